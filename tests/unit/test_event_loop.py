"""The event loop that programs run on: what an interrupt finds before it turns."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any

import pytest

from shardbus import event_loop


@types.coroutine
def pause() -> Generator[None, None, None]:
    """A suspension that needs no loop."""
    yield


async def _never() -> None:
    raise AssertionError("it was interrupted before it began")


def test_a_coroutine_that_is_interrupted_before_it_begins_is_closed(monkeypatch: pytest.MonkeyPatch):
    def interrupted() -> asyncio.AbstractEventLoop:
        raise KeyboardInterrupt

    monkeypatch.setattr(event_loop, "new_event_loop", interrupted)
    main = _never()
    with pytest.raises(KeyboardInterrupt):
        event_loop.run(main)
    with pytest.raises(RuntimeError, match="cannot reuse"):
        main.send(None)  # closed: else it would have begun, or been complained of as never awaited


def test_what_is_no_coroutine_is_told_as_asyncio_tells_it():
    with pytest.raises(ValueError, match="a coroutine was expected"):
        event_loop.run(_never)  # type: ignore[arg-type]  # the parentheses are missing


def test_one_that_was_left_in_the_middle_hides_no_interrupt(monkeypatch: pytest.MonkeyPatch):
    class Interrupted:
        def __init__(self, **_: object) -> None: ...

        def __enter__(self) -> Interrupted:
            return self

        def __exit__(self, *_: object) -> None: ...

        def run(self, main: Coroutine[Any, Any, None]) -> None:
            main.send(None)
            raise KeyboardInterrupt

    async def stubborn() -> None:
        try:
            await pause()
        finally:
            await pause()

    monkeypatch.setattr(asyncio, "Runner", Interrupted)
    main = stubborn()
    with pytest.raises(KeyboardInterrupt):
        event_loop.run(main)
    main.throw(GeneratorExit)  # it cleans up, and that suspends it again
    with pytest.raises(GeneratorExit):
        main.throw(GeneratorExit)
