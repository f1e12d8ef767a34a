"""The workload: which keys, in which numbers, how often; the same for the same seed."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.spec import KEYS_MAX, LoadError, LoadSpec
from loadgen.workload import UniformKeys, UniqueKeys, Workload, workload_of


def deal(workload: Workload, count: int, sizes: tuple[int, ...] = (256,)) -> list[tuple[int, str, int]]:
    """The next `count` events as (number, key, ordinal), taken in pieces of the given sizes in turn."""
    events: list[tuple[int, str, int]] = []
    turn = 0
    while len(events) < count:
        stretch = workload.take(min(sizes[turn % len(sizes)], count - len(events)))
        assert 1 <= len(stretch) == len(stretch.ordinals)
        numbers = range(stretch.first, stretch.first + len(stretch))
        events += zip(numbers, stretch.keys, stretch.ordinals, strict=True)
        turn += 1
    return events


@given(
    keys=st.integers(1, 5000),
    seed=st.integers(0, 9),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=5).map(tuple),
)
def test_events_are_numbered_from_zero_and_each_keys_ordinals_from_one(
    keys: int, seed: int, sizes: tuple[int, ...]
) -> None:
    seen: Counter[str] = Counter()
    for number, (n, key, ordinal) in enumerate(deal(UniformKeys(keys, 0, seed), 4000, sizes)):
        seen[key] += 1
        assert (n, ordinal) == (number, seen[key])


@pytest.mark.parametrize("keys", [1, 7, 1000, 40_000])
def test_ordinals_go_on_when_the_deck_is_dealt_again(keys: int) -> None:
    workload = UniformKeys(keys, 0, 1)
    seen: Counter[str] = Counter()
    for _, key, ordinal in deal(workload, 200_000):
        seen[key] += 1
        assert ordinal == seen[key]
    assert len(seen) == keys


def test_uniform_keys_come_equally_often() -> None:
    keys = 1000
    counts = Counter(key for _, key, _ in deal(UniformKeys(keys, 0, 1), 660_000))
    # 660,000 events are ten laps of 66 copies, so not only about equally often but exactly.
    assert set(counts.values()) == {660}


def test_uniform_keys_come_in_random_order() -> None:
    # Of two neighbours, one in `keys` should be equal; a cycle would have none, a sorted deck nearly all.
    events = deal(UniformKeys(100, 0, 1), 65_600)
    pairs = sum(a[1] == b[1] for a, b in itertools.pairwise(events))
    expected, deviation = 656, 26  # binomial: n p, √(n p)
    assert abs(pairs - expected) < 5 * deviation


def test_each_quarter_of_a_deck_is_uniform_too() -> None:
    # χ² of 100 keys in 16,400 events has 99 degrees of freedom: mean 99, deviation √198 = 14.
    events = deal(UniformKeys(100, 0, 1), 65_600)
    for quarter in range(4):
        counts = Counter(key for _, key, _ in events[quarter * 16_400 : (quarter + 1) * 16_400])
        chi_squared = sum((counts[f"k{key}"] - 164) ** 2 / 164 for key in range(100))
        assert chi_squared < 99 + 5 * 14


def test_unique_keys_never_come_twice() -> None:
    events = deal(UniqueKeys(0, 1), 10_000, (256, 1, 77))
    assert len({key for _, key, _ in events}) == 10_000
    assert {ordinal for _, _, ordinal in events} == {1}
    assert [n for n, _, _ in events] == list(range(10_000))


def test_the_same_seed_makes_the_same_events() -> None:
    one, same, other = (UniformKeys(50, 8, seed) for seed in (3, 3, 4))
    assert (one.payload, deal(one, 500)) == (same.payload, deal(same, 500))
    assert (one.payload, deal(one, 500)) != (other.payload, deal(other, 500))


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_the_payload_has_the_size_that_was_asked_for(size: int) -> None:
    assert len(UniformKeys(1, size, 1).payload) == len(UniqueKeys(size, 1).payload) == size


def test_the_specification_chooses_the_keys() -> None:
    assert isinstance(workload_of(LoadSpec(rate=None, keys=None)), UniqueKeys)
    assert isinstance(workload_of(LoadSpec(rate=None, keys=5)), UniformKeys)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("rate", 0.0, "the rate"),
        ("rate", float("nan"), "the rate"),
        ("rate", -5.0, "the rate"),
        ("duration_s", 0.0, "the duration"),
        ("warmup_s", -1.0, "the warm-up"),
        ("keys", 0, "the number of keys"),
        ("keys", KEYS_MAX + 1, "the number of keys"),
        ("payload_bytes", -1, "the payload"),
        ("workers", 0, "the number of workers"),
        ("flush_s", 0.0, "the time for the flush"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any, named: str) -> None:
    with pytest.raises(LoadError, match=f"{named} must be from"):
        LoadSpec(**{"rate": 1.0, field: value})
