"""Subscriptions, commands in numbers and streams over real workers: killed ones, and listeners that stand still."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from buses import RunningBus

import shardbus
from shardbus import CommandFailed, CommandLost, Missed

MakeBus = Callable[..., RunningBus]

APPLICATION = """
import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from shardbus import Bus, Command, Context, Event


class Ticked(Event, key="key"):
    key: str
    n: int
    payload: bytes = b""


class Stay(Command[int], key="key"):
    key: str


class Again(Command[int], key="key", idempotent=True):
    key: str


class Deadly(Command[int], key="key", idempotent=True):
    key: str


class Tell(Command[list[str]], key="key"):
    key: str


class Tokens(Command[int], key="key"):
    key: str


bus = Bus("listened")
told: list[str] = []


@bus.on(Ticked)
async def tick(event: Ticked) -> None: ...


@bus.command(Stay)
async def stay(command: Stay) -> int:
    told.append("began")
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        told.append("cancelled")
        raise
    return 0


@bus.command(Again)
async def again(command: Again, context: Context) -> int:
    if context.attempt == 1:
        await asyncio.sleep(3600)
    return context.attempt


@bus.command(Deadly)
async def die(command: Deadly) -> int:
    await asyncio.sleep(0.01)
    os._exit(9)


@bus.command(Tell)
async def tell(command: Tell) -> list[str]:
    return told


@bus.command(Tokens)
async def tokens(command: Tokens) -> AsyncIterator[int]:
    n = 0
    try:
        while True:
            yield n
            n += 1
    finally:
        told.append(f"closed at {n}")


class Stubborn(Command[int], key="key"):
    key: str


@bus.command(Stubborn)
async def stubborn(command: Stubborn) -> AsyncIterator[int]:
    yield 0
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(3600)
"""

LISTENER = """
import asyncio, sys
import shardbus
from listened import Ticked

async def main():
    async with shardbus.connect(sys.argv[1]) as client:
        async with client.subscribe(Ticked, queue_events_max=100_000) as events:
            print("listening", flush=True)
            got = missed = 0
            async for event in events:
                if isinstance(event, shardbus.Missed):
                    missed += event.count
                else:
                    got += 1
                    if event.key == "end":
                        break
            print(got, missed, flush=True)

asyncio.run(main())
"""


def served(make_bus: MakeBus, directory: Path, workers: int = 1, *options: str) -> tuple[RunningBus, dict[str, Any]]:
    (directory / "listened.py").write_text(APPLICATION)
    (directory / "listener.py").write_text(LISTENER)
    bus = make_bus("--workers", str(workers), *options, application="listened:bus")
    bus.wait_ready()
    space: dict[str, Any] = {}
    exec(compile(APPLICATION, "listened.py", "exec"), space)  # noqa: S102 - the same message types as the served application
    return bus, space


def rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def told(client: shardbus.Client, space: dict[str, Any], wanted: str) -> list[str]:
    """What handlers of the shard of key "a" told, once that is among it."""
    async with asyncio.timeout(30):
        while True:
            found = await client.execute(space["Tell"](key="a"))
            if any(one.startswith(wanted) for one in found):
                return found
            await asyncio.sleep(0.02)


async def test_a_listener_of_every_key_hears_all_of_it_in_order(make_bus: MakeBus, short_path: Path) -> None:
    bus, space = await asyncio.to_thread(served, make_bus, short_path, 2)
    async with shardbus.connect(bus.address) as client, shardbus.connect(bus.address) as listener:
        async with listener.subscribe(space["Ticked"], queue_events_max=20_000) as events:
            found = []
            async with asyncio.timeout(60):
                for first in range(0, 10_000, 1000):  # at a time, less than a window takes
                    batch = [space["Ticked"](key=str(n % 10), n=n) for n in range(first, first + 1000)]
                    await client.publish_many(batch)
                    found += [await anext(events) for _ in batch]
        for key in range(10):
            assert [one.n for one in found if one.key == str(key)] == list(range(key, 10_000, 10))


async def test_a_subscription_goes_on_with_the_successor_and_says_that_some_may_be_missing(
    make_bus: MakeBus, short_path: Path
) -> None:
    bus, space = await asyncio.to_thread(served, make_bus, short_path)
    async with shardbus.connect(bus.address) as client, client.subscribe(space["Ticked"], key="a") as events:
        await client.publish(space["Ticked"](key="a", n=1))
        async with asyncio.timeout(60):
            assert (await anext(events)).n == 1
            await client.flush()  # else it comes again
            os.kill((await asyncio.to_thread(bus.worker_pids))[0], signal.SIGKILL)
            assert await anext(events) == Missed(None)
            await client.publish(space["Ticked"](key="a", n=2))
            assert (await anext(events)).n == 2


async def test_a_listener_that_stands_still_costs_its_worker_a_window_and_hears_how_much_it_missed(
    make_bus: MakeBus, short_path: Path
) -> None:
    bus, space = await asyncio.to_thread(served, make_bus, short_path)
    listener = subprocess.Popen(  # noqa: ASYNC220 - nothing else goes on yet
        [sys.executable, "listener.py", bus.address],
        cwd=short_path,
        env=bus.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert listener.stdout is not None
    try:
        assert await asyncio.to_thread(listener.stdout.readline) == "listening\n"
        worker = (await asyncio.to_thread(bus.worker_pids))[0]
        async with shardbus.connect(bus.address) as client:
            payload = bytes(2000)
            await client.publish_many([space["Ticked"](key="a", n=n, payload=payload) for n in range(1000)])
            await client.flush(60)
            before = rss_bytes(worker)
            listener.send_signal(signal.SIGSTOP)
            for _ in range(100):  # 200 MB
                await client.publish_many([space["Ticked"](key="a", n=n, payload=payload) for n in range(1000)])
            assert (await client.flush(120)).handled == 101_000  # nobody waits for a listener
            assert rss_bytes(worker) - before < 60_000_000
            listener.send_signal(signal.SIGCONT)
            got = missed = 0
            while not missed:  # once the listener has taken what was on its way, there is room for the end
                await client.publish(space["Ticked"](key="end", n=0))
                try:
                    told = await asyncio.to_thread(listener.communicate, timeout=2)
                except subprocess.TimeoutExpired:
                    continue
                got, missed = map(int, told[0].split())
        assert got + missed >= 101_001
        assert missed > 50_000
    finally:
        listener.kill()
        listener.communicate()


async def test_five_thousand_commands_are_in_flight_and_end_with_their_callers(
    make_bus: MakeBus, short_path: Path
) -> None:
    bus, space = await asyncio.to_thread(served, make_bus, short_path)
    async with shardbus.connect(bus.address) as client:
        calls = [
            asyncio.create_task(client.execute(space["Stay"](key=f"k{n % 4000}"), timeout=100)) for n in range(5000)
        ]
        async with asyncio.timeout(60):
            while len(await client.execute(space["Tell"](key="a"), timeout=30)) < 4000:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        for call in reversed(calls):  # those that wait behind others first
            call.cancel()
        await client.flush(60)
        async with asyncio.timeout(60):
            while len(found := await client.execute(space["Tell"](key="a"), timeout=30)) < 8000:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (found.count("began"), found.count("cancelled")) == (4000, 4000)  # those behind others never began


async def test_an_idempotent_command_is_sent_again_to_the_successor_and_others_are_lost(
    make_bus: MakeBus, short_path: Path
) -> None:
    bus, space = await asyncio.to_thread(served, make_bus, short_path)
    async with shardbus.connect(bus.address) as client:
        again = asyncio.create_task(client.execute(space["Again"](key="b"), timeout=60))
        lost = asyncio.create_task(client.execute(space["Stay"](key="s"), timeout=60))
        stream = client.stream(space["Tokens"](key="c"), window=5)
        async with asyncio.timeout(60):
            assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
            await told(client, space, "began")
            os.kill((await asyncio.to_thread(bus.worker_pids))[0], signal.SIGKILL)
            assert await again == 2
            (outcome,) = await asyncio.gather(lost, return_exceptions=True)
            assert isinstance(outcome, CommandLost)
            try:
                async for _ in stream:
                    pass
            except CommandLost:
                pass
            else:
                raise AssertionError("the stream ended as if it were whole")


async def test_an_idempotent_command_that_ends_its_workers_is_found_out(make_bus: MakeBus, short_path: Path) -> None:
    bus, space = await asyncio.to_thread(served, make_bus, short_path)
    async with shardbus.connect(bus.address) as client:
        with pytest.raises(CommandFailed, match="ended the worker with exit code 9; 2 workers have died") as raised:
            await client.execute(space["Deadly"](key="a"), timeout=100)
        assert raised.value.error_type == "Crashed"
        assert await client.execute(space["Tell"](key="a"), timeout=30) == []


async def test_a_stream_is_closed_when_its_client_leaves(make_bus: MakeBus, short_path: Path) -> None:
    bus, space = await asyncio.to_thread(served, make_bus, short_path)
    async with shardbus.connect(bus.address) as client:
        async with shardbus.connect(bus.address) as other:
            stream = other.stream(space["Tokens"](key="a"), window=10, timeout=100)
            assert [await anext(stream) for _ in range(100)] == list(range(100))
            await stream.aclose()
        (found,) = await told(client, space, "closed")
        last = int(found.split()[-1])  # what it yielded last
        assert 99 <= last <= 109


async def test_a_stream_that_its_worker_has_cut_short_does_not_look_complete(make_bus: MakeBus, short_path: Path) -> None:
    bus, space = await asyncio.to_thread(served, make_bus, short_path, 1, "--drain-timeout", "0.2")
    async with shardbus.connect(bus.address) as client:
        stream = client.stream(space["Stubborn"](key="a"), timeout=5)
        assert await anext(stream) == 0
        ending = asyncio.create_task(asyncio.to_thread(bus.end))
        with pytest.raises((CommandFailed, CommandLost, TimeoutError)):  # and not StopAsyncIteration
            await anext(stream)
    assert "Stubborn is running" in (await ending)[1]
