"""Batch handlers in real worker processes: kills from outside, and an event that kills whoever handles its batch."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from buses import RunningBus

import shardbus

MakeBus = Callable[..., RunningBus]

PILING = """
import asyncio
import os

from shardbus import Bus, Context, Event


class Step(Event, key="walk"):
    walk: str
    n: int
    how: str = ""


bus = Bus("piling")


@bus.on(Step, batch=64)
async def step(events: list[Step], contexts: list[Context]) -> None:
    if any(event.how == "suspend" for event in events):
        await asyncio.sleep(0.01)
    for event in events:
        if event.how == "abort" or (event.how == "late" and (await asyncio.sleep(0.02) or True)):
            os.abort()
    with open(f"steps-{os.getpid()}.txt", "a") as file:
        file.writelines(f"{event.walk} {event.n} {context.attempt}\\n" for event, context in zip(events, contexts))
"""
_space: dict[str, Any] = {}
exec(compile(PILING, "piling.py", "exec"), _space)  # noqa: S102 - the same message type as the served application
Step = _space["Step"]


def piling(make_bus: MakeBus, *arguments: str) -> RunningBus:
    bus = make_bus(*arguments, application="piling:nothing")
    bus.close()
    (bus.directory / "piling.py").write_text(PILING)
    bus._command[bus._command.index("piling:nothing")] = "piling:bus"
    bus.start()
    bus.wait_ready()
    return bus


def steps(directory: Path) -> dict[str, list[int]]:
    """The first attempt at each event of each walk that was written down, in the order of all files."""
    found: dict[str, dict[int, None]] = {}
    for file in sorted(directory.glob("steps-*.txt"), key=lambda file: file.stat().st_ctime):
        for line in file.read_text().splitlines():
            walk, n, _attempt = line.split()
            found.setdefault(walk, {})[int(n)] = None
    return {walk: list(numbers) for walk, numbers in found.items()}


async def worker_pid(client: shardbus.Client) -> int:
    """The process of the one worker, once it is up: of one that is not, the number is 0, which is a whole group's."""
    while (worker := (await client.status())["workers"][0])["state"] != "up" or not worker["pid"]:  # noqa: ASYNC110 - ended by the time-out
        await asyncio.sleep(0.02)
    pid: int = worker["pid"]
    return pid


async def check_evidence(client: shardbus.Client, published: int) -> None:
    evidence = await client.evidence([client.publisher])
    assert sum(one.distinct for one in evidence) == published
    assert sum(one.missing + one.out_of_order for one in evidence) == 0
    assert sum(one.repeats for one in evidence) == sum(one.announced for one in evidence)


@pytest.mark.parametrize("how", ["abort", "late"])
async def test_of_a_batch_that_kills_its_worker_only_the_culprit_becomes_a_dead_letter(make_bus: MakeBus, how: str):
    bus = piling(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address) as client:
        for number in range(600):
            kind = how if number == 300 else ""
            await client.publish(Step(walk=f"w{number % 10}", n=number // 10, how=kind), ordinal=number // 10 + 1)
        ledger = await client.flush(60)
        assert (ledger.handled + ledger.waiting, ledger.dead) == (599, 1)
        [letter] = await client.dead_letters()
        assert (letter.reason, letter.key) == ("crashed", "w0")
        assert "SIGABRT" in letter.error
        await check_evidence(client, 600)
        assert (await client.status())["workers"][0]["restarts"] <= 5
    bus.end()
    expected = {f"w{at}": [n for n in range(60) if (at, n) != (0, 30)] for at in range(10)}
    assert steps(bus.directory) == expected


async def test_batches_in_a_worker_that_is_killed_are_handled_by_its_successor_in_order(make_bus: MakeBus):
    bus = piling(make_bus, "--workers", "1")
    chance = random.Random(3)
    async with shardbus.connect(bus.address) as client:
        for number in range(6000):
            kind = "suspend" if number % 50 == 0 else ""
            await client.publish(Step(walk=f"w{number % 20}", n=number // 20, how=kind), ordinal=number // 20 + 1)
            if number % 2000 == 1000:
                await asyncio.sleep(chance.random() * 0.05)
                os.kill(await worker_pid(client), signal.SIGKILL)
        ledger = await client.flush(60)
        assert (ledger.handled + ledger.waiting, ledger.dead) == (6000, 0)
        while (await client.status())["waiting"]:  # noqa: ASYNC110 - ended by the time-out
            await asyncio.sleep(0.05)
        await check_evidence(client, 6000)
    bus.end()
    assert steps(bus.directory) == {f"w{at}": list(range(300)) for at in range(20)}
