"""What a shard can prove: a book over a buffer, as a worker writes it and the supervisor folds and reads it."""

from __future__ import annotations

import itertools
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbus.messages import WireKey
from shardbus.metrics import (
    BUCKETS,
    Book,
    Evidence,
    Recorder,
    book_bytes,
    bucket_bounds_us,
    bucket_index,
    bucket_indices,
)
from shardbus.wire.codec import pack_keys

PUBLISHER = b"p" * 16
OTHER = b"q" * 16
SECOND_NS = 1_000_000_000  # a row that was not used for so long may be given away
SIZES = {"keys": 8, "publishers": 2, "log_bytes": 1024}


class Both:
    """A worker's side and the supervisor's over one buffer."""

    def __init__(self, buffer: bytearray | None = None) -> None:
        self.buffer = bytearray(book_bytes(**SIZES)) if buffer is None else buffer
        self.book = Book(memoryview(self.buffer), **SIZES)
        self.recorder = Recorder(memoryview(self.buffer), full=self.fold, **SIZES)
        self.folds = 0

    def fold(self) -> None:
        self.folds += 1
        self.book.fold(self.folds * SECOND_NS)

    def note(self, key: WireKey, ordinal: int, attempt: int = 1, *, publisher: bytes = PUBLISHER) -> None:
        self.recorder.note(publisher, key, ordinal, attempt, 0, 0, 0, dead=False)
        self.recorder.flush()

    def evidence(self, publisher: bytes = PUBLISHER) -> Evidence:
        self.recorder.flush()
        self.fold()
        found = self.book.evidence(0, publisher)
        assert found is not None
        return found


def column(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


KEYS: list[WireKey] = ["a", "", 7, -1, b"a", (b"u" * 16,), None]


def test_ordinals_in_order_are_distinct_and_nothing_else():
    both = Both()
    for key in KEYS:
        for ordinal in (1, 2, 3):
            both.note(key, ordinal)
    found = both.evidence()
    assert (found.distinct, found.repeats, found.out_of_order, found.missing) == (3 * len(KEYS), 0, 0, 0)


def test_a_batch_is_noted_as_its_events_one_by_one_would_be():
    one, many = Both(), Both()
    ordinals, intended, ended = [1, 1, 2, 0], [1000, 0, 3000, 4000], [3000, 3500, 5000, 9_000_000]
    keys: list[WireKey] = ["a", b"a", "a", "b"]
    for key, ordinal, due, begin, end in zip(keys, ordinals, intended, [2000, *ended], ended, strict=False):
        one.recorder.note(PUBLISHER, key, ordinal, 1, due, begin, end, dead=False)
    many.recorder.note_all(PUBLISHER, 1, pack_keys(keys), 4, column(*ordinals), column(*intended), 2000, ended)
    assert one.evidence() == many.evidence()
    assert (many.evidence().distinct, many.evidence().samples) == (3, 3)


@pytest.mark.parametrize("stamps", [(column(1, 2), None), (None, column(5000, 6000)), (column(1, 2), column(5000, 6000))])
def test_a_batch_may_have_either_stamp(stamps: tuple[bytes | None, bytes | None]):
    both = Both()
    ordinals, intended_ns = stamps
    ended_ns = [6000, 9000] if intended_ns else []
    both.recorder.note_all(PUBLISHER, 1, pack_keys(["a", "a"]), 2, ordinals, intended_ns, 5500, ended_ns)
    found = both.evidence()
    assert found.distinct == (0 if ordinals is None else 2)
    assert found.latency == ([] if intended_ns is None else [(1, 1), (3, 1)])
    assert found.service == ([] if intended_ns is None else [(0, 1), (3, 1)])
    assert found.queue == ([] if intended_ns is None else [(0, 1), (1, 1)])


def test_single_events_stay_in_order_with_batches():
    both = Both()
    for first in range(1, 30, 3):
        both.recorder.note(PUBLISHER, "a", first, 1, 0, 0, 0, dead=False)
        both.recorder.note_all(PUBLISHER, 1, pack_keys(["a"]), 1, column(first + 1), None, 0, [])
        both.recorder.note(PUBLISHER, "a", first + 2, 2, 0, 0, 0, dead=True)
    found = both.evidence()
    assert (found.distinct, found.repeats, found.missing, found.out_of_order, found.dead) == (30, 0, 0, 0, 10)


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
@pytest.mark.parametrize("folds", ["at the end", "after each"])
def test_what_is_not_in_order_is_told_apart(
    noted: list[tuple[int, int]],
    distinct: int,
    repeats: int,
    announced: int,
    out_of_order: int,
    missing: int,
    folds: str,
):
    both = Both()
    for ordinal, attempt in noted:
        both.note("a", ordinal, attempt)
        if folds == "after each":
            both.fold()
    found = both.evidence()
    assert (found.distinct, found.repeats, found.announced) == (distinct, repeats, announced)
    assert (found.out_of_order, found.missing) == (out_of_order, missing)


@pytest.mark.parametrize("folded", [True, False])
def test_successors_go_on_where_worker_and_supervisor_were_killed(folded: bool):
    before = Both()
    before.note("a", 1)
    if folded:
        before.fold()
        before.note("a", 2)
    after = Both(before.buffer)
    after.note("a", 1 + folded, 2)
    after.note("a", 2 + folded, 2)
    found = after.evidence()
    assert (found.distinct, found.repeats, found.announced, found.missing) == (2 + folded, 1, 1, 0)


def test_what_was_noted_and_not_written_when_the_worker_was_killed_is_not_there():
    before = Both()
    before.note("a", 1)
    before.recorder.note(PUBLISHER, "a", 2, 1, 0, 0, 0, dead=False)
    after = Both(before.buffer)
    assert after.evidence().distinct == 1


def test_a_record_that_was_being_folded_when_the_supervisor_was_killed_is_counted_once():
    before = Both()
    before.note("a", 1)
    before.fold()
    for key in ("a", "b", "c"):
        before.recorder.note(PUBLISHER, key, 2 if key == "a" else 1, 1, 0, 0, 0, dead=False)
    before.recorder.flush()
    as_it_was = memoryview(before.buffer).cast("Q")[:8].tolist()
    before.fold()
    memoryview(before.buffer).cast("Q")[6] = as_it_was[6]  # all of it is in, but for the word that says so
    found = Both(before.buffer).evidence()
    assert (found.distinct, found.repeats, found.missing) == (4, 0, 0)


def test_an_event_is_dead_once_however_often_workers_are_killed_in_the_transaction_of_its_dead_letter():
    both = Both()
    for attempt in (1, 2, 3):
        for ordinal in range(1, 51):
            both.recorder.note(PUBLISHER, "a", ordinal, attempt, 0, 0, 0, dead=ordinal % 2 == 0)
    found = both.evidence()
    assert (found.distinct, found.dead, found.repeats, found.announced) == (50, 25, 100, 100)


def test_the_first_outcome_of_an_event_is_the_one_that_counts():
    both = Both()
    for key, outcomes in (("a", (True, False)), ("b", (False, True))):
        for attempt, dead in enumerate(outcomes, 1):
            both.recorder.note(PUBLISHER, key, 1, attempt, 0, 0, 0, dead=dead)
    found = both.evidence()
    assert (found.distinct, found.dead, found.repeats) == (2, 1, 2)


def test_a_dead_one_that_was_overtaken_counts_when_it_comes_and_one_beyond_all_counting_never():
    both = Both()
    for ordinal in (2, 1, 1, 2**41):
        both.recorder.note(PUBLISHER, "a", ordinal, 1, 0, 0, 0, dead=True)
    found = both.evidence()
    assert (found.distinct, found.dead, found.out_of_order, found.repeats, found.unchecked) == (2, 2, 1, 1, 1)


@pytest.mark.parametrize("kept", [0, 1])
def test_dead_ones_that_were_being_folded_when_the_supervisor_was_killed_are_counted_once(kept: int):
    before = Both()
    if kept:
        before.note("a", 1)
        before.fold()
    for ordinal in range(1 + kept, 11):
        before.recorder.note(PUBLISHER, "a", ordinal, 1, 0, 0, 0, dead=True)
    before.recorder.flush()
    words = memoryview(before.buffer).cast("Q")
    tail = words[6]
    before.fold()
    words[6] = tail  # all of it is in, but for the word that says so
    found = Both(before.buffer).evidence()
    assert (found.distinct, found.dead, found.repeats) == (10, 10 - kept, 0)


def test_a_full_log_is_folded_before_more_is_written():
    both = Both()
    for ordinal in range(1, 1001):
        both.note("a", ordinal)
    assert both.folds > 10
    found = both.evidence()
    assert (found.distinct, found.repeats, found.missing) == (1000, 0, 0)


def test_a_fold_may_stop_in_between():
    both = Both()
    for ordinal in range(1, 6):
        both.note("a", ordinal)
    assert both.book.fold(1, 2)
    assert both.book.fold(1, 2)
    assert not both.book.fold(1, 2)
    assert both.evidence().distinct == 5


def test_a_log_that_somebody_has_written_over_holds_nobody_up():
    both = Both()
    both.note("a", 1)
    at = len(both.buffer) - SIZES["log_bytes"]
    both.buffer[at + 48 : at + 50] = b"\xff\xff"
    with pytest.raises(msgspec.DecodeError):
        both.fold()
    both.note("a", 1)
    assert both.evidence().distinct == 1


@pytest.mark.parametrize("size", [0, 7, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_record_of_an_impossible_size_holds_nobody_up(size: int):
    both = Both()
    both.note("a", 1)
    at = len(both.buffer) - SIZES["log_bytes"]
    both.buffer[at : at + 8] = size.to_bytes(8, "little")
    with pytest.raises(ValueError, match="a record of"):
        both.fold()
    both.note("a", 1)
    assert both.evidence().distinct == 1


def test_a_publisher_that_is_forgotten_takes_none_of_another_with_it():
    both = Both()
    for key in range(SIZES["keys"]):  # all there is room for, the last one of another publisher
        both.note(key, 1, publisher=OTHER if key == SIZES["keys"] - 1 else PUBLISHER)
    both.fold()
    both.note(0, 2)
    both.fold()
    both.note("a", 1, publisher=b"r" * 16)  # takes the other's row, and the place of the first key
    assert both.evidence().distinct == SIZES["keys"]


def test_more_keys_than_there_is_room_for_leave_the_count_right():
    both = Both()
    for key in range(3 * SIZES["keys"]):
        for ordinal in (1, 2):
            both.note(f"k{key}", ordinal)
    found = both.evidence()
    assert (found.distinct, found.repeats, found.missing) == (6 * SIZES["keys"], 0, 0)


@pytest.mark.parametrize(("keys", "batch"), [(8, 4), (8, 8), (8, 20)])
def test_keys_that_leave_the_ring_are_counted_as_they_were(keys: int, batch: int):
    both = Both()
    assert SIZES["keys"] == keys
    for first in range(0, 10 * batch, batch):
        names: list[WireKey] = [f"k{first + at}" for at in range(batch)]
        both.recorder.note_all(PUBLISHER, 1, pack_keys(names), batch, column(*[1] * batch), None, 0, [])
    found = both.evidence()
    assert (found.distinct, found.missing, found.repeats) == (10 * batch, 0, 0)


def test_the_row_that_was_used_least_recently_is_given_away():
    both = Both()
    for publisher in (PUBLISHER, OTHER, b"r" * 16):
        both.recorder.note(publisher, "a", 1, 1, 1000, 2000, 8000, dead=False)
        both.recorder.flush()
        both.fold()
    gone = both.book.evidence(0, PUBLISHER)
    assert gone is not None
    assert (gone.complete, gone.distinct, gone.latency) == (False, 0, [])
    assert both.book.evidence(0, b"s" * 16) is None  # never seen
    for publisher in (OTHER, b"r" * 16):
        found = both.evidence(publisher)
        assert (found.complete, found.distinct, found.samples) == (True, 1, 1)
        assert (found.latency, found.service, found.queue) == ([(7, 1)], [(6, 1)], [(1, 1)])


def test_publishers_beyond_the_rows_cost_those_that_have_one_nothing_and_are_told_so():
    both = Both()
    publishers = [bytes([number]) * 16 for number in range(1, 6)]
    for ordinal in range(1, 4):
        for publisher in publishers:
            both.recorder.note(publisher, "a", ordinal, 1, 0, 0, 0, dead=False)
        both.recorder.flush()
        both.book.fold(ordinal)
    told = [both.book.evidence(0, publisher) for publisher in publishers]
    assert [one is not None and one.complete for one in told] == [True, True, False, False, False]
    assert [one is not None and (one.distinct, one.missing) for one in told[:2]] == [(3, 0), (3, 0)]


@pytest.mark.parametrize("had_a_row", [True, False])
def test_a_publisher_that_gets_a_row_later_is_not_taken_for_one_that_lost_events(had_a_row: bool):
    both = Both()
    if had_a_row:
        both.note("a", 1)
        both.fold()
    both.note("a", 1, publisher=OTHER)
    both.note("a", 1, publisher=b"r" * 16)
    both.fold()
    if not had_a_row:
        both.note("a", 1)  # while both rows are in use
        both.book.fold(both.folds * SECOND_NS)
    both.note("a", 2)
    found = both.evidence()
    assert not found.complete
    assert not Both(both.buffer).evidence().complete  # a successor of the supervisor knows it, too


def test_a_row_of_a_clock_that_has_started_anew_may_be_given_away():
    both = Both()
    for publisher in (PUBLISHER, OTHER):
        both.note("a", 1, publisher=publisher)
    both.book.fold(10**6 * SECOND_NS)
    both.note("a", 1, publisher=b"r" * 16)
    assert both.evidence(b"r" * 16).complete


def test_latencies_are_counted_and_those_of_dead_ones_are_not():
    both = Both()
    for latency_us in (5, 5, 3_000_000, -4):
        end_ns = 10_000 + 1000 * latency_us
        both.recorder.note(PUBLISHER, "a", 0, 1, 10_000, end_ns - 2000, end_ns, dead=False)
    both.recorder.note(PUBLISHER, "a", 0, 1, 10_000, 12_000, 20_000, dead=True)
    found = both.evidence()
    assert found.samples == 4
    assert dict(found.latency) == {0: 1, 5: 2, bucket_index(3_000_000): 1}
    assert dict(found.service) == {2: 4}
    assert dict(found.queue) == {0: 1, 3: 2, bucket_index(2_999_998): 1}
    assert found.dead == 1


def test_each_event_of_a_part_begins_when_the_one_before_has_ended_measured_or_not():
    both = Both()
    ended_ns = [40_000, 45_000, 3_000_000]
    both.recorder.note_all(PUBLISHER, 1, pack_keys(["a"] * 3), 3, None, column(1000, 0, 5000), 10_000, ended_ns)
    both.recorder.note_all(PUBLISHER, 1, pack_keys(["a"]), 1, None, column(9000), 3_001_000, [3_005_000])
    found = both.evidence()
    assert dict(found.latency) == {39: 1, bucket_index(2995): 1, bucket_index(2996): 1}
    assert found.service == [(4, 1), (30, 1), (bucket_index(2955), 1)]
    assert found.queue == [(9, 1), (40, 1), (bucket_index(2992), 1)]


def test_single_events_have_beginnings_of_their_own():
    both = Both()
    for due, begin, end in ((1000, 3000, 8000), (2000, 4000, 7000), (0, 0, 0)):
        both.recorder.note(PUBLISHER, "a", 0, 1, due, begin, end, dead=False)
    found = both.evidence()
    assert (found.latency, found.service, found.queue) == ([(5, 1), (7, 1)], [(3, 1), (5, 1)], [(2, 2)])
    assert found.samples == 2


def test_singles_without_an_intended_instant_carry_no_times():
    sizes = []
    for intended_ns in (0, 1000):
        both = Both()
        both.recorder.note(PUBLISHER, "a", 1, 1, intended_ns, 2000, 3000, dead=False)
        both.recorder.flush()
        sizes.append(memoryview(both.buffer).cast("Q")[5])
    assert sizes[1] == sizes[0] + 3 * 8


def test_a_bucket_that_is_full_stays_so():
    both = Both()
    both.recorder.note(PUBLISHER, "a", 0, 1, 1000, 2000, 3000, dead=False)
    both.evidence()
    counts, at = memoryview(both.buffer).cast("I"), 2 * (16 + 16 * SIZES["publishers"]) + 2  # 2 µs, of the first row
    assert counts[at] == 1
    counts[at] = 2**32 - 1
    both.recorder.note(PUBLISHER, "a", 0, 1, 1000, 2000, 3000, dead=False)
    assert both.evidence().latency == [(2, 2**32 - 1)]


@pytest.mark.parametrize("value_us", [0, 1, 2047, 2048, 2049, 4095, 4096, 123_456, 10**9, 2**36 - 1])
def test_a_bucket_holds_its_values_to_three_digits(value_us: int):
    low, high = bucket_bounds_us(bucket_index(value_us))
    assert low <= value_us <= high
    assert (high - low) * 1000 <= max(1000, value_us)


@given(st.lists(st.integers(-5, 2**40) | st.integers(0, 5000) | st.integers(2**20, 2**21), min_size=1, max_size=50))
def test_many_values_are_in_the_buckets_of_each(values_us: list[int]):
    assert list(bucket_indices(values_us)) == [bucket_index(value) for value in values_us]


@pytest.mark.parametrize("power", range(1, 38))
def test_values_of_one_size_are_in_the_buckets_of_each(power: int):
    values_us = [2**power, 2**power + 1, 2 ** (power + 1) - 1, 2**power + 2 ** (power - 1)]
    assert list(bucket_indices(values_us)) == [bucket_index(value) for value in values_us]


def test_buckets_follow_each_other_without_a_gap():
    bounds = [bucket_bounds_us(index) for index in range(BUCKETS)]
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(bounds))
    assert bucket_index(2**60) == BUCKETS - 1
