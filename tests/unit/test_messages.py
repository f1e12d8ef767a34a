"""Messages: how they are declared, what a key may be, and under which name they travel."""

from __future__ import annotations

import enum
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

import msgspec
import pytest

from shardbus.errors import InvalidKey, RegistrationError
from shardbus.messages import (
    Command,
    Event,
    Message,
    check_key_type,
    from_wire_key,
    key_getter,
    reply_type,
    to_wire_key,
    wire_name,
)


class OrderPlaced(Event, key="order_id"):
    order_id: str
    amount: float


class GetTotal(Command[float], key="order_id"):
    order_id: str


class Ticked(Event):
    count: int = 0


# -- declaring


def test_a_message_travels_under_its_class_name():
    assert wire_name(OrderPlaced) == "OrderPlaced"


def test_a_message_travels_under_the_name_it_was_given():
    class Renamed(Event, name="order.placed.v2"):
        pass

    assert wire_name(Renamed) == "order.placed.v2"


def test_a_subclass_has_its_own_name_and_its_parents_key():
    class OrderPlacedAgain(OrderPlaced):
        reason: str = ""

    assert wire_name(OrderPlacedAgain) == "OrderPlacedAgain"
    getter = key_getter(OrderPlacedAgain)
    assert getter is not None
    assert getter(OrderPlacedAgain(order_id="42", amount=1.0)) == "42"


def test_a_message_is_frozen():
    event = OrderPlaced(order_id="42", amount=9.5)
    with pytest.raises(AttributeError):
        event.amount = 1.0


def test_a_message_takes_keywords_only_however_deep_it_is_derived():
    class Derived(OrderPlaced):
        more: int

    for call in (lambda: OrderPlaced("42", 9.5), lambda: Derived("42", 9.5, 1)):
        with pytest.raises(TypeError):
            call()


def test_a_required_field_may_follow_one_with_a_default():
    class Mixed(Event):
        first: int = 0
        second: str

    assert Mixed(second="x").first == 0


def test_options_of_structs_still_work():
    class Small(Event, tag=True, omit_defaults=True, rename="camel"):
        line_count: int = 0

    assert msgspec.json.encode(Small(line_count=3)) == b'{"type":"Small","lineCount":3}'


def test_a_message_is_checked_when_it_is_decoded():
    body = msgspec.msgpack.encode({"order_id": "42", "amount": "much"})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(body, type=OrderPlaced)


def test_unknown_fields_are_ignored_and_new_ones_take_their_default():
    class OrderPlacedLater(Event, name="OrderPlaced"):
        order_id: str
        currency: str = "EUR"

    body = msgspec.msgpack.encode(OrderPlaced(order_id="42", amount=9.5))
    assert msgspec.msgpack.decode(body, type=OrderPlacedLater) == OrderPlacedLater(order_id="42")


REFUSED_DECLARATIONS = {
    "a key that is no field": ({"key": "id"}, ["key='id'", "order_id", "amount"]),
    "an empty name": ({"name": ""}, ["name=", "empty"]),
    "a name that is too long": ({"name": "é" * 65}, ["128 bytes", "name="]),
    "a message that can change": ({"frozen": False}, ["always frozen"]),
    "a message with positional fields": ({"kw_only": False}, ["always kw_only"]),
}


@pytest.mark.parametrize(("options", "parts"), REFUSED_DECLARATIONS.values(), ids=REFUSED_DECLARATIONS)
def test_a_declaration_is_refused_where_it_stands(options: dict[str, Any], parts: list[str]):
    with pytest.raises(RegistrationError) as raised:
        type(Event)("Order", (Event,), {"__annotations__": {"order_id": str, "amount": float}}, **options)
    assert [part for part in ["Order", *parts] if part not in str(raised.value)] == []


def test_a_key_of_a_type_without_fields_is_refused():
    with pytest.raises(RegistrationError, match="none"):

        class Empty(Event, key="id"):
            pass


def test_a_name_of_the_greatest_length_is_taken():
    assert wire_name(type(Event)("E", (Event,), {}, name="é" * 64)) == "é" * 64


# -- replies


def test_the_reply_type_is_the_one_that_was_declared():
    assert reply_type(GetTotal) is float


def test_a_reply_type_may_be_generic():
    class ListAll(Command[list[str]]):
        pass

    assert reply_type(ListAll) == list[str]


def test_a_command_may_reply_with_nothing():
    class Stop(Command[None]):
        pass

    assert reply_type(Stop) is type(None)


def test_a_reply_type_is_inherited():
    class GetTotalLater(GetTotal):
        at: int = 0

    assert reply_type(GetTotalLater) is float


def test_a_command_that_declares_no_reply_type_may_reply_with_anything():
    class Bare(Command):  # type: ignore[type-arg]  # what this test is about
        pass

    assert reply_type(Bare) is Any


def test_a_reply_type_that_is_still_a_variable_may_be_anything():
    T = TypeVar("T")

    class Fetch(Command[T], Generic[T]):
        pass

    assert reply_type(Fetch) is Any


# -- keys

SOME_UUID = UUID("12345678-1234-5678-1234-567812345678")


class Colour(str, enum.Enum):  # noqa: UP042 - the old way, whose members have another text than their value
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Raw(bytes):
    pass


KEYS = {
    "text": ("42", "42"),
    "empty text": ("", ""),
    "a number": (42, 42),
    "the lowest number": (-(2**63), -(2**63)),
    "the highest number": (2**64 - 1, 2**64 - 1),
    "bytes": (b"42", b"42"),
    "a UUID": (SOME_UUID, (SOME_UUID.bytes,)),
    "no key": (None, None),
    "a member of a text enum": (Colour.RED, "red"),
    "a member of a number enum": (Level.HIGH, 3),
    "a subclass of bytes": (Raw(b"x"), b"x"),
    "the longest text": ("x" * 1024, "x" * 1024),
    "the longest text of two-byte characters": ("é" * 512, "é" * 512),
    "the longest bytes": (b"x" * 1024, b"x" * 1024),
}


@pytest.mark.parametrize(("key", "expected"), KEYS.values(), ids=KEYS)
def test_a_key_has_one_normal_form(key: Any, expected: Any):
    wire_key = to_wire_key(key)
    assert wire_key == expected
    assert type(wire_key) is type(expected)


@pytest.mark.parametrize("key", ["42", 42, b"42", SOME_UUID, None], ids=repr)
def test_a_key_comes_back_as_it_was_written(key: Any):
    again = from_wire_key(to_wire_key(key))
    assert again == key
    assert type(again) is type(key)


REFUSED_KEYS = {
    "a float": (4.2, ["4.2", "float", "str, an int, bytes or a UUID"]),
    "a truth value": (True, ["True", "bool"]),
    "a tuple": ((b"x" * 16,), ["tuple"]),
    "mutable bytes": (bytearray(b"x"), ["bytearray"]),
    "a number below 64 bits": (-(2**63) - 1, ["64 bits", "use a str"]),
    "a number above 64 bits": (2**64, ["64 bits", "use a str"]),
    "text that is too long": ("x" * 1025, ["1,024 bytes", "digest"]),
    "text that is too long only in bytes": ("é" * 513, ["1,024 bytes", "digest"]),
    "bytes that are too long": (b"x" * 1025, ["1,025", "1,024", "digest"]),
}


@pytest.mark.parametrize(("key", "parts"), REFUSED_KEYS.values(), ids=REFUSED_KEYS)
def test_a_key_is_refused_with_the_reason(key: Any, parts: list[str]):
    with pytest.raises(InvalidKey) as raised:
        to_wire_key(key)
    assert [part for part in parts if part not in str(raised.value)] == []


def test_a_refused_key_is_not_shown_at_length():
    with pytest.raises(InvalidKey) as raised:
        to_wire_key("x" * 100_000)
    assert len(str(raised.value)) < 200


def test_a_message_type_without_a_key_has_no_getter():
    assert key_getter(Ticked) is None


def test_a_getter_takes_the_key_from_a_message():
    getter = key_getter(GetTotal)
    assert getter is not None
    assert getter(GetTotal(order_id="7")) == "7"


# -- key fields


def keyed_by(annotation: Any) -> type[Message]:
    made: type[Message] = type(Event)("Keyed", (Event,), {"__annotations__": {"id": annotation}}, key="id")
    return made


GOOD_KEY_FIELDS = {
    "str": str,
    "int": int,
    "bytes": bytes,
    "UUID": UUID,
    "an optional": str | None,
    "one of several": int | str,
    "a text enum": Colour,
    "literals": Literal["a", "b"],
    "a constrained text": Annotated[str, msgspec.Meta(max_length=10)],
    "anything": Any,
}


@pytest.mark.parametrize("annotation", GOOD_KEY_FIELDS.values(), ids=GOOD_KEY_FIELDS)
def test_a_field_can_be_the_key(annotation: Any):
    check_key_type(keyed_by(annotation))


BAD_KEY_FIELDS = {
    "float": (float, "float"),
    "bool": (bool, "bool"),
    "a list": (list[str], "list"),
    "one of several of which one cannot": (str | float, "float"),
}


@pytest.mark.parametrize(("annotation", "shown"), BAD_KEY_FIELDS.values(), ids=BAD_KEY_FIELDS)
def test_a_field_that_can_hold_no_key_is_refused(annotation: Any, shown: str):
    with pytest.raises(RegistrationError) as raised:
        check_key_type(keyed_by(annotation))
    assert [part for part in ("Keyed", "'id'", shown, "UUID") if part not in str(raised.value)] == []


def test_a_type_without_a_key_has_nothing_to_check():
    check_key_type(Ticked)
