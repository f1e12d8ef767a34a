"""Does the bus keep its promises under fire? Faults at random from a seed, while events flow, and a count of everything.

Workers get SIGKILL, SIGSTOP for up to a second, and SIGTERM; the supervisor gets SIGKILL, and `serve` is started again; some
handlers block their worker's event loop until it is replaced; one event in ten fails, some of them for good. Every event is
stamped, so the shards' evidence shows what was lost, overtaken or repeated unannounced.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections import Counter
from typing import Any, Final

import msgspec

import shardbus
from benchmarks import scenarios
from loadgen.collector import totals_of
from loadgen.injector import RECOVERED_S_MAX, Injector
from loadgen.processes import Fault, inject, started_bus
from shardbus import Bus, Context, Event, Retry

_WORKERS: Final = 4
_KEYS: Final = 1000
_BATCH: Final = 20
_ALWAYS: Final = 1_000_000  # fails so often that it never succeeds
_BLOCKS_S: Final = 8.0  # longer than a worker may be silent
_SETTLE_S: Final = 180.0
_P50_RECOVERY_S: Final = 0.7
_P99_RECOVERY_S: Final = 2.0


class Work(Event, key="key"):
    """An event whose handler fails so many times, or blocks its worker the first time."""

    key: str
    fails: int = 0
    blocks_s: float = 0.0


bus = Bus("chaos")


@bus.on(Work, retry=Retry(attempts=4, base_s=0.05))
async def work(event: Work, context: Context) -> None:
    """Do as the event says."""
    if event.blocks_s and not context.redelivered:
        time.sleep(event.blocks_s)  # noqa: ASYNC251 - this is the fault
    if context.attempt <= event.fails:
        raise ValueError(f"attempt {context.attempt} fails")


class Tally(msgspec.Struct):
    """What was done, and what was seen."""

    faults: Counter[str]
    recoveries_s: list[float]
    doomed: int = 0  # published events that must become dead letters
    blocking: int = 0  # events to publish that block their worker


class Bench:
    """A bus that is served again whenever its supervisor is killed."""

    def __init__(self, address: str, stack: contextlib.AsyncExitStack) -> None:
        self.address = address
        self._stack = stack
        self.supervisor: Any = None

    async def serve(self) -> None:
        """Start it, or start it again."""
        self.supervisor = await self._stack.enter_async_context(
            started_bus(_WORKERS, self.address, application="benchmarks.chaos:bus", log_level="error")
        )


async def _publish(client: shardbus.Client, rate: float, chance: random.Random, tally: Tally, stop: asyncio.Event) -> None:
    """Stamped events at about this rate until told to stop; one in ten fails, one of those for good."""
    ordinals = [0] * _KEYS
    while not stop.is_set():
        events, stamps = [], []
        for _ in range(_BATCH):
            key = chance.randrange(_KEYS)
            ordinals[key] += 1
            fails = 0 if chance.random() >= 0.1 else chance.choice([1, 1, 1, 1, 2, 2, 2, 3, 3, _ALWAYS])
            blocks_s = 0.0
            if tally.blocking:
                tally.blocking -= 1
                blocks_s, fails = _BLOCKS_S, 0
            tally.doomed += fails == _ALWAYS
            events.append(Work(key=f"k{key}", fails=fails, blocks_s=blocks_s))
            stamps.append(ordinals[key])
        await client.publish_many(events, ordinals=stamps)
        await asyncio.sleep(_BATCH / rate)


async def _faults(bench: Bench, client: shardbus.Client, count: int, chance: random.Random, tally: Tally) -> None:
    """So many faults, one after another, at random."""
    injector = Injector(client)
    for number in range(count):
        await asyncio.sleep(chance.uniform(0.05, 0.5))
        kind = chance.choices(["kill", "stop", "terminate", "supervisor", "block"], [60, 22, 12, 3, 3])[0]
        shard = chance.randrange(_WORKERS)
        pause_s = chance.uniform(0.1, 1.0)
        if kind == "supervisor":
            inject(bench.supervisor.pid, Fault.KILL)
            await bench.supervisor.wait()
            await bench.serve()
        elif kind == "block":
            tally.blocking += 1
        elif kind == "stop":
            await injector.stop(shard, pause_s)
        elif kind == "kill":
            recovery_s = await injector.kill(shard)
            tally.recoveries_s.append(RECOVERED_S_MAX if recovery_s is None else recovery_s)
        else:
            inject((await injector.worker(shard))["pid"], Fault.TERMINATE)
        tally.faults[kind] += 1
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {count} faults", end="", file=sys.stderr)


async def _settled(client: shardbus.Client) -> dict[str, Any]:
    """The bus once nothing waits in its stores and nothing moves any more, or as it is when that takes too long."""
    end = time.monotonic() + _SETTLE_S
    handled = -1
    while True:
        status = await client.status(timeout=10.0)
        still = handled == status["handled"] and all(one["state"] == "up" for one in status["workers"])
        if (still and not status["waiting"]) or time.monotonic() > end:
            return status
        handled = status["handled"]
        await asyncio.sleep(1.5)  # workers report once a second


async def benchmark(options: argparse.Namespace) -> int:
    """Run, count, and print; the exit code."""
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    tally = Tally(faults=Counter(), recoveries_s=[])
    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        bench = Bench(f"ipc://{tempfile.gettempdir()}/shardbus-chaos-{os.getuid()}", stack)
        await bench.serve()
        client = await stack.enter_async_context(shardbus.connect(bench.address, close_timeout=1.0))
        await client.purge()
        before = (await _settled(client))["dead_letters"]
        began = time.monotonic()
        publishing = asyncio.create_task(_publish(client, options.rate, random.Random(f"{seed}/events"), tally, stop))
        await _faults(bench, client, options.faults, random.Random(f"{seed}/faults"), tally)
        stop.set()
        await publishing
        took_s = time.monotonic() - began
        ledger = await client.flush(_SETTLE_S)
        status = await _settled(client)
        totals = totals_of(await client.evidence([client.publisher], timeout=30.0))
        dead = status["dead_letters"] - before
        await client.purge()
    kinds = ", ".join(f"{count} {kind}" for kind, count in tally.faults.most_common())
    print(f"\n{options.faults} faults in {took_s:.0f} s: {kinds}")
    recoveries = sorted(tally.recoveries_s) or [0.0]
    p50, p99 = recoveries[len(recoveries) // 2], recoveries[int(len(recoveries) * 0.99)]
    left = ledger.published - ledger.handled - ledger.dead - ledger.waiting - ledger.dropped - ledger.in_flight

    def none(name: str, count: int) -> scenarios.Check:
        return scenarios.Check(name=name, measured=f"{count:,}", target="0", passed=count == 0)

    checks = [
        none(f"lost, of {ledger.published:,} published", ledger.published - totals.distinct),
        none("out of order", totals.out_of_order),
        none(f"unannounced repeats, of {totals.repeats:,} repeats", totals.repeats - totals.announced),
        none("missing from the ledger", left),
        none("in flight at the end", ledger.in_flight),
        none("waiting at the end", status["waiting"]),
        none(f"dead letters that should not be, or are not, of {tally.doomed:,}", abs(dead - tally.doomed)),
        none("shards given up", sum(one["state"] == "given-up" for one in status["workers"])),
        scenarios.at_most_us("killed to first handled again, p50", int(p50 * 1e6), int(options.p50 * 1e6)),
        scenarios.at_most_us("killed to first handled again, p99", int(p99 * 1e6), int(options.p99 * 1e6)),
    ]
    method = (
        f"{_WORKERS} workers, {options.rate:,.0f} events/s over {_KEYS:,} keys; a tenth fails, a hundredth for good",
        "the same seed makes the same events and faults in the same order; when they meet is the machine's to decide",
    )
    return scenarios.show(f"chaos, seed {seed}", checks, method)


def main() -> int:
    """Parse options and run."""
    parser = scenarios.parser("chaos", __doc__)
    parser.add_argument("--faults", type=int, default=100, metavar="N", help="how many (default 100)")
    parser.add_argument("--rate", type=float, default=5000.0, metavar="N", help="events per second (default 5000)")
    parser.add_argument("--seed", type=int, metavar="N", help="of events and faults; default: a new one")
    parser.add_argument("--p50", type=float, default=_P50_RECOVERY_S, metavar="S", help="target of the median recovery")
    parser.add_argument("--p99", type=float, default=_P99_RECOVERY_S, metavar="S", help="target of its 99th percentile")
    return scenarios.main(benchmark(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
