"""Fixtures: buses in this process, over rows that the test can look at."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from shardbus.bus import Bus
from shardbus.client import Client
from shardbus.local import run_local
from shardbus.publishing import PublishMiddleware, client_class
from shardbus.sql.store import SqlStore
from shardbus.sql.urls import sqlite_file_url
from shardbus.store import Store
from shardbus.testing import MemoryRows, MemoryStore


@pytest.fixture
def rows() -> MemoryRows:
    return MemoryRows()


@pytest.fixture(params=["memory", "sqlite file"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Opens a store of either kind, again and again over the same rows."""
    rows = MemoryRows()

    def store() -> Store:
        return MemoryStore(rows) if request.param == "memory" else SqlStore(sqlite_file_url(str(tmp_path / "store.db")))

    return store


@pytest.fixture
def run(rows: MemoryRows) -> Callable[..., AbstractAsyncContextManager[Client]]:
    """Runs a bus in this process, over rows that the test can look at."""

    @asynccontextmanager
    async def running(bus: Bus, *middleware: PublishMiddleware, close_timeout_s: float = 30.0) -> AsyncIterator[Client]:
        client_type = client_class(middleware)
        stores: list[Store] = [MemoryStore(rows)]
        async with run_local(bus, stores=stores, close_timeout_s=close_timeout_s, make_client=client_type) as client:
            yield client

    return running
