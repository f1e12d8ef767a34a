"""Back-pressure: what publish does when a shard takes nothing, by name, and how it is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shardbus import Bus, Client, Event, NotDelivered, OutboxFull, UsageError
from shardbus.config import Limits
from shardbus.local import run_local
from shardbus.testing import MemoryStore

LIMITS = Limits(batch_events_max=4, outbox_events_max=40, session_credit_events_max=8, credit_events_max=2048)


class Step(Event, key="key"):
    key: str
    n: int


class Application:
    """Handlers that stand at a gate."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.handled: list[int] = []
        self.bus = Bus("pressure")
        self.bus.on(Step)(self.handle)

    async def handle(self, event: Step) -> None:
        await self.gate.wait()
        self.handled.append(event.n)

    @asynccontextmanager
    async def running(self, **options: Any) -> AsyncIterator[Client]:
        store = MemoryStore()
        store.failing = "not now"  # so that lanes stay in memory, and credit is what bounds
        async with run_local(self.bus, stores=[store], limits=LIMITS, close_timeout_s=10.0, **options) as client:
            yield client


@pytest.fixture
def application() -> Application:
    return Application()


async def publish(client: Client, count: int) -> None:
    for n in range(count):
        await client.publish(Step(key=f"k{n}", n=n))


def assert_balanced(client: Client) -> None:
    ledger = client.ledger()
    assert ledger.published == ledger.handled + ledger.dead + ledger.waiting + ledger.dropped + ledger.in_flight


async def test_publish_waits_for_room_and_loses_nothing(application: Application):
    async with application.running() as client:
        publishing = asyncio.create_task(publish(client, 100))
        while client.statistics().outboxes[0].held_events < 30:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert not publishing.done()
        held = client.statistics().outboxes[0].held_events
        assert 30 <= held <= 40
        application.gate.set()
        await publishing
        assert (await client.flush(10)).handled == 100
        statistics = client.statistics()
    assert (statistics.rejected, statistics.ledger.dropped) == (0, 0)
    assert statistics.waits > 0
    assert statistics.waited_s >= 0.03
    assert application.handled == list(range(100))


async def test_publish_is_rejected_and_what_was_published_before_is_not_touched(application: Application):
    async with application.running(on_full="reject") as client:
        with pytest.raises(OutboxFull, match="outbox of shard 0 is full") as raised:
            await publish(client, 100)
        assert raised.value.held_events <= 40
        published = client.ledger().published
        assert client.statistics().rejected == 1
        application.gate.set()
        assert (await client.flush(10)).handled == published
        await client.publish(Step(key="later", n=published))
    assert application.handled == list(range(published + 1))


async def test_the_oldest_that_no_worker_has_seen_is_dropped_and_counted(application: Application):
    async with application.running(on_full="drop_oldest") as client:
        await publish(client, 200)
        assert_balanced(client)
        dropped = client.ledger().dropped
        assert 140 <= dropped < 200
        application.gate.set()
        ledger = await client.flush(10)
        assert_balanced(client)
    assert (ledger.handled, ledger.dropped, ledger.in_flight) == (200 - dropped, dropped, 0)
    # What the worker had, and the newest; in order.
    assert application.handled == sorted(application.handled)
    assert application.handled[:8] == list(range(8))
    assert application.handled[-1] == 199


async def test_pressure_is_told_once_on_the_way_up_and_once_on_the_way_down(application: Application):
    told: list[bool] = []
    async with application.running(on_pressure=told.append) as client:
        publishing = asyncio.create_task(publish(client, 100))
        while not told:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert told == [True]
        application.gate.set()
        await publishing
        await client.flush(10)
        await asyncio.sleep(0)
    assert told[-1] is False
    assert told == [at % 2 == 0 for at in range(len(told))]


async def test_what_waits_for_room_when_the_client_leaves_says_so(application: Application):
    with pytest.raises(NotDelivered):
        async with run_local(
            application.bus, stores=[MemoryStore()], limits=LIMITS, close_timeout_s=0.05
        ) as client:
            await publish(client, 20)


def test_a_policy_that_is_none_is_refused(application: Application):
    make: Callable[..., Any] = application.bus.local
    with pytest.raises(UsageError, match="drop_oldest"):
        asyncio.run(_enter(make(on_full="panic")))


async def _enter(context: Any) -> None:
    async with context:
        pass
