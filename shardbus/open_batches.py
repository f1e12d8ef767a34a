"""Which batch an event of a batch handler joins, and when that begins.

Events gather as their turns come, each keeping its key busy, and those behind it in its lane join the same batch. What goes
together is decided in `batching`; this is that for the events of lanes, with the timers of what lingers. Runs nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable

from shardbus.batch_handlers import Batch, slot_of
from shardbus.batching import Gatherings
from shardbus.inbound import Delivery
from shardbus.lane_book import Lane, LaneBook
from shardbus.quarantine import Quarantine


class OpenBatches(Gatherings[Batch]):
    """Those that gather in a shard, and those that are to depart. Bounded by credit.

    Args:
        clean: in whose copy timers run.
        wake: called when something is to depart.
    """

    def __init__(
        self, quarantine: Quarantine, book: LaneBook, clean: contextvars.Context, wake: Callable[[], None]
    ) -> None:
        super().__init__()
        self._quarantine = quarantine
        self._book = book
        self._clean = clean
        self._wake = wake
        self._lingers = True

    def take(self, delivery: Delivery) -> Batch:
        """Put an event whose turn has come into a batch, with those behind it in its lane that may join; one that is full,
        or that nobody may join, is to run now."""
        lane = None if delivery.key is None else self._book.busy.get(delivery.key)
        if lane is None and delivery.key is not None:
            lane = self._book.open(delivery.key)
        is_alone = self._is_alone(delivery)
        batch = None if is_alone else self.find(slot_of(delivery.plan, delivery))
        if batch is not None:
            batch.members.append(delivery)
        else:
            batch = Batch(delivery.plan, delivery)
            if not is_alone:
                self._begin(batch)
        if lane is not None:
            lane.running, lane.batch = delivery, batch
            while lane.queue and isinstance(head := lane.queue[0], Delivery) and self._joins(lane, head):
                self._book.take(lane)
        self.joined(batch)
        return batch

    def join(self, lane: Lane, delivery: Delivery) -> bool:
        """Let an event that comes behind a busy key join the batch in which all of its lane is; whether it may, and did."""
        if lane.batch is None or lane.queue or lane.stored or not self._joins(lane, delivery):
            return False
        self.joined(lane.batch)
        return True

    def hurry(self) -> None:
        """Let no batch linger from now on."""
        self._lingers = False
        for batch in self.lingering():
            if batch.timer is not None:
                batch.timer.cancel()
            self._lingered(batch)

    def depart(self, gathering: Batch) -> None:
        """It begins now."""
        super().depart(gathering)
        if gathering.timer is not None:
            gathering.timer.cancel()

    def _begin(self, batch: Batch) -> None:
        self.open(batch)
        if batch.policy.linger_s and self._lingers:
            loop = asyncio.get_running_loop()
            batch.timer = loop.call_later(batch.policy.linger_s, self._lingered, batch, context=self._clean)
        else:
            self.due(batch)

    def _lingered(self, batch: Batch) -> None:
        self.due(batch)
        self._wake()

    def _joins(self, lane: Lane, delivery: Delivery) -> bool:
        """Whether an event joins the batch in which those before it in its lane are; then it did."""
        batch = lane.batch
        if (
            batch is None
            or not batch.is_open
            or batch.is_full
            or delivery.plan is not batch.plan
            or not delivery.is_event
            or self._is_alone(delivery)
        ):
            return False
        batch.members.append(delivery)
        if lane.more is None:
            lane.more = []
        lane.more.append(delivery)
        return True

    def _is_alone(self, delivery: Delivery) -> bool:
        """Whether an event is handled by itself: a suspect, and one that has failed, or was there when all had."""
        return delivery.todo is not None or delivery.identity in self._quarantine.suspects
