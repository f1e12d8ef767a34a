"""What is built before a bus runs, of values that make no sense: told where it is written, with the value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from shardbus import Breaker, Idempotency, Logging, RateLimit, RegistrationError, Retry

MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (lambda: Retry(attempts=0), "Retry(attempts=0): a handler is called at least once; give a whole number from 1 on"),
    (lambda: Retry(attempts=2.5), "Retry(attempts=2.5): a handler is called at least once"),  # type: ignore[arg-type]
    (lambda: Retry(attempts="3"), "Retry(attempts='3'): a handler is called at least once"),  # type: ignore[arg-type]
    (lambda: Retry(base_s=-1), "Retry(base_s=-1, factor=2, cap_s=30): needs numbers, 0 ≤ base_s ≤ cap_s and factor ≥ 1"),
    (lambda: Retry(base_s="1"), "Retry(base_s='1', factor=2, cap_s=30): needs numbers"),  # type: ignore[arg-type]
    (lambda: Retry(cap_s=math.nan), "Retry(base_s=0.1, factor=2, cap_s=nan): needs numbers"),
    (lambda: Retry(base_s=40), "Retry(base_s=40, factor=2, cap_s=30): needs numbers, 0 ≤ base_s ≤ cap_s"),
    (lambda: Retry(factor=0.5), "Retry(base_s=0.1, factor=0.5, cap_s=30): needs numbers"),
    (lambda: Retry(on="ValueError"), "Retry(on='ValueError'): name exception classes"),  # type: ignore[arg-type]
    (lambda: Breaker(failures=0), "Breaker(failures=0, window_s=30, open_s=10, successes=2): counts start at 1"),
    (lambda: Breaker(failures="5"), "Breaker(failures='5', window_s=30, open_s=10, successes=2)"),  # type: ignore[arg-type]
    (lambda: Breaker(window_s=math.nan), "Breaker(failures=5, window_s=nan, open_s=10, successes=2): "),
    (lambda: Breaker(open_s=math.inf), "Breaker(failures=5, window_s=30, open_s=inf, successes=2): "),
    (lambda: Breaker(while_open="drop"), "Breaker(while_open='drop'): it is 'wait' or 'dead'"),  # type: ignore[arg-type]
    (RateLimit, "RateLimit() needs a rate: RateLimit(100), or RateLimit(per_key=5, per_s=60)"),
    (lambda: RateLimit("100"), "RateLimit(…, '100'): rates and periods are numbers above 0"),  # type: ignore[arg-type]
    (lambda: RateLimit(100, per_s=0), "RateLimit(…, 0): rates and periods are numbers above 0"),
    (lambda: RateLimit(True), "RateLimit(…, True): rates and periods are numbers above 0"),
    (lambda: RateLimit(100, burst=0), "RateLimit(burst=0, keys_max=100000): both start at 1"),
    (lambda: RateLimit(100, burst="5"), "RateLimit(burst='5', keys_max=100000): both"),  # type: ignore[arg-type]
    (lambda: RateLimit(per_key=5, keys_max=0), "RateLimit(burst=None, keys_max=0): both start at 1"),
    (lambda: Idempotency("id"), "Idempotency('id'): give a function of the message"),  # type: ignore[arg-type]
    (lambda: Idempotency(repr, window_s=0), "Idempotency(window_s=0, entries_max=100000): a window is above 0 seconds"),
    (lambda: Idempotency(repr, window_s="1h"), "Idempotency(window_s='1h', "),  # type: ignore[arg-type]
    (lambda: Idempotency(repr, entries_max=0), "Idempotency(window_s=3600, entries_max=0): "),
    (lambda: Logging(level="info"), "Logging(level='info'): give a level's number"),  # type: ignore[arg-type]
    (lambda: Logging("shop"), "Logging('shop'): give a logger, for instance logging"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "told"), MISTAKES, ids=[told[:40] for _, told in MISTAKES])
def test_an_option_that_makes_no_sense_is_told_with_its_value(make: Callable[[], Any], told: str):
    with pytest.raises(RegistrationError) as raised:
        make()
    assert str(raised.value).startswith(told)
