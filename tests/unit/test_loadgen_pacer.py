"""The pacer: what is due when, and that its schedule never slips."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.pacer import EVENT, Arrivals, Due, Evenly, Poisson, Profile, Recorded, Stage

START = 1_000_000_000_000
SECOND = 1_000_000_000


def steady(rate: float, seconds: float = 7200.0) -> Evenly:
    return Evenly(START, Profile([Stage(rate, seconds)]))


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
    ("what the schedule no longer holds is never due", 1000, 7_200_000, 9000 * SECOND, 0, 3600 * SECOND),
]


@pytest.mark.parametrize(
    ("rate", "sent", "elapsed_ns", "count", "wait_ns"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_what_is_due(rate: float, sent: int, elapsed_ns: int, count: int, wait_ns: int) -> None:
    assert steady(rate).due(sent, START + elapsed_ns) == Due(count, wait_ns)


def test_a_second_holds_exactly_its_rate() -> None:
    assert steady(20_000).scheduled(10 * SECOND - 1) == 200_000


def test_no_error_adds_up_over_a_million_seconds() -> None:
    assert steady(33_333.333, 2e6).intended_ns(33_333_333_000, 1) == [START + 1_000_000 * SECOND]


def test_a_rate_below_the_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 0\.001"):
        Profile([Stage(0.0004, 1.0)])


# -- stages and ramps


def test_stages_follow_each_other_and_hold_what_their_rates_say() -> None:
    arrivals = Evenly(START, Profile([Stage(5000, 10), Stage(20_000, 30), Stage(50_000, 10)]))
    edges = [arrivals.scheduled(seconds * SECOND - 1) for seconds in (10, 40, 50)]
    assert edges == [50_000, 650_000, 1_150_000]
    assert arrivals.intended_ns(49_999, 3) == [START + 9_999_800_000, START + 10 * SECOND, START + 10 * SECOND + 50_000]


@pytest.mark.parametrize(("rate", "to", "seconds"), [(1000, 9000, 10), (9000, 1000, 10), (0.001, 400, 3), (5, 7, 0.004)])
def test_a_ramp_holds_what_its_mean_rate_says_and_its_instants_follow_the_line(
    rate: float, to: float, seconds: float
) -> None:
    profile = Profile([Stage(rate, seconds, to)])
    assert profile.end / EVENT == pytest.approx((rate + to) / 2 * seconds, rel=1e-3, abs=1e-3)
    for tenth in range(11):
        at_s = seconds * tenth / 10
        count = rate * at_s + (to - rate) * at_s * at_s / (2 * seconds)
        step_s = max(0.01, seconds / 1000)
        off = abs(to - rate) / seconds * step_s * step_s  # within a step of the staircase the line is a chord
        assert profile.position(int(at_s * SECOND)) / EVENT == pytest.approx(count, rel=1e-6, abs=off + 1e-3)


PROFILES = st.lists(
    st.builds(
        Stage,
        st.floats(0.001, 1e6),
        st.floats(0.0001, 50.0),
        st.none() | st.floats(0.001, 1e6),
    ),
    min_size=1,
    max_size=4,
).map(Profile)


def evenly(profile: Profile, drivers: int) -> list[Evenly]:
    return [Evenly(START, profile, driver=driver, drivers=drivers) for driver in range(drivers)]


@given(PROFILES, st.floats(0, 1), st.integers(1, 4))
def test_an_event_is_due_at_its_intended_instant_and_not_before(profile: Profile, place: float, drivers: int) -> None:
    for arrivals in evenly(profile, drivers):
        total = arrivals.scheduled(profile.length_ns)
        if not total:
            continue
        number = int(place * (total - 1))
        (instant,) = arrivals.intended_ns(number, 1)
        # Several events share a nanosecond where more than one come in it.
        assert arrivals.scheduled(instant - START) > number
        assert arrivals.scheduled(instant - START - 1) <= number


@given(PROFILES, st.floats(0, 1), st.floats(0, 1))
def test_waiting_as_told_makes_something_due(profile: Profile, place: float, moment: float) -> None:
    arrivals = Evenly(START, profile)
    total = arrivals.scheduled(profile.length_ns)
    sent = int(place * total)
    now_ns = START + int(moment * profile.length_ns)
    due = arrivals.due(sent, now_ns)
    assert (due.count == 0) == (due.wait_ns > 0)
    if due.wait_ns and sent < total:
        assert arrivals.due(sent, now_ns + due.wait_ns).count >= 1
        assert arrivals.due(sent, now_ns + due.wait_ns - 1).count == 0


@given(PROFILES, st.integers(2, 5))
def test_drivers_that_share_a_schedule_send_what_one_would(profile: Profile, drivers: int) -> None:
    whole = Evenly(START, profile)
    parts = evenly(profile, drivers)
    assert sum(part.scheduled(profile.length_ns) for part in parts) == whole.scheduled(profile.length_ns)
    shared = [part.intended_ns(0, min(50, part.scheduled(profile.length_ns))) for part in parts]
    ours = [instant for turn in itertools.zip_longest(*shared) for instant in turn if instant is not None]
    assert ours == whole.intended_ns(0, len(ours))


@given(PROFILES, st.integers(0, 3), st.lists(st.integers(0, 10**8), max_size=30))
def test_however_late_the_sender_wakes_up_each_event_keeps_its_instant(
    profile: Profile, seed: int, naps_ns: list[int]
) -> None:
    makers = [lambda: Evenly(START, profile), lambda: Poisson(START, profile, random.Random(seed))]
    for make in makers:
        arrivals: Arrivals = make()
        now_ns, sent, instants = START, 0, []
        for nap_ns in naps_ns:
            now_ns += nap_ns
            count = min(arrivals.due(sent, now_ns).count, 1000)
            instants += arrivals.intended_ns(sent, count)
            sent += count
        assert all(instant <= now_ns for instant in instants)
        again = make()
        again.due(0, START)
        again.scheduled(now_ns - START)
        assert instants == again.intended_ns(0, sent)


# -- random arrivals


def gaps(arrivals: Poisson, count: int, until_ns: int) -> list[int]:
    arrivals.scheduled(until_ns)
    instants = arrivals.intended_ns(0, count)
    return [after - before for before, after in itertools.pairwise([START, *instants])]


def test_the_gaps_of_poisson_arrivals_are_exponential() -> None:
    # Fifty classes that are equally likely for an exponential gap: χ² has 49 degrees of freedom, mean 49, deviation 9.9.
    count, rate = 50_000, 1000.0
    found = gaps(Poisson(START, Profile([Stage(rate, 3600)]), random.Random(4)), count, 60 * SECOND)
    assert len(found) == count
    classes = [0] * 50
    for gap in found:
        classes[min(49, int(50 * (1 - math.exp(-gap * rate / SECOND))))] += 1
    assert sum((one - count / 50) ** 2 / (count / 50) for one in classes) < 49 + 3 * 9.9


def test_poisson_arrivals_in_equal_times_vary_as_they_should_and_are_no_clusters() -> None:
    arrivals = Poisson(START, Profile([Stage(1000, 3600)]), random.Random(5))
    edges = [arrivals.scheduled(millis * SECOND // 1000) for millis in range(0, 100_000, 20)]
    counts = [after - before for before, after in itertools.pairwise(edges)]
    mean = sum(counts) / len(counts)
    variance = sum((count - mean) ** 2 for count in counts) / len(counts)
    # Poisson: mean and variance are both 20; over 5,000 intervals their own deviations are 0.06 and 0.4.
    assert mean == pytest.approx(20, abs=0.2)
    assert variance == pytest.approx(20, abs=1.3)


def test_poisson_arrivals_follow_a_ramp() -> None:
    arrivals = Poisson(START, Profile([Stage(1000, 10, 9000)]), random.Random(6))
    halves = arrivals.scheduled(5 * SECOND), arrivals.scheduled(11 * SECOND)
    # 15,000 and 50,000 expected; deviations √15,000 = 122 and √50,000 = 224.
    assert halves[0] == pytest.approx(15_000, abs=3 * 122)
    assert halves[1] == pytest.approx(50_000, abs=3 * 224)


def test_several_poisson_drivers_have_the_whole_rate_together() -> None:
    profile = Profile([Stage(2000, 20)])
    parts = [Poisson(START, profile, random.Random(seed), drivers=4) for seed in range(4)]
    assert sum(part.scheduled(20 * SECOND) for part in parts) == pytest.approx(40_000, abs=3 * 200)


def test_the_same_seed_draws_the_same_arrivals_and_another_seed_others() -> None:
    def instants(seed: int) -> list[int]:
        return gaps(Poisson(START, Profile([Stage(500, 60)]), random.Random(seed)), 1000, 5 * SECOND)

    assert instants(1) == instants(1) != instants(2)


def test_random_arrivals_that_were_sent_are_forgotten() -> None:
    arrivals = Poisson(START, Profile([Stage(100_000, 60)]), random.Random(1))
    sent = 0
    for millis in range(2000):
        while count := arrivals.due(sent, START + millis * 1_000_000).count:
            sent += min(count, 256)
            assert len(arrivals._instants) < 4096
    assert sent == pytest.approx(200_000, rel=0.01)


# -- recorded arrivals


def test_recorded_arrivals_keep_their_instants() -> None:
    arrivals = Recorded(START, [0, 5, 5, 900])
    assert arrivals.due(0, START - 1) == Due(0, 1)
    assert arrivals.due(0, START + 5) == Due(3, 0)
    assert arrivals.due(3, START + 5) == Due(0, 895)
    assert arrivals.due(4, START + 900) == Due(0, 3600 * SECOND)
    assert arrivals.intended_ns(1, 9) == [START + 5, START + 5, START + 900]
    assert [arrivals.scheduled(elapsed) for elapsed in (-1, 0, 4, 5, 10**9)] == [0, 1, 1, 3, 4]
