"""The writer of a store: rows that come late, at a position from before; and the rows of scheduled events, which go last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shardbus.config import Limits
from shardbus.store import DeadLetter, Envelope, ScheduledEvent, WaitingEvent
from shardbus.store_writer import StoreWriter
from shardbus.testing import MemoryStore


def row(position: int) -> WaitingEvent:
    envelope = Envelope(
        publisher=b"p" * 16,
        seq=position,
        slot=0,
        type="T",
        key="k",
        body=b"",
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
async def writing(store: MemoryStore, **limits: int) -> AsyncIterator[StoreWriter]:
    broken: list[BaseException] = []
    writer = StoreWriter(store, Limits(**limits), lambda: 0, broken.append, lambda: None)  # type: ignore[arg-type]
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


async def test_a_scheduled_row_stands_for_its_event_until_what_it_became_is_written():
    # Its lane goes to the store, and it fails before that is written, where there is room for nothing more.
    store = MemoryStore()
    await store.write(scheduled=[ScheduledEvent(envelope=row(1).envelope, due_ns=1)])
    async with writing(store, store_rows_max=1) as writer:
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
    async with writing(store, store_rows_max=1) as writer:
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
