"""What publishers hear of their messages: acks, replies of commands, items of streams.

Owns when they are sent. An ack leaves at the end of the event loop's turn where its publisher waits for it, else a little
later, together with others; replies leave at the end of their turn, or before the ack that calls their commands finished.
The evidence is written before any ack. Who is live is `publishers`' affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from shardbus.config import Limits
from shardbus.inbound import Delivery
from shardbus.metrics import Recorder
from shardbus.wire.frames import Items, Replies, encode_frame
from shardbus.wire.session import WorkerSession

Send = Callable[[bytes, bytes], bool]
"""Send a frame to a peer; False where it could not be taken, and the protocol has to mend it."""


class Publisher:
    """A live session, and whom to answer."""

    __slots__ = ("peer", "replies", "reply_bytes", "session", "touched")

    def __init__(self, session: WorkerSession, peer: bytes) -> None:
        self.session = session
        self.peer = peer
        self.touched = False
        self.replies: list[tuple[int, str, bytes]] = []  # to be sent at the end of the turn
        self.reply_bytes = 0


class Acks:
    """Acks and answers of one shard. `live` are its publishers, by their identity. Replies that wait are bounded by a frame
    for each publisher: one more sends them."""

    def __init__(
        self, live: Mapping[bytes, Publisher], epoch: bytes, recorder: Recorder, send: Send, limits: Limits
    ) -> None:
        self._live = live
        self._epoch = epoch
        self._recorder = recorder
        self._send = send
        self._limits = limits
        self._touched: list[Publisher] = []
        self._replying: list[Publisher] = []
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Let no timer ring any more; acks that are due stay unsaid."""
        if self._timer is not None:
            self._timer.cancel()

    def credit(self) -> tuple[int, int]:
        """How many events, and how many bytes, each publisher may have unfinished."""
        return self._limits.credit_share(len(self._live))

    # -- acks

    def touched(self, session: WorkerSession) -> None:
        """An ack is due: at the end of the turn where the publisher waits, else a little later, together with others."""
        one = self._live.get(session.publisher)
        if one is None:
            return
        if not one.touched:
            one.touched = True
            self._touched.append(one)
        if session.is_awaited:
            if not self._is_due:
                self._is_due = True
                asyncio.get_running_loop().call_soon(self.flush)
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._limits.ack_delay_s, self.flush)

    def flush(self) -> None:
        """Send all acks that are due."""
        self._is_due = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        touched, self._touched = self._touched, []
        for one in touched:
            one.touched = False
            self.ack(one)

    def disown(self) -> None:
        """This process is a copy of the one that owes them: send none, and note no evidence."""
        self._touched.clear()
        self._replying.clear()

    def ack(self, one: Publisher, *, full: bool = False, ping: int = 0) -> None:
        """Send an ack now; see `WorkerSession.ack`."""
        if one.replies:
            self._send_replies(one)  # what an ack calls finished has its reply
        self._recorder.flush()  # evidence comes before the ack
        self._send(one.peer, one.session.ack(self.credit(), full=full, ping=ping))

    # -- replies

    def reply(self, delivery: Delivery, status: str, body: bytes) -> None:
        """Send a command's outcome to whoever holds its session now, with the others of this turn."""
        one = self._live.get(delivery.publisher)
        if one is None:
            return
        replies = one.replies
        if not replies:
            if not self._replying:
                asyncio.get_running_loop().call_soon(self.flush_replies)
            self._replying.append(one)
        elif (
            len(replies) == self._limits.batch_events_max
            or one.reply_bytes + len(body) > self._limits.batch_bytes_target
        ):
            self._send_replies(one)
        replies.append((delivery.seq, status, body))
        one.reply_bytes += len(body)

    def items(self, delivery: Delivery, first: int, items: tuple[bytes, ...]) -> None:
        """Send items of a stream, from its item `first` on, to whoever holds its command's session now."""
        one = self._live.get(delivery.publisher)
        if one is not None:
            self._send(one.peer, encode_frame(Items(self._epoch, delivery.seq, first, items)))

    def flush_replies(self) -> None:
        """Send all replies that wait."""
        replying, self._replying = self._replying, []
        for one in replying:
            if one.replies:
                self._send_replies(one)

    def _send_replies(self, one: Publisher) -> None:
        self._send(one.peer, encode_frame(Replies(self._epoch, tuple(one.replies))))
        one.replies.clear()
        one.reply_bytes = 0
