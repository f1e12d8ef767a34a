"""Addresses of a bus as people write them: a directory for ipc, a host and port for tcp."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from typing import Final

import msgspec

from shardbus.errors import ConfigError

_IPC_BYTES_MAX: Final = 107  # sun_path, less its final zero
_PORT: Final = re.compile("[0-9]{1,9}")
_NAME_BYTES: Final = len("/w255-4294967295-ffffffff")  # the longest socket name in a bus's directory


class IpcAddress(msgspec.Struct, frozen=True):
    """A directory that belongs to one bus."""

    directory: str

    @property
    def url(self) -> str:
        """As people write it."""
        return f"ipc://{self.directory}"

    @property
    def control(self) -> str:
        """Where the supervisor listens."""
        return f"ipc://{self.directory}/control"

    def worker(self, shard: int, counter: int, incarnation: bytes) -> str:
        """Where one incarnation of a worker listens: a path that no other ever used."""
        return f"ipc://{self.directory}/w{shard}-{counter}-{incarnation[:4].hex()}"


class TcpAddress(msgspec.Struct, frozen=True):
    """A host and the supervisor's port; workers take the ports after it."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """As people write it."""
        return f"tcp://{self.host}:{self.port}"

    @property
    def control(self) -> str:
        """Where the supervisor listens."""
        return self.url

    def worker(self, shard: int, _counter: int, _incarnation: bytes) -> str:
        """Where a worker listens: its port is its shard's, whatever the incarnation."""
        return f"tcp://{self.host}:{self.port + 1 + shard}"


Address = IpcAddress | TcpAddress


def parse_address(text: str) -> Address:
    """The address that a person wrote.

    Raises:
        ConfigError: it is none; the message says what one looks like.
    """
    scheme, separator, rest = text.partition("://") if isinstance(text, str) else ("", "", "")
    if not separator or scheme not in ("ipc", "tcp"):
        raise ConfigError(f"{text!r} is not an address; use ipc://DIRECTORY or tcp://HOST:PORT")
    if scheme == "ipc":
        if not rest or rest.startswith("@"):
            raise ConfigError(f"{text!r}: ipc:// takes a directory, for instance ipc:///run/shop")
        directory = os.path.abspath(rest)
        _check_text(text, directory)
        if len(os.fsencode(directory)) + _NAME_BYTES > _IPC_BYTES_MAX:
            raise ConfigError(
                f"{text!r}: the path is too long for a socket; at most {_IPC_BYTES_MAX - _NAME_BYTES} bytes fit"
            )
        return IpcAddress(directory)
    _check_text(text, rest)
    host, separator, port = rest.rpartition(":")
    if not separator or not host or not _PORT.fullmatch(port) or not 1 <= int(port) <= 65_535:
        raise ConfigError(f"{text!r}: tcp:// takes a host and a port, for instance tcp://127.0.0.1:7400")
    return TcpAddress(host, int(port))


def _check_text(text: str, place: str) -> None:
    try:
        place.encode()
    except UnicodeEncodeError:  # bytes that are no text, from a command line or the current directory
        raise ConfigError(f"{text!r} is not an address: {place!r} is not UTF-8") from None
    if "\0" in place:
        raise ConfigError(f"{text!r} is not an address: there is a NUL character in {place!r}")


_SOCKET_NAME: Final = re.compile(r"control|w[0-9]+-[0-9]+-[0-9a-f]{8}")


def is_socket_name(name: str) -> bool:
    """Whether a file in a bus's directory is one of its sockets."""
    return _SOCKET_NAME.fullmatch(name) is not None


def check_ports(address: Address, workers: int) -> None:
    """Refuse a tcp address that leaves no ports for so many workers.

    Raises:
        ConfigError: the last worker's port would not exist.
    """
    if isinstance(address, TcpAddress) and address.port + workers > 65_535:
        raise ConfigError(
            f"{address.url}: {workers} workers take the {workers} ports after it, and there are none above 65535; name a "
            f"port up to {65_535 - workers}"
        )


def default_address(environment: Mapping[str, str]) -> str:
    """The address that is meant where none is given: `$SHARDBUS_URL`, or a directory of this user's."""
    url = environment.get("SHARDBUS_URL")
    if url:
        return url
    return f"ipc://{own_directory(environment, 'shardbus')}"


def own_directory(environment: Mapping[str, str], name: str) -> str:
    """Where this user's buses have directories of such a name: in the one for sockets, where there is such a one."""
    base = environment.get("XDG_RUNTIME_DIR")
    if base and os.path.isdir(base) and os.access(base, os.W_OK | os.X_OK):  # it may be of somebody who became this user
        return f"{base}/{name}"
    return f"{tempfile.gettempdir()}/{name}-{os.getuid()}"
