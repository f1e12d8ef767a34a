"""A thread that notices when the event loop stands still, and says in which handler.

A handler that blocks its event loop silences the whole worker: no other key goes on, and after some seconds the supervisor
replaces it. The loop itself can say nothing meanwhile, so a thread looks at it from outside.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final

import msgspec

_TICK_S: Final = 0.25
_FRAMES_MAX: Final = 30


class Stall(msgspec.Struct, frozen=True, kw_only=True):
    """The event loop has stood still for `seconds`, while `what` ran, at `stack`."""

    seconds: float
    what: str
    stack: str


class Watchdog:
    """Watches the running event loop from its start to its close; make it in the loop's own thread.

    Args:
        limit_s: how long the loop may stand still before somebody is told.
        what: says what runs; called from the thread, so it must only read.
        tell: called from the thread, once for each time that the loop stands still.
        pulse: called from the thread every `pulse_s` seconds: the process lives, whatever its loop does.
    """

    def __init__(
        self,
        limit_s: float,
        what: Callable[[], str],
        tell: Callable[[Stall], object],
        pulse: Callable[[], object],
        pulse_s: float,
    ) -> None:
        self._limit_s = limit_s
        self._what = what
        self._tell = tell
        self._pulse = pulse
        self._pulse_s = pulse_s
        self._loop = asyncio.get_running_loop()
        self._watched = threading.get_ident()
        self._turned_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="shardbus-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._turn()
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._timer is not None:
            self._timer.cancel()
            self._thread.join()

    def _turn(self) -> None:
        self._turned_at = time.monotonic()
        self._timer = self._loop.call_later(_TICK_S, self._turn)

    def _watch(self) -> None:
        told_of = 0.0
        while not self._closed.wait(self._pulse_s):
            self._pulse()
            turned_at = self._turned_at
            seconds = time.monotonic() - turned_at
            if seconds >= self._limit_s + _TICK_S and turned_at != told_of:
                told_of = turned_at
                frame = sys._current_frames().get(self._watched)
                stack = "".join(traceback.format_stack(frame, _FRAMES_MAX)) if frame is not None else ""
                self._tell(Stall(seconds=seconds, what=self._what(), stack=stack))
