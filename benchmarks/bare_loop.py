"""How much of what is possible here the bus reaches: `loadgen --rate max` beside a loop that does the least work possible.

The bare loop is two processes over one ZeroMQ PUSH/PULL pair, with the events, keys and batches of `loadgen` and the
handler of the demo application: build, encode, pack, send; receive, unpack, decode, await the handler. No bus: no routing,
no acks, no order, no evidence, nothing kept for a resend. Bare loop and bus take turns in one run, for about a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import tempfile
import time
from array import array
from typing import Final

import msgspec
import zmq
from msgspec.structs import replace

from benchmarks import scenarios
from benchmarks.scenarios import at_least_one, positive
from loadgen import LoadError
from loadgen.processes import started
from loadgen.workload import UniformKeys
from shardbus.demo import Tick, count

_BATCH: Final = 512
_FRAMES_MAX: Final = 64  # in each socket's queue: as many events as a bus lets a publisher have unfinished
_END: Final = b""
_PATIENCE_S: Final = 30.0  # for what is left in the queues when the time is over

# The columns of a batch on the wire: names, places of names, keys, bodies, ordinals, intended instants, extras.
_Columns = tuple[tuple[str], None, tuple[str, ...], memoryview, bytes, None, None]
_GC_THRESHOLDS: Final = (50_000, 20, 20)  # as a worker has them


def send(address: str, duration_s: float) -> None:
    """The publisher: batches as fast as they go, for some seconds, then the end mark."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.sndhwm = _FRAMES_MAX
        socket.connect(address)
        workload = UniformKeys(1000, seed=1)
        template = Tick(key="")
        encode = msgspec.msgpack.Encoder().encode
        end_ns = time.monotonic_ns() + int(duration_s * 1e9)
        while time.monotonic_ns() < end_ns:
            stretch = workload.take(_BATCH)
            events = [replace(template, key=key, n=n) for n, key in enumerate(stretch.keys, stretch.first)]
            ordinals = array("q", stretch.ordinals).tobytes()
            socket.send(encode((("Tick",), None, stretch.keys, encode(events), ordinals, None, None)))
        socket.send(_END)
        # Closed now, the socket would drop its last frames in one run of five, whatever LINGER says (seen with libzmq 4.3.5
        # where the receiver is the slower one). Whoever started this process ends it once the receiver has spoken.
        time.sleep(_PATIENCE_S)


async def receive(address: str) -> float:
    """The worker: every event to its handler; events per second from the first batch to the end mark."""
    unpack = msgspec.msgpack.Decoder(_Columns).decode
    decode = msgspec.msgpack.Decoder(list[Tick]).decode
    handled, began_ns = 0, 0
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.rcvhwm = _FRAMES_MAX
        socket.bind(address)
        print("ready", flush=True)
        while frame := socket.recv():
            began_ns = began_ns or time.monotonic_ns()
            events = decode(unpack(frame)[3])
            for event in events:
                await count(event)
            handled += len(events)
    return handled * 1e9 / (time.monotonic_ns() - began_ns)


async def bare(duration_s: float) -> float:
    """One turn of the bare loop, both ends in processes of their own, as the bus has them; events per second."""
    with tempfile.TemporaryDirectory(prefix="shardbus-bench-") as directory:
        address = f"ipc://{directory}/bare"
        async with started(["benchmarks.bare_loop", "--receive", address], piped_stdin=False) as receiver:
            assert receiver.stdout is not None  # it is a pipe
            await receiver.stdout.readline()
            sending = ["benchmarks.bare_loop", "--send", address, "--duration", str(duration_s)]
            async with started(sending, piped_stdin=False):
                try:
                    async with asyncio.timeout(duration_s + _PATIENCE_S):
                        return float(await receiver.stdout.readline())
                except (TimeoutError, ValueError):
                    raise LoadError("the bare loop did not end with a figure") from None


async def benchmark(options: argparse.Namespace) -> int:
    """Measure in turns, and print; the exit code."""
    alone: list[float] = []
    reports = []
    async with scenarios.private_bus(1) as address:
        for turn in range(1, options.rounds + 1):
            alone.append(await bare(options.duration))
            reports.append(await scenarios.full_speed(address, options.duration))
            print(
                f"round {turn}: bare loop {alone[-1]:,.0f} events/s, bus {reports[-1].achieved_rate:,.0f}", flush=True
            )
    unsound = [report for report in reports if report.verdict != "ok"]
    rates = [report.achieved_rate for report in reports]
    ratio = scenarios.median_ratio(rates, alone)
    checks = [
        scenarios.sound(f"bus, {options.rounds} runs", (unsound or reports)[0]),
        scenarios.Check(
            name=f"bus {statistics.median(rates):,.0f} events/s of bare loop {statistics.median(alone):,.0f}",
            measured=f"{ratio:.2f}",
            target=f"≥ {options.target:.2f}",
            passed=ratio >= options.target,
        ),
    ]
    method = (
        f"{options.rounds} pairs of {options.duration:g} s, the median of their ratios; the bus: 1 worker, 1 s of warm-up",
        "the bare loop: the same events, keys, batches and handler over one socket pair; no acks, order, evidence or resend",
    )
    return scenarios.show("the bus and the bare loop", checks, method)


def main() -> int:
    """Parse options and run; the two hidden ones are the bare loop's ends."""
    parser = scenarios.parser("bare_loop", __doc__)
    parser.add_argument("--duration", type=positive, default=4.0, metavar="S", help="seconds for each turn (default 4)")
    parser.add_argument("--rounds", type=at_least_one, default=5, metavar="N", help="turns of each (default 5)")
    parser.add_argument("--target", type=float, default=scenarios.BARE_RATIO_MIN, metavar="X", help="bus / bare loop")
    parser.add_argument("--send", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--receive", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send:
        send(options.send, options.duration)
        return 0
    if options.receive:
        print(asyncio.run(receive(options.receive)), flush=True)
        return 0
    return scenarios.main(benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
