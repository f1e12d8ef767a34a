"""The event loop that programs of the bus run on. The only file that imports uvloop.

uvloop, where it is installed, because a turn of its loop costs about half of asyncio's: in turns on one machine, one worker
carried 740,000–850,000 events/s on it and 430,000–650,000 on asyncio's, and the median latency at 20,000/s fell by a fifth.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine
from typing import Any, TypeVar

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform
    from asyncio import new_event_loop  # type: ignore[assignment]  # the same, but for the loop it makes

ResultT = TypeVar("ResultT")


def run(main: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run a coroutine as `asyncio.run` does, on the fastest event loop that is installed; return its result.

    One that an interrupt finds before it has begun is closed, so that nothing complains that it never ran.
    """
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(main)
    finally:
        if inspect.iscoroutine(main) and inspect.getcoroutinestate(main) == inspect.CORO_CREATED:
            main.close()
