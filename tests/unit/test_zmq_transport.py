"""Addresses at which nobody can listen, or which nobody can reach: told in a line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from shardbus.errors import ConfigError
from shardbus.zmq_transport import ZmqConnector, ZmqListener


async def test_a_port_in_use_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        listener = ZmqListener()
        try:
            with pytest.raises(ConfigError) as raised:
                listener.bind(address, lambda *_: None)
        finally:
            listener.close()
    assert str(raised.value) == f"{address} is in use: another program listens there; name another with --bind"


async def test_a_path_at_which_nothing_can_be_made_is_told(tmp_path: Path):
    listener = ZmqListener()
    try:
        with pytest.raises(ConfigError, match=f"cannot listen at ipc://{tmp_path}/none/control: No such file or directory"):
            listener.bind(f"ipc://{tmp_path}/none/control", lambda *_: None)
    finally:
        listener.close()


async def test_an_address_to_which_nobody_can_connect_is_told():
    connector = ZmqConnector()
    try:
        with pytest.raises(ConfigError, match="cannot connect to nonsense://x: Protocol not supported"):
            connector.open("nonsense://x", lambda _: None)
    finally:
        connector.close()
