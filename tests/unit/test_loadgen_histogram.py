"""Percentiles: from counts, with three digits, and none lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.collector import totals_of
from loadgen.histogram import HIGHEST_US, Percentiles, percentiles_us
from shardbus.metrics import Evidence, bucket_index

ROWS: list[tuple[str, list[tuple[int, int]], Percentiles | None]] = [
    ("no values", [], None),
    ("one value", [(7, 1)], Percentiles(p50=7, p90=7, p99=7, p99_9=7, max=7)),
    ("zero counts too", [(0, 5)], Percentiles(p50=0, p90=0, p99=0, p99_9=0, max=0)),
    ("a negative one counts as zero", [(-3, 1)], Percentiles(p50=0, p90=0, p99=0, p99_9=0, max=0)),
    (
        "one to a thousand",
        [(value, 1) for value in range(1, 1001)],
        Percentiles(p50=500, p90=900, p99=990, p99_9=999, max=1000),
    ),
    ("repeats add up", [(10, 50), (20, 40), (10, 5), (30, 5)], Percentiles(p50=10, p90=20, p99=30, p99_9=30, max=30)),
    ("the order does not matter", [(30, 1), (10, 98), (20, 1)], Percentiles(p50=10, p90=10, p99=20, p99_9=30, max=30)),
    (
        "one outlier in a thousand is beyond p99.9",
        [(5, 999), (900, 1)],
        Percentiles(p50=5, p90=5, p99=5, p99_9=5, max=900),
    ),
]


@pytest.mark.parametrize(("counts", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_percentiles(counts: list[tuple[int, int]], expected: Percentiles | None) -> None:
    assert percentiles_us(counts) == expected


def test_what_is_beyond_the_hour_counts_as_the_hour_and_is_not_lost() -> None:
    found = percentiles_us([(10, 1), (50 * HIGHEST_US, 2)])
    assert found is not None
    assert found.p50 == pytest.approx(HIGHEST_US, rel=0.001)
    assert found.max == found.p50


@given(st.lists(st.integers(0, HIGHEST_US), min_size=1, max_size=50))
def test_a_percentile_is_a_recorded_value_to_three_digits(values: list[int]) -> None:
    found = percentiles_us([(value, 1) for value in values])
    assert found is not None
    in_order = sorted(values)
    for percentile, share in ((found.p50, 0.5), (found.p90, 0.9), (found.p99, 0.99), (found.max, 1.0)):
        exact = in_order[max(1, int(share * len(values) + 0.5)) - 1]
        assert exact <= percentile <= exact * 1.001


def evidence(shard: int, latencies_us: list[int], **counts: int) -> Evidence:
    buckets = [(bucket_index(value), 1) for value in latencies_us]
    fields = {"distinct": 0, "repeats": 0, "announced": 0, "out_of_order": 0, "missing": 0, "unchecked": 0, "dead": 0}
    times = {"latency": buckets, "service": [(bucket, 1) for bucket, _ in buckets[:1]], "queue": buckets[1:]}
    return Evidence(shard=shard, publisher=bytes(16), samples=len(buckets), **times, **{**fields, **counts})


def test_the_shards_histograms_merge_as_if_there_were_one() -> None:
    values = [*range(1, 3000, 7), *range(100_000, 5_000_000, 77_777)]
    totals = totals_of([evidence(0, values[::2]), evidence(1, values[1::2])])
    assert totals.samples == len(values)
    assert totals.latency_us == percentiles_us([(value, 1) for value in values])
    assert totals.service_us == percentiles_us([(value, 1) for value in values[:2]])
    assert totals.queue_us == percentiles_us([(value, 1) for value in values[2:]])


def test_the_shards_counts_add_up() -> None:
    totals = totals_of([evidence(0, [], distinct=5, repeats=2, dead=1), evidence(3, [], distinct=7, announced=1)])
    assert (totals.distinct, totals.repeats, totals.announced, totals.dead) == (12, 2, 1, 1)


def test_a_publisher_that_nobody_has_seen_has_no_evidence() -> None:
    totals = totals_of([])
    assert (totals.distinct, totals.latency_us, totals.service_us, totals.queue_us) == (0, None, None, None)
