"""Handlers that publish, in simulated worlds: every child of every event is handled, and nobody waits for ever.

`SHARDBUS_SEEDS=0:10000` looks further.
"""

from __future__ import annotations

import os

import pytest
from publishing_world import PublishingWorld
from world import live, live_all

_FIRST, _, _LAST = os.environ.get("SHARDBUS_SEEDS", "0:200").partition(":")
_CHUNK = max(1, (int(_LAST) - int(_FIRST)) // 5)


@pytest.mark.timeout(0 if "SHARDBUS_SEEDS" in os.environ else 240)
@pytest.mark.parametrize("start", range(int(_FIRST), int(_LAST), _CHUNK))
def test_every_child_of_every_event_is_handled_in_every_seed(start: int) -> None:
    live_all(range(start, min(start + _CHUNK, int(_LAST))), PublishingWorld)


def test_a_seed_lives_the_same_life_twice() -> None:
    assert live(3, PublishingWorld).played == live(3, PublishingWorld).played
