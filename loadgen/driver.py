"""The process that sends: `python -m loadgen.driver`, a `LoadSpec` as one JSON line on stdin, `DriverLine`s on stdout.

Owns the open loop and its clock. It alone decides when an event goes; what the bus made of it is the collector's to say.
It ends when its stdin does, so that it never outlives whoever started it.

Paced, it wakes up when the next event is due, though not within 100 µs, sends all that is due, each event stamped with
its own intended instant, and gives the event loop one turn. It sleeps in `time.sleep` on purpose: asyncio rounds a delay
up to a millisecond, and spinning would steal the core that the bus is measured on.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from msgspec.structs import replace

import shardbus
from loadgen.pacer import ConstantRate
from loadgen.spec import (
    Counts,
    DriverFailed,
    DriverLine,
    DriverResult,
    LoadError,
    LoadSpec,
    Progress,
    Started,
    decode_spec,
    encode_line,
)
from loadgen.workload import Stretch, Workload, workload_of
from shardbus.demo import GetCount, Tick
from shardbus.metrics import bucket_bounds_us, bucket_index

BATCH: Final = 256  # events a call: what fits into a frame of the bus
_NS: Final = 1_000_000_000
_NAP_NS_MIN: Final = 100_000  # really about 160 µs: what Linux makes of it
_NAP_NS_MAX: Final = 1_000_000  # so long may an ack or a credit lie unread
_LONG_WAIT_NS: Final = 3_000_000  # longer waits are asyncio's: a slow load does not keep a core awake
_OVERRUN_NS: Final = 100_000_000  # a schedule that is further behind is not waited for at either end of the window
_LAGS_MAX: Final = 65_536  # distinct lags that are kept apart
_CONNECT_S: Final = 10.0

Say = Callable[[DriverLine], None]
Send = Callable[[Stretch, list[int] | None], Awaitable[None]]
"""Publish a stretch; the second argument is the intended instants, None for events that are not measured."""


class WaitMeter:
    """How long publish calls have waited for room.

    A call waited if the event loop had a turn meanwhile. Then the part of its time in which this thread did not run is
    the wait; the rest was the generator's own work, such as encoding and reading acks.
    """

    def __init__(self) -> None:
        self.waited_ns = 0
        self._turned = False

    async def measure(self, call: Awaitable[None]) -> None:
        """Await a publish call and add what it waited."""
        self._turned = False
        mark = asyncio.get_running_loop().call_soon(self._turn)
        began_ns, cpu_ns = time.monotonic_ns(), time.thread_time_ns()
        try:
            await call
        finally:
            if self._turned:
                idle_ns = time.monotonic_ns() - began_ns - (time.thread_time_ns() - cpu_ns)
                self.waited_ns += max(0, idle_ns)
            mark.cancel()

    def _turn(self) -> None:
        self._turned = True


class LagCounts:
    """Send lags, counted: whole microseconds up to 2,047, three digits beyond, so that memory is bounded."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, instants_ns: list[int], now_ns: int) -> None:
        """Count events that go now and should have gone at these instants."""
        self._counts.update([(now_ns - instant) // 1000 for instant in instants_ns])
        if len(self._counts) > _LAGS_MAX:
            self._counts = Counter(self.counts())

    def counts(self) -> dict[int, int]:
        """Microseconds → how many events; 27,648 entries at most."""
        folded: Counter[int] = Counter()
        for lag_us, count in self._counts.items():
            folded[bucket_bounds_us(bucket_index(lag_us))[1]] += count
        return dict(folded)


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver notes at either end of the measured window."""

    at_ns: int
    cpu_s: float
    waited_ns: int
    sent: int
    counts: Counts


class Driver:
    """One run's sending side, on a connected client."""

    def __init__(self, spec: LoadSpec, client: shardbus.Client, workload: Workload) -> None:
        self._spec = spec
        self._client = client
        self._workload = workload
        self._wait = WaitMeter()
        self._lags = LagCounts()
        self._send: Send = self._send_many if spec.call == "publish_many" else self._send_each
        self._template = Tick(key="", payload=workload.payload)
        self._sent = 0
        self._start_ns = time.monotonic_ns()
        self._warm_ns = self._start_ns + int(spec.warmup_s * _NS)
        self._end_ns = self._warm_ns + int(spec.duration_s * _NS)
        self._pacer = None if spec.rate is None else ConstantRate.of(self._start_ns, spec.rate)
        self._warm, self._total = (0, 0) if self._pacer is None else _window_of(self._pacer, spec)
        self._before: Edge | None = None

    async def run(self) -> DriverResult:
        """Send the whole load, wait for it to be finished, and say what happened.

        Sending ends at the end of the window, or, where publish waits for room, up to `flush_s` later.
        """
        sending = self._send_at_will() if self._pacer is None else self._send_on_time(self._pacer)
        limit_s = self._spec.warmup_s + self._spec.duration_s + self._spec.flush_s
        try:
            async with asyncio.timeout(limit_s):
                await sending
        except TimeoutError:
            pass  # the bus takes nothing more; the figures show it
        after = self._edge()
        before = self._before or after
        final = await self._flush()
        flush_s = (time.monotonic_ns() - after.at_ns) / _NS
        window_s = (after.at_ns - before.at_ns) / _NS
        return DriverResult(
            scheduled=None if self._pacer is None else self._total - self._warm,
            sent=after.sent - before.sent,
            window_s=window_s,
            before=before.counts,
            after=after.counts,
            final=final,
            flush_s=flush_s,
            waited_s=(after.waited_ns - before.waited_ns) / _NS,
            send_lag_us=self._lags.counts(),
            cpu_share=(after.cpu_s - before.cpu_s) / window_s if window_s else 0.0,
            rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def progress(self) -> Progress:
        """Where the run stands now."""
        at_s = (time.monotonic_ns() - self._start_ns) / _NS
        return Progress(at_s=at_s, warming_up=self._before is None, counts=self._counts())

    async def _send_on_time(self, pacer: ConstantRate) -> None:
        """Send each event when it is due, or as soon after as can be. The schedule never slips."""
        warm, total = self._warm, self._total
        while True:
            now_ns = time.monotonic_ns()
            self._open_window(now_ns, overdue_ns=0 if self._sent >= warm else _OVERRUN_NS)
            due = pacer.due(self._sent, now_ns)
            if self._sent == total:
                if now_ns >= self._end_ns:
                    return
                await _idle(self._end_ns - now_ns)
            elif now_ns >= self._end_ns + _OVERRUN_NS:
                return
            elif due.count:
                limit = warm if self._sent < warm else total
                await self._send_due(pacer, min(due.count, BATCH, limit - self._sent), measured=self._sent >= warm)
            else:
                await _idle(due.wait_ns)

    async def _send_due(self, pacer: ConstantRate, count: int, *, measured: bool) -> None:
        stretch = self._workload.take(count)
        intended_ns = None
        if measured:
            intended_ns = pacer.intended_ns(self._sent, len(stretch))
            self._lags.add(intended_ns, time.monotonic_ns())
        await self._wait.measure(self._send(stretch, intended_ns))
        self._sent += len(stretch)

    async def _send_at_will(self) -> None:
        """Send batch after batch as fast as the bus takes them. Nothing is due, so nothing is late or measured."""
        take, send = self._workload.take, self._send
        while (now_ns := time.monotonic_ns()) < self._end_ns:
            self._open_window(now_ns, overdue_ns=0)
            stretch = take(BATCH)
            await send(stretch, None)
            self._sent += len(stretch)

    def _open_window(self, now_ns: int, *, overdue_ns: int) -> None:
        """Begin to measure `overdue_ns` after the warm-up, whose events may be late by as much without harm."""
        if self._before is None and now_ns >= self._warm_ns + overdue_ns:
            self._before = self._edge()

    async def _send_many(self, stretch: Stretch, intended_ns: list[int] | None) -> None:
        # `replace` builds an event in 90 ns. Calling the class takes 400 on Python 3.11, because a class whose metaclass
        # is written in Python is called without vectorcall there.
        template = self._template
        events = [replace(template, key=key, n=n) for n, key in enumerate(stretch.keys, stretch.first)]
        await self._client.publish_many(events, ordinals=stretch.ordinals, intended_ns=intended_ns)

    async def _send_each(self, stretch: Stretch, intended_ns: list[int] | None) -> None:
        publish, template = self._client.publish, self._template
        instants = intended_ns or [0] * len(stretch)
        numbers = range(stretch.first, stretch.first + len(stretch))
        for n, key, ordinal, instant in zip(numbers, stretch.keys, stretch.ordinals, instants, strict=True):
            await publish(replace(template, key=key, n=n), ordinal=ordinal, intended_ns=instant)

    async def _flush(self) -> Counts:
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
        ledger = self._client.ledger()
        return Counts(
            published=ledger.published,
            handled=ledger.handled,
            dead=ledger.dead,
            waiting=ledger.waiting,
            dropped=ledger.dropped,
            in_flight=ledger.in_flight,
        )


def _window_of(pacer: ConstantRate, spec: LoadSpec) -> tuple[int, int]:
    """How many events are due before the window, and before its end."""
    warmup_ns = int(spec.warmup_s * _NS)
    return pacer.scheduled(warmup_ns - 1), pacer.scheduled(warmup_ns + int(spec.duration_s * _NS) - 1)


async def _idle(wait_ns: int) -> None:
    await asyncio.sleep(0)  # what was published leaves with this turn, and acks come in
    if wait_ns > _LONG_WAIT_NS:
        await asyncio.sleep((wait_ns - _LONG_WAIT_NS // 2) / _NS)
    else:
        time.sleep(min(max(wait_ns, _NAP_NS_MIN), _NAP_NS_MAX) / _NS)  # noqa: ASYNC251 - see the module's docstring


async def drive(spec: LoadSpec, say: Say) -> None:
    """Connect, run, and say everything on the way.

    Raises:
        ShardbusError: the bus cannot be reached or refuses.
    """
    workload = workload_of(spec)
    gc.collect()
    gc.freeze()  # the workload's tables live for ever; the collector need not walk them while events are built
    async with shardbus.connect(spec.address, timeout=_CONNECT_S, close_timeout=0.0) as client:
        await _check_application(client)
        say(Started(publisher=client.publisher.hex()))
        driver = Driver(spec, client, workload)
        reporting = asyncio.create_task(_report_every_second(driver, say))
        try:
            result = await driver.run()
        finally:
            reporting.cancel()
        say(result)


async def _check_application(client: shardbus.Client) -> None:
    """Make sure that the bus runs an application that takes our events.

    Raises:
        LoadError: it does not; every event would become a dead letter of somebody's.
    """
    try:
        await client.execute(GetCount(key=""), timeout=_CONNECT_S)
    except shardbus.CommandFailed as error:
        application = (await client.status())["bus"]
        raise LoadError(
            f"the bus at {client.address} runs {application}, which does not take loadgen's events ({error.error}); serve "
            "the built-in demo application (`shardbus serve` without MODULE:BUS), or name another bus with --connect"
        ) from None
    except TimeoutError:
        pass  # a bus in trouble; the run will show it


async def _report_every_second(driver: Driver, say: Say) -> None:
    while True:
        await asyncio.sleep(1.0)
        say(driver.progress())


async def _until_stdin_ends() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(4096):
        pass


def _say(line: DriverLine) -> None:
    sys.stdout.buffer.write(encode_line(line) + b"\n")
    sys.stdout.buffer.flush()


async def _main(spec: LoadSpec) -> None:
    driving = asyncio.ensure_future(drive(spec, _say))
    orphaned = asyncio.ensure_future(_until_stdin_ends())
    await asyncio.wait([driving, orphaned], return_when=asyncio.FIRST_COMPLETED)
    orphaned.cancel()
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
    shardbus.run(_main(decode_spec(sys.stdin.buffer.readline())))
