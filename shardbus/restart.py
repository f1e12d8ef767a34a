"""Whether and when a dead worker is started again. Pure: time and history are arguments.

Only a death before any progress counts towards giving up, so a shard whose workers are killed while they work is
restarted for ever, and one that cannot start is given up after a few tries, loudly.
"""

from __future__ import annotations

import msgspec


class RestartIn(msgspec.Struct, frozen=True):
    """Start a new worker after `delay_s` seconds."""

    delay_s: float


class GiveUp(msgspec.Struct, frozen=True):
    """Leave the shard without a worker; `deaths` in a row made no progress."""

    deaths: int


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Back-off: none after a death that followed progress, then `delay_s · 2ⁿ`, up to `delay_s_max`."""

    deaths_max: int = 5
    delay_s: float = 0.1
    delay_s_max: float = 5.0

    def decide(self, fruitless_deaths: int) -> RestartIn | GiveUp:
        """What to do after a death; `fruitless_deaths` is how many in a row made no progress, this one included."""
        if fruitless_deaths >= self.deaths_max:
            return GiveUp(fruitless_deaths)
        if fruitless_deaths == 0:
            return RestartIn(0.0)
        return RestartIn(min(self.delay_s_max, self.delay_s * 2.0 ** min(fruitless_deaths - 1, 60)))
