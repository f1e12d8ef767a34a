"""When each event should go. Pure: no clock is read here, time and chance are arguments.

The schedule is fixed before the run and never slips: an event that could not go in time keeps its intended instant, so
that its latency includes the wait (the idea of wrk2, https://github.com/giltene/wrk2). The shape is vegeta's pacer
(https://github.com/tsenart/vegeta): what has been sent and what time it is → what is due.

A `Profile` says how many events are due by when. `Evenly` and `Poisson` place the events on it, `Recorded` has instants
of its own. Positions on a profile are counted in `EVENT`s, so that everything is an integer and no error adds up.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise, repeat
from operator import floordiv
from typing import Final, Protocol

import msgspec

EVENT: Final = 10**12  # one event on a profile: nanoseconds, times thousandths of an event per second
_NS: Final = 1_000_000_000
_RAMP_STEP_NS: Final = 10_000_000  # a ramp is a staircase of such steps …
_RAMP_STEPS_MAX: Final = 1000  # … or of so many: each has the ramp's count of events, so none is gained or lost
_DRAWN: Final = 1024  # random arrivals are drawn so many at a time
_DRAWN_AHEAD_MAX: Final = 1_000_000  # of a sender that is hopelessly late, its debt is only estimated
_NEVER_NS: Final = 3600 * _NS  # the wait for an event that will not come


class Due(msgspec.Struct, frozen=True):
    """How many events are to be sent now, and how long until the next one is due (0 where some are due)."""

    count: int
    wait_ns: int


class Arrivals(Protocol):
    """A schedule. Events have numbers from 0; `start_ns` is when the schedule begins."""

    start_ns: int

    def due(self, sent: int, now_ns: int) -> Due:
        """What is due at `now_ns` when `sent` events have been sent; where nothing ever is again, a long wait."""

    def intended_ns(self, first: int, count: int) -> list[int]:
        """The instants at which the events `first` … `first + count - 1` should go; never decreasing.

        They are due; and no event before `first` is asked for again.
        """

    def scheduled(self, elapsed_ns: int) -> int:
        """How many events are due in the first `elapsed_ns` nanoseconds, both ends included."""


class Stage(msgspec.Struct, frozen=True):
    """Some seconds of load at a rate in events per second, which rises or falls evenly where `to` is another one."""

    rate: float
    seconds: float
    to: float | None = None


class Profile:
    """Stages, one after another: how many events are due by when.

    Constant stretches of a rate in thousandths of an event per second. Event n is due at ⌊n·10¹²/rate⌋ ns of a stretch that
    begins with it, and at the first whole nanosecond after any other beginning.
    """

    def __init__(self, stages: Iterable[Stage]) -> None:
        self._starts_ns = [0]
        self._positions = [0]
        self._rates: list[int] = []
        for stage in stages:
            for rate_milli, length_ns in _stretches(stage):
                self._rates.append(rate_milli)
                self._starts_ns.append(self._starts_ns[-1] + length_ns)
                self._positions.append(self._positions[-1] + rate_milli * length_ns)
        self.length_ns = self._starts_ns[-1]
        self.end = self._positions[-1]
        """The position of the profile's end: no event there or beyond is ever due."""

    def position(self, elapsed_ns: int) -> int:
        """The lowest position that is not yet due after so many nanoseconds."""
        if elapsed_ns < 0:
            return 0
        at = bisect_right(self._starts_ns, elapsed_ns) - 1
        if at == len(self._rates):
            return self.end
        return min(self._positions[at] + (elapsed_ns + 1 - self._starts_ns[at]) * self._rates[at], self._positions[at + 1])

    def instants_ns(self, positions: Sequence[int], start_ns: int) -> list[int]:
        """When each of these positions, which never decrease and lie before the end, is due."""
        found: list[int] = []
        done = 0
        while done < len(positions):
            at = bisect_right(self._positions, positions[done]) - 1
            begin, rate = self._positions[at], self._rates[at]
            shift = start_ns + self._starts_ns[at]
            until = len(positions)
            if positions[-1] >= self._positions[at + 1]:
                until = bisect_right(positions, self._positions[at + 1] - 1, done)
            # ⌊(p - begin) / rate⌋ + shift, as one division, so that it runs in C: half the cost of a loop.
            offset = begin - shift * rate
            part = positions[done:until]
            if not isinstance(part, range):
                part = [position - offset for position in part]
            elif part.step % rate == 0:  # a whole number of nanoseconds between any two
                first = (part.start - offset) // rate
                step = part.step // rate
                found += range(first, first + len(part) * step, step)
                done = until
                continue
            else:
                part = range(part.start - offset, part.stop - offset, part.step)
            found += map(floordiv, part, repeat(rate))
            done = until
        return found


def _stretches(stage: Stage) -> list[tuple[int, int]]:
    """A stage as (thousandths of an event per second, nanoseconds)."""
    length_ns = round(stage.seconds * _NS)
    first = _milli(stage.rate)
    last = first if stage.to is None else _milli(stage.to)
    if first == last:
        return [(first, length_ns)]
    steps = max(1, min(_RAMP_STEPS_MAX, length_ns // _RAMP_STEP_NS))
    edges = [length_ns * step // steps for step in range(steps + 1)]
    return [
        (max(1, first + (last - first) * (2 * step + 1) // (2 * steps)), end - begin)
        for step, (begin, end) in enumerate(pairwise(edges))
    ]


def _milli(rate: float) -> int:
    rate_milli = round(rate * 1000)
    if rate_milli < 1:
        raise ValueError(f"a rate of at least 0.001 events per second is needed, not {rate!r}")
    return rate_milli


class Evenly:
    """Each event in its place: at a constant rate, all intervals are equal.

    Of several drivers that share a load, number `driver` of `drivers` sends every so-manieth event.
    """

    def __init__(self, start_ns: int, profile: Profile, *, driver: int = 0, drivers: int = 1) -> None:
        self.start_ns = start_ns
        self._profile = profile
        self._first = driver * EVENT
        self._step = drivers * EVENT

    def due(self, sent: int, now_ns: int) -> Due:
        """See `Arrivals.due`."""
        count = self.scheduled(now_ns - self.start_ns) - sent
        if count > 0:
            return Due(count, 0)
        position = self._first + sent * self._step
        if position >= self._profile.end:
            return Due(0, _NEVER_NS)
        return Due(0, self._profile.instants_ns((position,), self.start_ns)[0] - now_ns)

    def intended_ns(self, first: int, count: int) -> list[int]:
        """See `Arrivals.intended_ns`; here any events before the profile's end may be asked for."""
        begin, step = self._first + first * self._step, self._step
        return self._profile.instants_ns(range(begin, begin + count * step, step), self.start_ns)

    def scheduled(self, elapsed_ns: int) -> int:
        """See `Arrivals.scheduled`."""
        return max(0, -((self._first - self._profile.position(elapsed_ns)) // self._step))


class Poisson:
    """Arrivals that do not know of each other: random, with the profile's rate as their mean.

    Gaps of a unit Poisson process, drawn from `chance`, are laid along the profile (time change), so its ramps hold too. Of
    several drivers, each has a process of its own with its part of the rate; together they are one of the whole rate.
    """

    def __init__(self, start_ns: int, profile: Profile, chance: random.Random, *, drivers: int = 1) -> None:
        self.start_ns = start_ns
        self._profile = profile
        self._random = chance.random
        self._mean = drivers * EVENT
        self._base = 0  # number of the first event whose instant is kept
        self._instants: list[int] = []
        self._last = 0  # position of the last one drawn
        self._over = False

    def due(self, sent: int, now_ns: int) -> Due:
        """See `Arrivals.due`; of events that are long overdue, some at a time."""
        self._forget(sent)
        while not self._over and not self._instants:
            self._draw()
        if not self._instants:
            return Due(0, _NEVER_NS)
        at = sent - self._base
        count = bisect_right(self._instants, now_ns) - at
        return Due(count, 0) if count > 0 else Due(0, self._instants[at] - now_ns)

    def intended_ns(self, first: int, count: int) -> list[int]:
        """See `Arrivals.intended_ns`."""
        begin = first - self._base
        return self._instants[begin : begin + count]

    def scheduled(self, elapsed_ns: int) -> int:
        """See `Arrivals.scheduled`. Draws up to that instant, or, where that would be over a million, says the mean."""
        limit_ns = self.start_ns + elapsed_ns
        ahead = (self._profile.position(elapsed_ns) - self._last) // self._mean
        if ahead > _DRAWN_AHEAD_MAX:
            return self._base + len(self._instants) + ahead
        while not self._over and (not self._instants or self._instants[-1] <= limit_ns):
            self._draw()
        return self._base + bisect_right(self._instants, limit_ns)

    def _forget(self, sent: int) -> None:
        gone = sent - self._base
        if gone >= _DRAWN or gone == len(self._instants):
            del self._instants[:gone]
            self._base = sent

    def _draw(self) -> None:
        position, mean, log, draw = self._last, self._mean, math.log, self._random
        positions = []
        for _ in range(_DRAWN):
            position -= int(mean * log(1.0 - draw()))
            positions.append(position)
        self._last = position
        if position >= self._profile.end:
            self._over = True
            del positions[bisect_right(positions, self._profile.end - 1) :]
        self._instants += self._profile.instants_ns(positions, self.start_ns)


class Recorded:
    """Arrivals at instants that were recorded: `offsets_ns` from the start, never decreasing."""

    def __init__(self, start_ns: int, offsets_ns: Sequence[int]) -> None:
        self.start_ns = start_ns
        self._offsets_ns = offsets_ns

    def due(self, sent: int, now_ns: int) -> Due:
        """See `Arrivals.due`."""
        count = self.scheduled(now_ns - self.start_ns) - sent
        if count > 0:
            return Due(count, 0)
        if sent >= len(self._offsets_ns):
            return Due(0, _NEVER_NS)
        return Due(0, self.start_ns + self._offsets_ns[sent] - now_ns)

    def intended_ns(self, first: int, count: int) -> list[int]:
        """See `Arrivals.intended_ns`; any events may be asked for."""
        return [self.start_ns + offset for offset in self._offsets_ns[first : first + count]]

    def scheduled(self, elapsed_ns: int) -> int:
        """See `Arrivals.scheduled`."""
        return bisect_right(self._offsets_ns, elapsed_ns)
