"""One run from beginning to end: a bus, drivers, a collector, faults, a report. Only who does what when."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, Protocol

import msgspec

import shardbus
from loadgen.collector import Collector
from loadgen.expect import Expectation
from loadgen.histogram import Histogram
from loadgen.injector import Injector, is_set_within
from loadgen.machine import shares_clock, this_machine
from loadgen.meters import merged
from loadgen.processes import DriverProcess, first_interrupt, is_there, own_address, started_bus, started_driver
from loadgen.replay import check_readable
from loadgen.report import (
    BusState,
    FaultRecord,
    Interval,
    Observed,
    Report,
    Totals,
    account,
    held_against,
    make_report,
    together,
    totals_of_acks,
    totals_of_commands,
)
from loadgen.spec import DriverLine, DriverResult, FaultSpec, LoadError, LoadSpec, Part, Progress, Started

_DEMO: Final = "shardbus.demo:bus"
_PROBE_S: Final = 1.0  # a bus on this host answers in milliseconds; one under full load still does within this
_CONNECT_S: Final = 5.0
_BEATS_S: Final = 2.5  # in which a worker beats twice
_POLL_S: Final = 0.05
_SILENCE_S: Final = 20.0  # a driver speaks every second; on a machine in trouble, rather less often
_READY_S: Final = 600.0  # a long recording is read before its driver is ready
_HEAD_START_NS: Final = 100_000_000  # from the word to go until the schedule begins
_INTERVALS_MAX: Final = 3600  # of one run, about a second each; a longer one has longer intervals


class Watcher(Protocol):
    """Who is told how a run goes."""

    def say(self, text: str) -> None:
        """Something that a person should know, once."""

    def begin(self, spec: LoadSpec, planned: int | None) -> None:
        """The schedule begins. `planned` events are on it, where that is known."""

    def progress(self, interval: Interval) -> None:
        """About once a second: what has happened since the last time."""

    def fault(self, record: FaultRecord) -> None:
        """A fault was done, and, where it ended a worker, what came of it."""


class _Silent:
    def say(self, text: str) -> None:
        """Nobody listens."""

    def begin(self, spec: LoadSpec, planned: int | None) -> None:
        """Nobody watches."""

    def progress(self, interval: Interval) -> None:
        """Nobody watches."""

    def fault(self, record: FaultRecord) -> None:
        """Nobody watches."""


def run(
    spec: LoadSpec,
    watcher: Watcher | None = None,
    *,
    expectations: Sequence[Expectation] = (),
    histogram: Histogram | None = None,
    report_on_interrupt: bool = False,
) -> Report:
    """Make a run and return its report. Starts processes, and ends them; must not be called from a running event loop.

    Args:
        spec: what is asked for.
        watcher: is told how it goes.
        expectations: what the report is held against.
        histogram: takes the response times of the measured window.
        report_on_interrupt: the first SIGINT (and SIGTERM, where that is handled) from the first measured second on ends the
            load instead of the run, whose report is then of what was done until there. In the main thread only.

    Raises:
        LoadError: the run could not be made or finished.
        ShardbusError: no bus at the address that was named, or it refused.
    """
    return shardbus.run(
        run_async(spec, watcher, expectations=expectations, histogram=histogram, report_on_interrupt=report_on_interrupt)
    )


async def run_async(
    spec: LoadSpec,
    watcher: Watcher | None = None,
    *,
    expectations: Sequence[Expectation] = (),
    histogram: Histogram | None = None,
    report_on_interrupt: bool = False,
) -> Report:
    """As `run`, inside an event loop."""
    watcher = watcher or _Silent()
    if spec.recording is not None:
        check_readable(spec.recording)
    run_: _Run | None = None

    def take_interrupt() -> bool:
        return run_ is not None and run_.take_interrupt()

    async with contextlib.AsyncExitStack() as stack:
        if report_on_interrupt:  # up to the end of all: what was served for the run may take its time for that
            stack.enter_context(first_interrupt(take_interrupt))
        address, lives_on = await _find_bus(spec, stack, watcher.say)
        client = await stack.enter_async_context(shardbus.connect(address, timeout=_CONNECT_S))
        local = shares_clock(client.address)
        if spec.faults and not local:
            raise LoadError(f"faults need a bus on this host; {client.address} is elsewhere")
        found = msgspec.structs.replace(spec, address=client.address, application=None)
        run_ = _Run(found, client, watcher, Collector(client, local=local), lives_on=lives_on)
        report = msgspec.structs.replace(await run_.measure(), load=spec)
        if histogram is not None and report.latency_us is not None:
            histogram.merge(run_.histogram())
        return held_against(report, expectations)


async def _find_bus(
    spec: LoadSpec, stack: contextlib.AsyncExitStack, say: Callable[[str], None]
) -> tuple[str | None, bool]:
    """The address of a bus, and whether it lives on after the run; one that was started ends with the stack."""
    if spec.address is not None:
        return spec.address, True
    application, why = spec.application, ""
    if application is None:
        try:
            async with shardbus.connect(timeout=_PROBE_S) as client:
                return client.address, True
        except shardbus.BusUnreachable as nobody:
            own = spec.template or spec.recording
            if own is not None:
                raise LoadError(
                    f"no bus runs at {nobody.address} that could take {own.type}; start yours with `shardbus serve "
                    "MODULE:BUS`, or have it served for this run with --app MODULE:BUS"
                ) from None
            application, why = _DEMO, f"no bus runs at {nobody.address}; "
    # At an address of its own: at that of a bus which does not run now, events may wait for their application.
    _check_shards(spec.faults, spec.workers)
    address = stack.enter_context(own_address(_own_name(application, spec.workers)))
    if is_there(address):
        await _check_free(address, application)
    say(f"{why}serving {application} at {address} for this run, workers: {spec.workers}")
    options = ["--leave-nothing"]  # nobody would look there
    await stack.enter_async_context(started_bus(spec.workers, address, application=application, options=options))
    return address, False


async def _check_free(address: str, application: str) -> None:
    """Two runs at once would measure each other, and the end of one would be that of both.

    Raises:
        LoadError: a bus answers there.
    """
    with contextlib.suppress(shardbus.BusUnreachable):
        async with shardbus.connect(address, timeout=_PROBE_S):
            raise LoadError(
                f"another run of loadgen serves {application} at {address}; wait until it has ended, or drive a bus that "
                "you serve yourself, with --connect"
            )


def _check_shards(faults: Sequence[FaultSpec], shards: int) -> None:
    """A fault of a shard that the bus has not is told before anything is started."""
    for fault in faults:
        if fault.shard is not None and fault.shard >= shards:
            raise LoadError(f"{fault}: there is no such shard; the bus has {shards}, counted from 0")


def _own_name(application: str, workers: int) -> str:
    """Where an application is served for a run: the same for the same application and number of workers."""
    digest = hashlib.sha256(f"{application} {workers}".encode()).hexdigest()[:8]
    return f"loadgen-{digest}"


class _Run:
    """A run on a bus that was found, and that `lives_on` after it or does not."""

    def __init__(
        self, spec: LoadSpec, client: shardbus.Client, watcher: Watcher, collector: Collector, *, lives_on: bool
    ) -> None:
        self._spec = spec
        self._client = client
        self._watcher = watcher
        self._collector = collector
        self._lives_on = lives_on
        self._latest: list[Progress | None] = [None] * spec.drivers
        self._unheard = set(range(spec.drivers))  # since the last news
        self._news = asyncio.Event()  # each driver has said how far it is, which they do once a second
        self._results: list[DriverResult | None] = [None] * spec.drivers
        self._running: dict[int, int] = {}  # the processes of drivers that have not ended, by their number
        self._intervals: list[Interval] = []
        self._faults: list[FaultRecord] = []
        self._drivers: list[DriverProcess] = []
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()  # before its time, by an interrupt
        self._over = asyncio.Event()  # nothing is sent any more
        self._released = asyncio.Event()  # workers that are stopped go on
        self._is_measured = False  # nothing is left to be found out
        self._cut_short = False  # by an interrupt that came when all was sent
        self._undone: list[str] = []  # faults

    def histogram(self) -> Histogram:
        """The response times of the measured window."""
        if self._spec.commands:
            return Histogram(self._result().replies_us.items())
        return self._collector.histogram

    def take_interrupt(self) -> bool:
        """End the load, if there is something to report by now; returns whether. For a signal's handler."""
        if any(line is None or line.warming_up for line in self._latest):
            return False
        self._loop.call_soon_threadsafe(self._stop)
        return True

    def _stop(self) -> None:
        for event in (self._stopped, self._over, self._released):
            event.set()
        for driver in self._drivers:  # first: to tell of it may take its time
            driver.stop()
        if self._is_measured:
            doing = "all is measured; ending what was started"
        elif None not in self._results:
            doing = "all was sent; waiting no longer for what lies in stores"
        elif all(line is not None and line.over for line in self._latest):
            doing = "all was sent; waiting for what is under way"
        else:
            doing = "no more is sent; waiting for what is under way"
        self._watcher.say(f"interrupted: {doing} (once more to end without a report)")

    async def measure(self) -> Report:
        """Make the run, and its report."""
        spec, collector = self._spec, self._collector
        _check_shards(spec.faults, len((await collector.state()).workers))
        await self._drive()
        machine_load = collector.machine_load()
        result = self._result()
        gone = False
        if spec.commands:
            totals, state = totals_of_commands(result), await collector.state()
        else:
            try:
                totals, state = await self._settled(result)
            except shardbus.BusUnreachable:
                gone, totals, state = True, totals_of_acks(result), await collector.state()  # the verdict says so
        self._is_measured = True
        found = {shard: histogram.percentiles() for shard, histogram in sorted(collector.by_shard.items())}
        return make_report(
            spec,
            result,
            totals,
            state,
            address=self._client.address,
            one_clock=shares_clock(self._client.address),
            machine=this_machine(),
            observed=Observed(
                gone=gone,
                cut_short=self._cut_short,
                undone=tuple(self._undone),
                absence=collector.absence,
                faults=tuple(self._faults),
                processes=collector.processes(),
                machine_load=machine_load,
                unseen=collector.unseen(),
                shard_latency_us={shard: one for shard, one in found.items() if one is not None},
                intervals=tuple(self._intervals),
            ),
        )

    async def _settled(self, result: DriverResult) -> tuple[Totals, BusState]:
        """The evidence, and the state of the bus, once what waits in a store is counted there: with its worker's beat."""
        collector, final = self._collector, result.final
        enough = asyncio.Event() if self._stopped.is_set() else self._stopped  # an interrupt has one effect
        totals, state = await collector.settle(final, self._spec.flush_s, enough), await collector.state()
        self._cut_short = enough.is_set() and totals.distinct < final.published - final.dropped - final.in_flight
        until_s = time.monotonic() + _BEATS_S
        while final.waiting and account(result, totals, state.waiting).lost and time.monotonic() < until_s:
            await asyncio.sleep(_POLL_S)
            state = await collector.state()  # first: what is handled from here on is evidence
            with contextlib.suppress(shardbus.BusUnreachable):
                totals = await collector.settle(final, 0.0)
        return totals, state

    def _result(self) -> DriverResult:
        return together([result for result in self._results if result is not None])

    async def _drive(self) -> None:
        """Start the drivers, give the word to go once all are ready, and follow them to their results."""
        spec = self._spec
        async with contextlib.AsyncExitStack() as stack:
            lines = []
            for number in range(spec.drivers):
                part = Part(spec=spec, driver=number, lives_on=self._lives_on)
                driver = await stack.enter_async_context(started_driver(part))
                self._drivers.append(driver)
                lines.append(driver.lines(_SILENCE_S + spec.flush_s, first_s=_READY_S))
            planned: int | None = None
            for number, each in enumerate(lines):
                started = await anext(each, None)
                if not isinstance(started, Started):
                    raise LoadError("a driver process ended before it was ready; what it wrote stands above")
                self._running[number] = started.pid
                self._collector.publishers.append(bytes.fromhex(started.publisher))
                planned = started.planned
            self._collector.begin(self._running)
            start_ns = time.monotonic_ns() + _HEAD_START_NS
            for driver in self._drivers:
                driver.go(start_ns)
            self._watcher.begin(spec, planned)
            watching = asyncio.create_task(self._watch())
            beside = [watching, *self._fault_tasks(start_ns)]
            try:
                async with asyncio.TaskGroup() as group:
                    following = [group.create_task(self._follow(number, each)) for number, each in enumerate(lines)]
                    # A run that cannot be judged any more ends now; `_end` says why.
                    watching.add_done_callback(lambda _: [task.cancel() for task in following])
            except* LoadError as several:
                raise several.exceptions[0] from None
            finally:
                await self._end(beside)

    async def _end(self, beside: Sequence[asyncio.Task[None]]) -> None:
        watching, *faults = beside
        self._over.set()
        self._released.set()
        if faults and None not in self._results:
            # A recovery that is still awaited is part of the report.
            await asyncio.wait(faults, timeout=_CONNECT_S)
        for task in beside:
            task.cancel()
        await asyncio.wait(beside)
        if None not in self._results:
            await self._observe()
        for task in (watching, *faults):
            error = None if task.cancelled() else task.exception()
            if isinstance(error, LoadError):
                raise error
            if error is not None:
                raise LoadError(f"the run could not be watched: {error!r}") from error

    async def _follow(self, number: int, lines: AsyncIterator[DriverLine]) -> None:
        """Read what a driver says up to its result."""
        async for line in lines:
            match line:
                case Progress():
                    self._latest[number] = _later(self._latest[number], line)
                case DriverResult():
                    self._results[number] = line
                    del self._running[number]
            self._hear(number)
        if self._results[number] is None:
            raise LoadError("a driver process ended without a result; what it wrote stands above")

    def _hear(self, number: int) -> None:
        """A driver has said something. There is news once all have that still do."""
        self._unheard.discard(number)
        if not self._unheard:
            self._unheard.update(self._running)
            self._news.set()
        if all(line is not None and line.over for line in self._latest):
            self._over.set()

    async def _watch(self) -> None:
        every = max(1, math.ceil(self._spec.planned_s / _INTERVALS_MAX))
        while True:
            for _ in range(every):
                await self._news.wait()
                self._news.clear()
            await self._observe()

    async def _observe(self) -> None:
        latest = [line for line in self._latest if line is not None]
        if len(latest) < self._spec.drivers or len(self._intervals) >= 2 * _INTERVALS_MAX:
            return
        # First: what is said meanwhile is the next interval's.
        self._latest = [msgspec.structs.replace(line, send_lag_us={}, replies_us={}) for line in latest]
        try:
            interval = await self._collector.interval(latest, self._running)
        except asyncio.CancelledError:
            self._latest = [_later(before, line) for before, line in zip(latest, self._latest, strict=True) if line]
            raise
        if interval is not None:
            self._intervals.append(interval)
            self._watcher.progress(interval)

    # -- faults

    def _fault_tasks(self, start_ns: int) -> list[asyncio.Task[None]]:
        chance = random.Random(f"{self._spec.seed}/faults")
        shards = len(self._collector.latest.workers)
        tasks = []
        for fault in self._spec.faults:
            shard = chance.randrange(max(1, shards)) if fault.shard is None else fault.shard
            tasks.append(asyncio.create_task(self._fault(fault, shard, start_ns)))
        return tasks

    async def _fault(self, fault: FaultSpec, shard: int, start_ns: int) -> None:
        injector = Injector(self._client)
        if await is_set_within(self._over, start_ns / 1e9 + fault.at_s - time.monotonic()):
            self._undone.append(str(fault))
            return
        record = FaultRecord(fault=str(fault), shard=shard, at_s=time.monotonic() - start_ns / 1e9)
        at = len(self._faults)
        self._faults.append(record)
        if fault.kind == "stop":
            record = msgspec.structs.replace(record, stopped_s=await injector.stop(shard, fault.seconds, self._released))
        else:
            end = injector.kill if fault.kind == "kill" else injector.terminate
            record = msgspec.structs.replace(record, recovery_s=await end(shard))
        self._faults[at] = record
        self._watcher.fault(record)


def _later(before: Progress | None, line: Progress) -> Progress:
    """A driver's latest word, with the times of those that nobody has looked at yet."""
    if before is None:
        return line
    return msgspec.structs.replace(
        line,
        send_lag_us=merged([before.send_lag_us, line.send_lag_us]),
        replies_us=merged([before.replies_us, line.replies_us]),
    )
