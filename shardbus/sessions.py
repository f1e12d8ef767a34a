"""Sessions: messages of one key, and handlers in the client's process for what is handled under it.

Knows the client by what it asks of it. What a session has at its worker is in `session_states`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol, TypeVar

from shardbus.cancellation import is_own_cancellation, uncancel
from shardbus.errors import ClientClosed, UsageError
from shardbus.messages import Command, Event, Message, key_getter, to_wire_key
from shardbus.session_events import SessionEnded, SessionKept, SessionStarted
from shardbus.streams import Stream
from shardbus.subscriptions import Missed, Subscription
from shardbus.tracebacks import log_error

log = logging.getLogger("shardbus.client")

ReplyT = TypeVar("ReplyT")
EventT = TypeVar("EventT", bound=Event)
HandlerT = TypeVar("HandlerT", bound=Callable[[Any], Any])


class Host(Protocol):
    """What a session asks of the client; see there."""

    async def publish(
        self,
        event: Event,
        *,
        headers: dict[str, str] | None = None,
        deadline: float | None = None,
        at: datetime | float | None = None,
        delay: float | None = None,
    ) -> None:
        """Publish an event."""

    async def publish_many(
        self, events: Sequence[Event], *, headers: dict[str, str] | None = None, deadline: float | None = None
    ) -> None:
        """Publish events one after another."""

    async def execute(
        self, command: Command[ReplyT], *, timeout: float = 5.0, headers: dict[str, str] | None = None
    ) -> ReplyT:
        """Execute a command."""

    def stream(
        self,
        command: Command[ReplyT],
        *,
        timeout: float = 60.0,
        window: int = 64,
        headers: dict[str, str] | None = None,
    ) -> Stream[ReplyT]:
        """Stream a command's reply."""

    def subscribe(self, *event_types: type[EventT], key: str) -> Subscription[EventT]:
        """Follow events."""


class _Held:
    __slots__ = ("times", "told")

    def __init__(self) -> None:
        self.times = 0
        self.told: Callable[[], bool] | None = None  # whether what was told last has arrived


class OpenSessions:
    """The sessions that a client has open, as many as its program opens. A worker that takes the place of another does not
    know them, so they are told again, each once what was told of it before has arrived."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def entered(self, key: str) -> None:
        """A session's beginning is on its way."""
        self._held.setdefault(key, _Held()).times += 1

    def left(self, key: str) -> None:
        """A session's end will be on its way."""
        held = self._held[key]
        held.times -= 1
        if not held.times:
            del self._held[key]

    def tell(self, concerns: Callable[[str], bool], publish: Callable[[Event], Callable[[], bool]]) -> None:
        """Tell again which of those that `concerns` names are open; `publish` returns what says whether that has arrived."""
        for key, held in self._held.items():
            if concerns(key) and (held.told is None or held.told()):
                held.told = publish(SessionKept(session=key, times=held.times))


class Session:
    """Messages of one key: `async with client.session("chat-7") as session`. Made by `Client.session`.

    Entering publishes `SessionStarted`, leaving `SessionEnded`, both under the session's key. What was registered with `on`
    ends with the block.
    """

    def __init__(self, host: Host, key: str, open_sessions: OpenSessions) -> None:
        if not isinstance(key, str) or not key:
            raise UsageError(f"session({key!r}): a session's key is a text")
        to_wire_key(key)  # one that is too long is told here, not where it is entered
        self.key = key
        """The key that all its messages have."""
        self._host = host
        self._open_sessions = open_sessions
        self._is_open = False
        self._listeners: list[asyncio.Task[None]] = []
        self._confirmed: list[asyncio.Future[None]] = []  # of listeners that nobody has waited for

    async def __aenter__(self) -> Session:
        if self._is_open:
            raise UsageError(f"the session {self.key!r} is open already; make another one")
        self._is_open = True
        await self._host.publish(SessionStarted(session=self.key))
        self._open_sessions.entered(self.key)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._is_open = False
        try:
            for listener in self._listeners:
                listener.cancel()
            if self._listeners:
                await asyncio.wait(self._listeners)
            self._listeners.clear()
            self._confirmed.clear()
        finally:
            self._open_sessions.left(self.key)
            try:
                await self._host.publish(SessionEnded(session=self.key))
            except ClientClosed:
                if error is None:
                    raise

    async def publish(
        self,
        event: Event,
        *,
        headers: dict[str, str] | None = None,
        deadline: float | None = None,
        at: datetime | float | None = None,
        delay: float | None = None,
    ) -> None:
        """As `Client.publish`, of an event with the session's key. What handlers of `on` are for comes to them.

        Raises:
            UsageError: the event has another key; else as for `Client.publish`.
            SubscriptionLost: a type that a handler was registered for cannot be followed.
        """
        self._check(event)
        await self._listening()
        await self._host.publish(event, headers=headers, deadline=deadline, at=at, delay=delay)

    async def publish_many(
        self, events: Sequence[Event], *, headers: dict[str, str] | None = None, deadline: float | None = None
    ) -> None:
        """As `Client.publish_many`. Raises as `publish`; where one of the events has another key, none is published."""
        for event in events:
            self._check(event)
        self._check_open()
        await self._listening()
        await self._host.publish_many(events, headers=headers, deadline=deadline)

    async def execute(
        self, command: Command[ReplyT], *, timeout: float = 5.0, headers: dict[str, str] | None = None
    ) -> ReplyT:
        """As `Client.execute`, of a command with the session's key. Raises as `publish` and `Client.execute`."""
        self._check(command)
        await self._listening()
        return await self._host.execute(command, timeout=timeout, headers=headers)

    def stream(
        self,
        command: Command[ReplyT],
        *,
        timeout: float = 60.0,
        window: int = 64,
        headers: dict[str, str] | None = None,
    ) -> Stream[ReplyT]:
        """As `Client.stream`, of a command with the session's key."""
        self._check(command)
        return self._host.stream(command, timeout=timeout, window=window, headers=headers)

    def on(self, event_type: type[Event], handler: HandlerT) -> HandlerT:
        """Call a handler, in this process, with each event of a type and the session's key that was handled by the bus.

        It is `async def` or plain `def` of `(event)`, and called for one event after another, in their order. That it raises
        is logged, and what it missed, because it is slow or a worker was replaced; see `Client.subscribe`.

        Raises:
            UsageError: the session is not open, or the handler is none; else as for `Client.subscribe`.
        """
        self._check_open()
        if not callable(handler):
            raise UsageError(f"session.on({event_type!r}, {handler!r}): a handler is a function of (event)")
        events = self._host.subscribe(event_type, key=self.key)
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._confirmed.append(confirmed)
        self._listeners.append(
            asyncio.get_running_loop().create_task(self._listen(events, handler, confirmed), name=f"session {self.key}")
        )
        return handler

    async def _listen(
        self, events: Subscription[Any], handler: Callable[[Any], Any], confirmed: asyncio.Future[None]
    ) -> None:
        try:
            async with events:
                confirmed.set_result(None)
                async for event in events:
                    if isinstance(event, Missed):
                        log.warning("the session %r has missed events (%s)", self.key, event)
                    else:
                        await self._call(handler, event)
        except asyncio.CancelledError:
            if self._is_open:  # a handler has done that
                log.warning("the session %r hears no more: it was cancelled", self.key)
            raise
        except Exception as error:  # the subscription has ended
            if confirmed.done():
                log.warning("the session %r hears no more: %s", self.key, error)
            else:
                confirmed.set_exception(error)
                confirmed.exception()  # whoever publishes hears of it; perhaps nobody does
        finally:
            confirmed.cancel()

    async def _call(self, handler: Callable[[Any], Any], event: Event) -> None:
        try:
            outcome = handler(event)
            if inspect.isawaitable(outcome):
                await outcome
        except (Exception, BaseExceptionGroup, asyncio.CancelledError) as error:  # the application's
            if is_own_cancellation(error):
                raise
            log_error(log, error, "a handler of the session %r failed with %s", self.key, type(event).__name__)
        if not self._is_open:  # whatever the handler has made of its cancellation, which comes only once
            raise asyncio.CancelledError
        uncancel(asyncio.current_task())

    async def _listening(self) -> None:
        """Wait until the workers have confirmed what was registered, so that it hears what is published now."""
        while self._confirmed:
            confirmed = self._confirmed[0]
            await asyncio.wait([confirmed])
            if confirmed in self._confirmed:
                self._confirmed.remove(confirmed)
            confirmed.result()

    def _check_open(self) -> None:
        if not self._is_open:
            raise UsageError(f"the session {self.key!r} is not open; use it inside its block")

    def _check(self, message: object) -> None:
        self._check_open()
        if not isinstance(message, Message):
            return  # the client says what is wrong
        key_of = key_getter(type(message))
        key = None if key_of is None else key_of(message)
        if key != self.key:
            raise UsageError(
                f"{type(message).__name__} has the key {key!r}, and the session {self.key!r}; publish it with the client, "
                "or give it the session's key"
            )
