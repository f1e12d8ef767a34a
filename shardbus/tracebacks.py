"""Tracebacks of errors that an application has raised, whatever its classes do when they are looked at.

`traceback` and `logging` ask an error for its notes and causes. A class whose `__getattr__` raises something else than
AttributeError ends whoever tells of it, so that the failure of one handler would be that of all.
"""

from __future__ import annotations

import logging
import traceback

from shardbus.errors import text_of


def traceback_of(error: BaseException) -> str:
    """An error's traceback with its causes; where they cannot be told, its own stack, type and text."""
    try:
        return "".join(traceback.format_exception(error)).rstrip()
    except Exception as odd:
        stack = traceback.format_tb(vars(BaseException)["__traceback__"].__get__(error))
        told = f"{type(error).__name__}: {text_of(error)} <more of it cannot be told: {type(odd).__name__}>"
        return "".join(["Traceback (most recent call last):\n", *stack, told])


def log_error(log: logging.Logger, error: BaseException, message: str, *args: object) -> None:
    """Log an error with its traceback: as `exc_info`, or in the text where a formatter would raise."""
    try:
        traceback.format_exception(error)
    except Exception:
        with_traceback = f"{message}\n%s"
        log.error(with_traceback, *args, traceback_of(error))
    else:
        log.error(message, *args, exc_info=error)
