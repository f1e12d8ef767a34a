"""Runs handlers: first in, first out per key, different keys side by side, no task for a handler that does not suspend.

A *leader* task takes messages one after another and awaits each handler itself. Beside it one callback is armed in the event
loop; when that runs, the leader is suspended in a handler, because nothing else could have let it run. Then the key of that
handler becomes busy, the suspended task stays with its handler until it ends, and a new leader goes on with the rest. So a
handler always runs inside a task of its own choosing of time: `asyncio.timeout`, `TaskGroup` and `current_task` work, and a
handler that never suspends costs no task. (A task for every handler caps a worker near 250,000 events/s.)

Every leader runs in a copy of the worker's clean context. A handler that leaves a context variable changed ends its leader,
so that no later handler sees the change.

A lane that grows too long in memory goes to the shard's store, whole, with the message that is running: the store then owns
it, and a successor of a killed worker finds it there in order. Later events of the key follow it there until the lane is
empty.

Scheduled events that are due come from the host, one by one, in turn with batches. What becomes of them is no different from
what becomes of a publisher's; as a publisher would, their rows in the store stand for them until they have ended.

What is about to run is written into the journal first, once a stride, so that a successor finds the handler that ended the
process. There, batches with a suspect in them are run one message a stride, and suspects when the quarantine lets them.

Events of a batch handler *gather* as their turns come, each keeping its key busy, and their handler is called by a leader as
any other. Where a publisher's batch is of such a type, a stretch of it is handed over as it came, and taken apart only where
the handler is suspended or fails. What goes together is decided in `batching`, what follows for each in `batch_handlers`.

A lane is *parked* behind a dead letter whose handler asks for it: nothing of it runs, and it lies in the store, until that
dead letter is redriven, and then runs first, or purged. It goes there only once the dead letter is committed: otherwise a
successor would find the end of the lane without what parks it.

Owns: which handler runs when, and what became of each message. Knows nothing of sockets, databases or processes; those are
behind `LaneHost`.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from types import CodeType, TracebackType
from typing import Any, Final, Protocol

import msgspec
import xxhash
from msgspec.structs import replace

from shardbus import batch_handlers
from shardbus.batch_handlers import (
    EXPIRED,
    Batch,
    Fault,
    HeldBack,
    Outcome,
    Together,
    call_together,
    parks_its_key,
    run_batch,
    settled,
    slot_of,
)
from shardbus.batching import Gatherings
from shardbus.breaker import Admitted, Blocked, Circuit
from shardbus.clock import NowNs
from shardbus.config import Limits
from shardbus.context import BatchContext, Context, States
from shardbus.errors import RemoteProtocolError, text_of
from shardbus.feeds import Feeds
from shardbus.inbound import UNKNOWN, Delivery, Inbound, Inbox, Later
from shardbus.journal import ALIVE, END, FIRST, Journal
from shardbus.messages import WireKey
from shardbus.outgoing import Outgoing
from shardbus.outlet import OUTLET, Outlet
from shardbus.pipeline import OUR_FILES
from shardbus.quarantine import Convicted, Crowded, Hold, Identity, Quarantine, Run
from shardbus.registry import Plan, Registered
from shardbus.retry import GiveUp, RetryIn
from shardbus.store import Failure
from shardbus.wire.frames import REPLY_EXPIRED, REPLY_FAILED, REPLY_OK
from shardbus.wire.session import WorkerSession
from shardbus.wording import counted

_SLICE_NS: Final = 2_000_000  # a leader gives the event loop a turn about every two milliseconds
# A publisher has the leader for so long (and a stride) before the next one that waits: by time, because one may send batches
# of three events and another batches of 512, of handlers that fail.
_SHARE_NS: Final = 1_000_000
_NOTE_NS: Final = _SLICE_NS // 2  # evidence is at most so much, and a stride, behind what has run
_STRIDE_MAX: Final = 32  # messages between two looks at the clock, which cost 60 ns; fewer where handlers are slow
_ERROR_CHARS_MAX: Final = 2000
_TRACEBACK_CHARS_MAX: Final = 32_000
_PLACES_MAX: Final = 1024
# What stands between a worker's loop and a handler.
_OUR_FILES: Final = (__file__, batch_handlers.__file__, asyncio.timeouts.__file__, *OUR_FILES)
_OVERDUE_NS: Final = 1_000_000_000  # so long after its deadline a command's handler is ended, whatever its caller said
_LOAD_ROWS: Final = 64  # rows read back from the store at a time for one lane
_FETCHES_MAX: Final = 1024  # lanes that are being read back or ready to run; others that are due wait in the store

_STREAMS: Final = ("StreamingCommand", "{} streams its reply; use client.stream(…)")
_STREAMS_NOT: Final = ("PlainCommand", "the handler of {} does not yield; use client.execute(…)")

CRASHED: Final = "crashed"  # the reason of a dead letter whose handling ends its worker
_NS: Final = 1_000_000_000


class _Stored:
    """A stretch of a lane that lies in the store only."""

    __slots__ = ("after", "count", "due_ns", "last")

    def __init__(self, after: int, count: int, last: int, due_ns: int = 0) -> None:
        self.after = after  # its rows have positions above this
        self.count = count
        self.last = last  # the position of its last row; 0: a predecessor wrote all of them
        self.due_ns = due_ns  # its first row is not due before, by the worker's clock


class LaneHost(Protocol):
    """What lanes ask of the worker around them. No call blocks; what is written is acked by the host once committed."""

    shard: int
    outgoing: Outgoing | None
    """How handlers send messages; None: they cannot."""

    @property
    def states(self) -> States:
        """What sessions have in this worker."""

    async def concluded(self, delivery: Delivery) -> None:
        """All handlers of a message whose plan `concludes` have ended, and its key still waits for it."""

    def conclusion_failed(self, delivery: Delivery, error: BaseException) -> None:
        """That has raised."""

    def touched(self, session: WorkerSession) -> None:
        """Something of this session finished: an ack is due at the end of the turn."""

    def reply(self, delivery: Delivery, status: str, body: bytes) -> None:
        """Send a command's outcome."""

    def items(self, delivery: Delivery, first: int, items: tuple[bytes, ...]) -> None:
        """Send what a streaming command yielded, from its item `first` on."""

    def bury(self, delivery: Delivery, failure: Failure, *, parks: bool = False) -> None:
        """Make it a dead letter; when that is committed, finish it. Where it parks its key, call `parked` then."""

    def can_keep(self, deliveries: Sequence[Delivery]) -> bool:
        """Whether the store has room for them as waiting events."""

    def put_off(self, delivery: Delivery) -> bool:
        """Write an event that is due later to the store, in no lane; when that is committed, finish it as waiting. False: it
        is due, or a command, and nothing was done."""

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        """Give each a position and write it to the store as waiting; when that is committed, finish it as waiting."""

    def amend(self, delivery: Delivery) -> None:
        """A waiting event goes on waiting, with another attempt, due time or handlers: write that."""

    def take_due(self) -> Delivery | None:
        """The next scheduled event that is due; None: there is none now."""

    def forget(self, delivery: Delivery) -> None:
        """A waiting event, or a scheduled one that was due, was handled; its row may go."""

    def defer(self, delivery: Delivery, failure: Failure | None, *, parks: bool) -> None:
        """It reached its outcome, and what its handlers have published is not finished: settle it when that is.

        A failure is to be buried then; where that parks its key, call `parked` once the store has it.
        """

    def load(self, key: WireKey, after: int, upto: int, limit: int, then: Callable[[list[Delivery]], None]) -> None:
        """Read waiting events of a key back, behind `after`, once the one at `upto` is written; hand them to `then`."""

    def note(self, delivery: Delivery, *, dead: bool) -> None:
        """A stamped event reached its outcome: write the evidence before it is acked."""

    def handled(self, count: int) -> None:
        """So many messages reached an outcome."""

    def malformed(self, session: WorkerSession, error: RemoteProtocolError) -> None:
        """A batch of this session cannot be unpacked."""

    def broken(self, error: BaseException) -> None:
        """A defect: what runs here cannot be trusted any more."""


class _Lane:
    """The messages of one busy key. When it is full in memory, it goes to the store, and later ones follow.

    A message without a key that has to wait has a lane of its own, which no other message joins.
    """

    __slots__ = ("batch", "is_counted", "key", "more", "parked", "parking", "queue", "running", "stored", "timer")

    def __init__(self, key: WireKey, running: Delivery | None) -> None:
        self.key = key
        self.running = running
        self.batch: Batch | None = None  # in which that one is, and `more` behind it
        self.more: list[Delivery] | None = None
        # A tuple while nothing of it is in memory: of lanes that wait in the store there may be very many, and a deque takes
        # 700 bytes.
        self.queue: deque[Delivery | _Stored] | tuple[_Stored, ...] = ()
        self.stored = False
        self.parked = False
        self.parking = False  # what parks it is not committed yet
        self.timer: asyncio.TimerHandle | None = None  # armed while the head is not due
        self.is_counted = False  # among those that are asleep

    def opened(self) -> deque[Delivery | _Stored]:
        """Its queue, to change it."""
        queue = self.queue
        if isinstance(queue, tuple):
            queue = self.queue = deque(queue)
        return queue

    @property
    def asleep(self) -> bool:
        """Whether it waits for its time or is parked, and the store has all of it."""
        if not self.stored or (not self.parked and self.timer is None):
            return False
        return all(isinstance(one, _Stored) or one.position for one in self.queue)  # a command is in memory only


class Lanes:
    """The lanes of one shard.

    `push` takes a batch and returns at once. Memory is bounded by what the sessions' credit lets in.
    """

    def __init__(
        self,
        plans: Mapping[str, Plan],
        host: LaneHost,
        limits: Limits,
        now: NowNs,
        chance: Callable[[], float],
        journal: Journal,
        quarantine: Quarantine,
        feeds: Feeds,
    ) -> None:
        self.plans = plans
        self.queued = 0  # messages in memory behind busy keys
        self.parked_keys = 0
        self._host = host
        self._limits = limits
        self._now = now
        self._chance = chance
        self._journal = journal
        self._quarantine = quarantine
        self._feeds = feeds
        self._crowded: dict[int, deque[_Lane]] = {}  # by its head's deaths: a suspect that waits for others
        # While it is armed, nothing begins but a suspect that is to be alone.
        self._hush: asyncio.TimerHandle | None = None
        self._soloist: tuple[Identity, float] | None = None  # that one, and for how many seconds
        self._solo: _Lane | None = None  # its lane, until what was under way has ended
        self._clean = contextvars.copy_context()
        self._inbox = Inbox()  # bounded by credit
        self._cursor: Inbound | None = None
        self._served: WorkerSession | None = None  # whose turn it is, and until when
        self._share_ends_ns = 0
        self._new_turn = False  # of what has just come; or that of lanes; and until when
        self._side_ends_ns = 0
        self._busy: dict[WireKey, _Lane] = {}
        self._ready: deque[_Lane] = deque()
        self._due = False  # the host may have scheduled events that are due
        self._due_next = False  # and it is their turn, before the batches'
        self._wanted: deque[_Lane] = deque()  # to be read back from the store
        self._fetched = 0  # those of them that the host was asked for
        self._rows_fetched = 0  # up to so many will come
        self._leader: object | None = None
        self._leading: asyncio.Task[None] | None = None  # the leader's task, or the last one's
        self._armed = False
        self._closing = False
        self._is_a_copy = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._stride = 1
        # What the leader runs outside the fast path, for whoever overtakes it.
        self._running: Delivery | Batch | Together | None = None
        self._gatherings: Gatherings[Batch] = Gatherings()
        self._lingers = True
        self._keyless: dict[object | None, Delivery] = {}  # of overtaken leaders whose message has no lane
        self._loose: set[_Lane] = set()  # lanes of messages without a key that wait
        self._asleep = 0  # of all these lanes
        self._calls: dict[Identity, _Call] = {}  # of commands that run
        self._places: dict[tuple[Any, ...], tuple[str, str, list[CodeType]]] = {}

    # -- what the shard calls

    def push(self, inbound: Inbound) -> None:
        """Take a batch; its handlers run later, never inside this call."""
        self._inbox.push(inbound)
        if not self._armed:
            self._turn()

    def due(self) -> None:
        """Take scheduled events from the host, in turn with batches, until it has none."""
        self._due = True
        self._arm()

    def adopt(
        self, key: WireKey, count: int, due_ns: int = 0, *, after: int = 0, last: int = 0, parked: bool = False
    ) -> None:
        """Make a lane of `count` waiting events that the store has, behind position `after`, the first due at `due_ns`.

        `last` is the position of the last one where it may not be written yet; `parked`: a dead letter parks it. A key that
        was adopted as parked may be adopted once more, for what waits behind that.
        """
        lane = None if key is None else self._busy.get(key)
        if lane is None:
            lane = self._new_lane(key)
            lane.stored = True
            lane.parked = parked
            self.parked_keys += parked
        if count:
            lane.queue = (_Stored(after, count, last, due_ns),)
        if lane.parked:
            self._count(lane)
        else:
            self._continue(lane)

    def _new_lane(self, key: WireKey) -> _Lane:
        """An empty lane of a key that has none, or of one message without a key."""
        lane = _Lane(key, None)
        if key is None:
            self._loose.add(lane)
        else:
            self._busy[key] = lane
        return lane

    def _count(self, lane: _Lane) -> None:
        """Something may have woken a lane, or let it sleep."""
        if lane.is_counted != lane.asleep:
            self._asleep += -1 if lane.is_counted else 1
            lane.is_counted = not lane.is_counted

    def parked(self, key: WireKey) -> None:
        """What parks a key is committed: its lane may go to the store. May be called again."""
        lane = self._busy[key]
        if lane.parking:
            lane.parking = False
            self._lay_down(lane)

    def unpark(self, key: WireKey, position: int = 0) -> None:
        """The dead letter that parked a key is gone; `position`: it waits there, in the store, and runs first."""
        lane = self._busy[key]
        lane.parked = False
        self.parked_keys -= 1
        if lane.timer is not None:
            lane.timer.cancel()
        if position:
            head = lane.queue[0] if lane.queue else None
            if isinstance(head, _Stored):
                # A predecessor may have died before it removed what had run before; that comes again, in its place.
                head.after = min(head.after, position - 1)
                head.count += 1
                head.due_ns = 0
            else:
                lane.opened().appendleft(_Stored(position - 1, 1, position))
        self._continue(lane)

    def can_rejoin(self, key: WireKey) -> bool:
        """Whether an event may join the end of a lane through the store: the whole lane must be there, too.

        Rows are read back by position, so what is in the lane already must have lower ones.
        """
        lane = self._busy.get(key) if key is not None else None
        return lane is None or lane.stored or self._spill(lane)

    def rejoin(self, key: WireKey, position: int) -> bool:
        """A waiting event that was dead joins the end of its lane, and makes that where there is none, which it returns; the
        store has, or will have, its row."""
        lane = self._busy.get(key) if key is not None else None
        if lane is None:
            self.adopt(key, 1, after=position - 1, last=position)
            return True
        self._stretch(lane, position)
        return False

    def _stretch(self, lane: _Lane, position: int) -> None:
        """Add an event to the end of a lane that lies in the store only."""
        end = lane.queue[-1] if lane.queue else None
        if isinstance(end, _Stored):
            end.count += 1
            end.last = position
        elif lane.queue:
            lane.opened().append(_Stored(position - 1, 1, position))
        else:
            lane.queue = (_Stored(position - 1, 1, position),)

    def cancel(self, session: WorkerSession, seq: int) -> None:
        """Nobody waits for a command any more: end its handler where it runs; where it has not begun, it never does."""
        call = self._calls.get((session.publisher, seq))
        if call is None:
            session.cancel(seq)
        else:
            call.cancel()

    def cancel_all(self, publisher: bytes) -> None:
        """End all handlers of a publisher's commands: it has gone."""
        for identity, call in self._calls.items():
            if identity[0] == publisher:
                call.cancel()

    def cancel_streams(self, publisher: bytes) -> None:
        """End a publisher's streams: it has been silent for long. Should it come back, it hears of it."""
        for identity, call in self._calls.items():
            if identity[0] == publisher and call.outlet is not None:
                call.cancel("its caller was silent for too long")

    def allow(self, session: WorkerSession, seq: int, allowed: int) -> None:
        """The reader of a stream takes more."""
        call = self._calls.get((session.publisher, seq))
        if call is not None and call.outlet is not None:
            call.outlet.allow(allowed)

    def cancel_overdue(self) -> None:
        """End handlers of commands whose callers have given up, by the same deadline, and perhaps could not say so."""
        before = self._now() - _OVERDUE_NS
        for call in self._calls.values():
            if 0 < call.deadline_ns < before:
                call.cancel()

    def disown(self) -> None:
        """This process is a copy of the one that these lanes are of: when the handler that made it returns, it ends."""
        self._is_a_copy = True
        self._leader = None  # so that whoever leads looks, and nobody else has to

    def idle(self) -> bool:
        """Whether nothing runs, and nothing is queued but what the store has and will give back in its time."""
        if self._tasks or self._inbox or self._cursor or self._ready or self._due or self._gatherings:
            return False
        return self._asleep == len(self._busy) + len(self._loose)

    @property
    def busy_keys(self) -> int:
        """Keys whose handler is running or whose lane is not empty."""
        return len(self._busy)

    def running(self) -> list[str]:
        """What is running or waiting in memory, for people: one line a busy key, the longest lanes first."""
        lanes = sorted(
            (lane for lane in (*self._busy.values(), *self._loose) if not lane.asleep),
            key=lambda lane: -len(lane.queue),
        )
        told = [
            f"key {lane.key!r}: {lane.running.name if lane.running else 'nothing'} is running, {len(lane.queue)} behind it"
            for lane in lanes
        ]
        told += [f"without a key: {delivery.name} is running" for delivery in self._keyless.values()]
        unstarted = sum(
            inbound.end - inbound.next_seq for inbound in (self._cursor, *self._inbox) if inbound is not None
        )
        return [*told, f"{counted(unstarted, 'message')} had not begun"] if unstarted else told

    def current(self) -> str:
        """What the leader runs now, for people; may be asked from another thread."""
        running, cursor = self._running, self._cursor
        if isinstance(running, Batch):
            return f"{_handlers_of(running.plan)} (a batch of {len(running.members)})"
        if isinstance(running, Together):
            return f"{_handlers_of(running.plan)} (a batch of {running.end - running.first})"
        if running is not None:
            return f"{_handlers_of(running.plan)} (key {running.key!r})"
        if cursor is not None:
            at = max(0, cursor.next_seq - 1 - cursor.first)
            return f"{_handlers_of(cursor.plan_at(at))} (key {cursor.columns.keys[at]!r})"
        return "something besides handlers"

    async def close(self) -> None:
        """Cancel what runs. What has not reached an outcome stays unfinished."""
        self._closing = True
        self._inbox.clear()
        self._ready.clear()
        self._wanted.clear()
        self.hurry()
        self._gatherings.clear()
        self._cursor = None
        for lane in (*self._busy.values(), *self._loose):
            if lane.timer is not None:
                lane.timer.cancel()
        if self._hush is not None:
            self._hush.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # -- leaders and followers

    def _turn(self) -> None:
        """Once a turn of the event loop while there is work: overtake a leader that is suspended, start the next one."""
        self._armed = False
        if self._closing:
            return
        if self._leader is not None:
            self._overtake()
        if not self._may_lead():
            return
        loop = asyncio.get_running_loop()
        token = self._leader = object()
        context = self._clean.copy()
        task = self._leading = loop.create_task(self._lead(token, context), context=context)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        # Behind the task's first step in the loop's queue: when it runs, that step has ended or is suspended in a handler.
        self._armed = True
        loop.call_soon(self._turn, context=self._clean)

    def _may_lead(self) -> bool:
        """Whether there is something to run that may begin now."""
        if self._hush is not None:
            return self._solo is not None and not self._tasks
        return bool(self._cursor or self._inbox or self._ready or self._due or self._gatherings.departing)

    def _arm(self) -> None:
        if not self._armed and not self._closing:
            self._armed = True
            asyncio.get_running_loop().call_soon(self._turn, context=self._clean)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._solo is not None and not self._tasks:
            self._arm()
        if not task.cancelled() and (error := task.exception()) is not None:
            # No handler raises through here, so this is a defect of the lanes: the worker must not go on.
            self._host.broken(error)

    def _overtake(self) -> None:
        """The leader is suspended in a handler: its key is busy from now on, and the task is no longer leader."""
        token, self._leader = self._leader, None
        running = self._running
        cursor = self._cursor
        if running is None:
            assert cursor is not None  # a leader that runs no delivery runs the fast path of a batch
            self._host.handled(cursor.hold())
            self._host.touched(cursor.session)
            running = cursor.delivery()
            if running.key is None:
                self._keyless[token] = running
        self._running = None
        if not isinstance(running, Delivery):
            self._suspend_batch(self._take_apart(running) if isinstance(running, Together) else running, token)
            return
        self._take_out(running)
        running.journalled = self._journal.suspend(running.publisher, running.seq, self._now())
        self._journal.rest()
        if running.key is not None:
            lane = self._busy.get(running.key)
            if lane is None:
                self._busy[running.key] = _Lane(running.key, running)
            else:
                lane.running = running

    async def _lead(self, token: object, context: contextvars.Context) -> None:
        """Run messages until there are none, a slice is used up, or this task is overtaken inside a handler."""
        end_ns = self._now() + _SLICE_NS
        ready, departing = self._ready, self._gatherings.departing
        overdue = len(departing)  # batches of an earlier turn: first
        if self._solo is not None:
            await self._run_solo(token)
            if _differ(context, self._clean):
                end_ns = 0
        while self._leader is token and not self._closing and self._hush is None and end_ns:
            if departing and (overdue > 0 or not (ready or self._due or self._inbox or self._cursor is not None)):
                overdue -= 1
                await self._run_gathered(next(iter(departing)), token)
            elif ready and not self._is_turn_of_new():
                lane = ready.popleft()
                await self._run_head(lane, token)
            elif self._due and (self._due_next or not (self._cursor is not None or self._inbox)):
                self._due_next = False
                await self._run_due(token, context, min(end_ns, self._now() + _SHARE_NS))
            elif self._cursor is not None or self._inbox:
                self._due_next = True
                cursor = self._next_batch()
                if cursor is not None and cursor.together is not None and self._may_go_together(cursor):
                    await self._run_together(cursor, token)
                elif cursor is not None:
                    await self._run_batch(cursor, token, context, min(end_ns, self._share_ends_ns))
            else:
                break
            if _differ(context, self._clean) or self._now() >= end_ns:
                break
        if self._leader is token:
            self._leader = None
            self._journal.rest()

    def _is_turn_of_new(self) -> bool:
        """Whether what has just come, or is due, goes before the heads of lanes: where there is both, a share each by turns,
        so that a key which catches up holds up no other."""
        if self._cursor is None and not (self._inbox or self._due):
            return False
        now_ns = self._now()
        if now_ns >= self._side_ends_ns:
            self._new_turn = not self._new_turn
            self._side_ends_ns = now_ns + _SHARE_NS
        return self._new_turn

    async def _run_due(self, token: object, context: contextvars.Context, end_ns: int) -> None:
        """Run scheduled events that are due, until there are none, or a share of the leader's slice is used up.

        They come as those of a publisher would: what stands behind a busy key stays in memory, and its row in the store.
        """
        while True:
            self._due = False  # first, because it may be said again meanwhile
            delivery = self._host.take_due()
            if delivery is None:
                return
            self._due = True
            key = delivery.key
            if key is not None and key in self._busy:
                self._append(self._busy[key], delivery)
            elif self._quarantine.suspects and delivery.identity in self._quarantine.suspects:
                self._set_apart(delivery)
            else:
                began_ns = 0
                if self._quarantine.suspects:
                    began_ns = self._journal.running[ALIVE] = self._now()
                self._journal.lead(delivery.publisher, delivery.seq, delivery.seq + 1, began_ns)
                if delivery.plan.simple is not None and not (
                    self._quarantine.suspects or self._feeds.index or delivery.ordinal or delivery.intended_ns
                ):
                    await self._run_simple(delivery, token)
                else:
                    await self._deliver(delivery, token)
            if self._leader is not token or self._now() >= end_ns or _differ(context, self._clean):
                return

    async def _run_simple(self, delivery: Delivery, token: object) -> None:
        """As `_deliver`, of an event with one plain handler; half as much, where many are due at once."""
        plan = delivery.plan
        assert plan.simple is not None
        try:
            message = plan.decode(delivery.body)
        except BaseException:  # whatever a message's own checks raise: they do it again
            await self._deliver(delivery, token)
            return
        self._running = delivery
        try:
            await plan.simple(message)
        except BaseException as error:  # the handler's
            if self._is_ours(error):
                raise
            self._absorb(error)
            if self._leader is token:
                self._running = None
            self._settle_failed(delivery, error)
        else:
            if self._leader is not token:
                self._settle(delivery, None)
                return
            self._running = None
            self._host.handled(1)
            self._host.forget(delivery)

    def _next_batch(self) -> Inbound | None:
        """The batch to go on with: of the publisher whose turn it is, as long as that is, and then of the next."""
        now_ns = self._now()
        cursor, inbox = self._cursor, self._inbox
        if now_ns >= self._share_ends_ns:
            self._share_ends_ns = now_ns + _SHARE_NS
            if cursor is not None and inbox:
                inbox.give_back(cursor)
                cursor = self._cursor = None
            elif self._served is not None:
                inbox.rotate(self._served)
        if cursor is not None:
            return cursor
        cursor = inbox.pop()
        if cursor.session is not self._served:
            self._served = cursor.session
            self._share_ends_ns = now_ns + _SHARE_NS
        if cursor.is_open:
            self._cursor = cursor
            return cursor
        return self._open(cursor)

    def _open(self, inbound: Inbound) -> Inbound | None:
        """Make a batch the cursor, unless it is not sound."""
        publisher, first, end = inbound.session.publisher, inbound.first, inbound.end
        self._journal.lead(publisher, first, end)  # decoding runs what a message checks itself
        try:
            inbound.open(self.plans, careful=self._quarantine.touches(publisher, first, end))
            if self._feeds.index and self._feeds.concern(inbound.columns.names):
                inbound.columns.apart()  # now, because it may turn out not to be sound
                inbound.feeds = self._feeds
        except RemoteProtocolError as error:
            self._host.malformed(inbound.session, error)
            return None
        self._cursor = inbound
        return inbound

    async def _run_batch(self, cursor: Inbound, token: object, context: contextvars.Context, end_ns: int) -> None:
        """Run messages of a batch, in strides, until its end or that of the leader's slice.

        The clock is looked at between strides only, so a stride is short where a message has taken long. Evidence is noted
        once a batch, and of a slow one every millisecond: a worker that dies takes that of so much with it.

        The hot path of a worker, so what is rare is elsewhere, and what is constant is local.
        """
        busy, now, clean, rows = self._busy, self._now, self._clean, cursor.rows
        timed, ended = cursor.timed, cursor.ended_ns.append
        takes_out = timed or cursor.careful  # also of a command, which else stays in its batch
        journal, limit = self._journal, cursor.end
        first = cursor.next_seq
        journal.lead(cursor.session.publisher, first, first)
        running = journal.running
        began_ns = cursor.began_ns = running[ALIVE] = now()
        note_ns = began_ns + _NOTE_NS
        while True:
            stride = 1 if cursor.careful else self._stride
            end = first + stride
            if end > limit or cursor.wanted is not None:
                first, end = cursor.stretch(first, stride)
            running[FIRST], running[END] = first, end
            # The tuples are not kept, so `zip` uses one again and again.
            for message, simple, key in islice(rows, stride):
                if simple is None and not takes_out and cursor.is_command and key not in busy:
                    await self._run_command(cursor, token)
                    if self._leader is not token:
                        return
                elif simple is None or (busy and key in busy):
                    self._host.handled(cursor.hold())
                    delivery = cursor.delivery()
                    if delivery.extra is not None and self._put_off(delivery):
                        pass
                    elif key in busy:
                        self._append(busy[key], delivery)
                    elif cursor.careful and delivery.identity in self._quarantine.suspects:
                        self._set_apart(delivery)
                    else:
                        await self._deliver(delivery, token)
                        if self._leader is not token:
                            return
                    if timed:
                        cursor.began_ns = now()
                else:
                    try:
                        await simple(message)
                    except BaseException as error:  # the handler's
                        self._fast_failed(cursor, token, key, error)
                        if self._leader is not token:
                            return
                        if timed:
                            cursor.began_ns = now()
                    else:
                        if self._leader is not token:
                            self._settle(self._overtaken(token, key), None)
                            return
                        if timed:
                            ended(now())
                try:
                    if context != clean:
                        break
                except Exception:  # as `_differ`, which costs a call
                    break
            else:
                now_ns = now()
                fits = now_ns - began_ns < _SLICE_NS // 8
                self._stride = min(_STRIDE_MAX, 2 * self._stride) if fits else max(1, self._stride // 4)
                began_ns = running[ALIVE] = now_ns
                first = cursor.next_seq
                if first < limit and now_ns < end_ns:
                    if now_ns >= note_ns:
                        cursor.note_before(first)
                        note_ns = now_ns + _NOTE_NS
                        if timed:
                            cursor.began_ns = now()  # the log may have been full
                    continue
            break
        # What was done so far is acked now, because the rest may take long.
        after = cursor.next_seq
        self._host.handled(cursor.finish_before(after))
        if after == limit:
            self._cursor = None
        self._host.touched(cursor.session)

    async def _run_command(self, cursor: Inbound, token: object) -> None:
        """Run a command in its place; where it ends there, its row is finished with those around it."""
        delivery = self._running = cursor.delivery()
        delivery.cursor = cursor
        await self._command(delivery)
        if self._leader is token:
            self._running = None
            if delivery.children is None:
                delivery.runs = ""
                return
            self._take_out(delivery)
        self._settle(delivery, None)

    def _take_out(self, delivery: Delivery) -> None:
        """Its row is no longer the batch's to finish."""
        cursor, delivery.cursor = delivery.cursor, None
        if cursor is not None:
            self._host.handled(cursor.hold())
            self._host.touched(cursor.session)

    def _put_off(self, delivery: Delivery) -> bool:
        """Leave an event to the store that is not due yet. It does not run now, so it is no suspect either."""
        extra = delivery.extra
        if extra is None or not extra.due_ns or not self._host.put_off(delivery):
            return False
        if self._quarantine.suspects:
            self._quarantine.clear(delivery.identity)
            self.release()
        return True

    def _overtaken(self, token: object, key: WireKey) -> Delivery:
        """What the follower made of the message whose handler was running when this task was overtaken."""
        if self._is_a_copy:
            os._exit(0)
        if key is None:
            return self._keyless.pop(token)
        running = self._busy[key].running
        assert running is not None  # the lane waits for this very task
        return running

    def _fast_failed(self, cursor: Inbound, token: object, key: WireKey, error: BaseException) -> None:
        if self._is_ours(error):
            raise error
        self._absorb(error)
        if self._leader is token:
            self._host.handled(cursor.hold())
            delivery = cursor.delivery()
        else:
            delivery = self._overtaken(token, key)
        self._settle_failed(delivery, error)

    def _settle_failed(self, delivery: Delivery, error: BaseException) -> None:
        """The one plain handler of an event has raised."""
        round_ = _Round(delivery)
        round_.ran = True
        self._handler_failed(round_, delivery.plan.handlers[0], error, "failed")
        self._settle(delivery, self._outcome(delivery, round_))

    def _is_ours(self, error: BaseException) -> bool:
        """Whether it ends the leader and not just a handler: the worker closes, or the coroutine is thrown away."""
        return self._closing or (isinstance(error, GeneratorExit) and asyncio.current_task() not in self._tasks)

    @staticmethod
    def _absorb(error: BaseException) -> None:
        """A cancellation that a handler brought upon itself ends with the handler."""
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None:
            while task.cancelling():
                task.uncancel()

    async def _run_head(self, lane: _Lane, token: object) -> None:
        """Run the next message of a lane."""
        head = lane.opened().popleft()
        assert isinstance(head, Delivery)  # `_continue` makes no other lane ready
        self.queued -= 1
        if self._wanted:
            self._fetch()
        if self._quarantine.suspects and not self._may_run(lane, head):
            return
        await self._run_taken(lane, head, token)

    async def _run_taken(self, lane: _Lane, head: Delivery, token: object) -> None:
        lane.running = head
        if head.key is None:
            self._loose.discard(lane)
        self._waits_no_more(head)
        began_ns = 0
        if self._quarantine.suspects:  # it matters for them only
            began_ns = self._journal.running[ALIVE] = self._now()
        self._journal.lead(head.publisher, head.seq, head.seq + 1, began_ns)
        await self._deliver(head, token)

    def _waits_no_more(self, delivery: Delivery) -> None:
        if delivery.journalled >= 0:
            self._journal.resume(delivery.journalled)
            delivery.journalled = -1

    async def _deliver(self, delivery: Delivery, token: object) -> None:
        """Run one message's handlers and settle it; afterwards the caller may have been overtaken."""
        if delivery.plan.batching is not None and delivery.is_event:
            await self._gather(delivery, token)
            return
        self._running = delivery
        if delivery.is_event:
            outcome = await self._event(delivery)
        else:
            await self._command(delivery)
            outcome = None
        if self._leader is token:
            self._running = None
        self._settle(delivery, outcome)

    # -- batches

    async def _gather(self, delivery: Delivery, token: object) -> None:
        """The turn of an event of a batch handler has come: it joins others, and what is full begins."""
        lane = None if delivery.key is None else self._busy.get(delivery.key)
        if lane is None and delivery.key is not None:
            lane = self._new_lane(delivery.key)
        batch = None if self._is_alone(delivery) else self._gatherings.find(slot_of(delivery.plan, delivery))
        if batch is not None:
            batch.members.append(delivery)
        else:
            batch = Batch(delivery.plan, delivery)
            if not self._is_alone(delivery):
                self._open_batch(batch)
        if lane is not None:
            lane.running, lane.batch = delivery, batch
            while lane.queue and isinstance(head := lane.queue[0], Delivery) and self._joins(lane, head):
                self.queued -= 1
                lane.opened().popleft()
        self._gatherings.joined(batch)
        if not batch.is_open:
            running = self._journal.running
            first, end = running[FIRST], running[END]
            await self._run_gathered(batch, token)
            if self._leader is token:
                self._journal.lead(delivery.publisher, first, end)  # of the batch from which this event came

    def _may_go_together(self, cursor: Inbound) -> bool:
        """Whether the next rows of a batch are a batch for their handler: enough of them, or nothing is there to join them,
        and none has to wait for its key."""
        plan = cursor.together
        assert plan is not None
        assert plan.batching is not None
        first = cursor.next_seq
        end = min(first + plan.batching.events_max, cursor.end)
        if first == end or plan.handlers[0].wants_context or self._quarantine.suspects:
            return False  # what has a context may publish, so it has a life of its own
        if end - first < plan.batching.events_max and (self._inbox or self._ready or self._gatherings):
            return False
        return self._busy.keys().isdisjoint(cursor.columns.keys[first - cursor.first : end - cursor.first])

    async def _run_together(self, cursor: Inbound, token: object) -> None:
        """Call the handler with the next rows of a batch; afterwards the caller may have been overtaken."""
        plan = cursor.together
        assert plan is not None
        assert plan.batching is not None
        handler, publisher = plan.handlers[0], cursor.session.publisher
        first = cursor.next_seq
        events = [message for message, _, _ in islice(cursor.rows, plan.batching.events_max)]
        end, count = cursor.next_seq, len(events)
        now_ns = self._journal.running[ALIVE] = self._now()
        self._journal.lead(publisher, first, end, now_ns)
        stretch = self._running = Together(plan, cursor, first, end)
        found: list[Failure | HeldBack | Fault | None] = [None] * count
        whole = await call_together(handler, None, events, [], range(count), found, self)
        if self._leader is token:
            self._running = None
            if whole is None and not any(found):
                self._host.handled(cursor.finish_before(end))
                self._host.touched(cursor.session)
            if end == cursor.end:
                self._cursor = None
            if whole is None and not any(found):
                return
        else:
            self._keyless.pop(token, None)
        batch = stretch.apart or self._take_apart(stretch)
        for row in batch.rows:
            self._journal.resume(row)
        self._settle_all(batch, list(settled(batch, handler, None, found, set(range(count)), whole, self)))

    def _take_apart(self, stretch: Together) -> Batch:
        """Its events need a life of their own: the handler is suspended, or has failed with some."""
        cursor = stretch.cursor
        self._host.handled(cursor.leave(stretch.first, stretch.end))
        self._host.touched(cursor.session)
        members = [cursor.delivery(seq) for seq in range(stretch.first, stretch.end)]
        batch = stretch.apart = Batch(stretch.plan, members[0])
        batch.members = members
        busy = self._busy
        for member in members:
            if member.key is not None:
                lane = busy.get(member.key)
                if lane is None:
                    lane = busy[member.key] = _Lane(member.key, member)
                    lane.batch = batch
                elif lane.more is None:
                    lane.more = [member]
                else:
                    lane.more.append(member)
        return batch

    def _is_alone(self, delivery: Delivery) -> bool:
        """Whether an event is handled by itself: a suspect, and one that has failed, or was there when all had."""
        return delivery.todo is not None or delivery.identity in self._quarantine.suspects

    def _open_batch(self, batch: Batch) -> None:
        self._gatherings.open(batch)
        if batch.policy.linger_s and self._lingers:
            loop = asyncio.get_running_loop()
            batch.timer = loop.call_later(batch.policy.linger_s, self._lingered, batch, context=self._clean)
        else:
            self._gatherings.due(batch)

    def _lingered(self, batch: Batch) -> None:
        self._gatherings.due(batch)
        self._arm()

    def hurry(self) -> None:
        """Let no batch linger from now on."""
        self._lingers = False
        for batch in self._gatherings.lingering():
            if batch.timer is not None:
                batch.timer.cancel()
            self._lingered(batch)

    def _joins(self, lane: _Lane, delivery: Delivery) -> bool:
        """Whether an event joins the batch in which those before it in its lane are; then it did."""
        batch = lane.batch
        if (
            batch is None
            or not batch.is_open
            or batch.is_full
            or delivery.plan is not batch.plan
            or not delivery.is_event
            or self._is_alone(delivery)
        ):
            return False
        batch.members.append(delivery)
        if lane.more is None:
            lane.more = []
        lane.more.append(delivery)
        return True

    async def _run_gathered(self, batch: Batch, token: object) -> None:
        """Call the handler with a batch and settle its events; afterwards the caller may have been overtaken."""
        self._gatherings.depart(batch)
        if batch.timer is not None:
            batch.timer.cancel()
        now_ns = self._journal.running[ALIVE] = self._now()
        stretches = list(batch.stretches())
        self._journal.rest()
        if len(stretches) == 1:
            self._journal.lead(*stretches[0], now_ns)
        else:
            self._write_down(batch, now_ns)
        for member in batch.members:
            member.began_ns = now_ns
        self._running = batch
        outcomes = await run_batch(batch, self)
        if batch.plan.concludes:
            for member, outcome in zip(batch.members, outcomes, strict=True):
                if not isinstance(outcome, Later | HeldBack):
                    await self._concluded(member)
        if self._leader is token:
            self._running = None
            self._journal.rest()
        else:
            self._keyless.pop(token, None)
        for row in batch.rows:
            self._journal.resume(row)
        self._settle_all(batch, outcomes)

    def _write_down(self, batch: Batch, now_ns: int) -> None:
        for publisher, first, end in batch.stretches():
            row = self._journal.suspend(publisher, first, now_ns, end - first)
            if row >= 0:
                batch.rows.append(row)

    def _suspend_batch(self, batch: Batch, token: object) -> None:
        """The leader is suspended in a batch handler; its keys are busy already."""
        if batch.members[0].key is None:
            self._keyless[token] = batch.members[0]
        if not batch.rows:
            self._write_down(batch, self._now())
        self._journal.rest()

    def _settle_all(self, batch: Batch, outcomes: list[Outcome]) -> None:
        """Settle the events of a batch, each key's in order; what is held back goes to the head of its lane first."""
        if self._is_a_copy:
            os._exit(0)
        last: dict[WireKey, int] = {}
        held: dict[WireKey, list[Delivery]] = {}
        for at, (member, outcome) in enumerate(zip(batch.members, outcomes, strict=True)):
            if isinstance(outcome, HeldBack):
                held.setdefault(member.key, []).append(member)
                member.attempt += outcome.ran
                member.message = None  # a handler may have changed what is in it
                if outcome.apart:
                    member.todo = {batch.plan.handlers[0].name: 0} if member.todo is None else member.todo
                if member.position:
                    self._host.amend(member)
            else:
                last[member.key] = at
        for key in last:
            if key is not None:
                lane = self._busy[key]
                lane.batch = lane.more = None
                behind = held.get(key, [])
                lane.opened().extendleft(reversed(behind))
                self.queued += len(behind)
        for at, (member, outcome) in enumerate(zip(batch.members, outcomes, strict=True)):
            if isinstance(outcome, HeldBack):
                continue
            if isinstance(outcome, Later) or member.key is None or last[member.key] == at:
                self._settle(member, outcome)
            else:
                self._conclude(member, outcome, False)

    # What `run_batch` asks.

    def now_ns(self) -> int:
        """The worker's clock."""
        return self._now()

    def unfit(self, delivery: Delivery) -> Failure | None:
        """Why no handler can be called with it; None: its message is decoded."""
        if self._is_late(delivery):
            return _expired(delivery)
        if delivery.message is None:
            try:
                delivery.message = delivery.plan.decode(delivery.body)
            except BaseException as error:  # whatever a message's own checks raise
                return self._undecodable(error)
        return None

    def context_of(self, delivery: Delivery, beside: frozenset[WireKey]) -> Context:
        """What a handler may know of it; `beside`: the keys of the batch."""
        return self._context_of(delivery, partial(BatchContext, beside))

    async def call(self, handler: Registered, message: Any, context: Any) -> Any:
        """Call a handler."""
        return await self._call(handler, message, context)

    def reason_of(self, error: BaseException) -> str | None:
        """Why a dead letter is one that is dead of this; None: the worker ends, and it is no failure."""
        if self._is_ours(error):
            return None
        self._absorb(error)
        return "timeout" if isinstance(error, _HandlerTimeout) else "failed"

    def failed(
        self, delivery: Delivery, handler: Registered, error: BaseException, reason: str, *, with_others: bool = False
    ) -> Failure | Later:
        """A batch handler has failed with this event. With others beside it, what is not retried may be another's error, so
        it is called alone; unless it is never to be called again."""
        round_ = _Round(delivery)
        round_.ran = True
        failures = round_.failures_before(handler)
        retry = handler.retry
        if with_others and retry.attempts > 1 and isinstance(retry.decide(failures + 1, error, 0.0), GiveUp):
            round_.again(handler, failures, 0.0)
        else:
            self._handler_failed(round_, handler, error, reason)
        outcome = self._outcome(delivery, round_)
        assert outcome is not None  # it gave up, or is to be called again
        return outcome

    def blocked(self, delivery: Delivery, handler: Registered, circuit: Circuit, delay_s: float) -> Failure | Later:
        """A batch handler's circuit is open; that is no reason to handle this event by itself later."""
        todo, round_ = delivery.todo, _Round(delivery)
        self._handler_blocked(round_, handler, circuit, delay_s)
        outcome = self._outcome(delivery, round_)
        delivery.todo = todo
        assert outcome is not None
        return outcome

    # -- suspects

    def _set_apart(self, delivery: Delivery) -> None:
        """A suspect's turn came in a batch: give it a lane, whose head runs when it may."""
        lane = self._new_lane(delivery.key)
        self._queue(lane, delivery)
        self._ready.append(lane)

    def _may_run(self, lane: _Lane, head: Delivery) -> bool:
        """Whether a head that was taken from its lane may run now; else it is where it belongs."""
        if not head.is_event and not (head.extra is not None and head.extra.idempotent):
            return True  # it is never sent again, so it cannot be a suspect
        match self._quarantine.admit(head.identity, self._now()):
            case Convicted(verdict=verdict, deaths=deaths):
                lane.running = head
                if head.key is None:
                    self._loose.discard(lane)
                failure = _crashed(head, verdict, deaths)
                if head.is_event:
                    self._settle(head, failure)
                else:
                    body = msgspec.msgpack.encode(("Crashed", failure.error, ""))
                    self._host.reply(head, REPLY_FAILED, body)
                    self._settle(head, None)
                return False
            case Hold(delay_s=delay_s):
                head.due_ns = self._now() + int(delay_s * 1e9)
                lane.opened().appendleft(head)
                self.queued += 1
                self._continue(lane)
                return False
            case Crowded(deaths=deaths):
                lane.opened().appendleft(head)
                self.queued += 1
                self._crowded.setdefault(deaths, deque()).append(lane)
                return False
            case Run(alone_s=alone_s) if alone_s:
                lane.opened().appendleft(head)
                self.queued += 1
                self._solo = lane
                self._soloist = (head.identity, alone_s)
                self._keep_silent(alone_s)
                return False
        return True

    def _keep_silent(self, seconds: float) -> None:
        """Let nothing begin but the soloist, for so long: what else is under way when it dies may have done it."""
        if self._hush is not None:
            self._hush.cancel()
        if not self._closing:
            self._hush = asyncio.get_running_loop().call_later(seconds, self._break_silence, context=self._clean)

    def _break_silence(self) -> None:
        """Go on with everything; a soloist that still waits for the end of others begins beside them."""
        if self._hush is not None:
            self._hush.cancel()
        self._hush = self._soloist = None
        lane, self._solo = self._solo, None
        if lane is not None:
            self._continue(lane)
        self._arm()

    async def _run_solo(self, token: object) -> None:
        """Run the soloist: nothing else is under way."""
        lane, self._solo = self._solo, None
        assert lane is not None
        assert self._soloist is not None
        self._keep_silent(self._soloist[1])
        head = lane.opened().popleft()
        assert isinstance(head, Delivery)  # a lane that waits keeps its beginning in memory
        self.queued -= 1
        await self._run_taken(lane, head, token)

    def release(self) -> None:
        """Let suspects run that there is room for now."""
        room = self._quarantine.room()
        while room > 0 and self._crowded:
            worst = max(self._crowded)
            self._continue(self._crowded[worst].popleft())
            if not self._crowded[worst]:
                del self._crowded[worst]
            room -= 1

    # -- handlers

    async def _event(self, delivery: Delivery) -> Failure | Later | None:
        plan = delivery.plan
        if plan is UNKNOWN or plan.is_command:
            return Failure(
                handlers=(),
                reason="unknown-type",
                error_type="",
                error=f"no handler of this application takes the event {delivery.name!r}",
            )
        if delivery.deadline_ns and self._is_late(delivery):
            return _expired(delivery)
        message = delivery.message
        if message is None:
            try:
                message = plan.decode(delivery.body)
            except BaseException as error:  # whatever a message's own checks raise
                return self._undecodable(error)
        context = self._context_of(delivery)
        round_ = _Round(delivery)
        todo = delivery.todo
        if todo is not None and not any(handler.name in todo for handler in plan.handlers):
            todo = None  # the application has other handlers by now
        if delivery.intended_ns:
            delivery.began_ns = self._now()
        for handler in plan.handlers:
            if todo is None or handler.name in todo:
                delivery.runs = handler.name
                await self._run_handler(handler, plan.circuits.get(handler.name), round_, message, context)
        outcome = self._outcome(delivery, round_)
        if plan.concludes and not isinstance(outcome, Later):
            await self._concluded(delivery)
        return outcome

    async def _concluded(self, delivery: Delivery) -> None:
        delivery.runs = ""
        try:
            await self._host.concluded(delivery)
        except BaseException as error:  # the application's
            if self._is_ours(error):
                raise
            self._absorb(error)
            self._host.conclusion_failed(delivery, error)

    async def _run_handler(
        self, handler: Registered, circuit: Circuit | None, round_: _Round, message: Any, context: Context
    ) -> None:
        """Call a handler, where it is concerned and its circuit lets it be called, and note what became of it."""
        if handler.where is not None:
            try:
                if not handler.where(message, context):
                    return
            except BaseException as error:  # the application's
                round_.ran = True
                self._handler_failed(round_, handler, error, "failed")
                return
        term = 0
        if circuit is not None:
            match circuit.admit(self._now()):
                case Admitted(term=term):
                    pass
                case Blocked(delay_s=delay_s):
                    self._handler_blocked(round_, handler, circuit, delay_s)
                    return
        round_.ran = True
        try:
            await self._call(handler, message, context)
        except BaseException as error:  # the one place where a handler's failure is caught
            if self._is_ours(error):
                if circuit is not None:
                    circuit.abandoned(term)
                raise
            self._absorb(error)
            if circuit is not None:
                circuit.failed(term, self._now())
            reason = "timeout" if isinstance(error, _HandlerTimeout) else "failed"
            self._handler_failed(round_, handler, error, reason)
        else:
            if circuit is not None:
                circuit.succeeded(term)

    @staticmethod
    async def _call(handler: Registered, message: Any, context: Context) -> Any:
        """Call a handler and return what it returns.

        Raises:
            _HandlerTimeout: it took longer than it may; else whatever it raises.
        """
        limit: asyncio.Timeout | None = None
        call = partial(handler.call, message, context) if handler.wants_context else partial(handler.call, message)
        try:
            if handler.timeout_s is None:  # `asyncio.timeout` of none costs as much as any other
                outcome = call()
                return await outcome if handler.is_async or hasattr(outcome, "__await__") else outcome
            async with asyncio.timeout(handler.timeout_s) as limit:  # only of what is `async`
                return await call()
        except TimeoutError as error:
            if limit is not None and limit.expired():
                raise _HandlerTimeout(f"not finished within {handler.timeout_s:g} s") from error
            raise  # the handler's own

    def _handler_failed(self, round_: _Round, handler: Registered, error: BaseException, reason: str) -> None:
        failures = round_.failures_before(handler) + 1
        match handler.retry.decide(failures, error, self._chance()):
            case RetryIn(delay_s=delay_s):
                round_.again(handler, failures, delay_s)
            case GiveUp():
                round_.gave_up.append(self._judge(handler, error, reason))

    def _handler_blocked(self, round_: _Round, handler: Registered, circuit: Circuit, delay_s: float) -> None:
        if circuit.policy.while_open == "wait":
            # Not all of a handler's lanes at one instant.
            round_.again(handler, round_.failures_before(handler), delay_s + self._chance() * min(1.0, delay_s))
        else:
            told = f"the circuit of {handler.name} is {circuit.state.value}"
            round_.gave_up.append(Failure(handlers=(handler.name,), reason="circuit-open", error_type="", error=told))

    @staticmethod
    def _outcome(delivery: Delivery, round_: _Round) -> Failure | Later | None:
        """What a round over a message's handlers comes to."""
        delivery.gave_up = (*delivery.gave_up, *round_.gave_up)
        if round_.todo:
            delivery.todo = round_.todo
            return Later(round_.delay_s, round_.ran)
        if not delivery.gave_up:
            return None
        first = delivery.gave_up[0]
        if len(delivery.gave_up) == 1:
            return first
        return replace(first, handlers=tuple(name for one in delivery.gave_up for name in one.handlers))

    async def _command(self, delivery: Delivery) -> None:
        plan, session = delivery.plan, delivery.session
        if session is not None and (session.left or delivery.seq in session.cancelled):
            session.cancelled.pop(delivery.seq, None)
            return
        if self._is_late(delivery):
            self._host.reply(delivery, REPLY_EXPIRED, b"")
            return
        if plan is UNKNOWN or not plan.is_command:
            told = f"no handler of this application takes the command {delivery.name!r}"
            self._host.reply(delivery, REPLY_FAILED, msgspec.msgpack.encode(("UnknownCommand", told, "")))
            return
        window = 0 if delivery.extra is None else delivery.extra.window
        if plan.streams != bool(window):
            kind, told = _STREAMS if plan.streams else _STREAMS_NOT
            self._host.reply(delivery, REPLY_FAILED, msgspec.msgpack.encode((kind, told.format(delivery.name), "")))
            return
        outlet: Outlet | None = None
        token: contextvars.Token[Outlet] | None = None
        if window:
            send = partial(self._host.items, delivery)
            outlet = Outlet(plan.encode_reply, window, self._limits, send)
            token = OUTLET.set(outlet)
        call = self._calls[delivery.identity] = _Call(self._leading, delivery.deadline_ns, outlet)
        try:
            message = plan.decode(delivery.body) if delivery.message is None else delivery.message
            delivery.runs = plan.handlers[0].name
            outcome = await self._call(plan.handlers[0], message, self._context_of(delivery))
            body = plan.encode_reply(outcome if outlet is None else outlet.count)
            if len(body) > self._limits.event_bytes_max:
                raise ValueError(f"the reply has {len(body):,} bytes, the limit is {self._limits.event_bytes_max:,}")
        except BaseException as error:  # goes back to the caller, with its traceback
            if self._is_ours(error):
                raise
            self._absorb(error)
            if outlet is not None:
                outlet.flush()
            if call.is_cancelled:
                if call.told:
                    body = msgspec.msgpack.encode(("Cancelled", call.told, ""))
                    self._host.reply(delivery, REPLY_FAILED, body)
                return
            text = _sound("".join(_told_from_the_handler(error).format())[-16_000:])
            body = msgspec.msgpack.encode((_type_name(error), _text_of(error), text))
            self._host.reply(delivery, REPLY_FAILED, body)
            return
        finally:
            del self._calls[delivery.identity]
            call.end()
            if token is not None:
                OUTLET.reset(token)  # a leader goes on in the clean context only
        if outlet is not None:
            outlet.flush()
        self._host.reply(delivery, REPLY_OK, body)

    def _is_late(self, delivery: Delivery) -> bool:
        return delivery.deadline_ns > 0 and self._now() >= delivery.deadline_ns

    def _context_of(self, delivery: Delivery, make: Callable[..., Context] = Context) -> Context:
        deadline_ns = delivery.deadline_ns
        return make(
            delivery.key,
            delivery.publisher,
            delivery.seq,
            delivery.attempt,
            self._host.shard,
            delivery.extra.headers if delivery.extra is not None and delivery.extra.headers else None,
            (lambda: (deadline_ns - self._now()) / _NS) if deadline_ns else None,
            self._host.outgoing,
            delivery,
            self._host.states,
        )

    # -- outcomes

    def _settle(self, delivery: Delivery, outcome: Failure | Later | None) -> None:
        """A message's handlers have ended, for now or for good.

        For good: write the evidence, then finish it, then let its lane go on.
        """
        if self._is_a_copy:
            os._exit(0)
        delivery.runs = ""
        self._waits_no_more(delivery)
        if self._quarantine.suspects and not (isinstance(outcome, Failure) and outcome.reason == CRASHED):
            if isinstance(outcome, Later):
                self._quarantine.pause(delivery.identity)
            else:
                self._quarantine.clear(delivery.identity)
            if self._soloist is not None and self._soloist[0] == delivery.identity:
                self._break_silence()
            self.release()
        if isinstance(outcome, Later):
            self._postpone(delivery, outcome)
            return
        parks = outcome is not None and delivery.key is not None and parks_its_key(delivery, outcome)
        self._conclude(delivery, outcome, parks)
        if parks:
            self._park(delivery.key)
            return
        lane = None if delivery.key is None else self._busy.get(delivery.key)
        if lane is not None:
            lane.running = None
            self._continue(lane)

    def _conclude(self, delivery: Delivery, outcome: Failure | None, parks: bool) -> None:
        """A message has reached its outcome."""
        self._host.handled(1)
        if (delivery.ordinal or delivery.intended_ns) and delivery.is_event:
            self._host.note(delivery, dead=outcome is not None)
        if outcome is None and self._feeds.index and delivery.is_event:
            headers = None if delivery.extra is None else delivery.extra.headers
            self._feeds.add(delivery.name, delivery.key, delivery.body, headers)
        if delivery.children is not None and delivery.children.pending:
            self._host.defer(delivery, outcome, parks=parks)
        elif outcome is not None:
            self._host.bury(delivery, outcome, parks=parks)
        else:
            if delivery.position or delivery.scheduled:
                self._host.forget(delivery)
            if delivery.session is not None:
                delivery.session.finish(delivery.seq)
                self._host.touched(delivery.session)

    def _park(self, key: WireKey) -> None:
        """Let nothing of a lane run until what its event became is redriven or purged. Commands, which live in memory only,
        fail; the rest goes to the store once that is committed."""
        lane = self._busy.get(key)
        if lane is None:
            lane = self._new_lane(key)
        lane.running = None
        lane.parked = lane.parking = True
        self.parked_keys += 1
        commands = [one for one in lane.queue if isinstance(one, Delivery) and not one.is_event]
        if commands:
            lane.queue = deque(one for one in lane.queue if isinstance(one, _Stored) or one.is_event)
            self.queued -= len(commands)
            for command in commands:
                self._refuse(command)
        self._count(lane)

    def _refuse(self, command: Delivery) -> None:
        """A command to a parked key fails at once: it might wait for days, and must not overtake what waits there."""
        told = f"key {command.key!r} is parked behind a dead letter; redrive or purge that, and try again"
        self._host.reply(command, REPLY_FAILED, msgspec.msgpack.encode(("KeyParked", told, "")))
        self._host.handled(1)
        if command.session is not None:
            command.session.finish(command.seq)
            self._host.touched(command.session)

    def _lay_down(self, lane: _Lane) -> None:
        """Let the store alone hold a parked lane; where that has no room, it stays in memory, not acked, and tries again."""
        lane.timer = None
        if any(isinstance(one, Delivery) and not one.position for one in lane.queue) and not self._spill(lane):
            if not self._closing:
                loop = asyncio.get_running_loop()
                lane.timer = loop.call_later(self._limits.lane_wait_s_max, self._lay_down, lane, context=self._clean)
            self._count(lane)
            return
        lane.stored = True
        if lane.queue:
            self._unload(lane, 0)
        self._count(lane)

    def _postpone(self, delivery: Delivery, later: Later) -> None:
        """Put a message back at the head of its lane, until its time. A long wait is the store's."""
        delivery.attempt += later.ran
        delivery.message = None  # a handler may have changed what is in it
        delivery.due_ns = self._now() + int(later.delay_s * 1e9)
        if delivery.deadline_ns:
            delivery.due_ns = min(delivery.due_ns, delivery.deadline_ns)  # then it is known to be too late
        lane = None if delivery.key is None else self._busy.get(delivery.key)
        if lane is None:
            lane = self._new_lane(delivery.key)
        lane.running = None
        lane.opened().appendleft(delivery)
        self.queued += 1
        if delivery.position:
            self._host.amend(delivery)
        # What has no key stays in memory as well, so it is acked only while there is room there.
        crowded = delivery.key is None and self.queued > self._limits.queued_events_max
        if later.delay_s > self._limits.lane_wait_s_max and not lane.stored and not crowded:
            self._spill(lane)
        if later.delay_s > self._limits.lane_wait_s_max and lane.stored and delivery.key is not None:
            self._unload(lane, delivery.due_ns)
        if later.ran and lane.queue and lane.queue[0] is delivery:
            # What the call left behind may yet end the worker, and then nothing else would name it.
            delivery.journalled = self._journal.wait(delivery.publisher, delivery.seq, self._now())
        self._continue(lane)

    def _unload(self, lane: _Lane, due_ns: int) -> None:
        """Let the store alone hold a lane that waits, so that what waits long costs no memory."""
        self._unload_from(lane, 0)
        if len(lane.queue) == 1 and isinstance(lane.queue[0], _Stored):
            lane.queue[0].due_ns = due_ns

    def _unload_from(self, lane: _Lane, first: int) -> None:
        """Let the store alone hold a lane from its `first` message on, unless a command is there, which it never holds."""
        rest = list(islice(lane.queue, first, None))
        loaded = [one for one in rest if isinstance(one, Delivery)]
        # One that is tied stands in the store with handlers to run that are to run again only if this worker dies.
        if loaded and all(one.position and not one.is_tied for one in loaded):
            count = sum(1 if isinstance(one, Delivery) else one.count for one in rest)
            last = max(one.position if isinstance(one, Delivery) else one.last for one in rest)
            after = min(one.position - 1 if isinstance(one, Delivery) else one.after for one in rest)
            self.queued -= len(loaded)
            for one in loaded:
                self._waits_no_more(one)
            stretch = _Stored(after, count, last)
            lane.queue = deque([*islice(lane.queue, first), stretch]) if first else (stretch,)

    def _continue(self, lane: _Lane) -> None:
        """Nothing of this lane runs: make its head ready, wait for its time, fetch it from the store, or end the lane."""
        lane.timer = None
        if lane.is_counted:
            self._count(lane)
        if not lane.queue:
            if lane.key is None:
                self._loose.discard(lane)
            else:
                del self._busy[lane.key]
            return
        head = lane.queue[0]
        wait_ns = head.due_ns - self._now() if head.due_ns else 0
        if wait_ns > 0:
            if not self._closing:
                loop = asyncio.get_running_loop()
                lane.timer = loop.call_later(wait_ns / 1e9, self._continue, lane, context=self._clean)
                self._count(lane)
        elif isinstance(head, _Stored):
            self._wanted.append(lane)
            self._fetch()
        else:
            self._ready.append(lane)
            if not self._armed and not self._closing:
                self._armed = True
                asyncio.get_running_loop().call_soon(self._turn, context=self._clean)

    def _fetch(self) -> None:
        """Have lanes read back that are due: as many as run soon, and many at a time, because they share a read then."""
        if self._fetched + len(self._ready) > _FETCHES_MAX // 2:
            return
        for _ in range(min(len(self._wanted), _FETCHES_MAX // 2)):
            lane = self._wanted.popleft()
            head = lane.queue[0]
            assert isinstance(head, _Stored)  # nothing of it can run
            limit = min(head.count, self._rows_in_memory(self.queued + self._rows_fetched))
            self._fetched += 1
            self._rows_fetched += limit
            self._host.load(lane.key, head.after, head.last, limit, partial(self._loaded, lane, limit))

    def _loaded(self, lane: _Lane, limit: int, rows: list[Delivery]) -> None:
        """Rows of the lane's first stored stretch came back, of `limit` that were asked for."""
        self._fetched -= 1
        self._rows_fetched -= limit
        head = lane.queue[0]
        assert isinstance(head, _Stored)
        rows = rows[: head.count]
        if rows:
            head.after = rows[-1].position
            head.count -= len(rows)
        else:
            head.count = 0  # somebody else removed them
        queue = lane.opened()
        if not head.count:
            queue.popleft()
        self.queued += len(rows)
        if lane.key is None:
            # They have no order: each waits for its own time.
            for row in rows:
                loose = self._new_lane(None)
                loose.stored = True
                loose.opened().append(row)
                self._continue(loose)
            if self.queued > self._limits.queued_events_max:
                head.due_ns = self._now() + int(
                    self._limits.lane_wait_s_max * 1e9
                )  # the rest when some of them have run
        else:
            queue.extendleft(reversed(rows))
        self._continue(lane)
        if self._wanted:
            self._fetch()

    def _append(self, lane: _Lane, delivery: Delivery) -> None:
        """Queue a message behind a busy key: in memory, or in the store where its lane has gone there."""
        self._put_behind(lane, delivery)
        if lane.parked or lane.timer is not None:
            self._count(lane)

    def _put_behind(self, lane: _Lane, delivery: Delivery) -> None:
        if lane.parked and not delivery.is_event:
            self._refuse(delivery)
            return
        if lane.batch is not None and not lane.queue and not lane.stored and self._joins(lane, delivery):
            self._gatherings.joined(lane.batch)
            return
        if lane.stored and delivery.is_event and not self._host.can_keep((delivery,)):
            # In memory only. Nothing behind it may be kept before it is, or a successor would run that first.
            lane.stored = False
        if lane.stored and delivery.is_event:
            self._host.keep((delivery,))
            behind = lane.parked or (bool(lane.queue) and isinstance(lane.queue[-1], _Stored))
            if behind or len(lane.queue) >= _LOAD_ROWS or self.queued > self._limits.queued_events_max:
                self._stretch(lane, delivery.position)
            else:
                self._queue(lane, delivery)
            return
        self._queue(lane, delivery)
        if lane.parked:
            if not lane.parking and lane.timer is None:
                self._lay_down(lane)
            return
        length = len(lane.queue)
        awake = len(self._busy) - self.parked_keys
        crowded = self.queued > self._limits.queued_events_max and length * (awake + 1) > self.queued
        if not lane.stored and (length > self._limits.lane_events_max or crowded):
            self._spill(lane)

    def _queue(self, lane: _Lane, delivery: Delivery) -> None:
        lane.opened().append(delivery)
        self.queued += 1

    def _spill(self, lane: _Lane) -> bool:
        """Give a whole lane to the store, with the message that runs: a successor must find its beginning there too.

        What it acks makes room for more, so only the lane's beginning stays in memory as well. False where the store has no
        room for all of it, or what parks the lane is not there yet.
        """
        events = [
            delivery
            for delivery in (lane.running, *(lane.more or ()), *lane.queue)
            if isinstance(delivery, Delivery) and not delivery.position and delivery.is_event
        ]
        if lane.parking or not self._host.can_keep(events):
            return False
        lane.stored = True
        self._host.keep(events)
        self._unload_from(lane, self._rows_in_memory(self.queued - len(lane.queue)))
        self._count(lane)
        return True

    def _rows_in_memory(self, others: int) -> int:
        """How many rows of a stored lane may be in memory, where so many messages of others are."""
        share = (self._limits.queued_events_max - others) // (len(self._busy) - self.parked_keys + 1)
        return max(1, min(_LOAD_ROWS, share))

    # -- failures

    def _undecodable(self, error: BaseException) -> Failure:
        return Failure(handlers=(), reason="undecodable", error_type=type(error).__name__, error=_text_of(error))

    def _judge(self, handler: Registered, error: BaseException, reason: str) -> Failure:
        """What to write of a handler that gave up."""
        place, text = self._place_of(error)
        return Failure(
            handlers=(handler.name,),
            reason=reason,
            error_type=_type_name(error),
            error=_text_of(error),
            place=place,
            traceback=text,
        )

    def _place_of(self, error: BaseException) -> tuple[str, str]:
        """The identity of where an error was raised, and its stack as text, formatted once for each distinct place.

        So it ends with the error's type: with its text, which the dead letter has, each would be a place of its own.
        Formatting takes 37 µs, finding the place 1: with it, a shard writes 50,000 dead letters a second. Code is known by
        its id, because its hash is that of all its constants; what is remembered holds the code, so that no other gets it.
        """
        own = _type_name(error)
        identity: list[Any] = [own]
        code: list[CodeType] = []
        step: TracebackType | None = error.__traceback__
        while step is not None:
            code.append(step.tb_frame.f_code)
            identity += (id(code[-1]), step.tb_lineno)
            step = step.tb_next
        cause = error.__cause__ or error.__context__
        if cause is not None and cause.__traceback__ is not None:
            code.append(cause.__traceback__.tb_frame.f_code)
            identity += (type(cause).__name__, id(code[-1]), cause.__traceback__.tb_lineno)
        known = self._places.get(tuple(identity))
        if known is None:
            if len(self._places) >= _PLACES_MAX:
                self._places.clear()
            told = _told_from_the_handler(error)
            if cause is None:
                text = "".join(["Traceback (most recent call last):\n", *told.stack.format(), own])
            else:
                text = "".join(told.format())
            if len(text) > _TRACEBACK_CHARS_MAX:  # with a cause, it has whole error texts in it
                half = _TRACEBACK_CHARS_MAX // 2
                text = f"{text[:half]}\n… {len(text) - 2 * half:,} characters …\n{text[-half:]}"
            place = xxhash.xxh3_128_hexdigest(text.encode("utf-8", "replace"))
            known = self._places[tuple(identity)] = (place, text, code)
        return known[:2]


class _Call:
    """A command's handler that runs, in a task that others' handlers run in as well."""

    __slots__ = ("_task", "deadline_ns", "is_cancelled", "outlet", "told")

    def __init__(self, task: asyncio.Task[Any] | None, deadline_ns: int, outlet: Outlet | None) -> None:
        self._task = task
        self.deadline_ns = deadline_ns
        self.outlet = outlet  # where it streams
        self.is_cancelled = False
        self.told = ""  # why, where its caller may still be there

    def cancel(self, told: str = "") -> None:
        """Nobody waits for it any more. Called from outside the task, so while that is suspended in the handler."""
        if not self.is_cancelled and self._task is not None:
            self.is_cancelled = True
            self.told = told
            if self.outlet is not None:
                self.outlet.close()
            self._task.cancel()

    def end(self) -> None:
        """The handler has ended, perhaps in spite of its cancellation: that must not meet the next one."""
        if self.is_cancelled and self._task is not None:
            while self._task.cancelling():
                self._task.uncancel()


class _HandlerTimeout(TimeoutError):
    """A handler ran longer than its `timeout_s`."""


class _Round:
    """One pass over the handlers of a message: who is to be called again and when, and who gave up."""

    __slots__ = ("_before", "delay_s", "gave_up", "ran", "todo")

    def __init__(self, delivery: Delivery) -> None:
        self._before = delivery.todo or {}
        self.todo: dict[str, int] = {}
        self.gave_up: list[Failure] = []
        self.delay_s = 0.0  # the longest that one of them asks for: then all of them run
        self.ran = False

    def failures_before(self, handler: Registered) -> int:
        return self._before.get(handler.name, 0)

    def again(self, handler: Registered, failures: int, delay_s: float) -> None:
        self.todo[handler.name] = failures
        self.delay_s = max(self.delay_s, delay_s)


def _crashed(delivery: Delivery, verdict: str, deaths: int) -> Failure:
    """The outcome of an event that is not run any more; a redrive runs the handlers that it had left, or gave up."""
    given_up = [name for one in delivery.gave_up for name in one.handlers]
    left = [one.name for one in delivery.plan.handlers if delivery.todo is None or one.name in delivery.todo]
    return Failure(
        handlers=tuple(dict.fromkeys([*given_up, *left])),
        reason=CRASHED,
        error_type="",
        error=f"its handling ended the worker with {verdict}; {deaths} workers have died while it was under way",
    )


def _expired(delivery: Delivery) -> Failure:
    """The outcome of an event whose deadline is over; a redrive runs the handlers that it had left, or gave up."""
    given_up = [name for one in delivery.gave_up for name in one.handlers]
    return Failure(
        handlers=tuple(dict.fromkeys([*given_up, *(delivery.todo or ())])),
        reason=EXPIRED,
        error_type="",
        error="its deadline was over before its handlers could begin",
    )


def _differ(one: contextvars.Context, other: contextvars.Context) -> bool:
    """Whether a variable was changed. One whose values cannot be compared (an array, say) was."""
    try:
        return one != other
    except Exception:
        return True


def _handlers_of(plan: Plan) -> str:
    return " or ".join(handler.name for handler in plan.handlers) or plan.name


def _type_name(error: BaseException) -> str:
    return TimeoutError.__name__ if isinstance(error, _HandlerTimeout) else type(error).__name__


def _told_from_the_handler(error: BaseException) -> traceback.TracebackException:
    """An error and what caused it, without the frames of ours that led to the handler."""
    told = traceback.TracebackException.from_exception(error)
    chain: list[traceback.TracebackException | None] = [told]
    while chain:
        one = chain.pop()
        if one is not None:
            ours = next((at for at, frame in enumerate(one.stack) if frame.filename not in _OUR_FILES), len(one.stack))
            del one.stack[:ours]
            chain += (one.__cause__, one.__context__)
    return told


def _text_of(error: BaseException) -> str:
    return _sound(text_of(error)[:_ERROR_CHARS_MAX])


def _sound(text: str) -> str:
    """Text that can be encoded: half of a surrogate pair cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
