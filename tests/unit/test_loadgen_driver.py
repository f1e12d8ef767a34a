"""The driver against a bus in the same process: what it sends, stamps and counts. No figure here depends on speed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardbus
from loadgen.collector import totals_of
from loadgen.driver import Driver, _check_command, plan_of
from loadgen.meters import LagCounts, Lags, LagTotals, WaitMeter
from loadgen.pacer import Stage
from loadgen.report import Totals, totals_of_commands
from loadgen.spec import DriverResult, LoadError, LoadSpec, Payload
from shardbus.demo import GetCount, Tick, bus
from shardbus.metrics import bucket_bounds_us, bucket_index

PUBLISH = pytest.mark.parametrize("call", ["publish_many", "publish"])


async def drive(spec: LoadSpec, application: shardbus.Bus = bus) -> tuple[DriverResult, Totals]:
    async with application.local() as client:
        result = await Driver(spec, client, plan_of(spec)).run()
        return result, totals_of(await client.evidence([client.publisher]))


@PUBLISH
async def test_a_paced_run_sends_what_was_scheduled_and_measures_all_but_the_warm_up(call):
    spec = LoadSpec(rate=1000.0, warmup_s=0.1, duration_s=0.3, keys=10, call=call)
    result, totals = await drive(spec)
    assert result.scheduled == 300
    assert not result.interrupted
    # A machine that stood still at the end of the warm-up sends the rest of it in the window, unmeasured; one that did so
    # for long at the end may have had to break the schedule off.
    assert 0 < totals.samples <= min(result.sent, 300)
    assert sum(result.send_lag_us.values()) == totals.samples
    assert result.final.published == totals.distinct == result.final.handled == 100 + totals.samples
    assert (totals.repeats, totals.out_of_order, totals.missing) == (0, 0, 0)


@PUBLISH
async def test_the_making_of_its_events_is_in_the_send_lag_and_what_publish_takes_is_not(call, monkeypatch):
    spec = LoadSpec(rate=100.0, warmup_s=0.0, duration_s=0.1, keys=10, call=call)
    async with bus.local() as client:
        driver = Driver(spec, client, plan_of(spec))
        take, send, early_ns = driver._source.take, driver._send, [0]
        clock = time.monotonic_ns

        def slow_take(count):
            early_ns[0] += 20_000_000  # ns that this takes
            return take(count)

        async def slow_send(load, intended_ns):
            await send(load, intended_ns)
            early_ns[0] += 20_000_000_000

        monkeypatch.setattr(time, "monotonic_ns", lambda: clock() + early_ns[0])
        monkeypatch.setattr(driver._source, "take", slow_take)
        monkeypatch.setattr(driver, "_send", slow_send)
        result = await driver.run()
    assert result.sent == sum(result.send_lag_us.values()) > 0
    assert min(result.send_lag_us) >= 20_000
    assert max(result.send_lag_us) < 20_000_000


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

    spec = LoadSpec(rate=1000.0, warmup_s=0.0, duration_s=0.1, keys=1, payload=Payload(low=33))
    result, _ = await drive(spec, application)
    assert seen == [(n, 33) for n in range(result.sent)]


async def test_a_bus_that_fails_every_event_has_dead_letters_and_no_loss():
    application = shardbus.Bus("failing")

    @application.on(Tick)
    async def fail(event: Tick) -> None:
        raise ValueError(event.key)

    result, totals = await drive(LoadSpec(rate=500.0, warmup_s=0.0, duration_s=0.1, keys=5), application)
    assert result.final.dead == totals.dead == totals.distinct == result.final.published


LOADS = {
    "even": LoadSpec(rate=1000.0, warmup_s=0.0, duration_s=3600.0, keys=10),
    "poisson": LoadSpec(rate=1000.0, warmup_s=0.0, duration_s=3600.0, keys=10, arrivals="poisson"),
    "stages": LoadSpec(rate=None, stages=(Stage(500.0, 3600.0, to=1e6),), warmup_s=0.0, keys=10),
    "at will": LoadSpec(rate=None, warmup_s=0.0, duration_s=3600.0, keys=10),
    "commands": LoadSpec(rate=100.0, warmup_s=0.0, duration_s=3600.0, keys=10, commands=True),
}


@pytest.mark.parametrize("spec", LOADS.values(), ids=LOADS)
async def test_a_run_that_is_stopped_sends_no_more_and_says_what_it_did_until_then(spec):
    async with bus.local() as client:
        driver = Driver(spec, client, plan_of(spec))
        running = asyncio.create_task(driver.run())
        while not driver.progress().counts.finished:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        driver.stop()
        result = await running
        driver.stop()  # nothing is left to be stopped
        assert result.interrupted
        assert result.window_s > 0
        assert result.final.published == result.final.handled == result.sent > 0
        if spec.is_paced:
            assert result.scheduled is not None
            assert result.sent <= result.scheduled < 100_000  # of at least 360,000
        else:
            assert result.scheduled is None


async def test_replies_are_noted_while_the_driver_waits_for_the_next_command_to_be_due():
    """At 500 commands a second each was noted three waits late, and the waits were the figure. Two it may take in one
    process: one for the handler, one for the reply."""
    spec = LOADS["commands"]
    async with bus.local() as client:
        driver = Driver(spec, client, plan_of(spec))
        load = driver._source.take(1)
        await driver._send(load, [time.monotonic_ns()])
        for _ in range(2):
            await driver._idle(100_000)
        assert driver._counts().handled == 1
        assert not driver._commands.under_way


@pytest.mark.parametrize("rate", [200_000.0, None])
async def test_one_that_waits_for_room_is_stopped_as_well(rate):
    application, gate = shardbus.Bus("full"), asyncio.Event()

    @application.on(Tick)
    async def wait(event: Tick) -> None:
        await gate.wait()

    async with application.local(close_timeout=60.0) as client:
        spec = LoadSpec(rate=rate, warmup_s=0.0, duration_s=3600.0, keys=10, flush_s=0.1)
        driver = Driver(spec, client, plan_of(spec))
        running = asyncio.create_task(driver.run())
        while not client.statistics().waits:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        driver.stop()
        result = await running
        gate.set()
    assert result.interrupted
    assert result.final.in_flight + result.final.waiting == result.final.published > 0


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
    assert len(lags._exact) + len(lags._late) <= 65_536 + 27_648
    assert len(lags.counts()) <= 27_648


def test_what_is_told_bit_by_bit_is_told_as_a_whole_too_and_that_takes_nothing_away():
    lags = Lags()
    lags.add([0], 5_000)
    assert lags.take_new() == {5: 1}
    lags.add([0, 0], 7_000)
    assert lags.counts() == {5: 1, 7: 2}
    assert lags.take_new() == {7: 2}
    assert lags.take_new() == {}
    assert lags.counts() == {5: 1, 7: 2}


def test_what_a_long_run_counts_takes_no_more_memory_than_a_short_one():
    totals = LagTotals()
    size = len(totals._counts)
    expected: Counter[int] = Counter()
    for second in range(4):
        lags = LagCounts()
        lags.add(list(range(0, 200_000_000, 1000)), (second + 1) * 1_000_000_000)
        lags.add([second * 1_000_000_000 - 1], second * 1_000_000_000 - 5_000)  # early
        totals.merge(lags.counts())
        expected.update(lags.counts())
    assert totals.counts() == dict(expected)
    assert len(totals._counts) == size == 27_648


@given(
    st.lists(st.integers(-10_000, 10**10), max_size=50).map(sorted),
    st.integers(0, 10**10),
)
def test_lags_are_counted_as_one_by_one_whatever_their_spread(instants: list[int], now_ns: int):
    lags = LagCounts()
    lags.add(instants, now_ns)
    expected: Counter[int] = Counter()
    for instant in instants:
        late_us = (now_ns - instant) // 1000
        expected[bucket_bounds_us(bucket_index(late_us))[1]] += 1
    assert lags.counts() == dict(expected)


def test_a_batch_that_is_late_is_counted_in_fewer_steps_than_it_has_events():
    class Looked(list):
        looks = 0

        def __getitem__(self, at):
            Looked.looks += 1
            return super().__getitem__(at)

    for late_ns, looks_max in ((100_000_000, 150), (1_000_000_000, 30), (10_000_000_000, 10)):
        instants = Looked(range(0, 256 * 3333, 3333))
        Looked.looks = 0
        LagCounts().add(instants, late_ns)
        assert Looked.looks <= looks_max


async def test_a_call_that_does_not_wait_has_waited_for_nothing():
    meter = WaitMeter()

    async def at_once() -> None:
        time.sleep(0.002)  # noqa: ASYNC251 - busy is not waiting

    await meter.measure(at_once())
    assert meter.waited_ns == 0


async def test_a_call_that_waits_for_room_has_waited_but_for_its_own_work():
    meter = WaitMeter()

    async def wait() -> None:
        await asyncio.sleep(0)  # the meter has seen the turn when this one goes on, however late that was
        await asyncio.sleep(0.02)

    await meter.measure(wait())
    assert meter.waited_ns > 10_000_000


async def test_commands_are_replied_to_and_timed_from_their_intended_instants():
    spec = LoadSpec(rate=500.0, warmup_s=0.1, duration_s=0.2, keys=10, commands=True)
    async with bus.local() as client:
        result = await Driver(spec, client, plan_of(spec)).run()
    totals = totals_of_commands(result)
    assert 0 < totals.samples <= min(result.sent, 100)
    assert totals.samples == sum(result.send_lag_us.values())
    assert result.final.published == result.final.handled == totals.distinct == 50 + totals.samples
    assert totals.latency_us.max >= min(result.send_lag_us)


async def test_commands_that_fail_and_commands_without_a_reply_are_told_apart():
    application = shardbus.Bus("moody")

    @application.command(GetCount)
    async def answer(command: GetCount) -> int:
        if command.key == "k0":
            raise ValueError("no")
        if command.key == "k1":
            await asyncio.sleep(30)
        return 1

    spec = LoadSpec(rate=300.0, warmup_s=0.0, duration_s=0.1, keys=3, commands=True, timeout_s=0.3, flush_s=0.1)
    async with application.local(close_timeout=0.1) as client:
        result = await Driver(spec, client, plan_of(spec)).run()
    final = result.final
    totals = totals_of_commands(result)
    assert 0 < final.dead == totals.dead < final.published
    assert final.in_flight == 0
    assert final.published - totals.distinct > 0


NOT_TAKEN = [
    ("UnknownCommand", "GetCount", True),
    ("ValidationError", "missing required field", True),
    ("LookupError", "its handler's own", False),
]


@pytest.mark.parametrize(("error_type", "error", "refused"), NOT_TAKEN)
async def test_a_command_that_the_application_does_not_take_is_no_load(error_type: str, error: str, refused: bool):
    class Refusing:
        address = "ipc:///run/bus"

        async def execute(self, command: GetCount, *, timeout: float) -> None:
            raise shardbus.CommandFailed("GetCount", error_type, error)

    spec = LoadSpec(rate=5.0, commands=True)
    expected = pytest.raises(LoadError, match=error_type) if refused else contextlib.nullcontext()
    with expected:
        await _check_command(Refusing(), spec)


@pytest.mark.parametrize("arrivals", ["even", "poisson"])
async def test_stages_are_sent_as_they_were_asked_for(arrivals):
    stages = (Stage(500.0, 0.1), Stage(500.0, 0.2, 2000.0))
    spec = LoadSpec(rate=None, stages=stages, arrivals=arrivals, warmup_s=0.1, keys=10)
    result, totals = await drive(spec)
    expected = 50 + 250
    assert abs(result.scheduled - expected) <= (0 if arrivals == "even" else 5 * expected**0.5)
    assert 0 < totals.samples <= min(result.sent, result.scheduled)
    assert sum(result.send_lag_us.values()) == totals.samples
