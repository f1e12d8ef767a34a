"""The fork server: whose children its copies are, how they end, and what is told where there is none."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from buses import APPLICATION, RunningBus, wait_until

import shardbus
import shardbus.fork_server
from shardbus.fork_server import FORK, Forked, ForkServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is none elsewhere")

_space: dict[str, object] = {}
exec(compile(APPLICATION, "accounts.py", "exec"), _space)  # noqa: S102 - the same message types as the served application
Added = _space["Added"]

SERVED = """
import os, sys
from shardbus.fork_server import serve_forks

argument, descriptor = serve_forks(int(sys.argv[3]))
if argument.isdecimal():
    os._exit(int(argument))
os.write(descriptor, f"{argument} {os.getppid()} {os.getsid(0) == os.getpid()}".encode())
os.read(descriptor, 1)
"""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    (tmp_path / "served.py").write_text(SERVED)
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", path)
    server = ForkServer("served")
    yield server
    server.close()


class Watched:
    """What a server tells who watches it."""

    def __init__(self, server: ForkServer) -> None:
        self.changed = asyncio.Event()
        self.ends: list[int | None] = []
        server.watch(self.changed.set, self._on_end)

    def _on_end(self, code: int | None) -> None:
        self.ends.append(code)
        self.changed.set()

    async def wait(self) -> None:
        await self.changed.wait()
        self.changed.clear()


async def started(server: ForkServer) -> bool:
    assert server.is_starting
    await Watched(server).wait()
    return forks(server)


def forks(server: ForkServer) -> bool:
    assert not server.is_starting
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = server.fork("0", theirs.fileno())
    return pid is not None and Forked(pid).wait() == 0


async def test_a_copy_is_a_child_of_who_asked_has_the_descriptor_and_outlives_the_server(served: ForkServer):
    assert await started(served)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            pid = served.fork("word", theirs.fileno())
        assert pid is not None
        assert ours.recv(100).decode() == f"word {os.getpid()} True"
        served.close()
        copy = Forked(pid)
        assert copy.poll() is None
        copy.kill()
        assert ours.recv(1) == b""
        assert (copy.wait(), copy.poll()) == (-signal.SIGKILL, -signal.SIGKILL)
        copy.terminate()  # one that is reaped hears nothing


async def test_a_copys_exit_code_is_its_own(served: ForkServer):
    assert await started(served)
    with socket.socket() as given:
        pids = [served.fork(str(code), given.fileno()) for code in (3, 70)]
        assert [Forked(pid).wait() for pid in pids if pid is not None] == [3, 70]


async def test_a_server_that_does_not_start_forks_nothing(served: ForkServer, tmp_path: Path):
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    broken = ForkServer("broken")
    watched = Watched(broken)
    await watched.wait()
    assert (watched.ends, broken.is_starting, forks(broken)) == ([3], False, False)
    broken.close()


async def test_a_server_that_dies_is_noticed_at_once_and_another_takes_its_place(served: ForkServer):
    watched = Watched(served)
    await watched.wait()
    kill(served)
    await watched.wait()
    assert (watched.ends, forks(served)) == ([-signal.SIGKILL], False)
    served.restart()
    assert served.is_starting
    await watched.wait()
    assert forks(served)


async def test_a_server_that_is_found_dead_or_does_not_answer_forks_nothing_and_that_is_told(
    served: ForkServer, monkeypatch: pytest.MonkeyPatch
):
    watched = Watched(served)
    await watched.wait()
    kill(served)
    assert not forks(served)  # before the event loop has looked
    await watched.wait()
    served.restart()
    await watched.wait()
    monkeypatch.setattr(shardbus.fork_server, "_ANSWER_S_MAX", 0.05)
    kill(served, signal.SIGSTOP)
    assert not forks(served)
    await watched.wait()
    assert watched.ends == [-signal.SIGKILL, None]


async def test_the_end_of_a_server_that_is_closed_is_told_to_nobody(served: ForkServer):
    watched = Watched(served)
    await watched.wait()
    served.close()
    await asyncio.sleep(0)
    assert watched.ends == []


def kill(server: ForkServer, number: signal.Signals = signal.SIGKILL) -> None:
    assert server._process is not None
    server._process.send_signal(number)


async def test_a_bus_whose_fork_server_was_killed_has_another_and_its_workers_come_back(make_bus: Callable[..., RunningBus]):
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    first = min(psutil.Process(bus.process.pid).children(), key=psutil.Process.create_time)
    assert FORK in first.cmdline()
    first.kill()
    assert bus.process.stderr is not None
    told = ""
    while "back" not in told:
        told += bus.process.stderr.readline()
    assert "the fork server ended (SIGKILL); starting another in 0.1 s" in told
    assert bus.status()["healthy"]
    async with shardbus.connect(bus.address) as client:
        for restarts in (1, 2):  # the second one's was made by the new server
            (worker,) = bus.worker_pids()
            for number in range(200):
                await client.publish(Added(account=str(number % 7)))
            os.kill(worker, signal.SIGKILL)
            await client.flush()
            wait_until(lambda: bus.status()["healthy"])
            assert bus.status()["workers"][0]["restarts"] == restarts
        ledger = await client.flush()
        assert (ledger.handled, ledger.dead, ledger.in_flight) == (400, 0, 0)
    (worker,) = bus.worker_pids()
    assert FORK in psutil.Process(worker).cmdline()
    assert bus.end()[0] == 0


def test_nothing_is_forked_before_the_server_has_imported_everything(served: ForkServer):
    with socket.socket() as given:
        assert served.fork("0", given.fileno()) is None
    assert served.is_starting
