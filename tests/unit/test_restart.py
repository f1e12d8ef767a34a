"""Whether and when a dead worker is started again: a table of captioned rows."""

from __future__ import annotations

import pytest

from shardbus.restart import GiveUp, RestartIn, RestartPolicy

DEFAULT = RestartPolicy()
PATIENT = RestartPolicy(deaths_max=100, delay_s=0.5, delay_s_max=3.0)
ONCE = RestartPolicy(deaths_max=1)
NEVER = RestartPolicy(deaths_max=0)

ROWS = {
    "a worker that was killed at work is back at once": (DEFAULT, 0, RestartIn(0.0)),
    "the first death without progress waits a little": (DEFAULT, 1, RestartIn(0.1)),
    "the second twice as long": (DEFAULT, 2, RestartIn(0.2)),
    "the third twice as long again": (DEFAULT, 3, RestartIn(0.4)),
    "the last that is allowed": (DEFAULT, 4, RestartIn(0.8)),
    "the fifth is the end": (DEFAULT, 5, GiveUp(5)),
    "what comes later stays the end": (DEFAULT, 6, GiveUp(6)),
    "a longer first wait": (PATIENT, 1, RestartIn(0.5)),
    "the last wait below the longest": (PATIENT, 3, RestartIn(2.0)),
    "no wait is longer than the longest": (PATIENT, 4, RestartIn(3.0)),
    "however many deaths": (PATIENT, 99, RestartIn(3.0)),
    "until there were too many": (PATIENT, 100, GiveUp(100)),
    "one try only": (ONCE, 1, GiveUp(1)),
    "one try only, but progress is rewarded": (ONCE, 0, RestartIn(0.0)),
    "no try at all": (NEVER, 0, GiveUp(0)),
}


@pytest.mark.parametrize(("policy", "fruitless_deaths", "decision"), ROWS.values(), ids=ROWS)
def test_after_a_death(policy: RestartPolicy, fruitless_deaths: int, decision: RestartIn | GiveUp):
    assert policy.decide(fruitless_deaths) == decision


@pytest.mark.parametrize(
    ("unexplained_deaths", "delay_s"), [(0, 0.0), (4, 0.0), (5, 0.1), (6, 0.2), (8, 0.8), (11, 5.0), (10_000, 5.0)]
)
def test_crashes_of_nobodys_doing_are_waited_after_once_they_are_no_chance_and_never_given_up(
    unexplained_deaths: int, delay_s: float
):
    assert DEFAULT.is_to_be_told(unexplained_deaths) == (unexplained_deaths in (5, 10_000))
    assert DEFAULT.decide(0, unexplained_deaths) == RestartIn(delay_s)


def test_a_wait_is_finite_however_large_the_number_of_deaths():
    policy = RestartPolicy(deaths_max=10**9)
    assert policy.decide(10_000) == RestartIn(policy.delay_s_max)
