"""What runs around a handler: in which order, with what, and what is refused as a middleware."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from shardbus.context import Context
from shardbus.errors import RegistrationError
from shardbus.messages import Command, Event
from shardbus.pipeline import CallNext, Layer, compose, layer
from shardbus.registry import Registry

CONTEXT = Context("a", b"p" * 16, 1, 1, 0, {"tenant": "acme"})


class Noted(Event):
    text: str = ""


class Marked(Noted):
    pass


class Ask(Command[str]):
    text: str = ""


async def around(message: Any, context: Context, call_next: CallNext) -> Any:
    return ("around", await call_next(message, context))


class Around:
    def __init__(self, name: str) -> None:
        self.name = name

    async def __call__(self, message: Any, context: Context, call_next: CallNext) -> Any:
        return (self.name, await call_next(message, context))

    async def method(self, message: Any, context: Context, go_on: CallNext) -> Any:
        return ("method", await go_on(message, context))


async def with_more(message: Any, context: Context, call_next: CallNext, more: int = 5) -> Any:
    return (more, await call_next(message, context))


def composed(function: Callable[..., Any], *middleware: Any, is_async: bool = True, wants_context: bool = False) -> Any:
    layers = tuple(layer(one, ()) for one in middleware)
    return compose(
        function, name="app.handle", is_async=is_async, wants_context=wants_context, layers=layers, threads=None
    )(Noted(text="x"), CONTEXT)


async def handle(message: Any) -> Any:
    return message.text


async def handle_with_context(message: Any, context: Context) -> Any:
    return dict(context.headers)


def handle_plainly(message: Any) -> Any:
    return message.text


def handle_plainly_with_context(message: Any, context: Context) -> Any:
    return dict(context.headers)


HANDLERS = {
    "async": (handle, True, False, "x"),
    "async with context": (handle_with_context, True, True, {"tenant": "acme"}),
    "plain": (handle_plainly, False, False, "x"),
    "plain with context": (handle_plainly_with_context, False, True, {"tenant": "acme"}),
    "plain that returns a coroutine": (lambda message, *_: handle(message), False, False, "x"),
}


@pytest.mark.parametrize(("function", "is_async", "wants_context", "result"), HANDLERS.values(), ids=HANDLERS)
async def test_a_middleware_gets_what_the_handler_returns(
    function: Callable[..., Any], is_async: bool, wants_context: bool, result: Any
):
    call = composed(function, around, is_async=is_async, wants_context=wants_context)
    assert await call == ("around", result)


async def test_the_first_middleware_is_the_outermost_whatever_form_it_has():
    call = composed(
        handle, Around("first"), around, Around("").method, with_more, functools.partial(with_more, more=6)
    )
    assert await call == ("first", ("around", ("method", (5, (6, "x")))))


async def test_what_a_middleware_hands_on_is_what_the_next_one_gets():
    async def change(message: Any, context: Context, call_next: CallNext) -> Any:
        return await call_next(Noted(text="y"), context.with_headers({"trace": "1"}))

    async def look(message: Any, context: Context, call_next: CallNext) -> Any:
        return (message.text, await call_next(message, context))

    call = composed(handle_with_context, change, look, wants_context=True)
    assert await call == ("y", {"tenant": "acme", "trace": "1"})
    assert dict(CONTEXT.headers) == {"tenant": "acme"}


async def test_a_middleware_knows_the_handler_and_may_keep_from_it():
    async def keep(message: Any, context: Context, call_next: CallNext) -> Any:
        return call_next.handler

    assert await composed(handle, around, keep) == ("around", "app.handle")


def test_a_context_keeps_its_facts_with_other_headers():
    other = CONTEXT.with_headers({"tenant": "b"})
    assert (other.key, other.message_id, other.attempt) == (CONTEXT.key, CONTEXT.message_id, CONTEXT.attempt)
    assert dict(other.headers) == {"tenant": "b"}


# -- what is refused


def plain(message: Any, context: Context, call_next: CallNext) -> None: ...


async def of_two(message: Any, context: Context) -> None: ...


async def of_four(message: Any, context: Context, call_next: CallNext, more: int) -> None: ...


async def of_any(*arguments: Any) -> None: ...


async def by_position(message: Any, context: Context, call_next: CallNext, /) -> None: ...


async def with_a_keyword(message: Any, context: Context, *, call_next: CallNext) -> None: ...


REFUSED: dict[str, tuple[Any, list[str]]] = {
    "a plain function": (plain, ["plain", "`async def`"]),
    "no function": (5, ["5", "`async def`"]),
    "a class": (Around, ["that is a class", "bus.use(Around(…))"]),
    "two parameters": (of_two, ["of_two", "(message, context, call_next)"]),
    "four": (of_four, ["of_four", "more"]),
    "any number": (of_any, ["of_any", "*arguments"]),
    "a third one without a name": (by_position, ["by_position"]),
    "a third one without a place": (with_a_keyword, ["with_a_keyword"]),
}


@pytest.mark.parametrize(("middleware", "parts"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_middleware_is_refused_with_the_reason(middleware: Any, parts: list[str]):
    with pytest.raises(RegistrationError) as raised:
        Registry("shop").use(middleware)
    assert [part for part in parts if part not in str(raised.value)] == []


def test_a_middleware_is_for_message_types():
    with pytest.raises(RegistrationError, match="takes message types, not int"):
        layer(around, int)  # type: ignore[arg-type]


def test_a_middleware_is_used_once():
    bus = Registry("shop")
    assert bus.use(around) is around
    with pytest.raises(RegistrationError, match=r"around is used already.*on=\(A, B\)"):
        bus.use(around, on=Noted)


# -- whom it is for

FOR: list[tuple[Any, type[Any], bool]] = [
    ((), Noted, True),
    (Noted, Noted, True),
    (Noted, Marked, True),
    (Marked, Noted, False),
    (Event, Noted, True),
    (Command, Noted, False),
    ((Ask, Marked), Marked, True),
    ((Ask, Marked), Noted, False),
]


@pytest.mark.parametrize(("on", "kind", "expected"), FOR)
def test_a_middleware_is_for_the_types_it_names_and_their_subclasses(on: Any, kind: type[Any], expected: bool):
    made: Layer = layer(around, on)
    assert made.is_for(kind) is expected


def test_an_application_without_middleware_for_a_type_runs_its_handler_itself():
    bus = Registry("shop")
    bus.on(Noted)(handle)
    bus.on(Marked)(handle)
    bus.use(around, on=Marked)
    plans = bus.plans()
    assert plans["Noted"].simple is handle
    assert plans["Noted"].handlers[0].call is handle
    assert plans["Marked"].simple is None
    assert (plans["Marked"].handlers[0].is_async, plans["Marked"].handlers[0].wants_context) == (True, True)
    assert plans["Marked"].handlers[0].name == plans["Noted"].handlers[0].name
