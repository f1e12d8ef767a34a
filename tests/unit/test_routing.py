"""Routing: the hash is for ever, and it spreads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from uuid import UUID

import pytest

from shardbus.config import SLOTS
from shardbus.messages import WireKey, to_wire_key
from shardbus.routing import ShardAddress, Table, even_slots, slot_of, stable_hash

# Rows in stores and state of applications are placed by these. If one of them changes, the code is wrong, not the table.
GOLDEN: list[tuple[WireKey, int, int]] = [
    ("", 0x2D06800538D394C2, 194),
    ("42", 0x1217CB28C0EF2191, 401),
    (42, 0xFB7549A4D68E6438, 56),
    (b"42", 0x8CED72EFA886D993, 403),
    (0, 0xE64B19A1D3836705, 773),
    (-1, 0x59C2E064B6401A93, 659),
    (2**63 - 1, 0x304F884F0516C4C2, 194),
    (2**64 - 1, 0x1619FC6EE26C64C5, 197),
    (-(2**63), 0xDC5BD0AB75E3BD21, 289),
    (b"", 0xF36CF7ECD1FCFDA0, 416),
    ("order-1", 0x5FC46503368E2876, 118),
    ("ключ", 0x9A137C08C1E55EDE, 734),
    ("\ud800", 0xDAAB8382539269D0, 464),
    ((UUID(int=42).bytes,), 0xECC627BB9FACAC8C, 140),
    (UUID(int=42).bytes, 0x479123A4B227039C, 924),
    (None, 0, 0),
]


@pytest.mark.parametrize(("key", "value", "slot"), GOLDEN, ids=ascii)
def test_the_hash_and_the_slot_of_a_key_never_change(key: WireKey, value: int, slot: int):
    assert stable_hash(key) == value
    assert slot_of(key) == slot


def test_there_are_1024_slots_for_ever():
    assert SLOTS == 1024


def test_42_is_neither_text_nor_bytes():
    assert len({stable_hash(key) for key in (42, "42", b"42")}) == 3


def test_a_uuid_is_not_its_bytes_nor_its_text():
    uuid = UUID(int=42)
    assert len({stable_hash(to_wire_key(key)) for key in (uuid, uuid.bytes, str(uuid), uuid.int)}) == 4


SEQUENCES: dict[str, Callable[[int], WireKey]] = {
    "numbers": lambda n: n,
    "numbers far apart": lambda n: n * SLOTS,
    "names": lambda n: f"user-{n}",
    "bytes": lambda n: n.to_bytes(4, "big"),
    "uuids": lambda n: (n.to_bytes(16, "big"),),
}


@pytest.mark.parametrize("key_of", SEQUENCES.values(), ids=SEQUENCES)
def test_keys_that_count_up_spread_evenly_over_the_slots(key_of: Callable[[int], WireKey]):
    per_slot = Counter(slot_of(key_of(n)) for n in range(100 * SLOTS))
    assert len(per_slot) == SLOTS
    # 100 expected, with a deviation of 10: the hash is fixed, so this holds always or never.
    assert min(per_slot.values()) > 50
    assert max(per_slot.values()) < 150


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 8, 64, 1000, 1024])
def test_shards_have_equally_many_slots_to_within_one(shards: int):
    counts = Counter(even_slots(shards))
    assert len(even_slots(shards)) == SLOTS
    assert set(counts) == set(range(shards))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_table_sends_a_key_to_the_owner_of_its_slot():
    slots = even_slots(4)
    table = Table(
        incarnation=b"i" * 16,
        layout=1,
        version=1,
        slots=slots,
        shards=[ShardAddress(shard=n, epoch=b"e", address=f"tcp://127.0.0.1:{n}") for n in range(4)],
    )
    for key, _, slot in GOLDEN:
        assert table.shard_of(key) == slots[slot]


def test_the_seed_of_pythons_own_hash_makes_no_difference():
    code = "from shardbus.routing import stable_hash; print(stable_hash('order-1'))"
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert int(done.stdout) == 0x5FC46503368E2876
