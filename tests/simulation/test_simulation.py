"""Order, at-least-once, the ledger and bounds, by the real client, sessions, lanes and shards in simulated worlds.

`python -m pytest tests/simulation` runs 1,000 seeds. For more: `SHARDBUS_SEEDS=0:100000`.
"""

from __future__ import annotations

import logging
import os

import pytest
from world import live

_FIRST, _, _LAST = os.environ.get("SHARDBUS_SEEDS", "0:1000").partition(":")
_CHUNK = max(1, (int(_LAST) - int(_FIRST)) // 10)


@pytest.mark.timeout(0 if "SHARDBUS_SEEDS" in os.environ else 240)
@pytest.mark.parametrize("start", range(int(_FIRST), int(_LAST), _CHUNK))
def test_every_promise_holds_in_every_seed(start: int) -> None:
    logging.disable(logging.CRITICAL)
    try:
        for seed in range(start, min(start + _CHUNK, int(_LAST))):
            try:
                live(seed)
            except BaseException as error:
                error.add_note(f"seed {seed}: SHARDBUS_SEEDS={seed}:{seed + 1} reproduces it")
                raise
    finally:
        logging.disable(logging.NOTSET)


def test_a_seed_lives_the_same_life_twice() -> None:
    assert live(7).handlings == live(7).handlings
