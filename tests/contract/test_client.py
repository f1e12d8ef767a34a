"""What a client promises to its program, whatever the program does: nothing forgotten quietly, no call that hangs."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import ChainMap, UserDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import pytest

from shardbus import (
    Bus,
    BusRejected,
    Client,
    ClientClosed,
    Command,
    CommandFailed,
    Context,
    Event,
    NotDelivered,
    Retry,
    UsageError,
    connect,
)
from shardbus.config import Limits
from shardbus.local import run_local
from shardbus.retry import GiveUp, RetryIn
from shardbus.testing import MemoryStore


class Step(Event, key="key"):
    key: str
    n: int = 0
    payload: bytes = b""


class Ask(Command[int], key="key"):
    key: str


bus = Bus("client")
handled: list[tuple[int, dict[str, str]]] = []
release = asyncio.Event()


@bus.on(Step)
async def handle(event: Step, context: Context) -> None:
    if event.key == "stuck":
        await asyncio.sleep(3600)
    handled.append((event.n, dict(context.headers)))
    if event.key == "relay":
        await context.publish(Step(key="relayed", n=10 * event.n), headers=KINDS_OF_HEADERS["text"])


@bus.command(Ask)
async def answer(command: Ask) -> int:
    if command.key == "stuck":
        await asyncio.sleep(3600)
    if command.key == "surrogate":
        raise ValueError("half of \udcff a pair")
    return 1


@pytest.fixture(autouse=True)
def nothing_handled() -> None:
    handled.clear()


@asynccontextmanager
async def running(limits: Limits | None = None, close_timeout_s: float = 5.0) -> AsyncIterator[Client]:
    async with run_local(
        bus, stores=[MemoryStore()], limits=limits or Limits(), close_timeout_s=close_timeout_s
    ) as client:
        yield client


# -- what is written wrongly


@pytest.mark.parametrize(
    ("open_it", "told"),
    [(bus.local, "async with bus.local() as client"), (connect, "async with shardbus.connect() as client")],
    ids=["local", "connect"],
)
async def test_whoever_forgets_async_with_is_told_to_write_it(open_it: Callable[[], Any], told: str):
    with pytest.raises(UsageError) as raised:
        await open_it()
    assert str(raised.value) == f"write: {told}"
    with pytest.raises(UsageError, match="write: async with"), open_it():
        pass
    for name in ("publish", "execute", "flush", "dead_letters"):
        with pytest.raises(UsageError, match="write: async with"):
            getattr(open_it(), name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        open_it().nonsense  # noqa: B018 - asking for it is the test


async def test_a_class_is_not_published_in_the_place_of_one_of_its_events():
    async with running() as client:
        with pytest.raises(UsageError, match=r"got the class Step; make one: Step\(…\)"):
            await client.publish(Step)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="got the class Ask"):
            await client.execute(Ask)  # type: ignore[arg-type]


@pytest.mark.parametrize("open_it", [bus.local, connect], ids=["local", "connect"])
def test_a_policy_for_a_full_outbox_that_is_none_is_refused_at_the_call(open_it: Callable[..., Any]):
    with pytest.raises(UsageError, match="on_full='drop-oldest': it is 'wait', 'reject' or 'drop_oldest'"):
        open_it(on_full="drop-oldest")


async def test_a_command_that_no_handler_takes_has_a_type_of_error_of_its_own():
    other = Bus("other")
    async with other.local() as client:
        with pytest.raises(CommandFailed, match="no handler of this application takes the command 'Ask'") as raised:
            await client.execute(Ask(key="a"))
    assert (raised.value.error_type, raised.value.remote_traceback) == ("UnknownCommand", "")


# -- a bus that breaks


class Defect(Retry):
    """A policy with a defect: the lanes that ask it are not to be trusted any more."""

    def decide(self, failures: int, error: BaseException, chance: float) -> RetryIn | GiveUp:
        raise ZeroDivisionError("a defect")


@pytest.mark.parametrize("wait", ["flush", "execute", "leave"])
async def test_a_defect_of_a_local_bus_ends_its_client_and_is_raised_where_the_block_is_left(wait: str):
    other = Bus("defect")

    @other.on(Step, retry=Defect())
    async def fail(event: Step) -> None:
        raise ValueError

    other.command(Ask)(answer)

    async def use() -> None:
        async with other.local(close_timeout=3600) as client:
            await client.publish(Step(key="a"))
            if wait == "leave":
                return
            with pytest.raises(BusRejected, match="has a defect and cannot go on: ZeroDivisionError: a defect"):
                await (client.flush() if wait == "flush" else client.execute(Ask(key="stuck"), timeout=3600))
            with pytest.raises(BusRejected):
                await client.publish(Step(key="a"))

    with pytest.raises(ZeroDivisionError, match="a defect"):
        await use()


# -- a bus that goes silent, and one that ends


async def test_a_client_that_waits_for_a_silent_bus_says_so_once_and_when_it_is_back(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "shardbus.client")
    async with running() as client:

        def be_silent() -> None:
            for _ in range(100):  # ticks, in one turn of the loop: nothing can be heard between them
                client._note_silence()

        be_silent()
        assert caplog.messages == []  # nothing waits for it
        await client.publish(Step(key="a"))
        be_silent()
        (told,) = caplog.messages
        assert "waiting for the bus at local" in told
        assert "(not finished: 1 event, 0 commands)" in told
        await client.flush(10)
        assert caplog.messages == [told, "the bus at local is back"]
        asking = asyncio.create_task(client.execute(Ask(key="a"), timeout=10))
        await asyncio.sleep(0)
        be_silent()
        assert "(not finished: 0 events, 1 command)" in caplog.messages[-1]
        await asking
        await client.flush(10)


async def test_a_client_waits_for_no_command_that_its_caller_has_given_up(caplog: pytest.LogCaptureFixture):
    async with running() as client:
        asking = asyncio.create_task(client.execute(Ask(key="a"), timeout=10))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        for _ in range(100):
            client._note_silence()
        assert caplog.messages == []


async def test_a_local_bus_says_what_ends_with_it(caplog: pytest.LogCaptureFixture):
    other = Bus("ends")

    @other.on(Step, retry=Retry(attempts=1))
    async def fail(event: Step) -> None:
        raise ValueError

    async with other.local() as client:
        await client.publish(Step(key="a"))
        assert (await client.flush(10)).dead == 1
    assert "dead letters: 1, waiting events: 0" in caplog.messages[-1]


# -- publishing many


@pytest.mark.parametrize("shards", [1, 3])
async def test_many_events_of_many_keys_reach_their_shards_in_order_with_their_stamps(shards: int):
    other = Bus("many")
    seen: dict[str, list[int]] = {}

    class Tock(Event, key="key"):
        key: str
        n: int

    @other.on(Step)
    async def step(event: Step) -> None:
        seen.setdefault(event.key, []).append(event.n)

    @other.on(Tock)
    async def tock(event: Tock) -> None:
        seen.setdefault(event.key, []).append(event.n)

    published = 0
    ordinals: dict[str, int] = {}
    async with run_local(other, shards=shards, stores=[MemoryStore() for _ in range(shards)]) as client:
        for length in (1, 511, 512, 513, 1, 1400, 3, 1024):
            events: list[Event] = []
            stamps = []
            for _ in range(length):
                key = f"k{published * published % 41}"
                # Some calls mix types, and some an event that is too large for a column of small ones.
                mixed = length == 513 and published % 7 == 0
                payload = bytes(5000) if length == 1400 and published % 300 == 0 else b""
                events.append(Tock(key=key, n=published) if mixed else Step(key=key, n=published, payload=payload))
                ordinals[key] = ordinals.get(key, 0) + 1
                stamps.append(ordinals[key])
                published += 1
            await client.publish_many(events, ordinals=stamps)
        ledger = await client.flush(20)
        evidence = await client.evidence([client.publisher])
    assert (ledger.published, ledger.handled) == (published, published)
    assert all(numbers == sorted(numbers) for numbers in seen.values())
    assert sorted(number for numbers in seen.values() for number in numbers) == list(range(published))
    assert sum(one.distinct for one in evidence) == published
    assert all(one.repeats == one.out_of_order == one.missing == 0 for one in evidence)


async def test_few_large_events_among_many_small_ones_are_all_published():
    other = Bus("large")
    seen: list[int] = []

    @other.on(Step)
    async def step(event: Step) -> None:
        seen.append(event.n)

    large = bytes(250_000)
    async with run_local(other, shards=2, stores=[MemoryStore(), MemoryStore()]) as client:
        for call in range(2):  # what is large in a chunk of 512 goes to one shard
            numbers = range(call * 4096, (call + 1) * 4096)
            events = [Step(key=f"k{n % 256}", n=n, payload=b"" if n % 512 else large) for n in numbers]
            await client.publish_many(events)
        ledger = await client.flush(20)
    assert (ledger.published, ledger.handled) == (8192, 8192)
    assert sorted(seen) == list(range(8192))


class Nested(Event, key="key"):
    key: str
    inner: Any


async def test_a_body_nested_as_deep_as_it_can_be_encoded_disturbs_nobody_else():
    other = Bus("nested")
    seen: list[str] = []
    other.on(Nested)(lambda event: seen.append(event.key))

    async def publish_deeper_and_deeper(client: Client) -> None:
        inner: Any = None
        for depth in itertools.count():
            inner = [inner]
            if depth % 10 == 0 or depth > 700:  # the limit is Python's, 1,000, less where this stands on the stack
                await client.publish_many([Nested(key=f"before {depth}", inner=None), Nested(key="", inner=inner)])

    async with run_local(other, shards=1, stores=[MemoryStore()]) as client:
        with pytest.raises(UsageError, match="recursion"):
            await publish_deeper_and_deeper(client)
        await client.publish(Nested(key="last", inner=None))
        ledger = await client.flush(20)
    assert ledger.handled + ledger.dead == ledger.published
    assert "last" in seen
    assert seen.count("") >= 70


# -- acks


async def test_what_somebody_waits_for_is_acked_at_once_and_the_rest_a_little_later():
    patient = Limits(ack_delay_s=100.0, ping_interval_s=1e9, session_silence_s=1e10)
    async with running(patient) as client:
        await client.publish(Step(key="a"))
        assert (await client.flush(20)).handled == 1
        await client.publish(Step(key="a"))
        while len(handled) < 2:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert client.ledger().handled == 1  # nobody has asked
    assert client.ledger().handled == 2  # leaving does
    async with running() as client:
        await client.publish(Step(key="a"))
        while client.ledger().handled < 1:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)


async def test_an_ack_says_nothing_that_the_evidence_does_not():
    patient = Limits(ack_delay_s=100.0, ping_interval_s=1e9, session_silence_s=1e10)
    async with running(patient) as client:
        for _ in range(3):
            await client.publish(Step(key="a"), ordinal=1, intended_ns=1)
            await asyncio.sleep(0.01)  # handled, or not, when the question comes
            await client.flush(20)
        evidence = await client.evidence([client.publisher])
        assert [(one.distinct, one.repeats, one.samples) for one in evidence] == [(1, 2, 3)]


# -- leaving


async def test_leaving_the_block_refuses_what_others_still_publish_and_loses_nothing():
    published = 0

    async def publish_on(client: Client) -> None:
        nonlocal published
        while True:
            await client.publish(Step(key=f"k{published % 50}"))
            published += 1

    async with running() as client:
        publishing = asyncio.create_task(publish_on(client))
        await asyncio.sleep(0.05)
    with pytest.raises(ClientClosed):
        await publishing
    assert published > 0
    assert len(handled) == published == client.ledger().handled


async def test_a_flush_ends_when_the_client_does():
    async with running(close_timeout_s=0.1) as client:
        await client.publish(Step(key="stuck"))
        flushing = asyncio.create_task(client.flush())
        await asyncio.sleep(0)
        await client.abort()
    with pytest.raises(NotDelivered):
        await asyncio.wait_for(flushing, 5)


async def test_a_question_that_is_under_way_when_the_client_closes_says_so():
    async with running() as client:
        assert client._control is not None
        client._control.close()  # so that no answer comes
        asking = asyncio.create_task(client.ask("status", b"", timeout=30))
        await asyncio.sleep(0)
        await client.abort()
    with pytest.raises(ClientClosed):
        await asyncio.wait_for(asking, 5)


async def test_a_command_that_nobody_waits_for_any_more_does_not_hold_up_leaving():
    async with running(close_timeout_s=0.1) as client:
        assert await client.execute(Ask(key="a")) == 1  # the shard and this client know each other
        with pytest.raises(TimeoutError, match="may have run"):
            await client.execute(Ask(key="stuck"), timeout=0.05)
        await asyncio.wait_for(client.flush(), 5)
        # What runs in the shard is cancelled with it; the client has nothing left to deliver.
        assert client.ledger().in_flight == 0
        await client.abort()


# -- sizes


async def test_tasks_that_publish_large_events_at_once_fill_no_frame_beyond_its_limit():
    async with running() as client:
        async with asyncio.TaskGroup() as group:
            for n in range(120):
                group.create_task(client.publish(Step(key=f"k{n}", n=n, payload=bytes(300_000))))
        ledger = await client.flush(30)
    assert ledger.handled == 120


async def test_a_turn_full_of_headers_arrives():
    headers = {f"header-{number}": "v" * 4000 for number in range(26)}
    async with running() as client:
        async with asyncio.TaskGroup() as group:
            for n in range(512):
                group.create_task(client.publish(Step(key=f"k{n}", n=n), headers=headers))
        assert (await client.flush(30)).handled == 512
    assert all(seen == headers for _, seen in handled)


async def test_headers_are_taken_as_they_are_when_publish_is_called():
    headers = {"n": ""}
    async with running() as client:
        for n in range(5):
            headers["n"] = str(n)
            await client.publish(Step(key="a", n=n), headers=headers)
        headers["n"] = "changed"
        await client.flush(5)
    assert handled == [(n, {"n": str(n)}) for n in range(5)]


class Text(str):
    """A text of a class of its own, which has no encoding."""


KINDS_OF_HEADERS = {
    "text": {"n": Text("1"), Text("m"): "2"},
    "chain": ChainMap({"n": "1"}, {"m": "2"}),
    "user": UserDict({"n": "1", "m": "2"}),
    "proxy": MappingProxyType({"n": "1", "m": "2"}),
}


@pytest.mark.parametrize("headers", KINDS_OF_HEADERS.values(), ids=KINDS_OF_HEADERS.keys())
async def test_headers_of_any_kind_arrive_and_hold_up_nobody(headers: Any):
    """Whatever a web framework calls its headers: what cannot be encoded would stay at the head of its outbox for ever."""
    async with running() as client:
        await client.publish(Step(key="a", n=1), headers=headers)
        await client.publish_many([Step(key="a", n=2), Step(key="b", n=3)], headers=headers)
        await client.schedule(Step(key="a", n=4), delay=-1, headers=headers)
        assert await client.execute(Ask(key="a"), headers=headers) == 1
        await client.publish(Step(key="relay", n=5), headers=headers)
        ledger = await client.flush(10)
        while len(handled) < 6:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.01)
    assert ledger.in_flight == 0
    plain = {"n": "1", "m": "2"}
    assert sorted(n for n, _ in handled) == [1, 2, 3, 4, 5, 50]
    assert all(seen.items() >= plain.items() for _, seen in handled)


async def test_leaving_with_nothing_but_commands_under_way_says_nothing_of_events():
    async with running(close_timeout_s=0.1) as client:
        asking = asyncio.create_task(client.execute(Ask(key="stuck"), timeout=30))
        await client.publish(Step(key="a"))
        ledger = await client.flush(5.0)
        assert (ledger.handled, ledger.in_flight, asking.done()) == (1, 0, False)
    with pytest.raises(ClientClosed):
        await asking


async def test_a_flush_that_ends_in_time_says_nothing_of_what_was_published_since():
    async with running(close_timeout_s=0.1) as client:
        asking = asyncio.create_task(client.execute(Ask(key="stuck"), timeout=30))
        await client.publish(Step(key="a"))
        assert (await client.flush(5.0)).handled == 1
        flushing = asyncio.create_task(client.flush(0.2))
        await asyncio.sleep(0)
        await client.publish(Step(key="stuck"))
        assert (await flushing).in_flight == 1
        with pytest.raises(NotDelivered, match="1 event "):
            await client.flush(0.05)
        await client.abort()
    with pytest.raises(ClientClosed):
        await asking


# -- what is refused where it is called


@pytest.mark.parametrize("stamp", [-1, 2**63, 1.5, "1", True])
async def test_a_stamp_that_is_none_is_refused_and_nothing_is_published(stamp: object):
    async with running() as client:
        with pytest.raises(UsageError, match="stamp"):
            await client.publish(Step(key="a"), ordinal=stamp)  # type: ignore[arg-type]
        if stamp is not True:
            with pytest.raises(UsageError, match="stamp"):
                await client.publish_many([Step(key="a"), Step(key="b")], intended_ns=[1, stamp])  # type: ignore[list-item]
        assert (await client.flush(5)).published == 0
    assert handled == []


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), 1e11])
async def test_a_timeout_that_makes_no_sense_is_refused(timeout: float):
    async with running() as client:
        with pytest.raises(UsageError, match="timeout"):
            await client.execute(Ask(key="a"), timeout=timeout)


async def test_a_header_that_is_no_sound_text_is_refused():
    async with running() as client:
        with pytest.raises(UsageError, match="header"):
            await client.publish(Step(key="a"), headers={"name": "\udcff"})


async def test_events_and_commands_are_not_mixed_up_whatever_came_before():
    async with running() as client:
        await client.execute(Ask(key="a"))
        await client.publish(Step(key="a"))
        with pytest.raises(UsageError, match="use execute"):
            await client.publish(Ask(key="a"))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="use publish"):
            await client.execute(Step(key="a"))  # type: ignore[arg-type]


# -- commands


async def test_no_more_commands_are_under_way_than_the_limit_says():
    limits = Limits(commands_in_flight_max=10)
    async with running(limits, close_timeout_s=0.1) as client:
        tasks = [asyncio.create_task(client.execute(Ask(key="stuck"), timeout=60)) for _ in range(100)]
        await asyncio.sleep(0.05)
        assert sum(len(outbox.commands) for outbox in client._outboxes) == 10
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await client.abort()


async def test_an_error_that_is_no_sound_text_reaches_the_caller_of_a_command():
    async with running() as client:
        with pytest.raises(CommandFailed, match="half of"):
            await client.execute(Ask(key="surrogate"))
        assert await client.execute(Ask(key="a")) == 1
