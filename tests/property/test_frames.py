"""Frames: anything valid survives the way, anything else is one kind of error, and neither costs unbounded memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardbus.config import DEFAULT_LIMITS
from shardbus.errors import RemoteProtocolError
from shardbus.wire.frames import (
    REASONS,
    Ack,
    Answer,
    Ask,
    Bye,
    Cancel,
    Data,
    Feed,
    Frame,
    Hello,
    Items,
    More,
    Nack,
    Ping,
    Reject,
    Replies,
    Subscribe,
    Subscribed,
    TableChanged,
    Taken,
    Unsubscribe,
    Unsubscribed,
    Welcome,
    decode_to_client,
    decode_to_publisher,
    decode_to_supervisor,
    decode_to_worker,
    encode_frame,
)

Decoder = Callable[[bytes], Any]

DECODERS: dict[str, Decoder] = {
    "worker": decode_to_worker,
    "publisher": decode_to_publisher,
    "supervisor": decode_to_supervisor,
    "client": decode_to_client,
}

each_end = pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)

epochs = st.binary(max_size=32)
sequences = st.integers(min_value=0, max_value=2**61)
small = st.integers(min_value=0, max_value=2**31)
blobs = st.binary(max_size=300)


def pairs_within(low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Sorted, disjoint ranges in `[low, high]`, flat."""
    return st.lists(st.integers(low, high), max_size=12, unique=True).map(
        lambda numbers: tuple(sorted(numbers)[: len(numbers) // 2 * 2])
    )


@st.composite
def batches(draw: st.DrawFn) -> Data:
    first, count = draw(sequences), draw(st.integers(1, DEFAULT_LIMITS.batch_events_max))
    return Data(
        epoch=draw(epochs),
        layout=draw(small),
        first=first,
        count=count,
        attempt=draw(st.integers(1, 1000)),
        skip=draw(pairs_within(first, first + count)),
        blob=draw(st.binary(min_size=1, max_size=300)),
    )


@st.composite
def stretches(draw: st.DrawFn) -> Data:
    first, count = draw(sequences), draw(st.integers(1, 2**60))
    return Data(draw(epochs), draw(small), first, count, 1, (first, first + count), b"")


@st.composite
def acks(draw: st.DrawFn) -> Ack:
    cumulative, more = draw(sequences), draw(st.integers(0, 40_000))
    return Ack(
        draw(epochs),
        cumulative + more,
        cumulative,
        draw(pairs_within(cumulative, cumulative + more)),
        draw(st.booleans()),
        draw(small),
        draw(small),
        draw(small),
        draw(small),
    )


names = st.lists(st.text(min_size=1, max_size=128), min_size=1, max_size=DEFAULT_LIMITS.subscription_types_max).map(tuple)
feeds = st.one_of(
    st.builds(Feed, epochs, sequences, sequences, st.just(0), st.just(b"")),
    st.builds(
        Feed,
        epochs,
        sequences,
        sequences,
        st.integers(1, DEFAULT_LIMITS.batch_events_max),
        st.binary(min_size=1, max_size=300),
    ),
)
to_worker: st.SearchStrategy[Frame] = st.one_of(
    st.builds(Hello, small, st.binary(min_size=16, max_size=16), small, epochs, sequences),
    batches(),
    stretches(),
    st.builds(Ping, epochs, sequences, sequences),
    st.builds(Bye, epochs),
    st.builds(Subscribe, epochs, sequences, names, st.binary(max_size=DEFAULT_LIMITS.key_bytes_max + 5)),
    st.builds(Unsubscribe, epochs, sequences),
    st.builds(Taken, epochs, sequences, sequences),
    st.builds(Cancel, epochs, sequences),
    st.builds(More, epochs, sequences, sequences),
)
replies = st.tuples(sequences, st.sampled_from(["ok", "failed", "expired"]), blobs)
to_publisher: st.SearchStrategy[Frame] = st.one_of(
    st.builds(Welcome, epochs, sequences, small, small, small),
    st.builds(Reject, epochs, st.sampled_from(sorted(REASONS))),
    acks(),
    st.builds(Nack, epochs, sequences),
    st.builds(Replies, epochs, st.lists(replies, min_size=1, max_size=5).map(tuple)),
    st.builds(Items, epochs, sequences, sequences, st.lists(blobs, min_size=1, max_size=20).map(tuple)),
    st.builds(Subscribed, epochs, sequences),
    st.builds(Unsubscribed, epochs, sequences, st.text(max_size=30)),
    feeds,
)
to_supervisor: st.SearchStrategy[Frame] = st.builds(Ask, small, st.text(max_size=30), blobs)
to_client: st.SearchStrategy[Frame] = st.one_of(
    st.builds(Answer, small, st.text(max_size=30), blobs), st.builds(TableChanged, blobs)
)

GOOD: dict[str, tuple[Decoder, st.SearchStrategy[Frame]]] = {
    "worker": (decode_to_worker, to_worker),
    "publisher": (decode_to_publisher, to_publisher),
    "supervisor": (decode_to_supervisor, to_supervisor),
    "client": (decode_to_client, to_client),
}

frames = st.sampled_from(sorted(GOOD)).flatmap(lambda end: st.tuples(st.just(GOOD[end][0]), GOOD[end][1]))


def survives(decode: Decoder, data: bytes) -> None:
    """Decoding ends in a frame or in the one error; anything else ends the test."""
    try:
        decode(data)
    except RemoteProtocolError:
        pass


# -- what is valid


@settings(max_examples=400)
@given(frames)
def test_a_valid_frame_arrives_as_it_was_sent(sent: tuple[Decoder, Frame]):
    decode, frame = sent
    assert decode(encode_frame(frame)) == frame


def test_a_full_frame_is_within_the_limit_and_arrives():
    blob = bytes(DEFAULT_LIMITS.batch_bytes_target + DEFAULT_LIMITS.event_bytes_max)
    count = DEFAULT_LIMITS.batch_events_max
    frame = Data(b"e" * 24, 1, 2**61, count, 1, tuple(range(2**61, 2**61 + count)), blob)
    data = encode_frame(frame)
    assert len(data) <= DEFAULT_LIMITS.frame_bytes_max
    assert decode_to_worker(data) == frame


def test_an_ack_with_a_gap_behind_every_unfinished_message_arrives():
    events = DEFAULT_LIMITS.session_credit_events_max
    frame = Ack(b"e" * 24, 2 * events, 0, tuple(range(1, 2 * events + 1)), True, 0, 0, 0, 0)
    assert decode_to_publisher(encode_frame(frame)) == frame


def test_a_field_that_a_later_version_appends_is_ignored():
    later = msgspec.msgpack.encode([3, b"epoch", 7, 1, "new"])
    assert decode_to_worker(later) == Ping(b"epoch", 7, 1)


# -- what is not


@settings(max_examples=300)
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(b"\x90")
@example(b"\x91\xc0")
@example(b"\x93\x03\xc4\x01e\x07\x00")
def test_random_bytes_are_refused_and_nothing_else(data: bytes):
    for decode in DECODERS.values():
        survives(decode, data)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=100)
@given(st.sampled_from([*range(1, 36), 0, -1, 99]), st.lists(anything, max_size=9))
def test_a_known_kind_with_any_fields_is_refused_or_sound(kind: int, fields: list[Any]):
    data = msgspec.msgpack.encode([kind, *fields])
    for decode in DECODERS.values():
        survives(decode, data)


@settings(max_examples=150)
@given(frames)
def test_every_truncation_is_refused(sent: tuple[Decoder, Frame]):
    decode, frame = sent
    data = encode_frame(frame)
    for length in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            decode(data[:length])


@settings(max_examples=150)
@given(frames, st.binary(min_size=1, max_size=5))
def test_bytes_after_the_end_are_refused(sent: tuple[Decoder, Frame], more: bytes):
    decode, frame = sent
    with pytest.raises(RemoteProtocolError):
        decode(encode_frame(frame) + more)


@each_end
@pytest.mark.parametrize("data", [b"\x00" * 100_000, b"\xc5\xff\xff" + bytes(0xFFFF) + b"\x00"], ids=["zeros", "bytes"])
def test_an_error_does_not_repeat_what_the_peer_sent(decode: Decoder, data: bytes):
    # It would flood the log of whoever writes it there, at the peer's will.
    with pytest.raises(RemoteProtocolError) as raised:
        decode(data)
    length = len(str(raised.value))
    assert length < 1000


@settings(max_examples=200)
@given(frames, st.data())
def test_a_changed_frame_is_refused_or_sound(sent: tuple[Decoder, Frame], data: st.DataObject):
    decode, frame = sent
    changed = bytearray(encode_frame(frame))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    survives(decode, bytes(changed))


@given(frames)
def test_no_end_takes_what_is_meant_for_another(sent: tuple[Decoder, Frame]):
    right, frame = sent
    shared = {Ask: (decode_to_supervisor, decode_to_worker), Answer: (decode_to_client, decode_to_publisher)}
    for decode in DECODERS.values():
        if decode is not right and decode not in shared.get(type(frame), ()):
            with pytest.raises(RemoteProtocolError):
                decode(encode_frame(frame))


UNSOUND: dict[str, tuple[Decoder, Frame]] = {
    "a publisher of too few bytes": (decode_to_worker, Hello(1, b"p" * 15, 1, b"e", 0)),
    "a publisher of too many bytes": (decode_to_worker, Hello(1, b"p" * 17, 1, b"e", 0)),
    "a greeting from below zero": (decode_to_worker, Hello(1, b"p" * 16, 1, b"e", -1)),
    "data from below zero": (decode_to_worker, Data(b"e", 1, -1, 1, 1, (), b"x")),
    "no data": (decode_to_worker, Data(b"e", 1, 0, 0, 1, (), b"x")),
    "less than no data": (decode_to_worker, Data(b"e", 1, 5, -1, 1, (), b"x")),
    "attempt zero": (decode_to_worker, Data(b"e", 1, 0, 1, 0, (), b"x")),
    "data beyond the last sequence": (decode_to_worker, Data(b"e", 1, 2**62, 1, 1, (), b"x")),
    "a batch that is too long": (decode_to_worker, Data(b"e", 1, 0, 513, 1, (), b"x")),
    "half a range": (decode_to_worker, Data(b"e", 1, 0, 9, 1, (1,), b"x")),
    "an empty range": (decode_to_worker, Data(b"e", 1, 0, 9, 1, (1, 1), b"x")),
    "a reversed range": (decode_to_worker, Data(b"e", 1, 0, 9, 1, (3, 1), b"x")),
    "ranges that overlap": (decode_to_worker, Data(b"e", 1, 0, 9, 1, (1, 4, 3, 5), b"x")),
    "ranges out of order": (decode_to_worker, Data(b"e", 1, 0, 9, 1, (5, 6, 1, 2), b"x")),
    "a range below the batch": (decode_to_worker, Data(b"e", 1, 5, 9, 1, (4, 6), b"x")),
    "a range beyond the batch": (decode_to_worker, Data(b"e", 1, 0, 9, 1, (8, 10), b"x")),
    "a stretch that is not wholly finished": (decode_to_worker, Data(b"e", 1, 0, 9, 1, (0, 8), b"")),
    "a stretch that is not finished at all": (decode_to_worker, Data(b"e", 1, 0, 9, 1, (), b"")),
    "more ranges than a batch has events": (
        decode_to_worker,
        Data(b"e", 1, 0, 2000, 1, tuple(range(1000)), b"x"),
    ),
    "an ack with half a range": (decode_to_publisher, Ack(b"e", 9, 0, (1,), True, 0, 0, 0, 0)),
    "an ack with a range below its cumulative part": (
        decode_to_publisher,
        Ack(b"e", 9, 5, (4, 6), True, 0, 0, 0, 0),
    ),
    "a subscription to nothing": (decode_to_worker, Subscribe(b"e", 1, (), b"")),
    "a subscription to too much": (decode_to_worker, Subscribe(b"e", 1, ("a",) * 33, b"")),
    "a subscription to a type without a name": (decode_to_worker, Subscribe(b"e", 1, ("",), b"")),
    "a subscription to a type with a long name": (decode_to_worker, Subscribe(b"e", 1, ("a" * 129,), b"")),
    "a subscription to a long key": (decode_to_worker, Subscribe(b"e", 1, ("a",), bytes(1041))),
    "a subscription with a number below zero": (decode_to_worker, Subscribe(b"e", -1, ("a",), b"")),
    "less than nothing taken": (decode_to_worker, Taken(b"e", 1, -1)),
    "more taken than there can be": (decode_to_worker, Taken(b"e", 1, 2**62)),
    "a command before the first cancelled": (decode_to_worker, Cancel(b"e", -1)),
    "fewer than no items allowed": (decode_to_worker, More(b"e", 1, -1)),
    "no items": (decode_to_publisher, Items(b"e", 1, 0, ())),
    "more items than a frame has": (decode_to_publisher, Items(b"e", 1, 0, (b"",) * 513)),
    "items before the first": (decode_to_publisher, Items(b"e", 1, -1, (b"",))),
    "a feed without its events": (decode_to_publisher, Feed(b"e", 1, 0, 1, b"")),
    "a feed of no events that has some": (decode_to_publisher, Feed(b"e", 1, 0, 0, b"x")),
    "a feed of more than a batch": (decode_to_publisher, Feed(b"e", 1, 0, 513, b"x")),
    "a feed from below zero": (decode_to_publisher, Feed(b"e", 1, -1, 1, b"x")),
    "an ack of what was not received": (decode_to_publisher, Ack(b"e", 9, 0, (8, 10), True, 0, 0, 0, 0)),
}


@pytest.mark.parametrize(("decode", "frame"), UNSOUND.values(), ids=UNSOUND)
def test_a_frame_that_no_sound_peer_sends_is_refused(decode: Decoder, frame: Frame):
    with pytest.raises(RemoteProtocolError):
        decode(encode_frame(frame))


# -- what a header may announce

ANNOUNCED = {
    "an array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "an array just above the limit": b"\xdc\xff\xff",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "a map at all": b"\x81\x01\x02",
    "a text of 4 GB": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 GB": b"\xc6\xff\xff\xff\xff",
    "an extension of 4 GB": b"\xc9\xff\xff\xff\xff\x01",
    "an extension": b"\xd4\x01\x00",
    "a time stamp": b"\xd6\xff\x00\x00\x00\x00",
    "arrays in arrays without end": b"\x91" * 100_000,
    "wide arrays in wide arrays": b"\xdc\x02\x0f" * 5_000,
}


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@each_end
@pytest.mark.parametrize("header", ANNOUNCED.values(), ids=ANNOUNCED)
def test_a_header_that_announces_too_much_is_refused_before_it_is_allocated(decode: Decoder, header: bytes):
    def refused() -> None:
        for data in (header, b"\x93\x03" + header, b"\x98\x02\xc4\x01e\x01\x00\x01\x01" + header):
            with pytest.raises(RemoteProtocolError):
                decode(data)

    refused()  # imports and caches are not what is measured
    assert peak_bytes(refused) < 16 * 1024 * 1024


def test_a_worker_allocates_little_for_the_worst_nesting():
    worst = b"\xdc\x02\x10" * 1020  # the longest array that is allowed, in itself, as deep as goes
    assert peak_bytes(lambda: survives(decode_to_worker, worst)) < 8 * 1024 * 1024
