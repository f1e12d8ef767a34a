"""The lanes themselves: what waits behind each busy key, in memory and in the store, and which lane's head may run.

A lane that grows too long in memory goes to the shard's store, whole, with the message that is running: the store then owns
it, and a successor of a killed worker finds it there in order. Later events of the key follow it there until the lane is
empty. What waits there for long is not in memory at all, and comes back a few rows at a time.

A lane is *parked* behind a dead letter whose handler asks for it: nothing of it runs, and it lies in the store, until that
dead letter is redriven, and then runs first, or purged. It goes there only once the dead letter is committed: otherwise a
successor would find the end of the lane without what parks it.

Owns what waits. Knows nothing of handlers and outcomes, nor of who runs the heads that are ready.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial
from itertools import islice
from typing import Final

from shardbus.batch_handlers import Batch
from shardbus.clock import NowNs
from shardbus.config import Limits
from shardbus.failures import failed_reply
from shardbus.inbound import Delivery, Later
from shardbus.journal import Journal
from shardbus.lane_host import LaneHost
from shardbus.messages import WireKey
from shardbus.wire.frames import REPLY_FAILED

_LOAD_ROWS: Final = 64  # rows read back from the store at a time for one lane
_FETCHES_MAX: Final = 1024  # lanes that are being read back or ready to run; others that are due wait in the store
_NS: Final = 1_000_000_000


class Rest(Enum):
    """Why nothing of a lane runs, or is about to."""

    NONE = auto()
    """Something does."""
    NOT_DUE = auto()
    """Its head waits for its time."""
    PARKING = auto()
    """A dead letter parks it, and is not committed yet."""
    PARKED = auto()
    """A dead letter parks it."""


_NONE: Final = Rest.NONE  # for each message behind a busy key: a member looked up takes as long as a call


class Stretch:
    """A part of a lane that lies in the store only."""

    __slots__ = ("after", "count", "due_ns", "last")

    def __init__(self, after: int, count: int, last: int, due_ns: int = 0) -> None:
        self.after = after  # its rows have positions above this
        self.count = count
        self.last = last  # the position of its last row; 0: a predecessor wrote all of them
        self.due_ns = due_ns  # its first row is not due before, by the worker's clock


class Lane:
    """The messages of one busy key. When it is full in memory, it goes to the store, and later ones follow.

    A message without a key that has to wait has a lane of its own, which no other message joins.
    """

    __slots__ = ("batch", "is_counted", "key", "more", "queue", "rest", "running", "stored", "timer")

    def __init__(self, key: WireKey, running: Delivery | None) -> None:
        self.key = key
        self.running = running
        self.batch: Batch | None = None  # in which that one is, and `more` behind it
        self.more: list[Delivery] | None = None
        # A tuple while nothing of it is in memory: of lanes that wait in the store there may be very many, and a deque takes
        # 700 bytes.
        self.queue: deque[Delivery | Stretch] | tuple[Stretch, ...] = ()
        self.stored = False
        self.rest: Rest = _NONE
        self.timer: asyncio.TimerHandle | None = None  # ends its rest, or tries again to give it to the store
        self.is_counted = False  # among those that are asleep

    def opened(self) -> deque[Delivery | Stretch]:
        """Its queue, to change it."""
        queue = self.queue
        if isinstance(queue, tuple):
            queue = self.queue = deque(queue)
        return queue

    @property
    def is_parked(self) -> bool:
        """Whether nothing of it runs until a dead letter is redriven or purged."""
        return self.rest is Rest.PARKED or self.rest is Rest.PARKING

    @property
    def is_asleep(self) -> bool:
        """Whether nothing of it runs, for now, and the store has all of it."""
        if not self.stored or self.rest is Rest.NONE:
            return False
        return all(isinstance(one, Stretch) or one.position for one in self.queue)  # a command is in memory only

    def follow(self, position: int) -> None:
        """Add an event to its end that lies in the store only."""
        end = self.queue[-1] if self.queue else None
        if isinstance(end, Stretch):
            end.count += 1
            end.last = position
        elif self.queue:
            self.opened().append(Stretch(position - 1, 1, position))
        else:
            self.queue = (Stretch(position - 1, 1, position),)

    def precede(self, position: int) -> None:
        """Add an event before all others that lies in the store only."""
        head = self.queue[0] if self.queue else None
        if isinstance(head, Stretch):
            # A predecessor may have died before it removed what had run before; that comes again, in its place.
            head.after = min(head.after, position - 1)
            head.count += 1
            head.due_ns = 0
        else:
            self.opened().appendleft(Stretch(position - 1, 1, position))

    def unload(self, first: int) -> list[Delivery]:
        """Let the store alone hold it from its `first` message on, and return those that were in memory.

        Where one of them is not in the store, as a command never is, or is to stay in memory, nothing is done.
        """
        rest = list(islice(self.queue, first, None))
        loaded = [one for one in rest if isinstance(one, Delivery)]
        # One that is tied stands in the store with handlers to run that are to run again only if this worker dies.
        if not all(one.position and not one.is_tied for one in loaded):
            return []
        if loaded:
            count = sum(1 if isinstance(one, Delivery) else one.count for one in rest)
            last = max(one.position if isinstance(one, Delivery) else one.last for one in rest)
            after = min(one.position - 1 if isinstance(one, Delivery) else one.after for one in rest)
            stretch = Stretch(after, count, last)
            self.queue = deque([*islice(self.queue, first), stretch]) if first else (stretch,)
        return loaded


class LaneBook:
    """All lanes of a shard. Bounded in memory by `Limits`; where the store has no room, by the credit of publishers.

    Args:
        clean: in whose copy timers run.
        wake: called when a lane is ready and none was; its head is to be taken soon, by a callback of the event loop.
    """

    def __init__(
        self,
        host: LaneHost,
        limits: Limits,
        now: NowNs,
        journal: Journal,
        clean: contextvars.Context,
        wake: Callable[[], None],
    ) -> None:
        self.busy: dict[WireKey, Lane] = {}
        """By key, those that are not empty, or of which something runs."""
        self.ready: deque[Lane] = deque()
        """Those whose heads are in memory and may run."""
        self.queued = 0
        """Messages in memory behind busy keys."""
        self.parked_keys = 0
        self._host = host
        self._limits = limits
        self._now = now
        self._journal = journal
        self._clean = clean
        self._wake = wake
        self._loose: set[Lane] = set()  # of messages without a key that wait
        self._asleep = 0  # of all these lanes
        self._wanted: deque[Lane] = deque()  # to be read back from the store
        self._fetched = 0  # those of them that the host was asked for
        self._rows_fetched = 0  # up to so many will come
        self._closing = False

    def close(self) -> None:
        """Nothing is ready or read back any more."""
        self._closing = True
        self.ready.clear()
        self._wanted.clear()
        for lane in (*self.busy.values(), *self._loose):
            if lane.timer is not None:
                lane.timer.cancel()

    @property
    def is_asleep(self) -> bool:
        """Whether no lane has anything that the store has not, or that runs before its time."""
        return self._asleep == len(self.busy) + len(self._loose)

    def told(self) -> list[str]:
        """What is running or waiting in memory, for people: one line a lane, the longest first."""
        lanes = (lane for lane in (*self.busy.values(), *self._loose) if not lane.is_asleep)
        return [
            f"key {lane.key!r}: {lane.running.name if lane.running else 'nothing'} is running, {len(lane.queue)} behind it"
            for lane in sorted(lanes, key=lambda lane: -len(lane.queue))
        ]

    # -- lanes that the store has already

    def adopt(
        self, key: WireKey, count: int, due_ns: int = 0, *, after: int = 0, last: int = 0, parked: bool = False
    ) -> None:
        """Make a lane of `count` waiting events that the store has, behind position `after`, the first due at `due_ns`.

        `last` is the position of the last one where it may not be written yet; `parked`: a dead letter parks it. A key that
        was adopted as parked may be adopted once more, for what waits behind that.
        """
        lane = None if key is None else self.busy.get(key)
        if lane is None:
            lane = self.open(key)
            lane.stored = True
            if parked:
                lane.rest = Rest.PARKED
                self.parked_keys += 1
        if count:
            lane.queue = (Stretch(after, count, last, due_ns),)
        if lane.is_parked:
            self._count(lane)
        else:
            self.proceed(lane)

    def can_rejoin(self, key: WireKey) -> bool:
        """Whether an event may join the end of a lane through the store: the whole lane must be there, too.

        Rows are read back by position, so what is in the lane already must have lower ones.
        """
        lane = self.busy.get(key) if key is not None else None
        return lane is None or lane.stored or self._spill(lane)

    def rejoin(self, key: WireKey, position: int) -> bool:
        """A waiting event that was dead joins the end of its lane, and makes that where there is none, which it returns; the
        store has, or will have, its row."""
        lane = self.busy.get(key) if key is not None else None
        if lane is None:
            self.adopt(key, 1, after=position - 1, last=position)
            return True
        lane.follow(position)
        return False

    # -- the end of a lane

    def open(self, key: WireKey) -> Lane:
        """An empty lane of a key that has none, or of one message without a key."""
        lane = Lane(key, None)
        if key is None:
            self._loose.add(lane)
        else:
            self.busy[key] = lane
        return lane

    def append(self, lane: Lane, delivery: Delivery) -> None:
        """Queue a message behind a busy key: in memory, or in the store where its lane has gone there."""
        is_resting = lane.rest is not _NONE
        is_parked = is_resting and lane.is_parked
        if is_parked and not delivery.is_event:
            self._refuse(delivery)
            return
        if lane.stored and delivery.is_event:
            if self._host.can_keep((delivery,)):
                self._host.keep((delivery,))
                behind = is_parked or (bool(lane.queue) and isinstance(lane.queue[-1], Stretch))
                if behind or len(lane.queue) >= _LOAD_ROWS or self.queued > self._limits.queued_events_max:
                    lane.follow(delivery.position)
                else:
                    self.put(lane, delivery)
                return
            # In memory only. Nothing behind it may be kept before it is, or a successor would run that first.
            lane.stored = False
        self.put(lane, delivery)
        if is_resting:
            self._count(lane)
        if is_parked:
            if lane.rest is Rest.PARKED and lane.timer is None:
                self._lay_down(lane)
            return
        length = len(lane.queue)
        awake = len(self.busy) - self.parked_keys
        crowded = self.queued > self._limits.queued_events_max and length * (awake + 1) > self.queued
        if not lane.stored and (length > self._limits.lane_events_max or crowded):
            self._spill(lane)

    def put(self, lane: Lane, delivery: Delivery) -> None:
        """Put a message behind a lane, in memory."""
        lane.opened().append(delivery)
        self.queued += 1

    def _spill(self, lane: Lane) -> bool:
        """Give a whole lane to the store, with the message that runs: a successor must find its beginning there too.

        What it acks makes room for more, so only the lane's beginning stays in memory as well. False where the store has no
        room for all of it, or what parks the lane is not there yet.
        """
        events = [
            delivery
            for delivery in (lane.running, *(lane.more or ()), *lane.queue)
            if isinstance(delivery, Delivery) and not delivery.position and delivery.is_event
        ]
        if lane.rest is Rest.PARKING or not self._host.can_keep(events):
            return False
        lane.stored = True
        self._host.keep(events)
        self._unload(lane, self._rows_in_memory(self.queued - len(lane.queue)))
        self._count(lane)
        return True

    def _unload(self, lane: Lane, first: int) -> None:
        """Let the store alone hold a lane from its `first` message on, where it can, so that what waits costs no memory."""
        loaded = lane.unload(first)
        self.queued -= len(loaded)
        for one in loaded:
            self.waits_no_more(one)

    def _rows_in_memory(self, others: int) -> int:
        """How many rows of a stored lane may be in memory, where so many messages of others are."""
        share = (self._limits.queued_events_max - others) // (len(self.busy) - self.parked_keys + 1)
        return max(1, min(_LOAD_ROWS, share))

    # -- the head of a lane

    def take(self, lane: Lane) -> Delivery:
        """Take the head of a lane that is ready."""
        head = lane.opened().popleft()
        assert isinstance(head, Delivery)  # `proceed` makes no other lane ready
        self.queued -= 1
        if self._wanted:
            self._fetch()
        return head

    def begin(self, lane: Lane, head: Delivery) -> None:
        """What was taken from a lane runs now."""
        lane.running = head
        if head.key is None:
            self._loose.discard(lane)
        if head.journalled >= 0:
            self.waits_no_more(head)

    def put_back(self, lane: Lane, deliveries: Sequence[Delivery]) -> None:
        """Let them be the first of their lane again, in this order."""
        lane.opened().extendleft(reversed(deliveries))
        self.queued += len(deliveries)

    def waits_no_more(self, delivery: Delivery) -> None:
        """A message that stood in the journal with a row of its own needs none any more."""
        if delivery.journalled >= 0:
            self._journal.resume(delivery.journalled)
            delivery.journalled = -1

    def proceed(self, lane: Lane) -> None:
        """Nothing of this lane runs: make its head ready, wait for its time, fetch it from the store, or end the lane."""
        lane.rest, lane.timer = _NONE, None
        if lane.is_counted:
            self._count(lane)
        if not lane.queue:
            if lane.key is None:
                self._loose.discard(lane)
            else:
                del self.busy[lane.key]
            return
        head = lane.queue[0]
        wait_ns = head.due_ns - self._now() if head.due_ns else 0
        if wait_ns > 0:
            if not self._closing:
                loop = asyncio.get_running_loop()
                lane.timer = loop.call_later(wait_ns / _NS, self.proceed, lane, context=self._clean)
                lane.rest = Rest.NOT_DUE
                self._count(lane)
        elif isinstance(head, Stretch):
            self._wanted.append(lane)
            self._fetch()
        else:
            if not self.ready:
                self._wake()
            self.ready.append(lane)

    def postpone(self, delivery: Delivery, later: Later) -> None:
        """Put a message back at the head of its lane, until its time. A long wait is the store's."""
        delivery.attempt += later.ran
        delivery.message = None  # a handler may have changed what is in it
        delivery.due_ns = self._now() + int(later.delay_s * _NS)
        if delivery.deadline_ns:
            delivery.due_ns = min(delivery.due_ns, delivery.deadline_ns)  # then it is known to be too late
        lane = None if delivery.key is None else self.busy.get(delivery.key)
        if lane is None:
            lane = self.open(delivery.key)
        lane.running = None
        self.put_back(lane, (delivery,))
        if delivery.position:
            self._host.amend(delivery)
        # What has no key stays in memory as well, so it is acked only while there is room there.
        crowded = delivery.key is None and self.queued > self._limits.queued_events_max
        if later.delay_s > self._limits.lane_wait_s_max and not lane.stored and not crowded:
            self._spill(lane)
        if later.delay_s > self._limits.lane_wait_s_max and lane.stored and delivery.key is not None:
            self._lay_away(lane, delivery.due_ns)
        if later.ran and lane.queue and lane.queue[0] is delivery:
            # What the call left behind may yet end the worker, and then nothing else would name it.
            delivery.journalled = self._journal.wait(delivery.publisher, delivery.seq, self._now())
        self.proceed(lane)

    def _lay_away(self, lane: Lane, due_ns: int) -> None:
        """Let the store alone hold a lane that waits, until `due_ns`."""
        self._unload(lane, 0)
        if len(lane.queue) == 1 and isinstance(lane.queue[0], Stretch):
            lane.queue[0].due_ns = due_ns

    # -- reading back

    def _fetch(self) -> None:
        """Have lanes read back that are due: as many as run soon, and many at a time, because they share a read then."""
        if self._fetched + len(self.ready) > _FETCHES_MAX // 2:
            return
        for _ in range(min(len(self._wanted), _FETCHES_MAX // 2)):
            lane = self._wanted.popleft()
            head = lane.queue[0]
            assert isinstance(head, Stretch)  # nothing of it can run
            limit = min(head.count, self._rows_in_memory(self.queued + self._rows_fetched))
            self._fetched += 1
            self._rows_fetched += limit
            self._host.load(lane.key, head.after, head.last, limit, partial(self._loaded, lane, limit))

    def _loaded(self, lane: Lane, limit: int, rows: list[Delivery]) -> None:
        """Rows of the lane's first stored stretch came back, of `limit` that were asked for."""
        self._fetched -= 1
        self._rows_fetched -= limit
        head = lane.queue[0]
        assert isinstance(head, Stretch)
        rows = rows[: head.count]
        if rows:
            head.after = rows[-1].position
            head.count -= len(rows)
        else:
            head.count = 0  # somebody else removed them
        if not head.count:
            lane.opened().popleft()
        if lane.key is None:
            self._loosen(rows)
            if self.queued > self._limits.queued_events_max:  # the rest when some of them have run
                head.due_ns = self._now() + int(self._limits.lane_wait_s_max * _NS)
        else:
            self.put_back(lane, rows)
        self.proceed(lane)
        if self._wanted:
            self._fetch()

    def _loosen(self, rows: list[Delivery]) -> None:
        """Rows without a key have no order: each waits for its own time."""
        for row in rows:
            lane = self.open(None)
            lane.stored = True
            self.put(lane, row)
            self.proceed(lane)

    # -- parked lanes

    def park(self, key: WireKey) -> None:
        """Let nothing of a lane run until what its event became is redriven or purged. Commands, which live in memory only,
        fail; the rest goes to the store once that is committed."""
        lane = self.busy.get(key)
        if lane is None:
            lane = self.open(key)
        lane.running = None
        lane.rest = Rest.PARKING
        self.parked_keys += 1
        commands = [one for one in lane.queue if isinstance(one, Delivery) and not one.is_event]
        if commands:
            lane.queue = deque(one for one in lane.queue if isinstance(one, Stretch) or one.is_event)
            self.queued -= len(commands)
            for command in commands:
                self._refuse(command)
        self._count(lane)

    def parked(self, key: WireKey) -> None:
        """What parks a key is committed: its lane may go to the store. May be called again."""
        lane = self.busy[key]
        if lane.rest is Rest.PARKING:
            lane.rest = Rest.PARKED
            self._lay_down(lane)

    def unpark(self, key: WireKey, position: int = 0) -> None:
        """The dead letter that parked a key is gone; `position`: it waits there, in the store, and runs first."""
        lane = self.busy[key]
        self.parked_keys -= 1
        if lane.timer is not None:
            lane.timer.cancel()
        if position:
            lane.precede(position)
        self.proceed(lane)

    def _lay_down(self, lane: Lane) -> None:
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
            self._lay_away(lane, 0)
        self._count(lane)

    def _refuse(self, command: Delivery) -> None:
        """A command to a parked key fails at once: it might wait for days, and must not overtake what waits there."""
        told = f"key {command.key!r} is parked behind a dead letter; redrive or purge that, and try again"
        self._host.reply(command, REPLY_FAILED, failed_reply("KeyParked", told))
        self._host.handled(1)
        if command.session is not None:
            command.session.finish(command.seq)
            self._host.touched(command.session)

    def _count(self, lane: Lane) -> None:
        """Something may have woken a lane, or let it sleep."""
        if lane.is_counted != lane.is_asleep:
            self._asleep += -1 if lane.is_counted else 1
            lane.is_counted = not lane.is_counted
