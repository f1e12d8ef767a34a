"""The blocking client over the local engine: what its calls promise to threads, and how they end."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from shardbus import (
    Bus,
    BusRejected,
    BusUnreachable,
    Client,
    ClientClosed,
    Command,
    CommandFailed,
    ConfigError,
    Context,
    DeadLetterFilter,
    Event,
    InvalidKey,
    MessageTooLarge,
    NotDelivered,
    OutboxFull,
    Retry,
    Session,
    UsageError,
    blocking,
    connect,
)
from shardbus.blocking import BlockingClient, BlockingSession
from shardbus.config import Limits
from shardbus.local import run_local
from shardbus.packing import Packed
from shardbus.testing import MemoryStore

bus = Bus("blocking")
handled: list[tuple[str, int, Any]] = []
seen_headers: list[dict[str, str]] = []
gate = threading.Event()


class Step(Event, key="key"):
    key: str
    n: int = 0
    several: tuple[int, ...] = ()
    payload: bytes = b""


class Bad(Event, key="key"):
    key: str


class Free(Event):
    n: int


class Count(Command[int], key="key"):
    key: str


class Fail(Command[None], key="key"):
    key: str


@bus.on(Step)
async def step(event: Step, context: Context) -> None:
    while event.key == "stuck" and not gate.is_set():  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(0.005)
    handled.append((event.key, event.n, event.several))
    seen_headers.append(context.headers)


@bus.on(Free)
async def free(event: Free) -> None:
    handled.append(("", event.n, ()))


@bus.on(Bad, retry=Retry(attempts=1))
async def bad(event: Bad) -> None:
    raise ValueError("bad")


@bus.command(Count)
async def count(command: Count) -> int:
    while command.key == "stuck" and not gate.is_set():  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(0.005)
    return sum(key == command.key for key, _, _ in handled)


@bus.command(Fail)
async def fail(command: Fail) -> None:
    raise KeyError("no such thing")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    handled.clear()
    seen_headers.clear()
    gate.clear()
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "shardbus-client"]


SMALL = Limits(
    batch_events_max=4,
    outbox_events_max=32,
    session_credit_events_max=16,
)


def running(
    limits: Limits | None = None, on_full: Any = "wait", close_timeout_s: float = 5.0, shards: int = 1
) -> BlockingClient:
    block = run_local(
        bus,
        shards=shards,
        stores=[MemoryStore() for _ in range(shards)],
        limits=limits or Limits(),
        close_timeout_s=close_timeout_s,
        on_full=on_full,
    )
    return BlockingClient(block, hands_over=on_full != "reject")


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():  # the test ends by its time-out
        time.sleep(0.002)


def fill(client: BlockingClient) -> int:
    """Publish to a stuck key until there is no more room; returns how many were published."""
    published = 0
    while True:
        try:
            client.publish(Step(key="stuck", n=published), timeout=0.1)
            published += 1
        except TimeoutError as error:
            assert str(error).startswith("Step: the outbox was full for 0.1 s, so nothing was published")  # noqa: PT017 - it ends the loop
            if not client._has_room:  # and it was not this thread that stood still
                return published


@contextmanager
def interrupted_while(condition: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C for what the main thread does in the block, once the condition holds."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupted = threading.Event()

    def interrupt() -> None:
        wait_for(condition)
        os.kill(os.getpid(), signal.SIGINT)
        # Python does not see one that comes in the instant before a lock is waited for; a person presses the keys again.
        while not interrupted.wait(5.0):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        yield
        raise AssertionError("it was not interrupted")
    except KeyboardInterrupt:
        pass
    finally:
        interrupted.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


# -- the calls


_SHARED = [name for name in vars(BlockingClient) if hasattr(Client, name) and not name.startswith("_") and name != "close"]
_OF_SESSIONS = [name for name in vars(Session) if not name.startswith("_")]
_STAMPS = ("ordinal", "ordinals", "intended_ns")  # for load generators


def test_no_call_of_the_asyncio_client_is_missing():
    inside = {"abort", "ask", "end", "evidence", "has_room", "pack", "publish_packed", "start", "tick"}
    assert {name for name in vars(Client) if not name.startswith("_")} - set(dir(BlockingClient)) <= inside
    assert set(_OF_SESSIONS) <= set(dir(BlockingSession))


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (connect, blocking.connect),
        (Bus.local, blocking.local),
        *((getattr(Client, name), getattr(BlockingClient, name)) for name in _SHARED),
        *((getattr(Session, name), getattr(BlockingSession, name)) for name in _OF_SESSIONS),
    ],
    ids=["connect", "local", *_SHARED, *(f"session.{name}" for name in _OF_SESSIONS)],
)
def test_every_call_takes_what_its_model_takes(model: Callable[..., Any], call: Callable[..., Any]):
    wanted = [one for one in inspect.signature(model).parameters.values() if one.name not in _STAMPS]
    found = list(inspect.signature(call).parameters.values())
    if call is blocking.local:
        wanted, found = wanted[1:], found[1:]  # the bus itself
    if call in (BlockingClient.publish, BlockingClient.subscribe):
        found = [one for one in found if one.name != "timeout"]  # asyncio has its own
    assert [(one.name, one.kind, one.default) for one in found] == [(one.name, one.kind, one.default) for one in wanted]


def test_a_script_publishes_executes_flushes_and_looks_at_the_counts():
    with blocking.local(bus, shards=2) as client:
        client.publish(Step(key="a", n=1), headers={"trace": "7"})
        client.publish(Free(n=1))
        client.publish_many([Step(key="b", n=number) for number in range(1000)])
        assert client.execute(Count(key="b")) == 1000
        ledger = client.flush()
        assert (ledger.published, ledger.handled, ledger.in_flight) == (1002, 1002, 0)
        assert client.ledger() == ledger == client.statistics().ledger
        assert client.status()["healthy"]
    assert {"trace": "7"} in seen_headers


def test_dead_letters_are_found_redriven_and_purged():
    with blocking.local(bus) as client:
        for key in ("a", "b", "c"):
            client.publish(Bad(key=key))
        assert client.flush(10).dead == 3
        letters = client.dead_letters()
        assert [letter.key for letter in letters] == ["a", "b", "c"]
        assert client.redrive(DeadLetterFilter(key=("a",))) == 1
        assert client.purge(DeadLetterFilter(key=("b",))) == 1
        wait_for(lambda: len(client.dead_letters()) == 2)
        assert client.purge() == 2


def test_what_a_command_raises_comes_to_its_caller_with_the_remote_traceback():
    with blocking.local(bus) as client:
        with pytest.raises(CommandFailed, match="no such thing") as raised:
            client.execute(Fail(key="a"))
        assert "in fail" in raised.value.remote_traceback
        with pytest.raises(TimeoutError, match=r"no reply within 0\.05 s; it may have run"):
            client.execute(Count(key="stuck"), timeout=0.05)
        gate.set()
        assert client.execute(Count(key="stuck")) == 0


@pytest.mark.parametrize("on_full", ["wait", "reject", "drop_oldest"])
def test_a_command_comes_after_what_its_thread_published_before(on_full: Any):
    with running(on_full=on_full) as client:
        for number in range(1, 300):
            client.publish(Step(key="a", n=number, payload=bytes(2000 if number % 50 == 0 else 0)))
            if number % 7 == 0:
                assert client.execute(Count(key="a")) == number
    assert [n for _, n, _ in handled] == list(range(1, 300))


def test_an_event_is_published_as_it_was_when_publish_returned():
    with blocking.local(bus) as client:
        several = [1, 2]
        event = Step(key="a", several=several)  # type: ignore[arg-type]  # nothing checks it here
        client.publish(event)
        several.append(3)
        client.flush()
        headers = {"a": "1"}
        client.publish(event, headers=headers)
        headers["a"] = "2"
    assert [several for _, _, several in handled] == [(1, 2), (1, 2, 3)]
    assert seen_headers == [{}, {"a": "1"}]


@pytest.mark.parametrize("on_full", ["wait", "reject"])
@pytest.mark.parametrize(
    ("event", "headers", "kind", "told"),
    [
        (Step(key=1.5), None, InvalidKey, "1.5 is a float"),
        (Step(key="k" * 1025), None, InvalidKey, "more than 1,024 bytes"),
        (Step(key="a", payload=bytes(1024 * 1024)), None, MessageTooLarge, "the limit is 1,048,576"),
        (Step(key="a", n=object()), None, UsageError, "cannot be encoded, so it was not sent"),
        (Step(key="a"), {"a": 1}, UsageError, "names and values are text"),
        (Step, None, UsageError, "got the class Step"),
        (Count(key="a"), None, UsageError, "publish takes events, and Count is none; use execute"),
        ("Step", None, UsageError, "publish takes events, and str is none"),
    ],
)
def test_an_event_that_cannot_be_published_is_refused_at_the_call(
    on_full: Any, event: Any, headers: Any, kind: type[Exception], told: str
):
    with running(on_full=on_full) as client:
        client.publish(Step(key="a"))
        with pytest.raises(kind, match=told):
            client.publish(event, headers=headers)
        assert client.flush().published == 1


# -- many threads


def test_threads_share_a_client_and_each_keeps_its_order():
    threads, each = 8, 1500
    with blocking.local(bus, shards=2) as client:

        def work(thread: int) -> int:
            for number in range(each):
                event = Step(key=f"t{thread}", n=number, payload=bytes(3000 if number % 97 == 0 else 0))
                if number % 200 == 0:
                    client.publish_many([event])
                else:
                    client.publish(event)
            return client.execute(Count(key=f"t{thread}"), timeout=60)

        with ThreadPoolExecutor(threads) as pool:
            assert list(pool.map(work, range(threads))) == [each] * threads
        assert client.flush().handled == threads * each
    for thread in range(threads):
        assert [n for key, n, _ in handled if key == f"t{thread}"] == list(range(each))


def test_what_waits_for_a_stuck_shard_does_not_hold_up_other_threads():
    with running(SMALL, shards=2) as client, ThreadPoolExecutor(1) as pool:
        published = fill(client)
        waiting = pool.submit(client.publish, Step(key="stuck", n=published))
        keys = [f"k{number}" for number in range(64)]
        shard = {key: client._client._table.shard_of(key) for key in [*keys, "stuck"]}  # type: ignore[union-attr]
        others = [key for key in keys if shard[key] != shard["stuck"]]
        for _ in range(10):
            for key in others:
                client.publish(Step(key=key))
        assert client.execute(Count(key=others[0])) == 10
        assert not waiting.done()
        gate.set()
        waiting.result()
        assert client.flush(30).handled == published + 1 + 10 * len(others)


# -- room


def test_what_is_handed_over_while_the_loop_takes_over_is_within_the_bound(monkeypatch: pytest.MonkeyPatch):
    with running(SMALL) as client:
        publish_packed = client._client.publish_packed

        def publish(events: list[Any]) -> None:
            publish_packed(events)
            packed = client._client.pack(Step(key="stuck"))
            while client._hand_over(packed):  # as another thread's publisher may, before the loop has gone on
                pass

        monkeypatch.setattr(client._client, "publish_packed", publish)
        client.publish(Step(key="stuck"))
        wait_for(lambda: not (client._has_room or client._handed))
        held = client.ledger().in_flight
        assert SMALL.outbox_events_max <= held <= SMALL.outbox_events_max + blocking._HANDED_EVENTS_MAX
        gate.set()
        assert client.flush(30).handled == held


def test_publish_waits_for_room_and_the_outbox_stays_within_its_bound():
    with running(SMALL) as client:
        published = fill(client)
        # What was handed over before the loop saw that the outbox is full comes on top of its bound.
        assert published <= SMALL.outbox_events_max + blocking._HANDED_EVENTS_MAX
        assert client.ledger().in_flight == published
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.publish, Step(key="stuck", n=published))
            wait_for(lambda: client._calls)
            gate.set()
            waiting.result()
        assert client.flush(30).handled == published + 1
    assert [n for _, n, _ in handled] == list(range(published + 1))


def test_a_full_outbox_refuses_where_it_was_told_to():
    with running(SMALL, "reject") as client:
        published = 0
        while not client.statistics().rejected:
            try:
                client.publish(Step(key="stuck", n=published))
                published += 1
            except OutboxFull as error:
                assert error.held_events == published  # noqa: PT017 - it ends the loop
        assert published <= SMALL.outbox_events_max
        assert client.statistics().rejected == 1
        gate.set()
        assert client.flush(30).handled == published


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_time_out_that_is_none_is_refused(timeout: float):
    with running(on_full="reject") as client, pytest.raises(UsageError, match="give seconds above 0"):
        client.publish(Step(key="a"), timeout=timeout)


def test_the_loop_looks_by_itself_where_an_interrupt_kept_a_publisher_from_waking_it():
    with blocking.local(bus) as client:
        client.flush()
        client._woken = True  # as if somebody had woken it
        client.publish(Step(key="a"))
        wait_for(lambda: handled)


@pytest.mark.parametrize("call", ["execute", "flush", "leave"])
def test_what_was_handed_over_comes_before_every_later_call(monkeypatch: pytest.MonkeyPatch, call: str):
    monkeypatch.setattr(blocking, "_LOOK_S", 3600.0)
    with blocking.local(bus) as client:
        client._woken = True  # as above
        client.publish(Step(key="a"))
        if call == "execute":
            assert client.execute(Count(key="a")) == 1
        elif call == "flush":
            assert client.flush().handled == 1
    assert len(handled) == 1


def test_every_burst_wakes_the_loop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocking, "_LOOK_S", 3600.0)
    with blocking.local(bus) as client:
        for number in range(1, 4):
            client.publish(Step(key="a"))
            client.publish(Step(key="a"))
            wait_for(lambda number=number: len(handled) == 2 * number)


def test_nothing_is_handed_over_once_the_client_closes():
    with blocking.local(bus) as client:
        packed = client._client.pack(Step(key="a"))
        assert client._hand_over(packed)
    assert not client._hand_over(packed)  # a thread that had looked before


def test_an_event_that_cannot_be_published_takes_no_other_along(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocking, "_LOOK_S", 3600.0)
    with blocking.local(bus) as client:

        def fails_once(events: Iterator[Packed]) -> None:
            monkeypatch.undo()
            client._client.publish_packed([next(events)])
            next(events)
            raise MemoryError

        client.flush()
        monkeypatch.setattr(client._client, "publish_packed", fails_once)
        client._woken = True  # so that they are taken over together
        for number in range(4):
            client.publish(Step(key="a", n=number))
        with pytest.raises(MemoryError):
            client.flush()
        client.flush()
    assert [n for _, n, _ in handled] == [0, 2, 3]


def test_a_signal_handler_uses_the_client_also_where_it_interrupts_a_publish():
    def use(*_: object) -> None:
        client.publish(Step(key="signal"))
        client.flush()  # waits for the loop
        client.close()

    before = signal.signal(signal.SIGUSR1, use)
    try:
        with blocking.local(bus) as client:
            client.flush()
            client.publish(Step(key="signal"))
            with client._lock:  # as in the midst of handing over
                signal.raise_signal(signal.SIGUSR1)
        assert len(handled) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- interrupts


def test_nothing_goes_before_an_interrupted_call_that_is_yet_to_be_cancelled():
    stands_still, go_on = threading.Event(), threading.Event()
    with running(SMALL) as client:
        published = fill(client)

        def stand_still() -> None:
            stands_still.set()
            go_on.wait()  # the test ends by its time-out

        def is_waiting() -> bool:
            if not any(call.task for call in list(client._calls)):
                return False
            client._tell_loop(stand_still)
            return stands_still.wait()

        try:
            with interrupted_while(is_waiting):
                client.publish(Step(key="stuck", n=published))
            client._has_room = True  # as the end of another call may find
            assert not client._hand_over(client._client.pack(Step(key="stuck", n=published + 1)))
        finally:
            go_on.set()
        gate.set()
        client.publish(Step(key="stuck", n=published + 1))
        client.flush(30)
    assert [n for _, n, _ in handled] == [*range(published), published + 1]


def test_an_interrupt_cancels_the_call_that_waits_and_the_client_goes_on():
    with running(SMALL) as client:
        with interrupted_while(lambda: client._calls):
            client.execute(Count(key="stuck"), timeout=600)
        wait_for(lambda: not client._calls)
        published = fill(client)
        with interrupted_while(lambda: client._calls):
            client.publish(Step(key="stuck", n=published))
        wait_for(lambda: not client._calls)
        with interrupted_while(lambda: client._calls):
            client.flush()
        wait_for(lambda: not client._calls)
        assert not client._interrupted
        assert client.ledger().published == published
        gate.set()
        client.publish(Step(key="stuck", n=published))
        assert client.flush(30).handled == published + 1
    assert [n for _, n, _ in handled] == list(range(published + 1))


def test_a_call_that_was_interrupted_twice_is_cancelled_all_the_same(monkeypatch: pytest.MonkeyPatch):
    with running(SMALL) as client:
        tell_loop = client._tell_loop

        def interrupted_again(do: Callable[..., object], *arguments: Any) -> None:
            if do == client._cancel:
                raise KeyboardInterrupt
            tell_loop(do, *arguments)

        monkeypatch.setattr(client, "_tell_loop", interrupted_again)
        with interrupted_while(lambda: client._calls):
            client.execute(Count(key="stuck"), timeout=600)
        wait_for(lambda: not client._calls)
        assert not client._interrupted


def test_an_interrupt_while_the_block_is_left_ends_the_client_at_once():
    client = running(close_timeout_s=600)
    client.publish(Step(key="stuck"))
    with interrupted_while(lambda: client._closing), client:
        pass
    assert not client._thread.is_alive()
    with pytest.raises(ClientClosed):
        client.publish(Step(key="a"))


def test_an_interrupt_before_the_loop_hears_of_the_end_ends_the_client_too(monkeypatch: pytest.MonkeyPatch):
    client = running(close_timeout_s=600)
    tell_loop = client._tell_loop

    def interrupted(do: Callable[..., object], *arguments: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "_tell_loop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.close()
    assert client._tell_loop == tell_loop
    assert not client._thread.is_alive()
    client.close()


def test_an_interrupt_while_it_connects_leaves_no_thread(tmp_path: Any):
    def connecting() -> bool:
        return any(thread.name == "shardbus-client" for thread in threading.enumerate())

    with interrupted_while(connecting):
        blocking.connect(f"ipc://{tmp_path}/b", timeout=600)
    wait_for(lambda: not connecting())


# -- the end


def test_leaving_the_block_delivers_everything_that_was_published():
    with blocking.local(bus) as client:
        for number in range(5000):
            client.publish(Step(key=f"k{number % 10}", n=number))
    assert len(handled) == 5000


def test_leaving_the_block_says_what_was_not_delivered():
    client = running(close_timeout_s=0.1)
    with pytest.raises(NotDelivered, match=r"1 event was published and not finished within 0\.1 s"), client:
        client.publish(Step(key="stuck"))


def test_an_error_of_the_block_comes_out_of_it_with_a_note_of_what_was_not_delivered():
    client = running(close_timeout_s=0.1)
    client.publish(Step(key="stuck"))
    with pytest.raises(ZeroDivisionError) as raised, client:
        raise ZeroDivisionError
    assert "not finished within 0.1 s" in raised.value.__notes__[0]


def test_calls_after_the_end_say_that_the_client_is_closed():
    with blocking.local(bus) as client:
        pass
    for call in (
        lambda: client.publish(Step(key="a")),
        lambda: client.publish_many([Step(key="a")]),
        lambda: client.execute(Count(key="a")),
        client.flush,
        client.ledger,
        client.statistics,
        client.status,
        client.dead_letters,
        client.redrive,
        client.purge,
        lambda: client.stream(Count(key="a")),
        lambda: client.subscribe(Step),
        lambda: client.session("a"),
    ):
        with pytest.raises(ClientClosed, match="use it inside its `with` block"):
            call()
    client.close()


def test_a_call_that_is_under_way_when_another_thread_closes_ends():
    client = running(close_timeout_s=0.1)
    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(client.execute, Count(key="stuck"), timeout=600)
        wait_for(lambda: client._calls)
        client.publish(Step(key="stuck"))
        with pytest.raises(NotDelivered):
            client.close()
        with pytest.raises(ClientClosed, match="closed while the command was under way"):
            calling.result(30)


def test_nothing_that_was_published_is_lost_when_another_thread_closes():
    for _ in range(10):
        handled.clear()
        published = [0, 0]
        client = running()

        def publish_on(thread: int, client: BlockingClient = client, published: list[int] = published) -> None:
            while True:
                client.publish(Step(key=f"t{thread}", n=published[thread]))
                published[thread] += 1

        with ThreadPoolExecutor(2) as pool:
            publishing = [pool.submit(publish_on, thread) for thread in (0, 1)]
            wait_for(lambda published=published: min(published) > 50)
            client.close()
            for one in publishing:
                with pytest.raises(ClientClosed):
                    one.result(30)
        assert len(handled) == sum(published)


def test_a_bus_with_a_defect_ends_the_calls_that_wait_and_is_raised_where_the_block_is_left():
    class Defect(Retry):
        def decide(self, failures: int, error: BaseException, chance: float) -> Any:
            raise ZeroDivisionError("a defect")

    other = Bus("defect")

    @other.on(Step, retry=Defect())
    async def raise_(event: Step) -> None:
        raise ValueError

    client = BlockingClient(other.local(), hands_over=True)
    client.publish(Step(key="a"))
    for call in (client.flush, lambda: client.publish(Step(key="a"))):
        with pytest.raises(BusRejected, match="has a defect"):
            call()
    with pytest.raises(ZeroDivisionError, match="a defect"):
        client.close()


def test_a_bus_that_does_not_answer_is_said_and_leaves_no_thread(tmp_path: Any):
    with pytest.raises(BusUnreachable, match=r"within 0\.1 s"):
        blocking.connect(f"ipc://{tmp_path}/b", timeout=0.1)


def test_what_is_asked_wrongly_is_told_at_the_call():
    with pytest.raises(ConfigError, match="is not an address"):
        blocking.connect("nowhere")
    with pytest.raises(UsageError, match="on_full='never'"):
        blocking.connect(on_full="never")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="shards=0"), blocking.local(bus, shards=0):
        pass


# -- where it does not belong


def test_a_thread_with_an_event_loop_is_told_to_use_the_other_client():
    with blocking.local(bus) as client:

        async def use(call: Callable[[], object]) -> None:
            with pytest.raises(UsageError, match=r"use the asyncio client there: async with shardbus\.connect"):
                call()

        for call in (lambda: client.publish(Step(key="a")), client.flush, client.close, blocking.connect):
            asyncio.run(use(call))


def test_a_callback_of_the_clients_own_thread_cannot_wait_for_it():
    told: list[BaseException] = []

    def on_pressure(under: bool) -> None:
        try:
            client.flush()
        except UsageError as error:
            told.append(error)

    block = run_local(bus, stores=[MemoryStore()], limits=SMALL, on_pressure=on_pressure)
    with BlockingClient(block, hands_over=True) as client:
        fill(client)
        wait_for(lambda: told)
        gate.set()


def test_middleware_sees_each_message_once():
    seen: list[str] = []

    def note(message: Any, headers: dict[str, str]) -> None:
        seen.append(type(message).__name__)
        headers["seen"] = "once"

    with blocking.local(bus, middleware=[note]) as client:
        client.publish(Step(key="a", n=1))
        client.publish(Step(key="a", n=2, payload=bytes(5000)))
        client.publish_many([Step(key="a", n=3)])
        assert client.execute(Count(key="a")) == 3
    assert seen == ["Step", "Step", "Step", "Count"]
    assert seen_headers == [{"seen": "once"}] * 3
