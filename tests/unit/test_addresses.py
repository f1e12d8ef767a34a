"""Addresses: what is none is told with what one looks like."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shardbus.addresses import IpcAddress, TcpAddress, check_ports, default_address, parse_address
from shardbus.errors import ConfigError

MISTAKES = [
    ("", "'' is not an address; use ipc://DIRECTORY or tcp://HOST:PORT"),
    ("/run/shop", "'/run/shop' is not an address"),
    ("http://shop:80", "'http://shop:80' is not an address"),
    ("ipc:///tmp/\udcff", "is not UTF-8"),
    ("tcp://\udcff:7400", "is not UTF-8"),
    ("ipc:///tmp/a\0b", "there is a NUL character"),
    (5, "5 is not an address"),
    (b"ipc:///run/shop", "b'ipc:///run/shop' is not an address"),
    ("ipc://", "'ipc://': ipc:// takes a directory, for instance ipc:///run/shop"),
    ("ipc://@shop", "ipc:// takes a directory"),
    (f"ipc:///{'x' * 100}", "the path is too long for a socket; at most "),
    ("tcp://", "'tcp://': tcp:// takes a host and a port, for instance tcp://127.0.0.1:7400"),
    ("tcp://shop", "tcp:// takes a host and a port"),
    ("tcp://:7400", "tcp:// takes a host and a port"),
    ("tcp://shop:http", "tcp:// takes a host and a port"),
    ("tcp://shop:0", "tcp:// takes a host and a port"),
    ("tcp://shop:65536", "tcp:// takes a host and a port"),
    (f"tcp://shop:{'9' * 5000}", "tcp:// takes a host and a port"),
    ("tcp://shop:-1", "tcp:// takes a host and a port"),
    ("tcp://shop:²", "tcp:// takes a host and a port"),
]


@pytest.mark.parametrize(("text", "told"), MISTAKES)
def test_what_is_no_address_is_told_with_what_one_looks_like(text: Any, told: str):
    with pytest.raises(ConfigError) as raised:
        parse_address(text)
    assert told in str(raised.value)
    assert repr(text) in str(raised.value)


def test_a_tcp_address_without_ports_for_all_workers_is_refused():
    address = parse_address("tcp://127.0.0.1:65530")
    check_ports(address, 5)
    with pytest.raises(ConfigError, match=r"6 workers take the 6 ports after it, .* name a port up to 65529"):
        check_ports(address, 6)
    assert isinstance(address, TcpAddress)


def test_the_default_is_shardbus_url_and_else_a_directory_of_this_user(tmp_path: Path):
    assert default_address({"SHARDBUS_URL": "tcp://127.0.0.1:7400"}) == "tcp://127.0.0.1:7400"
    assert default_address({"SHARDBUS_URL": "", "XDG_RUNTIME_DIR": str(tmp_path)}) == f"ipc://{tmp_path}/shardbus"
    assert default_address({"XDG_RUNTIME_DIR": f"{tmp_path}/none"}).endswith(f"/shardbus-{os.getuid()}")


def test_a_relative_path_is_meant_from_where_it_is_written_and_told_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert parse_address("ipc://here") == IpcAddress(f"{tmp_path}/here")
    assert parse_address("ipc://./here/../there").url == f"ipc://{tmp_path}/there"
