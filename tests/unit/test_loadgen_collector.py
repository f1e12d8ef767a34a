"""The collector: what grows by the interval, merges of shards, and processes that come and go."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from typing import Any, cast

import pytest
from msgspec.structs import replace

import shardbus
from loadgen.collector import Collector, Processes
from loadgen.histogram import Histogram, difference, percentiles_us
from loadgen.resources import Watched
from loadgen.spec import Counts, LoadError, Progress
from shardbus.demo import Tick, bus
from shardbus.metrics import Evidence


def progress(at_s: float, finished: int, scheduled: int | None) -> Progress:
    counts = Counts(published=finished, handled=finished, dead=0, waiting=0, dropped=0, in_flight=0)
    return Progress(at_s=at_s, warming_up=False, counts=counts, scheduled=scheduled, send_lag_us={100: 1})


async def test_an_interval_has_what_came_since_the_last_one_and_the_whole_is_their_sum():
    async with bus.local(shards=2) as client:
        collector = Collector(client)
        collector.publishers = [client.publisher]
        collector.begin({})
        latencies = []
        for turn in (1, 2, 3):
            stamps = [1] * (10 * turn)  # long ago, so that each has a latency
            events = [Tick(key=f"k{turn}-{number}") for number in range(len(stamps))]
            await client.publish_many(events, ordinals=stamps, intended_ns=stamps)
            await client.flush(10.0)
            interval = await collector.interval([progress(turn, 10 * turn, 20 * turn)], {0: os.getpid()})
            latencies.append(interval)
        assert [interval.latency_us is not None for interval in latencies] == [True] * 3
        for interval in latencies:
            # They were due when the clock began, and nothing takes as long as they have waited.
            assert interval.service_p99_us < interval.queue_p99_us <= interval.latency_us.p99
        assert [(interval.offered_rate, interval.achieved_rate) for interval in latencies] == [(20.0, 10.0)] * 3
        assert collector.histogram.total == 60 == sum(one.total for one in collector.by_shard.values())
        assert set(collector.by_shard) == {0, 1}
        # Nothing new: no latency, and no interval where no time has passed.
        assert await collector.interval([progress(3, 30, 60)], {}) is None
        silent = await collector.interval([progress(4, 30, 60)], {})
        assert (silent.latency_us, silent.service_p99_us, silent.queue_p99_us) == (None, None, None)
        # Of commands there is no evidence; their drivers say when they were answered.
        answered = await collector.interval([replace(progress(at_s, 30, 60), replies_us={at_s: 1}) for at_s in (5, 6)], {})
        assert (answered.latency_us.p50, answered.latency_us.max) == (5, 6)


async def test_what_waits_in_a_store_is_waited_for_until_somebody_has_had_enough():
    application, gate = shardbus.Bus("fails"), asyncio.Event()

    @application.on(Tick, retry=shardbus.Retry(attempts=2, base_s=1e9, cap_s=1e9))
    async def fail(event: Tick) -> None:
        gate.set()
        raise ConnectionError

    async with application.local() as client:
        collector = Collector(client, local=False)
        collector.publishers = [client.publisher]
        await client.publish_many([Tick(key="a")], ordinals=[1], intended_ns=[1])
        await client.flush(10.0)
        waiting = replace(progress(1.0, 0, None).counts, published=1, waiting=1)
        enough = asyncio.Event()
        settling = asyncio.create_task(collector.settle(waiting, 3600.0, enough))
        await asyncio.sleep(0.05)
        assert not settling.done()
        enough.set()
        assert (await settling).distinct == 0


@pytest.mark.parametrize("settled", [True, False], ids=["at the end", "meanwhile"])
async def test_a_run_for_whose_evidence_a_shard_had_no_room_is_not_judged(settled: bool):
    none: dict[str, Any] = dict.fromkeys(Evidence.__struct_fields__, 0)
    none |= {"publisher": b"p" * 16, "latency": [], "service": [], "queue": []}
    mine = [Evidence(**{**none, "shard": at, "complete": at != 1}) for at in (0, 1)]

    class Full:
        async def evidence(self, publishers: list[bytes], **_: float) -> list[Evidence]:
            return [one for one in mine if one.publisher in publishers]

        async def status(self, **_: float) -> dict[str, Any]:
            return {"workers": [], "waiting": 0}

    collector = Collector(cast("shardbus.Client", Full()), local=False)
    collector.publishers = [b"p" * 16]
    last = progress(1.0, 10, None)
    with pytest.raises(LoadError, match=r"shard 1 had no room for the evidence of 1 of this run's .* fewer --drivers"):
        await (collector.settle(last.counts, 1.0) if settled else collector.interval([last], {}))


async def test_a_run_whose_evidence_begins_anew_in_the_middle_is_not_judged():
    async with bus.local() as client:
        collector = Collector(client, local=False)
        collector.publishers = [client.publisher]
        await client.publish_many([Tick(key="a"), Tick(key="a")], ordinals=[1, 2], intended_ns=[1, 1])
        await client.flush(10.0)
        await collector.interval([progress(1.0, 2, None)], {})
    async with bus.local() as after:
        await after.publish_many([Tick(key="a")], ordinals=[3], intended_ns=[1])
        await after.flush(10.0)
        collector._client = after
        for publisher in (client.publisher, after.publisher):  # the bus has not seen it since, or has
            collector.publishers = [publisher]
            collector._seen._distinct = {(0, publisher): 5}
            with pytest.raises(LoadError, match="the evidence of shard 0 has begun anew in the middle of the run"):
                await collector.settle(progress(1.0, 2, None).counts, 1.0)


async def test_a_supervisor_that_is_silent_or_another_is_told(monkeypatch: pytest.MonkeyPatch):
    answers: list[int | None] = [7, None, None, 7, 8, None]  # who answered
    now_s = 0.0

    class Client:
        async def status(self, **_: float) -> dict[str, Any]:
            nonlocal now_s
            pid = answers.pop(0)
            if pid is None:
                now_s += 2.0
                raise shardbus.BusUnreachable("ipc:///run/bus", 2.0)
            return {"workers": [], "waiting": 0, "pid": pid}

    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    collector = Collector(cast("shardbus.Client", Client()), local=False)
    told = []
    while answers:
        now_s += 1.0
        await collector.state()
        told.append((collector.absence.successors, collector.absence.silent_s))
    assert told == [(0, 0.0), (0, 2.0), (0, 5.0), (0, 6.0), (1, 6.0), (1, 6.0)]


def test_the_difference_of_growing_counts_is_what_came_in_between():
    assert difference({1: 5, 2: 3, 9: 1}, {1: 5, 2: 1}) == [(2, 2), (9, 1)]
    assert difference({1: 2}, {1: 5}) == [(1, 2)]  # begun anew


def test_merged_histograms_count_as_one():
    parts = [[(value, 1) for value in range(start, 50_000, 7)] for start in range(7)]
    whole = Histogram()
    for part in parts:
        whole.merge(Histogram(part))
    assert whole.percentiles() == percentiles_us(pair for part in parts for pair in part)


def test_the_distribution_for_the_plotter_is_in_milliseconds_and_ends_at_the_maximum():
    lines = Histogram([(1000, 98), (2000, 1), (5000, 1)]).hgrm().splitlines()
    assert lines[0].split() == ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]
    rows = [line.split() for line in lines[2:] if not line.startswith("#")]
    assert rows[0][0] == "1.000"
    assert rows[-1][:3] == ["5.003", "1.000000000000", "100"]
    assert [float(row[1]) for row in rows] == sorted(float(row[1]) for row in rows)
    assert lines[-3].startswith("#[Mean    =        1.05")


def test_a_process_that_is_gone_is_said_to_be_missing_and_its_successor_counts_on():
    processes = Processes()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert Watched().look(ended.pid) is None
    mine = os.getpid()
    processes.look({"worker 0": mine}, 1.0)
    (use,) = processes.look({"worker 0": mine}, 2.0)
    assert (use.name, use.pid) == ("worker 0", mine)
    assert use.rss_bytes > 1_000_000
    assert processes.look({"worker 0": ended.pid}, 3.0) == ()
    assert processes.unseen() == ("worker 0",)
    processes.look({"worker 0": os.getppid()}, 4.0)
    # Another process: its own beginning is not counted against the time of the one before.
    (total,) = processes.total()
    assert 0.0 <= total.cpu_share < 64.0
    assert total.pid == os.getppid()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what has ended cannot be looked at")
def test_a_process_that_has_just_ended_keeps_the_memory_that_it_had():
    """Else a line through what was seen would fall, and hide that it had grown."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        processes = Processes()
        processes.look({"driver 0": child.pid}, 1.0)
        (running,) = processes.look({"driver 0": child.pid}, 2.0)
        assert child.stdin is not None
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
        (ended,) = processes.look({"driver 0": child.pid}, 3.0)
    assert ended.rss_bytes >= running.rss_bytes > 0
    assert processes.unseen() == ()
