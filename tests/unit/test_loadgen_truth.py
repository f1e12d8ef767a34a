"""What loadgen must find: a bus that loses, doubles or overtakes one event, and a generator that is itself too slow.

The buses are real ones in this process, behind clients that break one promise and claim that all is well.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

import shardbus
from loadgen.collector import totals_of
from loadgen.driver import Driver, plan_of
from loadgen.machine import this_machine
from loadgen.report import BusState, Report, make_report
from loadgen.source import Load, Source
from loadgen.spec import LoadSpec
from shardbus.demo import bus

_VICTIM = 3  # of the first batch that has so many


class FaultyClient:
    """A client that does something to one batch, and says that it did not."""

    def __init__(self, client: shardbus.Client) -> None:
        self._client = client
        self._struck = False
        self._hidden = 0  # events that the real client does not know of, or knows of too many

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def publish_many(self, events: Sequence[Any], *, ordinals: Sequence[int], intended_ns: Any) -> None:
        columns = list(zip(events, ordinals, intended_ns or [0] * len(events), strict=True))
        if not self._struck and len(columns) > _VICTIM:
            self._struck = True
            columns = self.strike(columns)
            self._hidden = len(events) - len(columns)
        events, ordinals, instants = zip(*columns, strict=True)
        await self._client.publish_many(events, ordinals=ordinals, intended_ns=instants)

    def strike(self, columns: list[Any]) -> list[Any]:
        return columns

    def ledger(self) -> shardbus.Ledger:
        ledger = self._client.ledger()
        return msgspec.structs.replace(
            ledger, published=ledger.published + self._hidden, handled=ledger.handled + self._hidden
        )


class Drops(FaultyClient):
    def strike(self, columns: list[Any]) -> list[Any]:
        return columns[:_VICTIM] + columns[_VICTIM + 1 :]


class Doubles(FaultyClient):
    def strike(self, columns: list[Any]) -> list[Any]:
        return columns[: _VICTIM + 1] + columns[_VICTIM:]


class Swaps(FaultyClient):
    def strike(self, columns: list[Any]) -> list[Any]:
        columns[_VICTIM - 1], columns[_VICTIM] = columns[_VICTIM], columns[_VICTIM - 1]
        return columns


class SlowSource:
    """A source that takes its time, as a generator does that builds large events."""

    def __init__(self, source: Source, pause_s: float) -> None:
        self._source = source
        self._pause_s = pause_s

    def take(self, count: int) -> Load:
        time.sleep(self._pause_s)
        return self._source.take(min(count, 1))


async def report_of(
    spec: LoadSpec, faulty: type[FaultyClient] | None = None, *, pause_s: float | None = None
) -> Report:
    plan = plan_of(spec)
    if pause_s is not None:
        plan = msgspec.structs.replace(plan, source=SlowSource(plan.source, pause_s))
    async with bus.local() as client:
        seen: Any = client if faulty is None else faulty(client)
        result = await Driver(spec, seen, plan).run()
        totals = totals_of(await client.evidence([client.publisher]))
    return make_report(
        spec,
        result,
        totals,
        BusState(workers=(), waiting=0),
        address="local",
        one_clock=True,
        machine=this_machine(),
    )


# One key, so that neighbours in a batch are neighbours of a key. Paced, so that batches stay as they are.
ONE_KEY = LoadSpec(rate=None, warmup_s=0.0, duration_s=0.2, keys=1)

FAULTS = [
    (Drops, "lost", 1, "1 event was acknowledged, and nothing shows that it was ever handled"),
    (Doubles, "duplicates", 1, "1 of 1 repeats was not announced"),
    (Swaps, "out_of_order", 1, "1 event was handled after a later one of its key"),
]


@pytest.mark.parametrize(("faulty", "figure", "count", "said"), FAULTS, ids=[row[0].__name__ for row in FAULTS])
async def test_one_event_of_many_that_went_wrong_is_found(
    faulty: type[FaultyClient], figure: str, count: int, said: str
) -> None:
    report = await report_of(ONE_KEY, faulty)
    assert report.published > 1000
    assert (report.verdict, report.exit_code, getattr(report, figure)) == ("failed", 1, count)
    assert said in "; ".join(report.reasons)
    others = {"lost", "duplicates", "out_of_order"} - {figure}
    assert [getattr(report, name) for name in others] == [0, 0]


async def test_a_sound_bus_behind_the_same_client_is_ok() -> None:
    assert (await report_of(ONE_KEY, FaultyClient)).verdict == "ok"


async def test_a_lost_event_is_found_in_a_paced_run_too_and_its_latency_is_not_quoted() -> None:
    report = await report_of(LoadSpec(rate=20_000.0, warmup_s=0.0, duration_s=0.5, keys=1), Drops)
    assert (report.verdict, report.lost, report.latency_us) == ("failed", 1, None)


async def test_a_generator_that_was_slowed_on_purpose_is_refused_as_the_bottleneck() -> None:
    report = await report_of(LoadSpec(rate=2000.0, warmup_s=0.0, duration_s=0.5, keys=10), pause_s=0.002)
    assert (report.verdict, report.exit_code, report.latency_us) == ("generator-bound", 3, None)
    assert "cannot offer this rate here" in "; ".join(report.reasons)
    assert report.lost == 0
