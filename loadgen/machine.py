"""What a run ran on, and whether the bus shares this host's clock."""

from __future__ import annotations

import functools
import os
import platform
import socket
from importlib import metadata

import msgspec

_PACKAGES = ("pyzmq", "msgspec", "msgpack")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where the figures come from. `versions` are of the packages that carry the events."""

    cpu_count: int
    cpu_model: str
    system: str
    python: str
    versions: dict[str, str]


class MachineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How busy the machine was during a run, whoever kept it so.

    `busy` and `stolen` (by the host of a virtual machine) are shares of the time of all cores together; `load_average` is
    that of the last minute, at the end.
    """

    busy: float
    stolen: float
    load_average: float


@functools.cache
def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(
        cpu_count=os.cpu_count() or 1,
        cpu_model=_cpu_model(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={name: _version_of(name) for name in ("shardbus", *_PACKAGES)},
    )


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from source"


def shares_clock(address: str) -> bool:
    """Whether the bus at `address` runs on this host, so that both read the same CLOCK_MONOTONIC.

    An ipc address always does. A tcp address does if its host is an address of ours: one that can be bound.
    """
    scheme, _, rest = address.partition("://")
    if scheme != "tcp":
        return True
    host = rest.rpartition(":")[0].strip("[]")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True
