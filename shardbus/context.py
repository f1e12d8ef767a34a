"""What a handler may know of the message it was called with, and how it sends others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID

from shardbus.errors import UsageError
from shardbus.messages import Command, Event, WireKey, from_wire_key, key_getter, to_wire_key, wire_name
from shardbus.outgoing import (
    CAUSATION,
    CORRELATION,
    HOLDS,
    REPEATED,
    Origin,
    Outgoing,
    check_beside,
    check_ring,
    child_headers,
    keys_held,
)

ReplyT = TypeVar("ReplyT")

_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})


class States(Protocol):
    """Whoever has the states of a worker's sessions."""

    async def state(self, key: WireKey) -> Any:
        """See `Context.session`."""


class Context:
    """Facts about one delivery, and `publish`, `execute` and `session` for its handler.

    Built only for handlers that ask for it.
    """

    __slots__ = ("_key", "_left_s", "_origin", "_outgoing", "_publisher", "_seq", "_states", "attempt", "headers", "shard")

    def __init__(
        self,
        key: WireKey,
        publisher: bytes,
        seq: int,
        attempt: int,
        shard: int,
        headers: Mapping[str, str] | None = None,
        left_s: Callable[[], float] | None = None,
        outgoing: Outgoing | None = None,
        origin: Origin | None = None,
        states: States | None = None,
    ) -> None:
        self._outgoing = outgoing
        self._states = states
        self._origin = origin
        self._key = key
        self._publisher = publisher
        self._seq = seq
        self.attempt = attempt
        """1 for the first delivery, one more for each that may have run before; goes on over retries and redrives.

        What was sent to a worker that died counts as one that may have run, so the first call that is ever made may say 2.
        """
        self.shard = shard
        """The number of the shard that handles the message."""
        self.headers: Mapping[str, str] = _NO_HEADERS if headers is None else headers
        """What the publisher sent beside the message."""
        self._left_s = left_s

    @property
    def key(self) -> str | int | bytes | UUID | None:
        """The message's key as its publisher wrote it."""
        return from_wire_key(self._key)

    @property
    def redelivered(self) -> bool:
        """Whether the message may have been handled before: true for every delivery after the first, whether that is a
        retry, a redrive, or a worker's in the place of one that died, which may not have come to it. Also true for what a
        handler published in such a call, because it may have published the same before."""
        return self.attempt > 1 or REPEATED in self.headers

    @property
    def message_id(self) -> str:
        """The message's identity, the same for every delivery of it: its publisher, shard and sequence."""
        return message_id(self._publisher, self.shard, self._seq)

    @property
    def remaining_s(self) -> float | None:
        """How many seconds are left, now: of a command until its caller waits no more, of an event until the deadline that
        it was published with; 0 where that is over, None where there is none."""
        return None if self._left_s is None else max(0.0, self._left_s())

    @property
    def causation_id(self) -> str | None:
        """The `message_id` of the message whose handler sent this one; None: no handler did."""
        return self.headers.get(CAUSATION)

    @property
    def correlation_id(self) -> str:
        """What all have in common that one message led to: its header `correlation-id`, or else its `message_id`."""
        return self.headers.get(CORRELATION) or self.message_id

    async def publish(self, event: Event, *, headers: Mapping[str, str] | None = None) -> None:
        """Publish an event from a handler. It never waits for room or credit.

        The message that is being handled is acked only when the event is handled, dead, or waiting in its shard's store; if
        this worker dies before that, the message comes again, and so may the event. If the handler raises, what it has
        published stays published. An event of the handler's own key joins the end of its lane.

        Args:
            event: any event.
            headers: text for its handlers, up to 26 of your own. `correlation-id`, `traceparent` and `tracestate` go on from
                this message where they are not among them; `causation-id` is set.

        Raises:
            InvalidKey, MessageTooLarge: as for `Client.publish`.
            OutboxFull: more of what handlers have published is unfinished than a worker may hold.
            UsageError: not an event, a value in it cannot be encoded, or the handler has returned.
        """
        outgoing, origin = self._sender()
        await outgoing.publish((event,), self._child_headers(headers), origin)

    async def publish_many(self, events: Sequence[Event], *, headers: Mapping[str, str] | None = None) -> None:
        """Publish events one after another, as `publish` does, all with these headers.

        If one of them cannot be published, those before it have been, and the error is that event's and says which it is.
        """
        outgoing, origin = self._sender()
        await outgoing.publish(events, self._child_headers(headers), origin)

    async def execute(
        self, command: Command[ReplyT], *, timeout: float = 5.0, headers: Mapping[str, str] | None = None
    ) -> ReplyT:
        """Send a command from a handler, and wait for its reply; the handler's key waits meanwhile, other keys go on.

        Raises:
            UsageError: the reply could never come: the command's key is that of the message being handled, or one whose
                handler waits for this one; or as for `publish`.
            TimeoutError, CommandFailed, CommandLost, InvalidKey, MessageTooLarge: as for `Client.execute`.
        """
        outgoing, _ = self._sender()
        own = self._child_headers(headers)
        held = self._held()
        if isinstance(command, Command):  # what is none is refused by the client
            key_of = key_getter(type(command))
            check_ring(wire_name(type(command)), None if key_of is None else to_wire_key(key_of(command)), held, self._key)
        if held:
            own[HOLDS] = " ".join(held)
        reply: ReplyT = await outgoing.execute(command, timeout, own)
        return reply

    async def session(self) -> Any:
        """The state of the session that this message belongs to by its key: what the application's `Bus.session` yields.

        It is made where there is none: for the first message of a session, and again after the session has ended, or its
        worker was replaced.

        Raises:
            UsageError: the application has no such thing, the message has no key or one that is not a text, or the handler
                has returned; else whatever making it raises.
        """
        if self._states is None or self._origin is None:
            raise UsageError("this context is of no running worker, so it belongs to no session; use `bus.local()`")
        if not self._origin.runs:
            raise UsageError("the handler of this context has returned; ask for its session while it runs")
        return await self._states.state(self._key)

    def _held(self) -> tuple[str, ...]:
        return keys_held(self.headers, self._key)

    def _sender(self) -> tuple[Outgoing, Origin]:
        if self._outgoing is None or self._origin is None:
            raise UsageError("this context is of no running worker, so nothing can be sent through it; use `bus.local()`")
        if not self._origin.runs:
            raise UsageError("the handler of this context has returned; publish and execute while it runs")
        return self._outgoing, self._origin

    def _child_headers(self, own: Mapping[str, str] | None) -> dict[str, str]:
        return child_headers(self.headers, self.message_id, repeated=self.redelivered, own=own)

    def with_headers(self, headers: Mapping[str, str]) -> Context:
        """The same facts with these headers added, or in the place of others; for a middleware to hand on."""
        added = {**self.headers, **headers}
        return Context(
            self._key,
            self._publisher,
            self._seq,
            self.attempt,
            self.shard,
            added,
            self._left_s,
            self._outgoing,
            self._origin,
            self._states,
        )

    def __repr__(self) -> str:
        return f"Context({self.message_id}, key={self.key!r}, attempt={self.attempt})"


class BatchContext(Context):
    """That of an event which its handler was called with beside others: their keys wait for the handler as well."""

    __slots__ = ("_beside",)

    def __init__(self, beside: frozenset[WireKey], *facts: Any) -> None:
        super().__init__(*facts)
        self._beside = beside

    async def execute(
        self, command: Command[ReplyT], *, timeout: float = 5.0, headers: Mapping[str, str] | None = None
    ) -> ReplyT:
        """See `Context.execute`. The keys of all events of the batch are held until its handler returns."""
        key_of = key_getter(type(command)) if isinstance(command, Command) else None
        if key_of is not None:
            check_beside(wire_name(type(command)), to_wire_key(key_of(command)), self._beside)
        return await super().execute(command, timeout=timeout, headers=headers)

    def _held(self) -> tuple[str, ...]:
        return keys_held(self.headers, self._key, self._beside)

    def with_headers(self, headers: Mapping[str, str]) -> BatchContext:
        """See `Context.with_headers`."""
        plain = super().with_headers(headers)
        return BatchContext(
            self._beside,
            plain._key,
            plain._publisher,
            plain._seq,
            plain.attempt,
            plain.shard,
            plain.headers,
            plain._left_s,
            plain._outgoing,
            plain._origin,
        )


def message_id(publisher: bytes, shard: int, seq: int) -> str:
    """The identity of a message as people see it."""
    return f"{publisher.hex()}-{shard}-{seq}"
