"""What can be said on the wire: every frame as a frozen type, and bytes ↔ frame with limits on everything.

A frame is one msgpack array whose first element is its kind. Both ways are msgspec's: it checks the types while it
decodes, and allocates in proportion to the bytes that are there, whatever their headers announce (since its release 0.14,
https://github.com/msgspec/msgspec/pull/367). So the limit on a frame's bytes bounds memory; arrays have limits of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec

from shardbus.config import DEFAULT_LIMITS
from shardbus.errors import RemoteProtocolError

# Flat pairs: data may list a gap behind every event of a batch, an ack behind every unfinished event of a session.
SkipRanges = Annotated[tuple[int, ...], msgspec.Meta(max_length=2 * DEFAULT_LIMITS.batch_events_max)]
FinishedRanges = Annotated[tuple[int, ...], msgspec.Meta(max_length=2 * DEFAULT_LIMITS.session_credit_events_max)]


_SEQ_END: Final = 2**62  # no sequence, and no time in nanoseconds, is as high
_ATTEMPTS_END: Final = 2**31


_Sequence = Annotated[int, msgspec.Meta(ge=0, lt=_SEQ_END)]
_Names = Annotated[
    tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=DEFAULT_LIMITS.name_bytes_max)], ...],
    msgspec.Meta(min_length=1, max_length=DEFAULT_LIMITS.subscription_types_max),
]
_Key = Annotated[bytes, msgspec.Meta(max_length=DEFAULT_LIMITS.key_bytes_max + 16)]
_Some = Annotated[int, msgspec.Meta(ge=0, le=DEFAULT_LIMITS.batch_events_max)]
_Replies = Annotated[
    tuple[tuple[_Sequence, str, bytes], ...], msgspec.Meta(min_length=1, max_length=DEFAULT_LIMITS.batch_events_max)
]
_Items = Annotated[
    tuple[bytes, ...], msgspec.Meta(min_length=1, max_length=DEFAULT_LIMITS.batch_events_max)
]


class _Frame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    pass


# -- publisher → worker


class Hello(_Frame, frozen=True, tag=1):
    """Opens a session, or takes it up again after the connection was lost. `first` is the lowest unfinished sequence."""

    protocol: int
    publisher: bytes
    layout: int
    epoch: bytes
    first: int


class Data(_Frame, frozen=True, tag=2):
    """`count` events from sequence `first` on, packed in `blob`; `skip` lists finished ranges in them (flat pairs).

    A stretch that is wholly finished travels with an empty blob, and may be longer than a batch. `attempt` is 1 for what
    was never sent before, and one more for each worker that may have seen it. `waited_ns` is how long messages in it have
    waited in the outbox: their deadlines count from the call. `awaited`: somebody waits for it to be finished, so its acks
    are not to be delayed.
    """

    epoch: bytes
    layout: int
    first: int
    count: int
    attempt: int
    skip: SkipRanges
    blob: bytes
    waited_ns: int = 0
    awaited: bool = False


class Ping(_Frame, frozen=True, tag=3):
    """Asks for a full `Ack`, which repeats its `number`. Somebody waits for all below `awaited` to be finished."""

    epoch: bytes
    awaited: int
    number: int = 0


class Bye(_Frame, frozen=True, tag=4):
    """The publisher leaves; its session may be forgotten."""

    epoch: bytes


class Subscribe(_Frame, frozen=True, tag=9):
    """Asks for the events of these types that are handled from now on. `key` is one key, as `pack_keys` packs it, or
    empty: all. `subscription` is the client's number for it, new for each worker. May be repeated.
    """

    epoch: bytes
    subscription: _Sequence
    names: _Names
    key: _Key


class Unsubscribe(_Frame, frozen=True, tag=10):
    """Ends a subscription."""

    epoch: bytes
    subscription: _Sequence


class Taken(_Frame, frozen=True, tag=11):
    """All events of a subscription below `upto` have arrived, or are known to be missing. Also says that it is alive."""

    epoch: bytes
    subscription: _Sequence
    upto: _Sequence


class Cancel(_Frame, frozen=True, tag=12):
    """Nobody waits for the command with this sequence any more."""

    epoch: bytes
    seq: _Sequence


class More(_Frame, frozen=True, tag=13):
    """The reader of a streaming command takes its items below `allowed`."""

    epoch: bytes
    seq: _Sequence
    allowed: _Sequence


# -- worker → publisher


class Welcome(_Frame, frozen=True, tag=17):
    """The session is open; the worker takes `expected` next.

    `session` numbers the worker's sessions: another number than before says that the worker remembers nothing of the
    publisher, so what was sent before may come to be handled again.
    """

    epoch: bytes
    expected: int
    session: int
    credit_events: int
    credit_bytes: int


class Reject(_Frame, frozen=True, tag=18):
    """The worker does not take what was sent. `reason` is one of `REASONS`."""

    epoch: bytes
    reason: str


class Ack(_Frame, frozen=True, tag=19):
    """What is finished: all below `cumulative`, and `finished` (flat ranges above it).

    `full` says whether `finished` is all of it or only what is new since the last ack. Everything else is absolute, so
    an ack may be lost, repeated or overtaken. `received` is the next sequence that the worker takes; `dead` and `waiting`
    count this session's events that ended so; credit bounds the unfinished events and bytes of this session. `ping` is the
    number of the ping that it answers, 0 where it answers none.
    """

    epoch: bytes
    received: int
    cumulative: int
    finished: FinishedRanges
    full: bool
    dead: int
    waiting: int
    credit_events: int
    credit_bytes: int
    ping: int = 0


class Nack(_Frame, frozen=True, tag=20):
    """Data above `expected` arrived: go back and send from `expected` on."""

    epoch: bytes
    expected: int


class Replies(_Frame, frozen=True, tag=21):
    """Outcomes of commands: the sequence of each, its status, and a body that is packed as that says."""

    epoch: bytes
    replies: _Replies


class Items(_Frame, frozen=True, tag=25):
    """What a streaming command yielded, from its item `first` on. Its reply says how many there were."""

    epoch: bytes
    seq: _Sequence
    first: _Sequence
    items: _Items


class Subscribed(_Frame, frozen=True, tag=26):
    """The subscription has begun: what arrives from now on is fed to it."""

    epoch: bytes
    subscription: _Sequence


class Unsubscribed(_Frame, frozen=True, tag=27):
    """The worker does not feed this subscription; `reason` is one of `UNSUBSCRIBED`."""

    epoch: bytes
    subscription: _Sequence
    reason: str


class Feed(_Frame, frozen=True, tag=28):
    """`count` handled events of a subscription, packed in `blob` as a batch is, the first with number `first`.

    Each event that it was meant to get has a number; what is missing between two feeds was dropped or lost. One without
    events says only what the next number is.
    """

    epoch: bytes
    subscription: _Sequence
    first: _Sequence
    count: _Some
    blob: bytes


# -- client → supervisor or worker and back


class Ask(_Frame, frozen=True, tag=33):
    """A question to the supervisor, or to a worker about its dead letters; `body` is msgpack, as `what` says."""

    request: int
    what: str
    body: bytes


class Answer(_Frame, frozen=True, tag=34):
    """The answer to the question with this number. `error` is empty, or says why there is no `body`."""

    request: int
    error: str
    body: bytes


class TableChanged(_Frame, frozen=True, tag=35):
    """A new routing table, sent unasked to everybody who asked for one; `body` is a packed `routing.Table`."""

    body: bytes


REASONS: Final = {
    "protocol": "the two sides speak different versions of the protocol",
    "stale-epoch": "the worker was replaced; ask the supervisor for the table",
    "stale-layout": "slots have moved; ask the supervisor for the table",
    "unknown-session": "greet first",
    "too-many-publishers": "the worker serves as many publishers as it can; try again",
    "malformed": "the frame was not sound; the session has ended",
}

UNSUBSCRIBED: Final = {
    "forgotten": "the worker has not heard of the subscriber for long, or never",
    "unknown-type": "no handler of this application takes events of that type, so none is ever handled",
    "too-many": "the worker feeds as many subscriptions as it can",
}

REPLY_OK: Final = "ok"
REPLY_FAILED: Final = "failed"
REPLY_EXPIRED: Final = "expired"

FromListener = Subscribe | Unsubscribe | Taken
FromCaller = Cancel | More
ToListener = Subscribed | Unsubscribed | Feed
ToWorker = Hello | Data | Ping | Bye | Ask | FromListener | FromCaller
ToPublisher = Welcome | Reject | Ack | Nack | Replies
ToClient = Answer | TableChanged
Frame = ToWorker | ToPublisher | Items | ToListener | Ask | ToClient

encode_frame: Final = msgspec.msgpack.Encoder().encode
"""Any frame to bytes."""

def brief(error: Exception) -> str:
    """What went wrong with a peer's bytes, without repeating them."""
    return f"{type(error).__name__}: {error}"[:160]


def _decoder(kind: Any) -> Callable[[bytes], Any]:
    decode = msgspec.msgpack.Decoder(kind).decode

    def checked(data: bytes) -> Any:
        try:
            return decode(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise RemoteProtocolError(f"not a frame: {brief(error)}") from None

    return checked


_to_worker: Final = _decoder(ToWorker)
_to_publisher: Final = _decoder(ToPublisher | Items | ToListener | Answer)


def decode_to_worker(data: bytes) -> ToWorker:
    """Bytes that a worker received.

    Raises:
        RemoteProtocolError: they are not a frame that a publisher may send.
    """
    frame: ToWorker = _to_worker(data)
    if isinstance(frame, Data):
        _check_data(frame)
    elif isinstance(frame, Hello) and (len(frame.publisher) != 16 or not 0 <= frame.first < _SEQ_END):
        raise RemoteProtocolError("a greeting needs a publisher of 16 bytes and a sequence from 0 on")
    return frame


def decode_to_publisher(data: bytes) -> ToPublisher | Items | ToListener | Answer:
    """Bytes that a publisher received from a worker. Raises as `decode_to_worker`."""
    frame: ToPublisher | Items | ToListener | Answer = _to_publisher(data)
    if isinstance(frame, Ack) and not _is_sorted_pairs(frame.finished, frame.cumulative, frame.received):
        raise RemoteProtocolError("an ack whose ranges are not sorted pairs")
    if isinstance(frame, Feed) and bool(frame.count) != bool(frame.blob):
        raise RemoteProtocolError(f"a feed of {frame.count} events in {len(frame.blob)} bytes")
    return frame


decode_to_supervisor: Final[Callable[[bytes], Ask]] = _decoder(Ask)
"""Bytes that the supervisor received from a client. Raises as `decode_to_worker`."""

decode_to_client: Final[Callable[[bytes], ToClient]] = _decoder(ToClient)
"""Bytes that a client received from the supervisor. Raises as `decode_to_worker`."""


def _check_data(frame: Data) -> None:
    sound = frame.first >= 0 and frame.count >= 1 and 1 <= frame.attempt < _ATTEMPTS_END
    if not sound or not 0 <= frame.waited_ns < _SEQ_END:
        raise RemoteProtocolError(
            f"data with first={frame.first}, count={frame.count}, attempt={frame.attempt}, waited_ns={frame.waited_ns}"
        )
    if frame.first + frame.count > _SEQ_END:
        raise RemoteProtocolError(f"data beyond the last sequence: first={frame.first}, count={frame.count}")
    if frame.blob and frame.count > DEFAULT_LIMITS.batch_events_max:
        raise RemoteProtocolError(f"a batch of {frame.count} events; the limit is {DEFAULT_LIMITS.batch_events_max}")
    if frame.skip and not _is_sorted_pairs(frame.skip, frame.first, frame.first + frame.count):
        raise RemoteProtocolError("data whose finished ranges are not sorted pairs within it")
    if not frame.blob and frame.skip != (frame.first, frame.first + frame.count):
        raise RemoteProtocolError("data without events whose stretch is not wholly finished")


def _is_sorted_pairs(flat: tuple[int, ...], low: int, high: int) -> bool:
    if len(flat) % 2:
        return False
    last = low - 1
    for at, number in enumerate(flat):
        # Starts may touch `low`; everything after is strictly ascending, and nothing lies above `high`.
        if number <= last or number > high:
            return False
        last = number if at % 2 == 0 else number - 1
    return True
