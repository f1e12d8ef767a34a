"""What each event of a load is: its key, its ordinal within the key, its size. Pure, and the same for the same seed.

Everything that can be is computed before the first event goes, because a publisher at full speed has about one
microsecond for each event in all (keys and ordinals here: 20 ns; counting ordinals in a list as they come: 70 ns).
"""

from __future__ import annotations

import math
import random
import sys
from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Final, Protocol

from loadgen.spec import PAYLOAD_BYTES_MAX, LoadSpec, Payload, Skew

_DECK_MIN: Final = 65_536  # keys dealt before the order repeats: over three seconds at 20,000/s, and 8 bytes each


class Stretch:
    """Consecutive events: column by column, of equal length. `first` is the number of the first event."""

    __slots__ = ("first", "keys", "ordinals")

    def __init__(self, first: int, keys: list[str], ordinals: Sequence[int]) -> None:
        self.first = first
        self.keys = keys
        self.ordinals = ordinals

    def __len__(self) -> int:
        return len(self.keys)


class Workload(Protocol):
    """A source of keys that never ends."""

    def take(self, count: int) -> Stretch:
        """The next events: at least one, at most `count`. Fewer are no sign of an end; ask again."""


class UniformKeys:
    """Every key equally often, in random order.

    A deck with the same number of copies of each key is shuffled once and dealt again and again. So an event's ordinal
    is its card's ordinal in the first lap, plus one lap's copies for every lap since: one addition. Neighbours in the deck
    are as good as independent; from 32,768 keys on, each has two copies in a lap.
    """

    def __init__(self, keys: int, seed: int) -> None:
        self._copies = max(2, -(-_DECK_MIN // keys))
        names = [f"k{number}" for number in range(keys)]
        self._deck = names * self._copies
        random.Random(seed).shuffle(self._deck)
        self._first_lap = array("q", _count_up(self._deck))
        self._at = 0
        self._lap = 0

    def take(self, count: int) -> Stretch:
        """See `Workload.take`; fewer than asked for where the deck ends."""
        begin, size = self._at, len(self._deck)
        end = min(begin + count, size)
        lapped = self._lap * self._copies
        ordinals = self._first_lap[begin:end]
        if lapped:
            ordinals = _add(ordinals, lapped)
        stretch = Stretch(self._lap * size + begin, self._deck[begin:end], ordinals)
        if end == size:
            end, self._lap = 0, self._lap + 1
        self._at = end
        return stretch


def _add(numbers: array[int], number: int) -> array[int]:
    """Add a number to each; no sum may need more than 63 bits.

    As one long number of 64-bit digits: that takes a third of the time of one after another.
    """
    summed = int.from_bytes(numbers.tobytes(), sys.byteorder) + number * _ones(len(numbers))
    return array("q", summed.to_bytes(8 * len(numbers), sys.byteorder))


@lru_cache(maxsize=1024)
def _ones(count: int) -> int:
    return ((1 << 64 * count) - 1) // ((1 << 64) - 1)


def _count_up(deck: list[str]) -> list[int]:
    """For each card, how many cards of its key have come, itself included."""
    seen: dict[str, int] = {}
    ordinals = []
    for key in deck:
        seen[key] = ordinal = seen.get(key, 0) + 1
        ordinals.append(ordinal)
    return ordinals


class WeightedKeys:
    """Each event's key is drawn for itself: key number i with a probability in proportion to `weights[i]`.

    Drawn exactly, by inversion: a uniform number is looked up in the cumulative weights (L. Devroye, Non-Uniform Random
    Variate Generation, 1986, III.2). A binary search in C costs 0.2 µs for a thousand keys and no more than twice that for
    a million; an alias table in Python would cost more.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._choices = random.Random(seed).choices
        self._names = [f"k{number}" for number in range(len(weights))]
        self._cumulative = list(accumulate(weights))
        self._seen: dict[str, int] = {}
        self._next = 0

    def take(self, count: int) -> Stretch:
        """See `Workload.take`."""
        first, seen = self._next, self._seen
        self._next += count
        keys = self._choices(self._names, cum_weights=self._cumulative, k=count)
        ordinals = []
        for key in keys:
            seen[key] = ordinal = seen.get(key, 0) + 1
            ordinals.append(ordinal)
        return Stretch(first, keys, ordinals)


def weights_of(skew: Skew, keys: int) -> list[float]:
    """The weight of each key; key 0 is the hottest."""
    if skew.kind == "hot":
        rest = (1.0 - skew.by) / max(1, keys - 1)
        return [skew.by if keys > 1 else 1.0, *[rest] * (keys - 1)]
    return [rank**-skew.by for rank in range(1, keys + 1)]


class UniqueKeys:
    """A key that was never used before for every event: what memory must not grow with. Ordinals are all 1.

    `prefix` keeps the keys of several drivers apart.
    """

    def __init__(self, prefix: str = "u") -> None:
        self._prefix = prefix
        self._next = 0

    def take(self, count: int) -> Stretch:
        """See `Workload.take`."""
        first, prefix = self._next, self._prefix
        self._next = end = first + count
        return Stretch(first, [f"{prefix}{number}" for number in range(first, end)], [1] * count)


class Sizes:
    """How many bytes of payload each event gets, drawn for itself."""

    def __init__(self, payload: Payload, seed: int) -> None:
        self._payload = payload
        self._chance = random.Random(f"{seed}/sizes")

    @property
    def fixed(self) -> int | None:
        """The size, where it is always the same."""
        return self._payload.low if self._payload.kind == "fixed" else None

    @property
    def largest(self) -> int:
        """No size is above this."""
        return {"fixed": self._payload.low, "uniform": self._payload.high, "lognormal": PAYLOAD_BYTES_MAX}[
            self._payload.kind
        ]

    def take(self, count: int) -> list[int]:
        """The next `count` sizes."""
        payload = self._payload
        if payload.kind == "fixed":
            return [payload.low] * count
        if payload.kind == "uniform":
            span, draw = payload.high - payload.low + 1, self._chance.random
            return [payload.low + int(draw() * span) for _ in range(count)]
        mu, normal, exp = math.log(max(1, payload.low)), self._chance.gauss, math.exp
        return [min(PAYLOAD_BYTES_MAX, round(exp(normal(mu, payload.sigma)))) for _ in range(count)]


def workload_of(spec: LoadSpec, driver: int = 0) -> Workload:
    """The keys that one driver of a run sends.

    All drivers draw from the same keys with seeds of their own, because only so the distribution of the whole is the one
    that was asked for. Order holds for each publisher and key, so nothing is lost by it.
    """
    seed = spec.seed + driver * 1_000_003
    if spec.keys is None:
        return UniqueKeys(f"u{driver}-" if driver else "u")
    if spec.skew.kind == "uniform":
        return UniformKeys(spec.keys, seed)
    return WeightedKeys(weights_of(spec.skew, spec.keys), seed)
