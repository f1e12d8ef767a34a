"""What a run finds out before it starts anything, and what it tells of itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

import loadgen.injector
import loadgen.runner
import shardbus
from loadgen.collector import Collector
from loadgen.processes import Fault
from loadgen.report import BusState, Interval, Totals
from loadgen.runner import _Run, _Silent, run_async
from loadgen.spec import (
    Counts,
    DriverLine,
    DriverResult,
    FaultSpec,
    LoadError,
    LoadSpec,
    Part,
    Progress,
    Recording,
    Started,
    Template,
)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a bus was started")

    monkeypatch.setattr(loadgen.runner, "started_bus", start)


@pytest.mark.parametrize("application", ["shop:bus", None])
@pytest.mark.usefixtures("nothing_starts")
async def test_a_fault_of_a_shard_that_is_not_there_is_told_before_a_bus_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, application: str | None
) -> None:
    monkeypatch.setenv("SHARDBUS_URL", f"ipc://{tmp_path}/nobody")
    monkeypatch.setattr(loadgen.runner, "_PROBE_S", 0.05)
    fault = FaultSpec(kind="kill", at_s=1.0, shard=2)
    with pytest.raises(LoadError, match="kill:worker2@1s: there is no such shard; the bus has 2, counted from 0"):
        await run_async(LoadSpec(rate=5.0, application=application, workers=2, faults=(fault,)))


@pytest.mark.usefixtures("nothing_starts")
async def test_a_recording_that_is_not_there_is_told_before_a_bus_is_started(tmp_path: Path) -> None:
    recording = Recording(path=f"{tmp_path}/missing.jsonl", type="A", key="b")
    with pytest.raises(LoadError, match=r"missing\.jsonl cannot be read"):
        await run_async(LoadSpec(rate=5.0, application="shop:bus", recording=recording))


@pytest.mark.usefixtures("nothing_starts")
async def test_no_demo_is_started_for_messages_of_an_application(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDBUS_URL", f"ipc://{tmp_path}/nobody")
    monkeypatch.setattr(loadgen.runner, "_PROBE_S", 0.05)
    with pytest.raises(LoadError, match=r"no bus runs at ipc://.*/nobody that could take Sale; start yours with"):
        await run_async(LoadSpec(rate=5.0, template=Template(type="Sale", key="k")))


class Endless:
    """A driver that is never done."""

    def go(self, start_ns: int) -> None: ...

    async def lines(self, silence_s: float, *, first_s: float) -> AsyncIterator[DriverLine]:
        yield Started(publisher="00" * 16, pid=os.getpid())
        counts = Counts(published=9, handled=9, dead=0, waiting=0, dropped=0, in_flight=0)
        yield Progress(at_s=1.0, warming_up=False, counts=counts)
        await asyncio.Event().wait()


class Blind(Collector):
    """Asks a bus that has no room for the evidence of this run."""

    async def state(self) -> BusState:
        return self.latest

    async def interval(self, *_: Any) -> Interval | None:
        raise LoadError("no room for it")


class Listening(_Silent):
    """Keeps what it is told, or cannot be told anything."""

    def __init__(self, *, gone: bool = False) -> None:
        self.told: list[str] = []
        self._gone = gone

    def say(self, text: str) -> None:
        if self._gone:
            raise BrokenPipeError
        self.told.append(text)


def run_of(
    spec: LoadSpec, collector: Collector | None = None, watcher: Listening | None = None, client: object = None
) -> _Run:
    """A run whose parts are called one by one."""
    bus = cast("shardbus.Client", client)
    return _Run(spec, bus, watcher or Listening(), collector or Blind(bus, local=False), lives_on=True)


@pytest.mark.parametrize("how", ["interrupted", "over"])
async def test_no_fault_is_done_once_nothing_is_sent_any_more_and_that_is_told(how: str) -> None:
    fault = FaultSpec(kind="kill", at_s=3000.0)
    run = run_of(LoadSpec(rate=1.0, duration_s=3600.0, faults=(fault,)))
    doing = asyncio.create_task(run._fault(fault, 0, time.monotonic_ns()))
    await asyncio.sleep(0)
    if how == "interrupted":
        run._stop()
    else:
        watching = asyncio.create_task(asyncio.sleep(600))
        run._results = [cast("Any", "a result")]
        await run._end([watching, doing])
    await doing
    assert (run._faults, run._undone) == ([], ["kill:worker@3000s"])


MEASURED = Progress(
    at_s=1.0, warming_up=False, counts=Counts(published=9, handled=9, dead=0, waiting=0, dropped=0, in_flight=0)
)
ENDED = DriverResult(
    scheduled=None,
    sent=9,
    window_s=1.0,
    before=MEASURED.counts,
    after=MEASURED.counts,
    final=MEASURED.counts,
    flush_s=0.0,
    waited_s=0.0,
    send_lag_us={},
    cpu_share=0.5,
    rss_bytes=1,
)
OVER = msgspec.structs.replace(MEASURED, over=True)
NOTHING = Totals(
    distinct=0, repeats=0, announced=0, out_of_order=0, missing=0, unchecked=0, dead=0, samples=0, latency_us=None
)
STAGES: list[tuple[str, list[Progress | None], list[Any], bool, str]] = [
    ("nothing is known", [None, None], [None, None], False, ""),
    ("one warms up", [MEASURED, msgspec.structs.replace(MEASURED, warming_up=True)], [None, None], False, ""),
    ("measuring", [MEASURED, OVER], [None, None], False, "no more is sent; waiting for what is under way"),
    ("flushing", [OVER, OVER], [None, None], False, "all was sent; waiting for what is under way"),
    ("settling", [OVER, OVER], ["a", "b"], False, "all was sent; waiting no longer for what lies in stores"),
    ("ending", [OVER, OVER], ["a", "b"], True, "all is measured; ending what was started"),
]


@pytest.mark.parametrize(
    ("latest", "results", "measured", "said"), [row[1:] for row in STAGES], ids=[row[0] for row in STAGES]
)
async def test_an_interrupt_is_taken_from_the_first_measured_second_on(
    latest: list[Progress | None], results: list[Any], measured: bool, said: str
) -> None:
    watcher = Listening()
    run = run_of(LoadSpec(rate=1.0, drivers=2), watcher=watcher)
    run._latest, run._results, run._is_measured = latest, results, measured
    assert run.take_interrupt() == bool(said)
    await asyncio.sleep(0)
    assert watcher.told == ([f"interrupted: {said} (once more to end without a report)"] if said else [])
    assert run._stopped.is_set() == bool(said)


async def test_drivers_are_stopped_though_nobody_can_be_told() -> None:
    class Stopped:
        def stop(self) -> None:
            stopped.append(self)

    stopped: list[Any] = []
    run = run_of(LoadSpec(rate=1.0), watcher=Listening(gone=True))
    run._drivers = [cast("Any", Stopped())]
    with pytest.raises(BrokenPipeError):
        run._stop()
    assert len(stopped) == 1


async def test_what_drivers_say_while_the_bus_is_asked_is_the_next_intervals() -> None:
    class Slow(Blind):
        async def interval(self, drivers: Any, _: Any) -> Interval | None:
            asked.append([(line.at_s, line.send_lag_us, line.replies_us) for line in drivers])
            begun.set()
            await go.wait()
            return None

    asked: list[Any] = []
    begun, go = asyncio.Event(), asyncio.Event()
    run = run_of(LoadSpec(rate=1.0), Slow(cast("shardbus.Client", None), local=False))
    run._latest = [msgspec.structs.replace(MEASURED, send_lag_us={7: 1}, replies_us={70: 1})]

    async def lines() -> AsyncIterator[DriverLine]:
        await begun.wait()
        yield msgspec.structs.replace(MEASURED, at_s=2.0, send_lag_us={9: 2}, replies_us={70: 3})

    observing = asyncio.create_task(run._observe())
    with pytest.raises(LoadError, match="ended without a result"):
        await run._follow(0, lines())
    observing.cancel()  # what it has not shown is shown with the rest
    await asyncio.wait([observing])
    go.set()
    await run._observe()
    assert asked == [[(1.0, {7: 1}, {70: 1})], [(2.0, {7: 1, 9: 2}, {70: 4})]]


async def test_the_bus_is_asked_when_each_driver_has_said_more() -> None:
    class Counting(Blind):
        async def interval(self, drivers: Any, driver_pids: Any) -> Interval | None:
            asked.append(len(drivers))
            if len(asked) == 2:  # the first driver ends while the bus is asked
                await run._follow(0, end())
            looked_at.append(dict(driver_pids))
            return None

    async def line() -> AsyncIterator[DriverLine]:
        yield MEASURED

    async def end() -> AsyncIterator[DriverLine]:
        yield ENDED

    asked: list[int] = []
    looked_at: list[dict[int, int]] = []
    run = run_of(LoadSpec(rate=1.0, drivers=2), Counting(cast("shardbus.Client", None), local=False))
    run._running.update({0: 41, 1: 42})
    watching = asyncio.create_task(run._watch())
    found = []
    for number in (0, 0, 1, 0, 1, 1, 1):
        with pytest.raises(LoadError, match="ended without a result"):
            await run._follow(number, line())
        for _ in range(5):  # turns, for who watches
            await asyncio.sleep(0)
        found.append(len(asked))
    watching.cancel()
    assert found == [0, 0, 1, 1, 2, 3, 4]
    assert looked_at == [{0: 41, 1: 42}] + [{1: 42}] * 3  # who has ended is not missed


async def test_the_load_is_over_when_no_driver_sends_any_more() -> None:
    async def line(over: bool) -> AsyncIterator[DriverLine]:
        yield msgspec.structs.replace(MEASURED, over=over)

    run = run_of(LoadSpec(rate=1.0, drivers=2))
    found = []
    for number, over in ((0, False), (1, True), (0, True)):
        with pytest.raises(LoadError, match="ended without a result"):
            await run._follow(number, line(over))
        found.append(run._over.is_set())
    assert found == [False, False, True]
    assert not run._released.is_set()


@pytest.mark.parametrize(("accounted", "cut_short"), [(9, False), (7, True)])
async def test_an_interrupt_of_the_settling_is_told_where_it_changed_something(accounted: int, cut_short: bool) -> None:
    class Settling(Blind):
        async def settle(self, final: Counts, deadline_s: float, enough: asyncio.Event | None = None) -> Totals:
            if enough is not None:
                run._stop()
                assert enough.is_set()
            return msgspec.structs.replace(NOTHING, distinct=accounted)

    watcher = Listening()
    run = run_of(LoadSpec(rate=1.0), Settling(cast("shardbus.Client", None), local=False), watcher)
    run._results = [cast("Any", "a result")]
    final = msgspec.structs.replace(MEASURED.counts, handled=7, waiting=2)
    totals, _ = await run._settled(cast("DriverResult", SimpleNamespace(final=final)))
    assert totals.distinct == accounted
    assert run._cut_short == cut_short
    assert watcher.told == [
        "interrupted: all was sent; waiting no longer for what lies in stores (once more to end without a report)"
    ]


async def test_a_worker_that_is_stopped_goes_on_when_nothing_is_sent_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, Fault]] = []

    class Client:
        async def status(self, **_: float) -> dict[str, Any]:
            return {"workers": [{"state": "up", "pid": 42}]}

    monkeypatch.setattr(loadgen.injector, "inject", lambda pid, fault: done.append((pid, fault)) or True)
    fault = FaultSpec(kind="stop", at_s=0.0, seconds=600.0)
    run = run_of(LoadSpec(rate=1.0, faults=(fault,)), client=Client())
    doing = asyncio.create_task(run._fault(fault, 0, time.monotonic_ns()))
    while not done:  # noqa: ASYNC110 - the test ends by its time-out
        await asyncio.sleep(0.001)
    run._stop()
    await doing
    assert done == [(42, Fault.STOP), (42, Fault.CONTINUE)]
    assert 0.0 < run._faults[0].stopped_s < 600.0


async def test_a_run_that_cannot_be_judged_any_more_ends_at_once_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.asynccontextmanager
    async def started_driver(part: Part) -> AsyncIterator[Endless]:
        yield Endless()

    monkeypatch.setattr(loadgen.runner, "started_driver", started_driver)
    run = run_of(LoadSpec(rate=1.0, duration_s=3.0, warmup_s=0.0))
    async with asyncio.timeout(20.0) as limit:
        with pytest.raises(LoadError, match=r"^no room for it$"):
            await run.measure()
    assert not limit.expired()
