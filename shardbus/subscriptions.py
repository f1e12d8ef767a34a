"""The listener's side of subscriptions: what arrived and waits for its reader, and what is asked of which worker.

Owns a bounded queue for each subscription, and for each shard that it concerns the number of the event that comes next, from
which it knows what is missing. Knows nothing of outboxes or sockets: those are behind `Line`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Generic, Literal, Protocol, TypeVar, get_args

import msgspec

from shardbus.config import Limits
from shardbus.errors import ClientClosed, SubscriptionLost, UsageError
from shardbus.gate import check_loop
from shardbus.messages import Event, WireKey, from_wire_key, may_have_key, wire_name
from shardbus.wire.codec import decode_batch, pack_keys
from shardbus.wire.frames import (
    UNSUBSCRIBED,
    Feed,
    Subscribe,
    Subscribed,
    Taken,
    ToListener,
    Unsubscribe,
    Unsubscribed,
    encode_frame,
)
from shardbus.wording import counted

log = logging.getLogger("shardbus.client")

EventT = TypeVar("EventT", bound=Event)
OnSlow = Literal["drop_oldest", "disconnect"]

_NS: Final = 1_000_000_000
_QUEUE_EVENTS_MAX: Final = 1_000_000
_TOLD_EVERY: Final = 1000  # of the events that do not decode, so many are not logged after one that is
_NO_HEADERS: Final[dict[str, str]] = {}


class Missed(msgspec.Struct, frozen=True):
    """In the place of events that a subscription did not get.

    `count` of them, where they are known: the reader or this program was too slow. None: a worker was replaced, or the
    connection to it was lost, so that events may be missing here, and some may come a second time.
    """

    count: int | None


class Fed(msgspec.Struct, frozen=True, gc=False):
    """An event that arrived and is not decoded yet."""

    name: str
    body: bytes
    headers: dict[str, str]
    size: int


_Way = tuple[bytes, Callable[[bytes], object]] | None


class Line(Protocol):
    """What subscriptions ask of the client."""

    def route(self, key: WireKey) -> list[int]:
        """The shards whose events have this key; None: any."""

    def line(self, shard: int) -> _Way:
        """The epoch of a shard's worker and the way to it; None: it takes nothing now."""


class Queue:
    """Bounded: what is put into a full one makes the oldest events leave, and `take` says how many did.

    One event is held in any case, however large it is.
    """

    def __init__(self, events_max: int, bytes_max: int) -> None:
        self._events_max = events_max
        self._bytes_max = bytes_max
        self._items: deque[Fed | Missed] = deque()  # no two that follow each other are missing
        self._events = 0
        self._bytes = 0

    def __len__(self) -> int:
        return self._events

    @property
    def bytes(self) -> int:
        """Of the events in it."""
        return self._bytes

    def has_room(self, size: int) -> bool:
        """Whether an event of so many bytes can join without another one leaving."""
        return not self._events or (self._events < self._events_max and self._bytes + size <= self._bytes_max)

    def put(self, event: Fed) -> None:
        """Append an event."""
        dropped = 0
        while not self.has_room(event.size):
            dropped += self._drop()
        if dropped:
            self._miss_first(dropped)
        self._items.append(event)
        self._events += 1
        self._bytes += event.size

    def miss(self, count: int | None) -> None:
        """Append that events are missing."""
        last = self._items[-1] if self._items else None
        if isinstance(last, Missed):
            self._items[-1] = _together(last.count, count)
        else:
            self._items.append(Missed(count))

    def take(self) -> Fed | Missed | None:
        """The next event, or what is missing there; None: it is empty."""
        if not self._items:
            return None
        item = self._items.popleft()
        if isinstance(item, Fed):
            self._events -= 1
            self._bytes -= item.size
        return item

    def _drop(self) -> int:
        """Let the oldest event go, keeping what is missing before it."""
        item = self.take()
        if isinstance(item, Missed):
            self.take()  # an event: what is missing in one place is one item
            self._miss_first(item.count)
        return 1

    def _miss_first(self, count: int | None) -> None:
        first = self._items[0] if self._items else None
        if isinstance(first, Missed):
            self._items[0] = _together(count, first.count)
        else:
            self._items.appendleft(Missed(count))


def _together(one: int | None, other: int | None) -> Missed:
    return Missed(None if one is None or other is None else one + other)


class _Source:
    """One shard's feed of a subscription."""

    __slots__ = (
        "asked_ns",
        "epoch",
        "expected",
        "is_open",
        "number",
        "resumes",
        "said_ns",
        "shard",
        "untold",
        "untold_bytes",
    )

    def __init__(self, shard: int, *, resumes: bool = False) -> None:
        self.shard = shard
        self.resumes = resumes  # it had begun before, so something may be missing when it begins again
        self.epoch = b""
        self.number = -1
        self.is_open = False
        self.expected = 0
        self.untold = 0  # taken, and the worker does not know yet
        self.untold_bytes = 0
        self.asked_ns = -(2**63)
        self.said_ns = 0

    def reset(self) -> None:
        """The worker has forgotten it, or is another one."""
        self.resumes = self.resumes or self.is_open
        self.is_open = False
        self.number = -1
        self.expected = self.untold = self.untold_bytes = 0
        self.asked_ns = -(2**63)


class _Reader:
    """A subscription as its client keeps it."""

    def __init__(
        self, types: dict[str, Callable[[bytes], Any]], key: WireKey, queue: Queue, on_slow: OnSlow, shards: list[int]
    ) -> None:
        self.types = types
        self.key = key
        self.queue = queue
        self.on_slow = on_slow
        self.sources = {shard: _Source(shard) for shard in shards}
        self.error: Exception | None = None
        self.closed = False
        self.undecodable = 0
        self._changed = asyncio.Event()

    @property
    def is_confirmed(self) -> bool:
        """Whether every shard feeds it."""
        return all(source.is_open for source in self.sources.values())

    def wake(self) -> None:
        """Something has changed."""
        self._changed.set()

    async def change(self) -> None:
        """Wait until something has changed after the last look."""
        self._changed.clear()
        await self._changed.wait()

    def put(self, event: Fed) -> None:
        if self.error is None:
            if self.on_slow == "disconnect" and not self.queue.has_room(event.size):
                told = f"its reader is slower by {counted(len(self.queue), 'event')}"
                self.fail(SubscriptionLost(", ".join(self.types), told))
            else:
                self.queue.put(event)

    def miss(self, count: int | None) -> None:
        """So many are missing here, not because of a slow reader's queue."""
        if self.error is None:
            if self.on_slow == "disconnect" and count is not None:
                told = f"this program was too slow for {counted(count, 'event')}"
                self.fail(SubscriptionLost(", ".join(self.types), told))
            else:
                self.queue.miss(count)
        self.wake()

    def fail(self, error: Exception) -> None:
        """Nothing more comes; what has come is read first."""
        if self.error is None:
            self.error = error
        self.wake()


class Subscription(Generic[EventT]):
    """Events as they are handled, and `Missed` where some are missing. Made by `Client.subscribe`.

    Iterate over it in one task. What leaves its loop, its block, or the program's hands is unsubscribed.
    """

    def __init__(self, subscriptions: Subscriptions, reader: _Reader) -> None:
        self._subscriptions = subscriptions
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self.headers: dict[str, str] = _NO_HEADERS
        """What was published beside the event that came last."""

    def __aiter__(self) -> Subscription[EventT]:
        return self

    @property
    def has_next(self) -> bool:
        """Whether the next event has arrived, so that asking for it does not wait."""
        return not self._reader.closed and len(self._reader.queue) > 0

    async def __anext__(self) -> EventT | Missed:
        """The next event.

        Raises:
            SubscriptionLost: the reader was too slow and asked for this, or a worker does not feed it.
            ClientClosed, BusRejected: the client was closed, or refused by the bus.
            UsageError: it is not the client's event loop that runs.
        """
        check_loop(self._loop)
        reader = self._reader
        while True:
            item = None if reader.closed else reader.queue.take()
            if isinstance(item, Missed):
                return item
            if item is not None:
                return self._decoded(item)
            if reader.closed:
                raise StopAsyncIteration
            if reader.error is not None:
                self._subscriptions.close(reader)
                raise reader.error
            await reader.change()

    def _decoded(self, item: Fed) -> EventT | Missed:
        reader = self._reader
        try:
            event: EventT = reader.types[item.name](item.body)
        except Exception as error:  # what a type's own checks raise
            if reader.undecodable % _TOLD_EVERY == 0:
                log.warning("an event %s is not as its subscriber declares it, and is missed: %s", item.name, error)
            reader.undecodable += 1
            return Missed(1)
        self.headers = item.headers
        return event

    async def __aenter__(self) -> Subscription[EventT]:
        """Wait until every worker that it concerns has confirmed it. Raises as iterating does."""
        check_loop(self._loop)
        reader = self._reader
        try:
            while not reader.is_confirmed:
                if reader.error is not None:
                    raise reader.error
                if reader.closed:
                    raise ClientClosed("the subscription is closed; make another one")
                await reader.change()
        except BaseException:
            self._subscriptions.close(reader)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Unsubscribe. Whoever iterates over it has come to its end.

        Raises:
            UsageError: it is not the client's event loop that runs.
        """
        check_loop(self._loop)
        self._subscriptions.close(self._reader)

    def __del__(self) -> None:
        # Of a loop that was left nothing else tells; what collects it may be another thread.
        if not self._reader.closed:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all with it
                self._loop.call_soon_threadsafe(self._subscriptions.close, self._reader)


class Subscriptions:
    """All subscriptions of one client: asks each worker for its part, again when it was replaced, and says what arrived.

    Bounded: one more than the client may have is refused.
    """

    def __init__(self, line: Line, limits: Limits) -> None:
        self._line = line
        self._limits = limits
        self._readers: dict[_Reader, None] = {}  # in the order of their subscribing
        self._by_number: dict[int, tuple[_Reader, _Source]] = {}
        self._numbers = itertools.count(1)

    def open(
        self, event_types: Sequence[type[EventT]], key: WireKey, events_max: int, on_slow: OnSlow, now_ns: int
    ) -> Subscription[EventT]:
        """See `Client.subscribe`."""
        _check_types(event_types, key, self._limits.subscription_types_max)
        if on_slow not in get_args(OnSlow):
            raise UsageError(f"on_slow={on_slow!r}: it is 'drop_oldest' or 'disconnect'")
        if type(events_max) is not int or not 1 <= events_max <= _QUEUE_EVENTS_MAX:
            raise UsageError(f"queue_events_max={events_max!r}: take 1 to {_QUEUE_EVENTS_MAX:,}")
        if len(self._readers) >= self._limits.subscriptions_client_max:
            raise UsageError(
                f"{len(self._readers)} subscriptions, and a client has no more; leave their loops, or subscribe to several "
                "types at once"
            )
        types: dict[str, Callable[[bytes], Any]] = {
            wire_name(kind): msgspec.msgpack.Decoder(kind).decode for kind in event_types
        }
        queue = Queue(events_max, self._limits.subscription_queue_bytes_max)
        reader = _Reader(types, key, queue, on_slow, self._line.route(key))
        self._readers[reader] = None
        self._ask(reader, {}, now_ns)
        return Subscription(self, reader)

    def close(self, reader: _Reader) -> None:
        """End a subscription; its workers are told."""
        if reader.closed:
            return
        reader.closed = True
        del self._readers[reader]
        for source in reader.sources.values():
            self._leave(source)
        reader.wake()

    def _leave(self, source: _Source) -> None:
        if self._by_number.pop(source.number, None) is not None:
            self._send(source, Unsubscribe(source.epoch, source.number))

    def end(self, error: Exception) -> None:
        """Nothing more comes to any of them."""
        for reader in self._readers:
            reader.fail(error)

    def reroute(self) -> None:
        """The bus came back with other shards."""
        for reader in self._readers:
            for source in reader.sources.values():
                self._by_number.pop(source.number, None)
            had_begun = any(source.is_open or source.resumes for source in reader.sources.values())
            reader.sources = {shard: _Source(shard, resumes=had_begun) for shard in self._line.route(reader.key)}

    def pump(self, now_ns: int) -> None:
        """Ask workers for what they do not feed yet, and tell them what was taken; call it about ten times a second."""
        lines: dict[int, _Way] = {}
        for reader in self._readers:
            if reader.error is None:
                self._ask(reader, lines, now_ns)

    def _ask(self, reader: _Reader, lines: dict[int, _Way], now_ns: int) -> None:
        for source in reader.sources.values():
            if source.shard not in lines:
                lines[source.shard] = self._line.line(source.shard)
            line = lines[source.shard]
            if line is None:
                continue
            epoch, send = line
            if source.epoch != epoch:
                self._by_number.pop(source.number, None)
                source.reset()
                source.epoch = epoch
            if source.is_open:
                if source.untold or now_ns - source.said_ns >= self._limits.taken_interval_s * _NS:
                    self._say(source, now_ns)
            elif now_ns - source.asked_ns >= self._limits.hello_interval_s * _NS:
                if source.number < 0:
                    source.number = next(self._numbers)
                    self._by_number[source.number] = (reader, source)
                source.asked_ns = now_ns
                key = b"" if reader.key is None else pack_keys([reader.key])
                send(encode_frame(Subscribe(epoch, source.number, tuple(reader.types), bytes(key))))

    def _say(self, source: _Source, now_ns: int) -> None:
        source.untold = source.untold_bytes = 0
        source.said_ns = now_ns
        self._send(source, Taken(source.epoch, source.number, source.expected))

    def _send(self, source: _Source, frame: Taken | Unsubscribe) -> None:
        line = self._line.line(source.shard)
        if line is not None and line[0] == source.epoch:
            line[1](encode_frame(frame))

    def receive(self, shard: int, frame: ToListener, now_ns: int) -> None:
        """Take what the present worker of a shard says.

        Raises:
            RemoteProtocolError: it is not sound.
        """
        known = self._by_number.get(frame.subscription)
        if known is None or known[1].shard != shard:
            return
        reader, source = known
        match frame:
            case Subscribed():
                if not source.is_open:
                    source.is_open = True
                    source.said_ns = now_ns
                    if source.resumes:
                        source.resumes = False
                        reader.miss(None)
                    reader.wake()
            case Unsubscribed(reason="forgotten"):
                del self._by_number[frame.subscription]
                source.reset()
            case Unsubscribed():
                why = UNSUBSCRIBED.get(frame.reason, frame.reason)
                reader.fail(SubscriptionLost(", ".join(reader.types), f"shard {shard}: {why}"))
            case Feed():
                self._fed(reader, source, frame, now_ns)
        if reader.error is not None:
            for one in reader.sources.values():
                self._leave(one)

    def _fed(self, reader: _Reader, source: _Source, frame: Feed, now_ns: int) -> None:
        if not source.is_open or frame.first < source.expected:
            return
        events = list(_events_in(frame, reader)) if frame.count else []  # first: it may not be sound
        missing = frame.first - source.expected
        if missing:
            reader.miss(missing)
        for event in events:
            reader.put(event)
        source.expected = frame.first + frame.count
        source.untold += missing + frame.count
        source.untold_bytes += len(frame.blob)
        if source.untold >= self._limits.taken_events or source.untold_bytes >= self._limits.taken_bytes:
            self._say(source, now_ns)
        if events:
            reader.wake()


def _events_in(frame: Feed, reader: _Reader) -> Iterator[Fed]:
    columns = decode_batch(frame.blob, frame.count)
    names = itertools.repeat(columns.names) if isinstance(columns.names, str) else columns.names
    for at, (name, body) in enumerate(zip(names, columns.apart(), strict=False)):
        if name in reader.types:
            extra = columns.extras.get(at)
            headers = _NO_HEADERS if extra is None else extra.headers
            yield Fed(name, body, headers, len(body) + sum(len(one) + len(headers[one]) for one in headers))


def _check_types(event_types: Sequence[type[Event]], key: WireKey, types_max: int) -> None:
    for kind in event_types:
        if not (isinstance(kind, type) and issubclass(kind, Event) and kind is not Event):
            raise UsageError(f"subscribe takes types of events, and {kind!r} is none")
        if key is not None and kind.__shardbus_key__ is None:
            raise UsageError(f"{kind.__name__} has no key, so none of them has the key {key!r}")
        if key is not None and not may_have_key(kind, key):
            shown = from_wire_key(key)
            raise UsageError(
                f"key={shown!r} is a {type(shown).__name__}, and {kind.__name__} is declared with a key of another type, so "
                "none of them has it; 42 is not '42'"
            )
    if not 1 <= len(event_types) <= types_max:
        raise UsageError(f"subscribe to {len(event_types)} types of events: take 1 to {types_max}")


