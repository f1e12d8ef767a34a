"""An application in the test's own process, with the bus's real client, sessions, lanes and retries, and what a test wants
of them: time that it controls, workers that die when it says so, and a record of what was published and handled.

    async with testing.run(bus, shards=2) as kit:
        await kit.client.publish(OrderPlaced(order_id="42", amount=9.5), delay=60)
        await kit.advance(60)
        assert [one.event.order_id for one in kit.handled] == ["42"]

Nothing of it depends on the speed of the machine, and its chances (the jitter of retries) come from a seed, so a test goes
the same way every time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import replace

from shardbus.arguments import check_count, is_number
from shardbus.client import Client
from shardbus.config import DEFAULT_LIMITS, Limits
from shardbus.context import Context, message_id
from shardbus.dead_letters import DeadLetter, DeadLetterFilter
from shardbus.errors import RemoteProtocolError, UsageError
from shardbus.publishing import PublishMiddleware, client_class
from shardbus.quarantine import Ended
from shardbus.registry import Plan, Registered, Registry, StateMaker, WorkerInfo
from shardbus.scheduled_events import at_time
from shardbus.testing.clock import Clock
from shardbus.testing.cluster import CONTROL, Cluster, ClusterConnector
from shardbus.wire.codec import decode_batch
from shardbus.wire.frames import Data, Hello, decode_to_worker

log = logging.getLogger("shardbus.testing")

_SHARDS_MAX: Final = 64
_BOOK: Final = {"keys": 4096, "publishers": 4, "log_bytes": 256 * 1024}
_JOURNAL: Final = {"suspended": 256, "suspects": 256}
_LIMITS: Final = replace(DEFAULT_LIMITS, ack_delay_s=0.0)  # acks come without time passing
_BUSY_TICK_S: Final = 0.1  # a client's, while something of it is unfinished

_WAITING_SHOWN: Final = 5  # handlers, where a test cannot go on

When = Literal["before", "after"]


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """An event that arrived at a shard for the first time, whoever published it.

    `event` is None where no handler takes its type, or where it does not decode. `due_at` is when it is scheduled for.
    """

    id: str
    type: str
    event: Any
    shard: int
    headers: Mapping[str, str]
    due_at: datetime | None


class Handled(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a handler of an event that has ended; `error` is what it raised, None: nothing.

    Of a batch handler there is one for each event of the call; `error` is what it said of that.
    """

    id: str
    event: Any
    handler: str
    shard: int
    attempt: int
    error: BaseException | None


class _Fault(msgspec.Struct, frozen=True):
    """What is to happen at a call of a handler."""

    what: Literal["kill", "duplicate"]
    when: When
    down_s: float


class Kit(Cluster):
    """What a test holds in its hands; see `run`."""

    ticks = False
    lingers = True

    def __init__(self, registry: Registry, shards: int, seed: int, limits: Limits, stuck_s: float) -> None:
        self.clock = Clock(self._tick, self._be_stuck, stuck_s)
        self.stuck = ""
        """Why the test cannot go on; empty: it can."""
        self._stuck_s = stuck_s
        self._running: dict[object, str] = {}  # handlers that were called and have not ended
        super().__init__(
            shards,
            now_ns=self.clock.now_ns,
            wall_ns=self.clock.wall_ns,
            chance=random.Random(seed).random,
            book=_BOOK,
            journal=_JOURNAL,
        )
        self.client: Client
        """A client of the bus, open as long as the block."""
        self.published: list[Published] = []
        """Events in the order in which they arrived at a shard; each once, however often it is sent. No commands."""
        self.handled: list[Handled] = []
        """Calls of event handlers in the order in which they ended. One that a time-out or a kill ends is there, with
        `CancelledError`, where it was waiting for something."""
        self._registry = registry
        self._limits = limits
        self._make_client: Callable[..., Client] = Client
        self._clients: list[Client] = []
        self._lives: list[asyncio.Task[None] | None] = [None] * shards
        self._ends: list[asyncio.Event | None] = [None] * shards
        self._comings: set[asyncio.Task[None]] = set()
        self._types = registry.plans()
        self._publishers: dict[bytes, bytes] = {}  # by peer
        self._seen: set[tuple[bytes, int, int]] = set()
        self._kills_unawaited: dict[object, int] = {}  # and of which shard
        self._calls = 0
        self._call_faults: dict[int, _Fault] = {}
        self._batches = 0
        self._batch_faults: dict[int, Callable[[Callable[[], None]], None]] = {}

    # -- time

    @property
    def now(self) -> datetime:
        """The bus's time, UTC. It begins with the real time, and then passes by `advance` alone."""
        return at_time(self.clock.wall_ns())

    async def settle(self) -> None:
        """Return when nothing can go on unless time passes: what can be handled now is handled, and its acks are there.

        A handler that waits for a socket is not waited for; one in a thread is.
        """
        await self.clock.settle()

    async def advance(self, seconds: float) -> None:
        """Let time pass, and run all that is due meanwhile, each at its instant: retries, schedules, time-outs, `sleep`s."""
        if not (is_number(seconds) and 0 <= seconds < math.inf):
            raise UsageError(f"advance({seconds!r}): time passes by seconds from 0 on")
        await self.clock.advance(seconds)

    def _tick(self) -> float | None:
        for shard in self.shards:
            if shard is not None:
                shard.tick()
        for client in self._clients:
            client.tick()
        for outgoing in self.outgoing.values():
            outgoing.tick()
        busy = any(client.ledger().in_flight for client in self._clients)
        busy = busy or any(outgoing.in_flight for outgoing in self.outgoing.values())
        if busy:
            return _BUSY_TICK_S
        # A client that has a session open says in time that it lives.
        has_sessions = any(shard.states.has_openers for shard in self.shards if shard is not None)
        return self._limits.session_silence_s / 10 if has_sessions else None

    # -- the bus

    @asynccontextmanager
    async def connect(self, *, middleware: tuple[PublishMiddleware, ...] = ()) -> AsyncIterator[Client]:
        """Another client of the bus, as `shardbus.connect` is one."""
        client = await self._connected(client_class(middleware))
        try:
            yield client
        finally:
            self._clients.remove(client)
            await client.abort()

    async def dead_letters(self, where: DeadLetterFilter | None = None) -> list[DeadLetter]:
        """The dead letters of all shards; see `Client.dead_letters`."""
        await self.settle()
        return await self.client.dead_letters(where)

    # -- faults

    def kill(self, shard: int = 0, *, down_s: float = 0.0) -> Coroutine[Any, Any, None]:
        """`await kit.kill(0)`: kill a shard's worker as SIGKILL does, and start its successor after `down_s` seconds (0: at
        once).

        What it had in memory is gone, what its store had committed is there. There is one process only: handlers that wait
        are cancelled, and the worker's lifespan ends as it does in an ordinary stop.

        The worker is dead when this returns; what it returns is awaited until all has settled. A test that forgets to await
        it fails at the end of the block.
        """
        if not 0 <= shard < self.shards_count:
            raise UsageError(f"there is no shard {shard}; the bus has {self.shards_count}")
        self._kill(shard, down_s)
        kill = object()
        self._kills_unawaited[kill] = shard
        return self._after_kill(kill)

    async def _after_kill(self, kill: object) -> None:
        self._kills_unawaited.pop(kill, None)
        await self.settle()

    def check_kills(self) -> None:
        """Raise `UsageError` where a kill was not awaited: its test would go on beside it. Called by `run`."""
        if self._kills_unawaited:
            shard = next(iter(self._kills_unawaited.values()))
            kill = f"kit.kill({shard})"
            raise UsageError(f"{kill} was not awaited, so the test went on beside it; write `await {kill}`")

    def kill_at(self, call: int, *, when: When = "after", down_s: float = 0.0) -> None:
        """Kill the worker that makes the n-th call of an event handler, counted from 1 over the whole bus and block.
        Only says so, and is not awaited.

        `"after"`: the handler has returned, and nobody was told, so it is called again. `"before"`: it was not called yet.
        """
        self._set_fault(call, _Fault("kill", when, down_s))

    def duplicate_at(self, call: int) -> None:
        """Call the handler of the n-th call twice, the second time as redelivered: what a worker's death may bring."""
        self._set_fault(call, _Fault("duplicate", "after", 0.0))

    def duplicate_batch(self, number: int) -> None:
        """Have the n-th batch that clients send (from 1) arrive twice, as after a lost connection. The bus must not mind."""
        self._set_batch_fault(number, _twice)

    def delay_batch(self, number: int, seconds: float) -> None:
        """Have the n-th batch that clients send (from 1) arrive so much later, behind others. The bus must not mind."""
        self._set_batch_fault(number, lambda deliver: self._later(seconds, deliver))

    def _set_fault(self, call: int, fault: _Fault) -> None:
        if call <= self._calls:
            raise UsageError(f"call {call} was made already; the next is {self._calls + 1}")
        self._call_faults[call] = fault

    def _set_batch_fault(self, number: int, fault: Callable[[Callable[[], None]], None]) -> None:
        if number <= self._batches:
            raise UsageError(f"batch {number} was sent already; the next is {self._batches + 1}")
        self._batch_faults[number] = fault

    @staticmethod
    def _later(seconds: float, deliver: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(seconds, deliver)

    # -- inside: life

    async def open(self, make_client: Callable[..., Client]) -> None:
        """Start all shards and the client. Called by `run`."""
        for at in range(self.shards_count):
            await self._begin(at)
        self.client = await self._connected(make_client)

    async def close(self) -> None:
        """End everything at once. Called by `run`."""
        for client in self._clients:
            await client.abort()
        for outgoing in self.outgoing.values():
            await outgoing.close()
        for coming in self._comings:
            coming.cancel()
        for end in self._ends:
            if end is not None:
                end.set()
        tasks = [task for task in (*self._lives, *self._comings, *self.deaths) if task is not None]
        if tasks:
            await asyncio.wait(tasks)
        for task in self._lives:
            if task is not None and not task.cancelled() and (error := task.exception()) is not None:
                self.broken.append(error)

    async def _connected(self, make: Callable[..., Client]) -> Client:
        client = make(
            "kit", ClusterConnector(self), CONTROL, now=self.now_ns, wall=self.wall_ns, limits=self._limits, ticks=False
        )
        self._clients.append(client)
        await client.start(10.0)
        return client

    async def _begin(self, at: int) -> None:
        """Start the next incarnation of a shard, in a task of its own, in which its lifespan also ends."""
        started = asyncio.get_running_loop().create_future()
        end = self._ends[at] = asyncio.Event()
        self._lives[at] = asyncio.get_running_loop().create_task(self._live(at, started, end))
        await started

    async def _live(self, at: int, started: asyncio.Future[None], end: asyncio.Event) -> None:
        try:
            async with self._registry.running(self._worker(at)):
                await self.start_shard(at)
                started.set_result(None)
                await end.wait()
                shard = self.shards[at]
                if shard is not None and self._ends[at] is end:
                    await shard.close(killed=True)
                elif self.deaths:
                    await asyncio.wait(self.deaths)
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    def _kill(self, at: int, down_s: float) -> None:
        end = self._ends[at]
        if self.shards[at] is None or end is None:
            return
        self.kill_shard(at, Ended(how="killed", told="SIGKILL", at_ns=self.now_ns()))
        end.set()
        life = self._lives[at]
        coming = asyncio.get_running_loop().create_task(self._succeed(at, life, down_s))
        self._comings.add(coming)
        coming.add_done_callback(self._comings.discard)

    async def _succeed(self, at: int, life: asyncio.Task[None] | None, down_s: float) -> None:
        if life is not None:
            await asyncio.wait([life])
        if down_s:
            await asyncio.sleep(down_s)
        await self._begin(at)

    def _be_stuck(self) -> None:
        """End the test: it waits for something that does not come by itself."""
        handlers = list(self._running.values())
        told = "; ".join(handlers[:_WAITING_SHOWN]) or "none"
        if len(handlers) > _WAITING_SHOWN:
            told += f"; and {len(handlers) - _WAITING_SHOWN} more"
        next_s = self.clock.next_s()
        due = "no timer is set" if next_s is None else f"the next timer is due in {next_s:g} s"
        self.stuck = (
            f"the test waits and nothing goes on: time stands still until `await kit.advance(…)`, where {due}, and in "
            f"{self._stuck_s:g} s nothing has come from outside. Handlers that wait: {told}. Await what needs time to pass "
            "as a task beside `advance`"
        )
        log.error("%s", self.stuck)
        task = self.clock.main_task()
        if task is not None:
            task.cancel(self.stuck)

    # -- inside: frames

    def carry(self, frame: bytes, deliver: Callable[[bytes], None]) -> None:
        """Deliver a frame by a turn of the loop of its own."""
        asyncio.get_running_loop().call_soon(deliver, frame)

    def to_shard(self, at: int, counter: int, peer: bytes, frame: bytes) -> None:
        """Note what is published, and let the batch through, twice or late where a test wants that."""
        deliver = partial(super().to_shard, at, counter, peer, frame)
        try:
            sent = decode_to_worker(frame)
        except RemoteProtocolError:
            sent = None
        if isinstance(sent, Hello):
            self._publishers[peer] = sent.publisher
        if not isinstance(sent, Data) or not sent.blob:
            deliver()
            return
        self._note_published(at, self._publishers[peer], sent)
        self._batches += 1
        fault = self._batch_faults.pop(self._batches, None)
        if fault is None:
            deliver()
        else:
            fault(deliver)

    def _note_published(self, at: int, publisher: bytes, sent: Data) -> None:
        columns = decode_batch(sent.blob, sent.count)
        names = [columns.names] * sent.count if isinstance(columns.names, str) else columns.names
        for place, (name, body) in enumerate(zip(names, columns.apart(), strict=True)):
            seq = sent.first + place
            extra = columns.extras.get(place)
            if (publisher, at, seq) in self._seen or (extra is not None and extra.timeout_ns):
                continue
            self._seen.add((publisher, at, seq))
            due_ns = 0 if extra is None else extra.due_ns
            self.published.append(
                Published(
                    id=message_id(publisher, at, seq),
                    type=name,
                    event=self._decoded(name, body),
                    shard=at,
                    headers={} if extra is None else extra.headers,
                    due_at=at_time(due_ns) if due_ns else None,
                )
            )

    def _decoded(self, name: str, body: bytes) -> Any:
        plan = self._types.get(name)
        try:
            return None if plan is None else plan.decode(body)
        except Exception:  # whatever a message's own checks raise
            return None

    # -- inside: handlers

    def limits_now(self) -> Limits:
        """See `Cluster.limits_now`."""
        return self._limits

    def session_states(self, at: int) -> StateMaker | None:
        """See `Cluster.session_states`."""
        return self._registry.session_states(self._worker(at))

    def _worker(self, at: int) -> WorkerInfo:
        return WorkerInfo(bus=self._registry.name, shard=at, shards=self.shards_count)

    def plans(self, at: int) -> dict[str, Plan]:
        """The application's plans, with each handler watched."""
        return {
            name: Plan(plan.message_type, tuple(self._watched(one, at, plan.is_command) for one in plan.handlers))
            for name, plan in self._registry.plans().items()
        }

    def _watched(self, handler: Registered, at: int, is_command: bool) -> Registered:
        incarnation = self.counters[at]

        async def call(message: Any, context: Any) -> Any:  # of a batch handler, both are lists
            if handler.in_thread:
                self.clock.thread_begins()
            running = object()
            first, its = (message[0], context[0]) if handler.batching else (message, context)
            more = f" and {len(message) - 1} more" if handler.batching and len(message) > 1 else ""
            what = f"{type(first).__name__} with the key {its.key!r}{more}"
            self._running[running] = f"{handler.name} of {what} (shard {at}, attempt {its.attempt})"
            try:
                outcome = handler.call(message, context) if handler.wants_context else handler.call(message)
                return await outcome if hasattr(outcome, "__await__") else outcome
            finally:
                del self._running[running]
                if handler.in_thread:
                    self.clock.thread_ended()

        def note(message: Any, context: Any, outcome: Any) -> None:
            together = zip(message, context, strict=True) if handler.batching else [(message, context)]
            for number, (event, its) in enumerate(together):
                error = outcome[number] if isinstance(outcome, list | tuple) and number < len(outcome) else outcome
                self.handled.append(
                    Handled(
                        id=its.message_id,
                        event=event,
                        handler=handler.name,
                        shard=at,
                        attempt=its.attempt,
                        error=error if isinstance(error, BaseException) else None,
                    )
                )

        async def watched(message: Any, context: Any) -> Any:
            if is_command:
                return await call(message, context)
            self._calls += 1
            fault = self._call_faults.pop(self._calls, None)
            if fault is not None and (fault.what, fault.when) == ("kill", "before"):
                await self._die(at, incarnation, fault.down_s)
            for again in range(2):
                try:
                    outcome = await call(message, context)
                except BaseException as error:
                    note(message, context, error)
                    raise
                note(message, context, outcome if handler.batching else None)
                if fault is None or fault.what != "duplicate" or again:
                    break
                context = [_redelivery(one) for one in context] if handler.batching else _redelivery(context)
            if fault is not None and fault.what == "kill":
                await self._die(at, incarnation, fault.down_s)
            return outcome

        return replace(handler, call=watched, is_async=True, wants_context=True)

    async def _die(self, at: int, incarnation: int, down_s: float) -> None:
        """The end of the worker that runs this handler, which so never returns."""
        end = self._ends[at]
        if self.counters[at] == incarnation and end is not None and not end.is_set():
            self._kill(at, down_s)
            await asyncio.Event().wait()
        raise asyncio.CancelledError  # it is dead already, and the handler has made nothing of that


def _twice(deliver: Callable[[], None]) -> None:
    deliver()
    deliver()


def _redelivery(context: Context) -> Context:
    """The facts of the next delivery of the same message."""
    again = context.with_headers({})
    again.attempt += 1
    return again


@asynccontextmanager
async def run(
    bus: Registry,
    *,
    shards: int = 1,
    seed: int = 0,
    limits: Limits = _LIMITS,
    middleware: tuple[PublishMiddleware, ...] = (),
    stuck_s: float = 10.0,
) -> AsyncIterator[Kit]:
    """Run an application in the test's process: `async with testing.run(bus, shards=2) as kit`.

    Within the block time stands still, also for the test's own `asyncio.sleep` and `asyncio.timeout`, and passes by
    `kit.advance`. What needs time to pass, for instance a command whose handler sleeps, is therefore a task beside that:
    `reply = asyncio.create_task(kit.client.execute(…)); await kit.advance(5); await reply`. At the end of the block
    everything ends at once, whatever is unfinished.

    Args:
        bus: the application.
        shards: how many workers it has.
        seed: of all that is left to chance.
        limits: the bounds of the bus.
        middleware: of `kit.client`, as for `shardbus.connect`.
        stuck_s: real seconds after which a test is ended in which nothing goes on by itself; the error names the handlers
            that wait, and their keys. `math.inf`: never, for a test that waits for other programs for so long.

    Raises:
        UsageError: a number of shards out of range; the test waits for what never comes; or it did not await a `kit.kill`.
        BaseException: a defect of the bus, at the end of the block.
    """
    check_count("shards", shards, 1, _SHARDS_MAX)
    make_client = client_class(middleware)
    if not is_number(stuck_s) or not stuck_s > 0:
        raise UsageError(f"stuck_s={stuck_s!r}: give seconds above 0, or math.inf")
    kit = Kit(bus, shards, seed, limits, stuck_s)
    with kit.clock:
        try:
            await kit.open(make_client)
            yield kit
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not kit.stuck or task is None or task is not kit.clock.main_task():
                raise
            task.uncancel()
            raise UsageError(kit.stuck) from None
        finally:
            await kit.close()
    if kit.broken:
        raise kit.broken[0]
    kit.check_kills()
