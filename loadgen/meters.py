"""What the driver measures of itself, at next to no cost for an event: how late events go, and how long publish waits."""

from __future__ import annotations

import asyncio
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from typing import Final

from shardbus.metrics import BUCKETS, bucket_bounds_us, bucket_index

_EXACT_US: Final = 65_536  # below it each microsecond is counted apart: as many entries, and a loop in C


class LagCounts:
    """How long after their instants things happened, counted: whole microseconds up to 2,047, three digits beyond.

    Memory is bounded. The later a batch, the fewer steps it takes: very late instants are counted by the bucket, whose end
    is looked up among them, so that a generator which falls behind is not slowed down by saying so. (Buckets are wide
    there; for a few milliseconds, each of them would have one event, and cost ten times as much.)
    """

    def __init__(self) -> None:
        self._exact: Counter[int] = Counter()
        self._late: Counter[int] = Counter()  # by bucket

    def add(self, instants_ns: Sequence[int], now_ns: int) -> None:
        """Count things that happen now and should have happened at these instants, which never decrease."""
        at, total = 0, len(instants_ns)
        while at < total:
            late_us = (now_ns - instants_ns[at]) // 1000
            if late_us < _EXACT_US:
                rest = instants_ns[at:] if at else instants_ns
                self._exact.update([(now_ns - instant) // 1000 for instant in rest])
                return
            bucket = bucket_index(late_us)
            end = bisect_right(instants_ns, now_ns - bucket_bounds_us(bucket)[0] * 1000, at)
            self._late[bucket] += end - at
            at = end

    def counts(self) -> dict[int, int]:
        """Microseconds → how many; a bucket counts as its highest value, what was early as 0. At most 27,648 entries."""
        found: Counter[int] = Counter()
        for late_us, count in self._exact.items():
            found[bucket_bounds_us(bucket_index(late_us))[1]] += count
        for bucket, count in self._late.items():
            found[bucket_bounds_us(bucket)[1]] += count
        return dict(found)


class LagTotals:
    """What was counted in a whole run, by the bucket. 221 kB, however long it takes: the microseconds of `LagCounts` would
    become more, and be seen as memory that the client gains."""

    def __init__(self) -> None:
        self._counts = array("Q", bytes(8 * BUCKETS))

    def merge(self, counts: Mapping[int, int]) -> None:
        """Add what `LagCounts.counts` says."""
        totals = self._counts
        for late_us, count in counts.items():
            totals[bucket_index(late_us)] += count

    def counts(self) -> dict[int, int]:
        """As `LagCounts.counts`."""
        return {bucket_bounds_us(bucket)[1]: count for bucket, count in enumerate(self._counts) if count}


class Lags:
    """What `LagCounts` counts, told bit by bit and as a whole."""

    def __init__(self) -> None:
        self._new = LagCounts()
        self._told = LagTotals()

    def add(self, instants_ns: Sequence[int], now_ns: int) -> None:
        """See `LagCounts.add`."""
        self._new.add(instants_ns, now_ns)

    def take_new(self) -> dict[int, int]:
        """What came since the last call; as `LagCounts.counts`."""
        new = self._new.counts()
        self._told.merge(new)
        self._new = LagCounts()
        return new

    def counts(self) -> dict[int, int]:
        """All of it; as `LagCounts.counts`."""
        return merged([self._told.counts(), self._new.counts()])


def merged(parts: Sequence[Mapping[int, int]]) -> dict[int, int]:
    """Counts of several drivers as one."""
    total: Counter[int] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


class WaitMeter:
    """How long publish calls have waited for room.

    A call waited if the event loop had a turn meanwhile. Then the part of the time after that turn in which this thread did
    not run is the wait; the rest was the generator's own work, such as encoding and reading acks. A call that had no turn
    costs no look at a clock.
    """

    def __init__(self) -> None:
        self.waited_ns = 0
        self._began_ns = 0  # 0: no turn so far
        self._cpu_ns = 0

    async def measure(self, call: Awaitable[None]) -> None:
        """Await a publish call and add what it waited."""
        self._began_ns = 0
        mark = asyncio.get_running_loop().call_soon(self._turn)
        try:
            await call
        finally:
            if self._began_ns:
                ran_ns = time.thread_time_ns() - self._cpu_ns
                self.waited_ns += max(0, time.monotonic_ns() - self._began_ns - ran_ns)
            else:
                mark.cancel()

    def _turn(self) -> None:
        self._began_ns, self._cpu_ns = time.monotonic_ns(), time.thread_time_ns()
