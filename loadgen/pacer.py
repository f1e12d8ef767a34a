"""When each event should go. Pure: no clock is read here, the time is an argument.

The schedule is fixed before the run and never slips: an event that could not go in time keeps its intended instant, so
that its latency includes the wait (the idea of wrk2, https://github.com/giltene/wrk2). The shape is vegeta's pacer
(https://github.com/tsenart/vegeta): what has been sent and what time it is → what is due.
"""

from __future__ import annotations

from typing import Final

import msgspec

_PER_SECOND: Final = 10**12  # nanoseconds, times thousandths of an event


class Due(msgspec.Struct, frozen=True):
    """How many events are to be sent now, and how long until the next one is due (0 where some are due)."""

    count: int
    wait_ns: int


class ConstantRate(msgspec.Struct, frozen=True, kw_only=True):
    """Event n (from 0) is due n / rate seconds after `start_ns`.

    In integers, so that no error adds up over a long run. Other arrivals are other types with the same three methods.
    """

    start_ns: int
    rate_milli: int  # thousandths of an event per second

    @classmethod
    def of(cls, start_ns: int, rate: float) -> ConstantRate:
        """A schedule of `rate` events per second, to the nearest thousandth."""
        rate_milli = round(rate * 1000)
        if rate_milli < 1:
            raise ValueError(f"a rate of at least 0.001 events per second is needed, not {rate!r}")
        return cls(start_ns=start_ns, rate_milli=rate_milli)

    def due(self, sent: int, now_ns: int) -> Due:
        """What is due at `now_ns` when `sent` events have been sent."""
        count = self.scheduled(now_ns - self.start_ns) - sent
        if count > 0:
            return Due(count, 0)
        return Due(0, self.start_ns + sent * _PER_SECOND // self.rate_milli - now_ns)

    def intended_ns(self, first: int, count: int) -> list[int]:
        """The instants at which the events `first` … `first + count - 1` should go; never decreasing."""
        start_ns, rate_milli = self.start_ns, self.rate_milli
        return [start_ns + n * _PER_SECOND // rate_milli for n in range(first, first + count)]

    def scheduled(self, elapsed_ns: int) -> int:
        """How many events are due in the first `elapsed_ns` nanoseconds, both ends included.

        Event n is due at ⌊n·10¹²/rate_milli⌋ ns, which is at most `elapsed_ns` exactly if
        n·10¹² < (elapsed_ns + 1)·rate_milli.
        """
        if elapsed_ns < 0:
            return 0
        return ((elapsed_ns + 1) * self.rate_milli - 1) // _PER_SECOND + 1
