"""The store under real faults: killed workers in the middle of a redrive, a locked file, no more room on the disk."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from buses import PAYMENTS, RunningBus, wait_until

import shardbus

MakeBus = Callable[..., RunningBus]

_space: dict[str, Any] = {}
exec(compile(PAYMENTS, "payments.py", "exec"), _space)  # noqa: S102 - the same message types as the served application
Paid = _space["Paid"]
Charged = _space["Charged"]


def taken(bus: RunningBus) -> list[tuple[str, int, bool]]:
    """What was handled, by worker, the first worker first: account, number, whether it said that it comes again."""
    files = sorted(bus.directory.glob("taken-*.txt"), key=lambda path: path.stat().st_ctime_ns)
    lines = [line.split() for path in files for line in path.read_text().splitlines()]
    return [(account, int(n), again == "1") for account, n, again in lines]


def the_ledger_balances(status: dict[str, Any], died: int) -> bool:
    return bool(status["dead_letters"] + status["redriven"] + status["purged"] + status["dropped"] == died)


async def publish(address: str, events: list[Any]) -> shardbus.Ledger:
    async with shardbus.connect(address) as client:
        await client.publish_many(events)
        return await client.flush(60)


async def redrive(address: str, rate: float | None = None) -> int:
    async with shardbus.connect(address) as client:
        return await client.redrive(rate=rate)


async def test_ten_thousand_are_redriven_over_a_killed_worker_and_none_is_lost(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1", application="payments:bus")
    bus.wait_ready()
    count = 10_000
    ledger = await publish(bus.address, [Paid(account=f"a{n % 20}", n=n) for n in range(count)])
    assert ledger.dead == count
    (bus.directory / "mended").touch()
    (pid,) = bus.worker_pids()
    redriving = asyncio.create_task(redrive(bus.address, rate=4000))
    await asyncio.to_thread(wait_until, lambda: len(taken(bus)) > 500)
    os.kill(pid, signal.SIGKILL)
    assert not redriving.done()
    await asyncio.wait([redriving])  # it may have been told that the worker did not answer
    while (await asyncio.to_thread(bus.status))["dead_letters"] or len({n for _, n, _ in taken(bus)}) < count:
        try:
            await redrive(bus.address)
        except shardbus.BusUnreachable:
            pass
    runs = taken(bus)
    assert {n for _, n, _ in runs} == set(range(count))
    assert all(again for _, _, again in runs)  # what is redriven says so, and so does what a crash has repeated
    repeats = sum(Counter(n for _, n, _ in runs).values()) - count
    assert repeats < count  # only what was under way when the worker died
    wait_until(lambda: the_ledger_balances(bus.status(), count) and bus.status()["waiting"] == 0)
    status = bus.status()
    assert the_ledger_balances(status, count)
    assert (status["redriven"], status["workers"][0]["restarts"]) == (count, 1)


async def test_parked_keys_come_back_in_order_after_a_kill(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1", application="payments:bus")
    bus.wait_ready()
    keys, each = 20, 100
    async with shardbus.connect(bus.address) as client:
        events = [Charged(account=f"a{n % keys}", n=n // keys) for n in range(keys * each)]
        await client.publish_many(events[: len(events) // 2])
        await client.flush(60)
        os.kill(bus.worker_pids()[0], signal.SIGKILL)
        await client.publish_many(events[len(events) // 2 :])
        ledger = await client.flush(60)
        assert (ledger.handled, ledger.dead, ledger.waiting) == (0, keys, keys * (each - 1))
        wait_until(lambda: bus.status()["parked"] == keys)
        (bus.directory / "mended").touch()
        assert await client.redrive() == keys
    # Once more, while they come back.
    await asyncio.to_thread(wait_until, lambda: len(taken(bus)) > 50)
    os.kill(bus.worker_pids()[0], signal.SIGKILL)
    wait_until(lambda: len({(account, n) for account, n, _ in taken(bus)}) == keys * each)
    runs = taken(bus)
    for key in range(keys):
        first = list(dict.fromkeys(n for account, n, _ in runs if account == f"a{key}"))
        assert first == list(range(each)), f"a{key}"
    seen: set[tuple[str, int]] = set()
    for account, n, again in runs:
        assert again or (account, n) not in seen, f"{account} {n} came again and did not say so"
        seen.add((account, n))
    wait_until(lambda: the_ledger_balances(bus.status(), keys) and bus.status()["waiting"] == 0)
    status = bus.status()
    assert the_ledger_balances(status, keys)
    assert (status["dead_letters"], status["parked"]) == (0, 0)


def failing(bus: RunningBus) -> str:
    return str(bus.status()["workers"][0]["store_failing"])


async def test_publishers_wait_while_another_process_has_the_file_locked(make_bus: MakeBus, tmp_path: Path) -> None:
    # A worker holds the lock itself, so another process gets it only between a worker's death and its successor.
    bus = make_bus("--workers", "1", "--dead-letters", f"sqlite+aiosqlite:///{tmp_path}/dead.db", application="payments:bus")
    bus.wait_ready()
    async with shardbus.connect(bus.address) as client:
        await client.publish_many([Paid(account=f"a{n}", n=n) for n in range(100)])
        assert (await client.flush(60)).dead == 100
        wait_until(lambda: bus.status()["dead_letters"] == 100)  # the worker has told it
        (pid,) = bus.worker_pids()
        with closing(sqlite3.connect(tmp_path / "dead-0.db", isolation_level=None)) as other:
            bus.process.send_signal(signal.SIGSTOP)
            os.kill(pid, signal.SIGKILL)
            other.execute("BEGIN EXCLUSIVE")
            bus.process.send_signal(signal.SIGCONT)
            wait_until(lambda: "database is locked" in failing(bus))
            await client.publish_many([Paid(account=f"a{n}", n=n) for n in range(100, 200)])
            with pytest.raises(shardbus.NotDelivered):
                await client.flush(1.0)
            status = bus.status()
            assert not status["healthy"]
            assert status["dead_letters"] == 100  # what is there, as far as is known
            other.execute("ROLLBACK")
        assert (await client.flush(60)).dead == 200
    wait_until(lambda: bus.status()["dead_letters"] == 200)
    status = bus.status()
    assert (status["healthy"], status["workers"][0]["restarts"]) == (True, 1)  # the successor waited


NARROW = """
import resource

from payments import Charged, Paid, bus
from shardbus import Command


class Widen(Command[None]):
    pass


def limit(file_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))


@bus.lifespan
async def narrow(worker):
    limit(400_000)
    yield


@bus.command(Widen)
def widen(command: Widen) -> None:
    limit(resource.RLIM_INFINITY)
"""


class Widen(shardbus.Command[None]):
    """Lets the worker write files of any length again."""


async def test_publishers_wait_while_the_store_cannot_grow(make_bus: MakeBus, short_path: Path) -> None:
    (short_path / "narrow.py").write_text(NARROW)
    url = f"sqlite+aiosqlite:///{short_path}/dead.db"
    bus = make_bus("--workers", "1", "--dead-letters", url, application="narrow:bus")
    bus.wait_ready()
    async with shardbus.connect(bus.address) as client:
        await client.publish_many([Paid(account=f"a{n % 50}", n=n) for n in range(4000)])
        await asyncio.to_thread(wait_until, lambda: "disk" in failing(bus))
        with pytest.raises(shardbus.NotDelivered):
            await client.flush(1.0)
        status = bus.status()
        assert not status["healthy"]
        assert "its store cannot write" in bus.shardbus("status").stdout
        await client.execute(Widen())  # the worker lives, and serves what needs no store
        assert (await client.flush(60)).dead == 4000
        letters = await client.dead_letters(limit=10_000)
    assert {letter.event["n"] for letter in letters} == set(range(4000))
    wait_until(lambda: bus.status()["healthy"])
    assert bus.status()["workers"][0]["restarts"] == 0
