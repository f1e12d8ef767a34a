"""A short run of `benchmarks.chaos`: every promise, under real signals. Nothing here depends on speed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_short_run_under_fire_keeps_every_promise(short_path: Path) -> None:
    limits = ["--p50", "3600", "--p99", "3600"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", "--faults", "15", "--rate", "1000", "--seed", "3", *limits],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(short_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 faults" in done.stdout
