"""What the lanes of a shard give to its store, and take from it: dead letters, waiting events, scheduled ones.

Owns the positions in lanes, and that an event is finished, as dead or as waiting, only once its row is committed. When and
how rows are written is `store_writer`'s affair; when scheduled events are due is `schedule`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from shardbus.clock import NowNs
from shardbus.envelopes import Envelopes, envelope_of, envelope_of_row, scheduled_event
from shardbus.failures import CRASHED
from shardbus.inbound import Delivery, Inbound
from shardbus.lane_reads import LaneRead
from shardbus.log_throttle import LogThrottle
from shardbus.messages import WireKey, from_wire_key
from shardbus.metrics import Recorder
from shardbus.quarantine import Quarantine
from shardbus.schedule import Schedule
from shardbus.store import ROW_OVERHEAD_BYTES, DeadLetter, Envelope, Failure, LaneHead, WaitingEvent
from shardbus.store_writer import StoreWriter
from shardbus.wire.session import WorkerSession
from shardbus.wording import one_line

log = logging.getLogger("shardbus.shard")


class LaneRows:
    """The rows of one shard's lanes. No call blocks. What is to be written is bounded by what may be unfinished, and
    `can_keep` says whether waiting events find room.

    `touched` hears of each session of which something is finished, `parked` of each key whose dead letter is committed.
    """

    def __init__(
        self,
        epoch: bytes,
        envelopes: Envelopes,
        writer: StoreWriter,
        schedule: Schedule,
        quarantine: Quarantine,
        recorder: Recorder,
        wall: NowNs,
        throttle: LogThrottle,
        *,
        touched: Callable[[WorkerSession], None],
        parked: Callable[[WireKey], None],
    ) -> None:
        self._position = 0
        self._epoch = epoch
        self._envelopes = envelopes
        self._writer = writer
        self._schedule = schedule
        self._quarantine = quarantine
        self._recorder = recorder
        self._wall = wall
        self._throttle = throttle
        self._touched = touched
        self._parked = parked

    def begin(self, position: int) -> None:
        """Put all that is new behind this position."""
        self._position = position

    def new_position(self) -> int:
        """A position behind all others."""
        self._position += 1
        return self._position

    # -- dead letters

    def bury(self, delivery: Delivery, failure: Failure, *, parks: bool = False) -> None:
        """Write a dead letter; finish its event, and tell its parked lane, once that is committed."""
        place = 0
        if parks:
            self._position += not delivery.position
            place = delivery.position or self._position
        letter = self._letter(envelope_of(delivery), failure, delivery.first_ns, place)

        def committed() -> None:
            if failure.reason == CRASHED:
                self._quarantine.clear(delivery.identity)
            if delivery.session is not None:
                self._finish_dead(delivery.session, delivery.seq)
            if parks:
                self._parked(delivery.key)

        row, then = self._instead(delivery, committed)
        self._writer.add_dead(letter, delivery.position, then, begun=row)

    def bury_row(self, inbound: Inbound, failure: Failure) -> None:
        """As `bury`, of the present row of a batch."""
        letter = self._letter(envelope_of_row(inbound), failure, 0, 0)
        self._writer.add_dead(letter, 0, partial(self._finish_dead, inbound.session, letter.envelope.seq))

    def _letter(self, envelope: Envelope, failure: Failure, first_ns: int, position: int) -> DeadLetter:
        """The dead letter of an event that has died now; counted, and told."""
        now_ns = self._wall()
        self._recorder.count("dead")
        self._tell(envelope, failure)
        return DeadLetter(
            envelope=envelope,
            handlers=failure.handlers,
            reason=failure.reason,
            error_type=failure.error_type,
            error=failure.error,
            place=failure.place,
            traceback=failure.traceback,
            first_ns=first_ns or now_ns,
            last_ns=now_ns,
            epoch=self._epoch,
            position=position,
        )

    def _finish_dead(self, session: WorkerSession, seq: int) -> None:
        session.finish_dead(seq)
        self._touched(session)

    def _tell(self, envelope: Envelope, failure: Failure) -> None:
        """Log a dead letter, if it is the first of its kind; one whose handling ends workers always: those are few."""
        line = partial(_line, envelope, failure)
        if failure.reason == CRASHED:
            log.warning("%s", line())
        else:
            self._throttle.warning((failure.reason, failure.handlers, failure.place or envelope.type), line)

    # -- waiting events

    def can_keep(self, deliveries: Sequence[Delivery]) -> bool:
        """Whether the store has room for them, and works."""
        sizes = [len(delivery.body) for delivery in deliveries if not delivery.scheduled]  # else it has one
        return self._writer.has_room(len(sizes), sum(sizes) + ROW_OVERHEAD_BYTES * len(sizes))

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        """Write events as waiting, in order; finish each once that is committed."""
        for delivery in deliveries:
            self._position += 1
            delivery.position = self._position
            row, then = self._instead(delivery, partial(self._finish_waiting, delivery))
            self._writer.add_waiting(self._waiting_event(delivery), then, begun=row)
        self._recorder.count("stored", len(deliveries))

    def keep_late(self, delivery: Delivery, position: int, then: Callable[[], None]) -> None:
        """Write an event as waiting at a position that it was given before others that may be written by now; once that is
        committed, finish it, and call `then`."""

        def committed() -> None:
            self._finish_waiting(delivery)
            then()

        delivery.position = position
        row, then_all = self._instead(delivery, committed)
        self._writer.add_late(self._waiting_event(delivery), then_all, begun=row)
        self._recorder.count("stored")

    def amend(self, delivery: Delivery) -> None:
        """Write what has changed of an event that goes on waiting."""
        self._writer.add_changed(self._waiting_event(delivery))

    def _waiting_event(self, delivery: Delivery) -> WaitingEvent:
        children = delivery.children
        if children is not None and children.pending and children.then is None:
            children.then = partial(self.amend, delivery)  # a successor need not run their handlers again, then
        return self._envelopes.waiting_event(delivery)

    def load(self, key: WireKey, after: int, upto: int, limit: int, then: Callable[[list[Delivery]], None]) -> None:
        """Read waiting events of a key back into memory, those behind `after`, once the one at `upto` is written."""

        def found(rows: list[WaitingEvent]) -> None:
            then([self._envelopes.from_waiting(row) for row in rows])

        self._writer.add_lane_read(LaneRead(LaneHead(key, after, limit), upto, found))

    def forget(self, delivery: Delivery) -> None:
        """Remove a waiting event, or a scheduled one, that was handled."""
        if delivery.position:
            self._writer.add_done(delivery.position)
        else:
            self._schedule.remove(delivery.scheduled)

    def _finish_waiting(self, delivery: Delivery) -> None:
        if delivery.session is not None:
            delivery.session.finish_waiting(delivery.seq)
            self._touched(delivery.session)

    # -- scheduled events

    def put_off(self, delivery: Delivery) -> bool:
        """Write an event that is due later as scheduled; finish it as waiting once that is committed."""
        event = scheduled_event(delivery, self._wall())
        if event is None:
            return False
        self._schedule.add(event, partial(self._finish_waiting, delivery))
        self._recorder.count("stored")
        return True

    def take_due(self) -> Delivery | None:
        """The next scheduled event that is due. Its row stands for it until it has ended, as a publisher does."""
        taken = self._schedule.take()
        if taken is None:
            return None
        found, is_repeat = taken
        return self._envelopes.from_scheduled(found, is_repeat=is_repeat)

    def _instead(self, delivery: Delivery, then: Callable[[], None]) -> tuple[int, Callable[[], None]]:
        """The row of a scheduled event in whose place something is written now (0: none), and what to call once it is."""
        row, delivery.scheduled = delivery.scheduled, 0
        if not row:
            return 0, then
        self._schedule.ended(row)

        def committed() -> None:
            self._schedule.gone(row)
            then()

        return row, committed


def _line(envelope: Envelope, failure: Failure) -> str:
    where = f" in {', '.join(failure.handlers)}" if failure.handlers else ""
    error = f"{failure.error_type}: " if failure.error_type else ""
    key = from_wire_key(envelope.key)
    return f"dead letter: {one_line(envelope.type)} key={key!r} ({failure.reason}{where}): {error}{one_line(failure.error)}"
