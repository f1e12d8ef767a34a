"""URLs of stores: what cannot be one is told with what one looks like."""

from __future__ import annotations

from typing import Any

import pytest

from shardbus import Bus
from shardbus.errors import ConfigError
from shardbus.sql.store import SqlStore
from shardbus.sql.urls import shard_url

EXAMPLE = "is not a database URL; try sqlite+aiosqlite:///dead-letters.db"
MISSING = "sqlite+aiosqlite:////no/such/directory"
UNOPENED = (
    f"the store {MISSING}/dead-0.db: unable to open database file: there is no directory /no/such/directory; name another "
    "with dead_letters=URL, or leave it out: in memory"
)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("dead.db", f"'dead.db' {EXAMPLE}"),
        ("", f"'' {EXAMPLE}"),
        (5, f"5 {EXAMPLE}"),
        ("sqlite:///dead.db", "'sqlite' is not a store that shardbus knows; use sqlite+aiosqlite:///FILE"),
        ("mysql://x/y", "'mysql' is not a store that shardbus knows"),
    ],
)
def test_what_is_no_url_of_a_store_is_told(url: Any, told: str):
    with pytest.raises(ConfigError) as raised:
        shard_url(url, 0)
    assert str(raised.value).startswith(told)


@pytest.mark.parametrize("url", ["sqlite:///dead.db", "nonsense://x"])
def test_an_engine_that_cannot_be_had_is_told(url: str):
    with pytest.raises(ConfigError, match="the store URL cannot be used: "):
        SqlStore(url)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dead_letters": "dead.db"}, f"'dead.db' {EXAMPLE}"),
        ({"dead_letters": f"{MISSING}/dead.db"}, UNOPENED),
        ({"shards": 0}, "shards=0: take 1 to 256"),
        ({"shards": "2"}, "shards='2': take 1 to 256"),
        ({"shards": True}, "shards=True: take 1 to 256"),
        ({"dead_letters_max_rows": 0}, "dead_letters_max_rows=0: take 1 or more"),
        ({"dead_letters_max_bytes": 100}, "dead_letters_max_bytes=100: take 2,097,152 or more"),
        ({"dead_letters_full": "explode"}, "dead_letters_full='explode': say 'stop' or 'drop_oldest'"),
    ],
)
async def test_a_local_bus_that_cannot_be_is_told(options: dict[str, Any], told: str):
    with pytest.raises(ConfigError) as raised:
        async with Bus("urls").local(**options):
            pass
    assert str(raised.value) == told
