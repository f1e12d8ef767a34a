"""Arithmetic that measurements are held against: what response times must be, and the percentiles of a list of times."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from loadgen.histogram import Percentiles, percentiles_us

NS = 1_000_000_000
WITHIN = 0.03
"""So far may a percentile that was measured on real processes be from that of arithmetic."""


def lindley(arrivals_ns: Sequence[int], services_ns: Sequence[int]) -> list[float]:
    """Response times in seconds of one server that takes one event after another (D. V. Lindley, 1952).

    An event waits for what is left of the one before: W' = max(0, W + S - A), where A is the time between the two.
    """
    found: list[float] = []
    wait_ns = 0
    for at, service_ns in enumerate(services_ns):
        if at:
            wait_ns = max(0, wait_ns + services_ns[at - 1] - (arrivals_ns[at] - arrivals_ns[at - 1]))
        found.append((wait_ns + service_ns) / NS)
    return found


def percentiles_of(times_s: Sequence[float]) -> Percentiles:
    """The percentiles of times in seconds."""
    found = percentiles_us((round(seconds * 1e6), 1) for seconds in times_s)
    assert found is not None
    return found


def differences(
    found: Percentiles | None, expected: Percentiles, names: Sequence[str], *, within: float = WITHIN
) -> list[str]:
    """Which of these percentiles are further from the expected ones than that part of them."""
    if found is None:
        return ["nothing was measured"]
    pairs = [(name, getattr(found, name), getattr(expected, name)) for name in names]
    return [
        f"{name}: {one:,} µs, expected {other:,} µs"
        for name, one, other in pairs
        if one != pytest.approx(other, rel=within)
    ]
