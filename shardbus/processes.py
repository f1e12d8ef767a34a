"""Processes and signals: start, watch, kill, pin. The only file that imports signal or psutil.

Children are a fork server's copies or new interpreters, never forks of this process. A pipe joins each to its supervisor:
the child writes reports into it, and reads its end as the supervisor's death. Linux ends a child with its parent besides
(PR_SET_PDEATHSIG); start children from the main thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Final

import psutil

from shardbus.errors import ConfigError
from shardbus.fork_server import Forked, ForkServer

_PR_SET_PDEATHSIG: Final = 1
_REPORT_BYTES_MAX: Final = 65_536
_DESCRIPTORS_MAX: Final = 65_536
_POLL_S: Final = 0.05  # where there is no pidfd

EXIT_BROKEN: Final = 70  # EX_SOFTWARE: a worker met a defect of its own, or its lifespan has ended it
EXIT_BOOT: Final = 78  # EX_CONFIG: a worker cannot start
_OWN_FAULTS: Final = frozenset(
    # By these the system ends a process for what it did itself. Any other may come from anybody.
    (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP)
)

Stop = Callable[[], None]


class _Frames:
    """Cuts a stream of bytes into the messages that were framed into it."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are whole now."""
        self._buffer += data
        found = []
        while len(self._buffer) >= 4:
            end = 4 + int.from_bytes(self._buffer[:4], "big")
            if len(self._buffer) < end:
                break
            found.append(bytes(self._buffer[4:end]))
            del self._buffer[:end]
        return found


def _framed(message: bytes) -> bytes:
    return len(message).to_bytes(4, "big") + message


def use_all_descriptors() -> None:
    """Let this process, and those that it starts, have as many descriptors as the system lets it: each client takes one of
    the supervisor and one of every worker, and libzmq ends a process that has none left for the next connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def descriptors_max() -> int:
    """How many descriptors this process may have, and each that it starts."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _DESCRIPTORS_MAX if soft == resource.RLIM_INFINITY else soft


class Child:
    """A started worker process.

    Args:
        module: what is run as `python -m`.
        argument: its first argument; its second is the descriptor of the pipe.
        forks: a server of the same module, which has it ready.
        on_report: called with each report that the child sends.
        on_exit: called once, when it is dead and reaped, with its exit code (negative: the signal).

    Raises:
        OSError: the system has no process or descriptor for it now; nothing was left behind.
    """

    def __init__(
        self,
        module: str,
        argument: str,
        forks: ForkServer,
        on_report: Callable[[bytes], None],
        on_exit: Callable[[int], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_report = on_report
        self._on_exit = on_exit
        self._process: Forked | subprocess.Popen[bytes]
        self._watch: asyncio.Task[None] | None = None
        self._pidfd = -1
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(ours.close)
            with theirs:
                pid = forks.fork(argument, theirs.fileno())
            if pid is not None:
                self._process = Forked(pid)
            else:
                ours.close()  # a copy that comes too late may have the other end, and ends with this one
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                undo.callback(ours.close)
                with theirs:
                    self._process = subprocess.Popen(
                        [sys.executable, "-m", module, argument, str(theirs.fileno())],
                        stdin=subprocess.DEVNULL,
                        pass_fds=(theirs.fileno(),),
                        start_new_session=True,  # Ctrl-C is the supervisor's to interpret
                    )
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            ours.setblocking(False)
            self._loop.add_reader(ours, self._read)
            undo.callback(self._loop.remove_reader, ours)
            if hasattr(os, "pidfd_open"):
                self._pidfd = os.pidfd_open(self._process.pid)
                undo.callback(os.close, self._pidfd)
                self._loop.add_reader(self._pidfd, self._ended)
            else:
                self._watch = self._loop.create_task(self._poll())
            undo.pop_all()
        self.pid = self._process.pid
        self._reports = ours
        self._frames = _Frames()

    def _read(self) -> None:
        try:
            data = self._reports.recv(_REPORT_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._reports)
            return
        for report in self._frames.feed(data):
            self._on_report(report)

    def tell(self, message: bytes) -> None:
        """Send it a message of a few hundred bytes; a child that is dead hears nothing."""
        with contextlib.suppress(OSError):
            self._reports.send(_framed(message))  # the pipe's buffer is empty but for this

    async def _poll(self) -> None:
        while self._process.poll() is None:  # noqa: ASYNC110 - no event tells of it on this platform
            await asyncio.sleep(_POLL_S)
        self._ended()

    def _ended(self) -> None:
        code = self._process.wait()
        with contextlib.suppress(OSError):
            self._read()  # a last report may lie in the pipe
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._loop.remove_reader(self._reports)
        self._reports.close()
        self._on_exit(code)

    def terminate(self) -> None:
        """Ask it to drain and end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once; also when it is stopped."""
        self._process.kill()

    def rss_bytes(self) -> int:
        """Its resident memory; 0 where it is gone."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def pin(self, core: int) -> None:
        """Keep it on one core, where the system can."""
        with contextlib.suppress(psutil.Error, AttributeError, ValueError, OSError):
            psutil.Process(self.pid).cpu_affinity([core])


class ReportPipe:
    """A child's way to its supervisor. Never blocks: a report that does not fit now is dropped, the next says as much."""

    def __init__(self, descriptor: int, on_message: Callable[[bytes], None], on_parent_gone: Stop) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        self._on_message = on_message
        self._on_parent_gone = on_parent_gone
        self._frames = _Frames()
        self._sending = threading.Lock()  # the watchdog's thread reports, too
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._read)

    def _read(self) -> None:
        try:
            data = self._socket.recv(4096)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._loop.remove_reader(self._socket)
            self._on_parent_gone()
        for message in self._frames.feed(data):
            self._on_message(message)

    def send(self, report: bytes) -> bool:
        """Send a report; False where there is no room now. Any thread may."""
        with self._sending:
            return self._send(report)

    def _send(self, report: bytes) -> bool:
        _, writable, _ = select.select([], [self._socket], [], 0)
        if not writable:
            return False
        try:
            self._socket.settimeout(1.0)  # a few hundred bytes into a writable socket; the rest of a frame must follow
            self._socket.sendall(_framed(report))
        except OSError:
            return False
        finally:
            self._socket.setblocking(False)
        return True

    def close(self) -> None:
        """Let go of the pipe."""
        self._loop.remove_reader(self._socket)
        self._socket.close()


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent dies; ends it now where that has happened already."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_soon(code: int, seconds: float) -> None:
    """Have this process end with that code after so many seconds, whatever its event loop and other threads do then."""
    last = threading.Timer(seconds, os._exit, (code,))
    last.daemon = True
    last.start()


def on_stop_signals(stop: Stop) -> None:
    """Have SIGTERM and SIGINT call `stop` from the event loop; install it in the main thread."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def on_stdin_closed(stop: Stop) -> None:
    """Have the end of standard input call `stop` from the event loop: it ends with whoever holds the other end."""
    loop = asyncio.get_running_loop()
    os.set_blocking(0, False)

    def look() -> None:
        with contextlib.suppress(BlockingIOError):
            if not os.read(0, 65_536):
                loop.remove_reader(0)
                stop()

    loop.add_reader(0, look)


def reap_orphans(own: set[int]) -> None:
    """As process 1 of a container, collect what others left behind; elsewhere the system does."""
    if os.getpid() != 1:
        return
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid in own:
                return  # its pidfd is ready, and whoever watches it comes next
            os.waitpid(ended.si_pid, os.WNOHANG)


def signal_name(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def kernel_kills() -> int | None:
    """How many processes of this machine the kernel has ended because memory ran out; None: it does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat", encoding="ascii") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def was_own_fault(code: int) -> bool:
    """Whether a process that ended with this code brought that upon itself: it exited, or by a signal that says so."""
    return code >= 0 or -code in _OWN_FAULTS


def was_killed(code: int) -> bool:
    """Whether an exit code says SIGKILL: the kernel sends it where memory runs out, and so may anybody."""
    return code == -signal.SIGKILL


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def check_platform() -> None:
    """Refuse a platform that cannot run workers."""
    if sys.platform == "win32":
        raise ConfigError("shardbus serve runs on Linux and macOS; on Windows use WSL")
