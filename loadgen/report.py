"""What a run comes to: the figures, and the verdict on them. Pure; the terminal and the files are `cli`'s.

`published` and all counts of outcomes are of the whole run, warm-up included, because a lost event is lost at any time.
Rates, latency and send lag are of the measured window alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from loadgen.histogram import Percentiles, percentiles_us
from loadgen.machine import Machine
from loadgen.spec import Call, DriverResult, LoadSpec

Verdict = Literal["ok", "failed", "generator-bound", "saturated"]

EXIT_CODES: Final[dict[Verdict, int]] = {"ok": 0, "failed": 1, "generator-bound": 3, "saturated": 4}
EXIT_USAGE: Final = 2

ACHIEVED_MIN: Final = 0.99  # of the offered rate; below it, somebody did not keep up
SEND_LAG_P99_US_MAX: Final = 5_000  # above it, the generator was not on time, and its latencies would be its own
WAITED_SHARE_MAX: Final = 0.01  # of the window, spent waiting for room; above it, the bus may have made sending late
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


# -- the verdict


class Judgement(msgspec.Struct, frozen=True):
    """A verdict, and why, in sentences for people; ok needs no reason."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that a verdict rests on.

    Of the whole run: `lost`, `in_flight` (published and not finished when the flush gave up), `duplicates`, `redelivered`,
    `out_of_order`. Of the window: the offered and the achieved rate in events per second (offered None: unpaced), how many
    events were `scheduled` and `sent`, the 99th percentile of the send lag, and the share of the time that publish waited
    for room.
    """

    lost: int
    in_flight: int
    duplicates: int
    redelivered: int
    out_of_order: int
    offered_rate: float | None
    achieved_rate: float
    scheduled: int | None
    sent: int
    send_lag_p99_us: int
    waited_share: float


def judge(facts: Facts) -> Judgement:
    """The verdict on a run. What broke a promise comes first, then the bus that was too slow, then the generator.

    An unpaced run offers no rate, so it can only be ok or failed.
    """
    broken = _broken_promises(facts)
    if broken:
        return Judgement("failed", tuple(broken))
    if facts.offered_rate is None or facts.scheduled is None:
        return Judgement("ok")
    late = _lateness(facts)
    slow = facts.achieved_rate < ACHIEVED_MIN * facts.offered_rate
    achieved = f"{facts.achieved_rate:,.0f} of {facts.offered_rate:,.0f} events/s were finished in the measured window"
    if late and _is_generators_fault(facts, facts.scheduled):
        return Judgement("generator-bound", (late, "one driver process cannot offer this rate here"))
    if late:
        waited = f"publish waited for room {facts.waited_share:.0%} of the time"
        return Judgement("saturated", (waited, late, achieved))
    if slow:
        return Judgement("saturated", (achieved,))
    return Judgement("ok")


def _broken_promises(facts: Facts) -> list[str]:
    reasons = []
    if facts.lost:
        reasons.append(f"{facts.lost:,} events were acknowledged, and nothing shows that they were ever handled")
    if facts.in_flight:
        reasons.append(f"{facts.in_flight:,} events were not finished when the time for the flush was up")
    if facts.out_of_order:
        reasons.append(f"{facts.out_of_order:,} events were handled after a later one of their key")
    if facts.duplicates != facts.redelivered:
        unannounced = facts.duplicates - facts.redelivered
        reasons.append(f"{unannounced:,} of {facts.duplicates:,} repeats were not announced as redelivered")
    return reasons


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
    `not_delivered`: not finished when the flush gave up. `waiting`: still in a store, at most. `duplicates`: all
    repeats; `redelivered`: those that said so. `unchecked`: events of keys that the shards no longer remembered.
    `latency_us` runs from the intended instant to the end of the handler, and is null where it would mislead; `notes` say
    why.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
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
    latency_us: Percentiles | None
    latency_samples: int
    send_lag_us: Percentiles | None
    publish_wait_s: float
    flush_s: float
    window_s: float
    generator_cpu: float
    generator_rss_bytes: int
    duration_s: float
    warmup_s: float
    keys: int | Literal["unique"]
    payload_bytes: int
    call: Call
    seed: int
    address: str
    workers: tuple[WorkerState, ...]
    machine: Machine

    @property
    def exit_code(self) -> int:
        """What the process that made the run ends with."""
        return EXIT_CODES[self.verdict]


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Where the published events are, by the evidence; see `Report` for the words."""

    handled: int
    dead_lettered: int
    waiting: int
    lost: int
    duplicates: int


def account(result: DriverResult, totals: Totals, bus_waiting: int) -> Account:
    """Hold the publisher's ledger against the shards' evidence.

    An event that the ledger calls waiting may have been handled since, or lie in a store still: then it is in `bus_waiting`,
    which counts everybody's events. So no more than that many are excused as waiting; what is missing beyond is lost.
    More outcomes than events can only be repeats that no shard recognised: unannounced ones.
    """
    final = result.final
    gap = final.published - final.dropped - final.in_flight - totals.distinct
    waiting = min(max(0, gap), final.waiting, bus_waiting)
    # What was in flight when the flush gave up may have been handled and not been heard of.
    surplus = max(0, totals.distinct - (final.published - final.dropped))
    return Account(
        handled=totals.distinct - totals.dead - surplus,
        dead_lettered=totals.dead,
        waiting=waiting,
        lost=max(0, gap) - waiting,
        duplicates=totals.repeats + surplus,
    )


def make_report(
    spec: LoadSpec,
    result: DriverResult,
    totals: Totals,
    bus: BusState,
    *,
    address: str,
    one_clock: bool,
    machine: Machine,
) -> Report:
    """Put a run's figures together and judge them.

    Args:
        result: what the driver saw.
        totals: the evidence of its publisher, after the flush.
        bus: the state of the bus after the flush.
        one_clock: whether the workers' clock is the driver's; otherwise no latency can be quoted.
    """
    books = account(result, totals, bus.waiting)
    lag_us = percentiles_us(result.send_lag_us.items())
    achieved_rate = (result.after.finished - result.before.finished) / result.window_s if result.window_s else 0.0
    judgement = judge(
        Facts(
            lost=books.lost,
            in_flight=result.final.in_flight,
            duplicates=books.duplicates,
            redelivered=totals.announced,
            out_of_order=totals.out_of_order,
            offered_rate=spec.rate,
            achieved_rate=achieved_rate,
            scheduled=result.scheduled,
            sent=result.sent,
            send_lag_p99_us=0 if lag_us is None else lag_us.p99,
            waited_share=result.waited_s / result.window_s if result.window_s else 0.0,
        )
    )
    silence = _why_no_latency(spec, judgement, lost=books.lost + result.final.in_flight, one_clock=one_clock)
    return Report(
        verdict=judgement.verdict,
        reasons=judgement.reasons,
        notes=(*([silence] if silence else []), *_notes(result, totals)),
        offered_rate=spec.rate,
        achieved_rate=achieved_rate,
        published=result.final.published,
        handled=books.handled,
        dead_lettered=books.dead_lettered,
        lost=books.lost,
        not_delivered=result.final.in_flight,
        waiting=books.waiting,
        duplicates=books.duplicates,
        redelivered=totals.announced,
        out_of_order=totals.out_of_order,
        unchecked=totals.unchecked,
        latency_us=None if silence else totals.latency_us,
        latency_samples=totals.samples,
        send_lag_us=lag_us,
        publish_wait_s=result.waited_s,
        flush_s=result.flush_s,
        window_s=result.window_s,
        generator_cpu=result.cpu_share,
        generator_rss_bytes=result.rss_bytes,
        duration_s=spec.duration_s,
        warmup_s=spec.warmup_s,
        keys="unique" if spec.keys is None else spec.keys,
        payload_bytes=spec.payload_bytes,
        call=spec.call,
        seed=spec.seed,
        address=address,
        workers=bus.workers,
        machine=machine,
    )


def _why_no_latency(spec: LoadSpec, judgement: Judgement, *, lost: int, one_clock: bool) -> str:
    """Why a run quotes no latency; empty where it does."""
    if spec.rate is None:
        return "no latency: at full speed it is the length of the queues, and says nothing of the bus"
    if judgement.verdict in ("generator-bound", "saturated"):
        return f"no latency: the run is {judgement.verdict}"
    if lost:
        return "no latency: the events that never arrived would have been the slowest"
    if not one_clock:
        return "no latency: the bus runs on another host, whose clock is another"
    return ""


def _notes(result: DriverResult, totals: Totals) -> Sequence[str]:
    notes = []
    if totals.unchecked:
        notes.append(
            f"{totals.unchecked:,} events could not be checked for order and repeats: their keys were more than the shards "
            "remember"
        )
    measured = sum(result.send_lag_us.values())
    unmeasured = measured - totals.samples
    if unmeasured > totals.dead + result.final.in_flight + result.final.waiting:
        notes.append(f"{unmeasured:,} of {measured:,} events of the measured window have no latency")
    return notes


def rows_of(report: Report) -> list[tuple[str, str]]:
    """The report for people: captions and values."""
    rate = "max" if report.offered_rate is None else f"{report.offered_rate:,.0f}/s"
    keys = report.keys if isinstance(report.keys, str) else f"{report.keys:,}"
    rows = [
        ("load", f"{rate} for {report.duration_s:g} s after {report.warmup_s:g} s, {keys} keys, {report.call}"),
        ("bus", f"{report.address}, workers: {len(report.workers)}"),
        ("achieved", f"{report.achieved_rate:,.0f}/s"),
        ("published", f"{report.published:,}"),
        ("handled", f"{report.handled:,}"),
        ("dead letters", f"{report.dead_lettered:,}"),
        ("lost", f"{report.lost:,}"),
        ("repeats", f"{report.duplicates:,}, announced: {report.redelivered:,}"),
        ("out of order", f"{report.out_of_order:,}"),
    ]
    if report.waiting or report.not_delivered:
        rows.append(("unfinished", f"waiting in a store: {report.waiting:,}, not delivered: {report.not_delivered:,}"))
    rows.append(("latency", _shown(report.latency_us)))
    if report.send_lag_us is not None:
        rows.append(("send lag", _shown(report.send_lag_us)))
    rows.append(("generator", f"{report.generator_cpu:.0%} of a core, {report.generator_rss_bytes / 1e6:,.0f} MB"))
    restarts = sum(worker.restarts for worker in report.workers)
    if restarts:
        rows.append(("restarts", f"{restarts:,} since the bus started"))
    machine = report.machine
    rows.append(("machine", f"{machine.cpu_count} × {machine.cpu_model}, Python {machine.python}"))
    rows.extend(("note", note) for note in report.notes)
    rows.append(("verdict", "; ".join((report.verdict, *report.reasons))))
    return rows


def _shown(percentiles: Percentiles | None) -> str:
    if percentiles is None:
        return "–"
    names = {"p50": "p50", "p90": "p90", "p99": "p99", "p99_9": "p99.9", "max": "max"}
    return "  ".join(f"{shown} {getattr(percentiles, field) / 1000:,.3f} ms" for field, shown in names.items())
