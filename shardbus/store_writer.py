"""The one task that writes a shard's store: what goes into which transaction, and what waits for room.

Owns the order of effects between lanes and store: nothing is told to be kept before it is committed. Knows nothing of
sessions or handlers; whoever adds a row says what is to happen then.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import islice, takewhile
from typing import Final, NamedTuple

import msgspec

from shardbus.clock import NowNs
from shardbus.config import Limits
from shardbus.lane_reads import LaneRead, LaneReads
from shardbus.store import (
    DeadLetter,
    Envelope,
    ScheduledEvent,
    Store,
    StoreCounts,
    StoreError,
    WaitingEvent,
    row_bytes,
)

log = logging.getLogger("shardbus.store")

_RETRY_S: Final = 0.25  # how long a failing store is left alone
_TELL_NS: Final = 60_000_000_000  # between two lines that dead letters are dropped
_LEAVING_MAX: Final = 1024  # rows of scheduled events in a transaction: they take no value but their number
_READS_MAX: Final = 64  # between two transactions, so that writes and their acks go on
_LANES_BYTES_MAX: Final = 4 * 1024 * 1024  # of the bodies that are read back for some lanes at once


class Burial(msgspec.Struct, frozen=True):
    """A dead letter to write, and the waiting row that it takes the place of (0: none)."""

    letter: DeadLetter
    position: int
    then: Callable[[], None]
    begun: int = 0  # the row of the scheduled event that it takes the place of


class Keeping(msgspec.Struct, frozen=True):
    """A waiting event to write, and the row of the dead letter or scheduled event that it was (0: none): that makes room."""

    event: WaitingEvent
    redriven: int
    then: Callable[[], None]
    begun: int = 0

    @property
    def had_row(self) -> bool:
        """Whether it needs no room."""
        return bool(self.redriven or self.begun)


class Mark(NamedTuple):
    """Until which due time scheduled events may begin."""

    until_ns: int
    then: Callable[[], None]


class Scheduling(NamedTuple):
    """A scheduled event to write."""

    event: ScheduledEvent
    then: Callable[[], None]


class Tally:
    """How many rows, and bytes, some of what is to be written comes to. What is added is removed once."""

    __slots__ = ("bytes", "rows")

    def __init__(self) -> None:
        self.rows = 0
        self.bytes = 0

    def add(self, envelope: Envelope) -> None:
        """One more."""
        self.rows += 1
        self.bytes += row_bytes(envelope)

    def remove(self, envelope: Envelope) -> None:
        """One less."""
        self.rows -= 1
        self.bytes -= row_bytes(envelope)


class StoreWriter:
    """The one task that touches the store: a transaction of some rows, then the reads that can be answered, and again.

    Its queue is bounded by the credit of the publishers whose events it holds. While the store fails or is full it tries
    again, and nothing that was not written is acked. Room comes from removals, so those are written first, and reads
    never wait for room, nor for a write that fails: what they bring back is what makes it. What is asked comes before
    lanes that are read back, of which there may be many. `before` is called before each transaction.
    """

    def __init__(
        self,
        store: Store,
        limits: Limits,
        now: NowNs,
        broken: Callable[[BaseException], None],
        before: Callable[[], None],
    ) -> None:
        self.counts = StoreCounts(dead=0, waiting=0, position_max=0)
        self.failing = ""
        self._store = store
        self._broken = broken
        self._before = before
        self._limits = limits
        self._now = now
        self._told_ns = 0  # when it was last told that dead letters are dropped
        self._told_failing = False  # it was told that it cannot write, and not yet that it can
        self._was_full = False  # the last time that it could not, it was for want of room
        self._taken = 0  # waiting rows up to this position are in, or in the transaction that is under way
        self._committed = 0  # waiting rows up to this position are in, or are not wanted any more
        self._dropped: set[int] = set()  # waiting rows that were handled before they were written
        self._dead: deque[Burial] = deque()  # need a row
        self._replacing: deque[Burial] = deque()  # take the place of their waiting row, and so need no room
        self._waiting: deque[Keeping] = deque()  # by position
        self._revived: deque[Keeping] = deque()  # at the position that it had: what parked its key, or what comes late
        self._scheduled: deque[Scheduling] = deque()
        self._to_die = Tally()  # of `_dead`
        self._to_park = Tally()  # of these: they are never dropped
        self._to_wait = Tally()  # of `_waiting` and `_revived`: what was no row before
        self._to_return = Tally()  # of `_waiting`: dead letters that are redriven, and not to be dropped any more
        self._to_schedule = Tally()
        self._leaving: deque[int] = deque()  # rows of scheduled events that have ended
        self._left: Callable[[Sequence[int]], None] = lambda _rows: None
        self._leaving_now = 0  # of them, how many are not to wait for more
        self._standing: set[int] = set()  # positions of waiting rows to come that a scheduled row stands for until then
        self._mark: Mark | None = None
        self._changed: dict[int, WaitingEvent] = {}  # by position: the last change is the one that counts
        self._done: deque[int] = deque()
        self._reads: deque[Callable[[], Awaitable[None]]] = deque()
        self._lane_reads = LaneReads()
        self._reading_lanes = False
        self._wanted = asyncio.Event()
        self._writing = False
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the store. Raises `StoreError` where it cannot be; it may be tried again."""
        await self._store.open()
        self.counts = self._store.counts()
        self._taken = self._committed = self.counts.position_max

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="shardbus-store-writer")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broken(error)  # a defect; without its writer a shard acks nothing more

    async def close(self, *, at_rest: bool = False) -> None:
        """Stop at once, and close the store. What was not committed was told to nobody.

        `at_rest`: nothing of what waits in it is under way.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if at_rest:
                with suppress(StoreError):  # then a successor counts a death too many
                    await self._store.rest()
        await self._store.close()

    def idle(self) -> bool:
        """Whether there is nothing to write or read, and nothing under way."""
        busy = self._wanted.is_set() or self._writing
        return not (self._writes_left() or self._leaving or self._reads_left() or busy)

    def _reads_left(self) -> bool:
        return bool(self._reads or self._lane_reads or self._reading_lanes)

    def _writes_left(self) -> bool:
        return bool(
            self._dead
            or self._replacing
            or self._waiting
            or self._revived
            or self._changed
            or self._done
            or self._scheduled
            or self._leaving_now
            or self._mark
        )

    def has_room(self, rows: int, size: int) -> bool:
        """Whether so many more waiting rows fit; then they are written before any dead letter that takes a new row."""
        return not self.failing and self._fit(rows + self._to_die.rows, size + self._to_die.bytes)

    def may_redrive(self, letter: DeadLetter) -> bool:
        """Whether a dead letter may become a waiting event: not where room was promised that only its end can make."""
        if letter.position or self._limits.store_full != "drop_oldest":
            return True  # it is never dropped
        return self._fit(1 + self._to_park.rows, row_bytes(letter.envelope) + self._to_park.bytes)

    def _fit(self, rows: int, size: int) -> bool:
        """Whether so many rows fit beside those that are in, and not to be dropped, and the waiting rows to come."""
        counts, limits = self.counts, self._limits
        rows += counts.dead + counts.waiting + self._to_wait.rows
        size += counts.bytes + self._to_wait.bytes
        if limits.store_full == "drop_oldest":
            rows -= counts.dead - counts.parked - self._to_return.rows
            size -= counts.droppable_bytes - self._to_return.bytes
        return rows <= limits.store_rows_max and size <= limits.store_bytes_max

    def add_dead(self, letter: DeadLetter, position: int, then: Callable[[], None], begun: int = 0) -> None:
        """Write a dead letter, in the place of the waiting row at `position` (0: none), or of the scheduled event of the row
        `begun` (0: none); call `then` once it is committed."""
        # Also where its waiting row is still to be written: its publisher may hear of that first, and then the event must
        # not be out of the store before its dead letter is in.
        if position or begun:
            self._replacing.append(Burial(letter, position, then, begun))
        else:
            self._dead.append(Burial(letter, 0, then))
            self._to_die.add(letter.envelope)
            if letter.position:
                self._to_park.add(letter.envelope)
        self._wanted.set()

    def _next_dead(self) -> None:
        """Take the next one that needs a row out of the queue."""
        letter = self._dead.popleft().letter
        self._to_die.remove(letter.envelope)
        if letter.position:
            self._to_park.remove(letter.envelope)

    def add_waiting(self, row: WaitingEvent, then: Callable[[], None], redriven: int = 0, begun: int = 0) -> None:
        """Write a waiting event; call `then` once it is committed.

        `redriven` is the row of the dead letter that it was, `begun` of the scheduled event: that goes in the same
        transaction.
        """
        self._waiting.append(Keeping(row, redriven, then, begun))
        if redriven:
            self._to_return.add(row.envelope)
        elif begun:
            self._standing.add(row.position)
        else:
            self._to_wait.add(row.envelope)
        self._wanted.set()

    def _next_waiting(self) -> WaitingEvent:
        """Take the next one out of the queue."""
        keeping = self._waiting.popleft()
        if keeping.redriven:
            self._to_return.remove(keeping.event.envelope)
        elif not keeping.begun:
            self._to_wait.remove(keeping.event.envelope)
        return keeping.event

    def add_scheduled(self, event: ScheduledEvent, then: Callable[[], None]) -> None:
        """Write a scheduled event; call `then` once it is committed. While there is no room for it, it waits, in memory."""
        self._scheduled.append(Scheduling(event, then))
        self._to_schedule.add(event.envelope)
        self._wanted.set()

    def add_revived(self, row: WaitingEvent, then: Callable[[], None], redriven: int) -> None:
        """As `add_waiting`, of what parked its key and waits again at the position that it had."""
        self._revived.append(Keeping(row, redriven, then))
        self._wanted.set()

    def add_late(self, row: WaitingEvent, then: Callable[[], None], begun: int = 0) -> None:
        """As `add_waiting`, of an event whose position was taken before others that are written by now.

        It is not to be removed before it is committed.
        """
        self._revived.append(Keeping(row, 0, then, begun))
        if not begun:
            self._to_wait.add(row.envelope)
        self._wanted.set()

    def add_changed(self, row: WaitingEvent) -> None:
        """Write what has changed of a waiting event."""
        self._changed[row.position] = row
        self._wanted.set()

    def add_done(self, position: int) -> None:
        """Remove a waiting event."""
        if position > self._taken and position not in self._standing:
            self._dropped.add(position)
        else:
            self._done.append(position)
        self._wanted.set()

    def when_left(self, then: Callable[[Sequence[int]], None]) -> None:
        """Call this with the rows of `add_leaving` that are gone, once that is committed."""
        self._left = then

    def add_leaving(self, row: int, *, more: bool) -> None:
        """Remove a scheduled event that has ended. `more` follow soon, or `hurry` does: then many go in one transaction."""
        self._leaving.append(row)
        if not more or (not self._leaving_now and len(self._leaving) >= _LEAVING_MAX):
            self.hurry()

    def hurry(self) -> None:
        """Let what has ended go now."""
        if self._leaving:
            self._leaving_now = len(self._leaving)
            self._wanted.set()

    def add_mark(self, until_ns: int, then: Callable[[], None]) -> None:
        """Let scheduled events begin that are due up to then; call `then` once that is committed. One at a time."""
        assert self._mark is None
        self._mark = Mark(until_ns, then)
        self._wanted.set()

    def add_read(self, ask: Callable[[], Awaitable[None]]) -> None:
        """Ask the store between two transactions, also while writes fail."""
        self._reads.append(ask)
        self._wanted.set()

    def add_lane_read(self, read: LaneRead) -> None:
        """Read waiting events of a lane, together with those of others."""
        self._lane_reads.add(read)
        self._wanted.set()

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            error = ""
            is_full = False
            try:
                if not await self._write() and self._writes_left():
                    is_full = True
                    error = f"it is full ({self.counts.dead + self.counts.waiting:,} rows, {self.counts.bytes:,} bytes)"
            except StoreError as failed:
                error = str(failed)
            try:
                await self._read()
            except StoreError as failed:
                error = error or str(failed)
            if error:
                self._fails(error, is_full=is_full)
                await self._pause()
            elif not (self._was_full and self._writes_left()):
                self._works()
            if error or self._writes_left() or self._reads_left():
                self._wanted.set()

    async def _pause(self) -> None:
        """Leave a store that fails alone for a while, but for what can be read of it."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _RETRY_S
        with suppress(StoreError):
            while loop.time() < end and await self._read():
                pass
        await asyncio.sleep(max(0.0, end - loop.time()))

    def _works(self) -> None:
        """Not for a full store that has found room for a few rows, and will be full again: each time would be a line."""
        if self._told_failing:
            log.warning("the store writes again")
        self._told_failing = self._was_full = False
        self.failing = ""

    def _fails(self, why: str, *, is_full: bool) -> None:
        if not self._told_failing:
            log.error("the store cannot write: %s; publishers wait until it can", why)
        self._told_failing = True
        self._was_full = is_full
        self.failing = why

    async def _write(self) -> bool:
        """One transaction of what there is room for; whether there was anything."""
        if self._limits.store_full == "drop_oldest":
            await self._make_room()
        done = self._take_done()
        leaving = list(islice(self._leaving, _LEAVING_MAX))
        mark = self._mark
        rows = self._limits.store_rows_max - self.counts.dead - self.counts.waiting + len(done) + len(leaving)
        size = self._limits.store_bytes_max - self.counts.bytes
        kept, last = self._take_waiting(rows, size)
        revived, last = self._take_revived(last)
        waiting = [*revived, *kept]
        # Waiting events that come later were promised their room.
        rows -= self._to_wait.rows
        size -= self._to_wait.bytes
        new = self._take_dead(rows, size)
        new_bytes = sum(row_bytes(burial.letter.envelope) for burial in new)
        scheduled = self._take_scheduled(rows - len(new), size - new_bytes)
        replacing = self._take_replacing()
        dead = [*new, *replacing]
        changed = [row for row in self._changed.values() if row.position <= last]
        if not (dead or waiting or changed or done or scheduled or self._leaving_now or mark):
            return False
        replaced = [burial.position for burial in replacing if burial.position]
        redriven = [keeping.redriven for keeping in waiting if keeping.redriven]
        begun = [keeping.begun for keeping in waiting if keeping.begun]
        begun += [burial.begun for burial in replacing if burial.begun]
        self._taken = last
        self._before()
        self._writing = True
        try:
            await self._store.write(
                dead=[burial.letter for burial in dead],
                waiting=[keeping.event for keeping in waiting],
                changed=changed,
                done=[*done, *replaced],
                redriven=redriven,
                scheduled=[scheduling.event for scheduling in scheduled],
                begun=[*begun, *leaving],
                begun_until_ns=0 if mark is None else mark.until_ns,
            )
        except BaseException:
            self._taken = self._committed
            self._done.extend(done)
            raise
        finally:
            self._writing = False
        self._committed = last
        if replacing and self._replacing[0] is not replacing[0]:
            written = set(map(id, replacing))
            self._replacing = deque(burial for burial in self._replacing if id(burial) not in written)
        else:
            for _ in replacing:
                self._replacing.popleft()
        for _ in new:
            self._next_dead()
        for _ in kept:
            self._next_waiting()
        for _ in revived:
            keeping = self._revived.popleft()
            if not keeping.had_row:
                self._to_wait.remove(keeping.event.envelope)
        for _ in scheduled:
            self._to_schedule.remove(self._scheduled.popleft().event.envelope)
        for _ in leaving:
            self._leaving.popleft()
        left = len(self._leaving)
        self._leaving_now = left if left >= _LEAVING_MAX else max(0, self._leaving_now - len(leaving))
        if mark is not None:
            self._mark = None
        if self._standing:
            self._standing.difference_update([keeping.event.position for keeping in kept])
        for row in changed:
            if self._changed.get(row.position) is row:
                del self._changed[row.position]
        if self._dropped:
            # Handled before they were written, and behind others that had to be: now they are rows to remove.
            written_now = [keeping.event.position for keeping in kept]
            self._done.extend(position for position in written_now if position in self._dropped)
            self._dropped.difference_update(written_now)
        self.counts = self._store.counts()
        found_room = new or scheduled or any(not keeping.had_row for keeping in kept)
        if found_room or not (self._dead or self._waiting or self._scheduled):
            self.failing = ""
        for burial in dead:
            burial.then()
        for keeping in waiting:
            keeping.then()
        for scheduling in scheduled:
            scheduling.then()
        if leaving:
            self._left(leaving)
        if mark is not None:
            mark.then()
        return True

    def _take_done(self) -> list[int]:
        """Positions to remove whose rows are in."""
        taken = [self._done.popleft() for _ in range(min(len(self._done), self._limits.store_write_rows_max))]
        self._done.extend(position for position in taken if position > self._committed)
        return [position for position in taken if position <= self._committed]

    def _take_dead(self, rows: int, size: int) -> list[Burial]:
        """Dead letters to write for which there is room."""
        dead: list[Burial] = []
        for burial in islice(self._dead, self._limits.store_write_rows_max):
            rows -= 1
            size -= row_bytes(burial.letter.envelope)
            if rows < 0 or size < 0:
                break
            dead.append(burial)
        return dead

    def _take_scheduled(self, rows: int, size: int) -> list[Scheduling]:
        """Scheduled events to write for which there is room."""
        scheduled: list[Scheduling] = []
        for scheduling in islice(self._scheduled, self._limits.store_write_rows_max):
            rows -= 1
            size -= row_bytes(scheduling.event.envelope)
            if rows < 0 or size < 0:
                break
            scheduled.append(scheduling)
        return scheduled

    def _take_replacing(self) -> list[Burial]:
        """Dead letters to write whose waiting rows are in: the first ones, or, where the row of the first is still to come,
        those behind it, because it may find no room, and dead letters may be dropped, waiting rows never."""
        limit = self._limits.store_write_rows_max
        first = list(takewhile(self._is_in, islice(self._replacing, limit)))
        return first or list(islice(filter(self._is_in, self._replacing), limit))

    def _is_in(self, burial: Burial) -> bool:
        return burial.position <= self._committed

    def _take_waiting(self, rows: int, size: int) -> tuple[list[Keeping], int]:
        """Waiting events to write for which there is room, and the last position decided with them; forgets what is not
        wanted any more."""
        while self._waiting and self._gives_up(self._waiting[0], rows, size):
            position = self._next_waiting().position
            self._dropped.discard(position)
            self._changed.pop(position, None)
            self._committed = position
        waiting: list[Keeping] = []
        for keeping in islice(self._waiting, self._limits.store_write_rows_max):
            if not keeping.had_row:  # what was dead or scheduled makes room for itself
                rows -= 1
                size -= row_bytes(keeping.event.envelope)
                if rows < 0 or size < 0:
                    break
            waiting.append(keeping)
        return waiting, waiting[-1].event.position if waiting else self._committed

    def _gives_up(self, first: Keeping, rows: int, size: int) -> bool:
        """Give up the row of the first waiting event to come where it needs none any more, and say whether it did: it was
        handled, or it is dead and finds no room.

        Then its dead letter waits for room, with others from now on: it must not hold up what comes behind it and may make
        that room. Where it parks its lane it does, because the lane's other events are not to be in the store without
        it.
        """
        event = first.event
        if event.position in self._dropped:
            return True
        if first.had_row or (rows > 0 and size >= row_bytes(event.envelope)):
            return False
        for at, burial in enumerate(self._replacing):
            if burial.position == event.position and not burial.letter.position:
                del self._replacing[at]
                self.add_dead(burial.letter, 0, burial.then)
                return True
        return False

    def _take_revived(self, last: int) -> tuple[list[Keeping], int]:
        """What takes its old position again, once all rows below that are decided; and the last position with these."""
        revived: list[Keeping] = []
        for keeping in islice(self._revived, self._limits.store_write_rows_max):
            if self._waiting and self._waiting[0].event.position < keeping.event.position:
                break
            last = max(last, keeping.event.position)
            revived.append(keeping)
        return revived, last

    async def _make_room(self) -> None:
        """Drop as many of the oldest dead letters as there is no room for what is to be written."""
        counts = self.counts
        rows = counts.dead + counts.waiting - self._limits.store_rows_max + self._to_wait.rows
        size = counts.bytes - self._limits.store_bytes_max + self._to_wait.bytes
        rows_to_come = rows + self._to_die.rows + self._to_schedule.rows
        bytes_to_come = size + self._to_die.bytes + self._to_schedule.bytes
        if (rows_to_come <= 0 and bytes_to_come <= 0) or counts.dead == counts.parked:
            return
        for burial in islice(self._dead, self._limits.store_write_rows_max):
            rows += 1
            size += row_bytes(burial.letter.envelope)
        for scheduling in islice(self._scheduled, self._limits.store_write_rows_max):
            rows += 1
            size += row_bytes(scheduling.event.envelope)
        if rows <= 0 and size <= 0:
            return
        leaving = {keeping.redriven for keeping in self._waiting if keeping.redriven}
        dropped = await self._store.drop_oldest(rows=max(0, rows), size=max(0, size), keep=leaving)
        self.counts = self._store.counts()
        now_ns = self._now()
        if dropped and (not self._told_ns or now_ns - self._told_ns >= _TELL_NS):
            self._told_ns = now_ns
            log.warning("the store is full: its oldest dead letters are dropped, %s so far", f"{self.counts.dropped:,}")

    async def purge(self, rows: Sequence[int]) -> int:
        """To be called from a read only: the writer itself is the one caller of the store."""
        purged = await self._store.purge(rows)
        self.counts = self._store.counts()
        return purged

    async def unschedule(self, publisher: bytes, seq: int) -> list[int] | None:
        """Remove a scheduled event, whether it is in or has no room yet; return the rows that it had. None: it is not there.

        To be called from a read only, as `purge`.
        """
        found = await self._store.unschedule(publisher, seq)
        self.counts = self._store.counts()
        for at, (event, then) in enumerate(self._scheduled):
            if (event.envelope.publisher, event.envelope.seq) == (publisher, seq):
                del self._scheduled[at]
                self._to_schedule.remove(event.envelope)
                then()
                return found
        return found or None

    @staticmethod
    async def _ask(reads: deque[Callable[[], Awaitable[None]]]) -> bool:
        count = min(len(reads), _READS_MAX)
        for _ in range(count):
            await reads[0]()
            reads.popleft()
        return count > 0

    async def _read(self) -> bool:
        """Answer some of what was asked by now, and read some lanes whose rows are in; whether there was anything."""
        asked = await self._ask(self._reads)
        lanes = self._lane_reads.take(self._committed)
        if not lanes:
            return asked
        answered = 0
        self._reading_lanes = True
        try:
            found = await self._store.load_waiting([read.head for read in lanes], _LANES_BYTES_MAX)
            answered = len(found)
        finally:
            self._reading_lanes = False
            self._lane_reads.give_back(lanes[answered:])
        for read, rows in zip(lanes, found, strict=False):
            # What has changed may not be written yet: a store that fails, or is full, can be read all the same.
            read.then([self._changed.get(row.position, row) for row in rows])
        return True
