"""What a shard does with what its predecessor has left: how that died, and what waits in its store.

Owns what is concluded from the death, once, and how far the lanes of what waits have come. Where the store fails, all may be
called again, and goes on from there.
"""

from __future__ import annotations

import logging
from typing import Final

from shardbus.clock import NowNs
from shardbus.envelopes import Envelopes
from shardbus.journal import Journal
from shardbus.lanes import Lanes
from shardbus.quarantine import Ended, Quarantine, Suspect, judge, told_after
from shardbus.store import Store, StoreCounts, WaitingLane

log = logging.getLogger("shardbus.shard")

_PAGE_LANES: Final = 1024  # that are adopted between two turns of the event loop


class Adoption:
    """A successor's start. `judge`, then `take_over`, then `adopt`, before anything new is taken.

    `journal` shows what the predecessor was running, and `predecessor` how that ended.
    """

    def __init__(
        self,
        journal: Journal,
        predecessor: Ended,
        quarantine: Quarantine,
        store: Store,
        lanes: Lanes,
        envelopes: Envelopes,
        now: NowNs,
    ) -> None:
        self._journal = journal
        self._predecessor = predecessor
        self._quarantine = quarantine
        self._store = store
        self._lanes = lanes
        self._envelopes = envelopes
        self._now = now
        self._judged = False
        self._taken_over = False
        self._last_parked = 0  # how far the lanes have come
        self._last_lane: WaitingLane | None = None

    def judge(self) -> None:
        """Conclude what the predecessor's death says, and begin the journal anew."""
        if self._judged:
            return
        self._judged = True
        scene, ended = self._journal.scene(), self._predecessor
        suspects = judge(scene, ended)
        self._journal.start_over(suspects)
        self._quarantine.adopt(suspects, self._now(), solos=ended.how != "killed")
        convicted = self._quarantine.convicted
        self._journal.tell(len(suspects) - convicted, convicted)
        if any(one.died != scene.suspects.get(identity, Suspect()).died for identity, one in suspects.items()):
            log.warning("a worker has ended (%s): %s", ended.told, told_after(len(suspects) - convicted, convicted))

    async def take_over(self, counts: StoreCounts) -> int:
        """Take the rows over, so that attempts of what may have run go on; return the position behind which new rows come.

        Raises:
            StoreError: the store cannot do that.
        """
        if not self._taken_over:
            if counts.dead + counts.waiting:
                self._envelopes.takeovers = await self._store.take_over()
            self._taken_over = True
        # New rows come behind all that were ever taken over, also where the last of those have gone.
        return max(counts.position_max, *self._envelopes.takeovers, 0)

    async def adopt(self, counts: StoreCounts) -> None:
        """Make lanes of what waits, page by page, so that the event loop turns; goes on where it failed.

        Raises:
            StoreError: the store cannot be read.
        """
        if counts.parked:
            await self._adopt_parked()
        if counts.waiting > counts.scheduled:
            await self._adopt_waiting()

    async def _adopt_parked(self) -> None:
        while page := await self._store.parked_keys(self._last_parked, _PAGE_LANES):
            for parked in page:
                self._lanes.adopt(parked.key, 0, parked=True)
            self._last_parked = page[-1].position

    async def _adopt_waiting(self) -> None:
        """Of keys whose events wait; those that are parked have a lane already."""
        while page := await self._store.waiting_lanes(self._last_lane, _PAGE_LANES):
            for lane in page:
                # Those without a key have no order, so none waits for the first.
                due_ns = 0 if lane.key is None else self._envelopes.by_our_clock(lane.due_ns)
                self._lanes.adopt(lane.key, lane.count, due_ns)
            self._last_lane = page[-1]
