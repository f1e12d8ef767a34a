"""Which log lines are told, and how many were not."""

from __future__ import annotations

from itertools import count

import pytest

from shardbus.log_throttle import LogThrottle, and_more

S = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ns = S

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_first_of_a_kind_is_told_and_the_next_a_minute_later_with_how_many_there_were(clock: Clock):
    throttle = LogThrottle(clock)
    assert [throttle.more_of("a") for _ in range(3)] == [0, None, None]
    clock.now_ns += 60 * S - 1
    assert throttle.more_of("a") is None
    clock.now_ns += 1
    assert throttle.more_of("a") == 3
    assert throttle.more_of("a") is None


def test_kinds_do_not_hold_up_each_other(clock: Clock):
    throttle = LogThrottle(clock)
    assert [throttle.more_of(kind) for kind in ("a", ("a",), ("a", "b"), "a")] == [0, 0, 0, None]


def test_of_more_kinds_than_are_remembered_all_are_told_anew(clock: Clock):
    throttle = LogThrottle(clock)
    assert throttle.more_of("first") == 0
    told = next(made for made in count(1) if throttle.more_of(made) == 0 and throttle.more_of("first") == 0)
    assert told == 1024


def test_a_line_says_how_many_more_there_were():
    assert and_more(0) == ""
    assert and_more(1234) == " (and 1,234 more of the kind since the last such line)"
