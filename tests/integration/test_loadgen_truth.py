"""That the figures of loadgen are right: held against arithmetic that needs no bus.

Stalls and service times are long beside what a machine adds, they are measured where they happen, and the arithmetic is
done on the instants of the run itself. A machine that is busy with others adds delays all the same, and a bound of 3 % is
not loosened for it. So a run that says of itself that it was disturbed (generator-bound, a send lag whose p99 is above a
tenth of the bound, a handler that woke a third of it too late) and is wrong is made again, twice at most; a run that was
clean is judged at once.

The same arithmetic without processes, on thousands of events, is in `tests/unit/test_loadgen_arithmetic.py`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import pytest
from buses import RunningBus
from queueing import NS, WITHIN, differences, lindley, percentiles_of

import shardbus
from loadgen.collector import totals_of
from loadgen.driver import Driver, plan_of
from loadgen.histogram import Percentiles, percentiles_us
from loadgen.injector import Injector
from loadgen.machine import this_machine
from loadgen.report import BusState, Totals, make_report
from loadgen.spec import DriverResult, LoadSpec, Template
from shardbus.demo import GetCount

MakeBus = Callable[..., RunningBus]

pytestmark = pytest.mark.alone

TURNS_MAX: Final = 3


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """A run: what is wrong with its figures, and whether it says of itself that it was disturbed."""

    wrong: list[str]
    disturbed: bool


async def judged(measure: Callable[[], Awaitable[Measured]]) -> list[str]:
    """What is wrong with a measurement that was clean, or else with the best of some."""
    for _ in range(TURNS_MAX):
        found = await measure()
        if not found.wrong or not found.disturbed:
            break
    return found.wrong


def is_disturbed(spec: LoadSpec, result: DriverResult, totals: Totals, expected: Percentiles, names: Sequence[str]) -> bool:
    bus = BusState(workers=(), waiting=0)
    report = make_report(spec, result, totals, bus, address="here", one_clock=True, machine=this_machine())
    bound_us = WITHIN * min(getattr(expected, name) for name in names)
    assert report.send_lag_us is not None
    return report.verdict == "generator-bound" or report.send_lag_us.p99 > bound_us / 10


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
    spec = LoadSpec(rate=200.0, duration_s=8.0, warmup_s=0.0, keys=100)
    stop_at_s, stop_s = 1.0, 3.0
    bus = make_bus("--workers", "1", application=None)
    bus.wait_ready()
    names = ("p90", "p99", "p99_9", "max")

    async def measure() -> Measured:
        plan = plan_of(spec)
        async with shardbus.connect(bus.address) as client, shardbus.connect(bus.address) as other:
            start_ns = time.monotonic_ns() + NS // 10
            driver = Driver(spec, client, plan, start_ns)

            async def stall() -> tuple[int, int]:
                await asyncio.sleep(0.1 + stop_at_s)
                stopped_s = await Injector(other).stop(0, stop_s)
                ended_ns = time.monotonic_ns()
                return ended_ns - round(stopped_s * NS), ended_ns

            result, (began_ns, ended_ns), closed_us = await asyncio.gather(
                driver.run(), stall(), one_after_another(other, start_ns / NS + spec.planned_s)
            )
            totals = totals_of(await other.evidence([client.publisher]))
        assert result.sent == totals.samples
        # An event that is due while the worker stands still waits until it goes on; all others wait for nothing to speak of.
        assert plan.arrivals is not None
        intended_ns = plan.arrivals(start_ns).intended_ns(0, result.sent)
        expected = percentiles_of([(ended_ns - due) / NS if began_ns <= due < ended_ns else 0.0 for due in intended_ns])
        wrong = differences(totals.latency_us, expected, names)
        # The closed loop sent nothing while it waited: one bad time among many good ones.
        closed = percentiles_us(closed_us.items())
        assert closed is not None
        stopped = percentiles_of([(ended_ns - began_ns) / NS])
        wrong += [f"closed loop: {text}" for text in differences(closed, stopped, ("max",))]
        if totals.latency_us is None or closed.p99 * 10 >= totals.latency_us.p99:
            wrong.append(f"the closed loop's p99 is {closed.p99:,} µs")
        return Measured(wrong=wrong, disturbed=is_disturbed(spec, result, totals, expected, names))

    assert await judged(measure) == []


QUEUE = """
import asyncio
import time

from shardbus import Bus, Command, Event


class Work(Event, key="key"):
    key: str
    n: int


class GetTimes(Command[list[tuple[int, int, int]]], key="key"):
    key: str
    first: int


bus = Bus("queue")
times: list[tuple[int, int, int]] = []
LENGTHS_S = __LENGTHS__


@bus.on(Work)
async def work(event: Work) -> None:
    began_ns = time.monotonic_ns()
    await asyncio.sleep(LENGTHS_S[event.n % len(LENGTHS_S)])
    times.append((event.n, began_ns, time.monotonic_ns()))


@bus.command(GetTimes)
async def get_times(command: GetTimes) -> list[tuple[int, int, int]]:
    return times[command.first : command.first + 500]
"""


class GetTimes(shardbus.Command[list[tuple[int, int, int]]], key="key"):
    key: str
    first: int


async def test_response_queue_and_service_times_of_one_key_are_those_of_its_arrivals_and_its_handler(
    make_bus: MakeBus, short_path: Path
) -> None:
    chance = random.Random(11)
    lengths_s = [round(0.15 + chance.expovariate(1 / 0.15), 4) for _ in range(64)]
    (short_path / "queue_app.py").write_text(QUEUE.replace("__LENGTHS__", repr(lengths_s)))
    bus = make_bus("--workers", "1", application="queue_app:bus")
    bus.wait_ready()
    template = Template(type="Work", key="key", body={"n": "{n}"})
    spec = LoadSpec(rate=1.8, arrivals="poisson", duration_s=12.0, warmup_s=0.0, keys=1, seed=5, template=template)
    names = ("p50", "p90", "p99", "p99_9", "max")
    before = 0

    async def measure() -> Measured:
        nonlocal before
        plan = plan_of(spec)
        async with shardbus.connect(bus.address) as client:
            start_ns = time.monotonic_ns() + NS // 10
            result = await Driver(spec, client, plan, start_ns).run()
            await client.flush(60.0)
            totals = totals_of(await client.evidence([client.publisher]))
            times: list[tuple[int, int, int]] = []
            while page := await client.execute(GetTimes(key="k0", first=before + len(times))):
                times += page
            before += len(times)
        assert [n for n, _, _ in times] == list(range(result.sent))
        assert totals.samples == result.sent > 12
        assert plan.arrivals is not None
        arrivals = plan.arrivals(start_ns)
        arrivals.scheduled(plan.length_ns)
        arrivals_ns = arrivals.intended_ns(0, result.sent)
        # What the handler itself saw leaves next to no room for the machine.
        seen = percentiles_of([(end - due) / NS for (_, _, end), due in zip(times, arrivals_ns, strict=True)])
        wrong = [f"seen by the handler: {text}" for text in differences(totals.latency_us, seen, names)]
        services_ns = [end - began for _, began, end in times]
        services = percentiles_of([service_ns / NS for service_ns in services_ns])
        wrong += [f"service time: {text}" for text in differences(totals.service_us, services, names)]
        # Who found nobody before it has waited for next to nothing, of which a part is nothing that can be held against.
        waits = percentiles_of([(began - due) / NS for (_, began, _), due in zip(times, arrivals_ns, strict=True)])
        wrong += [f"queue time: {text}" for text in differences(totals.queue_us, waits, ("p90", "p99", "p99_9", "max"))]
        responses_s = lindley(arrivals_ns, services_ns)
        # It is queueing that is tested: a good part of the events found the one before still there.
        waited = sum(response * NS > service + 1 for response, service in zip(responses_s, services_ns, strict=True))
        assert waited > result.sent / 4
        expected = percentiles_of(responses_s)
        # A worker that stood still is late where its handler wakes.
        late_s = max(service / NS - lengths_s[n % len(lengths_s)] for n, service in enumerate(services_ns))
        return Measured(
            wrong=wrong + differences(totals.latency_us, expected, names),
            disturbed=is_disturbed(spec, result, totals, expected, names) or late_s * 1e6 > WITHIN * expected.p50 / 3,
        )

    assert await judged(measure) == []
