"""Real buses for tests: `shardbus serve` as a process, on an address of its own, ended with the test."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from click.testing import CliRunner, Result

from shardbus.cli import cli
from shardbus.connecting import ask_bus

APPLICATION = """
import asyncio
import hashlib
import os
import time

from shardbus import Bus, Command, Context, Event, Retry


class Added(Event, key="account"):
    account: str
    amount: int = 1


class Stumbled(Event, key="account"):
    account: str


class Slept(Event, key="account"):
    account: str
    seconds: float


class Blocked(Event, key="account"):
    account: str
    seconds: float


class GetTotal(Command[int], key="account"):
    account: str


class Die(Command[None], key="account"):
    account: str


bus = Bus("accounts")
totals: dict[str, int] = {}


@bus.on(Added)
async def add(event: Added) -> None:
    totals[event.account] = totals.get(event.account, 0) + event.amount


@bus.on(Stumbled, retry=Retry(base_s=0.01))  # three attempts, as by default
async def stumble(event: Stumbled, context: Context) -> None:
    raise ValueError(f"{event.account} stumbled on attempt {context.attempt}")


@bus.on(Slept)
async def sleep(event: Slept) -> None:
    await asyncio.sleep(event.seconds)


@bus.on(Blocked)
async def block(event: Blocked) -> None:
    time.sleep(event.seconds)


@bus.command(GetTotal)
async def total(command: GetTotal) -> int:
    return totals.get(command.account, 0)


@bus.command(Die)
def die(command: Die) -> None:
    os._exit(9)
"""

PAYMENTS = r"""
import os

from shardbus import Bus, Context, Event, Retry


class Paid(Event, key="account"):
    account: str
    n: int


class Charged(Event, key="account"):
    account: str
    n: int


bus = Bus("payments")


def _take(event: Paid | Charged, context: Context) -> None:
    if not os.path.exists("mended"):
        raise ConnectionError("no bank")
    with open(f"taken-{os.getpid()}.txt", "a") as file:
        file.write(f"{event.account} {event.n} {int(context.redelivered)}\n")


@bus.on(Paid, retry=Retry(attempts=1))
def pay(event: Paid, context: Context) -> None:
    _take(event, context)


@bus.on(Charged, retry=Retry(attempts=1), on_dead_letter="park")
def charge(event: Charged, context: Context) -> None:
    _take(event, context)
"""
"""Handlers that fail until there is a file named `mended`, and write down what they take."""


def state_of(address: str) -> str:
    """The directory on RAM where a bus at an address keeps its state."""
    return f"/dev/shm/shardbus-{os.getuid()}-{hashlib.sha256(address.encode()).hexdigest()[:16]}"


class RunningBus:
    """A `shardbus serve` that a test started."""

    def __init__(self, directory: Path, *arguments: str, application: str | None = "accounts:bus") -> None:
        self.directory = directory
        self.address = f"ipc://{directory}/bus"
        self.state = state_of(self.address)
        (directory / "accounts.py").write_text(APPLICATION)
        (directory / "payments.py").write_text(PAYMENTS)
        self._command = [sys.executable, "-m", "shardbus", "serve"]
        if application is not None:
            self._command.append(application)
        self._command += ["--bind", self.address, *arguments]
        self.process = self.start()

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(Path(__file__).parents[2]), str(self.directory)])
        return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error"}

    def start(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            self._command,
            cwd=self.directory,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def wait_ready(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("ready"):
            _, errors = self.process.communicate(timeout=30)
            raise AssertionError(f"the bus did not start: {line}{errors}")
        return line

    def shardbus(self, *arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shardbus", *arguments],
            cwd=self.directory,
            env=self.environment() | {"SHARDBUS_URL": self.address},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def told(self, *arguments: str) -> Result:
        """What a `shardbus` command does, without a process for it; may be called beside a running event loop."""
        runner = CliRunner(env={"SHARDBUS_URL": self.address}, catch_exceptions=False)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(runner.invoke, cli, arguments).result()

    def status(self) -> dict[str, Any]:
        """What `shardbus status --json` says, without a process for it; may be called beside a running event loop."""
        asking = ask_bus(self.address, "status", connect_timeout=10.0, timeout=30.0)
        with ThreadPoolExecutor(1) as thread:
            found: dict[str, Any] = msgspec.msgpack.decode(thread.submit(asyncio.run, asking).result())
        return found

    def worker_pids(self) -> list[int]:
        """A worker's for each shard, by shard; waits for the successor where one has died."""
        pids: list[int] = []

        def are_there() -> bool:
            pids[:] = [worker["pid"] for worker in self.status()["workers"]]
            return all(pids)  # never 0: to kill that would be to kill ourselves

        wait_until(are_there, 60.0)
        return pids

    def end(self) -> tuple[int, str]:
        """SIGTERM, and wait; returns exit code and standard error."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self, timeout: float = 60) -> tuple[int, str]:
        """Wait until it has ended by itself; returns exit code and standard error."""
        _, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, errors

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=30)


def free_port(count: int = 1) -> int:
    """The first of so many ports in a row that nobody has, below those that the system gives to whoever asks for any."""
    for port in random.sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for at in range(count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port + at))
            return port
    raise AssertionError(f"there are no {count} free ports in a row")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(condition: Any, timeout_s: float = 30.0) -> None:
    """Poll until a condition of another process holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come to hold in time"
        time.sleep(0.02)
