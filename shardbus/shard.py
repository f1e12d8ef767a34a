"""One shard's work, whatever carries the frames: sessions, lanes and the store, joined.

A worker process wraps it in sockets, `bus.local()` in nothing. Frames come in through `receive`; what is to be sent goes out
through the `send` that it was given. It acks at the end of the event loop's turn, once a session, and never before a dead
letter or a waiting event is committed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from msgspec.structs import replace

from shardbus.clock import NowNs, wall_ns
from shardbus.config import PROTOCOL, Limits
from shardbus.dead_letters import Request, decode_request, encode_answer, page_of
from shardbus.deferral import Deferrals, Deferred
from shardbus.errors import RemoteProtocolError
from shardbus.failures import CRASHED
from shardbus.feeds import Feeds
from shardbus.inbound import UNKNOWN, Delivery, Inbound
from shardbus.journal import Journal
from shardbus.lane_reads import LaneRead
from shardbus.lanes import Lanes
from shardbus.messages import WireKey, wire_name
from shardbus.metrics import Recorder
from shardbus.outgoing import Outgoing, is_worker
from shardbus.quarantine import UNKNOWN_END, Ended, Identity, Quarantine, Suspect, judge, told_after
from shardbus.registry import Plan, StateMaker
from shardbus.routing import slot_of
from shardbus.schedule import Schedule
from shardbus.scheduled_events import CANCEL, decode_cancel
from shardbus.session_events import BUILT_IN
from shardbus.session_states import SessionStates
from shardbus.session_table import GONE
from shardbus.store import (
    ROW_OVERHEAD_BYTES,
    DeadLetter,
    Envelope,
    Failure,
    LaneHead,
    ScheduledEvent,
    Store,
    StoreCounts,
    StoredDeadLetter,
    StoreError,
    WaitingEvent,
    WaitingLane,
)
from shardbus.store_writer import StoreWriter
from shardbus.wire.codec import Extra
from shardbus.wire.frames import (
    Answer,
    Ask,
    Cancel,
    Data,
    FromCaller,
    FromListener,
    Hello,
    Items,
    Ping,
    Reject,
    Replies,
    Subscribe,
    decode_to_worker,
    encode_frame,
)
from shardbus.wire.session import WorkerSession
from shardbus.wording import counted

log = logging.getLogger("shardbus.shard")

Send = Callable[[bytes, bytes], bool]
"""Send a frame to a peer; False where it could not be taken, and the protocol has to mend it."""

_IDLE_NS: Final = 1_000_000_000  # a publisher that has nothing unfinished for so long makes room for one that comes
_RESTING_MAX: Final = 4096  # sessions of silent publishers that are remembered
_NS: Final = 1_000_000_000
_TELL_NS: Final = 60 * _NS
_TOLD_MAX: Final = 1024
_ASKED_MAX: Final = 256
_ANSWERS_MAX: Final = 64  # of up to a megabyte
_ASKED_S: Final = 20.0  # somebody who wants an answer asks again sooner
_PAGE_LANES: Final = 1024  # that are adopted between two turns of the event loop
_PAGE_ROWS_MAX: Final = 256  # dead letters a question and answer
_PAGE_BYTES_MAX: Final = 1024 * 1024  # of their bodies, so that a page of large ones neither blocks nor bloats a worker


class _Publisher:
    """A live session, and whom to answer."""

    __slots__ = ("peer", "replies", "reply_bytes", "session", "touched")

    def __init__(self, session: WorkerSession, peer: bytes) -> None:
        self.session = session
        self.peer = peer
        self.touched = False
        self.replies: list[tuple[int, str, bytes]] = []  # to be sent at the end of the turn
        self.reply_bytes = 0


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
        recorder: Recorder,
        journal: Journal,
        send: Send,
        now: NowNs,
        limits: Limits,
        broken: Callable[[BaseException], None],
        wall: NowNs = wall_ns,
        chance: Callable[[], float] = random.random,
        predecessor: Ended = UNKNOWN_END,
        outgoing: Outgoing | None = None,
        states: StateMaker | None = None,
    ) -> None:
        self.shard = shard
        self.epoch = epoch
        self.outgoing = outgoing
        self.states = SessionStates(states, limits, now, outgoing)
        self.recorder = recorder
        self._journal = journal
        self._predecessor = predecessor
        self._judged = False
        self._quarantine = Quarantine({}, self._note_suspect, now(), chance)
        # Sessions are followed whether or not an application handles their events.
        ours = {wire_name(kind): plans.get(wire_name(kind)) or Plan(kind, ()) for kind in BUILT_IN}
        ours = {name: Plan(plan.message_type, plan.handlers, concludes=not plan.is_command) for name, plan in ours.items()}
        plans = dict(plans) | ours
        self._feeds = Feeds(epoch, limits, lambda name: _is_event(plans, name), send, self._feeds_due)
        self.lanes = Lanes(plans, self, limits, now, chance, journal, self._quarantine, self._feeds)
        self._layout = layout
        self._send = send
        self._now = now
        self._wall = wall
        self._limits = limits
        self._broken = broken
        # A successor does not run again what the store says has ended, so the evidence of that comes first.
        self._writer = StoreWriter(store, limits, now, broken, before=recorder.flush)
        self._store = store
        self._schedule = Schedule(store, self._writer, limits, wall, self.lanes.due)
        self._position = 0
        self._takeovers: tuple[int, ...] | None = None  # up to which positions predecessors left rows, which may have run
        self._adopts = False
        self._last_parked = 0  # how far the lanes of what a predecessor left have come
        self._last_lane: WaitingLane | None = None
        self._publishers: dict[bytes, _Publisher] = {}  # live, by publisher
        self._peers: dict[bytes, _Publisher] = {}
        self._greeting: dict[bytes, tuple[bytes, Hello]] = {}  # by publisher, while the store is asked about it
        self._resting: OrderedDict[bytes, WorkerSession] = OrderedDict()
        self._blocked: OrderedDict[bytes, None] = OrderedDict()
        self._touched: list[_Publisher] = []
        self._replying: list[_Publisher] = []
        self._acks_due = False
        self._ack_timer: asyncio.TimerHandle | None = None
        self._asked: dict[tuple[bytes, int], int] = {}  # questions that wait for their answer, and when they were asked last
        self._answers: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()  # the last ones, for whoever missed them
        self._leaving: set[int] = set()  # rows of dead letters that are being redriven
        self._told: dict[object, tuple[int, int]] = {}  # kinds of dead letters: when one was logged, how many since
        self._draining = False
        self._sessions_made = 0
        self._deferred = Deferrals()
        self._deferred_timer: asyncio.TimerHandle | None = None

    # -- life

    async def start(self) -> None:
        """Judge the predecessor's death, open the store, and put what waits there into lanes, before anything new is taken.

        May be called again where the store could not be opened.

        Raises:
            StoreError: the store cannot be opened.
        """
        self.states.start()
        if not self._judged:
            self._judged = True
            self._judge()
        await self._writer.open()
        counts = self._writer.counts
        self._adopts = counts.dead + counts.waiting + counts.removed > 0
        if self._takeovers is None:
            self._takeovers = await self._store.take_over() if counts.dead + counts.waiting else ()
        # New rows come behind all that were ever taken over, also where the last of those have gone.
        self._position = max(counts.position_max, *self._takeovers, 0)
        if counts.parked:
            await self._adopt_parked()
        if counts.waiting > counts.scheduled:
            await self._adopt_waiting()
        if counts.scheduled:
            await self._schedule.start()
        self._writer.start()
        self._schedule.tick()

    async def _adopt_parked(self) -> None:
        """Make lanes of parked keys, page by page, so that the event loop turns; goes on where it failed."""
        while page := await self._store.parked_keys(self._last_parked, _PAGE_LANES):
            for parked in page:
                self.lanes.adopt(parked.key, 0, parked=True)
            self._last_parked = page[-1].position

    async def _adopt_waiting(self) -> None:
        """Likewise of keys whose events wait; those that are parked have a lane already."""
        while page := await self._store.waiting_lanes(self._last_lane, _PAGE_LANES):
            for lane in page:
                # Those without a key have no order, so none waits for the first.
                due_ns = 0 if lane.key is None else self._by_our_clock(lane.due_ns)
                self.lanes.adopt(lane.key, lane.count, due_ns)
            self._last_lane = page[-1]

    def _judge(self) -> None:
        """Conclude what the predecessor's death says, and begin the journal anew."""
        scene, ended = self._journal.scene(), self._predecessor
        suspects = judge(scene, ended)
        self._journal.start_over(suspects)
        self._quarantine.adopt(suspects, self._now(), solos=ended.how != "killed")
        convicted = self._quarantine.convicted
        self._journal.tell(len(suspects) - convicted, convicted)
        if any(one.died != scene.suspects.get(identity, Suspect()).died for identity, one in suspects.items()):
            log.warning("a worker has ended (%s): %s", ended.told, told_after(len(suspects) - convicted, convicted))

    async def drain(self, deadline_s: float) -> list[str]:
        """Take nothing new but from other workers, and wait until everything accepted is finished, with what handlers have
        published; return what was not, in words.

        May be called again, because handlers of other workers may publish after this one has come to rest.
        """
        self._draining = True
        self.states.rest()
        self._schedule.close()  # the successor finds what is scheduled
        self.lanes.hurry()
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        late = end - min(1.0, deadline_s / 4)  # what waits for its children by then waits for them in the store
        while not self._is_at_rest(loop.time() >= late) and loop.time() < end:  # noqa: ASYNC110 - once in a life
            await asyncio.sleep(0.005)
        self._flush_acks()
        left = self.lanes.running()
        if self._deferred.in_memory:
            unfinished = counted(self._deferred.in_memory, "message")
            left = [*left, f"{unfinished} whose handlers have published what is not finished"]
        return left or (["writes to the store"] if not self._writer.idle() else [])

    def _is_at_rest(self, late: bool) -> bool:
        if late:
            for one in list(self._deferred.overdue(self._now(), 0)):
                self._store_deferred(one)
        unsettled = self._deferred.in_memory if late else len(self._deferred)
        return self.lanes.idle() and self._writer.idle() and not unsettled and (late or not self.states.pending)

    async def end_sessions(self, timeout_s: float) -> list[str]:
        """Run the ends of what sessions have open here, once nothing runs any more; return what was not run, in words."""
        await self.lanes.close()
        left = await self.states.close(min(timeout_s, self._limits.session_ends_s))
        return [f"sessions whose ends were not run: {left:,}"] if left else []

    async def close(self, *, killed: bool = False) -> None:
        """Stop at once. What is unfinished stays with its publishers and in the store; what sessions have open is ended,
        unless this is to be as if it were killed."""
        self._schedule.close()
        at_rest = self._draining and self._is_at_rest(late=False)
        await self.lanes.close()
        self._flush_replies()
        await (self.states.abort() if killed else self.states.close(self._limits.session_ends_s))
        await self._writer.close(at_rest=at_rest)
        self.recorder.flush()
        if self._ack_timer is not None:
            self._ack_timer.cancel()
        if self._deferred_timer is not None:
            self._deferred_timer.cancel()

    # -- what the worker says of it

    @property
    def counts(self) -> StoreCounts:
        """What the store holds; what was scheduled and has begun is waiting, and no longer scheduled."""
        counts, begun = self._writer.counts, self._schedule.begun
        return replace(counts, scheduled=counts.scheduled - begun) if begun else counts

    @property
    def next_due_ns(self) -> int:
        """When the next scheduled event is due, since 1970; 0: there is none."""
        return self._schedule.next_due_ns

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

    @property
    def open_sessions(self) -> int:
        """Sessions of clients that are open, or have a state, here."""
        return len(self.states)

    # -- frames

    def receive(self, peer: bytes, data: bytes) -> None:
        """Take what a peer sent. Bytes that are not sound end the peer's session and nothing else."""
        if peer in self._blocked:
            self.recorder.count("ignored")
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
            elif isinstance(frame, FromListener):
                self._on_listener(peer, frame)
            elif isinstance(frame, FromCaller):
                self._on_caller(peer, frame)
            else:
                self._on_bye(peer)
        except RemoteProtocolError as error:
            self._block(peer, error)

    def tick(self) -> None:
        """Forget publishers that have been silent for long, and suspects that took long; call it about once a second."""
        self.recorder.flush()  # of events whose publisher has left: nobody waits for their ack
        self._schedule.tick()
        self._feeds.tick(self._now())
        self.lanes.cancel_overdue()
        if self._quarantine.suspects:
            self._quarantine.tick(self._now())
            self.lanes.release()
        self.states.tick(self._heard_ns)
        silent_before = self._now() - int(self._limits.session_silence_s * _NS)
        for publisher, one in list(self._publishers.items()):
            if one.session.heard_ns < silent_before:
                if one.session.unfinished:
                    self.lanes.cancel_streams(publisher)
                else:
                    self._rest(publisher)

    def _on_data(self, peer: bytes, frame: Data) -> None:
        one = self._peers.get(peer)
        is_other = one is None or frame.epoch != self.epoch or frame.layout != self._layout
        if one is None or is_other or (self._draining and self._is_closed_to(one.session.publisher)):
            self._refuse(peer, frame.epoch, frame.layout, greeted=one is not None)
            return
        now_ns = self._now()
        session = one.session
        session.heard_ns = session.used_ns = now_ns
        skip = session.accept(frame)
        if skip is None:
            answer = session.answer_to_refused(frame)
            if answer is not None:
                self._send(peer, answer)
            else:
                self.touched(session)
            return
        if frame.blob:
            self.lanes.push(Inbound(session, self.recorder, frame, skip, now_ns - frame.waited_ns))
        if skip:
            self.touched(session)

    def _on_hello(self, peer: bytes, frame: Hello) -> None:
        if frame.protocol != PROTOCOL:
            self._reject(peer, frame.epoch, "protocol")
        elif frame.epoch != self.epoch or frame.layout != self._layout or self._is_closed_to(frame.publisher):
            self._refuse(peer, frame.epoch, frame.layout, greeted=True)
        elif frame.publisher in self._publishers:
            one = self._publishers[frame.publisher]
            self._peers.pop(one.peer, None)
            if one.peer != peer:
                self._feeds.leave(one.peer)
            one.peer = peer
            self._welcome(one)
        elif self._is_crowded():
            if (resting := self._resting.get(frame.publisher)) is not None:
                resting.heard_ns = self._now()  # it has no place, and is not gone
            self._reject(peer, frame.epoch, "too-many-publishers")
        elif frame.publisher in self._resting:
            self._admit(peer, self._resting.pop(frame.publisher))
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
        if frame.publisher in self._publishers or self._is_closed_to(frame.publisher):
            return
        if self._is_crowded():
            self._reject(peer, frame.epoch, "too-many-publishers")
            return
        session = self._new_session(frame)
        session.adopt(dead, waiting)
        self._admit(peer, session)

    def _is_closed_to(self, publisher: bytes) -> bool:
        """A worker that drains takes what other workers' handlers publish: those drain, too, and wait for it."""
        return self._draining and not is_worker(publisher, self.epoch)

    def _new_session(self, frame: Hello) -> WorkerSession:
        self._sessions_made += 1
        return WorkerSession(frame.publisher, self.epoch, frame.first, self._limits, self._sessions_made)

    def _is_crowded(self) -> bool:
        """Whether there is no room for one more session, even if the one that was idle longest made way: it keeps its place
        where it has something unfinished, or listens, and else comes back by itself when it publishes."""
        if len(self._publishers) + len(self._greeting) < self._limits.sessions_max:
            return False
        idle = [
            one.session
            for one in self._publishers.values()
            if not one.session.unfinished and not self._feeds.listens(one.peer)
        ]
        oldest = min(idle, key=lambda session: session.used_ns, default=None)
        if oldest is None or self._now() - oldest.used_ns < _IDLE_NS:
            return True
        self._rest(oldest.publisher)
        return False

    def _admit(self, peer: bytes, session: WorkerSession) -> None:
        session.used_ns = self._now()
        one = self._publishers[session.publisher] = _Publisher(session, peer)
        session.left = False
        self._welcome(one)

    def _welcome(self, one: _Publisher) -> None:
        before = self._peers.get(one.peer)
        if before is not None and before is not one:  # one connection, one session
            self._rest(before.session.publisher)
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
        self._ack(one, full=True, ping=frame.number)

    def _on_bye(self, peer: bytes) -> None:
        one = self._peers.get(peer)
        if one is not None:
            one.session.left = True
            self.lanes.cancel_all(one.session.publisher)
            self._rest(one.session.publisher)
            self.states.tick(self._heard_ns)

    def _heard_ns(self, publisher: bytes) -> int | None:
        """When a publisher was heard of last; `GONE`: it has said that it goes, and all of it is finished; None: it is not
        known here."""
        one = self._publishers.get(publisher)
        session = self._resting.get(publisher) if one is None else one.session
        if session is None:
            return None
        return GONE if session.left and not session.unfinished else session.heard_ns

    # -- who waits for commands

    def _on_caller(self, peer: bytes, frame: FromCaller) -> None:
        one = self._peers.get(peer)
        if one is None or frame.epoch != self.epoch:
            return  # who it was has gone, and so has what it waited for
        one.session.heard_ns = self._now()
        if isinstance(frame, Cancel):
            self.lanes.cancel(one.session, frame.seq)
        else:
            self.lanes.allow(one.session, frame.seq, frame.allowed)

    # -- who listens

    def _on_listener(self, peer: bytes, frame: FromListener) -> None:
        one = self._peers.get(peer)
        if one is None or frame.epoch != self.epoch or (self._draining and isinstance(frame, Subscribe)):
            self._refuse(peer, frame.epoch, self._layout, greeted=one is not None)
        else:
            self._feeds.receive(peer, frame, self._now())

    def _feeds_due(self) -> None:
        asyncio.get_running_loop().call_soon(self._feeds.flush)

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
                if ask.what == CANCEL:
                    event = decode_cancel(ask)
                    self._writer.add_read(lambda: self._cancel_scheduled(asked, event))
                    return
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

    async def _cancel_scheduled(self, asked: tuple[bytes, int], event: tuple[bytes, int]) -> None:
        if self._is_stale(asked):
            return
        try:
            cancelled = await self._schedule.cancel(*event)
        except StoreError as error:
            self._answer(asked, Answer(asked[1], f"the store of shard {self.shard} cannot do that now: {error}", b""))
            return
        self._answer(asked, Answer(asked[1], "", encode_answer(cancelled)))

    def _is_stale(self, asked: tuple[bytes, int]) -> bool:
        """Whether nobody waits for this answer any more; who did has been told so."""
        stale = self._now() - self._asked[asked] > _ASKED_S * _NS
        if stale:
            del self._asked[asked]
        return stale

    async def _answer_from_store(self, asked: tuple[bytes, int], what: str, request: Request) -> None:
        if self._is_stale(asked):
            return
        try:
            limit = min(request.limit, _PAGE_ROWS_MAX)
            found = await self._store.dead_letters(request.where, request.after, limit, _PAGE_BYTES_MAX)
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
                envelope=self._attempted(letter.envelope, letter.envelope.attempt + 1, letter.position),
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
        self._feeds.leave(one.peer)
        self._resting[publisher] = one.session
        if len(self._resting) > _RESTING_MAX:
            self._resting.popitem(last=False)

    def _note_suspect(self, identity: Identity, suspect: Suspect | None) -> None:
        self._journal.note(identity, suspect)
        convicted = self._quarantine.convicted
        self._journal.tell(len(self._quarantine.suspects) - convicted, convicted)

    def _refuse(self, peer: bytes, epoch: bytes, layout: int, *, greeted: bool) -> None:
        if epoch != self.epoch or (self._draining and greeted):
            self._reject(peer, epoch, "stale-epoch")
        elif layout != self._layout:
            self._reject(peer, epoch, "stale-layout")
        elif not greeted:
            self._reject(peer, epoch, "unknown-session")

    def _reject(self, peer: bytes, epoch: bytes, reason: str) -> None:
        self.recorder.count("rejected")
        self._send(peer, encode_frame(Reject(epoch, reason)))

    def _block(self, peer: bytes, error: RemoteProtocolError) -> None:
        """End the session of a peer that sent garbage. Its publisher may come back over a new connection."""
        self.recorder.count("malformed")
        one = self._peers.get(peer)
        more = self._more_of("malformed")
        if more is not None:
            log.warning("a peer sent what is not sound, and is ignored from now on: %s%s", error, _and_more(more))
        self._send(peer, encode_frame(Reject(self.epoch if one is not None else b"", "malformed")))
        if one is not None:
            self._rest(one.session.publisher)  # its publisher may take it up again, over another connection
        self._blocked[peer] = None
        if len(self._blocked) > self._limits.blocked_peers_max:
            self._blocked.popitem(last=False)

    def malformed(self, session: WorkerSession, error: RemoteProtocolError) -> None:
        """A batch of this session turned out not to be sound. A publisher that greets again begins anew, and says so."""
        one = self._publishers.get(session.publisher)
        if one is not None and one.session is session:
            self._block(one.peer, error)
        if self._resting.get(session.publisher) is session:
            del self._resting[session.publisher]

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

    def _ack(self, one: _Publisher, *, full: bool = False, ping: int = 0) -> None:
        if one.replies:
            self._send_replies(one)  # what an ack calls finished has its reply
        self.recorder.flush()  # evidence comes before the ack
        self._send(one.peer, one.session.ack(self._credit(), full=full, ping=ping))

    def reply(self, delivery: Delivery, status: str, body: bytes) -> None:
        """Send a command's outcome to whoever holds its session now, with the others of this turn."""
        one = self._publishers.get(delivery.publisher)
        if one is None:
            return
        replies = one.replies
        if not replies:
            if not self._replying:
                asyncio.get_running_loop().call_soon(self._flush_replies)
            self._replying.append(one)
        elif (
            len(replies) == self._limits.batch_events_max
            or one.reply_bytes + len(body) > self._limits.batch_bytes_target
        ):
            self._send_replies(one)
        replies.append((delivery.seq, status, body))
        one.reply_bytes += len(body)

    def _send_replies(self, one: _Publisher) -> None:
        self._send(one.peer, encode_frame(Replies(self.epoch, tuple(one.replies))))
        one.replies.clear()
        one.reply_bytes = 0

    def _flush_replies(self) -> None:
        replying, self._replying = self._replying, []
        for one in replying:
            if one.replies:
                self._send_replies(one)

    def items(self, delivery: Delivery, first: int, items: tuple[bytes, ...]) -> None:
        """Send items of a stream to whoever holds its command's session now."""
        one = self._publishers.get(delivery.publisher)
        if one is not None:
            self._send(one.peer, encode_frame(Items(self.epoch, delivery.seq, first, items)))

    def handled(self, count: int) -> None:
        """Count outcomes."""
        self.recorder.add_handled(count)

    def note(self, delivery: Delivery, *, dead: bool) -> None:
        """Note the evidence of a single event; it is written before the next ack."""
        self.recorder.note(
            delivery.publisher,
            delivery.key,
            delivery.ordinal,
            delivery.attempt,
            delivery.intended_ns,
            delivery.began_ns,
            self._now() if delivery.intended_ns else 0,
            dead=dead,
        )

    def broken(self, error: BaseException) -> None:
        """Pass a defect on to the worker."""
        self._broken(error)

    async def concluded(self, delivery: Delivery) -> None:
        """An event of a session reaches its outcome: its handlers have ended, or it has none."""
        await self.states.concluded(delivery.name, delivery.key, delivery.publisher, delivery.seq, delivery.body)

    def conclusion_failed(self, delivery: Delivery, error: BaseException) -> None:
        """See `SessionStates.failed`."""
        self.states.failed(delivery.key, error)

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
        self.recorder.count("dead")
        self._tell(delivery, failure)

        def committed() -> None:
            if failure.reason == CRASHED:
                self._quarantine.clear(delivery.identity)
            if delivery.session is not None:
                delivery.session.finish_dead(delivery.seq)
                self.touched(delivery.session)
            if parks:
                self.lanes.parked(delivery.key)

        row, then = self._instead(delivery, committed)
        self._writer.add_dead(letter, delivery.position, then, begun=row)

    def _tell(self, delivery: Delivery, failure: Failure) -> None:
        """Log a dead letter: the first of its kind, and after that one a minute, with how many there were.

        One whose handling ends workers is always logged: those are few.
        """
        more = self._more_of((failure.reason, failure.handlers, failure.place or delivery.name))
        if more is None and failure.reason != CRASHED:
            return
        log.warning(
            "dead letter: %s key=%r (%s%s): %s%s%s",
            delivery.name,
            delivery.key,
            failure.reason,
            f" in {', '.join(failure.handlers)}" if failure.handlers else "",
            f"{failure.error_type}: " if failure.error_type else "",
            failure.error,
            _and_more(more or 0),
        )

    def _more_of(self, kind: object) -> int | None:
        """How many of a kind were not logged since the last that was; None: this one is not to be, either."""
        last_ns, more = self._told.get(kind, (0, 0))
        now_ns = self._now()
        if last_ns and now_ns - last_ns < _TELL_NS:
            self._told[kind] = (last_ns, more + 1)
            return None
        if len(self._told) >= _TOLD_MAX:
            self._told.clear()
        self._told[kind] = (now_ns, 0)
        return more

    def can_keep(self, deliveries: Sequence[Delivery]) -> bool:
        """Whether the store has room for them, and works."""
        sizes = [len(delivery.body) for delivery in deliveries if not delivery.scheduled]  # else it has one
        return self._writer.has_room(len(sizes), sum(sizes) + ROW_OVERHEAD_BYTES * len(sizes))

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        """Write events as waiting, in order; finish each once that is committed."""
        for delivery in deliveries:
            self._position += 1
            delivery.position = self._position
            row, then = self._instead(delivery, self._kept(delivery))
            self._writer.add_waiting(self._waiting_event(delivery), then, begun=row)
        self.recorder.count("stored", len(deliveries))

    def put_off(self, delivery: Delivery) -> bool:
        """Write an event that is due later as scheduled; finish it as waiting once that is committed."""
        extra = delivery.extra
        if extra is None or extra.timeout_ns or extra.due_ns <= self._wall():
            return False
        self._schedule.add(ScheduledEvent(envelope=_envelope(delivery), due_ns=extra.due_ns), self._kept(delivery))
        self.recorder.count("stored")
        return True

    def amend(self, delivery: Delivery) -> None:
        """Write what has changed of an event that goes on waiting."""
        self._writer.add_changed(self._waiting_event(delivery))

    def _waiting_event(self, delivery: Delivery) -> WaitingEvent:
        due_ns, deadline_ns = delivery.due_ns, delivery.deadline_ns
        todo = delivery.todo or {}
        if delivery.children is not None and delivery.children.pending:
            # What they have published may end with this worker; then a successor is to run them again.
            todo = todo and {**dict.fromkeys(delivery.children.pending, 0), **todo}
            if delivery.children.then is None:
                delivery.children.then = partial(self.amend, delivery)
        return WaitingEvent(
            position=delivery.position,
            envelope=self._attempted(_envelope(delivery), delivery.attempt, delivery.position),
            todo=todo,
            gave_up=delivery.gave_up,
            due_ns=due_ns - self._now() + self._wall() if due_ns else 0,  # a successor has its own clock
            deadline_ns=deadline_ns - self._now() + self._wall() if deadline_ns else 0,
        )

    def _inherited(self, position: int) -> int:
        """How often a waiting row was taken over, and so may have been delivered once more."""
        return len(self._takeovers) - bisect_left(self._takeovers, position) if self._takeovers and position else 0

    def _attempted(self, envelope: Envelope, attempt: int, position: int) -> Envelope:
        """An event that is to wait at a position, as the store has it: without what is added when that is read."""
        attempt -= self._inherited(position)
        return envelope if attempt == envelope.attempt else replace(envelope, attempt=attempt)

    def _by_our_clock(self, at_ns: int) -> int:
        return at_ns - self._wall() + self._now() if at_ns else 0

    def _kept(self, delivery: Delivery) -> Callable[[], None]:
        def committed() -> None:
            if delivery.session is not None:
                delivery.session.finish_waiting(delivery.seq)
                self.touched(delivery.session)

        return committed

    def forget(self, delivery: Delivery) -> None:
        """Remove a waiting event, or a scheduled one, that was handled."""
        if delivery.position:
            self._writer.add_done(delivery.position)
        else:
            self._schedule.remove(delivery.scheduled)

    def take_due(self) -> Delivery | None:
        """The next scheduled event that is due. Its row stands for it until it has ended, as a publisher does."""
        taken = self._schedule.take()
        if taken is None:
            return None
        found, is_repeat = taken
        delivery = self._from_envelope(found.event.envelope, int(is_repeat))
        delivery.scheduled = found.row
        return delivery

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

    # -- what waits for its children

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
        self._position += 1
        of_worker = session is not None and is_worker(session.publisher, self.epoch)
        one = Deferred(delivery, failure, parks, self._position, of_worker, self._now())
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
                asyncio.get_running_loop().call_soon(self.lanes.parked, delivery.key)
        elif failure is not None:
            self._store_deferred(one)
        events_max, bytes_max = self._credit()
        while self._deferred.are_many(of_worker, events_max // 2, bytes_max // 2):
            if not self._may_store(of_worker) or not self._store_deferred(self._deferred.oldest(of_worker)):
                break
        self._watch_deferred()

    def _watch_deferred(self) -> None:
        if self._deferred_timer is None and self._deferred.in_memory:
            every_s = self._limits.lane_wait_s_max / 4
            self._deferred_timer = asyncio.get_running_loop().call_later(every_s, self._look_at_deferred)

    def _look_at_deferred(self) -> None:
        self._deferred_timer = None
        wait_ns = int(self._limits.lane_wait_s_max * _NS)
        may_store = {of_worker: self._may_store(of_worker) for of_worker in (True, False)}
        for one in list(self._deferred.overdue(self._now(), wait_ns)):
            if (one.failure is not None or may_store[one.of_worker]) and not self._store_deferred(one):
                break
        self._watch_deferred()

    def _may_store(self, of_worker: bool) -> bool:
        """Publishers other than workers are held up where handlers publish more than is taken; see `deferral`."""
        return of_worker or self.outgoing is None or self.outgoing.has_room()

    def _store_deferred(self, one: Deferred) -> bool:
        """Let a message wait for its children in the store; False where that has no room. A command is finished: none runs
        twice, so nothing is lost with it."""
        delivery = one.delivery
        if not delivery.is_event:
            self._deferred.stored(one)
            one.is_written = True
            self._finish(delivery)
            return True
        if not self.can_keep((delivery,)):
            return False
        delivery.position = one.place
        self._deferred.stored(one)
        self.recorder.count("stored")
        row, then = self._instead(delivery, partial(self._deferred_kept, one))
        self._writer.add_late(self._waiting_event(delivery), then, begun=row)
        return True

    def _deferred_kept(self, one: Deferred) -> None:
        one.is_written = True
        self._kept(one.delivery)()
        if one.is_untied:
            self._settle(one)
        elif one.parks:
            self.lanes.parked(one.delivery.key)

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
            self.bury(delivery, one.failure, parks=one.parks)
            return
        if delivery.position or delivery.scheduled:
            self.forget(delivery)
        self._finish(delivery)

    def _finish(self, delivery: Delivery) -> None:
        if delivery.session is not None:
            delivery.session.finish(delivery.seq)
            self.touched(delivery.session)

    def load(self, key: WireKey, after: int, upto: int, limit: int, then: Callable[[list[Delivery]], None]) -> None:
        """Read waiting events of a key back into memory, those behind `after`, once the one at `upto` is written."""

        def found(rows: list[WaitingEvent]) -> None:
            then([self._from_store(row) for row in rows])

        self._writer.add_lane_read(LaneRead(LaneHead(key, after, limit), upto, found))

    def _from_store(self, row: WaitingEvent) -> Delivery:
        delivery = self._from_envelope(row.envelope, self._inherited(row.position))
        delivery.position = row.position
        delivery.deadline_ns = self._by_our_clock(row.deadline_ns)
        delivery.due_ns = self._by_our_clock(row.due_ns)
        delivery.todo = row.todo or None
        delivery.gave_up = row.gave_up
        return delivery

    def _from_envelope(self, envelope: Envelope, inherited: int) -> Delivery:
        """A message of a store; it may have run in so many predecessors since its attempts were written."""
        return Delivery(
            None,
            envelope.publisher,
            envelope.seq,
            envelope.type,
            self.lanes.plans.get(envelope.type, UNKNOWN),
            envelope.key,
            envelope.body,
            envelope.ordinal,
            envelope.intended_ns,
            envelope.attempt + inherited,
            Extra(0, envelope.headers, 0, False) if envelope.headers else None,
        )


def _is_event(plans: Mapping[str, Plan], name: str) -> bool:
    return name in plans and not plans[name].is_command


def _and_more(count: int) -> str:
    return f" (and {count:,} more of the kind since the last such line)" if count else ""


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
