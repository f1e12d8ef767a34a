"""Service and queue times, whatever path an event takes: exactly what its handlers saw, by a clock that they move."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import pytest

from shardbus import Bus, Client, Context, Event, Retry
from shardbus.local import run_local
from shardbus.metrics import Evidence, bucket_index
from shardbus.testing import MemoryStore

DUE_NS = 1_000_000_000
NOW_NS = DUE_NS + 500_000


class Clock:
    """What a shard takes for the time; only what is asked to moves it."""

    def __init__(self) -> None:
        self.ns = NOW_NS
        self.spans: dict[int, tuple[int, int]] = {}  # by event: when its handlers began and ended

    def __call__(self) -> int:
        return self.ns

    @contextlib.contextmanager
    def watch(self, n: int) -> Iterator[None]:
        """See when the handlers of event `n` begin and end, the last time that they do."""
        began_ns = self.ns
        yield
        self.spans[n] = (began_ns, self.ns)

    def pass_us(self, us: int) -> None:
        self.ns += 1000 * us


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr("shardbus.local.monotonic_ns", moved)
    return moved


class Work(Event, key="key"):
    key: str
    n: int
    us: int = 1


class Slow(Work, key="key"):
    """Its handler suspends."""


class Thorough(Work, key="key"):
    """It has two handlers, one of which takes a context."""


class Stubborn(Work, key="key"):
    """Its handler fails the first time."""


class Doomed(Work, key="key"):
    """Its handler fails every time."""


def application(clock: Clock) -> Bus:
    bus = Bus("times")
    tried: set[int] = set()

    @bus.on(Work)
    async def work(event: Work) -> None:
        with clock.watch(event.n):
            clock.pass_us(event.us)

    @bus.on(Slow)
    async def slow(event: Slow) -> None:
        with clock.watch(event.n):
            clock.pass_us(event.us)
            await asyncio.sleep(0.002)
            clock.pass_us(event.us)

    began_ns: dict[int, int] = {}

    @bus.on(Thorough)
    async def first(event: Thorough) -> None:
        began_ns[event.n] = clock.ns
        clock.pass_us(event.us)

    @bus.on(Thorough)
    async def second(event: Thorough, context: Context) -> None:
        assert context.key == event.key
        clock.pass_us(2 * event.us)
        clock.spans[event.n] = (began_ns[event.n], clock.ns)

    @bus.on(Stubborn, retry=Retry(base_s=0.001))
    async def stubborn(event: Stubborn) -> None:
        with clock.watch(event.n):
            clock.pass_us(event.us)
            if event.n not in tried:
                tried.add(event.n)
                raise ValueError(event.n)

    @bus.on(Doomed, retry=Retry(attempts=1))
    async def doomed(event: Doomed) -> None:
        clock.pass_us(event.us)
        raise ValueError(event.n)

    return bus


@contextlib.asynccontextmanager
async def running(clock: Clock) -> AsyncIterator[Client]:
    """The application; time also passes while nothing runs, or no retry would ever be due."""

    async def go_on() -> None:
        while True:
            await asyncio.sleep(0.001)
            clock.pass_us(1000)

    going = asyncio.create_task(go_on())
    try:
        async with run_local(application(clock), stores=[MemoryStore()]) as client:
            yield client
    finally:
        going.cancel()


async def evidence_of(client: Client, events: list[Work]) -> Evidence:
    await client.publish_many(events, intended_ns=[DUE_NS + event.n for event in events])
    await client.flush(20.0)
    (found,) = await client.evidence([client.publisher])
    return found


def buckets(times_ns: Iterator[int]) -> dict[int, int]:
    return Counter(bucket_index(ns // 1000) for ns in times_ns)


def check(found: Evidence, clock: Clock) -> None:
    """Held against what the handlers saw, to the digits of a bucket."""
    spans = clock.spans.items()
    assert found.samples == len(spans)
    assert dict(found.service) == buckets(end - began for _, (began, end) in spans)
    assert dict(found.latency) == buckets(end - DUE_NS - n for n, (_, end) in spans)
    # In whole microseconds it is the response time without the service time.
    whole = ((end - DUE_NS - n) // 1000 - (end - began) // 1000 for n, (began, end) in spans)
    assert dict(found.queue) == Counter(map(bucket_index, whole))


async def test_events_that_run_one_after_another_share_out_the_time_between_them(clock: Clock):
    async with running(clock) as client:
        found = await evidence_of(client, [Work(key=f"k{n % 7}", n=n, us=n % 13) for n in range(1000)])
        check(found, clock)
    assert sum(us * count for us, count in found.service) == sum(n % 13 for n in range(1000))


@pytest.mark.parametrize("other", [Slow, Thorough, Stubborn, Doomed])
async def test_an_event_that_leaves_its_batch_takes_its_own_time_along(clock: Clock, other: type[Work]):
    events = [(other if n % 5 == 3 else Work)(key=f"k{n % 11}", n=n, us=1 + n % 9) for n in range(300)]
    async with running(clock) as client:
        check(await evidence_of(client, events), clock)
    assert len(clock.spans) == (240 if other is Doomed else 300)


async def test_events_behind_one_of_their_key_that_takes_long_wait_and_are_not_slow_themselves(clock: Clock):
    kinds = (Slow, Work, Work, Thorough, Work)
    async with running(clock) as client:
        found = await evidence_of(client, [kinds[n % 5](key="one", n=n, us=3) for n in range(50)])
        check(found, clock)
    assert sum(count for us, count in found.service if us <= 9) == 40


async def test_events_without_an_intended_instant_have_no_times(clock: Clock):
    async with running(clock) as client:
        events: list[Work] = [(Slow if n == 3 else Work)(key=f"k{n}", n=n) for n in range(10)]
        await client.publish_many(events, ordinals=[1] * len(events))
        await client.flush(20.0)
        (found,) = await client.evidence([client.publisher])
    assert (found.distinct, found.samples, found.latency, found.service, found.queue) == (10, 0, [], [], [])
