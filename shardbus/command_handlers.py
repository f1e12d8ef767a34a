"""Runs a command's handler and replies; ends it where nobody waits for the reply any more.

A command runs once, whatever becomes of it: its outcome is a reply, with the error where its handler raised, and is nobody's
dead letter. Knows nothing of lanes, leaders or the store.
"""

from __future__ import annotations

import asyncio
import contextvars
from functools import partial
from typing import Any, Final

from shardbus.cancellation import uncancel
from shardbus.clock import NowNs
from shardbus.config import Limits
from shardbus.failures import Failures, failed_reply
from shardbus.handler_calls import HandlerTasks, absorb, call_handler, context_of
from shardbus.inbound import UNKNOWN, Delivery
from shardbus.lane_host import LaneHost
from shardbus.outlet import OUTLET, Outlet
from shardbus.quarantine import Identity
from shardbus.wire.frames import REPLY_EXPIRED, REPLY_FAILED, REPLY_OK
from shardbus.wire.session import WorkerSession

_OVERDUE_NS: Final = 1_000_000_000  # so long after its deadline a command's handler is ended, whatever its caller said

_STREAMS: Final = ("StreamingCommand", "{} streams its reply; use client.stream(…)")
_STREAMS_NOT: Final = ("PlainCommand", "the handler of {} does not yield; use client.execute(…)")


class CommandHandlers:
    """The handlers of a shard's commands, those that run by their command. Bounded by credit."""

    def __init__(
        self, host: LaneHost, tasks: HandlerTasks, failures: Failures, limits: Limits, now: NowNs
    ) -> None:
        self._host = host
        self._tasks = tasks
        self._failures = failures
        self._limits = limits
        self._now = now
        self._calls: dict[Identity, _Call] = {}

    async def run(self, delivery: Delivery) -> None:
        """Run a command's handler in the leader's task, and give the host its outcome, also where it raises."""
        plan, session = delivery.plan, delivery.session
        if session is not None and (session.left or delivery.seq in session.cancelled):
            session.cancelled.pop(delivery.seq, None)
            return
        if delivery.deadline_ns and self._now() >= delivery.deadline_ns:
            self._host.reply(delivery, REPLY_EXPIRED, b"")
            return
        if plan is UNKNOWN or not plan.is_command:
            told = f"no handler of this application takes the command {delivery.name!r}"
            self._host.reply(delivery, REPLY_FAILED, failed_reply("UnknownCommand", told))
            return
        window = 0 if delivery.extra is None else delivery.extra.window
        if plan.streams != bool(window):
            kind, told = _STREAMS if plan.streams else _STREAMS_NOT
            self._host.reply(delivery, REPLY_FAILED, failed_reply(kind, told.format(delivery.name)))
            return
        outlet: Outlet | None = None
        token: contextvars.Token[Outlet] | None = None
        if window:
            send = partial(self._host.items, delivery)
            outlet = Outlet(plan.encode_reply, window, self._limits, send)
            token = OUTLET.set(outlet)
        call = self._calls[delivery.identity] = _Call(self._tasks.leading, delivery.deadline_ns, outlet)
        try:
            message = plan.decode(delivery.body) if delivery.message is None else delivery.message
            delivery.runs = plan.handlers[0].name
            context = context_of(delivery, self._host, self._now)
            outcome = await call_handler(plan.handlers[0], message, context)
            if outlet is not None and self._tasks.closing:
                raise asyncio.CancelledError  # it may have been cut short, and is not to look complete
            body = plan.encode_reply(outcome if outlet is None else outlet.count)
            if len(body) > self._limits.event_bytes_max:
                raise ValueError(f"the reply has {len(body):,} bytes, the limit is {self._limits.event_bytes_max:,}")
        except BaseException as error:  # goes back to the caller, with its traceback
            if self._tasks.is_ours(error):
                raise
            absorb(error)
            if outlet is not None:
                outlet.flush()
            if not call.is_cancelled:
                self._host.reply(delivery, REPLY_FAILED, self._failures.reply_to(error))
            elif call.told:
                self._host.reply(delivery, REPLY_FAILED, failed_reply("Cancelled", call.told))
            return
        finally:
            del self._calls[delivery.identity]
            call.end()
            if token is not None:
                OUTLET.reset(token)  # a leader goes on in the clean context only
        if outlet is not None:
            outlet.flush()
        self._host.reply(delivery, REPLY_OK, body)

    def close(self) -> None:
        """No time is left for those that run: nothing more is taken from one that streams."""
        for call in self._calls.values():
            if call.outlet is not None:
                call.outlet.close()

    def cancel(self, session: WorkerSession, seq: int) -> None:
        """Nobody waits for a command any more: end its handler where it runs; where it has not begun, it never does."""
        call = self._calls.get((session.publisher, seq))
        if call is None:
            session.cancel(seq)
        else:
            call.cancel()

    def cancel_all(self, publisher: bytes) -> None:
        """End all handlers of a publisher's commands: it has gone."""
        for identity, call in self._calls.items():
            if identity[0] == publisher:
                call.cancel()

    def cancel_streams(self, publisher: bytes) -> None:
        """End a publisher's streams: it has been silent for long. Should it come back, it hears of it."""
        for identity, call in self._calls.items():
            if identity[0] == publisher and call.outlet is not None:
                call.cancel("its caller was silent for too long")

    def cancel_overdue(self) -> None:
        """End handlers of commands whose callers have given up, by the same deadline, and perhaps could not say so."""
        before = self._now() - _OVERDUE_NS
        for call in self._calls.values():
            if 0 < call.deadline_ns < before:
                call.cancel()

    def allow(self, session: WorkerSession, seq: int, allowed: int) -> None:
        """The reader of a stream takes more."""
        call = self._calls.get((session.publisher, seq))
        if call is not None and call.outlet is not None:
            call.outlet.allow(allowed)


class _Call:
    """A command's handler that runs, in a task that others' handlers run in as well."""

    __slots__ = ("_task", "deadline_ns", "is_cancelled", "outlet", "told")

    def __init__(self, task: asyncio.Task[Any] | None, deadline_ns: int, outlet: Outlet | None) -> None:
        self._task = task
        self.deadline_ns = deadline_ns
        self.outlet = outlet  # where it streams
        self.is_cancelled = False
        self.told = ""  # why, where its caller may still be there

    def cancel(self, told: str = "") -> None:
        """Nobody waits for it any more. Called from outside the task, so while that is suspended in the handler."""
        if not self.is_cancelled and self._task is not None:
            self.is_cancelled = True
            self.told = told
            if self.outlet is not None:
                self.outlet.close()
            self._task.cancel()

    def end(self) -> None:
        """The handler has ended, perhaps in spite of its cancellation: that must not meet the next one."""
        if self.is_cancelled and self._task is not None:
            uncancel(self._task)
