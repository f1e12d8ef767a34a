"""An open-loop load generator for shardbus that tells the truth, or says why it cannot.

It sends events on a schedule that never slips, measures each from the instant at which it should have gone to the end of
its handler, tells the handler's own time from the wait before it, and checks from the shards' own evidence that none was
lost, repeated unannounced or overtaken by a later one of its key. A run in which the generator or the bus fell behind says
so, and quotes no latency.
"""

from __future__ import annotations

import importlib

# As in shardbus: a name is imported when it is first asked for, and `__init__.pyi` tells type checkers.
_HOMES = {
    "LoadError": "loadgen.spec",
    "LoadSpec": "loadgen.spec",
    "Report": "loadgen.report",
    "Verdict": "loadgen.report",
    "run": "loadgen.runner",
    "run_async": "loadgen.runner",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
