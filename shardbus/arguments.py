"""Checks of the plain values that a program hands over: each error says the argument's name, the value, and what to give.

Pure. Time-outs, counts and headers of the public calls go through here, so that a text where a number belongs, a NaN (which
no comparison finds) or an infinity is told where it was written, and is neither a hang nor a `TypeError` of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from shardbus.errors import UsageError

SECONDS_MAX: Final = 10_000_000  # 115 days


def is_number(value: object) -> bool:
    """Whether it is an `int` or a `float`, and no `bool`; a NaN is one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Whether it is a whole number, and no `bool`."""
    return type(value) is int


def check_seconds(name: str, value: Any, *, zero: bool = False) -> None:
    """Refuse what is no number of seconds above 0 (`zero`: from 0 on), up to `SECONDS_MAX`. Raises `UsageError`."""
    if (value.__class__ is float or value.__class__ is int) and 0 < value <= SECONDS_MAX:
        return  # nearly always
    if not is_number(value) or not 0 <= value <= SECONDS_MAX or (value == 0 and not zero):
        raise UsageError(f"{name}={value!r}: give seconds {'from 0 on' if zero else 'above 0'}, up to {SECONDS_MAX:,}")


def check_count(
    name: str, value: Any, least: int, most: int | None = None, *, error: type[UsageError] = UsageError
) -> None:
    """Refuse what is no whole number in these bounds. Raises `error`."""
    if not is_count(value) or value < least or (most is not None and value > most):
        raise error(f"{name}={value!r}: take {f'{least:,} or more' if most is None else f'{least:,} to {most:,}'}")


def check_headers(headers: Any, most: int) -> None:
    """Refuse what is no table of headers, or one of more than `most`. Raises `UsageError`."""
    if not isinstance(headers, Mapping):
        raise UsageError(f'headers={headers!r:.100}: give a dict of text, for instance headers={{"tenant": "acme"}}')
    if len(headers) > most:
        raise UsageError(f"{len(headers)} headers; the limit is {most}; what is more belongs into the message")


def told_number(value: object) -> str:
    """A number as short as it is written; anything else as it is, so that an error can show it."""
    return f"{value:g}" if is_number(value) else repr(value)
