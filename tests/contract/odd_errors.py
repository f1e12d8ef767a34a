"""Errors that an application may well raise, and that cannot be looked at as others can; and how it may answer that its code
is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final


class Odd(Exception):
    """As some applications write them: for what it does not know it raises another error than Python expects."""

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__("odd")
        self.fields = fields

    def __getattr__(self, name: str) -> str:
        return self.fields[name]


class SafeText(str):
    """Text as template engines have it: what is made of it is of its class, too."""

    def __getitem__(self, at: Any) -> SafeText:
        return SafeText(str.__getitem__(self, at))

    def __str__(self) -> str:
        return self


class Marked(Exception):
    """Its text is of a class of its own."""

    def __str__(self) -> str:
        return SafeText("marked")


class Leaving(Exception):
    """To tell of it raises what ends programs."""

    def __str__(self) -> str:
        raise SystemExit(3)

    def __getattr__(self, name: str) -> str:
        raise SystemExit(4)


class Closed(Exception):
    """Nothing of it can be looked at, not even its class."""

    def __getattribute__(self, name: str) -> object:
        raise KeyError(name)


class Hopeless(Exception):
    """Even what every error has cannot be looked at."""

    @property
    def __cause__(self) -> BaseException | None:  # type: ignore[override]
        raise KeyError("cause")


class Empty(Exception):
    """A collection of what is wrong, with nothing in it: it is false."""

    def __len__(self) -> int:
        return 0


class Sealed(ExceptionGroup[Exception]):
    """A group that does not show its members."""

    @property
    def exceptions(self) -> tuple[Exception, ...]:  # type: ignore[override]
        raise KeyError("exceptions")


class Templates:
    """Where the source of a module would be."""

    def get_source(self, name: str) -> str:
        raise KeyError(name)


_PAGE: Final[dict[str, object]] = {"__name__": "page", "__loader__": Templates()}
exec(compile("def render():\n    raise LookupError('of a page')\n", "page.html", "exec"), _PAGE)  # noqa: S102 - as templates are


def _of_a_page() -> Exception:
    """Its stack has a line that cannot be read."""
    render = _PAGE["render"]
    assert callable(render)
    try:
        render()
    except LookupError as error:
        return error
    raise AssertionError("it is raised")


ODD_ERRORS: Final[dict[str, Callable[[], Exception]]] = {
    "odd": lambda: Odd({}),
    "hopeless": Hopeless,
    "marked": Marked,
    "leaving": Leaving,
    "closed": Closed,
    "empty": Empty,
    "of a page": _of_a_page,
    "sealed": lambda: Sealed("two", [ValueError("a"), ValueError("b")]),
}


async def _in_a_group() -> None:
    async def child() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            raise ConnectionError("no goodbye")

    async with asyncio.TaskGroup() as group:
        group.create_task(child())
        await asyncio.sleep(600)


async def _with_another_error() -> None:
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        raise ConnectionError("no goodbye") from None


async def _with_what_ends_programs() -> None:
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        raise SystemExit(3) from None


async def _as_if_thrown_away() -> None:
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        raise GeneratorExit from None


async def _with_nothing() -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(600)


async def _with_nothing_as_it_is_documented() -> None:
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()


async def catch_what_a_child_raises() -> None:
    """A `TaskGroup` whose child fails, which is caught: nobody is cancelled."""

    async def child() -> None:
        await asyncio.sleep(0)
        raise ConnectionError("no answer")

    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(child())


ANSWERS: Final[dict[str, Callable[[], Awaitable[None]]]] = {
    "a group's": _in_a_group,
    "another error": _with_another_error,
    "what ends programs": _with_what_ends_programs,
    "as if thrown away": _as_if_thrown_away,
    "nothing": _with_nothing,
    "nothing, as documented": _with_nothing_as_it_is_documented,
}
"""Each takes ten minutes, and answers a cancellation in its own way."""
