"""Batches: anything valid survives the way, anything else is one kind of error, and neither costs unbounded memory."""

from __future__ import annotations

import sys
import tracemalloc
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardbus.config import DEFAULT_LIMITS
from shardbus.errors import RemoteProtocolError
from shardbus.messages import WireKey
from shardbus.wire.codec import Batch, Extra, decode_batch, stamp_at

pack = msgspec.msgpack.encode
NOTHING = pack(None)


class Message(NamedTuple):
    """What a publisher appends to a batch."""

    name: str
    key: WireKey
    body: bytes
    stamp: tuple[int, int] | None
    headers: dict[str, str] | None
    timeout_ns: int
    idempotent: bool
    window: int = 0


keys: st.SearchStrategy[WireKey] = st.one_of(
    st.none(),
    st.text(max_size=40),
    st.integers(-(2**63), 2**64 - 1),
    st.binary(max_size=40),
    st.binary(min_size=16, max_size=16).map(lambda raw: (raw,)),
)
stamps = st.integers(0, 2**63 - 1)
messages = st.builds(
    Message,
    name=st.sampled_from(["OrderPlaced", "Заказ", "x" * DEFAULT_LIMITS.name_bytes_max])
    | st.text(min_size=1, max_size=20),
    key=keys,
    body=st.binary(max_size=60).map(pack),
    stamp=st.none() | st.tuples(stamps, stamps),
    headers=st.none() | st.dictionaries(st.text(max_size=10), st.text(max_size=20), max_size=4),
    timeout_ns=st.integers(0, 2**62 - 1),
    idempotent=st.booleans(),
    window=st.integers(0, DEFAULT_LIMITS.stream_items_max),
)
publications = st.lists(messages, min_size=1, max_size=40)


def batch_of(published: list[Message]) -> Batch:
    batch = Batch()
    for at, message in enumerate(published):
        if at % 3:
            batch.add(message.name, message.key, message.body)
        else:
            batch.add_many(message.name, [message.key], message.body)
        if message.stamp is not None:
            batch.stamp(*message.stamp)
        if message.headers is not None:
            batch.extras.append(Extra(at, message.headers, message.timeout_ns, message.idempotent, message.window))
    return batch


def survives(blob: bytes, count: int) -> None:
    """Decoding ends in columns of `count` messages or in the one error; anything else ends the test."""
    try:
        columns = decode_batch(blob, count)
        bodies = columns.apart()
    except RemoteProtocolError:
        return
    assert len(columns.keys) == len(bodies) == count
    assert isinstance(columns.names, str) or len(columns.names) == count
    for column in (columns.ordinals, columns.intended_ns):
        assert column is None or len(column) == 8 * count
    assert all(0 <= at < count for at in columns.extras)
    assert all(isinstance(body, bytes) for body in bodies)
    for key in columns.keys:
        assert type(key) in (str, int, bytes, tuple, type(None))


# -- what is valid


@settings(max_examples=200)
@given(publications)
def test_a_batch_arrives_as_it_was_published(published: list[Message]):
    batch = batch_of(published)
    assert len(batch) == len(published)
    columns = decode_batch(batch.seal(), len(published))

    names = [columns.names] * len(published) if isinstance(columns.names, str) else columns.names
    assert names == [message.name for message in published]
    assert list(columns.keys) == [message.key for message in published]
    assert [type(key) for key in columns.keys] == [type(message.key) for message in published]
    assert columns.apart() == [message.body for message in published]

    stamps = [message.stamp or (0, 0) for message in published]
    ordinals, instants = [list(column) for column in zip(*stamps, strict=True)]
    assert [stamp_at(columns.ordinals, at) for at in range(len(published))] == ordinals
    assert [stamp_at(columns.intended_ns, at) for at in range(len(published))] == instants
    assert (columns.ordinals is None, columns.intended_ns is None) == (not any(ordinals), not any(instants))

    assert columns.extras == {
        at: Extra(at, message.headers, message.timeout_ns, message.idempotent, message.window)
        for at, message in enumerate(published)
        if message.headers is not None
    }


@given(publications)
def test_a_batch_is_plain_msgpack_to_another_implementation(published: list[Message]):
    names, places, keys, bodies, *_ = msgpack.unpackb(batch_of(published).seal(), use_list=False)
    indices = [0] * len(keys) if places is None else array("H", places)
    assert [names[place] for place in indices] == [message.name for message in published]
    assert keys == tuple(m.key for m in published)
    assert msgpack.unpackb(bodies) == [msgpack.unpackb(m.body) for m in published]


def test_a_batch_of_one_type_carries_its_name_once():
    one = batch_of([Message("OrderPlaced", None, NOTHING, None, None, 0, False)] * 200)
    assert one.seal().count(b"OrderPlaced") == 1
    assert decode_batch(one.seal(), 200).names == "OrderPlaced"


def test_sealing_twice_gives_the_same_bytes():
    with_stamps = Message("A", 1, pack("x"), (1, 2), None, 0, False)
    batch = batch_of([with_stamps, Message("B", 2, pack("y"), None, {"h": "v"}, 0, False)])
    assert batch.seal() == batch.seal()


def test_a_full_batch_of_as_many_types_arrives():
    count = DEFAULT_LIMITS.batch_events_max
    published = [Message(f"Type{at}", at, pack("b"), (at, at), {"h": str(at)}, at, True) for at in range(count)]
    columns = decode_batch(batch_of(published).seal(), count)
    assert columns.names == [message.name for message in published]
    assert len(columns.extras) == count


def test_a_body_and_a_key_of_the_greatest_length_arrive():
    body, key = pack(bytes(DEFAULT_LIMITS.event_bytes_max - 5)), "é" * (DEFAULT_LIMITS.key_bytes_max // 2)
    columns = decode_batch(batch_of([Message("A", key, body, None, None, 0, False)]).seal(), 1)
    assert (columns.keys, columns.apart(), len(body)) == ((key,), [body], DEFAULT_LIMITS.event_bytes_max)


def test_as_many_headers_as_are_allowed_arrive():
    headers = {f"header-{at}": "v" * 1000 for at in range(DEFAULT_LIMITS.headers_max)}
    columns = decode_batch(batch_of([Message("A", None, NOTHING, None, headers, 0, False)]).seal(), 1)
    assert columns.extras[0].headers == headers


def test_a_body_that_is_nested_deeper_than_this_stack_has_room_for_arrives():
    deep = b"\x91" * 1500 + NOTHING
    batch = batch_of([Message("A", None, body, None, None, 0, False) for body in (pack("x"), deep, pack("y"))])
    limit = sys.getrecursionlimit()
    assert decode_batch(batch.seal(), 3).apart() == [pack("x"), deep, pack("y")]
    assert sys.getrecursionlimit() == limit


# -- what is not


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 300))
@example(b"", 0)
@example(b"\xc0", 1)
@example(b"\xc4\x06abcdef", 1)
@example(b"\xa6abcdef", 1)
@example(b"\x96" + b"\x90" * 6, 0)
def test_random_bytes_are_refused_and_nothing_else(blob: bytes, count: int):
    survives(blob, count)


@settings(max_examples=60)
@given(st.lists(messages, min_size=1, max_size=8))
def test_every_truncation_is_refused(published: list[Message]):
    blob = batch_of(published).seal()
    for length in range(len(blob)):
        with pytest.raises(RemoteProtocolError):
            decode_batch(blob[:length], len(published))


@given(publications, st.binary(min_size=1, max_size=5))
def test_bytes_after_the_end_are_refused(published: list[Message], more: bytes):
    with pytest.raises(RemoteProtocolError):
        decode_batch(batch_of(published).seal() + more, len(published))


@pytest.mark.parametrize("more", [b"\x00" * 100_000, b"\x00"], ids=["much more", "one byte more"])
def test_an_error_does_not_repeat_what_the_peer_sent(more: bytes):
    # It would flood the log of whoever writes it there, at the peer's will.
    blob = batch_of([Message("A", None, pack(bytes(100_000)), None, None, 0, False)]).seal()
    with pytest.raises(RemoteProtocolError) as raised:
        decode_batch(blob + more, 1)
    length = len(str(raised.value))
    assert length < 1000


@settings(max_examples=150)
@given(st.lists(messages, min_size=1, max_size=12), st.data())
def test_a_changed_batch_is_refused_or_sound(published: list[Message], data: st.DataObject):
    changed = bytearray(batch_of(published).seal())
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    survives(bytes(changed), len(published))


@given(publications, st.integers(-2, 300))
def test_another_count_than_was_published_is_refused(published: list[Message], count: int):
    blob = batch_of(published).seal()
    if count == len(published):
        assert len(decode_batch(blob, count).apart()) == count
    else:
        with pytest.raises(RemoteProtocolError):
            decode_batch(blob, count)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)
XY = pack([b"x", b"y"])
SOUND: list[Any] = [["A"], None, [1, 2], XY, None, None, None]


@settings(max_examples=150)
@given(st.integers(0, 6), anything)
def test_a_column_of_anything_is_refused_or_sound(column: int, value: Any):
    columns = list(SOUND)
    columns[column] = value
    survives(pack(columns), 2)


@settings(max_examples=200)
@given(anything)
def test_extras_of_anything_are_refused_or_sound(value: Any):
    survives(pack([*SOUND[:6], pack(value)]), 2)
    survives(pack([*SOUND[:6], pack([value])]), 2)


def stamps_of(*values: int) -> bytes:
    return array("q", values).tobytes()


UNSOUND: dict[str, list[Any]] = {
    "a column too few": SOUND[:6],
    "a column too many": [*SOUND, None],
    "a key that is a float": [["A"], None, [1, 2.0], XY, None, None, None],
    "a key that is a truth value": [["A"], None, [1, True], XY, None, None, None],
    "a UUID of 15 bytes": [["A"], None, [1, [b"u" * 15]], XY, None, None, None],
    "a UUID of text": [["A"], None, [1, ["u" * 16]], XY, None, None, None],
    "a UUID of two parts": [["A"], None, [1, [b"u" * 16, b"u" * 16]], XY, None, None, None],
    "a key of too many bytes": [["A"], None, [1, b"k" * 1025], XY, None, None, None],
    "a key of too much text": [["A"], None, [1, "k" * 1025], XY, None, None, None],
    "bodies that are text": [["A"], None, [1, 2], "\x92xy", None, None, None],
    "bodies that are none": [["A"], None, [1, 2], None, None, None, None],
    "bodies that are not packed": [["A"], None, [1, 2], [b"x", b"y"], None, None, None],
    "a body too few": [["A"], None, [1, 2], pack([b"x"]), None, None, None],
    "a body too many": [["A"], None, [1, 2], pack([b"x", b"y", b"z"]), None, None, None],
    "fewer bodies than they say": [["A"], None, [1, 2], XY[:-2], None, None, None],
    "half a body": [["A"], None, [1, 2], XY[:-1], None, None, None],
    "bodies with more after their end": [["A"], None, [1, 2], XY + b"\x00", None, None, None],
    "a body that nests without end": [["A"], None, [1, 2], b"\x92\x00" + b"\x91" * 100_000, None, None, None],
    "a key too many": [["A"], None, [1, 2, 3], XY, None, None, None],
    "no name": [[], None, [1, 2], XY, None, None, None],
    "a name that is bytes": [[b"A"], None, [1, 2], XY, None, None, None],
    "a place that names nothing": [["A"], b"\x00\x00\x01\x00", [1, 2], XY, None, None, None],
    "a place too few": [["A"], b"\x00\x00", [1, 2], XY, None, None, None],
    "names that are no text": [["A", 7], b"\x00\x00\x00\x00", [1, 2], XY, None, None, None],
    "two names and no places": [["A", "B"], None, [1, 2], XY, None, None, None],
    "half a place": [["A", "B"], b"\x00\x00\x01", [1, 2], XY, None, None, None],
    "places that are text": [["A", "B"], "0101", [1, 2], XY, None, None, None],
    "a name of too much text": [["A" * 1025], None, [1, 2], XY, None, None, None],
    "a stamp too few": [["A"], None, [1, 2], XY, stamps_of(1), stamps_of(1, 2), None],
    "half a stamp": [["A"], None, [1, 2], XY, stamps_of(1, 2)[:-1], stamps_of(1, 2), None],
    "a negative ordinal": [["A"], None, [1, 2], XY, stamps_of(1, -2), stamps_of(1, 2), None],
    "a negative instant": [["A"], None, [1, 2], XY, stamps_of(1, 2), stamps_of(1, -2), None],
    "stamps that are text": [["A"], None, [1, 2], XY, "x" * 16, stamps_of(1, 2), None],
    "extras that are not packed": [["A"], None, [1, 2], XY, None, None, []],
    "an extra of no message": [["A"], None, [1, 2], XY, None, None, pack([[2, {}, 0, False]])],
    "an extra from below": [["A"], None, [1, 2], XY, None, None, pack([[-1, {}, 0, False]])],
    "a negative timeout": [["A"], None, [1, 2], XY, None, None, pack([[0, {}, -1, False]])],
    "an endless timeout": [["A"], None, [1, 2], XY, None, None, pack([[0, {}, 2**62, False]])],
    "a window below zero": [["A"], None, [1, 2], XY, None, None, pack([[0, {}, 1, False, -1]])],
    "a window beyond its bound": [["A"], None, [1, 2], XY, None, None, pack([[0, {}, 1, False, 0, 1025]])],
    "a header that is a number": [["A"], None, [1, 2], XY, None, None, pack([[0, {"h": 1}, 0, False]])],
    "too many headers": [
        ["A"], None, [1, 2], XY, None, None, pack([[0, {str(at): "" for at in range(33)}, 0, False]]),
    ],
    "extras with more after their end": [["A"], None, [1, 2], XY, None, None, pack([]) + b"\x00"],
    "too many bytes of extras": [["A"], None, [1, 2], XY, None, None, bytes(600_000)],
}  # fmt: skip


@pytest.mark.parametrize("columns", UNSOUND.values(), ids=UNSOUND)
def test_a_batch_that_no_sound_publisher_packs_is_refused(columns: list[Any]):
    with pytest.raises(RemoteProtocolError):
        decode_batch(pack(columns), 2).apart()


def test_the_batch_that_the_unsound_ones_differ_from_is_sound():
    assert decode_batch(pack(SOUND), 2).apart() == [pack(b"x"), pack(b"y")]


# -- what a header may announce

ANNOUNCED = {
    "an array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "an array just above the limit": b"\xdc\x02\x01",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "a map at all": b"\x81\x01\x02",
    "a text of 4 GB": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 GB": b"\xc6\xff\xff\xff\xff",
    "an extension": b"\xd4\x01\x00",
    "a time stamp": b"\xd6\xff\x00\x00\x00\x00",
    "arrays in arrays without end": b"\x91" * 100_000,
    "wide arrays in wide arrays": b"\xdc\x01\x00" * 5_000,
}


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("header", ANNOUNCED.values(), ids=ANNOUNCED)
def test_a_header_that_announces_too_much_is_refused_before_it_is_allocated(header: bytes):
    def refused() -> None:
        within = [pack([*SOUND[:6], header]), pack([*SOUND[:6], b"\x91" + header])]
        for blob in (header, b"\x97\x91\xa1A\xc0" + header, *within):
            with pytest.raises(RemoteProtocolError):
                decode_batch(blob, 2)

    refused()  # imports and caches are not what is measured
    assert peak_bytes(refused) < 8 * 1024 * 1024


def test_keys_that_are_far_longer_than_any_client_makes_them_are_refused():
    batch = Batch()
    for _ in range(256):
        batch.add("Step", "🦆" * 1024, NOTHING)
    with pytest.raises(RemoteProtocolError, match="bytes of keys"):
        decode_batch(batch.seal(), 256)
