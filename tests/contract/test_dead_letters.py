"""Dead letters from the outside: found, redriven, purged; nothing lost on the way, and order kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from shardbus import (
    Breaker,
    Bus,
    BusRejected,
    Client,
    Context,
    DeadLetterFilter,
    Event,
    NotDelivered,
    Retry,
    UsageError,
    testing,
)
from shardbus.config import Limits
from shardbus.inbound import Inbound
from shardbus.lane_rows import LaneRows
from shardbus.local import run_local
from shardbus.store import Failure
from shardbus.testing import MemoryRows, MemoryStore


class Step(Event, key="key"):
    key: str
    n: int = 0


class Other(Event, key="key"):
    key: int


class Unheard(Event):
    pass


class Application:
    """Handlers that fail until they are mended, and a record of what they did."""

    def __init__(self) -> None:
        self.broken = True
        self.sound: list[int] = []
        self.shaky: list[tuple[str, int, bool]] = []
        self.bus = Bus("letters")
        self.bus.on(Step)(self.take)
        self.bus.on(Step, retry=Retry(attempts=1))(self.fail)
        self.bus.on(Other, retry=Retry(attempts=1))(self.fail_too)

    async def take(self, event: Step) -> None:
        self.sound.append(event.n)

    async def fail(self, event: Step, context: Context) -> None:
        if self.broken:
            raise ValueError(f"step {event.n}")
        self.shaky.append((event.key, event.n, context.redelivered))

    async def fail_too(self, event: Other) -> None:
        if self.broken:
            raise KeyError("other")

    @asynccontextmanager
    async def running(self, *, shards: int = 1, rows: MemoryRows | None = None) -> AsyncIterator[Client]:
        stores = [MemoryStore(rows if rows is not None and at == 0 else None) for at in range(shards)]
        async with run_local(self.bus, shards=shards, stores=list(stores)) as client:
            yield client


@pytest.fixture
def application() -> Application:
    return Application()


async def publish(client: Client, count: int, keys: int = 3) -> None:
    for n in range(count):
        await client.publish(Step(key=f"k{n % keys}", n=n), headers={"n": str(n)})
    await client.flush(10)


async def test_a_dead_letter_tells_all_about_its_event(application: Application):
    began = datetime.now(UTC) - timedelta(seconds=1)
    async with application.running() as client:
        await publish(client, 1)
        (letter,) = await client.dead_letters()
    assert (letter.type, letter.key, letter.event) == ("Step", "k0", {"key": "k0", "n": 0})
    assert (letter.reason, letter.error_type, letter.error) == ("failed", "ValueError", "step 0")
    assert [name.split(".")[-1] for name in letter.handlers] == ["fail"]
    assert (letter.attempts, letter.headers) == (1, {"n": "0"})
    assert began <= letter.first_at <= letter.last_at <= datetime.now(UTC)
    assert "in fail" in letter.traceback
    assert letter.id == f"{client.publisher.hex()}-0-0"


async def test_the_line_that_tells_of_a_dead_letter_is_one_and_has_its_key(caplog: pytest.LogCaptureFixture):
    class Device(Event, key="serial"):
        serial: UUID

    class Forged(Event, name="Odd\nERROR of somebody else"):
        pass

    bus = Bus("lines")

    @bus.on(Device, retry=Retry(attempts=1))
    async def handle(event: Device) -> None:
        raise ValueError("first\nsecond \x1b[2J")

    serial = UUID(int=7)
    async with run_local(bus) as client:
        await client.publish(Device(serial=serial))
        await client.flush(10)
        (letter,) = await client.dead_letters()
        await client.publish(Forged())
        await client.flush(10)
    assert letter.error == "first\nsecond \x1b[2J"
    line, forged = [record.getMessage() for record in caplog.records if record.name == "shardbus.shard"]
    assert line.startswith(f"dead letter: Device key={serial!r} (failed in ")
    assert line.endswith("ValueError: first\\nsecond \\x1b[2J")
    assert forged.startswith("dead letter: Odd\\nERROR of somebody else key=None (unknown-type)")


async def test_how_many_more_there_were_is_told_a_minute_later_and_at_the_end(caplog: pytest.LogCaptureFixture):
    class Device(Event, key="serial"):
        serial: UUID

    bus = Bus("counts")

    @bus.on(Device, retry=Retry(attempts=1))
    async def handle(event: Device) -> None:
        raise ValueError("broken")

    def more() -> list[str]:
        lines = [record.getMessage().partition("ValueError: broken")[2] for record in caplog.records]
        return [line for line in lines if line]

    told = " (and 2 more of the kind since the last such line)"
    async with testing.run(bus) as kit:
        await kit.client.publish_many([Device(serial=UUID(int=n)) for n in range(3)])
        await kit.advance(59.0)
        assert more() == []
        await kit.advance(2.0)
        assert more() == [told]
    async with run_local(bus) as client:
        await client.publish_many([Device(serial=UUID(int=n)) for n in range(3)])
        await client.flush(10)
        assert more() == [told]
    assert more() == [told, told]


async def test_dead_letters_of_all_shards_are_found_by_what_they_are(application: Application):
    async with application.running(shards=3) as client:
        await publish(client, 30, keys=10)
        await client.publish(Other(key=42))
        await client.publish(Unheard())
        await client.flush(10)
        everything = await client.dead_letters()
        assert len(everything) == 32
        assert len(await client.dead_letters(limit=7)) == 7
        by_type = await client.dead_letters(DeadLetterFilter(type="Other"))
        assert [letter.key for letter in by_type] == [42]
        with pytest.raises(UsageError, match="reason='bogus': it is one of failed, timeout, circuit-open"):
            DeadLetterFilter(reason="bogus")
        assert await client.dead_letters(DeadLetterFilter(key=("42",))) == []
        assert await client.dead_letters(DeadLetterFilter(key=(42,))) == by_type
        assert len(await client.dead_letters(DeadLetterFilter(key=("k3",)))) == 3
        assert [one.type for one in await client.dead_letters(DeadLetterFilter(reason="unknown-type"))] == ["Unheard"]
        named = tuple(letter.id for letter in everything[5:12])
        assert {one.id for one in await client.dead_letters(DeadLetterFilter(ids=named))} == set(named)
        later = datetime.now(UTC) + timedelta(hours=1)
        assert await client.dead_letters(DeadLetterFilter(since=later)) == []


async def test_what_is_redriven_runs_only_the_handlers_that_gave_up_and_says_so(application: Application):
    async with application.running(shards=2) as client:
        await publish(client, 40, keys=4)
        application.broken = False
        assert await client.redrive() == 40
        while len(application.shaky) < 40:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        assert await client.dead_letters() == []
        status = await client.status()
    assert sorted(application.sound) == list(range(40))
    assert all(redelivered for _, _, redelivered in application.shaky)
    for key in range(4):
        assert [n for name, n, _ in application.shaky if name == f"k{key}"] == list(range(key, 40, 4))
    assert status["dead_letters"] == 0


async def test_a_redriven_event_joins_the_end_of_its_lane(application: Application):
    async with application.running() as client:
        await client.publish(Step(key="a", n=0))
        await client.flush(10)
        application.broken = False
        redriving = asyncio.create_task(client.redrive())
        await client.publish_many([Step(key="a", n=n) for n in range(1, 300)])
        assert await redriving == 1
        await client.flush(10)
        while len(application.shaky) < 300:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
    assert [n for _, n, _ in application.shaky if n] == list(range(1, 300))


async def test_what_fails_again_is_dead_again_and_not_redriven_for_ever(application: Application):
    async with application.running() as client:
        await publish(client, 600)
        died = {letter.id: letter.first_at for letter in await client.dead_letters()}
        assert await client.redrive() == 600
        while len(letters := await client.dead_letters()) < 600:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
    assert {letter.attempts for letter in letters} == {2}
    assert {letter.id: letter.first_at for letter in letters} == died
    assert all(letter.first_at < letter.last_at for letter in letters)


async def test_only_what_is_meant_is_redriven_or_purged(application: Application):
    async with application.running() as client:
        await publish(client, 30)
        assert await client.purge(DeadLetterFilter(key=("k0",))) == 10
        assert await client.purge(DeadLetterFilter(key=("k0",))) == 0
        (first, *_) = await client.dead_letters()
        application.broken = False
        assert await client.redrive(DeadLetterFilter(ids=(first.id,))) == 1
        assert len(await client.dead_letters()) == 19
        assert await client.purge() == 19
        assert await client.dead_letters() == []


async def test_a_redrive_can_be_slow_on_purpose(application: Application):
    async with application.running() as client:
        await publish(client, 20)
        application.broken = False
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await client.redrive(rate=100) == 20
        assert loop.time() - began >= 0.19


async def test_what_was_redriven_when_the_worker_died_waits_in_its_successors_store(application: Application):
    rows = MemoryRows()
    async with application.running(rows=rows) as client:
        await publish(client, 500)
        assert len(rows.dead) == 500
        application.broken = False
        await client.redrive()
        # Here the worker is gone: whatever it had not finished is in the store.
        left = len(rows.waiting)
        await client.abort()
    handled = {n for _, n, _ in application.shaky}
    assert len(handled) >= 500 - left
    async with application.running(rows=rows):
        while rows.waiting:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
    assert {n for _, n, _ in application.shaky} == set(range(500))
    assert (len(rows.dead), rows.redriven) == (0, 500)


async def test_handlers_that_are_no_more_leave_their_events_to_those_that_are(application: Application):
    rows = MemoryRows()
    async with application.running(rows=rows) as client:
        await publish(client, 3)
    successor = Bus("letters")
    taken: list[int] = []

    @successor.on(Step)
    async def renamed(event: Step) -> None:
        taken.append(event.n)

    async with run_local(successor, stores=[MemoryStore(rows)]) as client:
        assert await client.redrive() == 3
        while rows.waiting or len(taken) < 3:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
    assert sorted(taken) == [0, 1, 2]


@pytest.mark.parametrize("text", ["", "x", "00-0-0", "zz" * 16 + "-0-0", "00" * 16 + "-0", "00" * 16 + "-0--1"])
def test_an_id_that_is_none_is_refused(text: str):
    with pytest.raises(UsageError, match="is no id"):
        DeadLetterFilter(ids=(text,))


def test_a_time_without_a_zone_is_refused():
    with pytest.raises(UsageError, match="zone"):
        DeadLetterFilter(since=datetime(2026, 1, 1))  # noqa: DTZ001 - that is what is refused


# -- when there is no room, or two do it at once


async def test_headers_come_back_with_a_redriven_event(application: Application):
    seen: list[str] = []
    successor = Bus("letters")

    @successor.on(Step)
    async def read(event: Step, context: Context) -> None:
        seen.append(context.headers["n"])

    rows = MemoryRows()
    async with application.running(rows=rows) as client:
        await publish(client, 3)
    async with run_local(successor, stores=[MemoryStore(rows)]) as client:
        await client.redrive()
        while len(seen) < 3:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
    assert sorted(seen) == ["0", "1", "2"]


async def test_a_store_that_is_full_can_be_listed_purged_and_redriven(application: Application):
    limits = Limits(store_rows_max=5)
    async with run_local(application.bus, stores=[MemoryStore()], limits=limits) as client:
        for n in range(12):
            await client.publish(Step(key=f"k{n}", n=n))
        with pytest.raises(NotDelivered):  # publishers wait: nothing is dropped
            await client.flush(0.3)
        while len(await client.dead_letters()) < 5:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
        assert len(await client.dead_letters()) == 5
        assert await client.purge() >= 5
        application.broken = False
        await client.flush(10)
        await client.redrive()
        while await client.dead_letters():  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        assert client.ledger().in_flight == 0


async def test_a_lane_that_does_not_fit_into_the_store_waits_in_memory_and_goes_on():
    bus = Bus("full")
    handled: list[int] = []
    all_are_there = asyncio.Event()
    down = True

    @bus.on(Step, retry=Retry(attempts=50, base_s=0.01, cap_s=0.02), breaker=Breaker(failures=1, open_s=1.2, successes=1))
    async def handle(event: Step) -> None:
        await all_are_there.wait()
        if down:
            raise ConnectionError("down")
        handled.append(event.n)

    async with run_local(bus, stores=[MemoryStore()], limits=Limits(store_rows_max=3)) as client:
        await client.publish_many([Step(key="a", n=n) for n in range(6)])
        while (await client.status())["workers"][0]["backlog"] < 6:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        all_are_there.set()
        await asyncio.sleep(0.1)
        down = False
        assert (await client.flush(20)).handled == 6
    assert handled == list(range(6))


async def test_two_redrives_and_a_purge_at_once_leave_nothing_and_lose_nothing(application: Application):
    rows = MemoryRows()
    async with application.running(rows=rows) as client:
        await publish(client, 900, keys=9)
        application.broken = False
        ones = DeadLetterFilter(key=("k1",))
        counts = await asyncio.gather(client.redrive(ones), client.redrive(), client.purge(ones))
        while rows.waiting:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        assert await client.dead_letters() == []
    assert sum(counts) == 900
    assert len(application.shaky) == rows.redriven == 900 - rows.purged


async def test_what_the_store_refuses_is_told_and_holds_up_nobody(application: Application):
    async with run_local(application.bus) as client:
        await publish(client, 3)
        with pytest.raises(BusRejected, match="too long"):
            await client.dead_letters(DeadLetterFilter(handler="x" * 60_000))
        assert len(await client.dead_letters(DeadLetterFilter(handler="%" * 1000))) == 0
        everything = tuple(letter.id for letter in await client.dead_letters()) * 2000
        assert len(await client.dead_letters(DeadLetterFilter(ids=everything[:3000]), limit=10)) == 10
        assert await client.purge() == 3


async def test_a_huge_traceback_is_cut_and_can_be_listed():
    bus = Bus("huge")

    @bus.on(Step, retry=Retry(attempts=1))
    async def handle(event: Step) -> None:
        try:
            raise KeyError("cause")
        except KeyError as cause:
            raise ValueError("x" * 3_000_000) from cause

    async with run_local(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
        (letter,) = await client.dead_letters()
    assert len(letter.traceback) < 40_000
    assert "KeyError" in letter.traceback


@pytest.mark.parametrize("stamped", [False, True])
async def test_a_dead_letter_is_the_same_however_its_handler_is_called(stamped: bool, monkeypatch: pytest.MonkeyPatch):
    """What is called once and dies never leaves its batch; with a context, or stamps, an event has a life of its own."""
    from_batches: list[str] = []
    bury_row = LaneRows.bury_row

    def buried(host: LaneRows, inbound: Inbound, failure: Failure) -> None:
        from_batches.append(failure.error)
        bury_row(host, inbound, failure)

    monkeypatch.setattr(LaneRows, "bury_row", buried)

    def refuse(event: Step | Other) -> None:
        if event.key in ("b", 3) or getattr(event, "n", 0) % 3:
            raise ValueError(f"{event} is refused")
        handled.append(event)

    async def plain(event: Step | Other) -> None:
        refuse(event)

    async def knowing(event: Step | Other, _: Context) -> None:
        refuse(event)

    ends: list[object] = []
    for handle in (plain, knowing):
        bus = Bus("once")
        bus.on(Step, retry=Retry(attempts=1))(handle)
        bus.on(Other, retry=Retry(attempts=1))(handle)
        handled: list[Event] = []
        async with run_local(bus) as client:
            for n in range(30):
                event = Other(key=n % 5) if n % 7 == 0 else Step(key="abc"[n % 3], n=n)
                headers = {"n": str(n)} if n % 2 else None
                await client.publish(event, headers=headers, ordinal=n + 1 if stamped else 0)
            ledger = await client.flush(10)
            letters = await client.dead_letters()
            evidence = await client.evidence([client.publisher])
            status = await client.status()
            assert await client.redrive() == len(letters)
            while len(again := await client.dead_letters()) < len(letters):  # noqa: ASYNC110 - ends by its time-out
                await asyncio.sleep(0.01)
        assert (ledger.handled, ledger.dead) == (len(handled), len(letters))
        assert len(from_batches) == (len(letters) if handle is plain and not stamped else 0)
        from_batches.clear()
        assert all("in refuse" in letter.traceback and f"in {handle.__name__}" in letter.traceback for letter in letters)
        found = [
            (one.id[32:], one.type, one.key, one.event, one.headers, one.reason, one.error_type, one.error, one.attempts)
            for one in letters
        ]
        assert all([name.rpartition(".")[2] for name in one.handlers] == [handle.__name__] for one in letters)
        assert status["workers"][0]["handled"] == 30
        redied = [(one.type, one.headers, one.error, one.attempts) for one in again]
        seen = [(one.distinct, one.dead, one.repeats, one.out_of_order) for one in evidence]
        ends.append((handled, found, redied, seen))
    assert ends[0] == ends[1]
    assert bool(ends[0][3]) == stamped


async def test_a_redriven_event_stays_behind_its_lane_when_that_goes_to_the_store(application: Application):
    bus = Bus("order")
    ran: list[int] = []
    blocked = asyncio.Event()
    broken = True

    @bus.on(Step, retry=Retry(attempts=2, base_s=3.0, cap_s=3.0))
    async def handle(event: Step, context: Context) -> None:
        if event.n == 0 and broken:
            raise ValueError("dead")
        if event.n == 1 and not blocked.is_set():
            blocked.set()
            await asyncio.sleep(0.2)
            raise ValueError("later")
        ran.append(event.n)

    rows = MemoryRows()
    async with run_local(bus, stores=[MemoryStore(rows)]) as client:
        await client.publish(Step(key="a", n=0))
        while not rows.dead:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
        broken = False
        await client.publish_many([Step(key="a", n=n) for n in (1, 2, 3)])
        await blocked.wait()
        assert await client.redrive() == 1
        while len(ran) < 4:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
    assert ran == [1, 2, 3, 0]
