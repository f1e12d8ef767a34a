"""Handlers that publish and execute: acks, order, back-pressure, rings, and what travels from parent to child."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from msgspec.structs import replace

from shardbus import Bus, Command, CommandFailed, Context, Event, MessageTooLarge, OutboxFull, Retry, UsageError
from shardbus.config import Limits
from shardbus.local import run_local
from shardbus.store import WaitingEvent
from shardbus.testing import MemoryRows, MemoryStore

SMALL = Limits(
    batch_events_max=4,
    outbox_events_max=40,
    session_credit_events_max=8,
    credit_events_max=2048,
    lane_wait_s_max=0.2,
    children_events_max=400,
)


class Order(Event, key="order"):
    order: str
    n: int = 0


class Shipped(Event, key="parcel"):
    parcel: str
    n: int = 0


class Loose(Event):
    n: int


class Total(Command[int], key="order"):
    order: str


class Other(Command[int], key="order"):
    order: str


class ByNumber(Command[int], key="number"):
    number: int


def stores(count: int) -> list[MemoryStore]:
    return [MemoryStore() for _ in range(count)]


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - handlers and stores have no event to wait for
            await asyncio.sleep(0.002)


# -- events


async def test_one_of_many_that_a_handler_publishes_and_that_is_not_sound_is_named():
    bus = Bus("parents")
    told: list[str] = []

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        with pytest.raises(UsageError) as raised:
            await context.publish_many([Loose(n=1), Loose(n=2), Loose(n=object())])
        told.append(str(raised.value))

    @bus.on(Loose)
    async def loose(event: Loose) -> None: ...

    async with bus.local() as client:
        await client.publish(Order(order="o"))
        assert (await client.flush(10)).handled == 1
    (line,) = told
    assert line.startswith("event 3 of 3 (Loose): Loose cannot be encoded, so it was not sent: ")
    assert line.endswith("; the 2 events before it went out, none after it")


async def test_what_a_handler_publishes_is_handled_and_known_as_its_child():
    bus = Bus("parents")
    contexts: dict[str, Context] = {}

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        contexts["order"] = context
        await context.publish(Shipped(parcel="p", n=event.n), headers={"by": "van"})

    @bus.on(Shipped)
    async def shipped(event: Shipped, context: Context) -> None:
        contexts["shipped"] = context
        await context.publish_many([Loose(n=1), Loose(n=2)])

    @bus.on(Loose)
    async def loose(event: Loose, context: Context) -> None:
        contexts[f"loose {event.n}"] = context

    async with bus.local(shards=2) as client:
        await client.publish(Order(order="o"), headers={"traceparent": "00-1-2-03", "tracestate": "a=b", "secret": "x"})
        assert (await client.flush(10)).handled == 1
        # An event is acked when its children are, with all that those led to.
        assert set(contexts) == {"order", "shipped", "loose 1", "loose 2"}

    root, child, grandchild = contexts["order"], contexts["shipped"], contexts["loose 1"]
    assert root.causation_id is None
    assert root.correlation_id == root.message_id
    assert child.causation_id == root.message_id
    assert grandchild.causation_id == child.message_id
    assert child.correlation_id == grandchild.correlation_id == root.message_id
    assert child.headers["by"] == "van"
    assert "by" not in grandchild.headers
    assert "secret" not in child.headers
    assert grandchild.headers["traceparent"] == "00-1-2-03"
    assert grandchild.headers["tracestate"] == "a=b"
    assert [one.redelivered for one in (root, child, grandchild)] == [False] * 3


async def test_a_publisher_may_give_the_correlation_and_a_handler_a_trace_of_its_own():
    bus = Bus("traces")
    seen: list[Context] = []

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        mine = context.with_headers({"traceparent": "00-span"})
        await mine.publish(Shipped(parcel="p"), headers={"causation-id": "made up", "shardbus-repeated": "1"})
        await context.publish(Shipped(parcel="p"), headers={"traceparent": "00-own"})

    @bus.on(Shipped)
    async def shipped(event: Shipped, context: Context) -> None:
        seen.append(context)

    async with bus.local() as client:
        headers = {"correlation-id": "request 7", "traceparent": "00-root", "tracestate": "a=b"}
        await client.publish(Order(order="o"), headers=headers)
    assert [one.correlation_id for one in seen] == ["request 7"] * 2
    assert [one.headers["traceparent"] for one in seen] == ["00-span", "00-own"]
    assert [one.headers.get("tracestate") for one in seen] == ["a=b", None]
    assert seen[0].causation_id != "made up"
    assert not seen[0].redelivered


async def test_an_event_is_acked_only_when_what_its_handler_published_is_finished():
    bus = Bus("acks")
    gate = asyncio.Event()
    handled: list[str] = []

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        handled.append(f"order {event.n}")
        if event.n == 1:
            await context.publish(Shipped(parcel="p"))

    @bus.on(Shipped)
    async def shipped(event: Shipped, context: Context) -> None:
        await gate.wait()
        handled.append("shipped")

    async with run_local(bus, shards=1, stores=stores(1), limits=Limits(lane_wait_s_max=30.0)) as client:
        for n in (1, 2, 3):
            await client.publish(Order(order="o", n=n))
        await until(lambda: handled == ["order 1", "order 2", "order 3"])  # its lane goes on meanwhile
        await until(lambda: client.ledger().handled == 2)
        assert client.ledger().in_flight == 1
        gate.set()
        ledger = await client.flush(10)
    assert (ledger.handled, ledger.waiting) == (3, 0)
    assert handled[-1] == "shipped"


async def test_what_waits_long_for_its_children_waits_in_the_store_and_leaves_it():
    bus = Bus("patience")
    gate = asyncio.Event()
    runs: list[str] = []

    @bus.on(Order)
    async def first(event: Order, context: Context) -> None:
        runs.append("first")
        await context.publish(Shipped(parcel="p"))

    @bus.on(Order)
    async def second(event: Order) -> None:
        runs.append("second")

    @bus.on(Shipped)
    async def shipped(event: Shipped) -> None:
        await gate.wait()

    rows = MemoryRows()
    async with run_local(bus, stores=[MemoryStore(rows)], limits=SMALL) as client:
        await client.publish(Order(order="o"))
        ledger = await client.flush(10)
        assert (ledger.waiting, ledger.handled) == (1, 0)
        orders = [row for row in rows.waiting.values() if row.envelope.type == "Order"]
        # A successor runs the handler again that has published, and no other.
        assert [list(row.todo) for row in orders] == [[f"{__name__}.{first.__qualname__}"]]
        gate.set()
        await until(lambda: not rows.waiting)
    assert runs == ["first", "second"]


async def test_a_successor_runs_again_what_had_published_and_marks_its_children():
    rows = MemoryRows()
    runs: list[str] = []
    hold = asyncio.Event()

    def application(waits: bool) -> Bus:
        bus = Bus("heirs")

        @bus.on(Order)
        async def publishes(event: Order, context: Context) -> None:
            runs.append(f"publishes {context.redelivered}")
            await context.publish(Shipped(parcel="p"))

        @bus.on(Order)
        async def does_not(event: Order, context: Context) -> None:
            runs.append("does not")

        @bus.on(Shipped)
        async def shipped(event: Shipped, context: Context) -> None:
            if waits:
                await hold.wait()
            runs.append(f"shipped {context.attempt} {context.redelivered}")

        return bus

    class Killed(Exception):
        pass

    async def live_until_killed() -> None:
        async with run_local(application(True), stores=[MemoryStore(rows)], limits=SMALL) as client:
            await client.publish(Order(order="o"))
            assert (await client.flush(10)).waiting == 1
            raise Killed

    with pytest.raises(Killed):
        await live_until_killed()
    left = {position: row for position, row in rows.waiting.items() if row.envelope.type == "Order"}
    rows.waiting = left  # the child was in the memory of the worker that died
    async with run_local(application(False), stores=[MemoryStore(rows)], limits=SMALL):
        await until(lambda: not rows.waiting)
    assert runs == ["publishes False", "does not", "publishes True", "shipped 1 True"]


async def test_a_handler_that_raises_has_published_all_the_same():
    bus = Bus("failures")
    shipped: list[tuple[int, bool]] = []

    @bus.on(Order, retry=Retry(attempts=2, base_s=0.01))
    async def order(event: Order, context: Context) -> None:
        await context.publish(Shipped(parcel="p", n=context.attempt))
        raise ValueError("too late")

    @bus.on(Shipped)
    async def ship(event: Shipped, context: Context) -> None:
        shipped.append((event.n, context.redelivered))

    async with bus.local() as client:
        await client.publish(Order(order="o"))
        await client.flush(10)
        await until(lambda: len(shipped) == 2)
        [letter] = await client.dead_letters()
    assert shipped == [(1, False), (2, True)]
    assert letter.error == "too late"


@pytest.mark.parametrize("on_dead_letter", ["continue", "park"])
async def test_an_event_that_fails_may_have_published_to_its_own_key(on_dead_letter: Any):
    bus = Bus("parking")
    runs: list[int] = []

    @bus.on(Order, retry=Retry(attempts=1), on_dead_letter=on_dead_letter)
    async def order(event: Order, context: Context) -> None:
        runs.append(event.n)
        if event.n == 1 and len(runs) == 1:
            await context.publish(Order(order="o", n=3))
            raise ValueError("not now")

    rows = MemoryRows()
    async with run_local(bus, stores=[MemoryStore(rows)], limits=SMALL) as client:
        await client.publish(Order(order="o", n=1))
        await client.publish(Order(order="o", n=2))
        await client.flush(10)
        await until(lambda: rows.dead)
        if on_dead_letter == "park":
            assert runs == [1]
            assert await client.redrive() == 1
            await until(lambda: len(runs) == 4)
        await until(lambda: not rows.waiting)
    assert runs == ([1, 1, 2, 3] if on_dead_letter == "park" else [1, 2, 3])


async def test_an_event_of_its_own_key_joins_the_end_of_the_lane():
    bus = Bus("own key")
    handled: list[int] = []

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        if event.n == 1:
            await context.publish(Order(order="o", n=4))
            await asyncio.sleep(0.05)  # so that it is there before this ends
        handled.append(event.n)

    async with bus.local() as client:
        for n in (1, 2, 3):
            await client.publish(Order(order="o", n=n))
        await client.flush(10)
    assert handled == [1, 2, 3, 4]


async def test_children_of_a_retried_event_do_not_run_twice_when_it_goes_to_the_store():
    bus = Bus("retries")
    gate = asyncio.Event()
    runs: list[str] = []

    @bus.on(Order)
    async def publishes(event: Order, context: Context) -> None:
        runs.append("publishes")
        await context.publish(Shipped(parcel="p"))

    @bus.on(Order, retry=Retry(attempts=2, base_s=1.0))
    async def fails_once(event: Order, context: Context) -> None:
        runs.append("fails once")
        if runs.count("fails once") == 1:
            raise ValueError("again")

    @bus.on(Shipped)
    async def shipped(event: Shipped) -> None:
        await gate.wait()
        runs.append("shipped")

    rows = MemoryRows()

    def order_row() -> WaitingEvent | None:
        return next((row for row in rows.waiting.values() if row.envelope.type == "Order"), None)

    limits = replace(SMALL, lane_wait_s_max=1e-6)
    async with run_local(bus, stores=[MemoryStore(rows)], limits=limits) as client:
        await client.publish(Order(order="o"))
        await until(order_row)
        row = order_row()
        assert row is not None
        assert [name.rpartition(".")[2] for name in row.todo] == ["publishes", "fails_once"]
        gate.set()
        await until(lambda: "shipped" in runs)
        await until(lambda: (row := order_row()) is None or len(row.todo) == 1)
        await until(lambda: not rows.waiting)
    assert sorted(runs) == ["fails once", "fails once", "publishes", "shipped"]


# -- back-pressure


@pytest.mark.parametrize("shards", [1, 2])
async def test_workers_that_publish_to_each_other_at_full_credit_do_not_wait_for_each_other(shards: int):
    bus = Bus("ping-pong")
    handled = 0

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        nonlocal handled
        handled += 1
        if event.n:
            await context.publish(Shipped(parcel=f"p{event.order}", n=event.n - 1))

    @bus.on(Shipped)
    async def shipped(event: Shipped, context: Context) -> None:
        nonlocal handled
        handled += 1
        if event.n:
            await context.publish(Order(order=f"o{event.parcel[:4]}", n=event.n - 1))

    held: list[MemoryStore] = stores(shards)
    async with run_local(bus, shards=shards, stores=list(held), limits=SMALL) as client:
        for at in range(150):
            await client.publish(Order(order=f"{at}", n=9))
        await client.flush(30)
        await until(lambda: handled == 1500)
        await until(lambda: not any(store.rows.waiting for store in held))
    assert handled == 1500


async def test_a_publisher_is_held_up_where_handlers_publish_more_than_is_taken():
    bus = Bus("fan-out")
    gate = asyncio.Event()
    ran = 0
    shipped = 0

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        nonlocal ran
        ran += 1
        await context.publish_many([Shipped(parcel=f"{event.order}-{n}") for n in range(5)])

    @bus.on(Shipped)
    async def ship(event: Shipped) -> None:
        nonlocal shipped
        await gate.wait()
        shipped += 1

    store = MemoryStore()
    async with run_local(bus, stores=[store], limits=SMALL) as client:
        publishing = asyncio.create_task(publish_orders(client, 200))
        await until(lambda: ran >= 8)
        await asyncio.sleep(4 * SMALL.lane_wait_s_max)
        assert ran < 30  # of 200: as many as fill the outbox, and the credit behind it
        gate.set()
        await publishing
        await client.flush(30)
        await until(lambda: shipped == 1000)
    assert ran == 200


async def publish_orders(client: Any, count: int) -> None:
    for at in range(count):
        await client.publish(Order(order=f"{at}"))


async def test_a_handler_that_publishes_without_end_is_told_so():
    bus = Bus("flood")
    told: list[Exception] = []

    @bus.on(Order, retry=Retry(attempts=1))
    async def order(event: Order, context: Context) -> None:
        try:
            await context.publish_many([Shipped(parcel=f"{n}") for n in range(100_000)])
        except OutboxFull as error:
            told.append(error)

    @bus.on(Shipped)
    async def ship(event: Shipped) -> None:
        await asyncio.sleep(0.01)

    async with run_local(bus, stores=stores(1), limits=SMALL) as client:
        await client.publish(Order(order="o"))
        await client.flush(30)
    assert len(told) == 1


# -- commands


async def test_a_handler_executes_commands_and_gets_their_replies():
    bus = Bus("commands")
    totals: list[Any] = []

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        totals.append(await context.execute(Total(order="other")))

    @bus.command(Total)
    async def total(command: Total, context: Context) -> int:
        await context.publish(Shipped(parcel="p"))
        return 42

    @bus.on(Shipped)
    async def shipped(event: Shipped, context: Context) -> None:
        totals.append(context.headers.get("shardbus-holds"))

    async with bus.local(shards=2) as client:
        await client.publish(Order(order="o"))
        await client.flush(10)
        await until(lambda: len(totals) == 2)
    assert sorted(totals, key=str) == [42, None]


@pytest.mark.parametrize("how", ["event", "command"])
async def test_a_command_of_the_handlers_own_key_is_refused_at_once(how: str):
    bus = Bus("same key")
    told: list[str] = []

    async def ask(context: Context) -> int:
        try:
            return await context.execute(Total(order="o"), timeout=3600.0)
        except UsageError as error:
            told.append(str(error))
            return 1

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        await ask(context)

    @bus.command(Other)
    async def other(command: Other, context: Context) -> int:
        return await ask(context)

    @bus.command(Total)
    async def total(command: Total) -> int:
        return 2

    async with bus.local() as client:
        if how == "event":
            await client.publish(Order(order="o"))
        else:
            assert await client.execute(Other(order="o")) == 1
        await client.flush(10)
        assert await client.execute(Other(order="other key")) == 2
    assert len(told) == 1
    assert "Total has the key 'o' of the message that is being handled" in told[0]


async def test_keys_of_two_types_are_two_keys():
    bus = Bus("types")

    @bus.command(Total)
    async def total(command: Total, context: Context) -> int:
        return await context.execute(ByNumber(number=42))

    @bus.command(ByNumber)
    async def by_number(command: ByNumber) -> int:
        return command.number

    async with bus.local() as client:
        assert await client.execute(Total(order="42")) == 42


async def test_a_ring_of_commands_is_refused_where_it_would_close():
    bus = Bus("ring")

    @bus.command(Total)
    async def total(command: Total, context: Context) -> int:
        return await context.execute(Other(order="b"), timeout=3600.0)

    @bus.command(Other)
    async def other(command: Other, context: Context) -> int:
        return await context.execute(ByNumber(number=3), timeout=3600.0)

    @bus.command(ByNumber)
    async def by_number(command: ByNumber, context: Context) -> int:
        return await context.execute(Total(order="a"), timeout=3600.0)

    async with bus.local(shards=2) as client:
        with pytest.raises(CommandFailed, match="Total would close a ring: its key 'a'"):
            await client.execute(Total(order="a"), timeout=10.0)


# -- misuse


async def test_what_cannot_be_sent_is_refused_in_the_handler():
    bus = Bus("misuse")
    told: dict[str, BaseException] = {}
    kept: list[Context] = []

    async def note(name: str, call: Any) -> None:
        try:
            await call
        except Exception as error:
            told[name] = error

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        kept.append(context)
        await note("command", context.publish(Total(order="o")))  # type: ignore[arg-type]
        await note("event", context.execute(Shipped(parcel="p")))  # type: ignore[type-var]
        await note("large", context.publish(Shipped(parcel="p" * 5, n=0), headers={"a": "b" * 5000}))
        await note("body", context.publish(Order(order="o" * 2_000_000)))

    def in_thread(event: Shipped, context: Context) -> None:
        asyncio.run(note("thread", context.publish(Loose(n=1))))

    bus.on(Shipped, in_thread=True)(in_thread)
    async with bus.local() as client:
        await client.publish(Order(order="o"))
        await client.publish(Shipped(parcel="p"))
        await client.flush(10)
        await note("late", kept[0].publish(Shipped(parcel="p")))
    await note("none", Context("k", b"p" * 16, 0, 1, 0).publish(Loose(n=1)))
    assert "use execute" in str(told["command"])
    assert "use publish" in str(told["event"])
    assert "together up to" in str(told["large"])
    assert isinstance(told["body"], MessageTooLarge)
    assert "not its threads" in str(told["thread"])
    assert "has returned" in str(told["late"])
    assert "no running worker" in str(told["none"])


async def test_a_uuid_key_is_held_like_any_other():
    class Slow(Command[int], key="id"):
        id: UUID

    bus = Bus("uuids")

    @bus.command(Slow)
    async def slow(command: Slow, context: Context) -> int:
        return await context.execute(Slow(id=command.id))

    async with bus.local() as client:
        with pytest.raises(CommandFailed, match="cannot execute a command of its own key"):
            await client.execute(Slow(id=UUID(int=5)))


@pytest.mark.parametrize("how", ["publish", "sleep"])
async def test_scheduled_events_that_wait_for_others_hold_up_no_further_ones(how: str):
    bus = Bus("schedules")
    gate = asyncio.Event()
    begun: list[int] = []
    loose: list[int] = []

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        begun.append(event.n)
        if how == "publish":
            await context.publish(Shipped(parcel=f"p{event.n}"))
        else:
            await gate.wait()

    @bus.on(Shipped)
    async def shipped(event: Shipped) -> None:
        await gate.wait()

    @bus.on(Loose)
    async def take(event: Loose) -> None:
        loose.append(event.n)

    async with bus.local() as client:
        for n in range(1200):
            await client.schedule(Order(order=f"o{n}", n=n), delay=1.0)
        await client.flush(30)
        await client.schedule(Loose(n=1), delay=1.5)
        await until(lambda: loose and len(begun) == 1200)
        gate.set()
        await client.flush(30)


async def test_a_handled_event_whose_children_take_long_does_not_expire():
    bus = Bus("patient")
    gate = asyncio.Event()
    rows = MemoryRows()
    runs: list[int] = []

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        runs.append(context.attempt)
        await context.publish(Shipped(parcel="p"))

    @bus.on(Shipped)
    async def shipped(event: Shipped) -> None:
        await gate.wait()

    async with run_local(bus, stores=[MemoryStore(rows)], limits=SMALL, close_timeout_s=0.1) as client:
        await client.publish(Order(order="o"), deadline=1.0)
        await until(lambda: client.ledger().waiting == 1)
        await asyncio.sleep(1.0)
    gate.set()
    async with run_local(bus, stores=[MemoryStore(rows)], limits=SMALL) as client:
        await until(lambda: len(runs) == 2)
    assert runs == [1, 2]
    assert not rows.dead


async def test_a_batch_handler_publishes_through_the_context_of_each_of_its_events():
    bus = Bus("in batches")
    gate = asyncio.Event()
    children: list[Context] = []
    batches: list[int] = []

    @bus.on(Order, batch=8)
    async def order(events: list[Order], contexts: list[Context]) -> None:
        batches.append(len(events))
        for event, context in zip(events, contexts, strict=True):
            if event.n % 2:
                await context.publish(Shipped(parcel=event.order, n=event.n))

    @bus.on(Shipped)
    async def shipped(event: Shipped, context: Context) -> None:
        await gate.wait()
        children.append(context)

    async with run_local(bus, stores=stores(1), limits=Limits(lane_wait_s_max=30.0)) as client:
        for n in range(16):
            await client.publish(Order(order=f"o{n}", n=n))
        await until(lambda: client.ledger().handled == 8)  # those without children
        assert client.ledger().in_flight == 8
        gate.set()
        assert (await client.flush(10)).handled == 16
    assert max(batches) > 1
    assert len({context.causation_id for context in children}) == 8


# -- headers


async def test_as_many_headers_as_a_program_may_give_go_on_with_all_that_the_bus_adds():
    own = {f"h{n}": "x" for n in range(26)}
    bus = Bus("headers")
    heard: list[dict[str, str]] = []
    told: list[str] = []

    @bus.on(Order)
    async def order(event: Order, context: Context) -> None:
        for headers in (own, own | {"one": "more"}):
            try:
                await context.publish(Shipped(parcel="p"), headers=headers)
                await context.execute(Other(order="elsewhere"), headers=headers)
            except UsageError as error:
                told.append(str(error))
        if context.attempt == 1:
            raise ConnectionError("again, so that its children are marked as repeated")

    @bus.on(Shipped)
    async def shipped(event: Shipped, context: Context) -> None:
        heard.append(dict(context.headers))

    @bus.command(Other)
    async def other(command: Other, context: Context) -> int:
        heard.append(dict(context.headers))
        return 1

    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    async with bus.local() as client:
        await client.publish(Order(order="o"), headers={"correlation-id": "c", **trace})
        assert (await client.flush(20)).handled == 1
        with pytest.raises(UsageError, match="27 headers; the limit is 26; what is more belongs into the message"):
            await client.publish(Order(order="o"), headers=own | {"one": "more"})
    assert told == ["27 headers; the limit is 26; what is more belongs into the message"] * 2
    assert len(heard) == 4
    assert all(own.items() | trace.items() <= headers.items() for headers in heard)
    assert max(map(len, heard)) == 32
