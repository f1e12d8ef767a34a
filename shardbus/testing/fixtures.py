"""Fixtures for pytest: `pytest_plugins = ["shardbus.testing.fixtures"]` in the root conftest.py enables them.

`run_bus` runs an application: `async with run_bus(bus, shards=2) as kit`. `kit` does so for a whole test, for the
application that a fixture `bus` of yours returns; it needs pytest-asyncio. Both take their seed from `--shardbus-seed`
(default: 0).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

import pytest

from shardbus.registry import Registry
from shardbus.testing.kit import Kit, run

try:
    from pytest_asyncio import fixture as async_fixture
except ImportError:
    async_fixture = pytest.fixture  # type: ignore[assignment]  # another plugin may run it


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--shardbus-seed", type=int, default=0, help="Seed of what tests of a shardbus leave to chance.")


@pytest.fixture
def run_bus(request: pytest.FixtureRequest) -> Callable[..., AbstractAsyncContextManager[Kit]]:
    """`shardbus.testing.run`, with the seed of this run of pytest."""
    return partial(run, seed=request.config.getoption("--shardbus-seed"))


@async_fixture
async def kit(bus: Registry, run_bus: Callable[..., AbstractAsyncContextManager[Kit]]) -> AsyncIterator[Kit]:
    """A `Kit` of the application that the fixture `bus` returns, open for one test."""
    async with run_bus(bus) as kit:
        yield kit
