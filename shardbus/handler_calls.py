"""Calls a handler, and tells its end from that of the task around it.

What raises in the leader's task is the handler's failure, or the end of the task itself: only the tasks' owner knows which.
Knows nothing of what follows from either.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from shardbus.cancellation import uncancel
from shardbus.clock import NowNs
from shardbus.context import Context
from shardbus.failures import HandlerTimeout
from shardbus.inbound import Delivery
from shardbus.lane_host import LaneHost
from shardbus.registry import Registered
from shardbus.tracebacks import log_error

log = logging.getLogger("shardbus.lanes")

_NS: Final = 1_000_000_000


class HandlerTasks:
    """The tasks in which handlers run: the leader's, and those of handlers that are suspended. Bounded by credit."""

    def __init__(self) -> None:
        self.running: set[asyncio.Task[None]] = set()
        self.leading: asyncio.Task[None] | None = None
        """In which the next handler runs; while there is no leader, the last one's."""
        self.closing = False
        self.disowned = False
        """This process is a copy, which a handler has made: nothing runs in it but that handler."""

    def lead(self, task: asyncio.Task[None]) -> None:
        """From now on handlers run in this one."""
        self.leading = task
        self.running.add(task)

    async def run(self, leading: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Lead to the end. What fails when it is cancelled, at the end of the shard, is no defect of ours."""
        try:
            await leading(*arguments)
        except BaseException as error:
            # An interrupt of the program around a local bus is nobody's answer.
            if not self.closing or self._is_thrown_away(error) or issubclass(type(error), KeyboardInterrupt):
                raise
            if not issubclass(type(error), asyncio.CancelledError):
                log_error(log, error, "a handler that was cancelled at the end has failed")
            raise asyncio.CancelledError from None

    async def close(self) -> None:
        """Cancel them, and wait until they have ended."""
        self.closing = True
        for task in self.running:
            task.cancel()
        if self.running:
            await asyncio.wait(self.running)

    def is_ours(self, error: BaseException) -> bool:
        """Whether it ends the task and not just a handler: the worker closes, or the coroutine is thrown away."""
        return self.closing or self._is_thrown_away(error)

    def _is_thrown_away(self, error: BaseException) -> bool:
        """Whether somebody throws the coroutine away, outside its task; a handler may raise the same."""
        if not issubclass(type(error), GeneratorExit):
            return False
        try:
            return asyncio.current_task() not in self.running
        except RuntimeError:  # no loop runs any more
            return True


def absorb(error: BaseException) -> None:
    """Let a cancellation that a handler brought upon itself end with the handler."""
    if issubclass(type(error), asyncio.CancelledError):
        uncancel(asyncio.current_task())


async def call_handler(handler: Registered, message: Any, context: Any) -> Any:
    """Call a handler and return what it returns.

    Raises:
        HandlerTimeout: it took longer than it may; else whatever it raises.
    """
    limit: asyncio.Timeout | None = None
    call = partial(handler.call, message, context) if handler.wants_context else partial(handler.call, message)
    try:
        if handler.timeout_s is None:  # `asyncio.timeout` of none costs as much as any other
            outcome = call()
            return await outcome if handler.is_async or hasattr(outcome, "__await__") else outcome
        async with asyncio.timeout(handler.timeout_s) as limit:  # only of what is `async`
            return await call()
    except TimeoutError as error:
        if limit is not None and limit.expired():
            raise HandlerTimeout(f"not finished within {handler.timeout_s:g} s") from error
        raise  # the handler's own


def context_of(
    delivery: Delivery, host: LaneHost, now: NowNs, make: Callable[..., Context] = Context
) -> Context:
    """What a handler may know of its message."""
    deadline_ns = delivery.deadline_ns
    return make(
        delivery.key,
        delivery.publisher,
        delivery.seq,
        delivery.attempt,
        host.shard,
        delivery.extra.headers if delivery.extra is not None and delivery.extra.headers else None,
        (lambda: (deadline_ns - now()) / _NS) if deadline_ns else None,
        host.outgoing,
        delivery,
        host.states,
    )
