"""What the blocking client reads item by item, and its sessions, over the local engine."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from odd_errors import ODD_ERRORS

from shardbus import (
    Bus,
    ClientClosed,
    Command,
    CommandFailed,
    Context,
    Event,
    Missed,
    SessionEnded,
    SessionStarted,
    SubscriptionLost,
    UsageError,
    blocking,
)
from shardbus.blocking import BlockingClient


class Count(Command[int], key="key"):
    key: str
    upto: int
    how: str = ""


class Plain(Command[int], key="key"):
    key: str


class Said(Event, key="key"):
    key: str
    n: int = 0


class Unhandled(Event, key="key"):
    key: str


bus = Bus("readers")
told: list[Any] = []
headers_told: list[dict[str, str]] = []
gate = threading.Event()


@bus.command(Count)
async def count(command: Count) -> AsyncIterator[Any]:
    try:
        for n in range(command.upto):
            told.append(n)
            yield "text" if command.how == "wrong" and n == 3 else n
        if command.how == "stuck":
            await asyncio.sleep(3600)
        if command.how == "fails":
            raise ValueError("no more")
    finally:
        told.append("closed")


@bus.command(Plain)
async def plain(command: Plain) -> int:
    return len(told)


@bus.on(Said)
async def said(event: Said, context: Context) -> None:
    while event.key == "stuck" and not gate.is_set():  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(0.005)
    told.append(event.n)
    headers_told.append({**context.headers, "has deadline": str(context.remaining_s is not None)})


@bus.on(SessionStarted, SessionEnded)
async def follow(event: SessionStarted | SessionEnded) -> None:
    told.append(type(event).__name__)


@pytest.fixture
def client() -> Iterator[BlockingClient]:
    told.clear()
    headers_told.clear()
    gate.clear()
    with blocking.local(bus, shards=2) as client:
        yield client
        gate.set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shardbus-")]


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():  # the test ends by its time-out
        time.sleep(0.002)


def waits(client: BlockingClient) -> bool:
    """Whether a thread waits for the loop."""
    return bool(client._calls)


# -- streams


@pytest.mark.parametrize("window", [1, 2, 64, 1024])
def test_a_stream_is_a_plain_iterator_over_all_items_in_order(client: BlockingClient, window: int):
    assert list(client.stream(Count(key="a", upto=3000), window=window)) == list(range(3000))
    with client.stream(Count(key="a", upto=3), window=window) as items:
        assert list(items) == [0, 1, 2]
        assert list(items) == []
    assert told.count("closed") == 2


def test_a_stream_comes_behind_what_its_thread_published_before(client: BlockingClient):
    for n in range(100, 150):
        client.publish(Said(key="a", n=n))
    assert next(client.stream(Count(key="a", upto=5))) == 0
    assert told[:51] == [*range(100, 150), 0]


def test_leaving_a_stream_s_block_or_its_loop_ends_the_handler(client: BlockingClient):
    with client.stream(Count(key="a", upto=9, how="stuck")) as items:
        for item in items:
            if item == 8:
                break
        assert "closed" not in told
    assert client.execute(Plain(key="a")) == 10  # behind the stream, which has ended
    items = client.stream(Count(key="b", upto=1, how="stuck"))
    with pytest.raises(KeyError), items:
        raise KeyError(next(items))
    assert list(items) == []
    for _ in client.stream(Count(key="c", upto=1, how="stuck")):
        break
    gc.collect()
    for key in "bc":
        client.execute(Plain(key=key), timeout=60.0)
    assert told.count("closed") == 3


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_the_handler_is_not_advanced_beyond_the_window(client: BlockingClient, window: int):
    with client.stream(Count(key="a", upto=1000), window=window) as items:
        for read in range(50):
            assert next(items) == read
            client.flush()
            client.execute(Plain(key="b"))  # the loop has turned
            # One more is what it would yield, and holds until the reader allows it.
            assert max(told) <= read + window + 1


def test_what_ends_a_stream_is_raised_behind_its_items(client: BlockingClient):
    items = client.stream(Count(key="a", upto=5, how="fails"))
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(CommandFailed, match="no more") as raised:
        next(items)
    assert "in count" in raised.value.remote_traceback
    assert list(items) == []
    items = client.stream(Count(key="a", upto=5, how="wrong"))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CommandFailed, match="an item of its reply is not as declared"):
        next(items)
    assert list(items) == []
    with pytest.raises(CommandFailed, match="PlainCommand"):
        next(client.stream(Plain(key="a")))
    items = client.stream(Count(key="a", upto=1, how="stuck"), timeout=1.0)
    assert next(items) == 0
    with pytest.raises(TimeoutError, match=r"Count: its stream has not ended within 1 s; it is cancelled"):
        next(items)
    assert list(items) == []


@pytest.mark.parametrize("window", [0, -1, 1025, 2000, 1.5, "8", True])
def test_a_window_that_is_none_is_refused_at_the_call(client: BlockingClient, window: Any):
    with pytest.raises(UsageError, match=f"window={window!r}: take 1 to 1,024"):
        client.stream(Count(key="a", upto=1), window=window)


# -- subscriptions


def test_events_are_followed_with_their_headers_in_order(client: BlockingClient):
    with client.subscribe(Said, key="a") as events:
        client.publish_many([Said(key="a", n=n) for n in range(500)])
        for n in range(500, 600):
            client.publish(Said(key="a", n=n), headers={"n": str(n)})
            client.publish(Said(key="b", n=-1))
        for n in range(600):
            assert next(events) == Said(key="a", n=n)
            assert events.headers == ({"n": str(n)} if n >= 500 else {})
    assert list(events) == []
    wait_for(lambda: not client._client._subscriptions._readers)


def test_a_loop_that_is_left_unsubscribes(client: BlockingClient):
    events = client.subscribe(Said)
    wait_for(lambda: next(iter(client._client._subscriptions._readers)).is_confirmed)
    client.publish(Said(key="a"))
    for event in events:
        assert event == Said(key="a")
        break
    del events
    gc.collect()
    wait_for(lambda: not client._client._subscriptions._readers)


def test_that_nothing_came_is_said_and_the_subscription_goes_on(client: BlockingClient):
    with client.subscribe(Said, SessionEnded, key="a", timeout=0.5) as events:
        for _ in range(2):
            with pytest.raises(TimeoutError) as raised:
                next(events)
            assert str(raised.value) == (
                "Said, SessionEnded of the key 'a': nothing came within 0.5 s; the subscription goes on"
            )
        client.publish(Said(key="a", n=1))
        client.flush()
        assert next(events) == Said(key="a", n=1)
    with client.subscribe(Said, timeout=0.5) as events, pytest.raises(TimeoutError, match=r"^Said: nothing came within"):
        list(events)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_time_out_that_is_none_is_refused(client: BlockingClient, timeout: float):
    with pytest.raises(UsageError, match="give seconds above 0"):
        client.subscribe(Said, timeout=timeout)


def test_a_type_that_nobody_handles_cannot_be_followed(client: BlockingClient):
    with pytest.raises(SubscriptionLost), client.subscribe(Unhandled):
        pass
    with pytest.raises(UsageError, match="subscribe takes types of events"):
        client.subscribe(Plain)  # type: ignore[type-var]
    with pytest.raises(UsageError, match="queue_events_max=0"):
        client.subscribe(Said, queue_events_max=0)


def test_a_slow_reader_is_told_what_it_missed_and_holds_nobody_up(client: BlockingClient):
    with client.subscribe(Said, key="a", queue_events_max=10) as events:
        client.publish_many([Said(key="a", n=n) for n in range(1000)])
        assert client.flush().handled == 1000
        wait_for(lambda: sum(map(_fed, client._client._subscriptions._readers)) == 1000)
        first = next(events)
        assert isinstance(first, Missed)
        assert first.count == 990
        assert [next(events) for _ in range(10)] == [Said(key="a", n=n) for n in range(990, 1000)]


def _fed(reader: Any) -> int:
    return sum(source.expected for source in reader.sources.values())


# -- threads


@pytest.mark.parametrize("kind", ["stream", "subscription"])
def test_one_thread_at_a_time_reads_and_any_thread_closes(client: BlockingClient, kind: str):
    reader: Any
    if kind == "stream":
        reader = client.stream(Count(key="a", upto=0, how="stuck"))
    else:
        reader = client.subscribe(Said)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, reader)
        wait_for(lambda: waits(client))
        with pytest.raises(UsageError, match=f"the {kind} .* is being read by another thread; one at a time"):
            next(reader)
        reader.close()
        assert reading.result(30) == []
    reader.close()


def test_threads_read_streams_and_events_of_one_client_beside_each_other(client: BlockingClient):
    def read(thread: int) -> int:
        with client.subscribe(Said, key=f"t{thread}") as events:
            for n in range(50):
                client.publish(Said(key=f"t{thread}", n=n))
            assert [event.n for _, event in zip(range(50), events, strict=False)] == list(range(50))  # type: ignore[union-attr]
        return sum(client.stream(Count(key=f"t{thread}", upto=200)))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [199 * 100] * 8


def test_a_reader_whose_client_is_closed_says_so_and_its_block_ends(client: BlockingClient):
    other = blocking.local(bus)
    with ThreadPoolExecutor(2) as pool:
        with other as closing:
            stream = closing.stream(Count(key="a", upto=0, how="stuck"))
            events = closing.subscribe(Said)
            reading = [pool.submit(next, stream), pool.submit(next, events)]
            wait_for(lambda: len(closing._calls) == 2)
        for one in reading:
            with pytest.raises(ClientClosed):
                one.result(30)
    with stream, pytest.raises(ClientClosed):
        next(stream)
    events.close()


def test_nothing_is_lost_where_an_interrupt_ends_the_waiting(client: BlockingClient, monkeypatch: pytest.MonkeyPatch):
    items = client.stream(Count(key="a", upto=100))
    wait, seen = items._wait, []

    def interrupted(work: Any) -> Any:
        result = wait(work)
        if len(seen) < 3:
            seen.append("interrupted")
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(items, "_wait", interrupted)
    read: list[int] = []
    while True:
        try:
            read.extend([next(items)])
        except KeyboardInterrupt:
            continue
        except StopIteration:
            break
    assert (read, len(seen)) == (list(range(100)), 3)


def test_a_thread_with_an_event_loop_is_told_to_use_the_other_client(client: BlockingClient):
    items = client.stream(Count(key="a", upto=1))

    async def use(call: Callable[[], object]) -> None:
        with pytest.raises(UsageError, match="use the asyncio client there"):
            call()

    for call in (
        lambda: client.stream(Count(key="a", upto=1)),
        lambda: client.subscribe(Said),
        lambda: client.session("a"),
        lambda: next(items),
    ):
        asyncio.run(use(call))


# -- sessions


def test_a_session_has_a_beginning_and_an_end_around_its_messages(client: BlockingClient):
    with client.session("7") as session:
        session.publish(Said(key="7", n=1), headers={"a": "b"}, deadline=60.0)
        session.publish_many([Said(key="7", n=2), Said(key="7", n=3)], headers={"c": "d"}, deadline=60.0)
        assert session.execute(Plain(key="7")) == 4
        assert list(session.stream(Count(key="7", upto=2))) == [0, 1]
        session.publish(Said(key="7", n=4), delay=-1)
    assert client.flush().dead == 0
    wait_for(lambda: 4 in told)
    told.remove(4)  # a scheduled event joins the end when it is due, perhaps behind the session's
    assert told == ["SessionStarted", 1, 2, 3, 0, 1, "closed", "SessionEnded"]
    assert headers_told[:3] == [{"a": "b", "has deadline": "True"}, *[{"c": "d", "has deadline": "True"}] * 2]


def test_handlers_of_a_session_run_in_threads_of_their_own_and_may_use_the_client(client: BlockingClient):
    heard: list[tuple[int, int]] = []
    threads: set[str] = set()

    def hear(event: Said) -> None:
        threads.add(threading.current_thread().name)
        time.sleep(0.001)
        heard.append((event.n, client.execute(Plain(key="other"))))

    other: list[int] = []
    with client.session("7") as session:
        assert session.on(Said, hear) is hear
        session.on(Said, lambda event: other.append(event.n))
        for n in range(20):
            session.publish(Said(key="7", n=n))
            client.publish(Said(key="8", n=-1))
        wait_for(lambda: len(heard) == len(other) == 20)
    client.publish(Said(key="7", n=99))
    client.flush()
    assert [n for n, _ in heard] == other == list(range(20))
    assert threads == {"shardbus-session 7"}
    wait_for(lambda: not client._client._subscriptions._readers)


def test_leaving_a_session_waits_for_the_handler_that_runs(client: BlockingClient):
    begun, ended = threading.Event(), []

    def hear(event: Said) -> None:
        begun.set()
        gate.wait(60)
        ended.append(event.n)

    with client.session("7") as session:
        session.on(Said, hear)
        session.publish_many([Said(key="7", n=1), Said(key="7", n=2)])
        assert begun.wait(60)
        threading.Timer(0.5, gate.set).start()
    assert ended == [1]


@pytest.mark.parametrize("make", [ValueError, *ODD_ERRORS.values()], ids=["plain", *ODD_ERRORS])
def test_a_handler_that_fails_is_logged_and_called_again(
    client: BlockingClient, caplog: pytest.LogCaptureFixture, make: Callable[[], Exception]
):
    heard: list[int] = []

    def hear(event: Said) -> None:
        heard.append(event.n)
        raise make()

    with client.session("7") as session:
        session.on(Said, hear)
        session.publish_many([Said(key="7", n=1), Said(key="7", n=2)])
        wait_for(lambda: heard == [1, 2])
    assert [record.getMessage().partition("\n")[0] for record in caplog.records if record.levelno == logging.ERROR] == [
        "a handler of the session '7' failed with Said"
    ] * 2


def test_what_does_not_belong_to_a_session_is_refused(client: BlockingClient):
    for key in ("", 7, None):
        with pytest.raises(UsageError, match="a session's key is a text"):
            client.session(key)  # type: ignore[arg-type]
    session = client.session("7")
    with pytest.raises(UsageError, match="is not open; use it inside its block"):
        session.publish(Said(key="7"))
    with session:
        with pytest.raises(UsageError, match="and the session '7'"):
            session.publish(Said(key="8"))
        with pytest.raises(UsageError, match="and the session '7'"):
            session.publish_many([Said(key="7"), Said(key="8")])
        with pytest.raises(UsageError, match="and the session '7'"):
            session.stream(Count(key="8", upto=1))
        with pytest.raises(UsageError, match="either scheduled or has a deadline"):
            session.publish(Said(key="7"), delay=1, deadline=1)
        with pytest.raises(UsageError, match=r"a plain `def` of \(event\).*`async def` is for the asyncio client"):
            session.on(Said, said)
        with pytest.raises(UsageError, match="a plain `def`"):
            session.on(Said, None)  # type: ignore[type-var]
        with pytest.raises(SubscriptionLost):
            session.on(Unhandled, print)
        with pytest.raises(UsageError, match="open already"):
            session.__enter__()
    with pytest.raises(UsageError, match="is not open; use it inside its `with` block"):
        session.on(Said, print)
    assert client.flush().published == 2


def test_a_session_whose_client_was_closed_ends_with_that(client: BlockingClient):
    with blocking.local(bus) as closing:
        session = closing.session("7").__enter__()
        session.on(Said, print)
    with pytest.raises(ClientClosed):
        session.__exit__(None, None, None)
    with pytest.raises(KeyError), blocking.local(bus) as closing, closing.session("7"):
        raise KeyError(closing.close())
