"""Which events concern a handler: predicates over a message and its context, combined with `&`, `|` and `~`. Pure.

    @bus.on(OrderPlaced, where=where(country="NL") & ~key_matches("test-*"))

They are asked in the worker, before the handler. One that raises is the handler's failure.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from typing import Any, NoReturn
from uuid import UUID

from shardbus.context import Context
from shardbus.errors import RegistrationError
from shardbus.messages import Message
from shardbus.signatures import is_coroutine_function, positional_count, shown, wants_context

Matches = Callable[[Any, Context], Any]
"""A predicate: of a message and its context."""


class Filter:
    """Which messages concern a handler. Made by the functions of this module; combine them with `&`, `|` and `~`."""

    __slots__ = ("_excludes", "_fault", "_told", "matches")

    def __init__(
        self,
        matches: Matches,
        told: str,
        *,
        fault: Callable[[type[Message]], str | None] = lambda _kind: None,
        excludes: Callable[[type[Message]], bool] = lambda _kind: False,
    ) -> None:
        self.matches = matches
        """Whether a message, with its context, is meant."""
        self._told = told
        self._fault = fault
        self._excludes = excludes

    def check(self, message_type: type[Message]) -> None:
        """Refuse a message type that this filter could only fail with.

        Raises:
            RegistrationError: a field or a key that the type does not have.
        """
        if (fault := self._fault(message_type)) is not None:
            raise RegistrationError(f"where={self}: {fault}")

    def __and__(self, other: Filter | Callable[..., Any]) -> Filter:
        other = as_filter(other)
        one, two = self.matches, other.matches
        return Filter(
            lambda message, context: one(message, context) and two(message, context),
            f"({self} & {other})",
            # What stands behind a type is never asked for another one.
            fault=lambda kind: self._fault(kind) or (None if self._excludes(kind) else other._fault(kind)),
            excludes=lambda kind: self._excludes(kind) or other._excludes(kind),
        )

    def __or__(self, other: Filter | Callable[..., Any]) -> Filter:
        other = as_filter(other)
        one, two = self.matches, other.matches
        return Filter(
            lambda message, context: one(message, context) or two(message, context),
            f"({self} | {other})",
            fault=lambda kind: self._fault(kind) or other._fault(kind),
            excludes=lambda kind: self._excludes(kind) and other._excludes(kind),
        )

    def __invert__(self) -> Filter:
        matches = self.matches
        return Filter(lambda message, context: not matches(message, context), f"~{self}", fault=self._fault)

    def __bool__(self) -> NoReturn:
        raise RegistrationError("combine filters with &, | and ~; `and`, `or` and `not` would drop one of them")

    def __repr__(self) -> str:
        return self._told


def where(predicate: Callable[..., Any] | None = None, /, **fields: Any) -> Filter:
    """Messages of which a function is true, and whose fields have these values: `where(lambda e: e.n > 3, country="NL")`.

    Args:
        predicate: a plain function of `(message)` or `(message, context)`.
        **fields: a value for each field that matters.

    Raises:
        RegistrationError: nothing was given, or no such function.
    """
    if predicate is None and not fields:
        raise RegistrationError("where() needs a function of the message, or fields: where(country='NL')")
    parts = []
    if fields:
        parts.append(_of_fields(fields))
    if predicate is not None:
        parts.append(_of_function(predicate))
    return parts[0] if len(parts) == 1 else parts[0] & parts[1]


def key_matches(pattern: str | bytes) -> Filter:
    """Messages whose key matches a shell pattern: `key_matches("chat-*")`. Upper and lower case differ.

    A pattern of text is held against a `str`, and against an `int` or a `UUID` as `str()` writes it; one of bytes against
    `bytes`. Other keys do not match.

    Raises:
        RegistrationError: no pattern.
    """
    if isinstance(pattern, str):
        matches_text = re.compile(fnmatch.translate(pattern)).match

        def matches(_message: Any, context: Context) -> bool:
            key = context.key
            return isinstance(key, str | int | UUID) and matches_text(str(key)) is not None

    elif isinstance(pattern, bytes):
        matches_bytes = re.compile(fnmatch.translate(pattern.decode("latin-1")).encode("latin-1")).match

        def matches(_message: Any, context: Context) -> bool:
            key = context.key
            return isinstance(key, bytes) and matches_bytes(key) is not None

    else:
        raise RegistrationError(f"key_matches({pattern!r}): give a pattern of text or bytes, for instance 'chat-*'")

    def fault(kind: type[Message]) -> str | None:
        return f"{kind.__name__} has no key" if kind.__shardbus_key__ is None else None

    return Filter(matches, f"key_matches({pattern!r})", fault=fault)


def header_matches(name: str, pattern: str = "*") -> Filter:
    """Messages with this header, whose value matches a shell pattern: `header_matches("tenant", "acme-*")`.

    Raises:
        RegistrationError: a name or a pattern that is no text.
    """
    if not isinstance(name, str) or not isinstance(pattern, str):
        raise RegistrationError(f"header_matches({name!r}, {pattern!r}): names and values of headers are text")
    matches_value = re.compile(fnmatch.translate(pattern)).match

    def matches(_message: Any, context: Context) -> bool:
        value = context.headers.get(name)
        return value is not None and matches_value(value) is not None

    return Filter(matches, f"header_matches({name!r}, {pattern!r})")


def is_type(*message_types: type[Message]) -> Filter:
    """Messages of these types, or of subclasses; for a handler of several: `is_type(Paid) & where(country="NL")`.

    Raises:
        RegistrationError: no message type.
    """
    for kind in message_types:
        if not (isinstance(kind, type) and issubclass(kind, Message)):
            raise RegistrationError(f"is_type takes message types, not {shown(kind)}")
    if not message_types:
        raise RegistrationError("is_type() needs a message type")
    return Filter(
        lambda message, _context: isinstance(message, message_types),
        f"is_type({', '.join(kind.__name__ for kind in message_types)})",
        excludes=lambda kind: not issubclass(kind, message_types),
    )


def as_filter(given: Filter | Callable[..., Any]) -> Filter:
    """A filter as it is; a function of the message as the filter that asks it.

    Raises:
        RegistrationError: neither.
    """
    if isinstance(given, Filter):
        return given
    if not callable(given) or isinstance(given, type):
        raise RegistrationError(
            f"where={shown(given)}: give a filter or a function of the message, for instance where=lambda event: …"
        )
    return _of_function(given)


def _of_function(predicate: Callable[..., Any]) -> Filter:
    if not callable(predicate):
        raise RegistrationError(f"where({predicate!r}): give a function of the message, or fields: where(country='NL')")
    told = f"where({shown(predicate)})"
    least, most = positional_count(predicate)
    if least > 2 or most < 1:
        raise RegistrationError(f"{told}: a predicate takes (message) or (message, context)")
    if is_coroutine_function(predicate):
        raise RegistrationError(f"{told}: a predicate is a plain `def`; what it would await belongs in the handler")
    if wants_context(predicate):
        return Filter(predicate, told)
    return Filter(lambda message, _context: predicate(message), told)


def _of_fields(fields: dict[str, Any]) -> Filter:
    wanted = tuple(fields.items())

    def matches(message: Any, _context: Context) -> bool:
        return all(getattr(message, name) == value for name, value in wanted)

    def fault(kind: type[Message]) -> str | None:
        missing = [name for name in fields if name not in kind.__struct_fields__]
        known = ", ".join(kind.__struct_fields__) or "none"
        return f"{kind.__name__} has no field {missing[0]!r} (it has {known})" if missing else None

    return Filter(matches, f"where({', '.join(f'{name}={value!r}' for name, value in wanted)})", fault=fault)
