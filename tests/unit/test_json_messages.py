"""Messages that people type: what is taken, and what they are told."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest

from shardbus.errors import UsageError
from shardbus.json_messages import JSON_BYTES_MAX, check_kind, choose_type, key_from_text, message_from_json
from shardbus.messages import Command, Event


class Item(msgspec.Struct):
    price: float


class Placed(Event, key="order_id"):
    order_id: str
    items: tuple[Item, ...] = ()
    note: bytes = b""


class Timed(Event, key="id", rename="camel", tag="timed"):
    id: UUID
    at_time: datetime


class Empty(Event):
    pass


class Get(Command[float], key="order_id"):
    order_id: str


def test_fields_are_taken_as_json_writes_them():
    assert message_from_json(Placed, '{"order_id": "1", "items": [{"price": 2}], "note": "AAE="}') == Placed(
        order_id="1", items=(Item(2.0),), note=b"\0\1"
    )
    identity = "12345678123456781234567812345678"
    text = f'{{"type": "timed", "id": "{UUID(identity)}", "atTime": "2026-01-31T12:00:00Z"}}'
    assert message_from_json(Timed, text) == Timed(id=UUID(identity), at_time=datetime(2026, 1, 31, 12, tzinfo=UTC))
    assert message_from_json(Empty, b" {} ") == Empty()


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        (Placed, '{"order_id": 1}', "Placed: field order_id: expected `str`, got `int`"),
        (Placed, '{"order_id": "1", "items": [{"price": "x"}]}', "field items[0].price: expected `float`, got `str`"),
        (Placed, "{}", "missing required field `order_id`; Placed takes an object with order_id, items, note"),
        (Placed, '{"order_id": "1", "itmes": []}', "Placed has no field 'itmes'; Placed takes an object with order_id"),
        (Placed, "[1]", "'[1]' is no JSON object; Placed takes an object with"),
        (Placed, "order_id=1", "'order_id=1' is no JSON: "),
        (Placed, "", "'' is no JSON: "),
        (Placed, b"\xff", "is no JSON: "),
        (Placed, '{"a": ' + "[" * 100_000, "…' is no JSON: "),
        (Placed, '{"order_id": "1", "note": "?"}', "field note: invalid base64"),
        (Placed, " " * (JSON_BYTES_MAX + 1), "Placed: more than 4,194,304 bytes of JSON"),
        (Empty, '{"a": 1}', "Empty has no field 'a'; Empty takes {}"),
    ],
)
def test_what_is_not_sound_is_told_with_the_fields_name(kind: Any, text: str | bytes, told: str):
    with pytest.raises(UsageError) as raised:
        message_from_json(kind, text)
    assert told in str(raised.value)


def test_an_unknown_name_is_told_with_the_known_ones():
    known = {"Placed": Placed, "Empty": Empty, "Get": Get}
    assert choose_type(known, "Get", "shop:bus") is Get
    told = "shop:bus has no handler of 'Gte'; it has the events Empty, Placed and the commands Get"
    with pytest.raises(UsageError, match=told):
        choose_type(known, "Gte", "shop:bus")
    with pytest.raises(UsageError, match="it has none at all"):
        choose_type({}, "Gte", "shop:bus")


def test_events_are_published_and_commands_executed():
    check_kind(Placed, Event)
    check_kind(Get, Command)
    with pytest.raises(UsageError, match="Get is a command; use `shardbus execute`"):
        check_kind(Get, Event)
    with pytest.raises(UsageError, match="Placed is an event; use `shardbus publish`"):
        check_kind(Placed, Command)


class Numbered(Event, key="number"):
    number: int


def test_a_key_is_read_as_its_type_has_it():
    identity = "12345678-1234-5678-1234-567812345678"
    assert key_from_text(Placed, "7") == "7"
    assert key_from_text(Numbered, "7") == 7
    assert key_from_text(Timed, identity) == UUID(identity)
    with pytest.raises(UsageError, match="the key 'seven' of Numbered"):
        key_from_text(Numbered, "seven")
    with pytest.raises(UsageError, match="Empty has no key"):
        key_from_text(Empty, "7")
