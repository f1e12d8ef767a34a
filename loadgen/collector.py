"""What the bus says of a run: its workers' state meanwhile, and at the end the shards' evidence of one publisher.

A publisher is new with every run, so its evidence starts from nothing and belongs to this run alone, whoever else
publishes on the same bus.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any, Final

import msgspec

import shardbus
from loadgen.histogram import percentiles_us
from loadgen.report import BusState, Totals, WorkerState
from loadgen.spec import Counts
from shardbus.metrics import Evidence, bucket_bounds_us

_POLL_S: Final = 0.2
_ASK_S: Final = 2.0  # a supervisor that is being replaced answers later; asked again until the deadline

_COUNTS: Final = ("distinct", "repeats", "announced", "out_of_order", "missing", "unchecked", "dead", "samples")


def totals_of(evidence: Iterable[Evidence]) -> Totals:
    """Add up what the shards say of one publisher, and merge their latency buckets into one histogram."""
    shards = list(evidence)
    counts = {name: sum(getattr(shard, name) for shard in shards) for name in _COUNTS}
    # Both ends of a bucket fall into the same bucket of the histogram, which has the same three digits.
    latencies = ((bucket_bounds_us(index)[0], count) for shard in shards for index, count in shard.latency)
    return Totals(**counts, latency_us=percentiles_us(latencies))


class Collector:
    """Asks a bus about a run, through a client of its own that publishes nothing."""

    def __init__(self, client: shardbus.Client) -> None:
        self._client = client
        self.latest = BusState(workers=(), waiting=0)

    async def state(self) -> BusState:
        """The bus now, or, where nobody answers in time, as it was last seen."""
        try:
            self.latest = _state_of(await self._client.status(timeout=_ASK_S))
        except shardbus.BusUnreachable:
            pass  # a supervisor may be away for a while without harm to the run
        return self.latest

    async def settle(self, publisher: bytes, final: Counts, deadline_s: float) -> Totals:
        """The evidence of a publisher that has flushed, once it accounts for every event, and at the latest in `deadline_s`.

        Events that the publisher knows as waiting are acked long before they are handled, so only their evidence tells.

        Raises:
            BusUnreachable: nobody has answered by then.
        """
        expected = final.published - final.dropped - final.in_flight
        deadline = time.monotonic() + deadline_s
        while True:
            totals = await self._totals(publisher, deadline)
            if totals.distinct >= expected or not final.waiting or time.monotonic() >= deadline:
                return totals
            await asyncio.sleep(_POLL_S)

    async def _totals(self, publisher: bytes, deadline: float) -> Totals:
        while True:
            try:
                return totals_of(await self._client.evidence([publisher], timeout=_ASK_S))
            except shardbus.BusUnreachable:
                if time.monotonic() >= deadline:
                    raise

    async def watch(self, interval_s: float) -> None:
        """Keep `latest` up to date: ask every `interval_s` seconds, for ever."""
        while True:
            await asyncio.sleep(interval_s)
            await self.state()


def _state_of(status: dict[str, Any]) -> BusState:
    workers = msgspec.convert(status["workers"], tuple[WorkerState, ...])
    return BusState(workers=workers, waiting=status["waiting"])
