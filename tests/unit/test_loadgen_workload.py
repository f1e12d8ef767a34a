"""The workload: which keys, in which numbers, how often; the same for the same seed."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.spec import KEYS_MAX, LoadError, LoadSpec, Payload, Skew
from loadgen.workload import Sizes, UniformKeys, UniqueKeys, WeightedKeys, Workload, weights_of, workload_of


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
    for number, (n, key, ordinal) in enumerate(deal(UniformKeys(keys, seed), 4000, sizes)):
        seen[key] += 1
        assert (n, ordinal) == (number, seen[key])


@pytest.mark.parametrize("keys", [1, 7, 1000, 40_000])
def test_ordinals_go_on_when_the_deck_is_dealt_again(keys: int) -> None:
    workload = UniformKeys(keys, 1)
    seen: Counter[str] = Counter()
    for _, key, ordinal in deal(workload, 200_000):
        seen[key] += 1
        assert ordinal == seen[key]
    assert len(seen) == keys


def test_uniform_keys_come_equally_often() -> None:
    keys = 1000
    counts = Counter(key for _, key, _ in deal(UniformKeys(keys, 1), 660_000))
    # 660,000 events are ten laps of 66 copies, so not only about equally often but exactly.
    assert set(counts.values()) == {660}


def test_uniform_keys_come_in_random_order() -> None:
    # Of two neighbours, one in `keys` should be equal; a cycle would have none, a sorted deck nearly all.
    events = deal(UniformKeys(100, 1), 65_600)
    pairs = sum(a[1] == b[1] for a, b in itertools.pairwise(events))
    expected, deviation = 656, 26  # binomial: n p, √(n p)
    assert abs(pairs - expected) < 5 * deviation


def test_each_quarter_of_a_deck_is_uniform_too() -> None:
    # χ² of 100 keys in 16,400 events has 99 degrees of freedom: mean 99, deviation √198 = 14.
    events = deal(UniformKeys(100, 1), 65_600)
    for quarter in range(4):
        counts = Counter(key for _, key, _ in events[quarter * 16_400 : (quarter + 1) * 16_400])
        chi_squared = sum((counts[f"k{key}"] - 164) ** 2 / 164 for key in range(100))
        assert chi_squared < 99 + 5 * 14


def test_unique_keys_never_come_twice() -> None:
    events = deal(UniqueKeys(), 10_000, (256, 1, 77))
    assert len({key for _, key, _ in events}) == 10_000
    assert {ordinal for _, _, ordinal in events} == {1}
    assert [n for n, _, _ in events] == list(range(10_000))


def test_the_same_seed_makes_the_same_events() -> None:
    one, same, other = (deal(UniformKeys(50, seed), 500) for seed in (3, 3, 4))
    assert one == same
    assert one != other


def test_the_specification_chooses_the_keys() -> None:
    assert isinstance(workload_of(LoadSpec(rate=None, keys=None)), UniqueKeys)
    assert isinstance(workload_of(LoadSpec(rate=None, keys=5)), UniformKeys)
    assert isinstance(workload_of(LoadSpec(rate=None, keys=5, skew=Skew(kind="zipf", by=1.0))), WeightedKeys)


def test_several_drivers_draw_from_the_same_keys_by_seeds_of_their_own() -> None:
    spec = LoadSpec(rate=None, keys=50, drivers=2)
    first, second = (deal(workload_of(spec, driver), 2000) for driver in (0, 1))
    assert {key for _, key, _ in first} == {key for _, key, _ in second}
    assert first != second


def test_unique_keys_of_several_drivers_are_unique_together() -> None:
    spec = LoadSpec(rate=None, keys=None, drivers=2)
    keys = [key for driver in (0, 1) for _, key, _ in deal(workload_of(spec, driver), 1000)]
    assert len(set(keys)) == 2000


# -- skewed keys

DRAWN = 200_000


def chi_squared(counts: Counter[str], weights: list[float]) -> tuple[float, int]:
    """χ² of drawn keys against their weights, and its degrees of freedom. Keys expected less than ten times count as one."""
    total = sum(weights)
    expected = [DRAWN * weight / total for weight in weights]
    classes = [(counts[f"k{key}"], mean) for key, mean in enumerate(expected) if mean >= 10]
    rare = [(counts[f"k{key}"], mean) for key, mean in enumerate(expected) if mean < 10]
    if rare:
        classes.append((sum(count for count, _ in rare), sum(mean for _, mean in rare)))
    return sum((count - mean) ** 2 / mean for count, mean in classes), len(classes) - 1


@pytest.mark.parametrize("keys", [10, 1000, 100_000])
@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.1, 2.0])
def test_zipf_keys_come_as_often_as_their_rank_says(keys: int, exponent: float) -> None:
    # With f degrees of freedom χ² has the mean f and the deviation √2f. The seed is fixed, so this is no matter of luck.
    weights = [rank**-exponent for rank in range(1, keys + 1)]
    drawn = Counter(key for _, key, _ in deal(WeightedKeys(weights_of(Skew(kind="zipf", by=exponent), keys), 7), DRAWN))
    found, freedom = chi_squared(drawn, weights)
    assert found < freedom + 3 * (2 * freedom) ** 0.5 + 3


def test_the_test_of_zipf_would_find_another_exponent() -> None:
    drawn = Counter(key for _, key, _ in deal(WeightedKeys(weights_of(Skew(kind="zipf", by=1.1), 1000), 7), DRAWN))
    found, freedom = chi_squared(drawn, [rank**-1.05 for rank in range(1, 1001)])
    assert found > freedom + 10 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_the_hot_key_gets_its_share_and_the_others_the_rest_evenly(share: float) -> None:
    drawn = Counter(key for _, key, _ in deal(WeightedKeys(weights_of(Skew(kind="hot", by=share), 100), 7), DRAWN))
    # Binomial: n p, √(n p q), and χ² of the 99 others.
    assert abs(drawn["k0"] - DRAWN * share) <= 3 * (DRAWN * share * (1 - share)) ** 0.5
    others = [drawn[f"k{key}"] for key in range(1, 100)]
    mean = sum(others) / 99
    if share < 1.0:
        assert sum((count - mean) ** 2 / mean for count in others) < 98 + 3 * 14


def test_skewed_keys_have_ordinals_and_numbers_as_all_have() -> None:
    seen: Counter[str] = Counter()
    for number, (n, key, ordinal) in enumerate(deal(WeightedKeys(weights_of(Skew(kind="zipf", by=1.2), 50), 3), 5000)):
        seen[key] += 1
        assert (n, ordinal) == (number, seen[key])


# -- sizes


def test_a_fixed_size_is_always_the_same() -> None:
    sizes = Sizes(Payload(low=33), 1)
    assert (sizes.fixed, sizes.largest, sizes.take(3)) == (33, 33, [33, 33, 33])


def test_uniform_sizes_come_equally_often_and_reach_both_ends() -> None:
    sizes = Sizes(Payload(kind="uniform", low=10, high=109), 1)
    counts = Counter(sizes.take(100_000))
    assert set(counts) == set(range(10, 110))
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 99 + 3 * 14


def test_lognormal_sizes_have_their_median_and_spread() -> None:
    drawn = sorted(Sizes(Payload(kind="lognormal", low=1000, sigma=0.5), 1).take(100_000))
    # Quantiles of the logarithm: the median, and one deviation to either side (15.87 %, 84.13 %).
    assert drawn[50_000] == pytest.approx(1000, rel=0.01)
    assert drawn[15_866] == pytest.approx(1000 * 2.718281828**-0.5, rel=0.01)
    assert drawn[84_134] == pytest.approx(1000 * 2.718281828**0.5, rel=0.01)


def test_no_size_is_above_a_megabyte() -> None:
    assert max(Sizes(Payload(kind="lognormal", low=900_000, sigma=2.0), 1).take(1000)) == 1_000_000


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
        ("drivers", 9, "the number of drivers"),
        ("timeout_s", 0.0, "the time for a reply"),
        ("workers", 0, "the number of workers"),
        ("flush_s", 0.0, "the time for the flush"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any, named: str) -> None:
    with pytest.raises(LoadError, match=f"{named} must be from"):
        LoadSpec(**{"rate": 1.0, field: value})
