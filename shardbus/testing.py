"""What users test with: the store in memory, the same port as the real one.

`MemoryRows` is what outlives a store, so that a simulated restart can hand it to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from shardbus.messages import WireKey
from shardbus.store import DeadLetter, StoreCounts, StoreError, WaitingEvent, WaitingLane


class MemoryRows:
    """The committed rows of a `MemoryStore`."""

    def __init__(self) -> None:
        self.dead: dict[tuple[bytes, int], DeadLetter] = {}
        self.waiting: dict[int, WaitingEvent] = {}


class MemoryStore:
    """A shard's store as plain dictionaries; implements `store.Store`.

    Args:
        rows: what a predecessor left; default: nothing.
    """

    def __init__(self, rows: MemoryRows | None = None) -> None:
        self.rows = MemoryRows() if rows is None else rows
        self.failing = ""
        """Set it to have every write raise `StoreError` with this text."""

    async def open(self) -> StoreCounts:
        """See `Store.open`."""
        return StoreCounts(
            dead=len(self.rows.dead), waiting=len(self.rows.waiting), position_max=max(self.rows.waiting, default=0)
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
    ) -> None:
        """See `Store.write`."""
        if self.failing:
            raise StoreError(self.failing)
        known = self.rows.waiting.keys()
        if len({row.position for row in waiting} - known) != len(waiting):
            raise StoreError("a position is taken")
        for letter in dead:
            identity = (letter.envelope.publisher, letter.envelope.seq)
            before = self.rows.dead.get(identity)
            if before is not None:
                letter = replace(letter, first_ns=before.first_ns)
            self.rows.dead[identity] = letter
        for row in waiting:
            self.rows.waiting[row.position] = row
        for row in changed:
            if row.position in self.rows.waiting:
                self.rows.waiting[row.position] = row
        for position in done:
            self.rows.waiting.pop(position, None)

    async def waiting_lanes(self) -> list[WaitingLane]:
        """See `Store.waiting_lanes`."""
        lanes: dict[WireKey, WaitingLane] = {}
        for _, row in sorted(self.rows.waiting.items()):
            key = row.envelope.key
            lane = lanes.get(key) or WaitingLane(key=key, count=0, due_ns=row.due_ns)
            lanes[key] = replace(lane, count=lane.count + 1)
        return list(lanes.values())

    async def load_waiting(self, key: WireKey, after: int, limit: int) -> list[WaitingEvent]:
        """See `Store.load_waiting`."""
        positions = sorted(
            position for position, row in self.rows.waiting.items() if position > after and row.envelope.key == key
        )
        return [self.rows.waiting[position] for position in positions[:limit]]

    async def outcomes(self, publisher: bytes, first: int) -> tuple[list[int], list[int]]:
        """See `Store.outcomes`."""
        dead = sorted(seq for owner, seq in self.rows.dead if owner == publisher and seq >= first)
        waiting = sorted(
            row.envelope.seq
            for row in self.rows.waiting.values()
            if row.envelope.publisher == publisher and row.envelope.seq >= first
        )
        return dead, waiting

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """See `Store.dead_letters`."""
        order = sorted(
            self.rows.dead.values(), key=lambda row: (row.first_ns, row.envelope.publisher, row.envelope.seq)
        )
        return order[:limit]
