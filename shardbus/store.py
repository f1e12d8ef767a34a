"""The store of a shard, as a port: what must outlive a worker. Adapters: `sql.store`, and one in memory for tests.

Rows are dead letters and waiting events. They belong to their slot, not to their shard, so that they can move with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

import msgspec

from shardbus.messages import WireKey

DEAD_REASONS: Final = ("failed", "timeout", "circuit-open", "undecodable", "unknown-type", "crashed", "expired")
"""Why an event is dead: `Failure.reason` is one of these."""

_T = TypeVar("_T")

ROW_OVERHEAD_BYTES: Final = 512
"""What a row is taken to need beside its event's body: key, headers, error, indices."""

FILE_URL: Final = "sqlite+aiosqlite:///"
"""Before the path of an SQLite file, the URL of a store in it."""

MEMORY_URL: Final = f"{FILE_URL}:memory:"
"""The URL of a store in its process's memory."""


class Envelope(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An event as a store keeps it: whose it is, what it is, and how often it may have run.

    Of a waiting event, `attempt` leaves out how often it was taken over: see `Store.take_over`.
    """

    publisher: bytes
    seq: int
    slot: int
    type: str
    key: WireKey
    body: bytes
    headers: dict[str, str] | None
    ordinal: int
    intended_ns: int
    attempt: int


def row_bytes(envelope: Envelope) -> int:
    """What a row of this event counts for in a store's bytes."""
    return len(envelope.body) + ROW_OVERHEAD_BYTES


def traceback_bytes(characters: int) -> int:
    """What a traceback of this length counts for, which all dead letters of its place share."""
    return characters + ROW_OVERHEAD_BYTES


class Failure(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Why an event was not handled.

    `handlers` names those that gave up (none where the event was never decoded); `reason` is one of `DEAD_REASONS`. `place`
    identifies the traceback.
    """

    handlers: tuple[str, ...]
    reason: str
    error_type: str
    error: str
    place: str = ""
    traceback: str = ""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An event that will not be handled: what it was, and why.

    The fields of its `Failure`, whose `traceback` is stored once for each distinct `place`, and the times in nanoseconds
    since 1970. `position` is that of its place in its lane, where its key is parked behind it, so that it can take that
    place again; 0: it parks nothing.
    """

    envelope: Envelope
    handlers: tuple[str, ...]
    reason: str
    error_type: str
    error: str
    place: str
    traceback: str
    first_ns: int
    last_ns: int
    epoch: bytes
    position: int = 0


class DeadFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters are meant: those that meet every condition that is set.

    `key` is a 1-tuple, because None is a key too; `events` are (publisher, sequence).
    """

    type: str | None = None
    key: tuple[WireKey] | None = None
    reason: str | None = None
    handler: str | None = None
    since_ns: int = 0
    until_ns: int = 2**63 - 1
    events: list[tuple[bytes, int]] | None = None


class StoredDeadLetter(msgspec.Struct, frozen=True):
    """A dead letter and its row: rows count up in the order in which events died."""

    row: int
    letter: DeadLetter


class WaitingEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An event that the store holds until its lane comes to it, not before `due_ns` (0: at once; since 1970).

    `position` orders the events of a lane, and is given by the store's owner. `todo` names the handlers that are still to
    run, and how often each has failed; none means all. `gave_up` is what others have given up with. `deadline_ns` is when
    it is too late for them (0: never; since 1970). `first_ns` is when it died first, where it was redriven (0: it was not).
    """

    position: int
    envelope: Envelope
    todo: dict[str, int] = {}
    gave_up: tuple[Failure, ...] = ()
    due_ns: int = 0
    deadline_ns: int = 0
    first_ns: int = 0


class ScheduledEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An event that the store holds until `due_ns` (since 1970), in no lane, and then until its handlers have ended, or it
    becomes a waiting event or a dead letter."""

    envelope: Envelope
    due_ns: int


class StoredScheduled(msgspec.Struct, frozen=True, gc=False):
    """A scheduled event and its row."""

    row: int
    event: ScheduledEvent


class ScheduleState(msgspec.Struct, frozen=True, kw_only=True):
    """What a store says of its scheduled events: when the first is due, the highest row, and up to which due time one may
    have begun. Nanoseconds since 1970; 0: there is none, or none may."""

    next_due_ns: int = 0
    row_max: int = 0
    begun_until_ns: int = 0


class WaitingLane(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How many events of a key wait, and until when its first does (nanoseconds since 1970; 0: it is due)."""

    key: WireKey
    count: int
    due_ns: int = 0


class ParkedKey(msgspec.Struct, frozen=True, gc=False):
    """A key, and the position of the dead letter that parks it."""

    key: WireKey
    position: int


class LaneHead(msgspec.Struct, frozen=True, gc=False):
    """What is asked of a lane: up to `limit` waiting events of a key, of positions above `after`."""

    key: WireKey
    after: int
    limit: int


class StoreCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What a store holds, and what became of dead letters that it holds no more.

    Every event that ever died here is among `dead`, `redriven`, `purged` or `dropped`. `parked` of the `dead` park their
    key. `scheduled` of the `waiting` are not due yet, and in no lane. `removed` events were purged or cancelled, and are
    still known to `outcomes`. `position_max` is over waiting events that are in a lane, and those that park. `bytes` are
    those of all rows, by `row_bytes`, and of tracebacks, once for each place, by `traceback_bytes`; `droppable_bytes` those
    of dead letters that park nothing, and of all tracebacks.
    """

    dead: int
    waiting: int
    position_max: int
    parked: int = 0
    removed: int = 0
    redriven: int = 0
    purged: int = 0
    dropped: int = 0
    bytes: int = 0
    droppable_bytes: int = 0
    scheduled: int = 0


REMOVED_MAX: Final = 65_536
"""How many events a store knows that were purged or cancelled, the last ones: as many as a publisher's outbox holds."""

TAKEOVERS_MAX: Final = 256
"""How often it is counted that a row was taken over; then the first time is forgotten for each new one."""

NOTHING_STORED: Final = StoreCounts(dead=0, waiting=0, position_max=0)


def store_ledger(counts: StoreCounts) -> dict[str, int]:
    """What `status` says of a shard's store: what is in it, and what became of dead letters that are not."""
    return {
        "dead_letters": counts.dead,
        "waiting": counts.waiting,
        "scheduled": counts.scheduled,
        "parked": counts.parked,
        "redriven": counts.redriven,
        "purged": counts.purged,
        "dropped": counts.dropped,
        "store_bytes": counts.bytes,
    }


def total_ledger(shards: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The sums of several shards' `store_ledger`, whatever else their mappings have."""
    shards = list(shards)
    return {name: sum(one[name] for one in shards) for name in store_ledger(NOTHING_STORED)}


def first_due(shards: Iterable[Mapping[str, Any]]) -> int:
    """The earliest `next_due_ns` of several shards' mappings; 0: nothing is scheduled."""
    return min((one["next_due_ns"] for one in shards if one["next_due_ns"]), default=0)


ANY_SIZE: Final = 2**62


def fitting(sizes: Iterable[int], bytes_max: int) -> int:
    """How many of these, in turn, have up to `bytes_max` bytes together; at least the first."""
    count = total = 0
    for size in sizes:
        total += size
        if count and total > bytes_max:
            break
        count += 1
    return count


def fitting_lanes(lanes: Iterable[list[_T]], size_of: Callable[[_T], int], bytes_max: int) -> list[list[_T]]:
    """As much of these lanes, in turn, as has up to `bytes_max` bytes together; at least the first of the first.

    The first lane of which nothing fits ends it.
    """
    answered: list[list[_T]] = []
    total = 0
    for rows in lanes:
        count = 0
        for row in rows:
            total += size_of(row)
            if total > bytes_max and (answered or count):
                break
            count += 1
        if rows and not count:
            break
        answered.append(rows[:count])
        if count < len(rows):
            break
    return answered


class Store(Protocol):
    """Keeps a shard's dead letters, waiting and scheduled events. Every call has one caller: the shard's writer task.

    A call that returns has committed. One that raises `StoreError` has committed nothing and may be called again.
    """

    async def open(self) -> StoreCounts:
        """Open or create the store, adopt what a predecessor left, and say what is in it."""

    async def close(self) -> None:
        """Release everything. Rows stay."""

    def counts(self) -> StoreCounts:
        """What is in it now. Asks nobody."""

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
        """In one transaction: add dead letters, waiting and scheduled events, change waiting events, remove those at
        positions `done`, and remove the dead letters of the rows `redriven` and the scheduled events of the rows `begun`,
        which have ended, or are waiting or dead from now on. `begun_until_ns`: what is due up to then may begin (0: as
        before).

        A dead letter of an event that is dead already replaces it and keeps its first time. One that parks has a position
        of its own or that of the waiting event in `done` that it was. A changed event takes over
        attempt, `todo`, `gave_up` and `due_ns` at its position. A position that is not there is no error. Within one call,
        additions come first and removals last.
        """

    async def take_over(self) -> tuple[int, ...]:
        """Note that a successor takes over what waits here, unless its predecessor came to rest; return up to which position
        rows were there each time that this happened, ascending, as far as such rows are left.

        So a row was taken over as often as there are numbers that are not below its position.
        """

    async def rest(self) -> None:
        """Note that nothing of what waits here is under way: it will not have been taken over from a worker that died."""

    async def waiting_lanes(self, after: WaitingLane | None, limit: int) -> list[WaitingLane]:
        """Up to `limit` keys that have waiting events, behind that of `after` (None: from the first), in its own order."""

    async def parked_keys(self, after: int, limit: int) -> list[ParkedKey]:
        """Up to `limit` keys that a dead letter parks whose position is above `after`, by that position."""

    async def load_waiting(self, lanes: Sequence[LaneHead], bytes_max: int = ANY_SIZE) -> list[list[WaitingEvent]]:
        """What is asked of each of these lanes, in the order of positions; a key may be among them several times.

        The bodies have up to `bytes_max` bytes together, but for the first, which is always among them: the last lane that
        is answered may have fewer events than it has room for, and those behind it are missing in the answer. One that is
        answered has its first event, or none.
        """

    async def outcomes(self, publisher: bytes, first: int) -> tuple[list[int], list[int]]:
        """The sequences from `first` on that this publisher has among the dead, and among the waiting and scheduled, sorted.

        Those of the last `REMOVED_MAX` events that were purged or cancelled are among them, as what they were: their
        publisher may not have heard of that, and what people have removed is not to come back when it greets.
        """

    async def due(
        self, until_ns: int, after: tuple[int, int], limit: int, bytes_max: int = ANY_SIZE
    ) -> list[StoredScheduled]:
        """Up to `limit` scheduled events that are due by `until_ns`, in the order of (due time, row), above `after` in it.

        Their bodies have up to `bytes_max` bytes together, but for the first, which is always among them.
        """

    async def due_above(self, row: int, until_ns: int, limit: int, bytes_max: int = ANY_SIZE) -> list[StoredScheduled]:
        """As `due`, of those of rows above `row`, in the order of their rows."""

    async def schedule_state(self) -> ScheduleState:
        """When the first scheduled event is due, the highest row of them, and the `begun_until_ns` that was written last."""

    async def next_due(self, after_ns: int) -> int:
        """When the first scheduled event is due that is due after `after_ns`; 0: there is none."""

    async def unschedule(self, publisher: bytes, seq: int) -> list[int]:
        """Remove a scheduled event; return the rows that it had: none if there was none."""

    async def dead_letters(
        self, where: DeadFilter, after: int, limit: int, bytes_max: int = ANY_SIZE
    ) -> list[StoredDeadLetter]:
        """Up to `limit` dead letters that are meant, of rows above `after`, in the order of their rows.

        Their bodies have up to `bytes_max` bytes together, but for the first, which is always among them.
        """

    async def purge(self, rows: Sequence[int]) -> int:
        """Remove the dead letters of these rows; return how many there were."""

    async def drop_oldest(self, *, rows: int, size: int, keep: Collection[int] = ()) -> int:
        """Remove the oldest dead letters that park nothing, count them as dropped, and return how many there were.

        So many that at least `rows` rows and `size` bytes are free that were not, or all there are. Those of the rows
        `keep` stay.
        """


class StoreError(Exception):
    """The store could not do it now: locked, full, or gone. The message is the database's."""
