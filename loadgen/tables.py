"""A report for people and for other programs: rows of a table, CSV. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from loadgen.expect import Outcome, shown
from loadgen.histogram import Percentiles
from loadgen.pacer import Stage
from loadgen.report import FaultRecord, Interval, ProcessUse, Report
from loadgen.spec import LoadSpec, Payload

NAMES = {"p50": "p50", "p90": "p90", "p99": "p99", "p99_9": "p99.9", "max": "max"}


def rows_of(report: Report) -> list[tuple[str, str]]:
    """The report for people: captions and values; the verdict is the last row."""
    rate = "" if report.offered_rate is None else f"{report.offered_rate:,.0f}/s offered, "
    rows = [
        ("load", load_text(report.load)),
        ("bus", f"{report.address}, workers: {len(report.workers)}"),
        ("rate", f"{rate}{report.achieved_rate:,.0f}/s achieved"),
        ("published", f"{report.published:,}"),
        ("handled", f"{report.handled:,}"),
        ("dead letters" if not report.load.commands else "failed", f"{report.dead_lettered:,}"),
        ("lost", f"{report.lost:,}" if report.proven else "–"),
    ]
    if not report.load.commands:
        rows += [
            ("repeats", f"{report.duplicates:,}, announced: {report.redelivered:,}" if report.proven else "–"),
            ("out of order", f"{report.out_of_order:,}" if report.proven else "–"),
        ]
    if report.waiting or report.not_delivered:
        rows.append(("unfinished", f"waiting in a store: {report.waiting:,}, not delivered: {report.not_delivered:,}"))
    rows.append(("response time", times(report.latency_us)))
    if not report.load.commands:  # whose beginnings nobody tells
        rows += [("service time", times(report.service_us)), ("queue time", times(report.queue_us))]
    if report.send_lag_us is not None:
        rows.append(("send lag", times(report.send_lag_us)))
    rows += [("fault", _fault(fault)) for fault in report.faults]
    rows += [("process", _process(use)) for use in report.processes]
    restarts = sum(worker.restarts for worker in report.workers)
    if restarts:
        rows.append(("restarts", f"{restarts:,} since the bus started"))
    machine = report.machine
    rows.append(("machine", f"{machine.cpu_count} × {machine.cpu_model}, Python {machine.python}"))
    if (load := report.machine_load) is not None:
        rows.append(("load average", f"{load.load_average:.1f}; cores {load.busy:.0%} busy, {load.stolen:.0%} stolen"))
    rows += [("note", note) for note in report.notes]
    rows += [(_passed(outcome), shown(outcome)) for outcome in report.expectations]
    cut_short = (f"interrupted after {report.window_s:,.1f} s that were measured",) if report.interrupted else ()
    rows.append(("verdict", "; ".join((report.verdict, *report.reasons, *cut_short))))
    return rows


def _passed(outcome: Outcome) -> str:
    if outcome.measured is None:
        return "----"  # neither; an ok run fails for it all the same
    return "PASS" if outcome.met else "FAIL"


def load_text(spec: LoadSpec) -> str:
    """What is asked of a run, in a line."""
    parts = [_rate(spec), _keys(spec)]
    if spec.payload != Payload():
        parts.append(_payload(spec.payload))
    if spec.recording is not None:
        parts[1:] = [f"{spec.recording.path} as {spec.recording.type} by {spec.recording.key}"]
    elif spec.template is not None:
        parts.append(f"{spec.template.type} by {spec.template.key}")
    parts.append("execute" if spec.commands else spec.call)
    if spec.drivers > 1:
        parts.append(f"drivers: {spec.drivers}")
    return ", ".join(parts)


def _rate(spec: LoadSpec) -> str:
    if spec.recording is not None and spec.recording.speed is not None:
        return f"at its own times × {spec.recording.speed:g}"
    if spec.stages:
        rate = ", ".join(map(_stage, spec.stages))
    else:
        rate = "max" if spec.rate is None else f"{spec.rate:,.0f}/s"
        rate += "" if spec.duration_s is None else f" for {spec.duration_s:g} s"
    warm_up = f" after {spec.warmup_s:g} s" if spec.warmup_s else ""
    return f"{rate}{warm_up}{', Poisson arrivals' if spec.arrivals == 'poisson' else ''}"


def _stage(stage: Stage) -> str:
    ramp = "" if stage.to is None else f"–{stage.to:,.0f}"
    return f"{stage.rate:,.0f}{ramp}/s for {stage.seconds:g} s"


def _keys(spec: LoadSpec) -> str:
    keys = "unique" if spec.keys is None else f"{spec.keys:,}"
    skew = {"uniform": "", "zipf": f", zipf({spec.skew.by:g})", "hot": f", one of them hot ({spec.skew.by:.0%})"}
    return f"{keys} keys{skew[spec.skew.kind]}"


def _payload(payload: Payload) -> str:
    match payload.kind:
        case "fixed":
            return f"{payload.low:,} bytes"
        case "uniform":
            return f"{payload.low:,}–{payload.high:,} bytes"
        case "lognormal":
            return f"lognormal bytes, median {payload.low:,}, sigma {payload.sigma:g}"


def _fault(fault: FaultRecord) -> str:
    if fault.fault.startswith("stop"):
        return f"{fault.fault}, shard {fault.shard}, at {fault.at_s:.1f} s"
    over = "no recovery seen" if fault.recovery_s is None else f"handled again after {fault.recovery_s:.3f} s"
    return f"{fault.fault}, shard {fault.shard}, at {fault.at_s:.1f} s: {over}"


def _process(use: ProcessUse) -> str:
    share = "–" if use.cpu_share is None else f"{use.cpu_share:.0%}"
    return f"{use.name}: {share} of a core, {use.rss_bytes / 1e6:,.0f} MB"


def times(percentiles: Percentiles | None) -> str:
    """Percentiles in milliseconds."""
    if percentiles is None:
        return "–"
    return "  ".join(f"{shown_as} {getattr(percentiles, name) / 1000:,.3f} ms" for name, shown_as in NAMES.items())


_COLUMNS = ("at_s", "warming_up", "offered_rate", "achieved_rate")
_P99S = ("service_p99_us", "queue_p99_us", "send_lag_p99_us")
_COUNTS = ("published", "handled", "dead", "waiting", "dropped", "in_flight")


def csv_of(intervals: Sequence[Interval]) -> str:
    """The time series, a line an interval: times in microseconds, memory in bytes, empty where nothing was measured."""
    shards = max((len(interval.backlog) for interval in intervals), default=0)
    processes = list(dict.fromkeys(use.name for interval in intervals for use in interval.processes))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [f"{name.replace(' ', '_')}_{what}" for name in processes for what in ("cpu", "rss_bytes")]
    latencies = [f"{name}_us" for name in NAMES]
    backlogs = [f"backlog_{shard}" for shard in range(shards)]
    writer.writerow([*_COLUMNS, *_COUNTS, *latencies, *_P99S, "stored", *backlogs, *heads])
    for interval in intervals:
        uses = {use.name: use for use in interval.processes}
        backlog = [*interval.backlog, *[""] * (shards - len(interval.backlog))]
        latency = [None if interval.latency_us is None else getattr(interval.latency_us, name) for name in NAMES]
        p99s = [getattr(interval, name) for name in _P99S]
        used = [getattr(uses.get(name), what, None) for name in processes for what in ("cpu_share", "rss_bytes")]
        row = [getattr(interval, name) for name in _COLUMNS] + [getattr(interval.counts, name) for name in _COUNTS]
        row = [f"{cell:.3f}" if isinstance(cell, float) else int(cell) if isinstance(cell, bool) else cell for cell in row]
        shares = [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in used]
        writer.writerow([*row, *latency, *p99s, interval.waiting, *backlog, *shares])
    return out.getvalue()
