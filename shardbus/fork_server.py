"""Workers by fork: a process that has imported what a worker needs, and copies itself for each of them. Owns `os.fork`.

Importing takes most of a second of processor time; a copy takes milliseconds, and shares the memory of what was imported.
The server runs nothing that a copy could break: no thread, no event loop, no socket of ZeroMQ, nothing of the application.

A copy is made by a go-between that ends at once, so that the supervisor, which asks the kernel for its orphans meanwhile,
inherits it: it is the supervisor's own child as any other, and nothing depends on the server afterwards. Linux only; where
there is no server, or it fails, workers are interpreters of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

FORK: Final = "--fork"
"""What the module of a worker is told, before pid and descriptor, to be a server."""

_PR_SET_CHILD_SUBREAPER: Final = 36
_REQUEST_BYTES_MAX: Final = 65_536
_PID_BYTES: Final = 4
_UP: Final = bytes(_PID_BYTES)  # as a first answer: everything is imported; as a later one: the system refuses a fork
_START_S_MAX: Final = 10.0
_ANSWER_S_MAX: Final = 1.0  # the supervisor's event loop waits so long; it takes milliseconds
_ADOPTION_LOOK_S: Final = 0.0005


class ForkServer:
    """The supervisor's end. Made from the main thread, before the event loop, so that it imports beside its maker.

    Args:
        module: what is run as `python -m`; it calls `serve_forks` when its first argument is `FORK`. None: there is no
            server, as on systems that have no way for it, and `fork` says so.
    """

    def __init__(self, module: str | None) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._end: socket.socket | None = None
        self._starts_until = 0.0
        if module is None or sys.platform != "linux" or not hasattr(socket, "send_fds"):
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, FORK, str(os.getpid()), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the supervisor's to interpret
            )
        ours.setblocking(False)
        self._end = ours
        self._starts_until = time.monotonic() + _START_S_MAX

    @property
    def is_starting(self) -> bool:
        """Whether it is worth waiting for: it imports, and has not failed."""
        return self._end is not None and 0.0 < self._starts_until > time.monotonic()

    def watch(self, on_change: Callable[[], None]) -> None:
        """Have the event loop call `on_change` when it no longer starts."""
        if self._end is None:
            return
        loop, end = asyncio.get_running_loop(), self._end

        def look() -> None:
            loop.remove_reader(end)
            with contextlib.suppress(OSError):
                if end.recv(_PID_BYTES) == _UP:
                    self._starts_until = 0.0
            if self._starts_until:
                self.close()
            on_change()

        loop.add_reader(end, look)

    def fork(self, argument: str, descriptor: int) -> int | None:
        """A new child of this process, by its pid, which has this argument and a copy of this descriptor; waits for some
        milliseconds. None: start one otherwise."""
        if self._end is None or self._starts_until:
            return None
        try:
            with _orphans_are_ours():
                self._end.settimeout(_ANSWER_S_MAX)
                socket.send_fds(self._end, [argument.encode()], [descriptor])
                answer = self._end.recv(_PID_BYTES)
        except OSError:
            answer = b""
        if answer and answer != _UP:
            return int.from_bytes(answer, "big")
        self.close()  # a copy that comes too late finds that nobody is its parent
        return None

    def close(self) -> None:
        """End it, if there is one. What it has forked lives on."""
        if self._end is not None:
            with contextlib.suppress(RuntimeError):  # no event loop watches it
                asyncio.get_running_loop().remove_reader(self._end)
            self._end.close()
            self._end = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Forked:
    """A child that was forked, with what of `subprocess.Popen` a child needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code (negative: the signal), once it is dead."""
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        """Wait until it is dead; return its exit code."""
        code = self._look(0)
        assert code is not None
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def _look(self, options: int) -> int | None:
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # somebody has collected it
                self._code = 0
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def serve_forks(descriptor: int) -> tuple[str, int]:
    """Be the server behind that descriptor until its maker closes the other end. Returns in each copy only: its argument and
    the descriptor that came with it."""
    gc.collect()
    gc.freeze()  # a collection in a copy would touch, and so copy, the memory of all that was imported
    with socket.socket(fileno=descriptor) as requests:
        answer = _UP
        while True:
            try:
                requests.send(answer)
                argument, descriptors, _, _ = socket.recv_fds(requests, _REQUEST_BYTES_MAX, 1)
            except OSError:
                argument = b""
            if not argument:
                os._exit(0)  # its maker has ended, or needs no more
            (given,) = descriptors
            pid = _fork_for_another()
            if pid is None:
                return argument.decode(), given
            os.close(given)
            answer = pid.to_bytes(_PID_BYTES, "big")


def _fork_for_another() -> int | None:
    """Copy this process by a go-between. Returns the copy's pid, 0 where the system refuses; and None in the copy."""
    reading, writing = os.pipe()
    try:
        between = os.fork()
    except OSError:
        os.close(reading)
        os.close(writing)
        return 0
    if between:
        os.close(writing)
        with open(reading, "rb") as pipe:
            pid = int.from_bytes(pipe.read(_PID_BYTES), "big")
        os.waitpid(between, 0)  # from here on the copy has its new parent
        return pid
    between = os.getpid()
    try:
        copy = os.fork()
    except OSError:
        os._exit(1)
    if copy:
        os.write(writing, copy.to_bytes(_PID_BYTES, "big"))
        os._exit(0)
    os.close(reading)
    os.close(writing)
    os.setsid()
    while os.getppid() == between:
        time.sleep(_ADOPTION_LOOK_S)
    return None


@contextlib.contextmanager
def _orphans_are_ours() -> Iterator[None]:
    """Be, for a moment, the process that inherits what is orphaned below it.

    Raises:
        OSError: the system does not do that.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no subreaper")
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
