"""Which shard a key belongs to: a stable hash, 1,024 slots, a versioned table. Pure.

The hash never changes between versions, machines or processes: rows in stores and state of applications are placed by it.
"""

from __future__ import annotations

import msgspec
import xxhash

from shardbus.config import SLOTS
from shardbus.messages import WireKey


def stable_hash(key: WireKey) -> int:
    """64 bits of xxh3 over the key's bytes, seeded by its type so that `42`, `"42"` and `b"42"` differ."""
    match key:
        case str():
            return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass"), 0)
        case int():
            return xxhash.xxh3_64_intdigest(key.to_bytes(9, "little", signed=True), 1)
        case bytes():
            return xxhash.xxh3_64_intdigest(key, 2)
        case (bytes() as uuid_bytes,):
            return xxhash.xxh3_64_intdigest(uuid_bytes, 3)
        case _:
            return 0


def slot_of(key: WireKey) -> int:
    """The slot of a key, 0 … 1,023."""
    return stable_hash(key) % SLOTS


class ShardAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where one shard is reached now. `epoch` changes with every incarnation of its worker; empty: none is up."""

    shard: int
    epoch: bytes
    address: str


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """The routing table, as the supervisor announces it.

    `layout` changes when slots move, `version` with every announcement; `slots[s]` is the shard that owns slot `s`.
    """

    incarnation: bytes
    layout: int
    version: int
    slots: list[int]
    shards: list[ShardAddress]

    def shard_of(self, key: WireKey) -> int:
        """The shard that owns a key."""
        return self.slots[stable_hash(key) % SLOTS]


def even_slots(shards: int) -> list[int]:
    """Slots dealt out in turn, so that the numbers of any two shards' slots differ by one at most."""
    return [slot % shards for slot in range(SLOTS)]
