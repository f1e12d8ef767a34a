"""Whose frames a shard takes: sessions of publishers, live and resting, and the peers that are refused.

Owns admission. A publisher greets, and gets its session: a new one, the one that it had, or, where a predecessor of this
worker has left rows, one that knows which of its events the store has already. A session whose publisher is silent, or has
left, *rests*: it is remembered, and takes no credit from the others. A peer is a connection, and has one session at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from shardbus.acks import Acks, Publisher, Send
from shardbus.clock import NowNs
from shardbus.config import PROTOCOL, Limits
from shardbus.errors import RemoteProtocolError
from shardbus.feeds import Feeds
from shardbus.log_throttle import LogThrottle
from shardbus.metrics import Recorder
from shardbus.outgoing import is_worker
from shardbus.session_table import GONE
from shardbus.store import Store
from shardbus.store_writer import StoreWriter
from shardbus.wire.frames import Hello, Ping, Reject, encode_frame
from shardbus.wire.session import WorkerSession

_IDLE_NS: Final = 1_000_000_000  # a publisher that has nothing unfinished for so long makes room for one that comes
_RESTING_MAX: Final = 4096  # sessions of silent publishers that are remembered
_NS: Final = 1_000_000_000


class Publishers:
    """The sessions of one shard. No more than `sessions_max` are live at a time: whoever comes then takes the place of one
    that is idle, or is refused. Of resting ones, and of blocked peers, the oldest are forgotten.

    `live` (by publisher) and `by_peer` are to be read only. `draining`: take nothing more but from other workers.
    `may_resend`: a predecessor has left rows, so whoever is new here may send what the store has already.
    """

    def __init__(
        self,
        epoch: bytes,
        layout: int,
        limits: Limits,
        now: NowNs,
        recorder: Recorder,
        send: Send,
        feeds: Feeds,
        store: Store,
        writer: StoreWriter,
        throttle: LogThrottle,
    ) -> None:
        self.live: dict[bytes, Publisher] = {}
        self.by_peer: dict[bytes, Publisher] = {}
        self.blocked: OrderedDict[bytes, None] = OrderedDict()
        self.draining = False
        self.may_resend = False
        self.acks = Acks(self.live, epoch, recorder, send, limits)
        self._epoch = epoch
        self._layout = layout
        self._limits = limits
        self._now = now
        self._recorder = recorder
        self._send = send
        self._feeds = feeds
        self._store = store
        self._writer = writer
        self._throttle = throttle
        self._greeting: dict[bytes, tuple[bytes, Hello]] = {}  # by publisher, while the store is asked about it
        self._resting: OrderedDict[bytes, WorkerSession] = OrderedDict()
        self._sessions_made = 0

    # -- what is known

    @property
    def unfinished(self) -> int:
        """Messages that were accepted and are not finished."""
        return sum(one.session.unfinished for one in self.live.values())

    def is_closed_to(self, publisher: bytes) -> bool:
        """A worker that drains takes what other workers' handlers publish: those drain, too, and wait for it."""
        return self.draining and not is_worker(publisher, self._epoch)

    def heard_ns(self, publisher: bytes) -> int | None:
        """When a publisher was heard of last; `GONE`: it has said that it goes, and all of it is finished; None: it is not
        known here."""
        one = self.live.get(publisher)
        session = self._resting.get(publisher) if one is None else one.session
        if session is None:
            return None
        return GONE if session.left and not session.unfinished else session.heard_ns

    def silent(self) -> list[WorkerSession]:
        """Live sessions whose publishers have not been heard of for long."""
        before_ns = self._now() - int(self._limits.session_silence_s * _NS)
        return [one.session for one in self.live.values() if one.session.heard_ns < before_ns]

    # -- who comes

    def greeted(self, peer: bytes, frame: Hello) -> None:
        """A publisher greets: welcome it, reject it, or look into the store first."""
        publisher = frame.publisher
        if frame.protocol != PROTOCOL:
            self._reject(peer, frame.epoch, "protocol")
        elif frame.epoch != self._epoch or frame.layout != self._layout or self.is_closed_to(publisher):
            self.refuse(peer, frame.epoch, frame.layout, greeted=True)
        elif publisher in self.live:
            one = self.live[publisher]
            self.by_peer.pop(one.peer, None)
            if one.peer != peer:
                self._feeds.leave(one.peer)
            one.peer = peer
            self._welcome(one)
        elif self._is_crowded():
            if (resting := self._resting.get(publisher)) is not None:
                resting.heard_ns = self._now()  # it has no place, and is not gone
            self._reject(peer, frame.epoch, "too-many-publishers")
        elif publisher in self._resting:
            self._admit(peer, self._resting.pop(publisher))
        elif self.may_resend:
            if publisher not in self._greeting:
                self._writer.add_read(lambda: self._admit_after_look(publisher))
            self._greeting[publisher] = (peer, frame)
        else:
            self._admit(peer, self._new_session(frame))

    async def _admit_after_look(self, publisher: bytes) -> None:
        """A publisher that knew a predecessor may resend what is in the store already."""
        dead, waiting = await self._store.outcomes(publisher, self._greeting[publisher][1].first)
        peer, frame = self._greeting.pop(publisher)
        if publisher in self.live or self.is_closed_to(publisher):
            return
        if self._is_crowded():
            self._reject(peer, frame.epoch, "too-many-publishers")
            return
        session = self._new_session(frame)
        session.adopt(dead, waiting)
        self._admit(peer, session)

    def _new_session(self, frame: Hello) -> WorkerSession:
        self._sessions_made += 1
        return WorkerSession(frame.publisher, self._epoch, frame.first, self._limits, self._sessions_made)

    def _is_crowded(self) -> bool:
        """Whether there is no room for one more session, even if the one that was idle longest made way: it keeps its place
        where it has something unfinished, or listens, and else comes back by itself when it publishes."""
        if len(self.live) + len(self._greeting) < self._limits.sessions_max:
            return False
        idle = [
            one.session for one in self.live.values() if not one.session.unfinished and not self._feeds.listens(one.peer)
        ]
        oldest = min(idle, key=lambda session: session.used_ns, default=None)
        if oldest is None or self._now() - oldest.used_ns < _IDLE_NS:
            return True
        self.rest(oldest.publisher)
        return False

    def _admit(self, peer: bytes, session: WorkerSession) -> None:
        session.used_ns = self._now()
        one = self.live[session.publisher] = Publisher(session, peer)
        session.left = False
        self._welcome(one)

    def _welcome(self, one: Publisher) -> None:
        before = self.by_peer.get(one.peer)
        if before is not None and before is not one:  # one connection, one session
            self.rest(before.session.publisher)
        one.session.heard_ns = self._now()
        self.by_peer[one.peer] = one
        self._send(one.peer, one.session.welcome(self.acks.credit()))
        self.acks.ack(one, full=True)

    # -- who is there

    def pinged(self, peer: bytes, frame: Ping) -> None:
        """A publisher asks for a full ack."""
        one = self.by_peer.get(peer)
        if one is None or frame.epoch != self._epoch:
            self.refuse(peer, frame.epoch, self._layout, greeted=one is not None)
            return
        one.session.heard_ns = self._now()
        one.session.hurry(frame.awaited)
        self.acks.ack(one, full=True, ping=frame.number)

    # -- who goes

    def rest(self, publisher: bytes) -> None:
        """Let a live session rest."""
        one = self.live.pop(publisher)
        self.by_peer.pop(one.peer, None)
        self._feeds.leave(one.peer)
        self._resting[publisher] = one.session
        if len(self._resting) > _RESTING_MAX:
            self._resting.popitem(last=False)

    def refuse(self, peer: bytes, epoch: bytes, layout: int, *, greeted: bool) -> None:
        """Say why a frame of this epoch and layout is not taken; `greeted`: its peer has a session, or asks for one."""
        if epoch != self._epoch or (self.draining and greeted):
            self._reject(peer, epoch, "stale-epoch")
        elif layout != self._layout:
            self._reject(peer, epoch, "stale-layout")
        elif not greeted:
            self._reject(peer, epoch, "unknown-session")

    def _reject(self, peer: bytes, epoch: bytes, reason: str) -> None:
        self._recorder.count("rejected")
        self._send(peer, encode_frame(Reject(epoch, reason)))

    def block(self, peer: bytes, error: RemoteProtocolError) -> None:
        """End the session of a peer that sent garbage. Its publisher may come back over a new connection."""
        self._recorder.count("malformed")
        one = self.by_peer.get(peer)
        self._throttle.warning("malformed", lambda: f"a peer sent what is not sound, and is ignored from now on: {error}")
        self._send(peer, encode_frame(Reject(self._epoch if one is not None else b"", "malformed")))
        if one is not None:
            self.rest(one.session.publisher)  # its publisher may take it up again, over another connection
        self.blocked[peer] = None
        if len(self.blocked) > self._limits.blocked_peers_max:
            self.blocked.popitem(last=False)

    def malformed(self, session: WorkerSession, error: RemoteProtocolError) -> None:
        """A batch of this session turned out not to be sound. A publisher that greets again begins anew, and says so."""
        one = self.live.get(session.publisher)
        if one is not None and one.session is session:
            self.block(one.peer, error)
        if self._resting.get(session.publisher) is session:
            del self._resting[session.publisher]
