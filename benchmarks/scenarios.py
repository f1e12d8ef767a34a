"""What the benchmarks share: a bus of their own, the loads, the targets, and how a result is told.

Every figure comes from `loadgen`, so it is measured to the end of the handler, across processes, with every event acked and
checked; only what is called "publish call alone" is not, and stands there because the reference measured nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

import msgspec

import shardbus
from benchmarks import STARTING
from loadgen import LoadError, LoadSpec, Report, run_async
from loadgen.histogram import Percentiles, percentiles_us
from loadgen.machine import Machine, this_machine
from loadgen.processes import end_as_on_interrupt, own_address, started, started_bus
from loadgen.spec import Arrivals, Call
from shardbus import run
from shardbus.demo import GetCount, Tick

REFERENCE_EVENTS_PER_S: Final = 12_553.0
REFERENCE_P99_US: Final = 219
REFERENCE_RATE: Final = f"{REFERENCE_EVENTS_PER_S:,.0f} events/s"
REFERENCE_P99: Final = f"{REFERENCE_P99_US / 1000:.3f} ms"
EVERY_EVENT: Final = "typed events over 1,000 keys, one awaited handler; each acked; order, loss and repeats checked"
FROM_INTENDED: Final = "latency: from the instant at which the event should have gone to the end of its handler"
REFERENCE_METHOD: Final = (
    "the reference: the bus of LLMgine, from which this one descends; its publish call alone, in one process, without acks"
)

RATE_MIN: Final = 10 * REFERENCE_EVENTS_PER_S
P99_US_MAX: Final = 10_000  # what the reference asked of itself
BARE_RATIO_MIN: Final = 0.6  # of the bare loop's rate
PACED_RATE: Final = 20_000.0  # events per second, at which latency is measured
REFERENCE_PACE: Final = 10_000.0  # events per second, at which the reference asked for its p99

# Aims: what the bus is built towards, on two cores that are its own.
RATE_AIM: Final = 1_000_000.0  # events per second: one publisher, one worker, the better of the two calls
P50_US_AIM: Final = 250
P99_US_AIM: Final = 1_000
ROUND_TRIP_P50_US_AIM: Final = 250

RESULTS: Final = Path(os.environ.get("SHARDBUS_RESULTS", "results"))
"""The directory in which results are kept, one file each; below the one that a benchmark is started in."""

FigureT = TypeVar("FigureT")

NOT_MEASURED: Final = "not measured"
_NO_TARGET: Final = "–"

_KEYS: Final = 1000
_OFFERED_MIN: Final = 0.99  # of what was to be sent, by a generator that was late and spoils nothing
_WARM_CALLS: Final = 200
_SESSIONS_S: Final = 5.0  # workers say once a second how many they remember


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One target: what was measured, what was wanted, whether it was reached, what the reference had, and why it failed.

    Beside it may stand an aim, a figure that the bus is built towards: always told, decisive only where asked for.
    """

    name: str
    measured: str
    target: str
    passed: bool
    aim: str = ""
    aim_reached: bool = True
    reference: str = ""
    why: str = ""


# -- targets


def at_least(name: str, rate: float, target: float, *, aim: float | None = None, reference: str = "") -> Check:
    """A rate in events per second that must reach its target."""
    return Check(
        name=name,
        measured=f"{rate:,.0f} events/s",
        target=f"≥ {target:,.0f}",
        passed=rate >= target,
        aim="" if aim is None else f"≥ {aim:,.0f}",
        aim_reached=aim is None or rate >= aim,
        reference=reference,
    )


def at_most_us(
    name: str,
    value_us: int | None,
    target_us: int | None,
    *,
    aim_us: int | None = None,
    reference: str = "",
    why: str = "",
) -> Check:
    """A time in microseconds that must stay within its target; None was not measured, which fails; `why` says why not.

    Without a target it is shown, beside its aim.
    """
    return Check(
        name=name,
        measured=NOT_MEASURED if value_us is None else f"{value_us / 1000:,.3f} ms",
        target=_NO_TARGET if target_us is None else _at_most(target_us),
        passed=target_us is None or (value_us is not None and value_us <= target_us),
        aim="" if aim_us is None else _at_most(aim_us),
        aim_reached=aim_us is None or (value_us is not None and value_us <= aim_us),
        reference=reference,
        why=why if value_us is None else "",
    )


def _at_most(time_us: int) -> str:
    return f"≤ {time_us / 1000:,.3f} ms"


def shown(name: str, measured: str, *, aim: str = "", aim_reached: bool = True) -> Check:
    """What has no target, and is told; perhaps beside an aim."""
    return Check(name=name, measured=measured, target=_NO_TARGET, passed=True, aim=aim, aim_reached=aim_reached)


def counted(name: str, found: int, wanted: int = 0) -> Check:
    """A count that must be exact; by default nothing of the kind may be there."""
    return Check(name=name, measured=f"{found:,}", target=f"{wanted:,}", passed=found == wanted)


def sound(name: str, report: Report, *, punctual: bool = True) -> Check:
    """Whether a run kept every promise and its own schedule; without that, its figures mean nothing.

    Not `punctual`: its latency is not what it was for, so a generator that was late with events, and has sent them all the
    same, spoils nothing.
    """
    late = report.verdict == "generator-bound" and report.achieved_rate >= _OFFERED_MIN * (report.offered_rate or 0.0)
    return Check(
        name=name,
        measured=report.verdict,
        target="ok" if punctual else f"ok, or late with {_OFFERED_MIN:.0%}",
        passed=report.verdict == "ok" or (late and not punctual),
        why="; ".join(report.reasons),
    )


def latency_checks(reports: Sequence[Report], *, p99_us_max: int, what: str = "", aims: bool = True) -> list[Check]:
    """The targets of the last of these paced runs: its verdict, and two percentiles from the intended instant to the
    handler's end.

    The aims are of 20,000 events/s.
    """
    report = reports[-1]
    p50_us, p99_us = (report.latency_us.p50, report.latency_us.p99) if report.latency_us else (None, None)
    silence = report.notes[0].removeprefix("no latency: ") if report.latency_us is None and report.notes else ""
    at = f"at {report.offered_rate or 0:,.0f}/s, {what or f'workers: {len(report.workers)}'}"
    again = "" if len(reports) == 1 else f", run {len(reports)}"
    return [
        sound(f"paced run {at}{again}", report),
        at_most_us(f"latency p50 {at}", p50_us, None, aim_us=P50_US_AIM if aims else None, why=silence),
        at_most_us(
            f"latency p99 {at}",
            p99_us,
            p99_us_max,
            aim_us=P99_US_AIM if aims else None,
            reference=REFERENCE_P99,
            why=silence,
        ),
    ]


def round_trip_check(times_us: Percentiles) -> Check:
    """Commands one after another: shown, beside their aim."""
    return at_most_us("command round trip p50", times_us.p50, None, aim_us=ROUND_TRIP_P50_US_AIM)


# -- what is measured


@contextlib.asynccontextmanager
async def private_bus(
    workers: int, application: str | None = None, *, log_level: str = "warning"
) -> AsyncIterator[str]:
    """The address of a bus that nobody else uses, with the demo or another application, until the block is left.

    It is always the same one, so that a second benchmark beside this one is refused: each would spoil the other's figures.
    """
    with own_address(f"shardbus-benchmarks-{os.getuid()}") as address:
        async with started_bus(workers, address, application=application, log_level=log_level):
            yield address


async def figure_of(kind: type[FigureT], arguments: list[str], *, timeout_s: float, nothing: str) -> FigureT:
    """What a benchmark's client says that runs as a process of its own, by these arguments of `python -m`: a line of JSON.

    Raises:
        LoadError: `nothing`: it ended without one, or took longer.
    """
    line = b""
    async with started(arguments, piped_stdin=False) as process:
        assert process.stdout is not None  # it is a pipe
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                line = await process.stdout.readline()
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.DecodeError:
        raise LoadError(nothing) from None


async def full_speed(address: str, duration_s: float, call: Call = "publish_many") -> Report:
    """As many events as the bus takes from one publisher, after a second of warm-up."""
    return await run_async(
        LoadSpec(rate=None, address=address, duration_s=duration_s, warmup_s=1.0, keys=_KEYS, call=call)
    )


async def paced(
    address: str, duration_s: float, *, rate: float = PACED_RATE, arrivals: Arrivals = "even", runs_max: int = 3
) -> list[Report]:
    """A constant rate, after a second of warm-up, until a run whose generator kept its schedule; the last one counts.

    A run that was generator-bound has measured the machine and not the bus, and quotes no latency: it is told, kept and done
    again.
    """
    spec = LoadSpec(
        rate=rate, arrivals=arrivals, address=address, duration_s=duration_s, warmup_s=1.0, keys=_KEYS
    )
    reports = [await run_async(spec)]
    while reports[-1].verdict == "generator-bound" and len(reports) < runs_max:
        print(f"paced run {len(reports)} of up to {runs_max}: {'; '.join(reports[-1].reasons)}", flush=True)
        reports.append(await run_async(spec))
    return reports


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of what was measured side by side: what drifts over a run falls out of each."""
    return median(value / other for value, other in zip(values, others, strict=True))


async def round_trips(address: str, count: int) -> Percentiles:
    """Commands one after another, each awaited: microseconds from the call to the reply."""
    times_us: Counter[int] = Counter()
    async with shardbus.connect(address) as client:
        for number in range(_WARM_CALLS + count):
            began_ns = time.perf_counter_ns()
            await client.execute(GetCount(key=f"k{number % _KEYS}"))
            if number >= _WARM_CALLS:
                times_us[(time.perf_counter_ns() - began_ns) // 1000] += 1
    return _percentiles(times_us)


async def publish_calls(address: str, count: int) -> tuple[float, Percentiles]:
    """The publish call alone, one after another, as the reference measured it: calls per second, and microseconds each.

    A call returns when the event is in the outbox, so this says what publishing costs the caller and nothing of the bus. One
    in so many waits for a turn of the event loop, or for room. The times are rounded up.
    """
    times_us: Counter[int] = Counter()
    async with shardbus.connect(address) as client:
        began_ns = last_ns = time.perf_counter_ns()
        for number in range(count):
            await client.publish(Tick(key=f"k{number % _KEYS}", n=number))
            now_ns = time.perf_counter_ns()
            times_us[(now_ns - last_ns) // 1000 + 1] += 1
            last_ns = now_ns
        elapsed_ns = last_ns - began_ns
        await client.flush(30.0)
    return count * 1e9 / elapsed_ns, _percentiles(times_us)


async def sessions(address: str, count: int) -> tuple[Percentiles, int]:
    """Clients that come, publish one event and leave, one after another.

    Returns what such a life takes, in microseconds, and how many publishers the workers still remember a little later.
    """
    times_us: Counter[int] = Counter()
    for number in range(count):
        began_ns = time.perf_counter_ns()
        async with shardbus.connect(address) as client:
            await client.publish(Tick(key=f"k{number}"))
        times_us[(time.perf_counter_ns() - began_ns) // 1000] += 1
    end_s = time.monotonic() + _SESSIONS_S
    async with shardbus.connect(address) as client:
        # Each worker counts this client, too, as soon as it has reported since.
        while left := sum(max(0, worker["publishers"] - 1) for worker in (await client.status())["workers"]):
            if time.monotonic() > end_s:
                break
            await asyncio.sleep(0.2)
    return _percentiles(times_us), left


def _percentiles(times_us: Counter[int]) -> Percentiles:
    found = percentiles_us(times_us.items())
    assert found is not None  # at least one call was made
    return found


# -- how it is told


def parser(module: str, description: str | None, *, aims: bool = False) -> argparse.ArgumentParser:
    """Options of a benchmark; each adds its own, with its targets among them, so that it can be made to fail.

    `aims`: it has some beside its targets.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if aims:
        made.add_argument("--aims", action="store_true", help="fail also where an aim is missed")
    return made


def positive(text: str) -> float:
    """An option's value that is a number above 0: a bad one is told before anything is started."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def at_least_one(text: str) -> int:
    """An option's value that is a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def add_duration(parser: argparse.ArgumentParser, default_s: float) -> None:
    """How long each load of it lasts."""
    told = f"seconds for each load (default {default_s:g})"
    parser.add_argument("--duration", type=positive, default=default_s, metavar="S", help=told)


def add_p99(parser: argparse.ArgumentParser) -> None:
    """The target of paced runs."""
    parser.add_argument("--p99-us", type=int, default=P99_US_MAX, metavar="US", help="latency p99 of the paced run")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a benchmark: when and on what it ran, every target, and the reports that the figures come from."""

    title: str
    finished_at: datetime
    machine: Machine
    passed: bool
    checks: tuple[Check, ...]
    method: tuple[str, ...]
    reports: tuple[Report, ...]


def keep(result: Result, directory: Path) -> Path | None:
    """Write a result into a file of its own; None where it cannot be written, which is said and is no failure."""
    name = re.sub(r"[^a-z0-9]+", "-", result.title.lower()).strip("-")
    path = directory / f"{name}-{result.finished_at:%Y%m%dT%H%M%SZ}.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2))
    except OSError as error:
        print(f"the result is not kept: {error}", file=sys.stderr)
        return None
    return path


def show(
    title: str,
    checks: Sequence[Check],
    method: Sequence[str],
    *,
    reports: Sequence[Report] = (),
    aims: bool = False,
) -> int:
    """Print targets, results and method, and keep them; the exit code: 0 if every target was reached.

    `reports` are the runs behind the figures; they are kept with them. `aims`: they decide as targets do.
    """
    machine = this_machine()
    print(f"\n{title}")
    print(f"{machine.cpu_count} × {machine.cpu_model}, {machine.system}, Python {machine.python}\n")
    rows = [("", "figure", "measured", "target"), *((_mark(check, aims), *_cells(check)) for check in checks)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    told = ["", *(_beside(check) for check in checks)]
    for row, beside in zip(rows, told, strict=True):
        cells = "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True))
        print(f"{cells}   {beside}".rstrip())
    print()
    for line in method:
        print(f"- {line}")
    print()
    missed = [check for check in checks if not check.passed]
    for check in missed:
        why = f" ({check.why})" if check.why else ""
        print(f"FAIL: {check.name}: {check.measured}, wanted {check.target}{why}")
    aimed = [check for check in checks if check.aim]
    short = [check for check in aimed if not check.aim_reached]
    for check in short if aims else ():
        print(f"MISS: {check.name}: {check.measured}, aimed at {check.aim}")
    result = Result(
        title=title,
        finished_at=datetime.now(UTC),
        machine=machine,
        passed=not missed and not (aims and short),
        checks=tuple(checks),
        method=tuple(method),
        reports=tuple(reports),
    )
    if (path := keep(result, RESULTS)) is not None:
        print(f"kept in {path}")
    targets = sum(check.target != _NO_TARGET for check in checks)
    ends = [f"{len(missed)} of {targets} targets missed"] if missed else []
    if aimed:
        ends.append(f"{len(aimed) - len(short)} of {len(aimed)} aims reached")
    print("; ".join(["PASS" if result.passed else "FAIL", *ends]))
    return 0 if result.passed else 1


def _mark(check: Check, aims: bool) -> str:
    if not check.passed:
        return "FAIL"
    if check.target == _NO_TARGET and check.measured == NOT_MEASURED:
        return "–"
    return "PASS" if check.aim_reached or not aims else "MISS"


def _beside(check: Check) -> str:
    """What stands behind the row of a check: its aim, and what the reference had."""
    reached = "reached" if check.aim_reached else "missed"
    aim = f"aim: {check.aim}, {'not measured' if check.measured == NOT_MEASURED else reached}" if check.aim else ""
    return "   ".join(filter(None, (aim, check.reference and f"reference: {check.reference}")))


def _cells(check: Check) -> tuple[str, str, str]:
    return check.name, check.measured, check.target


def main(benchmark: Coroutine[Any, Any, int]) -> int:
    """Run a benchmark to its exit code; what went wrong is one line for people."""
    end_as_on_interrupt()
    try:
        STARTING.__exit__()
        return run(benchmark)
    except KeyboardInterrupt:
        print("interrupted; what was started was ended")
        return 130
    except (LoadError, shardbus.ShardbusError) as error:
        print(f"FAIL: {error}")
        return 1
