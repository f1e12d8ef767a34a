"""The fork server: whose children its copies are, how they end, and what is told where there is none."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardbus.fork_server import Forked, ForkServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is none elsewhere")

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


async def started(server: ForkServer) -> bool:
    changed = asyncio.Event()
    server.watch(changed.set)
    assert server.is_starting
    await changed.wait()
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


async def test_a_server_that_does_not_start_or_has_died_forks_nothing(served: ForkServer, tmp_path: Path):
    (tmp_path / "broken.py").write_text("raise SystemExit(1)")
    broken = ForkServer("broken")
    assert not await started(broken)
    broken.close()
    assert await started(served)
    assert served._process is not None
    os.kill(served._process.pid, signal.SIGKILL)
    served._process.wait()
    with socket.socket() as given:
        assert served.fork("0", given.fileno()) is None


def test_nothing_is_forked_before_the_server_has_imported_everything(served: ForkServer):
    with socket.socket() as given:
        assert served.fork("0", given.fileno()) is None
    assert served.is_starting
