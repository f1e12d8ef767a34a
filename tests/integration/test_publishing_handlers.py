"""Handlers that publish, in real workers: to each other at full credit, through a SIGKILL, and while the bus drains."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from buses import RunningBus, wait_until

import shardbus

MakeBus = Callable[..., RunningBus]

RALLY = r"""
import asyncio
import os

from shardbus import Bus, Command, Context, Event


class Ping(Event, key="table"):
    table: str
    ball: int
    left: int
    slow_s: float = 0.0


class Ring(Command[str], key="table"):
    table: str
    through: list[str]


bus = Bus("rally")
log = open(f"played-{os.getpid()}.txt", "a", buffering=1)


@bus.on(Ping)
async def play(event: Ping, context: Context) -> None:
    if event.slow_s:
        await asyncio.sleep(event.slow_s)
    if event.left:
        # Every other table is another worker's, so that each publishes to all.
        table = f"{event.ball}-{event.left}"
        await context.publish(Ping(table=table, ball=event.ball, left=event.left - 1, slow_s=event.slow_s))
    log.write(f"{event.ball} {event.left} {int(context.redelivered)}\n")


@bus.command(Ring)
async def ring(command: Ring, context: Context) -> str:
    if not command.through:
        return f"done by {context.shard}"
    first, *rest = command.through
    return await context.execute(Ring(table=first, through=rest), timeout=20.0)
"""


def played(directory: Path) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for path in directory.glob("played-*.txt"):
        for line in path.read_text().splitlines():
            ball, left, _ = line.split()
            found[int(ball), int(left)] += 1
    return found


def announced(directory: Path) -> set[tuple[int, int]]:
    """What was called with `redelivered`."""
    lines = [line.split() for path in directory.glob("played-*.txt") for line in path.read_text().splitlines()]
    return {(int(ball), int(left)) for ball, left, redelivered in lines if redelivered == "1"}


@pytest.fixture
def make_rally(make_bus: MakeBus, short_path: Path) -> Iterator[Callable[..., tuple[RunningBus, ModuleType]]]:
    (short_path / "rally.py").write_text(RALLY)

    def make(*arguments: str) -> tuple[RunningBus, ModuleType]:
        bus = make_bus(*arguments, application="rally:bus")
        bus.wait_ready()
        before = Path.cwd()
        os.chdir(short_path)
        sys.path.insert(0, str(short_path))
        try:
            return bus, importlib.import_module("rally")
        finally:
            os.chdir(before)
            sys.path.remove(str(short_path))

    yield make
    module = sys.modules.pop("rally", None)
    if module is not None:
        module.log.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - of other processes
            await asyncio.sleep(0.02)


def has_played(directory: Path, calls: int) -> bool:
    return sum(played(directory).values()) >= calls


def all_served(directory: Path, balls: int) -> bool:
    return len({ball for ball, _ in played(directory)}) == balls


MakeRally = Callable[..., tuple[RunningBus, ModuleType]]


async def serve_balls(bus: RunningBus, rally: ModuleType, balls: int, left: int, slow_s: float = 0.0) -> shardbus.Ledger:
    async with shardbus.connect(bus.address, close_timeout=60) as client:
        for ball in range(balls):
            await client.publish(rally.Ping(table=f"{ball}", ball=ball, left=left, slow_s=slow_s))
        return await client.flush(60)


def test_workers_that_publish_to_each_other_at_full_credit_come_to_an_end(make_rally: MakeRally, short_path: Path):
    bus, rally = make_rally("--workers", "2")
    balls, left = 20_000, 2  # more at a time than either worker takes from one publisher
    ledger = asyncio.run(serve_balls(bus, rally, balls, left))
    assert ledger.handled + ledger.waiting == balls
    wait_until(lambda: len(played(short_path)) == balls * (left + 1))  # what waits in a store, `status` may learn later
    wait_until(lambda: bus.status()["waiting"] == 0)
    found = played(short_path)
    assert len(found) == balls * (left + 1)
    assert set(found.values()) == {1}
    code, errors = bus.end()
    assert code == 0, errors


def test_no_child_is_lost_when_a_worker_is_killed(make_rally: MakeRally, short_path: Path):
    bus, rally = make_rally("--workers", "2")
    balls, left = 200, 12

    async def play() -> shardbus.Ledger:
        playing = asyncio.create_task(serve_balls(bus, rally, balls, left, slow_s=0.001))
        for at in range(3):
            await until(partial(has_played, short_path, (at + 1) * balls * left // 5))
            os.kill(bus.worker_pids()[at % 2], signal.SIGKILL)
        return await playing

    ledger = asyncio.run(play())
    assert ledger.handled + ledger.waiting == balls
    everything = {(ball, step) for ball in range(balls) for step in range(left + 1)}
    wait_until(lambda: everything <= set(played(short_path)))  # what waits in a store, `status` may learn a second later
    wait_until(lambda: bus.status()["waiting"] == 0)
    found = played(short_path)
    assert set(found) == everything
    # What came twice was announced, and so was what that published.
    assert {one for one, count in found.items() if count > 1} <= announced(short_path)
    code, errors = bus.end()
    assert code == 0, errors


def test_a_bus_that_drains_finishes_what_its_handlers_publish(make_rally: MakeRally, short_path: Path):
    bus, rally = make_rally("--workers", "2")
    balls, left = 50, 10

    async def publish_and_drain() -> tuple[int, str]:
        async with shardbus.connect(bus.address, close_timeout=60) as client:
            for ball in range(balls):
                await client.publish(rally.Ping(table=f"{ball}", ball=ball, left=left, slow_s=0.05))
            await until(lambda: all_served(short_path, balls))
            return await asyncio.to_thread(bus.end)

    code, errors = asyncio.run(publish_and_drain())
    assert code == 0, errors
    found = played(short_path)
    assert len(found) == balls * (left + 1)
    assert set(found.values()) == {1}


def test_what_is_not_finished_when_a_drain_is_over_comes_again(make_rally: MakeRally, short_path: Path):
    bus, rally = make_rally("--workers", "2", "--drain-timeout", "2")

    async def publish_and_drain() -> None:
        async with shardbus.connect(bus.address, close_timeout=60) as client:
            for ball in range(20):
                await client.publish(rally.Ping(table=f"{ball}", ball=ball, left=8, slow_s=0.5))
            await until(lambda: all_served(short_path, 20))
            await asyncio.to_thread(bus.end)
            bus.start()
            await asyncio.to_thread(bus.wait_ready)
            await client.flush(60)

    asyncio.run(publish_and_drain())
    wait_until(lambda: bus.status()["waiting"] == 0)
    found = played(short_path)
    assert set(found) == {(ball, step) for ball in range(20) for step in range(9)}
    assert {one for one, count in found.items() if count > 1} <= announced(short_path)


def test_a_ring_of_commands_through_workers_is_refused(make_rally: MakeRally):
    bus, rally = make_rally("--workers", "2")

    async def ask(*through: str) -> str:
        async with shardbus.connect(bus.address) as client:
            reply: str = await client.execute(rally.Ring(table="a", through=list(through)), timeout=20.0)
            return reply

    assert asyncio.run(ask("b", "c", "d")).startswith("done by")
    with pytest.raises(shardbus.CommandFailed, match="would close a ring"):
        asyncio.run(ask("b", "c", "d", "b"))
    with pytest.raises(shardbus.CommandFailed, match="a command of its own key"):
        asyncio.run(ask("a"))
