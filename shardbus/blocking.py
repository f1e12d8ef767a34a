"""The client for programs without an event loop: scripts, and the threads of a synchronous web framework.

    with shardbus.blocking.connect() as client:
        client.publish(OrderPlaced(order_id="42", amount=9.5))
        print(client.execute(GetTotal(order_id="42")))

It is the asyncio client, on an event loop in one background thread; the calls wait for it. Many threads may share one.

**What a call costs.** `publish` checks and encodes the event in the calling thread, puts it into the *hand-over*, and wakes
the loop once a burst: 2.4 µs an event in a loop, where the asyncio client took 1.1 to 2.5 on the same machine, and 30 µs
for one that comes alone. Where the hand-over or an outbox is full, and for a large event, it waits for a round trip to the
loop instead, as all other calls do: 50 to 90 µs. `publish_many` is one round trip a call, and then costs what the asyncio
client's does; with fewer than some 30 events `publish` is the cheaper one.

**The hand-over** is a part of the outbox: up to 1,024 events of up to 1 KiB each, above the outbox's own bound. What is in
it has been published, is waited for by `flush` and by the end of the block, and comes before all that its thread does next.
With `on_full="reject"` it is not used: whether there is room must be known before `publish` returns. Nor is it with
middleware, which runs on the loop.

**Streams, subscriptions and sessions** are kept on the loop; how threads read them is in `blocking_readers.py`, and the
handlers of sessions, each in a thread of its own, are in `blocking_sessions.py`.

**Forks.** The thread stays in the parent, so a client cannot be used in a child of `os.fork()`, and says so. Pre-fork
servers connect in their workers: in gunicorn's `post_fork`, in uWSGI's `@postfork`, or at the first request.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from operator import length_hint
from types import TracebackType
from typing import Any, Final, TypeVar
from uuid import UUID

from shardbus import connecting
from shardbus.arguments import check_seconds
from shardbus.blocking_readers import BlockingStream, BlockingSubscription, open_stream
from shardbus.blocking_sessions import BlockingSession
from shardbus.bus import Bus
from shardbus.client import Client
from shardbus.config import DEFAULT_LIMITS, StoreFull
from shardbus.dead_letters import DeadLetter, DeadLetterFilter
from shardbus.errors import BusRejected, ClientClosed, NotDelivered, UsageError
from shardbus.event_loop import run
from shardbus.messages import Command, Event
from shardbus.outboxes import Ledger, OnFull, Statistics
from shardbus.packing import Packed
from shardbus.publishing import PublishMiddleware
from shardbus.scheduled_events import Scheduled
from shardbus.subscriptions import OnSlow

log = logging.getLogger("shardbus.blocking")

ResultT = TypeVar("ResultT")
ReplyT = TypeVar("ReplyT")
EventT = TypeVar("EventT", bound=Event)

_HANDED_EVENTS_MAX: Final = DEFAULT_LIMITS.handed_events_max
_HANDED_EVENT_BYTES_MAX: Final = DEFAULT_LIMITS.handed_event_bytes_max
_LOOK_S: Final = 0.1  # a KeyboardInterrupt may strike between the hand-over and the waking, so the loop looks by itself


def connect(
    address: str | None = None,
    *,
    timeout: float = 10.0,
    close_timeout: float = 30.0,
    on_full: OnFull = "wait",
    on_pressure: Callable[[bool], object] | None = None,
    middleware: Sequence[PublishMiddleware] = (),
) -> BlockingClient:
    """Connect to a bus, and wait for it: `with shardbus.blocking.connect() as client`.

    Leaving the block flushes. A program that has no such block calls `close()`; at the end of the process a client that is
    open is closed, and what was not delivered is logged.

    Args:
        address: `ipc://DIRECTORY` or `tcp://HOST:PORT`; default: `$SHARDBUS_URL`, or this user's own bus.
        timeout: seconds to wait for a bus to answer.
        close_timeout: seconds that leaving the block waits for what is unfinished.
        on_full: as for `shardbus.connect`.
        on_pressure: as for `shardbus.connect`; called from the client's own thread, so it must not wait.
        middleware: likewise.

    Raises:
        BusUnreachable: no bus answered in time.
        ConfigError: the address is none.
        UsageError: an `on_full` that is none, or an event loop runs in this thread.
    """
    block = connecting.connect(
        address,
        timeout=timeout,
        close_timeout=close_timeout,
        on_full=on_full,
        on_pressure=on_pressure,
        middleware=middleware,
    )
    return BlockingClient(block, hands_over=on_full != "reject" and not middleware)


@contextlib.contextmanager
def local(
    bus: Bus,
    *,
    shards: int = 1,
    dead_letters: str | None = None,
    dead_letters_max_rows: int = DEFAULT_LIMITS.store_rows_max,
    dead_letters_max_bytes: int = DEFAULT_LIMITS.store_bytes_max,
    dead_letters_full: StoreFull = DEFAULT_LIMITS.store_full,
    close_timeout: float = 30.0,
    on_full: OnFull = "wait",
    on_pressure: Callable[[bool], object] | None = None,
    middleware: Sequence[PublishMiddleware] = (),
) -> Iterator[BlockingClient]:
    """Run an application in this process, on the client's thread: `with shardbus.blocking.local(bus) as client`.

    For small programs, and tests of synchronous ones. The arguments and errors are those of `Bus.local`.
    """
    block = bus.local(
        shards=shards,
        dead_letters=dead_letters,
        dead_letters_max_rows=dead_letters_max_rows,
        dead_letters_max_bytes=dead_letters_max_bytes,
        dead_letters_full=dead_letters_full,
        close_timeout=close_timeout,
        on_full=on_full,
        on_pressure=on_pressure,
        middleware=middleware,
    )
    with BlockingClient(block, hands_over=on_full != "reject" and not middleware) as client:
        yield client


class _Outcome:
    """What the client's thread tells others, once.

    They wait for a bare lock, which that thread only ever releases. A `Future` has one that both take, and an interrupt may
    leave it with who waited: then the client's thread stands still for ever.
    """

    __slots__ = ("_told", "error", "is_told", "value")

    def __init__(self) -> None:
        self._told = threading.Lock()
        self._told.acquire()
        self.is_told = False
        self.value: Any = None
        self.error: BaseException | None = None

    def tell(self, value: Any = None, error: BaseException | None = None) -> None:
        """Say it. The second time, nothing happens."""
        if not self.is_told:
            self.value, self.error, self.is_told = value, error, True
            self._told.release()

    def wait(self) -> None:
        """Wait until it is told."""
        with self._told:
            pass

    def result(self) -> Any:
        """Wait, and return the value or raise the error."""
        self.wait()
        if self.error is None:
            return self.value
        try:
            raise self.error
        finally:
            del self  # the error holds this frame


class _Call(_Outcome):
    """Something to do on the loop, whose outcome a thread waits for."""

    __slots__ = ("given_up", "task", "work")

    def __init__(self, work: Callable[[Client], Coroutine[Any, Any, Any]]) -> None:
        super().__init__()
        self.work = work
        self.task: asyncio.Task[Any] | None = None
        self.given_up = False


class BlockingClient:
    """Publishes events and executes commands, from any thread. Made by `connect` and `local`.

    Events of one key that one thread publishes are handled in the order of its calls. A `KeyboardInterrupt` in a call that
    waits cancels it on the loop: its event may or may not have been published. Leaving the block still flushes then; a
    second one there ends the client at once.

    Every call raises `ClientClosed` after the block was left, and `UsageError` in a child of `os.fork()` and where an event
    loop runs in the calling thread: it would stand still, and has the asyncio client.
    """

    def __init__(self, block: AbstractAsyncContextManager[Client], *, hands_over: bool) -> None:
        _check_no_loop()
        self._hands_over = hands_over
        self._handed: deque[Packed] = deque()
        self._has_room = False
        self._interrupted: set[_Call] = set()  # yet to be cancelled: what is published after one of them stays behind it
        self._woken = False
        # What is handed over, and the closing, come one after another. A signal's handler may come in between, and wait for
        # the loop, so that takes no lock.
        self._lock = threading.RLock()
        self._closing = False
        self._ended = False
        self._forked = False
        self._calls: set[_Call] = set()
        self._client: Client
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._leave: asyncio.Event
        self._given_up = False
        self._aborting: asyncio.Task[None] | None = None
        self._opened = _Outcome()
        self._closed = _Outcome()
        # A daemon: `atexit` comes after the end of all other threads, which may use this client until then.
        self._thread = threading.Thread(target=self._live, args=(block,), name="shardbus-client", daemon=True)
        _clients.add(self)
        try:
            self._thread.start()
            self._opened.result()
        except BaseException:
            self._give_up()
            raise
        atexit.register(self._close_at_exit)

    # -- life

    def __enter__(self) -> BlockingClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (NotDelivered, BusRejected) as left:
            # The block's own error is what its caller must see; what was not delivered is a note to it.
            if error is None:
                raise
            error.add_note(str(left))

    def close(self) -> None:
        """Flush, say good-bye, and end the thread; the second time, and in a child of `os.fork()`, do nothing.

        Raises:
            NotDelivered: events were left when the time was up.
            BusRejected: the bus has refused this client for good.
        """
        if self._forked:
            return  # its events are the parent's to deliver
        _check_no_loop()
        try:
            with self._lock:
                first = not self._closing
                self._closing = True  # nothing is handed over any more
            self._tell_loop(self._leave.set)
            self._closed.wait()
        except BaseException:  # whoever closes was interrupted, before the loop heard of it or while it flushes
            self._give_up()
            raise
        self._thread.join()
        atexit.unregister(self._close_at_exit)
        if first:
            self._closed.result()

    def _give_up(self) -> None:
        """End the thread at once. What is unfinished is forgotten."""
        self._given_up = True
        if self._loop is not None:
            self._tell_loop(self._abort)
        with contextlib.suppress(RuntimeError):  # interrupted before it had begun: it will see the flag
            self._thread.join()
        atexit.unregister(self._close_at_exit)

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except Exception as error:  # the process ends, and nobody can catch it
            log.error("at the end of the process: %s", error)

    # -- events

    def publish(
        self,
        event: Event,
        *,
        headers: dict[str, str] | None = None,
        deadline: float | None = None,
        timeout: float | None = None,
        at: datetime | float | None = None,
        delay: float | None = None,
    ) -> None:
        """Publish an event, and wait for room where its outbox is full. The promise is that of `Client.publish`.

        Args:
            event: any event; its key says where it goes.
            headers: text for the handlers' `context.headers`.
            deadline: as for `Client.publish`.
            timeout: seconds to wait for room, where the outbox is full. Default: for ever.
            at: not before then; see `Client.schedule`. Costs a round trip to the loop.
            delay: likewise, seconds from now.

        Raises:
            TimeoutError: there was no room in time; nothing was published.
            InvalidKey, OutboxFull, MessageTooLarge, UsageError: as for `Client.publish`; nothing was published.
            BusRejected: the bus has refused this client for good.
        """
        self._check()
        if timeout is not None:
            check_seconds("timeout", timeout)
        if self._has_room and deadline is None and at is None and delay is None:
            packed = self._client.pack(event, headers)
            if packed[-1] <= _HANDED_EVENT_BYTES_MAX and self._hand_over(packed):
                return
        self._call(lambda client: _publish(client, event, headers, deadline, timeout, at, delay))

    def publish_many(
        self, events: Sequence[Event], *, headers: dict[str, str] | None = None, deadline: float | None = None
    ) -> None:
        """Publish events one after another, at a lower cost for each; waits for room without end.

        Headers and a deadline are those of every event. If an event cannot be published, those before it have been, and the
        error is that event's. Raises as `publish` does.
        """
        self._call(lambda client: client.publish_many(events, headers=headers, deadline=deadline))

    def flush(self, timeout: float | None = None) -> Ledger:
        """Wait until every event published so far, by any thread, is handled, dead or waiting; return the counts.

        Raises:
            NotDelivered: `timeout` seconds were not enough.
            BusRejected: the bus has refused this client for good.
        """
        return self._call(lambda client: client.flush(timeout))

    def ledger(self) -> Ledger:
        """What became of this client's events so far, as far as it has heard."""
        return self._call(lambda client: _at_once(client.ledger))

    def statistics(self) -> Statistics:
        """The ledger, what publishing waited for, and what is held for each shard."""
        return self._call(lambda client: _at_once(client.statistics))

    # -- commands

    def execute(
        self, command: Command[ReplyT], *, timeout: float = 5.0, headers: dict[str, str] | None = None
    ) -> ReplyT:
        """Send a command and wait for its reply. It takes its place behind the earlier messages of its key.

        Raises:
            TimeoutError: no reply within `timeout` seconds; the message says whether the command may have run.
            CommandFailed: its handler raised, or there is none; carries the remote traceback.
            CommandLost: the worker died after it was sent; whether it ran is unknown.
            InvalidKey, MessageTooLarge: as for `publish`.
        """
        return self._call(lambda client: client.execute(command, timeout=timeout, headers=headers))

    def stream(
        self,
        command: Command[ReplyT],
        *,
        timeout: float = 60.0,
        window: int = 64,
        headers: dict[str, str] | None = None,
    ) -> BlockingStream[ReplyT]:
        """Send a command whose handler yields, and read its items: `for token in client.stream(Chat(…))`.

        The arguments and errors are those of `Client.stream`; what comes while it is read is in `BlockingStream`. As a
        block, `with client.stream(…) as tokens`, it ends the handler wherever the block is left.
        """
        return open_stream(
            command,
            lambda client, ahead: client.stream(command, timeout=timeout, window=ahead, headers=headers),
            window,
            self._call,
            self._call_at_end,
        )

    # -- listening

    def subscribe(
        self,
        *event_types: type[EventT],
        key: str | int | bytes | UUID | None = None,
        queue_events_max: int = 1024,
        on_slow: OnSlow = "drop_oldest",
        timeout: float | None = None,
    ) -> BlockingSubscription[EventT]:
        """Follow events of these types as they are handled: `with client.subscribe(Said, timeout=5.0) as events`.

        See `Client.subscribe` for what comes, and for the other arguments and errors; events wait for the reader on the
        client's loop, so they come in whatever its threads do.

        Args:
            *event_types: one or several types that the application handles.
            key: events of this key only; default: of all keys.
            queue_events_max: how many events wait for the reader here, up to 16 MiB.
            on_slow: what happens then.
            timeout: seconds to wait for the next event, and, where it is a block, for the workers at its beginning; then
                `TimeoutError` says that nothing came, and the subscription goes on. Default: for ever.

        Raises:
            UsageError: a time-out that is none; else as for `Client.subscribe`.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        events = self._call(
            lambda client: _at_once(
                lambda: client.subscribe(*event_types, key=key, queue_events_max=queue_events_max, on_slow=on_slow)
            )
        )
        name = ", ".join(kind.__name__ for kind in event_types) + ("" if key is None else f" of the key {key!r}")
        return BlockingSubscription(events, name, timeout, self._call, self._call_at_end)

    def session(self, key: str) -> BlockingSession:
        """A group of messages under one key: `with client.session("chat-7") as session`. See `BlockingSession`.

        Raises:
            UsageError: the key is no text.
        """
        session = self._call(lambda client: _at_once(lambda: client.session(key)))
        return BlockingSession(session, self.subscribe, self._call, self._call_at_end)

    # -- scheduled events

    def schedule(
        self,
        event: Event,
        *,
        at: datetime | float | None = None,
        delay: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> Scheduled:
        """Publish an event that is to be handled later, and return its handle. See `Client.schedule`."""
        return self._call(lambda client: client.schedule(event, at=at, delay=delay, headers=headers))

    def cancel(self, which: Scheduled | str, *, timeout: float = 30.0) -> bool:
        """Cancel a scheduled event; return whether it will never be handled. See `Client.cancel`."""
        return self._call(lambda client: client.cancel(which, timeout=timeout))

    # -- what the bus knows

    def status(self, *, timeout: float = 5.0) -> dict[str, Any]:
        """The bus as its supervisor sees it; the form of `shardbus status --json`. Raises `BusUnreachable`."""
        return self._call(lambda client: client.status(timeout=timeout))

    def dead_letters(self, where: DeadLetterFilter | None = None, *, limit: int = 1000) -> list[DeadLetter]:
        """Dead letters of all shards; see `Client.dead_letters`."""
        return self._call(lambda client: client.dead_letters(where, limit=limit))

    def redrive(self, where: DeadLetterFilter | None = None, *, rate: float | None = None) -> int:
        """Have dead letters handled again; return how many. See `Client.redrive`."""
        return self._call(lambda client: client.redrive(where, rate=rate))

    def purge(self, where: DeadLetterFilter | None = None) -> int:
        """Remove dead letters for good; return how many. See `Client.purge`."""
        return self._call(lambda client: client.purge(where))

    # -- inside: from the callers' threads

    def _check(self) -> None:
        _check_no_loop()
        if self._forked:
            raise UsageError(
                f"this client was made in another process, before os.fork() made this one (process {os.getpid()}); connect "
                "after the fork, for instance in gunicorn's post_fork"
            )
        if self._closing:
            raise ClientClosed("the client is closed; use it inside its `with` block")

    def _hand_over(self, packed: Packed) -> bool:
        """Put an event where the loop will take it from; False where there is no room."""
        with self._lock:
            is_open = self._has_room and not (self._closing or self._interrupted)
            if not is_open or len(self._handed) >= _HANDED_EVENTS_MAX:
                return False
            self._handed.append(packed)
            if not self._woken:
                self._woken = True
                self._tell_loop(self._hand_on)
            return True

    def _call(self, work: Callable[[Client], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """Have the loop do something, behind all that was handed over, and wait for the outcome."""
        self._check()
        call = _Call(work)
        try:
            self._calls.add(call)
            if self._ended:  # looked at after it is there, and set before they are looked at
                raise _closed_before()
            self._tell_loop(self._begin, call)
            result: ResultT = call.result()
            return result
        finally:
            if not call.is_told:  # whoever waits was interrupted, and may be once more: this takes no lock
                self._interrupted.add(call)
                self._tell_loop(self._cancel, call)
            del call  # its error holds this frame

    def _call_at_end(self, work: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
        """As `_call`, where a block is left: in a client that has ended, or is another process's, nothing is to be done."""
        if not self._forked:
            with contextlib.suppress(ClientClosed):
                self._call(work)

    def _tell_loop(self, do: Callable[..., object], *arguments: Any) -> None:
        """Have the loop do something soon. One that has ended has done all that was promised, and failed the rest."""
        assert self._loop is not None  # it has begun
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(do, *arguments)

    def _note_fork(self) -> None:
        self._lock = threading.RLock()  # another thread of the parent's may have held it
        self._forked = True

    # -- inside: in the client's thread

    def _live(self, block: AbstractAsyncContextManager[Client]) -> None:
        error: BaseException | None = None
        try:
            run(self._use(block))
        except BaseException as raised:  # it is raised again where somebody opens or closes
            error = raised
        self._closing = self._ended = True
        for call in list(self._calls):
            call.tell(error=_closed_before())
        for told in (self._opened, self._closed):
            told.tell(error=error)

    async def _use(self, block: AbstractAsyncContextManager[Client]) -> None:
        self._leave = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        if self._given_up:
            raise asyncio.CancelledError
        async with block as self._client:
            self._look()
            self._opened.tell()
            await self._leave.wait()
            self._hand_on()

    def _abort(self) -> None:
        if self._opened.is_told:
            self._leave.set()
            self._aborting = asyncio.ensure_future(self._client.abort())  # so the flush that waits is over, too
        elif self._main is not None:
            self._main.cancel()

    def _look(self) -> None:
        asyncio.get_running_loop().call_later(_LOOK_S, self._look)
        for call in list(self._interrupted):
            self._cancel(call)
        self._hand_on()
        self._feel_room()

    def _hand_on(self) -> None:
        """Take over what was handed over. First the flag: who hands something over after this wakes the loop again."""
        self._woken = False
        if self._handed:
            taken = list(self._handed)  # in one go: nothing in it lets another thread run
            published = iter(taken)
            try:
                self._client.publish_packed(published)
                self._feel_room()
            finally:  # not before, so that no more are handed over until it is known whether there is room for them
                for _ in range(len(taken) - length_hint(published)):
                    self._handed.popleft()

    def _feel_room(self) -> None:
        self._has_room = self._hands_over and self._client.has_room()

    def _begin(self, call: _Call) -> None:
        if call.given_up:
            return
        try:
            self._hand_on()
        except Exception as error:  # nobody but its caller would hear of it, and would wait for ever
            self._calls.discard(call)
            call.tell(error=error)
            return
        call.task = asyncio.ensure_future(call.work(self._client))
        call.task.add_done_callback(lambda task: self._end(call, task))

    def _cancel(self, call: _Call) -> None:
        if call not in self._interrupted:
            return  # `_look` has seen to it
        self._interrupted.discard(call)
        call.given_up = True
        if call.task is not None:
            call.task.cancel()
        else:
            self._calls.discard(call)

    def _end(self, call: _Call, task: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        self._feel_room()
        if task.cancelled():
            call.tell(error=_closed_before())
        elif (error := task.exception()) is not None:
            call.tell(error=error)
        else:
            call.tell(task.result())


async def _publish(
    client: Client,
    event: Event,
    headers: dict[str, str] | None,
    deadline: float | None,
    timeout: float | None,
    at: datetime | float | None,
    delay: float | None,
) -> None:
    try:
        async with asyncio.timeout(timeout):
            await client.publish(event, headers=headers, deadline=deadline, at=at, delay=delay)
    except TimeoutError:
        raise TimeoutError(
            f"{type(event).__name__}: the outbox was full for {timeout:g} s, so nothing was published "
            "(see `shardbus status`)"
        ) from None


def _closed_before() -> ClientClosed:
    return ClientClosed("the client was closed before the call was done")


async def _at_once(ask: Callable[[], ResultT]) -> ResultT:
    return ask()


def _check_no_loop() -> None:
    # Not `get_running_loop`, which raises where there is none: 0.03 against 0.4 µs.
    if asyncio._get_running_loop() is not None:
        raise UsageError(
            "an event loop runs in this thread, and a blocking call would stop it; use the asyncio client there: "
            "async with shardbus.connect() as client"
        )


_clients: Final[weakref.WeakSet[BlockingClient]] = weakref.WeakSet()


def _note_fork() -> None:
    for client in list(_clients):
        client._note_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
