"""Which lanes are read back from the store together: many by one read, because each read is a transaction of its own.

Pure bookkeeping: the writer asks for the next ones, and hands back those that the store had no room for in its answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from shardbus.store import LaneHead, WaitingEvent

_LANES_MAX: Final = 128  # of one read, so that what is written and asked meanwhile waits for milliseconds only
_ROWS_MAX: Final = 1024  # likewise


class LaneRead(NamedTuple):
    """Where a lane's waiting events are to be read from, once the row at `upto` is written, and who takes them."""

    head: LaneHead
    upto: int
    then: Callable[[list[WaitingEvent]], None]


class LaneReads:
    """Lanes that want to be read back, in the order in which they asked. Bounded by whoever asks: one read a lane."""

    def __init__(self) -> None:
        self._reads: deque[LaneRead] = deque()

    def __bool__(self) -> bool:
        return bool(self._reads)

    def add(self, read: LaneRead) -> None:
        """Put one behind the others."""
        self._reads.append(read)

    def take(self, committed: int) -> list[LaneRead]:
        """The next ones for one read, of those whose rows are in up to position `committed`; the others go to the end."""
        taken: list[LaneRead] = []
        rows = 0
        for _ in range(len(self._reads)):
            if len(taken) == _LANES_MAX or rows >= _ROWS_MAX:
                break
            read = self._reads.popleft()
            if read.upto > committed:
                self._reads.append(read)
                continue
            taken.append(read)
            rows += read.head.limit
        return taken

    def give_back(self, reads: Sequence[LaneRead]) -> None:
        """They were not answered: they come first the next time."""
        self._reads.extendleft(reversed(reads))
