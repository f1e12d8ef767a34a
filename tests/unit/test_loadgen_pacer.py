"""The pacer: what is due when, and that its schedule never slips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.pacer import ConstantRate, Due

START = 1_000_000_000_000
SECOND = 1_000_000_000

ROWS = [
    # caption, rate, sent, elapsed ns → due, wait ns
    ("the first event is due at the start", 1000, 0, 0, 1, 0),
    ("before the start nothing is", 1000, 0, -5, 0, 5),
    ("the next one is due after its interval", 1000, 1, 0, 0, 1_000_000),
    ("one nanosecond too early is too early", 1000, 1, 999_999, 0, 1),
    ("at its instant an event is due", 1000, 1, 1_000_000, 1, 0),
    ("all that came due while the sender slept is due at once", 1000, 1, 5_000_000, 5, 0),
    ("a sender that is an hour behind still owes every event", 20_000, 0, 3600 * SECOND, 72_000_001, 0),
    ("what was sent is not due again", 20_000, 20_001, SECOND, 0, 50_000),
    ("slower than one a second", 0.5, 1, SECOND, 0, SECOND),
    ("as slow as can be", 0.001, 1, 0, 0, 1000 * SECOND),
    ("an interval that is no whole number of nanoseconds", 3, 1, 333_333_333, 1, 0),
    ("faster than one a nanosecond tick", 300_000, 0, 100_000, 31, 0),
]


@pytest.mark.parametrize(
    ("rate", "sent", "elapsed_ns", "count", "wait_ns"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_what_is_due(rate: float, sent: int, elapsed_ns: int, count: int, wait_ns: int) -> None:
    pacer = ConstantRate.of(START, rate)
    assert pacer.due(sent, START + elapsed_ns) == Due(count, wait_ns)


def test_a_second_holds_exactly_its_rate() -> None:
    pacer = ConstantRate.of(START, 20_000)
    assert pacer.scheduled(10 * SECOND - 1) == 200_000


def test_no_error_adds_up_over_a_million_seconds() -> None:
    pacer = ConstantRate.of(START, 33_333.333)
    assert pacer.intended_ns(33_333_333_000, 1) == [START + 1_000_000 * SECOND]


def test_a_rate_below_the_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 0\.001"):
        ConstantRate.of(START, 0.0004)


RATES = st.integers(min_value=1, max_value=10_000_000_000).map(
    lambda milli: ConstantRate(start_ns=START, rate_milli=milli)
)


@given(RATES, st.integers(0, 10**12))
def test_an_event_is_due_at_its_intended_instant_and_not_before(pacer: ConstantRate, number: int) -> None:
    (instant,) = pacer.intended_ns(number, 1)
    # Several events share a nanosecond where more than one come in it.
    assert pacer.scheduled(instant - START) > number
    assert pacer.scheduled(instant - START - 1) <= number


@given(RATES, st.integers(0, 10**9), st.integers(0, 10**15))
def test_waiting_as_told_makes_something_due(pacer: ConstantRate, sent: int, elapsed_ns: int) -> None:
    due = pacer.due(sent, START + elapsed_ns)
    assert (due.count == 0) == (due.wait_ns > 0)
    if due.wait_ns:
        assert pacer.due(sent, START + elapsed_ns + due.wait_ns).count >= 1
        assert pacer.due(sent, START + elapsed_ns + due.wait_ns - 1).count == 0


@given(RATES, st.lists(st.integers(0, 10**7), max_size=30))
def test_however_late_the_sender_wakes_up_each_event_keeps_its_instant(pacer: ConstantRate, naps_ns: list[int]) -> None:
    now_ns, sent, instants = START, 0, []
    for nap_ns in naps_ns:
        now_ns += nap_ns
        count = min(pacer.due(sent, now_ns).count, 1000)
        instants += pacer.intended_ns(sent, count)
        sent += count
    assert instants == pacer.intended_ns(0, sent)
    assert all(instant <= now_ns for instant in instants)
