"""Histograms of times: mergeable, with percentiles. Pure; owns the use of HdrHistogram.

Times are whole microseconds from 1 µs to one hour with three significant digits, as HdrHistogram
(http://hdrhistogram.org) keeps them; larger ones count as one hour, so that none is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from hdrh.histogram import HdrHistogram

HIGHEST_US: Final = 3_600_000_000
_US_PER_MS: Final = 1000.0
_TICKS: Final = 5  # of a distribution, for each halving of what is left: what the plotter is used to


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Whole microseconds. Each is the highest value that cannot be told from the one measured (three digits)."""

    p50: int
    p90: int
    p99: int
    p99_9: int
    max: int


class Histogram:
    """Times in microseconds, counted. 190 kB, whatever it counts."""

    def __init__(self, counts: Iterable[tuple[int, int]] = ()) -> None:
        self._hdr: Any = HdrHistogram(1, HIGHEST_US, 3)
        self.add(counts)

    def add(self, counts: Iterable[tuple[int, int]]) -> None:
        """Count values given as (microseconds, how often), in any order and with repeats."""
        record = self._hdr.record_value
        for value_us, count in counts:
            record(min(max(value_us, 0), HIGHEST_US), count)

    def clear(self) -> None:
        """Begin anew."""
        self._hdr.reset()

    def merge(self, other: Histogram) -> None:
        """Count what another one has counted, as if it had been counted here."""
        self._hdr.add(other._hdr)

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self._hdr.get_total_count())

    def percentiles(self) -> Percentiles | None:
        """Percentiles; None where nothing was counted.

        A percentile is the value of the event at that place, to the nearest event, when all stand in order.
        """
        if not self.total:
            return None
        at = self._hdr.get_percentile_to_value_dict([50.0, 90.0, 99.0, 99.9])
        p50, p90, p99, p99_9 = (int(at[percent]) for percent in (50.0, 90.0, 99.0, 99.9))
        return Percentiles(p50=p50, p90=p90, p99=p99, p99_9=p99_9, max=int(self._hdr.get_max_value()))

    def hgrm(self) -> str:
        """The percentile distribution in milliseconds, as the plotter at http://hdrhistogram.github.io reads it."""
        # HdrHistogram's own writer leaves the deviation unscaled.
        hdr = self._hdr
        lines = [f"{'Value':>12} {'Percentile':>14} {'TotalCount':>10} {'1/(1-Percentile)':>14}", ""]
        for at in hdr.get_percentile_iterator(_TICKS):
            share = at.percentile_level_iterated_to / 100
            tail = f" {1 / (1 - share):14.2f}" if share < 1 else ""
            value = at.value_iterated_to / _US_PER_MS
            lines.append(f"{value:12.3f} {share:2.12f} {at.total_count_to_this_value:10d}{tail}")
        mean, deviation = hdr.get_mean_value() / _US_PER_MS, hdr.get_stddev() / _US_PER_MS
        lines += [
            f"#[Mean    = {mean:12.3f}, StdDeviation   = {deviation:12.3f}]",
            f"#[Max     = {hdr.get_max_value() / _US_PER_MS:12.3f}, TotalCount     = {self.total:12d}]",
            f"#[Buckets = {hdr.bucket_count:12d}, SubBuckets     = {hdr.sub_bucket_count:12d}]",
        ]
        return "\n".join(lines) + "\n"


def percentiles_us(counts: Iterable[tuple[int, int]]) -> Percentiles | None:
    """Percentiles of values given as (microseconds, how often); None where there are none."""
    return Histogram(counts).percentiles()


def difference(later: Mapping[int, int], earlier: Mapping[int, int]) -> list[tuple[int, int]]:
    """What a growing table of counts has gained. One that is smaller was begun anew, so all in it is gained."""
    gained = [(value, count - earlier.get(value, 0)) for value, count in later.items()]
    if any(count < 0 for _, count in gained):
        return list(later.items())
    return [(value, count) for value, count in gained if count]
