"""The kit that applications are tested with, by tests as an application would have them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from shardbus import Breaker, Bus, Command, Context, Event, NotDelivered, Retry, UsageError, WorkerInfo, testing


class Ordered(Event, key="order"):
    order: str
    n: int = 0


class Reminder(Event, key="order"):
    order: str


class Count(Command[int], key="order"):
    order: str


class Shop:
    """An application whose handlers fail as often as a test wants."""

    def __init__(self) -> None:
        self.bus = Bus("shop")
        self.failures = 0
        self.took_s = 0.0
        self.seen: list[tuple[str, int, int]] = []
        self.workers: list[str] = []
        self.bus.on(Ordered, retry=Retry(attempts=3, base_s=10.0), timeout_s=5.0)(self.take)
        self.bus.on(Reminder)(self.remind)
        self.bus.command(Count)(self.count)
        self.bus.lifespan(self.lifespan)

    async def lifespan(self, worker: WorkerInfo) -> AsyncIterator[None]:
        self.workers.append(f"up {worker.shard}")
        yield
        self.workers.append(f"down {worker.shard}")

    async def take(self, event: Ordered, context: Context) -> None:
        self.seen.append((event.order, event.n, context.attempt))
        if self.took_s:
            await asyncio.sleep(self.took_s)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no warehouse")

    def remind(self, event: Reminder) -> None:
        self.seen.append((event.order, 0, 0))

    async def count(self, command: Count) -> int:
        return len(self.seen)


@pytest.fixture
def shop() -> Shop:
    return Shop()


# -- time


async def test_what_can_be_handled_now_is_handled_when_the_bus_has_settled(shop):
    async with testing.run(shop.bus, shards=2) as kit:
        for n in range(3):
            await kit.client.publish(Ordered(order="a", n=n))
        await kit.settle()
        assert [one.event.n for one in kit.handled] == [0, 1, 2]
        assert kit.client.ledger().handled == 3
        assert await kit.client.execute(Count(order="a")) == 3


async def test_a_retry_comes_when_its_time_has(shop):
    shop.failures = 2
    async with testing.run(shop.bus) as kit:
        await kit.client.publish(Ordered(order="a"))
        await kit.settle()
        assert [(one.attempt, type(one.error)) for one in kit.handled] == [(1, ConnectionError)]
        await kit.advance(60.0)
        assert [one.attempt for one in kit.handled] == [1, 2, 3]
        assert kit.handled[-1].error is None
        assert await kit.dead_letters() == []


async def test_an_event_whose_retries_are_used_up_is_a_dead_letter(shop):
    shop.failures = 3
    async with testing.run(shop.bus) as kit:
        await kit.client.publish(Ordered(order="a"))
        await kit.advance(60.0)
        (letter,) = await kit.dead_letters()
        assert (letter.reason, letter.error, letter.attempts) == ("failed", "no warehouse", 3)
        assert await kit.client.redrive() == 1
        await kit.settle()
        assert kit.handled[-1].error is None


async def test_a_handler_runs_into_its_time_out_without_anybody_waiting_for_it(shop):
    shop.took_s = 3600.0
    began = time.monotonic()
    async with testing.run(shop.bus) as kit:
        await kit.client.publish(Ordered(order="a"))
        await kit.advance(4.9)
        assert kit.handled == []
        await kit.advance(0.2)
        assert [type(one.error) for one in kit.handled] == [asyncio.CancelledError]
        shop.took_s = 0.0
        await kit.advance(60.0)
        assert kit.handled[-1].error is None
    assert time.monotonic() - began < 60


async def test_an_open_circuit_is_tried_again_after_its_window():
    bus = Bus("breaker")
    calls: list[int] = []

    @bus.on(Ordered, retry=Retry(attempts=1), breaker=Breaker(failures=2, open_s=30.0))
    async def take(event: Ordered) -> None:
        calls.append(event.n)
        if event.n < 2:
            raise ConnectionError("down")

    async with testing.run(bus) as kit:
        for n in range(3):
            await kit.client.publish(Ordered(order=str(n), n=n))
        await kit.advance(29.0)
        assert calls == [0, 1]
        await kit.advance(3.0)
        assert calls == [0, 1, 2]


async def test_a_scheduled_event_is_handled_at_its_instant_however_far_that_is(shop):
    async with testing.run(shop.bus) as kit:
        due = kit.now + timedelta(days=365)
        await kit.client.publish(Reminder(order="a"), at=due)
        await kit.settle()
        assert [(one.type, one.due_at) for one in kit.published] == [("Reminder", due)]
        await kit.advance(timedelta(days=365).total_seconds() - 1)
        assert kit.handled == []
        await kit.advance(1.0)
        assert [one.event for one in kit.handled] == [Reminder(order="a")]


async def test_a_thread_is_waited_for():
    bus = Bus("threads")

    @bus.on(Ordered, in_thread=True)
    def take(event: Ordered) -> None:
        time.sleep(0.05)

    @bus.on(Reminder)
    async def remind(event: Reminder) -> None:
        await asyncio.to_thread(time.sleep, 0.05)

    async with testing.run(bus) as kit:
        await kit.client.publish(Ordered(order="a"))
        await kit.client.publish(Reminder(order="b"))
        await kit.settle()
        assert len(kit.handled) == 2


async def test_time_goes_on_by_itself_again_behind_the_block(shop):
    async with testing.run(shop.bus) as kit:
        await kit.advance(1000.0)
    async with asyncio.timeout(60):
        await asyncio.sleep(0.001)


async def test_nothing_spins_whatever_fraction_of_a_nanosecond_time_stands_at(shop):
    async with testing.run(shop.bus) as kit:
        await kit.advance(3.0e8)  # where a float has no nanoseconds any more
        for n in range(200):
            await kit.client.publish(Ordered(order="a", n=n), delay=n / 7)
            await kit.advance(n / 7)
            assert len(kit.handled) == n + 1


async def test_a_publisher_that_was_silent_for_long_publishes_as_before(shop):
    async with testing.run(shop.bus) as kit:
        for n in range(3):
            await kit.client.publish(Ordered(order="a", n=n))
            await kit.advance(3600.0)
        assert [n for _, n, _ in shop.seen] == [0, 1, 2]


async def test_time_does_not_go_back(shop):
    async with testing.run(shop.bus) as kit:
        with pytest.raises(UsageError, match="from 0 on"):
            await kit.advance(-1.0)


# -- deaths and duplicates


async def test_an_event_comes_again_when_its_worker_dies_before_it_says_that_it_is_handled(shop):
    async with testing.run(shop.bus, shards=2) as kit:
        kit.kill_at(2)
        for n in range(3):
            await kit.client.publish(Ordered(order="a", n=n))
        await kit.settle()
        assert [n for _, n, _ in shop.seen] == [0, 1, 0, 1, 2] or [n for _, n, _ in shop.seen] == [0, 1, 1, 2]
        assert shop.seen[-2:] == [("a", 1, 2), ("a", 2, 2)]
        assert kit.client.ledger().handled == 3
        assert len(kit.published) == 3


async def test_a_worker_that_dies_before_a_handler_has_begun_has_not_called_it(shop):
    async with testing.run(shop.bus) as kit:
        kit.kill_at(1, when="before", down_s=30.0)
        await kit.client.publish(Ordered(order="a"))
        await kit.advance(29.0)
        assert shop.seen == []
        await kit.advance(2.0)
        assert shop.seen == [("a", 0, 2)]


async def test_what_a_store_has_outlives_the_worker_and_what_is_in_memory_does_not(shop):
    async with testing.run(shop.bus) as kit:
        await kit.client.publish(Reminder(order="later"), delay=100.0)
        shop.took_s = 3.0
        await kit.client.publish(Ordered(order="a"))
        await kit.settle()
        await kit.kill(0)
        assert [type(one.error) for one in kit.handled] == [asyncio.CancelledError]
        await kit.advance(100.0)
        assert [one.attempt for one in kit.handled if one.error is None] == [2, 1]
        assert shop.workers == ["up 0", "down 0", "up 0"]
    assert shop.workers == ["up 0", "down 0", "up 0", "down 0"]


async def test_a_worker_is_killed_where_that_is_said_and_a_kill_that_is_not_awaited_fails_the_test(shop):
    async def forgets() -> None:
        async with testing.run(shop.bus) as kit:
            kill = kit.kill(0)
            await kit.settle()
            assert shop.workers == ["up 0", "down 0", "up 0"]
            kill.close()  # which says nothing, where the interpreter would warn as well

    with pytest.raises(UsageError, match=r"kit\.kill\(0\) was not awaited.*write `await kit\.kill\(0\)`"):
        await forgets()


async def test_a_handler_that_is_called_twice_for_one_event_is_told_so(shop):
    async with testing.run(shop.bus) as kit:
        kit.duplicate_at(2)
        for n in range(3):
            await kit.client.publish(Ordered(order="a", n=n))
        await kit.settle()
        assert shop.seen == [("a", 0, 1), ("a", 1, 1), ("a", 1, 2), ("a", 2, 1)]


async def test_batches_that_come_twice_or_late_are_handled_once_and_in_order(shop):
    async with testing.run(shop.bus) as kit:
        kit.duplicate_batch(1)
        kit.delay_batch(2, 2.0)
        for n in range(4):
            await kit.client.publish(Ordered(order="a", n=n))
            await asyncio.sleep(0)
        await kit.advance(5.0)
        assert [n for _, n, _ in shop.seen] == [0, 1, 2, 3]


async def test_what_has_happened_already_cannot_be_made_to_fail(shop):
    async with testing.run(shop.bus) as kit:
        await kit.client.publish(Ordered(order="a"))
        await kit.settle()
        with pytest.raises(UsageError, match="call 1 was made already; the next is 2"):
            kit.kill_at(1)
        with pytest.raises(UsageError, match="batch 1 was sent already"):
            kit.duplicate_batch(1)
        with pytest.raises(UsageError, match="no shard 1"):
            await kit.kill(1)


async def test_another_client_is_another_publisher(shop):
    async with testing.run(shop.bus) as kit, kit.connect() as other:
        scheduled = await other.schedule(Reminder(order="a"), delay=10.0)
        await kit.settle()
        assert await kit.client.cancel(scheduled.id) is True
        await kit.advance(20.0)
        assert kit.handled == []


async def test_the_same_seed_brings_the_same_life():
    async def life(seed: int) -> list[tuple[int, float]]:
        shop = Shop()
        shop.failures = 2
        async with testing.run(shop.bus, seed=seed) as kit:
            began = kit.now
            await kit.client.publish(Ordered(order="a"))
            times: list[tuple[int, float]] = []
            for _ in range(300):
                await kit.advance(0.1)
                times.append((len(kit.handled), round((kit.now - began).total_seconds(), 3)))
            return times

    assert await life(1) == await life(1)
    assert await life(1) != await life(2)


async def test_what_is_unfinished_ends_with_the_block(shop):
    shop.took_s = 3.0
    async with testing.run(shop.bus) as kit:
        await kit.client.publish(Ordered(order="a"))
        flushed = asyncio.create_task(kit.client.flush(0.5))
        await kit.advance(1.0)
        with pytest.raises(NotDelivered):
            await flushed


# -- the plugin, and what it costs others


def test_an_application_does_not_import_what_it_is_tested_with():
    program = "import sys, shardbus; print([name for name in sys.modules if 'testing' in name and 'shardbus' in name])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "[]\n"


def test_the_fixtures_serve_whoever_enables_them(tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["shardbus.testing.fixtures"]\n')
    (tmp_path / "test_shop.py").write_text(
        """
import pytest
from shardbus import Bus, Event

class Ordered(Event, key="order"):
    order: str

@pytest.fixture
def bus():
    bus = Bus("shop")
    bus.on(Ordered)(lambda event: None)
    return bus

@pytest.mark.asyncio
async def test_it(kit):
    await kit.client.publish(Ordered(order="a"), delay=3600)
    await kit.advance(3600)
    assert len(kit.handled) == 1

@pytest.mark.asyncio
async def test_more(run_bus, bus):
    async with run_bus(bus, shards=2) as kit:
        await kit.client.publish(Ordered(order="a"))
        await kit.settle()
        assert len(kit.handled) == 1
"""
    )
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--shardbus-seed=3", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "2 passed" in ran.stdout, ran.stdout + ran.stderr


async def test_what_a_handler_publishes_is_handled_in_the_same_settling_and_recorded():
    bus = Bus("chains")

    @bus.on(Ordered)
    async def take(event: Ordered, context: Context) -> None:
        await context.publish(Reminder(order=event.order))

    @bus.on(Reminder)
    async def remind(event: Reminder) -> None:
        pass

    async with testing.run(bus, shards=2) as kit:
        await kit.client.publish(Ordered(order="a"))
        await kit.settle()
        assert [one.type for one in kit.published] == ["Ordered", "Reminder"]
        assert [one.event for one in kit.handled] == [Ordered(order="a"), Reminder(order="a")]
        assert (await kit.client.flush()).handled == 1
        await kit.advance(3600.0)
        assert len(kit.handled) == 2


# -- a test that cannot go on


async def test_a_test_that_waits_for_what_never_comes_is_told_which_handlers_wait_for_which_keys():
    stuck = Bus("stuck")

    @stuck.on(Reminder)
    async def wait(event: Reminder) -> None:
        await asyncio.Event().wait()

    with pytest.raises(UsageError) as raised:  # noqa: PT012 - leaving the block raises
        async with testing.run(stuck, stuck_s=0.05) as kit:
            await kit.client.publish(Reminder(order="a"))
            await kit.client.publish(Reminder(order="b"))
            await kit.client.flush()
    told = str(raised.value)
    assert "the test waits and nothing goes on: time stands still until `await kit.advance(…)`" in told
    for key in "ab":
        assert f"wait of Reminder with the key '{key}' (shard 0, attempt 1)" in told


async def test_a_test_that_waits_where_time_stands_still_is_told_when_something_is_due():
    stuck = Bus("stuck")

    @stuck.on(Reminder, retry=Retry(attempts=2, base_s=1000.0, cap_s=1000.0))
    async def fail(event: Reminder) -> None:
        raise ConnectionError

    with pytest.raises(UsageError, match=r"where the next timer is due in [\d.]+ s, .* Handlers that wait: none"):
        async with testing.run(stuck, stuck_s=0.05):
            await asyncio.sleep(5)


@pytest.mark.parametrize("stuck_s", [0, -1, "10", None, float("nan")])
async def test_a_limit_for_a_test_that_is_none_is_refused(stuck_s: Any):
    with pytest.raises(UsageError, match=r"stuck_s=.*: give seconds above 0, or math\.inf"):
        async with testing.run(Bus("any"), stuck_s=stuck_s):
            pass


async def test_a_test_in_which_a_thread_works_is_not_stuck():
    slow = Bus("slow")

    @slow.on(Reminder, in_thread=True)
    def work(event: Reminder) -> None:
        time.sleep(0.2)

    async with testing.run(slow, stuck_s=0.02) as kit:
        await kit.client.publish(Reminder(order="a"))
        await kit.settle()
        assert len(kit.handled) == 1


async def test_a_batch_handler_is_watched_event_by_event_and_may_be_called_twice():
    batches = Bus("batches")
    attempts: list[list[int]] = []

    @batches.on(Ordered, batch=3, linger_s=5.0, retry=Retry(attempts=1))
    async def take(events: list[Ordered], contexts: list[Context]) -> list[Exception | None]:
        attempts.append([one.attempt for one in contexts])
        return [ValueError("bad") if event.n == 2 else None for event in events]

    async with testing.run(batches) as kit:
        kit.duplicate_at(1)
        await kit.client.publish_many([Ordered(order=f"o{n}", n=n) for n in range(3)])
        await kit.settle()
        assert [(one.event.n, str(one.error)) for one in kit.handled] == [(0, "None"), (1, "None"), (2, "bad")] * 2
        assert [one.error for one in await kit.dead_letters()] == ["bad"]
    assert attempts == [[1, 1, 1], [2, 2, 2]]


async def test_a_batch_handler_that_waits_for_ever_is_named_with_its_first_key():
    batches = Bus("batches")

    @batches.on(Ordered, batch=3, linger_s=5.0)
    async def take(events: list[Ordered]) -> None:
        await asyncio.Event().wait()

    with pytest.raises(UsageError, match=r"take of Ordered with the key 'o0' and 2 more \(shard 0, attempt 1\)"):  # noqa: PT012 - leaving the block raises
        async with testing.run(batches, stuck_s=0.05) as kit:
            await kit.client.publish_many([Ordered(order=f"o{n}", n=n) for n in range(3)])
            await kit.client.flush()
