"""What a shard can prove: a book over a buffer, as the worker writes it and the supervisor reads it."""

from __future__ import annotations

import itertools

import pytest

from shardbus.metrics import BUCKETS, Book, book_bytes, bucket_bounds_us, bucket_index

TICKS = itertools.count(1)
PUBLISHER = b"p" * 16
OTHER = b"q" * 16
SIZES = {"keys": 8, "publishers": 2}


@pytest.fixture
def buffer() -> memoryview:
    return memoryview(bytearray(book_bytes(**SIZES)))


def test_ordinals_in_order_are_distinct_and_nothing_else(buffer: memoryview):
    book = Book(buffer, **SIZES)
    mine = book.publisher(PUBLISHER, next(TICKS))
    for ordinal in (1, 2, 3):
        mine.note("a", ordinal, 1)
    mine.note(b"a", 1, 1)
    found = book.evidence(0, PUBLISHER)
    assert found is not None
    assert (found.distinct, found.repeats, found.out_of_order, found.missing) == (4, 0, 0, 0)


@pytest.mark.parametrize(
    ("noted", "distinct", "repeats", "announced", "out_of_order", "missing"),
    [
        pytest.param([(1, 1), (2, 1), (2, 1)], 2, 1, 0, 0, 0, id="one came twice, unannounced"),
        pytest.param([(1, 1), (2, 1), (2, 2)], 2, 1, 1, 0, 0, id="one came twice, and said so"),
        pytest.param([(1, 1), (3, 1)], 2, 0, 0, 0, 1, id="one never came"),
        pytest.param([(1, 1), (3, 1), (2, 1)], 3, 0, 0, 1, 0, id="two came the wrong way round"),
        pytest.param([(2, 1), (1, 1), (3, 1)], 3, 0, 0, 1, 0, id="the first two came the wrong way round"),
    ],
)
def test_what_is_not_in_order_is_told_apart(
    buffer: memoryview,
    noted: list[tuple[int, int]],
    distinct: int,
    repeats: int,
    announced: int,
    out_of_order: int,
    missing: int,
):
    book = Book(buffer, **SIZES)
    for ordinal, attempt in noted:
        book.publisher(PUBLISHER, next(TICKS)).note("a", ordinal, attempt)
    found = book.evidence(0, PUBLISHER)
    assert found is not None
    assert (found.distinct, found.repeats, found.announced) == (distinct, repeats, announced)
    assert (found.out_of_order, found.missing) == (out_of_order, missing)


def test_a_successor_goes_on_where_its_predecessor_was_killed(buffer: memoryview):
    Book(buffer, **SIZES).publisher(PUBLISHER, next(TICKS)).note("a", 1, 1)
    book = Book(buffer, **SIZES)
    book.publisher(PUBLISHER, next(TICKS)).note("a", 1, 2)
    book.publisher(PUBLISHER, next(TICKS)).note("a", 2, 2)
    found = book.evidence(0, PUBLISHER)
    assert found is not None
    assert (found.distinct, found.repeats, found.announced, found.missing) == (2, 1, 1, 0)


def test_more_keys_than_there_is_room_for_leave_the_count_right(buffer: memoryview):
    book = Book(buffer, **SIZES)
    for key in range(3 * SIZES["keys"]):
        for ordinal in (1, 2):
            book.publisher(PUBLISHER, next(TICKS)).note(f"k{key}", ordinal, 1)
    found = book.evidence(0, PUBLISHER)
    assert found is not None
    assert (found.distinct, found.repeats, found.missing) == (6 * SIZES["keys"], 0, 0)


def test_the_row_that_was_used_least_recently_is_given_away_and_its_owner_takes_nothing_more(buffer: memoryview):
    book = Book(buffer, **SIZES)
    first = book.publisher(PUBLISHER, next(TICKS))
    first.note("a", 1, 1)
    first.measured(7)
    book.publisher(OTHER, next(TICKS)).note("a", 1, 1)
    book.publisher(b"r" * 16, next(TICKS)).note("a", 1, 1)
    assert first.retired
    assert book.evidence(0, PUBLISHER) is None
    first.note("a", 2, 1)
    first.write_latencies()
    assert first.latencies_us == {}
    for publisher in (OTHER, b"r" * 16):
        found = book.evidence(0, publisher)
        assert found is not None
        assert (found.distinct, found.samples) == (1, 0)


def test_latencies_are_counted_once_they_are_written(buffer: memoryview):
    book = Book(buffer, **SIZES)
    mine = book.publisher(PUBLISHER, next(TICKS))
    mine.note("a", 1, 1)
    for latency_us in (5, 5, 3_000_000, -4):
        mine.measured(latency_us)
    book.write_latencies()
    book.write_latencies()
    found = book.evidence(0, PUBLISHER)
    assert found is not None
    assert found.samples == 4
    assert dict(found.latency) == {0: 1, 5: 2, bucket_index(3_000_000): 1}


@pytest.mark.parametrize("value_us", [0, 1, 2047, 2048, 2049, 4095, 4096, 123_456, 10**9, 2**36 - 1])
def test_a_bucket_holds_its_values_to_three_digits(value_us: int):
    low, high = bucket_bounds_us(bucket_index(value_us))
    assert low <= value_us <= high
    assert (high - low) * 1000 <= max(1000, value_us)


def test_buckets_follow_each_other_without_a_gap():
    bounds = [bucket_bounds_us(index) for index in range(BUCKETS)]
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(bounds))
    assert bucket_index(2**60) == BUCKETS - 1
