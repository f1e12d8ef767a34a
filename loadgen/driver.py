"""The process that sends: `python -m loadgen.driver`. JSON lines on stdin say what, when, and perhaps to end before its
time; it says `DriverLine`s on stdout.

Owns the open loop and its clock. It alone decides when an event goes; what the bus made of it is the collector's to say.
It ends when its stdin does, so that it never outlives whoever started it.

Paced, it wakes up when the next event is due, though not within 100 µs, sends all that is due, each event stamped with
its own intended instant, and gives the event loop one turn. It sleeps in `time.sleep` on purpose: asyncio rounds a delay
up to a millisecond, and spinning would steal the core that the bus is measured on. While commands are under way it sleeps no
longer than 100 µs at a time, and then gives the loop as many turns as a reply takes to be noted.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

import shardbus
from loadgen.meters import Lags, WaitMeter
from loadgen.pacer import Arrivals, Evenly, Poisson, Profile, Recorded, Stage
from loadgen.replay import Replay, scan
from loadgen.source import Load, Source, made
from loadgen.spec import (
    SECONDS_MAX,
    Counts,
    DriverFailed,
    DriverLine,
    DriverResult,
    Go,
    LoadError,
    LoadSpec,
    Part,
    Progress,
    Recording,
    Started,
    Stop,
    decode_part,
    decode_word,
    encode_line,
)
from shardbus.demo import GetCount

BATCH: Final = 512  # events a call: what fits into a frame of the bus
COMMANDS_MAX: Final = 4096  # whose replies one driver waits for; when so many are under way, the next one waits
_NS: Final = 1_000_000_000
_NAP_NS_MIN: Final = 100_000  # really about 160 µs: what Linux makes of it
_REPLY_TURNS: Final = 4  # of the event loop, from a reply in the socket to the task that waits for it
_NAP_NS_MAX: Final = 1_000_000  # so long may an ack or a credit lie unread
_LONG_WAIT_NS: Final = 3_000_000  # longer waits are asyncio's: a slow load does not keep a core awake
_SLEEP_NS_MAX: Final = 200_000_000  # the end of a window is not slept through
_OVERRUN_NS: Final = 100_000_000  # a schedule that is further behind is not waited for at either end of the window
_LAST_NS: Final = 100_000_000  # from a recording's last event, at its own time, to the end of the window: to be handled in
_CONNECT_S: Final = 10.0
_NOT_TAKEN: Final = ("UnknownCommand", "ValidationError")  # errors of the bus, which has no handler or no field for it
_FIRST_S: Final = 5.0  # for the first event of an application that is not known

Say = Callable[[DriverLine], None]
Send = Callable[[Load, "list[int] | None"], Awaitable[None]]
"""Publish a load; the second argument is the intended instants, None for events that are not measured."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What one driver is to send, and when, but for the instant of the start.

    `arrivals` makes the schedule that begins at an instant; it is None where the load is unpaced. `length_ns` is from the
    first event to the end of the schedule, of which the first `warm_ns` are not measured. `planned` events are on it, where
    that is known.
    """

    source: Source
    arrivals: Callable[[int], Arrivals] | None
    warm_ns: int
    length_ns: int
    planned: int | None = None


def plan_of(spec: LoadSpec, driver: int = 0) -> Plan:
    """Make a driver's plan; reads a recording for the first time.

    Raises:
        LoadError: the load cannot be made.
    """
    warm_ns = int(spec.warmup_s * _NS)
    if spec.recording is not None:
        return _recorded(spec, spec.recording, driver, warm_ns)
    length_ns = int(spec.planned_s * _NS)
    profile = profile_of(spec)
    if profile is None:
        return Plan(source=made(spec, driver), arrivals=None, warm_ns=warm_ns, length_ns=length_ns)

    def arrivals(start_ns: int) -> Arrivals:
        if spec.arrivals == "poisson":
            chance = random.Random(f"{spec.seed}/{driver}/arrivals")
            return Poisson(start_ns, profile, chance, drivers=spec.drivers)
        return Evenly(start_ns, profile, driver=driver, drivers=spec.drivers)

    return Plan(source=made(spec, driver), arrivals=arrivals, warm_ns=warm_ns, length_ns=length_ns)


def profile_of(spec: LoadSpec) -> Profile | None:
    """The rates of all drivers together, warm-up first; None: unpaced. A recording's has no end of its own."""
    if spec.stages:
        first = spec.stages[0].rate
        stages = spec.stages
    elif spec.rate is not None:
        first = spec.rate
        stages = (Stage(first, SECONDS_MAX if spec.duration_s is None else spec.duration_s),)
    else:
        return None
    warm_up = (Stage(first, spec.warmup_s),) if spec.warmup_s else ()
    return Profile((*warm_up, *stages))


def _recorded(spec: LoadSpec, recording: Recording, driver: int, warm_ns: int) -> Plan:
    profile = profile_of(spec)
    coming: Arrivals | None = None
    if profile is not None and spec.arrivals == "poisson":
        coming = Poisson(0, profile, random.Random(f"{spec.seed}/arrivals"))
    elif profile is not None:
        coming = Evenly(0, profile)
    bounded = spec.stages or spec.duration_s is not None
    until_ns = int(spec.planned_s * _NS) if bounded and spec.is_paced else None
    found = scan(recording, coming, driver=driver, drivers=spec.drivers, until_ns=until_ns)
    offsets_ns = found.offsets_ns
    return Plan(
        source=Replay(recording, found, driver=driver, drivers=spec.drivers),
        arrivals=None if offsets_ns is None else lambda start_ns: Recorded(start_ns, offsets_ns),
        warm_ns=min(warm_ns, found.length_ns),
        length_ns=int((SECONDS_MAX if spec.duration_s is None else spec.planned_s) * _NS)
        if offsets_ns is None
        else found.length_ns + (_LAST_NS if profile is None else 0),
        planned=found.total,
    )


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver notes at either end of the measured window."""

    at_ns: int
    cpu_s: float
    waited_ns: int
    sent: int
    counts: Counts


class Driver:
    """One run's sending side, on a connected client.

    Args:
        start_ns: when the schedule begins; default: now.
    """

    def __init__(self, spec: LoadSpec, client: shardbus.Client, plan: Plan, start_ns: int | None = None) -> None:
        self._spec = spec
        self._client = client
        self._source = plan.source
        self._wait = WaitMeter()
        self._lags = Lags()
        self._commands = Commands(client, spec.timeout_s) if spec.commands else None
        self._send: Send = self._send_many if spec.call == "publish_many" else self._send_each
        if self._commands is not None:
            self._send = self._commands.send
        self._sent = 0
        self._over = False  # the source has no more
        self._start_ns = time.monotonic_ns() if start_ns is None else start_ns
        self._warm_ns = self._start_ns + plan.warm_ns
        self._end_ns = self._start_ns + plan.length_ns
        self._arrivals = None if plan.arrivals is None else plan.arrivals(self._start_ns)
        self._warm_count: int | None = None  # events before the measured ones, once all are sent
        self._before: Edge | None = None
        self._after: Edge | None = None
        self._limit: asyncio.Timeout | None = None  # of sending
        self._interrupted = False

    def go_at(self, start_ns: int, plan: Plan) -> None:
        """Begin at another instant than was thought; before `run`."""
        self._start_ns = start_ns
        self._warm_ns = start_ns + plan.warm_ns
        self._end_ns = start_ns + plan.length_ns
        self._arrivals = None if plan.arrivals is None else plan.arrivals(start_ns)

    async def send_first(self) -> Load:
        """Send one event ahead of the schedule, and return it: it shows whether the application takes such events."""
        load = self._source.take(1)
        await self._send(load, None)
        self._sent += len(load.messages)
        return load

    async def run(self) -> DriverResult:
        """Send the whole load, wait for it to be finished, and say what happened.

        Sending ends at the end of the window, or, where publish waits for room, up to `flush_s` later.
        """
        sending = self._send_at_will() if self._arrivals is None else self._send_on_time(self._arrivals)
        limit_s = (self._end_ns - time.monotonic_ns()) / _NS + self._spec.flush_s
        try:
            async with asyncio.timeout(limit_s) as self._limit:
                await sending
        except TimeoutError:
            pass  # the bus takes nothing more; the figures show it
        finally:
            self._limit = None
        after = self._after = self._edge()
        before = self._before or after
        final = await self._flush()
        flush_s = (time.monotonic_ns() - after.at_ns) / _NS
        window_s = (after.at_ns - before.at_ns) / _NS
        return DriverResult(
            scheduled=None if self._arrivals is None else self._scheduled_in_window(self._arrivals),
            scheduled_s=max(0, self._end_ns - self._warm_ns) / _NS,
            sent=after.sent - before.sent,
            window_s=window_s,
            before=before.counts,
            after=after.counts,
            final=final,
            flush_s=flush_s,
            waited_s=(after.waited_ns - before.waited_ns) / _NS,
            send_lag_us=self._lags.counts(),
            cpu_share=(after.cpu_s - before.cpu_s) / window_s if window_s else 0.0,
            rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform != "darwin" else 1),
            replies_us={} if self._commands is None else self._commands.replies.counts(),
            interrupted=self._interrupted,
        )

    def stop(self) -> None:
        """End the schedule now, so that `run` sends no more. Nothing happens where it has ended."""
        now_ns = time.monotonic_ns()
        if now_ns < self._end_ns and self._limit is not None:
            self._interrupted = True
            self._end_ns = now_ns
            self._limit.reschedule(asyncio.get_running_loop().time() + self._spec.flush_s)

    def progress(self) -> Progress:
        """Where the run stands now; the send lags and the replies are those since the last call."""
        now_ns = time.monotonic_ns()
        scheduled = None
        if self._arrivals is not None and not isinstance(self._arrivals, Poisson):
            scheduled = self._arrivals.scheduled(min(now_ns, self._end_ns - 1) - self._start_ns)
        return Progress(
            at_s=(now_ns - self._start_ns) / _NS,
            warming_up=self._before is None,
            counts=self._counts(),
            scheduled=scheduled,
            over=self._after is not None,
            send_lag_us=self._lags.take_new(),
            replies_us={} if self._commands is None else self._commands.replies.take_new(),
        )

    def _scheduled_in_window(self, arrivals: Arrivals) -> int:
        # A schedule that is random tells the beginning only while that is to come, so it is noted on the way.
        warm = self._warm_count
        if warm is None:
            warm = arrivals.scheduled(self._warm_ns - 1 - self._start_ns)
        return arrivals.scheduled(self._end_ns - 1 - self._start_ns) - warm

    async def _send_on_time(self, arrivals: Arrivals) -> None:
        """Send each event when it is due, or as soon after as can be. The schedule never slips."""
        while True:
            now_ns = time.monotonic_ns()
            if self._warm_count is None and now_ns >= self._warm_ns:
                self._end_warm_up(arrivals)
            measured = self._warm_count is not None
            self._open_window(now_ns, overdue_ns=0 if measured else _OVERRUN_NS)
            # What is measured and what is not never goes in one batch.
            due = arrivals.due(self._sent, min(now_ns, (self._end_ns if measured else self._warm_ns) - 1))
            over = now_ns >= self._end_ns if measured and not due.count else now_ns >= self._end_ns + _OVERRUN_NS
            if over or self._over:
                return
            if due.count:
                await self._send_due(arrivals, min(due.count, BATCH), measured=measured)
                # What was published leaves with this turn: where sending takes longer than the next event is away, there
                # would be no other before a batch is full. And a nap, or every event would be a frame of its own.
                await asyncio.sleep(0)
                if due.count < BATCH:
                    await self._idle(_NAP_NS_MIN)
            else:
                edge_ns = self._end_ns if measured else self._warm_ns
                await self._idle(min(due.wait_ns, edge_ns - now_ns))

    async def _idle(self, wait_ns: int) -> None:
        if wait_ns > _LONG_WAIT_NS:
            await asyncio.sleep(min(wait_ns - _LONG_WAIT_NS // 2, _SLEEP_NS_MAX) / _NS)
            return
        listens = self._commands is not None and self._commands.under_way
        longest_ns = _NAP_NS_MIN if listens else _NAP_NS_MAX
        time.sleep(min(max(wait_ns, _NAP_NS_MIN), longest_ns) / _NS)  # noqa: ASYNC251 - see the module's docstring
        for _ in range(_REPLY_TURNS if listens else 0):
            await asyncio.sleep(0)

    def _end_warm_up(self, arrivals: Arrivals) -> None:
        if not arrivals.due(self._sent, self._warm_ns - 1).count:
            self._warm_count = self._sent

    async def _send_due(self, arrivals: Arrivals, count: int, *, measured: bool) -> None:
        load = self._source.take(count)
        taken = len(load.messages)
        if not taken:
            self._over = True
            return
        intended_ns = arrivals.intended_ns(self._sent, taken) if measured else None
        called_ns = time.monotonic_ns()  # to build the events was the generator's own time
        try:
            await self._wait.measure(self._send(load, intended_ns))
        finally:
            if intended_ns is not None:
                self._lags.add(intended_ns, called_ns)
        self._sent += taken

    async def _send_at_will(self) -> None:
        """Send batch after batch as fast as the bus takes them. Nothing is due, so nothing is late or measured."""
        take, send = self._source.take, self._send
        while (now_ns := time.monotonic_ns()) < self._end_ns:
            self._open_window(now_ns, overdue_ns=0)
            load = take(BATCH)
            if not load.messages:
                return
            await send(load, None)
            self._sent += len(load.messages)

    def _open_window(self, now_ns: int, *, overdue_ns: int) -> None:
        """Begin to measure `overdue_ns` after the warm-up, whose events may be late by as much without harm."""
        if self._before is None and now_ns >= self._warm_ns + overdue_ns:
            self._before = self._edge()

    async def _send_many(self, load: Load, intended_ns: list[int] | None) -> None:
        await self._client.publish_many(load.messages, ordinals=load.ordinals, intended_ns=intended_ns)

    async def _send_each(self, load: Load, intended_ns: list[int] | None) -> None:
        publish = self._client.publish
        instants = intended_ns or [0] * len(load.messages)
        for event, ordinal, instant in zip(load.messages, load.ordinals, instants, strict=True):
            await publish(event, ordinal=ordinal, intended_ns=instant)

    async def _flush(self) -> Counts:
        if self._commands is not None:
            await self._commands.finish()
        try:
            await self._client.flush(self._spec.flush_s)
        except shardbus.NotDelivered:
            pass  # the ledger's `in_flight` says it, and the report judges it
        return self._counts()

    def _edge(self) -> Edge:
        return Edge(
            at_ns=time.monotonic_ns(),
            cpu_s=time.process_time(),
            waited_ns=self._wait.waited_ns,
            sent=self._sent,
            counts=self._counts(),
        )

    def _counts(self) -> Counts:
        if self._commands is not None:
            return self._commands.counts()
        ledger = self._client.ledger()
        return Counts(
            published=ledger.published,
            handled=ledger.handled,
            dead=ledger.dead,
            waiting=ledger.waiting,
            dropped=ledger.dropped,
            in_flight=ledger.in_flight,
        )


class Commands:
    """Commands under way, a task each, and what became of them. When `COMMANDS_MAX` are, the next one waits."""

    def __init__(self, client: shardbus.Client, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._running: set[asyncio.Task[None]] = set()
        self._sent = self._replied = self._failed = self._unanswered = 0
        self.replies = Lags()
        """When replies came, from the intended instant."""

    @property
    def under_way(self) -> bool:
        """Whether a reply may come."""
        return bool(self._running)

    async def send(self, load: Load, intended_ns: list[int] | None) -> None:
        """Send commands without waiting for their replies; see `Send`."""
        loop = asyncio.get_running_loop()
        instants = intended_ns or [0] * len(load.messages)
        for command, instant in zip(load.messages, instants, strict=True):
            while len(self._running) >= COMMANDS_MAX:
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            self._sent += 1
            task = loop.create_task(self._execute(command, instant))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def finish(self) -> None:
        """Wait until each has its reply, or its time is up."""
        if self._running:
            await asyncio.wait(self._running)

    async def _execute(self, command: Any, intended_ns: int) -> None:
        try:
            await self._client.execute(command, timeout=self._timeout_s)
        except shardbus.CommandFailed:
            self._failed += 1
        except (TimeoutError, shardbus.CommandLost, shardbus.ClientClosed):
            self._unanswered += 1
        else:
            self._replied += 1
            if intended_ns:
                self.replies.add([intended_ns], time.monotonic_ns())

    def counts(self) -> Counts:
        """A ledger of commands: `dead` failed; what got no reply in time is `published` and nothing else."""
        left = self._sent - self._replied - self._failed - self._unanswered
        return Counts(
            published=self._sent, handled=self._replied, dead=self._failed, waiting=0, dropped=0, in_flight=left
        )


async def drive(part: Part, say: Say, go: Awaitable[int], stop: asyncio.Event) -> None:
    """Connect, wait for the word to go, run, and say everything on the way.

    Args:
        part: what to send.
        say: takes each line.
        go: gives the instant at which the schedule begins.
        stop: is set where it is to end before its time.

    Raises:
        ShardbusError: the bus cannot be reached or refuses.
        LoadError: the load cannot be made, or the application does not take it.
    """
    spec = part.spec
    plan = plan_of(spec, part.driver)
    gc.collect()
    gc.freeze()  # the workload's tables live for ever; the collector need not walk them while events are built
    async with shardbus.connect(spec.address, timeout=_CONNECT_S, close_timeout=0.0) as client:
        driver = Driver(spec, client, plan)
        if spec.template is None and spec.recording is None:
            await _check_demo(client)
        else:
            await _check_first(client, driver, part)
        say(Started(publisher=client.publisher.hex(), pid=os.getpid(), planned=plan.planned))
        driver.go_at(await go, plan)
        beside = [asyncio.create_task(_report_every_second(driver, say)), asyncio.create_task(_stop_when(stop, driver))]
        try:
            result = await driver.run()
        finally:
            for task in beside:
                task.cancel()
        say(driver.progress())
        say(result)


async def _check_demo(client: shardbus.Client) -> None:
    """Make sure that the bus runs the demo application.

    Raises:
        LoadError: it does not; every event would become a dead letter of somebody's.
    """
    try:
        await client.execute(GetCount(key=""), timeout=_CONNECT_S)
    except shardbus.CommandFailed as error:
        application = (await client.status())["bus"]
        raise LoadError(
            f"the bus at {client.address} runs {application}, which does not take loadgen's own events ({error.error}); "
            "name one of its own with --type and --key, or another bus with --connect"
        ) from None
    except TimeoutError:
        pass  # a bus in trouble; the run will show it


async def _check_first(client: shardbus.Client, driver: Driver, part: Part) -> None:
    """Send the first event of a type that is only known by name, and see that the application knows it, too.

    Raises:
        LoadError: it does not, or the body does not decode: all others would fail likewise.
    """
    if part.spec.commands:
        await _check_command(client, part.spec)
        return
    first = await driver.send_first()
    try:
        await client.flush(_FIRST_S)
    except shardbus.NotDelivered:
        return  # its handler takes long
    if not client.ledger().dead or not first.messages:
        return
    where = shardbus.DeadLetterFilter(type=type(first.messages[0]).__shardbus_name__)
    for letter in reversed(await client.dead_letters(where)):
        if letter.reason in ("unknown-type", "undecodable"):
            application = (await client.status())["bus"]
            look = f"; it is a dead letter there now (`shardbus dead-letters list --connect {client.address}`)"
            hint = ""
            if part.spec.recording is None:
                fields = "; all fields but the key come from --body"
                hint = fields if letter.reason == "undecodable" else "; a command is executed with --commands"
            raise LoadError(
                f"the bus at {client.address} runs {application}, which does not take the event {letter.type!r} "
                f"{letter.event}: {letter.error or letter.reason}{hint}{look if part.lives_on else ''}"
            )


async def _check_command(client: shardbus.Client, spec: LoadSpec) -> None:
    command = made(spec, 0).take(1).messages[0]
    try:
        await client.execute(command, timeout=_FIRST_S)
    except shardbus.CommandFailed as error:
        # A handler's own failure is part of the load.
        if error.error_type in _NOT_TAKEN:
            name = type(command).__shardbus_name__
            fields = "; all fields but the key come from --body" if error.error_type == "ValidationError" else ""
            raise LoadError(
                f"the bus at {client.address} does not take the command {name!r}: {error.error_type}: {error.error}{fields}"
            ) from None
    except (TimeoutError, shardbus.CommandLost):
        pass  # a bus in trouble; the run will show it


async def _report_every_second(driver: Driver, say: Say) -> None:
    while True:
        await asyncio.sleep(1.0)
        say(driver.progress())


async def _stop_when(stop: asyncio.Event, driver: Driver) -> None:
    await stop.wait()
    driver.stop()


def _say(line: DriverLine) -> None:
    sys.stdout.buffer.write(encode_line(line) + b"\n")
    sys.stdout.buffer.flush()


async def _listen(go: asyncio.Future[int], stop: asyncio.Event) -> None:
    """Pass on the words to go and to stop, and return when stdin ends."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while line := await reader.readline():
            match decode_word(line):
                case Go(start_ns=start_ns) if not go.done():
                    go.set_result(start_ns)
                case Stop():
                    stop.set()
    finally:
        transport.close()


async def _main(part: Part) -> None:
    go: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    driving = asyncio.ensure_future(drive(part, _say, go, stop))
    orphaned = asyncio.ensure_future(_listen(go, stop))
    await asyncio.wait([driving, orphaned], return_when=asyncio.FIRST_COMPLETED)
    orphaned.cancel()
    await asyncio.wait([orphaned])
    if not driving.done():
        driving.cancel()
    try:
        await driving
    except asyncio.CancelledError:
        pass  # nobody is left to hear of it
    except shardbus.NotDelivered:
        pass  # was said with the result
    except (shardbus.ShardbusError, LoadError) as error:
        _say(DriverFailed(error=str(error)))


if __name__ == "__main__":
    shardbus.run(_main(decode_part(sys.stdin.buffer.readline())))
