"""Fixtures: buses in this process, over rows that the test can look at."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from shardbus.bus import Bus
from shardbus.client import Client
from shardbus.local import run_local
from shardbus.publishing import PublishMiddleware, client_class
from shardbus.testing import MemoryRows, MemoryStore


@pytest.fixture
def rows() -> MemoryRows:
    return MemoryRows()


@pytest.fixture
def run(rows: MemoryRows) -> Callable[..., AbstractAsyncContextManager[Client]]:
    """Runs a bus in this process, over rows that the test can look at."""

    @asynccontextmanager
    async def running(bus: Bus, *middleware: PublishMiddleware) -> AsyncIterator[Client]:
        async with run_local(bus, stores=[MemoryStore(rows)], make_client=client_class(middleware)) as client:
            yield client

    return running
