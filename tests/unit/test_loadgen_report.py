"""The report: where every event is, and the verdict, with each way to fail."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from loadgen import expect
from loadgen.histogram import Percentiles
from loadgen.machine import Machine, MachineLoad, shares_clock, this_machine
from loadgen.pacer import Stage
from loadgen.report import (
    EXIT_CODES,
    PROVEN,
    PUBLISHERS_MAX,
    Absence,
    Account,
    BusState,
    Facts,
    FaultRecord,
    Interval,
    Observed,
    ProcessUse,
    Report,
    Totals,
    Verdict,
    WorkerState,
    account,
    held_against,
    judge,
    make_report,
    together,
    totals_of_acks,
)
from loadgen.resources import MachineMeter
from loadgen.spec import Counts, DriverResult, LoadSpec, Payload, Recording, Skew, Template
from loadgen.tables import csv_of, load_text, rows_of
from shardbus.config import DEFAULT_LIMITS

FAST = Percentiles(p50=100, p90=150, p99=200, p99_9=250, max=300)
SHORT = Percentiles(p50=20, p90=30, p99=40, p99_9=50, max=60)
WAIT = Percentiles(p50=80, p90=120, p99=160, p99_9=200, max=240)
MACHINE = Machine(cpu_count=2, cpu_model="a processor", system="Linux", python="3.11", versions={})


BUSY = MachineLoad(busy=0.99, stolen=0.01, load_average=7.5)
CROWDED = MachineLoad(busy=0.5, stolen=0.0, load_average=2.1)
ROBBED = MachineLoad(busy=0.3, stolen=0.1, load_average=0.5)
IDLE = MachineLoad(busy=0.3, stolen=0.0, load_average=0.5)


def facts(**changes: Any) -> Facts:
    """A run that went well, but for the changes."""
    well = {
        "lost": 0,
        "not_delivered": 0,
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
    ("a lost event", {"lost": 1}, "failed", "1 event was acknowledged, and nothing shows"),
    ("a bus that kept up and has not finished", {"not_delivered": 2}, "failed", "2 events were not finished"),
    (
        "what a bus that was too slow has not finished is no other fault",
        {"not_delivered": 2, "achieved_rate": 9_000.0},
        "saturated",
        "9,000 of 20,000 events/s were finished in the measured window; 2 events were not finished when the",
    ),
    (
        "a bus without a worker is not slow",
        {"not_delivered": 2, "achieved_rate": 9_000.0, "is_up": False},
        "failed",
        "2 events were not finished",
    ),
    (
        "nor is a generator that was too slow an excuse for the bus",
        {"not_delivered": 1, "achieved_rate": 9_000.0, "sent": 90_000, "driver_cpu": 0.97},
        "failed",
        "1 event was not finished",
    ),
    (
        "unpaced, what is not finished is a broken promise",
        {"offered_rate": None, "scheduled": None, "not_delivered": 1},
        "failed",
        "1 event was not finished",
    ),
    (
        "a slow bus is no excuse for what it lost",
        {"not_delivered": 2, "achieved_rate": 9_000.0, "lost": 1},
        "failed",
        "1 event was acknowledged",
    ),
    ("an event overtaken", {"out_of_order": 3}, "failed", "3 events were handled after a later one"),
    ("a bus that took its evidence with it", {"gone": True}, "failed", "the bus was gone at the end of the run"),
    ("an unannounced repeat", {"duplicates": 5, "redelivered": 4}, "failed", "1 of 5 repeats was not announced"),
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
        {"send_lag_p99_us": 80_000, "sent": 150_000, "achieved_rate": 15_000.0, "waited_share": 0.01},
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
    (
        "a generator that is a little late is no excuse for a bus that finished half of what was sent",
        {"send_lag_p99_us": 8_000, "achieved_rate": 10_000.0},
        "saturated",
        "10,000 of 20,000 events/s",
    ),
    (
        "what was sent too late to be finished in the window is not held against the bus",
        {"send_lag_p99_us": 500_000, "achieved_rate": 19_000.0},
        "generator-bound",
        "500.0 ms",
    ),
    ("several processes are named", {"send_lag_p99_us": 9_000, "drivers": 3}, "generator-bound", "3 driver processes"),
    (
        "a driver that had its core is the limit itself",
        {"send_lag_p99_us": 9_000, "driver_cpu": 0.93, "machine_load": BUSY},
        "generator-bound",
        "one driver process cannot offer this rate here (used 93% of a core); try --drivers 2",
    ),
    (
        "there is a largest number of drivers",
        {"send_lag_p99_us": 9_000, "driver_cpu": 0.93, "drivers": 8},
        "generator-bound",
        "8 driver processes cannot offer this rate here (used 93% of a core each)",
    ),
    (
        "a driver that waited for a core is not",
        {"send_lag_p99_us": 9_000, "driver_cpu": 0.13, "cpu_count": 2, "machine_load": BUSY},
        "generator-bound",
        "one driver process got 13% of a core, the load average was 7.5 on 2 cores (99% busy, 1% stolen); free the machine",
    ),
    (
        "more to run than cores is busy",
        {"send_lag_p99_us": 9_000, "driver_cpu": 0.2, "cpu_count": 2, "machine_load": CROWDED},
        "generator-bound",
        "this machine was too busy",
    ),
    (
        "time that the host took is not there",
        {"send_lag_p99_us": 9_000, "driver_cpu": 0.2, "cpu_count": 2, "machine_load": ROBBED},
        "generator-bound",
        "this machine was too busy",
    ),
    (
        "a late driver on an idle machine was held up by something else",
        {"send_lag_p99_us": 9_000, "driver_cpu": 0.05, "cpu_count": 2, "machine_load": IDLE},
        "generator-bound",
        "cannot offer this rate here, and not for want of processor time (used 5% of a core)",
    ),
    (
        "a bus that fell behind on a busy machine is saturated, and the reader is told of the machine",
        {"achieved_rate": 10_000.0, "cpu_count": 2, "machine_load": BUSY},
        "saturated",
        "this machine was busy: the load average was 7.5 on 2 cores (99% busy, 1% stolen)",
    ),
    ("commands without a reply", {"lost": 2, "commands": True}, "failed", "2 commands got no reply"),
    ("a broken promise outweighs saturation", {"lost": 1, "waited_share": 1.0, "sent": 5}, "failed", "1 event was"),
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


def test_how_busy_the_machine_is_is_measured_from_the_beginning_on() -> None:
    meter = MachineMeter()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    load = meter.load()
    assert 0.0 < load.busy <= 1.0
    assert 0.0 <= load.stolen <= load.busy
    assert load.load_average >= 0.0


def test_every_broken_promise_is_named() -> None:
    judgement = judge(facts(lost=1, not_delivered=1, out_of_order=1, duplicates=1))
    assert len(judgement.reasons) == 4


def test_exit_codes_are_as_documented() -> None:
    assert EXIT_CODES == {"ok": 0, "failed": 1, "generator-bound": 3, "saturated": 4}


def counts(published: int = 0, **others: int) -> Counts:
    fields = {"handled": 0, "dead": 0, "waiting": 0, "dropped": 0, "in_flight": 0, **others}
    return Counts(published=published, **fields)


def result(final: Counts, **changes: Any) -> DriverResult:
    ran = {
        "scheduled": 100,
        "scheduled_s": 0.8,
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
    return Totals(distinct=distinct, latency_us=FAST, service_us=SHORT, queue_us=WAIT, **{**fields, **others})


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
        Account(handled=105, dead_lettered=0, waiting=0, lost=0, not_delivered=15, duplicates=0),
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
        Account(handled=120, dead_lettered=0, waiting=0, lost=0, duplicates=5, unrecognised=3),
    ),
    (
        "… also where all were dead: no count is ever below zero",
        counts(120, dead=120),
        totals(130, dead=130),
        0,
        Account(handled=0, dead_lettered=120, waiting=0, lost=0, duplicates=10, unrecognised=10),
    ),
    (
        "finished after the flush gave up, and dead by then",
        counts(120, handled=90, dead=10, in_flight=20),
        totals(118, dead=28),
        0,
        Account(handled=90, dead_lettered=28, waiting=0, lost=0, not_delivered=2, duplicates=0),
    ),
]


@pytest.mark.parametrize(
    ("final", "evidence", "bus_waiting", "expected"), [row[1:] for row in ACCOUNTS], ids=[row[0] for row in ACCOUNTS]
)
def test_account(final: Counts, evidence: Totals, bus_waiting: int, expected: Account) -> None:
    found = account(result(final), evidence, bus_waiting)
    assert found == expected
    everywhere = found.handled + found.dead_lettered + found.waiting + found.lost + found.not_delivered
    assert everywhere == final.published - final.dropped


def test_a_bus_that_is_gone_is_not_said_to_have_lost_what_it_had_acknowledged() -> None:
    ran = result(counts(120, handled=90, dead=5, waiting=5, in_flight=20))
    found = make_report(
        LoadSpec(rate=100.0),
        ran,
        totals_of_acks(ran),
        BusState(workers=(WORKER,), waiting=0),
        address="ipc:///run/bus",
        one_clock=True,
        machine=MACHINE,
        observed=Observed(gone=True),
    )
    assert (found.verdict, found.exit_code, found.latency_us) == ("failed", 1, None)
    assert (found.handled, found.dead_lettered, found.waiting, found.lost, found.not_delivered) == (90, 5, 5, 0, 20)
    assert "the bus was gone" in found.reasons[0]
    assert "20 events were not finished" in found.reasons[1]
    assert found.notes == ("no latency: the bus that had measured it is gone",)
    rows = dict(rows_of(found))
    assert [rows[name] for name in ("handled", "lost", "repeats", "out of order")] == ["90", "–", "–", "–"]
    held = held_against(found, [expect.parse(f"{figure}==0") for figure in PROVEN])
    assert [(one.met, one.measured) for one in held.expectations] == [(False, None)] * len(PROVEN)


def test_a_shard_that_was_given_up_is_named() -> None:
    down = msgspec.structs.replace(WORKER, shard=1, pid=0, state="given-up")
    found = make_report(
        LoadSpec(rate=100.0),
        *ALL_WELL,
        BusState(workers=(WORKER, down), waiting=0),
        address="ipc:///run/bus",
        one_clock=True,
        machine=MACHINE,
    )
    assert found.notes == ("shard 1 was given-up at the end: nothing of its keys is handled until it has a worker",)


def test_a_shard_that_had_no_room_for_one_more_publisher_is_named() -> None:
    assert DEFAULT_LIMITS.sessions_max == PUBLISHERS_MAX
    crowded = msgspec.structs.replace(WORKER, publishers=PUBLISHERS_MAX)
    for left, told in ((0, 0), (20, 1)):
        found = make_report(
            LoadSpec(rate=100.0),
            result(counts(120, handled=120 - left, in_flight=left)),
            totals(120 - left, samples=100),
            BusState(workers=(crowded,), waiting=0),
            address="ipc:///run/bus",
            one_clock=True,
            machine=MACHINE,
        )
        assert sum("shard 0 had 256 publishers at the end, and takes no other" in note for note in found.notes) == told


DEAD_IN_DOUBT: list[tuple[str, Counts, Totals, str]] = [
    ("the same by both", counts(120, handled=110, dead=10), totals(120, dead=10, samples=100), ""),
    (
        "more at the last outcome",
        counts(120, handled=110, dead=10),
        totals(120, dead=4, repeats=8, announced=8, samples=100),
        "10 events became dead letters, and by the first 4",
    ),
    ("beside repeats that nobody knew", counts(120, dead=120), totals(130, dead=130), "dead letters are not exact: 10"),
    ("of some, only the evidence tells", counts(120, handled=110, waiting=10), totals(120, dead=10, samples=100), ""),
]


@pytest.mark.parametrize(
    ("final", "evidence", "said"), [row[1:] for row in DEAD_IN_DOUBT], ids=[row[0] for row in DEAD_IN_DOUBT]
)
def test_a_count_of_dead_letters_that_is_in_doubt_is_told(final: Counts, evidence: Totals, said: str) -> None:
    notes = [note for note in report(result(final), evidence).notes if "dead letters" in note]
    assert len(notes) == bool(said)
    assert said in "".join(notes)


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
    assert (found.service_us, found.queue_us) == (SHORT, WAIT)
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
    assert (found.latency_us, found.service_us, found.queue_us) == (None, None, None)
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
        "latency_us service_us queue_us send_lag_us"
    )
    assert set(promised.split()) <= set(written)
    for times in ("latency_us", "service_us", "queue_us", "send_lag_us"):
        assert set(written[times]) == {"p50", "p90", "p99", "p99_9", "max"}


def test_the_table_tells_the_parts_of_the_response_time_below_it_but_not_of_commands() -> None:
    captions = [caption for caption, _ in rows_of(report(*ALL_WELL))]
    at = captions.index("response time")
    assert captions[at : at + 4] == ["response time", "service time", "queue time", "send lag"]
    commands = msgspec.structs.replace(report(*ALL_WELL), load=LoadSpec(rate=100.0, commands=True))
    assert not {"service time", "queue time"} & {caption for caption, _ in rows_of(commands)}


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


# -- expectations


def expected(texts: list[str], found: Report) -> Report:
    return held_against(found, [expect.parse(text) for text in texts])


def test_expectations_that_are_met_leave_an_ok_run_ok() -> None:
    texts = ["p99<10ms", "lost==0", "achieved_rate>=99", "service_p99<50us", "queue_p50<=100us"]
    found = expected(texts, report(*ALL_WELL))
    assert (found.verdict, [outcome.met for outcome in found.expectations]) == ("ok", [True] * 5)
    assert ("PASS", "p99<10ms: 0.200 ms") in rows_of(found)
    assert ("PASS", "service_p99<50us: 0.040 ms") in rows_of(found)


def test_one_that_is_not_met_fails_the_run_and_says_what_was_measured() -> None:
    found = expected(["p99<100us", "lost==0"], report(*ALL_WELL))
    assert (found.verdict, found.exit_code, found.reasons) == ("failed", 1, ("expected p99<100us: 0.200 ms",))
    assert ("FAIL", "p99<100us: 0.200 ms") in rows_of(found)


def test_one_that_was_not_measured_is_neither_passed_nor_failed_for_its_readers() -> None:
    good, evidence = ALL_WELL
    late = msgspec.structs.replace(good, send_lag_us={9000: 100})
    found = expected(["p99<200ms"], report(late, evidence))
    assert ("----", "p99<200ms: NOT MEASURED") in rows_of(found)


def test_a_run_in_which_nothing_was_handled_has_failed_unless_that_is_expected() -> None:
    good, evidence = ALL_WELL
    final = msgspec.structs.replace(good.final, handled=0, dead=good.final.published)
    dead = report(msgspec.structs.replace(good, final=final), msgspec.structs.replace(evidence, dead=evidence.distinct))
    assert dead.handled == 0
    found = expected(["lost==0"], dead)
    assert rows_of(found)[-1] == ("verdict", "failed; none was handled: 120 became dead letters")
    assert found.exit_code == 1
    assert expected(["dead_lettered==120"], dead).verdict == expected(["handled<1"], dead).verdict == "ok"
    for tolerated in ("dead_lettered<1000", "handled<=120", "handled!=1", "dead_lettered>=0"):  # not that all may die
        assert expected([tolerated], dead).verdict == "failed"
    hanging = report(msgspec.structs.replace(good, final=counts(120, in_flight=120)), totals(0))
    assert expected([], hanging).reasons[-1] == "none was handled: 120 did not end"
    assert expected([], hanging).verdict == expected(["dead_lettered==0"], hanging).verdict == "failed"
    assert expected(["dead_lettered==0"], hanging).reasons[-1] == "none was handled: 120 did not end"
    assert "none was handled" not in "".join(expected(["handled==0"], hanging).reasons)
    overloaded = msgspec.structs.replace(hanging, verdict="saturated")
    assert expected(["handled==0"], overloaded).verdict == "saturated"
    assert expected(["dead_lettered>=1"], overloaded).verdict == "failed"  # none died
    assert rows_of(expected([], report(*ALL_WELL)))[-1] == ("verdict", "ok")


def test_what_was_finished_is_held_against_what_was_due_where_that_is_not_the_rate() -> None:
    ran, evidence = ALL_WELL
    spec = LoadSpec(rate=110.0, arrivals="poisson")
    found = make_report(
        spec,
        msgspec.structs.replace(ran, after=counts(145, handled=145)),
        evidence,
        BusState(workers=(WORKER,), waiting=0),
        address="ipc:///run/bus",
        one_clock=True,
        machine=MACHINE,
    )
    assert ran.scheduled is not None
    assert found.offered_rate == ran.scheduled / ran.scheduled_s != ran.scheduled / ran.window_s != spec.rate
    assert found.verdict == "ok"


def test_an_interrupted_run_is_judged_and_says_so_beside_its_verdict() -> None:
    found = msgspec.structs.replace(report(*ALL_WELL), interrupted=True, window_s=7.26)
    assert rows_of(found)[-1] == ("verdict", "ok; interrupted after 7.3 s that were measured")
    assert (found.exit_code, report(*ALL_WELL).exit_code) == (130, 0)


def test_a_run_that_was_refused_stays_refused_and_its_expectations_are_not_met() -> None:
    good, evidence = ALL_WELL
    late = msgspec.structs.replace(good, send_lag_us={9000: 100})
    found = expected(["p99<1h"], report(late, evidence))
    assert (found.verdict, found.exit_code, found.expectations[0].met) == ("generator-bound", 3, False)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("dead_lettered==0", "failed"),
        ("dead_lettered<=1", "failed"),
        ("dead_lettered<3", "generator-bound"),  # it is met
        ("handled>1000", "generator-bound"),
        ("dead_lettered>=5", "generator-bound"),
        ("recovery<1s", "generator-bound"),  # not measured
    ],
)
def test_a_late_generator_excuses_what_was_not_reached_and_not_what_went_wrong(text: str, verdict: str) -> None:
    good, evidence = ALL_WELL
    final = msgspec.structs.replace(good.final, handled=good.final.handled - 2, dead=2)
    late = msgspec.structs.replace(good, send_lag_us={9000: 100}, final=final)
    found = expected([text], report(late, msgspec.structs.replace(evidence, dead=2)))
    assert (found.verdict, found.dead_lettered) == (verdict, 2)


# -- several drivers, intervals, faults


def test_what_several_drivers_saw_adds_up() -> None:
    one = result(counts(120, handled=120))
    both = together([one, msgspec.structs.replace(one, window_s=1.5, send_lag_us={80: 1})])
    assert (both.scheduled, both.sent, both.final.handled, both.window_s) == (200, 200, 240, 1.5)
    assert both.send_lag_us == {80: 61, 120: 40}
    assert together([one]) == one


INTERVAL = Interval(
    at_s=1.0,
    warming_up=False,
    offered_rate=100.0,
    achieved_rate=99.5,
    counts=counts(120, handled=119, in_flight=1),
    latency_us=FAST,
    service_p99_us=40,
    queue_p99_us=160,
    send_lag_p99_us=120,
    backlog=(3, 4),
    waiting=0,
    processes=(ProcessUse(name="worker 0", pid=1, cpu_share=0.5, rss_bytes=60_000_000),),
)


def observed_report(**changes: Any) -> Report:
    ran, evidence = ALL_WELL
    seen = Observed(
        faults=(FaultRecord(fault="kill:worker@1s", shard=0, at_s=1.0, recovery_s=0.25),),
        processes=INTERVAL.processes,
        machine_load=BUSY,
        unseen=("worker 1",),
        intervals=(INTERVAL,),
    )
    return make_report(
        LoadSpec(rate=100.0),
        msgspec.structs.replace(ran, **changes),
        evidence,
        BusState(workers=(WORKER,), waiting=0),
        address="ipc:///run/bus",
        one_clock=True,
        machine=MACHINE,
        observed=seen,
    )


def test_faults_processes_and_what_was_not_seen_are_in_the_report() -> None:
    rows = rows_of(observed_report())
    assert ("fault", "kill:worker@1s, shard 0, at 1.0 s: handled again after 0.250 s") in rows
    assert ("process", "worker 0: 50% of a core, 60 MB") in rows
    assert ("load average", "7.5; cores 99% busy, 1% stolen") in rows
    assert any(caption == "note" and "worker 1" in text for caption, text in rows)
    assert expected(["recovery<300ms", "worker_rss<75MB", "worker_cpu<60%"], observed_report()).verdict == "ok"


@pytest.mark.parametrize(
    ("absence", "notes"),
    [
        (Absence(), ()),
        (Absence(silent_s=3.24), ("the bus' supervisor did not answer for 3.2 s",)),
        (Absence(successors=1), ("the bus was served anew once during the run",)),
        (
            Absence(successors=2, silent_s=9.0),
            ("the bus was served anew 2 times during the run", "the bus' supervisor did not answer for 9.0 s"),
        ),
    ],
)
def test_a_supervisor_that_was_away_is_told(absence: Absence, notes: tuple[str, ...]) -> None:
    found = make_report(
        LoadSpec(rate=100.0),
        *ALL_WELL,
        BusState(workers=(WORKER,), waiting=0),
        address="ipc:///run/bus",
        one_clock=True,
        machine=MACHINE,
        observed=Observed(absence=absence),
    )
    assert found.notes == notes


def test_a_run_that_quotes_no_latency_quotes_none_by_the_second() -> None:
    found = observed_report(send_lag_us={9000: 100})
    assert found.verdict == "generator-bound"
    told = [(interval.latency_us, interval.service_p99_us, interval.queue_p99_us) for interval in found.intervals]
    assert told == [(None, None, None)]


def test_the_time_series_has_a_line_an_interval_and_empty_cells_where_nothing_was_measured() -> None:
    silent = msgspec.structs.replace(INTERVAL, at_s=2.0, latency_us=None, backlog=(1,), processes=())
    header, first, second = csv_of([INTERVAL, silent]).splitlines()
    columns = header.split(",")
    first_row = dict(zip(columns, first.split(","), strict=True))
    second_row = dict(zip(columns, second.split(","), strict=True))
    assert (first_row["at_s"], first_row["achieved_rate"], first_row["p99_us"]) == ("1.000", "99.500", "200")
    assert (first_row["backlog_1"], first_row["worker_0_cpu"]) == ("4", "0.5000")
    p99s = [first_row[f"{name}_p99_us"] for name in ("service", "queue", "send_lag")]
    assert p99s == ["40", "160", "120"]
    assert (second_row["p99_us"], second_row["backlog_1"], second_row["worker_0_cpu"]) == ("", "", "")


LOADS = [
    (LoadSpec(rate=20_000.0), "20,000/s for 10 s after 2 s, 1,000 keys, publish_many"),
    (LoadSpec(rate=None, warmup_s=0.0, keys=None), "max for 10 s, unique keys, publish_many"),
    (
        LoadSpec(rate=None, stages=(Stage(5.0, 10.0), Stage(5.0, 20.0, 50.0)), warmup_s=0.0, arrivals="poisson"),
        "5/s for 10 s, 5–50/s for 20 s, Poisson arrivals, 1,000 keys, publish_many",
    ),
    (
        LoadSpec(rate=1.0, skew=Skew(kind="zipf", by=1.1), payload=Payload(kind="uniform", low=10, high=100), drivers=2),
        "1/s for 10 s after 2 s, 1,000 keys, zipf(1.1), 10–100 bytes, publish_many, drivers: 2",
    ),
    (
        LoadSpec(rate=1.0, template=Template(type="OrderPlaced", key="order_id")),
        "1/s for 10 s after 2 s, 1,000 keys, OrderPlaced by order_id, publish_many",
    ),
    (
        LoadSpec(rate=None, duration_s=None, recording=Recording(path="a.jsonl", type="A", key="b", speed=100.0)),
        "at its own times × 100, a.jsonl as A by b, publish_many",
    ),
]


@pytest.mark.parametrize(("spec", "text"), LOADS, ids=[row[1] for row in LOADS])
def test_a_load_is_told_in_a_line(spec: LoadSpec, text: str) -> None:
    assert load_text(spec) == text
