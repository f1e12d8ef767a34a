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
        self._module = module if sys.platform == "linux" and hasattr(socket, "send_fds") else None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: socket.socket | None = None
        self._starts_until = 0.0
        self._on_up: Callable[[], None] | None = None
        self._on_end: Callable[[int | None], None] | None = None
        self._start()

    def _start(self) -> None:
        if self._module is None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(ours.close)
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, FORK, str(os.getpid()), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the supervisor's to interpret
            )
            undo.pop_all()
        ours.setblocking(False)
        self._end = ours
        self._starts_until = time.monotonic() + _START_S_MAX
        if self._on_up is not None:
            asyncio.get_running_loop().add_reader(ours, self._look)

    @property
    def is_starting(self) -> bool:
        """Whether it is worth waiting for: it imports, and has not failed."""
        return self._end is not None and 0.0 < self._starts_until > time.monotonic()

    def watch(self, on_up: Callable[[], None], on_end: Callable[[int | None], None]) -> None:
        """Have the event loop call `on_up` each time that the server has imported everything, and `on_end` when it is gone:
        with its exit code (negative: the signal), or None where it was ended because it did not answer."""
        self._on_up, self._on_end = on_up, on_end
        if self._end is not None:
            asyncio.get_running_loop().add_reader(self._end, self._look)

    def restart(self) -> None:
        """Start another in the place of one that is gone; for the main thread, and for one who watches.

        Raises:
            OSError: the system has no process for it.
        """
        assert self._end is None
        self._start()

    def _look(self) -> None:
        """It says that it is up, or has ended: any other answer is read where it was asked for."""
        assert self._end is not None  # else nobody looks
        try:
            said = self._end.recv(_PID_BYTES)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if said == _UP:
            self._starts_until = 0.0
            if self._on_up is not None:
                self._on_up()
        else:
            self._bury()

    def fork(self, argument: str, descriptor: int) -> int | None:
        """A new child of this process, by its pid, which has this argument and a copy of this descriptor; waits for some
        milliseconds. None: start one otherwise."""
        if self._end is None or self._starts_until:
            return None
        try:
            with _orphans_are_ours():
                answer = self._ask(self._end, argument, descriptor)
        except OSError:
            self.close()  # here it is of no use
            return None
        if answer is None:
            self._lose(None)  # a copy that comes too late finds that nobody is its parent
        elif not answer:
            self._bury()
        elif answer != _UP:
            return int.from_bytes(answer, "big")
        return None

    @staticmethod
    def _ask(end: socket.socket, argument: str, descriptor: int) -> bytes | None:
        """What it answers; nothing: it is dead; None: it does not answer."""
        try:
            end.settimeout(_ANSWER_S_MAX)
            socket.send_fds(end, [argument.encode()], [descriptor])
            return end.recv(_PID_BYTES)
        except TimeoutError:
            return None
        except OSError:
            return b""
        finally:
            end.setblocking(False)

    def _bury(self) -> None:
        """Its end of the socket is closed: it is dead, or will be in a moment."""
        assert self._process is not None  # as long as there is a socket
        try:
            code: int | None = self._process.wait(_ANSWER_S_MAX)
        except subprocess.TimeoutExpired:
            code = None
        self._lose(code)

    def close(self) -> None:
        """End it, if there is one, for good. What it has forked lives on."""
        self._on_up = self._on_end = None
        self._lose(None)

    def _lose(self, code: int | None) -> None:
        if self._end is not None:
            with contextlib.suppress(RuntimeError):  # no event loop watches it
                asyncio.get_running_loop().remove_reader(self._end)
            self._end.close()
            self._end = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._on_end is not None:
            asyncio.get_running_loop().call_soon(self._on_end, code)


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
