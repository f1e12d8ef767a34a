"""What happens when a shard's store is full, by rows and by bytes; and its ledger, whatever happened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shardbus import Bus, Client, ConfigError, Event, NotDelivered, Retry
from shardbus.config import Limits
from shardbus.local import run_local
from shardbus.sql.store import SqlStore
from shardbus.sql.urls import sqlite_file_url
from shardbus.store import ANY_SIZE, DeadFilter, Store, StoredDeadLetter
from shardbus.testing import MemoryRows, MemoryStore

SMALL = {"batch_bytes_target": 20_000, "event_bytes_max": 20_000}


class Bad(Event, key="key"):
    key: str
    n: int
    body: bytes = b""


class Parking(Event, key="key"):
    key: str


bus = Bus("bounds")


@bus.on(Bad, retry=Retry(attempts=1))
def fail(event: Bad) -> None:
    raise ValueError("bad")


@bus.on(Parking, retry=Retry(attempts=1), on_dead_letter="park")
def park(event: Parking) -> None:
    raise ValueError("parked")


Run = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture(params=["memory", "sqlite file"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Runs the bus in this process, again and again over the same rows."""
    rows = MemoryRows()

    def store() -> Store:
        return MemoryStore(rows) if request.param == "memory" else SqlStore(sqlite_file_url(str(tmp_path / "store.db")))

    @asynccontextmanager
    async def running(**bounds: Any) -> AsyncIterator[Client]:
        async with run_local(bus, stores=[store()], limits=Limits(**SMALL, **bounds)) as client:
            yield client

    return running


async def publish(client: Client, *numbers: int, size: int = 0) -> None:
    for n in numbers:
        await client.publish(Bad(key=f"k{n}", n=n, body=bytes(size)))


async def ledger(client: Client) -> tuple[int, int, int, int]:
    """Dead, redriven, purged, dropped."""
    status = await client.status()
    assert status["store_bytes"] >= 512 * status["dead_letters"]
    return status["dead_letters"], status["redriven"], status["purged"], status["dropped"]


async def numbers(client: Client) -> list[int]:
    return [letter.event["n"] for letter in await client.dead_letters()]


async def test_the_oldest_dead_letters_make_room_by_rows_and_are_counted(run: Run):
    async with run(store_rows_max=10, store_full="drop_oldest") as client:
        for start in range(0, 100, 7):
            await publish(client, *range(start, min(start + 7, 100)))
            assert (await client.flush(10)).in_flight == 0
        assert await numbers(client) == list(range(90, 100))
        assert await ledger(client) == (10, 0, 0, 90)
    async with run(store_rows_max=10, store_full="drop_oldest") as client:
        await client.purge()
        await publish(client, 100)
        await client.flush(10)
        assert await ledger(client) == (1, 0, 10, 90)


async def test_many_at_once_are_dropped_without_a_publisher_waiting(run: Run):
    async with run(store_rows_max=10, store_full="drop_oldest") as client:
        await client.publish_many([Bad(key=f"k{n % 50}", n=n) for n in range(1500)])
        assert (await client.flush(30)).dead == 1500
        assert await ledger(client) == (10, 0, 0, 1490)


async def test_redriving_from_a_full_store_drops_nothing(run: Run):
    async with run(store_rows_max=10, store_full="drop_oldest") as client:
        await publish(client, *range(10))
        await client.flush(10)
        assert await client.redrive(rate=40) == 10
        while (await client.status())["waiting"]:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
        assert await ledger(client) == (10, 10, 0, 0)  # they failed again, and died again


async def test_the_oldest_dead_letters_make_room_by_bytes(run: Run):
    async with run(store_bytes_max=30_000, store_full="drop_oldest") as client:
        await publish(client, *range(20), size=4000)
        await client.flush(10)
        assert await numbers(client) == [14, 15, 16, 17, 18, 19]
        await publish(client, 20, size=19_000)
        await client.flush(10)
        assert await numbers(client) == [18, 19, 20]
        assert await ledger(client) == (3, 0, 0, 18)
        assert (await client.status())["store_bytes"] <= 30_000


async def test_what_parks_its_key_and_what_waits_is_never_dropped(run: Run):
    async with run(store_rows_max=10, store_full="drop_oldest") as client:
        await publish(client, 0)
        await client.publish_many([Parking(key="p")] * 5)
        await client.flush(10)
        await publish(client, *range(1, 30))
        await client.flush(10)
        status = await client.status()
        assert (status["dead_letters"], status["parked"], status["waiting"], status["dropped"]) == (6, 1, 4, 25)
        # What waits makes dead letters go, and when there are none left, publishers wait.
        await client.publish_many([Parking(key="p")] * 20)
        with pytest.raises(NotDelivered):
            await client.flush(0.3)
        while ((status := await client.status())["parked"], status["waiting"]) != (1, 9):  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
        while await client.purge():  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
        await client.flush(10)


@pytest.mark.parametrize(("bounds", "size"), [({"store_rows_max": 5}, 0), ({"store_bytes_max": 25_000}, 4000)])
async def test_a_full_store_has_publishers_wait_and_says_why_until_there_is_room(
    run: Run, bounds: dict[str, int], size: int
):
    async with run(**bounds) as client:
        await publish(client, *range(12), size=size)
        with pytest.raises(NotDelivered):
            await client.flush(0.3)
        while "it is full (5 rows, " not in (await client.status())["workers"][0]["store_failing"]:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
        assert await ledger(client) == (5, 0, 0, 0)
        while client.ledger().in_flight:
            await client.purge()
            await asyncio.sleep(0.01)
        assert client.ledger().dead == 12
        dead, _, purged, dropped = await ledger(client)
        assert (dead + purged, dropped) == (12, 0)


class Slow(MemoryStore):
    """Answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()

    async def dead_letters(
        self, where: DeadFilter, after: int, limit: int, bytes_max: int = ANY_SIZE
    ) -> list[StoredDeadLetter]:
        found = await super().dead_letters(where, after, limit, bytes_max)
        self.asked.set()
        await self.gate.wait()
        return found


@pytest.mark.parametrize("full", ["stop", "drop_oldest"])
async def test_what_is_redriven_into_a_full_store_dies_again_where_it_was_and_is_not_dropped(full: Any):
    store = Slow()
    async with run_local(bus, stores=[store], limits=Limits(store_rows_max=10, store_full=full)) as client:
        await publish(client, *range(10))
        await client.flush(10)
        redriving = asyncio.create_task(client.redrive())
        await store.asked.wait()
        await publish(client, *range(10, 15))  # they die while the redrive is under way
        await asyncio.sleep(0.05)
        store.gate.set()
        assert await redriving == 10
        while full == "stop" and client.ledger().in_flight:
            await client.purge()
            await asyncio.sleep(0.001)
        await client.flush(10)
        assert store.rows.redriven == 10
        assert store.rows.row_max == 25


async def test_dead_letters_whose_room_was_promised_stay_dead_and_make_it():
    store, gate = Slow(), asyncio.Event()
    application = Bus("promised")
    application.on(Bad, retry=Retry(attempts=1))(fail)

    @application.on(Parking)
    async def hold(event: Parking) -> None:
        await gate.wait()

    limits = Limits(store_rows_max=10, store_full="drop_oldest", lane_events_max=5)
    async with run_local(application, stores=[store], limits=limits) as client:
        await publish(client, *range(10))
        await client.flush(10)
        redriving = asyncio.create_task(client.redrive())
        await store.asked.wait()
        await client.publish_many([Parking(key="p")] * 7)  # more than a lane has in memory: all of them are to wait
        await asyncio.sleep(0.05)
        store.gate.set()
        assert await redriving == 3
        await client.flush(10)
        assert client.ledger().waiting == 7
        gate.set()
        while (await client.status())["waiting"]:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
        dead, redriven, _, dropped = await ledger(client)
    assert (dead + dropped, redriven) == (10, 3)


async def test_the_bound_counts_what_a_predecessor_left(run: Run):
    async with run() as client:
        await publish(client, *range(8), size=4000)
        await client.flush(10)
    async with run(store_bytes_max=25_000, store_full="drop_oldest") as client:
        await publish(client, 8, size=4000)
        await client.flush(10)
        assert await numbers(client) == [4, 5, 6, 7, 8]
        assert await ledger(client) == (5, 0, 0, 4)


@pytest.mark.parametrize(
    "options",
    [{"dead_letters_max_rows": 0}, {"dead_letters_max_bytes": 1000}, {"dead_letters_full": "panic"}],
)
def test_bounds_that_make_no_sense_are_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        bus.local(**options)


async def test_a_bus_in_this_process_takes_bounds():
    async with bus.local(dead_letters_max_rows=3, dead_letters_full="drop_oldest") as client:
        await publish(client, *range(10))
        await client.flush(10)
        assert await numbers(client) == [7, 8, 9]
