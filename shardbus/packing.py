"""From messages to what travels: how each type is published, and the checks of everything that comes with a message. Pure.

Owns what a client has learnt of message types. Knows nothing of outboxes: where a message goes is not asked here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

import msgspec

from shardbus.arguments import check_headers, check_seconds
from shardbus.config import Limits
from shardbus.errors import ClientClosed, MessageTooLarge, ShardbusError, UsageError
from shardbus.messages import Command, Event, Message, WireKey, key_getter, reply_type, to_wire_key, wire_name
from shardbus.wire.codec import encode_bodies, has_negative
from shardbus.wording import counted

TargetT = TypeVar("TargetT")

_HEADER_BYTES_MAX: Final = 4096
_NS: Final = 1_000_000_000
_NO_HEADERS: Final[dict[str, str]] = {}  # of most commands; nobody changes it

encode: Final = msgspec.msgpack.Encoder().encode
UNENCODABLE: Final = (TypeError, ValueError, OverflowError, msgspec.EncodeError, RecursionError)
"""What `encode` raises."""

Packed = tuple[str, WireKey, bytes, dict[str, str] | None, int]
"""An event as it travels, checked: name, key, body, headers, and the bytes of the last two. See `Client.pack`."""


class Route:
    """How one message type is published; `decode_reply`: of a command, its replies, or the items of its stream."""

    __slots__ = ("decode_reply", "idempotent", "key_class", "key_of", "name", "type")

    decode_reply: Callable[[bytes], Any]

    def __init__(self, message_type: type[Message]) -> None:
        self.type = message_type
        self.idempotent = message_type.__shardbus_idempotent__
        self.name = wire_name(message_type)
        self.key_of = key_getter(message_type)
        # Keys of this very class are in their normal form; others pass through `to_wire_key`.
        annotation = message_type.__annotations__.get(message_type.__shardbus_key__ or "", None)
        self.key_class: type | None = {"str": str, "int": int, "bytes": bytes, str: str, int: int, bytes: bytes}.get(
            annotation
        )
        if issubclass(message_type, Command):
            self.decode_reply = msgspec.msgpack.Decoder(reply_type(message_type)).decode


class Part(Generic[TargetT]):
    """Events of one keyed type that go to one place, encoded; `places` says which of those published, None: all of them."""

    __slots__ = ("bodies", "keys", "name", "places", "target")

    def __init__(
        self, target: TargetT, name: str, keys: Sequence[Any], bodies: bytes, places: Sequence[int] | None
    ) -> None:
        self.target = target
        self.name = name
        self.keys = keys
        self.bodies = bodies
        self.places = places


class Packing:
    """The message types that a client has sent, each with its route, and what is packed by them.

    Args:
        limits: how large a message may be, and how many headers it may have.
        known: keys that are in their normal form; to look at them must be safe for any thread.
        check_open: called before a type is learnt; raises where the client takes nothing.
    """

    def __init__(self, limits: Limits, known: Container[Any], check_open: Callable[[], None]) -> None:
        self.events: dict[type, Route] = {}
        self._commands: dict[type, Route] = {}
        self._limits = limits
        self._known = known
        self._check_open = check_open

    def learn_event(self, event: Event) -> Route:
        """The route of an event that has none in `events` yet.

        Raises:
            UsageError: it is no event; or what `check_open` raises.
        """
        return self._learn(self.events, event, Event)

    def _learn(self, routes: dict[type, Route], message: Message, kind: type[Message]) -> Route:
        self._check_open()
        message_type = type(message)
        if isinstance(message, type) and issubclass(message, Message):
            raise UsageError(f"got the class {message.__name__}; make one: {message.__name__}(…)")
        if not isinstance(message, kind):
            verb = "publish takes events" if kind is Event else "execute and stream take commands"
            hint = "; use execute" if isinstance(message, Command) else "; use publish" if isinstance(message, Event) else ""
            raise UsageError(f"{verb}, and {message_type.__name__} is none{hint}")
        route = routes[message_type] = Route(message_type)
        return route

    def pack(self, event: Event, headers: dict[str, str] | None) -> Packed:
        """See `Client.pack`."""
        route = self.events.get(event.__class__) or self.learn_event(event)
        try:
            body = encode(event)
        except UNENCODABLE as error:
            raise cannot_encode(route, error) from error
        if len(body) > self._limits.event_bytes_max:
            raise MessageTooLarge(route.name, len(body), self._limits.event_bytes_max)
        size_bytes = len(body)
        if headers is not None:
            headers, more_bytes = sound_headers(headers, self._limits)
            size_bytes += more_bytes
        return route.name, self._key_of(route, event), body, headers or None, size_bytes

    def pack_command(
        self, command: Command[Any], headers: Mapping[str, str] | None
    ) -> tuple[Route, WireKey, bytes, dict[str, str], int]:
        """A command, checked: its route, key, body, headers, and the bytes of the last two. Raises as `Client.execute`."""
        route = self._commands.get(command.__class__) or self._learn(self._commands, command, Command)
        try:
            body = encode(command)
        except UNENCODABLE as error:
            raise cannot_encode(route, error) from error
        key = self._key_of(route, command)
        size = len(body)
        if size > self._limits.event_bytes_max:
            raise MessageTooLarge(route.name, size, self._limits.event_bytes_max)
        if headers is None:
            return route, key, body, _NO_HEADERS, size
        sound, more_bytes = sound_headers(headers, self._limits)
        return route, key, body, sound, size + more_bytes

    def _key_of(self, route: Route, message: Message) -> WireKey:
        if route.key_of is None:
            return None
        key: WireKey = route.key_of(message)
        return key if key.__class__ is route.key_class and key in self._known else to_wire_key(key)

    def alike(self, events: Sequence[Event]) -> tuple[Route, list[Any]] | None:
        """The route of events of one keyed type, and their keys, in their normal form; None where they are not such."""
        route = self.events.get(events[0].__class__)
        if route is None or route.key_of is None or set(map(type, events)) != {route.type}:
            return None
        keys = list(map(route.key_of, events))
        return (route, keys) if set(map(type, keys)) == {route.key_class} else None


def packed_parts(
    route: Route, events: Sequence[Event], keys: Sequence[Any], targets: Sequence[TargetT], distinct: Set[TargetT]
) -> list[Part[TargetT]]:
    """Events that are `alike`, encoded together for each of their `distinct` targets.

    A third of the cost of one at a time, because the loops run in C. Raises whatever encoding one of them raises.
    """
    if len(distinct) == 1:
        return [Part(targets[0], route.name, keys, encode_bodies(list(events)), None)]
    places: dict[TargetT, list[int]] = {target: [] for target in distinct}
    for at, target in enumerate(targets):
        places[target].append(at)
    return [
        Part(target, route.name, [keys[at] for at in ats], encode_bodies([events[at] for at in ats]), ats)
        for target, ats in places.items()
    ]


def cannot_encode(route: Route, error: Exception) -> UsageError:
    """What its caller is told of a message that has no encoding."""
    return UsageError(f"{route.name} cannot be encoded, so it was not sent: {error}")


def tell_which(error: ShardbusError, at: int, total: int, event: object) -> None:
    """Have the error of one of many events say which it is, from 1, and what became of the others."""
    if isinstance(error, ClientClosed) and not at:
        return  # that is no event's fault, and nothing was published
    before = "nothing was published" if not at else f"the {counted(at, 'event')} before it went out, none after it"
    error.args = (f"event {at + 1:,} of {total:,} ({type(event).__name__}): {error}; {before}",)


def sound_headers(headers: Mapping[str, str], limits: Limits) -> tuple[dict[str, str], int]:
    """Headers of their caller's kind as what travels, plain text in a plain dict, and how many bytes they take.

    A text of a class of its own has no encoding, and would hold up all that is packed with it.

    Raises:
        UsageError: they are no headers, too many or too long.
    """
    check_headers(headers, limits.own_headers_max)
    sound: dict[str, str] = {}
    total = 0
    for name, value in headers.items():
        size = _HEADER_BYTES_MAX + 1
        if isinstance(name, str) and isinstance(value, str):
            name, value = str.__str__(name), str.__str__(value)
            with suppress(UnicodeEncodeError):
                size = len(name.encode()) + len(value.encode())
        if size > _HEADER_BYTES_MAX:
            raise UsageError(f"the header {name!r}: names and values are text, together up to {_HEADER_BYTES_MAX:,} bytes")
        sound[name] = value
        total += size
    return sound, total


def deadline_ns(deadline_s: float) -> int:
    """A deadline in nanoseconds. Raises `UsageError`: it is none."""
    check_seconds("deadline", deadline_s)
    return int(deadline_s * _NS)


def check_stamp(stamp: int) -> None:
    """Refuse what is no ordinal and no instant. Raises `UsageError`."""
    if type(stamp) is not int or not 0 <= stamp < 2**63:
        raise UsageError(f"{stamp!r} is no stamp: ordinals and instants are whole numbers from 0 to 2⁶³ - 1")


def packed_stamps(stamps: Sequence[int] | None) -> array[int] | None:
    """Stamps, checked. Raises `UsageError`: one of them is none."""
    if stamps is None:
        return None
    try:
        packed = array("q", stamps)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"stamps are whole numbers from 0 to 2⁶³ - 1: {error}") from None
    if has_negative(packed):
        check_stamp(min(packed))
    return packed


def picked(stamps: Sequence[int] | None, places: Sequence[int] | None) -> Sequence[int] | None:
    """The stamps of a part; None: it has none."""
    return stamps if stamps is None or places is None else [stamps[at] for at in places]


def events_of(events: Any) -> list[Event]:
    """What `publish_many` was given, as a list: not every sequence has slices. Raises `UsageError`: it is none."""
    if isinstance(events, Sequence):
        return list(events)
    hint = "use publish" if isinstance(events, Event) else "write publish_many(list(…))"
    raise UsageError(f"publish_many takes a list of events, and got one {type(events).__name__}; {hint}")
