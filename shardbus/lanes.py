"""Runs handlers: first in, first out per key, different keys side by side, no task for a handler that does not suspend.

A *leader* task takes messages one after another and awaits each handler itself. Beside it one callback is armed in the event
loop; when that runs, the leader is suspended in a handler, because nothing else could have let it run. Then the key of that
handler becomes busy, the suspended task stays with its handler until it ends, and a new leader goes on with the rest. So a
handler always runs inside a task of its own choosing of time: `asyncio.timeout`, `TaskGroup` and `current_task` work, and a
handler that never suspends costs no task. (A task for every handler caps a worker near 250,000 events/s.)

Every leader runs in a copy of the worker's clean context. A handler that leaves a context variable changed ends its leader,
so that no later handler sees the change.

Scheduled events that are due come from the host, one by one, in turn with batches. What becomes of them is no different from
what becomes of a publisher's; as a publisher would, their rows in the store stand for them until they have ended.

What is about to run is written into the journal first, once a stride, so that a successor finds the handler that ended the
process. There, batches with a suspect in them are run one message a stride, and suspects when the quarantine lets them.

Events of a batch handler gather as their turns come, and their handler is called by a leader as any other. Where a
publisher's batch is of such a type, a stretch of it is handed over as it came, and taken apart only where the handler is
suspended or fails.

Owns who leads, and whose message runs next. What waits is the `lane_book`'s, which suspects may run the `trials`', what goes
together the `open_batches`'; handlers are run by `event_handlers`, `batch_handlers` and `command_handlers`, but for those of
the fast path; and what follows from their outcomes is in `outcomes`. None of them knows of sockets, databases or processes:
those are behind `LaneHost`.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Final

from shardbus import batch_handlers, command_handlers, event_handlers, handler_calls
from shardbus.batch_handlers import Batch, Fault, HeldBack, Together, call_together, run_batch, settled
from shardbus.clock import NowNs
from shardbus.command_handlers import CommandHandlers
from shardbus.config import Limits
from shardbus.errors import RemoteProtocolError
from shardbus.event_handlers import EventHandlers
from shardbus.failures import Failures, crashed, failed_reply
from shardbus.feeds import Feeds
from shardbus.handler_calls import HandlerTasks, absorb
from shardbus.inbound import Delivery, Inbound, Later
from shardbus.inbox import Inbox
from shardbus.journal import ALIVE, END, FIRST, Journal
from shardbus.lane_book import Lane, LaneBook
from shardbus.lane_host import LaneHost
from shardbus.messages import WireKey
from shardbus.open_batches import OpenBatches
from shardbus.outcomes import Outcomes
from shardbus.quarantine import Convicted, Quarantine
from shardbus.registry import Plan
from shardbus.store import Failure
from shardbus.trials import Trials
from shardbus.wire.frames import REPLY_FAILED
from shardbus.wording import counted

_SLICE_NS: Final = 2_000_000  # a leader gives the event loop a turn about every two milliseconds
_SIDE_NS: Final = 1_000_000  # what has just come, or is due, and the heads of lanes take turns of this length
_NOTE_NS: Final = _SLICE_NS // 2  # evidence is at most so much, and a stride, behind what has run
_STRIDE_MAX: Final = 32  # messages between two looks at the clock, which cost 60 ns; fewer where handlers are slow
_STRIDE_FIRST: Final = 4  # of a publisher whose turn begins
# What stands between a worker's loop and a handler.
_OUR_FILES: Final = (
    __file__,
    batch_handlers.__file__,
    command_handlers.__file__,
    event_handlers.__file__,
    handler_calls.__file__,
)


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
        clean = contextvars.copy_context()
        tasks = HandlerTasks()
        failures = self._failures = Failures(_OUR_FILES)
        self.plans = plans
        self._host = host
        self._now = now
        self._journal = journal
        self._quarantine = quarantine
        self._feeds = feeds
        self._clean = clean
        self._tasks = tasks
        self._book = LaneBook(host, limits, now, journal, clean, self._arm)
        self._busy = self._book.busy  # its own, as `_ready` is: each is looked at for each message
        self._ready = self._book.ready
        self._trials = Trials(quarantine, self._book, now, clean, self._arm)
        self._batches = OpenBatches(quarantine, self._book, clean, self._arm)
        self._events = EventHandlers(host, tasks, failures, now, chance)
        self._commands = CommandHandlers(host, tasks, failures, limits, now)
        self._outcomes = Outcomes(host, self._book, self._trials, quarantine, feeds)
        # What the shard asks of one part alone: it calls that without a step between.
        self.adopt = self._book.adopt
        self.can_rejoin = self._book.can_rejoin
        self.rejoin = self._book.rejoin
        self.parked = self._book.parked
        self.unpark = self._book.unpark
        self.cancel = self._commands.cancel
        self.cancel_all = self._commands.cancel_all
        self.cancel_streams = self._commands.cancel_streams
        self.cancel_overdue = self._commands.cancel_overdue
        self.allow = self._commands.allow
        self.release = self._trials.release
        self.hurry = self._batches.hurry
        self._inbox = Inbox()  # bounded by credit
        self._cursor: Inbound | None = None
        self._new_turn = False  # of what has just come; or that of lanes; and until when
        self._side_ends_ns = 0
        self._due = False  # the host may have scheduled events that are due
        self._due_next = False  # and it is their turn, before the batches'
        self._leader: object | None = None
        self._armed = False
        self._stride = 1
        # What the leader runs outside the fast path, for whoever overtakes it.
        self._running: Delivery | Batch | Together | None = None
        self._keyless: dict[object | None, Delivery] = {}  # of overtaken leaders whose message has no lane

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

    def disown(self) -> None:
        """This process is a copy of the one that these lanes are of: when the handler that made it returns, it ends."""
        self._tasks.disowned = True
        self._leader = None  # so that whoever leads looks, and nobody else has to

    def idle(self) -> bool:
        """Whether nothing runs, and nothing is queued but what the store has and will give back in its time."""
        if self._tasks.running or self._inbox or self._cursor or self._ready or self._due or self._batches:
            return False
        return self._book.is_asleep

    @property
    def busy_keys(self) -> int:
        """Keys whose handler is running or whose lane is not empty."""
        return len(self._busy)

    @property
    def parked_keys(self) -> int:
        """Those of them that a dead letter parks."""
        return self._book.parked_keys

    @property
    def queued(self) -> int:
        """Messages in memory behind busy keys."""
        return self._book.queued

    def running(self) -> list[str]:
        """What is running or waiting in memory, for people: one line a busy key, the longest lanes first."""
        told = self._book.told()
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
        self._tasks.closing = True
        self._inbox.clear()
        self._cursor = None
        self._batches.hurry()
        self._batches.clear()
        self._book.close()
        self._trials.close()
        self._commands.close()
        await self._tasks.close()

    # -- leaders and followers

    def _turn(self) -> None:
        """Once a turn of the event loop while there is work: overtake a leader that is suspended, start the next one."""
        self._armed = False
        if self._tasks.closing or self._tasks.disowned:
            return
        if self._leader is not None:
            self._overtake()
        if not self._may_lead():
            return
        loop = asyncio.get_running_loop()
        token = self._leader = object()
        context = self._clean.copy()
        task = loop.create_task(self._tasks.run(self._lead, token, context), context=context)
        self._tasks.lead(task)
        task.add_done_callback(self._ended)
        # Behind the task's first step in the loop's queue: when it runs, that step has ended or is suspended in a handler.
        self._armed = True
        loop.call_soon(self._turn, context=self._clean)

    def _may_lead(self) -> bool:
        """Whether there is something to run that may begin now."""
        if self._trials.hush is not None:
            return self._trials.solo is not None and not self._tasks.running
        return bool(self._cursor or self._inbox or self._ready or self._due or self._batches.departing)

    def _arm(self) -> None:
        if not self._armed and not self._tasks.closing:
            self._armed = True
            asyncio.get_running_loop().call_soon(self._turn, context=self._clean)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.running.discard(task)
        if self._trials.solo is not None and not self._tasks.running:
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
                self._busy[running.key] = Lane(running.key, running)
            else:
                lane.running = running

    async def _lead(self, token: object, context: contextvars.Context) -> None:
        """Run messages until there are none, a slice is used up, or this task is overtaken inside a handler."""
        end_ns = self._now() + _SLICE_NS
        ready, departing, trials, inbox = self._ready, self._batches.departing, self._trials, self._inbox
        tasks = self._tasks
        overdue = len(departing)  # batches of an earlier turn: first
        if trials.solo is not None:
            await self._run_taken(*trials.begin_solo(), token)
            if _differ(context, self._clean):
                end_ns = 0
        while self._leader is token and not tasks.closing and trials.hush is None and end_ns:
            if departing and (overdue > 0 or not (ready or self._due or inbox or self._cursor is not None)):
                overdue -= 1
                await self._run_gathered(next(iter(departing)), token)
            elif ready and not self._is_turn_of_new():
                await self._run_head(ready.popleft(), token)
            elif self._due and (self._due_next or not (self._cursor is not None or inbox)):
                self._due_next = False
                await self._run_due(token, context, min(end_ns, self._now() + _SIDE_NS))
            elif self._cursor is not None or inbox:
                self._due_next = True
                cursor = self._next_batch()
                if cursor is not None and cursor.together is not None and self._may_go_together(cursor):
                    await self._run_together(cursor, token)
                elif cursor is not None:
                    await self._run_batch(cursor, token, context, min(end_ns, inbox.share_ends_ns))
                if self._leader is token:
                    inbox.rest(self._now())
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
            self._side_ends_ns = now_ns + _SIDE_NS
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
                self._trials.set_apart(delivery)
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
            if self._tasks.is_ours(error):
                raise
            absorb(error)
            if self._leader is token:
                self._running = None
            else:
                self._return(token)
            self._settle_failed(delivery, error)
        else:
            if self._leader is not token:
                self._return(token)
                self._outcomes.settle(delivery, None)
                return
            self._running = None
            self._host.handled(1)
            self._host.forget(delivery)

    def _next_batch(self) -> Inbound | None:
        """The batch to go on with, unless it is not sound."""
        begun, self._cursor = self._cursor, None
        served = self._inbox.served
        cursor = self._inbox.take(begun, self._now())
        if cursor.session is not served:
            self._stride = min(self._stride, _STRIDE_FIRST)  # its handlers may be slower
        if not cursor.is_open:
            return self._open(cursor)
        self._cursor = cursor
        return cursor

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
                        self._trials.set_apart(delivery)
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
                            self._outcomes.settle(self._overtaken(token, key), None)
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
        await self._commands.run(delivery)
        if self._leader is token:
            self._running = None
            if delivery.children is None:
                delivery.runs = ""
                return
            self._take_out(delivery)
        else:
            self._return(token)
        self._outcomes.settle(delivery, None)

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
            self._trials.ended(delivery.identity, for_good=True)
        return True

    def _return(self, token: object) -> Delivery | None:
        """A handler has ended in a task that leads no more: forget, and return, what it ran without a key.

        A copy of the worker ends here, where its handler comes back.
        """
        if self._tasks.disowned:
            os._exit(0)
        return self._keyless.pop(token, None)

    def _overtaken(self, token: object, key: WireKey) -> Delivery:
        """What the follower made of the message whose handler was running when this task was overtaken."""
        loose = self._return(token)
        running = loose if key is None else self._busy[key].running
        assert running is not None  # the lane waits for this very task
        return running

    def _fast_failed(self, cursor: Inbound, token: object, key: WireKey, error: BaseException) -> None:
        if self._tasks.is_ours(error):
            raise error
        absorb(error)
        if self._leader is not token:
            self._settle_failed(self._overtaken(token, key), error)
            return
        plan = cursor.present_plan
        if plan.dies_at_once and cursor.recorder is None:
            # It needs no life of its own, because it is not called again: that saves a third.
            self._host.handled(cursor.hold() + 1)
            self._host.bury_row(cursor, self._failures.of_handler(plan.handlers[0].name, error, "failed"))
        else:
            self._host.handled(cursor.hold())
            self._settle_failed(cursor.delivery(), error)

    def _settle_failed(self, delivery: Delivery, error: BaseException) -> None:
        """The one plain handler of an event has raised."""
        outcome = self._events.failed(delivery, delivery.plan.handlers[0], error, "failed")
        self._outcomes.settle(delivery, outcome)

    def _append(self, lane: Lane, delivery: Delivery) -> None:
        """A message stands behind a busy key: it joins those before it in their batch, or waits."""
        if lane.batch is None or not self._batches.join(lane, delivery):
            self._book.append(lane, delivery)

    async def _run_head(self, lane: Lane, token: object) -> None:
        """Run the next message of a lane, unless it is a suspect that has to wait, or is not run any more."""
        head = self._book.take(lane)
        if self._quarantine.suspects:
            verdict = self._trials.admit(lane, head)
            if verdict is None:
                return
            if isinstance(verdict, Convicted):
                self._convict(lane, head, verdict)
                return
        await self._run_taken(lane, head, token)

    def _convict(self, lane: Lane, head: Delivery, why: Convicted) -> None:
        """The head of a lane ends its worker: that is its outcome."""
        self._book.begin(lane, head)
        failure = crashed(head, why.verdict, why.deaths)
        if not head.is_event:
            self._host.reply(head, REPLY_FAILED, failed_reply("Crashed", failure.error))
        self._outcomes.settle(head, failure if head.is_event else None)

    async def _run_taken(self, lane: Lane, head: Delivery, token: object) -> None:
        self._book.begin(lane, head)
        began_ns = 0
        if self._quarantine.suspects:  # it matters for them only
            began_ns = self._journal.running[ALIVE] = self._now()
        self._journal.lead(head.publisher, head.seq, head.seq + 1, began_ns)
        await self._deliver(head, token)

    async def _deliver(self, delivery: Delivery, token: object) -> None:
        """Run one message's handlers and settle it; afterwards the caller may have been overtaken."""
        if delivery.plan.batching is not None and delivery.is_event:
            await self._gather(delivery, token)
            return
        self._running = delivery
        outcome: Failure | Later | None = None
        if delivery.is_event:
            outcome = await self._events.run(delivery)
        else:
            await self._commands.run(delivery)
        if self._leader is token:
            self._running = None
        else:
            self._return(token)
        self._outcomes.settle(delivery, outcome)

    # -- batches

    async def _gather(self, delivery: Delivery, token: object) -> None:
        """The turn of an event of a batch handler has come: it joins others, and what is full begins."""
        batch = self._batches.take(delivery)
        if not batch.is_open:
            running = self._journal.running
            first, end = running[FIRST], running[END]
            await self._run_gathered(batch, token)
            if self._leader is token:
                self._journal.lead(delivery.publisher, first, end)  # of the batch from which this event came

    def _may_go_together(self, cursor: Inbound) -> bool:
        """Whether the next rows of a batch are a batch for their handler: enough of them, or nothing is there to join them,
        and none has to wait for its key.

        Half of what a call takes is enough. Each that is taken apart to wait for the rest costs twice as much, keeps its key
        busy, so that the rows behind it are taken apart, too, and where batches come in other sizes there is no end of it.
        """
        plan = cursor.together
        assert plan is not None
        assert plan.batching is not None
        first, most = cursor.next_seq, plan.batching.events_max
        end = min(first + most, cursor.end)
        if first == end or plan.handlers[0].wants_context or self._quarantine.suspects:
            return False  # what has a context may publish, so it has a life of its own
        if end - first < most and (self._ready or self._batches or (self._inbox and 2 * (end - first) < most)):
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
        whole = await call_together(handler, None, events, [], range(count), found, self._events)
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
            self._return(token)
        batch = stretch.apart or self._take_apart(stretch)
        for row in batch.rows:
            self._journal.resume(row)
        outcomes = list(settled(batch, handler, None, found, set(range(count)), whole, self._events))
        self._outcomes.settle_all(batch, outcomes)

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
                    lane = busy[member.key] = Lane(member.key, member)
                    lane.batch = batch
                elif lane.more is None:
                    lane.more = [member]
                else:
                    lane.more.append(member)
        return batch

    async def _run_gathered(self, batch: Batch, token: object) -> None:
        """Call the handler with a batch and settle its events; afterwards the caller may have been overtaken."""
        self._batches.depart(batch)
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
        outcomes = await run_batch(batch, self._events)
        if batch.plan.concludes:
            for member, outcome in zip(batch.members, outcomes, strict=True):
                if not isinstance(outcome, Later | HeldBack):
                    await self._events.conclude(member)
        if self._leader is token:
            self._running = None
            self._journal.rest()
        else:
            self._return(token)
        for row in batch.rows:
            self._journal.resume(row)
        self._outcomes.settle_all(batch, outcomes)

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


def _differ(one: contextvars.Context, other: contextvars.Context) -> bool:
    """Whether a variable was changed. One whose values cannot be compared (an array, say) was."""
    try:
        return one != other
    except Exception:
        return True


def _handlers_of(plan: Plan) -> str:
    return " or ".join(handler.name for handler in plan.handlers) or plan.name
