"""The bus without resilience features: what one publisher and one worker carry, and how late at 20,000 events/s.

No retries, no breakers, no dead letters, nobody killed. Acks, order and evidence are no features that could be left out.
Takes about 40 seconds.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import scenarios


async def benchmark(options: argparse.Namespace) -> int:
    """Measure, and print; the exit code."""
    async with scenarios.private_bus(1) as address:
        many = await scenarios.full_speed(address, options.duration)
        single = await scenarios.full_speed(address, options.duration, call="publish")
        paced = await scenarios.paced(address, options.duration)
    better = max(many.achieved_rate, single.achieved_rate)
    checks = [
        scenarios.sound(f"publish_many: {many.achieved_rate:,.0f} events/s", many),
        scenarios.sound(f"publish: {single.achieved_rate:,.0f} events/s", single),
        scenarios.at_least(
            "events finished, the better call",
            better,
            options.target,
            aim=scenarios.RATE_AIM,
            reference=scenarios.REFERENCE_RATE,
        ),
        *scenarios.latency_checks(paced, p99_us_max=options.p99_us),
    ]
    method = (
        f"1 worker, 1 publisher, {options.duration:g} s for each load after 1 s of warm-up",
        scenarios.EVERY_EVENT,
        "rate: events that reached the end of their handler and were acked within the measured window",
        scenarios.FROM_INTENDED,
        scenarios.REFERENCE_METHOD,
    )
    return scenarios.show("bus performance, simple", checks, method, reports=[many, single, *paced], aims=options.aims)


def main() -> int:
    """Parse options and run."""
    parser = scenarios.parser("bus_performance_simple", __doc__, aims=True)
    scenarios.add_duration(parser, 10.0)
    parser.add_argument(
        "--target", type=float, default=scenarios.RATE_MIN, metavar="N", help="events/s, the better call"
    )
    scenarios.add_p99(parser)
    return scenarios.main(benchmark(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
