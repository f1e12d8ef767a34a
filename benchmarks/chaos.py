"""Does the bus keep its promises under fire? Faults at random from a seed, while events flow, and a count of everything.

Workers get SIGKILL, SIGSTOP for up to a second, and SIGTERM; the supervisor gets SIGKILL, and `serve` is started again; a
second publisher gets SIGKILL, and another takes its place; a dead worker's store is locked by another process; some handlers
block their worker's event loop until it is replaced; some events kill whoever handles them; one event in ten fails, some of
them for good; and the stores are small, so that they fill up, until somebody purges their dead letters. Every event is
stamped, so the shards' evidence shows what was lost, overtaken or repeated unannounced. Takes about 0.8 s a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Final

import msgspec

import shardbus
from benchmarks import scenarios
from benchmarks.scenarios import at_least_one, counted, positive
from loadgen.collector import totals_of
from loadgen.injector import RECOVERED_S_MAX, Injector
from loadgen.processes import Fault, inject, started, started_bus
from loadgen.report import Totals
from shardbus import Bus, Context, DeadLetterFilter, Event, Retry

_WORKERS: Final = 4
_KEYS: Final = 1000
_BATCH: Final = 20
_ALWAYS: Final = 1_000_000  # fails so often that it never succeeds
_BLOCKS_S: Final = 8.0  # longer than a worker may be silent
_STORE_ROWS_MAX: Final = 500  # of each shard; the janitor comes when one is full
_LOCK_S: Final = 5.0  # how long the store of a worker that was killed is waited for
_SETTLE_S: Final = 180.0
_P50_RECOVERY_S: Final = 0.7
_P99_RECOVERY_S: Final = 2.0
_WEIGHTS: Final = {
    "kill": 52,
    "stop": 20,
    "terminate": 10,
    "publisher": 6,
    "poison": 4,
    "supervisor": 3,
    "block": 3,
    "lock": 2,
}


class Work(Event, key="key"):
    """An event whose handler fails so many times, blocks its worker the first time, or kills it every time."""

    key: str
    fails: int = 0
    blocks_s: float = 0.0
    kills: bool = False


bus = Bus("chaos")


@bus.on(Work, retry=Retry(attempts=4, base_s=0.05))
async def work(event: Work, context: Context) -> None:
    """Do as the event says."""
    if event.kills:
        os.abort()
    if event.blocks_s and not context.redelivered:
        time.sleep(event.blocks_s)  # noqa: ASYNC251 - this is the fault
    if context.attempt <= event.fails:
        raise ValueError(f"attempt {context.attempt} fails")


class Tally(msgspec.Struct):
    """What was done, and what was seen."""

    faults: Counter[str]
    recoveries_s: list[float]
    publishers: list[bytes]  # that were killed, or are to be
    doomed: int = 0  # published events that must become dead letters
    blocking: int = 0  # events to publish that block their worker
    killing: int = 0  # events to publish that kill it
    poisoned: int = 0  # that were published


class Bench:
    """A bus that is served again whenever its supervisor is killed, and a second publisher likewise."""

    def __init__(self, directory: str, stack: contextlib.AsyncExitStack) -> None:
        self.address = f"ipc://{directory}/bus"
        self.supervisor: asyncio.subprocess.Process
        self.publisher: asyncio.subprocess.Process
        self._store = f"{directory}/dead"
        self._stack = stack

    async def serve(self) -> None:
        """Start it, or start it again."""
        store = f"sqlite+aiosqlite:///{self._store}.db"
        options = ("--dead-letters", store, "--dead-letters-max-rows", str(_STORE_ROWS_MAX))
        serving = started_bus(
            _WORKERS, self.address, application="benchmarks.chaos:bus", log_level="error", options=options
        )
        self.supervisor = await self._stack.enter_async_context(serving)

    async def publish(self, tally: Tally) -> None:
        """Start a second publisher, or another one."""
        publishing = started(["benchmarks.chaos", "--publish", self.address], piped_stdin=True)
        self.publisher = await self._stack.enter_async_context(publishing)
        assert self.publisher.stdout is not None  # it is a pipe
        tally.publishers.append(bytes.fromhex((await self.publisher.stdout.readline()).decode().strip()))

    @contextlib.contextmanager
    def locked_store(self, shard: int) -> Iterator[None]:
        """Hold the store of a shard whose worker was just killed."""
        with contextlib.closing(sqlite3.connect(f"{self._store}-{shard}.db", timeout=_LOCK_S, isolation_level=None)) as held:
            held.execute("BEGIN EXCLUSIVE")
            yield


async def _publish(client: shardbus.Client, rate: float, chance: random.Random, tally: Tally, stop: asyncio.Event) -> None:
    """Stamped events at about this rate until told to stop; one in ten fails, one of those for good."""
    ordinals = [0] * _KEYS
    while not stop.is_set():
        events, stamps = [], []
        for _ in range(_BATCH):
            key = chance.randrange(_KEYS)
            ordinals[key] += 1
            fails = 0 if chance.random() >= 0.1 else chance.choice([1, 1, 1, 1, 2, 2, 2, 3, 3, _ALWAYS])
            blocks_s, kills = 0.0, False
            if tally.blocking:
                tally.blocking -= 1
                blocks_s, fails = _BLOCKS_S, 0
            elif tally.killing:
                tally.killing -= 1
                tally.poisoned += 1
                kills, fails = True, 0
            tally.doomed += kills or fails == _ALWAYS
            events.append(Work(key=f"k{key}", fails=fails, blocks_s=blocks_s, kills=kills))
            stamps.append(ordinals[key])
        await client.publish_many(events, ordinals=stamps)
        await asyncio.sleep(_BATCH / rate)


async def _publish_until_killed(address: str) -> None:
    """The second publisher: says who it is, and publishes stamped events until it is killed, or nobody listens any more."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    ended = asyncio.ensure_future(reader.read())
    async with shardbus.connect(address, timeout=_SETTLE_S, close_timeout=1.0) as client:
        print(client.publisher.hex(), flush=True)
        number = 0
        while not ended.done():
            turn, part = divmod(number, 50)
            events = [Work(key=f"{part}/{at}") for at in range(_BATCH)]
            await client.publish_many(events, ordinals=[turn + 1] * _BATCH)
            number += 1
            await asyncio.sleep(0.05)


async def _faults(bench: Bench, client: shardbus.Client, count: int, chance: random.Random, tally: Tally) -> None:
    """So many faults, one after another, at random."""
    injector = Injector(client)
    for number in range(count):
        await asyncio.sleep(chance.uniform(0.05, 0.5))
        kind = chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        shard = chance.randrange(_WORKERS)
        pause_s = chance.uniform(0.1, 1.0)
        match kind:
            case "supervisor":
                inject(bench.supervisor.pid, Fault.KILL)
                await bench.supervisor.wait()
                await bench.serve()
            case "publisher":
                inject(bench.publisher.pid, Fault.KILL)
                await bench.publisher.wait()
                await bench.publish(tally)
            case "block":
                tally.blocking += 1
            case "poison":
                tally.killing += 1
            case "stop":
                await injector.stop(shard, pause_s)
            case "kill":
                recovery_s = await injector.kill(shard)
                tally.recoveries_s.append(RECOVERED_S_MAX if recovery_s is None else recovery_s)
            case "lock":
                await _lock(bench, injector, shard, 2 * pause_s)
            case _:
                inject((await injector.worker(shard))["pid"], Fault.TERMINATE)
        tally.faults[kind] += 1
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {count} faults", end="", file=sys.stderr)


async def _lock(bench: Bench, injector: Injector, shard: int, seconds: float) -> None:
    """Kill a worker, and have its store locked by us before its successor, which the supervisor must not start too soon."""
    worker = await injector.worker(shard)
    inject(bench.supervisor.pid, Fault.STOP)
    try:
        inject(worker["pid"], Fault.KILL)
        with bench.locked_store(shard):
            inject(bench.supervisor.pid, Fault.CONTINUE)
            await asyncio.sleep(seconds)
    finally:
        inject(bench.supervisor.pid, Fault.CONTINUE)


async def _purge_when_full(client: shardbus.Client, tally: Tally) -> None:
    """The janitor: where a store is full, publishers wait until somebody disposes of its dead letters."""
    while True:
        await asyncio.sleep(0.2)
        with contextlib.suppress(shardbus.BusUnreachable):
            workers = (await client.status(timeout=2.0))["workers"]
            if any("full" in one["store_failing"] for one in workers):
                tally.faults["full store"] += 1
                await asyncio.sleep(0.5)
                await client.purge(DeadLetterFilter(reason="failed"))


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
        await asyncio.sleep(2.5)  # workers report once a second, and later on a busy machine


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to: its tally, the first publisher's ledger, the bus, the evidence, and the letters of crashes."""

    tally: Tally
    took_s: float
    ledger: shardbus.Ledger
    status: dict[str, Any]
    totals: Totals
    others: list[Totals]  # of the publishers that were killed
    crashed: list[shardbus.DeadLetter]


async def _under_fire(options: argparse.Namespace, seed: int) -> Outcome:
    """Serve a bus, publish, do the faults, and count once everything is quiet."""
    tally = Tally(faults=Counter(), recoveries_s=[], publishers=[])
    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="shardbus-chaos-", ignore_cleanup_errors=True))
        bench = Bench(directory, stack)
        await bench.serve()
        client = await stack.enter_async_context(shardbus.connect(bench.address, close_timeout=1.0))
        await bench.publish(tally)
        began = time.monotonic()
        publish = _publish(client, options.rate, random.Random(f"{seed}/events"), tally, stop)
        async with _running(_purge_when_full(client, tally)), _running(publish) as publishing:
            await _faults(bench, client, options.faults, random.Random(f"{seed}/faults"), tally)
            stop.set()
            await publishing
            inject(bench.publisher.pid, Fault.KILL)
            took_s = time.monotonic() - began
            ledger = await client.flush(_SETTLE_S)
            status = await _settled(client)
        totals = totals_of(await client.evidence([client.publisher], timeout=30.0))
        others = [totals_of(await client.evidence([publisher], timeout=30.0)) for publisher in tally.publishers]
        crashed = await client.dead_letters(DeadLetterFilter(reason="crashed"), limit=tally.poisoned + 100)
        await client.purge()
    return Outcome(
        tally=tally,
        took_s=took_s,
        ledger=ledger,
        status=status,
        totals=totals,
        others=others,
        crashed=crashed,
    )


def _promises(outcome: Outcome) -> list[scenarios.Check]:
    """What must not be there, counted."""
    tally, ledger, status, totals, others = (
        outcome.tally, outcome.ledger, outcome.status, outcome.totals, outcome.others
    )
    left = ledger.published - ledger.handled - ledger.dead - ledger.waiting - ledger.dropped - ledger.in_flight
    dead = sum(status[name] for name in ("dead_letters", "redriven", "purged", "dropped"))
    blamed = sum(not letter.event["kills"] for letter in outcome.crashed)
    spared = tally.poisoned - (len(outcome.crashed) - blamed)
    return [
        counted(f"lost, of {ledger.published:,} published", ledger.published - totals.distinct),
        counted("out of order", totals.out_of_order),
        counted(f"unannounced repeats, of {totals.repeats:,} repeats", totals.repeats - totals.announced),
        counted(
            f"out of order, overtaken or repeated unannounced, of {len(others)} publishers that were killed",
            sum(one.out_of_order + one.missing + one.repeats - one.announced for one in others),
        ),
        counted("missing from the ledger", left),
        counted("in flight at the end", ledger.in_flight),
        counted("waiting at the end", status["waiting"]),
        counted(f"dead letters that should not be, or are not, of {tally.doomed:,}", abs(dead - tally.doomed)),
        counted(f"events that killed their worker and are not dead letters for it, of {tally.poisoned}", spared),
        counted("events that were blamed for a crash and did not bring it about", blamed),
        counted("shards given up", sum(one["state"] == "given-up" for one in status["workers"])),
    ]


def _recoveries(tally: Tally, options: argparse.Namespace) -> list[scenarios.Check]:
    times_s = sorted(tally.recoveries_s) or [0.0]
    p50, p99 = times_s[len(times_s) // 2], times_s[int(len(times_s) * 0.99)]
    return [
        scenarios.at_most_us("killed to first handled again, p50", int(p50 * 1e6), int(options.p50 * 1e6)),
        scenarios.at_most_us("killed to first handled again, p99", int(p99 * 1e6), int(options.p99 * 1e6)),
    ]


async def benchmark(options: argparse.Namespace) -> int:
    """Run, count, and print; the exit code."""
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    outcome = await _under_fire(options, seed)
    kinds = ", ".join(f"{count} {kind}" for kind, count in outcome.tally.faults.most_common())
    print(f"\n{options.faults} faults in {outcome.took_s:.0f} s: {kinds}")
    method = (
        f"{_WORKERS} workers, {options.rate:,.0f} events/s over {_KEYS:,} keys; a tenth fails, a hundredth for good",
        f"stores of {_STORE_ROWS_MAX} rows on disk; who finds one full purges what failed; a store is locked for up to 2 s",
        "the same seed makes the same events and faults in the same order; when they meet is the machine's to decide",
    )
    checks = [*_promises(outcome), *_recoveries(outcome.tally, options)]
    return scenarios.show(f"chaos, seed {seed}", checks, method)


def main() -> int:
    """Parse options and run; the hidden one is the second publisher's."""
    parser = scenarios.parser("chaos", __doc__)
    parser.add_argument("--faults", type=at_least_one, default=100, metavar="N", help="how many (default 100)")
    parser.add_argument("--rate", type=positive, default=5000.0, metavar="N", help="events per second (default 5000)")
    parser.add_argument("--seed", type=int, metavar="N", help="of events and faults; default: a new one")
    parser.add_argument("--p50", type=float, default=_P50_RECOVERY_S, metavar="S", help="target of the median recovery")
    parser.add_argument("--p99", type=float, default=_P99_RECOVERY_S, metavar="S", help="target of its 99th percentile")
    parser.add_argument("--publish", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.publish:
        asyncio.run(_publish_until_killed(options.publish))
        return 0
    return scenarios.main(benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
