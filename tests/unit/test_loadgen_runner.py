"""What a run finds out before it starts anything, and what it tells of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loadgen.runner
from loadgen.runner import run_async
from loadgen.spec import FaultSpec, LoadError, LoadSpec, Recording


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
