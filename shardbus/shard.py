"""One shard's work, whatever carries the frames: sessions, lanes and the store, joined.

A worker process wraps it in sockets, `bus.local()` in nothing. Frames come in through `receive`; what is to be sent goes out
through the `send` that it was given. It acks at the end of the event loop's turn, once a session, and never before a dead
letter or a waiting event is committed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import islice, takewhile
from typing import Final, NamedTuple

from msgspec.structs import replace

from shardbus.clock import NowNs, wall_ns
from shardbus.config import PROTOCOL, Limits
from shardbus.dead_letters import Request, decode_request, encode_answer, page_of
from shardbus.errors import RemoteProtocolError
from shardbus.journal import Journal
from shardbus.lanes import CRASHED, UNKNOWN, Delivery, Inbound, Lanes
from shardbus.messages import WireKey
from shardbus.metrics import Book, PublisherBook
from shardbus.quarantine import UNKNOWN_END, Ended, Identity, Quarantine, Suspect, judge
from shardbus.registry import Plan
from shardbus.routing import slot_of
from shardbus.store import (
    ROW_OVERHEAD_BYTES,
    DeadLetter,
    Envelope,
    Failure,
    Store,
    StoreCounts,
    StoredDeadLetter,
    StoreError,
    WaitingEvent,
    row_bytes,
)
from shardbus.wire.codec import Extra, decode_batch
from shardbus.wire.frames import Answer, Ask, Data, Hello, Ping, Reject, Reply, decode_to_worker, encode_frame
from shardbus.wire.session import WorkerSession

log = logging.getLogger("shardbus.shard")

Send = Callable[[bytes, bytes], bool]
"""Send a frame to a peer; False where it could not be taken, and the protocol has to mend it."""

_RETRY_S: Final = 0.25  # how long a failing store is left alone
_RESTING_MAX: Final = 4096  # sessions of silent publishers that are remembered
_NS: Final = 1_000_000_000
_TELL_NS: Final = 60 * _NS
_TOLD_MAX: Final = 1024
_ASKED_MAX: Final = 256
_ANSWERS_MAX: Final = 64  # of up to a megabyte
_READS_MAX: Final = 64  # between two transactions, so that writes and their acks go on
_ASKED_S: Final = 20.0  # somebody who wants an answer asks again sooner
_PAGE_ROWS_MAX: Final = 256  # dead letters a question and answer


class _Publisher:
    """A live session, and whom to answer."""

    __slots__ = ("book", "peer", "session", "touched")

    def __init__(self, session: WorkerSession, peer: bytes) -> None:
        self.session = session
        self.peer = peer
        self.book: PublisherBook | None = None
        self.touched = False


class _Burial(NamedTuple):
    """A dead letter to write, and the waiting row that it takes the place of (0: none)."""

    letter: DeadLetter
    position: int
    then: Callable[[], None]


class _Keeping(NamedTuple):
    """A waiting event to write, and the row of the dead letter that it was (0: none), which makes room for it."""

    event: WaitingEvent
    redriven: int
    then: Callable[[], None]


class _Read(NamedTuple):
    """Something to ask of the store, once the waiting rows up to a position are in."""

    upto: int
    ask: Callable[[], Awaitable[None]]


class _Writer:
    """The one task that touches the store: a transaction of some rows, then the reads that can be answered, and again.

    Its queue is bounded by the credit of the publishers whose events it holds. While the store fails or is full it tries
    again, and nothing that was not written is acked. Room comes from removals, so those are written first, and reads
    never wait for room: what they bring back is what makes it.
    """

    def __init__(self, store: Store, limits: Limits, now: NowNs, broken: Callable[[BaseException], None]) -> None:
        self.counts = StoreCounts(dead=0, waiting=0, position_max=0)
        self.failing = ""
        self._store = store
        self._broken = broken
        self._limits = limits
        self._now = now
        self._told_ns = 0  # when it was last told that dead letters are dropped
        self._taken = 0  # waiting rows up to this position are in, or in the transaction that is under way
        self._committed = 0  # waiting rows up to this position are in, or are not wanted any more
        self._dropped: set[int] = set()  # waiting rows that reached their outcome before they were written
        self._dead: deque[_Burial] = deque()  # need a row
        self._replacing: deque[_Burial] = deque()  # take the place of their waiting row, and so need no room
        self._waiting: deque[_Keeping] = deque()  # by position
        self._revived: deque[_Keeping] = deque()  # what parked its key, at the position that it had
        self._dead_bytes = 0  # of rows in these queues
        self._waiting_bytes = 0
        self._waiting_rows = 0  # without what is redriven: that was a row before
        self._changed: dict[int, WaitingEvent] = {}  # by position: the last change is the one that counts
        self._done: deque[int] = deque()
        self._reads: deque[_Read] = deque()
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self._store.open()
        self.counts = self._store.counts()
        self._taken = self._committed = self.counts.position_max

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="shardbus-store-writer")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broken(error)  # a defect; without its writer a shard acks nothing more

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._store.close()

    def idle(self) -> bool:
        return not (self._writes_left() or self._reads or self._wanted.is_set())

    def _writes_left(self) -> bool:
        return bool(self._dead or self._replacing or self._waiting or self._revived or self._changed or self._done)

    def has_room(self, rows: int, size: int) -> bool:
        """Whether so many more waiting rows fit; then they are written before any dead letter that takes a new row."""
        counts, limits = self.counts, self._limits
        rows += counts.dead + counts.waiting + len(self._dead) + self._waiting_rows
        size += counts.bytes + self._dead_bytes + self._waiting_bytes
        if limits.store_full == "drop_oldest":
            rows -= counts.dead - counts.parked
            size -= counts.droppable_bytes
        return rows <= limits.store_rows_max and size <= limits.store_bytes_max and not self.failing

    def add_dead(self, letter: DeadLetter, position: int, then: Callable[[], None]) -> None:
        if position > self._taken and not letter.position:  # what parks is never missing: its row goes when it is dead
            self._dropped.add(position)
            position = 0
        if position:
            self._replacing.append(_Burial(letter, position, then))
        else:
            self._dead.append(_Burial(letter, 0, then))
            self._dead_bytes += row_bytes(letter.envelope)
        self._wanted.set()

    def add_waiting(self, row: WaitingEvent, then: Callable[[], None], redriven: int = 0) -> None:
        """`redriven` is the row of the dead letter that it was: that goes in the same transaction."""
        self._waiting.append(_Keeping(row, redriven, then))
        if not redriven:
            self._waiting_rows += 1
            self._waiting_bytes += row_bytes(row.envelope)
        self._wanted.set()

    def _next_waiting(self) -> WaitingEvent:
        """Take the next one out of the queue."""
        event, redriven, _ = self._waiting.popleft()
        if not redriven:
            self._waiting_rows -= 1
            self._waiting_bytes -= row_bytes(event.envelope)
        return event

    def add_revived(self, row: WaitingEvent, then: Callable[[], None], redriven: int) -> None:
        """As `add_waiting`, of what parked its key and waits again at the position that it had."""
        self._revived.append(_Keeping(row, redriven, then))
        self._wanted.set()

    def add_changed(self, row: WaitingEvent) -> None:
        self._changed[row.position] = row
        self._wanted.set()

    def add_done(self, position: int) -> None:
        if position > self._taken:
            self._dropped.add(position)
        else:
            self._done.append(position)
        self._wanted.set()

    def add_read(self, ask: Callable[[], Awaitable[None]], upto: int = 0) -> None:
        self._reads.append(_Read(upto, ask))
        self._wanted.set()

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                moved = await self._write()
                moved = await self._read() or moved
            except StoreError as error:
                self._fails(str(error))
                await asyncio.sleep(_RETRY_S)
                self._wanted.set()
                continue
            if not moved and self._writes_left():
                self._fails(f"it is full ({self.counts.dead + self.counts.waiting:,} rows, {self.counts.bytes:,} bytes)")
                await asyncio.sleep(_RETRY_S)
            elif self.failing:
                log.warning("the store writes again")
                self.failing = ""
            if self._writes_left() or self._reads:
                self._wanted.set()

    def _fails(self, why: str) -> None:
        if not self.failing:
            log.error("the store cannot write: %s; publishers wait until it can", why)
        self.failing = why

    async def _write(self) -> bool:
        """One transaction of what there is room for; whether there was anything."""
        if self._limits.store_full == "drop_oldest":
            await self._make_room()
        done = self._take_done()
        rows = self._limits.store_rows_max - self.counts.dead - self.counts.waiting + len(done)
        size = self._limits.store_bytes_max - self.counts.bytes
        kept, last = self._take_waiting(rows, size)
        revived, last = self._take_revived(last)
        waiting = [*revived, *kept]
        # Waiting events that come later were promised their room.
        new = self._take_dead(rows - self._waiting_rows, size - self._waiting_bytes)
        replacing = self._take_replacing()
        dead = [*new, *replacing]
        changed = [row for row in self._changed.values() if row.position <= last]
        if not (dead or waiting or changed or done):
            return False
        replaced = [burial.position for burial in replacing]
        redriven = [keeping.redriven for keeping in waiting if keeping.redriven]
        self._taken = last
        try:
            await self._store.write(
                dead=[burial.letter for burial in dead],
                waiting=[keeping.event for keeping in waiting],
                changed=changed,
                done=[*done, *replaced],
                redriven=redriven,
            )
        except BaseException:
            self._taken = self._committed
            self._done.extend(done)
            raise
        self._committed = last
        for _ in replacing:
            self._replacing.popleft()
        for _ in new:
            self._dead_bytes -= row_bytes(self._dead.popleft().letter.envelope)
        for _ in kept:
            self._next_waiting()
        for _ in revived:
            self._revived.popleft()
        for row in changed:
            if self._changed.get(row.position) is row:
                del self._changed[row.position]
        if self._dropped:
            # Handled before they were written, and behind others that had to be: now they are rows to remove.
            written_now = [keeping.event.position for keeping in kept]
            self._done.extend(position for position in written_now if position in self._dropped)
            self._dropped.difference_update(written_now)
        self.counts = self._store.counts()
        for burial in dead:
            burial.then()
        for keeping in waiting:
            keeping.then()
        return True

    def _take_done(self) -> list[int]:
        """Positions to remove whose rows are in."""
        taken = [self._done.popleft() for _ in range(min(len(self._done), self._limits.store_write_rows_max))]
        self._done.extend(position for position in taken if position > self._committed)
        return [position for position in taken if position <= self._committed]

    def _take_dead(self, rows: int, size: int) -> list[_Burial]:
        """Dead letters to write for which there is room."""
        dead: list[_Burial] = []
        for burial in islice(self._dead, self._limits.store_write_rows_max):
            rows -= 1
            size -= row_bytes(burial.letter.envelope)
            if rows < 0 or size < 0:
                break
            dead.append(burial)
        return dead

    def _take_replacing(self) -> list[_Burial]:
        """Dead letters to write whose waiting rows are in."""
        first = islice(self._replacing, self._limits.store_write_rows_max)
        return list(takewhile(lambda burial: burial.position <= self._committed, first))

    def _take_waiting(self, rows: int, size: int) -> tuple[list[_Keeping], int]:
        """Waiting events to write for which there is room, and the last position decided with them; forgets what is not
        wanted any more."""
        if self._dropped:
            while self._waiting and self._waiting[0].event.position in self._dropped:
                position = self._next_waiting().position
                self._dropped.discard(position)
                self._changed.pop(position, None)
                self._committed = position
        waiting: list[_Keeping] = []
        for keeping in islice(self._waiting, self._limits.store_write_rows_max):
            if not keeping.redriven:  # what was dead makes room for itself
                rows -= 1
                size -= row_bytes(keeping.event.envelope)
                if rows < 0 or size < 0:
                    break
            waiting.append(keeping)
        return waiting, waiting[-1].event.position if waiting else self._committed

    def _take_revived(self, last: int) -> tuple[list[_Keeping], int]:
        """What takes its old position again, once all rows below that are decided; and the last position with these."""
        revived: list[_Keeping] = []
        for keeping in islice(self._revived, self._limits.store_write_rows_max):
            if self._waiting and self._waiting[0].event.position < keeping.event.position:
                break
            last = max(last, keeping.event.position)
            revived.append(keeping)
        return revived, last

    async def _make_room(self) -> None:
        """Drop as many of the oldest dead letters as there is no room for what is to be written."""
        counts = self.counts
        rows = counts.dead + counts.waiting - self._limits.store_rows_max + self._waiting_rows
        size = counts.bytes - self._limits.store_bytes_max + self._waiting_bytes
        if (rows + len(self._dead) <= 0 and size + self._dead_bytes <= 0) or counts.dead == counts.parked:
            return
        for burial in islice(self._dead, self._limits.store_write_rows_max):
            rows += 1
            size += row_bytes(burial.letter.envelope)
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

    async def _read(self) -> bool:
        """Answer some of the reads that were asked for by now and whose rows are in; whether there was one."""
        answered = False
        for _ in range(min(len(self._reads), _READS_MAX)):
            read = self._reads[0]
            if read.upto <= self._committed:
                await read.ask()
                answered = True
            else:
                self._reads.append(read)
            self._reads.popleft()
        return answered


class Shard:
    """Sessions, lanes and store of one shard. `start`, then `receive` and `tick`; `drain`, then `close`.

    It is the `LaneHost` of its lanes. `journal` shows what a predecessor was running, and `predecessor` how that ended: what
    follows from the two is concluded here, once.
    """

    def __init__(
        self,
        *,
        shard: int,
        epoch: bytes,
        layout: int,
        plans: Mapping[str, Plan],
        store: Store,
        book: Book,
        journal: Journal,
        send: Send,
        now: NowNs,
        limits: Limits,
        broken: Callable[[BaseException], None],
        wall: NowNs = wall_ns,
        chance: Callable[[], float] = random.random,
        predecessor: Ended = UNKNOWN_END,
    ) -> None:
        self.shard = shard
        self.epoch = epoch
        self.book = book
        suspects = judge(journal.scene(), predecessor)
        journal.start_over(suspects)
        self._journal = journal
        self._predecessor = predecessor
        self._quarantine = Quarantine(suspects, self._note_suspect, now(), chance)
        journal.tell(len(suspects) - self._quarantine.convicted, self._quarantine.convicted)
        self.lanes = Lanes(plans, self, limits, now, chance, journal, self._quarantine)
        self._layout = layout
        self._send = send
        self._now = now
        self._wall = wall
        self._limits = limits
        self._broken = broken
        self._writer = _Writer(store, limits, now, broken)
        self._store = store
        self._position = 0
        self._adopted_position = 0  # rows up to here were written by a predecessor, and may have run
        self._adopts = False
        self._publishers: dict[bytes, _Publisher] = {}  # live, by publisher
        self._peers: dict[bytes, _Publisher] = {}
        self._greeting: dict[bytes, tuple[bytes, Hello]] = {}  # by publisher, while the store is asked about it
        self._resting: OrderedDict[bytes, WorkerSession] = OrderedDict()
        self._blocked: OrderedDict[bytes, None] = OrderedDict()
        self._touched: list[_Publisher] = []
        self._acks_due = False
        self._ack_timer: asyncio.TimerHandle | None = None
        self._asked: dict[tuple[bytes, int], int] = {}  # questions that wait for their answer, and when they were asked last
        self._answers: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()  # the last ones, for whoever missed them
        self._leaving: set[int] = set()  # rows of dead letters that are being redriven
        self._told: dict[object, tuple[int, int]] = {}  # kinds of dead letters: when one was logged, how many since
        self._draining = False
        self._sessions_made = 0

    # -- life

    async def start(self) -> None:
        """Open the store and put what waits in it into lanes, before anything new is taken.

        Raises:
            StoreError: the store cannot be opened.
        """
        if self._quarantine.suspects:
            log.warning(
                "a worker has ended%s: %d messages were under way and are tried alone now; %d are known to end workers and "
                "are not run",
                f" ({self._predecessor.told})" if self._predecessor.told else "",
                len(self._quarantine.suspects) - self._quarantine.convicted,
                self._quarantine.convicted,
            )
        await self._writer.open()
        counts = self._writer.counts
        self._adopts = counts.dead + counts.waiting > 0
        self._position = self._adopted_position = counts.position_max
        lanes = await self._store.waiting_lanes() if counts.waiting else []
        parked = set(await self._store.parked_keys()) if counts.parked else set()
        self._writer.start()
        for lane in lanes:
            # Those without a key have no order, so none waits for the first.
            due_ns = 0 if lane.key is None else self._by_our_clock(lane.due_ns)
            self.lanes.adopt(lane.key, lane.count, due_ns, parked=lane.key in parked)
            parked.discard(lane.key)
        for key in parked:
            self.lanes.adopt(key, 0, parked=True)

    async def drain(self, deadline_s: float) -> list[str]:
        """Take nothing new, and wait until everything accepted is finished; return what was not, in words."""
        self._draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        while not (self.lanes.idle() and self._writer.idle()) and loop.time() < end:  # noqa: ASYNC110 - once in a life
            await asyncio.sleep(0.005)
        self._flush_acks()
        left = self.lanes.running()
        return left or (["writes to the store"] if not self._writer.idle() else [])

    async def close(self) -> None:
        """Stop at once. What is unfinished stays with its publishers and in the store."""
        await self.lanes.close()
        await self._writer.close()
        if self._ack_timer is not None:
            self._ack_timer.cancel()

    # -- what the worker says of it

    @property
    def counts(self) -> StoreCounts:
        """What the store holds."""
        return self._writer.counts

    @property
    def store_failing(self) -> str:
        """Why the store cannot write now; empty: it can."""
        return self._writer.failing

    @property
    def backlog(self) -> int:
        """Messages that were accepted and are not finished."""
        return sum(one.session.unfinished for one in self._publishers.values())

    @property
    def publishers(self) -> int:
        """Live sessions."""
        return len(self._publishers)

    # -- frames

    def receive(self, peer: bytes, data: bytes) -> None:
        """Take what a peer sent. Bytes that are not sound end the peer's session and nothing else."""
        if peer in self._blocked:
            self.book.count("ignored")
            return
        try:
            frame = decode_to_worker(data)
            if type(frame) is Data:
                self._on_data(peer, frame)
            elif type(frame) is Hello:
                self._on_hello(peer, frame)
            elif type(frame) is Ping:
                self._on_ping(peer, frame)
            elif type(frame) is Ask:
                self._on_ask(peer, frame)
            else:
                self._on_bye(peer)
        except RemoteProtocolError as error:
            self._block(peer, error)

    def tick(self) -> None:
        """Forget publishers that have been silent for long, and suspects that took long; call it about once a second."""
        self.book.write_latencies()  # of events that nobody waits for an ack of
        if self._quarantine.suspects:
            self._quarantine.tick(self._now())
            self.lanes.release()
        silent_before = self._now() - int(self._limits.session_silence_s * _NS)
        for publisher, one in list(self._publishers.items()):
            if one.session.heard_ns < silent_before and not one.session.unfinished:
                self._rest(publisher)

    def _on_data(self, peer: bytes, frame: Data) -> None:
        one = self._peers.get(peer)
        if one is None or frame.epoch != self.epoch or frame.layout != self._layout or self._draining:
            self._refuse(peer, frame.epoch, frame.layout, greeted=one is not None)
            return
        now_ns = self._now()
        session = one.session
        session.heard_ns = now_ns
        # Unpacked before it is accepted: a batch that is not sound must not move the session.
        columns = decode_batch(frame.blob, frame.count) if frame.blob else None
        skip = session.accept(frame)
        if skip is None:
            answer = session.answer_to_refused(frame)
            if answer is not None:
                self._send(peer, answer)
            else:
                self.touched(session)
            return
        if columns is not None:
            book = one.book
            if (columns.ordinals or columns.intended_ns) and (book is None or book.retired):
                book = one.book = self.book.publisher(session.publisher, now_ns)
            if book is not None:
                book.used(now_ns)
            self.lanes.push(
                Inbound(
                    session,
                    book,
                    frame.first,
                    frame.count,
                    frame.attempt,
                    skip,
                    columns,
                    now_ns - frame.waited_ns,
                )
            )
        if skip:
            self.touched(session)

    def _on_hello(self, peer: bytes, frame: Hello) -> None:
        if frame.protocol != PROTOCOL:
            self._reject(peer, frame.epoch, "protocol")
        elif frame.epoch != self.epoch or frame.layout != self._layout or self._draining:
            self._refuse(peer, frame.epoch, frame.layout, greeted=True)
        elif frame.publisher in self._publishers:
            one = self._publishers[frame.publisher]
            self._peers.pop(one.peer, None)
            one.peer = peer
            self._welcome(one)
        elif frame.publisher in self._resting:
            self._admit(peer, self._resting.pop(frame.publisher))
        elif self._is_crowded():
            self._reject(peer, frame.epoch, "too-many-publishers")
        elif self._adopts:
            if frame.publisher not in self._greeting:
                self._writer.add_read(lambda: self._admit_after_look(frame.publisher))
            self._greeting[frame.publisher] = (peer, frame)
        else:
            self._admit(peer, self._new_session(frame))

    async def _admit_after_look(self, publisher: bytes) -> None:
        """A publisher that knew a predecessor may resend what is in the store already."""
        dead, waiting = await self._store.outcomes(publisher, self._greeting[publisher][1].first)
        peer, frame = self._greeting.pop(publisher)
        if frame.publisher in self._publishers or self._draining:
            return
        if self._is_crowded():
            self._reject(peer, frame.epoch, "too-many-publishers")
            return
        session = self._new_session(frame)
        session.adopt(dead, waiting)
        self._admit(peer, session)

    def _new_session(self, frame: Hello) -> WorkerSession:
        self._sessions_made += 1
        return WorkerSession(frame.publisher, self.epoch, frame.first, self._limits, self._sessions_made)

    def _is_crowded(self) -> bool:
        """Whether there is no room for one more session, even if the one that was silent longest made way."""
        if len(self._publishers) < self._limits.sessions_max:
            return False
        idle = [one.session for one in self._publishers.values() if not one.session.unfinished]
        oldest = min(idle, key=lambda session: session.heard_ns, default=None)
        if oldest is None or self._now() - oldest.heard_ns < self._limits.session_silence_s / 3 * _NS:
            return True
        self._rest(oldest.publisher)
        return False

    def _admit(self, peer: bytes, session: WorkerSession) -> None:
        before = self._peers.get(peer)
        if before is not None:  # one connection, one session
            self._rest(before.session.publisher)
        one = self._publishers[session.publisher] = _Publisher(session, peer)
        self._welcome(one)

    def _welcome(self, one: _Publisher) -> None:
        one.session.heard_ns = self._now()
        self._peers[one.peer] = one
        self._send(one.peer, one.session.welcome(self._credit()))
        self._ack(one, full=True)

    def _on_ping(self, peer: bytes, frame: Ping) -> None:
        one = self._peers.get(peer)
        if one is None or frame.epoch != self.epoch:
            self._refuse(peer, frame.epoch, self._layout, greeted=one is not None)
            return
        one.session.heard_ns = self._now()
        one.session.hurry(frame.awaited)
        self._ack(one, full=True)

    def _on_bye(self, peer: bytes) -> None:
        one = self._peers.get(peer)
        if one is not None:
            self._rest(one.session.publisher)

    # -- what people ask about dead letters

    def _on_ask(self, peer: bytes, ask: Ask) -> None:
        """Answer once the store has: dead letters are read, redriven and purged by the writer, behind what it writes."""
        asked = (peer, ask.request)
        known = self._answers.get(asked)
        if known is not None:
            self._send(peer, known)
            return
        is_new = asked not in self._asked
        if is_new and len(self._asked) >= _ASKED_MAX:
            return  # it is asked again
        self._asked[asked] = self._now()
        if is_new:
            try:
                request = decode_request(ask)
            except RemoteProtocolError as error:
                self._answer(asked, Answer(ask.request, str(error), b""))
                return
            self._writer.add_read(lambda: self._answer_from_store(asked, ask.what, request))

    def _answer(self, asked: tuple[bytes, int], answer: Answer) -> None:
        del self._asked[asked]
        frame = self._answers[asked] = encode_frame(answer)
        if len(self._answers) > _ANSWERS_MAX:
            self._answers.popitem(last=False)
        self._send(asked[0], frame)

    async def _answer_from_store(self, asked: tuple[bytes, int], what: str, request: Request) -> None:
        if self._now() - self._asked[asked] > _ASKED_S * _NS:
            del self._asked[asked]  # nobody waits any more, and has been told so
            return
        try:
            found = await self._store.dead_letters(request.where, request.after, min(request.limit, _PAGE_ROWS_MAX))
            last = found[-1].row if found else 0
            if what == "dead-letters":
                self._answer(asked, Answer(asked[1], "", encode_answer(page_of(found))))
                return
            found = [one for one in found if one.row not in self._leaving]
            if what == "purge":
                purged = await self._writer.purge([one.row for one in found])
                for one in found:
                    if one.letter.position:
                        self.lanes.unpark(one.letter.envelope.key)
                self._answer(asked, Answer(asked[1], "", encode_answer((purged, last))))
                return
        except StoreError as error:
            self._answer(asked, Answer(asked[1], f"the store of shard {self.shard} cannot do that now: {error}", b""))
            return
        self._redrive(found, lambda count: self._answer(asked, Answer(asked[1], "", encode_answer((count, last)))))

    def _redrive(self, found: Sequence[StoredDeadLetter], answer: Callable[[int], None]) -> None:
        """Put dead letters back at the end of their lanes, and what parked its lane at the head of that; answer once all is
        committed."""
        left = 0
        redriven = 0

        def committed(one: StoredDeadLetter) -> None:
            nonlocal left
            self._leaving.discard(one.row)
            if one.letter.position:
                self.lanes.unpark(one.letter.envelope.key, one.letter.position)
            left -= 1
            if not left:
                answer(redriven)

        for one in found:
            letter = one.letter
            if not letter.position and not self.lanes.can_rejoin(letter.envelope.key):
                continue  # its lane cannot go to the store now; it stays dead
            self._position += not letter.position
            event = WaitingEvent(
                position=letter.position or self._position,
                envelope=replace(letter.envelope, attempt=letter.envelope.attempt + 1),
                todo=dict.fromkeys(letter.handlers, 0),
            )
            self._quarantine.clear((letter.envelope.publisher, letter.envelope.seq))
            self._leaving.add(one.row)
            left += 1
            redriven += 1
            if letter.position:
                self._writer.add_revived(event, partial(committed, one), one.row)
            else:
                self._writer.add_waiting(event, partial(committed, one), one.row)
                self.lanes.rejoin(letter.envelope.key, event.position)
        if not redriven:
            answer(0)

    def _rest(self, publisher: bytes) -> None:
        one = self._publishers.pop(publisher)
        self._peers.pop(one.peer, None)
        self._resting[publisher] = one.session
        if len(self._resting) > _RESTING_MAX:
            self._resting.popitem(last=False)

    def _note_suspect(self, identity: Identity, suspect: Suspect | None) -> None:
        self._journal.note(identity, suspect)
        convicted = self._quarantine.convicted
        self._journal.tell(len(self._quarantine.suspects) - convicted, convicted)

    def _refuse(self, peer: bytes, epoch: bytes, layout: int, *, greeted: bool) -> None:
        if epoch != self.epoch or self._draining:
            self._reject(peer, epoch, "stale-epoch")
        elif layout != self._layout:
            self._reject(peer, epoch, "stale-layout")
        elif not greeted:
            self._reject(peer, epoch, "unknown-session")

    def _reject(self, peer: bytes, epoch: bytes, reason: str) -> None:
        self.book.count("rejected")
        self._send(peer, encode_frame(Reject(epoch, reason)))

    def _block(self, peer: bytes, error: RemoteProtocolError) -> None:
        """End the session of a peer that sent garbage. Its publisher may come back over a new connection."""
        self.book.count("malformed")
        one = self._peers.get(peer)
        log.warning("a peer sent what is not sound, and is ignored from now on: %s", error)
        self._send(peer, encode_frame(Reject(self.epoch if one is not None else b"", "malformed")))
        if one is not None:
            self._rest(one.session.publisher)  # its publisher may take it up again, over another connection
        self._blocked[peer] = None
        if len(self._blocked) > self._limits.blocked_peers_max:
            self._blocked.popitem(last=False)

    def _credit(self) -> tuple[int, int]:
        return self._limits.credit_share(len(self._publishers))

    # -- what the lanes ask

    def touched(self, session: WorkerSession) -> None:
        """An ack is due: at the end of the turn where the publisher waits, else a little later, together with others."""
        one = self._publishers.get(session.publisher)
        if one is None:
            return
        if not one.touched:
            one.touched = True
            self._touched.append(one)
        if session.is_awaited:
            if not self._acks_due:
                self._acks_due = True
                asyncio.get_running_loop().call_soon(self._flush_acks)
        elif self._ack_timer is None:
            self._ack_timer = asyncio.get_running_loop().call_later(self._limits.ack_delay_s, self._flush_acks)

    def _flush_acks(self) -> None:
        self._acks_due = False
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        touched, self._touched = self._touched, []
        for one in touched:
            one.touched = False
            self._ack(one)

    def _ack(self, one: _Publisher, *, full: bool = False) -> None:
        self.book.write_latencies()  # evidence comes before the ack
        self._send(one.peer, one.session.ack(self._credit(), full=full))

    def reply(self, delivery: Delivery, status: str, body: bytes) -> None:
        """Send a command's outcome to whoever holds its session now."""
        one = self._publishers.get(delivery.publisher)
        if one is not None:
            self._send(one.peer, encode_frame(Reply(self.epoch, delivery.seq, status, body)))

    def handled(self, count: int) -> None:
        """Count outcomes."""
        self.book.add_handled(count)

    def broken(self, error: BaseException) -> None:
        """Pass a defect on to the worker."""
        self._broken(error)

    def bury(self, delivery: Delivery, failure: Failure, *, parks: bool = False) -> None:
        """Write a dead letter; finish its event, and tell its parked lane, once that is committed."""
        now_ns = self._wall()
        place = 0
        if parks:
            self._position += not delivery.position
            place = delivery.position or self._position
        letter = DeadLetter(
            envelope=_envelope(delivery),
            handlers=failure.handlers,
            reason=failure.reason,
            error_type=failure.error_type,
            error=failure.error,
            place=failure.place,
            traceback=failure.traceback,
            first_ns=now_ns,
            last_ns=now_ns,
            epoch=self.epoch,
            position=place,
        )
        self.book.count("dead")
        self._tell(delivery, failure)

        def committed() -> None:
            if failure.reason == CRASHED:
                self._quarantine.clear(delivery.identity)
            if delivery.session is not None:
                delivery.session.finish_dead(delivery.seq)
                self.touched(delivery.session)
            if parks:
                self.lanes.parked(delivery.key)

        self._writer.add_dead(letter, delivery.position, committed)

    def _tell(self, delivery: Delivery, failure: Failure) -> None:
        """Log a dead letter: the first of its kind, and after that one a minute, with how many there were.

        One whose handling ends workers is always logged: those are few.
        """
        kind = (failure.reason, failure.handlers, failure.place or delivery.name)
        last_ns, more = self._told.get(kind, (0, 0))
        now_ns = self._now()
        if last_ns and now_ns - last_ns < _TELL_NS and failure.reason != CRASHED:
            self._told[kind] = (last_ns, more + 1)
            return
        if len(self._told) >= _TOLD_MAX:
            self._told.clear()
        self._told[kind] = (now_ns, 0)
        log.warning(
            "dead letter: %s key=%r (%s%s): %s%s%s",
            delivery.name,
            delivery.key,
            failure.reason,
            f" in {', '.join(failure.handlers)}" if failure.handlers else "",
            f"{failure.error_type}: " if failure.error_type else "",
            failure.error,
            f" (and {more:,} more of the kind since the last such line)" if more else "",
        )

    def can_keep(self, deliveries: Sequence[Delivery]) -> bool:
        """Whether the store has room for them, and works."""
        size = sum([len(delivery.body) for delivery in deliveries]) + ROW_OVERHEAD_BYTES * len(deliveries)
        return self._writer.has_room(len(deliveries), size)

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        """Write events as waiting, in order; finish each once that is committed."""
        for delivery in deliveries:
            self._position += 1
            delivery.position = self._position
            self._writer.add_waiting(self._waiting_event(delivery), self._kept(delivery))
        self.book.count("stored", len(deliveries))

    def amend(self, delivery: Delivery) -> None:
        """Write what has changed of an event that goes on waiting."""
        self._writer.add_changed(self._waiting_event(delivery))

    def _waiting_event(self, delivery: Delivery) -> WaitingEvent:
        due_ns = delivery.due_ns
        return WaitingEvent(
            position=delivery.position,
            envelope=_envelope(delivery),
            todo=delivery.todo or {},
            gave_up=delivery.gave_up,
            due_ns=due_ns - self._now() + self._wall() if due_ns else 0,  # a successor has its own clock
        )

    def _by_our_clock(self, wall_due_ns: int) -> int:
        return wall_due_ns - self._wall() + self._now() if wall_due_ns else 0

    def _kept(self, delivery: Delivery) -> Callable[[], None]:
        def committed() -> None:
            if delivery.session is not None:
                delivery.session.finish_waiting(delivery.seq)
                self.touched(delivery.session)

        return committed

    def forget(self, position: int) -> None:
        """Remove a waiting event that reached its outcome."""
        self._writer.add_done(position)

    def load(self, key: WireKey, after: int, upto: int, limit: int, then: Callable[[list[Delivery]], None]) -> None:
        """Read waiting events of a key back into memory, those behind `after`, once the one at `upto` is written."""

        async def read() -> None:
            rows = await self._store.load_waiting(key, after, limit)
            then([self._from_store(row) for row in rows])

        self._writer.add_read(read, upto)

    def _from_store(self, row: WaitingEvent) -> Delivery:
        envelope = row.envelope
        inherited = row.position <= self._adopted_position
        stamped = envelope.ordinal or envelope.intended_ns
        delivery = Delivery(
            None,
            self.book.publisher(envelope.publisher, self._now()) if stamped else None,
            envelope.publisher,
            envelope.seq,
            envelope.type,
            self.lanes.plans.get(envelope.type, UNKNOWN),
            envelope.key,
            envelope.body,
            envelope.ordinal,
            envelope.intended_ns,
            envelope.attempt + inherited,
            None,
            0,
            row.position,
        )
        if envelope.headers:
            delivery.extra = Extra(0, envelope.headers, 0, False)
        delivery.due_ns = self._by_our_clock(row.due_ns)
        delivery.todo = row.todo or None
        delivery.gave_up = row.gave_up
        return delivery


def _envelope(delivery: Delivery) -> Envelope:
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
