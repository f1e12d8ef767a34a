"""What runs around handlers and around publishing, and which handlers run: middleware, filters, priorities, threads."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from shardbus import (
    Breaker,
    Bus,
    CallNext,
    Client,
    Command,
    CommandFailed,
    Context,
    Event,
    Idempotency,
    InvalidMessage,
    Logging,
    RateLimit,
    RegistrationError,
    Retry,
    Timing,
    UsageError,
    Validation,
    WorkerInfo,
    header_matches,
    is_type,
    key_matches,
    where,
)
from shardbus.publishing import client_class
from shardbus.testing import MemoryRows

FAST = Retry(base_s=0.001)
ONCE = Retry(attempts=1)


class Step(Event, key="key"):
    key: str
    n: int = 0


class Jump(Event, key="key"):
    key: str
    n: int = 0


class Ask(Command[int], key="key"):
    key: str


Run = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture
def bus() -> Bus:
    return Bus("contract")


def dead(rows: MemoryRows) -> list[tuple[str, str, tuple[str, ...]]]:
    return [
        (row.reason, row.error_type, tuple(name.split(".")[-1] for name in row.handlers)) for row in rows.dead.values()
    ]


# -- middleware around handlers


async def test_each_handler_has_the_middleware_around_it_the_first_outermost(bus: Bus, run: Run):
    seen: list[str] = []

    def middleware(name: str) -> Any:
        async def around(message: Any, context: Context, call_next: CallNext) -> Any:
            seen.append(f"{name} {call_next.handler.split('.')[-1]}")
            try:
                return await call_next(message, context)
            finally:
                seen.append(f"end of {name}")

        return around

    bus.use(middleware("outer"))

    @bus.on(Step)
    async def first(event: Step) -> None:
        seen.append("first")

    @bus.on(Step)
    def second(event: Step, context: Context) -> None:
        seen.append("second")

    bus.use(middleware("inner"))
    async with run(bus) as client:
        await client.publish(Step(key="a"))
        assert (await client.flush(10)).handled == 1
    assert seen == [
        *("outer first", "inner first", "first", "end of inner", "end of outer"),
        *("outer second", "inner second", "second", "end of inner", "end of outer"),
    ]


async def test_a_middleware_may_change_message_headers_and_reply(bus: Bus, run: Run):
    @bus.use
    async def change(message: Any, context: Context, call_next: CallNext) -> Any:
        other = type(message)(key=message.key + "!")
        return await call_next(other, context.with_headers({"tenant": "acme"})) + 1

    @bus.command(Ask)
    async def answer(command: Ask, context: Context) -> int:
        assert dict(context.headers) == {"tenant": "acme", "trace": "1"}
        return len(command.key)

    async with run(bus) as client:
        assert await client.execute(Ask(key="abc"), headers={"trace": "1"}) == 5


async def test_a_middleware_that_raises_is_the_handlers_failure(bus: Bus, run: Run, rows: MemoryRows):
    called: list[int] = []

    @bus.use
    async def refuse(message: Any, context: Context, call_next: CallNext) -> Any:
        called.append(context.attempt)
        raise PermissionError("not today")

    @bus.on(Step, retry=FAST)
    async def handle(event: Step) -> None:
        raise AssertionError("was called")

    @bus.command(Ask)
    async def answer(command: Ask) -> int:
        raise AssertionError("was called")

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        assert (await client.flush(10)).dead == 1
        with pytest.raises(CommandFailed, match="PermissionError: not today"):
            await client.execute(Ask(key="a"))
    assert called == [1, 2, 3, 1]
    assert dead(rows) == [("failed", "PermissionError", ("handle",))]
    (letter,) = rows.dead.values()
    assert "in refuse" in letter.traceback.splitlines()[1]


async def test_a_middleware_that_keeps_going_wrong_opens_the_handlers_circuit(bus: Bus, run: Run, rows: MemoryRows):
    called = 0

    @bus.use
    async def refuse(message: Any, context: Context, call_next: CallNext) -> Any:
        nonlocal called
        called += 1
        raise PermissionError

    @bus.on(Step, retry=ONCE, breaker=Breaker(failures=3, open_s=3600, while_open="dead"))
    async def handle(event: Step) -> None: ...

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{at}") for at in range(10)])
        await client.flush(10)
    assert called == 3
    assert sorted(reason for reason, _, _ in dead(rows)) == ["circuit-open"] * 7 + ["failed"] * 3


async def test_a_middleware_may_handle_a_failure_or_call_nothing(bus: Bus, run: Run):
    @bus.use
    async def forgive(message: Any, context: Context, call_next: CallNext) -> Any:
        try:
            if message.n != 2:
                await call_next(message, context)
        except ValueError:
            pass

    @bus.on(Step)
    async def handle(event: Step) -> None:
        assert event.n != 2
        raise ValueError

    async with run(bus) as client:
        await client.publish_many([Step(key="a", n=n) for n in range(4)])
        assert (await client.flush(10)).handled == 4


async def test_the_timeout_of_a_handler_includes_what_is_around_it(bus: Bus, run: Run, rows: MemoryRows):
    @bus.use
    async def dawdle(message: Any, context: Context, call_next: CallNext) -> Any:
        await asyncio.sleep(3600)

    @bus.on(Step, retry=ONCE, timeout_s=0.01)
    async def handle(event: Step) -> None: ...

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
    assert dead(rows) == [("timeout", "TimeoutError", ("handle",))]


async def test_a_middleware_for_a_type_leaves_the_others_alone(bus: Bus, run: Run):
    seen: list[str] = []

    async def note(message: Any, context: Context, call_next: CallNext) -> Any:
        seen.append(type(message).__name__)
        return await call_next(message, context)

    bus.use(note, on=(Jump, Command))

    @bus.on(Step, Jump)
    async def handle(event: Step | Jump) -> None: ...

    @bus.command(Ask)
    async def answer(command: Ask) -> int:
        return 5

    async with run(bus) as client:
        await client.publish_many([Step(key="a"), Jump(key="a")])
        assert await client.execute(Ask(key="a")) == 5
    assert seen == ["Jump", "Ask"]


async def test_what_a_middleware_sets_the_handler_sees_and_no_later_message(bus: Bus, run: Run):
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[tuple[str, str]] = []

    @bus.use
    async def name(message: Any, context: Context, call_next: CallNext) -> Any:
        before = request.get()
        request.set(message.key)
        await call_next(message, context)
        seen.append((before, request.get()))

    @bus.on(Step)
    async def handle(event: Step) -> None:
        assert request.get() == event.key
        if event.n % 3 == 0:
            await asyncio.sleep(0)

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{at}", n=at) for at in range(30)])
        assert (await client.flush(10)).handled == 30
    assert [before for before, _ in seen] == ["none"] * 30


# -- the shipped ones


async def test_log_times_and_duplicates_on_a_running_bus(bus: Bus, run: Run, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "shardbus.handlers")
    timing = Timing()
    handled: list[int] = []
    bus.use(Logging())
    bus.use(timing)
    bus.use(Idempotency(lambda event: event.n), on=Step)

    @bus.on(Step, retry=FAST)
    async def handle(event: Step, context: Context) -> None:
        if event.n == 3 and context.attempt == 1:
            raise ValueError("again")
        handled.append(event.n)

    async with run(bus) as client:
        await client.publish_many([Step(key="a", n=n) for n in (1, 2, 2, 3, 3, 1)])
        assert (await client.flush(10)).handled == 6
    assert handled == [1, 2, 3]
    (times,) = timing.times()
    assert (times.type, times.calls, times.failed) == ("Step", 7, 1)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert len(caplog.records) == 7


async def test_a_rate_of_a_key_holds_up_that_key_alone(bus: Bus, run: Run):
    began: dict[str, list[float]] = {"a": [], "b": []}
    bus.use(RateLimit(per_key=4, burst=1))

    @bus.on(Step)
    async def handle(event: Step) -> None:
        began[event.key].append(time.monotonic())

    async with run(bus) as client:
        await client.publish_many([*(Step(key="a", n=n) for n in range(3)), Step(key="b")])
        await client.flush(10)
    assert began["b"][0] < began["a"][1]
    assert began["a"][2] - began["a"][0] >= 0.3  # two intervals, and the first may have begun late


# -- filters


async def test_a_handler_runs_for_what_concerns_it(bus: Bus, run: Run):
    seen: list[str] = []

    @bus.on(Step, where=lambda event: event.n > 2)
    async def large(event: Step) -> None:
        seen.append(f"large {event.n}")

    @bus.on(Step, where=key_matches("a*") & ~header_matches("skip"))
    async def of_a(event: Step) -> None:
        seen.append(f"of_a {event.n}")

    @bus.on(Step, Jump, where=is_type(Jump) | where(n=1))
    def jumps(event: Step | Jump) -> None:
        seen.append(f"jumps {event.n}")

    async with run(bus) as client:
        await client.publish(Step(key="b", n=3))
        await client.publish(Step(key="a", n=1))
        await client.publish(Step(key="a", n=2), headers={"skip": "yes"})
        await client.publish(Jump(key="b", n=9))
        assert (await client.flush(10)).handled == 4
    assert sorted(seen) == ["jumps 1", "jumps 9", "large 3", "of_a 1"]


async def test_an_event_that_concerns_nobody_is_handled(bus: Bus, run: Run, rows: MemoryRows):
    @bus.on(Step, where=where(n=5))
    async def handle(event: Step) -> None:
        raise AssertionError("was called")

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{at}") for at in range(20)])
        assert (await client.flush(10)).handled == 20
    assert rows.dead == {}


async def test_a_filter_that_raises_is_the_handlers_failure(bus: Bus, run: Run, rows: MemoryRows):
    asked = 0

    def broken(event: Step) -> bool:
        nonlocal asked
        asked += 1
        raise LookupError("no such thing")

    @bus.on(Step, retry=FAST, where=broken)
    async def handle(event: Step) -> None:
        raise AssertionError("was called")

    @bus.on(Step)
    async def sound(event: Step) -> None: ...

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
    assert asked == 3
    assert dead(rows) == [("failed", "LookupError", ("handle",))]
    (letter,) = rows.dead.values()
    assert "in broken" in letter.traceback.splitlines()[1]


async def test_a_circuit_hears_nothing_of_events_that_do_not_concern_its_handler(bus: Bus, run: Run, rows: MemoryRows):
    @bus.on(Step, retry=ONCE, where=where(n=1), breaker=Breaker(failures=1, open_s=3600, while_open="dead"))
    async def handle(event: Step) -> None:
        raise ConnectionError

    async with run(bus) as client:
        await client.publish(Step(key="a", n=1))
        await client.flush(10)
        await client.publish_many([Step(key=f"k{at}", n=2) for at in range(10)])
        ledger = await client.flush(10)
        await client.publish(Step(key="a", n=1))
        await client.flush(10)
    assert (ledger.handled, ledger.dead) == (10, 1)
    assert [reason for reason, _, _ in dead(rows)] == ["failed", "circuit-open"]


async def test_a_filter_of_a_field_that_is_not_there_is_refused_where_it_is_registered(bus: Bus):
    with pytest.raises(RegistrationError, match="Step has no field 'm'"):
        bus.on(Step, where=where(m=1))
    with pytest.raises(RegistrationError, match="where=5"):
        bus.on(Step, where=5)  # type: ignore[arg-type]
    assert bus.plans() == {}


# -- several types, and priority


async def test_handlers_run_by_priority_and_then_as_registered(bus: Bus, run: Run, rows: MemoryRows):
    seen: list[str] = []
    for name, priority in (("b", 0), ("d", -1), ("a", 10), ("c", 0)):

        def handle(event: Step, name: str = name) -> None:
            seen.append(name)
            if name == "c":
                raise ValueError(name)

        handle.__qualname__ = name
        bus.on(Step, priority=priority, retry=ONCE)(handle)
    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
    assert seen == ["a", "b", "c", "d"]
    assert dead(rows) == [("failed", "ValueError", ("c",))]


def test_what_is_refused_of_one_type_is_registered_for_none(bus: Bus):
    async def of_step(event: Step) -> None: ...

    with pytest.raises(RegistrationError, match="takes Step, but is registered for Jump"):
        bus.on(Step, Jump)(of_step)
    with pytest.raises(RegistrationError, match="a type twice"):
        bus.on(Step, Step)
    with pytest.raises(RegistrationError, match="subclass of Event, not Ask"):
        bus.on(Step, Ask)  # type: ignore[arg-type]
    with pytest.raises(RegistrationError, match="priority='high'"):
        bus.on(Step, priority="high")  # type: ignore[arg-type]
    assert bus.plans() == {}


# -- threads


async def test_a_handler_in_a_thread_holds_up_no_other_key(bus: Bus, run: Run):
    release = threading.Event()
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")
    threads: list[tuple[str, bool]] = []
    done: list[str] = []

    @bus.use
    async def name(message: Any, context: Context, call_next: CallNext) -> Any:
        tenant.set(message.key)
        return await call_next(message, context)

    @bus.on(Step, in_thread=True)
    def slow(event: Step, context: Context) -> None:
        assert release.wait(30)
        threads.append((tenant.get(), threading.current_thread() is threading.main_thread()))

    @bus.on(Jump)
    async def quick(event: Jump) -> None:
        done.append(event.key)

    @bus.command(Ask, in_thread=True)
    def answer(command: Ask) -> int:
        return len(command.key)

    async with run(bus) as client:
        await client.publish(Step(key="slow"))
        await client.publish_many([Jump(key=f"k{at}") for at in range(100)])
        assert await client.execute(Ask(key="abc")) == 3
        while len(done) < 100:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        assert threads == []
        release.set()
        assert (await client.flush(10)).handled == 101
    assert threads == [("slow", False)]
    assert [one for one in threading.enumerate() if one.name.startswith("shardbus-handler")] == []


async def test_a_handler_in_a_thread_that_fails_is_tried_again_and_its_traceback_begins_with_it(
    bus: Bus, run: Run, rows: MemoryRows
):
    @bus.on(Step, in_thread=True, retry=FAST)
    def broken(event: Step) -> None:
        raise ValueError(event.n)

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
    (letter,) = rows.dead.values()
    assert (letter.handlers[0].split(".")[-1], letter.envelope.attempt) == ("broken", 3)
    first, second, *_, last = letter.traceback.splitlines()
    assert (first, last) == ("Traceback (most recent call last):", "ValueError")
    assert "in broken" in second


async def test_a_plain_handler_behind_a_filter_has_a_traceback_that_begins_with_it(bus: Bus, run: Run, rows: MemoryRows):
    @bus.on(Step, where=where(n=0), retry=ONCE)
    def broken(event: Step) -> None:
        raise ValueError(event.n)

    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
    assert "in broken" in next(iter(rows.dead.values())).traceback.splitlines()[1]


async def test_leaving_early_waits_for_a_thread_before_the_lifespan_closes(bus: Bus):
    began, seen = threading.Event(), []

    @bus.lifespan
    async def resources(worker: WorkerInfo) -> AsyncIterator[None]:
        try:
            yield
        finally:
            seen.append("closed")

    @bus.on(Step, in_thread=True)
    def slow(event: Step) -> None:
        began.set()
        time.sleep(0.1)
        seen.append("ended")

    async def leave_early() -> None:
        async with bus.local(close_timeout=0.01) as client:
            await client.publish(Step(key="a"))
            await asyncio.to_thread(began.wait, 30)
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        await leave_early()
    assert seen == ["ended", "closed"]


def test_a_thread_is_for_a_plain_function_without_a_timeout(bus: Bus):
    async def waits(event: Step) -> None: ...

    def blocks(event: Step) -> None: ...

    def answers(command: Ask) -> int:
        return 1

    with pytest.raises(RegistrationError, match=r"waits: in_thread=True.*`async def` needs no thread"):
        bus.on(Step, in_thread=True)(waits)
    with pytest.raises(RegistrationError, match=r"blocks: in_thread=True.*cannot be cancelled there"):
        bus.on(Step, in_thread=True, timeout_s=5)(blocks)
    with pytest.raises(RegistrationError, match=r"answers: in_thread=True.*cannot be cancelled there"):
        bus.command(Ask, in_thread=True, timeout_s=5)(answers)
    with pytest.raises(RegistrationError, match="threads_max=0"):
        Bus("shop", threads_max=0)


# -- middleware around publishing


async def test_each_message_goes_through_the_clients_middleware_before_it_is_encoded(bus: Bus, run: Run):
    seen: list[tuple[str, int, dict[str, str]]] = []

    @bus.on(Step, Jump)
    async def handle(event: Step | Jump, context: Context) -> None:
        seen.append((type(event).__name__, event.n, dict(context.headers)))

    @bus.command(Ask)
    async def answer(command: Ask, context: Context) -> int:
        return len(context.headers)

    def stamp(message: Any, headers: dict[str, str]) -> None:
        headers["tenant"] = headers.get("tenant", "") + "x"

    def replace(message: Any, headers: dict[str, str]) -> Any:
        if isinstance(message, Step) and message.n == 1:
            return Jump(key=message.key, n=headers["tenant"].count("x") + 10)
        return message

    given = {"trace": "1"}
    async with run(bus, stamp, replace, stamp) as client:
        await client.publish(Step(key="a", n=0), headers=given)
        await client.publish_many([Step(key="a", n=n) for n in (1, 2)], headers={"trace": "2"}, ordinals=[1, 2])
        assert await client.execute(Ask(key="a"), headers=given) == 2
        await client.flush(10)
        assert client.ledger().published == 3
    assert seen == [
        ("Step", 0, {"trace": "1", "tenant": "xx"}),
        ("Jump", 11, {"trace": "2", "tenant": "xx"}),
        ("Step", 2, {"trace": "2", "tenant": "xx"}),
    ]
    assert given == {"trace": "1"}


async def test_what_a_middleware_refuses_is_not_published_and_what_was_before_it_is(bus: Bus, run: Run):
    handled: list[int] = []

    @bus.on(Step)
    async def handle(event: Step) -> None:
        handled.append(event.n)

    def refuse(message: Step, headers: dict[str, str]) -> None:
        if message.n == 3:
            raise PermissionError("three")

    async with run(bus, refuse) as client:
        with pytest.raises(PermissionError, match="three"):
            await client.publish_many([Step(key="a", n=n) for n in range(6)])
        with pytest.raises(PermissionError, match="three"):
            await client.publish(Step(key="a", n=3))
        assert (await client.flush(10)).published == 3
    assert handled == [0, 1, 2]


async def test_a_middleware_of_a_client_keeps_the_key(bus: Bus, run: Run):
    others: list[Any] = [Step(key="b"), Jump(key="b"), Ask(key="a"), "text"]

    def replace(message: Any, headers: dict[str, str]) -> Any:
        return others[0]

    async with run(bus, replace) as client:
        for told in ("Step with the key 'b' for Step with the key 'a'", "Jump with the key 'b'"):
            with pytest.raises(UsageError, match=told):
                await client.publish(Step(key="a"))
            del others[0]
        with pytest.raises(UsageError, match="publish takes events"):
            await client.publish(Step(key="a"))
        del others[0]
        with pytest.raises(UsageError, match="replace returned a str for"):
            await client.publish(Step(key="a"))
        with pytest.raises(UsageError, match="publish takes events"):
            await client.publish(Ask(key="a"))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="2 stamps"):
            await client.publish_many([Step(key="a")], ordinals=[1, 2])
        assert client.ledger().published == 0


async def test_what_its_worker_could_not_decode_is_refused_before_it_is_published(bus: Bus):
    @bus.on(Step)
    async def handle(event: Step) -> None: ...

    async with bus.local(middleware=[Validation()]) as client:
        with pytest.raises(InvalidMessage, match=r"Step is not as it is declared.*Expected `int`, got `str` - at `\$\.n`"):
            await client.publish(Step(key="a", n="5"))  # type: ignore[arg-type]
        await client.publish(Step(key="a", n=5))
        ledger = await client.flush(10)
    assert (ledger.published, ledger.handled) == (1, 1)


async def waits(message: Any, headers: dict[str, str]) -> None: ...


NO_MIDDLEWARE: dict[str, tuple[Any, str]] = {
    "a coroutine function": ([waits], r"waits: a middleware of a client is a plain `def`"),
    "one of handlers": ([Logging()], r"for bus\.use"),
    "a class": ([Validation], r"that is a class; make one: Validation\(…\)"),
    "no list": (Validation(), r"give a list"),
    "no function": ([5], "5: a middleware of a client"),
    "a function of one": ([len], r"takes \(message, headers\), and len"),
}


@pytest.mark.parametrize(("middleware", "told"), NO_MIDDLEWARE.values(), ids=NO_MIDDLEWARE)
def test_what_is_no_middleware_of_a_client_is_refused(middleware: Any, told: str, bus: Bus):
    with pytest.raises(UsageError, match=told):
        bus.local(middleware=middleware)


def test_a_client_without_middleware_is_the_plain_one():
    assert client_class(()) is Client
