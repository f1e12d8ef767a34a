"""Sets of ranges, against plain sets of numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shardbus.wire.ranges import RangeSet

TOP = 60

numbers = st.integers(min_value=0, max_value=TOP)
spans = st.tuples(numbers, numbers)  # also empty and reversed ones


def filled(pairs: list[tuple[int, int]]) -> tuple[RangeSet, set[int]]:
    ranges, plain = RangeSet(), set[int]()
    for start, end in pairs:
        ranges.add(start, end)
        plain |= set(range(start, end))
    return ranges, plain


def spread(pairs: list[tuple[int, int]]) -> list[int]:
    return [number for start, end in pairs for number in range(start, end)]


class AgainstAPlainSet(RuleBasedStateMachine):
    """Does the same to both, in any order, and compares after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = RangeSet()
        self.plain: set[int] = set()

    @rule(span=spans)
    def add(self, span: tuple[int, int]) -> None:
        fresh = set(range(*span)) - self.plain
        assert self.ranges.add(*span) == len(fresh)
        self.plain |= fresh

    @rule(start=numbers)
    def take_prefix(self, start: int) -> None:
        # As the sessions use it: everything below `start` goes, and what follows it without a gap.
        end = start
        while end in self.plain:
            end += 1
        assert self.ranges.take_prefix(start) == end
        self.plain = {number for number in self.plain if number >= end}

    @rule(span=spans)
    def gaps(self, span: tuple[int, int]) -> None:
        assert spread(self.ranges.gaps(*span)) == [number for number in range(*span) if number not in self.plain]

    @rule(span=spans)
    def within(self, span: tuple[int, int]) -> None:
        assert spread(self.ranges.within(*span)) == [number for number in range(*span) if number in self.plain]

    @rule()
    def clear(self) -> None:
        self.ranges.clear()
        self.plain.clear()

    @invariant()
    def holds_the_same_numbers(self) -> None:
        assert spread(list(self.ranges)) == sorted(self.plain)
        assert [number for number in range(TOP + 1) if number in self.ranges] == sorted(self.plain)

    @invariant()
    def keeps_its_ranges_sorted_apart_and_not_empty(self) -> None:
        flat = self.ranges.flat()
        assert all(low < high for low, high in pairwise(flat))
        assert len(flat) == 2 * len(self.ranges)


TestAgainstAPlainSet = AgainstAPlainSet.TestCase
TestAgainstAPlainSet.settings = settings(max_examples=100, stateful_step_count=25)


@given(st.lists(spans, max_size=20), st.randoms(use_true_random=False))
def test_the_order_of_additions_makes_no_difference(pairs: list[tuple[int, int]], chance):
    shuffled = list(pairs)
    chance.shuffle(shuffled)
    assert filled(pairs)[0].flat() == filled(shuffled)[0].flat()


@given(st.lists(spans, max_size=20), spans)
def test_gaps_and_what_lies_within_make_up_a_span(pairs: list[tuple[int, int]], span: tuple[int, int]):
    ranges, _ = filled(pairs)
    assert sorted(spread(ranges.gaps(*span)) + spread(ranges.within(*span))) == list(range(*span))


@given(st.lists(spans, max_size=20), spans)
def test_asking_changes_nothing(pairs: list[tuple[int, int]], span: tuple[int, int]):
    ranges, _ = filled(pairs)
    before = ranges.flat()
    ranges.gaps(*span)
    ranges.within(*span)
    assert ranges.flat() == before


@given(st.lists(spans, max_size=20))
def test_adding_twice_adds_nothing(pairs: list[tuple[int, int]]):
    ranges, plain = filled(pairs)
    assert [ranges.add(*pair) for pair in pairs] == [0] * len(pairs)
    assert spread(list(ranges)) == sorted(plain)


@given(st.integers(min_value=0, max_value=2**62))
def test_a_set_is_as_large_as_its_ranges_whatever_they_span(size: int):
    ranges = RangeSet()
    assert ranges.add(0, size) == size
    assert len(ranges) == (size > 0)
