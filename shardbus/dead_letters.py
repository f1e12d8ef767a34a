"""What is asked and answered about dead letters: the words of clients, workers and people. Pure.

A worker owns its shard's store, so clients ask it: one page of dead letters, or to redrive or purge one page of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import msgspec

from shardbus.context import message_id
from shardbus.errors import RemoteProtocolError, UsageError
from shardbus.messages import WireKey, from_wire_key, to_wire_key
from shardbus.store import DEAD_REASONS, DeadFilter, StoredDeadLetter
from shardbus.wire.frames import Ask, brief

QUESTIONS: Final = ("dead-letters", "redrive", "purge")
EVENTS_MAX: Final = 256  # named in one question
_TEXT_MAX: Final = 1024
_PAGE_BYTES_MAX: Final = 1024 * 1024  # of bodies in one answer; the rest comes with the next page


class Request(msgspec.Struct, frozen=True):
    """Up to `limit` dead letters that are meant, of rows above `after`."""

    where: DeadFilter
    after: int
    limit: int


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """An event that will not be handled unless it is redriven.

    `id` is the event's `context.message_id`. `handlers` are those that gave up, and that a redrive runs. `body` is the
    event as it travelled; `event` shows it as plain data, where it decodes. `traceback` begins with the handler, and is
    stored once for each place that raised, so there are types of errors in it, and no texts: those are in `error`, with
    notes, and with what caused it, was being handled, or is in its group. Times are UTC: it died first at `first_at`,
    however often it was redriven since, and last at `last_at`.
    `parked`: later events of its key wait until it is redriven or purged.
    """

    id: str
    shard: int
    type: str
    key: str | int | bytes | UUID | None
    body: bytes
    headers: dict[str, str]
    handlers: tuple[str, ...]
    reason: str
    error_type: str
    error: str
    traceback: str
    attempts: int
    first_at: datetime
    last_at: datetime
    parked: bool = False

    @property
    def event(self) -> Any:
        """The fields of the event, or None where its bytes are no msgpack."""
        try:
            return msgspec.msgpack.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None


class DeadLetterFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters are meant: those that meet every condition that is given.

    `key` is the event's key as its publisher wrote it, in a 1-tuple, because None is one too. `since` is a time with its
    zone. `ids` are those of `DeadLetter.id`.

    Raises:
        UsageError: a key, a reason or an id that is none, or a time without a zone.
    """

    type: str | None = None
    key: tuple[Any] | None = None
    reason: str | None = None
    handler: str | None = None
    since: datetime | None = None
    ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, given in (("type", self.type), ("handler", self.handler)):
            if given is not None and not isinstance(given, str):
                raise UsageError(f"{name}={given!r}: give its name, a text")
        if self.key is not None and not (isinstance(self.key, tuple) and len(self.key) == 1):
            # A text is a sequence too: of key="42" the filter would take "4".
            raise UsageError(f"key={self.key!r}: give the key in a 1-tuple, for instance key=('42',); (None,) is no key")
        if self.since is not None and not isinstance(self.since, datetime):
            raise UsageError(f"since={self.since!r}: give a datetime with its zone, for instance datetime.now(UTC)")
        if self.since is not None and self.since.tzinfo is None:
            raise UsageError(f"since={self.since}: give a time with its zone, for instance datetime.now(UTC)")
        if self.reason is not None and self.reason not in DEAD_REASONS:
            raise UsageError(f"reason={self.reason!r}: it is one of {', '.join(DEAD_REASONS)}")
        if self.ids is not None and not isinstance(self.ids, tuple | list):
            raise UsageError(f"ids={self.ids!r}: give a tuple of ids, for instance ids=(letter.id,)")
        self.for_shards()

    def for_shards(self) -> tuple[DeadFilter, dict[int, list[tuple[bytes, int]]] | None]:
        """The store's filter, and by shard the events that are named; None: none are."""
        shards: dict[int, list[tuple[bytes, int]]] | None = None
        if self.ids is not None:
            shards = {}
            for shard, event in map(parse_id, self.ids):
                shards.setdefault(shard, []).append(event)
        return (
            DeadFilter(
                type=self.type,
                key=None if self.key is None else (to_wire_key(self.key[0]),),
                reason=self.reason,
                handler=self.handler,
                since_ns=0 if self.since is None else int(self.since.timestamp() * 1e9),
            ),
            shards,
        )


class Page(msgspec.Struct, frozen=True):
    """An answer: some dead letters and their rows. Fewer than were asked for is no sign of an end."""

    found: list[StoredDeadLetter]


class _WireFilter(msgspec.Struct, frozen=True, array_like=True):
    type: str | None
    key: list[Any] | None
    reason: str | None
    handler: str | None
    since_ns: int
    until_ns: int
    events: list[tuple[bytes, int]] | None
    after: int
    limit: int


_encode: Final = msgspec.msgpack.Encoder().encode
_decode_filter: Final = msgspec.msgpack.Decoder(_WireFilter).decode
_decode_any: Final = msgspec.msgpack.Decoder(list[Any]).decode
_decode_count: Final = msgspec.msgpack.Decoder(tuple[int, int]).decode


def encode_request(request: Request) -> bytes:
    """The body of a question."""
    where = request.where
    return _encode(
        (
            where.type,
            where.key,
            where.reason,
            where.handler,
            where.since_ns,
            where.until_ns,
            where.events,
            request.after,
            request.limit,
        )
    )


def decode_request(ask: Ask) -> Request:
    """What a question means.

    Raises:
        RemoteProtocolError: nothing that a worker knows.
    """
    if ask.what not in QUESTIONS:
        raise RemoteProtocolError(f"a worker does not know the question {ask.what!r}")
    try:
        wire = _decode_filter(ask.body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"not a question: {brief(error)}") from None
    texts = (wire.type, wire.reason, wire.handler)
    if any(text is not None and len(text) > _TEXT_MAX for text in texts) or len(wire.events or ()) > EVENTS_MAX:
        raise RemoteProtocolError("not a question: too long")
    sound = 0 <= wire.since_ns < 2**63 and 0 <= wire.until_ns < 2**63 and 0 <= wire.after < 2**62 and 0 < wire.limit < 2**31
    if not sound or (wire.events is not None and any(not 0 <= seq < 2**62 for _, seq in wire.events)):
        raise RemoteProtocolError("not a question: a number is out of range")
    where = DeadFilter(
        type=wire.type,
        key=None if wire.key is None else (_sound_key(wire.key),),
        reason=wire.reason,
        handler=wire.handler,
        since_ns=wire.since_ns,
        until_ns=wire.until_ns,
        events=wire.events,
    )
    return Request(where, wire.after, wire.limit)


def _sound_key(wire: list[Any]) -> WireKey:
    match wire:
        case [None | str() | int() | bytes() as key]:
            return key
        case [[bytes(digits)]]:
            return (digits,)
    raise RemoteProtocolError("not a question: a key that is none")


def page_of(found: Sequence[StoredDeadLetter]) -> Page:
    """As many of these as fit into one answer, and always the first."""
    size = 0
    fitting: list[StoredDeadLetter] = []
    for one in found:
        letter = one.letter
        size += len(letter.envelope.body) + len(letter.traceback) + 8192
        if fitting and size > _PAGE_BYTES_MAX:
            break
        fitting.append(one)
    return Page(fitting)


def encode_answer(body: object) -> bytes:
    """The body of an answer: a page, or how many."""
    return _encode(body)


def decode_count(body: bytes) -> tuple[int, int]:
    """How many dead letters of a page were redriven or purged, and the row of its last (0: the page is empty).

    Raises `msgspec.DecodeError`.
    """
    return _decode_count(body)


def decode_page(body: bytes, shard: int) -> tuple[list[DeadLetter], int]:
    """The dead letters of a page, and the row of the last (0: the page is empty). Raises `msgspec.DecodeError`."""
    rows = msgspec.msgpack.decode(body)["found"]
    letters = [_shown(row["letter"], shard) for row in rows]
    return letters, rows[-1]["row"] if rows else 0


def _shown(letter: dict[str, Any], shard: int) -> DeadLetter:
    envelope = letter["envelope"]
    key = envelope["key"]
    return DeadLetter(
        id=message_id(envelope["publisher"], shard, envelope["seq"]),
        shard=shard,
        type=envelope["type"],
        key=from_wire_key((key[0],) if isinstance(key, list) else key),
        body=envelope["body"],
        headers=envelope["headers"] or {},
        handlers=tuple(letter["handlers"]),
        reason=letter["reason"],
        error_type=letter["error_type"],
        error=letter["error"],
        traceback=_whole(letter["traceback"], letter["error_type"], letter["error"]),
        attempts=envelope["attempt"],
        first_at=datetime.fromtimestamp(letter["first_ns"] / 1e9, UTC),
        last_at=datetime.fromtimestamp(letter["last_ns"] / 1e9, UTC),
        parked=letter["position"] > 0,
    )


def _whole(traceback: str, error_type: str, error: str) -> str:
    """A traceback as Python prints it. The store has one for each place, which ends with the error's type alone."""
    if not error or not error_type or traceback.rpartition("\n")[2] != error_type:
        return traceback
    return f"{traceback}: {error}"


def parse_id(text: str) -> tuple[int, tuple[bytes, int]]:
    """The shard and the event (publisher, sequence) of a dead letter's id.

    Raises:
        UsageError: it is no such id.
    """
    publisher, _, rest = text.partition("-")
    shard, _, seq = rest.partition("-")
    try:
        found = int(shard), (bytes.fromhex(publisher), int(seq))
    except ValueError:
        found = -1, (b"", -1)
    if len(found[1][0]) != 16 or not 0 <= found[1][1] < 2**62 or found[0] < 0:
        raise UsageError(f"{text!r} is no id of a dead letter; `shardbus dead-letters list` shows them")
    return found
