"""What runs around a handler: middleware, and the thread of a handler that asks for one. Composed once, at start-up.

A middleware is `async def middleware(message, context, call_next)`. The outermost is what the lanes call; each gets the next
one as `call_next`, and the innermost the handler. It is handed over by the parameter's name, so that no frame and no
coroutine of ours stands between them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import msgspec

from shardbus import filters, outlet, threads
from shardbus.context import Context
from shardbus.errors import RegistrationError
from shardbus.messages import Message
from shardbus.outlet import OUTLET
from shardbus.signatures import is_coroutine_function, parameters_of, shown
from shardbus.threads import Threads

OUR_FILES: Final = (__file__, filters.__file__, outlet.__file__, threads.__file__)
"""Whose frames may stand between the lanes and a handler; a traceback for people begins behind them."""


class CallNext(Protocol):
    """The rest of the way to a handler: `await call_next(message, context)` returns what the handler does."""

    @property
    def handler(self) -> str:
        """The name of the handler at the end, as dead letters have it."""

    def __call__(self, message: Any, context: Context, /) -> Awaitable[Any]:
        """Go on, with this message and context or with others."""


Middleware = Callable[[Any, Context, CallNext], Awaitable[Any]]
"""`async def middleware(message, context, call_next)`, a function or an object that is called so."""

Call = Callable[[Any, Context], Awaitable[Any]]


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A middleware, the name of its third parameter, and the types that it is for (none: all)."""

    middleware: Middleware
    parameter: str
    on: tuple[type[Message], ...]
    skip_batches: bool = False
    """It is not for types with a batch handler."""

    def is_for(self, message_type: type[Message]) -> bool:
        """Whether it stands around the handlers of a type."""
        return not self.on or issubclass(message_type, self.on)


class _Next(functools.partial[Awaitable[Any]]):
    """A `CallNext`, at the price of a C call."""

    handler: str


def layer(
    middleware: Middleware, on: type[Message] | tuple[type[Message], ...], *, skip_batches: bool = False
) -> Layer:
    """A middleware, checked.

    Raises:
        RegistrationError: it cannot be called as a middleware is, or `on` names what is no message type.
    """
    told = shown(middleware)
    if isinstance(middleware, type):
        raise RegistrationError(f"bus.use({told}): that is a class; make one: bus.use({told}(…))")
    if not callable(middleware) or not is_coroutine_function(middleware):
        raise RegistrationError(f"{told}: a middleware is an `async def` that takes (message, context, call_next)")
    parameters = parameters_of(middleware)
    takes_rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [one for one in parameters if one.default is one.empty and one.kind not in takes_rest]
    if len(needed) > 3 or len(parameters) < 3 or parameters[2].kind is not parameters[2].POSITIONAL_OR_KEYWORD:
        found = ", ".join(str(one) for one in parameters)
        raise RegistrationError(f"a middleware takes (message, context, call_next), and {told} takes ({found})")
    types = on if isinstance(on, tuple) else (on,)
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, Message)):
            raise RegistrationError(f"bus.use(…, on=…) takes message types, not {shown(kind)}")
    return Layer(middleware=middleware, parameter=parameters[2].name, on=types, skip_batches=skip_batches)


def compose(
    function: Callable[..., Any],
    *,
    name: str,
    is_async: bool,
    wants_context: bool,
    layers: tuple[Layer, ...],
    threads: Threads | None,
    streams: bool = False,
) -> Call:
    """A handler with everything around it, the first layer outermost; in a thread where `threads` are given.

    Of one that streams, `call` is the whole of it, to its last item: its middleware see it begin and end.
    """
    call = _streaming(function, wants_context) if streams else _innermost(function, is_async, wants_context, threads)
    for one in reversed(layers):
        following = _Next(call)
        following.handler = name
        call = functools.partial(one.middleware, **{one.parameter: following})
    return call


def _streaming(function: Callable[..., Any], wants_context: bool) -> Call:
    """The handler itself, run to its end; its items go to whoever reads them."""

    async def streamed(message: Any, context: Context) -> None:
        await OUTLET.get().drain(function(message, context) if wants_context else function(message))

    return streamed


def _innermost(function: Callable[..., Any], is_async: bool, wants_context: bool, threads: Threads | None) -> Call:
    """The handler itself, as an awaitable of `(message, context)`."""
    if is_async:
        return function if wants_context else lambda message, _context: function(message)

    async def plain(message: Any, context: Context) -> Any:
        arguments = (message, context) if wants_context else (message,)
        outcome = function(*arguments) if threads is None else await threads.run(function, *arguments)
        return await outcome if hasattr(outcome, "__await__") else outcome

    return plain
