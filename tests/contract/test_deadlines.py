"""Deadlines: what becomes of an event that comes too late, and what a handler sees of the time that is left."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import shardbus
from shardbus import Bus, Command, Context, DeadLetterFilter, Event, Retry, UsageError

FAR_OFF = Retry(attempts=100, base_s=1e9, cap_s=1e9)  # the delay is anything up to that


class Step(Event, key="key"):
    key: str
    n: int = 0


class Ask(Command[float | None], key="key"):
    key: str


async def test_an_event_whose_deadline_is_over_before_its_handler_begins_is_not_run():
    bus, handled, go_on = Bus("late"), list[int](), asyncio.Event()

    @bus.on(Step)
    async def step(event: Step) -> None:
        handled.append(event.n)
        await go_on.wait()

    async with bus.local() as client:
        await client.publish(Step(key="a", n=1))
        await client.publish(Step(key="a", n=2), deadline=0.01)
        await client.publish(Step(key="a", n=3), deadline=60)
        await asyncio.sleep(0.05)
        go_on.set()
        ledger = await client.flush(10)
        assert (handled, ledger.handled, ledger.dead) == ([1, 3], 2, 1)
        [letter] = await client.dead_letters(DeadLetterFilter(reason="expired"))
        assert "deadline" in letter.error
        # Whoever redrives it wants it handled, however late that is.
        assert await client.redrive() == 1
        while handled != [1, 3, 2]:  # noqa: ASYNC110 - what it looks at tells nobody
            await asyncio.sleep(0.001)


async def test_many_events_have_one_deadline_and_the_same_headers():
    bus, handled, go_on = Bus("late"), list[tuple[int, dict[str, str], bool]](), asyncio.Event()

    @bus.on(Step)
    async def step(event: Step, context: Context) -> None:
        handled.append((event.n, context.headers, context.remaining_s is not None))
        await go_on.wait()

    async with bus.local() as client:
        await client.publish_many([Step(key="a", n=n) for n in range(2)], headers={"tenant": "acme"})
        await client.publish_many([Step(key="a", n=n) for n in range(10, 610)], headers={"tenant": "b"}, deadline=0.01)
        await client.publish_many([Step(key="a", n=2)], deadline=60)
        with pytest.raises(UsageError, match="deadline=0"):
            await client.publish_many([Step(key="a")], deadline=0)
        with pytest.raises(UsageError, match="names and values are text"):
            await client.publish_many([Step(key="a")], headers={"a": 1})  # type: ignore[dict-item]
        with pytest.raises(UsageError, match="2 events and 1 stamps"):
            await client.publish_many([Step(key="a")] * 2, headers={"a": "b"}, ordinals=[1])
        await asyncio.sleep(0.05)
        go_on.set()
        ledger = await client.flush(10)
        assert (ledger.handled, ledger.dead) == (3, 600)
    assert handled == [(0, {"tenant": "acme"}, False), (1, {"tenant": "acme"}, False), (2, {}, True)]


async def test_a_deadline_holds_through_retries_and_the_handlers_that_are_left_are_named():
    bus, calls = Bus("late"), list[str]()

    @bus.on(Step)
    async def good(event: Step) -> None:
        calls.append("good")

    @bus.on(Step, retry=FAR_OFF)
    async def bad(event: Step) -> None:
        calls.append("bad")
        raise ValueError

    async with bus.local() as client:
        await client.publish(Step(key="a"), deadline=1.0)
        await client.flush(10)  # the store's, because the retry is long off
        while not (letters := await client.dead_letters()):  # noqa: ASYNC110 - it does not wait for the retry
            await asyncio.sleep(0.01)
        [letter] = letters
    assert (letter.reason, calls) == ("expired", ["good", "bad"])
    assert [name.rpartition(".")[2] for name in letter.handlers] == ["bad"]


async def test_a_deadline_holds_across_a_restart_where_the_event_waits_in_the_store(tmp_path: Path):
    bus, calls = Bus("late"), list[int]()

    @bus.on(Step, retry=FAR_OFF)
    async def bad(event: Step) -> None:
        calls.append(event.n)
        raise ValueError

    url = f"sqlite+aiosqlite:///{tmp_path}/dead.db"
    async with bus.local(dead_letters=url) as client:
        await client.publish(Step(key="a"), deadline=1.0)
        assert (await client.flush(10)).waiting == 1
    await asyncio.sleep(1.0)
    async with bus.local(dead_letters=url) as client:
        while not (letters := await client.dead_letters()):  # noqa: ASYNC110 - what it looks at tells nobody
            await asyncio.sleep(0.01)
    assert ([letter.reason for letter in letters], calls) == (["expired"], [0])


async def test_handlers_see_how_much_time_is_left():
    bus, seen = Bus("late"), list[float | None]()

    @bus.on(Step)
    async def step(event: Step, context: Context) -> None:
        seen.append(context.with_headers({"more": "text"}).remaining_s)

    @bus.command(Ask)
    async def ask(command: Ask, context: Context) -> float | None:
        return context.remaining_s

    async with bus.local() as client:
        await client.publish(Step(key="a"))
        await client.publish(Step(key="a"), deadline=50.0, headers={"some": "text"})
        await client.flush(10)
        left = await client.execute(Ask(key="a"), timeout=30.0)
    assert seen[0] is None
    assert seen[1] is not None
    assert 40 < seen[1] <= 50
    assert left is not None
    assert 20 < left <= 30


async def test_a_client_with_middleware_and_a_blocking_client_have_deadlines_too():
    bus, seen = Bus("late"), list[float | None]()

    @bus.on(Step)
    async def step(event: Step, context: Context) -> None:
        seen.append(context.remaining_s)

    async with bus.local(middleware=[lambda message, headers: None]) as client:
        await client.publish(Step(key="a"), deadline=50.0)
        await client.flush(10)

    def block() -> None:
        with shardbus.blocking.local(bus) as client:
            client.publish(Step(key="a"), deadline=50.0)
            client.flush(10)

    await asyncio.to_thread(block)
    assert len(seen) == 2
    assert all(left is not None and 40 < left <= 50 for left in seen)


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan"), float("inf"), 1e12, "soon"])
async def test_a_deadline_that_is_none_is_refused(deadline: float):
    bus = Bus("late")
    async with bus.local() as client:
        with pytest.raises(UsageError, match="deadline="):
            await client.publish(Step(key="a"), deadline=deadline)
        assert client.ledger().published == 0
