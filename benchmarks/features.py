"""Features at scale: commands one by one and a thousand at a time, batch handlers, and events scheduled for one second.

Takes about 60 seconds. Clients are processes of their own, with the event loop that `shardbus.run` gives.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import sys
import time
from collections import Counter
from typing import Final, TypeVar

import msgspec

import shardbus
from benchmarks import scenarios
from benchmarks.scenarios import Check, at_least_one, positive
from loadgen import LoadError, LoadSpec, Report, run_async
from loadgen.histogram import Percentiles, percentiles_us
from loadgen.spec import Template
from shardbus import Bus, Command, Context, Event
from shardbus.demo import GetCount

_APPLICATION: Final = "benchmarks.features:bus"
_WORKERS: Final = 2
_IN_FLIGHT: Final = 1000
_COMMANDS_PER_S_MIN: Final = 50_000.0
_BATCH_RATIO_MIN: Final = 1.5
_BATCH: Final = 256
_KEYS: Final = 1000
_SCHEDULED: Final = 100_000
_SECOND_NS: Final = 1_000_000_000
_PATIENCE_S: Final = 60.0
_AT_ONCE: Final = 512  # scheduled by calls that wait together

ResultT = TypeVar("ResultT")


# -- an application


class CountedSingly(Event, key="key", gc=False):
    """Counted by a handler that is called for each."""

    key: str


class CountedTogether(Event, key="key", gc=False):
    """Counted by a handler that is called with many."""

    key: str


class InsertedSingly(Event, key="key", gc=False):
    """Inserted by a handler that is called for each."""

    key: str


class InsertedTogether(Event, key="key", gc=False):
    """Inserted by a handler that is called with many."""

    key: str


class Due(Event, key="key", gc=False):
    """Scheduled; its handler notes how late it is."""

    key: str
    due_ns: int


class Lateness(msgspec.Struct, frozen=True):
    """What a worker has seen of scheduled events: how many were handled how many microseconds after they were due."""

    shard: int
    early: int
    repeated: int
    late_us: dict[int, int]


class GetLateness(Command[Lateness], key="key"):
    """What the worker of a key has seen."""

    key: str


bus = Bus("features")
_counts: Counter[str] = Counter()
_database: Final = sqlite3.connect(":memory:", isolation_level=None)
_database.execute("CREATE TABLE inserted (key TEXT PRIMARY KEY, count INTEGER)")
_late_us: Counter[int] = Counter()
_odd: Counter[str] = Counter()


@bus.on(CountedSingly)
async def count_one(event: CountedSingly) -> None:
    """Count: next to nothing."""
    _counts[event.key] += 1


@bus.on(CountedTogether, batch=_BATCH)
async def count_many(events: list[CountedTogether]) -> None:
    """Count, likewise."""
    for event in events:
        _counts[event.key] += 1


@bus.on(InsertedSingly)
async def insert_one(event: InsertedSingly) -> None:
    """Count in a database: one transaction a call."""
    _insert([(event.key,)])


@bus.on(InsertedTogether, batch=_BATCH)
async def insert_many(events: list[InsertedTogether]) -> None:
    """Count in a database, likewise."""
    _insert([(event.key,) for event in events])


def _insert(keys: list[tuple[str]]) -> None:
    _database.execute("BEGIN")
    _database.executemany(
        "INSERT INTO inserted VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET count = count + 1", keys
    )
    _database.execute("COMMIT")


@bus.on(Due)
async def note(event: Due, context: Context) -> None:
    """Note how late it is, in steps of a millisecond."""
    late_ns = time.time_ns() - event.due_ns
    _odd["early"] += late_ns < 0
    _odd["repeated"] += context.redelivered
    _late_us[late_ns // 1_000_000 * 1000] += 1


@bus.command(GetLateness)
async def get_lateness(_: GetLateness, context: Context) -> Lateness:
    """Reply with what this worker has noted."""
    return Lateness(context.shard, _odd["early"], _odd["repeated"], dict(_late_us))


# -- clients, each in a process of its own


class Commands(msgspec.Struct, frozen=True):
    """Commands that were executed: how many in a second, and how long each took."""

    per_s: float
    times_us: Percentiles


async def execute(address: str, in_flight: int, duration_s: float) -> Commands:
    """So many callers, each executing commands one after another; measured after a second of warm-up."""
    times_us: Counter[int] = Counter()
    begin_ns = time.perf_counter_ns() + _SECOND_NS
    end_ns = begin_ns + int(duration_s * 1e9)

    async def caller(number: int) -> None:
        while (began_ns := time.perf_counter_ns()) < end_ns:
            number += 1
            await client.execute(GetCount(key=f"k{number % _KEYS}"), timeout=_PATIENCE_S)
            now_ns = time.perf_counter_ns()
            if began_ns >= begin_ns and now_ns < end_ns:
                times_us[(now_ns - began_ns) // 1000] += 1

    async with shardbus.connect(address) as client:
        await asyncio.gather(*map(caller, range(in_flight)))
    found = percentiles_us(times_us.items())
    if found is None:
        raise LoadError(f"no command was answered within {duration_s:g} s")
    return Commands(times_us.total() / duration_s, found)


class Fired(msgspec.Struct, frozen=True):
    """Scheduled events: how many, how many in a second were taken, and what became of them by workers."""

    count: int
    taken_per_s: float
    workers: tuple[Lateness, ...]


async def schedule(address: str, count: int) -> Fired:
    """Schedule events evenly over one second that lies far enough ahead, and see how late they were handled."""
    async with shardbus.connect(address) as client:
        first_ns = time.time_ns() + int((5 + count / 5000) * 1e9)  # an hour, for a store that takes so few a second
        began_s = time.monotonic()
        for start in range(0, count, _AT_ONCE):
            for number in range(start, min(start + _AT_ONCE, count)):
                due_ns = first_ns + number * _SECOND_NS // count
                await client.schedule(Due(key=f"k{number % _KEYS}", due_ns=due_ns), at=due_ns / 1e9)
        await client.flush(_PATIENCE_S)
        taken_per_s = count / (time.monotonic() - began_s)
        if time.time_ns() >= first_ns:
            raise LoadError(f"{count:,} events were not stored before the first was due; schedule fewer with --scheduled")
        await asyncio.sleep((first_ns - time.time_ns()) / 1e9 + 1.0)
        end_s = time.monotonic() + _PATIENCE_S
        while True:
            workers = await _seen(client)
            if sum(sum(one.late_us.values()) for one in workers) >= count or time.monotonic() > end_s:
                return Fired(count, taken_per_s, workers)
            await asyncio.sleep(0.1)


async def _seen(client: shardbus.Client) -> tuple[Lateness, ...]:
    """What each worker says: its shard is known once one of its keys was asked."""
    found: dict[int, Lateness] = {}
    for number in range(_KEYS):
        if len(found) == _WORKERS:
            break
        one = await client.execute(GetLateness(key=f"k{number}"), timeout=_PATIENCE_S)
        found[one.shard] = one
    return tuple(found.values())


async def _in_a_process(kind: type[ResultT], *arguments: str) -> ResultT:
    nothing = f"{' '.join(arguments)}: the client ended without a figure"
    command = ["benchmarks.features", *arguments]
    return await scenarios.figure_of(kind, command, timeout_s=3 * _PATIENCE_S, nothing=nothing)


# -- the parts


async def commands(address: str, options: argparse.Namespace) -> list[Check]:
    """Round trips one after another, and a thousand at a time."""
    single = await _in_a_process(Commands, "--execute", address, "--in-flight", "1", "--duration", str(options.duration))
    many = await _in_a_process(
        Commands, "--execute", address, "--in-flight", str(_IN_FLIGHT), "--duration", str(options.duration)
    )
    return [
        scenarios.at_most_us("execute, one after another, p50", single.times_us.p50, options.round_trip_us),
        Check(
            name=f"execute, {_IN_FLIGHT:,} in flight, workers: {_WORKERS}",
            measured=f"{many.per_s:,.0f} commands/s",
            target=f"≥ {options.commands:,.0f}",
            passed=many.per_s >= options.commands,
        ),
        scenarios.shown(
            "execute p50 p99, one after another · in flight, ms",
            " · ".join(f"{one.p50 / 1000:.3f} {one.p99 / 1000:.3f}" for one in (single.times_us, many.times_us)),
        ),
    ]


async def batches(address: str, options: argparse.Namespace) -> tuple[list[Check], list[Report]]:
    """Handlers called event by event, and the same with batches, in turns at full speed.

    What a worker carries is what it would do with the whole of a core: events finished by its processor time. The publisher
    is not the one that is measured, and may be the slower one.
    """
    types = (InsertedSingly, InsertedTogether, CountedSingly, CountedTogether)
    runs: dict[str, list[Report]] = {each.__name__: [] for each in types}
    for _ in range(options.turns):
        for name, reports in runs.items():
            template = Template(type=name, key="key")
            reports.append(await run_async(LoadSpec(rate=None, address=address, duration_s=options.turn, template=template)))
    every = [report for reports in runs.values() for report in reports]
    one, many, count_one, count_many = (statistics.median(map(_carried, reports)) for reports in runs.values())
    return [
        scenarios.sound(
            f"batches, {options.turns} turns", next((report for report in every if report.verdict != "ok"), every[0])
        ),
        Check(
            name=f"a core inserts {many:,.0f} events/s in batches, {one:,.0f} one by one",
            measured=f"{many / one:.2f}",
            target=f"≥ {options.ratio:.2f}",
            passed=many >= options.ratio * one,
        ),
        scenarios.shown(
            f"a core counts {count_many:,.0f} events/s in batches, {count_one:,.0f} one by one",
            f"{count_many / count_one:.2f}",
        ),
    ], every


def _carried(report: Report) -> float:
    """Events per second of a worker's processor time."""
    share = next((use.cpu_share for use in report.processes if use.name == "worker 0"), None)
    return report.achieved_rate / share if share else float("nan")


async def scheduled(address: str, options: argparse.Namespace) -> list[Check]:
    """Events that are all due in one second: how many were handled before it was over, and how late."""
    fired = await _in_a_process(Fired, "--schedule", address, "--scheduled", str(options.scheduled))
    late_us: Counter[int] = Counter()
    for one in fired.workers:
        late_us.update(one.late_us)
    found = percentiles_us(late_us.items())
    p50, p99, worst = ("–", "–", None) if found is None else (found.p50 / 1000, found.p99 / 1000, found.max)
    return [
        scenarios.counted(f"scheduled, stored at {fired.taken_per_s:,.0f}/s, and handled", late_us.total(), fired.count),
        scenarios.counted("before they were due", sum(one.early for one in fired.workers)),
        scenarios.counted("repeated", sum(one.repeated for one in fired.workers)),
        scenarios.at_most_us(f"the last one's lateness (p50 {p50} ms, p99 {p99} ms)", worst, options.late_us),
    ]


async def benchmark(options: argparse.Namespace) -> int:
    """Measure, and print; the exit code."""
    print("commands …", flush=True)
    async with scenarios.private_bus(_WORKERS, log_level="error") as address:
        checks = await commands(address, options)
    print("batches …", flush=True)
    async with scenarios.private_bus(1, _APPLICATION, log_level="error") as address:
        found, reports = await batches(address, options)
        checks += found
    print("scheduled …", flush=True)
    async with scenarios.private_bus(_WORKERS, _APPLICATION, log_level="error") as address:
        checks += await scheduled(address, options)
    method = (
        f"commands: {_WORKERS} workers, GetCount over {_KEYS:,} keys, {options.duration:g} s after 1 s of warm-up",
        f"batches: 1 worker, medians of {options.turns} turns of {options.turn:g} s, by the worker's processor time",
        "inserting: one transaction of SQLite, in memory, a call; counting: next to nothing",
        f"scheduled: {_WORKERS} workers, due evenly over one second; lateness from each event's own instant, in whole ms",
    )
    return scenarios.show("features at scale", checks, method, reports=reports)


def main() -> int:
    """Parse options and run; the hidden ones are the clients."""
    parser = scenarios.parser("features", __doc__)
    add = parser.add_argument
    add("--duration", type=positive, default=5.0, metavar="S", help="seconds of commands, each way (default 5)")
    add("--turns", type=at_least_one, default=3, metavar="N", help="turns of either handler (default 3)")
    add("--turn", type=positive, default=3.0, metavar="S", help="seconds of each (default 3)")
    add("--scheduled", type=at_least_one, default=_SCHEDULED, metavar="N", help="events due in one second (default 100,000)")
    add("--commands", type=float, default=_COMMANDS_PER_S_MIN, metavar="N", help="commands/s in flight")
    add("--round-trip-us", type=int, default=scenarios.ROUND_TRIP_P50_US_AIM, metavar="US", help="p50, one by one")
    add("--ratio", type=float, default=_BATCH_RATIO_MIN, metavar="X", help="in batches / one by one")
    add("--late-us", type=int, default=1_000_000, metavar="US", help="lateness of the last scheduled event")
    add("--in-flight", type=int, default=_IN_FLIGHT, help=argparse.SUPPRESS)
    add("--execute", metavar="ADDRESS", help=argparse.SUPPRESS)
    add("--schedule", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.execute:
        _tell(shardbus.run(execute(options.execute, options.in_flight, options.duration)))
    elif options.schedule:
        _tell(shardbus.run(schedule(options.schedule, options.scheduled)))
    else:
        return scenarios.main(benchmark(options))
    return 0


def _tell(found: Commands | Fired) -> None:
    print(msgspec.json.encode(found).decode(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
