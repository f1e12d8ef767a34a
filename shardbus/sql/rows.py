"""What stands in a row of a store's tables: messages and what became of them, as the database holds them, and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec

from shardbus.messages import WireKey
from shardbus.sql.tables import ENVELOPE_WIDTH
from shardbus.store import DeadLetter, Envelope, Failure, ScheduledEvent, StoredScheduled, WaitingEvent
from shardbus.wording import encodable

pack: Final = msgspec.msgpack.Encoder().encode
_unpack_headers: Final = msgspec.msgpack.Decoder(dict[str, str]).decode


class _Progress(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is written of a waiting event only where there is something to say; what is added has a default."""

    todo: dict[str, int] = {}
    gave_up: tuple[Failure, ...] = ()
    deadline_ns: int = 0
    first_ns: int = 0


_NO_PROGRESS: Final = _Progress()
_unpack_progress: Final = msgspec.msgpack.Decoder(_Progress).decode


def unpack_key(packed: bytes) -> WireKey:
    """What `pack` made of a key: msgpack has no tuples, of which a key may be one."""
    key: Any = msgspec.msgpack.decode(packed)
    return (key[0],) if isinstance(key, list) else key


def _envelope_row(envelope: Envelope) -> tuple[Any, ...]:
    return (
        envelope.publisher,
        envelope.seq,
        envelope.slot,
        envelope.type,
        pack(envelope.key),
        envelope.body,
        None if envelope.headers is None else pack(envelope.headers),
        envelope.ordinal,
        envelope.intended_ns,
        envelope.attempt,
    )


@lru_cache(1024)
def _handlers_text(names: tuple[str, ...]) -> str:
    """Between lines of their own, so that each can be looked for."""
    return "".join(f"\n{name}\n" for name in names)


def dead_row(letter: DeadLetter) -> tuple[Any, ...]:
    """Values of `DEAD_COLUMNS`, in their order."""
    return (
        *_envelope_row(letter.envelope),
        _handlers_text(letter.handlers),
        letter.reason,
        storable(letter.error_type),
        storable(letter.error),
        storable(letter.place),
        letter.first_ns,
        letter.last_ns,
        letter.epoch,
        letter.position,
    )


def waiting_row(event: WaitingEvent) -> tuple[Any, ...]:
    """Values of all columns of a waiting event, in their order."""
    return (*_envelope_row(event.envelope), progress_of(event), event.due_ns, event.position)


def scheduled_row(event: ScheduledEvent) -> tuple[Any, ...]:
    """Values of `SCHEDULED_COLUMNS`, in their order."""
    return (*_envelope_row(event.envelope), event.due_ns)


def progress_of(event: WaitingEvent) -> bytes | None:
    """What has become of a waiting event so far; None: nothing."""
    if not (event.todo or event.gave_up or event.deadline_ns or event.first_ns):
        return None
    return pack(_Progress(event.todo, event.gave_up, event.deadline_ns, event.first_ns))


def _to_envelope(row: Sequence[Any]) -> Envelope:
    publisher, seq, slot, type_name, key, body, headers, ordinal, intended_ns, attempt = row
    return Envelope(
        publisher=publisher,
        seq=seq,
        slot=slot,
        type=type_name,
        key=unpack_key(key),
        body=body,
        headers=None if headers is None else _unpack_headers(headers),
        ordinal=ordinal,
        intended_ns=intended_ns,
        attempt=attempt,
    )


def to_dead(row: Sequence[Any]) -> DeadLetter:
    """A dead letter of `DEAD_COLUMNS` and the traceback of its place."""
    handlers, reason, error_type, error, place, first_ns, last_ns, epoch, position, traceback = row[ENVELOPE_WIDTH:]
    return DeadLetter(
        envelope=_to_envelope(row[:ENVELOPE_WIDTH]),
        handlers=tuple(handlers.split("\n")[1::2]),
        reason=reason,
        error_type=error_type,
        error=error,
        place=place,
        traceback=traceback,
        first_ns=first_ns,
        last_ns=last_ns,
        epoch=epoch,
        position=position,
    )


def to_waiting(row: Sequence[Any]) -> WaitingEvent:
    """A waiting event of all its columns."""
    progress, due_ns, position = row[ENVELOPE_WIDTH:]
    found = _NO_PROGRESS if progress is None else _unpack_progress(progress)
    return WaitingEvent(
        position=position,
        envelope=_to_envelope(row[:ENVELOPE_WIDTH]),
        todo=found.todo,
        gave_up=found.gave_up,
        due_ns=due_ns,
        deadline_ns=found.deadline_ns,
        first_ns=found.first_ns,
    )


def to_scheduled(row: Sequence[Any]) -> StoredScheduled:
    """A scheduled event of the number of its row and `SCHEDULED_COLUMNS`."""
    number, *envelope, due_ns = row
    return StoredScheduled(number, ScheduledEvent(envelope=_to_envelope(envelope), due_ns=due_ns))


def storable(text: str) -> str:
    """Text as every database takes it: an error's text may hold anything, and must not cost the event its record."""
    return encodable(text).replace("\0", "\\u0000")
