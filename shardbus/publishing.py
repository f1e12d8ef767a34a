"""Middleware around publishing: a client that shows each message to the program before it is encoded.

A client without middleware is the plain one, which knows nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from shardbus.client import Client
from shardbus.errors import UsageError
from shardbus.messages import Command, Event, Message, key_getter
from shardbus.packing import events_of
from shardbus.scheduled_events import Scheduled
from shardbus.signatures import is_coroutine_function, positional_count, shown
from shardbus.streams import Stream

ReplyT = TypeVar("ReplyT")
MessageT = TypeVar("MessageT", bound=Message)

PublishMiddleware = Callable[[Any, dict[str, str]], Message | None]
"""`def middleware(message, headers)`: may change the headers, return another message with the same key, or raise.

A plain `def`: were it to wait, a later `publish` of the same key could overtake it.
"""


def client_class(middleware: Sequence[PublishMiddleware]) -> Callable[..., Client]:
    """What to make a client with: the plain one where there is no middleware.

    Raises:
        UsageError: one of them cannot be called as a middleware is.
    """
    if not isinstance(middleware, list | tuple):
        raise UsageError(f"middleware={shown(middleware)}: give a list: middleware=[…]")
    for one in middleware:
        _check(one)
    return partial(_ClientWithMiddleware, tuple(middleware)) if middleware else Client


def _check(one: PublishMiddleware) -> None:
    told = shown(one)
    if isinstance(one, type):
        raise UsageError(f"middleware=[{told}]: that is a class; make one: {told}(…)")
    if not callable(one) or is_coroutine_function(one):
        raise UsageError(
            f"{told}: a middleware of a client is a plain `def` of (message, headers), because events of one key must not "
            "overtake each other while it waits; one of (message, context, call_next) is for bus.use(…)"
        )
    least, most = positional_count(one)
    if not least <= 2 <= most:
        raise UsageError(f"a middleware of a client takes (message, headers), and {told} takes {least} arguments")


class _ClientWithMiddleware(Client):
    """A client whose messages go through middleware, the first one first."""

    def __init__(self, middleware: tuple[PublishMiddleware, ...], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._middleware = middleware

    async def publish(
        self,
        event: Event,
        *,
        headers: dict[str, str] | None = None,
        deadline: float | None = None,
        ordinal: int = 0,
        intended_ns: int = 0,
        at: datetime | float | None = None,
        delay: float | None = None,
    ) -> None:
        """See `Client.publish`. Raises also what a middleware raises; then nothing was published."""
        later = at is not None or delay is not None  # then it comes through `schedule`
        if isinstance(event, Event) and not later:  # what is none is refused by the client itself
            event, headers = self._pass(event, headers)
        await super().publish(
            event,
            headers=headers,
            deadline=deadline,
            ordinal=ordinal,
            intended_ns=intended_ns,
            at=at,
            delay=delay,
        )

    async def schedule(
        self,
        event: Event,
        *,
        at: datetime | float | None = None,
        delay: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> Scheduled:
        """See `Client.schedule`. Raises also what a middleware raises; then nothing was scheduled."""
        if isinstance(event, Event):
            event, headers = self._pass(event, headers)
        return await super().schedule(event, at=at, delay=delay, headers=headers)

    async def publish_many(
        self,
        events: Sequence[Event],
        *,
        headers: dict[str, str] | None = None,
        deadline: float | None = None,
        ordinals: Sequence[int] | None = None,
        intended_ns: Sequence[int] | None = None,
    ) -> None:
        """See `Client.publish_many`; here each event is published by itself, because a middleware may give it headers."""
        events = events_of(events)
        for stamps in (ordinals, intended_ns):
            if stamps is not None and len(stamps) != len(events):
                raise UsageError(f"{len(events)} events and {len(stamps)} stamps; give one for each event, or none")
        await self._publish_each(events, headers, deadline, ordinals, intended_ns)

    async def execute(
        self, command: Command[ReplyT], *, timeout: float = 5.0, headers: dict[str, str] | None = None
    ) -> ReplyT:
        """See `Client.execute`. Raises also what a middleware raises; then nothing was sent."""
        if isinstance(command, Command):
            command, headers = self._pass(command, headers)
        return await super().execute(command, timeout=timeout, headers=headers)

    def stream(
        self,
        command: Command[ReplyT],
        *,
        timeout: float = 60.0,
        window: int = 64,
        headers: dict[str, str] | None = None,
    ) -> Stream[ReplyT]:
        """See `Client.stream`. Raises also what a middleware raises; then nothing is sent."""
        if isinstance(command, Command):
            command, headers = self._pass(command, headers)
        return super().stream(command, timeout=timeout, window=window, headers=headers)

    def _pass(self, message: MessageT, headers: dict[str, str] | None) -> tuple[MessageT, dict[str, str] | None]:
        """A message and its headers as the middleware leaves them; what the caller gave is not changed."""
        own = {} if headers is None else dict(headers)
        for one in self._middleware:
            other = one(message, own)
            if other is not None and other is not message:
                if not isinstance(other, Message) or _key_of(other) != _key_of(message):
                    raise UsageError(
                        f"the middleware {shown(one)} returned {_shown(other)} for {_shown(message)}; it returns a message "
                        "with the same key, or None"
                    )
                message = other  # type: ignore[assignment]  # an event or a command, which the client checks
        return message, own or None


def _shown(thing: object) -> str:
    name = type(thing).__name__
    return f"{name} with the key {_key_of(thing)!r}" if isinstance(thing, Message) else f"a {name}"


def _key_of(message: Message) -> Any:
    key_of = key_getter(type(message))
    return None if key_of is None else key_of(message)
