"""The state of a session: made when a handler asks for it, ended in the key's lane, with the session or by the worker."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import msgspec
import pytest
from msgspec.structs import replace
from odd_errors import ANSWERS, Odd, catch_what_a_child_raises

from shardbus import (
    Bus,
    Client,
    Command,
    CommandFailed,
    Context,
    Event,
    RegistrationError,
    Retry,
    SessionEnded,
    SessionStarted,
    UsageError,
    WorkerInfo,
    testing,
)
from shardbus.clock import monotonic_ns
from shardbus.config import DEFAULT_LIMITS, Limits
from shardbus.local import run_local
from shardbus.registry import StateMaker
from shardbus.session_states import SessionStates
from shardbus.testing import MemoryStore


class Said(Event, key="chat"):
    chat: str
    text: str = ""


class Batched(Event, key="chat"):
    chat: str
    text: str = ""


class Numbered(Event, key="number"):
    number: int


class Identified(Event, key="id"):
    id: UUID


class Loose(Event):
    text: str


class Length(Command[int], key="chat"):
    chat: str


class Words(Command[str], key="chat"):
    chat: str


class Chats:
    """An application whose sessions have a history."""

    def __init__(self, *, idle_seconds: float = 900.0, with_state: bool = True, retry: Retry | None = None) -> None:
        self.bus = Bus("chats")
        self.told: list[str] = []
        self.saved: dict[str, list[str]] = {}
        self.makes: Callable[[str], Any] | None = None
        self.ends: Callable[[str], Any] | None = None
        self.follows: Callable[[SessionEnded, Context], Any] | None = None
        self.contexts: list[Context] = []
        retry = retry or Retry(attempts=1)
        if with_state:
            self.bus.session(idle_seconds=idle_seconds)(self.chat)
        self.bus.on(Said, retry=retry)(self.say)
        self.bus.on(Numbered, Identified, Loose, retry=retry)(self.ask)
        self.bus.on(SessionStarted, SessionEnded, retry=Retry(attempts=2, base_s=0.001))(self.follow)
        self.bus.command(Length)(self.length)
        self.bus.command(Words)(self.words)

    async def chat(self, session: str) -> AsyncIterator[list[str]]:
        if self.makes is not None:
            await self.makes(session)
        self.told.append(f"open {session}")
        history = list(self.saved.get(session, ()))
        try:
            yield history
            if self.ends is not None:
                await self.ends(session)
            self.saved[session] = history
            self.told.append(f"end {session}: {' '.join(history)}")
        finally:
            self.told.append(f"closed {session}")

    async def say(self, event: Said, context: Context) -> None:
        self.contexts.append(context)
        history = await context.session()
        history.append(event.text)

    async def ask(self, event: Any, context: Context) -> None:
        await context.session()

    async def follow(self, event: SessionStarted | SessionEnded, context: Context) -> None:
        reason = f" ({event.reason})" if isinstance(event, SessionEnded) else ""
        self.told.append(f"{type(event).__name__} {event.session}{reason}")
        if self.follows is not None and isinstance(event, SessionEnded):
            await self.follows(event, context)

    async def length(self, command: Length, context: Context) -> int:
        return len(await context.session())

    async def words(self, command: Words, context: Context) -> AsyncIterator[str]:
        for word in await context.session():
            yield word


@pytest.fixture
def chats() -> Chats:
    return Chats()


@asynccontextmanager
async def running(bus: Bus, limits: Limits = DEFAULT_LIMITS, shards: int = 1) -> AsyncIterator[Client]:
    async with run_local(bus, shards=shards, stores=[MemoryStore() for _ in range(shards)], limits=limits) as client:
        yield client


async def open_sessions(client: Client) -> int:
    return sum(worker["sessions"] for worker in (await client.status())["workers"])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - handlers run by themselves
            await asyncio.sleep(0.001)


# -- the life of a state


async def test_a_state_is_made_when_a_handler_asks_and_ended_behind_the_handlers_of_the_end(chats: Chats):
    async with running(chats.bus) as client:
        async with client.session("7") as session:
            for text in ("hello", "world"):
                await session.publish(Said(chat="7", text=text))
            assert await session.execute(Length(chat="7")) == 2
            assert [word async for word in session.stream(Words(chat="7"))] == ["hello", "world"]
            assert await open_sessions(client) == 1
        await client.flush()
        assert await open_sessions(client) == 0
        assert chats.told == [
            "SessionStarted 7",
            "open 7",
            "SessionEnded 7 (left)",
            "end 7: hello world",
            "closed 7",
        ]


async def test_a_session_that_no_handler_asks_for_has_no_state(chats: Chats):
    async with running(chats.bus) as client:
        async with client.session("7"):
            pass
        await client.flush()
    assert chats.told == ["SessionStarted 7", "SessionEnded 7 (left)"]


async def test_what_a_session_leaves_the_next_one_of_the_key_finds(chats: Chats):
    async with running(chats.bus) as client:
        for text in "ab":
            async with client.session("7") as session:
                await session.publish(Said(chat="7", text=text))
        await client.flush()
    assert chats.saved == {"7": ["a", "b"]}


async def test_a_state_ends_with_the_last_who_has_the_session_open(chats: Chats):
    async with running(chats.bus) as client:
        async with client.session("7") as one:
            async with client.session("7"):
                await one.publish(Said(chat="7", text="x"))
            await client.flush()
            assert chats.told[-1] == "SessionEnded 7 (left)"
            await one.publish(Said(chat="7", text="y"))
        await client.flush()
    assert [told for told in chats.told if not told.startswith("Session")] == ["open 7", "end 7: x y", "closed 7"]


async def test_nothing_of_the_key_runs_beside_the_end_and_what_comes_then_begins_anew(chats: Chats):
    goes_on = asyncio.Event()

    async def end(session: str) -> None:
        chats.told.append("ending")
        if session == "7":
            await goes_on.wait()

    chats.ends = end
    async with running(chats.bus) as client:
        async with client.session("7") as session:
            await session.publish(Said(chat="7", text="x"))
        await client.publish(Said(chat="7", text="y"))
        await client.publish(Said(chat="8", text="other"))
        await until(lambda: "open 8" in chats.told)
        await asyncio.sleep(0.01)
        assert chats.told.count("open 7") == 1
        goes_on.set()
        await client.flush()
        assert chats.told.count("open 7") == 2
    assert chats.saved["7"] == ["x", "y"]


async def test_a_state_may_be_made_from_the_key_and_the_worker(chats: Chats):
    bus, seen = Bus("worker"), []

    @bus.session
    async def state(session: str, worker: WorkerInfo) -> AsyncIterator[int]:
        seen.append((session, worker.bus, worker.shards))
        yield 5

    bus.on(Said)(chats.ask)
    async with running(bus) as client:
        await client.publish(Said(chat="7"))
        await client.flush()
    assert seen == [("7", "worker", 1)]


async def test_a_message_outside_any_session_of_a_client_has_the_state_of_its_key(chats: Chats):
    async with running(chats.bus) as client:
        await client.publish(Said(chat="7", text="x"))
        assert await client.execute(Length(chat="7")) == 1
        assert await open_sessions(client) == 1
        await client.publish(SessionEnded(session="7"))
        await client.flush()
        assert await open_sessions(client) == 0
    assert chats.saved == {"7": ["x"]}


async def test_events_of_a_batch_handler_have_each_its_own_state():
    chats = Chats()

    @chats.bus.on(Batched, batch=8, retry=Retry(attempts=1))
    async def batched(events: list[Batched], contexts: list[Context]) -> None:
        for event, context in zip(events, contexts, strict=True):
            (await context.session()).append(event.text)

    async with running(chats.bus) as client:
        await client.publish_many([Batched(chat=str(n % 3), text=str(n)) for n in range(9)])
        assert (await client.flush()).dead == 0
    assert chats.saved == {"0": ["0", "3", "6"], "1": ["1", "4", "7"], "2": ["2", "5", "8"]}


async def test_an_application_may_take_the_ends_of_sessions_in_batches():
    bus, told = Bus("batched ends"), []

    @bus.session
    async def state(session: str) -> AsyncIterator[None]:
        yield
        told.append(f"end {session}")

    @bus.on(Said)
    async def say(event: Said, context: Context) -> None:
        await context.session()

    @bus.on(SessionEnded, batch=2, linger_s=5.0)
    async def left(events: list[SessionEnded]) -> None:
        told.append(f"left {' '.join(event.session for event in events)}")

    async with running(bus) as client:
        for key in "12":
            await client.publish(Said(chat=key))
        await client.publish_many([SessionEnded(session=key) for key in "12"])
        await client.flush()
        assert told == ["left 1 2", "end 1", "end 2"]


def test_an_end_of_an_older_client_was_left():
    assert msgspec.msgpack.decode(msgspec.msgpack.encode({"session": "7"}), type=SessionEnded).reason == "left"


# -- failures


async def test_what_making_a_state_raises_is_the_handlers_failure_and_a_retry_makes_it():
    chats = Chats(retry=Retry(attempts=2, base_s=0.001))
    failures = ["down"]

    async def make(session: str) -> None:
        if failures:
            raise ConnectionError(failures.pop())

    chats.makes = make
    async with running(chats.bus) as client:
        await client.publish(Said(chat="7", text="x"))
        assert (await client.flush()).dead == 0
        failures.append("down again")
        with pytest.raises(CommandFailed, match="down again") as raised:
            await client.execute(Length(chat="8"))
        assert raised.value.error_type == "ConnectionError"
        assert await open_sessions(client) == 1
    assert chats.saved == {"7": ["x"]}


async def test_a_handler_that_is_cancelled_while_its_state_is_made_leaves_none(chats: Chats):
    stays = True

    async def make(session: str) -> None:
        chats.told.append("making")
        if stays:
            try:
                await asyncio.sleep(3600)
            finally:
                chats.told.append("not made")

    chats.makes = make
    async with running(chats.bus) as client:
        with pytest.raises(TimeoutError):
            await client.execute(Length(chat="7"), timeout=1.0)
        await until(lambda: "not made" in chats.told)
        assert await open_sessions(client) == 0
        stays = False
        assert await client.execute(Length(chat="7")) == 0
        assert chats.told == ["making", "not made", "making", "open 7"]


async def test_a_handler_that_runs_out_of_time_while_its_state_is_made_leaves_none():
    bus, told = Bus("slow"), []

    @bus.session
    async def state(session: str) -> AsyncIterator[str]:
        told.append("making")
        if len(told) == 1:
            await asyncio.sleep(3600)
        yield "state"

    @bus.on(Said, timeout_s=0.02, retry=Retry(attempts=2, base_s=0.001))
    async def say(event: Said, context: Context) -> None:
        told.append(await context.session())

    async with running(bus) as client:
        await client.publish(Said(chat="7"))
        assert (await client.flush()).dead == 0
    assert told == ["making", "making", "state"]


async def test_tasks_of_a_handler_that_ask_together_get_one_state(chats: Chats):
    bus, made = Bus("together"), []

    @bus.session
    async def state(session: str) -> AsyncIterator[object]:
        made.append(session)
        await asyncio.sleep(0)
        if len(made) == 1:
            raise ConnectionError("the first fails")
        yield object()

    @bus.on(Said)
    async def say(event: Said, context: Context) -> None:
        failed, *states = await asyncio.gather(*(context.session() for _ in range(3)), return_exceptions=True)
        assert isinstance(failed, ConnectionError)
        assert states[0] is states[1]

    async with running(bus) as client:
        await client.publish(Said(chat="7"))
        assert (await client.flush()).dead == 0
    assert made == ["7", "7"]


async def test_an_end_that_raises_is_logged_with_the_key_and_the_state_is_gone(
    chats: Chats, caplog: pytest.LogCaptureFixture
):
    async def end(session: str) -> None:
        raise {"7": ConnectionError("cannot save"), "9": Odd({})}.get(session, asyncio.CancelledError())

    chats.ends = end
    async with running(chats.bus) as client:
        for key in "789":
            async with client.session(key) as session:
                await session.publish(Said(chat=key, text="x"))
        assert (await client.flush()).dead == 0
        assert await open_sessions(client) == 0
        assert await client.execute(Length(chat="7")) == 0
        chats.ends = None
    records = [record for record in caplog.records if record.name == "shardbus.sessions"]
    *plain, odd = [record.getMessage() for record in records]
    assert plain == [f"the end of the session '{key}' failed; its state is gone" for key in "78"]
    assert odd.startswith("the end of the session '9' failed; its state is gone\n")
    assert "Odd: odd" in caplog.text
    assert "cannot save" in caplog.text


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
async def test_an_end_that_raises_what_ends_programs_ends_nothing_but_itself(chats: Chats, error: type[BaseException]):
    async def end(session: str) -> None:
        await asyncio.sleep(0.001)
        if session == "chat-3":
            raise error
        chats.told.append(session)

    chats.ends = end
    async with running(chats.bus) as client:
        for number in range(9):
            await client.publish(Said(chat=f"chat-{number}", text="x"))
        await client.flush()
    assert sorted(one for one in chats.told if one.startswith("chat-")) == [f"chat-{n}" for n in range(9) if n != 3]


async def test_a_state_that_is_none_is_told(caplog: pytest.LogCaptureFixture):
    bus = Bus("none")

    @bus.session
    async def state(session: str) -> AsyncIterator[int]:
        for _ in range(int(session)):
            yield 1

    @bus.command(Length)
    async def length(command: Length, context: Context) -> int:
        return int(await context.session())

    async with running(bus) as client:
        with pytest.raises(CommandFailed, match="made no state of the session '0': it ended before its yield"):
            await client.execute(Length(chat="0"))
        assert await client.execute(Length(chat="2")) == 1
        await client.publish(SessionEnded(session="2"))
        await client.flush()
    assert "it yields twice; a session has one state" in caplog.text


async def test_an_end_that_is_retried_ends_the_state_once_behind_the_last_attempt(chats: Chats):
    async def follow(event: SessionEnded, context: Context) -> None:
        assert await context.session() == ["x"]
        if context.attempt == 1:
            raise ConnectionError("not yet")

    chats.follows = follow
    async with running(chats.bus) as client:
        async with client.session("7") as session:
            await session.publish(Said(chat="7", text="x"))
        assert (await client.flush()).dead == 0
    assert chats.told.count("end 7: x") == 1
    assert chats.told[-4:] == ["SessionEnded 7 (left)", "SessionEnded 7 (left)", "end 7: x", "closed 7"]


async def test_an_end_that_becomes_a_dead_letter_ends_the_state_all_the_same(chats: Chats):
    async def follow(event: SessionEnded, context: Context) -> None:
        raise ConnectionError("never")

    chats.follows = follow
    async with running(chats.bus) as client:
        async with client.session("7") as session:
            await session.publish(Said(chat="7", text="x"))
        assert (await client.flush()).dead == 1
        assert "end 7: x" in chats.told
        assert await open_sessions(client) == 0


# -- what ends by itself


async def test_an_idle_session_ends_at_its_time_counted_from_its_last_use():
    chats = Chats(idle_seconds=60.0)
    async with testing.run(chats.bus) as kit, kit.client.subscribe(SessionEnded) as ends:
        async with kit.client.session("7") as session:
            await session.publish(Said(chat="7", text="x"))
            await kit.advance(50)
            await session.publish(Said(chat="7", text="y"))
            await kit.advance(59)
            assert chats.told == ["SessionStarted 7", "open 7"]
            await kit.advance(1)
            assert chats.told[2:] == ["SessionEnded 7 (idle)", "end 7: x y", "closed 7"]
            assert await anext(ends) == SessionEnded(session="7", reason="idle")
            await session.publish(Said(chat="7", text="z"))  # it begins anew
            await kit.settle()
            assert chats.told[-1] == "open 7"
        await kit.settle()
        assert chats.saved["7"] == ["x", "y", "z"]
        await kit.advance(1000)
        assert len([one for one in chats.told if one.startswith("SessionEnded")]) == 2


async def test_a_session_that_has_no_state_is_idle_from_its_beginning():
    chats = Chats(idle_seconds=60.0)
    async with testing.run(chats.bus) as kit, kit.client.session("7"):
        await kit.settle()
        await kit.advance(61)
        assert chats.told == ["SessionStarted 7", "SessionEnded 7 (idle)"]


async def test_sessions_of_an_application_without_a_state_are_not_idle():
    chats = Chats(with_state=False)
    async with testing.run(chats.bus) as kit, kit.client.session("7"):
        await kit.settle()
        await kit.advance(10_000)
        assert chats.told == ["SessionStarted 7"]


@pytest.mark.parametrize("with_state", [True, False])
async def test_sessions_of_a_client_that_closes_without_leaving_them_end_at_once(with_state: bool):
    chats = Chats(with_state=with_state)
    async with testing.run(chats.bus, shards=2) as kit:
        async with kit.connect() as other:
            for key in "12":
                await other.session(key).__aenter__()
            async with kit.client.session("2"):
                await kit.settle()
                await other.close(1.0)
                await kit.settle()
                gone = ["SessionEnded 1 (client gone)", "SessionEnded 2 (client gone)"]
                assert sorted(chats.told)[:2] == gone
                assert sum(shard.open_sessions for shard in kit.shards if shard) == 1
        await kit.settle()
        assert sum(shard.open_sessions for shard in kit.shards if shard) == 0


async def test_sessions_of_a_client_that_is_not_heard_of_for_30_seconds_end():
    chats = Chats()
    async with testing.run(chats.bus) as kit, kit.connect() as other:
        await other.session("7").__aenter__()
        await other.publish(Said(chat="7", text="x"))
        await kit.advance(100)
        assert chats.told == ["SessionStarted 7", "open 7"]
        other._outboxes.send = lambda *_: None  # type: ignore[method-assign, assignment]
        await kit.advance(26)
        assert chats.told == ["SessionStarted 7", "open 7"]
        await kit.advance(6)
        assert chats.told[2:] == ["SessionEnded 7 (client gone)", "end 7: x", "closed 7"]


async def test_a_worker_full_of_sessions_ends_the_one_that_is_idle_for_longest():
    chats = Chats()
    async with running(chats.bus, replace(DEFAULT_LIMITS, session_states_max=2)) as client:
        for key in ("1", "2", "1", "3"):
            await client.publish(Said(chat=key, text=key))
            await client.flush()
        await until(lambda: "closed 2" in chats.told)
        assert chats.told[-3:] == ["SessionEnded 2 (full)", "end 2: 2", "closed 2"]
        assert await open_sessions(client) == 2


async def test_ends_that_cannot_be_published_now_are_published_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from shardbus import OutboxFull
    from shardbus.handler_client import HandlerClient

    chats = Chats(idle_seconds=5.0)
    publish, refusals = HandlerClient.publish, [OutboxFull(0, 1)]

    async def refuse(self: HandlerClient, *arguments: Any) -> None:
        if refusals:
            raise refusals.pop()
        await publish(self, *arguments)

    monkeypatch.setattr(HandlerClient, "publish", refuse)
    async with testing.run(chats.bus) as kit:
        await kit.client.publish(Said(chat="7"))
        await kit.advance(5.5)
        assert "sessions that have ended cannot be told yet: 1" in caplog.text
        assert chats.told == ["open 7"]
        await kit.advance(1)
        assert "SessionEnded 7 (idle)" in chats.told


# -- the worker


async def test_a_worker_that_drains_ends_all_states_before_its_lifespan(
    chats: Chats, caplog: pytest.LogCaptureFixture
):
    @chats.bus.lifespan
    async def pool() -> AsyncIterator[None]:
        yield
        chats.told.append("pool closed")

    async def end(session: str) -> None:
        await asyncio.sleep(0)
        if session == "1":
            raise ConnectionError("cannot save")

    chats.ends = end
    async with running(chats.bus) as client:
        for key in range(200):
            await client.publish(Said(chat=str(key), text="x"))
    assert len(chats.saved) == 199
    assert chats.told[-1] == "pool closed"
    assert chats.told.count("pool closed") == 1
    assert [record.getMessage() for record in caplog.records] == ["the end of the session '1' failed; its state is gone"]


async def test_all_ends_are_run_also_where_they_catch_what_tasks_of_theirs_raise(chats: Chats):
    async def end(session: str) -> None:
        await catch_what_a_child_raises()

    chats.ends = end
    async with running(chats.bus) as client:
        await client.publish_many([Said(chat=f"chat-{number}", text="x") for number in range(200)])
    assert len(chats.saved) == 200


async def test_ends_that_take_too_long_do_not_hold_up_a_worker_that_drains(
    chats: Chats, caplog: pytest.LogCaptureFixture
):
    async def end(session: str) -> None:
        if session != "1":
            await asyncio.sleep(3600)

    chats.ends = end
    async with running(chats.bus, replace(DEFAULT_LIMITS, session_ends_s=0.05)) as client:
        for key in "123":
            await client.publish(Said(chat=key, text="x"))
    assert chats.saved == {"1": ["x"]}
    assert caplog.messages == ["of 2 sessions the end was not run: there was no time for it (0.05 s)"]


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_nor_do_they_however_they_answer_that_there_is_no_time(chats: Chats, answer: Callable[[], Awaitable[None]]):
    begun: list[str] = []

    async def end(session: str) -> None:
        begun.append(session)
        await answer()

    chats.ends = end
    async with running(chats.bus, replace(DEFAULT_LIMITS, session_ends_s=0.05)) as client:
        await client.publish_many([Said(chat=f"chat-{number}") for number in range(100)])
    assert len(begun) == 64  # no other is begun after the time is over


async def test_a_worker_says_how_many_ends_it_had_no_time_for_and_runs_none_of_them_later(chats: Chats):
    async def end(session: str) -> None:
        await asyncio.sleep(3600)

    chats.ends = end
    async with running(chats.bus) as client:
        for key in "12":
            await client.publish(Said(chat=key))
        await client.flush()
        (shard,) = client._connector._bus.shards  # type: ignore[attr-defined]
        assert await shard.end_sessions(0.02) == ["sessions whose ends were not run: 2"]
        assert await shard.end_sessions(0.02) == []
    assert chats.saved == {}


async def test_a_state_is_made_again_after_its_worker_was_killed(chats: Chats):
    async with testing.run(chats.bus) as kit:
        async with kit.client.session("7") as session:
            await session.publish(Said(chat="7", text="x"))
            await kit.settle()
            await kit.kill(0)
            await session.publish(Said(chat="7", text="y"))
            await kit.settle()
            assert chats.told == ["SessionStarted 7", "open 7", "closed 7", "open 7"]
        await kit.settle()
        assert chats.told[4:] == ["SessionEnded 7 (left)", "end 7: y", "closed 7"]


async def test_a_cancellation_that_one_state_leaves_behind_is_not_taken_for_that_of_another():
    dropped: list[str] = []

    async def state(session: str) -> AsyncIterator[str]:
        try:
            yield session
        finally:
            dropped.append(session)
            if session == "a":
                await catch_what_a_child_raises()  # it leaves a cancellation behind in Python 3.11
            else:
                raise asyncio.CancelledError  # as of what somebody else has cancelled

    maker = StateMaker(name="state", make=state, idle_s=900.0)
    states = SessionStates(maker, DEFAULT_LIMITS, monotonic_ns, None)
    states.start()
    for key in "abc":
        await states.state(key)
    await states.abort()
    assert dropped == ["a", "b", "c"]


async def test_who_has_a_session_open_is_known_to_the_successor_of_a_worker_that_was_killed(chats: Chats):
    async with testing.run(chats.bus) as kit, kit.connect() as other:
        for client in (other, other, kit.client):
            await client.session("7").__aenter__()
        async with other.session("left"):
            await kit.settle()
        await kit.settle()
        for _ in range(3):
            await kit.kill(0)
            await kit.advance(5)
        assert kit.shards[0] is not None
        assert kit.shards[0].open_sessions == 1
        chats.told.clear()
        await other.close(1.0)
        await kit.advance(1)
        assert chats.told == ["SessionEnded 7 (client gone)"]
        assert kit.shards[0].open_sessions == 1
        await kit.client.close(1.0)
        await kit.advance(1)
        assert chats.told == ["SessionEnded 7 (client gone)"] * 2
        assert kit.shards[0].open_sessions == 0


async def test_a_successor_is_told_once_of_each_session_however_often_it_dies_first(chats: Chats):
    goes_on = asyncio.Event()

    async def make(session: str) -> None:
        await goes_on.wait()

    chats.makes = make
    async with testing.run(chats.bus) as kit:
        async with kit.client.session("7") as session:
            await session.publish(Said(chat="7", text="x"))  # what comes behind it waits
            for _ in range(4):
                await kit.kill(0)
            assert [one.type for one in kit.published].count("shardbus.SessionKept") == 1
            goes_on.set()
            await kit.advance(1)
            await kit.kill(0)
            assert [one.type for one in kit.published].count("shardbus.SessionKept") == 2
        await kit.advance(1)
        assert kit.shards[0] is not None
        assert kit.shards[0].open_sessions == 0


async def test_a_call_that_is_made_twice_has_the_state_twice(chats: Chats):
    async with testing.run(chats.bus) as kit:
        kit.duplicate_at(1)
        await kit.client.publish(Said(chat="7", text="x"))
        await kit.settle()
        assert await kit.client.execute(Length(chat="7")) == 2


# -- what a user may do wrong


async def test_a_state_that_cannot_be_asked_for_is_refused(chats: Chats):
    async with running(chats.bus) as client:
        for event, told in (
            (Numbered(number=7), "this message has the key 7; a session's key is a text"),
            (Identified(id=UUID(int=1)), "this message has the key"),
            (Loose(text="x"), "this message has no key; a session's key is a text"),
        ):
            await client.publish(event)
            await client.flush()
            letter = (await client.dead_letters())[-1]
            assert (letter.error_type, told in letter.error) == ("UsageError", True)
        await client.publish(Said(chat="7"))
        await client.flush()
        with pytest.raises(UsageError, match="the handler of this context has returned"):
            await chats.contexts[0].session()
    with pytest.raises(UsageError, match="of no running worker"):
        await Context("7", b"p", 1, 1, 0).session()


async def test_an_application_without_a_state_says_so():
    chats = Chats(with_state=False)
    async with running(chats.bus) as client:
        with pytest.raises(CommandFailed, match="says nowhere what a session's state is"):
            await client.execute(Length(chat="7"))


async def test_a_state_is_not_asked_for_in_a_thread(chats: Chats):
    found: list[str] = []

    @chats.bus.on(Batched, in_thread=True)
    def threaded(event: Batched, context: Context) -> None:
        try:
            asyncio.run(context.session())
        except UsageError as error:
            found.append(str(error))

    async with running(chats.bus) as client:
        await client.publish(Batched(chat="7"))
        await client.flush()
    assert len(found) == 1
    assert "not its threads" in found[0]


async def plain(session: str) -> list[str]:
    return []


async def takes_nothing() -> AsyncIterator[int]:
    yield 1


async def takes_three(session: str, worker: WorkerInfo, more: int) -> AsyncIterator[int]:
    yield 1


async def sound(session: str) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("register", "told"),
    [
        (lambda bus: bus.session(plain), "takes an `async def` that yields the session's state once, not plain"),
        (lambda bus: bus.session(7), "yields the session's state once, not 7"),
        (lambda bus: bus.session()(takes_nothing), "takes_nothing: a session's state is made from"),
        (lambda bus: bus.session(takes_three), "takes_three: a session's state is made from"),
        (lambda bus: [bus.session(sound), bus.session(sound)], "sound makes the state of this application's sessions"),
        *(
            (lambda bus, seconds=seconds: bus.session(idle_seconds=seconds), f"idle_seconds={seconds!r}: write seconds")
            for seconds in (0, -1, True, "900", float("inf"), float("nan"))
        ),
    ],
)
def test_a_registration_that_makes_no_sense_is_refused(register: Callable[[Bus], Any], told: str):
    with pytest.raises(RegistrationError) as raised:
        register(Bus("refused"))
    assert told in str(raised.value)


def test_a_decorator_returns_the_function_itself():
    assert Bus("one").session(sound) is sound
    assert Bus("two").session(idle_seconds=1)(sound) is sound


# -- nothing is left


async def test_many_sessions_leave_nothing_behind(chats: Chats):
    async with running(chats.bus, shards=2) as client:
        for at in range(1000):
            async with client.session(str(at)) as session:
                await session.publish(Said(chat=str(at), text="x"))
        await client.flush()
        assert await open_sessions(client) == 0
        assert len(chats.saved) == 1000
        for shard in client._connector._bus.shards:  # type: ignore[attr-defined]
            states = shard.states
            assert [states._states, states._opening, [*states._due], states._table._heard_ns] == [{}, {}, [], {}]
            assert not shard.lanes.busy_keys


async def test_a_state_is_made_and_ended_without_variables_that_leak(chats: Chats):
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")
    bus, seen = Bus("variables"), []

    @bus.session(idle_seconds=0.05)
    async def state(session: str) -> AsyncIterator[None]:
        yield
        seen.append(variable.get())

    @bus.on(Said)
    async def say(event: Said, context: Context) -> None:
        variable.set("dirty")
        await context.session()

    async with running(bus) as client:
        await client.publish(Said(chat="7"))
        await until(lambda: bool(seen))
    assert seen == ["clean"]
