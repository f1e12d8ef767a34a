"""What a function that a user hands over takes: how many arguments, and whether the context is one. Reads, never calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from shardbus.errors import RegistrationError


def is_coroutine_function(function: Callable[..., Any]) -> bool:
    """Whether calling it, function or object, makes a coroutine."""
    return any(map(inspect.iscoroutinefunction, _callables(function)))


def is_stream_function(function: Callable[..., Any]) -> bool:
    """Whether calling it, function or object, makes an async generator."""
    return any(map(inspect.isasyncgenfunction, _callables(function)))


def _callables(function: Callable[..., Any]) -> tuple[Any, Any]:
    """What may say so: itself, and of an object the method that a call calls."""
    method = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004 - the method itself is inspected
    return function, method


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Its parameters, as its caller sees them.

    Raises:
        RegistrationError: they cannot be read.
    """
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise RegistrationError(f"{shown(function)}: its signature cannot be read") from error


def positional_count(function: Callable[..., Any]) -> tuple[int, int]:
    """How many positional arguments a callable needs at least, and takes at most.

    Raises:
        RegistrationError: its signature cannot be read, or it needs a keyword that nobody would give.
    """
    least = most = 0
    for parameter in parameters_of(function):
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            least += parameter.default is parameter.empty
        elif parameter.kind is parameter.VAR_POSITIONAL:
            most += 2
        elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise RegistrationError(f"{shown(function)}: the keyword-only parameter {parameter.name!r} has no default")
    return least, most


def wants_context(function: Callable[..., Any]) -> bool:
    """A second positional parameter is the context, unless it has a default and another name."""
    least, most = positional_count(function)
    if most < 2 or least == 2:
        return least == 2
    parameters = parameters_of(function)
    return len(parameters) > 1 and parameters[1].name == "context"


def shown(thing: object) -> str:
    """A function or a class by its name, anything else as it shows itself."""
    return f"{getattr(thing, '__qualname__', None) or repr(thing)}"
