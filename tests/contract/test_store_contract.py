"""What every store promises, asked of each adapter; and what a file promises beyond that: kills, locks, versions."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import aiosqlite
import msgspec
import pytest
from msgspec.structs import replace

from shardbus.messages import WireKey
from shardbus.sql.store import SqlStore
from shardbus.sql.urls import sqlite_file_url
from shardbus.store import (
    FILE_URL,
    MEMORY_URL,
    TAKEOVERS_MAX,
    DeadFilter,
    DeadLetter,
    Envelope,
    Failure,
    LaneHead,
    ParkedKey,
    ScheduledEvent,
    Store,
    StoreCounts,
    StoreError,
    WaitingEvent,
    WaitingLane,
    row_bytes,
    traceback_bytes,
)
from shardbus.testing import MemoryRows, MemoryStore

PUBLISHER = bytes(range(16))
OTHER = bytes(range(16, 32))
DUE_NS = 2**62
KEYS: list[WireKey] = [
    "",
    "42",
    42,
    -(2**63),
    2**64 - 1,
    b"42",
    b"",
    b"\x00\xff",
    (bytes(range(16)),),
    bytes(range(16)),
    "naïve 🦆 \x00 ' %s ?",
    "x" * 1024,
    None,
]

MakeStore = Callable[[], Store]


def envelope(seq: int = 1, *, key: WireKey = "order-1", publisher: bytes = PUBLISHER) -> Envelope:
    return Envelope(
        publisher=publisher,
        seq=seq,
        slot=1023,
        type="OrderPlaced",
        key=key,
        body=b"\x82\x00\xff",
        headers={"trace": "añ", "": ""},
        ordinal=2**63 - 1,
        intended_ns=2**62,
        attempt=3,
    )


def dead_letter(
    seq: int = 1,
    *,
    key: WireKey = "order-1",
    publisher: bytes = PUBLISHER,
    first_ns: int = 100,
    error: str = "no such order: ☂",
    place: str = "shop.py:12",
    traceback: str = "Traceback …\n",
) -> DeadLetter:
    return DeadLetter(
        envelope=envelope(seq, key=key, publisher=publisher),
        handlers=("shop.add", "shop.mail"),
        reason="failed",
        error_type="KeyError",
        error=error,
        place=place,
        traceback=traceback,
        first_ns=first_ns,
        last_ns=first_ns + 1,
        epoch=b"e" * 24,
    )


def waiting_event(
    position: int, *, seq: int | None = None, key: WireKey = "order-1", publisher: bytes = PUBLISHER
) -> WaitingEvent:
    return WaitingEvent(
        position=position,
        envelope=envelope(position if seq is None else seq, key=key, publisher=publisher),
        todo={"shop.mail": 2},
        gave_up=(Failure(handlers=("shop.add",), reason="failed", error_type="KeyError", error="☂", place="p"),),
        due_ns=DUE_NS,
        deadline_ns=DUE_NS + 1,
        first_ns=100,
    )


async def dead_in(store: Store, limit: int, **where: Any) -> list[DeadLetter]:
    return [found.letter for found in await store.dead_letters(DeadFilter(**where), 0, limit)]


def held(counts: StoreCounts) -> tuple[int, int, int]:
    return counts.dead, counts.waiting, counts.position_max


async def load(store: Store, key: WireKey, after: int, limit: int) -> list[WaitingEvent]:
    (lane,) = await store.load_waiting([LaneHead(key, after, limit)])
    return lane


async def positions(store: Store, key: WireKey = "order-1", after: int = 0, limit: int = 100) -> list[int]:
    return [event.position for event in await load(store, key, after, limit)]


@pytest.fixture(autouse=True)
async def every_thread_ends() -> AsyncIterator[None]:
    """A connection is a thread. One that is left behind, also by an `open()` that failed, fails its own test here,
    and not another one whenever the garbage collector finds it."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)  # the driver stops the thread of a failed connection without waiting for it
        assert not thread.is_alive(), f"{thread.name} is left behind"


@pytest.fixture(params=["memory", "sqlite in memory", "sqlite file"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    """Makes stores over the same rows, as far as the adapter keeps rows beyond `close()`."""
    rows = MemoryRows()
    makers: dict[str, MakeStore] = {
        "memory": lambda: MemoryStore(rows),
        "sqlite in memory": lambda: SqlStore(MEMORY_URL),
        "sqlite file": lambda: SqlStore(sqlite_file_url(str(tmp_path / "store.db"))),
    }
    return makers[request.param]


@pytest.fixture
async def store(make_store: MakeStore) -> AsyncIterator[Store]:
    store = make_store()
    await store.open()
    yield store
    await store.close()


# -- every adapter


async def test_a_new_store_is_empty(make_store):
    store = make_store()
    assert await store.open() == StoreCounts(dead=0, waiting=0, position_max=0)
    assert await dead_in(store, 10) == []
    assert await store.waiting_lanes(None, 100) == []
    assert await load(store, "order-1", 0, 10) == []
    assert await store.outcomes(PUBLISHER, 0) == ([], [])
    await store.close()


@pytest.mark.parametrize("key", KEYS, ids=lambda key: repr(key)[:24])
async def test_every_field_and_every_kind_of_key_comes_back_as_it_was(store, key):
    await store.write(dead=[dead_letter(key=key)], waiting=[waiting_event(7, seq=2, key=key)], done=[])
    (dead,) = await dead_in(store, 10)
    (waiting,) = await load(store, key, 0, 10)
    assert dead == dead_letter(key=key)
    assert waiting == waiting_event(7, seq=2, key=key)
    assert type(dead.envelope.key) is type(waiting.envelope.key) is type(key)


async def test_what_is_absent_comes_back_absent(store):
    bare = msgspec.structs.replace(envelope(), headers=None, body=b"")
    dead = msgspec.structs.replace(dead_letter(place="", traceback="", error=""), envelope=bare, handlers=())
    event = WaitingEvent(position=1, envelope=bare)
    await store.write(dead=[dead], waiting=[event], done=[])
    assert await dead_in(store, 10) == [dead]
    assert await load(store, "order-1", 0, 10) == [event]


async def test_keys_that_look_alike_are_lanes_of_their_own(store):
    await store.write(dead=[], waiting=[waiting_event(at, key=key) for at, key in enumerate(KEYS, 1)], done=[])
    found = {lane.key: (lane.count, lane.due_ns) for lane in await store.waiting_lanes(None, 100)}
    assert found == dict.fromkeys(KEYS, (1, DUE_NS))
    for at, key in enumerate(KEYS, 1):
        assert await positions(store, key) == [at]


async def test_a_lane_is_loaded_in_the_order_of_its_positions_however_they_were_written(store):
    for position in (30, 10, 2, 20):
        await store.write(dead=[], waiting=[waiting_event(position)], done=[])
    assert await positions(store) == [2, 10, 20, 30]


def scheduled_event(due_ns: int, seq: int, **where: Any) -> ScheduledEvent:
    return ScheduledEvent(envelope=envelope(seq, **where), due_ns=due_ns)


async def due(store: Store, until_ns: int, after: tuple[int, int] = (0, 0), limit: int = 100) -> list[int]:
    return [found.event.envelope.seq for found in await store.due(until_ns, after, limit)]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: repr(key)[:24])
async def test_a_scheduled_event_comes_back_as_it_was(store, key):
    await store.write(scheduled=[scheduled_event(5, 1, key=key)])
    (found,) = await store.due(5, (0, 0), 10)
    assert found.event == scheduled_event(5, 1, key=key)


async def test_scheduled_events_come_by_their_due_time_and_then_as_they_were_written_page_by_page(store):
    await store.write(scheduled=[scheduled_event(due_ns, seq) for seq, due_ns in enumerate([30, 10, 20, 10, 40], 1)])
    assert await due(store, 30) == [2, 4, 3, 1]
    assert await due(store, 9) == []
    first = await store.due(30, (0, 0), 2)
    assert [found.event.envelope.seq for found in first] == [2, 4]
    assert await due(store, 30, (10, first[0].row)) == [4, 3, 1]
    assert await due(store, 30, (10, first[1].row)) == [3, 1]
    assert [await store.next_due(after) for after in (0, 9, 10, 30, 40)] == [10, 10, 20, 40, 0]


async def test_a_page_of_scheduled_events_is_bounded_by_their_bytes_but_for_the_first(store):
    events = [
        ScheduledEvent(envelope=replace(envelope(seq), body=b"x" * 1000), due_ns=seq) for seq in range(1, 5)
    ]
    await store.write(scheduled=events)
    assert len(await store.due(10, (0, 0), 10, 10)) == 1
    assert len(await store.due(10, (0, 0), 10, 3000)) == 3


async def test_a_scheduled_event_waits_in_no_lane_until_it_begins_which_is_one_transaction(store):
    await store.write(waiting=[waiting_event(1, seq=1)], scheduled=[scheduled_event(10, 2), scheduled_event(11, 3)])
    counts = store.counts()
    assert (counts.waiting, counts.scheduled, counts.position_max) == (3, 2, 1)
    assert counts.bytes == 3 * row_bytes(envelope())
    assert await positions(store) == [1]
    assert await store.waiting_lanes(None, 100) == [WaitingLane(key="order-1", count=1, due_ns=DUE_NS)]
    (found, _) = await store.due(11, (0, 0), 10)
    await store.write(waiting=[waiting_event(2, seq=2)], begun=[found.row])
    counts = store.counts()
    assert (counts.waiting, counts.scheduled, counts.bytes) == (3, 1, 3 * row_bytes(envelope()))
    assert await positions(store) == [1, 2]
    assert await due(store, 11) == [3]


async def test_scheduled_events_of_the_latest_rows_come_as_they_were_written(store):
    await store.write(scheduled=[scheduled_event(due_ns, seq) for seq, due_ns in enumerate([30, 10, 20, 10, 40], 1)])
    first, *_ = await store.due(10, (0, 0), 1)
    found = await store.due_above(first.row, 30, 10)
    assert [one.event.envelope.seq for one in found] == [3, 4]
    assert [one.event.envelope.seq for one in await store.due_above(0, 30, 2)] == [1, 2]
    assert len(await store.due_above(0, 30, 10, bytes_max=1)) == 1
    assert await store.due_above(found[-1].row, 39, 10) == []


async def test_many_that_are_due_at_one_instant_are_read_on_from_where_a_page_ended(store):
    await store.write(scheduled=[scheduled_event(7, seq) for seq in range(1, 6)] + [scheduled_event(8, 6)])
    pages, after = [], (0, 0)
    while page := await store.due(8, after, 2):
        pages.append([one.event.envelope.seq for one in page])
        after = (page[-1].event.due_ns, page[-1].row)
    assert pages == [[1, 2], [3, 4], [5, 6]]
    assert await store.due(7, (8, 0), 10) == []


async def test_a_store_says_what_is_scheduled_and_until_when_it_may_have_begun(store):
    state = await store.schedule_state()
    assert (state.next_due_ns, state.row_max, state.begun_until_ns) == (0, 0, 0)
    await store.write(scheduled=[scheduled_event(9, 1), scheduled_event(7, 2)], begun_until_ns=8)
    rows = [one.row for one in await store.due(9, (0, 0), 9)]
    await store.write(begun=rows[:1])
    state = await store.schedule_state()
    assert (state.next_due_ns, state.row_max, state.begun_until_ns) == (9, rows[1], 8)
    await store.write(begun_until_ns=20)
    assert (await store.schedule_state()).begun_until_ns == 20


async def test_what_is_scheduled_is_known_to_whoever_asks_for_outcomes(store):
    await store.write(
        dead=[dead_letter(2)],
        waiting=[waiting_event(1, seq=5)],
        scheduled=[scheduled_event(1, 3), scheduled_event(1, 6), scheduled_event(1, 4, publisher=OTHER)],
    )
    assert await store.outcomes(PUBLISHER, 3) == ([], [3, 5, 6])
    assert await store.outcomes(PUBLISHER, 0) == ([2], [3, 5, 6])


async def test_a_scheduled_event_is_cancelled_once(store):
    await store.write(scheduled=[scheduled_event(1, 1), scheduled_event(1, 2), scheduled_event(1, 1, publisher=OTHER)])
    assert [len(await store.unschedule(PUBLISHER, 1)) for _ in range(2)] == [1, 0]
    assert await store.unschedule(PUBLISHER, 9) == []
    counts = store.counts()
    assert (counts.waiting, counts.scheduled, counts.bytes) == (2, 2, 2 * row_bytes(envelope()))
    assert await due(store, 1) == [2, 1]


async def test_the_rows_of_scheduled_events_are_numbered_only_once(store):
    await store.write(scheduled=[scheduled_event(1, 1)])
    (found,) = await store.due(1, (0, 0), 10)
    await store.write(begun=[found.row])
    await store.write(scheduled=[scheduled_event(1, 2)])
    await store.write(begun=[found.row])
    assert await due(store, 1) == [2]


async def test_a_lane_is_loaded_piece_by_piece(store):
    lanes = [waiting_event(at, key="odd" if at % 2 else "even") for at in range(1, 11)]
    await store.write(dead=[], waiting=lanes, done=[])
    assert await positions(store, "even", limit=2) == [2, 4]
    assert await positions(store, "even", after=4, limit=2) == [6, 8]
    assert await positions(store, "even", after=8, limit=2) == [10]
    assert await positions(store, "even", after=10, limit=2) == []
    assert await positions(store, "even", after=5, limit=1) == [6]


@pytest.mark.parametrize("count", [1, 7, 300])
async def test_many_lanes_are_loaded_at_once_each_from_its_place_and_up_to_its_limit(store, count: int):
    keys = [f"key {at}" for at in range(count)]
    rows = [waiting_event(1 + lap * count + at, key=key) for lap in range(3) for at, key in enumerate(keys)]
    await store.write(waiting=rows)
    heads = [LaneHead(key, at % 3 and at + 1, 1 + at % 2) for at, key in enumerate(keys)]
    heads += [LaneHead("nobody", 0, 5), LaneHead(keys[0], 1, 5)]
    expected = [
        [row for row in rows if row.envelope.key == head.key and row.position > head.after][: head.limit] for head in heads
    ]
    assert await store.load_waiting(heads) == expected
    assert await store.load_waiting([]) == []


@pytest.mark.parametrize(
    ("bytes_max", "expected"), [(1, [[1]]), (3, [[1]]), (6, [[1, 3]]), (9, [[1, 3], [2]]), (12, [[1, 3], [2, 4], []])]
)
async def test_what_is_loaded_together_is_bounded_by_bytes_and_lanes_behind_the_bound_are_not_answered(
    store, bytes_max: int, expected: list[list[int]]
):
    await store.write(waiting=[waiting_event(at, key="odd" if at % 2 else "even") for at in range(1, 5)])  # 3 bytes each
    heads = [LaneHead("odd", 0, 9), LaneHead("even", 0, 9), LaneHead("nobody", 0, 9)]
    found = await store.load_waiting(heads, bytes_max)
    assert [[row.position for row in lane] for lane in found] == expected


async def test_a_store_knows_how_often_its_rows_were_taken_over(path):
    store = SqlStore(sqlite_file_url(path))
    await takeovers_are_counted(lambda: store)


async def test_a_store_in_memory_knows_that_too():
    store = MemoryStore()
    await takeovers_are_counted(lambda: store)


async def takeovers_are_counted(next_store: Callable[[], Store]) -> None:
    store = next_store()
    await store.open()
    assert await store.take_over() == ()  # there is nothing
    await store.write(waiting=[waiting_event(2), waiting_event(5)])
    await store.close()
    await store.open()
    assert await store.take_over() == (5,)
    await store.write(waiting=[waiting_event(7, seq=7)], dead=[replace(dead_letter(9), position=9)])
    await store.rest()
    await store.close()
    await store.open()
    assert await store.take_over() == (5,)  # what came to rest did not die
    assert await store.take_over() == (5, 9)
    await store.write(done=[2, 5])
    assert await store.take_over() == (9, 9)  # nothing is left that was there the first time
    await store.write(waiting=[waiting_event(12)])
    assert await store.take_over() == (9, 9, 12)
    await store.write(done=[12])
    await store.close()
    await store.open()
    assert await store.take_over() == (9, 9, 9, 12)  # ascending, also where the last rows have gone
    for _ in range(TAKEOVERS_MAX + 1):
        found = await store.take_over()
    assert found == (*(9,) * (TAKEOVERS_MAX - 1), 12)
    await store.close()


async def test_a_lane_is_due_when_its_first_event_is(store):
    early, late = replace(waiting_event(7), due_ns=100), replace(waiting_event(3), due_ns=900)
    await store.write(waiting=[early, late])
    assert await store.waiting_lanes(None, 100) == [WaitingLane(key="order-1", count=2, due_ns=900)]
    await store.write(done=[3])
    assert await store.waiting_lanes(None, 100) == [WaitingLane(key="order-1", count=1, due_ns=100)]


async def test_a_waiting_event_that_has_changed_keeps_its_place_and_what_it_is(store):
    before, other = waiting_event(3), waiting_event(4)
    await store.write(waiting=[before, other])
    after = replace(before, envelope=replace(before.envelope, attempt=9), todo={"shop.add": 1}, gave_up=(), due_ns=5)
    await store.write(changed=[after])
    assert await load(store, "order-1", 0, 9) == [after, other]
    await store.write(changed=[replace(after, todo={}, due_ns=0)])
    assert (await load(store, "order-1", 0, 1))[0].todo == {}


async def test_a_change_of_what_has_gone_is_no_error_and_brings_nothing_back(store):
    await store.write(changed=[waiting_event(3)])
    await store.write(waiting=[waiting_event(4)], changed=[waiting_event(4)], done=[4])
    assert await store.waiting_lanes(None, 100) == []


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
async def test_lanes_come_page_by_page_each_once(store, limit: int):
    events = [waiting_event(at, key=key) for at, key in ((5, "a"), (3, 7), (4, None), (9, 7), (1, None))]
    await store.write(dead=[], waiting=events, done=[])
    found: list[WaitingLane] = []
    while page := await store.waiting_lanes(found[-1] if found else None, limit):
        assert len(page) <= limit
        found += page
    assert sorted((lane.count, str(lane.key)) for lane in found) == [(1, "a"), (2, "7"), (2, "None")]


async def test_parked_keys_come_page_by_page(store):
    await store.write(dead=[replace(dead_letter(at, key=f"key {at}"), position=10 * at) for at in (3, 1, 2)])
    await store.write(dead=[dead_letter(4, key="dead, and parks nothing")])
    assert await store.parked_keys(0, 2) == [ParkedKey("key 1", 10), ParkedKey("key 2", 20)]
    assert await store.parked_keys(20, 2) == [ParkedKey("key 3", 30)]
    assert await store.parked_keys(30, 2) == []


async def test_done_events_are_removed_and_unknown_positions_are_no_error(store):
    await store.write(dead=[], waiting=[waiting_event(at) for at in (1, 2, 3)], done=[])
    await store.write(dead=[], waiting=[], done=[2, 99, 2])
    assert await positions(store) == [1, 3]
    await store.write(dead=[], waiting=[], done=[1, 3])
    assert await store.waiting_lanes(None, 100) == []


async def test_additions_come_before_removals(store):
    await store.write(dead=[], waiting=[waiting_event(1), waiting_event(2)], done=[1])
    assert await positions(store) == [2]


async def test_an_empty_write_is_no_error(store):
    await store.write(dead=[], waiting=[], done=[])
    assert await dead_in(store, 1) == []


async def test_a_write_that_fails_leaves_nothing_and_the_next_one_works(store):
    await store.write(dead=[], waiting=[waiting_event(1), waiting_event(2)], done=[])
    with pytest.raises(StoreError):
        await store.write(dead=[dead_letter(1)], waiting=[waiting_event(3), waiting_event(2)], done=[1])
    assert await dead_in(store, 10) == []
    assert await positions(store) == [1, 2]
    await store.write(dead=[dead_letter(1)], waiting=[waiting_event(3)], done=[1])
    # The traceback of the write that failed must not count as stored.
    assert await dead_in(store, 10) == [dead_letter(1)]
    assert await positions(store) == [2, 3]


async def test_an_event_that_dies_again_replaces_its_dead_letter_and_keeps_its_first_time(store):
    await store.write(dead=[dead_letter(1, first_ns=100), dead_letter(2, first_ns=150)], waiting=[], done=[])
    again = msgspec.structs.replace(
        dead_letter(1, first_ns=500, error="another"),
        envelope=msgspec.structs.replace(envelope(1), attempt=9),
        handlers=("shop.mail",),
        reason="undecodable",
        error_type="ValidationError",
        epoch=b"f" * 24,
    )
    await store.write(dead=[again, dead_letter(3, first_ns=600)], waiting=[], done=[])
    assert await dead_in(store, 10) == [
        msgspec.structs.replace(again, first_ns=100),
        dead_letter(2, first_ns=150),
        dead_letter(3, first_ns=600),
    ]


async def test_of_an_event_that_dies_twice_in_one_write_the_last_stays(store):
    await store.write(dead=[dead_letter(first_ns=100), dead_letter(first_ns=200, error="last")], waiting=[], done=[])
    assert await dead_in(store, 10) == [
        msgspec.structs.replace(dead_letter(first_ns=200, error="last"), first_ns=100)
    ]


@pytest.mark.parametrize(("bytes_max", "count"), [(1, 1), (3, 1), (5, 1), (6, 2), (8, 2), (9, 3), (15, 5), (100, 5)])
async def test_a_page_of_dead_letters_is_bounded_by_bytes_and_has_at_least_one(store, bytes_max: int, count: int):
    await store.write(dead=[dead_letter(seq) for seq in range(5)])  # each has a body of three bytes
    assert len(await store.dead_letters(DeadFilter(), 0, 9, bytes_max)) == count
    assert await store.dead_letters(DeadFilter(type="Unheard"), 0, 9, bytes_max) == []


async def test_events_of_two_publishers_with_one_sequence_are_two_dead_letters(store):
    letters = [dead_letter(1, first_ns=1), dead_letter(1, first_ns=2, publisher=OTHER)]
    await store.write(dead=letters, waiting=[], done=[])
    assert await dead_in(store, 10) == letters


async def test_dead_letters_come_page_by_page_in_the_order_in_which_they_died(store):
    for seq in (3, 1, 2):
        await store.write(dead=[dead_letter(seq)])
    everything = DeadFilter()
    first = await store.dead_letters(everything, 0, 2)
    second = await store.dead_letters(everything, first[-1].row, 2)
    assert [found.letter.envelope.seq for found in (*first, *second)] == [3, 1, 2]
    assert await store.dead_letters(everything, second[-1].row, 2) == []


FILTERS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "everything": ({}, {1, 2, 3, 4}),
    "a type": ({"type": "Other"}, {2}),
    "a type that none has": ({"type": "other"}, set()),
    "a key": ({"key": ("42",)}, {3}),
    "a key that looks like it": ({"key": (42,)}, {4}),
    "no key at all": ({"key": (None,)}, set()),
    "a reason": ({"reason": "timeout"}, {3}),
    "a handler": ({"handler": "shop.mail"}, {1, 2, 4}),
    "a handler's beginning": ({"handler": "shop.m"}, set()),
    "a handler with a wildcard": ({"handler": "shop.%"}, set()),
    "since when": ({"since_ns": 300}, {3, 4}),
    "by name": ({"events": [(PUBLISHER, 1), (PUBLISHER, 4), (OTHER, 2)]}, {1, 4}),
    "by no name": ({"events": []}, set()),
    "several conditions": ({"handler": "shop.mail", "since_ns": 300}, {4}),
}


@pytest.mark.parametrize(("where", "expected"), FILTERS.values(), ids=FILTERS)
async def test_dead_letters_are_found_by_what_they_are(store, where: dict[str, Any], expected: set[int]):
    letters = [
        dead_letter(1),
        replace(dead_letter(2, first_ns=200), envelope=replace(envelope(2), type="Other")),
        replace(dead_letter(3, key="42", first_ns=300), reason="timeout", handlers=("shop.add",)),
        dead_letter(4, key=42, first_ns=400),
    ]
    await store.write(dead=letters)
    assert {letter.envelope.seq for letter in await dead_in(store, 10, **where)} == expected


async def test_what_died_is_present_redriven_or_purged(store):
    await store.write(dead=[dead_letter(seq) for seq in range(1, 7)])
    rows = [found.row for found in await store.dead_letters(DeadFilter(), 0, 10)]
    assert await store.purge([rows[0], rows[1], 999]) == 2
    assert await store.purge([rows[0]]) == 0
    await store.write(waiting=[waiting_event(1, seq=3)], redriven=[rows[2], rows[0]])
    assert [letter.envelope.seq for letter in await dead_in(store, 10)] == [4, 5, 6]
    assert await positions(store) == [1]


async def test_the_ledger_and_what_is_parked_outlive_a_close(path):
    store = SqlStore(sqlite_file_url(path))
    await store.open()
    await store.write(dead=[dead_letter(seq) for seq in range(1, 7)])
    rows = [found.row for found in await store.dead_letters(DeadFilter(), 0, 10)]
    await store.purge(rows[:1])
    await store.write(redriven=rows[1:3], dead=[replace(dead_letter(9), position=3)])
    await store.drop_oldest(rows=1, size=0)
    counts = store.counts()
    await store.close()
    assert counts == await store.open()
    assert (counts.dead, counts.parked, counts.redriven, counts.purged, counts.dropped) == (3, 1, 2, 1, 1)
    assert [one.key for one in await store.parked_keys(0, 10)] == ["order-1"]
    await store.close()


async def parked(store: Store) -> set[WireKey]:
    keys = [one.key for one in await store.parked_keys(0, 100)]
    assert len(keys) == len(set(keys)) == store.counts().parked
    return set(keys)


async def test_a_dead_letter_that_parks_says_so_until_it_is_gone(store):
    parking = [replace(dead_letter(seq, key=key), position=seq) for seq, key in enumerate(KEYS[:-1], 1)]
    await store.write(dead=[*parking, dead_letter(99, key="another")])
    assert await parked(store) == set(KEYS[:-1])
    assert [letter.position for letter in await dead_in(store, 99)] == [*range(1, len(KEYS)), 0]
    first, second = await store.dead_letters(DeadFilter(), 0, 2)
    await store.write(waiting=[waiting_event(first.letter.position)], redriven=[first.row])
    await store.purge([second.row])
    assert await parked(store) == set(KEYS[2:-1])


async def test_no_position_is_given_twice_while_a_dead_letter_may_take_its_place_again(store):
    await store.write(waiting=[waiting_event(7), waiting_event(8)])
    await store.write(dead=[replace(dead_letter(7), position=7)], done=[7, 8])
    await store.write(dead=[replace(dead_letter(12), position=12)])
    assert held(store.counts()) == (2, 0, 12)


async def test_a_parked_event_that_fails_again_takes_its_place_among_the_dead_letters_again(store):
    letter = replace(dead_letter(1), position=4)
    await store.write(dead=[letter], waiting=[waiting_event(5, seq=2)])
    (found,) = await store.dead_letters(DeadFilter(), 0, 9)
    await store.write(waiting=[waiting_event(4, seq=1)], redriven=[found.row])
    assert await positions(store) == [4, 5]
    await store.write(dead=[letter], done=[4])
    assert await positions(store) == [5]
    assert await parked(store) == {"order-1"}


def sized(seq: int, size: int, **fields: Any) -> DeadLetter:
    letter = dead_letter(seq, **fields)
    return replace(letter, envelope=replace(letter.envelope, body=bytes(size)))


async def test_the_bytes_of_a_store_are_those_of_its_rows_whatever_became_of_others(store):
    def weighed(letters: list[DeadLetter]) -> int:
        return sum(row_bytes(letter.envelope) for letter in letters)

    letters = [sized(seq, 1000 * seq) for seq in range(1, 6)]
    parking = replace(sized(6, 77), position=9)
    shared = traceback_bytes(len(parking.traceback))
    events = [waiting_event(1), waiting_event(2)]
    one_event = row_bytes(events[0].envelope)
    await store.write(dead=[*letters, parking], waiting=events)
    assert store.counts().bytes == weighed([*letters, parking]) + 2 * one_event + shared
    assert store.counts().droppable_bytes == weighed(letters) + shared
    rows = [found.row for found in await store.dead_letters(DeadFilter(), 0, 10)]
    await store.purge(rows[:1])
    await store.write(done=[2, 2, 99], redriven=rows[1:2])
    assert store.counts().bytes == weighed([*letters[2:], parking]) + one_event + shared
    again = sized(4, 1)
    await store.write(dead=[again, again])  # it is dead already
    assert store.counts().bytes == weighed([letters[2], again, letters[4], parking]) + one_event + shared
    assert await store.drop_oldest(rows=2, size=0) == 2
    await store.purge([rows[5]])
    assert store.counts().bytes == weighed([letters[4]]) + one_event + shared
    assert (store.counts().droppable_bytes, store.counts().parked) == (weighed([letters[4]]) + shared, 0)


async def test_a_traceback_counts_once_for_each_place_and_goes_with_its_last_dead_letter(store):
    letters = [dead_letter(seq, place=place, traceback=place * 1000) for seq, place in enumerate("aabbcd", 1)]

    def held_bytes(*seqs: int) -> int:
        left = [letter for letter in letters if letter.envelope.seq in seqs]
        return sum(row_bytes(letter.envelope) for letter in left) + 1512 * len({letter.place for letter in left})

    await store.write(dead=letters)
    assert store.counts().bytes == store.counts().droppable_bytes == held_bytes(1, 2, 3, 4, 5, 6)
    rows = [found.row for found in await store.dead_letters(DeadFilter(), 0, 10)]
    await store.purge(rows[:1])
    assert store.counts().bytes == held_bytes(2, 3, 4, 5, 6)
    await store.purge(rows[1:3])
    assert store.counts().bytes == held_bytes(4, 5, 6)
    await store.write(redriven=rows[3:4])
    assert store.counts().bytes == held_bytes(5, 6)
    await store.drop_oldest(rows=0, size=1)
    assert store.counts().bytes == held_bytes(6)
    letters[5] = dead_letter(6, place="e", traceback="e" * 1000)
    await store.write(dead=[letters[5], *letters[:2]])  # it dies elsewhere; a place that has gone comes back
    assert store.counts().bytes == store.counts().droppable_bytes == held_bytes(1, 2, 6)
    assert {one.place: one.traceback for one in await dead_in(store, 10)} == {"a": "a" * 1000, "e": "e" * 1000}


async def test_the_oldest_dead_letters_are_dropped_and_counted_and_nothing_else_is(store):
    letters = [dead_letter(1), replace(dead_letter(2), position=5), *(dead_letter(seq) for seq in range(3, 9))]
    await store.write(dead=letters, waiting=[waiting_event(6)])
    rows = [found.row for found in await store.dead_letters(DeadFilter(), 0, 10)]
    assert await store.drop_oldest(rows=3, size=0, keep=[rows[2]]) == 3
    assert [letter.envelope.seq for letter in await dead_in(store, 10)] == [2, 3, 6, 7, 8]
    assert await store.drop_oldest(rows=0, size=1) == 1
    assert await store.drop_oldest(rows=1000, size=1000) == 3
    assert await store.drop_oldest(rows=1, size=1) == 0
    assert [letter.envelope.seq for letter in await dead_in(store, 10)] == [2]
    assert await positions(store) == [6]
    counts = store.counts()
    assert (counts.dead, counts.redriven, counts.purged, counts.dropped) == (1, 0, 0, 7)


async def test_many_are_dropped_at_once(store):
    await store.write(dead=[dead_letter(seq) for seq in range(1, 2001)])
    assert await store.drop_oldest(rows=1500, size=1800 * row_bytes(envelope())) == 1800
    assert [letter.envelope.seq for letter in await dead_in(store, 300)] == list(range(1801, 2001))


async def test_outcomes_are_those_of_one_publisher_from_a_sequence_on(store):
    await store.write(
        dead=[dead_letter(seq) for seq in (9, 3, 5)] + [dead_letter(6, publisher=OTHER)],
        waiting=[waiting_event(1, seq=8), waiting_event(2, seq=4), waiting_event(3, seq=7, publisher=OTHER)],
        done=[],
    )
    assert await store.outcomes(PUBLISHER, 0) == ([3, 5, 9], [4, 8])
    assert await store.outcomes(PUBLISHER, 5) == ([5, 9], [8])
    assert await store.outcomes(PUBLISHER, 10) == ([], [])
    assert await store.outcomes(OTHER, 0) == ([6], [7])
    assert await store.outcomes(b"nobody", 0) == ([], [])


async def test_what_was_purged_or_cancelled_is_still_known_to_whoever_asks_for_outcomes(make_store):
    store = make_store()
    await store.open()
    letters = [dead_letter(seq, publisher=publisher) for publisher in (PUBLISHER, OTHER) for seq in (3, 4, 5)]
    await store.write(dead=letters, scheduled=[scheduled_event(7, 6), scheduled_event(7, 8)], waiting=[waiting_event(9)])
    rows = [found.row for found in await store.dead_letters(DeadFilter(), 0, 10)]
    await store.purge([rows[1], rows[2], rows[5], 999])
    await store.unschedule(PUBLISHER, 6)
    assert await store.outcomes(PUBLISHER, 0) == ([3, 4, 5], [6, 8, 9])
    assert await store.outcomes(PUBLISHER, 5) == ([5], [6, 8, 9])
    assert await store.outcomes(OTHER, 0) == ([3, 4, 5], [])
    await store.write(done=[9], redriven=rows[:1])  # those were not removed by people, and their attempts say what they are
    assert await store.outcomes(PUBLISHER, 0) == ([4, 5], [6, 8])
    assert store.counts().removed == 4
    await store.close()


async def test_of_what_was_removed_the_last_are_known(store, monkeypatch):
    for module in ("sql.store", "testing.memory_store"):
        monkeypatch.setattr(f"shardbus.{module}.REMOVED_MAX", 3)
    await store.write(dead=[dead_letter(seq) for seq in range(1, 8)])
    rows = [found.row for found in await store.dead_letters(DeadFilter(), 0, 10)]
    await store.purge(rows[:2])
    await store.purge(rows[2:5])
    await store.purge(rows[5:6])
    assert (await store.outcomes(PUBLISHER, 0), store.counts().removed) == (([4, 5, 6, 7], []), 3)


async def test_dead_letters_of_one_place_share_its_traceback_and_those_of_others_do_not(store):
    letters = [
        dead_letter(1, first_ns=1, place="a", traceback="A"),
        dead_letter(2, first_ns=2, place="a", traceback="A"),
        dead_letter(3, first_ns=3, place="b", traceback="B"),
    ]
    await store.write(dead=letters[:1], waiting=[], done=[])
    await store.write(dead=letters[1:], waiting=[], done=[])
    assert await dead_in(store, 10) == letters


@pytest.mark.parametrize("count", [1, 511, 513, 1000])
async def test_writes_of_any_length_are_kept_whole(store, count):
    letters = [dead_letter(seq, first_ns=seq) for seq in range(count)]
    events = [waiting_event(at) for at in range(1, count + 1)]
    await store.write(dead=letters, waiting=events, done=[])
    assert await dead_in(store, count + 1) == letters
    assert await load(store, "order-1", 0, count + 1) == events
    await store.write(dead=[], waiting=[], done=range(1, count))
    assert await positions(store) == [count]


async def test_an_error_that_is_no_sound_text_does_not_cost_its_event_the_record(store):
    await store.write(dead=[dead_letter(error="lone \ud800 surrogate, NUL \0")], waiting=[], done=[])
    (letter,) = await dead_in(store, 10)
    assert letter.envelope == envelope()
    assert letter.error.startswith("lone ")


async def test_a_store_takes_calls_again_after_it_was_closed_and_opened(make_store):
    store = make_store()
    for _ in range(2):
        await store.open()
        await store.write(dead=[dead_letter()], waiting=[], done=[])
        letters = await dead_in(store, 10)
        await store.close()
        assert letters == [dead_letter()]


async def test_a_store_may_be_closed_twice_and_without_having_been_opened(make_store):
    store = make_store()
    await store.close()
    await store.open()
    await store.close()
    await store.close()


# -- adapters whose rows outlive them


@pytest.mark.parametrize("make_store", ["memory", "sqlite file"], indirect=True)
async def test_a_successor_adopts_what_its_predecessor_left(make_store):
    first = make_store()
    await first.open()
    await first.write(dead=[dead_letter(1), dead_letter(2)], waiting=[waiting_event(at) for at in (4, 5, 6)], done=[4])
    await first.close()
    second = make_store()
    assert held(await second.open()) == (2, 2, 6)
    assert await dead_in(second, 10) == [dead_letter(1), dead_letter(2)]
    assert await load(second, "order-1", 0, 10) == [waiting_event(5), waiting_event(6)]
    # The place is known to the rows, though not to this store.
    await second.write(dead=[dead_letter(3)], waiting=[], done=[])
    assert await dead_in(second, 10) == [dead_letter(1), dead_letter(2), dead_letter(3)]
    await second.close()


# -- the file


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "store.db")


def files_beside(path: str) -> set[str]:
    return {entry.name for entry in Path(path).parent.iterdir()}


async def test_a_traceback_is_in_the_file_once_for_each_place(path):
    for start in (0, 10):  # the second store does not know what the first has written
        store = SqlStore(sqlite_file_url(path))
        await store.open()
        for seq in range(start, start + 4):
            await store.write(dead=[dead_letter(seq, place=f"shop.py:{seq % 2}")], waiting=[], done=[])
        await store.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM tracebacks").fetchone() == (2,)


async def test_no_index_of_the_log_is_mapped_because_a_full_ram_disk_would_kill_the_process(path):
    store = SqlStore(sqlite_file_url(path))
    await store.open()
    await store.write(dead=[dead_letter()], waiting=[], done=[])
    assert files_beside(path) == {"store.db", "store.db-wal"}  # and no store.db-shm
    await store.close()


_COMMIT_THEN_HANG = """
import asyncio, sys
from shardbus.sql.store import SqlStore
from shardbus.store import DeadFilter, DeadLetter, Envelope, WaitingEvent

def envelope(seq):
    return Envelope(publisher=bytes(16), seq=seq, slot=1, type="T", key="k", body=b"", headers=None, ordinal=0,
                    intended_ns=0, attempt=1)

async def main():
    store = SqlStore(sys.argv[1])
    await store.open()
    for start in range(0, 2000, 500):
        seqs = range(start, start + 500)
        await store.write(
            dead=[DeadLetter(envelope=envelope(seq), handlers=(), reason="failed", error_type="E", error="e", place="p",
                             traceback="t", first_ns=seq, last_ns=seq, epoch=b"") for seq in seqs],
            waiting=[WaitingEvent(position=seq + 1, envelope=envelope(seq)) for seq in seqs],
            done=[],
        )
    print("committed", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_what_was_committed_survives_a_kill_and_its_lock_does_not(path):
    url = sqlite_file_url(path)
    writer = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _COMMIT_THEN_HANG, url),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=asyncio.subprocess.PIPE,
    )
    assert writer.stdout is not None
    store = SqlStore(url)
    try:
        assert await writer.stdout.readline() == b"committed\n"
        with pytest.raises(StoreError, match="locked"):
            await store.open()
    finally:
        if writer.returncode is None:
            writer.send_signal(signal.SIGKILL)
        await writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert held(await store.open()) == (2000, 2000, 2000)
    assert await store.outcomes(bytes(16), 0) == (list(range(2000)), list(range(2000)))
    assert (await dead_in(store, 1))[0].traceback == "t"
    await store.close()


async def test_a_locked_file_is_a_store_error_and_opens_once_the_lock_is_gone(path):
    store = SqlStore(sqlite_file_url(path))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for _ in range(2):
            with pytest.raises(StoreError, match="database is locked"):
                await store.open()
        other.execute("ROLLBACK")
    await store.open()
    await store.write(dead=[dead_letter()], waiting=[], done=[])
    assert await dead_in(store, 10) == [dead_letter()]
    await store.close()


async def test_rows_of_a_bus_with_another_number_of_shards_are_refused_and_an_empty_store_is_not(path):
    for shards in (2, 3):  # empty, so the number may change
        store = SqlStore(sqlite_file_url(path), shards=shards)
        await store.open()
        await store.close()
    await store.open()
    await store.write(dead=[dead_letter()])
    await store.close()
    with pytest.raises(StoreError, match=r"a bus with 3 shards; serve with --workers 3"):
        await SqlStore(sqlite_file_url(path), shards=4).open()
    again = SqlStore(sqlite_file_url(path), shards=3)
    assert (await again.open()).dead == 1
    await again.close()


async def test_an_empty_store_of_another_schema_is_made_anew(path):
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
        database.execute("INSERT INTO meta VALUES ('schema_version', '1')")
        database.execute("CREATE TABLE dead_letters (id INTEGER PRIMARY KEY, other TEXT)")
        database.execute("CREATE TABLE waiting (position INTEGER PRIMARY KEY)")
    store = SqlStore(sqlite_file_url(path))
    assert await store.open() == StoreCounts(dead=0, waiting=0, position_max=0)
    await store.write(dead=[dead_letter()], waiting=[waiting_event(1)])
    await store.close()
    assert (await store.open()).dead == 1
    await store.close()


async def test_a_store_of_another_schema_is_refused_untouched_with_what_to_do(path):
    store = SqlStore(sqlite_file_url(path))
    await store.open()
    await store.write(dead=[dead_letter()], waiting=[], done=[])
    await store.close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE meta SET value = value + 1")
    with pytest.raises(StoreError, match=r"schema version 8, this shardbus knows 7.*--dead-letters"):
        await store.open()
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute("SELECT count(*) FROM dead_letters").fetchone() == (1,)
        database.execute("UPDATE meta SET value = value - 1")
    assert held(await store.open()) == (1, 0, 0)
    await store.close()


async def test_what_is_scheduled_stays_in_a_file_and_is_counted(path):
    store = SqlStore(sqlite_file_url(path))
    await store.open()
    await store.write(scheduled=[scheduled_event(7, 1)], dead=[dead_letter(2)])
    before = store.counts()
    await store.close()
    assert await store.open() == before
    assert (before.waiting, before.scheduled) == (1, 1)
    assert await due(store, 7) == [1]
    await store.close()


async def test_a_store_of_the_version_before_scheduled_events_grows_and_keeps_its_rows(path):
    store = SqlStore(sqlite_file_url(path))
    await store.open()
    await store.write(dead=[dead_letter()], waiting=[waiting_event(1, seq=2)])
    await store.close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE scheduled")
        database.execute("UPDATE meta SET value = '5' WHERE name = 'schema_version'")
    assert held(await store.open()) == (1, 1, 1)
    await store.write(scheduled=[scheduled_event(7, 3)])
    await store.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT value FROM meta WHERE name = 'schema_version'").fetchone() == ("7",)
    assert (await store.open()).scheduled == 1
    await store.close()


async def test_a_store_of_another_schema_that_holds_only_scheduled_events_is_refused_too(path):
    store = SqlStore(sqlite_file_url(path))
    await store.open()
    await store.write(scheduled=[scheduled_event(7, 3)])
    await store.close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE meta SET value = '8' WHERE name = 'schema_version'")
    with pytest.raises(StoreError, match="schema version 8"):
        await store.open()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM scheduled").fetchone() == (1,)


async def test_a_file_that_is_no_database_is_a_store_error(tmp_path):
    (tmp_path / "store.db").write_bytes(b"no database, and longer than the header of one would be" * 100)
    store = SqlStore(sqlite_file_url(str(tmp_path / "store.db")))
    with pytest.raises(StoreError, match="not a database"):
        await store.open()


def test_the_url_that_a_supervisor_writes_without_sqlalchemy_is_the_one_of_the_file():
    assert sqlite_file_url("/dev/shm/shardbus-0-a/store-1.db") == f"{FILE_URL}/dev/shm/shardbus-0-a/store-1.db"


async def test_a_new_file_is_its_owners_alone_and_one_that_is_there_keeps_its_mode(path):
    for mode in (0o600, 0o640):
        before = os.umask(0o022)
        try:
            store = SqlStore(sqlite_file_url(path))
            await store.open()
            await store.write(dead=[dead_letter(mode)])
        finally:
            os.umask(before)
        modes = {name: os.stat(Path(path).parent / name).st_mode & 0o777 for name in files_beside(path)}
        assert modes == dict.fromkeys(modes, mode)
        assert len(modes) == 2
        await store.close()
        os.chmod(path, 0o640)


async def test_nothing_of_a_purged_dead_letter_is_found_also_where_an_older_version_left_its_traceback(path):
    store = SqlStore(sqlite_file_url(path))
    await store.open()
    await store.write(dead=[dead_letter(1)])
    await store.purge([one.row for one in await store.dead_letters(DeadFilter(), 0, 10)])
    await store.close()
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute("SELECT count(*) FROM tracebacks").fetchone() == (0,)
        database.execute("INSERT INTO tracebacks VALUES ('gone', 'a card number')")
        database.execute("DROP INDEX dead_letters_by_place")
        database.execute("UPDATE meta SET value = '6' WHERE name = 'schema_version'")
    assert (await store.open()).bytes == 0
    await store.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM tracebacks").fetchone() == (0,)
        assert database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'dead_letters_by_place'").fetchone() == (1,)


async def test_a_directory_that_does_not_exist_is_a_store_error(tmp_path):
    store = SqlStore(sqlite_file_url(str(tmp_path / "nowhere" / "store.db")))
    with pytest.raises(StoreError, match="unable to open"):
        await store.open()


@pytest.mark.parametrize("name", ["with space.db", "100%25.db", "what?.db", "a#b.db", "naïve.db"])
async def test_a_file_of_any_name_is_the_one_that_is_opened(tmp_path, name):
    store = SqlStore(sqlite_file_url(str(tmp_path / name)))
    await store.open()
    await store.close()
    assert files_beside(str(tmp_path / name)) == {name}


async def test_a_connection_that_broke_is_replaced_by_a_later_call(path, monkeypatch):
    connections = []
    connect = aiosqlite.connect

    def recording(*arguments, **options):
        connections.append(connect(*arguments, **options))
        return connections[-1]

    monkeypatch.setattr(aiosqlite, "connect", recording)
    store = SqlStore(sqlite_file_url(path))
    await store.open()
    await store.write(dead=[dead_letter(1)], waiting=[], done=[])
    await connections[-1].close()
    with pytest.raises(StoreError):
        await store.write(dead=[dead_letter(2)], waiting=[], done=[])
    await store.write(dead=[dead_letter(2)], waiting=[], done=[])
    assert await dead_in(store, 10) == [dead_letter(1), dead_letter(2)]
    await store.close()
