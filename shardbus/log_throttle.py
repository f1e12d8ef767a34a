"""Log lines that may come thousands of times a second: the first of a kind, then one a minute, with how many there were."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from shardbus.clock import NowNs

_QUIET_NS: Final = 60_000_000_000
_KINDS_MAX: Final = 1024  # that are remembered; where there are more, all are forgotten, and told anew


class LogThrottle:
    """Decides which lines are logged, and counts the others. It logs none itself."""

    def __init__(self, now: NowNs) -> None:
        self._now = now
        self._told: dict[Hashable, tuple[int, int]] = {}  # by kind: when one was logged, how many since

    def more_of(self, kind: Hashable) -> int | None:
        """How many of a kind were not logged since the last that was; None: this one is not to be, either."""
        last_ns, more = self._told.get(kind, (0, 0))
        now_ns = self._now()
        if last_ns and now_ns - last_ns < _QUIET_NS:
            self._told[kind] = (last_ns, more + 1)
            return None
        if len(self._told) >= _KINDS_MAX:
            self._told.clear()
        self._told[kind] = (now_ns, 0)
        return more


def and_more(count: int) -> str:
    """The end of a line, for as many as were not logged; empty for none."""
    return f" (and {count:,} more of the kind since the last such line)" if count else ""
