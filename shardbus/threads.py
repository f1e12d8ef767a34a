"""Threads for handlers that block: a bounded number of them, in the process of the worker.

Owns the pool. A thread cannot be cancelled, so whoever waits for one waits for its end, also when cancelled: otherwise the
next message of the key would run beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

THREADS_MAX: Final = 16
"""So many handlers run in threads at a time, in one worker; further ones wait, each in its key's lane."""


class Threads:
    """Up to `threads_max` threads, started as they are needed. Calls beyond that wait their turn.

    How many wait is bounded by what the sessions' credit lets into a worker.
    """

    def __init__(self, threads_max: int) -> None:
        self._threads_max = threads_max
        self._users = 0
        self._pool: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Keep the threads; the last one to leave ends them. Whoever has called waits for their end, so all are idle."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users and self._pool is not None:
                pool, self._pool = self._pool, None
                pool.shutdown(cancel_futures=True)

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a plain function in a thread, with the caller's context variables; return or raise what it does.

        Cancelled before the function has begun, it does not begin; cancelled later, this ends when the function has.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads_max, "shardbus-handler")
        future = self._pool.submit(_call, contextvars.copy_context(), function, arguments)
        returned, outcome = await _end_of(future)
        if returned:
            return outcome
        try:
            raise outcome
        finally:
            del outcome  # it holds this frame


async def _end_of(future: Future[tuple[bool, Any]]) -> tuple[bool, Any]:
    ended = asyncio.wrap_future(future)
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            outcome = await asyncio.shield(ended)
        except asyncio.CancelledError as error:
            if future.cancel():
                raise
            cancelled = error
        else:
            if cancelled is None:
                return outcome
            try:
                raise cancelled
            finally:
                del cancelled


def _call(context: contextvars.Context, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether it returned, and what; else what it raised. As a value: a future takes no `StopIteration`."""
    try:
        return True, context.run(function, *arguments)
    except BaseException as error:  # the handler's, raised again where it is awaited
        return False, error
