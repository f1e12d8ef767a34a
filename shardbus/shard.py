"""One shard's work, whatever carries the frames: sessions, lanes and the store, joined.

A worker process wraps it in sockets, `bus.local()` in nothing. Frames come in through `receive`; what is to be sent goes out
through the `send` that it was given. Each part owns one thing, and this is where they meet:

    publishers   who is admitted          acks         what publishers hear, and when
    lanes        what runs                lane_rows    what of it goes to the store, and comes back
    settling     what waits for children  inquiries    what people ask about dead letters and scheduled events
    feeds        who listens              adoption     what a predecessor has left

It acks at the end of the event loop's turn, once a session, and never before a dead letter or a waiting event is committed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from shardbus.acks import Send
from shardbus.adoption import Adoption
from shardbus.clock import NowNs, wall_ns
from shardbus.config import Limits
from shardbus.envelopes import Envelopes
from shardbus.errors import RemoteProtocolError
from shardbus.feeds import Feeds
from shardbus.inbound import Delivery, Inbound
from shardbus.inquiries import Inquiries
from shardbus.journal import Journal
from shardbus.lane_rows import LaneRows
from shardbus.lanes import Lanes
from shardbus.log_throttle import LogThrottle
from shardbus.messages import wire_name
from shardbus.metrics import Recorder
from shardbus.outgoing import Outgoing
from shardbus.publishers import Publishers
from shardbus.quarantine import UNKNOWN_END, Ended, Identity, Quarantine, Suspect
from shardbus.registry import Plan, StateMaker
from shardbus.schedule import Schedule
from shardbus.session_events import BUILT_IN
from shardbus.session_states import SessionStates
from shardbus.settling import Settling
from shardbus.store import Store, StoreCounts
from shardbus.store_writer import StoreWriter
from shardbus.wire.frames import Ask, Cancel, Data, FromCaller, FromListener, Hello, Ping, Subscribe, decode_to_worker
from shardbus.wording import counted

log = logging.getLogger("shardbus.shard")


class Shard:
    """Sessions, lanes and store of one shard. `start`, then `receive` and `tick`; `drain`, then `close`.

    It is the `LaneHost` of its lanes; most of what they ask, its parts answer. `journal` shows what a predecessor was
    running, and `predecessor` how that ended.
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
        self._layout = layout
        self._send = send
        self._now = now
        self._limits = limits
        self._journal = journal
        self._quarantine = Quarantine({}, self._note_suspect, now(), chance)
        plans = _with_built_in(plans)
        self._feeds = Feeds(epoch, limits, lambda name: _is_event(plans, name), send, self._feeds_due)
        self.lanes = lanes = Lanes(plans, self, limits, now, chance, journal, self._quarantine, self._feeds)
        # A successor does not run again what the store says has ended, so the evidence of that comes first.
        self._writer = writer = StoreWriter(store, limits, now, broken, before=recorder.flush)
        self._schedule = schedule = Schedule(store, writer, limits, wall, lanes.due)
        self._throttle = throttle = LogThrottle(now, log)
        self._publishers = Publishers(epoch, layout, limits, now, recorder, send, self._feeds, store, writer, throttle)
        self._peers = self._publishers.by_peer
        self._acks = acks = self._publishers.acks
        envelopes = Envelopes(plans, now, wall)
        self._rows = rows = LaneRows(
            epoch,
            envelopes,
            writer,
            schedule,
            self._quarantine,
            recorder,
            wall,
            throttle,
            touched=acks.touched,
            parked=lanes.parked,
        )
        self._deferred = Settling(
            epoch,
            rows,
            schedule,
            outgoing,
            limits,
            now,
            credit=acks.credit,
            touched=acks.touched,
            parked=lanes.parked,
        )
        self._inquiries = Inquiries(shard, store, writer, schedule, lanes, rows, envelopes, self._quarantine, send, now)
        self._adoption = Adoption(journal, predecessor, self._quarantine, store, lanes, envelopes, now)
        # What the lanes ask, where one part alone answers: they call it without a step between.
        self.broken = broken
        self.touched = acks.touched
        self.reply = acks.reply
        self.items = acks.items
        self.malformed = self._publishers.malformed
        self.handled = recorder.add_handled
        self.bury = rows.bury
        self.bury_row = rows.bury_row
        self.can_keep = rows.can_keep
        self.keep = rows.keep
        self.put_off = rows.put_off
        self.amend = rows.amend
        self.take_due = rows.take_due
        self.forget = rows.forget
        self.load = rows.load
        self.defer = self._deferred.defer

    # -- life

    async def start(self) -> None:
        """Judge the predecessor's death, open the store, and put what waits there into lanes, before anything new is taken.

        May be called again where the store could not be opened.

        Raises:
            StoreError: the store cannot be opened.
        """
        self.states.start()
        self._adoption.judge()
        await self._writer.open()
        counts = self._writer.counts
        self._publishers.may_resend = counts.dead + counts.waiting + counts.removed > 0
        self._rows.begin(await self._adoption.take_over(counts))
        await self._adoption.adopt(counts)
        if counts.scheduled:
            await self._schedule.start()
        self._writer.start()
        self._schedule.tick()

    async def drain(self, deadline_s: float) -> list[str]:
        """Take nothing new but from other workers, and wait until everything accepted is finished, with what handlers have
        published; return what was not, in words.

        May be called again, because handlers of other workers may publish after this one has come to rest.
        """
        self._publishers.draining = True
        self.states.rest()
        self._schedule.close()  # the successor finds what is scheduled
        self.lanes.hurry()
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        late = end - min(1.0, deadline_s / 4)  # what waits for its children by then waits for them in the store
        while not self._is_at_rest(loop.time() >= late) and loop.time() < end:  # noqa: ASYNC110 - once in a life
            await asyncio.sleep(0.005)
        self._acks.flush()
        left = self.lanes.running()
        if self._deferred.in_memory:
            unfinished = counted(self._deferred.in_memory, "message")
            left = [*left, f"{unfinished} whose handlers have published what is not finished"]
        return left or (["writes to the store"] if not self._writer.idle() else [])

    def _is_at_rest(self, late: bool) -> bool:
        if late:
            self._deferred.store_all()
        unsettled = self._deferred.in_memory if late else len(self._deferred)
        return self.lanes.idle() and self._writer.idle() and not unsettled and (late or not self.states.pending)

    async def end_sessions(self, timeout_s: float) -> list[str]:
        """Run the ends of what sessions have open here, once nothing runs any more; return what was not run, in words."""
        await self.lanes.close()
        left = await self.states.close(min(timeout_s, self._limits.session_ends_s))
        return [f"sessions whose ends were not run: {left:,}"] if left else []

    def disown(self) -> None:
        """This process is a copy of the one whose shard this is: when the handler that made it returns, it ends."""
        self.lanes.disown()
        self._acks.disown()

    async def close(self, *, killed: bool = False) -> None:
        """Stop at once. What is unfinished stays with its publishers and in the store; what sessions have open is ended,
        unless this is to be as if it were killed."""
        self._schedule.close()
        at_rest = self._publishers.draining and self._is_at_rest(late=False)
        await self.lanes.close()
        self._acks.flush_replies()
        await (self.states.abort() if killed else self.states.close(self._limits.session_ends_s))
        await self._writer.close(at_rest=at_rest)
        self.recorder.flush()
        self._acks.close()
        self._deferred.close()
        if not killed:
            self._throttle.close()

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
        return self._publishers.unfinished

    @property
    def publishers(self) -> int:
        """Live sessions."""
        return len(self._publishers.live)

    @property
    def open_sessions(self) -> int:
        """Sessions of clients that are open, or have a state, here."""
        return len(self.states)

    # -- frames

    def receive(self, peer: bytes, data: bytes) -> None:
        """Take what a peer sent. Bytes that are not sound end the peer's session and nothing else."""
        if peer in self._publishers.blocked:
            self.recorder.count("ignored")
            return
        try:
            frame = decode_to_worker(data)
            if type(frame) is Data:
                self._on_data(peer, frame)
            elif type(frame) is Hello:
                self._publishers.greeted(peer, frame)
            elif type(frame) is Ping:
                self._publishers.pinged(peer, frame)
            elif type(frame) is Ask:
                self._inquiries.ask(peer, frame)
            elif isinstance(frame, FromListener):
                self._on_listener(peer, frame)
            elif isinstance(frame, FromCaller):
                self._on_caller(peer, frame)
            else:
                self._on_bye(peer)
        except RemoteProtocolError as error:
            self._publishers.block(peer, error)

    def tick(self) -> None:
        """Forget publishers that have been silent for long, and suspects that took long; call it about once a second."""
        self.recorder.flush()  # of events whose publisher has left: nobody waits for their ack
        self._schedule.tick()
        self._feeds.tick(self._now())
        self._throttle.tick()
        self.lanes.cancel_overdue()
        if self._quarantine.suspects:
            self._quarantine.tick(self._now())
            self.lanes.release()
        self.states.tick(self._publishers.heard_ns)
        for session in self._publishers.silent():
            if session.unfinished:
                self.lanes.cancel_streams(session.publisher)
            else:
                self._publishers.rest(session.publisher)

    def _on_data(self, peer: bytes, frame: Data) -> None:
        publishers = self._publishers
        one = self._peers.get(peer)
        is_other = one is None or frame.epoch != self.epoch or frame.layout != self._layout
        if one is None or is_other or (publishers.draining and publishers.is_closed_to(one.session.publisher)):
            publishers.refuse(peer, frame.epoch, frame.layout, greeted=one is not None)
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

    def _on_bye(self, peer: bytes) -> None:
        one = self._peers.get(peer)
        if one is not None:
            one.session.left = True
            self.lanes.cancel_all(one.session.publisher)
            self._publishers.rest(one.session.publisher)
            self.states.tick(self._publishers.heard_ns)

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
        if one is None or frame.epoch != self.epoch or (self._publishers.draining and isinstance(frame, Subscribe)):
            self._publishers.refuse(peer, frame.epoch, self._layout, greeted=one is not None)
        else:
            self._feeds.receive(peer, frame, self._now())

    def _feeds_due(self) -> None:
        asyncio.get_running_loop().call_soon(self._feeds.flush)

    # -- what the lanes ask, and no part answers

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

    async def concluded(self, delivery: Delivery) -> None:
        """An event of a session reaches its outcome: its handlers have ended, or it has none."""
        await self.states.concluded(delivery.name, delivery.key, delivery.publisher, delivery.seq, delivery.body)

    def conclusion_failed(self, delivery: Delivery, error: BaseException) -> None:
        """See `SessionStates.failed`."""
        self.states.failed(delivery.key, error)

    def _note_suspect(self, identity: Identity, suspect: Suspect | None) -> None:
        self._journal.note(identity, suspect)
        convicted = self._quarantine.convicted
        self._journal.tell(len(self._quarantine.suspects) - convicted, convicted)


def _is_event(plans: Mapping[str, Plan], name: str) -> bool:
    return name in plans and not plans[name].is_command


def _with_built_in(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """The plans of an application and of the bus's own events: sessions are followed whether or not it handles those."""
    ours = {wire_name(kind): plans.get(wire_name(kind)) or Plan(kind, ()) for kind in BUILT_IN}
    ours = {name: Plan(plan.message_type, plan.handlers, concludes=not plan.is_command) for name, plan in ours.items()}
    return dict(plans) | ours
