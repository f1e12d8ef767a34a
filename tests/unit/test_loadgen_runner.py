"""What a run finds out before it starts anything, and what it tells of itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

import loadgen.injector
import loadgen.runner
import shardbus
from loadgen.collector import Collector
from loadgen.processes import Fault
from loadgen.report import BusState, Interval
from loadgen.runner import _Run, _Silent, run_async
from loadgen.spec import (
    Counts,
    DriverLine,
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


@pytest.mark.parametrize("kind", ["kill", "stop"])
async def test_no_fault_is_done_once_nothing_is_sent_any_more(kind: Any) -> None:
    client = cast("shardbus.Client", None)
    fault = FaultSpec(kind=kind, at_s=3000.0, seconds=600.0)
    spec = LoadSpec(rate=1.0, duration_s=3600.0, faults=(fault,))
    run = _Run(spec, client, _Silent(), Blind(client, local=False), lives_on=True)
    doing = asyncio.create_task(run._fault(fault, 0, time.monotonic_ns()))
    await asyncio.sleep(0)
    run._stop()
    await doing
    assert run._faults == []


async def test_a_worker_that_is_stopped_goes_on_when_nothing_is_sent_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, Fault]] = []

    class Client:
        async def status(self, **_: float) -> dict[str, Any]:
            return {"workers": [{"state": "up", "pid": 42}]}

    monkeypatch.setattr(loadgen.injector, "inject", lambda pid, fault: done.append((pid, fault)) or True)
    client = cast("shardbus.Client", Client())
    fault = FaultSpec(kind="stop", at_s=0.0, seconds=600.0)
    run = _Run(LoadSpec(rate=1.0, faults=(fault,)), client, _Silent(), Blind(client, local=False), lives_on=True)
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
    monkeypatch.setattr(loadgen.runner, "_INTERVAL_S", 0.001)
    client = cast("shardbus.Client", None)
    spec = LoadSpec(rate=1.0, duration_s=3.0, warmup_s=0.0)
    run = _Run(spec, client, _Silent(), Blind(client, local=False), lives_on=True)
    async with asyncio.timeout(20.0) as limit:
        with pytest.raises(LoadError, match=r"^no room for it$"):
            await run.measure(contextlib.nullcontext())
    assert not limit.expired()
