"""The store in memory, the same port as the real one.

`MemoryRows` is what outlives a store, so that a simulated restart can hand it to the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from msgspec.structs import replace

from shardbus.messages import WireKey
from shardbus.store import (
    ANY_SIZE,
    REMOVED_MAX,
    TAKEOVERS_MAX,
    DeadFilter,
    DeadLetter,
    LaneHead,
    ParkedKey,
    ScheduledEvent,
    ScheduleState,
    StoreCounts,
    StoredDeadLetter,
    StoredScheduled,
    StoreError,
    WaitingEvent,
    WaitingLane,
    fitting,
    fitting_lanes,
    row_bytes,
    traceback_bytes,
)


class MemoryRows:
    """The committed rows of a `MemoryStore`."""

    def __init__(self) -> None:
        self.dead: dict[tuple[bytes, int], DeadLetter] = {}
        self.rows: dict[tuple[bytes, int], int] = {}  # of dead letters
        self.waiting: dict[int, WaitingEvent] = {}
        self.scheduled: dict[int, ScheduledEvent] = {}  # by row
        self.row_max = 0
        self.scheduled_row_max = 0
        self.begun_until_ns = 0
        self.redriven = 0
        self.purged = 0
        self.dropped = 0
        self.removed: list[tuple[bytes, int, bool]] = []  # publisher, sequence, and whether it was dead
        self.takeovers: tuple[int, ...] = ()
        self.is_at_rest = False


class MemoryStore:
    """A shard's store as plain dictionaries; implements `store.Store`.

    Args:
        rows: what a predecessor left; default: nothing.
    """

    def __init__(self, rows: MemoryRows | None = None) -> None:
        self.rows = MemoryRows() if rows is None else rows
        self.failing = ""
        """Set it to have every write raise `StoreError` with this text."""
        self.dead = False
        """Set it when its process dies: nothing is written any more, and no write returns."""

    async def open(self) -> StoreCounts:
        """See `Store.open`."""
        return self.counts()

    def counts(self) -> StoreCounts:
        """See `Store.counts`."""
        rows = self.rows
        dead = waiting = droppable = position_max = parked = 0
        for letter in rows.dead.values():
            size = row_bytes(letter.envelope)
            dead += size
            if letter.position:
                parked += 1
                position_max = max(position_max, letter.position)
            else:
                droppable += size
        places = {letter.place: len(letter.traceback) for letter in rows.dead.values() if letter.traceback}
        tracebacks = sum(map(traceback_bytes, places.values()))
        for row in rows.waiting.values():
            waiting += row_bytes(row.envelope)
        for scheduled in rows.scheduled.values():
            waiting += row_bytes(scheduled.envelope)
        return StoreCounts(
            dead=len(rows.dead),
            waiting=len(rows.waiting) + len(rows.scheduled),
            scheduled=len(rows.scheduled),
            position_max=max(position_max, max(rows.waiting, default=0)),
            parked=parked,
            removed=len(rows.removed),
            redriven=rows.redriven,
            purged=rows.purged,
            dropped=rows.dropped,
            bytes=dead + waiting + tracebacks,
            droppable_bytes=droppable + tracebacks,
        )

    async def close(self) -> None:
        """See `Store.close`."""

    async def write(
        self,
        *,
        dead: Sequence[DeadLetter] = (),
        waiting: Sequence[WaitingEvent] = (),
        changed: Sequence[WaitingEvent] = (),
        done: Sequence[int] = (),
        redriven: Sequence[int] = (),
        scheduled: Sequence[ScheduledEvent] = (),
        begun: Sequence[int] = (),
        begun_until_ns: int = 0,
    ) -> None:
        """See `Store.write`."""
        await self._may_write()
        known = self.rows.waiting.keys()
        if len({row.position for row in waiting} - known) != len(waiting):
            raise StoreError("a position is taken")
        for letter in dead:
            identity = (letter.envelope.publisher, letter.envelope.seq)
            before = self.rows.dead.get(identity)
            if before is not None:
                letter = replace(letter, first_ns=before.first_ns)
            else:
                self.rows.row_max += 1
                self.rows.rows[identity] = self.rows.row_max
            self.rows.dead[identity] = letter
        for row in waiting:
            self.rows.waiting[row.position] = row
        for row in changed:
            if row.position in self.rows.waiting:
                self.rows.waiting[row.position] = row
        for position in done:
            self.rows.waiting.pop(position, None)
        self.rows.redriven += self._remove_dead(redriven)
        for event in scheduled:
            self.rows.scheduled_row_max += 1
            self.rows.scheduled[self.rows.scheduled_row_max] = event
        for at in begun:
            self.rows.scheduled.pop(at, None)
        self.rows.begun_until_ns = begun_until_ns or self.rows.begun_until_ns

    async def take_over(self) -> tuple[int, ...]:
        """See `Store.take_over`."""
        await self._may_write()
        rows = self.rows
        positions = [*rows.waiting, *(letter.position for letter in rows.dead.values() if letter.position)]
        if not rows.is_at_rest:
            rows.takeovers = (*rows.takeovers, self.counts().position_max)
        lowest = min(positions, default=2**63)
        rows.takeovers = tuple(sorted(at for at in rows.takeovers if at >= lowest))[-TAKEOVERS_MAX:]
        rows.is_at_rest = False
        return rows.takeovers

    async def rest(self) -> None:
        """See `Store.rest`."""
        self.rows.is_at_rest = self.rows.is_at_rest or not (self.dead or self.failing)

    async def waiting_lanes(self, after: WaitingLane | None, limit: int) -> list[WaitingLane]:
        """See `Store.waiting_lanes`."""
        lanes: dict[WireKey, WaitingLane] = {}
        for _, row in sorted(self.rows.waiting.items()):
            key = row.envelope.key
            lane = lanes.get(key) or WaitingLane(key=key, count=0, due_ns=row.due_ns)
            lanes[key] = replace(lane, count=lane.count + 1)
        found = list(lanes.values())  # by their lowest position
        start = 0 if after is None else next(at for at, lane in enumerate(found, 1) if lane.key == after.key)
        return found[start : start + limit]

    async def parked_keys(self, after: int, limit: int) -> list[ParkedKey]:
        """See `Store.parked_keys`."""
        parking = {letter.position: letter.envelope.key for letter in self.rows.dead.values()}
        return [ParkedKey(parking[at], at) for at in sorted(parking) if at > after][:limit]

    async def load_waiting(self, lanes: Sequence[LaneHead], bytes_max: int = ANY_SIZE) -> list[list[WaitingEvent]]:
        """See `Store.load_waiting`."""
        by_key: dict[WireKey, list[WaitingEvent]] = {lane.key: [] for lane in lanes}
        for _, row in sorted(self.rows.waiting.items()):
            if row.envelope.key in by_key:
                by_key[row.envelope.key].append(row)
        found = [[row for row in by_key[lane.key] if row.position > lane.after][: lane.limit] for lane in lanes]
        return fitting_lanes(found, lambda row: len(row.envelope.body), bytes_max)

    async def outcomes(self, publisher: bytes, first: int) -> tuple[list[int], list[int]]:
        """See `Store.outcomes`."""
        dead = {seq for owner, seq in self.rows.dead if owner == publisher and seq >= first}
        waiting = {
            envelope.seq
            for rows in (self.rows.waiting, self.rows.scheduled)
            for envelope in [row.envelope for row in rows.values()]
            if envelope.publisher == publisher and envelope.seq >= first
        }
        for owner, seq, was_dead in self.rows.removed:
            if owner == publisher and seq >= first:
                (dead if was_dead else waiting).add(seq)
        return sorted(dead), sorted(waiting)

    async def due(
        self, until_ns: int, after: tuple[int, int], limit: int, bytes_max: int = ANY_SIZE
    ) -> list[StoredScheduled]:
        """See `Store.due`."""
        order = sorted((event.due_ns, row) for row, event in self.rows.scheduled.items() if event.due_ns <= until_ns)
        found = [StoredScheduled(at[1], self.rows.scheduled[at[1]]) for at in order if at > after][:limit]
        return found[: fitting((len(one.event.envelope.body) for one in found), bytes_max)]

    async def due_above(self, row: int, until_ns: int, limit: int, bytes_max: int = ANY_SIZE) -> list[StoredScheduled]:
        """See `Store.due_above`."""
        found = [
            StoredScheduled(at, event)
            for at, event in sorted(self.rows.scheduled.items())
            if at > row and event.due_ns <= until_ns
        ][:limit]
        return found[: fitting((len(one.event.envelope.body) for one in found), bytes_max)]

    async def schedule_state(self) -> ScheduleState:
        """See `Store.schedule_state`."""
        return ScheduleState(
            next_due_ns=await self.next_due(0),
            row_max=max(self.rows.scheduled, default=0),
            begun_until_ns=self.rows.begun_until_ns,
        )

    async def next_due(self, after_ns: int) -> int:
        """See `Store.next_due`."""
        return min((event.due_ns for event in self.rows.scheduled.values() if event.due_ns > after_ns), default=0)

    async def unschedule(self, publisher: bytes, seq: int) -> list[int]:
        """See `Store.unschedule`."""
        await self._may_write()
        found = [
            row
            for row, event in self.rows.scheduled.items()
            if (event.envelope.publisher, event.envelope.seq) == (publisher, seq)
        ]
        for row in found:
            del self.rows.scheduled[row]
            self._note_removed(publisher, seq, was_dead=False)
        return found

    async def dead_letters(
        self, where: DeadFilter, after: int, limit: int, bytes_max: int = ANY_SIZE
    ) -> list[StoredDeadLetter]:
        """See `Store.dead_letters`."""
        found = [
            StoredDeadLetter(row, self.rows.dead[identity])
            for identity, row in sorted(self.rows.rows.items(), key=lambda item: item[1])
            if row > after and _is_meant(self.rows.dead[identity], where)
        ]
        found = found[:limit]
        return found[: fitting((len(one.letter.envelope.body) for one in found), bytes_max)]

    async def purge(self, rows: Sequence[int]) -> int:
        """See `Store.purge`."""
        await self._may_write()
        for (publisher, seq), row in self.rows.rows.items():
            if row in rows:
                self._note_removed(publisher, seq, was_dead=True)
        purged = self._remove_dead(rows)
        self.rows.purged += purged
        return purged

    async def drop_oldest(self, *, rows: int, size: int, keep: Collection[int] = ()) -> int:
        """See `Store.drop_oldest`."""
        await self._may_write()
        oldest: list[int] = []
        for identity, row in sorted(self.rows.rows.items(), key=lambda item: item[1]):
            if len(oldest) >= rows and size <= 0:
                break
            if not self.rows.dead[identity].position and row not in keep:
                oldest.append(row)
                size -= row_bytes(self.rows.dead[identity].envelope)
        dropped = self._remove_dead(oldest)
        self.rows.dropped += dropped
        return dropped

    async def _may_write(self) -> None:
        if self.dead:
            await asyncio.Event().wait()
        if self.failing:
            raise StoreError(self.failing)

    def _note_removed(self, publisher: bytes, seq: int, *, was_dead: bool) -> None:
        self.rows.removed.append((publisher, seq, was_dead))
        del self.rows.removed[:-REMOVED_MAX]

    def _remove_dead(self, rows: Sequence[int]) -> int:
        if not rows:
            return 0
        wanted = set(rows)
        found = [identity for identity, row in self.rows.rows.items() if row in wanted]
        for identity in found:
            del self.rows.dead[identity], self.rows.rows[identity]
        return len(found)


def _is_meant(letter: DeadLetter, where: DeadFilter) -> bool:
    envelope = letter.envelope
    return (
        where.type in (None, envelope.type)
        and (where.key is None or where.key[0] == envelope.key)
        and where.reason in (None, letter.reason)
        and (where.handler is None or where.handler in letter.handlers)
        and where.since_ns <= letter.last_ns <= where.until_ns
        and (where.events is None or (envelope.publisher, envelope.seq) in where.events)
    )
