"""How people write loads, faults and expectations, and what they are told when it cannot be read."""

from __future__ import annotations

from typing import Any

import pytest

from loadgen import expect, notation
from loadgen.pacer import Stage
from loadgen.spec import FaultSpec, LoadError, LoadSpec, Payload, Skew

READ: list[tuple[Any, str, Any]] = [
    (notation.rate, "20000", 20_000.0),
    (notation.rate, "20k", 20_000.0),
    (notation.rate, "1.5M", 1_500_000.0),
    (notation.rate, "20_000/s", 20_000.0),
    (notation.seconds, "10", 10.0),
    (notation.seconds, "10s", 10.0),
    (notation.seconds, "500ms", 0.5),
    (notation.seconds, "250 us", 0.00025),
    (notation.seconds, "2m", 120.0),
    (notation.seconds, "1h", 3600.0),
    (notation.size, "75MB", 75_000_000),
    (notation.size, "4KiB", 4096),
    (notation.stages, "5k:10s", (Stage(5000.0, 10.0),)),
    (notation.stages, "5k:10s,20k:30s,50k:10s", (Stage(5000.0, 10.0), Stage(20_000.0, 30.0), Stage(50_000.0, 10.0))),
    (notation.stages, "1k-50k:1m", (Stage(1000.0, 60.0, 50_000.0),)),
    (notation.skew, "uniform", Skew()),
    (notation.skew, "zipf", Skew(kind="zipf", by=1.0)),
    (notation.skew, "zipf:1.2", Skew(kind="zipf", by=1.2)),
    (notation.skew, "hot:0.5", Skew(kind="hot", by=0.5)),
    (notation.payload, "1kB", Payload(low=1000)),
    (notation.payload, "10-100", Payload(kind="uniform", low=10, high=100)),
    (notation.count, "19,988", 19_988.0),
    (notation.count, "10k", 10_000.0),
    (notation.share, "80%", 0.8),
    (notation.share, "1.5", 1.5),
    (notation.payload, "lognormal:500:0.8", Payload(kind="lognormal", low=500, sigma=0.8)),
    (notation.fault, "kill:worker@5s", FaultSpec(kind="kill", at_s=5.0)),
    (notation.fault, "term:worker-1@500ms", FaultSpec(kind="term", at_s=0.5, shard=1)),
    (notation.fault, "stop:worker2:1s@10s", FaultSpec(kind="stop", at_s=10.0, shard=2, seconds=1.0)),
]


@pytest.mark.parametrize(("read", "text", "expected"), READ, ids=[f"{row[0].__name__} {row[1]}" for row in READ])
def test_what_people_write_is_understood(read: Any, text: str, expected: Any) -> None:
    assert read(text) == expected


UNREADABLE: list[tuple[Any, str, str]] = [
    (notation.rate, "", "is no rate"),
    (notation.rate, "-5", "is no rate"),
    (notation.rate, "5 apples", "is no rate"),
    (notation.seconds, "soon", "is no time"),
    (notation.seconds, "5 years", "is no time"),
    (notation.stages, "5k", "is no stage"),
    (notation.stages, "5k:10s,", "is no stage"),
    (notation.skew, "zipf:steep", "is no skew"),
    (notation.skew, "hot:1.5", "the share of the hot key must be from 0 to 1"),
    (notation.payload, "lognormal:5", "is no payload"),
    (notation.payload, "100-10", "the largest payload must be from 100"),
    (notation.fault, "kill:worker", "is no fault"),
    (notation.fault, "kill:worker:1s@5s", "is no fault"),
    (notation.fault, "stop:worker@5s", "is no fault"),
    (notation.keys, "1.5", "is no number of keys"),
    (notation.keys, "100/s", "is no number of keys"),
    (notation.count, "5ms", "is no number; give how many"),
    (notation.count, "5/s", "is no number; give how many"),
    (notation.share, "80 percent", "is no share"),
    (notation.share, "5k", "is no share"),
]


@pytest.mark.parametrize(("read", "text", "said"), UNREADABLE, ids=[f"{row[0].__name__} {row[1]!r}" for row in UNREADABLE])
def test_what_cannot_be_understood_is_refused_with_an_example(read: Any, text: str, said: str) -> None:
    with pytest.raises(LoadError, match=said):
        read(text)


@pytest.mark.parametrize("text", ["kill:worker@5s", "term:worker1@0.5s", "stop:worker2:1s@10s"])
def test_a_fault_is_shown_as_it_is_written(text: str) -> None:
    assert str(notation.fault(text)) == text


FIGURES: dict[str, float | None] = {
    "p99": 0.0095,
    "p99_9": 0.012,
    "lost": 0.0,
    "achieved_rate": 19_900.0,
    "worker_rss": 62e6,
    "worker_cpu": 0.55,
    "recovery": None,
}

EXPECTED = [
    ("p99<10ms", True),
    ("p99 <= 9.5ms", True),
    ("p99<9500us", False),
    ("p99.9<10ms", False),
    ("lost==0", True),
    ("lost = 0", True),
    ("lost>0", False),
    ("achieved_rate>=19.9k", True),
    ("achieved_rate>20k", False),
    ("worker_rss<75MB", True),
    ("worker_cpu<50%", False),
    ("worker_cpu<0.6", True),
    ("recovery<2s", False),
]


@pytest.mark.parametrize(("text", "met"), EXPECTED)
def test_an_expectation_is_met_or_not(text: str, met: bool) -> None:
    assert expect.check(expect.parse(text), FIGURES).met == met


def test_what_was_not_measured_was_not_met_and_says_so() -> None:
    outcome = expect.check(expect.parse("recovery<2s"), FIGURES)
    assert (outcome.met, expect.shown(outcome)) == (False, "recovery<2s: NOT MEASURED")


def test_memory_is_no_fault_of_a_late_generator_and_a_latency_may_be() -> None:
    outcomes = [expect.check(expect.parse(text), FIGURES) for text in ("worker_rss<1MB", "p99<1ms", "achieved_rate>20k")]
    assert [(outcome.met, outcome.is_excused) for outcome in outcomes] == [(False, False), (False, True), (False, True)]


KILL = FaultSpec(kind="kill", at_s=1.0)
STOP = FaultSpec(kind="stop", at_s=1.0, seconds=1.0)
NEVER = [
    ("service_p99<5ms", LoadSpec(rate=100.0, commands=True), "only the response time"),
    ("queue_p50<5ms", LoadSpec(rate=100.0, commands=True), "only the response time"),
    ("recovery<3s", LoadSpec(rate=100.0), "--fault kill:worker@5s"),
    ("recovery<3s", LoadSpec(rate=100.0, faults=(STOP,)), "--fault kill:worker@5s"),
    ("p99<5ms", LoadSpec(rate=None), "give a --rate"),
]


@pytest.mark.parametrize(("text", "spec", "why"), NEVER)
def test_what_a_load_can_never_measure_is_refused_before_it_runs(text: str, spec: LoadSpec, why: str) -> None:
    with pytest.raises(LoadError, match=f"can never be met: .*{why}"):
        expect.check_measurable(expect.parse(text), spec)


def test_what_a_load_measures_may_be_expected_of_it() -> None:
    for text in expect.FIGURES:
        bound = {"time": "1ms", "bytes": "1MB"}.get(expect.FIGURES[text], "1")
        expect.check_measurable(expect.parse(f"{text}<{bound}"), LoadSpec(rate=100.0, faults=(STOP, KILL)))
    for text in ("p99<1ms", "send_lag_p99<1ms", "lost==0"):
        expect.check_measurable(expect.parse(text), LoadSpec(rate=100.0, commands=True))
    for text in ("achieved_rate>1", "worker_rss<1GB", "lost==0"):
        expect.check_measurable(expect.parse(text), LoadSpec(rate=None))


def test_an_outcome_shows_what_was_measured_in_its_unit() -> None:
    shown = [expect.shown(expect.check(expect.parse(text), FIGURES)) for text, _ in EXPECTED[:1] + EXPECTED[7:11]]
    assert shown == [
        "p99<10ms: 9.500 ms",
        "achieved_rate>=19.9k: 19,900/s",
        "achieved_rate>20k: 19,900/s",
        "worker_rss<75MB: 62.0 MB",
        "worker_cpu<50%: 55%",
    ]


@pytest.mark.parametrize(
    "text", ["p99", "p98<1ms", "p99<10", "lost==none", "<1ms", "p99<>1ms", "worker_rss<big", "worker_rss<100"]
)
def test_no_expectation_is_refused(text: str) -> None:
    with pytest.raises(LoadError):
        expect.parse(text)
