"""Both ends of a session: what may be sent, what was received, what is finished. Sans-IO.

One session joins one publisher to one shard. The publisher numbers its messages from 0; the numbers live as long as the
publisher and outlive workers. Each end is a small state machine whose moves stand in a table; a frame that the table does
not know in the present state came late and is ignored. Neither end reads a clock: the time is an argument.

    PublisherSession   outbox side: keeps packed batches until they are finished, resends them to the next epoch
    WorkerSession      worker side: takes batches in order, collects what is finished, says so
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Final

import msgspec

from shardbus.config import PROTOCOL, Limits
from shardbus.errors import RemoteProtocolError
from shardbus.wire.codec import thinned
from shardbus.wire.frames import (
    Ack,
    Bye,
    Cancel,
    Data,
    Hello,
    Nack,
    Ping,
    Reject,
    Replies,
    ToPublisher,
    Welcome,
    encode_frame,
)
from shardbus.wire.ranges import RangeSet

_NS: Final = 1_000_000_000


class State(enum.Enum):
    """Where a publisher's end stands."""

    CLOSED = "closed"  # no worker is known, or the known one is gone
    GREETING = "greeting"  # a greeting is on its way
    OPEN = "open"


class Replied(msgspec.Struct, frozen=True):
    """Outcomes of commands arrived: of each its sequence, status and body."""

    replies: tuple[tuple[int, str, bytes], ...]


class Rejected(msgspec.Struct, frozen=True):
    """The worker said no; `reason` is a key of `frames.REASONS`."""

    reason: str


class Lost(msgspec.Struct, frozen=True):
    """A command was sent to a worker that has died, and is not sent again."""

    seq: int


Happened = Replied | Rejected | Lost


class _Packed:
    """A sealed batch, kept until every message in it is finished."""

    __slots__ = ("attempt", "blob", "commands", "count", "first", "idempotent", "offered_ns", "sent", "unfinished", "whole")

    def __init__(
        self,
        first: int,
        count: int,
        blob: bytes,
        commands: tuple[int, ...],
        offered_ns: int,
        idempotent: tuple[int, ...],
    ) -> None:
        self.offered_ns = offered_ns
        self.first = first
        self.count = count
        self.blob = blob
        self.attempt = 1
        self.sent = False  # in this session, so that the worker may have it, whatever was gone back since
        self.commands = commands  # sequences of commands that must not be sent twice
        self.idempotent = idempotent  # and of those that may
        self.unfinished = count
        self.whole = count  # messages whose bodies are in the blob

    @property
    def may_have_run(self) -> bool:
        """Whether a worker may have it, or one that has died may have had it."""
        return self.sent or self.attempt > 1


_DATA_BYTES_MAX: Final = 16 * 1024  # of a data frame besides its batch: ranges to skip, and numbers

_THIN: Final = 4  # a batch is thinned out when only one in so many of its bodies is still wanted …
_THIN_BYTES_MIN: Final = 4096  # … and it holds so many bytes
_MARKS_MAX: Final = 8  # pings whose answers are waited for; the oldest is forgotten

_first_of: Final = attrgetter("first")


class PublisherSession:
    """The publisher's end towards one shard.

    Holds every message that was offered and is not finished; `held_events` and `held_bytes` are for the outbox to bound.
    The caller feeds frames to `receive`, time to `tick`, and sends what `frames_to_send` yields. `on_finished` is called
    with each range of sequences, half-open, that has been finished.
    """

    def __init__(
        self, publisher: bytes, limits: Limits, on_finished: Callable[[int, int], None] | None = None
    ) -> None:
        self._on_finished = on_finished
        self.publisher = publisher
        self.state = State.CLOSED
        self.epoch = b""
        self.layout = 0
        self.next_seq = 0
        self.held_events = 0  # offered and not finished
        self.held_bytes = 0
        self._limits = limits
        self._finished_since = 0  # messages, since it was looked at what can be let go of
        self._unsent: deque[_Packed] = deque()
        self._sent: list[_Packed] = []  # sent in this epoch and not finished, by first sequence
        self._sent_next = 0  # the sequence after the last one sent in this epoch
        self._in_flight_events = 0
        self._in_flight_bytes = 0
        self._cumulative = 0  # everything below is finished
        self._finished = RangeSet()  # finished above it
        self._credit_events = 0
        self._credit_bytes = 0
        self._dead_before = 0  # counts of sessions that have ended
        self._waiting_before = 0
        self._dead = 0
        self._waiting = 0
        self._session: int | None = None  # the worker's number for it; None: no welcome of this epoch yet
        self._greeted_ns = -(2**63)
        self._pinged_ns = 0
        self._pings = 0
        self._marks: dict[int, int] = {}  # by ping: what was sent before it, so that less in its answer means a loss
        self._awaited = 0  # somebody waits for everything below to be finished
        self._abandoned: set[int] = set()  # commands that nobody waits for, and that may not be finished
        self._control: list[bytes] = []  # greetings and pings to send before data

    # -- what is known

    @property
    def dead(self) -> int:
        """Events that ended as dead letters, over all epochs."""
        return self._dead_before + self._dead

    @property
    def waiting(self) -> int:
        """Events that were kept by a shard's store, over all epochs."""
        return self._waiting_before + self._waiting

    def unfinished_below(self, seq: int) -> int:
        """How many messages before `seq` are not finished."""
        if self._cumulative >= seq:
            return 0
        finished = sum(end - start for start, end in self._finished.within(self._cumulative, seq))
        return seq - self._cumulative - finished

    # -- what the caller does

    def offer(
        self,
        blob: bytes,
        count: int,
        commands: tuple[int, ...] = (),
        now_ns: int = 0,
        idempotent: tuple[int, ...] = (),
    ) -> None:
        """Take over a sealed batch of the next `count` sequences; where some have no time without end, say when.

        `idempotent` are commands that are sent again to a worker's successor, as events are.
        """
        assert len(blob) <= self._limits.frame_bytes_max - _DATA_BYTES_MAX  # a larger frame would never arrive
        self._unsent.append(_Packed(self.next_seq, count, blob, commands, now_ns, idempotent))
        self.next_seq += count
        self.held_events += count
        self.held_bytes += len(blob)
        if self._abandoned:
            unsent = self._abandoned.intersection((*commands, *idempotent))
            self._abandoned -= unsent
            for seq in unsent:
                self._finish(seq, seq + 1)

    def hurry(self) -> None:
        """Somebody waits for all that was offered: its acks are not to be delayed."""
        self._awaited = self.next_seq
        if self.state is State.OPEN and self._in_flight_events:
            self._ping()

    def _ping(self) -> None:
        self._pings += 1
        self._marks[self._pings] = self._sent_next
        if len(self._marks) > _MARKS_MAX:
            del self._marks[next(iter(self._marks))]
        self._control.append(encode_frame(Ping(self.epoch, self._awaited, self._pings)))

    def abandon(self, seq: int) -> None:
        """Nobody waits for this command any more: where it has not been sent, it never is; else its worker is told."""
        if self.is_finished(seq):
            return
        packed = self._unsent_with(seq)
        if packed is not None and not packed.sent:
            self._finish(seq, seq + 1)
            return
        self._abandoned.add(seq)
        if self.state is not State.GREETING and self._session is not None and seq < self.next_seq:
            self._control.append(encode_frame(Cancel(self.epoch, seq)))

    def _forget_abandoned(self) -> None:
        self._abandoned = {seq for seq in self._abandoned if not self.is_finished(seq)}

    def drop_oldest(self) -> int:
        """Forget the oldest batch that no worker has seen and that holds no command; return how many messages that were."""
        for packed in self._unsent:
            if not packed.may_have_run and not packed.commands and not packed.idempotent:
                dropped = packed.unfinished
                self._finish(packed.first, packed.first + packed.count)
                return dropped
        return 0

    def thin_out(self) -> None:
        """Let go of what is finished in batches of which little is left, so that few slow messages do not hold the bytes of
        all that were packed with them. To be called where room is wanted; it looks only after enough was finished."""
        if self._finished_since < self.held_events // 4 + 1:
            return
        self._finished_since = 0
        for packed in self._sent:
            self._in_flight_bytes -= self._thin(packed)
        for packed in self._unsent:
            self._thin(packed)

    def _thin(self, packed: _Packed) -> int:
        """Thin a batch out where that is worth it; return how many bytes that saved."""
        if packed.unfinished > packed.whole // _THIN or len(packed.blob) < _THIN_BYTES_MIN:
            return 0
        done = self._finished_in(packed)
        kept = set(range(packed.first, packed.first + packed.count))
        for at in range(0, len(done), 2):
            kept.difference_update(range(done[at], done[at + 1]))
        before = len(packed.blob)
        packed.blob = thinned(packed.blob, packed.count, [seq - packed.first for seq in sorted(kept)])
        packed.whole = packed.unfinished
        saved = before - len(packed.blob)
        self.held_bytes -= saved
        return saved

    def was_sent(self, seq: int) -> bool:
        """Whether some worker may have seen the message with this sequence."""
        packed = self._unsent_with(seq)
        return seq < self.next_seq and (packed is None or packed.may_have_run)

    def _unsent_with(self, seq: int) -> _Packed | None:
        """The batch with this sequence, where it is not sent or has come back. Thousands of callers may give up at once, so
        it is not looked for one by one."""
        at = bisect_right(self._unsent, seq, key=_first_of) - 1
        packed = self._unsent[at] if at >= 0 else None
        return packed if packed is not None and seq < packed.first + packed.count else None

    def open(self, epoch: bytes, layout: int) -> list[Lost]:
        """A worker with this epoch is up: greet it, and send it what is unfinished before anything new.

        Returns the commands that had been sent to its predecessor and are not sent again.
        """
        lost = self._retire_session()
        self.epoch, self.layout = epoch, layout
        self._session = None
        self._begin_greeting()
        return lost

    def close(self) -> None:
        """The worker is gone and no other is known yet; what was sent is kept for the next."""
        self.state = State.CLOSED
        self._control.clear()

    def greet_again(self) -> None:
        """The connection is new: take the session up again where the worker says."""
        self._begin_greeting()

    def leave(self) -> list[bytes]:
        """The frames that say good-bye, where somebody listens."""
        said = [encode_frame(Bye(self.epoch))] if self.state is State.OPEN else []
        self.close()
        return said

    def tick(self, now_ns: int) -> None:
        """Repeat an unanswered greeting, and ask for a full ack now and then."""
        if self._abandoned:
            self._forget_abandoned()
        if self.state is State.GREETING:
            if now_ns - self._greeted_ns >= self._limits.hello_interval_s * _NS:
                self._greeted_ns = now_ns
                self._control = [
                    encode_frame(Hello(PROTOCOL, self.publisher, self.layout, self.epoch, self._cumulative))
                ]
        elif self.state is State.OPEN:
            # An idle publisher pings too, at a tenth of the silence that would end its session.
            interval_s = self._limits.ping_interval_s if self._in_flight_events else self._limits.session_silence_s / 10
            if now_ns - self._pinged_ns >= interval_s * _NS:
                self._pinged_ns = now_ns
                self._ping()

    def frames_to_send(self, now_ns: int = 0) -> Iterable[bytes]:
        """Everything that may be sent now, within the credit; each frame is considered sent when it is yielded."""
        while self._control:
            yield self._control.pop(0)
        while self._unsent and self.state is State.OPEN:
            packed = self._unsent[0]
            if self._in_flight_events and self._in_flight_events + packed.unfinished > self._credit_events:
                return
            if self._in_flight_events and self._in_flight_bytes + len(packed.blob) > self._credit_bytes:
                self.thin_out()
                if self._in_flight_bytes + len(packed.blob) > self._credit_bytes:
                    return
            if packed.first > self._sent_next:
                # What lies between is finished and forgotten here; the worker must know that it need not wait for it.
                stretch = (self._sent_next, packed.first)
                yield self._data(self._sent_next, packed.first - self._sent_next, 1, stretch, b"", 0)
            self._unsent.popleft()
            self._sent.append(packed)
            packed.sent = True
            self._sent_next = packed.first + packed.count
            self._in_flight_events += packed.unfinished
            self._in_flight_bytes += len(packed.blob)
            skip: tuple[int, ...] = ()
            if packed.unfinished != packed.count:
                skip = self._finished_in(packed)
            waited_ns = max(0, now_ns - packed.offered_ns) if packed.offered_ns else 0
            yield self._data(packed.first, packed.count, packed.attempt, skip, packed.blob, waited_ns)

    def receive(self, frame: ToPublisher) -> list[Happened]:
        """Take a decoded frame; return what the caller must know of."""
        if frame.epoch != self.epoch:
            return []
        move = _PUBLISHER_MOVES[self.state].get(type(frame))
        return [] if move is None else move(self, frame)

    # -- moves, by the table below

    def _on_welcome(self, frame: Welcome) -> list[Happened]:
        self.state = State.OPEN
        self._credit_events, self._credit_bytes = frame.credit_events, frame.credit_bytes
        lost: list[Happened] = []
        if self._session not in (None, frame.session):
            lost += self._retire_session()
        else:
            self._go_back(frame.expected)
        self._session = frame.session
        self._sent_next = frame.expected
        self._marks.clear()
        self._forget_abandoned()
        # What is sent again must not run; what runs since before the connection was lost must end.
        self._control += [encode_frame(Cancel(self.epoch, seq)) for seq in self._abandoned if seq < self.next_seq]
        return lost

    def _on_ack(self, frame: Ack) -> list[Happened]:
        self._credit_events, self._credit_bytes = frame.credit_events, frame.credit_bytes
        self._dead = max(self._dead, frame.dead)
        self._waiting = max(self._waiting, frame.waiting)
        if frame.cumulative > self._cumulative:
            self._finish(self._cumulative, frame.cumulative)
        flat = frame.finished
        for at in range(0, len(flat), 2):
            self._finish(flat[at], flat[at + 1])
        if frame.ping and frame.received < self._marks.pop(frame.ping, 0):
            self._go_back(frame.received)
        return []

    def _on_nack(self, frame: Nack) -> list[Happened]:
        self._go_back(frame.expected)
        return []

    def _on_replies(self, frame: Replies) -> list[Happened]:
        return [Replied(frame.replies)]

    def _on_reject(self, frame: Reject) -> list[Happened]:
        if frame.reason == "unknown-session":
            if self.state is State.OPEN:
                self._begin_greeting()
            return []
        if frame.reason != "too-many-publishers":
            self.close()
        return [Rejected(frame.reason)]

    # -- how

    def _begin_greeting(self) -> None:
        self.state = State.GREETING
        self._greeted_ns = -(2**63)
        self._control.clear()

    def _retire_session(self) -> list[Lost]:
        """What was sent may be handled a second time: count the attempt, and give up commands that must not be."""
        self._dead_before += self._dead
        self._waiting_before += self._waiting
        self._dead = self._waiting = 0
        lost: list[Lost] = []
        for packed in (*self._sent, *self._unsent):
            if not packed.sent:
                continue
            packed.sent = False
            packed.attempt += 1
            lost.extend(Lost(seq) for seq in packed.commands if not self.is_finished(seq))
            packed.commands = ()
        gone = RangeSet()
        for seq in sorted({*(one.seq for one in lost), *self._abandoned}):
            if seq < self.next_seq:
                gone.add(seq, seq + 1)
        for start, end in gone.within(0, self.next_seq):
            self._finish(start, end)
        self._go_back(self._cumulative)
        self._sent_next = self._cumulative
        return lost

    def _go_back(self, expected: int) -> None:
        """Move what was sent from `expected` on back to the front of what is unsent."""
        self._marks.clear()  # of pings that went before what is sent again
        sent = self._sent
        at = len(sent)
        while at and sent[at - 1].first + sent[at - 1].count > expected:
            at -= 1
            packed = sent[at]
            self._unsent.appendleft(packed)
            self._in_flight_events -= packed.unfinished
            self._in_flight_bytes -= len(packed.blob)
        del sent[at:]
        self._sent_next = min(self._sent_next, expected)

    def is_finished(self, seq: int) -> bool:
        """Whether the message with this sequence is finished."""
        return seq < self._cumulative or seq in self._finished

    def _finished_in(self, packed: _Packed) -> tuple[int, ...]:
        end = packed.first + packed.count
        flat: list[int] = []
        low = packed.first
        if self._cumulative > low:
            low = min(self._cumulative, end)
            flat += (packed.first, low)
        for start, stop in self._finished.within(low, end):
            if flat and flat[-1] == start:
                flat[-1] = stop
            else:
                flat += (start, stop)
        return tuple(flat)

    def _finish(self, start: int, end: int) -> None:
        """Note that `[start, end)` is finished; release batches that are wholly so."""
        if end > self.next_seq:
            raise RemoteProtocolError(f"an ack for sequence {end}, and only {self.next_seq} were ever used")
        start = max(start, self._cumulative)
        if start >= end:
            return
        fresh = self._finished.gaps(start, end) if len(self._finished) else [(start, end)]
        if not fresh:
            return
        for low, high in fresh:
            self._release(low, high)
        if start == self._cumulative:
            self._cumulative = end
            if len(self._finished):
                self._finished.add(start, end)
                self._cumulative = self._finished.take_prefix(end)
        else:
            self._finished.add(start, end)
        if self._on_finished is not None:
            for low, high in fresh:
                self._on_finished(low, high)

    def _release(self, low: int, high: int) -> None:
        self.held_events -= high - low
        self._finished_since += high - low
        sent = self._sent
        if sent and low <= sent[-1].first + sent[-1].count:
            begin = at = max(0, bisect_right(sent, low, key=_first_of) - 1)
            spent: list[int] = []
            while at < len(sent) and sent[at].first < high:
                packed = sent[at]
                covered = min(high, packed.first + packed.count) - max(low, packed.first)
                if covered > 0:
                    self._in_flight_events -= covered
                    packed.unfinished -= covered
                    if not packed.unfinished:
                        spent.append(at)
                        self._in_flight_bytes -= len(packed.blob)
                        self.held_bytes -= len(packed.blob)
                at += 1
            if spent:
                if spent[-1] - spent[0] + 1 == len(spent):
                    del sent[spent[0] : spent[-1] + 1]
                else:
                    sent[begin:at] = [packed for packed in sent[begin:at] if packed.unfinished]
        unsent = self._unsent
        if unsent and unsent[0].first < high:
            # After going back, an ack of what was sent before may still arrive.
            at = max(0, bisect_right(unsent, low, key=_first_of) - 1)
            while at < len(unsent) and unsent[at].first < high:
                packed = unsent[at]
                covered = min(high, packed.first + packed.count) - max(low, packed.first)
                if covered > 0:
                    packed.unfinished -= covered
                    if not packed.unfinished:
                        self.held_bytes -= len(packed.blob)
                        del unsent[at]
                        continue
                at += 1

    def _data(
        self, first: int, count: int, attempt: int, skip: tuple[int, ...], blob: bytes, waited_ns: int
    ) -> bytes:
        awaited = first < self._awaited
        return encode_frame(Data(self.epoch, self.layout, first, count, attempt, skip, blob, waited_ns, awaited))


_Move = Callable[[PublisherSession, ToPublisher], list[Happened]]

_PUBLISHER_MOVES: Final[dict[State, dict[type, _Move]]] = {
    State.CLOSED: {
        # A worker that drains takes nothing new, and still says what became of what it has.
        Ack: PublisherSession._on_ack,  # type: ignore[dict-item]  # each move takes the frame of its row
        Replies: PublisherSession._on_replies,  # type: ignore[dict-item]
    },
    State.GREETING: {
        Welcome: PublisherSession._on_welcome,  # type: ignore[dict-item]
        Reject: PublisherSession._on_reject,  # type: ignore[dict-item]
    },
    State.OPEN: {
        Ack: PublisherSession._on_ack,  # type: ignore[dict-item]
        Nack: PublisherSession._on_nack,  # type: ignore[dict-item]
        Replies: PublisherSession._on_replies,  # type: ignore[dict-item]
        Reject: PublisherSession._on_reject,  # type: ignore[dict-item]
    },
}


class WorkerSession:
    """The worker's end towards one publisher.

    Takes batches strictly in order; what is finished may come in any order. `unfinished` counts accepted messages that
    are not finished, and is what credit bounds. `heard_ns`, `used_ns` and `clock_ns` are the owner's business.
    """

    __slots__ = (
        "_adopted",
        "_awaited",
        "_credit_bytes_max",
        "_credit_events_max",
        "_delta",
        "_epoch",
        "_finished",
        "_nacked",
        "_told",
        "cancelled",
        "clock_ns",
        "cumulative",
        "dead",
        "heard_ns",
        "left",
        "number",
        "publisher",
        "received",
        "unfinished",
        "unopened_bytes",
        "used_ns",
        "waiting",
    )

    def __init__(self, publisher: bytes, epoch: bytes, first: int, limits: Limits, number: int = 1) -> None:
        self.publisher = publisher
        self.number = number  # tells it from other sessions of the same publisher with the same worker
        self.received = first  # the next sequence that is taken
        self.cumulative = first
        self.unfinished = 0
        self.dead = 0
        self.waiting = 0
        self.unopened_bytes = 0  # of batches that it took and whose turn has not come; the owner takes them off
        self.heard_ns = 0
        self.used_ns = 0  # when it sent data last
        self.clock_ns = 0  # its time in the inbox, which runs while its messages do; 0: it is new there
        self.left = False  # the publisher has said good-bye: nobody waits for its commands
        self.cancelled: dict[int, None] = {}  # commands that nobody waits for, and that have not begun; the first ones first
        self._epoch = epoch
        self._finished = RangeSet()
        self._delta: list[int] = []  # ranges that the next ack reports
        self._adopted: dict[int, bool] = {}  # sequence → whether it is dead (else waiting)
        self._nacked = -1
        self._awaited = 0
        self._told = first  # below it, the publisher knows that all is finished
        # A publisher within its credit cannot exceed this: one more batch may start while anything is unfinished.
        self._credit_bytes_max = limits.credit_bytes_max
        self._credit_events_max = limits.session_credit_events_max + limits.batch_events_max

    def accept(self, frame: Data) -> tuple[int, ...] | None:
        """Decide on a batch: the ranges of it that must not run (flat pairs), or None where it is not taken.

        A batch that was taken is the caller's to run, but for those ranges, which this session already counts as
        finished. What is not taken is answered by `answer_to_refused`.

        Raises:
            RemoteProtocolError: the publisher sent more than any credit allows.
        """
        end = frame.first + frame.count
        if frame.first > self.received or end <= self.received:
            return None
        skip = frame.skip
        if frame.first < self.received:
            merged = RangeSet()
            merged.add(frame.first, self.received)
            for at in range(0, len(skip), 2):
                merged.add(skip[at], skip[at + 1])
            skip = tuple(merged.flat())
        fresh = end - self.received
        if self.unfinished + (fresh if frame.blob else 0) > self._credit_events_max:
            raise RemoteProtocolError(f"{self.unfinished + fresh} unfinished messages, more than any credit")
        if self.unopened_bytes > self._credit_bytes_max:
            raise RemoteProtocolError(f"{self.unopened_bytes:,} bytes that nobody has looked at, more than any credit")
        self.unopened_bytes += len(frame.blob)
        if frame.awaited:
            self.hurry(end)
        before = self.received
        if self._adopted and frame.blob:
            skip = self._skip_adopted(frame, skip, before)
        self.received = end
        self.unfinished += fresh
        for at in range(0, len(skip), 2):
            if skip[at + 1] > before:
                self.finish_range(max(skip[at], before), skip[at + 1])
        return skip

    def _skip_adopted(self, frame: Data, skip: tuple[int, ...], before: int) -> tuple[int, ...]:
        known = RangeSet()
        for at in range(0, len(skip), 2):
            known.add(skip[at], skip[at + 1])
        for seq in range(max(before, frame.first), frame.first + frame.count):
            dead = self._adopted.pop(seq, None)
            if dead is not None and known.add(seq, seq + 1):
                # The publisher does not know yet: the ack of the worker that stored it never arrived.
                self.dead += dead
                self.waiting += not dead
        return tuple(known.flat())

    def hurry(self, awaited: int) -> None:
        """The publisher waits for everything below this sequence to be finished."""
        self._awaited = max(self._awaited, awaited)

    @property
    def is_awaited(self) -> bool:
        """Whether the publisher waits for something that no ack has told it: do not delay the next one."""
        return self._told < self._awaited

    def answer_to_refused(self, frame: Data) -> bytes | None:
        """What to say to a batch that `accept` did not take: go back, or what is finished; None: it was said already."""
        if frame.first > self.received:
            if self._nacked == self.received:
                return None
            self._nacked = self.received
            return encode_frame(Nack(self._epoch, self.received))
        return None

    def finish(self, seq: int) -> int:
        """Note that the message with this sequence is finished; return 1, or 0 where it was already."""
        return self.finish_range(seq, seq + 1)

    def finish_range(self, start: int, end: int) -> int:
        """Note that `[start, end)` is finished; return how many were not before."""
        if start == self.cumulative and not len(self._finished):
            self.unfinished -= end - start
            self.cumulative = end
            return end - start
        start = max(start, self.cumulative)
        fresh = self._finished.add(start, end) if start < end else 0
        if fresh:
            self.unfinished -= fresh
            if start == self.cumulative:
                self.cumulative = self._finished.take_prefix(start)
            else:
                self._delta += (start, end)
        return fresh

    def finish_dead(self, seq: int) -> None:
        """The event became a dead letter, and that is committed."""
        self.dead += self.finish(seq)

    def finish_waiting(self, seq: int) -> None:
        """The store has the event, and that is committed."""
        self.waiting += self.finish(seq)

    def cancel(self, seq: int) -> None:
        """Nobody waits for this command, which has not begun: it is not to. Of more than credit allows, the first may."""
        if not self.is_finished(seq):
            self.cancelled[seq] = None
            if len(self.cancelled) > self._credit_events_max:
                del self.cancelled[next(iter(self.cancelled))]

    def adopt(self, dead: list[int], waiting: list[int]) -> None:
        """Sequences that a predecessor of this worker put into the store: they must not run again when they are resent."""
        self._adopted = {**dict.fromkeys(waiting, False), **dict.fromkeys(dead, True)}

    def is_finished(self, seq: int) -> bool:
        """Whether the message with this sequence is finished."""
        return seq < self.cumulative or seq in self._finished

    def ack(self, credit: tuple[int, int], *, full: bool = False, ping: int = 0) -> bytes:
        """The frame that says what is finished; `full` lists all of it, else only what is new since the last. `ping` is the
        number of the ping that it answers."""
        if full:
            finished: tuple[int, ...] = tuple(self._finished.flat())
        elif self._delta:
            merged = RangeSet()
            delta = self._delta
            for at in range(0, len(delta), 2):
                if delta[at + 1] > self.cumulative:
                    merged.add(max(delta[at], self.cumulative), delta[at + 1])
            finished = tuple(merged.flat())
        else:
            finished = ()
        self._delta = []
        self._told = self.cumulative
        return encode_frame(
            Ack(self._epoch, self.received, self.cumulative, finished, full, self.dead, self.waiting, *credit, ping)
        )

    def welcome(self, credit: tuple[int, int]) -> bytes:
        """The frame that opens the session, or takes it up again."""
        self._nacked = -1
        return encode_frame(Welcome(self._epoch, self.received, self.number, *credit))
