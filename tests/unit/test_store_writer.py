"""The writer of a store: rows that come late, at a position from before; what is read, and what a store that fails does;
and the rows of scheduled events, which go last."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

from shardbus.config import Limits
from shardbus.lane_reads import LaneRead
from shardbus.messages import WireKey
from shardbus.store import (
    ANY_SIZE,
    DeadLetter,
    Envelope,
    LaneHead,
    ScheduledEvent,
    Store,
    StoreError,
    WaitingEvent,
)
from shardbus.store_writer import StoreWriter
from shardbus.testing import MemoryStore


class Watched(MemoryStore):
    """Says which lanes were read together."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[list[WireKey]] = []

    async def load_waiting(self, lanes: Sequence[LaneHead], bytes_max: int = ANY_SIZE) -> list[list[WaitingEvent]]:
        found = await super().load_waiting(lanes, bytes_max)
        self.reads.append([lane.key for lane in lanes[: len(found)]])
        return found


def row(position: int, key: WireKey = "k", body: bytes = b"") -> WaitingEvent:
    envelope = Envelope(
        publisher=b"p" * 16,
        seq=position,
        slot=0,
        type="T",
        key=key,
        body=body,
        headers=None,
        ordinal=0,
        intended_ns=0,
        attempt=1,
    )
    return WaitingEvent(position=position, envelope=envelope)


async def settled(writer: StoreWriter) -> None:
    async with asyncio.timeout(10):
        while not writer.idle():  # noqa: ASYNC110 - it has no event for that
            await asyncio.sleep(0.001)


async def test_the_writer_is_not_idle_while_rows_leave():
    class SlowStore(MemoryStore):
        async def write(self, **rows: Any) -> None:
            await asyncio.sleep(0.01)
            await super().write(**rows)

    store = SlowStore()
    writer = StoreWriter(store, Limits(), lambda: 0, lambda _error: None, lambda: None)
    await writer.open()
    writer.start()
    writer.add_waiting(row(1), lambda: None)
    await settled(writer)
    writer.add_done(1)
    await settled(writer)
    assert not store.rows.waiting  # whoever drains closes it now
    await writer.close()


def letter(seq: int) -> DeadLetter:
    return DeadLetter(
        envelope=row(seq).envelope,
        handlers=("h",),
        reason="failed",
        error_type="",
        error="",
        place="",
        traceback="",
        first_ns=1,
        last_ns=1,
        epoch=b"e",
    )


@asynccontextmanager
async def writing(store: Store, limits: Limits | None = None) -> AsyncIterator[StoreWriter]:
    broken: list[BaseException] = []
    writer = StoreWriter(store, limits or Limits(), lambda: 0, broken.append, lambda: None)
    await writer.open()
    writer.start()
    yield writer
    await writer.close()
    assert not broken


async def test_rows_that_leave_go_together_when_no_more_are_to_follow():
    store, gone = MemoryStore(), []
    await store.write(scheduled=[ScheduledEvent(envelope=row(seq).envelope, due_ns=1) for seq in range(1, 5)])
    async with writing(store) as writer:
        writer.when_left(gone.append)
        for number in (1, 2, 3):
            writer.add_leaving(number, more=True)
        await asyncio.sleep(0.01)
        assert (len(store.rows.scheduled), writer.idle()) == (4, False)
        writer.add_leaving(4, more=False)
        await settled(writer)
        assert gone == [[1, 2, 3, 4]]
        assert not store.rows.scheduled


async def test_an_event_that_dies_before_it_is_kept_stays_in_the_store_once_it_is():
    # Its publisher hears that it is kept, and others' dead letters come first: the worker may end before its own is written.
    store = MemoryStore()
    async with writing(store, Limits(store_write_rows_max=2)) as writer:
        seen: list[tuple[bool, bool]] = []
        write = store.write

        async def look(**rows: Any) -> None:
            await write(**rows)
            seen.append((2 in store.rows.waiting, (b"p" * 16, 2) in store.rows.dead))

        store.write = look  # type: ignore[method-assign]
        told: list[str] = []
        for other in range(3, 9):
            writer.add_dead(letter(other), 0, lambda: None)
        writer.add_waiting(row(1), lambda: None)
        writer.add_waiting(row(2), lambda: told.append("kept"))
        writer.add_dead(letter(2), 2, lambda: told.append("dead"))
        await settled(writer)
    assert seen[0] == (True, False)
    assert seen[-1] == (False, True)
    assert all(map(any, seen))
    assert told == ["kept", "dead"]


@pytest.mark.parametrize("full", ["stop", "drop_oldest"])
async def test_a_dead_event_that_finds_no_room_does_not_hold_up_what_makes_it(full: Any):
    # Its room was that of dead letters, which are on their way back into their lanes now, behind it.
    store = MemoryStore()
    async with writing(store, Limits(store_rows_max=3, store_full=full)) as writer:
        for other in (11, 12, 13):
            writer.add_dead(letter(other), 0, lambda: None)
        await settled(writer)
        told: list[str] = []
        back = asyncio.Event()
        writer.add_waiting(row(1), lambda: told.append("kept"))
        writer.add_dead(letter(1), 1, lambda: told.append("dead"))
        for position, dead in enumerate(sorted(store.rows.rows.values()), 2):
            writer.add_waiting(row(position), back.set, redriven=dead)
        async with asyncio.timeout(10):
            await back.wait()
        assert not told  # it is in the store in no way, and its publisher holds it
        writer.add_done(2)
        await settled(writer)
    assert told == ["dead"]
    assert (sorted(store.rows.waiting), list(store.rows.dead)) == ([3, 4], [(b"p" * 16, 1)])


async def test_a_dead_event_that_parks_its_key_and_finds_no_room_does_not_hold_up_the_dead_letters_behind_it():
    # Once the others are dead letters they may be dropped, and that is its room.
    store = MemoryStore()
    async with writing(store, Limits(store_rows_max=3, store_full="drop_oldest")) as writer:
        for position in (1, 2, 3):
            writer.add_waiting(row(position), lambda: None)
        await settled(writer)
        told: list[int] = []
        writer.add_waiting(row(4), lambda: told.append(4))
        writer.add_dead(replace(letter(4), position=4), 4, lambda: told.append(-4))
        for position in (1, 2, 3):
            writer.add_dead(letter(position), position, partial(told.append, position))
        await settled(writer)
    assert sorted(told[:3]) == [1, 2, 3]
    assert told[3:] == [4, -4]
    assert (b"p" * 16, 4) in store.rows.dead


async def test_dead_letters_whose_room_was_promised_are_not_redriven_and_so_make_it():
    # What parks a key and what waits behind it is never dropped, so nothing else would ever make that room.
    store = MemoryStore()
    async with writing(store, Limits(store_rows_max=3, store_full="drop_oldest")) as writer:
        for other in (11, 12, 13):
            writer.add_dead(letter(other), 0, lambda: None)
        await settled(writer)
        assert writer.may_redrive(letter(11))
        writer.add_waiting(row(1), lambda: None, redriven=min(store.rows.rows.values()))
        assert writer.has_room(2, 0)
        assert not writer.has_room(3, 0)
        told: list[str] = []
        writer.add_dead(replace(letter(2), position=2), 0, partial(told.append, "parked"))
        writer.add_waiting(row(3), partial(told.append, "kept"))
        assert not writer.may_redrive(letter(12))
        assert writer.may_redrive(replace(letter(12), position=9))  # that one is never dropped anyway
        await settled(writer)
        assert sorted(told) == ["kept", "parked"]
        assert sorted(store.rows.waiting) == [1, 3]
        assert not writer.may_redrive(letter(12))
        writer.add_done(1)
        await settled(writer)
        assert writer.may_redrive(letter(12))


async def test_a_scheduled_row_stands_for_its_event_until_what_it_became_is_written():
    # Its lane goes to the store, and it fails before that is written, where there is room for nothing more.
    store = MemoryStore()
    await store.write(scheduled=[ScheduledEvent(envelope=row(1).envelope, due_ns=1)])
    async with writing(store, Limits(store_rows_max=1)) as writer:
        seen: list[tuple[int, int, int]] = []
        write = store.write

        async def look(**rows: Any) -> None:
            await write(**rows)
            seen.append((len(store.rows.scheduled), len(store.rows.waiting), len(store.rows.dead)))

        store.write = look  # type: ignore[method-assign]
        writer.add_waiting(row(1), lambda: None, begun=1)
        writer.add_dead(letter(1), 1, lambda: None)
        await settled(writer)
        assert all(sum(counts) >= 1 for counts in seen)
        assert seen[-1] == (0, 0, 1)


async def test_a_dead_letter_takes_the_place_of_its_scheduled_row_in_a_full_store():
    store = MemoryStore()
    await store.write(scheduled=[ScheduledEvent(envelope=row(1).envelope, due_ns=1)])
    async with writing(store, Limits(store_rows_max=1)) as writer:
        writer.add_dead(letter(1), 0, lambda: None, begun=1)
        await settled(writer)
        assert (len(store.rows.scheduled), len(store.rows.dead)) == (0, 1)


async def test_a_mark_is_told_once_it_is_committed():
    store, told = MemoryStore(), []
    async with writing(store) as writer:
        store.failing = "locked"
        writer.add_mark(7, lambda: told.append(store.rows.begun_until_ns))
        await asyncio.sleep(0.01)
        assert told == []
        store.failing = ""
        await settled(writer)
        assert told == [7]


async def test_a_full_store_is_told_once_while_it_finds_room_for_a_row_at_a_time(caplog: pytest.LogCaptureFixture):
    store, dead = MemoryStore(), []
    async with writing(store, Limits(store_rows_max=2)) as writer, asyncio.timeout(10):
        for position in (1, 2):
            writer.add_waiting(row(position), lambda: None)
        await settled(writer)
        for seq in (3, 4, 5):
            writer.add_dead(letter(seq), 0, lambda seq=seq: dead.append(seq))  # type: ignore[misc]
        for position in (1, 2):
            while not writer.failing:  # noqa: ASYNC110 - it has no event for that
                await asyncio.sleep(0.001)
            writer.add_done(position)
            while len(dead) < position:  # noqa: ASYNC110 - nor for that
                await asyncio.sleep(0.001)
        while not writer.failing:  # noqa: ASYNC110 - nor for that
            await asyncio.sleep(0.001)
        assert [record.message for record in caplog.records] == [
            "the store cannot write: it is full (2 rows, 1,024 bytes); publishers wait until it can"
        ]

        async def make_room() -> None:
            await writer.purge([1])

        writer.add_read(make_room)
        await settled(writer)
        assert dead == [3, 4, 5]
        assert [record.message for record in caplog.records[1:]] == ["the store writes again"]


@pytest.mark.parametrize("together", [True, False])
async def test_a_row_that_comes_late_has_its_place_before_those_that_are_written(together: bool):
    store, broken, committed = MemoryStore(), [], []
    writer = StoreWriter(store, Limits(store_rows_max=4), lambda: 0, broken.append, lambda: None)
    await writer.open()
    writer.start()
    for position in (2, 5):
        writer.add_waiting(row(position), lambda at=position: committed.append(at))  # type: ignore[misc]
    if not together:
        await settled(writer)
    assert writer.has_room(1, 0)
    writer.add_late(row(3), lambda: committed.append(3))
    assert writer.has_room(1, 600)
    assert not writer.has_room(2, 600)  # what comes late takes room before it is there
    await settled(writer)
    assert sorted(committed) == [2, 3, 5]
    assert sorted(store.rows.waiting) == [2, 3, 5]
    assert writer.has_room(1, 600)
    for position in (2, 3, 5):
        writer.add_done(position)
    writer.add_waiting(row(6), lambda: committed.append(6))
    await settled(writer)
    assert sorted(store.rows.waiting) == [6]
    assert writer.has_room(3, 0)
    assert not writer.has_room(4, 0)
    await writer.close()
    assert not broken


# -- what is read


async def asked(writer: StoreWriter) -> None:
    """Something that was asked of the store is answered."""
    answered = asyncio.Event()

    async def ask() -> None:
        answered.set()

    writer.add_read(ask)
    async with asyncio.timeout(10):
        await answered.wait()


async def test_lanes_are_read_together_and_after_what_is_asked():
    store, order = Watched(), []
    await store.write(waiting=[row(1 + at, f"key {at}") for at in range(100)])

    async def ask() -> None:
        order.append(0)

    async with writing(store) as writer:
        for at in range(100):
            head = LaneHead(f"key {at}", 0, 1)
            writer.add_lane_read(LaneRead(head, 0, lambda rows: order.extend(one.position for one in rows)))
        writer.add_read(ask)
        await settled(writer)
    assert len(store.reads) == 1
    assert order == list(range(101))


async def test_how_much_is_read_together_is_bounded_in_lanes_rows_and_bytes():
    store, sizes = Watched(), []
    await store.write(waiting=[row(1 + at, at % 1000) for at in range(5000)])
    large = [row(6000 + at, "large", bytes(1024 * 1024)) for at in range(6)]
    await store.write(waiting=large)
    async with writing(store) as writer:
        for at in range(1000):
            writer.add_lane_read(LaneRead(LaneHead(at, 0, 64), 0, lambda rows: sizes.append(len(rows))))
        writer.add_lane_read(LaneRead(LaneHead("large", 0, 64), 0, lambda rows: sizes.append(len(rows))))
        await settled(writer)
    assert sizes == [5] * 1000 + [4]
    assert max(map(len, store.reads)) == 16  # of up to 64 rows each
    assert [key for read in store.reads for key in read] == [*range(1000), "large"]


async def test_a_lane_whose_rows_are_not_written_yet_does_not_hold_up_others():
    class Stuck(Watched):
        async def write(self, **rows: Any) -> None:
            raise StoreError("the disk is full")

    store, found = Stuck(), []
    store.rows.waiting[1] = row(1, "there")
    async with writing(store) as writer:
        writer.add_waiting(row(2, "to come"), lambda: None)
        writer.add_lane_read(LaneRead(LaneHead("to come", 1, 1), 2, found.append))
        writer.add_lane_read(LaneRead(LaneHead("there", 0, 1), 0, found.append))
        async with asyncio.timeout(10):
            while not found:  # noqa: ASYNC110 - the test ends by its time-out
                await asyncio.sleep(0.001)
        assert found == [[row(1, "there")]]
        assert not writer.idle()


# -- a store that fails


async def test_what_is_asked_is_answered_while_writes_fail():
    store = MemoryStore()
    async with writing(store) as writer:
        store.failing = "the disk is full"
        writer.add_waiting(row(1), lambda: None)
        for _ in range(3):
            await asked(writer)
            assert writer.failing == "the disk is full"
        store.failing = ""
        await settled(writer)
        assert writer.failing == ""


async def test_what_is_read_back_while_writes_fail_is_as_it_was_changed_last():
    # Else its attempts are counted anew, and handlers that have succeeded are called again.
    store, found = MemoryStore(), []
    await store.write(waiting=[row(1), row(2)])
    changed = replace(row(1), todo={"second": 1}, due_ns=7)
    async with writing(store) as writer:
        store.failing = "locked"
        writer.add_changed(changed)
        writer.add_lane_read(LaneRead(LaneHead("k", 0, 64), 0, found.extend))
        async with asyncio.timeout(10):
            while not found:  # noqa: ASYNC110 - it has no event for that
                await asyncio.sleep(0.001)
        assert found == [changed, row(2)]
        store.failing = ""


async def test_a_full_store_does_not_say_that_it_writes_again_before_it_does(caplog: pytest.LogCaptureFixture):
    async with writing(MemoryStore(), Limits(store_rows_max=2)) as writer:
        kept: list[int] = []
        for position in (1, 2, 3):
            writer.add_waiting(row(position), lambda at=position: kept.append(at))  # type: ignore[misc]
        async with asyncio.timeout(10):
            while not writer.failing:  # noqa: ASYNC110 - the test ends by its time-out
                await asyncio.sleep(0.001)
        for at in range(3):  # neither an answer nor a change of what is there makes room
            await asked(writer)
            writer.add_changed(replace(row(1), due_ns=at))
            await asked(writer)
            assert "full" in writer.failing
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        writer.add_done(1)
        await settled(writer)
        assert (kept, writer.failing) == ([1, 2, 3], "")
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


async def test_a_store_that_could_not_be_read_works_again_once_it_can():
    failures = [StoreError("locked"), StoreError("locked")]

    class Locked(MemoryStore):
        async def load_waiting(self, lanes: Sequence[LaneHead], bytes_max: int = ANY_SIZE) -> list[list[WaitingEvent]]:
            if failures:
                raise failures.pop()
            return await super().load_waiting(lanes, bytes_max)

    store, found = Locked(), []
    store.rows.waiting[1] = row(1)
    async with writing(store) as writer:
        writer.add_lane_read(LaneRead(LaneHead("k", 0, 1), 0, found.append))
        await settled(writer)
        assert (found, writer.failing) == ([[row(1)]], "")
