"""Targets of the benchmarks: what passes, and why one failed."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import msgspec
import pytest

from benchmarks import scenarios
from benchmarks.scenarios import at_least, at_most_us, counted, latency_checks, show, sound
from loadgen.histogram import Percentiles
from loadgen.machine import Machine
from loadgen.report import Report
from loadgen.spec import LoadError, LoadSpec

REPORT = Report(
    verdict="ok",
    reasons=(),
    notes=(),
    offered_rate=20_000.0,
    achieved_rate=20_000.0,
    published=1,
    handled=1,
    dead_lettered=0,
    lost=0,
    not_delivered=0,
    waiting=0,
    duplicates=0,
    redelivered=0,
    out_of_order=0,
    unchecked=0,
    latency_us=Percentiles(p50=100, p90=150, p99=900, p99_9=950, max=999),
    latency_samples=1,
    send_lag_us=None,
    publish_wait_s=0.0,
    flush_s=0.0,
    window_s=1.0,
    generator_cpu=0.1,
    generator_rss_bytes=1,
    load=LoadSpec(rate=20_000.0),
    address="ipc:///run/bus",
    workers=(),
    machine=Machine(cpu_count=2, cpu_model="a processor", system="Linux", python="3.11", versions={}),
)


@pytest.mark.parametrize(("found", "wanted", "passed"), [(0, 0, True), (1, 0, False), (5, 5, True), (4, 5, False)])
def test_a_count_is_exact_or_it_fails(found: int, wanted: int, passed: bool) -> None:
    assert counted("lost", found, wanted).passed == passed
    assert counted("lost", 0).passed


def test_a_time_that_was_measured_is_held_against_its_bound() -> None:
    assert [check.passed for check in latency_checks([REPORT], p99_us_max=899)] == [True, True, False]
    assert at_most_us("p99", 900, 899, why="not asked for").why == ""


def test_a_latency_that_was_refused_fails_and_says_why() -> None:
    refused = msgspec.structs.replace(
        REPORT, verdict="generator-bound", latency_us=None, notes=("no latency: the run is generator-bound",)
    )
    run, p50, p99 = latency_checks([REPORT, refused], p99_us_max=1000)
    assert run.name.endswith(", run 2")
    assert [check.passed for check in (run, p50, p99)] == [False, True, False]  # of the second, only the aim is missed
    assert not p50.aim_reached
    assert (p50.measured, p50.why) == ("not measured", "the run is generator-bound")


def test_a_generator_that_was_late_spoils_a_latency_and_nothing_that_is_counted() -> None:
    late = msgspec.structs.replace(REPORT, verdict="generator-bound")
    assert (sound("run", late).passed, sound("run", late, punctual=False).passed) == (False, True)
    assert not sound("run", msgspec.structs.replace(late, achieved_rate=19_700.0), punctual=False).passed
    for verdict in ("failed", "saturated"):
        assert not sound("run", msgspec.structs.replace(REPORT, verdict=verdict), punctual=False).passed


@pytest.mark.parametrize(
    ("aims", "exit_code", "last"), [(False, 0, "PASS; 1 of 2 aims reached"), (True, 1, "FAIL; 1 of 2 aims reached")]
)
def test_an_aim_that_was_missed_is_told_and_fails_only_where_aims_are_to_decide(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    aims: bool,
    exit_code: int,
    last: str,
) -> None:
    monkeypatch.setattr(scenarios, "RESULTS", tmp_path)
    checks = [
        at_least("events finished", 700_000, 125_530, aim=1_000_000),
        at_most_us("latency p50", 200, None, aim_us=250),
        counted("lost", 0),
    ]
    assert show("a benchmark", checks, (), aims=aims) == exit_code
    said = capsys.readouterr().out
    assert "aim: ≥ 1,000,000, missed" in said
    assert "aim: ≤ 0.250 ms, reached" in said
    assert ("MISS: events finished: 700,000 events/s, aimed at ≥ 1,000,000" in said) == aims
    (row,) = [line for line in said.splitlines() if "  ≥ 125,530  " in line]
    assert row.startswith("MISS  events finished" if aims else "PASS  events finished")
    assert said.splitlines()[-1] == last


def test_a_target_that_was_missed_fails_whatever_was_aimed_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scenarios, "RESULTS", tmp_path)
    late = at_most_us("latency p99", None, 10_000, aim_us=1000, why="the run is generator-bound")
    assert show("a benchmark", [late, counted("lost", 0)], ()) == 1
    said = capsys.readouterr().out
    assert "aim: ≤ 1.000 ms, not measured" in said
    assert "FAIL: latency p99: not measured, wanted ≤ 10.000 ms (the run is generator-bound)" in said
    assert said.splitlines()[-1] == "FAIL; 1 of 2 targets missed; 0 of 1 aims reached"


@pytest.mark.parametrize(("bound", "runs"), [(0, 1), (1, 2), (9, 3)])
def test_a_paced_run_whose_generator_was_late_is_done_again_and_a_few_times_only(
    monkeypatch: pytest.MonkeyPatch, bound: int, runs: int
) -> None:
    late = msgspec.structs.replace(REPORT, verdict="generator-bound", reasons=("busy",))
    found = iter([late] * bound + [REPORT])

    async def run(_: LoadSpec) -> Report:
        return next(found)

    monkeypatch.setattr(scenarios, "run_async", run)
    reports = asyncio.run(scenarios.paced("ipc:///run/bus", 1.0))
    assert [report.verdict for report in reports] == (["generator-bound"] * bound + ["ok"])[:runs]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x", ""])
def test_an_option_that_is_no_number_above_0_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="no number above 0"):
        scenarios.positive(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "²", "x", ""])
def test_an_option_that_is_no_whole_number_above_0_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="no whole number above 0"):
        scenarios.at_least_one(text)


def test_options_above_0_are_taken():
    assert (scenarios.positive("0.5"), scenarios.at_least_one("12")) == (0.5, 12)


def test_what_drifts_falls_out_of_a_ratio_of_pairs():
    assert scenarios.median_ratio([11.0, 33.0, 2.2], [10.0, 30.0, 2.0]) == pytest.approx(1.1)


async def test_a_client_that_does_not_end_in_time_is_an_error_with_words():
    arguments = ["http.server", "--bind", "127.0.0.1", "0"]  # says nothing to a pipe, and never ends
    with pytest.raises(LoadError, match="no figure"):
        await scenarios.figure_of(Percentiles, arguments, timeout_s=0.01, nothing="no figure")
