"""Calls a batch handler, once, and says what became of each event.

Of the events of one key, in their order: those up to the first that is to be called again have their outcomes, that one
waits, and those behind it are held back: whatever the handler said of them, they are neither handled nor have they failed.
A handler that raises does not say which event it was: all are called again, each by itself, so that one which cannot be
handled costs the others no more than that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from shardbus.batching import Gathering, KeyOrder, outcomes_of
from shardbus.breaker import Admitted, Blocked, Circuit
from shardbus.context import Context
from shardbus.event_handlers import EventHandlers
from shardbus.failures import parks_its_key
from shardbus.handler_calls import call_handler
from shardbus.inbound import Delivery, Inbound, Later
from shardbus.registry import Plan, Registered
from shardbus.store import Failure


class HeldBack(msgspec.Struct, frozen=True):
    """It comes again, behind an event of its key. The handler was called with it (`ran`), and raised (`apart`)."""

    ran: bool
    apart: bool


Outcome = Failure | Later | HeldBack | None

_NOT_RUN: Final = HeldBack(ran=False, apart=False)


class Batch(Gathering[Delivery]):
    """Events of one type that are handled together, and their rows in the journal while they are."""

    __slots__ = ("plan", "rows", "timer")

    def __init__(self, plan: Plan, first: Delivery) -> None:
        policy = plan.batching
        assert policy is not None
        super().__init__(policy, slot_of(plan, first), [first])
        self.plan = plan
        self.rows: list[int] = []
        self.timer: asyncio.TimerHandle | None = None  # armed while it lingers

    def stretches(self) -> Iterator[tuple[bytes, int, int]]:
        """Its events as stretches of sequences: publisher, first, and the one behind the last."""
        publisher, first, end = b"", 0, 0
        for member in self.members:
            if member.seq == end and member.publisher == publisher:
                end += 1
                continue
            if end > first:
                yield publisher, first, end
            publisher, first, end = member.publisher, member.seq, member.seq + 1
        yield publisher, first, end


class Together:
    """A stretch of a publisher's batch, handled as it came: its events are taken apart only where they need it."""

    __slots__ = ("apart", "cursor", "end", "first", "plan")

    def __init__(self, plan: Plan, cursor: Inbound, first: int, end: int) -> None:
        self.plan = plan
        self.cursor = cursor
        self.first = first
        self.end = end
        self.apart: Batch | None = None


def slot_of(plan: Plan, delivery: Delivery) -> tuple[str, Any]:
    """What an event must have in common with those that it joins."""
    policy = plan.batching
    return plan.name, (delivery.key,) if policy is not None and policy.by_key else None


class Fault(msgspec.Struct, frozen=True):
    """What an event, or the whole call, failed with."""

    error: BaseException
    reason: str


async def run_batch(batch: Batch, handlers: EventHandlers) -> list[Outcome]:
    """Call the handler with those members that it may be called with, and return each member's outcome."""
    members, plan = batch.members, batch.plan
    handler = plan.handlers[0]
    circuit = plan.circuits.get(handler.name)
    found: list[Failure | HeldBack | Fault | None] = [None] * len(members)
    called: list[int] = []
    contexts: list[Context] = []
    with_context = handler.wants_context or handler.where is not None
    beside = frozenset(member.key for member in members) if with_context else frozenset()
    order = KeyOrder()
    for at, member in enumerate(members):
        if order.holds(member.key):
            found[at] = _NOT_RUN
            continue
        failure = handlers.unfit(member)
        if failure is not None:
            found[at] = failure
            if parks_its_key(member, failure):
                order.wait(member.key)
            continue
        if with_context:
            context = handlers.context_in_batch(member, beside)
            if handler.where is not None:
                try:
                    if not handler.where(member.message, context):
                        continue
                except BaseException as error:  # the application's
                    found[at] = Fault(error, "failed")
                    order.wait(member.key)
                    continue
            contexts.append(context)
        called.append(at)
    whole: Fault | Blocked | None = None
    if called:
        running = [members[at] for at in called]
        for member in running:
            member.runs = handler.name
        try:
            events = [member.message for member in running]
            whole = await call_together(handler, circuit, events, contexts, called, found, handlers)
        finally:
            for member in running:
                member.runs = ""
    return list(settled(batch, handler, circuit, found, set(called), whole, handlers))


async def call_together(
    handler: Registered,
    circuit: Circuit | None,
    events: list[Any],
    contexts: list[Context],
    called: Sequence[int],
    found: list[Failure | HeldBack | Fault | None],
    handlers: EventHandlers,
) -> Fault | Blocked | None:
    """Call it, and write into `found` what it says of each; or return why that is the same for all."""
    term = 0
    if circuit is not None:
        match circuit.admit(handlers.now()):
            case Admitted(term=term):
                pass
            case Blocked() as blocked:
                return blocked
    try:
        returned = await call_handler(handler, events, contexts)
        outcomes = outcomes_of(returned, len(called), handler.name)
    except BaseException as error:  # the handler's
        reason = handlers.reason_of(error)
        if reason is None:
            if circuit is not None:
                circuit.abandoned(term)
            raise
        if circuit is not None:
            circuit.failed(term, handlers.now())
        return Fault(error, reason)
    some = False
    for at, outcome in zip(called, outcomes, strict=True):
        if outcome is None:
            some = True
        else:
            found[at] = Fault(outcome, "failed")
    if circuit is not None:
        if some:
            circuit.succeeded(term)
        else:  # a handler that handles nothing has failed, though it says so politely
            circuit.failed(term, handlers.now())
    return None


def settled(
    batch: Batch,
    handler: Registered,
    circuit: Circuit | None,
    found: list[Failure | HeldBack | Fault | None],
    called: set[int],
    whole: Fault | Blocked | None,
    handlers: EventHandlers,
) -> Iterator[Outcome]:
    """Each member's outcome, in their order."""
    order = KeyOrder()
    ran = not isinstance(whole, Blocked)
    held = HeldBack(ran=ran, apart=ran and whole is not None)
    for at, member in enumerate(batch.members):
        one = found[at]
        outcome: Outcome
        if order.holds(member.key):
            outcome = held if at in called else _NOT_RUN
        elif at in called and isinstance(whole, Blocked):
            assert circuit is not None
            outcome = handlers.blocked(member, handler, circuit, whole.delay_s)
        elif at in called and isinstance(whole, Fault):
            outcome = handlers.failed(member, handler, whole.error, whole.reason, with_others=len(called) > 1)
        elif isinstance(one, Fault):
            outcome = handlers.failed(member, handler, one.error, one.reason)
        else:
            outcome = one
        if outcome is not None and not (isinstance(outcome, Failure) and not parks_its_key(member, outcome)):
            order.wait(member.key)
        yield outcome
