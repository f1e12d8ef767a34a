"""Time that a test controls: timers of the running event loop fire when `Clock.advance` comes to them, and not before.

Owns what it puts in the place of the loop's `time`, `call_later` and `call_at`, and around its selector's `select`, for as
long as its block is open: with them
`asyncio.sleep` and `asyncio.timeout` stand still, too, the test's own as well. Threads and sockets go on as ever.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from types import TracebackType
from typing import Any, Final

import msgspec

_NS: Final = 1_000_000_000
_ROUNDING_NS: Final = 1000  # what comes so much behind the end of `advance` was meant to come at it
_TURNS_MAX: Final = 1_000_000
_RUN_UNTIL_COMPLETE: Final = asyncio.base_events._run_until_complete_cb  # type: ignore[attr-defined]
_PATCHED: Final = ("time", "call_soon", "call_later", "call_at", "run_in_executor")


class Timer(msgspec.Struct, eq=False):
    """A callback to come."""

    callback: Callable[..., object] | None
    args: tuple[Any, ...]
    context: contextvars.Context | None
    due_s: float = 0.0

    def cancel(self) -> None:
        """Never call it."""
        self.callback = None

    def cancelled(self) -> bool:
        """Whether it will never be called, or was."""
        return self.callback is None

    def when(self) -> float:
        """When it is due, by the loop's clock."""
        return self.due_s


class Clock:
    """The clock of a running event loop. Use it as a block; time passes by `advance`.

    Args:
        tick: is called whenever time has passed; it returns after how many seconds at the latest it is to be called
            again, None: that does not matter.
        stuck: is called, once, when the loop has had nothing to do for `stuck_s` real seconds: whoever waits then waits for
            time to pass, or for ever. Only with an event loop of asyncio's own.
    """

    def __init__(
        self, tick: Callable[[], float | None], stuck: Callable[[], None] = lambda: None, stuck_s: float = math.inf
    ) -> None:
        self._tick = tick
        self._stuck = stuck
        self._stuck_s = stuck_s
        self._idle_s = 0.0
        self._selector: Any = None
        self._loop: Any = None
        # Whole nanoseconds: to a float of many seconds a nanosecond adds nothing, and whoever waits for that waits for ever.
        self._now_ns = 0
        self._began_ns = 0
        self._began_wall_ns = 0
        self._timers: list[tuple[int, int, Timer]] = []  # a heap; of those for one instant, the first comes first
        self._numbers = count()
        self._calls = 0  # of `call_soon`
        self._threads = 0  # calls that run in threads now
        self._thread_ended = asyncio.Event()

    def __enter__(self) -> Clock:
        self._loop = asyncio.get_running_loop()
        self._now_ns = self._began_ns = int(self._loop.time() * _NS)
        self._began_wall_ns = time.time_ns()
        self._real_soon = self._loop.call_soon
        self._real_executor = self._loop.run_in_executor
        ours = (lambda: self._now_ns / _NS, self._call_soon, self._call_later, self._call_at, self._run_in_executor)
        for name, function in zip(_PATCHED, ours, strict=True):
            setattr(self._loop, name, function)
        self._selector = getattr(self._loop, "_selector", None)
        if self._selector is not None and self._stuck_s < math.inf:
            self._real_select = self._selector.select
            self._selector.select = self._select
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        for name in _PATCHED:
            delattr(self._loop, name)
        if self._selector is not None and self._stuck_s < math.inf:
            del self._selector.select

    def main_task(self) -> asyncio.Task[Any] | None:
        """The task that the loop runs until it is complete: the test's, or the program's."""
        for task in asyncio.all_tasks(self._loop):
            if any(callback is _RUN_UNTIL_COMPLETE for callback, _ in getattr(task, "_callbacks", None) or ()):
                return task
        return None

    def next_s(self) -> float | None:
        """After how many seconds the next timer is due; None: there is none."""
        due_ns = [due for due, _, timer in self._timers if timer.callback is not None]
        return (min(due_ns) - self._now_ns) / _NS if due_ns else None

    def now_ns(self) -> int:
        """Nanoseconds of a clock that never goes back."""
        return self._now_ns

    def wall_ns(self) -> int:
        """Nanoseconds since 1970: the real time at which the block was entered, and what has passed in it."""
        return self._began_wall_ns + self._now_ns - self._began_ns

    async def settle(self) -> None:
        """Return when nothing can go on unless time passes."""
        for _ in range(_TURNS_MAX):
            self._run_due()
            calls = self._calls
            await asyncio.sleep(0)
            if self._calls - calls > 1:  # besides the end of this very sleep
                continue
            if self._threads:
                self._thread_ended.clear()
                await self._thread_ended.wait()
            elif not self._timers or self._timers[0][0] > self._now_ns:
                return
        raise AssertionError(f"something goes on without time passing: {_TURNS_MAX:,} turns of the event loop")

    async def advance(self, seconds: float) -> None:
        """Let time pass: whatever comes due meanwhile runs at its instant, and settles before time goes on."""
        end_ns = self._now_ns + round(seconds * _NS)
        await self.settle()
        step_s = self._tick()
        while True:
            await self.settle()
            while self._timers and self._timers[0][2].callback is None:
                heappop(self._timers)
            steps = [self._timers[0][0]] if self._timers else []
            if step_s is not None:
                steps.append(self._now_ns + round(step_s * _NS))
            next_ns = min(steps, default=end_ns + 2 * _ROUNDING_NS)
            if next_ns > end_ns + _ROUNDING_NS:
                if self._now_ns >= end_ns:
                    return
                next_ns = end_ns
            self._now_ns = max(self._now_ns, next_ns)
            step_s = self._tick()

    def thread_begins(self) -> None:
        """A call runs in a thread: `settle` waits for its end, in real time."""
        self._threads += 1

    def thread_ended(self, _: object = None) -> None:
        """It has ended."""
        self._threads -= 1
        self._thread_ended.set()

    # -- in the place of the loop's own

    def _call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        self._calls += 1
        handle: asyncio.Handle = self._real_soon(callback, *args, context=context)
        return handle

    def _call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Timer:
        due_ns = self._now_ns + max(0, math.ceil(delay * _NS))
        return self._add(due_ns, callback, args, context)

    def _call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Timer:
        return self._add(math.ceil(when * _NS), callback, args, context)

    def _add(
        self,
        due_ns: int,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> Timer:
        timer = Timer(callback, args, contextvars.copy_context() if context is None else context, due_ns / _NS)
        heappush(self._timers, (due_ns, next(self._numbers), timer))
        return timer

    def _select(self, timeout: float | None = None) -> Any:
        """What wakes the loop. It stops here only when nothing is ready to run."""
        if self._threads or (timeout is not None and timeout <= 0):
            self._idle_s = 0.0
            return self._real_select(timeout)
        left_s = self._stuck_s - self._idle_s
        if left_s <= 0:  # told already
            return self._real_select(timeout)
        began = time.monotonic()
        events = self._real_select(left_s if timeout is None else min(timeout, left_s))
        self._idle_s = 0.0 if events else self._idle_s + max(0.001, time.monotonic() - began)
        if self._idle_s >= self._stuck_s:
            self._stuck()
        return events

    def _run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._real_executor(executor, function, *args)
        self.thread_begins()
        future.add_done_callback(self.thread_ended)
        return future

    def _run_due(self) -> None:
        timers = self._timers
        while timers and timers[0][0] <= self._now_ns:
            timer = heappop(timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                self._call_soon(callback, *timer.args, context=timer.context)
