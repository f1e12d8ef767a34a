"""How log lines look: text for people or JSON for machines, the shard in every line."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final

LEVELS: Final = ("debug", "info", "warning", "error")
FORMATS: Final = ("text", "json")


class _Formatter(logging.Formatter):
    def __init__(self, shard: int | None, *, as_json: bool) -> None:
        super().__init__()
        self._shard = shard
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        message = record.getMessage()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if not self._as_json:
            who = "supervisor" if self._shard is None else f"shard {self._shard}"
            line = f"{when} {record.levelname.lower():7} {who}: {message}"
            return f"{line}\n{trace}" if trace else line
        fields = {
            "time": when,
            "level": record.levelname.lower(),
            "logger": record.name,
            "shard": self._shard,
            "pid": record.process,
            "message": message,
        }
        if trace:
            fields["traceback"] = trace
        return json.dumps(fields, ensure_ascii=False)


def configure_logging(level: str, form: str, shard: int | None) -> None:
    """Send this process's log lines to standard error. `shard` None: the supervisor."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(shard, as_json=form == "json"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(max(logging.INFO, root.level))
