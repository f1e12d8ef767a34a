"""A worker that takes over a store in which very many keys wait: what that costs, and what does not wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec
import pytest
from msgspec.structs import replace

from shardbus import Bus, Context, DeadLetterFilter, Event, Retry, testing
from shardbus.local import run_local
from shardbus.messages import WireKey
from shardbus.routing import slot_of
from shardbus.shard import Shard
from shardbus.store import (
    ANY_SIZE,
    DeadLetter,
    Envelope,
    LaneHead,
    ParkedKey,
    Store,
    StoreError,
    WaitingEvent,
    WaitingLane,
)
from shardbus.testing import MemoryStore

KEYS = 2500
MakeStore = Callable[[], Store]


class Step(Event, key="key"):
    key: str
    n: int = 0


class Loose(Event, key="key"):
    key: str | None = None
    n: int = 0


class Application:
    """Notes what ran, and how the reads of its store and the turns of the event loop go."""

    def __init__(self) -> None:
        self.ran: list[tuple[str | None, int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun = 0
        self.bus = Bus("adoption")
        self.bus.on(Step, retry=Retry(attempts=1))(self.take)
        self.bus.on(Loose, retry=Retry(attempts=1))(self.take)

    async def take(self, event: Step | Loose) -> None:
        self.begun += 1
        await self.gate.wait()
        self.ran.append((event.key, event.n))


@pytest.fixture
def application() -> Application:
    return Application()


def waiting(position: int, key: WireKey, n: int, name: str = "Step") -> WaitingEvent:
    body = msgspec.msgpack.encode({"key": key, "n": n})
    envelope = Envelope(
        publisher=b"p" * 16,
        seq=position,
        slot=slot_of(key),
        type=name,
        key=key,
        body=body,
        headers=None,
        ordinal=0,
        intended_ns=0,
        attempt=1,
    )
    return WaitingEvent(position=position, envelope=envelope)


def parking(position: int, key: str) -> DeadLetter:
    return DeadLetter(
        envelope=waiting(position, key, 0).envelope,
        handlers=(),  # all of them run again
        reason="failed",
        error_type="ValueError",
        error="no",
        place="",
        traceback="",
        first_ns=1,
        last_ns=1,
        epoch=b"e" * 24,
        position=position,
    )


async def filled(store: Store, rows: Sequence[WaitingEvent], parks: Sequence[DeadLetter] = ()) -> None:
    await store.open()
    for at in range(0, len(rows), 1024):
        await store.write(waiting=rows[at : at + 1024])
    await store.write(dead=parks)
    await store.close()


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - the test ends by its time-out
        await asyncio.sleep(0.001)


async def test_what_is_new_and_what_is_asked_do_not_wait_for_very_many_keys_and_each_of_those_runs_in_order(
    application: Application, make_store: MakeStore
):
    await filled(make_store(), [waiting(1 + lap * KEYS + at, f"k{at}", lap) for lap in range(2) for at in range(KEYS)])
    async with run_local(application.bus, stores=[make_store()]) as client:
        application.gate.clear()
        await client.publish(Step(key="fresh", n=7))
        await client.dead_letters()
        assert application.begun < KEYS
        application.gate.set()
        await until(lambda: len(application.ran) == 2 * KEYS + 1)
    assert application.ran.count(("fresh", 7)) == 1
    for at in (0, 1, KEYS - 1):
        assert [n for key, n in application.ran if key == f"k{at}"] == [0, 1]


async def test_keys_that_wait_are_read_many_at_a_time_and_no_more_of_them_than_run_soon(application: Application):
    class Watched(MemoryStore):
        reads: list[int] = []  # noqa: RUF012 - one store

        async def load_waiting(self, lanes: Sequence[LaneHead], bytes_max: int = ANY_SIZE) -> list[list[WaitingEvent]]:
            found = await super().load_waiting(lanes, bytes_max)
            self.reads.append(sum(map(len, found)))
            return found

    store = Watched()
    await filled(store, [waiting(1 + at, f"k{at}", 0) for at in range(KEYS)])
    async with run_local(application.bus, stores=[store]) as client:
        ahead = 0
        while len(application.ran) < KEYS:
            await asyncio.sleep(0)
            ahead = max(ahead, sum(store.reads) - application.begun)
        await client.flush()
    assert sum(store.reads) == KEYS
    assert len(store.reads) <= KEYS // 64
    assert 0 < ahead <= 1024


async def test_a_store_of_very_many_keys_is_adopted_page_by_page_and_goes_on_where_it_failed(
    application: Application, monkeypatch: pytest.MonkeyPatch
):
    pages: list[int] = []
    failures = {1, 2, 5, 7}

    class Paged(MemoryStore):
        def turned(self, page: Sequence[object]) -> None:
            pages.append(len(page))
            if len(pages) in failures:
                raise StoreError("locked")

        async def waiting_lanes(self, after: WaitingLane | None, limit: int) -> list[WaitingLane]:
            found = await super().waiting_lanes(after, limit)
            self.turned(found)
            return found

        async def parked_keys(self, after: int, limit: int) -> list[ParkedKey]:
            found = await super().parked_keys(after, limit)
            self.turned(found)
            return found

    start = Shard.start

    async def stubborn(shard: Shard) -> None:  # as a worker that takes over does
        while True:
            with suppress(StoreError):
                return await start(shard)

    monkeypatch.setattr(Shard, "start", stubborn)
    store = Paged()
    rows = [waiting(1 + at, f"k{at}", 0) for at in range(KEYS)]
    rows += [waiting(20_000 + at, f"parked {at}", 1) for at in range(750)]
    rows += [waiting(30_000 + at, None, at, "Loose") for at in range(100)]
    await filled(store, rows, [parking(10_000 + at, f"parked {at}") for at in range(1500)])
    async with run_local(application.bus, stores=[store]) as client:
        await until(lambda: len(application.ran) == KEYS + 100)
        status = await client.status()
        assert (status["parked"], status["waiting"]) == (1500, 750)
        assert len(set(application.ran)) == KEYS + 100
        await client.purge(DeadLetterFilter(key=("parked 0",)))
        await until(lambda: ("parked 0", 1) in application.ran)
    assert (max(pages), not failures - set(range(len(pages)))) == (1024, True)


async def test_a_parked_key_stays_parked_whatever_waits_behind_it(application: Application, make_store: MakeStore):
    rows = [waiting(2, "parked", 1), waiting(3, "free", 1), waiting(4, None, 1, "Loose"), waiting(5, None, 2, "Loose")]
    await filled(make_store(), rows, [parking(1, "parked"), parking(6, "parked alone")])
    async with run_local(application.bus, stores=[make_store()]) as client:
        await until(lambda: len(application.ran) == 3)
        assert sorted(application.ran, key=str) == [("free", 1), (None, 1), (None, 2)]
        assert (await client.status())["parked"] == 2
        await client.redrive(DeadLetterFilter(key=("parked",)))
        await until(lambda: len(application.ran) == 5)
        assert application.ran[3:] == [("parked", 0), ("parked", 1)]


async def test_whether_all_that_waits_is_in_the_store_is_known_without_a_look_at_each_key(
    application: Application, monkeypatch: pytest.MonkeyPatch
):
    def looked(lane: object) -> bool:
        raise AssertionError("it looks at each")

    store = MemoryStore()
    later = [replace(waiting(1 + at, f"k{at}", 0), due_ns=2**62) for at in range(3)]
    await filled(store, [*later, waiting(20, "parked", 1)], [parking(10, "parked")])
    async with run_local(application.bus, stores=[store]) as client:
        lanes = client._connector._bus.shards[0].lanes  # type: ignore[attr-defined]
        await client.flush()
        with monkeypatch.context() as patch:
            patch.setattr("shardbus.lane_book.Lane.is_asleep", property(looked))
            assert lanes.idle()
        assert lanes.busy_keys == 4
        application.gate.clear()
        await client.publish(Step(key="free"))
        await until(lambda: application.begun)
        assert not lanes.idle()
        application.gate.set()
        await client.flush()
        await until(lanes.idle)
        assert lanes.running() == []


# -- what a crash adds to attempts


async def test_attempts_go_on_over_many_crashes_of_what_waits_in_the_store():
    bus, attempts = Bus("adoption"), []

    @bus.on(Step, retry=Retry(attempts=3, base_s=5.0))
    async def fail_once(event: Step, context: Context) -> None:
        attempts.append(context.attempt)
        if len(attempts) in (1, 5):
            raise ConnectionError

    async with testing.run(bus) as kit:
        await kit.client.publish(Step(key="a"))
        for call in (2, 3, 4):
            kit.kill_at(call)
        await kit.advance(60)
        assert attempts == [1, 2, 3, 4, 5, 6]


async def test_attempts_go_on_over_crashes_and_a_redrive_of_what_parks_its_key():
    bus, attempts = Bus("adoption"), []

    @bus.on(Step, retry=Retry(attempts=1), on_dead_letter="park")
    async def fail_once(event: Step, context: Context) -> None:
        attempts.append(context.attempt)
        if len(attempts) == 1:
            raise ValueError

    async with testing.run(bus) as kit:
        await kit.client.publish(Step(key="a"))
        await kit.settle()
        for _ in range(3):
            await kit.kill()  # it is dead meanwhile, so these are no deliveries
        kit.kill_at(2)
        kit.kill_at(3)
        redriving = asyncio.create_task(kit.client.redrive())
        await kit.advance(60)
        await redriving
        assert attempts == [1, 2, 3, 4]


async def test_what_comes_after_a_crash_has_no_part_in_it_though_rows_of_higher_places_have_gone():
    bus, attempts = Bus("adoption"), []

    @bus.on(Step, retry=Retry(attempts=1), on_dead_letter="park")
    async def park_first(event: Step, context: Context) -> None:
        if not event.n:
            raise ValueError
        attempts.append((event.n, context.attempt))

    async with testing.run(bus) as kit:
        await kit.client.publish_many([Step(key="a"), *(Step(key="b", n=n) for n in (0, 1, 2))])
        await kit.settle()
        await kit.kill()
        await kit.client.purge(DeadLetterFilter(key=("b",)))
        await kit.settle()
        await kit.kill()
        await kit.client.publish(Step(key="a", n=3))
        await kit.client.schedule(Step(key="a", n=4), delay=10)
        await kit.advance(20)
        await kit.client.purge()
        await kit.settle()
    assert attempts == [(1, 2), (2, 2), (3, 1), (4, 1)]


async def test_what_waits_while_its_worker_stops_in_order_was_not_delivered(make_store: MakeStore):
    bus, attempts = Bus("adoption"), []

    @bus.on(Step, retry=Retry(attempts=1), on_dead_letter="park")
    async def park_first(event: Step, context: Context) -> None:
        if not event.n:
            raise ValueError
        attempts.append(context.attempt)

    async with run_local(bus, stores=[make_store()]) as client:
        await client.publish_many([Step(key="a", n=n) for n in range(3)])
        assert (await client.flush()).waiting == 2
    for _ in range(2):
        async with run_local(bus, stores=[make_store()]):
            pass
    async with run_local(bus, stores=[make_store()]) as client:
        await client.purge()
        await until(lambda: len(attempts) == 2)
    assert attempts == [1, 1]


# -- what people have removed before its publisher has heard of it


class Apart:
    """A bus whose client does not hear of the next worker until it is to: its process stands still."""

    def __init__(self, kit: testing.Kit, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kit = kit
        self._patch = monkeypatch.context()

    async def kill_when(self, condition: Callable[[], object]) -> None:
        """Kill the worker once the store has something, before the client has the ack of that."""
        while not condition():  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0)
        assert self.kit.client.ledger().in_flight == 1
        self._patch.__enter__().setattr(self.kit.client, "_adopt", lambda table: None)
        await self.kit.kill()

    async def let_hear(self) -> None:
        self._patch.__exit__(None, None, None)
        await self.kit.advance(5)


async def test_what_was_purged_before_its_publisher_heard_of_it_does_not_come_back(monkeypatch: pytest.MonkeyPatch):
    bus, calls = Bus("adoption"), []

    @bus.on(Step, retry=Retry(attempts=1))
    async def fail(event: Step) -> None:
        calls.append(event.n)
        raise ValueError

    async with testing.run(bus) as kit, kit.connect() as operator:
        apart = Apart(kit, monkeypatch)
        await kit.client.publish(Step(key="a"))
        await apart.kill_when(lambda: kit.rows[0].dead)
        assert await operator.purge() == 1
        await kit.kill()  # also where that was told to a worker that has died since
        await apart.let_hear()
        ledger = kit.client.ledger()
        assert (calls, ledger.dead, ledger.in_flight, await kit.dead_letters()) == ([0], 1, 0, [])


async def test_what_was_cancelled_before_its_publisher_heard_of_it_is_never_handled(monkeypatch: pytest.MonkeyPatch):
    bus, calls = Bus("adoption"), []

    @bus.on(Step)
    async def take(event: Step) -> None:
        calls.append(event.n)

    async with testing.run(bus) as kit, kit.connect() as operator:
        apart = Apart(kit, monkeypatch)
        scheduled = await kit.client.schedule(Step(key="a"), delay=60)
        await apart.kill_when(lambda: kit.rows[0].scheduled)
        assert await operator.cancel(scheduled.id)
        await kit.kill()
        await apart.let_hear()
        await kit.advance(600)
        ledger = kit.client.ledger()
        assert (calls, ledger.waiting, ledger.in_flight) == ([], 1, 0)
