"""Tracebacks are told of whatever an application raises."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from odd_errors import ODD_ERRORS

from shardbus.errors import text_of
from shardbus.tracebacks import TRACEBACK_CHARS_MAX, log_error, traceback_of


def _raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_traceback_is_the_interpreters():
    error = _raised(ValueError("no"))
    error.__cause__ = KeyError("a")
    told = traceback_of(error)
    assert told.startswith("KeyError: 'a'\n\nThe above exception was the direct cause")
    assert told.endswith("ValueError: no")


@pytest.mark.parametrize("make", ODD_ERRORS.values(), ids=ODD_ERRORS)
def test_where_an_error_was_raised_is_told_whatever_it_does_when_it_is_looked_at(make: Callable[[], Exception]):
    error = _raised(make())
    told = traceback_of(error)
    assert told.startswith("Traceback (most recent call last):\n")
    assert "in _raised" in told
    assert f"{type(error).__name__}: {text_of(error)}".removesuffix(": ") in told
    assert type(text_of(error)) is str


def test_a_long_text_does_not_fill_a_log(caplog: pytest.LogCaptureFixture):
    error = _raised(ValueError("x" * 1_000_000))
    log_error(logging.getLogger("tests"), error, "failed")
    for told in (traceback_of(error), caplog.text):
        assert len(told) < TRACEBACK_CHARS_MAX + 200
        assert "in _raised" in told


@pytest.mark.parametrize("make", [ValueError, *ODD_ERRORS.values()], ids=["plain", *ODD_ERRORS])
def test_it_is_logged_with_its_traceback(make: Callable[[], Exception], caplog: pytest.LogCaptureFixture):
    error = _raised(make())
    log_error(logging.getLogger("tests"), error, "the end of %r failed", "7")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("the end of '7' failed")
    assert "in _raised" in caplog.text
    assert type(error).__name__ in caplog.text
    if make is ValueError:
        assert record.getMessage() == "the end of '7' failed"
        assert record.exc_info is not None  # for whoever collects errors
