"""`connect`: a client of a bus that runs elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager

from shardbus.addresses import Address, default_address, parse_address
from shardbus.arguments import check_seconds
from shardbus.client import Client, ClientBlock, open_client
from shardbus.outboxes import OnFull, check_full
from shardbus.publishing import PublishMiddleware, client_class
from shardbus.zmq_transport import ZmqConnector


def connect(
    address: str | None = None,
    *,
    timeout: float = 10.0,
    close_timeout: float = 30.0,
    on_full: OnFull = "wait",
    on_pressure: Callable[[bool], object] | None = None,
    middleware: Sequence[PublishMiddleware] = (),
) -> AbstractAsyncContextManager[Client]:
    """Connect to a bus: `async with shardbus.connect() as client`.

    Args:
        address: `ipc://DIRECTORY` or `tcp://HOST:PORT`; default: `$SHARDBUS_URL`, or this user's own bus.
        timeout: seconds to wait for a bus to answer.
        close_timeout: seconds that leaving the block waits for what is unfinished.
        on_full: what `publish` does when a shard's outbox is full: it waits; or raises `OutboxFull` ("reject"); or drops the
            oldest batch that no worker has seen ("drop_oldest"), which the ledger counts.
        on_pressure: called from the event loop with True when an outbox is filled to three quarters, and with False when all
            are below one quarter again.
        middleware: called for each event and command, in this order, before it is encoded: a plain `def` of
            `(message, headers)`. It may change the headers, return another message with the same key (None: this one), or
            raise, which the caller sees, and then nothing was published. `publish_many` then publishes one by one.

    Raises:
        BusUnreachable: no bus answered in time.
        ConfigError: the address is none.
        UsageError: an `on_full`, a middleware or a time-out that is none.
        NotDelivered: on leaving, if events were left when the time was up.
    """
    parsed = _parsed(address)
    check_seconds("timeout", timeout, zero=True)
    check_seconds("close_timeout", close_timeout, zero=True)
    check_full(on_full, on_pressure)
    make = client_class(middleware)

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[Client]:
        client = make(parsed.url, ZmqConnector(), parsed.control, on_full=on_full, on_pressure=on_pressure)
        async with open_client(client, timeout_s=timeout, close_timeout_s=close_timeout):
            yield client

    return ClientBlock(opened(), "shardbus.connect()")


async def ask_bus(address: str | None, what: str, *, connect_timeout: float, timeout: float) -> bytes:
    """Put a question to a bus, for instance `status`, which is answered also while no worker is up.

    Raises:
        BusUnreachable: no bus answered in time.
        BusRejected: it does not know the question.
        ConfigError: the address is none.
    """
    parsed = _parsed(address)
    client = Client(parsed.url, ZmqConnector(), parsed.control)
    await client.start(connect_timeout, workers=False)
    try:
        return await client.ask(what, b"", timeout=timeout)
    finally:
        await client.abort()


def _parsed(address: str | None) -> Address:
    return parse_address(default_address(os.environ) if address is None else address)
