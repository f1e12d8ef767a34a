"""Tracebacks of errors that an application has raised, whatever its classes do when they are looked at.

`traceback` and `logging` ask an error for its notes and causes. A class whose `__getattr__` raises something else than
AttributeError ends whoever tells of it, so that the failure of one handler would be that of all. Nor may a long text fill a
log.
"""

from __future__ import annotations

import logging
import traceback
from types import TracebackType
from typing import Any, Final

from shardbus.errors import text_of

TRACEBACK_CHARS_MAX: Final = 32_000
_TRACEBACK: Final[Any] = vars(BaseException)["__traceback__"]


def stack_of(error: BaseException) -> TracebackType | None:
    """Where an error was raised, whatever its class says when it is asked for one of its attributes."""
    found: TracebackType | None = _TRACEBACK.__get__(error)
    return found


def steps_of(error: BaseException) -> traceback.StackSummary:
    """The steps to where an error was raised, with their lines of source where these can be read.

    A module may have a loader of its own. That is asked for them, and may raise.
    """
    stack = stack_of(error)
    try:
        return traceback.extract_tb(stack)
    except BaseException:
        codes = [(frame.f_code, line) for frame, line in traceback.walk_tb(stack)]
        return traceback.StackSummary.from_list([(code.co_filename, line, code.co_name, "") for code, line in codes])


def shortened(text: str, chars_max: int) -> str:
    """A text of which the middle is left out, where it is longer than that."""
    half = chars_max // 2
    left_out = len(text) - 2 * half
    return text if len(text) <= chars_max else f"{text[:half]}\n… {left_out:,} characters …\n{text[-half:]}"


def traceback_of(error: BaseException) -> str:
    """An error's traceback with its causes; where they cannot be told, its own stack, type and text. Bounded."""
    return shortened(_told(error)[0], TRACEBACK_CHARS_MAX)


def _told(error: BaseException) -> tuple[str, bool]:
    """As much of an error's traceback as can be told, and whether that is what the interpreter tells."""
    try:
        return "".join(traceback.format_exception(error)).rstrip(), True
    except BaseException as odd:  # SystemExit, too: the error was only looked at
        stack = steps_of(error).format()
        told = f"{type(error).__name__}: {text_of(error)} <more of it cannot be told: {type(odd).__name__}>"
        return "".join(["Traceback (most recent call last):\n", *stack, told]), False


def log_error(log: logging.Logger, error: BaseException, message: str, *args: object) -> None:
    """Log an error with its traceback: as `exc_info`, or in the text where a formatter would raise, or fill the log."""
    told, is_whole = _told(error)
    if is_whole and len(told) <= TRACEBACK_CHARS_MAX:
        log.error(message, *args, exc_info=(type(error), error, stack_of(error)))  # an error alone might be a false value
    else:
        with_traceback = f"{message}\n%s"
        log.error(with_traceback, *args, shortened(told, TRACEBACK_CHARS_MAX))
