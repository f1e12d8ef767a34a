"""What is said about scheduled events: when one is due, the handle of one, and the question that cancels it. Pure."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from shardbus.context import message_id
from shardbus.dead_letters import parse_id
from shardbus.errors import RemoteProtocolError, UsageError
from shardbus.wire.frames import Ask, brief

CANCEL: Final = "cancel-scheduled"
"""The question to a shard."""

_NS: Final = 1_000_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_DUE_NS_MAX: Final = 2**62 - 1  # in the year 2116

_encode: Final = msgspec.msgpack.Encoder().encode
_decode_event: Final = msgspec.msgpack.Decoder(tuple[bytes, int]).decode
_decode_bool: Final = msgspec.msgpack.Decoder(bool).decode


class Scheduled(msgspec.Struct, frozen=True, kw_only=True):
    """An event that was scheduled: what `Client.cancel` takes.

    `id` is the event's `context.message_id`, by which another program may cancel it. `due_at` is UTC.
    """

    id: str
    due_at: datetime


def due_ns(at: datetime | float | None, delay: float | None, wall_ns: int) -> int:
    """When an event is due, in nanoseconds since 1970, by exactly one of the two; what is past is due at once.

    Raises:
        UsageError: both, or none, a time without its zone, or what is no time.
    """
    if (at is None) == (delay is None):
        raise UsageError("say when, once: at=… (a datetime with its zone, or seconds since 1970) or delay=… (seconds)")
    if isinstance(at, datetime):
        if at.tzinfo is None or at.utcoffset() is None:
            raise UsageError(f"at={at}: give a time with its zone, for instance datetime.now(UTC) + timedelta(hours=1)")
        due = (at - _EPOCH) // timedelta(microseconds=1) * 1000
    else:
        name, given = ("delay", delay) if at is None else ("at", at)
        if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
            wanted = "seconds as a number" if at is None else "a datetime with its zone, or seconds since 1970"
            raise UsageError(f"{name}={given!r}: give {wanted}")
        due = (wall_ns if at is None else 0) + round(given * _NS)
    if due > _DUE_NS_MAX:
        raise UsageError(f"{f'delay={delay!r}' if at is None else f'at={at}'}: that is beyond the year 2116")
    return max(1, due)


def scheduled(publisher: bytes, shard: int, seq: int, due_ns: int) -> Scheduled:
    """The handle of an event."""
    return Scheduled(id=message_id(publisher, shard, seq), due_at=at_time(due_ns))


def at_time(wall_ns: int) -> datetime:
    """Nanoseconds since 1970 as a time, UTC; to the microsecond, without a float's rounding."""
    return _EPOCH + timedelta(microseconds=wall_ns // 1000)


def event_of(which: Scheduled | str) -> tuple[int, tuple[bytes, int]]:
    """The shard of an event, and its publisher and sequence.

    Raises:
        UsageError: it is no handle, and no id of one.
    """
    text = which.id if isinstance(which, Scheduled) else which
    try:
        return parse_id(text)
    except (UsageError, AttributeError):
        raise UsageError(f"{which!r} is no scheduled event; give what `schedule` returned, or its `id`") from None


def encode_cancel(event: tuple[bytes, int]) -> bytes:
    """The body of the question."""
    return _encode(event)


def decode_cancel(ask: Ask) -> tuple[bytes, int]:
    """Which event is meant: its publisher and sequence.

    Raises:
        RemoteProtocolError: it does not say.
    """
    try:
        publisher, seq = _decode_event(ask.body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"not a question: {brief(error)}") from None
    if len(publisher) != 16 or not 0 <= seq < 2**62:
        raise RemoteProtocolError("not a question: no event")
    return publisher, seq


def decode_cancelled(body: bytes) -> bool:
    """The answer. Raises `msgspec.DecodeError`."""
    return _decode_bool(body)
