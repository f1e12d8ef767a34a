"""That the figures of loadgen are right: held against arithmetic that needs no bus.

Nothing here depends on how fast the machine is: stalls and service times are long beside everything that a machine adds,
and they are measured where they happen.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from buses import RunningBus

import shardbus
from loadgen.collector import totals_of
from loadgen.driver import Driver, plan_of
from loadgen.histogram import Percentiles, percentiles_us
from loadgen.injector import Injector
from loadgen.spec import LoadSpec, Template
from shardbus.demo import GetCount

MakeBus = Callable[..., RunningBus]

WITHIN = 0.03
_NS = 1_000_000_000


def percentiles_of(times_s: Sequence[float]) -> Percentiles:
    found = percentiles_us((round(seconds * 1e6), 1) for seconds in times_s)
    assert found is not None
    return found


def assert_equal(found: Percentiles, expected: Percentiles, names: Sequence[str]) -> None:
    for name in names:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=WITHIN), (name, found, expected)


async def one_after_another(client: shardbus.Client, until_s: float) -> Counter[int]:
    """What a closed loop sees: the next request goes when the reply to the last one has come."""
    times_us: Counter[int] = Counter()
    while time.monotonic() < until_s:
        began_ns = time.monotonic_ns()
        await client.execute(GetCount(key="closed"), timeout=30.0)
        times_us[(time.monotonic_ns() - began_ns) // 1000] += 1
        await asyncio.sleep(0.001)
    return times_us


async def test_a_worker_that_stands_still_gives_the_percentiles_of_arithmetic_and_a_closed_loop_hides_them(
    make_bus: MakeBus,
) -> None:
    # Slow enough that what piled up is handled in no time once the worker goes on.
    rate, seconds, stop_at_s, stop_s = 200.0, 8.0, 1.0, 3.0
    bus = make_bus("--workers", "1", application=None)
    bus.wait_ready()
    spec = LoadSpec(rate=rate, duration_s=seconds, warmup_s=0.0, keys=100)
    async with shardbus.connect(bus.address) as client, shardbus.connect(bus.address) as other:
        start_ns = time.monotonic_ns() + _NS // 10
        driver = Driver(spec, client, plan_of(spec), start_ns)

        async def stall() -> float:
            await asyncio.sleep(0.1 + stop_at_s)
            return await Injector(other).stop(0, stop_s)

        result, stopped_s, closed_us = await asyncio.gather(
            driver.run(), stall(), one_after_another(other, start_ns / _NS + seconds)
        )
        totals = totals_of(await other.evidence([client.publisher]))
    assert result.sent == totals.samples == seconds * rate
    # An event that is due while the worker stands still waits until it goes on; all others wait for nothing to speak of.
    waits = [stopped_s - n / rate for n in range(int(stopped_s * rate))]
    expected = percentiles_of(waits + [0.0] * (int(seconds * rate) - len(waits)))
    assert totals.latency_us is not None
    assert_equal(totals.latency_us, expected, ("p90", "p99", "p99_9", "max"))
    # The closed loop sent nothing while it waited: one bad time among many good ones.
    closed = percentiles_us(closed_us.items())
    assert closed is not None
    assert closed.max == pytest.approx(stopped_s * 1e6, rel=WITHIN)
    assert closed.p99 * 10 < totals.latency_us.p99


QUEUE = """
import asyncio
import time

from shardbus import Bus, Command, Event


class Work(Event, key="key"):
    key: str
    n: int


class GetTimes(Command[list[tuple[int, int]]], key="key"):
    key: str
    first: int


bus = Bus("queue")
times: list[tuple[int, int]] = []
LENGTHS_S = __LENGTHS__


@bus.on(Work)
async def work(event: Work) -> None:
    began_ns = time.monotonic_ns()
    await asyncio.sleep(LENGTHS_S[event.n % len(LENGTHS_S)])
    times.append((event.n, time.monotonic_ns() - began_ns))


@bus.command(GetTimes)
async def get_times(command: GetTimes) -> list[tuple[int, int]]:
    return times[command.first : command.first + 500]
"""


class GetTimes(shardbus.Command[list[tuple[int, int]]], key="key"):
    key: str
    first: int


def lindley(arrivals_ns: Sequence[int], services_ns: Sequence[int]) -> list[float]:
    """Response times in seconds of one server that takes one event after another (D. V. Lindley, 1952).

    An event waits for what is left of the one before: W' = max(0, W + S - A), where A is the time between the two.
    """
    found: list[float] = []
    wait_ns = 0
    for at, service_ns in enumerate(services_ns):
        if at:
            wait_ns = max(0, wait_ns + services_ns[at - 1] - (arrivals_ns[at] - arrivals_ns[at - 1]))
        found.append((wait_ns + service_ns) / _NS)
    return found


def test_the_recursion_itself_is_right() -> None:
    # Arrivals at 0, 1, 2, 10; each takes 3: ends at 3, 6, 9, 13.
    assert lindley([0, _NS, 2 * _NS, 10 * _NS], [3 * _NS] * 4) == [3.0, 5.0, 7.0, 3.0]


async def test_response_times_of_one_key_are_those_of_its_arrivals_and_service_times(
    make_bus: MakeBus, short_path: Path
) -> None:
    chance = random.Random(11)
    lengths_s = [round(0.15 + chance.expovariate(1 / 0.15), 4) for _ in range(64)]
    (short_path / "queue_app.py").write_text(QUEUE.replace("__LENGTHS__", repr(lengths_s)))
    bus = make_bus("--workers", "1", application="queue_app:bus")
    bus.wait_ready()
    spec = LoadSpec(
        rate=1.8,
        arrivals="poisson",
        duration_s=20.0,
        warmup_s=0.0,
        keys=1,
        seed=5,
        template=Template(type="Work", key="key", body={"n": "{n}"}),
    )
    plan = plan_of(spec)
    async with shardbus.connect(bus.address) as client:
        start_ns = time.monotonic_ns() + _NS // 10
        result = await Driver(spec, client, plan, start_ns).run()
        await client.flush(60.0)
        totals = totals_of(await client.evidence([client.publisher]))
        times: list[tuple[int, int]] = []
        while page := await client.execute(GetTimes(key="k0", first=len(times))):
            times += page
    assert [n for n, _ in times] == list(range(result.sent))
    assert totals.samples == result.sent > 20
    assert plan.arrivals is not None
    arrivals = plan.arrivals(start_ns)
    arrivals.scheduled(plan.length_ns)
    arrivals_ns = arrivals.intended_ns(0, result.sent)
    services_ns = [service_ns for _, service_ns in times]
    responses_s = lindley(arrivals_ns, services_ns)
    # It is queueing that is tested: a good part of the events found the one before still there.
    waited = sum(response * _NS > service + 1 for response, service in zip(responses_s, services_ns, strict=True))
    assert waited > result.sent / 4
    expected = percentiles_of(responses_s)
    assert totals.latency_us is not None
    assert_equal(totals.latency_us, expected, ("p50", "p90", "p99", "p99_9", "max"))
