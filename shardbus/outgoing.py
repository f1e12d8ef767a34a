"""What handlers send: the port to whatever sends it, the headers that it carries, and what of it is not finished yet.

Pure, but for the port, which a client implements that stands above (`shardbus.handler_client`). A message that a handler
publishes is a *child* of the message that is being handled. That one is finished only when its children are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from shardbus.arguments import check_headers
from shardbus.config import DEFAULT_LIMITS
from shardbus.errors import UsageError
from shardbus.messages import Command, Event, WireKey
from shardbus.routing import stable_hash

CORRELATION: Final = "correlation-id"
"""The header that a chain of messages has in common. Whoever publishes its first message may set it."""

CAUSATION: Final = "causation-id"
"""The header with the `message_id` of the message whose handler sent this one."""

REPEATED: Final = "shardbus-repeated"
"""The header that says that what this message was caused by may have been handled, and may have caused it, before."""

HOLDS: Final = "shardbus-holds"
"""The header of a command with the keys that wait for its reply, as hashes."""

_RESERVED: Final = frozenset((CAUSATION, REPEATED, HOLDS))
_TRACEPARENT: Final = "traceparent"
_TRACESTATE: Final = "tracestate"
_HELD_MAX: Final = 64  # commands that wait for each other; their hashes fit into one header


class Children:
    """What the handlers of one message have published and what is not finished, by handler.

    `then` is called when that becomes nothing, once. Its size is the number of the message's handlers.
    """

    __slots__ = ("pending", "then")

    def __init__(self) -> None:
        self.pending: dict[str, int] = {}
        self.then: Callable[[], None] | None = None

    def add(self, handler: str, count: int = 1) -> None:
        """A handler has published so many."""
        self.pending[handler] = self.pending.get(handler, 0) + count

    def finish(self, handler: str) -> None:
        """One of them is handled, dead or waiting in its shard's store."""
        left = self.pending[handler] - 1
        if left:
            self.pending[handler] = left
            return
        del self.pending[handler]
        then = self.then
        if not self.pending and then is not None:
            self.then = None
            then()


class Origin(Protocol):
    """A message that is being handled, as whoever publishes for its handlers sees it."""

    children: Children | None
    runs: str
    """The handler that runs; empty: none does."""


class Outgoing(Protocol):
    """The way out of a worker. Calls may come from its event loop only."""

    async def publish(self, events: Sequence[Event], headers: dict[str, str], origin: Origin) -> None:
        """Take events at once, also where an outbox is above its bound, and count them among the origin's children.

        Raises as `Client.publish`, and `OutboxFull` where what handlers have published has reached a bound of its own.
        """

    async def execute(self, command: Command[Any], timeout_s: float, headers: dict[str, str]) -> Any:
        """Send a command and wait for its reply. Raises as `Client.execute`."""

    def has_room(self) -> bool:
        """Whether no outbox is filled to a quarter of an ordinary client's bound.

        Above that, whoever publishes to this worker is better held up: what its handlers publish waits long enough.
        """

    async def close(self) -> None:
        """Let go at once; what is not finished is forgotten here."""


def child_headers(
    parent: Mapping[str, str], message_id: str, *, repeated: bool, own: Mapping[str, str] | None
) -> dict[str, str]:
    """The headers of a child: the handler's own, and those that every child has.

    Args:
        parent: the headers of the message that is being handled.
        message_id: its identity.
        repeated: it may have been handled before.
        own: what the handler gives. A correlation or a trace context of its own stands in the place of its parent's; what is
            the bus's to say is left out.

    Raises:
        UsageError: what the handler gives are no headers, or too many.
    """
    headers: dict[str, str] = {}
    if own is not None:
        check_headers(own, DEFAULT_LIMITS.own_headers_max)
        headers = {name: value for name, value in own.items() if name not in _RESERVED}
    if _TRACEPARENT not in headers:
        for name in (_TRACEPARENT, _TRACESTATE):
            if name in parent:
                headers.setdefault(name, parent[name])
    headers.setdefault(CORRELATION, parent.get(CORRELATION) or message_id)
    headers[CAUSATION] = message_id
    if repeated:
        headers[REPEATED] = "1"
    return headers


def keys_held(
    parent: Mapping[str, str], key: WireKey, beside: frozenset[WireKey] = frozenset()
) -> tuple[str, ...]:
    """The keys that wait, as hashes, while a handler of this key awaits the reply to a command.

    `beside`: those of the batch that it is called with; all of them wait, but where they would leave no room for those of
    others, only this one is told.
    """
    held = tuple(parent[HOLDS].split()) if HOLDS in parent else ()
    if len(beside) > 1 and len(held) + len(beside) <= _HELD_MAX // 2:
        return (*held, *(_told(one) for one in beside if one is not None))
    return held if key is None else (*held, _told(key))


def check_ring(name: str, key: WireKey, held: tuple[str, ...], here: WireKey) -> None:
    """Refuse a command that could never be executed, because its key waits for its reply.

    Args:
        name: the command's.
        key: its key.
        held: as `keys_held` has them.
        here: the key of the message that is being handled.

    Raises:
        UsageError: so it is, or so many commands wait for each other that their keys cannot be told.
    """
    if key is not None and key == here:
        raise UsageError(
            f"{name} has the key {key!r} of the message that is being handled, and would wait for its end: a handler cannot "
            "execute a command of its own key. Call what that command's handler calls, or publish an event"
        )
    if key is not None and _told(key) in held:
        raise UsageError(
            f"{name} would close a ring: its key {key!r} is held by a handler that waits, through the commands of others, "
            "for this very handler. Hand over what is needed in the command, or publish an event"
        )
    if len(held) > _HELD_MAX:
        raise UsageError(f"{name}: {len(held)} handlers wait for each other's commands; the limit is {_HELD_MAX}")


def check_beside(name: str, key: WireKey, beside: frozenset[WireKey]) -> None:
    """Refuse a command of a batch handler whose key is that of an event of the batch: it would wait for the handler's end.

    Raises:
        UsageError: so it is.
    """
    if key is not None and key in beside:
        raise UsageError(
            f"{name} has the key {key!r} of an event of the batch that is being handled, and would wait for its end: a "
            "batch handler cannot execute a command of a key in its batch. Call what that command's handler calls, or "
            "publish an event"
        )


def worker_publisher(epoch: bytes) -> bytes:
    """The identity as a publisher of the worker with this epoch: 16 bytes that every worker of its bus recognises."""
    incarnation, shard, counter = epoch[:16], epoch[16:18], epoch[18:]
    return incarnation[:10] + shard + counter[-4:].rjust(4, b"\0")


def is_worker(publisher: bytes, epoch: bytes) -> bool:
    """Whether a publisher is a worker of the bus that the worker with this epoch belongs to."""
    return publisher[:10] == epoch[:10]


def _told(key: WireKey) -> str:
    return f"{stable_hash(key):016x}"


assert _HELD_MAX * 17 < 2048
# What is added to a handler's own headers always fits.
_INHERITED: Final = (CORRELATION, _TRACEPARENT, _TRACESTATE)
assert DEFAULT_LIMITS.own_headers_max + len(_RESERVED) + len(_INHERITED) <= DEFAULT_LIMITS.headers_max
