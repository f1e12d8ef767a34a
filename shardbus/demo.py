"""The built-in demo application: what `shardbus serve` runs without MODULE:BUS, and what `loadgen` drives."""

from __future__ import annotations

from shardbus import Bus, Command, Event

_KEYS_MAX = 16_384  # keys whose count is kept in memory; when full, all are forgotten


class Tick(Event, key="key", gc=False):
    """One unit of load."""

    key: str
    n: int = 0
    payload: bytes = b""


class GetCount(Command[int], key="key"):
    """How many ticks of a key this worker has counted since it started."""

    key: str


bus = Bus("demo")
_counts: dict[str, int] = {}


@bus.on(Tick)
async def count(event: Tick) -> None:
    """Count ticks by key."""
    try:
        _counts[event.key] += 1
    except KeyError:
        if len(_counts) >= _KEYS_MAX:
            _counts.clear()
        _counts[event.key] = 1


@bus.command(GetCount)
async def get_count(command: GetCount) -> int:
    """Reply with a key's count."""
    return _counts.get(command.key, 0)
