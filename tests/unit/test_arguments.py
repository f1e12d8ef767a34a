"""Plain values that a program hands over: what is none is told with its name, what it was, and what to give."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shardbus.arguments import check_count, check_headers, check_seconds, told_number
from shardbus.errors import ConfigError, UsageError


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "5", None, True, 10_000_001])
def test_what_is_no_time_is_told_with_its_name_and_value(value: Any):
    with pytest.raises(UsageError) as raised:
        check_seconds("timeout", value)
    assert str(raised.value) == f"timeout={value!r}: give seconds above 0, up to 10,000,000"


def test_a_time_may_begin_at_nothing_where_that_is_said():
    check_seconds("timeout", 0, zero=True)
    check_seconds("timeout", 0.5)
    with pytest.raises(UsageError, match=r"timeout=-0\.5: give seconds from 0 on, up to 10,000,000"):
        check_seconds("timeout", -0.5, zero=True)


@pytest.mark.parametrize("value", [0, 9, 2.0, "2", None, True, math.nan])
def test_what_is_no_count_is_told_with_its_bounds(value: Any):
    with pytest.raises(ConfigError) as raised:
        check_count("shards", value, 1, 8, error=ConfigError)
    assert str(raised.value) == f"shards={value!r}: take 1 to 8"


def test_a_count_may_have_no_upper_bound():
    check_count("limit", 10**12, 1)
    with pytest.raises(UsageError, match=r"limit=0: take 1 or more"):
        check_count("limit", 0, 1)


@pytest.mark.parametrize("value", [["a"], "a", 3, {("a", "b")}])
def test_what_are_no_headers_is_told_with_an_example(value: Any):
    with pytest.raises(UsageError, match=r'headers=.*: give a dict of text, for instance headers={"tenant": "acme"}'):
        check_headers(value, 26)


def test_a_number_is_told_as_it_is_written_and_anything_else_as_it_is():
    assert [told_number(one) for one in (30.0, 0.25, "x", None)] == ["30", "0.25", "'x'", "None"]
