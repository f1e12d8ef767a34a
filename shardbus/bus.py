"""`Bus`: an application's handlers, and the way to run them in the calling process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from shardbus.client import Client, OnFull
from shardbus.errors import ConfigError
from shardbus.local import run_local
from shardbus.registry import Registry

_SHARDS_MAX = 256


class Bus(Registry):
    """An application: its name, its handlers, its lifespan.

    Register with `@bus.on(EventType)`, `@bus.command(CommandType)` and `@bus.lifespan`. Run it on all cores with
    `shardbus serve MODULE:BUS`, or in this process with `local()`.
    """

    def local(
        self,
        *,
        shards: int = 1,
        dead_letters: str | None = None,
        close_timeout: float = 30.0,
        on_full: OnFull = "wait",
        on_pressure: Callable[[bool], object] | None = None,
    ) -> AbstractAsyncContextManager[Client]:
        """Run the application in the calling process: `async with bus.local() as client`.

        Args:
            shards: how many shards, all in this process.
            dead_letters: URL of the store, as for `shardbus serve --dead-letters`; default: in memory.
            close_timeout: seconds that leaving the block waits for what is unfinished.
            on_full: as for `shardbus.connect`.
            on_pressure: likewise.

        Raises:
            NotDelivered: on leaving, if events were left when the time was up.
            ConfigError: a number of shards out of range, or a store that cannot be opened.
        """
        if not 1 <= shards <= _SHARDS_MAX:
            raise ConfigError(f"shards={shards}: take 1 to {_SHARDS_MAX}")
        return run_local(
            self,
            shards=shards,
            dead_letters=dead_letters,
            close_timeout_s=close_timeout,
            on_full=on_full,
            on_pressure=on_pressure,
        )
