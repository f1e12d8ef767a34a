"""Log lines that may come thousands of times a second: the first of a kind, then once a minute how many more there were."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Final

from shardbus.clock import NowNs

_QUIET_NS: Final = 60_000_000_000
_KINDS_MAX: Final = 1024  # that are remembered; where there are more, all are forgotten, and told anew


class _Told:
    """A line that was logged, and how many of its kind were not, since an instant."""

    __slots__ = ("line", "more", "since_ns")

    def __init__(self, line: str, since_ns: int) -> None:
        self.line = line
        self.since_ns = since_ns
        self.more = 0


class LogThrottle:
    """Logs warnings: each kind's first, and what came after it as a number. `tick` about once a second, and then `close`."""

    def __init__(self, now: NowNs, log: logging.Logger) -> None:
        self._now = now
        self._log = log
        self._told: dict[Hashable, _Told] = {}  # by kind

    def warning(self, kind: Hashable, line: Callable[[], str]) -> None:
        """Log a line, or count it where one of its kind was logged less than a minute ago."""
        told = self._told.get(kind)
        if told is not None:
            told.more += 1
            return
        if len(self._told) >= _KINDS_MAX:
            self.close()
        told = self._told[kind] = _Told(line(), self._now())
        self._log.warning("%s", told.line)

    def tick(self) -> None:
        """Tell what was counted for a minute, and forget kinds of which none has come in that time."""
        now_ns = self._now()
        for kind, told in list(self._told.items()):
            if now_ns - told.since_ns < _QUIET_NS:
                continue
            if told.more:
                self._tell_more(told)
                told.since_ns, told.more = now_ns, 0
            else:
                del self._told[kind]

    def close(self) -> None:
        """Tell all that was counted, and forget it."""
        for told in self._told.values():
            if told.more:
                self._tell_more(told)
        self._told.clear()

    def _tell_more(self, told: _Told) -> None:
        self._log.warning("%s (and %s more of the kind since the last such line)", told.line, f"{told.more:,}")
