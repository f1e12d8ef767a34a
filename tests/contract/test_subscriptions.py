"""What a subscription promises: events as they were handled, in order, and a word in the place of those that are missing."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shardbus import (
    Bus,
    Client,
    ClientClosed,
    Command,
    Event,
    Missed,
    Retry,
    SubscriptionLost,
    UsageError,
)
from shardbus.config import Limits
from shardbus.feeds import Feeds
from shardbus.local import run_local
from shardbus.testing import MemoryStore


class Shipped(Event, key="order"):
    order: str
    n: int = 0


class Failed(Event, key="order"):
    order: str


class Heard(Event):
    n: int


class Unhandled(Event):
    n: int


class Ask(Command[int], key="order"):
    order: str


bus = Bus("listened")
once = Retry(attempts=1)


@bus.on(Shipped, retry=once)
async def ship(event: Shipped) -> None:
    if event.n % 7 == 3:
        await asyncio.sleep(0)  # some suspend, most do not
    if event.n < 0:
        raise ValueError("not shipped")


@bus.on(Failed, retry=Retry(attempts=2, base_s=0.001, cap_s=0.002))
async def fail(event: Failed, context: Any) -> None:
    if context.attempt == 1:
        raise ValueError("later")


@bus.on(Heard)
async def hear(event: Heard) -> None: ...


@bus.command(Ask)
async def answer(command: Ask) -> int:
    return 1


@asynccontextmanager
async def running(shards: int = 2, limits: Limits | None = None) -> AsyncIterator[Client]:
    stores = [MemoryStore() for _ in range(shards)]
    async with run_local(bus, shards=shards, stores=stores, limits=limits or Limits()) as client:
        yield client


async def taken(subscription: Any, count: int) -> list[Any]:
    async with asyncio.timeout(20):
        return [await anext(subscription) for _ in range(count)]


async def test_events_arrive_after_they_were_handled_in_the_order_of_their_key():
    async with running() as client, client.subscribe(Shipped) as events:
        for n in range(300):
            for order in "abc":
                await client.publish(Shipped(order=order, n=n))
        found = await taken(events, 900)
    for order in "abc":
        assert [event.n for event in found if event.order == order] == list(range(300))


async def test_a_key_and_several_types_choose_what_arrives():
    async with running() as client, client.subscribe(Shipped, Failed, key="b") as events:
        await client.publish(Heard(n=1))
        for n in range(5):
            for order in "abc":
                await client.publish(Shipped(order=order, n=n), headers={"n": str(n)})
        await client.publish(Failed(order="b"))
        assert await taken(events, 5) == [Shipped(order="b", n=n) for n in range(5)]
        assert events.headers == {"n": "4"}
        assert await taken(events, 1) == [Failed(order="b")]
        assert events.headers == {}


async def test_what_died_does_not_arrive():
    async with running() as client, client.subscribe(Shipped) as events:
        for n in (1, -1, 2):
            await client.publish(Shipped(order="a", n=n))
        assert (await client.flush()).dead == 1
        await client.publish(Shipped(order="a", n=4))
        assert [event.n for event in await taken(events, 3)] == [1, 2, 4]


async def test_events_without_a_key_arrive_from_every_shard():
    async with running() as client, client.subscribe(Heard) as events:
        for n in range(10):
            await client.publish(Heard(n=n))
            await client.flush()
        assert sorted(event.n for event in await taken(events, 10)) == list(range(10))


async def test_a_slow_reader_misses_the_oldest_and_is_told_how_many():
    async with running() as client, client.subscribe(Shipped, queue_events_max=10) as events:
        for n in range(100):
            await client.publish(Shipped(order="a", n=n))
        await client.flush()
        await asyncio.sleep(0.05)
        found = await taken(events, 11)
        assert found == [Missed(90), *(Shipped(order="a", n=n) for n in range(90, 100))]
        await client.publish(Shipped(order="a", n=100))
        assert await taken(events, 1) == [Shipped(order="a", n=100)]


async def test_a_slow_reader_that_asked_for_it_is_disconnected_behind_what_it_has():
    async with running() as client:
        events = client.subscribe(Shipped, queue_events_max=10, on_slow="disconnect")
        async with events:
            for n in range(100):
                await client.publish(Shipped(order="a", n=n))
            await client.flush()
            await asyncio.sleep(0.05)
            assert [event.n for event in await taken(events, 10)] == list(range(10))
            with pytest.raises(SubscriptionLost, match="Shipped has ended: its reader is slower"):
                await anext(events)
            with pytest.raises(StopAsyncIteration):
                await anext(events)
        assert not client._subscriptions._readers


async def test_what_the_worker_dropped_is_told_once_there_is_room_again(monkeypatch: pytest.MonkeyPatch):
    limits = Limits(feed_events_max=64)
    async with running(1, limits) as client, client.subscribe(Shipped) as events:
        # The program stands still: what arrives is not taken before it goes on.
        waiting: list[Any] = []
        subscriptions = client._subscriptions
        receive = subscriptions.receive
        monkeypatch.setattr(subscriptions, "receive", lambda *arguments: waiting.append(arguments))
        for n in range(1000):
            await client.publish(Shipped(order="a", n=n))
        await client.flush()
        await asyncio.sleep(0.05)
        monkeypatch.setattr(subscriptions, "receive", receive)
        for arguments in waiting:
            receive(*arguments)
        found = await taken(events, 64)
        assert [event.n for event in found] == list(range(64))
        assert await taken(events, 1) == [Missed(936)]  # although nothing follows
        await client.publish(Shipped(order="a", n=1000))
        assert await taken(events, 1) == [Shipped(order="a", n=1000)]


async def test_a_batch_in_which_nobody_is_interested_is_not_looked_at(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("nobody listens to that")

    async with running() as client:
        for name in ("add", "concern", "flush"):
            monkeypatch.setattr(Feeds, name, refuse)
        await client.publish_many([Shipped(order="a", n=n) for n in range(1000)])
        assert (await client.flush()).handled == 1000
        monkeypatch.undo()
        monkeypatch.setattr(Feeds, "add", refuse)
        async with client.subscribe(Failed):
            await client.publish_many([Shipped(order="a") for n in range(1000)])
            assert (await client.flush()).handled == 2000


@pytest.mark.parametrize("leave", ["break", "cancel", "aclose", "forget"])
async def test_whoever_leaves_is_unsubscribed(leave: str):
    async with running() as client:
        async def read(count: int) -> None:
            async for _ in client.subscribe(Shipped):
                count -= 1
                if not count:
                    break

        if leave == "aclose":
            events = client.subscribe(Shipped)
            await events.aclose()
        elif leave == "forget":
            client.subscribe(Shipped)
        else:
            reading = asyncio.create_task(read(1 if leave == "break" else 2))
            while not any(reader.is_confirmed for reader in client._subscriptions._readers):  # noqa: ASYNC110 - likewise
                await asyncio.sleep(0.01)
            if leave == "cancel":
                reading.cancel()
            else:
                await client.publish(Shipped(order="a"))
            await asyncio.wait([reading])
            del reading
        gc.collect()
        for _ in range(100):
            await asyncio.sleep(0.01)
            if not client._subscriptions._readers:
                break
        assert not client._subscriptions._readers
        await client.publish(Shipped(order="a"))
        await client.flush()


async def test_who_was_silent_for_long_is_forgotten_and_begins_again_when_it_comes_back():
    limits = Limits(subscription_silence_s=1.0, taken_interval_s=0.1)
    async with running(1, limits) as client, client.subscribe(Shipped) as events:
        outboxes = client._outboxes
        sends, outboxes.send = outboxes.send, lambda *_: None  # type: ignore[method-assign, assignment]
        await asyncio.sleep(3.5)
        outboxes.send = sends  # type: ignore[method-assign]
        assert await taken(events, 1) == [Missed(None)]
        await client.publish(Shipped(order="a"))
        assert await taken(events, 1) == [Shipped(order="a")]


async def test_a_type_that_no_handler_takes_is_an_error_and_not_silence():
    async with running() as client:
        with pytest.raises(SubscriptionLost, match="no handler of this application takes events of that type"):
            async with client.subscribe(Unhandled):
                pass
        with pytest.raises(SubscriptionLost):
            await taken(client.subscribe(Shipped, Unhandled), 1)


async def test_an_event_that_its_subscriber_cannot_decode_is_missed():
    class Other(Event, key="order", name="Shipped"):
        order: str
        n: str

    async with running() as client, client.subscribe(Other) as events:
        await client.publish(Shipped(order="a"))
        assert await taken(events, 1) == [Missed(1)]


async def test_a_closed_client_ends_its_subscriptions():
    async with running() as client:
        events = client.subscribe(Shipped)
        reading = asyncio.create_task(taken(events, 1))
        await asyncio.sleep(0)
    with pytest.raises(ClientClosed):
        await reading
    with pytest.raises(ClientClosed):
        client.subscribe(Shipped)


async def test_a_subscription_that_makes_no_sense_is_refused():
    async with running() as client:
        for arguments, told in (
            ((), "0 types"),
            ((Ask,), "none"),
            ((Event,), "none"),
            ((Shipped(order="a"),), "none"),
        ):
            with pytest.raises(UsageError, match=told):
                client.subscribe(*arguments)
        for options in ({"key": True}, {"queue_events_max": 0}, {"on_slow": "wait"}):
            with pytest.raises(UsageError):
                client.subscribe(Shipped, **options)
        with pytest.raises(UsageError, match="has no key"):
            client.subscribe(Heard, key="a")


async def test_a_client_and_a_worker_have_only_so_many():
    async with running(1, Limits(subscriptions_client_max=2)) as client:
        kept = [client.subscribe(Shipped) for _ in range(2)]
        with pytest.raises(UsageError, match="2 subscriptions"):
            client.subscribe(Shipped)
        await kept.pop().aclose()
        await client.subscribe(Shipped).aclose()
    async with running(1, Limits(subscriptions_max=1)) as client, client.subscribe(Shipped):
        with pytest.raises(SubscriptionLost, match="as many subscriptions as it can"):
            async with client.subscribe(Shipped):
                pass
