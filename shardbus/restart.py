"""Whether and when a dead worker is started again. Pure: time and history are arguments.

Only a death before any progress counts towards giving up, so a shard whose workers are killed while they work is
restarted for ever, and one that cannot start is given up after a few tries, loudly. One whose workers crash soon, again and
again, while no handler runs, waits between them: nobody can be accused of it, and others are served in the meantime.
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
    """Back-off: none after a death that followed progress, then `delay_s · 2ⁿ`, up to `delay_s_max`.

    So too, without an end, after `deaths_max` unexplained deaths in a row.
    """

    deaths_max: int = 5
    delay_s: float = 0.1
    delay_s_max: float = 5.0

    def is_to_be_told(self, unexplained_deaths: int) -> bool:
        """Whether so many crashes in a row, of nobody's doing and soon after the start, are no chance, and news."""
        return unexplained_deaths > 0 and unexplained_deaths % self.deaths_max == 0

    def decide(self, fruitless_deaths: int, unexplained_deaths: int = 0) -> RestartIn | GiveUp:
        """What to do after a death.

        Args:
            fruitless_deaths: how many in a row made no progress, this one included.
            unexplained_deaths: how many in a row were crashes of nobody's doing and soon after the start.
        """
        if fruitless_deaths >= self.deaths_max:
            return GiveUp(fruitless_deaths)
        waits = max(fruitless_deaths, unexplained_deaths - self.deaths_max + 1)
        if waits <= 0:
            return RestartIn(0.0)
        return RestartIn(min(self.delay_s_max, self.delay_s * 2.0 ** min(waits - 1, 60)))
