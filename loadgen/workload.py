"""What each event of a load is: its key, its ordinal within the key, its payload. Pure, and the same for the same seed.

Everything that can be is computed before the first event goes, because a publisher at full speed has about one
microsecond for each event in all (keys and ordinals here: 40 ns; counting ordinals in a list as they come: 70 ns).
"""

from __future__ import annotations

import random
from typing import Final, Protocol

from loadgen.spec import LoadSpec

_DECK_MIN: Final = 65_536  # keys dealt before the order repeats: over three seconds at 20,000/s, and 8 bytes each


class Stretch:
    """Consecutive events: column by column, of equal length. `first` is the number of the first event."""

    __slots__ = ("first", "keys", "ordinals")

    def __init__(self, first: int, keys: list[str], ordinals: list[int]) -> None:
        self.first = first
        self.keys = keys
        self.ordinals = ordinals

    def __len__(self) -> int:
        return len(self.keys)


class Workload(Protocol):
    """A source of events that never ends. `payload` is what every event carries."""

    payload: bytes

    def take(self, count: int) -> Stretch:
        """The next events: at least one, at most `count`. Fewer are no sign of an end; ask again."""


class UniformKeys:
    """Every key equally often, in random order.

    A deck with the same number of copies of each key is shuffled once and dealt again and again. So an event's ordinal
    is its card's ordinal in the first lap, plus one lap's copies for every lap since: one addition. Neighbours in the deck
    are as good as independent; from 32,768 keys on, each has two copies in a lap.
    """

    def __init__(self, keys: int, payload_bytes: int, seed: int) -> None:
        chance = random.Random(seed)
        self.payload = chance.randbytes(payload_bytes)
        self._copies = max(2, -(-_DECK_MIN // keys))
        names = [f"k{number}" for number in range(keys)]
        self._deck = names * self._copies
        chance.shuffle(self._deck)
        self._first_lap = _count_up(self._deck)
        self._at = 0
        self._lap = 0

    def take(self, count: int) -> Stretch:
        """See `Workload.take`; fewer than asked for where the deck ends."""
        begin, size = self._at, len(self._deck)
        end = min(begin + count, size)
        lapped = self._lap * self._copies
        ordinals = self._first_lap[begin:end]
        if lapped:
            ordinals = [ordinal + lapped for ordinal in ordinals]
        stretch = Stretch(self._lap * size + begin, self._deck[begin:end], ordinals)
        if end == size:
            end, self._lap = 0, self._lap + 1
        self._at = end
        return stretch


def _count_up(deck: list[str]) -> list[int]:
    """For each card, how many cards of its key have come, itself included."""
    seen: dict[str, int] = {}
    ordinals = []
    for key in deck:
        seen[key] = ordinal = seen.get(key, 0) + 1
        ordinals.append(ordinal)
    return ordinals


class UniqueKeys:
    """A key that was never used before for every event: what memory must not grow with. Ordinals are all 1."""

    def __init__(self, payload_bytes: int, seed: int) -> None:
        self.payload = random.Random(seed).randbytes(payload_bytes)
        self._next = 0

    def take(self, count: int) -> Stretch:
        """See `Workload.take`."""
        first = self._next
        self._next = end = first + count
        return Stretch(first, [f"u{number}" for number in range(first, end)], [1] * count)


def workload_of(spec: LoadSpec) -> Workload:
    """The events that a run asks for."""
    if spec.keys is None:
        return UniqueKeys(spec.payload_bytes, spec.seed)
    return UniformKeys(spec.keys, spec.payload_bytes, spec.seed)
