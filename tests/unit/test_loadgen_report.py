"""The report: where every event is, and the verdict, with each way to fail."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from loadgen.histogram import Percentiles
from loadgen.machine import Machine, shares_clock, this_machine
from loadgen.report import (
    EXIT_CODES,
    Account,
    BusState,
    Facts,
    Report,
    Totals,
    Verdict,
    WorkerState,
    account,
    judge,
    make_report,
)
from loadgen.spec import Counts, DriverResult, LoadSpec
from loadgen.tables import rows_of

FAST = Percentiles(p50=100, p90=150, p99=200, p99_9=250, max=300)
MACHINE = Machine(cpu_count=2, cpu_model="a processor", system="Linux", python="3.11", versions={})


def facts(**changes: Any) -> Facts:
    """A run that went well, but for the changes."""
    well = {
        "lost": 0,
        "in_flight": 0,
        "duplicates": 0,
        "redelivered": 0,
        "out_of_order": 0,
        "offered_rate": 20_000.0,
        "achieved_rate": 20_000.0,
        "scheduled": 200_000,
        "sent": 200_000,
        "send_lag_p99_us": 300,
        "waited_share": 0.0,
    }
    return Facts(**{**well, **changes})


VERDICTS: list[tuple[str, dict[str, Any], Verdict, str]] = [
    ("all well", {}, "ok", ""),
    ("a lost event", {"lost": 1}, "failed", "1 events were acknowledged, and nothing shows"),
    ("an event that was not finished", {"in_flight": 2}, "failed", "2 events were not finished"),
    ("an event overtaken", {"out_of_order": 3}, "failed", "3 events were handled after a later one"),
    ("an unannounced repeat", {"duplicates": 5, "redelivered": 4}, "failed", "1 of 5 repeats were not announced"),
    ("announced repeats are what a crash costs", {"duplicates": 5, "redelivered": 5}, "ok", ""),
    ("just enough achieved", {"achieved_rate": 19_800.0}, "ok", ""),
    ("too little achieved", {"achieved_rate": 19_799.0}, "saturated", "19,799 of 20,000 events/s"),
    ("the send lag at its bound", {"send_lag_p99_us": 5_000}, "ok", ""),
    ("late, and the bus had room", {"send_lag_p99_us": 5_001}, "generator-bound", "the send lag's p99 is 5.0 ms"),
    ("unsent, and the bus had room", {"sent": 197_999}, "generator-bound", "197,999 of 200,000 events were sent"),
    (
        "late, because the bus had no room",
        {"send_lag_p99_us": 900_000, "waited_share": 0.4},
        "saturated",
        "publish waited for room 40% of the time",
    ),
    ("unsent, because the bus had no room", {"sent": 90_000, "waited_share": 0.9}, "saturated", "90%"),
    ("a bus that was full for a moment only", {"waited_share": 0.3}, "ok", ""),
    (
        "a late generator is not excused by a bus that it kept idle",
        {"send_lag_p99_us": 80_000, "achieved_rate": 15_000.0, "waited_share": 0.01},
        "generator-bound",
        "one driver process cannot offer",
    ),
    (
        "a generator that waits now and then, and is far too slow besides",
        {"sent": 90_000, "waited_share": 0.05},
        "generator-bound",
        "90,000 of 200,000",
    ),
    (
        "a bus that stops takes what fits and no more, while the generator is on time",
        {"sent": 65_536, "waited_share": 0.67, "achieved_rate": 0.0},
        "saturated",
        "0 of 20,000 events/s",
    ),
    ("a broken promise outweighs saturation", {"lost": 1, "waited_share": 1.0, "sent": 5}, "failed", "1 events"),
    (
        "unpaced, nothing is offered, so nothing is late",
        {"offered_rate": None, "scheduled": None, "waited_share": 0.9, "send_lag_p99_us": 0},
        "ok",
        "",
    ),
    ("unpaced, promises hold all the same", {"offered_rate": None, "scheduled": None, "lost": 7}, "failed", "7 events"),
]


@pytest.mark.parametrize(
    ("changes", "verdict", "said"), [row[1:] for row in VERDICTS], ids=[row[0] for row in VERDICTS]
)
def test_verdict(changes: dict[str, Any], verdict: Verdict, said: str) -> None:
    judgement = judge(facts(**changes))
    assert judgement.verdict == verdict
    assert said in "; ".join(judgement.reasons)
    assert bool(judgement.reasons) == (verdict != "ok")


def test_every_broken_promise_is_named() -> None:
    judgement = judge(facts(lost=1, in_flight=1, out_of_order=1, duplicates=1))
    assert len(judgement.reasons) == 4


def test_exit_codes_are_as_documented() -> None:
    assert EXIT_CODES == {"ok": 0, "failed": 1, "generator-bound": 3, "saturated": 4}


def counts(published: int = 0, **others: int) -> Counts:
    fields = {"handled": 0, "dead": 0, "waiting": 0, "dropped": 0, "in_flight": 0, **others}
    return Counts(published=published, **fields)


def result(final: Counts, **changes: Any) -> DriverResult:
    ran = {
        "scheduled": 100,
        "sent": 100,
        "window_s": 1.0,
        "before": counts(20, handled=20),
        "after": counts(120, handled=120),
        "final": final,
        "flush_s": 0.01,
        "waited_s": 0.0,
        "send_lag_us": {80: 60, 120: 40},
        "cpu_share": 0.25,
        "rss_bytes": 50_000_000,
    }
    return DriverResult(**{**ran, **changes})


def totals(distinct: int, **others: Any) -> Totals:
    fields = dict.fromkeys(("repeats", "announced", "out_of_order", "missing", "unchecked", "dead", "samples"), 0)
    return Totals(distinct=distinct, latency_us=FAST, **{**fields, **others})


ACCOUNTS: list[tuple[str, Counts, Totals, int, Account]] = [
    (
        "all handled",
        counts(120, handled=120),
        totals(120),
        0,
        Account(handled=120, dead_lettered=0, waiting=0, lost=0, duplicates=0),
    ),
    (
        "some became dead letters",
        counts(120, handled=110, dead=10),
        totals(120, dead=10),
        0,
        Account(handled=110, dead_lettered=10, waiting=0, lost=0, duplicates=0),
    ),
    (
        "acked as handled, and no shard knows of it",
        counts(120, handled=120),
        totals(119),
        0,
        Account(handled=119, dead_lettered=0, waiting=0, lost=1, duplicates=0),
    ),
    (
        "acked as waiting, and still in a store",
        counts(120, handled=100, waiting=20),
        totals(105),
        15,
        Account(handled=105, dead_lettered=0, waiting=15, lost=0, duplicates=0),
    ),
    (
        "acked as waiting, and in no store",
        counts(120, handled=100, waiting=20),
        totals(105),
        4,
        Account(handled=105, dead_lettered=0, waiting=4, lost=11, duplicates=0),
    ),
    (
        "others' waiting events excuse nothing",
        counts(120, handled=120),
        totals(110),
        500,
        Account(handled=110, dead_lettered=0, waiting=0, lost=10, duplicates=0),
    ),
    (
        "in flight is not lost",
        counts(120, handled=100, in_flight=20),
        totals(105),
        0,
        Account(handled=105, dead_lettered=0, waiting=0, lost=0, duplicates=0),
    ),
    (
        "dropped by a policy that was chosen is not lost",
        counts(120, handled=100, dropped=20),
        totals(100),
        0,
        Account(handled=100, dead_lettered=0, waiting=0, lost=0, duplicates=0),
    ),
    (
        "more outcomes than events are repeats that nobody recognised",
        counts(120, handled=120),
        totals(123, repeats=2, announced=2),
        0,
        Account(handled=120, dead_lettered=0, waiting=0, lost=0, duplicates=5),
    ),
]


@pytest.mark.parametrize(
    ("final", "evidence", "bus_waiting", "expected"), [row[1:] for row in ACCOUNTS], ids=[row[0] for row in ACCOUNTS]
)
def test_account(final: Counts, evidence: Totals, bus_waiting: int, expected: Account) -> None:
    assert account(result(final), evidence, bus_waiting) == expected


WORKER = WorkerState(shard=0, pid=1, restarts=0, handled=120, backlog=0, rss_bytes=60_000_000)
ALL_WELL = (result(counts(120, handled=120)), totals(120, samples=100))


def report(ran: DriverResult, evidence: Totals, *, rate: float | None = 100.0, one_clock: bool = True) -> Report:
    return make_report(
        LoadSpec(rate=rate),
        ran,
        evidence,
        BusState(workers=(WORKER,), waiting=0),
        address="ipc:///run/bus",
        one_clock=one_clock,
        machine=MACHINE,
    )


def test_a_good_run_quotes_its_latency() -> None:
    found = report(*ALL_WELL)
    assert (found.verdict, found.exit_code, found.latency_us) == ("ok", 0, FAST)
    assert found.achieved_rate == 100.0
    assert found.send_lag_us == Percentiles(p50=80, p90=120, p99=120, p99_9=120, max=120)
    assert not found.notes


NO_LATENCY: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("saturated", {"after": counts(80, handled=80)}, {}, "the run is saturated"),
    ("generator-bound", {"send_lag_us": {9000: 100}}, {}, "the run is generator-bound"),
    ("not finished", {"final": counts(120, handled=119, in_flight=1)}, {}, "would have been the slowest"),
    ("lost", {"final": counts(121, handled=121)}, {}, "would have been the slowest"),
    ("another host", {}, {"one_clock": False}, "another host"),
    ("unpaced", {"scheduled": None, "send_lag_us": {}}, {"rate": None}, "the length of the queues"),
]


@pytest.mark.parametrize(
    ("changes", "options", "said"), [row[1:] for row in NO_LATENCY], ids=[row[0] for row in NO_LATENCY]
)
def test_no_latency_is_quoted_where_it_would_mislead(
    changes: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    good, evidence = ALL_WELL
    found = report(msgspec.structs.replace(good, **changes), evidence, **options)
    assert found.latency_us is None
    assert said in found.notes[0]


def test_events_without_a_latency_are_said() -> None:
    good, _ = ALL_WELL
    assert report(good, totals(120, samples=90)).notes == ("10 of 100 events of the measured window have no latency",)


def test_keys_that_the_shards_forgot_are_said() -> None:
    good, _ = ALL_WELL
    found = report(good, totals(120, samples=100, unchecked=7))
    assert (found.unchecked, found.verdict) == (7, "ok")
    assert "7 events could not be checked" in found.notes[0]


def test_the_json_has_the_fields_that_were_promised() -> None:
    written = msgspec.json.decode(msgspec.json.encode(report(*ALL_WELL)))
    promised = (
        "offered_rate achieved_rate published handled dead_lettered lost duplicates redelivered out_of_order verdict "
        "latency_us send_lag_us"
    )
    assert set(promised.split()) <= set(written)
    assert set(written["latency_us"]) == {"p50", "p90", "p99", "p99_9", "max"} == set(written["send_lag_us"])


def test_the_table_ends_with_the_verdict_and_why() -> None:
    good, evidence = ALL_WELL
    assert rows_of(report(good, evidence))[-1] == ("verdict", "ok")
    caption, value = rows_of(report(good, totals(119, samples=100)))[-1]
    assert (caption, value.partition(";")[0]) == ("verdict", "failed")


@pytest.mark.parametrize(
    ("address", "shared"),
    [
        ("ipc:///run/bus", True),
        ("tcp://127.0.0.1:7400", True),
        ("tcp://localhost:7400", True),
        ("tcp://192.0.2.1:7400", False),  # TEST-NET-1 (RFC 5737): nobody's
    ],
)
def test_only_a_bus_on_this_host_shares_the_clock(address: str, shared: bool) -> None:
    assert shares_clock(address) == shared


def test_the_machine_is_named() -> None:
    machine = this_machine()
    assert machine.cpu_count >= 1
    assert machine.cpu_model
    assert set(machine.versions) == {"shardbus", "pyzmq", "msgspec", "msgpack"}
