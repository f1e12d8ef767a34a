"""Tracebacks are told of whatever an application raises."""

from __future__ import annotations

import logging

import pytest
from odd_errors import Hopeless, Odd

from shardbus.tracebacks import log_error, traceback_of


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


@pytest.mark.parametrize("error", [Odd({}), Hopeless("hopeless")], ids=["odd", "hopeless"])
def test_where_an_error_was_raised_is_told_though_its_attributes_raise(error: Exception):
    told = traceback_of(_raised(error))
    assert told.startswith("Traceback (most recent call last):\n")
    assert "in _raised" in told
    assert f"{type(error).__name__}: {error}" in told


@pytest.mark.parametrize("error", [ValueError("no"), Odd({}), Hopeless("hopeless")], ids=["plain", "odd", "hopeless"])
def test_it_is_logged_with_its_traceback(error: Exception, caplog: pytest.LogCaptureFixture):
    log_error(logging.getLogger("tests"), _raised(error), "the end of %r failed", "7")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("the end of '7' failed")
    assert (record.exc_info is not None) == isinstance(error, ValueError)
    assert "in _raised" in caplog.text
    assert f"{type(error).__name__}: {error}" in caplog.text
