"""What an exit code says of who ended a process, and what is left of one that could not be started."""

from __future__ import annotations

import errno
import gc
import os
import signal

import pytest

from shardbus.fork_server import ForkServer
from shardbus.processes import Child, was_killed, was_own_fault


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGSYS", "SIGTRAP"])
def test_a_signal_for_what_a_process_did_is_its_own_fault(name: str):
    assert was_own_fault(-signal.Signals[name])


@pytest.mark.parametrize("code", [0, 1, 3, 139])
def test_an_exit_is_its_own_doing(code: int):
    assert was_own_fault(code)


@pytest.mark.parametrize(
    "name", ["SIGHUP", "SIGINT", "SIGQUIT", "SIGPIPE", "SIGALRM", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGKILL"]
)
def test_a_signal_that_anybody_may_send_is_not(name: str):
    assert not was_own_fault(-signal.Signals[name])
    assert was_killed(-signal.Signals[name]) == (name == "SIGKILL")


async def test_a_child_that_cannot_be_watched_is_not_left_behind(monkeypatch: pytest.MonkeyPatch):
    started: list[int] = []

    def no_room(pid: int) -> int:
        started.append(pid)
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_room, raising=False)
    gc.collect()  # what earlier tests have left open
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="too many open files"):
        Child("no_such_module", "", ForkServer(None), lambda report: None, lambda code: None)
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)
