"""Futures that time out: one timer of the event loop for all that wait equally long.

With a thousand commands under way, a timer for each took a tenth of what they cost their client.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

_ROUNDING_S: Final = 1e-6  # of instants that are sums of others


class Timeouts:
    """The futures of one event loop that are to end in time. Bounded by what is waited for.

    What waits equally long ends in the order in which it began. So each length is a queue, and its head alone needs a timer.
    Where every length is another, each costs what its timer does, and as much again.
    """

    def __init__(self) -> None:
        self._queues: dict[float, _Queue] = {}

    def add(self, future: asyncio.Future[Any], timeout_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """Have a future raise `TimeoutError` after so many seconds, unless it is done by then. It is to be removed."""
        queue = self._queues.get(timeout_s)
        if queue is None:
            queue = self._queues[timeout_s] = _Queue(loop.call_later(timeout_s, self._ring, timeout_s, loop))
        queue.due_s[future] = loop.time() + timeout_s

    def remove(self, future: asyncio.Future[Any], timeout_s: float) -> None:
        """Nobody waits for it any more."""
        queue = self._queues.get(timeout_s)
        if queue is not None and queue.due_s.pop(future, None) is not None and not queue.due_s:
            queue.timer.cancel()
            del self._queues[timeout_s]

    def _ring(self, timeout_s: float, loop: asyncio.AbstractEventLoop) -> None:
        queue = self._queues[timeout_s]
        now_s = loop.time() + _ROUNDING_S
        over: list[asyncio.Future[Any]] = []
        for future, due_s in queue.due_s.items():
            if due_s > now_s:
                queue.timer = loop.call_at(due_s, self._ring, timeout_s, loop)
                break
            over.append(future)
        else:
            del self._queues[timeout_s]
        for future in over:
            del queue.due_s[future]
            if not future.done():
                future.set_exception(TimeoutError())
                future.exception()  # nobody may be left to see it


class _Queue:
    """Futures that wait equally long, and when each is due. The timer rings when the first of them is, or before."""

    __slots__ = ("due_s", "timer")

    def __init__(self, timer: asyncio.TimerHandle) -> None:
        self.due_s: dict[asyncio.Future[Any], float] = {}
        self.timer = timer
