"""Runs the handlers of one event, in their order, and says what becomes of it.

Each that fails is called again as its own policy says. What that comes to for the event is one value: handled, later, or a
failure. Knows nothing of lanes, leaders or the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from shardbus.breaker import Admitted, Blocked, Circuit
from shardbus.clock import NowNs
from shardbus.context import BatchContext, Context
from shardbus.failures import Failures, HandlerTimeout, circuit_open, expired, together, undecodable, unknown_type
from shardbus.handler_calls import HandlerTasks, absorb, call_handler, context_of
from shardbus.inbound import UNKNOWN, Delivery, Later
from shardbus.lane_host import LaneHost
from shardbus.messages import WireKey
from shardbus.registry import Registered
from shardbus.retry import GiveUp, RetryIn
from shardbus.store import Failure


class EventHandlers:
    """The handlers of a shard's events. What they run in is the caller's task."""

    def __init__(
        self, host: LaneHost, tasks: HandlerTasks, failures: Failures, now: NowNs, chance: Callable[[], float]
    ) -> None:
        self.now = now
        self._host = host
        self._tasks = tasks
        self._failures = failures
        self._chance = chance

    async def run(self, delivery: Delivery) -> Failure | Later | None:
        """Run those handlers of an event that it has left."""
        plan = delivery.plan
        if plan is UNKNOWN or plan.is_command:
            return unknown_type(delivery)
        failure = self.unfit(delivery)
        if failure is not None:
            return failure
        message = delivery.message
        context = context_of(delivery, self._host, self.now)
        round_ = _Round(delivery)
        todo = delivery.todo
        if todo is not None and not any(handler.name in todo for handler in plan.handlers):
            todo = None  # the application has other handlers by now
        if delivery.intended_ns:
            delivery.began_ns = self.now()
        for handler in plan.handlers:
            if self._tasks.disowned:
                return None  # to whoever ends this copy
            if self._tasks.closing:  # the one before did not let itself be cancelled
                raise asyncio.CancelledError
            if todo is None or handler.name in todo:
                delivery.runs = handler.name
                await self._run_handler(handler, plan.circuits.get(handler.name), round_, message, context)
        outcome = round_.outcome(delivery)
        if plan.concludes and not isinstance(outcome, Later):
            await self.conclude(delivery)
        return outcome

    def unfit(self, delivery: Delivery) -> Failure | None:
        """Why no handler can be called with an event; None: its message is decoded."""
        if delivery.deadline_ns and self.now() >= delivery.deadline_ns:
            return expired(delivery)
        if delivery.message is None:
            try:
                delivery.message = delivery.plan.decode(delivery.body)
            except BaseException as error:  # whatever a message's own checks raise
                return undecodable(error)
        return None

    async def conclude(self, delivery: Delivery) -> None:
        """All handlers of an event have ended, for good: tell the host, whose own part may run code of the application."""
        if self._tasks.disowned:
            return
        if self._tasks.closing:  # as above: what it runs takes its time
            raise asyncio.CancelledError
        delivery.runs = ""
        try:
            await self._host.concluded(delivery)
        except BaseException as error:  # the application's
            if self._tasks.is_ours(error):
                raise
            absorb(error)
            self._host.conclusion_failed(delivery, error)

    async def _run_handler(
        self, handler: Registered, circuit: Circuit | None, round_: _Round, message: Any, context: Context
    ) -> None:
        """Call a handler, where it is concerned and its circuit lets it be called, and note what became of it."""
        if handler.where is not None:
            try:
                if not handler.where(message, context):
                    return
            except BaseException as error:  # the application's
                round_.ran = True
                self._failed(round_, handler, error, "failed")
                return
        term = 0
        if circuit is not None:
            match circuit.admit(self.now()):
                case Admitted(term=term):
                    pass
                case Blocked(delay_s=delay_s):
                    self._blocked(round_, handler, circuit, delay_s)
                    return
        round_.ran = True
        try:
            await call_handler(handler, message, context)
        except BaseException as error:  # the handler's
            reason = self.reason_of(error)
            if reason is None:
                if circuit is not None:
                    circuit.abandoned(term)
                raise
            if circuit is not None:
                circuit.failed(term, self.now())
            self._failed(round_, handler, error, reason)
        else:
            if circuit is not None:
                circuit.succeeded(term)

    def _failed(self, round_: _Round, handler: Registered, error: BaseException, reason: str) -> None:
        failures = round_.failures_before(handler) + 1
        match handler.retry.decide(failures, error, self._chance()):
            case RetryIn(delay_s=delay_s):
                round_.again(handler, failures, delay_s)
            case GiveUp():
                round_.gave_up.append(self._failures.of_handler(handler.name, error, reason))

    def _blocked(self, round_: _Round, handler: Registered, circuit: Circuit, delay_s: float) -> None:
        if circuit.policy.while_open == "wait":
            # Not all of a handler's lanes at one instant.
            round_.again(handler, round_.failures_before(handler), delay_s + self._chance() * min(1.0, delay_s))
        else:
            round_.gave_up.append(circuit_open(handler.name, circuit.state.value))

    # What is asked of an event whose one handler is called elsewhere.

    def context_in_batch(self, delivery: Delivery, beside: frozenset[WireKey]) -> Context:
        """What a batch handler may know of one of its events; `beside`: the keys of the batch."""
        return context_of(delivery, self._host, self.now, partial(BatchContext, beside))

    def reason_of(self, error: BaseException) -> str | None:
        """Why a dead letter is one that is dead of this; None: the worker ends, and it is no failure."""
        if self._tasks.is_ours(error):
            return None
        absorb(error)
        return "timeout" if issubclass(type(error), HandlerTimeout) else "failed"

    def failed(
        self, delivery: Delivery, handler: Registered, error: BaseException, reason: str, *, with_others: bool = False
    ) -> Failure | Later:
        """The one handler of an event has failed with it: what follows.

        With others beside it in a batch, what is not retried may be another's error, so it is called alone; unless it is
        never to be called again.
        """
        round_ = _Round(delivery)
        round_.ran = True
        if with_others and self._gives_up(round_, handler, error):
            round_.again(handler, round_.failures_before(handler), 0.0)
        else:
            self._failed(round_, handler, error, reason)
        outcome = round_.outcome(delivery)
        assert outcome is not None  # it gave up, or is to be called again
        return outcome

    @staticmethod
    def _gives_up(round_: _Round, handler: Registered, error: BaseException) -> bool:
        """Whether a handler that may be called several times is not to be called again for this error."""
        retry = handler.retry
        return retry.attempts > 1 and isinstance(retry.decide(round_.failures_before(handler) + 1, error, 0.0), GiveUp)

    def blocked(self, delivery: Delivery, handler: Registered, circuit: Circuit, delay_s: float) -> Failure | Later:
        """A batch handler's circuit is open; that is no reason to handle this event by itself later."""
        todo, round_ = delivery.todo, _Round(delivery)
        self._blocked(round_, handler, circuit, delay_s)
        outcome = round_.outcome(delivery)
        delivery.todo = todo
        assert outcome is not None
        return outcome


class _Round:
    """One pass over the handlers of an event: who is to be called again and when, and who gave up."""

    __slots__ = ("_before", "_delay_s", "_todo", "gave_up", "ran")

    def __init__(self, delivery: Delivery) -> None:
        self._before = delivery.todo or {}
        self._todo: dict[str, int] = {}
        self._delay_s = 0.0  # the longest that one of them asks for: then all of them run
        self.gave_up: list[Failure] = []
        self.ran = False

    def failures_before(self, handler: Registered) -> int:
        return self._before.get(handler.name, 0)

    def again(self, handler: Registered, failures: int, delay_s: float) -> None:
        self._todo[handler.name] = failures
        self._delay_s = max(self._delay_s, delay_s)

    def outcome(self, delivery: Delivery) -> Failure | Later | None:
        """What it comes to; the event remembers who is to be called again, and who gave up."""
        delivery.gave_up = (*delivery.gave_up, *self.gave_up)
        if self._todo:
            delivery.todo = self._todo
            return Later(self._delay_s, self.ran)
        return together(delivery.gave_up) if delivery.gave_up else None
