"""A key that a dead letter parks: what waits behind it, what it takes to go on, and what outlives a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec
import pytest

from shardbus import (
    Bus,
    Client,
    Command,
    CommandFailed,
    Context,
    DeadLetterFilter,
    Event,
    NotDelivered,
    Retry,
)
from shardbus.config import Limits
from shardbus.local import run_local
from shardbus.store import DeadLetter, Envelope, Store, WaitingEvent
from shardbus.testing import MemoryRows, MemoryStore

ONCE = Retry(attempts=1)


class Step(Event, key="key"):
    key: str
    n: int = 0


class Loose(Event, key="key"):
    key: str | None = None
    n: int = 0


class Ask(Command[int], key="key"):
    key: str


class Application:
    """A handler that parks keys while it is broken for some numbers, and a record of what it did."""

    def __init__(self) -> None:
        self.bad: set[int] = set()
        self.ran: list[tuple[str, int]] = []
        self.again: list[int] = []
        self.bus = Bus("parking")
        self.bus.on(Step, retry=ONCE, on_dead_letter="park")(self.take)
        self.bus.command(Ask)(self.answer)

    async def take(self, event: Step, context: Context) -> None:
        if context.redelivered:
            self.again.append(event.n)
        if event.n in self.bad:
            raise ValueError(f"step {event.n}")
        self.ran.append((event.key, event.n))

    def answer(self, command: Ask) -> int:
        return len(self.ran)

    def of(self, key: str) -> list[int]:
        return [n for name, n in self.ran if name == key]


Run = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def run(make_store: Callable[[], Store]) -> Run:
    """Runs a bus in this process, again and again over the same rows."""

    @asynccontextmanager
    async def running(bus: Bus, **options: Any) -> AsyncIterator[Client]:
        async with run_local(bus, stores=[make_store()], **options) as client:
            yield client

    return running


async def steps(client: Client, key: str, *numbers: int) -> None:
    await client.publish_many([Step(key=key, n=n) for n in numbers])


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - the test ends by its time-out
        await asyncio.sleep(0.001)


async def stored(client: Client) -> tuple[int, int, int]:
    """Dead, waiting, parked."""
    status = await client.status()
    return status["dead_letters"], status["waiting"], status["parked"]


async def test_later_events_of_a_parked_key_wait_in_the_store_and_other_keys_go_on(application: Application, run: Run):
    application.bad = {1}
    async with run(application.bus) as client:
        await steps(client, "a", 0, 1, 2, 3)
        await steps(client, "b", 10, 11)
        await steps(client, "a", 4)
        ledger = await client.flush(10)
        assert (ledger.handled, ledger.dead, ledger.waiting) == (3, 1, 3)
        assert await stored(client) == (1, 3, 1)
        (letter,) = await client.dead_letters()
        assert letter.parked
    assert application.ran == [("a", 0), ("b", 10), ("b", 11)]


async def test_a_redriven_event_runs_before_all_that_waited_behind_it(application: Application, run: Run):
    application.bad = {1}
    async with run(application.bus) as client:
        await steps(client, "a", *range(300))
        await client.flush(10)
        application.bad = set()
        assert await client.redrive() == 1
        await steps(client, "a", 300, 301)
        await until(lambda: len(application.ran) == 302)
        await client.flush(10)
        while await stored(client) != (0, 0, 0):  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
    assert application.of("a") == list(range(302))
    assert application.again == [1]


async def test_a_purge_lets_the_key_go_on_without_its_event(application: Application, run: Run):
    application.bad = {1}
    async with run(application.bus) as client:
        await steps(client, "a", 0, 1, 2)
        await steps(client, "b", 1)
        await client.flush(10)
        assert await client.purge() == 2
        await steps(client, "b", 2)
        await steps(client, "a", 3)
        await until(lambda: len(application.ran) == 4)
    assert application.of("a") == [0, 2, 3]
    assert application.of("b") == [2]


async def test_what_fails_again_parks_again_in_its_old_place(application: Application, run: Run):
    application.bad = {1, 3}
    async with run(application.bus) as client:
        await steps(client, "a", 0, 1, 2, 3, 4)
        await client.flush(10)
        for _ in range(3):
            assert await client.redrive() == 1
            await until(lambda: application.again)
            application.again.clear()
            while (await stored(client))[2] == 0:  # noqa: ASYNC110 - the test ends by its time-out
                await asyncio.sleep(0.001)
            assert await stored(client) == (1, 3, 1)
        application.bad = {3}
        await client.redrive()
        await until(lambda: len(application.ran) == 3)
        await client.flush(10)
        application.bad = set()
        while not await client.redrive():  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        await until(lambda: len(application.ran) == 5)
    assert application.of("a") == [0, 1, 2, 3, 4]


async def test_a_key_stays_parked_when_its_worker_dies(application: Application, run: Run):
    application.bad = {1}
    async with run(application.bus) as client:
        await steps(client, "a", 0, 1, 2, 3)
        await steps(client, "b", 1)
        await client.flush(10)
    for number in (4, 5):
        async with run(application.bus) as client:
            await steps(client, "a", number)
            await steps(client, "b", number)
            await client.flush(10)
            assert await stored(client) == (2, 2 + 2 * (number - 3), 2)
    assert application.ran == [("a", 0)]
    application.bad = set()
    async with run(application.bus) as client:
        assert await client.redrive() == 2
        await until(lambda: len(application.ran) == 9)
    assert application.of("a") == [0, 1, 2, 3, 4, 5]
    assert application.of("b") == [1, 4, 5]


async def test_what_was_redriven_before_a_crash_is_first_after_it(application: Application, run: Run):
    application.bad = {1}
    async with run(application.bus) as client:
        await steps(client, "a", 0, 1, 2, 3)
        await client.flush(10)
        application.bad = set()
        await client.redrive()
        await client.abort()  # whatever it had not finished is in the store
    async with run(application.bus) as client:
        await steps(client, "a", 4)
        await until(lambda: 4 in application.of("a"))
    assert list(dict.fromkeys(application.of("a"))) == [0, 1, 2, 3, 4]


async def test_commands_to_a_parked_key_fail_at_once_and_say_why(application: Application, run: Run):
    application.bad = {1}
    gate = asyncio.Event()

    async def stand(event: Step) -> None:
        await gate.wait()

    application.bus.on(Step)(stand)
    async with run(application.bus) as client:
        await steps(client, "a", 0, 1, 2)
        behind = asyncio.create_task(client.execute(Ask(key="a"), timeout=60.0))  # waits in the lane already
        await asyncio.sleep(0.05)
        assert not behind.done()
        gate.set()
        with pytest.raises(CommandFailed, match="KeyParked: key 'a' is parked behind a dead letter") as raised:
            await behind
        assert raised.value.error_type == "KeyParked"
        with pytest.raises(CommandFailed, match="KeyParked"):
            await client.execute(Ask(key="a"), timeout=60.0)
        assert await client.execute(Ask(key="b")) == 1
        await client.flush(10)
        await client.purge()
        await until(lambda: len(application.ran) == 2)
        assert await client.execute(Ask(key="a")) == 2


async def test_what_redrives_without_having_parked_joins_the_end_also_of_a_parked_lane(run: Run):
    bus = Bus("both")
    bad = {1, 2}
    ran: list[int] = []

    def take(event: Step) -> None:
        if event.n in bad:
            raise ValueError
        ran.append(event.n)

    async with run(bus_of(bus, take, "continue")) as client:
        await steps(client, "a", 1)
        await client.flush(10)
    async with run(bus_of(Bus("both"), take, "park")) as client:
        await steps(client, "a", 2, 3)
        await client.flush(10)
        assert await stored(client) == (2, 1, 1)
        bad.clear()
        assert await client.redrive(DeadLetterFilter(ids=((await client.dead_letters())[0].id,))) == 1
        assert await stored(client) == (1, 2, 1)
        assert await client.redrive() == 1
        await until(lambda: len(ran) == 3)
    assert ran == [2, 3, 1]


def bus_of(bus: Bus, handler: Callable[[Step], None], on_dead_letter: Any) -> Bus:
    bus.on(Step, retry=ONCE, on_dead_letter=on_dead_letter)(handler)
    return bus


@pytest.mark.parametrize(("bad", "parks"), [("first", False), ("second", True), ("both", True)])
async def test_of_several_handlers_those_that_gave_up_decide(run: Run, bad: str, parks: bool):
    bus = Bus("several")

    @bus.on(Step, retry=ONCE)
    def first(event: Step) -> None:
        if bad != "second":
            raise ValueError

    @bus.on(Step, retry=Retry(attempts=2, base_s=0.001), on_dead_letter="park")
    def second(event: Step) -> None:
        if bad != "first":
            raise ValueError

    async with run(bus) as client:
        await steps(client, "a", 1)
        await client.flush(10)
        (letter,) = await client.dead_letters()
        assert letter.parked is parks
        assert len(letter.handlers) == (2 if bad == "both" else 1)


async def test_an_event_whose_key_is_none_parks_nothing(run: Run):
    bus = Bus("loose")

    @bus.on(Loose, retry=ONCE, on_dead_letter="park")
    def fail(event: Loose) -> None:
        raise ValueError

    async with run(bus) as client:
        await client.publish_many([Loose(n=n) for n in range(20)])
        assert (await client.flush(10)).dead == 20
        assert await stored(client) == (20, 0, 0)
        assert not any(letter.parked for letter in await client.dead_letters())


async def test_an_event_that_does_not_decode_parks_where_a_handler_would(application: Application, run: Run):
    async with run(application.bus) as client:
        await client.publish(Step(key="a", n="no number"))  # type: ignore[arg-type]
        await steps(client, "a", 1)
        ledger = await client.flush(10)
        assert (ledger.dead, ledger.waiting) == (1, 1)
        (letter,) = await client.dead_letters()
        assert (letter.reason, letter.parked) == ("undecodable", True)
        await client.purge()
        await until(lambda: application.ran)


async def test_where_the_store_has_no_room_for_a_parked_lane_publishers_wait_until_it_has(
    application: Application, run: Run
):
    application.bad = {0}
    limits = Limits(store_rows_max=6, lane_wait_s_max=0.05)
    async with run(application.bus, limits=limits) as client:
        for key in "abc":
            await steps(client, key, 0)
        await client.flush(10)
        await steps(client, "a", *range(1, 9))
        with pytest.raises(NotDelivered):
            await client.flush(0.3)
        assert client.ledger().in_flight > 0
        assert (await stored(client))[0] == 3  # as before: what parks them
        assert application.ran == []
        application.bad = set()
        assert await client.redrive(DeadLetterFilter(key=("a",))) == 1
        await client.flush(10)
        await until(lambda: len(application.of("a")) == 9)
    assert application.of("a") == list(range(9))


async def test_a_parked_lane_goes_to_the_store_once_that_works_again(application: Application):
    application.bad = {1}
    store = MemoryStore()
    async with run_local(application.bus, stores=[store], limits=Limits(lane_wait_s_max=0.05)) as client:
        store.failing = "locked"
        await steps(client, "a", 0, 1, 2, 3)
        with pytest.raises(NotDelivered):
            await client.flush(0.3)
        while "locked" not in (await client.status())["workers"][0]["store_failing"]:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
        assert not store.rows.waiting
        store.failing = ""
        ledger = await client.flush(10)
        assert (ledger.handled, ledger.dead, ledger.waiting) == (1, 1, 2)


class Watched(MemoryStore):
    """Writes when it is let, and never holds the end of a parked lane without what parks it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.writes = 0

    async def write(self, **rows: Any) -> None:
        await self.gate.wait()
        await super().write(**rows)
        self.writes += 1
        waits = {row.envelope.key for row in self.rows.waiting.values()}
        parked = {letter.envelope.key for letter in self.rows.dead.values() if letter.position}
        assert "a" not in waits or "a" in parked


async def test_nothing_behind_a_parked_event_is_stored_before_that_is(application: Application):
    application.bad = {0}
    store = Watched()
    limits = Limits(store_write_rows_max=4, lane_events_max=5)
    async with run_local(application.bus, stores=[store], limits=limits) as client:
        await client.publish_many([Step(key=f"other{at}") for at in range(40)])
        await steps(client, "a", *range(20))
        await asyncio.sleep(0.05)
        store.gate.set()
        ledger = await client.flush(10)
        assert (ledger.dead, ledger.waiting) == (41, 19)
        assert store.writes > 10


async def test_what_ran_before_a_parked_event_and_was_not_removed_in_time_comes_again_in_its_place(
    application: Application,
):
    def envelope(n: int) -> Envelope:
        body = msgspec.msgpack.encode(Step(key="a", n=n))
        return Envelope(
            publisher=bytes(16), seq=n, slot=0, type="Step", key="a", body=body, headers=None, ordinal=0, intended_ns=0,
            attempt=1,
        )  # fmt: skip

    parked = DeadLetter(
        envelope=envelope(2), handlers=(), reason="failed", error_type="E", error="e", place="", traceback="", first_ns=1,
        last_ns=1, epoch=b"e", position=2,
    )  # fmt: skip
    rows = MemoryRows()
    await MemoryStore(rows).write(
        dead=[parked], waiting=[WaitingEvent(position=n, envelope=envelope(n)) for n in (1, 3, 4)]
    )
    async with run_local(application.bus, stores=[MemoryStore(rows)]) as client:
        assert await client.redrive() == 1
        while rows.waiting:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
    assert application.of("a") == [1, 2, 3, 4]


async def test_many_keys_may_be_parked_at_once_and_all_come_back_in_order(application: Application, run: Run):
    application.bad = {1}
    keys = [f"k{at}" for at in range(200)]
    async with run(application.bus) as client:
        for number in range(5):
            for key in keys:
                await client.publish(Step(key=key, n=number))
        await client.flush(30)
        assert await stored(client) == (200, 600, 200)
    application.bad = set()
    async with run(application.bus) as client:
        assert await client.redrive() == 200
        await until(lambda: len(application.ran) == 1000)
    assert all(application.of(key) == [0, 1, 2, 3, 4] for key in keys)


# -- what was too late


class Late(Event, key="key"):
    key: str
    n: int = 0


@pytest.mark.parametrize("batch", [None, 8], ids=["one", "batch"])
async def test_an_event_that_was_too_late_parks_nothing_because_nothing_has_failed(batch: int | None):
    bus = Bus("late")
    ran: list[int] = []

    @bus.on(Step)
    async def hold(event: Step) -> None:
        await asyncio.sleep(0.05)

    def take(events: Any) -> None:
        ran.extend(one.n for one in (events if batch else [events]))

    bus.on(Late, on_dead_letter="park", batch=batch)(take)
    async with run_local(bus, stores=[MemoryStore()]) as client:
        await client.publish(Step(key="a"))
        await client.publish(Late(key="a", n=1), deadline=0.001)
        await client.publish(Late(key="a", n=2))
        ledger = await client.flush(10)
        assert (ledger.handled, ledger.dead, ledger.waiting) == (2, 1, 0)
        (letter,) = await client.dead_letters()
        assert (letter.reason, letter.parked) == ("expired", False)
    assert ran == [2]


async def test_an_event_that_a_parking_handler_gave_up_parks_also_where_the_deadline_ends_the_rest():
    bus = Bus("late")

    @bus.on(Late, retry=ONCE, on_dead_letter="park")
    async def give_up(event: Late) -> None:
        raise ValueError("for good")

    @bus.on(Late, retry=Retry(attempts=1000, base_s=0.01, cap_s=0.05))  # a wait of a second would be the store's
    async def go_on(event: Late) -> None:
        raise ConnectionError("again")

    async with run_local(bus, stores=[MemoryStore()]) as client:
        await client.publish(Late(key="a"), deadline=1.0)
        assert (await client.flush(10)).dead == 1
        (letter,) = await client.dead_letters()
        assert (letter.reason, letter.parked) == ("expired", True)
        assert await client.purge() == 1
