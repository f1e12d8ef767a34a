"""The figures that the reference documented, on this bus: throughput, latency, session cleanup.

Twice each: the publish call alone, as the reference measured it, and to the end of the handler, across processes, which is
what an application sees. Then session cleanup: clients that come and leave, and what the workers remember of them; and, on a
bus of its own, what `session_cleanup` measures. Takes about 110 seconds, 30 of them for a killed client to be silent.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import scenarios, session_cleanup

_CALLS = 200_000
_SESSIONS = 200
_SESSION_P99_US_MAX = 250_000


async def benchmark(options: argparse.Namespace) -> int:
    """Measure, and print; the exit code."""
    async with scenarios.private_bus(1) as address:
        calls_per_s, call_us = await scenarios.publish_calls(address, _CALLS)
        fast = await scenarios.full_speed(address, options.duration)
        paced = await scenarios.paced(address, options.duration)
        life_us, left = await scenarios.sessions(address, _SESSIONS)
    cleanup = await session_cleanup.measure(options.sessions, options.killed)
    rate, late = scenarios.REFERENCE_RATE, scenarios.REFERENCE_P99
    checks = [
        scenarios.at_least("publish calls alone", calls_per_s, options.target, reference=rate),
        scenarios.at_most_us("publish call alone, p99", call_us.p99, scenarios.REFERENCE_P99_US, reference=late),
        scenarios.sound("full speed, to the end of the handler", fast),
        scenarios.at_least("events finished", fast.achieved_rate, options.target, reference="not measured"),
        *scenarios.latency_checks(paced, p99_us_max=options.p99_us),
        scenarios.Check(
            name=f"clients remembered, of {_SESSIONS} that have left", measured=f"{left}", target="0", passed=left == 0
        ),
        scenarios.at_most_us("connect, publish, flush, leave: p99", life_us.p99, _SESSION_P99_US_MAX),
        *session_cleanup.checks_of(cleanup, options),
    ]
    method = (
        f"clients: {_SESSIONS}, one after another; each connects, publishes one event and leaves",
        *session_cleanup.method_of(cleanup),
        f"publish calls alone: {_CALLS:,} calls, one after another, each until it returns: the event is in the outbox",
        f"the rest: 1 worker, 1 publisher, {options.duration:g} s for each load after 1 s of warm-up",
        scenarios.EVERY_EVENT,
        scenarios.REFERENCE_METHOD,
    )
    return scenarios.show("benchmark as documented", checks, method, reports=[fast, *paced], aims=options.aims)


def main() -> int:
    """Parse options and run."""
    parser = scenarios.parser("benchmark_documented", __doc__, aims=True)
    scenarios.add_duration(parser, 10.0)
    parser.add_argument(
        "--target",
        type=float,
        default=scenarios.RATE_MIN,
        metavar="N",
        help="events/s (default: 10 × reference)",
    )
    scenarios.add_p99(parser)
    session_cleanup.add_options(parser)
    return scenarios.main(benchmark(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
