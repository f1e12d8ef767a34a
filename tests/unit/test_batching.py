"""What a batch handler's answer means, which events go together, and what is refused where one is registered."""

from __future__ import annotations

from typing import Any

import pytest

from shardbus import Bus, Context, RegistrationError, UsageError
from shardbus.batch_handlers import Batch
from shardbus.batching import Batching, Gathering, Gatherings, KeyOrder, batching, outcomes_of
from shardbus.inbound import Delivery
from shardbus.journal import Journal, journal_bytes
from shardbus.messages import Command, Event

ERROR = ValueError("bad")


class Step(Event, key="key"):
    key: str


class Loose(Event):
    n: int = 0


class Ask(Command[int]):
    n: int = 0


# -- outcomes


@pytest.mark.parametrize(
    ("returned", "expected"),
    [(None, [None, None]), ([None, ERROR], [None, ERROR]), ((ERROR, ERROR), [ERROR, ERROR])],
)
def test_a_handler_says_that_all_are_handled_or_what_became_of_each(returned: Any, expected: Any):
    assert outcomes_of(returned, 2, "app.handle") == expected


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([], "a list of 0"),
        ([None], "a list of 1"),
        ([None] * 3, "a list of 3"),
        (7, "a int"),
        ("ok", "a str"),
        ([None, False], "bool False"),
        ([None, ValueError], "type <class 'ValueError'>"),
    ],
)
def test_an_answer_that_is_none_is_told_clearly(returned: Any, told: str):
    with pytest.raises(UsageError) as found:
        outcomes_of(returned, 2, "app.handle")
    assert "app.handle was called with 2 events and returned" in str(found.value)
    assert told in str(found.value)


# -- order


def test_what_stands_behind_one_that_waits_waits_and_without_a_key_nothing_does():
    order = KeyOrder()
    assert not order.holds("a")
    order.wait("a")
    order.wait(None)
    assert [order.holds(key) for key in ("a", "b", None)] == [True, False, False]


# -- who goes together


def test_what_is_full_is_closed_and_departs_before_what_only_lingers():
    gatherings: Gatherings[Gathering[int]] = Gatherings()
    slow, full = (Gathering(Batching(events_max=2, linger_s=1.0), slot, [1]) for slot in "ab")
    for one in (slow, full):
        gatherings.open(one)
        gatherings.joined(one)
    full.members.append(2)
    gatherings.joined(full)
    assert (gatherings.find("a"), gatherings.find("b")) == (slow, None)
    assert (list(gatherings.departing), list(gatherings.lingering())) == ([full], [slow])
    gatherings.depart(full)
    gatherings.due(slow)
    assert slow.is_open  # others may join it until it begins
    gatherings.depart(slow)
    assert not gatherings
    assert not slow.is_open


# -- registration


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch": 1}, "2 to 4,096"),
        ({"batch": 4097}, "2 to 4,096"),
        ({"batch": True}, "2 to 4,096"),
        ({"batch": 8, "batch_by": "account"}, "batch_by='account'"),
        ({"batch": 8, "linger_s": -1.0}, "linger_s=-1.0"),
        ({"batch": 8, "linger_s": float("nan")}, "linger_s=nan"),
        ({"batch": 8, "linger_s": 61}, "linger_s=61"),
        ({"linger_s": 1.0}, "batch=256"),
        ({"batch_by": "key"}, "batch=256"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], told: str):
    with pytest.raises(RegistrationError, match=told):
        Bus("b").on(Step, **options)


def test_what_was_not_asked_for_is_one_event_at_a_time():
    assert batching(None, "type", 0.0) is None
    assert batching(2, "key", 1) == Batching(events_max=2, by_key=True, linger_s=1)


def test_a_batch_by_key_needs_a_key():
    with pytest.raises(RegistrationError, match="Loose has no key"):
        Bus("b").on(Loose, batch=8, batch_by="key")


@pytest.mark.parametrize("first_batch", [None, 8])
def test_a_batch_handler_is_the_only_one_of_its_type(first_batch: int | None):
    bus = Bus("b")
    bus.on(Step, batch=first_batch)(lambda events: None)
    with pytest.raises(RegistrationError, match="the only one of its type"):
        bus.on(Step, batch=8)(lambda events: None)
    if first_batch:
        with pytest.raises(RegistrationError, match="the only one of its type"):
            bus.on(Step)(lambda event: None)
    bus.on(Loose)(lambda event: None)


def test_a_batch_handler_that_says_that_it_takes_one_event_is_refused():
    bus = Bus("b")

    def one(event: Step) -> None: ...

    def many(events: list[Step], contexts: list[Context]) -> None: ...

    with pytest.raises(RegistrationError, match=r"takes one Step; a batch handler takes list\[Step\]"):
        bus.on(Step, batch=8)(one)
    bus.on(Step, batch=8)(many)
    plan = bus.plans()["Step"]
    assert (plan.simple, plan.batching) == (None, Batching(events_max=8))
    assert plan.handlers[0].wants_context


@pytest.mark.parametrize("middleware_first", [True, False])
def test_middleware_which_takes_one_message_is_refused_around_a_batch_handler(middleware_first: bool):
    bus = Bus("b")

    async def around(message: Any, context: Any, call_next: Any) -> Any:
        return await call_next(message, context)

    def use() -> None:
        bus.use(around)

    def on() -> None:
        bus.on(Step, batch=8)(lambda events: None)

    first, second = (use, on) if middleware_first else (on, use)
    first()
    with pytest.raises(RegistrationError, match="Step has a batch handler, and the middleware"):
        second()


def test_middleware_for_other_types_stands_beside_a_batch_handler():
    bus = Bus("b")

    async def around(message: Any, context: Any, call_next: Any) -> Any:
        return await call_next(message, context)

    bus.use(around, on=(Loose, Ask))
    bus.on(Step, batch=8)(lambda events: None)


# -- in the journal


def test_a_batch_is_written_down_as_stretches_and_found_there_by_a_successor():
    plan = Bus("b")
    plan.on(Step, batch=8)(lambda events: None)
    steps = plan.plans()["Step"]

    def delivery(publisher: bytes, seq: int) -> Delivery:
        return Delivery(None, publisher, seq, "Step", steps, "a", b"", 0, 0, 1)

    one, two = b"1" * 16, b"2" * 16
    members = [delivery(one, 5), delivery(one, 6), delivery(two, 7), delivery(two, 9), delivery(one, 7)]
    batch = Batch(steps, members[0])
    batch.members = members
    stretches = [(one, 5, 7), (two, 7, 8), (two, 9, 10), (one, 7, 8)]
    assert list(batch.stretches()) == stretches
    sizes = {"suspended": 8, "suspects": 8}
    journal = Journal(memoryview(bytearray(journal_bytes(**sizes))), **sizes)
    rows = [journal.suspend(publisher, first, 100, end - first) for publisher, first, end in stretches]
    found = {identity for under_way in journal.scene().suspended for identity in under_way.identities}
    assert found == {member.identity for member in members}
    journal.resume(rows[0])
    assert not {(one, 5), (one, 6)} & {one for under_way in journal.scene().suspended for one in under_way.identities}
