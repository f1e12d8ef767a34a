"""The writer of a store: rows that come late, at a position from before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shardbus.config import Limits
from shardbus.store import Envelope, WaitingEvent
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
