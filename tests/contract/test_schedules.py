"""Scheduled events: when they are handled, what they hold up, what they cost, and what outlives a worker or a bus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from shardbus import Bus, Client, Context, Event, Retry, UsageError, blocking, testing
from shardbus.config import DEFAULT_LIMITS, Limits
from shardbus.local import run_local
from shardbus.sql.store import SqlStore
from shardbus.sql.urls import sqlite_file_url
from shardbus.store import Store
from shardbus.testing import MemoryRows, MemoryStore

AHEAD = timedelta(days=1)


class Step(Event, key="key"):
    key: str
    n: int = 0


class Loose(Event):
    n: int = 0


class Stubborn(Event, key="key"):
    key: str


class Application:
    def __init__(self) -> None:
        self.ran: list[tuple[Any, int, int]] = []
        self.headers: list[dict[str, str]] = []
        self.broken = True
        self.look: Callable[[], object] = list
        self.bus = Bus("schedules")
        self.bus.on(Step)(self.take)
        self.bus.on(Loose)(self.take_loose)
        self.bus.on(Stubborn, retry=Retry(attempts=2, base_s=100.0, cap_s=100.0))(self.fail)

    async def take(self, event: Step, context: Context) -> None:
        self.ran.append((event.key, event.n, context.attempt))
        self.look()
        self.headers.append(dict(context.headers))

    async def take_loose(self, event: Loose) -> None:
        self.ran.append((None, event.n, 1))

    async def fail(self, event: Stubborn) -> None:
        self.ran.append((event.key, -1, 0))
        if self.broken:
            raise ValueError("broken")


@pytest.fixture
def application() -> Application:
    return Application()


# -- with a clock


async def test_a_scheduled_event_is_acked_when_it_is_stored_and_handled_when_it_is_due(application):
    async with testing.run(application.bus) as kit:
        await kit.client.publish(Step(key="a", n=1), delay=60, headers={"trace": "7"})
        ledger = await kit.client.flush()
        assert (ledger.waiting, ledger.handled, ledger.in_flight) == (1, 0, 0)
        await kit.advance(59.9)
        assert application.ran == []
        await kit.advance(0.2)
        assert application.ran == [("a", 1, 1)]
        assert application.headers == [{"trace": "7"}]
        assert kit.shards[0].counts.waiting == 0


async def test_it_holds_up_no_other_event_of_its_key_and_joins_the_end_of_its_lane(application):
    async with testing.run(application.bus) as kit:
        await kit.client.publish(Step(key="a", n=3), delay=10)
        await kit.client.publish(Step(key="a", n=1))
        await kit.settle()
        assert application.ran == [("a", 1, 1)]
        application.broken = False
        await kit.client.publish(Stubborn(key="a"))
        await kit.client.publish(Step(key="a", n=2))
        await kit.advance(10)
        assert [n for _, n, _ in application.ran] == [1, -1, 2, 3]


async def test_it_waits_behind_a_retry_of_its_key_when_it_is_due(application):
    async with testing.run(application.bus) as kit:
        await kit.client.publish(Step(key="a", n=2), delay=10)
        await kit.client.publish(Stubborn(key="a"))
        await kit.client.publish(Step(key="a", n=1))
        await kit.advance(20)
        assert [n for _, n, _ in application.ran] == [-1]
        await kit.advance(200)
        assert [n for _, n, _ in application.ran] == [-1, -1, 1, 2]


async def test_they_come_in_the_order_of_their_due_times_and_then_of_their_publication(application):
    async with testing.run(application.bus) as kit:
        for n, delay in enumerate([3.0, 1.0, 2.0, 1.0]):
            await kit.client.publish(Step(key="a", n=n), at=kit.now + timedelta(seconds=delay))
        await kit.settle()
        await kit.kill(0, down_s=10.0)  # due, all of them, when somebody comes
        await kit.advance(11)
        assert [n for _, n, _ in application.ran] == [1, 3, 2, 0]


async def test_what_is_due_already_is_handled_at_once_and_in_its_place(application):
    async with testing.run(application.bus) as kit:
        await kit.client.publish(Step(key="a", n=1))
        await kit.client.publish(Step(key="a", n=2), at=kit.now - AHEAD)
        await kit.client.publish(Step(key="a", n=3), delay=0)
        await kit.client.publish(Step(key="a", n=4))
        await kit.settle()
        assert [n for _, n, _ in application.ran] == [1, 2, 3, 4]
        assert kit.client.ledger().handled == 4


@pytest.mark.parametrize("before", ["it is stored", "it is sent"])
async def test_what_is_cancelled_is_never_handled(application, before):
    async with testing.run(application.bus) as kit:
        first = await kit.client.schedule(Step(key="a", n=1), delay=10)
        second = await kit.client.schedule(Step(key="a", n=2), delay=20)
        if before == "it is stored":
            await kit.settle()
        assert await kit.client.cancel(first) is True
        assert await kit.client.cancel(first) is False
        assert kit.shards[0].counts.scheduled == 1
        assert kit.shards[0].next_due_ns == pytest.approx(second.due_at.timestamp() * 1e9, abs=2000)
        await kit.advance(30)
        assert [n for _, n, _ in application.ran] == [2]
        assert await kit.client.cancel(second) is False
        assert kit.client.ledger().waiting == 2


async def test_cancel_takes_an_id_from_anywhere_and_refuses_what_is_none(application):
    async with testing.run(application.bus, shards=2) as kit:
        scheduled = await kit.client.schedule(Loose(), delay=10)
        await kit.settle()
        async with kit.connect() as other:
            assert await other.cancel(scheduled.id) is True
            assert await other.cancel(f"{'00' * 16}-9-1") is False
            with pytest.raises(UsageError, match="no scheduled event"):
                await other.cancel("42")


async def test_a_death_between_scheduling_and_due_costs_nothing_and_counts_as_no_attempt(application):
    async with testing.run(application.bus) as kit:
        await kit.client.publish(Step(key="a", n=1), delay=10)
        await kit.client.publish(Loose(n=2), delay=10)
        await kit.settle()
        for _ in range(3):
            await kit.kill(0)
        await kit.advance(10)
        assert sorted(application.ran, key=str) == [("a", 1, 1), (None, 2, 1)]


async def test_a_death_while_they_are_due_loses_none(application):
    async with testing.run(application.bus) as kit:
        kit.kill_at(5)
        kit.kill_at(9, when="before", down_s=1.0)
        for n in range(20):
            await kit.client.publish(Step(key=f"k{n % 3}", n=n), delay=10)
        await kit.advance(30)
        assert {n for _, n, _ in application.ran} == set(range(20))
        assert kit.shards[0].counts.waiting == 0


async def test_what_had_begun_when_its_worker_died_comes_again_and_says_so(application):
    async with testing.run(application.bus) as kit:
        for n in range(4):
            await kit.client.publish(Step(key=f"k{n}", n=n), delay=10)
        await kit.client.publish(Step(key="later", n=9), delay=10.5)
        await kit.client.publish(Step(key="down", n=10), delay=15)
        kit.kill_at(3, down_s=10.0)  # at the third handling, before the rows of the first two are gone
        await kit.advance(60)
        attempts: dict[int, list[int]] = {}
        for _, n, attempt in application.ran:
            attempts.setdefault(n, []).append(attempt)
        assert attempts[0] == attempts[1] == [1, 2]
        assert attempts[3] == [2]  # due in the same instant, and nobody knows whether it had begun
        assert attempts[9] == attempts[10] == [1]
        assert kit.shards[0].counts.waiting == 0


async def test_what_is_read_ahead_can_be_cancelled_until_it_begins(application):
    async with testing.run(application.bus) as kit:
        scheduled = [await kit.client.schedule(Step(key=f"k{n}", n=n), delay=2 + n) for n in range(3)]
        await kit.advance(1)
        assert await kit.client.cancel(scheduled[0]) is True
        await kit.advance(2.5)
        assert await kit.client.cancel(scheduled[1]) is False
        assert await kit.client.cancel(scheduled[2]) is True
        assert kit.shards[0].next_due_ns == 0
        await kit.advance(10)
        assert [n for _, n, _ in application.ran] == [1]
        assert kit.shards[0].counts.waiting == 0


async def test_nothing_begins_while_the_store_could_not_tell_a_successor_of_it(application):
    async with testing.run(application.bus) as kit:
        await kit.client.publish(Step(key="a", n=1), delay=2)
        await kit.advance(1)
        kit.stores[0].failing = "locked"
        await kit.advance(3)
        assert application.ran == []
        kit.stores[0].failing = ""
        await kit.advance(1)
        assert application.ran == [("a", 1, 1)]
        assert kit.shards[0].counts.waiting == 0


async def test_what_has_begun_runs_once_however_long_the_store_cannot_remove_its_row(application):
    async with testing.run(application.bus) as kit:
        scheduled = await kit.client.schedule(Step(key="a", n=1), delay=2)
        await kit.client.publish(Step(key="a", n=2), delay=2.1)
        await kit.client.publish(Step(key="a", n=3), delay=3)

        def lock() -> None:
            kit.stores[0].failing = "locked"

        application.look = lock
        await kit.advance(5)
        assert [n for _, n, _ in application.ran] == [1, 2]  # the third is due too late for the mark of the first
        assert "locked" in kit.shards[0].store_failing
        application.look = list
        cancelled = asyncio.create_task(kit.client.cancel(scheduled))
        await kit.advance(1)
        kit.stores[0].failing = ""
        await kit.advance(1)
        assert await cancelled is False
        assert application.ran == [("a", 1, 1), ("a", 2, 1), ("a", 3, 1)]
        assert kit.shards[0].counts.waiting == 0


async def test_they_wait_in_memory_behind_a_busy_key_in_order_and_their_rows_stand_for_them():
    bus, gate, ran = Bus("busy"), asyncio.Event(), list[int]()

    @bus.on(Step)
    async def slow(event: Step) -> None:
        ran.append(event.n)
        await gate.wait()

    async with testing.run(bus) as kit:
        for n in range(3):
            await kit.client.publish(Step(key="a", n=n), delay=10 + n / 10)
        await kit.advance(11)
        assert ran == [0]
        assert (kit.shards[0].counts.waiting, kit.shards[0].counts.scheduled) == (3, 0)
        await kit.kill(0)
        await kit.advance(1)
        assert ran == [0, 0]
        gate.set()
        await kit.settle()
        assert ran == [0, 0, 1, 2]
        assert kit.shards[0].counts.waiting == 0


async def test_what_fails_when_it_is_due_becomes_a_dead_letter_in_the_place_of_its_row(application):
    bus = Bus("failing")

    @bus.on(Step, retry=Retry(attempts=2, base_s=0.1), on_dead_letter="park")
    async def fail(event: Step) -> None:
        if event.n == 1:
            raise ValueError("broken")
        application.ran.append((event.key, event.n, 0))

    limits = replace(testing.kit._LIMITS, store_rows_max=3)
    async with testing.run(bus, limits=limits) as kit:
        for n in (1, 2, 3):
            await kit.client.publish(Step(key="a", n=n), delay=n)
        await kit.advance(10)
        counts = kit.shards[0].counts
        assert (counts.dead, counts.parked, counts.waiting, counts.scheduled) == (1, 1, 2, 0)
        assert await kit.client.purge() == 1
        await kit.settle()
        assert [n for _, n, _ in application.ran] == [2, 3]
        assert kit.shards[0].counts.waiting == 0


async def test_a_batch_handler_takes_what_is_due_together():
    bus, taken = Bus("batches"), list[list[int]]()

    @bus.on(Loose, batch=10)
    async def take(events: list[Loose]) -> None:
        taken.append([event.n for event in events])

    async with bus.local() as client:
        at = datetime.now(UTC) + timedelta(seconds=0.5)
        for n in range(25):
            await client.publish(Loose(n=n), at=at)
        await until(lambda: sum(map(len, taken)) == 25)
        assert [n for events in taken for n in events] == list(range(25))
        assert max(map(len, taken)) == 10


async def test_many_that_are_due_at_once_are_all_handled_and_need_no_lanes(application):
    async with testing.run(application.bus) as kit:
        for n in range(3000):
            await kit.client.publish(Step(key=f"k{n}", n=n), delay=10)
        await kit.client.flush()
        lanes: list[int] = []
        application.look = lambda: lanes.append(kit.shards[0].lanes.busy_keys)
        await kit.advance(10)
        assert max(lanes) == 0
        assert sorted(n for _, n, _ in application.ran) == list(range(3000))
        assert kit.shards[0].counts.waiting == 0


async def test_publishers_wait_while_the_store_has_no_room(application):
    limits = replace(testing.kit._LIMITS, store_rows_max=3)
    async with testing.run(application.bus, limits=limits) as kit:
        scheduled = [await kit.client.schedule(Step(key="a", n=n), delay=10 + n) for n in range(5)]
        await kit.settle()
        assert kit.client.ledger().waiting == 3
        assert "full" in kit.shards[0].store_failing
        cancelled = asyncio.create_task(kit.client.cancel(scheduled[0]))  # a full store is looked at after a while
        await kit.advance(1)
        assert await cancelled is True
        assert kit.client.ledger().waiting == 4
        await kit.advance(60)
        assert [n for _, n, _ in application.ran] == [1, 2, 3, 4]


async def test_status_says_how_many_and_when_the_next_is_due(application):
    async with application.bus.local(shards=2) as client:
        due = datetime.now(UTC) + AHEAD
        for n in range(4):
            await client.publish(Step(key=f"k{n}", n=n), at=due + n * AHEAD)
        await client.flush()
        status = await client.status()
        assert (status["waiting"], status["scheduled"]) == (4, 4)
        assert status["next_due_ns"] == pytest.approx(due.timestamp() * 1e9, abs=2000)


async def test_stamps_and_a_schedule_do_not_go_together(application):
    async with application.bus.local() as client:
        for stamps in ({"ordinal": 1}, {"intended_ns": 1}):
            with pytest.raises(UsageError, match="stamps cannot be scheduled"):
                await client.publish(Step(key="a"), delay=1, **stamps)
        with pytest.raises(UsageError, match="give a time with its zone"):
            await client.publish(Step(key="a"), at=datetime.now())  # noqa: DTZ005


async def test_middleware_sees_what_is_scheduled_once(application):
    seen: list[int] = []

    def note(event: Any, headers: dict[str, str]) -> None:
        seen.append(event.n)
        headers["seen"] = "yes"

    async with testing.run(application.bus, middleware=(note,)) as kit:
        await kit.client.publish(Step(key="a", n=1), delay=1)
        await kit.client.schedule(Step(key="a", n=2), delay=1)
        await kit.advance(1)
        assert seen == [1, 2]
        assert application.headers == [{"seen": "yes"}] * 2


def test_the_blocking_client_schedules_and_cancels(application):
    with blocking.local(application.bus) as client:
        client.publish(Step(key="a", n=1), delay=0.01)
        scheduled = client.schedule(Step(key="a", n=2), at=datetime.now(UTC) + AHEAD)
        assert client.flush().waiting >= 1
        assert client.cancel(scheduled) is True
        assert client.cancel(scheduled.id) is False


# -- over real stores


Run = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture(params=["memory", "sqlite file"])
def run(request: pytest.FixtureRequest, tmp_path: Path, application: Application) -> Run:
    """Runs the bus in this process, again and again over the same rows."""
    rows = MemoryRows()

    def store() -> Store:
        return MemoryStore(rows) if request.param == "memory" else SqlStore(sqlite_file_url(str(tmp_path / "store.db")))

    @asynccontextmanager
    async def running(limits: Limits = DEFAULT_LIMITS) -> AsyncIterator[Client]:
        async with run_local(application.bus, stores=[store()], limits=limits) as client:
            yield client

    return running


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_what_is_scheduled_outlives_a_bus_that_stops(application, run):
    async with run() as client:
        await client.publish(Step(key="a", n=1), delay=1.0)
        await client.publish(Step(key="a", n=2), at=datetime.now(UTC) + AHEAD)
        await client.flush()
    async with run() as client:
        await until(lambda: bool(application.ran))
        status = await client.status()
        assert status["scheduled"] == 1
    assert application.ran == [("a", 1, 1)]


async def test_large_and_keyless_events_are_handled_too(application, run):
    async with run() as client:
        await client.publish(Step(key="a" * 1000, n=1), delay=0.1, headers={"much": "x" * 4000})
        for n in range(300):
            await client.publish(Loose(n=n), delay=0.1)
        await client.flush()
        await until(lambda: len(application.ran) == 301)
