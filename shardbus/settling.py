"""Messages whose handlers have ended, and whose children are not finished: each is settled when they are.

Owns when such a message goes to the store, and the timer that looks at those that wait in memory; which of them go first is
decided in `deferral`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from shardbus.clock import NowNs
from shardbus.config import Limits
from shardbus.deferral import Deferrals, Deferred
from shardbus.inbound import Delivery
from shardbus.lane_rows import LaneRows
from shardbus.messages import WireKey
from shardbus.outgoing import Outgoing, is_worker
from shardbus.schedule import Schedule
from shardbus.store import Failure
from shardbus.wire.session import WorkerSession

_NS: Final = 1_000_000_000


class Settling:
    """What waits for its children in one shard. Bounded by those, which the worker's client bounds; what is more than half
    of a publisher's `credit`, or waits for long, goes to the store.

    `touched` hears of each session of which something is finished, `parked` of each key whose failed event is in the store.
    """

    def __init__(
        self,
        epoch: bytes,
        rows: LaneRows,
        schedule: Schedule,
        outgoing: Outgoing | None,
        limits: Limits,
        now: NowNs,
        *,
        credit: Callable[[], tuple[int, int]],
        touched: Callable[[WorkerSession], None],
        parked: Callable[[WireKey], None],
    ) -> None:
        self._epoch = epoch
        self._rows = rows
        self._schedule = schedule
        self._outgoing = outgoing
        self._limits = limits
        self._now = now
        self._credit = credit
        self._touched = touched
        self._parked = parked
        self._deferred = Deferrals()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._deferred)

    @property
    def in_memory(self) -> int:
        """How many the store does not have, and is not about to."""
        return self._deferred.in_memory

    def close(self) -> None:
        """Let no timer ring any more."""
        if self._timer is not None:
            self._timer.cancel()

    def defer(self, delivery: Delivery, failure: Failure | None, *, parks: bool) -> None:
        """Settle a message when its children are finished.

        One that failed goes to the store at once, and stands there as waiting until it is a dead letter: events of its key
        may be among its children, and where it parks they can be kept only once it is.
        """
        children, session = delivery.children, delivery.session
        assert children is not None  # else it were not tied
        if delivery.scheduled:
            self._schedule.ended(delivery.scheduled)
        delivery.deadline_ns = 0
        of_worker = session is not None and is_worker(session.publisher, self._epoch)
        one = Deferred(delivery, failure, parks, self._rows.new_position(), of_worker, self._now())
        children.then = partial(self._untied, one)
        if not delivery.position:
            # A successor is to run those whose children it does not know, and to conclude the same of the others.
            delivery.todo = dict.fromkeys(children.pending, 0)
            delivery.gave_up = tuple(gave for gave in delivery.gave_up if children.pending.keys().isdisjoint(gave.handlers))
            delivery.due_ns = 0
        self._deferred.add(one)
        if delivery.position:
            self._deferred.stored(one)  # with the handlers that ran now, if not with more
            one.is_written = True
            if parks:
                asyncio.get_running_loop().call_soon(self._parked, delivery.key)
        elif failure is not None:
            self._store(one)
        self._make_room(of_worker)
        self._watch()

    # -- into the store

    def store_all(self) -> None:
        """Let all wait in the store that it has room for: this worker ends soon."""
        for one in list(self._deferred.overdue(self._now(), 0)):
            self._store(one)

    def _make_room(self, of_worker: bool) -> None:
        events_max, bytes_max = self._credit()
        while self._deferred.are_many(of_worker, events_max // 2, bytes_max // 2):
            if not self._may_store(of_worker) or not self._store(self._deferred.oldest(of_worker)):
                break

    def _watch(self) -> None:
        if self._timer is None and self._deferred.in_memory:
            every_s = self._limits.lane_wait_s_max / 4
            self._timer = asyncio.get_running_loop().call_later(every_s, self._look)

    def _look(self) -> None:
        self._timer = None
        wait_ns = int(self._limits.lane_wait_s_max * _NS)
        may_store = {of_worker: self._may_store(of_worker) for of_worker in (True, False)}
        for one in list(self._deferred.overdue(self._now(), wait_ns)):
            if (one.failure is not None or may_store[one.of_worker]) and not self._store(one):
                break
        self._watch()

    def _may_store(self, of_worker: bool) -> bool:
        """Publishers other than workers are held up where handlers publish more than is taken; see `deferral`."""
        return of_worker or self._outgoing is None or self._outgoing.has_room()

    def _store(self, one: Deferred) -> bool:
        """Let a message wait for its children in the store; False where that has no room. A command is finished: none runs
        twice, so nothing is lost with it."""
        delivery = one.delivery
        if not delivery.is_event:
            self._deferred.stored(one)
            one.is_written = True
            self._finish(delivery)
            return True
        if not self._rows.can_keep((delivery,)):
            return False
        self._deferred.stored(one)
        self._rows.keep_late(delivery, one.place, partial(self._stored, one))
        return True

    def _stored(self, one: Deferred) -> None:
        one.is_written = True
        if one.is_untied:
            self._settle(one)
        elif one.parks:
            self._parked(one.delivery.key)

    # -- settled

    def _untied(self, one: Deferred) -> None:
        """The children of a message are finished."""
        one.is_untied = True
        if one.is_written or not one.is_stored:
            self._settle(one)
        elif one.failure is None:
            self._finish(one.delivery)  # its row goes once it is there

    def _settle(self, one: Deferred) -> None:
        delivery = one.delivery
        self._deferred.remove(one)
        if one.failure is not None:
            self._rows.bury(delivery, one.failure, parks=one.parks)
            return
        if delivery.position or delivery.scheduled:
            self._rows.forget(delivery)
        self._finish(delivery)

    def _finish(self, delivery: Delivery) -> None:
        if delivery.session is not None:
            delivery.session.finish(delivery.seq)
            self._touched(delivery.session)
