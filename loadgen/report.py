"""What a run comes to: the figures, and the verdict on them. Pure; what people read is made of it in `tables`.

`published` and all counts of outcomes are of the whole run, warm-up included, because a lost event is lost at any time.
Rates and times are of the measured window alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from loadgen.expect import Expectation, Outcome, check, shown
from loadgen.histogram import Histogram, Percentiles, percentiles_us
from loadgen.machine import Machine, MachineLoad
from loadgen.meters import merged
from loadgen.spec import DRIVERS_MAX, Counts, DriverResult, LoadSpec
from shardbus.interrupts import EXIT_INTERRUPTED

Verdict = Literal["ok", "failed", "generator-bound", "saturated"]

EXIT_CODES: Final[dict[Verdict, int]] = {"ok": 0, "failed": 1, "generator-bound": 3, "saturated": 4}
EXIT_USAGE: Final = 2

ACHIEVED_MIN: Final = 0.99  # of the offered rate; below it, somebody did not keep up
SEND_LAG_P99_US_MAX: Final = 5_000  # above it, the generator was not on time, and its latencies would be its own
BEHIND_S_MAX: Final = 0.1  # … and so much of the load may be under way at the end of a short window
WAITED_SHARE_MAX: Final = 0.01  # of the window, spent waiting for room; above it, the bus may have made sending late
DRIVER_CPU_MIN: Final = 0.8  # of a core; a driver that took as much was busy itself, not held up
MACHINE_BUSY_MIN: Final = 0.9  # of all cores; above it, or with more to run than cores, whoever sleeps wakes up late
STOLEN_MAX: Final = 0.05  # of all cores, taken by the host of a virtual machine
PUBLISHERS_MAX: Final = 256  # of a shard, by the bus' own limits
OWN_PACE_MIN: Final = 0.9  # of what was due while the generator did not wait; below it, it was too slow by itself


# -- what a report is made of


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as the supervisor sees it; fields as in `shardbus status --json`."""

    shard: int
    pid: int
    restarts: int
    handled: int
    backlog: int
    rss_bytes: int
    state: str = "up"
    publishers: int = 0


class BusState(msgspec.Struct, frozen=True, kw_only=True):
    """The bus at one moment. `waiting` events lie in the shards' stores, whoever published them."""

    workers: tuple[WorkerState, ...]
    waiting: int

    @property
    def backlog(self) -> int:
        """Messages that all workers together have accepted and not finished."""
        return sum(worker.backlog for worker in self.workers)


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """The evidence of one publisher over all shards; the counts are those of `shardbus.metrics.Evidence`."""

    distinct: int
    repeats: int
    announced: int
    out_of_order: int
    missing: int
    unchecked: int
    dead: int
    samples: int
    latency_us: Percentiles | None
    service_us: Percentiles | None = None
    queue_us: Percentiles | None = None


class ProcessUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a process used: processor time as a share of one core (None: it was not seen for long enough), and memory."""

    name: str
    pid: int
    cpu_share: float | None
    rss_bytes: int


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """About a second of a run, up to `at_s` after its first event was due.

    `offered_rate` is None where nothing was scheduled; `counts` are of the run so far. `latency_us` are the response times
    heard of in the interval (of commands, when their replies came), None where there were none or nobody answered, and so
    for `service_p99_us` and `queue_p99_us`.
    `backlog` is of each shard, at its end.
    """

    at_s: float
    warming_up: bool
    offered_rate: float | None
    achieved_rate: float
    counts: Counts
    latency_us: Percentiles | None
    service_p99_us: int | None = None
    queue_p99_us: int | None = None
    send_lag_p99_us: int | None
    backlog: tuple[int, ...]
    waiting: int
    processes: tuple[ProcessUse, ...]


class FaultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A fault as it was done: to which shard, when, and for one that ended a worker how long until its successor had handled
    something (None: nothing was seen of it). A worker was really stopped for `stopped_s`.
    """

    fault: str
    shard: int
    at_s: float
    stopped_s: float = 0.0
    recovery_s: float | None = None


# -- the verdict


class Judgement(msgspec.Struct, frozen=True):
    """A verdict, and why, in sentences for people; ok needs no reason."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that a verdict rests on.

    Of the whole run: `lost`, `not_delivered` (not finished when the flush gave up), `duplicates`, `redelivered`,
    `out_of_order`; `gone`: the bus was, and with it the evidence; `is_up`: all its workers were, at the end. Of the window:
    the offered and the achieved rate in events per second (offered None: unpaced), how many events were `scheduled` and
    `sent`, the 99th percentile of the send lag, and the share of the time that publish waited for room. `driver_cpu` is what
    each driver had of a core; `cpu_count` and `machine_load` (None: not looked at) are this machine's.
    """

    lost: int
    not_delivered: int
    duplicates: int
    redelivered: int
    out_of_order: int
    gone: bool = False
    is_up: bool = True
    offered_rate: float | None
    achieved_rate: float
    scheduled: int | None
    sent: int
    send_lag_p99_us: int
    waited_share: float
    drivers: int = 1
    commands: bool = False
    driver_cpu: float = 0.0
    cpu_count: int = 1
    machine_load: MachineLoad | None = None


def judge(facts: Facts) -> Judgement:
    """The verdict on a run. What broke a promise comes first, then the bus that was too slow, then the generator.

    An unpaced run offers no rate, so it can only be ok or failed. What was not finished in the end is the mark of a bus that
    was too slow where it was; where it had kept up, or a worker was missing, it is a broken promise.
    """
    broken = _broken_promises(facts)
    unfinished = []
    if facts.not_delivered:
        unfinished.append(f"{_events_were(facts.not_delivered)} not finished when the time for the flush was up")
    if facts.offered_rate is None or facts.scheduled is None:
        return Judgement("failed", (*broken, *unfinished)) if broken or unfinished else Judgement("ok")
    late = _lateness(facts)
    behind = bool(late) and _is_bus_behind(facts, facts.offered_rate, facts.scheduled)
    generators = bool(late) and not behind and _is_generators_fault(facts, facts.scheduled)
    slow = not generators and facts.achieved_rate < (1 - _behind_max(facts)) * facts.offered_rate
    if broken or (unfinished and not (slow and facts.is_up)):
        return Judgement("failed", (*broken, *unfinished))
    achieved = f"{facts.achieved_rate:,.0f} of {facts.offered_rate:,.0f} events/s were finished in the measured window"
    if unfinished:
        return _saturated(facts, achieved, *unfinished)
    if behind:
        return _saturated(facts, achieved, late)
    if generators:
        return Judgement("generator-bound", (late, _why_late(facts)))
    if late:
        waited = f"publish waited for room {facts.waited_share:.0%} of the time"
        return _saturated(facts, waited, late, achieved)
    if slow:
        return _saturated(facts, achieved)
    return Judgement("ok")


def _saturated(facts: Facts, *reasons: str) -> Judgement:
    """A bus that did not keep up. Where the machine was busy, that is told beside it, for the reader to weigh."""
    load = facts.machine_load
    if load is not None and _is_busy(load, facts.cpu_count):
        reasons += (f"this machine was busy: {_load_text(load, facts.cpu_count)}",)
    return Judgement("saturated", reasons)


def _load_text(load: MachineLoad, cpu_count: int) -> str:
    shares = f"{load.busy:.0%} busy, {load.stolen:.0%} stolen"
    return f"the load average was {load.load_average:.1f} on {cpu_count} cores ({shares})"


def _why_late(facts: Facts) -> str:
    """What kept a generator from its schedule, as far as that is known: itself, the machine, or something unseen."""
    drivers = "one driver process" if facts.drivers == 1 else f"{facts.drivers} driver processes"
    each = f"{facts.driver_cpu:.0%} of a core{'' if facts.drivers == 1 else ' each'}"
    load = facts.machine_load
    if facts.driver_cpu >= DRIVER_CPU_MIN:
        more = f"; try --drivers {facts.drivers + 1}" if facts.drivers < DRIVERS_MAX else ""
        return f"{drivers} cannot offer this rate here (used {each}){more}"
    if load is not None and _is_busy(load, facts.cpu_count):
        return (
            f"this machine was too busy: {drivers} got {each}, {_load_text(load, facts.cpu_count)}; free the machine or "
            "lower the rate"
        )
    return f"{drivers} cannot offer this rate here, and not for want of processor time (used {each})"


def _is_busy(load: MachineLoad, cpu_count: int) -> bool:
    return load.busy >= MACHINE_BUSY_MIN or load.stolen > STOLEN_MAX or load.load_average > cpu_count


def _behind_max(facts: Facts) -> float:
    """Which part of the offered load may be unfinished at the end of the window."""
    window_s = (facts.scheduled or 0) / facts.offered_rate if facts.offered_rate else 0.0
    return max(1 - ACHIEVED_MIN, min(1.0, BEHIND_S_MAX / window_s)) if window_s else 1.0


def _broken_promises(facts: Facts) -> list[str]:
    reasons = []
    if facts.gone:
        reasons.append(
            "the bus was gone at the end of the run, and with it what would show losses, repeats and order; handled and "
            "dead are what it had acknowledged"
        )
    if facts.lost and facts.commands:
        lost = "1 command got no reply in time, or its worker died under it"
        more = f"{facts.lost:,} commands got no reply in time, or their worker died under them"
        reasons.append(lost if facts.lost == 1 else more)
    elif facts.lost:
        it = "it was" if facts.lost == 1 else "they were"
        reasons.append(f"{_events_were(facts.lost)} acknowledged, and nothing shows that {it} ever handled")
    if facts.out_of_order:
        its = "its" if facts.out_of_order == 1 else "their"
        reasons.append(f"{_events_were(facts.out_of_order)} handled after a later one of {its} key")
    if facts.duplicates != facts.redelivered:
        unannounced = facts.duplicates - facts.redelivered
        was = "was" if unannounced == 1 else "were"
        reasons.append(f"{unannounced:,} of {facts.duplicates:,} repeats {was} not announced as redelivered")
    return reasons


def _events(count: int) -> str:
    return "1 event" if count == 1 else f"{count:,} events"


def _events_were(count: int) -> str:
    return f"{_events(count)} {'was' if count == 1 else 'were'}"


def _is_bus_behind(facts: Facts, offered_rate: float, scheduled: int) -> bool:
    """Whether the bus left more unfinished of what was sent than a late generator can explain."""
    finished = facts.achieved_rate * scheduled / offered_rate if offered_rate else 0.0
    allowed = max((1 - ACHIEVED_MIN) * facts.sent, BEHIND_S_MAX * offered_rate)
    sent_late = facts.send_lag_p99_us / 1e6 * offered_rate
    return facts.sent - finished > allowed + sent_late


def _is_generators_fault(facts: Facts, scheduled: int) -> bool:
    """Whether a late generator would have been late with a bus that always has room.

    It would if it never waited to speak of. It also would if it sent far less in the time that it did not wait than was
    due in that time.
    """
    in_time_of_its_own = scheduled * (1 - facts.waited_share)
    return facts.waited_share <= WAITED_SHARE_MAX or facts.sent < OWN_PACE_MIN * in_time_of_its_own


def _lateness(facts: Facts) -> str:
    """Why the events did not go on time; empty where they did."""
    assert facts.scheduled is not None  # only a paced run can be late
    if facts.sent < ACHIEVED_MIN * facts.scheduled:
        return f"{facts.sent:,} of {facts.scheduled:,} events were sent in time"
    if facts.send_lag_p99_us > SEND_LAG_P99_US_MAX:
        bound_ms = SEND_LAG_P99_US_MAX / 1000
        return f"the send lag's p99 is {facts.send_lag_p99_us / 1000:,.1f} ms; above {bound_ms:g} ms it is no open loop"
    return ""


# -- the report


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a run; `--json` writes these fields.

    Rates in events per second; `achieved_rate` is what reached its outcome within the measured window, as its publisher
    learnt from acks, over the window's length. `lost`: published, finished by nobody, and not waiting in a store.
    `not_delivered`: not finished when the flush gave up, and nothing shows that it is since. `waiting`: still in a store, at
    most. An event that came again counts by its first outcome, so published = handled + dead-lettered + waiting + lost +
    not delivered. `duplicates`: all repeats; `redelivered`: those that said so. `unchecked`: events of keys that the shards
    no longer remembered. Not `proven`: the bus was gone at the end, so `handled` and `dead_lettered` are what publishers
    were told, and of `PROVEN` nothing is known. `interrupted`: the load, or the waiting for what lay in stores, was ended
    before its time, and everything here is of what was done until then.
    Times run from the intended instant: `send_lag_us` to the publish call, `latency_us` (the response time) to the end of
    the handler, or, for a command, to its reply. It is the sum of two, for each event: `queue_us`, to the beginning of the
    handler (with the send lag in it), and `service_us`, the handler's own time, of the attempt that settled the event.
    Nobody measures these two of a command. All three are null where they would mislead; `notes` say why.
    `load` is what was asked for, its `address` and `workers` too; what served is in those beside it. Counts of commands
    stand where those of events would: `handled` were replied to, `dead_lettered` failed, `lost` got no reply.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    expectations: tuple[Outcome, ...] = ()
    offered_rate: float | None
    achieved_rate: float
    published: int
    handled: int
    dead_lettered: int
    lost: int
    not_delivered: int
    waiting: int
    duplicates: int
    redelivered: int
    out_of_order: int
    unchecked: int
    proven: bool = True
    interrupted: bool = False
    latency_us: Percentiles | None
    service_us: Percentiles | None = None
    queue_us: Percentiles | None = None
    latency_samples: int
    send_lag_us: Percentiles | None
    publish_wait_s: float
    flush_s: float
    window_s: float
    generator_cpu: float
    generator_rss_bytes: int
    load: LoadSpec
    address: str
    workers: tuple[WorkerState, ...]
    faults: tuple[FaultRecord, ...] = ()
    processes: tuple[ProcessUse, ...] = ()
    shard_latency_us: dict[int, Percentiles] = {}
    intervals: tuple[Interval, ...] = ()
    machine: Machine
    machine_load: MachineLoad | None = None

    @property
    def exit_code(self) -> int:
        """What the process that made the run ends with."""
        return EXIT_INTERRUPTED if self.interrupted else EXIT_CODES[self.verdict]


def figures_of(report: Report) -> dict[str, float | None]:
    """Everything that can be expected of a run (`expect.FIGURES`), times in seconds."""
    latency = report.latency_us
    workers = [use for use in report.processes if use.name.startswith("worker ")]
    shares = [use.cpu_share for use in workers if use.cpu_share is not None]
    recoveries = [fault.recovery_s for fault in report.faults if not fault.fault.startswith("stop")]
    recovered = [seconds for seconds in recoveries if seconds is not None]
    times_us: dict[str, int | None] = {
        name: None if latency is None else getattr(latency, name) for name in ("p50", "p90", "p99", "p99_9", "max")
    }
    for kind, found in (("service", report.service_us), ("queue", report.queue_us), ("send_lag", report.send_lag_us)):
        times_us |= {f"{kind}_{name}": None if found is None else getattr(found, name) for name in ("p50", "p99")}
    return {
        **{name: None if value is None else value / 1e6 for name, value in times_us.items()},
        **{name: float(getattr(report, name)) for name in COUNTED},
        **({} if report.proven else dict.fromkeys(PROVEN)),
        "recovery": max(recovered) if recovered and len(recovered) == len(recoveries) else None,
        "achieved_rate": report.achieved_rate,
        "worker_rss": max((float(use.rss_bytes) for use in workers), default=None),
        "worker_cpu": max(shares, default=None),
    }


COUNTED: Final = (
    "published",
    "handled",
    "dead_lettered",
    "lost",
    "duplicates",
    "redelivered",
    "out_of_order",
    "not_delivered",
    "waiting",
    "unchecked",
)


PROVEN: Final = ("lost", "duplicates", "redelivered", "out_of_order", "unchecked")
"""Of these, what only the bus can show."""


_FATES: Final = ("dead_lettered", "waiting", "not_delivered")
"""Of these, what else than to be handled becomes of events that are not lost."""


def _means_that_none_is_handled(one: Expectation) -> bool:
    """Whether an expectation says that, or that something else becomes of events: `handled<1` does, `handled!=1` and
    `dead_lettered<5` do not."""
    if one.figure == "handled":
        return one.is_met_by(0) and not (one.is_met_by(1) or one.is_met_by(math.inf))
    return one.figure in _FATES and not one.is_met_by(0)


def held_against(report: Report, expectations: Sequence[Expectation]) -> Report:
    """A report with its expectations checked. One that is not met makes an ok run a failed one, and any run where no load is
    an excuse. That something is handled is expected of every run that does not say what else is to become of its events."""
    figures = figures_of(report)
    outcomes = tuple(check(expectation, figures) for expectation in expectations)
    missed = tuple(f"expected {shown(outcome)}" for outcome in outcomes if not outcome.met)
    verdict = report.verdict
    meant = any(
        outcome.met and _means_that_none_is_handled(one) for one, outcome in zip(expectations, outcomes, strict=True)
    )
    if report.published and not report.handled and not meant:
        dead = "failed" if report.load.commands else "became dead letters"
        fates = ((report.dead_lettered, dead), (report.waiting, "wait in a store"), (report.not_delivered, "did not end"))
        told = ", ".join(f"{count:,} {fate}" for count, fate in fates if count)
        missed += (f"none was handled{': ' if told else ''}{told}",)
        verdict = "failed"
    if (missed and verdict == "ok") or not all(outcome.met or outcome.is_excused for outcome in outcomes):
        verdict = "failed"
    return msgspec.structs.replace(
        report, expectations=outcomes, verdict=verdict, reasons=(*report.reasons, *missed)
    )


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Where the published events are, by the evidence; see `Report` for the words. All but `duplicates` add up to what was
    published and not dropped. `unrecognised` are the repeats that no shard knew for such.
    """

    handled: int
    dead_lettered: int
    waiting: int
    lost: int
    not_delivered: int = 0
    duplicates: int
    unrecognised: int = 0


def account(result: DriverResult, totals: Totals, bus_waiting: int) -> Account:
    """Hold the publisher's ledger against the shards' evidence.

    An event that the ledger calls waiting may have been handled since, or lie in a store still: then it is in `bus_waiting`,
    which counts everybody's events. So no more than that many are excused as waiting; what is missing beyond is lost.
    More outcomes than events can only be repeats that no shard recognised: unannounced ones.
    """
    final = result.final
    kept = final.published - final.dropped
    unrecognised = max(0, totals.distinct - kept)
    settled = totals.distinct - unrecognised
    dead = min(totals.dead, settled)
    # What was in flight when the flush gave up may have been handled and not been heard of.
    not_delivered = min(final.in_flight, kept - settled)
    gap = kept - settled - not_delivered
    waiting = min(gap, final.waiting, bus_waiting)
    return Account(
        handled=settled - dead,
        dead_lettered=dead,
        waiting=waiting,
        lost=gap - waiting,
        not_delivered=not_delivered,
        duplicates=totals.repeats + unrecognised,
        unrecognised=unrecognised,
    )


def together(results: Sequence[DriverResult]) -> DriverResult:
    """What several drivers saw, as one: counts and processor time add up, the window is the longest."""
    one = results[0]
    if len(results) == 1:
        return one
    return DriverResult(
        scheduled=None if one.scheduled is None else sum(result.scheduled or 0 for result in results),
        scheduled_s=max(result.scheduled_s for result in results),
        sent=sum(result.sent for result in results),
        window_s=max(result.window_s for result in results),
        before=Counts.sum(result.before for result in results),
        after=Counts.sum(result.after for result in results),
        final=Counts.sum(result.final for result in results),
        flush_s=max(result.flush_s for result in results),
        waited_s=sum(result.waited_s for result in results) / len(results),
        send_lag_us=merged([result.send_lag_us for result in results]),
        cpu_share=sum(result.cpu_share for result in results),
        rss_bytes=sum(result.rss_bytes for result in results),
        replies_us=merged([result.replies_us for result in results]),
        interrupted=any(result.interrupted for result in results),
    )


def totals_of_acks(result: DriverResult) -> Totals:
    """What stands in for evidence where that is gone: what the publishers were told."""
    final = result.final
    return Totals(
        distinct=final.handled + final.dead,
        repeats=0,
        announced=0,
        out_of_order=0,
        missing=0,
        unchecked=0,
        dead=final.dead,
        samples=0,
        latency_us=None,
    )


def totals_of_commands(result: DriverResult) -> Totals:
    """The evidence of commands: they are not in the shards' books, but each has a reply or has not."""
    replies = Histogram(result.replies_us.items())
    return msgspec.structs.replace(
        totals_of_acks(result), samples=replies.total, latency_us=replies.percentiles()
    )


class Absence(msgspec.Struct, frozen=True, kw_only=True):
    """How many times another supervisor answered than before, and the longest time that a question waited in vain."""

    successors: int = 0
    silent_s: float = 0.0


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen beside drivers and evidence; see `Report`.

    `gone`: the bus, before it could be asked for evidence. `cut_short`: an interrupt ended the waiting for what lay in
    stores. `undone`: faults whose time had not come when the load ended.
    """

    gone: bool = False
    cut_short: bool = False
    undone: tuple[str, ...] = ()
    absence: Absence = Absence()
    faults: tuple[FaultRecord, ...] = ()
    processes: tuple[ProcessUse, ...] = ()
    machine_load: MachineLoad | None = None
    unseen: tuple[str, ...] = ()
    shard_latency_us: dict[int, Percentiles] = {}
    intervals: tuple[Interval, ...] = ()


def make_report(
    spec: LoadSpec,
    result: DriverResult,
    totals: Totals,
    bus: BusState,
    *,
    address: str,
    one_clock: bool,
    machine: Machine,
    observed: Observed = Observed(),  # noqa: B008 - frozen
) -> Report:
    """Put a run's figures together and judge them.

    Args:
        result: what the drivers saw.
        totals: the evidence of their publishers, after the flush.
        bus: the state of the bus after the flush.
        one_clock: whether the workers' clock is the driver's; otherwise no latency can be quoted.
        observed: what else was seen.
    """
    books = account(result, totals, result.final.waiting if observed.gone else bus.waiting)
    lag_us = percentiles_us(result.send_lag_us.items())
    window_s = result.window_s
    achieved_rate = (result.after.finished - result.before.finished) / window_s if window_s else 0.0
    offered_rate = spec.rate
    by_count = offered_rate is None or spec.recording is not None or spec.arrivals == "poisson"
    if result.scheduled is not None and by_count:  # the rate is what was due: it is not the same at every moment, or in all
        offered_rate = result.scheduled / result.scheduled_s if result.scheduled_s else 0.0
    judgement = judge(
        Facts(
            lost=books.lost,
            not_delivered=books.not_delivered,
            is_up=all(worker.state == "up" for worker in bus.workers),
            duplicates=books.duplicates,
            redelivered=totals.announced,
            out_of_order=totals.out_of_order,
            gone=observed.gone,
            offered_rate=offered_rate,
            achieved_rate=achieved_rate,
            scheduled=result.scheduled,
            sent=result.sent,
            send_lag_p99_us=0 if lag_us is None else lag_us.p99,
            waited_share=result.waited_s / window_s if window_s else 0.0,
            drivers=spec.drivers,
            commands=spec.commands,
            driver_cpu=result.cpu_share / spec.drivers,
            cpu_count=machine.cpu_count,
            machine_load=observed.machine_load,
        )
    )
    # A command's two instants are both read by its driver, wherever the bus runs.
    one_clock = one_clock or spec.commands
    lost = books.lost + result.final.in_flight
    silence = _why_no_latency(spec, judgement, gone=observed.gone, lost=lost, one_clock=one_clock)
    return Report(
        verdict=judgement.verdict,
        reasons=judgement.reasons,
        notes=(
            *([silence] if silence else []),
            *_notes(result, totals, books, observed),
            *_closed(bus, books.not_delivered),
        ),
        offered_rate=offered_rate,
        achieved_rate=achieved_rate,
        published=result.final.published,
        handled=books.handled,
        dead_lettered=books.dead_lettered,
        lost=books.lost,
        not_delivered=books.not_delivered,
        waiting=books.waiting,
        duplicates=books.duplicates,
        redelivered=totals.announced,
        out_of_order=totals.out_of_order,
        unchecked=totals.unchecked,
        proven=not observed.gone,
        interrupted=result.interrupted or observed.cut_short,
        latency_us=None if silence else totals.latency_us,
        service_us=None if silence else totals.service_us,
        queue_us=None if silence else totals.queue_us,
        latency_samples=totals.samples,
        send_lag_us=lag_us,
        publish_wait_s=result.waited_s,
        flush_s=result.flush_s,
        window_s=window_s,
        generator_cpu=result.cpu_share,
        generator_rss_bytes=result.rss_bytes,
        load=spec,
        address=address,
        workers=bus.workers,
        faults=observed.faults,
        processes=observed.processes,
        shard_latency_us={} if silence else observed.shard_latency_us,
        intervals=_without_latency(observed.intervals) if silence else observed.intervals,
        machine=machine,
        machine_load=observed.machine_load,
    )


def _without_latency(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """What would mislead as a whole would mislead by the second, too."""
    no_times = {"latency_us": None, "service_p99_us": None, "queue_p99_us": None}
    return tuple(msgspec.structs.replace(interval, **no_times) for interval in intervals)


def _why_no_latency(spec: LoadSpec, judgement: Judgement, *, gone: bool, lost: int, one_clock: bool) -> str:
    """Why a run quotes no latency; empty where it does."""
    if not spec.is_paced:
        return "no latency: at full speed it is the length of the queues, and says nothing of the bus"
    if judgement.verdict in ("generator-bound", "saturated"):
        return f"no latency: the run is {judgement.verdict}"
    if gone:
        return "no latency: the bus that had measured it is gone"
    if lost:
        return "no latency: the events that never arrived would have been the slowest"
    if not one_clock:
        return "no latency: the bus runs on another host, whose clock is another"
    return ""


def _closed(bus: BusState, not_delivered: int) -> Sequence[str]:
    """Why a shard takes nothing, where it has no worker, or may have had no room for this publisher."""
    notes = [
        f"shard {worker.shard} was {worker.state} at the end: nothing of its keys is handled until it has a worker"
        for worker in bus.workers
        if worker.state in ("down", "given-up")
    ]
    notes += [
        f"shard {worker.shard} had {worker.publishers:,} publishers at the end, and takes no other until one has finished"
        for worker in bus.workers
        if not_delivered and worker.publishers >= PUBLISHERS_MAX
    ]
    return notes


def _notes(result: DriverResult, totals: Totals, books: Account, observed: Observed) -> Sequence[str]:
    notes = []
    absence = observed.absence
    if absence.successors:
        times = "once" if absence.successors == 1 else f"{absence.successors:,} times"
        notes.append(f"the bus was served anew {times} during the run")
    if absence.silent_s and not observed.gone:
        notes.append(f"the bus' supervisor did not answer for {absence.silent_s:.1f} s")
    if observed.cut_short:
        notes.append("an interrupt ended the waiting for events that lay in stores")
    notes += [f"{fault} was not done: the load had ended" for fault in observed.undone]
    if observed.unseen:
        notes.append(f"not always seen, so their processor time and memory may be too low: {', '.join(observed.unseen)}")
    if totals.unchecked:
        notes.append(
            f"{_events(totals.unchecked)} could not be checked for order and repeats: there were more keys than the shards "
            "remember"
        )
    final = result.final
    if books.unrecognised and totals.dead:
        notes.append(
            f"the dead letters are not exact: {books.unrecognised:,} outcomes were more than there were events, and nobody "
            "knows whether those were among them"
        )
    elif not (books.lost or final.waiting or final.in_flight) and final.dead != totals.dead:
        notes.append(
            f"by the acks, which tell the last outcome, {_events(final.dead)} became dead letters, and by the first "
            f"{totals.dead:,}: some came again after their worker had ended, and ended otherwise"
        )
    measured = sum(result.send_lag_us.values())
    unmeasured = measured - totals.samples
    if not observed.gone and unmeasured > totals.dead + result.final.in_flight + result.final.waiting:
        notes.append(f"{unmeasured:,} of {measured:,} events of the measured window have no latency")
    return notes
