"""Messages of lanes as rows, and rows as messages: clocks, attempts, handlers that are to run."""

from __future__ import annotations

from shardbus.envelopes import Envelopes, envelope_of, scheduled_event
from shardbus.inbound import UNKNOWN, Delivery
from shardbus.outgoing import Children
from shardbus.registry import Plan
from shardbus.session_events import SessionEnded
from shardbus.store import DeadLetter, Failure, ScheduledEvent, StoredDeadLetter, StoredScheduled
from shardbus.wire.codec import Extra

PUBLISHER = b"p" * 16
KNOWN = Plan(SessionEnded, ())
WALL_NS = 1_000_000


def envelopes(*takeovers: int, now_ns: int = 100, wall_ns: int = WALL_NS) -> Envelopes:
    made = Envelopes({"Known": KNOWN}, lambda: now_ns, lambda: wall_ns)
    made.takeovers = takeovers
    return made


def delivery(*, extra: Extra | None = None, attempt: int = 1, position: int = 7, name: str = "Known") -> Delivery:
    return Delivery(None, PUBLISHER, 3, name, KNOWN, "k", b"\x90", 5, 6, attempt, extra, position=position)


def dead(position: int, attempt: int = 2) -> StoredDeadLetter:
    letter = DeadLetter(
        envelope=envelope_of(delivery(attempt=attempt)),
        handlers=("a", "b"),
        reason="failed",
        error_type="E",
        error="",
        place="",
        traceback="",
        first_ns=1,
        last_ns=1,
        epoch=b"e",
        position=position,
    )
    return StoredDeadLetter(row=9, letter=letter)


def test_a_message_comes_back_from_the_store_as_it_went_there():
    one = delivery(extra=Extra(4, {"h": "v"}, 0, False), attempt=2)
    one.todo, one.gave_up = {"a": 1}, (Failure(handlers=("b",), reason="failed", error_type="E", error=""),)
    back = envelopes().from_waiting(envelopes().waiting_event(one))
    for field in ("publisher", "seq", "name", "plan", "key", "body", "ordinal", "intended_ns", "attempt", "position"):
        assert getattr(back, field) == getattr(one, field), field
    assert (back.todo, back.gave_up, back.session) == (one.todo, one.gave_up, None)
    assert back.extra is not None
    assert back.extra.headers == {"h": "v"}
    assert (back.due_ns, back.deadline_ns) == (0, 0)


def test_a_message_of_a_type_that_has_no_plan_comes_back_as_unknown():
    assert envelopes().from_waiting(envelopes().waiting_event(delivery(name="Other"))).plan is UNKNOWN


def test_times_outlive_a_worker_and_its_clock():
    one = delivery()
    one.due_ns, one.deadline_ns = 150, 90
    row = envelopes(now_ns=100).waiting_event(one)
    assert (row.due_ns, row.deadline_ns) == (WALL_NS + 50, WALL_NS - 10)
    back = envelopes(now_ns=5_000, wall_ns=WALL_NS + 20).from_waiting(row)
    assert (back.due_ns, back.deadline_ns) == (5_030, 4_970)


def test_each_take_over_of_a_row_is_one_more_attempt_without_a_write():
    row = envelopes().waiting_event(delivery(attempt=1, position=7))
    assert envelopes(6).from_waiting(row).attempt == 1  # it came behind what was taken over
    assert envelopes(7).from_waiting(row).attempt == 2
    assert envelopes(6, 7, 8, 8).from_waiting(row).attempt == 4


def test_attempts_are_not_inherited_twice_where_a_row_is_written_again():
    successor = envelopes(7, 8)
    again = successor.from_waiting(envelopes().waiting_event(delivery(attempt=1, position=7)))
    assert again.attempt == 3
    again.attempt += 1
    assert successor.waiting_event(again).envelope.attempt == 2
    assert successor.from_waiting(successor.waiting_event(again)).attempt == 4


def test_handlers_whose_children_are_not_finished_are_among_those_that_are_to_run():
    one = delivery()
    one.children = Children()
    one.children.add("published")
    one.todo = {"failed": 2}
    assert envelopes().waiting_event(one).todo == {"published": 0, "failed": 2}
    one.todo = {"published": 1}
    assert envelopes().waiting_event(one).todo == {"published": 1}
    one.todo = None  # all of them are to run, anyway
    assert envelopes().waiting_event(one).todo == {}


def test_a_dead_letter_that_parked_its_lane_comes_back_to_its_place():
    event = envelopes(4, 7).revived(dead(position=7), 99)
    assert (event.position, event.todo) == (7, {"a": 0, "b": 0})
    assert envelopes(4, 7).from_waiting(event).attempt == 3


def test_any_other_dead_letter_comes_back_at_a_new_position():
    event = envelopes(4, 7).revived(dead(position=0), 99)
    assert (event.position, event.envelope.attempt) == (99, 3)


def test_when_a_redriven_event_died_first_is_not_forgotten_however_often_it_waits():
    event = envelopes().revived(dead(position=0), 99)
    again = envelopes().waiting_event(envelopes().from_waiting(event))
    assert envelopes().from_waiting(again).first_ns == event.first_ns == 1


def test_an_event_that_is_due_later_is_scheduled_and_nothing_else_is():
    later = delivery(extra=Extra(0, {"h": "v"}, 0, False, due_ns=WALL_NS + 1))
    event = scheduled_event(later, WALL_NS)
    assert event is not None
    assert (event.due_ns, event.envelope) == (WALL_NS + 1, envelope_of(later))
    assert scheduled_event(later, WALL_NS + 1) is None
    assert scheduled_event(delivery(), WALL_NS) is None
    assert scheduled_event(delivery(extra=Extra(0, {}, 1, False, due_ns=WALL_NS + 1)), WALL_NS) is None  # a command


def test_a_scheduled_event_that_may_have_begun_is_at_its_next_attempt():
    found = StoredScheduled(row=8, event=ScheduledEvent(envelope=envelope_of(delivery()), due_ns=1))
    fresh = envelopes(7).from_scheduled(found, is_repeat=False)
    repeat = envelopes(7).from_scheduled(found, is_repeat=True)
    assert (fresh.attempt, fresh.scheduled, fresh.position) == (1, 8, 0)
    assert (repeat.attempt, repeat.scheduled) == (2, 8)
