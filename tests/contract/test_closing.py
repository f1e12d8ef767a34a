"""What ends with its shard ends, whatever the application makes of its cancellation; what follows it is not begun."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from shardbus import Bus, Command, CommandLost, Context, Event, NotDelivered, SessionEnded, testing
from shardbus.config import DEFAULT_LIMITS
from shardbus.local import run_local
from shardbus.testing import MemoryStore


class Said(Event, key="chat"):
    chat: str


class Count(Command[int], key="chat"):
    chat: str


async def stand_still() -> None:
    """For ever, up to a cancellation, and then go on as if there had been none."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


async def test_nothing_more_is_taken_from_a_stream_and_what_was_is_not_all_of_it():
    bus, begun, told = Bus("counts"), asyncio.Event(), list[int]()

    @bus.command(Count)
    async def count(command: Count) -> AsyncIterator[int]:
        for number in range(3):
            begun.set()
            await stand_still()
            told.append(number)
            yield number

    async with testing.run(bus) as kit:

        async def read() -> list[int]:
            return [item async for item in kit.client.stream(Count(chat="7"), timeout=1000.0)]

        reading = asyncio.create_task(read())
        await begun.wait()
        await kit.kill(0)
        with pytest.raises(CommandLost):
            await reading
    assert told == [0]


async def test_the_end_of_a_session_is_not_run_behind_a_handler_that_goes_on():
    bus, begun, ended = Bus("chats"), asyncio.Event(), list[str]()

    @bus.session
    async def state(session: str) -> AsyncIterator[list[str]]:
        yield []
        ended.append("begins")
        await asyncio.sleep(600)

    @bus.on(Said)
    async def said(event: Said, context: Context) -> None:
        await context.session()

    @bus.on(SessionEnded)
    async def end(event: SessionEnded) -> None:
        begun.set()
        await stand_still()

    limits = replace(DEFAULT_LIMITS, session_ends_s=0.05)
    with pytest.raises(NotDelivered):  # noqa: PT012 - leaving the client's block raises
        async with run_local(bus, stores=[MemoryStore()], close_timeout_s=0.1, limits=limits) as client:
            await client.publish(Said(chat="7"))
            await client.flush()
            await client.publish(SessionEnded(session="7"))
            await begun.wait()
    assert len(ended) <= 1  # by the shard itself, within its time for that


async def test_a_worker_dies_once_in_a_simulation():
    bus, begun = Bus("chats"), asyncio.Event()

    @bus.on(Said)
    async def said(event: Said) -> None:
        begun.set()
        await stand_still()

    async with testing.run(bus) as kit:
        kit.kill_at(1)
        await kit.client.publish(Said(chat="7"))
        await begun.wait()
