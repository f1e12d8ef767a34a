"""Messages as lanes have them and as the store has them: one into the other and back.

Two things differ. Lanes go by the worker's clock, which a successor does not have; rows go by the wall clock. And a row that
was taken over from a worker that died may have run there once more than it says: that is added when the row is read, so that
a take-over need not rewrite it, and taken off when it is written. Reads the clocks, and has no effect.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from msgspec.structs import replace

from shardbus.clock import NowNs
from shardbus.inbound import UNKNOWN, Delivery, Inbound
from shardbus.registry import Plan
from shardbus.routing import slot_of
from shardbus.store import Envelope, ScheduledEvent, StoredDeadLetter, StoredScheduled, WaitingEvent
from shardbus.wire.codec import Extra


def envelope_of(delivery: Delivery) -> Envelope:
    """A message with the attempt that it is at."""
    return Envelope(
        publisher=delivery.publisher,
        seq=delivery.seq,
        slot=slot_of(delivery.key),
        type=delivery.name,
        key=delivery.key,
        body=delivery.body,
        headers=delivery.extra.headers if delivery.extra is not None and delivery.extra.headers else None,
        ordinal=delivery.ordinal,
        intended_ns=delivery.intended_ns,
        attempt=delivery.attempt,
    )


def envelope_of_row(inbound: Inbound) -> Envelope:
    """That of the present row of a batch, which carries no stamps: `envelope_of` its delivery, without making that one,
    because a flood of dead letters has one each.
    """
    seq = inbound.next_seq - 1
    at = seq - inbound.first
    columns = inbound.columns
    key = columns.keys[at]
    extra = columns.extras.get(at)
    return Envelope(
        publisher=inbound.session.publisher,
        seq=seq,
        slot=slot_of(key),
        type=columns.name_at(at),
        key=key,
        body=columns.apart()[at],
        headers=extra.headers if extra is not None and extra.headers else None,
        ordinal=0,
        intended_ns=0,
        attempt=inbound.attempt,
    )


def scheduled_event(delivery: Delivery, wall_ns: int) -> ScheduledEvent | None:
    """An event that is due later; None: it is due, or has no time, or is a command."""
    extra = delivery.extra
    if extra is None or extra.timeout_ns or extra.due_ns <= wall_ns:
        return None
    return ScheduledEvent(envelope=envelope_of(delivery), due_ns=extra.due_ns)


class Envelopes:
    """Translates for one shard: by its plans, its clocks, and the take-overs of its store.

    `takeovers` are the positions up to which rows were there at each, in ascending order; to be set before anything is read.
    """

    def __init__(self, plans: Mapping[str, Plan], now: NowNs, wall: NowNs) -> None:
        self.takeovers: tuple[int, ...] = ()
        self._plans = plans
        self._now = now
        self._wall = wall

    # -- into the store

    def waiting_event(self, delivery: Delivery) -> WaitingEvent:
        """An event that waits at its position. Handlers whose children are not finished are among those that are to run:
        what they have published may end with this worker."""
        due_ns, deadline_ns = delivery.due_ns, delivery.deadline_ns
        todo = delivery.todo or {}
        if todo and delivery.children is not None:
            todo = {**dict.fromkeys(delivery.children.pending, 0), **todo}
        return WaitingEvent(
            position=delivery.position,
            envelope=self._without_inherited(envelope_of(delivery), delivery.attempt, delivery.position),
            todo=todo,
            gave_up=delivery.gave_up,
            due_ns=due_ns - self._now() + self._wall() if due_ns else 0,
            deadline_ns=deadline_ns - self._now() + self._wall() if deadline_ns else 0,
            first_ns=delivery.first_ns,
        )

    def revived(self, dead: StoredDeadLetter, new_position: int) -> WaitingEvent:
        """A dead letter as an event that waits for its next attempt, where it parked its lane, else at a new position."""
        letter = dead.letter
        return WaitingEvent(
            position=letter.position or new_position,
            envelope=self._without_inherited(letter.envelope, letter.envelope.attempt + 1, letter.position),
            todo=dict.fromkeys(letter.handlers, 0),
            first_ns=letter.first_ns,
        )

    # -- out of the store

    def from_waiting(self, row: WaitingEvent) -> Delivery:
        """A waiting event that is to go on."""
        delivery = self._from_envelope(row.envelope, self._inherited(row.position))
        delivery.position = row.position
        delivery.deadline_ns = self.by_our_clock(row.deadline_ns)
        delivery.due_ns = self.by_our_clock(row.due_ns)
        delivery.todo = row.todo or None
        delivery.gave_up = row.gave_up
        delivery.first_ns = row.first_ns
        return delivery

    def from_scheduled(self, found: StoredScheduled, *, is_repeat: bool) -> Delivery:
        """A scheduled event that is due; `is_repeat`: it may have begun before."""
        delivery = self._from_envelope(found.event.envelope, int(is_repeat))
        delivery.scheduled = found.row
        return delivery

    def by_our_clock(self, wall_ns: int) -> int:
        """An instant of the wall clock by the worker's own; 0 is none."""
        return wall_ns - self._wall() + self._now() if wall_ns else 0

    def _from_envelope(self, envelope: Envelope, inherited: int) -> Delivery:
        """A message that may have run in so many predecessors since its attempts were written."""
        return Delivery(
            None,
            envelope.publisher,
            envelope.seq,
            envelope.type,
            self._plans.get(envelope.type, UNKNOWN),
            envelope.key,
            envelope.body,
            envelope.ordinal,
            envelope.intended_ns,
            envelope.attempt + inherited,
            Extra(0, envelope.headers, 0, False) if envelope.headers else None,
        )

    # -- attempts

    def _inherited(self, position: int) -> int:
        """How often a waiting row was taken over, and so may have been delivered once more."""
        return len(self.takeovers) - bisect_left(self.takeovers, position) if self.takeovers and position else 0

    def _without_inherited(self, envelope: Envelope, attempt: int, position: int) -> Envelope:
        """An event that is to wait at a position, without what is added when that is read."""
        attempt -= self._inherited(position)
        return envelope if attempt == envelope.attempt else replace(envelope, attempt=attempt)
