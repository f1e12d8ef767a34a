"""A simulated world for the real client, sessions, lanes and shards: virtual time, a network that loses, doubles and
reorders, workers that die. Everything follows from the seed."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import accumulate
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from shardbus.breaker import Breaker
from shardbus.client import Client
from shardbus.config import Limits
from shardbus.context import Context
from shardbus.errors import BusRejected, BusUnreachable, CommandLost
from shardbus.messages import Command, Event
from shardbus.metrics import Book
from shardbus.quarantine import Ended
from shardbus.registry import OnDeadLetter, Plan, Registry
from shardbus.retry import Retry
from shardbus.store import ANY_SIZE, LaneHead, WaitingEvent
from shardbus.testing import MemoryRows, MemoryStore
from shardbus.testing.cluster import CONTROL, Cluster, ClusterConnector

T = TypeVar("T")

LIMITS = Limits(
    batch_events_max=4,
    outbox_events_max=48,
    session_credit_events_max=24,
    credit_events_max=2048,
    lane_events_max=3,
    queued_events_max=16,
    ping_interval_s=0.2,
    hello_interval_s=0.1,
)
FAULTS_END_S = 5.0
BOOK = {"keys": 256, "publishers": 2, "log_bytes": 16_384}
JOURNAL = {"suspended": 64, "suspects": 128}
POISON = ("poison", "late poison", "flaky poison")  # kinds of events that end their shard


class _Handle(msgspec.Struct, eq=False):
    """A callback to come."""

    callback: Callable[..., object] | None
    args: tuple[Any, ...]
    context: contextvars.Context | None
    loop: VirtualLoop | None = None  # of a timer that is not due yet

    def __lt__(self, other: _Handle) -> bool:
        return False  # of timers for the same instant, the heap has any come first

    def cancel(self) -> None:
        self.callback = None
        if self.loop is not None:
            self.loop.cancelled_timers += 1
            self.loop = None


class VirtualLoop(asyncio.AbstractEventLoop):
    """An event loop whose time passes only when nothing is left to do.

    No more than a world needs: no selector, no threads, no debugging. What a callback raises ends the run.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, _Handle]] = []  # a heap
        self.cancelled_timers = 0
        self._stopping = False
        self._closed = False
        self.create_future = partial(asyncio.Future, loop=self)  # type: ignore[method-assign]
        self.create_task = partial(asyncio.Task, loop=self)  # type: ignore[method-assign,assignment]

    def time(self) -> float:
        return self.now

    def is_running(self) -> bool:
        return asyncio._get_running_loop() is self

    def call_soon(  # type: ignore[override]  # a handle of its own
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:
        handle = _Handle(callback, args, context)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:
        handle = _Handle(callback, args, context, self)
        heappush(self._timers, (when, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:
        handle = _Handle(callback, args, context, self)
        heappush(self._timers, (self.now + delay, handle))
        return handle

    def run_until_complete(self, future: Any) -> Any:
        task = asyncio.ensure_future(future, loop=self)
        task.add_done_callback(lambda _: self.stop())
        asyncio._set_running_loop(self)
        try:
            self._run()
        finally:
            asyncio._set_running_loop(None)
        return task.result()

    def _run(self) -> None:
        """Turn by turn, run what is ready by then; what that makes ready has the next turn."""
        ready, timers = self._ready, self._timers
        self._stopping = False
        while not self._stopping:
            if self.cancelled_timers > 50 and self.cancelled_timers > len(timers) / 2:
                timers[:] = [timer for timer in timers if timer[1].callback is not None]
                heapify(timers)
                self.cancelled_timers = 0
            while timers and timers[0][1].callback is None:
                heappop(timers)
                self.cancelled_timers -= 1
            if not ready:
                assert timers, "nothing is scheduled any more, and the world has not ended"
                self.now = max(self.now, timers[0][0])
            due = self.now + 1e-9
            while timers and timers[0][0] < due:
                handle = heappop(timers)[1]
                if handle.callback is None:
                    self.cancelled_timers -= 1
                handle.loop = None
                ready.append(handle)
            for _ in range(len(ready)):
                handle = ready.popleft()
                callback, context = handle.callback, handle.context
                if callback is None:
                    continue
                if context is None:
                    callback(*handle.args)
                else:
                    context.run(callback, *handle.args)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        logging.getLogger("asyncio").error(context["message"], exc_info=context.get("exception"))

    def get_debug(self) -> bool:
        return False

    def stop(self) -> None:
        self._stopping = True

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True
        self._ready.clear()
        self._timers.clear()


class Note(Event, key="key"):
    key: str
    n: int
    sender: int
    kind: str = "quick"


class Pile(Event, key="key"):
    """As a note, for a batch handler."""

    key: str
    n: int
    sender: int
    kind: str = "quick"


class Once(Event, key="key", frozen=True):
    """Has one plain handler, which is called once; carries no stamps."""

    key: str
    n: int
    sender: int
    fails: bool


class Late(Event, key="key"):
    """It is scheduled."""

    key: str
    n: int
    sender: int
    due_s: float


class Sum(Command[int], key="key"):
    key: str


class Handling(msgspec.Struct):
    """A handler ran to its end."""

    sender: int
    key: str
    n: int
    attempt: int
    kind: str
    failed: bool
    handler: str


class Network:
    """Carries frames between clients and shards with what a seed does to them."""

    def __init__(self, world: World) -> None:
        self.world = world

    def carry(self, frame: bytes, deliver: Callable[[bytes], None]) -> None:
        world, loop = self.world, self.world.loop
        if loop.now >= FAULTS_END_S:
            loop.call_later(0.0005, deliver, frame)
            return
        chance = world.chance.random
        copies = 1
        if chance() < world.loss:
            copies = 0
        elif chance() < world.doubling:
            copies = 2
        for _ in range(copies):
            loop.call_later(0.0005 + (chance() * world.jitter_s if chance() < 0.3 else 0.0), deliver, frame)


class WorldStore(MemoryStore):
    """Takes its time, before or after it commits, and has one caller at a time, as a database connection has."""

    def __init__(self, rows: MemoryRows, chance: random.Random) -> None:
        super().__init__(rows)
        self._chance = chance
        self._busy = False

    async def _call(self, call: Callable[..., Awaitable[T]], *args: Any, **rows: Any) -> T:
        assert not self._busy, "two calls at once"
        self._busy = True
        try:
            when = self._chance.random() * 0.08 - 0.04
            if when < 0.0:
                await asyncio.sleep(-when)
            if self.dead:
                await asyncio.Event().wait()
            answer = await call(*args, **rows)
            if when > 0.0:
                await asyncio.sleep(when)
        finally:
            self._busy = False
        return answer

    async def write(self, **rows: Any) -> None:
        await self._call(super().write, **rows)

    async def load_waiting(self, lanes: Sequence[LaneHead], bytes_max: int = ANY_SIZE) -> list[list[WaitingEvent]]:
        return await self._call(super().load_waiting, lanes, bytes_max)

    async def drop_oldest(self, **what: Any) -> int:
        return await self._call(super().drop_oldest, **what)

    async def outcomes(self, publisher: bytes, first: int) -> tuple[list[int], list[int]]:
        return await self._call(super().outcomes, publisher, first)


class _Book(Book):
    """Without histograms: no event here says when it was meant to be published."""

    def _counted(self, row: int, which: int) -> list[tuple[int, int]]:
        return []


class World(Cluster):
    """Shards, clients and faults of one seed. `run` lives through it and checks every promise at the end."""

    def __init__(self, seed: int, loop: VirtualLoop) -> None:
        self.seed = seed
        self.loop = loop
        self.chance = random.Random(seed)
        self.loss = self.chance.choice([0.0, 0.02, 0.2])
        self.doubling = self.chance.choice([0.0, 0.05, 0.3])
        self.jitter_s = self.chance.choice([0.0, 0.01, 0.3])
        self.restarts = self.chance.choice([0, 1, 4])
        self.shards_count = self.chance.choice([1, 1, 2])
        self.senders = self.chance.choice([1, 2])
        self.events_each = self.chance.choice([20, 60])
        self.keys = self.chance.choice([1, 3, 8])
        self.store_failures = self.chance.choice([0, 0, 3])
        self.limits = replace(
            LIMITS,
            store_rows_max=self.chance.choice([2000, 2000, 10]),
            store_full=self.chance.choice(["stop", "stop", "drop_oldest"]),
            store_write_rows_max=self.chance.choice([1024, 2]),  # 2: what belongs together is written apart
            lane_wait_s_max=0.5,
        )
        self.parks = self.chance.random() < 0.4  # bad events park their keys, and end well after some redrives
        self.poisoned = not self.parks and self.chance.random() < 0.4  # what is redriven would crash for ever
        self.poison_weight = random.Random(f"{seed}/poison").choice([2, 2, 10]) if self.poisoned else 0
        super().__init__(
            self.shards_count,
            now_ns=self._now_ns,
            wall_ns=self._now_ns,
            chance=self.chance.random,
            book=BOOK,
            journal=JOURNAL,
        )
        self.carry = Network(self).carry  # type: ignore[method-assign]
        self.folds = random.Random(f"{seed}/folds")
        self.leaving = random.Random(f"{seed}/leaving")
        self.later = random.Random(f"{seed}/later")
        self.schedules = self.later.random() < 0.15
        self.onces = random.Random(f"{seed}/once")
        self.once_share = self.onces.choice([0.0, 0.0, 0.2, 1.0])
        self.once_sent: list[Once] = []
        self.once_calls: dict[tuple[int, int], int] = defaultdict(int)  # by sender and number, in the order of the first
        self.scheduled: dict[tuple[int, int], Late] = {}  # by sender and number
        self.cancelled: set[tuple[int, int]] = set()
        self.asked_to_cancel: set[tuple[int, int]] = set()
        self.lates: list[tuple[int, int, float, int]] = []  # handled: sender, number, when, attempt
        self.crashes = 0
        self.kills = 0  # by somebody outside
        self.handlings: list[Handling] = []
        self.sums: dict[str, int] = defaultdict(int)
        self.died = False
        self.clients: list[Client] = []
        self.registry = Registry("world")
        self.calls: dict[tuple[int, str, int], int] = defaultdict(int)
        self.flaky_calls: set[tuple[int, str, int, int]] = set()
        self.bad_calls: dict[tuple[int, str, int], int] = defaultdict(int)
        retry = Retry(attempts=3, base_s=self.chance.choice([0.01, 0.5, 2.0]))
        breaker = Breaker(failures=3, open_s=2.0) if self.chance.random() < 0.3 else None
        on_dead_letter: OnDeadLetter = "park" if self.parks else "continue"
        self.registry.on(Note, retry=retry, breaker=breaker, on_dead_letter=on_dead_letter)(self._handle)
        self.registry.on(Note, retry=retry, timeout_s=1.0)(self._handle_too)
        piles = random.Random(f"{seed}/piles")
        self.pile_share = piles.choice([0.0, 0.0, 0.5, 1.0])
        self.pile_raises = piles.random() < 0.5
        self.registry.on(
            Pile,
            retry=retry,
            breaker=breaker,
            on_dead_letter=on_dead_letter,
            batch=piles.choice([2, 5]),
            batch_by=piles.choice(["type", "type", "key"]),
            linger_s=piles.choice([0.0, 0.0, 0.05]),
        )(self._handle_pile)
        self.registry.on(Late)(self._handle_late)
        self.registry.on(Once, retry=Retry(attempts=1))(self._handle_once)
        self.registry.command(Sum)(self._sum)
        self.successors: set[asyncio.Task[None]] = set()

    # -- the application

    async def _handle(self, event: Note, context: Context) -> None:
        if event.kind == "flaky poison" and self.fails_first(event, context.shard):
            raise ValueError("the first call in a process fails")
        if event.kind in POISON:
            await self._crash(context.shard, self.counters[context.shard], late=event.kind == "late poison")
        if event.kind == "slow":
            await asyncio.sleep(0.01 + 0.01 * (event.n % 5))
        elif event.kind == "stuck":
            await asyncio.sleep(3.0)
        self.sums[event.key] += 1
        fails = event.kind == "bad"
        if fails and self.parks:
            self.bad_calls[event.sender, event.key, event.n] += 1
            fails = self.bad_calls[event.sender, event.key, event.n] <= 3 * (1 + event.n % 3)
        self._handled(event, context, "first", fails=fails)

    async def _handle_pile(self, events: list[Pile], contexts: list[Context]) -> list[Exception | None]:
        """Stops at the first event of a key that fails: those behind it come again."""
        await asyncio.sleep(max({"slow": 0.02, "stuck": 3.0}.get(event.kind, 0.0) for event in events))
        outcomes: list[Exception | None] = [None] * len(events)
        failed: set[str] = set()
        for at, (event, context) in enumerate(zip(events, contexts, strict=True)):
            if event.key in failed:
                continue
            self.calls[event.sender, event.key, event.n] += 1
            calls = self.calls[event.sender, event.key, event.n]
            fails = event.kind == "bad" and not (self.parks and calls > 3 * (1 + event.n % 3))
            fails |= event.kind == "flaky" and calls == 1
            fails |= event.kind == "flaky poison" and self.fails_first(event, context.shard)
            if event.kind in POISON and not fails:
                await self._crash(context.shard, self.counters[context.shard], late=event.kind == "late poison")
            if fails:
                outcomes[at] = ValueError(f"{event.n} is {event.kind}")
                failed.add(event.key)
        failed.clear()
        raised = next((one for one in outcomes if one is not None), None) if self.pile_raises else None
        for event, context, outcome in zip(events, contexts, outcomes, strict=True):
            if event.key in failed:
                continue
            if outcome is not None or raised is not None:
                failed.add(event.key)
            if event.kind in POISON:
                continue  # as that of a single event, it has raised before it did anything
            self.sums[event.key] += 1
            handling = Handling(
                event.sender, event.key, event.n, context.attempt, event.kind, event.key in failed, "first"
            )
            self.handlings.append(handling)
        if raised is not None:
            raise raised
        return outcomes

    def fails_first(self, event: Note | Pile, shard: int) -> bool:
        """Whether this is the first call for the event in this incarnation of the shard."""
        call = (event.sender, event.key, event.n, self.counters[shard])
        known = call in self.flaky_calls
        self.flaky_calls.add(call)
        return not known

    async def _crash(self, at: int, counter: int, *, late: bool) -> None:
        """The end of the process that runs this handler, which so never returns."""
        if late:
            await asyncio.sleep(0.05)
        if self.shards[at] is not None and self.counters[at] == counter:
            self.crashes += 1
            self.kill_shard(at, Ended(how="crashed", told="SIGABRT", at_ns=self.now_ns()))
            succession = self.loop.create_task(self._succeed(at, self.chance.random() * 0.5))
            self.successors.add(succession)
            succession.add_done_callback(self.successors.discard)
        await asyncio.Event().wait()

    async def _succeed(self, at: int, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        await self.start_shard(at)

    async def _handle_too(self, event: Note, context: Context) -> None:
        self.calls[event.sender, event.key, event.n] += 1
        calls = self.calls[event.sender, event.key, event.n]
        if event.kind == "slow" and calls == 1:
            await asyncio.sleep(5.0)  # runs into its time-out, the first time
        self._handled(event, context, "second", fails=event.kind == "flaky" and calls < 3)

    def _handled(self, event: Note, context: Context, handler: str, *, fails: bool) -> None:
        self.handlings.append(
            Handling(event.sender, event.key, event.n, context.attempt, event.kind, fails, handler)
        )
        if fails:
            raise ValueError(f"{event.n} is {event.kind}")

    async def _handle_late(self, event: Late, context: Context) -> None:
        self.lates.append((event.sender, event.n, self.loop.now, context.attempt))

    async def _handle_once(self, event: Once) -> None:
        self.once_calls[event.sender, event.n] += 1
        if event.n % 11 == 0:
            await asyncio.sleep(0.05)
        if event.fails and not (self.parks and self.once_calls[event.sender, event.n] > 2):
            raise LookupError(f"{event.n} fails")

    def _sum(self, command: Sum) -> int:
        return self.sums[command.key]

    # -- the bus

    def _now_ns(self) -> int:
        return int(self.loop.now * 1e9)

    def plans(self, at: int) -> dict[str, Plan]:
        return self.registry.plans()

    def limits_now(self) -> Limits:
        return self.limits if self.loop.now < FAULTS_END_S else LIMITS

    def new_store(self, at: int) -> WorldStore:
        return WorldStore(self.rows[at], self.chance)

    def new_book(self, buffer: bytearray) -> _Book:
        return _Book(memoryview(buffer), **BOOK)

    def kill_shard(self, at: int, ended: Ended) -> None:
        self.died = self.died or self.shards[at] is not None
        super().kill_shard(at, ended)

    def bury_evidence(self, at: int) -> None:
        if self.folds.random() < 0.5:
            self.books[at].fold(self.now_ns(), self.folds.randrange(10))

    async def faults(self) -> None:
        for _ in range(self.restarts):
            await asyncio.sleep(self.chance.random() * FAULTS_END_S / (self.restarts + 1))
            at = self.chance.randrange(self.shards_count)
            if self.shards[at] is not None and at not in self.starting:
                self.kills += 1
                self.kill_shard(at, Ended(how="killed", told="SIGKILL", at_ns=self.now_ns()))
                await asyncio.sleep(self.chance.random() * 0.5)
                await self.start_shard(at)

    async def failing_stores(self) -> None:
        for _ in range(self.store_failures):
            await asyncio.sleep(self.chance.random() * FAULTS_END_S / (self.store_failures + 1))
            store = self.stores[self.chance.randrange(self.shards_count)]
            assert store is not None
            store.failing = "locked"
            await asyncio.sleep(self.chance.random())
            store.failing = ""

    async def purged(self) -> None:
        """A store that is full of dead letters stays full until somebody makes room."""
        await asyncio.sleep(FAULTS_END_S + 1.0)
        for shard in self.shards:
            if shard is not None:
                shard._writer._limits = LIMITS

    # -- the publishers

    async def sender(self, number: int) -> Client:
        client = Client(
            "world",
            ClusterConnector(self),
            CONTROL,
            limits=LIMITS,
            now=self.now_ns,
            wall=self.now_ns,
            publisher=b"%016d" % number,
        )
        await client.start(60.0)
        self.clients.append(client)
        chance = random.Random(f"{self.seed}/{number}")
        piles = random.Random(f"{self.seed}/piles/{number}")
        ordinals: dict[str, int] = defaultdict(int)
        kinds = ["quick", "slow", "bad", "flaky", "stuck", *POISON]
        weights = list(accumulate([64, 18, 8, 8, 2, *[self.poison_weight] * len(POISON)]))
        credit = LIMITS.session_credit_events_max + LIMITS.batch_events_max  # what a session may have unfinished
        bound = LIMITS.queued_events_max + credit * self.senders + self.keys
        for _ in range(self.events_each):
            key = f"k{chance.randrange(self.keys)}"
            ordinals[key] += 1
            kind = chance.choices(kinds, cum_weights=weights)[0]
            if kind in POISON:
                self.poison.add((number, key, ordinals[key]))
            event_type = Pile if piles.random() < self.pile_share else Note
            event = event_type(key=key, n=ordinals[key], sender=number, kind=kind)
            await client.publish(event, ordinal=ordinals[key])
            if client.ledger().in_flight > LIMITS.outbox_events_max * self.shards_count:
                raise AssertionError("the outboxes hold more than their bound")
            for shard in self.shards:
                assert shard is None or shard.lanes.queued <= bound, "the lanes hold more than their bound"
            if chance.random() < 0.2:
                await asyncio.sleep(chance.random() * 0.4)
            while self.onces.random() < self.once_share / 2:
                once = Once(key=key, n=len(self.once_sent), sender=number, fails=self.onces.random() < 0.7)
                self.once_sent.append(once)
                await client.publish(once, headers={"n": str(once.n)} if once.n % 5 == 0 else None)
            if self.schedules and self.later.random() < 0.3:
                await self.schedule(client, number, key)
        self.ordinals[number] = dict(ordinals)
        return client

    async def schedule(self, client: Client, sender: int, key: str) -> None:
        due_s = self.loop.now + self.later.choice([-1.0, 0.0, 0.1, 1.0, 5.0]) * self.later.random()
        late = Late(key=key, n=len(self.scheduled), sender=sender, due_s=due_s)
        self.scheduled[sender, late.n] = late
        scheduled = await client.schedule(late, at=due_s)
        if self.later.random() < 0.2:
            await asyncio.sleep(self.later.random())
            self.asked_to_cancel.add((sender, late.n))
            try:
                if await client.cancel(scheduled):
                    assert not any(one[:2] == (sender, late.n) for one in self.lates), "cancelled, and it had been handled"
                    self.cancelled.add((sender, late.n))
            except (BusUnreachable, BusRejected):
                pass  # the network took the answer, or the store is locked or full

    async def redrives(self) -> None:
        """Somebody has parked keys go on, now and then and in the middle of faults."""
        while self.parks and self.loop.now < FAULTS_END_S:
            await asyncio.sleep(self.chance.random())
            async with asyncio.TaskGroup() as group:
                for client in self.clients:
                    group.create_task(self.redrive(client))

    @staticmethod
    async def redrive(client: Client) -> None:
        try:
            await client.redrive()
        except BusUnreachable:
            pass  # its worker died, or the network took the answer

    async def asked(self, client: Client) -> None:
        if self.loss == 0 and self.chance.random() < 0.5:
            for key in sorted({key for ordinals in self.ordinals.values() for key in ordinals}):
                assert await self.ask(client, key) == self.sums[key]

    async def ask(self, client: Client, key: str) -> int:
        while True:
            try:
                return await client.execute(Sum(key=key), timeout=3000.0)
            except CommandLost:
                # Rightly: the last death was not announced yet when it was sent, or a waiting event has brought the next.
                assert self.died

    # -- a life

    async def run(self) -> None:
        self.ordinals: dict[int, dict[str, int]] = {}
        self.poison: set[tuple[int, str, int]] = set()  # sender, key, number
        for at in range(self.shards_count):
            await self.start_shard(at)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.faults())
            group.create_task(self.failing_stores())
            group.create_task(self.purged())
            group.create_task(self.redrives())
            senders = [group.create_task(self.sender(number)) for number in range(self.senders)]
        clients = [task.result() for task in senders]
        ledgers = [await client.flush(600.0) for client in clients]
        if not self.parks:
            await self.asked(clients[0])
        for client in clients[self.parks :]:
            if self.leaving.random() < 0.7:  # the others stay, idle, and meet every worker that comes
                await client.abort()
        # What the stores took over is handled too, when faults have ended, and what is parked when that is redriven.
        while (
            any(rows.waiting or rows.scheduled or (self.parks and rows.dead) for rows in self.rows)
            or not all(one and one.lanes.idle() for one in self.shards)
        ):
            await asyncio.sleep(0.5)
            if self.parks and any(rows.dead for rows in self.rows):
                await self.redrive(clients[0])
            assert self.loop.now < 3600, "waiting events never end"
        assert not any(one is None or one.lanes.running() for one in self.shards)  # `idle` only counts
        if self.parks:
            assert all(one is not None and not one.lanes.busy_keys and not one.lanes.parked_keys for one in self.shards)
            await self.asked(clients[0])
        for client in clients:
            await client.abort()
        for shard in self.shards:
            assert shard is not None
            await shard.close()
        if self.deaths:
            await asyncio.wait(self.deaths)
        assert not self.broken
        for sender, ledger in enumerate(ledgers):
            published = self.events_each + sum(one == sender for one, _ in self.scheduled)
            published += sum(one.sender == sender for one in self.once_sent)
            assert ledger.published == published == ledger.handled + ledger.dead + ledger.waiting
            assert ledger.in_flight == 0
        self.check()

    def check(self) -> None:
        first: dict[tuple[int, str], list[int]] = defaultdict(list)
        every: dict[tuple[int, str], list[int]] = defaultdict(list)
        done: dict[tuple[int, str], list[int]] = defaultdict(list)
        seen: dict[tuple[str, int, str, int], Handling] = {}
        for one in self.handlings:
            identity = (one.handler, one.sender, one.key, one.n)
            before = seen.get(identity)
            if before is not None:
                assert one.attempt > 1, f"{identity} came again and did not say so"
                assert self.died or before.failed, f"{identity} succeeded and came again although no worker died"
            elif one.handler == "first":
                first[one.sender, one.key].append(one.n)
            every[one.sender, one.key].append(one.n)
            seen[identity] = one
            if one.handler == "first" and not one.failed and one.n not in done[one.sender, one.key]:
                done[one.sender, one.key].append(one.n)
        for (sender, key), numbers in (first if self.died else every).items():
            # Also across retries: while one event of a key is tried again, no later one overtakes it.
            assert numbers == sorted(numbers), f"sender {sender}, key {key}: out of order: {numbers}"
        if self.parks:
            # Through any crash: what waits behind a parked event is handled after that is.
            for (sender, key), numbers in done.items():
                assert numbers == sorted(numbers), f"sender {sender}, key {key}: overtook what parked: {numbers}"
        for sender, ordinals in self.ordinals.items():
            for key, last in ordinals.items():
                expected = [number for number in range(1, last + 1) if (sender, key, number) not in self.poison]
                assert first.get((sender, key), []) == expected, f"lost events of {key}"
        for one in seen.values():
            assert one.failed == (not self.parks and one.kind == "bad" and one.handler == "first"), f"{one} had no outcome"
        bad = {(one.sender, one.key, one.n) for one in self.handlings if one.kind == "bad"}
        self.check_scheduled()
        self.check_once()
        self.check_evidence()
        for rows in self.rows:
            assert rows.row_max == len(rows.dead) + rows.redriven + rows.purged + rows.dropped, "the store's ledger"
        letters = [letter for rows in self.rows for letter in rows.dead.values()]
        dropped = sum(rows.dropped for rows in self.rows)
        crashed = [msgspec.msgpack.decode(one.envelope.body, type=Note) for one in letters if one.reason == "crashed"]
        convicted = {(note.sender, note.key, note.n) for note in crashed}
        # What fails before it kills may have used up its attempts in the incarnations that others have ended.
        fallen = [one.envelope for one in letters if one.reason == "failed" and one.envelope.type != "Once"]
        failed = [msgspec.msgpack.decode(one.body, type=Note) for one in fallen]
        gave_up = {(note.sender, note.key, note.n) for note in failed if note.kind == "flaky poison"}
        assert all("SIGABRT" in one.error for one in letters if one.reason == "crashed")
        # A kill from outside takes back what a crash before it had said.
        most = 4 * len(self.poison) + self.kills
        assert self.crashes <= most, f"{self.crashes} crashes and {self.kills} kills to find {len(self.poison)}"
        once_doomed = sum(one.fails for one in self.once_sent)
        doomed = len(bad) + len(self.poison) + once_doomed
        if self.parks:
            assert not letters
            assert not dropped or once_doomed  # only what parks nothing may be dropped
        elif dropped:
            # A dead letter that was dropped before its publisher heard of it is sent and dies again.
            assert len(letters) + dropped >= doomed if self.died else len(letters) + dropped == doomed
            assert convicted <= self.poison
        else:
            assert len(letters) == doomed
            assert convicted | gave_up == self.poison
            envelopes = [one.envelope for one in letters if one.envelope.type == "Once"]
            once = {msgspec.msgpack.decode(one.body, type=Once): one.attempt for one in envelopes}
            assert len(once) == len(envelopes) == once_doomed, "dead letters of what is called once"
            assert all(one.fails for one in once)
            assert all(
                attempt > 1 or self.once_calls[one.sender, one.n] == 1 for one, attempt in once.items()
            ), "it was called again, and its dead letter does not say so"

    def check_once(self) -> None:
        """Each was called, in the order of its key, and once where no worker died and nobody redrives."""
        orders: dict[tuple[int, str], list[int]] = defaultdict(list)
        for sender, n in self.once_calls:
            orders[sender, self.once_sent[n].key].append(n)
        assert all(numbers == sorted(numbers) for numbers in orders.values()), "overtaken"
        assert len(self.once_calls) == len(self.once_sent), "lost"
        assert self.died or self.parks or set(self.once_calls.values()) <= {1}, "called again, and no worker died"

    def check_scheduled(self) -> None:
        """Each was handled, not before it was due, and not where cancelling it succeeded."""
        handled = [one[:2] for one in self.lates]
        lost = self.scheduled.keys() - set(handled) - self.cancelled
        # Cancelled, and nobody heard of it: the answer was lost, or the question was put again.
        assert all(one in self.asked_to_cancel for one in lost), f"lost scheduled events: {lost - self.asked_to_cancel}"
        assert self.cancelled.isdisjoint(handled), "cancelled, and handled"
        assert all(now_s >= self.scheduled[sender, n].due_s - 1e-6 for sender, n, now_s, _ in self.lates), "too early"
        assert self.died or len(handled) == len(set(handled)), "handled twice although no worker died"
        seen: set[tuple[int, int]] = set()
        for sender, n, _, attempt in self.lates:
            assert self.died or attempt == 1, "called a repeat although no worker died"
            assert attempt > 1 or (sender, n) not in seen, "came again and did not say so"
            seen.add((sender, n))

    def check_evidence(self) -> None:
        """What the shards can prove is what happened, whatever died."""
        for at in range(self.shards_count):
            self.fold(at)
        for sender, client in enumerate(self.clients):
            found = [one for book in self.books if (one := book.evidence(0, client.publisher)) is not None]
            assert sum(one.distinct for one in found) == sum(self.ordinals[sender].values()), f"evidence of {sender}"
            assert all(one.missing == one.out_of_order == 0 for one in found), f"evidence of {sender}"
            assert all(one.repeats == one.announced for one in found), f"evidence of {sender}"


WorldT = TypeVar("WorldT", bound=World)


def live(seed: int, kind: type[WorldT]) -> WorldT:
    """One life of a world of this kind."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        world = kind(seed, loop)
        loop.run_until_complete(asyncio.wait_for(world.run(), 7200))
        return world
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def live_all(seeds: Iterable[int], kind: type[World]) -> None:
    """A life of each seed, in silence; the first that breaks a promise says which it was."""
    logging.disable(logging.CRITICAL)
    try:
        for seed in seeds:
            try:
                live(seed, kind)
            except BaseException as error:
                error.add_note(f"seed {seed}: SHARDBUS_SEEDS={seed}:{seed + 1} reproduces it")
                raise
    finally:
        logging.disable(logging.NOTSET)
