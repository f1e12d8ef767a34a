"""Scheduled events over real processes: a worker that is killed, and a bus that is stopped, before they are due."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from buses import RunningBus, wait_until

import shardbus

APPLICATION = r"""
import os
import time

from shardbus import Bus, Context, Event


class Reminder(Event, key="who"):
    who: str
    due: float


bus = Bus("reminders")


@bus.on(Reminder)
def remind(event: Reminder, context: Context) -> None:
    with open("reminded.txt", "a") as file:
        file.write(f"{event.who} {time.time() - event.due} {context.attempt}\n")
"""

MakeBus = Callable[..., RunningBus]


def reminding(make_bus: MakeBus, short_path: Path, *arguments: str) -> RunningBus:
    (short_path / "reminders.py").write_text(APPLICATION)
    bus = make_bus(*arguments, application="reminders:bus")
    bus.wait_ready()
    return bus


@pytest.fixture
def reminder(short_path: Path) -> Any:
    (short_path / "reminders.py").write_text(APPLICATION)
    sys.path.insert(0, str(short_path))
    try:
        import reminders  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(short_path))
        sys.modules.pop("reminders", None)
    return reminders.Reminder


def reminded(bus: RunningBus) -> list[tuple[str, float, int]]:
    path = bus.directory / "reminded.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(who, float(late_s), int(attempt)) for who, late_s, attempt in map(str.split, lines)]


async def test_workers_that_are_killed_before_events_are_due_lose_none(
    make_bus: MakeBus, short_path: Path, reminder: Any
) -> None:
    bus = reminding(make_bus, short_path, "--workers", "2")
    due = time.time() + 10.0  # all below up to the last cancel comes before that
    async with shardbus.connect(bus.address) as client:
        for n in range(40):
            await client.publish(reminder(who=f"w{n}", due=due), at=due)
        cancelled = [await client.schedule(reminder(who=f"c{n}", due=due), at=due) for n in range(4)]
        ledger = await client.flush(30)
        assert (ledger.waiting, ledger.handled) == (44, 0)
        assert await client.cancel(cancelled[0]) is True
        for pid in bus.worker_pids():
            os.kill(pid, signal.SIGKILL)
        assert [await client.cancel(one) for one in cancelled] == [False, True, True, True]
        await asyncio.to_thread(wait_until, lambda: len(reminded(bus)) >= 40)
        await asyncio.to_thread(wait_until, lambda: bus.status()["healthy"] and bus.status()["waiting"] == 0)
    found = reminded(bus)
    assert sorted(who for who, _, _ in found) == sorted(f"w{n}" for n in range(40))
    assert all(late_s >= 0 and attempt == 1 for _, late_s, attempt in found)


async def test_a_worker_killed_just_before_or_in_the_middle_of_a_second_loses_none_of_what_is_due_in_it(
    make_bus: MakeBus, short_path: Path, reminder: Any
) -> None:
    bus = reminding(make_bus, short_path, "--workers", "2")
    count, due = 2000, time.time() + 10.0  # they are scheduled well before that
    async with shardbus.connect(bus.address) as client:
        for n in range(count):
            await client.publish(reminder(who=f"w{n}", due=due), at=due + n / count)
        assert (await client.flush(30)).waiting == count
        first, second = bus.worker_pids()
        await asyncio.sleep(due - 0.5 - time.time())  # it has read all of them ahead
        os.kill(first, signal.SIGKILL)
        await asyncio.to_thread(wait_until, lambda: len(reminded(bus)) >= count // 4)
        os.kill(second, signal.SIGKILL)
        await asyncio.to_thread(wait_until, lambda: bus.status()["healthy"] and bus.status()["waiting"] == 0)
    found = reminded(bus)
    assert {who for who, _, _ in found} == {f"w{n}" for n in range(count)}
    attempts: dict[str, list[int]] = {}
    for who, late_s, attempt in found:
        assert late_s >= 0
        attempts.setdefault(who, []).append(attempt)
    assert all(sorted(of_one) in ([1], [2], [1, 2]) for of_one in attempts.values())  # what came again has said so
    # What fell due while nobody was there, or later, and what was handled before the death, is called no repeat.
    assert sum(of_one == [1] for of_one in attempts.values()) > count // 4


async def test_a_bus_that_is_stopped_before_an_event_is_due_runs_it_when_it_is_back(
    make_bus: MakeBus, short_path: Path, reminder: Any
) -> None:
    store = f"sqlite+aiosqlite:///{short_path}/store.db"
    bus = reminding(make_bus, short_path, "--workers", "1", "--dead-letters", store)
    due = time.time() + 3600
    async with shardbus.connect(bus.address) as client:
        await client.publish(reminder(who="a", due=due), at=due)
        await client.publish(reminder(who="b", due=due), delay=86_400)
    await asyncio.to_thread(wait_until, lambda: bus.status()["scheduled"] == 2)
    assert "2 waiting (2 scheduled, the next for " in (await asyncio.to_thread(bus.shardbus, "status")).stdout
    await asyncio.to_thread(bus.end)
    with closing(sqlite3.connect(short_path / "store-0.db")) as database, database:  # an hour goes by
        database.execute("UPDATE scheduled SET due_ns = due_ns - 3600000000000")
    assert reminded(bus) == []
    bus.start()
    bus.wait_ready()
    await asyncio.to_thread(wait_until, lambda: len(reminded(bus)) == 1)
    await asyncio.to_thread(wait_until, lambda: bus.status()["scheduled"] == 1)
    assert [(who, attempt) for who, _, attempt in reminded(bus)] == [("a", 1)]
