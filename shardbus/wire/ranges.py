"""Sets of sequence numbers as sorted, disjoint, half-open ranges. Pure; both ends of a session count with them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class RangeSet:
    """A set of integers as ranges. Its size is the number of ranges, whatever they span."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        """The number of ranges."""
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._starts, number) - 1
        return at >= 0 and number < self._ends[at]

    def add(self, start: int, end: int) -> int:
        """Add `[start, end)`; return how many numbers were not in the set before."""
        if start >= end:
            return 0
        starts, ends = self._starts, self._ends
        low = bisect_left(ends, start)  # the first range that touches or follows
        high = bisect_right(starts, end)  # one past the last range that touches or precedes
        if low == high:
            starts.insert(low, start)
            ends.insert(low, end)
            return end - start
        known = 0
        for at in range(low, high):
            overlap = min(ends[at], end) - max(starts[at], start)
            if overlap > 0:
                known += overlap
        starts[low:high] = [min(start, starts[low])]
        ends[low:high] = [max(end, ends[high - 1])]
        return end - start - known

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges of `[start, end)` that are not in the set."""
        missing: list[tuple[int, int]] = []
        at = bisect_right(self._ends, start)
        while start < end:
            if at == len(self._starts) or self._starts[at] >= end:
                missing.append((start, end))
                break
            if self._starts[at] > start:
                missing.append((start, self._starts[at]))
            start = self._ends[at]
            at += 1
        return missing

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges of the set that lie in `[start, end)`, cut to it."""
        found: list[tuple[int, int]] = []
        for at in range(bisect_right(self._ends, start), len(self._starts)):
            if self._starts[at] >= end:
                break
            found.append((max(start, self._starts[at]), min(end, self._ends[at])))
        return found

    def take_prefix(self, start: int) -> int:
        """Remove the range that begins at or before `start`, if one does, and return its end; else return `start`."""
        end = start
        while self._starts and self._starts[0] <= end:
            end = max(end, self._ends[0])
            del self._starts[0], self._ends[0]
        return end

    def flat(self) -> list[int]:
        """`[start, end, start, end, …]`."""
        return [number for pair in self for number in pair]

    def clear(self) -> None:
        """Forget everything."""
        self._starts.clear()
        self._ends.clear()
