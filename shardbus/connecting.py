"""`connect`: a client of a bus that runs elsewhere."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager

from shardbus.addresses import default_address, parse_address
from shardbus.client import Client, open_client
from shardbus.zmq_transport import ZmqConnector


def connect(
    address: str | None = None, *, timeout: float = 10.0, close_timeout: float = 30.0
) -> AbstractAsyncContextManager[Client]:
    """Connect to a bus: `async with shardbus.connect() as client`.

    Args:
        address: `ipc://DIRECTORY` or `tcp://HOST:PORT`; default: `$SHARDBUS_URL`, or this user's own bus.
        timeout: seconds to wait for a bus to answer.
        close_timeout: seconds that leaving the block waits for what is unfinished.

    Raises:
        BusUnreachable: no bus answered in time.
        ConfigError: the address is none.
        NotDelivered: on leaving, if events were left when the time was up.
    """
    parsed = parse_address(default_address(os.environ) if address is None else address)
    client = Client(parsed.url, ZmqConnector(), parsed.control)
    return open_client(client, timeout_s=timeout, close_timeout_s=close_timeout)
