"""Benchmarks of shardbus: `python -m benchmarks.NAME`. Method and results: README.md beside this file."""

from __future__ import annotations

import sys

from shardbus.interrupts import EndedByInterrupts

STARTING = EndedByInterrupts("benchmarks")
"""Entered where one is started as `python -m benchmarks.…`, and left by `scenarios.main`. The processes that a benchmark
starts itself never leave it: they have nothing to end."""

if sys.argv[0] == "-m":  # as long as its module is looked for
    STARTING.__enter__()
