"""The application of `test_surface.py`: served by `shardbus serve` for one engine, run in the test for the other.

What a handler saw is noted under its key in the memory of its shard, and read by a command of that key, which takes its
place behind what was published before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from shardbus import (
    Breaker,
    Bus,
    Command,
    Context,
    Event,
    Idempotency,
    Retry,
    SessionEnded,
    SessionStarted,
    UsageError,
    continue_trace,
    current_trace,
    header_matches,
    where,
)


class Noted(Event, key="key"):
    key: str
    n: int = 0


class Unkeyed(Event):
    """It has no order, and goes to the next shard."""

    n: int


class Flaky(Event, key="key"):
    """Fails so many times."""

    key: str
    times: int


class Doomed(Event, key="key"):
    """Fails unless its key is mended."""

    key: str
    n: int = 0


class Parking(Event, key="key"):
    """Likewise, and parks its key."""

    key: str
    n: int = 0


class Slow(Event, key="key"):
    key: str
    seconds: float


class Timed(Event, key="key"):
    """Runs longer than it may."""

    key: str


class Broken(Event, key="key"):
    """Fails each time; the circuit of its handler opens at the second."""

    key: str


class Ordered(Event, key="key"):
    """Several handlers, with filters and priorities, one of them in a thread."""

    key: str
    n: int


class Once(Event, key="key"):
    key: str
    id: str


class Wrapped(Event, key="key"):
    """A middleware is around its handler."""

    key: str


class Gathered(Event, key="key"):
    """A batch handler takes it."""

    key: str
    n: int
    bad: bool = False


class Parent(Event, key="key"):
    """Its handler publishes `Noted`, of the key `child`."""

    key: str
    child: str
    count: int = 1


class Traced(Event, key="key"):
    key: str


class Unhandled(Event, key="key"):
    """The application has no handler of it."""

    key: str


class UnhandledCommand(Command[int], key="key"):
    """Likewise."""

    key: str


class Seen(Command[list[list[Any]]], key="key"):
    """What was noted under this key."""

    key: str


class Facts(Command[dict[str, Any]], key="key"):
    """What its handler's context says."""

    key: str


class Mend(Command[None], key="key"):
    key: str


class Fail(Command[None], key="key"):
    key: str


class Sleep(Command[str], key="key", idempotent=True):
    key: str
    seconds: float


class Ask(Command[list[list[Any]]], key="key"):
    """Its handler executes `Seen` of another key."""

    key: str
    other: str


class Count(Command[int], key="key"):
    """Streams."""

    key: str
    upto: int


bus = Bus("surface")
seen: dict[str, list[list[Any]]] = {}
mended: set[str] = set()


def note(key: str, *what: Any) -> None:
    seen.setdefault(key, []).append(list(what))


@bus.on(Noted)
async def noted(event: Noted, context: Context) -> None:
    note(event.key, event.n, context.attempt, context.redelivered, dict(context.headers))


@bus.on(Unkeyed)
async def unkeyed(event: Unkeyed, context: Context) -> None:
    assert context.key is None


@bus.on(Flaky, retry=Retry(attempts=4, base_s=0.001, on=ConnectionError))
async def flaky(event: Flaky, context: Context) -> None:
    note(event.key, context.attempt)
    if context.attempt <= event.times:
        raise ConnectionError("not yet")


@bus.on(Doomed, retry=Retry(attempts=1))
async def doomed(event: Doomed, context: Context) -> None:
    if event.key not in mended:
        raise LookupError(f"nothing at {event.key}")
    note(event.key, event.n, context.attempt, context.redelivered)


@bus.on(Parking, retry=Retry(attempts=1), on_dead_letter="park")
async def parking(event: Parking) -> None:
    if event.n == 1 and event.key not in mended:
        raise LookupError("the first one")
    note(event.key, event.n)


@bus.on(Slow)
async def slow(event: Slow) -> None:
    await asyncio.sleep(event.seconds)
    note(event.key, "slow")


@bus.on(Timed, timeout_s=0.01, retry=Retry(attempts=1))
async def timed(event: Timed) -> None:
    await asyncio.sleep(60)


@bus.on(
    Broken, retry=Retry(attempts=1), breaker=Breaker(failures=2, window_s=60, open_s=600, successes=1, while_open="dead")
)
async def broken(event: Broken) -> None:
    raise ConnectionError("no bank")


@bus.on(Ordered, where=where(lambda event: event.n >= 10) & ~header_matches("tenant", "other-*"))
async def large(event: Ordered) -> None:
    note(event.key, "large", event.n)


@bus.on(Ordered, priority=10, in_thread=True)
def first(event: Ordered) -> None:
    note(event.key, "first", event.n)


bus.use(Idempotency(lambda event: (event.key, event.id)), on=Once)


@bus.on(Once)
async def once(event: Once) -> None:
    note(event.key, event.id)


@bus.on(Wrapped)
async def wrapped(event: Wrapped, context: Context) -> None:
    note(event.key, "handler", context.headers.get("added"))


async def around(message: Wrapped, context: Context, call_next: Any) -> Any:
    note(message.key, "before", call_next.handler.rpartition(".")[2])
    outcome = await call_next(message, context.with_headers({"added": "by the middleware"}))
    note(message.key, "after")
    return outcome


bus.use(around, on=Wrapped)


@bus.on(Gathered, batch=64, retry=Retry(attempts=1))
async def gathered(events: list[Gathered], contexts: list[Context]) -> list[Exception | None]:
    outcomes: list[Exception | None] = []
    for event, context in zip(events, contexts, strict=True):
        outcomes.append(ValueError("bad") if event.bad else None)
        if not event.bad:
            note(event.key, event.n, context.key == event.key)
    return outcomes


@bus.on(Parent)
async def parent(event: Parent, context: Context) -> None:
    note(event.key, context.message_id)
    if event.count == 1:
        await context.publish(Noted(key=event.child), headers={"own": "yes"})
    else:
        await context.publish_many([Noted(key=event.child, n=n) for n in range(event.count)])


bus.use(continue_trace, on=Traced)


@bus.on(Traced)
async def traced(event: Traced) -> None:
    trace = current_trace()
    note(event.key, None if trace is None else str(trace))


@bus.on(SessionStarted)
async def started(event: SessionStarted) -> None:
    note(event.session, "started")


@bus.on(SessionEnded)
async def ended(event: SessionEnded) -> None:
    note(event.session, "ended")


@bus.command(Seen)
async def read(command: Seen) -> list[list[Any]]:
    return seen.get(command.key, [])


@bus.command(Facts)
async def facts(command: Facts, context: Context) -> dict[str, Any]:
    return {
        "key": context.key,
        "attempt": context.attempt,
        "redelivered": context.redelivered,
        "remaining": context.remaining_s is not None and 0 < context.remaining_s <= 7,
        "headers": dict(context.headers),
        "causation": context.causation_id,
        "correlation": context.correlation_id == context.message_id,
        "shard": context.shard,
    }


@bus.command(Mend)
async def mend(command: Mend) -> None:
    mended.add(command.key)


@bus.command(Fail)
async def fail(command: Fail) -> None:
    raise KeyError("no such thing")


@bus.command(Sleep)
async def sleep(command: Sleep) -> str:
    try:
        await asyncio.sleep(command.seconds)
    except asyncio.CancelledError:
        note(command.key, "cancelled")
        raise
    return "slept"


@bus.command(Ask)
async def ask(command: Ask, context: Context) -> list[list[Any]]:
    try:
        return await context.execute(Seen(key=command.other), timeout=5.0)
    except UsageError as error:
        return [["refused", str(error)]]


@bus.command(Count)
async def count(command: Count) -> AsyncIterator[int]:
    try:
        for n in range(command.upto):
            yield n
    finally:
        note(command.key, "closed")
