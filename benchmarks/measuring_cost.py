"""What measuring costs: the same events with stamps and the evidence asked for, and without either.

Order, loss and repeats are what every load is measured for, also at full speed, where nothing is due and so nothing is late.
Response times, which a load at a rate has as well, take a look at the clock for each event; they are told apart.

Both cost the worker processor time, which is what a worker with a core of its own loses. That is seen at a pace that leaves
the machine room. At full speed on two cores, the supervisor, which holds the evidence, takes time from publisher and worker,
and what fills one core makes an event dearer on the other; what comes of that is told beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from statistics import median
from typing import Final, Literal, cast

import msgspec

import shardbus
from benchmarks import scenarios
from benchmarks.scenarios import Check, at_least_one, positive
from loadgen import LoadSpec
from loadgen.resources import Watched
from loadgen.source import made

COST_MAX: Final = 0.05  # of the worker's time
_RATE: Final = 200_000.0  # leaves a core free where there are two
_PACE_KEPT: Final = 0.9  # of that rate, with the ends of turns; below, publisher or worker is full, and events wait
_TURN_LEAST_S: Final = 0.5  # the kernel counts in hundredths, and a turn's end is no part of its pace
_OVERHEAD_S: Final = 0.5  # a turn: its last events and its evidence
_BATCH: Final = 512
_TICK_S: Final = 0.001
_PATIENCE_S: Final = 30.0

_Kind = Literal["nothing", "order", "latency"]
"""What is measured in a turn: with `order` go loss and repeats, and all of these with `latency`."""
_PACED: Final[tuple[_Kind, ...]] = ("nothing", "order", "latency")
_FAST: Final[tuple[_Kind, ...]] = ("nothing", "order")


class _Turn(msgspec.Struct, frozen=True):
    """What a publisher saw that published for a while."""

    events: int
    seconds: float
    worker_s: float  # of the worker's processor time

    @property
    def rate(self) -> float:
        """Events handled a second."""
        return self.events / self.seconds

    @property
    def worker_us(self) -> float:
        """Microseconds of the worker's processor time, an event."""
        return self.worker_s / self.events * 1e6


_Turns = dict[_Kind, list[_Turn]]


class _Seen(msgspec.Struct, frozen=True):
    """Turns of each kind, the n-th of all kinds side by side, and what the shards can prove."""

    paced: _Turns
    fast: _Turns
    published: int
    proven: int
    irregular: int


async def checks(address: str, options: argparse.Namespace) -> list[Check]:
    """What it costs at a bus with one worker."""
    seen = await scenarios.figure_of(
        _Seen,
        ["benchmarks.measuring_cost", address, "--turns", str(options.turns), "--turn", str(options.turn)],
        timeout_s=5 * (options.turns + 1) * (options.turn + _OVERHEAD_S) + 2 * _PATIENCE_S,
        nothing="the publisher that measures in turns did not end with its figures",
    )
    # All turns together: the kernel counts in hundredths of a second, a few percent of one turn.
    us = {
        kind: 1e6 * sum(one.worker_s for one in turns) / sum(one.events for one in turns)
        for kind, turns in seen.paced.items()
    }
    cost = us["order"] / us["nothing"] - 1
    pace = min(sum(one.events for one in turns) / sum(one.seconds for one in turns) for turns in seen.paced.values())
    at_pace = pace >= _PACE_KEPT * _RATE
    fast_us, fast_plain_us = ([one.worker_us for one in seen.fast[kind]] for kind in ("order", "nothing"))
    rates, plain_rates = ([one.rate for one in seen.fast[kind]] for kind in ("order", "nothing"))
    return [
        scenarios.counted("measured events proven to be handled", seen.proven, seen.published),
        scenarios.counted("of them repeated, overtaken or missing", seen.irregular),
        scenarios.at_least("pace of the turns at a rate", pace, _PACE_KEPT * _RATE),
        Check(
            name=f"measuring order, loss at {_RATE:,.0f}/s, the worker: {us['order']:.2f} µs, {us['nothing']:.2f} without",
            measured=f"{cost:+.1%}" if at_pace else scenarios.NOT_MEASURED,
            target=f"≤ {options.cost:.0%}",
            passed=at_pace and cost <= options.cost,
        ),
        _beside(f"measuring response times, too: {us['latency']:.2f} µs", us["latency"] / us["nothing"] - 1),
        _beside(
            f"at full speed, the worker: {median(fast_us):.2f} µs, {median(fast_plain_us):.2f} without",
            scenarios.median_ratio(fast_us, fast_plain_us) - 1,
        ),
        _beside(
            f"at full speed, the machine: {median(rates):,.0f} events/s, {median(plain_rates):,.0f} without",
            1 - scenarios.median_ratio(rates, plain_rates),
        ),
    ]


def _beside(name: str, cost: float) -> Check:
    return scenarios.shown(name, f"{cost:+.1%}", aim=f"≤ {COST_MAX:.0%}", aim_reached=cost <= COST_MAX)


async def publish_in_turns(address: str, turns: int, turn_s: float) -> _Seen:
    """The publisher: the events of `loadgen --rate max`, in a process of its own.

    The speed of a shared machine drifts by more within seconds than is measured here. So turns are short and in one process,
    and which kind is first changes every time.
    """
    sources = {kind: made(LoadSpec(rate=None), 0) for kind in ("nothing", "measured")}
    watched, published = Watched(), list[int]()
    async with shardbus.connect(address) as client:
        worker = (await client.status())["workers"][0]["pid"]

        def mark() -> tuple[int, float, float]:
            usage = watched.look(worker)
            return client.ledger().handled, time.monotonic(), float("nan") if usage is None else usage.cpu_s

        async def turn(kind: _Kind, rate: float | None) -> _Turn:
            source = sources["nothing" if kind == "nothing" else "measured"]
            before = mark()
            began_s, count = before[1], 0
            while (now_s := time.monotonic()) < began_s + turn_s:
                if rate is not None and count > rate * (now_s - began_s):
                    await asyncio.sleep(_TICK_S)
                    continue
                load = source.take(_BATCH)
                await client.publish_many(
                    load.messages,
                    ordinals=None if kind == "nothing" else load.ordinals,
                    intended_ns=[time.monotonic_ns()] * len(load.messages) if kind == "latency" else None,
                )
                count += len(load.messages)
            await client.flush(_PATIENCE_S)
            if kind != "nothing":
                await client.evidence([client.publisher])
                published.append(count)
            events, seconds, worker_s = (now - then for then, now in zip(before, mark(), strict=True))
            return _Turn(cast("int", events), seconds, worker_s)

        async def turns_of(kinds: tuple[_Kind, ...], rate: float | None) -> _Turns:
            for kind in kinds:
                await turn(kind, rate)  # to warm up
            seen: _Turns = {kind: [] for kind in kinds}
            for number in range(turns):
                first = number % len(kinds)
                for kind in (*kinds[first:], *kinds[:first]):
                    seen[kind].append(await turn(kind, rate))
            return seen

        paced, fast = await turns_of(_PACED, _RATE), await turns_of(_FAST, None)
        shards = await client.evidence([client.publisher])
    return _Seen(
        paced=paced,
        fast=fast,
        published=sum(published),
        proven=sum(one.distinct for one in shards),
        irregular=sum(one.repeats + one.out_of_order + one.missing + one.unchecked for one in shards),
    )


def _turn_s(text: str) -> float:
    seconds = positive(text)
    if seconds < _TURN_LEAST_S:
        raise argparse.ArgumentTypeError(f"{text!r} is less than {_TURN_LEAST_S:g} s")
    return seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    """How much this part does, and its target, as options."""
    add = parser.add_argument
    add("--turns", type=at_least_one, default=16, metavar="N", help="turns of each kind of measuring (default 16)")
    add("--turn", type=_turn_s, default=1.0, metavar="S", help="seconds of each (default 1)")
    add("--cost", type=float, default=COST_MAX, metavar="X", help="what measuring order may cost the worker (0.05)")


def main() -> int:
    """Be the publisher of a bus with one worker, and print what it saw."""
    parser = scenarios.parser("measuring_cost", __doc__)
    parser.add_argument("address", help="of the bus")
    add_options(parser)
    options = parser.parse_args()
    seen = shardbus.run(publish_in_turns(options.address, options.turns, options.turn))
    print(msgspec.json.encode(seen).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
