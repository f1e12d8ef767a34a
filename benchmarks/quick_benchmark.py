"""A check in seconds: does the bus run here, how fast, and how late? Takes about 20 seconds.

Two workers: 10,000 events/s for some seconds, at which the reference asked for a p99 below 10 ms, then as many as the bus
takes, then commands one after another.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import scenarios
from benchmarks.scenarios import Check

_WORKERS = 2
_COMMANDS = 1000
_TWO_WORKERS_RATE_MIN = 250_000.0  # two workers and a publisher share the cores; 20 times the reference


async def benchmark(options: argparse.Namespace) -> int:
    """Measure, and print; the exit code."""
    async with scenarios.private_bus(_WORKERS) as address:
        paced = await scenarios.paced(address, options.duration, rate=scenarios.REFERENCE_PACE, runs_max=2)
        fast = await scenarios.full_speed(address, options.duration)
        commands = await scenarios.round_trips(address, _COMMANDS)
    checks: list[Check] = [
        *scenarios.latency_checks(paced, p99_us_max=options.p99_us, aims=False),
        scenarios.sound("full speed, workers: 2", fast),
        scenarios.at_least(
            "events finished, full speed",
            fast.achieved_rate,
            options.target,
            reference=scenarios.REFERENCE_RATE,
        ),
        scenarios.round_trip_check(commands),
    ]
    method = (
        f"{_WORKERS} workers, one publisher, {options.duration:g} s for each load after 1 s of warm-up",
        scenarios.EVERY_EVENT,
        scenarios.FROM_INTENDED,
        scenarios.REFERENCE_METHOD,
    )
    return scenarios.show("quick benchmark", checks, method, reports=[*paced, fast], aims=options.aims)


def main() -> int:
    """Parse options and run."""
    parser = scenarios.parser("quick_benchmark", __doc__, aims=True)
    scenarios.add_duration(parser, 4.0)
    parser.add_argument("--target", type=float, default=_TWO_WORKERS_RATE_MIN, metavar="N", help="events/s at full speed")
    scenarios.add_p99(parser)
    return scenarios.main(benchmark(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
