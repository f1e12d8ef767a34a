"""`Bus`: an application's handlers, and the way to run them in the calling process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import get_args

from msgspec.structs import replace

from shardbus.arguments import check_count, check_seconds
from shardbus.client import Client, ClientBlock
from shardbus.config import DEFAULT_LIMITS, STORE_BYTES_LEAST, StoreFull
from shardbus.errors import ConfigError
from shardbus.local import run_local
from shardbus.outboxes import OnFull, check_full
from shardbus.publishing import PublishMiddleware, client_class
from shardbus.registry import Registry

_SHARDS_MAX = 256


class Bus(Registry):
    """An application: its name, its handlers, its lifespan.

    Register with `@bus.on(EventType)`, `@bus.command(CommandType)`, `@bus.lifespan`, `@bus.session` and
    `bus.use(middleware)`. Run it on all cores with `shardbus serve MODULE:BUS`, or in this process with `local()`.
    """

    def local(
        self,
        *,
        shards: int = 1,
        dead_letters: str | None = None,
        dead_letters_max_rows: int = DEFAULT_LIMITS.store_rows_max,
        dead_letters_max_bytes: int = DEFAULT_LIMITS.store_bytes_max,
        dead_letters_full: StoreFull = DEFAULT_LIMITS.store_full,
        close_timeout: float = 30.0,
        on_full: OnFull = "wait",
        on_pressure: Callable[[bool], object] | None = None,
        middleware: Sequence[PublishMiddleware] = (),
    ) -> AbstractAsyncContextManager[Client]:
        """Run the application in the calling process: `async with bus.local() as client`.

        Args:
            shards: how many shards, all in this process.
            dead_letters: URL of the store, as for `shardbus serve --dead-letters`; default: in memory, and gone with the
                block; what is lost so is logged.
            dead_letters_max_rows: how many dead letters and waiting events a shard may hold.
            dead_letters_max_bytes: likewise, bytes of their bodies and 512 for each.
            dead_letters_full: what happens then. `"stop"`: nothing more is acked as stored, so publishers wait.
                `"drop_oldest"`: the oldest dead letters are dropped, and counted; never one that parks its key.
            close_timeout: seconds that leaving the block waits for what is unfinished.
            on_full: as for `shardbus.connect`.
            on_pressure: likewise.
            middleware: likewise, around publishing; what is around handlers is `use`'s.

        Raises:
            NotDelivered: on leaving, if events were left when the time was up.
            UsageError: an `on_full`, a middleware or a time-out that is none.
            ConfigError: a number of shards or a bound out of range, or a store that cannot be opened.
        """
        check_count("shards", shards, 1, _SHARDS_MAX, error=ConfigError)
        check_count("dead_letters_max_rows", dead_letters_max_rows, 1, error=ConfigError)
        check_count("dead_letters_max_bytes", dead_letters_max_bytes, STORE_BYTES_LEAST, error=ConfigError)
        if dead_letters_full not in get_args(StoreFull):
            raise ConfigError(f"dead_letters_full={dead_letters_full!r}: say 'stop' or 'drop_oldest'")
        check_seconds("close_timeout", close_timeout, zero=True)
        check_full(on_full, on_pressure)
        block = run_local(
            self,
            shards=shards,
            dead_letters=dead_letters,
            limits=replace(
                DEFAULT_LIMITS,
                store_rows_max=dead_letters_max_rows,
                store_bytes_max=dead_letters_max_bytes,
                store_full=dead_letters_full,
            ),
            close_timeout_s=close_timeout,
            on_full=on_full,
            on_pressure=on_pressure,
            make_client=client_class(middleware),
        )
        return ClientBlock(block, "bus.local()")
