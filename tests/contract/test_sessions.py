"""A session: messages under one key, and handlers in the client's process that end with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from odd_errors import ANSWERS, ODD_ERRORS, catch_what_a_child_raises

from shardbus import (
    Bus,
    Client,
    Command,
    Event,
    SessionEnded,
    SessionStarted,
    SubscriptionLost,
    UsageError,
)


class Said(Event, key="chat"):
    chat: str
    text: str = ""


class Unhandled(Event, key="chat"):
    chat: str


class Loose(Event):
    text: str


class Length(Command[int], key="chat"):
    chat: str


class Words(Command[str], key="chat"):
    chat: str


bus = Bus("chat")
told: list[str] = []


@bus.on(Said)
async def note(event: Said) -> None:
    told.append(event.text)


@bus.on(SessionStarted, SessionEnded)
async def follow(event: SessionStarted | SessionEnded) -> None:
    told.append(f"{type(event).__name__} {event.session}")


@bus.command(Length)
async def length(command: Length) -> int:
    return len(told)


@bus.command(Words)
async def words(command: Words) -> AsyncIterator[str]:
    yield "one"
    yield "two"


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    told.clear()
    async with bus.local(shards=2) as client:
        yield client


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - handlers run by themselves
            await asyncio.sleep(0.001)


async def test_a_session_has_a_beginning_and_an_end_around_its_messages(client: Client):
    async with client.session("7") as session:
        await session.publish(Said(chat="7", text="hello"), headers={"a": "b"})
        assert await session.execute(Length(chat="7")) == 2
        assert [word async for word in session.stream(Words(chat="7"))] == ["one", "two"]
    await client.flush()
    assert told == ["SessionStarted 7", "hello", "SessionEnded 7"]


async def test_a_session_publishes_many_later_and_with_a_deadline(client: Client):
    async with client.session("7") as session:
        await session.publish_many([Said(chat="7", text=text) for text in "ab"], headers={"a": "b"}, deadline=60.0)
        await session.publish(Said(chat="7", text="c"), deadline=60.0)
        await session.publish(Said(chat="7", text="at once"), at=1.0)
        await session.publish(Said(chat="7", text="never"), delay=3600.0)
        with pytest.raises(UsageError, match="either scheduled or has a deadline"):
            await session.publish(Said(chat="7"), delay=1.0, deadline=1.0)
        with pytest.raises(UsageError, match="and the session '7'"):
            await session.publish_many([Said(chat="7", text="not"), Said(chat="8", text="this")])
        await until(lambda: "at once" in told)
    with pytest.raises(UsageError, match="is not open"):
        await session.publish_many([])
    ledger = await client.flush()
    assert (ledger.published, ledger.dead) == (7, 0)
    told.remove("at once")  # it joined the end of its lane when it was due
    assert told == ["SessionStarted 7", "a", "b", "c", "SessionEnded 7"]


async def test_a_session_that_fails_has_an_end_too(client: Client):
    with pytest.raises(KeyError):
        async with client.session("7"):
            raise KeyError
    await client.flush()
    assert told == ["SessionStarted 7", "SessionEnded 7"]


async def test_an_application_that_takes_no_notice_of_sessions_has_no_dead_letters():
    other = Bus("other")
    other.on(Said)(note)
    async with other.local() as client, client.subscribe(SessionEnded) as ends:
        async with client.session("7"):
            pass
        assert (await client.flush()).dead == 0
        assert await anext(ends) == SessionEnded(session="7")


async def test_handlers_of_a_session_hear_its_key_in_order_and_end_with_it(client: Client):
    heard: list[str] = []

    async def hear(event: Said) -> None:
        await asyncio.sleep(0 if len(event.text) % 2 else 0.001)
        heard.append(event.text)

    plain: list[str] = []
    async with client.session("7") as session:
        session.on(Said, hear)
        session.on(Said, lambda event: plain.append(event.text))
        for n in range(20):
            await session.publish(Said(chat="7", text="x" * n))
            await client.publish(Said(chat="8", text="other"))
        await until(lambda: len(heard) == len(plain) == 20)
    await client.publish(Said(chat="7", text="late"))
    await client.flush()
    await asyncio.sleep(0.02)
    assert heard == plain == ["x" * n for n in range(20)]
    assert not client._subscriptions._readers


HANDLERS_OWN = {
    "plain": ValueError,
    **ODD_ERRORS,
    "of what was cancelled": asyncio.CancelledError,
    "a group": lambda: BaseExceptionGroup("g", [KeyboardInterrupt()]),
}


@pytest.mark.parametrize("make", HANDLERS_OWN.values(), ids=HANDLERS_OWN)
async def test_a_handler_that_fails_is_logged_and_called_again(
    client: Client, caplog: pytest.LogCaptureFixture, make: Callable[[], BaseException]
):
    heard: list[str] = []

    async def hear(event: Said) -> None:
        heard.append(event.text)
        raise make()

    async with client.session("7") as session:
        session.on(Said, hear)
        for text in "ab":
            await session.publish(Said(chat="7", text=text))
        await until(lambda: heard == ["a", "b"])
    assert [record.getMessage().partition("\n")[0] for record in caplog.records if record.levelno == logging.ERROR] == [
        "a handler of the session '7' failed with Said"
    ] * 2


@pytest.mark.parametrize("answer", [ANSWERS[name] for name in ANSWERS if name != "what ends programs"])
async def test_leaving_ends_a_handler_however_it_answers_that(client: Client, answer: Callable[[], Awaitable[None]]):
    heard: list[str] = []

    async def hear(event: Said) -> None:
        heard.append(event.text)
        await answer()

    async with client.session("7") as session:
        session.on(Said, hear)
        for text in "ab":
            await session.publish(Said(chat="7", text=text))
        await until(lambda: heard == ["a"] and any(reader.queue for reader in client._subscriptions._readers))
    assert heard == ["a"]


async def test_a_handler_that_catches_what_a_task_of_its_own_raises_is_called_again(client: Client):
    heard: list[str] = []

    async def hear(event: Said) -> None:
        heard.append(event.text)
        await catch_what_a_child_raises()

    async with client.session("7") as session:
        session.on(Said, hear)
        for text in "abc":
            await session.publish(Said(chat="7", text=text))
        await until(lambda: heard == ["a", "b", "c"])


async def test_a_handler_that_cancels_itself_hears_no_more_and_that_is_told(
    client: Client, caplog: pytest.LogCaptureFixture
):
    async def hear(event: Said) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(600)

    async with client.session("7") as session:
        session.on(Said, hear)
        await session.publish(Said(chat="7"))
        await until(lambda: "the session '7' hears no more: it was cancelled" in caplog.text)


async def test_a_type_that_cannot_be_followed_is_told_to_whoever_publishes(client: Client):
    async with client.session("7") as session:
        session.on(Unhandled, print)
        with pytest.raises(SubscriptionLost):
            await session.publish(Said(chat="7"))
        await session.publish(Said(chat="7"))  # it is told once


async def test_what_does_not_belong_to_a_session_is_refused(client: Client):
    for key in ("", 7, None):
        with pytest.raises(UsageError, match="a session's key is a text"):
            client.session(key)  # type: ignore[arg-type]
    session = client.session("7")
    with pytest.raises(UsageError, match="is not open"):
        await session.publish(Said(chat="7"))
    async with session:
        for event in (Said(chat="8"), Loose(text="x")):
            with pytest.raises(UsageError, match="and the session '7'"):
                await session.publish(event)
        with pytest.raises(UsageError, match="and the session '7'"):
            await session.execute(Length(chat="8"))
        with pytest.raises(UsageError, match="and the session '7'"):
            session.stream(Words(chat="8"))
        with pytest.raises(UsageError, match="publish takes events"):
            await session.publish(Length(chat="7"))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="publish takes events"):
            await session.publish("hello")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="a handler is a function"):
            session.on(Said, None)  # type: ignore[type-var]
        with pytest.raises(UsageError, match="open already"):
            await session.__aenter__()
    with pytest.raises(UsageError, match="is not open"):
        session.on(Said, print)
