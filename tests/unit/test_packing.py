"""What messages are packed as, and what of them goes together."""

from __future__ import annotations

import uuid

import pytest

from shardbus.config import DEFAULT_LIMITS
from shardbus.errors import ClientClosed, UsageError
from shardbus.messages import Command, Event, from_wire_key, to_wire_key
from shardbus.packing import Packing, packed_parts, packed_stamps, picked


class Step(Event, key="key"):
    key: str
    n: int = 0


class Other(Event, key="key"):
    key: str


class Keyless(Event):
    n: int


class Ask(Command[int], key="key"):
    key: str


@pytest.fixture
def packing() -> Packing:
    return Packing(DEFAULT_LIMITS, (), lambda: None)


def test_what_goes_to_each_target_is_together_in_its_order_and_finds_its_stamps(packing: Packing) -> None:
    events = [Step(key=key, n=n) for n, key in enumerate("abacb")]
    packing.learn_event(events[0])
    found = packing.alike(events)
    assert found is not None
    route, keys = found
    target_of = {"a": "first", "b": "second", "c": "first"}
    targets = [target_of[key] for key in keys]
    parts = {part.target: part for part in packed_parts(route, events, keys, targets, set(targets))}
    assert parts["first"].keys == ["a", "a", "c"]
    assert parts["second"].keys == ["b", "b"]
    assert picked([10, 11, 12, 13, 14], parts["first"].places) == [10, 12, 13]
    assert picked([10, 11, 12, 13, 14], parts["second"].places) == [11, 14]


def test_what_goes_to_one_target_is_packed_as_one_by_one(packing: Packing) -> None:
    events = [Step(key="a", n=n) for n in range(3)]
    route = packing.learn_event(events[0])
    (part,) = packed_parts(route, events, ["a"] * 3, ["here"] * 3, {"here"})
    assert part.bodies == b"".join(packing.pack(event, None)[2] for event in events)
    assert picked([1, 2, 3], part.places) == [1, 2, 3]


@pytest.mark.parametrize(
    "events",
    [[Step(key="a"), Other(key="a")], [Keyless(n=1), Keyless(n=2)], [Step(key="a"), Step(key=b"a")]],  # type: ignore[arg-type]
    ids=["two types", "no key", "keys of two types"],
)
def test_events_that_differ_are_not_packed_together(packing: Packing, events: list[Event]) -> None:
    packing.learn_event(events[0])
    assert packing.alike(events) is None


def test_a_message_of_the_other_kind_is_told_the_other_call(packing: Packing) -> None:
    with pytest.raises(UsageError, match="use execute"):
        packing.pack(Ask(key="a"), None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="use publish"):
        packing.pack_command(Step(key="a"), None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="make one"):
        packing.pack(Step, None)  # type: ignore[arg-type]


def test_no_type_is_learnt_where_nothing_is_taken() -> None:
    def shut() -> None:
        raise ClientClosed("closed")

    packing = Packing(DEFAULT_LIMITS, (), shut)
    with pytest.raises(ClientClosed):
        packing.pack(Step(key="a"), None)
    assert packing.events == {}


def test_headers_are_counted_and_kept_as_they_were(packing: Packing) -> None:
    headers = {"tenant": "ä"}
    _, _, body, kept, size = packing.pack(Step(key="a"), headers)
    headers["tenant"] = "later"
    assert kept == {"tenant": "ä"}
    assert size == len(body) + len(b"tenant") + len("ä".encode())


def test_a_key_in_its_normal_form_is_made_of_any_key() -> None:
    for key in ("a", 7, b"b", uuid.UUID(int=3)):
        wire_key = to_wire_key(key)
        assert to_wire_key(from_wire_key(wire_key)) == wire_key


@pytest.mark.parametrize("stamps", [[1, -1], [2**63], ["1"]])
def test_what_is_no_stamp_is_refused(stamps: list[int]) -> None:
    with pytest.raises(UsageError, match="stamp"):
        packed_stamps(stamps)
