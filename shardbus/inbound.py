"""A batch on its way through the lanes: a cursor over its rows, and a message taken out of it.

What a handler has done is noted as evidence in bulk, and in any case before it is reported as finished, because an ack says
what is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import compress, islice, repeat
from operator import length_hint
from typing import Any, Final

from msgspec import Struct

from shardbus.feeds import Feeds
from shardbus.messages import Message, WireKey
from shardbus.metrics import Recorder
from shardbus.outgoing import Children
from shardbus.quarantine import Identity
from shardbus.registry import Handler, Plan
from shardbus.store import Failure
from shardbus.wire.codec import Columns, Extra, decode_batch, pack_keys, stamp_at
from shardbus.wire.frames import Data
from shardbus.wire.session import WorkerSession

_FEW: Final = 8  # rows that are noted one by one: a record of their own would cost more, and its folding, too
UNKNOWN: Final = Plan(Message, ())  # stands for every type that has no handler here
NOTHING: Final = Columns((), (), memoryview(b""), b"\x90", None, None, {})  # of a batch that is not open yet


class Later(Struct, frozen=True):
    """Some of a message's handlers are to run, again or at last, after `delay_s` seconds; `ran` says that some did now."""

    delay_s: float
    ran: bool


class Delivery:
    """One message on its way through a lane, apart from its batch. Built only where the fast path does not apply."""

    __slots__ = (
        "attempt",
        "began_ns",
        "body",
        "children",
        "cursor",
        "deadline_ns",
        "due_ns",
        "extra",
        "first_ns",
        "gave_up",
        "intended_ns",
        "journalled",
        "key",
        "message",
        "name",
        "ordinal",
        "plan",
        "position",
        "publisher",
        "runs",
        "scheduled",
        "seq",
        "session",
        "todo",
    )

    def __init__(
        self,
        session: WorkerSession | None,
        publisher: bytes,
        seq: int,
        name: str,
        plan: Plan,
        key: WireKey,
        body: bytes,
        ordinal: int,
        intended_ns: int,
        attempt: int,
        extra: Extra | None = None,
        deadline_ns: int = 0,
        position: int = 0,
        message: Any = None,
    ) -> None:
        self.session = session  # None: it came from the store, nobody waits for its ack
        self.publisher = publisher
        self.seq = seq
        self.name = name
        self.plan = plan
        self.key = key
        self.body = body
        self.ordinal = ordinal
        self.intended_ns = intended_ns
        self.attempt = attempt
        self.extra = extra
        self.deadline_ns = deadline_ns  # it is too late then, by the worker's clock; 0: never
        self.position = position  # its row in the store; 0: none
        self.message = message  # decoded already; None: not yet, or it does not decode
        self.scheduled = 0  # its row among the scheduled events, while that stands for it; 0: none
        self.due_ns = 0  # not before, by the worker's clock
        self.began_ns = 0  # where it has an intended instant: when the handlers of its last attempt began
        self.todo: dict[str, int] | None = None  # handlers still to run → how often each has failed; None: all, never
        self.gave_up: tuple[Failure, ...] = ()
        self.first_ns = 0  # when it died first, since 1970, where it was redriven
        self.journalled = -1  # its row in the journal, while its handler is suspended, or it waits for its next attempt
        self.cursor: Inbound | None = None  # the batch that will finish its row, where that is still in it
        self.runs = ""  # the handler that runs and may publish
        self.children: Children | None = None  # what its handlers have published

    @property
    def is_tied(self) -> bool:
        """Whether something that its handlers have published is not finished."""
        return self.children is not None and bool(self.children.pending)

    @property
    def identity(self) -> Identity:
        """What the journal knows it by."""
        return self.publisher, self.seq

    @property
    def is_event(self) -> bool:
        """Not a command: it counts in the ledger, and the store may take it."""
        return self.extra is None or not self.extra.timeout_ns


_Row = tuple[Any, Handler | None, WireKey]
"""Message, handler, key."""


class Inbound:
    """A batch that was taken, as the leader's cursor over it.

    `rows` is shared by the leaders that work on it one after another; what was done in order is reported as one range. A row
    does not say its sequence: that follows from how far the iterator has come, so it costs nothing where nobody asks.
    """

    __slots__ = (
        "_blob",
        "_items",
        "_messages",
        "_noted",
        "_of_shard",
        "_plans",
        "_run_start",
        "_skip",
        "asked_ns",
        "attempt",
        "began_ns",
        "careful",
        "columns",
        "end",
        "ended_ns",
        "feeds",
        "first",
        "recorder",
        "rows",
        "session",
        "timed",
        "together",
        "wanted",
    )

    def __init__(
        self,
        session: WorkerSession,
        recorder: Recorder,
        frame: Data,
        skip: tuple[int, ...],
        asked_ns: int,
    ) -> None:
        self.session = session
        self.first = frame.first
        self.end = frame.first + frame.count
        self.attempt = frame.attempt
        self.asked_ns = asked_ns  # when what has a deadline was sent, by this worker's clock
        self.columns = NOTHING
        self.recorder: Recorder | None = None
        self._of_shard = recorder
        self._blob = frame.blob
        self._run_start = frame.first
        self._noted = frame.first  # rows below it are in the evidence, or not this cursor's to note
        self._skip = skip
        self.wanted: bytearray | None = None  # where some are skipped: 1 for each row that is not
        self.careful = False
        self.feeds: Feeds | None = None  # where somebody listens to a type that is in it
        self.timed = False
        self.together: Plan | None = None  # whose batch handler may be called with stretches of it
        # Where timed: when each row ended that was handled and is not noted yet, and when the first of them began.
        self.ended_ns: list[int] = []
        self.began_ns = 0
        self._items: Iterator[Any] = repeat(None, frame.count)
        self._plans: Plan | list[Plan] = UNKNOWN
        self._messages: list[Any] | None = None
        self.rows: Iterator[_Row] = iter(())

    def open(self, plans: Mapping[str, Plan], *, careful: bool) -> None:
        """Unpack it, decode the bodies, and set up `rows`: message, handler and key of each.

        Only now, when its turn has come: what is unpacked and then waits leaves the processor's cache (seen: a quarter of
        the throughput).

        The handler is None where the message needs more than a call: another kind of handler, or a body that does not
        decode. A batch with a suspect in it is opened with care: nothing is decoded yet, and each message runs by itself.

        Raises:
            RemoteProtocolError: it is not a batch of as many messages as its frame said.
        """
        self.careful = careful
        blob, self._blob = self._blob, b""
        self.session.unopened_bytes -= len(blob)
        columns = self.columns = decode_batch(blob, self.end - self.first)
        if columns.ordinals is not None or columns.intended_ns is not None:
            self.recorder = self._of_shard  # else nobody stamped its events
            self.timed = columns.intended_ns is not None
        names = columns.names
        handlers: Iterable[Handler | None]
        if isinstance(names, str):
            plan = self._plans = plans.get(names, UNKNOWN)
            handlers = repeat(plan.simple)
            messages = None if careful else _all_decoded(plan.decode_all, columns.bodies)
            if plan.together and messages is not None and not (columns.extras or self.timed or self._skip):
                self.together = plan
        else:
            several = self._plans = [plans.get(name, UNKNOWN) for name in names]
            handlers = [plan.simple for plan in several]
            pairs = zip(several, columns.apart(), strict=True)
            messages = None if careful else _all_decoded(list, (plan.decode(body) for plan, body in pairs))
        self._messages = messages
        if messages is None:
            columns.apart()
            handlers = repeat(None)
        else:
            self._items = iter(messages)
            if columns.extras:
                handlers = list(islice(handlers, len(messages)))
                for at, extra in columns.extras.items():
                    if extra.timeout_ns or extra.left_ns or extra.due_ns:
                        # A command, whatever its name is here, an event that may be too late, or not to be handled yet.
                        handlers[at] = None
        self.rows = zip(self._items, handlers, columns.keys, strict=False)  # the first is the one that ends
        if skip := self._skip:
            wanted = bytearray(b"\x01") * (self.end - self.first)
            for at in range(0, len(skip), 2):
                low, high = skip[at] - self.first, skip[at + 1] - self.first
                wanted[low:high] = bytes(high - low)
            self.wanted = wanted
            self.rows = compress(self.rows, wanted)

    @property
    def is_open(self) -> bool:
        """Whether it was opened."""
        return self.columns is not NOTHING

    @property
    def next_seq(self) -> int:
        """The sequence of the row that comes next; the present one's is one less."""
        return self.end - length_hint(self._items)

    @property
    def is_command(self) -> bool:
        """Whether the present row is one; none is where no message has extras."""
        extras = self.columns.extras
        extra = extras.get(self.next_seq - 1 - self.first) if extras else None
        return extra is not None and extra.timeout_ns > 0

    def stretch(self, first: int, length: int) -> tuple[int, int]:
        """Where the next `length` rows lie, from sequence `first` on: the first of them, and the one behind the last."""
        wanted = self.wanted
        if wanted is None:
            return first, min(first + length, self.end)
        at = wanted.find(1, first - self.first)
        if at < 0:
            return self.end, self.end
        first = self.first + at
        for _ in range(length):
            at = wanted.find(1, at) + 1
            if not at:
                return first, self.end
        return first, self.first + at

    def note_before(self, seq: int) -> None:
        """Write the evidence of the rows below `seq` that were handled in order since the last time."""
        start, self._noted = self._noted, seq
        recorder = self.recorder
        if recorder is None or start >= seq:
            return
        low, high = start - self.first, seq - self.first
        columns, publisher, ended_ns = self.columns, self.session.publisher, self.ended_ns
        ordinals, intended_ns = columns.ordinals, columns.intended_ns
        began_ns = self.began_ns
        if ended_ns:
            self.began_ns = ended_ns[-1]  # rows run one straight after another
        if self.wanted is None and high - low > _FEW:
            recorder.note_all(
                publisher,
                self.attempt,
                columns.packed_keys if high - low == len(columns.keys) else pack_keys(columns.keys[low:high]),
                high - low,
                None if ordinals is None else ordinals[8 * low : 8 * high],
                None if intended_ns is None else intended_ns[8 * low : 8 * high],
                began_ns,
                ended_ns,
            )
        else:
            ended = iter(ended_ns)
            rows = range(low, high)
            for at in rows if self.wanted is None else compress(rows, self.wanted[low:high]):
                ordinal, intended, end_ns = stamp_at(ordinals, at), stamp_at(intended_ns, at), next(ended, 0)
                recorder.note(
                    publisher, columns.keys[at], ordinal, self.attempt, intended, began_ns, end_ns, dead=False
                )
                began_ns = end_ns
        ended_ns.clear()

    def finish_before(self, seq: int) -> int:
        """Report what was done in order below `seq`; return how many messages that were."""
        self.note_before(seq)
        start, self._run_start = self._run_start, seq
        if self.feeds is not None and start < seq:
            self._feed(self.feeds, start - self.first, seq - self.first)
        return self.session.finish_range(start, seq) if start < seq else 0

    def _feed(self, feeds: Feeds, low: int, high: int) -> None:
        """Feed the rows that were handled to those who listen."""
        columns, wanted = self.columns, self.wanted
        name_at, keys, bodies, extras = columns.name_at, columns.keys, columns.apart(), columns.extras
        for at in range(low, high):
            if wanted is None or wanted[at]:
                extra = extras.get(at)
                feeds.add(name_at(at), keys[at], bodies[at], None if extra is None else extra.headers)

    def hold(self) -> int:
        """As `finish_before` the present row, and leave that one to whoever takes it out of the batch."""
        seq = self.next_seq - 1
        done = self.finish_before(seq)
        self._run_start = self._noted = seq + 1
        return done

    def plan_at(self, at: int) -> Plan:
        """The plan of a row."""
        return self._plans if isinstance(self._plans, Plan) else self._plans[at]

    @property
    def present_plan(self) -> Plan:
        """That of the present row."""
        return self.plan_at(self.next_seq - 1 - self.first)

    def leave(self, first: int, end: int) -> int:
        """As `finish_before` the first of these rows, and leave them to whoever takes them out of the batch."""
        done = self.finish_before(first)
        self._run_start = self._noted = end
        return done

    def delivery(self, seq: int = -1) -> Delivery:
        """The row of a sequence, apart; without one, the present row."""
        columns = self.columns
        at = (seq if seq >= 0 else self.next_seq - 1) - self.first
        extra = columns.extras.get(at)
        left_ns = 0 if extra is None else extra.timeout_ns or extra.left_ns
        delivery = Delivery(
            self.session,
            self.session.publisher,
            self.first + at,
            columns.name_at(at),
            self.plan_at(at),
            columns.keys[at],
            columns.apart()[at],
            stamp_at(columns.ordinals, at),
            stamp_at(columns.intended_ns, at),
            self.attempt,
            extra,
            max(1, self.asked_ns + left_ns) if left_ns else 0,  # a host may be younger than the wait
            message=None if self._messages is None else self._messages[at],
        )
        delivery.began_ns = self.began_ns  # the rows before it are noted: it began when they had ended
        return delivery


def _all_decoded(decode: Callable[[Any], list[Any]], bodies: Any) -> list[Any] | None:
    """The messages of a batch, or None where one cannot be decoded: then each is, beside its handler.

    All at once because that takes 130 ns a message less than decoding and handling by turns (seen in turns in one run).
    """
    try:
        return decode(bodies)
    except BaseException:  # whatever a message's own checks raise
        return None
