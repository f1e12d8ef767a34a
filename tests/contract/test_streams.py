"""Streaming replies: what a handler yields reaches its reader, in order, no faster than it is read."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shardbus import (
    Bus,
    Client,
    ClientClosed,
    Command,
    CommandFailed,
    Event,
    RegistrationError,
    Stream,
    Timing,
    UsageError,
)
from shardbus.config import Limits
from shardbus.local import run_local
from shardbus.testing import MemoryStore


class Count(Command[int], key="key"):
    key: str
    upto: int
    how: str = ""


class Plain(Command[int], key="key"):
    key: str


class Step(Event, key="key"):
    key: str


bus = Bus("streams")
told: list[str] = []
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")


@bus.command(Count)
async def count(command: Count) -> AsyncIterator[Any]:
    try:
        for n in range(command.upto):
            told.append(str(n))
            if command.how == "slow":
                await asyncio.sleep(3600 if n == 3 else 0)
            if command.how == "stubborn" and n == 3:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(3600)
            yield bytes(1_000_000) if command.how == "large" else "text" if command.how == "wrong" else n
        if command.how == "fails":
            raise ValueError("no more")
        if command.how == "variable":
            variable.set("changed")
    except (GeneratorExit, asyncio.CancelledError) as error:
        told.append(type(error).__name__)
        raise
    finally:
        told.append("closed")


@bus.command(Plain)
async def plain(command: Plain) -> int:
    told.append("plain")
    return 1


@bus.on(Step)
async def step(event: Step) -> None:
    told.append(f"stepped {variable.get()}")


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    told.clear()


@asynccontextmanager
async def running(limits: Limits | None = None) -> AsyncIterator[Client]:
    async with run_local(bus, stores=[MemoryStore()], limits=limits or Limits()) as client:
        yield client


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what handlers do is seen from outside
            await asyncio.sleep(0.001)


async def rest(stream: Stream[int]) -> list[int]:
    return [item async for item in stream]


async def test_items_arrive_in_order_and_the_lane_goes_on_behind_them():
    async with running() as client:
        await client.publish(Step(key="a"))
        stream = client.stream(Count(key="a", upto=1000), window=10)
        items = [item async for item in stream]
        assert items == list(range(1000))
        assert await client.execute(Plain(key="a")) == 1
        assert [one for one in told if not one.isdigit()] == ["stepped clean", "closed", "plain"]
        assert [item async for item in stream] == []  # it is read once


@pytest.mark.parametrize("upto", [0, 1, 64, 65])
@pytest.mark.parametrize("window", [1, 2, 64, 1024])
async def test_any_window_carries_any_number_of_items(window: int, upto: int):
    async with running() as client:
        assert [item async for item in client.stream(Count(key="a", upto=upto), window=window)] == list(range(upto))


async def test_a_handler_is_not_advanced_beyond_the_window():
    async with running() as client:
        stream = client.stream(Count(key="a", upto=1000), window=8)
        assert await anext(stream) == 0
        await until(lambda: len(told) == 8)
        await asyncio.sleep(0.02)
        assert len(told) == 8
        for n in range(1, 5):
            assert await anext(stream) == n
        await until(lambda: len(told) == 12)
        await stream.aclose()


async def test_large_items_are_bounded_by_their_bytes():
    async with running() as client:
        stream = client.stream(Count(key="a", upto=1000, how="large"), window=1000)
        with pytest.raises(CommandFailed):  # they are no numbers
            await anext(stream)
        await until(lambda: "closed" in told)
        assert len([one for one in told if one.isdigit()]) <= 6


class Read(Command[bytes], key="key"):
    key: str
    size: int


@bus.command(Read)
async def read_bytes(command: Read) -> AsyncIterator[bytes]:
    for _ in range(50):
        yield bytes(command.size)


@pytest.mark.parametrize("size", [100_000, 200_000, 900_000])
async def test_items_of_any_size_arrive_whatever_the_window(size: int):
    async with running() as client:
        items = [item async for item in client.stream(Read(key="a", size=size), window=1000, timeout=30.0)]
    assert [len(item) for item in items] == [size] * 50


async def test_a_stream_goes_on_where_what_its_reader_said_was_lost():
    async with running() as client:
        stream = client.stream(Count(key="a", upto=50), window=4, timeout=30.0)
        items = [await anext(stream)]
        await until(lambda: len(told) == 4)
        client._outboxes[0].session.greet_again()
        items += [await anext(stream) for _ in range(3)]  # meanwhile nothing more can be said
        assert items + await rest(stream) == list(range(50))


async def test_a_client_that_leaves_ends_what_nobody_reads_on_and_waits_for_nothing():
    async with asyncio.timeout(20), running() as client:
        stream = client.stream(Count(key="a", upto=1000), window=4)
        assert await anext(stream) == 0
        assert (await client.flush()).published == 0
    with pytest.raises(ClientClosed):
        await rest(stream)
    assert "closed" in told


@pytest.mark.parametrize("leave", ["break", "cancel", "aclose", "block"])
async def test_a_handler_that_waits_for_its_reader_is_closed_when_that_leaves(leave: str):
    async with running() as client:

        async def read() -> None:
            async for item in client.stream(Count(key="a", upto=1000), window=4):
                if leave == "break" and item == 5:
                    break
                if leave == "cancel" and item == 5:
                    await asyncio.sleep(3600)

        if leave in ("aclose", "block"):
            stream = client.stream(Count(key="a", upto=1000), window=4)
            if leave == "block":
                async with stream:
                    assert await anext(stream) == 0
            else:
                assert await anext(stream) == 0
                await stream.aclose()
        else:
            reading = asyncio.create_task(read())
            await until(lambda: "5" in told)
            await asyncio.sleep(0.01)
            if leave == "cancel":
                reading.cancel()
            await asyncio.wait([reading])
            del reading
        gc.collect()
        await until(lambda: "closed" in told)
        assert "GeneratorExit" in told
        assert await client.execute(Plain(key="a")) == 1
        await client.flush(5)


async def test_a_handler_that_waits_for_something_else_is_cancelled_when_its_reader_leaves():
    async with running() as client:
        stream = client.stream(Count(key="a", upto=10, how="slow"))
        assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
        await stream.aclose()
        await until(lambda: "closed" in told)
        assert "CancelledError" in told
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_handler_that_goes_on_in_spite_of_its_cancellation_is_closed_at_its_next_item():
    async with running() as client:
        stream = client.stream(Count(key="a", upto=1000, how="stubborn"))
        assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
        await stream.aclose()
        await until(lambda: "closed" in told)
        assert told[-4:] == ["2", "3", "GeneratorExit", "closed"]
        assert await client.execute(Plain(key="a")) == 1


async def test_a_stream_ends_when_its_time_is_over():
    async with running() as client:
        stream = client.stream(Count(key="a", upto=10, how="slow"), timeout=1.0)
        with pytest.raises(TimeoutError, match=r"Count: its stream has not ended within 1 s; it is cancelled"):
            await rest(stream)
        await until(lambda: "closed" in told)


async def test_a_stream_outlives_a_reader_that_waits_for_one_item_in_vain():
    async with running() as client:
        stream = client.stream(Count(key="a", upto=10, how="slow"))
        assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.02)
        assert "closed" not in told
        await stream.aclose()


async def test_what_a_handler_raises_comes_behind_its_items():
    async with running() as client:
        stream = client.stream(Count(key="a", upto=100, how="fails"), window=7)
        assert [await anext(stream) for _ in range(100)] == list(range(100))
        with pytest.raises(CommandFailed, match="no more") as raised:
            await anext(stream)
        assert raised.value.error_type == "ValueError"
        assert "raise ValueError" in raised.value.remote_traceback
        assert "outlet.py" not in raised.value.remote_traceback


async def test_each_kind_of_call_is_refused_for_the_other_kind_of_command():
    async with running() as client:
        with pytest.raises(CommandFailed, match=r"Count streams its reply; use client\.stream") as raised:
            await client.execute(Count(key="a", upto=1))
        assert raised.value.error_type == "StreamingCommand"
        with pytest.raises(CommandFailed, match=r"does not yield; use client\.execute") as raised:
            await anext(client.stream(Plain(key="a")))
        assert raised.value.error_type == "PlainCommand"
        assert told == []
    async with Bus("none").local() as client:
        with pytest.raises(CommandFailed, match="UnknownCommand"):
            await anext(client.stream(Plain(key="a")))


async def test_an_item_that_is_not_as_declared_ends_the_stream():
    async with running() as client:
        with pytest.raises(CommandFailed, match="an item of its reply is not as declared"):
            await anext(client.stream(Count(key="a", upto=100, how="wrong"), window=4))
        await until(lambda: "closed" in told)


async def test_a_variable_that_a_stream_changes_is_not_seen_by_the_next_handler():
    async with running() as client:
        assert [item async for item in client.stream(Count(key="a", upto=3, how="variable"))] == [0, 1, 2]
        await client.publish(Step(key="a"))
        await client.flush()
        assert told[-1] == "stepped clean"


async def test_a_middleware_is_around_the_whole_stream():
    other = Bus("timed")
    timing = Timing()
    other.use(timing)
    other.command(Count)(count)
    async with other.local() as client:
        assert [item async for item in client.stream(Count(key="a", upto=50), window=3)] == list(range(50))
        with pytest.raises(CommandFailed):
            assert [item async for item in client.stream(Count(key="a", upto=5, how="fails"))]
    assert [(one.calls, one.failed) for one in timing.times()] == [(2, 1)]


async def test_a_closed_client_ends_its_streams():
    async with running() as client:
        stream = client.stream(Count(key="a", upto=10, how="slow"))
        assert await anext(stream) == 0
        await client.abort()
        with pytest.raises(ClientClosed):
            await rest(stream)
    await until(lambda: "closed" in told)


async def test_a_stream_is_closed_when_its_client_has_vanished_and_tells_it_should_that_come_back():
    limits = Limits(session_silence_s=1.0, ping_interval_s=0.1)
    async with running(limits) as client:
        stream = client.stream(Count(key="a", upto=1000), window=4)
        assert await anext(stream) == 0
        outboxes = client._outboxes
        sends, outboxes.send = outboxes.send, lambda *_: None  # type: ignore[method-assign, assignment]
        await until(lambda: "closed" in told)
        outboxes.send = sends  # type: ignore[method-assign]
        with pytest.raises(CommandFailed, match="its caller was silent for too long"):
            await rest(stream)


async def test_a_stream_that_makes_no_sense_is_refused():
    async with running() as client:
        for options in ({"window": 0}, {"window": 1025}, {"window": True}, {"timeout": 0}):
            with pytest.raises(UsageError):
                client.stream(Count(key="a", upto=1), **options)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="execute and stream take commands"):
            client.stream(Step(key="a"))  # type: ignore[arg-type]


def test_what_yields_is_a_handler_of_commands_only_and_async():
    refused = Bus("refused")

    def yields(command: Count) -> Any:
        yield 1

    async def yields_for_an_event(event: Step) -> AsyncIterator[int]:
        yield 1

    with pytest.raises(RegistrationError, match="make it `async def`"):
        refused.command(Count)(yields)
    with pytest.raises(RegistrationError, match="a handler of Step returns"):
        refused.on(Step)(yields_for_an_event)
