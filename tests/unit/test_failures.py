"""What is told of a message that failed: where its handler raised, which handlers a redrive runs, and what parks a key."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import msgspec
import pytest
from odd_errors import Hopeless, Odd

from shardbus import Bus, Event
from shardbus.failures import (
    Failures,
    HandlerTimeout,
    crashed,
    expired,
    failed_reply,
    parks_its_key,
    together,
    undecodable,
    unknown_type,
)
from shardbus.inbound import UNKNOWN, Delivery
from shardbus.registry import Plan
from shardbus.store import Failure


class Step(Event, key="key"):
    key: str


def from_file(handler: Callable[[str], None], name: str) -> Callable[[str], None]:
    """A handler as if it were in another file."""
    return FunctionType(handler.__code__.replace(co_filename=name), globals())


def _one(text: str) -> None:
    raise ValueError(text)


def _other(text: str) -> None:
    raise ValueError(text)


def _caused(text: str) -> None:
    try:
        raise KeyError(text)
    except KeyError as error:
        raise ValueError(text) from error


one, other, caused = (from_file(handler, "app.py") for handler in (_one, _other, _caused))


@pytest.fixture
def failures() -> Failures:
    """Where this file is what stands between the loop and a handler."""
    return Failures((__file__,))


def raised(handler: Callable[[str], None], text: str = "no") -> Exception:
    try:
        handler(text)
    except Exception as error:
        return error
    raise AssertionError("it has not raised")


def gave_up(*names: str, reason: str = "failed") -> Failure:
    return Failure(handlers=names, reason=reason, error_type="E", error="")


def first(event: Step) -> None:
    """A handler."""


def second(event: Step) -> None:
    """Another one."""


def plan(*, parks: bool = False) -> Plan:
    bus = Bus("failures")
    bus.on(Step, on_dead_letter="park" if parks else "continue")(first)
    bus.on(Step)(second)
    return bus.plans()["Step"]


def delivery(of: Plan, todo: dict[str, int] | None = None, *given_up: Failure) -> Delivery:
    found = Delivery(None, b"p" * 16, 0, "Step", of, "k", b"", 0, 0, 1)
    found.todo, found.gave_up = todo, given_up
    return found


def test_what_several_handlers_raised_is_told_of_each():
    one = Failure(handlers=("a.one",), reason="failed", error_type="ValueError", error="first", place="p", traceback="t")
    two = Failure(handlers=("a.two",), reason="timeout", error_type="TimeoutError", error="late")
    open_ = Failure(handlers=("a.three",), reason="circuit-open", error_type="", error="the circuit is open")
    assert together((one,)) is one
    told = together((one, two, open_))
    assert told.handlers == ("a.one", "a.two", "a.three")
    assert (told.reason, told.error_type, told.traceback) == ("failed", "ValueError", "t")
    assert told.error == "first; a.two: TimeoutError: late; a.three: the circuit is open"


def test_a_long_error_leaves_room_for_those_of_other_handlers():
    long = Failure(handlers=("a",), reason="failed", error_type="E", error="x" * 3000)
    short = Failure(handlers=("b",), reason="failed", error_type="E", error="k")
    for gave_up in ((long, short), (short, long)):
        told = together(gave_up).error
        assert "x" * 900 in told
        assert "k" in told
        assert len(told) <= 2000


def test_of_more_handlers_than_there_is_room_for_some_are_told_of_and_how_many_more():
    told = together([Failure(handlers=(f"h{n}",), reason="failed", error_type="E", error="x" * 500) for n in range(40)])
    assert len(told.handlers) == 40
    assert "h15: E: xxx" in told.error
    assert told.error.endswith("; and 24 more")
    assert len(told.error) <= 2000


# -- places


def test_errors_of_one_line_have_one_place_whatever_their_texts(failures: Failures):
    first, second = (failures.of_handler("h", raised(one, text), "failed") for text in ("a", "b"))
    assert (first.place, first.traceback) == (second.place, second.traceback)
    assert [first.error, second.error] == ["a", "b"]
    assert failures.of_handler("h", raised(other), "failed").place != first.place


def test_the_cause_of_an_error_is_part_of_its_place(failures: Failures):
    error = raised(one)
    alone = failures.of_handler("h", error, "failed")
    error.__cause__ = raised(other)
    assert failures.of_handler("h", error, "failed").place != alone.place


def test_what_led_to_an_error_is_told_with_each_and_shared_by_none(failures: Failures):
    """A traceback is stored once for its place, so no text of an error may stand in it."""
    alice, bob = (failures.of_handler("h", raised(caused, name), "failed") for name in ("alice", "bob"))
    assert (alice.place, alice.traceback) == (bob.place, bob.traceback)
    assert bob.error == "bob; caused by KeyError: 'bob'"
    assert "alice" not in bob.traceback
    assert bob.traceback.index("KeyError") < bob.traceback.index("direct cause") < bob.traceback.rindex("ValueError")


def test_what_was_being_handled_is_told_unless_it_was_suppressed(failures: Failures):
    error = raised(one, "outer")
    error.__context__ = raised(other, "inner")
    told = failures.of_handler("h", error, "failed")
    assert told.error == "outer; while handling ValueError: inner"
    assert "During handling" in told.traceback
    error.__suppress_context__ = True
    told = failures.of_handler("h", error, "failed")
    assert (told.error, told.traceback.count("ValueError")) == ("outer", 1)  # its type


def test_what_is_in_a_group_is_told(failures: Failures):
    inner = raised(caused, "away")
    told = failures.of_handler("h", ExceptionGroup("of two", [inner, raised(other, "late")]), "failed")
    assert told.error == (
        "of two (2 sub-exceptions); in it ValueError: away; caused by KeyError: 'away'; "
        "in the group 'of two' ValueError: late"
    )
    assert told.traceback.endswith("\n\nThe above exception is in the group below:\n\nExceptionGroup")
    assert told.traceback.count("in the group below") == 2


def test_in_which_of_two_groups_it_is_is_told(failures: Failures):
    inner = ExceptionGroup("inner", [raised(one, "x"), raised(one, "y")])
    told = failures.of_handler("h", ExceptionGroup("outer", [inner, raised(caused, "z")]), "failed")
    assert told.error == (
        "outer (2 sub-exceptions); in it ExceptionGroup: inner (2 sub-exceptions); in it ValueError: x; "
        "in it ValueError: y; in the group 'outer' ValueError: z; caused by KeyError: 'z'"
    )


def test_the_cause_of_a_group_is_not_taken_for_that_of_its_members(failures: Failures):
    group = ExceptionGroup("of two", [raised(one, "away"), raised(other, "late")])
    group.__cause__ = raised(caused, "first")
    told = failures.of_handler("h", group, "failed")
    assert told.error == (
        "of two (2 sub-exceptions); caused by ValueError: first; caused by KeyError: 'first'; "
        "in the group 'of two' ValueError: away; in it ValueError: late"
    )
    assert told.traceback.endswith("direct cause of the following exception:\n\nExceptionGroup")


def _raise_odd(_: str) -> None:
    raise Odd({})


@pytest.mark.parametrize("kind", [Odd, Hopeless])
def test_an_error_whose_attributes_raise_is_an_outcome_and_a_reply_like_any_other(
    failures: Failures, kind: type[Odd] | type[Hopeless]
):
    error = kind({})
    told = failures.of_handler("h", error, "failed")
    assert (told.handlers, told.error_type) == (("h",), kind.__name__)
    assert told.error.startswith(str(error))
    name, text, stack = msgspec.msgpack.decode(failures.reply_to(error))
    assert (name, text) == (kind.__name__, str(error))
    assert stack.startswith(f"{kind.__name__}: {error}")
    assert ("cannot be told: KeyError" in stack) == (kind is Hopeless)


def test_where_it_was_raised_is_told_of_an_error_whose_attributes_raise(failures: Failures):
    told = failures.of_handler("h", raised(from_file(_raise_odd, "app.py")), "failed")
    assert "in _raise_odd" in told.traceback


def test_the_caller_of_a_command_is_told_all_that_a_dead_letter_says_where_a_cause_is_odd(failures: Failures):
    error = raised(from_file(_raise_odd, "app.py"))
    outer = raised(one, "outer")
    outer.__cause__ = error
    _, text, stack = msgspec.msgpack.decode(failures.reply_to(outer))
    assert text == "outer"
    assert "in _raise_odd" in stack
    assert stack.endswith("ValueError: outer; caused by Odd: odd")


def test_notes_are_told(failures: Failures):
    error = raised(one, "no")
    error.add_note("tenant acme")
    told = failures.of_handler("h", error, "failed")
    assert told.error == "no; tenant acme"
    assert "acme" not in told.traceback
    error.__notes__ = 5
    assert failures.of_handler("h", error, "failed").error == "no"


def test_a_ring_of_causes_ends(failures: Failures):
    first, second = raised(one, "first"), raised(other, "second")
    first.__cause__, second.__cause__ = second, first
    assert failures.of_handler("h", first, "failed").error == "first; caused by ValueError: second"


def test_more_than_a_few_causes_are_not_told(failures: Failures):
    error = raised(one, "0")
    innermost: BaseException = error
    for at in range(1, 100):
        innermost.__cause__ = raised(other, str(at))
        innermost = innermost.__cause__
    told = failures.of_handler("h", error, "failed")
    assert told.error.count("caused by") == 15
    assert len(told.traceback) < 33_000


def test_a_traceback_begins_behind_our_frames_and_ends_with_the_type(failures: Failures):
    text = failures.of_handler("h", raised(one, "secret"), "failed").traceback
    head, first, *_, last = text.splitlines()
    assert head.startswith("Traceback")
    assert 'File "app.py"' in first
    assert last == "ValueError"
    assert __file__ not in text
    assert __file__ in Failures(()).of_handler("h", raised(one), "failed").traceback


def test_a_traceback_is_bounded_however_deep_and_a_text_however_long(failures: Failures):
    def deep(left: int, text: str) -> None:
        code = deep.__code__.replace(co_filename=f"{'x' * 500}{left}.py")
        deeper = FunctionType(code, globals(), closure=deep.__closure__)
        if left:
            deeper(left - 1, text)
        raise ValueError(text)

    told = failures.of_handler("h", raised(lambda text: deep(100, text), "x" * 1_000_000), "failed")
    assert len(told.error) == 2000
    assert len(told.traceback) < 33_000
    assert "characters …" in told.traceback
    assert told.traceback.startswith("Traceback")


def test_places_are_found_again_when_more_were_seen_than_are_remembered(failures: Failures):
    before = failures.of_handler("h", raised(one), "failed")
    for at in range(1100):
        failures.of_handler("h", raised(from_file(_one, f"app{at}.py")), "failed")
    assert len(failures._places) <= 1024
    assert failures.of_handler("h", raised(one), "failed") == before


# -- texts


def test_a_time_out_is_told_as_what_a_handler_could_have_raised(failures: Failures):
    assert failures.of_handler("h", HandlerTimeout("not finished"), "timeout").error_type == "TimeoutError"


def test_a_long_text_is_cut_and_one_that_cannot_be_encoded_is_mended(failures: Failures):
    assert len(failures.of_handler("h", ValueError("x" * 5000), "failed").error) == 2000
    assert undecodable(ValueError("half \ud800 of a pair")).error == r"half \ud800 of a pair"
    assert len(undecodable(ValueError("\ud800" * 5000)).error) == 2000


def test_a_reply_says_kind_text_and_traceback(failures: Failures):
    kind, told, stack = msgspec.msgpack.decode(failures.reply_to(raised(one, "half \ud800")))
    assert (kind, told) == ("ValueError", r"half \ud800")
    assert 'File "app.py"' in stack
    assert msgspec.msgpack.decode(failed_reply("KeyParked", "why")) == ["KeyParked", "why", ""]


def test_an_event_that_nobody_takes_is_told_by_its_type():
    assert "'Step'" in unknown_type(delivery(UNKNOWN)).error


# -- handlers


def test_what_crashed_is_redriven_for_whom_it_had_left_and_who_gave_it_up():
    steps = plan()
    early, late = (handler.name for handler in steps.handlers)
    assert crashed(delivery(steps), "SIGSEGV", 3).handlers == (early, late)
    assert crashed(delivery(steps, {late: 1}), "SIGSEGV", 3).handlers == (late,)
    assert crashed(delivery(steps, {late: 1}, gave_up(early)), "SIGSEGV", 3).handlers == (early, late)
    assert "SIGSEGV; 3 workers" in crashed(delivery(steps), "SIGSEGV", 3).error


def test_what_expired_is_redriven_for_all_unless_some_had_ended():
    steps = plan()
    early, late = (handler.name for handler in steps.handlers)
    assert expired(delivery(steps)).handlers == ()
    assert expired(delivery(steps, {late: 1}, gave_up(early))).handlers == (early, late)


def test_what_is_too_late_parks_its_key_only_where_a_handler_that_parks_had_given_it_up():
    steps = plan(parks=True)
    early, late = (handler.name for handler in steps.handlers)
    assert parks_its_key(delivery(steps), gave_up(early))
    assert not parks_its_key(delivery(steps), gave_up(late))
    event = delivery(steps, {early: 1})
    assert not parks_its_key(event, expired(event))
    event = delivery(steps, {late: 1}, gave_up(early))
    assert parks_its_key(event, expired(event))
