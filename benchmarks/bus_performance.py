"""The bus with all its features: throughput, latency under load, memory over time, faults, and what measuring costs.

Ends within five minutes. The faults are exercised for real and counted to the last one: handlers that fail and are
retried, that fail for good, that fail until their circuit opens, and workers that are killed while events flow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from statistics import linear_regression
from typing import Final

import shardbus
from benchmarks import measuring_cost, scenarios
from benchmarks.scenarios import Check, positive
from loadgen import LoadSpec, Report, run_async
from loadgen.processes import own_address, started_bus
from loadgen.report import Interval
from loadgen.spec import FaultSpec, Template
from shardbus import Breaker, Bus, Command, Context, DeadLetterFilter, Event, Retry

_SUSTAINED_MIN: Final = 10_000.0
_SLOPE_MB_MAX: Final = 10.0  # a minute, at 20,000 events/s: a leak of eight bytes an event
_RECOVERY_US_MAX: Final = 2_000_000
_SETTLED: Final = 1 / 2  # of a run, before which memory is not looked at: caches fill first
_FLAKY: Final = 2000
_DOOMED: Final = 500
_ATTEMPTS: Final = 4
_FAILURES: Final = 5
_FRAGILE: Final = 200
_OPEN_S: Final = 3.0  # the failures that a circuit spares its handler are published within it, on a busy machine too
_PATIENCE_S: Final = 30.0


# -- an application with faults


class Work(Event, key="key"):
    """An event whose handler fails so many times."""

    key: str
    fails: int = 0


class Fragile(Event, key="key"):
    """An event whose handler stands behind a breaker, and fails or not."""

    key: str
    fails: bool


class GetCalls(Command[dict[str, int]], key="key"):
    """How often each handler was called in this worker."""

    key: str


bus = Bus("bus-performance")
_calls: Counter[str] = Counter()


@bus.on(Work, retry=Retry(attempts=_ATTEMPTS, base_s=0.01))
async def work(event: Work, context: Context) -> None:
    """Fail as the event says."""
    _calls["work"] += 1
    if context.attempt <= event.fails:
        raise ValueError(f"attempt {context.attempt} fails")


@bus.on(
    Fragile,
    retry=Retry(attempts=1),
    breaker=Breaker(failures=_FAILURES, open_s=_OPEN_S, successes=2, while_open="dead"),
)
async def fragile(event: Fragile) -> None:
    """Fail as the event says."""
    _calls["fragile"] += 1
    if event.fails:
        raise ConnectionError("what this handler needs is away")


@bus.command(GetCalls)
async def get_calls(_: GetCalls) -> dict[str, int]:
    """Reply with the counts."""
    return dict(_calls)


# -- the parts


async def sustained(address: str, options: argparse.Namespace) -> tuple[list[Check], list[Report]]:
    """As many events as the bus takes, for a while: the mean, and the slowest second."""
    report = await scenarios.full_speed(address, options.sustained)
    slowest = min((one.achieved_rate for one in _measured(report.intervals)), default=0.0)
    checks = [
        scenarios.sound(f"sustained for {options.sustained:g} s", report),
        scenarios.at_least(
            "sustained, mean",
            report.achieved_rate,
            options.target,
            aim=scenarios.RATE_AIM,
            reference=scenarios.REFERENCE_RATE,
        ),
        scenarios.at_least("sustained, slowest second", slowest, options.target),
    ]
    return checks, [report]


async def latency(address: str, options: argparse.Namespace) -> tuple[list[Check], list[Report]]:
    """Response times under load, events arriving at random as independent users come."""
    reports = await scenarios.paced(address, options.latency, arrivals="poisson")
    times = reports[-1].latency_us
    more = () if times is None else (times.p90, times.p99_9, times.max)
    told = " ".join(f"{value / 1000:,.3f}" for value in more) or scenarios.NOT_MEASURED
    checks = [
        *scenarios.latency_checks(reports, p99_us_max=options.p99_us, what="Poisson arrivals"),
        scenarios.shown("latency p90 p99.9 max, ms", told),
    ]
    return checks, reports


async def memory(address: str, options: argparse.Namespace) -> tuple[list[Check], list[Report]]:
    """How memory goes over time, with keys that come again, and with a new key for every event."""
    checks, reports = [], []
    for keys, caption in ((1000, "1,000 keys"), (None, "a new key every event")):
        spec = LoadSpec(
            rate=scenarios.PACED_RATE, address=address, duration_s=options.memory, warmup_s=1.0, keys=keys
        )
        report = await run_async(spec)
        reports.append(report)
        checks.append(scenarios.sound(f"memory, {caption}, {options.memory:g} s", report, punctual=False))
        checks += [
            _slope_check(f"memory of {name}, {caption}", name, report, options.slope_mb)
            for name in ("worker 0", "driver 0", "supervisor")
        ]
    return checks, reports


def _slope_check(caption: str, name: str, report: Report, most_mb: float) -> Check:
    points = [
        (one.at_s / 60, use.rss_bytes / 1e6)
        for one in _measured(report.intervals)
        for use in one.processes
        if use.name == name
    ]
    points = points[int(len(points) * _SETTLED) :]
    if len(points) < 3:
        return Check(name=caption, measured=scenarios.NOT_MEASURED, target=f"≤ {most_mb:g} MB/min", passed=False)
    slope = slope_of(points)
    return Check(
        name=caption,
        measured=f"{points[-1][1]:,.1f} MB, {slope:+.2f} MB/min",
        target=f"≤ {most_mb:g} MB/min",
        passed=slope <= most_mb,
    )


def slope_of(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the line with the least squares through points (x, y)."""
    return linear_regression([x for x, _ in points], [y for _, y in points]).slope


def _measured(intervals: Sequence[Interval]) -> list[Interval]:
    """Whole intervals of the measured window: the last one is of what was left over."""
    return [one for one in intervals[1:-1] if not one.warming_up]


async def faults(options: argparse.Namespace) -> tuple[list[Check], list[Report]]:
    """Retries, dead letters, a circuit that opens and closes again, and workers killed under load; all counted."""
    async with contextlib.AsyncExitStack() as stack:
        address = stack.enter_context(own_address(f"shardbus-benchmarks-faults-{os.getuid()}"))
        application = "benchmarks.bus_performance:bus"
        await stack.enter_async_context(started_bus(1, address, application=application, log_level="error"))
        client = await stack.enter_async_context(shardbus.connect(address))
        await client.purge()  # what a run that was broken off may have left
        checks = [*await _retries(client), *await _dead_letters(client), *await _circuit(client)]
        report = await run_async(
            LoadSpec(
                rate=5000.0,
                address=address,
                duration_s=options.faults,
                warmup_s=1.0,
                template=Template(type="Work", key="key"),
                faults=tuple(FaultSpec(kind="kill", at_s=1 + options.faults * part) for part in (0.2, 0.5)),
            )
        )
    recoveries = [fault.recovery_s for fault in report.faults]
    slowest_s = max((seconds for seconds in recoveries if seconds is not None), default=None)
    checks += [
        scenarios.sound(
            f"{len(recoveries)} workers killed at 5,000/s, of {report.published:,} events", report, punctual=False
        ),
        scenarios.counted("lost", report.lost),
        scenarios.counted("out of order", report.out_of_order),
        scenarios.counted(f"unannounced repeats, of {report.duplicates:,}", report.duplicates - report.redelivered),
        scenarios.at_most_us(
            "killed to first handled again, the slower",
            None if slowest_s is None or None in recoveries else int(slowest_s * 1e6),
            _RECOVERY_US_MAX,
        ),
    ]
    return checks, [report]


async def _retries(client: shardbus.Client) -> list[Check]:
    events = [Work(key=f"k{number % 100}", fails=number % _ATTEMPTS) for number in range(_FLAKY)]
    before, calls = client.ledger(), await _calls_of(client, "work")
    await client.publish_many(events)
    ledger = await client.flush(_PATIENCE_S)
    made_calls = await _calls_of(client, "work") - calls
    return [
        scenarios.counted("retried until they succeeded", ledger.handled - before.handled, _FLAKY),
        scenarios.counted("calls of their handler", made_calls, sum(event.fails + 1 for event in events)),
    ]


async def _dead_letters(client: shardbus.Client) -> list[Check]:
    before, calls = client.ledger(), await _calls_of(client, "work")
    await client.publish_many([Work(key=f"d{number % 50}", fails=_ATTEMPTS) for number in range(_DOOMED)])
    ledger = await client.flush(_PATIENCE_S)
    made_calls = await _calls_of(client, "work") - calls
    letters = await client.dead_letters(DeadLetterFilter(type="Work", reason="failed"))
    full = sum(letter.attempts == _ATTEMPTS for letter in letters)
    return [
        scenarios.counted("failed for good: dead letters", ledger.dead - before.dead, _DOOMED),
        scenarios.counted("calls of their handler", made_calls, _DOOMED * _ATTEMPTS),
        scenarios.counted(f"dead letters in the store, each after {_ATTEMPTS} attempts", full, _DOOMED),
        scenarios.counted("purged", await client.purge(DeadLetterFilter(type="Work")), _DOOMED),
    ]


async def _circuit(client: shardbus.Client) -> list[Check]:
    calls = await _calls_of(client, "fragile")
    await client.publish_many([Fragile(key="b", fails=True) for _ in range(_FRAGILE)])
    await client.flush(_PATIENCE_S)
    called = await _calls_of(client, "fragile") - calls
    refused = await client.dead_letters(DeadLetterFilter(type="Fragile", reason="circuit-open"))
    await asyncio.sleep(_OPEN_S * 1.5)
    before = client.ledger()
    await client.publish_many([Fragile(key="b", fails=False) for _ in range(_FRAGILE)])
    ledger = await client.flush(_PATIENCE_S)
    await client.purge(DeadLetterFilter(type="Fragile"))
    return [
        scenarios.counted("calls until the circuit opened", called, _FAILURES),
        scenarios.counted("refused while it was open", len(refused), _FRAGILE - _FAILURES),
        scenarios.counted("handled once it had closed again", ledger.handled - before.handled, _FRAGILE),
    ]


async def _calls_of(client: shardbus.Client, handler: str) -> int:
    return (await client.execute(GetCalls(key="calls"), timeout=_PATIENCE_S)).get(handler, 0)


async def measuring(address: str, options: argparse.Namespace) -> tuple[list[Check], list[Report]]:
    """What measuring costs."""
    return await measuring_cost.checks(address, options), []


async def benchmark(options: argparse.Namespace) -> int:
    """Measure, and print; the exit code."""
    checks: list[Check] = []
    reports: list[Report] = []
    async with scenarios.private_bus(1) as address:
        for part in (sustained, latency, memory, measuring):
            print(f"{part.__name__} …", flush=True)
            found, made_reports = await part(address, options)
            checks += found
            reports += made_reports
    print("faults …", flush=True)
    found, made_reports = await faults(options)
    method = (
        f"1 worker, 1 publisher; {options.sustained:g}, {options.latency:g}, 2 × {options.memory:g} s after 1 s of warm-up",
        scenarios.EVERY_EVENT,
        scenarios.FROM_INTENDED,
        "memory: the line of least squares through the resident memory of each second of the second half",
        f"measuring: {options.turns} turns of {options.turn:g} s of each kind, side by side, some without stamps",
        "faults: an application of its own, 1 worker; every retry, dead letter and refusal is counted, by two sides",
        scenarios.REFERENCE_METHOD,
    )
    return scenarios.show("bus performance", [*checks, *found], method, reports=[*reports, *made_reports], aims=options.aims)


def main() -> int:
    """Parse options and run."""
    parser = scenarios.parser("bus_performance", __doc__, aims=True)
    add = parser.add_argument
    add("--sustained", type=positive, default=20.0, metavar="S", help="seconds of sustained load (default 20)")
    add("--latency", type=positive, default=15.0, metavar="S", help="seconds of paced load (default 15)")
    add("--memory", type=positive, default=40.0, metavar="S", help="seconds for each look at memory (default 40)")
    add("--faults", type=positive, default=10.0, metavar="S", help="seconds of load under which workers are killed (10)")
    add("--target", type=float, default=_SUSTAINED_MIN, metavar="N", help="events/s sustained")
    scenarios.add_p99(parser)
    add("--slope-mb", type=float, default=_SLOPE_MB_MAX, metavar="MB", help="growth of memory a minute")
    measuring_cost.add_options(parser)
    return scenarios.main(benchmark(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
