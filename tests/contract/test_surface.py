"""Every public call of a client, on both engines: what it does, and what it says of a call that makes no sense.

`zmq` is one `shardbus serve` for the whole file, with two workers; `local` the same application in the test's process, with
two shards. Each test has keys of its own. What needs a clock, small limits or faults is in the other files, on one engine.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import surface
from surface import (
    Ask,
    Broken,
    Count,
    Doomed,
    Facts,
    Fail,
    Flaky,
    Gathered,
    Mend,
    Noted,
    Once,
    Ordered,
    Parent,
    Parking,
    Seen,
    Sleep,
    Slow,
    Timed,
    Traced,
    Unhandled,
    UnhandledCommand,
    Unkeyed,
    Wrapped,
)

import shardbus
from shardbus import (
    Client,
    ClientClosed,
    CommandFailed,
    DeadLetterFilter,
    InvalidKey,
    InvalidMessage,
    MessageTooLarge,
    Missed,
    NotDelivered,
    Traceparent,
    UsageError,
    Validation,
    blocking,
    propagate_trace,
)

SHARDS = 2


class Engine:
    """A running application, and how a program gets a client of it."""

    def __init__(self, name: str, address: str = "") -> None:
        self.name = name
        self._address = address

    def open(self, **options: Any) -> AbstractAsyncContextManager[Client]:
        if self.name == "local":
            return surface.bus.local(shards=SHARDS, **options)
        return shardbus.connect(self._address, **options)

    def open_blocking(self) -> AbstractAsyncContextManager[blocking.BlockingClient]:
        return blocking.local(surface.bus, shards=SHARDS) if self.name == "local" else blocking.connect(self._address)


@contextmanager
def served() -> Iterator[str]:
    """The application as `shardbus serve` runs it; its address."""
    directory = Path(tempfile.mkdtemp(prefix="sb"))
    here = Path(__file__).parent
    address = f"ipc://{directory}/bus"
    path = os.pathsep.join([str(here.parents[1]), str(here)])
    command = [sys.executable, "-m", "shardbus", "serve", "surface:bus", "--workers", str(SHARDS), "--bind", address]
    command += ["--dead-letters", f"sqlite+aiosqlite:///{directory}/dead.db", "--drain-timeout", "0"]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready:"), process.communicate(timeout=30)[1]
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module", params=["local", "zmq"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "local":
        yield Engine("local")
        return
    with served() as address:
        yield Engine("zmq", address)


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key that no other test has."""
    return request.node.name


async def read(client: Client, key: str) -> list[list[Any]]:
    return await client.execute(Seen(key=key), timeout=30.0)


async def dead_of(client: Client, key: str) -> list[shardbus.DeadLetter]:
    return await client.dead_letters(DeadLetterFilter(key=(key,)))


async def tidy(client: Client, key: str) -> None:
    """No dead letters are left by a test: those of a bus in this process would be a warning in its log."""
    await client.purge(DeadLetterFilter(key=(key,)))


# -- publishing


async def test_events_are_handled_in_order_once_and_counted(engine: Engine, key: str):
    async with engine.open() as client:
        await client.publish(Noted(key=key, n=0), headers={"tenant": "acme"})
        await client.publish_many([Noted(key=key, n=n) for n in range(1, 1000)])
        ledger = await client.flush(30.0)
        assert (ledger.published, ledger.handled, ledger.in_flight) == (1000, 1000, 0)
        assert client.ledger() == client.statistics().ledger == ledger
        assert [one.shard for one in client.statistics().outboxes] == list(range(SHARDS))
        found = await read(client, key)
    assert [n for n, *_ in found] == list(range(1000))
    assert found[0][1:] == [1, False, {"tenant": "acme"}]
    assert found[1][1:] == [1, False, {}]


async def test_events_without_a_key_are_handled(engine: Engine):
    async with engine.open() as client:
        await client.publish_many([Unkeyed(n=n) for n in range(100)])
        await client.publish_many(deque(Unkeyed(n=n) for n in range(100)))
        await client.publish_many(tuple(Unkeyed(n=n) for n in range(100)))
        assert (await client.flush(30.0)).handled == 300


CALLS_ELSEWHERE: dict[str, Callable[[Client, str], Any]] = {
    "publish": lambda client, key: client.publish(Noted(key=key)),
    "publish_many": lambda client, key: client.publish_many([Noted(key=key), Noted(key=key)]),
    "publish_many with headers": lambda client, key: client.publish_many([Noted(key=key)], headers={"a": "b"}),
    "schedule": lambda client, key: client.schedule(Noted(key=key), delay=0.0),
    "flush": lambda client, key: client.flush(),
    "execute": lambda client, key: client.execute(Seen(key=key)),
    "status": lambda client, key: client.status(),
    "dead_letters": lambda client, key: client.dead_letters(),
    "subscribe": lambda client, key: one_of(client.subscribe(Noted, key=key)),
    "session": lambda client, key: entered(client.session(key)),
}


async def one_of(items: Any) -> Any:
    return await anext(items)


async def entered(block: Any) -> None:
    async with block:
        pass


@pytest.mark.parametrize("call", CALLS_ELSEWHERE.values(), ids=CALLS_ELSEWHERE)
async def test_a_client_in_another_event_loop_is_refused_and_nothing_is_published(
    engine: Engine, key: str, call: Callable[[Client, str], Any]
):
    async def elsewhere(client: Client) -> None:
        await call(client, key)

    async with engine.open() as client:
        await client.publish(Noted(key=key))
        await client.flush(30.0)
        with pytest.raises(UsageError, match="belongs to the event loop that opened it, and this is another one"):
            await asyncio.to_thread(asyncio.run, elsewhere(client))
        await client.publish(Noted(key=key, n=1))
        ledger = await client.flush(30.0)
        assert (ledger.published, ledger.handled) == (2, 2)
        assert [n for n, *_ in await read(client, key)] == [0, 1]


READS: dict[str, Callable[[Client, str], Any]] = {
    "subscription": lambda client, key: client.subscribe(Noted, key=key),
    "stream": lambda client, key: client.stream(Count(key=key, upto=3), timeout=30.0),
}


@pytest.mark.parametrize("begin", READS.values(), ids=READS)
async def test_what_a_client_reads_is_refused_in_another_event_loop_and_goes_on_in_its_own(
    engine: Engine, key: str, begin: Callable[[Client, str], Any]
):
    async def ended(items: Any) -> None:
        await items.aclose()

    async with engine.open() as client, begin(client, key) as items:
        for call in (one_of, entered, ended):
            with pytest.raises(UsageError, match="belongs to the event loop that opened it, and this is another one"):
                await asyncio.to_thread(asyncio.run, call(items))
        await client.publish(Noted(key=key))
        assert await anext(items) in (0, Noted(key=key))


def test_a_client_in_a_later_event_loop_is_refused_too(engine: Engine, key: str):
    block = engine.open()
    with asyncio.Runner() as first:
        client = first.run(block.__aenter__())
        with pytest.raises(UsageError, match=r"use shardbus\.blocking"):
            asyncio.run(client.publish(Noted(key=key)))
        first.run(block.__aexit__(None, None, None))
        with pytest.raises(ClientClosed):
            asyncio.run(client.publish(Noted(key=key)))


async def test_stamps_are_evidence(engine: Engine, key: str):
    async with engine.open() as client:
        await client.publish(Noted(key=key), ordinal=1, intended_ns=1)
        await client.publish_many([Noted(key=key) for _ in range(9)], ordinals=range(2, 11))
        await client.flush(30.0)
        found: list[Any] = []
        while sum(one.distinct for one in found) < 10:
            found = await client.evidence([client.publisher])
        assert sum(one.out_of_order for one in found) == 0


async def test_the_middleware_of_a_client_sees_each_message_and_may_refuse_it(engine: Engine, key: str):
    def stamp(message: Any, headers: dict[str, str]) -> None:
        headers["tenant"] = "acme"

    async with engine.open(middleware=[Validation(), stamp]) as client:
        await client.publish(Noted(key=key))
        with pytest.raises(InvalidMessage, match="Noted is not as it is declared, so it was not published: "):
            await client.publish(Noted(key=key, n="x"))  # type: ignore[arg-type]
        assert (await client.execute(Facts(key=key), timeout=7.0))["headers"] == {"tenant": "acme"}
        assert await read(client, key) == [[0, 1, False, {"tenant": "acme"}]]


async def test_leaving_the_block_says_what_was_not_finished(engine: Engine, key: str):
    with pytest.raises(NotDelivered, match=r"1 event was published and not finished within") as raised:  # noqa: PT012
        async with engine.open(close_timeout=0.01) as client:
            await client.publish(Slow(key=key, seconds=1.0))
            with pytest.raises(NotDelivered):
                await client.flush(0.01)
    assert raised.value.in_flight == 1


async def test_a_deadline_that_is_over_is_a_dead_letter(engine: Engine, key: str):
    async with engine.open() as client:
        await client.publish(Slow(key=key, seconds=0.1))
        await client.publish(Noted(key=key), deadline=0.01)
        await client.publish(Noted(key=key, n=1), deadline=60)
        assert (await client.flush(30.0)).dead == 1
        (letter,) = await dead_of(client, key)
        assert (letter.reason, letter.type) == ("expired", "Noted")
        assert [one[0] for one in await read(client, key)] == ["slow", 1]
        await tidy(client, key)


async def test_a_trace_goes_from_its_publisher_to_the_handler(engine: Engine, key: str):
    trace = Traceparent.new()
    async with engine.open(middleware=[propagate_trace]) as client:
        with shardbus.trace(trace):
            await client.publish(Traced(key=key))
        await client.publish(Traced(key=key))
        (within,), (without,) = await read(client, key)
    assert within.split("-")[1] == str(trace).split("-")[1]
    assert without is None


# -- scheduled events


async def test_a_scheduled_event_waits_is_handled_when_it_is_due_or_cancelled(engine: Engine, key: str):
    async with engine.open() as client:
        later = await client.schedule(Noted(key=key, n=1), at=datetime.now(UTC) + timedelta(days=1))
        await client.schedule(Noted(key=key, n=2), delay=1.0, headers={"a": "b"})
        await client.publish(Noted(key=key, n=3), delay=1.5)
        assert (await client.flush(30.0)).waiting == 3
        while len(found := await read(client, key)) < 2:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
        assert [(n, headers) for n, _, _, headers in found] == [(2, {"a": "b"}), (3, {})]
        assert await client.cancel(later.id) is True
        assert await client.cancel(later) is False


# -- handlers


async def test_a_handler_is_called_again_until_it_succeeds(engine: Engine, key: str):
    async with engine.open() as client:
        await client.publish(Flaky(key=key, times=2))
        assert (await client.flush(30.0)).handled == 1
        assert await read(client, key) == [[1], [2], [3]]


async def test_what_no_handler_takes_runs_too_long_or_meets_an_open_circuit_is_dead_with_its_reason(
    engine: Engine, key: str
):
    async with engine.open() as client:
        for event in (Unhandled(key=key), Timed(key=key), Broken(key=key), Broken(key=key), Broken(key=key)):
            await client.publish(event)
        assert (await client.flush(30.0)).dead == 5
        reasons = [(one.type, one.reason) for one in await dead_of(client, key)]
        assert reasons == [
            ("Unhandled", "unknown-type"),
            ("Timed", "timeout"),
            ("Broken", "failed"),
            ("Broken", "failed"),
            ("Broken", "circuit-open"),
        ]
        await tidy(client, key)


async def test_filters_priorities_and_threads_decide_which_handlers_run_and_when(engine: Engine, key: str):
    async with engine.open() as client:
        await client.publish(Ordered(key=key, n=10))
        await client.publish(Ordered(key=key, n=9))
        await client.publish(Ordered(key=key, n=11), headers={"tenant": "other-shop"})
        assert await read(client, key) == [["first", 10], ["large", 10], ["first", 9], ["first", 11]]


async def test_middleware_is_around_the_handler(engine: Engine, key: str):
    async with engine.open() as client:
        await client.publish(Wrapped(key=key))
        assert await read(client, key) == [["before", "wrapped"], ["handler", "by the middleware"], ["after"]]
        for _ in range(2):
            await client.publish(Once(key=f"{key} once", id="a"))
        assert await read(client, f"{key} once") == [["a"]]


async def test_a_batch_handler_says_of_each_event_what_became_of_it(engine: Engine, key: str):
    async with engine.open() as client:
        await client.publish_many([Gathered(key=key, n=n, bad=n == 50) for n in range(100)])
        ledger = await client.flush(30.0)
        assert (ledger.handled, ledger.dead) == (99, 1)
        # What stood behind the failed event in its batch has not been held up by it: it is dead, and parks nothing.
        assert await read(client, key) == [[n, True] for n in range(100) if n != 50]
        await tidy(client, key)


# -- handlers that publish


async def test_what_a_handler_publishes_knows_where_it_comes_from(engine: Engine, key: str):
    async with engine.open() as client:
        await client.publish(Parent(key=key, child=f"{key} child"), headers={"correlation-id": "request-7"})
        await client.publish(Parent(key=key, child=f"{key} children", count=300))
        assert (await client.flush(30.0)).handled == 2
        ((one,), _) = await read(client, key)
        ((_, _, _, headers),) = await read(client, f"{key} child")
        assert headers == {"own": "yes", "correlation-id": "request-7", "causation-id": one}
        assert [n for n, *_ in await read(client, f"{key} children")] == list(range(300))


async def test_a_handler_may_execute_a_command_of_another_key_and_is_told_of_its_own(engine: Engine, key: str):
    async with engine.open() as client:
        await client.publish(Noted(key=f"{key} other", n=7))
        await client.flush(30.0)
        assert (await client.execute(Ask(key=key, other=f"{key} other"), timeout=30.0))[0][0] == 7
        ((refused, told),) = await client.execute(Ask(key=key, other=key), timeout=30.0)
        assert refused == "refused"
        assert f"Seen has the key {key!r} of the message that is being handled, and would wait for its end" in told


# -- dead letters


async def test_dead_letters_are_found_by_what_they_are_redriven_and_purged(engine: Engine, key: str):
    async with engine.open() as client:
        began = datetime.now(UTC) - timedelta(minutes=1)
        for n in range(3):
            await client.publish(Doomed(key=key, n=n), headers={"tenant": "acme"})
        await client.publish(Unhandled(key=key))
        assert (await client.flush(30.0)).dead == 4
        letters = await dead_of(client, key)
        one = letters[0]
        assert (one.type, one.key, one.event, one.headers) == ("Doomed", key, {"key": key, "n": 0}, {"tenant": "acme"})
        assert (one.reason, one.error_type, one.error) == ("failed", "LookupError", f"nothing at {key}")
        assert one.handlers == ("surface.doomed",)
        assert one.traceback.splitlines()[-2:] == [
            '    raise LookupError(f"nothing at {event.key}")',
            f"LookupError: nothing at {key}",
        ]
        for condition, count in (
            ({"type": "Doomed"}, 3),
            ({"reason": "unknown-type"}, 1),
            ({"handler": "surface.doomed"}, 3),
            ({"since": began}, 4),
            ({"since": datetime.now(UTC) + timedelta(minutes=1)}, 0),
            ({"ids": (one.id, letters[-1].id)}, 2),
        ):
            found = await client.dead_letters(DeadLetterFilter(key=(key,), **condition))
            assert len(found) == count, condition
        assert len(await client.dead_letters(DeadLetterFilter(key=(key,)), limit=2)) == 2
        assert await client.purge(DeadLetterFilter(ids=(letters[-1].id,))) == 1
        await client.execute(Mend(key=key))
        assert await client.redrive(DeadLetterFilter(key=(key,)), rate=1000) == 3
        while len(found := await read(client, key)) < 3:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
        assert found == [[0, 2, True], [1, 2, True], [2, 2, True]]
        assert await dead_of(client, key) == []


async def test_a_parked_key_waits_until_its_dead_letter_is_disposed_of(engine: Engine, key: str):
    async with engine.open() as client:
        for n in (1, 2, 3):
            await client.publish(Parking(key=key, n=n))
        ledger = await client.flush(30.0)
        assert (ledger.dead, ledger.waiting) == (1, 2)
        with pytest.raises(CommandFailed, match="is parked behind a dead letter; redrive or purge that") as raised:
            await read(client, key)
        assert raised.value.error_type == "KeyParked"
        (letter,) = await dead_of(client, key)
        assert letter.parked
        assert await client.purge(DeadLetterFilter(ids=(letter.id,))) == 1
        found: list[list[Any]] = []
        while len(found) < 2:
            try:
                found = await read(client, key)
            except CommandFailed:  # the purge is on its way
                await asyncio.sleep(0.01)
        assert found == [[2], [3]]


# -- commands


async def test_a_command_has_a_reply_its_facts_and_its_place(engine: Engine, key: str):
    async with engine.open() as client:
        facts = await client.execute(Facts(key=key), timeout=7.0, headers={"a": "b"})
        assert 0 <= facts.pop("shard") < SHARDS
        assert facts == {
            "key": key,
            "attempt": 1,
            "redelivered": False,
            "remaining": True,
            "headers": {"a": "b"},
            "causation": None,
            "correlation": True,
        }
        assert await client.execute(Sleep(key=key, seconds=0.0)) == "slept"


async def test_a_command_that_fails_is_told_with_its_error_and_traceback(engine: Engine, key: str):
    async with engine.open() as client:
        with pytest.raises(CommandFailed, match="Fail failed: KeyError: 'no such thing'") as raised:
            await client.execute(Fail(key=key))
        assert "in fail" in raised.value.remote_traceback
        with pytest.raises(CommandFailed, match="takes the command 'UnhandledCommand'") as raised:
            await client.execute(UnhandledCommand(key=key))
        assert raised.value.error_type == "UnknownCommand"
        with pytest.raises(CommandFailed, match=r"Count streams its reply; use client\.stream") as raised:
            await client.execute(Count(key=key, upto=1))
        assert raised.value.error_type == "StreamingCommand"


@pytest.mark.parametrize("by", ["time", "task"])
async def test_a_command_that_nobody_waits_for_any_more_is_cancelled(engine: Engine, key: str, by: str):
    async with engine.open() as client:
        assert await read(client, key) == []  # its shard and this client know each other
        waiting = asyncio.create_task(client.execute(Sleep(key=key, seconds=60), timeout=1.0 if by == "time" else 60))
        if by == "task":
            await asyncio.sleep(1.0)
            waiting.cancel()
        with pytest.raises(TimeoutError if by == "time" else asyncio.CancelledError):
            await waiting
        assert await read(client, key) == [["cancelled"]]  # its key goes on


async def test_a_stream_is_read_item_by_item_and_ended_by_who_leaves(engine: Engine, key: str):
    async with engine.open() as client:
        assert [n async for n in client.stream(Count(key=key, upto=500), timeout=30.0, window=7)] == list(range(500))
        async for n in client.stream(Count(key=key, upto=1_000_000), headers={"a": "b"}):
            if n == 3:
                break
        assert await read(client, key) == [["closed"], ["closed"]]
        with pytest.raises(CommandFailed) as raised:
            await anext(client.stream(Facts(key=key)))
        assert raised.value.error_type == "PlainCommand"


# -- listening


async def test_events_are_followed_after_they_were_handled(engine: Engine, key: str):
    heard = []
    async with engine.open() as client, client.subscribe(Noted, Doomed, key=key, queue_events_max=10) as events:
        await client.publish(Noted(key=key, n=1), headers={"a": "b"})
        await client.publish(Doomed(key=key))
        await client.publish(Noted(key=f"{key} other"))
        await client.publish(Noted(key=key, n=2))
        async for event in events:
            assert not isinstance(event, Missed)
            heard.append((event.n, dict(events.headers)))
            if event.n == 2:
                break
        await tidy(client, key)
    assert heard == [(1, {"a": "b"}), (2, {})]


async def test_a_session_is_begun_used_heard_and_ended(engine: Engine, key: str):
    heard: list[int] = []
    arrived = asyncio.Event()

    def hear(event: Noted) -> None:
        heard.append(event.n)
        if event.n == 2:
            arrived.set()

    async with engine.open() as client:
        async with client.session(key) as session:
            session.on(Noted, hear)
            await session.publish(Noted(key=key, n=1))
            await session.publish(Noted(key=key, n=2))
            await arrived.wait()
            with pytest.raises(UsageError, match="Noted has the key 'another', and the session"):
                await session.publish(Noted(key="another"))
            assert len(await session.execute(Seen(key=key))) == 3
            assert [n async for n in session.stream(Count(key=key, upto=2))] == [0, 1]
        found = await read(client, key)
    assert heard == [1, 2]
    assert (found[0], found[-1]) == (["started"], ["ended"])


# -- the bus


async def test_status_is_the_same_question_everywhere(engine: Engine):
    async with engine.open() as client:
        status = await client.status(timeout=30.0)
    assert status["healthy"] is True
    assert [one["shard"] for one in status["workers"]] == list(range(SHARDS))
    common = {"shard", "pid", "epoch", "restarts", "handled", "backlog", "dead_letters", "waiting", "rss_bytes"}
    assert all(common <= one.keys() for one in status["workers"])
    assert {"dead_letters", "redriven", "purged", "dropped", "waiting", "scheduled", "parked"} <= status.keys()


def test_the_blocking_client_has_the_same_calls(engine: Engine, key: str):
    with engine.open_blocking() as client:
        client.publish(Noted(key=key, n=1), headers={"a": "b"}, timeout=30.0)
        client.publish_many([Noted(key=key, n=2)])
        later = client.schedule(Noted(key=key, n=3), delay=3600)
        ledger = client.flush(30.0)
        assert (ledger.handled, ledger.waiting, client.ledger()) == (2, 1, ledger)
        assert client.cancel(later) is True
        assert client.execute(Seen(key=key), timeout=30.0) == [[1, 1, False, {"a": "b"}], [2, 1, False, {}]]
        client.publish(Doomed(key=key))
        assert client.flush(30.0).dead == 1
        where = DeadLetterFilter(key=(key,))
        assert [one.type for one in client.dead_letters(where)] == ["Doomed"]
        assert (client.redrive(DeadLetterFilter(type="Nothing")), client.purge(where)) == (0, 1)
        assert client.status()["healthy"] is True
        assert client.statistics().ledger.published == 4
        for call in (
            lambda: client.publish(Noted(key=key), timeout=math.nan),
            lambda: client.execute(Seen(key=key), timeout=-1),
        ):
            with pytest.raises(UsageError, match=r"timeout=.*: give seconds above 0"):
                call()


# -- calls that make no sense


EVENT = Noted(key="misuse")
COMMAND = Seen(key="misuse")
NO_ZONE = datetime(2030, 1, 1)  # noqa: DTZ001 - it is a mistake

MISUSES: dict[str, tuple[Callable[[Client], Any], type[Exception], str]] = {
    "publish nothing": (lambda c: c.publish(None), UsageError, "publish takes events, and NoneType is none"),
    "publish a class": (lambda c: c.publish(Noted), UsageError, "got the class Noted; make one: Noted(…)"),
    "publish a command": (lambda c: c.publish(COMMAND), UsageError, "publish takes events, and Seen is none; use"),
    "headers": (lambda c: c.publish(EVENT, headers=["a"]), UsageError, "headers=['a']: give a dict of text"),
    "a header": (lambda c: c.publish(EVENT, headers={"a": 1}), UsageError, "the header 'a': names and values are text"),
    "headers of a command": (lambda c: c.execute(COMMAND, headers="a"), UsageError, "headers='a': give a dict"),
    "a long header": (lambda c: c.publish(EVENT, headers={"a": "b" * 5000}), UsageError, "together up to 4,096 bytes"),
    "a deadline": (lambda c: c.publish(EVENT, deadline=math.nan), UsageError, "deadline=nan: give seconds above 0"),
    "a deadline and a time": (lambda c: c.publish(EVENT, delay=1, deadline=1), UsageError, "either scheduled or"),
    "stamps and a time": (lambda c: c.publish(EVENT, delay=1, ordinal=1), UsageError, "stamps cannot be scheduled"),
    "a stamp": (lambda c: c.publish(EVENT, ordinal=-1), UsageError, "-1 is no stamp: ordinals and instants are whole"),
    "a key": (lambda c: c.publish(Noted(key=1.5)), InvalidKey, "1.5 is a float; a key is a str, an int, bytes or"),
    "a long key": (lambda c: c.publish(Noted(key="k" * 2000)), InvalidKey, "use a digest of it as the key"),
    "a long key of bytes": (lambda c: c.publish(Noted(key=b"k" * 2000)), InvalidKey, "a key of 2,000 bytes; the limit"),
    "a large key": (lambda c: c.subscribe(Noted, key=2**70), InvalidKey, "does not fit into 64 bits; use a str"),
    "no text": (lambda c: c.execute(Seen(key="\udc00")), UsageError, "Seen cannot be encoded, so it was not sent"),
    "a value": (lambda c: c.publish(Noted(key="a", n=object())), UsageError, "Noted cannot be encoded, so it was not sent"),
    "a value among many": (lambda c: c.publish_many([Noted(key="a", n=object())]), UsageError, "1 of 1 (Noted): Noted"),
    "a large event": (lambda c: c.publish(Noted(key="a", n="x" * 2_000_000)), UsageError, "send a reference to"),
    "a large command": (lambda c: c.execute(Fail(key="a" * 2_000_000)), InvalidKey, "a key of more than 1,024 bytes"),
    "one of many": (lambda c: c.publish_many(EVENT), UsageError, "takes a list of events, and got one Noted; use"),
    "a generator": (lambda c: c.publish_many(one for one in [EVENT]), UsageError, "write publish_many(list(…))"),
    "a number of many": (lambda c: c.publish_many(5), UsageError, "takes a list of events, and got one int"),
    "nothing among many": (lambda c: c.publish_many([None, EVENT]), UsageError, "event 1 of 2 (NoneType): "),
    "stamps of many": (lambda c: c.publish_many([EVENT], ordinals=[]), UsageError, "1 events and 0 stamps; give"),
    "a stamp of many": (lambda c: c.publish_many([EVENT], ordinals=["a"]), UsageError, "stamps are whole numbers"),
    "flush": (lambda c: c.flush(-1), UsageError, "timeout=-1: give seconds from 0 on, up to 10,000,000"),
    "no time": (lambda c: c.schedule(EVENT), UsageError, "say when, once: at=… (a datetime with its zone, or"),
    "two times": (lambda c: c.schedule(EVENT, at=1, delay=1), UsageError, "say when, once: "),
    "a time of no zone": (lambda c: c.schedule(EVENT, at=NO_ZONE), UsageError, "give a time with its zone, for instance"),
    "a time of text": (lambda c: c.publish(EVENT, at="noon"), UsageError, "at='noon': give a datetime with its"),
    "a delay": (lambda c: c.publish(EVENT, delay=math.inf), UsageError, "delay=inf: give seconds as a number"),
    "a far time": (lambda c: c.schedule(EVENT, delay=1e12), UsageError, "that is beyond the year 2116"),
    "schedule a command": (lambda c: c.schedule(COMMAND, delay=1), UsageError, "publish takes events, and Seen is"),
    "cancel": (lambda c: c.cancel("x"), UsageError, "'x' is no scheduled event; give what `schedule` returned, or"),
    "cancel in no time": (lambda c: c.cancel(f"{'0' * 32}-0-1", timeout=0), UsageError, "timeout=0: give seconds"),
    "execute an event": (lambda c: c.execute(EVENT), UsageError, "execute and stream take commands, and Noted is none; use"),
    "execute a class": (lambda c: c.execute(Seen), UsageError, "got the class Seen; make one: Seen(…)"),
    "execute for ever": (lambda c: c.execute(COMMAND, timeout=None), UsageError, "timeout=None: give seconds above 0"),
    "stream an event": (lambda c: c.stream(EVENT), UsageError, "execute and stream take commands, and Noted is none; use"),
    "stream in no time": (lambda c: c.stream(COMMAND, timeout=0), UsageError, "timeout=0: give seconds above 0"),
    "a window": (lambda c: c.stream(COMMAND, window=0), UsageError, "window=0: take 1 to 1,024"),
    "no types": (lambda c: c.subscribe(), UsageError, "subscribe to 0 types of events: take 1 to 32"),
    "a command's type": (lambda c: c.subscribe(Seen), UsageError, "subscribe takes types of events, and"),
    "a subscription's policy": (lambda c: c.subscribe(Noted, on_slow="x"), UsageError, "on_slow='x': it is"),
    "a subscription's bound": (lambda c: c.subscribe(Noted, queue_events_max=0), UsageError, "queue_events_max=0:"),
    "a subscription's key": (lambda c: c.subscribe(Noted, key=1.5), InvalidKey, "1.5 is a float"),
    "another type's key": (lambda c: c.subscribe(Noted, key=42), UsageError, "key=42 is a int, and Noted is"),
    "a key of what has none": (lambda c: c.subscribe(Unkeyed, key="a"), UsageError, "Unkeyed has no key, so none"),
    "a session's key": (lambda c: c.session(7), UsageError, "session(7): a session's key is a text"),
    "a session's long key": (lambda c: c.session("k" * 2000), InvalidKey, "use a digest of it as the key"),
    "a session outside": (lambda c: c.session("a").publish(EVENT), UsageError, "is not open; use it inside its"),
    "status in no time": (lambda c: c.status(timeout=math.nan), UsageError, "timeout=nan: give seconds above 0"),
    "a limit": (lambda c: c.dead_letters(limit=0), UsageError, "limit=0: take 1 or more"),
    "no filter": (lambda c: c.purge("Noted"), UsageError, "where='Noted': give a filter, for instance"),
    "a rate": (lambda c: c.redrive(rate=0), UsageError, "rate=0: give dead letters a second, above 0"),
    "a reason": (lambda c: DeadLetterFilter(reason="x"), UsageError, "reason='x': it is one of failed, timeout,"),
    "an id": (lambda c: DeadLetterFilter(ids=("x",)), UsageError, "'x' is no id of a dead letter"),
    "ids of text": (lambda c: DeadLetterFilter(ids="x"), UsageError, "ids='x': give a tuple of ids"),
    "a filter's key": (lambda c: DeadLetterFilter(key="42"), UsageError, "key='42': give the key in a 1-tuple"),
    "a filter's type": (lambda c: DeadLetterFilter(type=Noted), UsageError, "give its name, a text"),
    "a filter's time": (lambda c: DeadLetterFilter(since="10m"), UsageError, "since='10m': give a datetime with"),
    "a filter's zone": (lambda c: DeadLetterFilter(since=NO_ZONE), UsageError, "give a time with its zone, for instance"),
}


@pytest.mark.parametrize("name", MISUSES)
async def test_a_call_that_makes_no_sense_is_told_with_its_value_and_what_to_do(engine: Engine, name: str):
    call, kind, told = MISUSES[name]
    async with engine.open() as client:
        with pytest.raises(kind) as raised:
            await call(client)
        assert told in str(raised.value)
        assert client.ledger().published == 0


@pytest.mark.parametrize("how", ["plain", "headers", "middleware", "keyless", "blocking"])
@pytest.mark.parametrize(
    ("bad", "kind", "told"),
    [
        (lambda key: Noted(key=key, n=object()), UsageError, "(Noted): Noted cannot be encoded, so it was not sent: "),
        (lambda key: None, UsageError, "(NoneType): publish takes events, and NoneType is none"),
        (lambda key: Seen(key=key), UsageError, "(Seen): publish takes events, and Seen is none; use execute"),
        (lambda key: Noted(key="k" * 2000), InvalidKey, "(Noted): a key of more than 1,024 bytes"),
        (lambda key: Noted(key=key, n="x" * 2_000_000), MessageTooLarge, "(Noted): Noted: the encoded message has 2,0"),
    ],
    ids=["value", "nothing", "command", "key", "large"],
)
async def test_one_of_many_that_is_not_sound_is_named_and_those_before_it_went_out(
    engine: Engine, key: str, how: str, bad: Callable[[str], Any], kind: type[UsageError], told: str
):
    key = f"{key[-40:]}"
    events = [Unkeyed(n=n) if how == "keyless" else Noted(key=key, n=n) for n in range(800)]
    events[616] = bad(key)
    middleware = [lambda message, headers: None] if how == "middleware" else []
    async with engine.open(middleware=middleware) as client:
        headers = {"a": "b"} if how == "headers" else None
        with pytest.raises(kind) as raised:
            await (in_a_thread(engine, events) if how == "blocking" else client.publish_many(events, headers=headers))
        assert str(raised.value).startswith(f"event 617 of 800 {told}")
        assert str(raised.value).endswith("; the 616 events before it went out, none after it")
        if how != "blocking":
            assert (await client.flush(30.0)).handled == client.ledger().published == 616


async def in_a_thread(engine: Engine, events: list[Any]) -> None:
    def publish() -> None:
        with engine.open_blocking() as client:
            client.publish_many(events)

    await asyncio.to_thread(publish)


async def test_many_events_that_are_none_are_told_also_where_a_middleware_sees_each(engine: Engine):
    async with engine.open(middleware=[Validation()]) as client:
        with pytest.raises(UsageError, match="publish_many takes a list of events, and got one Noted; use publish"):
            await client.publish_many(EVENT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"on_full": "explode"}, "on_full='explode': it is 'wait', 'reject' or 'drop_oldest'"),
        ({"on_pressure": 3}, "on_pressure=3: give a function of (under_pressure), which is True or False"),
        ({"close_timeout": math.nan}, "close_timeout=nan: give seconds from 0 on"),
        ({"close_timeout": "30"}, "close_timeout='30': give seconds from 0 on"),
        ({"middleware": 3}, "middleware=3: give a list: middleware=[…]"),
        ({"middleware": None}, "middleware=None: give a list: middleware=[…]"),
        ({"middleware": [Validation]}, "middleware=[Validation]: that is a class; make one: Validation(…)"),
        ({"middleware": ["x"]}, "'x': a middleware of a client is a plain `def` of (message, headers)"),
        ({"middleware": [lambda message: None]}, "takes (message, headers), and "),
    ],
)
def test_an_option_that_makes_no_sense_is_told_where_it_is_written(engine: Engine, options: dict[str, Any], told: str):
    with pytest.raises(UsageError) as raised:
        engine.open(**options)
    assert told in str(raised.value)


CALLS: dict[str, Callable[[Client], Any]] = {
    "publish": lambda c: c.publish(EVENT),
    "publish_many": lambda c: c.publish_many([EVENT]),
    "schedule": lambda c: c.schedule(EVENT, delay=1),
    "cancel": lambda c: c.cancel(f"{'0' * 32}-0-1"),
    "flush": lambda c: c.flush(),
    "execute": lambda c: c.execute(COMMAND),
    "stream": lambda c: c.stream(COMMAND),
    "subscribe": lambda c: c.subscribe(Noted),
    "session": lambda c: c.session("a").__aenter__(),
    "status": lambda c: c.status(),
    "dead_letters": lambda c: c.dead_letters(),
    "redrive": lambda c: c.redrive(),
    "purge": lambda c: c.purge(),
}


async def test_every_call_on_a_client_that_was_closed_says_so(engine: Engine):
    async with engine.open() as client:
        pass
    for name, call in CALLS.items():
        with pytest.raises(ClientClosed) as raised:
            await call(client)
        assert str(raised.value) == "the client is closed; use it inside its `async with` block", name
    assert client.ledger().published == 0
