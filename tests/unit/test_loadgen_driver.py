"""The driver against a bus in the same process: what it sends, stamps and counts. No figure here depends on speed."""

from __future__ import annotations

import pytest

import shardbus
from loadgen.collector import totals_of
from loadgen.driver import Driver, LagCounts
from loadgen.report import Totals
from loadgen.spec import DriverResult, LoadSpec
from loadgen.workload import workload_of
from shardbus.demo import Tick, bus

PUBLISH = pytest.mark.parametrize("call", ["publish_many", "publish"])


async def drive(spec: LoadSpec, application: shardbus.Bus = bus) -> tuple[DriverResult, Totals]:
    async with application.local() as client:
        result = await Driver(spec, client, workload_of(spec)).run()
        return result, totals_of(await client.evidence([client.publisher]))


@PUBLISH
async def test_a_paced_run_sends_what_was_scheduled_and_measures_all_but_the_warm_up(call):
    spec = LoadSpec(rate=1000.0, warmup_s=0.1, duration_s=0.3, keys=10, call=call)
    result, totals = await drive(spec)
    assert result.scheduled == 300
    # A machine that stood still for long at the end may have had to break the schedule off.
    assert 0 < result.sent <= 300
    assert sum(result.send_lag_us.values()) == totals.samples == result.sent
    assert result.final.published == totals.distinct == result.final.handled == 100 + result.sent
    assert (totals.repeats, totals.out_of_order, totals.missing) == (0, 0, 0)


@PUBLISH
async def test_an_unpaced_run_measures_no_latency_and_loses_nothing(call):
    result, totals = await drive(LoadSpec(rate=None, warmup_s=0.1, duration_s=0.2, keys=100, call=call))
    assert (result.scheduled, result.send_lag_us, totals.samples) == (None, {}, 0)
    assert result.final.published == totals.distinct == result.final.handled > result.sent > 0


async def test_every_event_has_its_payload_and_its_number():
    seen: list[tuple[int, int]] = []
    application = shardbus.Bus("listener")

    @application.on(Tick)
    async def note(event: Tick) -> None:
        seen.append((event.n, len(event.payload)))

    result, _ = await drive(LoadSpec(rate=1000.0, warmup_s=0.0, duration_s=0.1, keys=1, payload_bytes=33), application)
    assert seen == [(n, 33) for n in range(result.sent)]


async def test_a_bus_that_fails_every_event_has_dead_letters_and_no_loss():
    application = shardbus.Bus("failing")

    @application.on(Tick)
    async def fail(event: Tick) -> None:
        raise ValueError(event.key)

    result, totals = await drive(LoadSpec(rate=500.0, warmup_s=0.0, duration_s=0.1, keys=5), application)
    assert result.final.dead == totals.dead == totals.distinct == result.final.published


def test_send_lags_are_exact_to_two_milliseconds_and_to_three_digits_beyond():
    lags = LagCounts()
    lags.add([1_000_000_000 - lag_us * 1000 for lag_us in (0, 7, 7, 2047, 123_456)], 1_000_000_000)
    found = lags.counts()
    (longest,) = set(found) - {0, 7, 2047}
    assert (found[0], found[7], found[2047], found[longest]) == (1, 2, 1, 1)
    assert 123_456 <= longest <= 123_456 * 1.001


def test_the_memory_for_send_lags_is_bounded_and_none_is_forgotten():
    lags = LagCounts()
    for second in range(4):
        lags.add(list(range(0, 200_000_000, 1000)), (second + 1) * 1_000_000_000)
    assert sum(lags.counts().values()) == 800_000
    assert len(lags.counts()) <= 27_648
    assert len(lags._counts) <= 65_536
