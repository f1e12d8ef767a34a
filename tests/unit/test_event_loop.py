"""The event loop that programs run on: what an interrupt finds before it turns."""

from __future__ import annotations

import asyncio

import pytest

from shardbus import event_loop


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
