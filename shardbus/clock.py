"""Time as an argument: the one real clock, and its type."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

NowNs = Callable[[], int]
"""Returns nanoseconds of a clock that never goes back."""

monotonic_ns: Final[NowNs] = time.monotonic_ns
"""CLOCK_MONOTONIC: one clock for all processes of a Linux host, not across hosts."""

wall_ns: Final[NowNs] = time.time_ns
"""Nanoseconds since 1970, for what people read; never for durations."""
