"""Commands in numbers, and what becomes of one that nobody waits for any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from shardbus import Bus, Client, Command, CommandFailed, Event, RegistrationError
from shardbus.config import Limits
from shardbus.local import run_local
from shardbus.testing import MemoryStore


class Wait(Command[str], key="key"):
    key: str
    how: str = ""


class Get(Command[int], key="key", idempotent=True):
    key: str


class Step(Event, key="key"):
    key: str


bus = Bus("commands")
told: list[str] = []
release: list[asyncio.Event] = []  # the present one's loop is the test's


@bus.command(Wait)
async def wait(command: Wait) -> str:
    told.append(f"began {command.how}")
    try:
        await release[0].wait()
    except asyncio.CancelledError:
        told.append(f"cancelled {command.how}")
        if command.how == "stubborn":
            return "all the same"
        raise
    finally:
        await asyncio.sleep(0)
    return "released"


@bus.command(Get)
async def get(command: Get) -> int:
    try:
        async with asyncio.timeout(0.001):  # is wrong where a cancellation of the task is left over
            await asyncio.sleep(60)
    except TimeoutError:
        return 1
    return 0


@bus.on(Step)
async def step(event: Step) -> None:
    told.append("stepped")


@pytest.fixture(autouse=True)
async def nothing_told() -> None:
    told.clear()
    release[:] = [asyncio.Event()]


@asynccontextmanager
async def running(shards: int = 1) -> AsyncIterator[Client]:
    stores = [MemoryStore() for _ in range(shards)]
    async with run_local(bus, shards=shards, stores=stores, limits=Limits()) as client:
        yield client


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what handlers do is seen from outside
            await asyncio.sleep(0.001)


async def until_told(*wanted: str) -> None:
    await until(lambda: told == list(wanted))


@pytest.mark.parametrize("how", ["willing", "stubborn"])
async def test_a_handler_is_cancelled_with_its_caller_and_its_lane_goes_on(how: str):
    async with running() as client:
        call = asyncio.create_task(client.execute(Wait(key="a", how=how)))
        await until_told(f"began {how}")
        call.cancel()
        await client.publish(Step(key="a"))
        assert await client.execute(Get(key="a")) == 1
        assert await client.execute(Get(key="b")) == 1
        assert told == [f"began {how}", f"cancelled {how}", "stepped"]
        assert (await client.flush(5)).handled == 1


async def test_a_handler_is_cancelled_when_its_callers_time_is_over():
    async with running() as client:
        with pytest.raises(TimeoutError, match="is cancelled where it still runs"):
            await client.execute(Wait(key="a"), timeout=1.0)
        await until_told("began ", "cancelled ")


async def test_a_command_that_is_cancelled_before_it_began_never_runs():
    async with running() as client:
        first = asyncio.create_task(client.execute(Wait(key="a", how="first")))
        await until_told("began first")
        others = [asyncio.create_task(client.execute(Wait(key="a", how="queued"))) for _ in range(3)]
        last = asyncio.create_task(client.execute(Wait(key="a", how="last")))
        await client.execute(Get(key="b"))  # its reply comes when the shard has all before it
        for one in others:
            one.cancel()
        await client.execute(Get(key="b"))
        release[0].set()
        assert await asyncio.gather(first, last) == ["released", "released"]
        assert told == ["began first", "began last"]
        await client.flush(5)


async def test_a_command_that_is_cancelled_in_the_turn_of_its_call_is_never_sent():
    async with running() as client:
        call = asyncio.create_task(client.execute(Wait(key="a")))
        await asyncio.sleep(0)
        call.cancel()
        assert await client.execute(Get(key="a")) == 1
        assert told == []
        await client.flush(5)


async def test_the_commands_of_a_client_that_leaves_end_with_it():
    async with running() as client:
        call = asyncio.create_task(client.execute(Wait(key="a"), timeout=60))
        await until_told("began ")
        call.cancel()
    assert told == ["began ", "cancelled "]


async def test_five_thousand_commands_are_in_flight_at_once():
    async with running(2) as client:
        calls = [asyncio.create_task(client.execute(Wait(key=str(n)), timeout=100)) for n in range(5000)]
        await until(lambda: len(told) == 5000)
        release[0].set()
        assert set(await asyncio.gather(*calls)) == {"released"}


async def test_five_thousand_commands_are_cancelled_at_once():
    async with running(2) as client:
        calls = [asyncio.create_task(client.execute(Wait(key=str(n % 3000)), timeout=100)) for n in range(5000)]
        await until(lambda: len(told) == 3000)
        for call in reversed(calls):  # those that wait behind others first
            call.cancel()
        await client.flush(60)
        await until(lambda: len(told) == 6000)
        assert (told.count("began "), told.count("cancelled ")) == (3000, 3000)  # those behind them never began
        assert await client.execute(Get(key="7")) == 1


async def test_only_a_command_is_idempotent():
    assert Get.__shardbus_idempotent__
    assert not Wait.__shardbus_idempotent__
    with pytest.raises(RegistrationError, match="idempotent= is for commands"):

        class Wrong(Event, idempotent=True):
            pass


async def test_a_command_without_handler_fails_as_before():
    async with Bus("none").local() as client:
        with pytest.raises(CommandFailed, match="no handler"):
            await client.execute(Get(key="a"))
