"""Whether a handler that failed is called again: a table of captioned rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbus.errors import RegistrationError
from shardbus.retry import GiveUp, Retry, RetryIn

DEFAULT = Retry()
PATIENT = Retry(attempts=1000, base_s=0.5, factor=3.0, cap_s=20.0)
PICKY = Retry(on=(ConnectionError, TimeoutError))

ROWS = {
    "the first failure waits up to the base": (DEFAULT, 1, ValueError(), 1.0, RetryIn(0.1)),
    "the second up to twice as long": (DEFAULT, 2, ValueError(), 1.0, RetryIn(0.2)),
    "the jitter is full: down to nothing": (DEFAULT, 2, ValueError(), 0.0, RetryIn(0.0)),
    "and evenly in between": (DEFAULT, 2, ValueError(), 0.25, RetryIn(0.05)),
    "the third failure is the last": (DEFAULT, 3, ValueError(), 0.5, GiveUp("failed 3 times")),
    "what comes later stays the end": (DEFAULT, 9, ValueError(), 0.5, GiveUp("failed 9 times")),
    "one attempt is no retry": (Retry(attempts=1), 1, ValueError(), 0.5, GiveUp("failed 1 times")),
    "another factor": (PATIENT, 3, ValueError(), 1.0, RetryIn(4.5)),
    "the cap": (PATIENT, 5, ValueError(), 1.0, RetryIn(20.0)),
    "a number of failures that would overflow": (PATIENT, 900, ValueError(), 1.0, RetryIn(20.0)),
    "an error that is named": (PICKY, 1, ConnectionResetError(), 1.0, RetryIn(0.1)),
    "an error that is not": (PICKY, 1, ValueError(), 1.0, GiveUp("ValueError is not retried")),
    "what is no Exception is not retried by default": (DEFAULT, 1, SystemExit(), 1.0, GiveUp("SystemExit is not retried")),
}


@pytest.mark.parametrize(("policy", "failures", "error", "chance", "expected"), ROWS.values(), ids=ROWS)
def test_a_failure_is_judged_by_the_policy(
    policy: Retry, failures: int, error: BaseException, chance: float, expected: RetryIn | GiveUp
):
    decided = policy.decide(failures, error, chance)
    assert type(decided) is type(expected)
    if isinstance(decided, RetryIn):
        assert decided.delay_s == pytest.approx(expected.delay_s)
    else:
        assert decided == expected


@given(st.integers(1, 10**9), st.floats(0, 1), st.floats(0, 10), st.floats(1, 10), st.floats(10, 3600))
def test_no_wait_is_ever_negative_or_above_the_cap(failures: int, chance: float, base: float, factor: float, cap: float):
    policy = Retry(attempts=10**9 + 1, base_s=base, factor=factor, cap_s=cap)
    decided = policy.decide(failures, ValueError(), chance)
    assert isinstance(decided, RetryIn)
    assert 0 <= decided.delay_s <= cap


def test_a_single_exception_class_may_stand_alone():
    assert Retry(on=KeyError).decide(1, KeyError(), 1.0) == RetryIn(0.1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"attempts": 0}, "at least once"),
        ({"base_s": -1.0}, "base_s"),
        ({"base_s": float("nan")}, "base_s"),
        ({"factor": 0.5}, "factor"),
        ({"cap_s": 0.01}, "cap_s"),
        ({"on": (3,)}, "exception classes"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(options: dict, told: str):
    with pytest.raises(RegistrationError, match=told):
        Retry(**options)
