"""Percentiles from counts. Pure; owns the use of HdrHistogram.

Latencies are whole microseconds from 1 µs to one hour with three significant digits, as HdrHistogram
(http://hdrhistogram.org) keeps them; larger ones count as one hour, so that none is lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec
from hdrh.histogram import HdrHistogram

HIGHEST_US: Final = 3_600_000_000


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Whole microseconds. Each is the highest value that cannot be told from the one measured (three digits)."""

    p50: int
    p90: int
    p99: int
    p99_9: int
    max: int


def percentiles_us(counts: Iterable[tuple[int, int]]) -> Percentiles | None:
    """Percentiles of values given as (microseconds, how often), in any order and with repeats; None where there are none.

    A percentile is the value of the event at that place, to the nearest event, when all stand in order.
    """
    histogram: Any = HdrHistogram(1, HIGHEST_US, 3)
    for value_us, count in counts:
        histogram.record_value(min(max(value_us, 0), HIGHEST_US), count)
    if not histogram.get_total_count():
        return None
    at = histogram.get_percentile_to_value_dict([50.0, 90.0, 99.0, 99.9])
    p50, p90, p99, p99_9 = (int(at[percent]) for percent in (50.0, 90.0, 99.0, 99.9))
    return Percentiles(p50=p50, p90=p90, p99=p99, p99_9=p99_9, max=int(histogram.get_max_value()))
