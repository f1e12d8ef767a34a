"""Order, at-least-once, the ledger and bounds, by the real client, sessions, lanes and shards in simulated worlds.

`python -m pytest tests/simulation` runs 1,000 seeds. For more: `SHARDBUS_SEEDS=0:100000`.
"""

from __future__ import annotations

import asyncio
import os

import pytest
from world import JOURNAL, VirtualLoop, World, live, live_all

from shardbus.journal import Journal
from shardbus.quarantine import Ended
from shardbus.store import StoreCounts, StoreError

_FIRST, _, _LAST = os.environ.get("SHARDBUS_SEEDS", "0:1000").partition(":")
_CHUNK = max(1, (int(_LAST) - int(_FIRST)) // 10)


@pytest.mark.timeout(0 if "SHARDBUS_SEEDS" in os.environ else 240)
@pytest.mark.parametrize("start", range(int(_FIRST), int(_LAST), _CHUNK))
def test_every_promise_holds_in_every_seed(start: int) -> None:
    live_all(range(start, min(start + _CHUNK, int(_LAST))), World)


def test_a_seed_lives_the_same_life_twice() -> None:
    assert live(7, World).handlings == live(7, World).handlings


def test_a_death_is_judged_once_though_the_store_cannot_be_opened_at_first(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def locked() -> StoreCounts:
        raise StoreError("locked")

    async def begin() -> None:
        world = World(0, loop)
        dead = Journal(memoryview(world.journals[0]), **JOURNAL)
        dead.scene()
        dead.lead(b"p" * 16, 3, 4)
        world.ends[0] = Ended(how="crashed", told="SIGABRT", at_ns=1)
        shard = world.new_shard(0)
        assert (shard._journal.deaths, shard._journal.names_somebody()) == (0, True)
        store = world.stores[0]
        assert store is not None
        with monkeypatch.context() as patch:
            patch.setattr(store, "open", locked)
            for _ in range(3):
                with pytest.raises(StoreError):
                    await shard.start()
        await shard.start()
        assert shard._journal.counts()[0] == shard._journal.deaths == 1
        await shard.close()

    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(begin())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["a worker has ended (SIGABRT)"]
