"""Where a store is: URLs as SQLAlchemy writes them, and the file of each shard."""

from __future__ import annotations

import os

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from shardbus.errors import ConfigError
from shardbus.store import MEMORY_URL


def shard_url(url: str, shard: int) -> str:
    """The URL of one shard's store: a file is one shard's alone, so its name gets the shard's number.

    Raises:
        ConfigError: not a URL of a store that this version can use.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(f"{url!r} is not a database URL; try sqlite+aiosqlite:///dead-letters.db") from None
    if parsed.drivername != "sqlite+aiosqlite":
        raise ConfigError(f"{parsed.drivername!r} is not a store that shardbus knows; use sqlite+aiosqlite:///FILE")
    if parsed.database in (None, "", ":memory:"):
        return MEMORY_URL
    assert parsed.database is not None  # just checked
    root, suffix = os.path.splitext(os.path.abspath(parsed.database))
    return sqlite_file_url(f"{root}-{shard}{suffix or '.db'}")


def files_there(url: str) -> int:
    """How many shards have left a file for this URL, counted from the first without a gap."""
    count = 0
    while (path := make_url(shard_url(url, count)).database) not in (None, ":memory:") and os.path.exists(str(path)):
        count += 1
    return count


def sqlite_file_url(path: str) -> str:
    """The store URL of an SQLite file."""
    return URL.create("sqlite+aiosqlite", database=path).render_as_string()
