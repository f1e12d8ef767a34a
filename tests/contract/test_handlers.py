"""What a handler may rely on, whatever runs it: tasks, time-outs, context variables; and what follows when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from odd_errors import ANSWERS, ODD_ERRORS

from shardbus import (
    Breaker,
    Bus,
    Client,
    ClientClosed,
    Command,
    CommandFailed,
    Context,
    Event,
    NotDelivered,
    RegistrationError,
    Retry,
    WorkerInfo,
)
from shardbus.testing import MemoryRows

FAST = Retry(base_s=0.001)


class Step(Event, key="key"):
    key: str
    n: int = 0


class Loose(Event):
    n: int = 0


class Ask(Command[int], key="key"):
    key: str


Run = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture
def bus() -> Bus:
    return Bus("contract")


def dead(rows: MemoryRows) -> list[tuple[int, str, tuple[str, ...]]]:
    return [
        (row.envelope.seq, row.reason, tuple(name.split(".")[-1] for name in row.handlers)) for row in rows.dead.values()
    ]


# -- what a handler runs in


async def test_timeouts_and_task_groups_work_before_and_after_the_first_await(bus: Bus, run: Run):
    seen: list[str] = []

    @bus.on(Step)
    async def handle(event: Step) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.sleep(10)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0.001))
        task = asyncio.current_task()
        assert task is not None
        await asyncio.sleep(0)
        assert asyncio.current_task() is task
        seen.append(event.key)

    async with run(bus) as client:
        for at in range(20):
            await client.publish(Step(key=f"k{at % 7}"))
        ledger = await client.flush(10)
    assert (ledger.handled, len(seen)) == (20, 20)


async def test_what_a_handler_leaves_in_a_context_variable_no_other_handler_sees(bus: Bus, run: Run):
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    @bus.on(Step)
    async def handle(event: Step) -> None:
        seen.append(request.get())
        request.set(event.key)
        if event.n % 3 == 0:
            await asyncio.sleep(0)

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{at}", n=at) for at in range(50)])
        await client.flush(10)
    assert seen == ["none"] * 50


async def test_a_context_variable_whose_values_cannot_be_compared_is_seen_by_no_other_handler_either(bus: Bus, run: Run):
    class Array:
        """As those of numerical libraries: `==` gives no truth."""

        def __eq__(self, other: object) -> bool:
            raise ValueError("the truth of an array is ambiguous")

        __hash__ = None  # type: ignore[assignment]

    default = Array()
    matrix: contextvars.ContextVar[Array] = contextvars.ContextVar("matrix")
    matrix.set(default)
    seen: list[bool] = []

    @bus.on(Step)
    async def handle(event: Step) -> None:
        seen.append(matrix.get() is default)
        matrix.set(Array())
        if event.n % 5 == 0:
            raise ValueError(event.n)

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{at}", n=at) for at in range(20)])
        await client.flush(10)
    assert seen == [True] * len(seen)
    assert len(seen) >= 20


async def test_a_slow_key_holds_up_no_other(bus: Bus, run: Run):
    release = asyncio.Event()
    done: list[str] = []

    @bus.on(Step)
    async def handle(event: Step) -> None:
        if event.key == "slow":
            await release.wait()
        done.append(event.key)

    async with run(bus) as client:
        await client.publish(Step(key="slow"))
        await client.publish_many([Step(key=f"k{at}") for at in range(300)])
        while len(done) < 300:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        assert "slow" not in done
        release.set()
        await client.flush(10)
    assert done[-1] == "slow"


# -- retries


async def test_a_handler_that_fails_is_called_again_and_the_others_are_not(bus: Bus, run: Run, rows: MemoryRows):
    calls: list[tuple[str, int]] = []

    @bus.on(Step)
    async def sound(event: Step, context: Context) -> None:
        calls.append(("sound", context.attempt))

    @bus.on(Step, retry=FAST)
    async def shaky(event: Step, context: Context) -> None:
        calls.append(("shaky", context.attempt))
        if context.attempt < 3:
            raise ConnectionError("not yet")

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        ledger = await client.flush(10)
    assert calls == [("sound", 1), ("shaky", 1), ("shaky", 2), ("shaky", 3)]
    assert (ledger.handled, dead(rows)) == (1, [])


async def test_a_handler_that_keeps_failing_ends_as_a_dead_letter_that_names_it_alone(bus: Bus, run: Run, rows: MemoryRows):
    calls = 0

    @bus.on(Step)
    def sound(event: Step) -> None: ...

    @bus.on(Step, retry=FAST)
    def broken(event: Step) -> None:
        nonlocal calls
        calls += 1
        raise ValueError(f"call {calls}")

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        ledger = await client.flush(10)
    assert (calls, ledger.dead, ledger.handled) == (3, 1, 0)
    (letter,) = rows.dead.values()
    assert dead(rows) == [(0, "failed", ("broken",))]
    assert (letter.error_type, letter.error, letter.envelope.attempt) == ("ValueError", "call 3", 3)
    assert "call += 1" not in letter.traceback
    assert "broken" in letter.traceback


async def fails(event: Step) -> None:
    raise ValueError(event.n)


async def fails_after_a_pause(event: Step) -> None:
    await asyncio.sleep(0)
    raise ValueError(event.n)


async def fails_with_context(event: Step, context: Context) -> None:
    raise ValueError(context.attempt)


def fails_plainly(event: Step) -> None:
    raise ValueError(event.n)


@pytest.mark.parametrize("handler", [fails, fails_after_a_pause, fails_with_context, fails_plainly])
async def test_a_dead_letter_counts_every_call_whatever_form_its_handler_has(
    handler: Callable[..., Any], bus: Bus, run: Run, rows: MemoryRows
):
    bus.on(Step, retry=FAST)(handler)
    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
    assert [row.envelope.attempt for row in rows.dead.values()] == [3]


async def test_an_attempt_counts_on_over_retries_and_a_redrive(bus: Bus, run: Run, rows: MemoryRows):
    seen: list[tuple[int, bool]] = []

    @bus.on(Step, retry=FAST)
    async def handle(event: Step, context: Context) -> None:
        seen.append((context.attempt, context.redelivered))
        if len(seen) < 4:
            raise ValueError(event.n)

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
        assert await client.redrive() == 1
        while len(seen) < 4:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
    assert seen == [(1, False), (2, True), (3, True), (4, True)]


@pytest.mark.parametrize("handler", [fails, fails_after_a_pause, fails_with_context, fails_plainly])
async def test_a_traceback_begins_with_the_handler_and_ends_with_the_type_of_the_error(
    handler: Callable[..., Any], bus: Bus, run: Run, rows: MemoryRows
):
    bus.on(Step, retry=Retry(attempts=1))(handler)
    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
    (letter,) = rows.dead.values()
    first, second, *_, last = letter.traceback.splitlines()
    assert (first, last) == ("Traceback (most recent call last):", "ValueError")
    assert f"in {handler.__name__}" in second


async def test_the_traceback_of_a_time_out_shows_where_its_handler_stood(bus: Bus, run: Run, rows: MemoryRows):
    @bus.on(Step, retry=Retry(attempts=1), timeout_s=0.01)
    async def handle(event: Step) -> None:
        await asyncio.sleep(3600)

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
    (letter,) = rows.dead.values()
    assert "in handle" in letter.traceback
    assert not any(f"{ours}.py" in letter.traceback for ours in ("lanes", "event_handlers", "handler_calls", "timeouts"))


async def test_two_handlers_that_give_up_are_one_dead_letter_of_both(bus: Bus, run: Run, rows: MemoryRows):
    calls: list[str] = []

    @bus.on(Step, retry=Retry(attempts=1))
    def first(event: Step) -> None:
        calls.append("first")
        raise KeyError("first")

    @bus.on(Step, retry=FAST)
    def second(event: Step) -> None:
        calls.append("second")
        raise ValueError("second")

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        assert (await client.flush(10)).dead == 1
    assert calls == ["first", "second", "second", "second"]
    assert dead(rows) == [(0, "failed", ("first", "second"))]
    assert next(iter(rows.dead.values())).error_type == "KeyError"


async def test_while_a_key_is_tried_again_its_later_events_wait_and_other_keys_go_on(bus: Bus, run: Run):
    order: list[tuple[str, int]] = []

    @bus.on(Step, retry=Retry(base_s=0.05))
    async def handle(event: Step, context: Context) -> None:
        if (event.key, event.n) == ("a", 0) and context.attempt < 3:
            raise ValueError("again")
        order.append((event.key, event.n))

    async with run(bus) as client:
        await client.publish_many([Step(key=key, n=n) for n in range(5) for key in ("a", "b")])
        await client.flush(10)
    assert [n for key, n in order if key == "a"] == [n for key, n in order if key == "b"] == list(range(5))


async def test_events_without_a_key_are_tried_again_too(bus: Bus, run: Run):
    handled: list[int] = []

    @bus.on(Loose, retry=FAST)
    async def handle(event: Loose, context: Context) -> None:
        if event.n % 2 and context.attempt < 2:
            raise ValueError("again")
        handled.append(event.n)

    async with run(bus) as client:
        for n in range(20):
            await client.publish(Loose(n=n))
        await client.flush(10)
    assert sorted(handled) == list(range(20))


async def test_an_event_that_waits_long_is_acked_as_waiting_and_survives(bus: Bus, run: Run, rows: MemoryRows):
    calls: list[tuple[int, int]] = []
    patient = Retry(base_s=1e9, cap_s=1e9)
    patience = [patient, FAST]

    def application(retry: Retry) -> Bus:
        bus = Bus("contract")

        @bus.on(Step)
        async def sound(event: Step, context: Context) -> None:
            calls.append((event.n, 0))

        @bus.on(Step, retry=retry)
        async def handle(event: Step, context: Context) -> None:
            calls.append((event.n, context.attempt))
            if event.n == 0:
                raise ValueError("later")

        return bus

    async with run(application(patience[0])) as client:
        await client.publish_many([Step(key="a", n=n) for n in range(3)])
        ledger = await client.flush(10)
    assert (ledger.waiting, ledger.handled) == (3, 0)
    assert calls == [(0, 0), (0, 1)]  # and leaving the block did not wait for it
    head = rows.waiting[min(rows.waiting)]
    assert list(head.todo.values()) == [1]
    # A successor finds it, in its time, with what it has been through: the failure counts, and `sound` is not run again.
    for position, row in rows.waiting.items():
        rows.waiting[position] = _due_now(row)
    calls.clear()
    async with run(application(patience[1])):
        while rows.waiting:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
    assert calls[:3] == [(0, 2), (0, 3), (1, 0)]  # a worker that stopped in order had not begun it again
    assert [n for n, _ in calls] == [0, 0, 1, 1, 2, 2]
    assert len(rows.dead) == 1


def _due_now(row: Any) -> Any:
    fields = {name: getattr(row, name) for name in row.__struct_fields__}
    return type(row)(**{**fields, "due_ns": 0})


# -- time-outs


async def test_a_handler_that_takes_too_long_is_cancelled_and_has_failed(bus: Bus, run: Run, rows: MemoryRows):
    cancelled: list[int] = []

    @bus.on(Step, retry=Retry(attempts=2, base_s=0.0), timeout_s=0.01)
    async def slow(event: Step, context: Context) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(context.attempt)
            raise

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        assert (await client.flush(10)).dead == 1
    assert cancelled == [1, 2]
    (letter,) = rows.dead.values()
    assert (letter.reason, letter.error_type, letter.error) == ("timeout", "TimeoutError", "not finished within 0.01 s")


async def test_a_timeout_of_the_handlers_own_is_its_failure_and_not_ours(bus: Bus, run: Run, rows: MemoryRows):
    @bus.on(Step, retry=Retry(attempts=1), timeout_s=30)
    async def slow(event: Step) -> None:
        async with asyncio.timeout(0.001):
            await asyncio.sleep(60)

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
    assert [row.reason for row in rows.dead.values()] == ["failed"]


async def test_a_command_handler_that_takes_too_long_fails_its_caller(bus: Bus, run: Run):
    @bus.command(Ask, timeout_s=0.01)
    async def slow(command: Ask) -> int:
        await asyncio.sleep(60)
        return 1

    async with run(bus) as client:
        with pytest.raises(CommandFailed, match=r"TimeoutError: not finished within 0\.01 s"):
            await client.execute(Ask(key="a"))


# -- the end, while one of them runs


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("kind", ["event", "batch", "command"])
async def test_a_handler_may_answer_its_cancellation_as_it_likes(
    bus: Bus, run: Run, rows: MemoryRows, kind: str, answer: Callable[[], Awaitable[None]], caplog: pytest.LogCaptureFixture
):
    begun = asyncio.Event()
    later: list[object] = []
    closed: list[str] = []

    @bus.lifespan
    async def pool(worker: WorkerInfo) -> AsyncIterator[None]:
        yield
        closed.append("pool")

    @bus.on(Step)
    async def step(event: Step) -> None:
        begun.set()
        await answer()

    @bus.on(Step)
    async def behind(event: Step) -> None:
        later.append(event)
        await asyncio.sleep(600)

    @bus.on(Loose, batch=2)
    async def loose(events: list[Loose]) -> None:
        begun.set()
        await answer()

    @bus.command(Ask)
    async def ask(command: Ask) -> int:
        begun.set()
        await answer()
        return 1

    with pytest.raises(NotDelivered) if kind != "command" else contextlib.nullcontext():
        async with run(bus, close_timeout_s=0.1) as client:
            if kind == "command":
                asking = asyncio.create_task(client.execute(Ask(key="a"), timeout=600))
            else:
                await client.publish(Step(key="a") if kind == "event" else Loose(n=1))
            await begun.wait()
    if kind == "command":
        with pytest.raises(ClientClosed):
            await asking
    assert closed == ["pool"]
    assert (later, rows.dead) == ([], {})
    told = caplog.text.count("a handler that was cancelled at the end has failed")
    # A command's caller has left, so its handler's end is nothing new.
    assert told == (0 if answer in (ANSWERS["nothing"], ANSWERS["nothing, as documented"]) or kind == "command" else 1)
    assert "defect" not in caplog.text


# -- circuits


async def test_a_handler_that_fails_opens_its_circuit_and_is_left_alone(bus: Bus, run: Run, rows: MemoryRows):
    calls = 0

    @bus.on(Step, retry=Retry(attempts=1), breaker=Breaker(failures=3, open_s=3600, while_open="dead"))
    async def broken(event: Step) -> None:
        nonlocal calls
        calls += 1
        raise ValueError("always")

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{at}") for at in range(40)])
        assert (await client.flush(10)).dead == 40
    assert calls == 3
    assert sorted(reason for _, reason, _ in dead(rows)) == ["circuit-open"] * 37 + ["failed"] * 3


async def test_while_a_circuit_is_open_events_wait_and_afterwards_all_are_handled_in_order(bus: Bus, run: Run):
    broken = True
    handled: list[tuple[str, int]] = []

    @bus.on(Step, retry=Retry(attempts=100, base_s=0.001), breaker=Breaker(failures=3, open_s=0.05, successes=1))
    async def handle(event: Step) -> None:
        if broken:
            raise ConnectionError("down")
        handled.append((event.key, event.n))

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{at % 4}", n=at // 4) for at in range(40)])
        await asyncio.sleep(0.1)
        broken = False
        ledger = await client.flush(10)
    assert ledger.handled == 40
    for key in {key for key, _ in handled}:
        assert [n for one, n in handled if one == key] == list(range(10))


async def test_an_event_that_only_waited_for_a_circuit_was_not_attempted(bus: Bus, run: Run):
    attempts: list[int] = []
    breaker = Breaker(failures=1, open_s=0.02, successes=1)

    @bus.on(Step, retry=Retry(attempts=1), breaker=breaker)
    async def handle(event: Step, context: Context) -> None:
        if event.key == "bad":
            raise ValueError("bad")
        attempts.append(context.attempt)

    async with run(bus) as client:
        await client.publish(Step(key="bad"))
        await client.flush(10)
        await client.publish(Step(key="good"))
        await client.flush(10)
    assert attempts == [1]


# -- what is refused


def test_a_plain_function_can_have_no_timeout(bus: Bus):
    with pytest.raises(RegistrationError, match="async def"):

        @bus.on(Step, timeout_s=1.0)
        def plain(event: Step) -> None: ...


def test_a_timeout_of_nothing_is_refused(bus: Bus):
    with pytest.raises(RegistrationError, match="above 0"):

        @bus.on(Step, timeout_s=0.0)
        async def handle(event: Step) -> None: ...


async def test_handlers_that_share_a_name_are_told_apart(bus: Bus, run: Run, rows: MemoryRows):
    for fails in (False, True, False):

        @bus.on(Step, retry=Retry(attempts=1))
        async def handle(event: Step, fails: bool = fails) -> None:
            if fails:
                raise ValueError("the second")

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
    assert [names[0].split("#")[-1] for _, _, names in dead(rows)] == ["2"]


async def test_a_retry_does_not_wait_for_more_than_its_policy_says(bus: Bus, run: Run):
    @bus.on(Step, retry=Retry(attempts=3, base_s=0.0))
    async def handle(event: Step, context: Context) -> None:
        if context.attempt < 3:
            raise ValueError("again")

    async with run(bus) as client:
        began = time.monotonic()
        await client.publish_many([Step(key=f"k{at}") for at in range(200)])
        await client.flush(30)
        assert time.monotonic() - began < 10


# -- errors of an application's own kinds


@pytest.mark.parametrize("make", ODD_ERRORS.values(), ids=ODD_ERRORS)
async def test_whatever_an_error_does_when_it_is_looked_at_it_costs_its_own_message_and_no_other(
    bus: Bus, run: Run, make: Callable[[], Exception]
):
    @bus.on(Step, retry=Retry(attempts=2, base_s=0.0))
    async def step(event: Step) -> None:
        if event.n == 1:
            await asyncio.sleep(0)
        if event.n < 2:
            raise make()

    @bus.on(Loose, retry=Retry(attempts=2, base_s=0.0), batch=2)
    async def loose(events: list[Loose]) -> list[Exception | None]:
        if len(events) > 1:
            raise make()
        return [make() if event.n == 0 else None for event in events]

    @bus.command(Ask)
    async def ask(command: Ask) -> int:
        raise make()

    async with run(bus) as client:
        await client.publish_many([Step(key="a", n=n) for n in range(3)])
        await client.publish_many([Loose(n=n) for n in range(2)])
        with pytest.raises(CommandFailed) as failed:
            await client.execute(Ask(key="a"), timeout=10)
        ledger = await client.flush(10)
        letters = await client.dead_letters()
    kind = type(make()).__name__
    assert failed.value.error_type == kind
    assert (ledger.handled, ledger.dead) == (2, 3)
    assert [letter.error_type for letter in letters] == [kind] * 3
    assert ["in step" in letter.traceback for letter in letters].count(True) == 2
