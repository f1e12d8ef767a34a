"""What follows when a message's handlers have ended, for now or for good.

For now: it waits at the head of its lane. For good: first the evidence is written, then the message is finished, or buried,
and then its lane goes on, or is parked. That order is kept here, once; but for events that die at once, which leave no
evidence, are no suspects and park nothing (`Lanes._fast_failed`).
"""

from __future__ import annotations

from shardbus.batch_handlers import Batch, HeldBack, Outcome
from shardbus.failures import CRASHED, parks_its_key
from shardbus.feeds import Feeds
from shardbus.inbound import Delivery, Later
from shardbus.lane_book import LaneBook
from shardbus.lane_host import LaneHost
from shardbus.messages import WireKey
from shardbus.quarantine import Quarantine
from shardbus.store import Failure
from shardbus.trials import Trials


class Outcomes:
    """Settles messages of a shard's lanes."""

    def __init__(
        self, host: LaneHost, book: LaneBook, trials: Trials, quarantine: Quarantine, feeds: Feeds
    ) -> None:
        self._host = host
        self._book = book
        self._trials = trials
        self._quarantine = quarantine
        self._feeds = feeds

    def settle(self, delivery: Delivery, outcome: Failure | Later | None) -> None:
        """A message's handlers have ended, for now or for good."""
        delivery.runs = ""
        if delivery.journalled >= 0:
            self._book.waits_no_more(delivery)
        if self._quarantine.suspects and not (isinstance(outcome, Failure) and outcome.reason == CRASHED):
            self._trials.ended(delivery.identity, for_good=not isinstance(outcome, Later))
        if isinstance(outcome, Later):
            self._book.postpone(delivery, outcome)
            return
        parks = outcome is not None and delivery.key is not None and parks_its_key(delivery, outcome)
        self._conclude(delivery, outcome, parks)
        if parks:
            self._book.park(delivery.key)
            return
        lane = None if delivery.key is None else self._book.busy.get(delivery.key)
        if lane is not None:
            lane.running = None
            self._book.proceed(lane)

    def settle_all(self, batch: Batch, outcomes: list[Outcome]) -> None:
        """Settle the events of a batch, each key's in order; what is held back goes to the head of its lane first."""
        last: dict[WireKey, int] = {}
        held: dict[WireKey, list[Delivery]] = {}
        for at, (member, outcome) in enumerate(zip(batch.members, outcomes, strict=True)):
            if isinstance(outcome, HeldBack):
                self._hold_back(batch, member, outcome)
                held.setdefault(member.key, []).append(member)
            else:
                last[member.key] = at
        for key in last:
            if key is not None:
                lane = self._book.busy[key]
                lane.batch = lane.more = None
                if key in held:
                    self._book.put_back(lane, held[key])
        for at, (member, outcome) in enumerate(zip(batch.members, outcomes, strict=True)):
            if isinstance(outcome, HeldBack):
                continue
            if isinstance(outcome, Later) or member.key is None or last[member.key] == at:
                self.settle(member, outcome)
            else:
                self._conclude(member, outcome, False)

    def _hold_back(self, batch: Batch, member: Delivery, why: HeldBack) -> None:
        """An event comes again, behind another one of its batch."""
        member.attempt += why.ran
        member.message = None  # a handler may have changed what is in it
        if why.apart and member.todo is None:
            member.todo = {batch.plan.handlers[0].name: 0}
        if member.position:
            self._host.amend(member)

    def _conclude(self, delivery: Delivery, outcome: Failure | None, parks: bool) -> None:
        """A message has reached its outcome."""
        self._host.handled(1)
        if (delivery.ordinal or delivery.intended_ns) and delivery.is_event:
            self._host.note(delivery, dead=outcome is not None)
        if outcome is None and self._feeds.index and delivery.is_event:
            headers = None if delivery.extra is None else delivery.extra.headers
            self._feeds.add(delivery.name, delivery.key, delivery.body, headers)
        if delivery.children is not None and delivery.children.pending:
            self._host.defer(delivery, outcome, parks=parks)
        elif outcome is not None:
            self._host.bury(delivery, outcome, parks=parks)
        else:
            if delivery.position or delivery.scheduled:
                self._host.forget(delivery)
            if delivery.session is not None:
                delivery.session.finish(delivery.seq)
                self._host.touched(delivery.session)
