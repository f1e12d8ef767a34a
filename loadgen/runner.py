"""One run from beginning to end: a bus, a driver, a collector, a report. Only who does what when."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final, Protocol

import shardbus
from loadgen.collector import Collector, totals_of
from loadgen.machine import shares_clock, this_machine
from loadgen.processes import DriverProcess, started_bus, started_driver
from loadgen.report import BusState, Report, make_report
from loadgen.spec import DriverResult, LoadError, LoadSpec, Progress, Started

_PROBE_S: Final = 1.0  # a bus on this host answers in milliseconds; one under full load still does within this
_CONNECT_S: Final = 5.0
_SILENCE_S: Final = 20.0  # a driver speaks every second; on a machine in trouble, rather less often
_STATE_S: Final = 1.0


class Watcher(Protocol):
    """Who is told how a run goes."""

    def say(self, text: str) -> None:
        """Something that a person should know, once."""

    def progress(self, progress: Progress, bus: BusState) -> None:
        """About once a second: the driver's ledger, and the bus as it was last seen."""


class _Silent:
    def say(self, text: str) -> None:
        """Nobody listens."""

    def progress(self, progress: Progress, bus: BusState) -> None:
        """Nobody watches."""


def run(spec: LoadSpec, watcher: Watcher | None = None) -> Report:
    """Make a run and return its report. Starts processes, and ends them; must not be called from a running event loop.

    Raises:
        LoadError: the run could not be made or finished.
        ShardbusError: no bus at the address that was named, or it refused.
    """
    return asyncio.run(run_async(spec, watcher))


async def run_async(spec: LoadSpec, watcher: Watcher | None = None) -> Report:
    """As `run`, inside an event loop."""
    watcher = watcher or _Silent()
    async with contextlib.AsyncExitStack() as stack:
        address = await _find_bus(spec, stack, watcher.say)
        client = await stack.enter_async_context(shardbus.connect(address, timeout=_CONNECT_S))
        return await _measure(spec, Collector(client), client.address, watcher)


async def _find_bus(spec: LoadSpec, stack: contextlib.AsyncExitStack, say: Callable[[str], None]) -> str | None:
    """The address of a bus that runs, or of one that was started for as long as the stack lives."""
    if spec.address is not None:
        return spec.address
    try:
        async with shardbus.connect(timeout=_PROBE_S) as client:
            return client.address
    except shardbus.BusUnreachable as nobody:
        say(f"no bus runs at {nobody.address}; starting one for this run, workers: {spec.workers}")
        await stack.enter_async_context(started_bus(spec.workers))
        return nobody.address


async def _measure(spec: LoadSpec, collector: Collector, address: str, watcher: Watcher) -> Report:
    await collector.state()
    watching = asyncio.create_task(collector.watch(_STATE_S))
    try:
        async with started_driver(_for_driver(spec, address)) as driver:
            publisher, result = await _follow(driver, collector, watcher, silence_s=_SILENCE_S + spec.flush_s)
    finally:
        watching.cancel()
    try:
        totals = await collector.settle(publisher, result.final, spec.flush_s)
    except shardbus.BusUnreachable:
        totals = totals_of(())  # the bus is gone, and with it all that would show what it did: the verdict says so
    return make_report(
        spec,
        result,
        totals,
        await collector.state(),
        address=address,
        one_clock=shares_clock(address),
        machine=this_machine(),
    )


def _for_driver(spec: LoadSpec, address: str) -> LoadSpec:
    fields = {name: getattr(spec, name) for name in spec.__struct_fields__}
    return LoadSpec(**{**fields, "address": address})


async def _follow(
    driver: DriverProcess, collector: Collector, watcher: Watcher, *, silence_s: float
) -> tuple[bytes, DriverResult]:
    """Read what the driver says up to its result; also returns the publisher's identity."""
    publisher = b""
    async for line in driver.lines(silence_s):
        match line:
            case Started():
                publisher = bytes.fromhex(line.publisher)
            case Progress():
                watcher.progress(line, collector.latest)
            case DriverResult():
                return publisher, line
    raise LoadError("the driver process ended without a result; what it wrote stands above")
