"""Addresses at which nobody can listen, or which nobody can reach: told in a line."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import warnings
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


async def test_in_a_child_of_a_fork_a_socket_takes_nothing_and_gives_nothing(tmp_path: Path):
    listener, connector = ZmqListener(), ZmqConnector()
    try:
        router = listener.bind(f"ipc://{tmp_path}/r", lambda *_: None)
        dealer = connector.open(f"ipc://{tmp_path}/r", lambda _: None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            child = os.fork()
        if not child:
            signal.alarm(20)  # libzmq would be called again and again
            router._drain()
            dealer._drain()
            os._exit(dealer.send(b"frame") or router.send(b"peer", b"frame"))
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert dealer.send(b"frame")
    finally:
        connector.close()
        listener.close()


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
