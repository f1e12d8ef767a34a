"""Processes and signals: the driver, and a bus for runs that find none. The only file that imports subprocess or signal.

Both are started in sessions of their own, so that Ctrl-C reaches the load generator alone, which then ends them in order.
Where the load generator is killed, they read the end of their stdin: a driver ends, and a bus drains and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import re
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import FrameType
from typing import Final

import msgspec

from loadgen.spec import DriverFailed, DriverLine, Go, LoadError, Part, Stop, Word, decode_line, encode_line
from shardbus.addresses import own_directory

_LINE_BYTES_MAX: Final = 4 * 1024 * 1024  # a result carries up to 27,648 counts of send lags
_CHUNK_BYTES: Final = 65536
_READY: Final = re.compile(rb"ready: \d+ workers? of ")
_READY_BYTES_MAX: Final = 8192  # of the line that says that a bus is ready: names and an address
_READY_S: Final = 60.0
_DRAIN_S: Final = 5.0
_END_S: Final = 10.0  # longer than a drain; then it is killed
_ABORT_S: Final = 2.0  # for its processes and files


@contextlib.asynccontextmanager
async def started(arguments: list[str], *, piped_stdin: bool) -> AsyncIterator[Process]:
    """Run `python -m …`, with its stdout to read; ended when the block is left, by force where it takes too long.

    Args:
        arguments: what follows `-m`.
        piped_stdin: whether its stdin is to be written; otherwise it has none.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        stdin=subprocess.PIPE if piped_stdin else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        limit=_LINE_BYTES_MAX,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        await _end(process)


async def _end(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_END_S):
            await process.communicate()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    except asyncio.CancelledError:  # by another interrupt: a bus does not drain any longer either, once it has a second one
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ABORT_S):
                await process.wait()
        raise


@contextlib.asynccontextmanager
async def started_bus(
    workers: int,
    address: str | None = None,
    *,
    application: str | None = None,
    log_level: str = "warning",
    options: Sequence[str] = (),
) -> AsyncIterator[Process]:
    """Run an application on a bus of its own, ready to take messages, until the block is left or this process ends.

    Args:
        workers: how many worker processes.
        address: where; None is the default address.
        application: MODULE:BUS; None is the demo.
        log_level: how much it says on stderr.
        options: others of `shardbus serve`.

    Raises:
        LoadError: it did not start; it has said why on stderr.
    """
    arguments = ["shardbus", "serve", *([application] if application is not None else []), "--until-stdin-closes"]
    arguments += ["--workers", str(workers), "--drain-timeout", f"{_DRAIN_S:g}", "--log-level", log_level]
    arguments += [*(["--bind", address] if address is not None else []), *options]
    async with started(arguments, piped_stdin=True) as process:
        assert process.stdout is not None  # it is a pipe
        try:
            async with asyncio.timeout(_READY_S):
                await _until_ready(process.stdout, process.pid)
        except TimeoutError:
            raise LoadError(f"the bus was not ready after {_READY_S:g} s") from None
        passing = asyncio.get_running_loop().create_task(_pass_on_all(process.stdout))
        try:
            yield process
        finally:
            passing.cancel()
            await asyncio.wait([passing])


async def _until_ready(stream: asyncio.StreamReader, pid: int) -> None:
    """Read to the line that says so. What an application prints is passed on; it may print a part of a line before it."""
    held, end = b"", f" (pid {pid})\n".encode()
    try:
        while octets := await stream.read(_CHUNK_BYTES):
            held += octets
            at = -1
            while (at := held.find(end, at + 1)) >= 0:
                said = [found.start() for found in _READY.finditer(held, held.rfind(b"\n", 0, at) + 1, at)]
                if said:
                    held = held[: said[-1]] + held[at + len(end) :]
                    return
            passed = max(held.rfind(b"\n") + 1, len(held) - _READY_BYTES_MAX)
            _pass_on(held[:passed])
            held = held[passed:]
    finally:
        _pass_on(held)
    raise LoadError("the bus did not start")


def _pass_on(octets: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more, or a disk is full; what prints it goes on
        sys.stderr.buffer.write(octets)
        sys.stderr.buffer.flush()


async def _pass_on_all(stream: asyncio.StreamReader) -> None:
    """Keep a pipe from filling up with what an application prints."""
    while octets := await stream.read(_CHUNK_BYTES):  # not by lines: it may never end one
        _pass_on(octets)


@contextlib.contextmanager
def own_address(name: str) -> Iterator[str]:
    """An address for a bus that is served no longer than the block; its directory ends with it.

    The same name makes the same address, so that what is left after a power failure is found, and emptied, instead of adding
    up, and that a second run beside this one is refused.
    """
    directory = own_directory(os.environ, name)
    try:
        yield f"ipc://{directory}"
    finally:
        with contextlib.suppress(OSError):  # it was never made, or somebody else serves there by now
            os.rmdir(directory)


def is_there(address: str) -> bool:
    """Whether there is something at an address of `own_address`: a bus, or what one has left."""
    return os.path.exists(address.removeprefix("ipc://"))


class DriverProcess:
    """A running driver: its lines, as they come."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def go(self, start_ns: int) -> None:
        """Tell it when to begin."""
        self._tell(Go(start_ns=start_ns))

    def stop(self) -> None:
        """Tell it to send no more, and to finish what is under way."""
        self._tell(Stop())

    def _tell(self, word: Word) -> None:
        assert self._process.stdin is not None  # it is a pipe
        if not self._process.stdin.is_closing():
            self._process.stdin.write(encode_line(word) + b"\n")

    async def lines(self, silence_s: float, *, first_s: float) -> AsyncIterator[DriverLine]:
        """What the driver says, until it ends.

        Args:
            silence_s: so many seconds may pass between two lines.
            first_s: so many until the first one.

        Raises:
            LoadError: the driver gave up, fell silent or broke.
        """
        stdout = self._process.stdout
        assert stdout is not None  # it is a pipe
        limit_s = first_s
        while True:
            try:
                async with asyncio.timeout(limit_s):
                    text = await stdout.readline()
            except TimeoutError:
                raise LoadError(f"the driver process has said nothing for {limit_s:g} s") from None
            except ValueError as error:  # a line beyond the bound
                raise LoadError(f"the driver process said what cannot be understood: {error}") from error
            if not text:
                return
            try:
                line: DriverLine = decode_line(text)
            except msgspec.DecodeError as error:
                raise LoadError(f"the driver process said what cannot be understood: {error}") from error
            if isinstance(line, DriverFailed):
                raise LoadError(line.error)
            limit_s = silence_s
            yield line


@contextlib.asynccontextmanager
async def started_driver(part: Part) -> AsyncIterator[DriverProcess]:
    """Start a driver of a run; ended when the block is left."""
    async with started(["loadgen.driver"], piped_stdin=True) as process:
        assert process.stdin is not None  # it is a pipe, and stays open: its end tells the driver that nobody listens
        process.stdin.write(encode_line(part) + b"\n")
        await process.stdin.drain()
        yield DriverProcess(process)


class Fault(enum.Enum):
    """What can be done to a process."""

    KILL = signal.SIGKILL
    STOP = signal.SIGSTOP
    CONTINUE = signal.SIGCONT
    TERMINATE = signal.SIGTERM


def inject(pid: int, fault: Fault) -> bool:
    """Do it; False where the process is gone."""
    try:
        os.kill(pid, fault.value)
    except ProcessLookupError:
        return False
    return True


def end_as_on_interrupt() -> None:
    """Have SIGTERM end the running asyncio program as Ctrl-C does, so that what was started is ended, too."""
    signal.signal(signal.SIGTERM, _interrupt)


@contextlib.contextmanager
def first_interrupt(take: Callable[[], bool]) -> Iterator[None]:
    """Offer the first SIGINT or SIGTERM of the block to `take`. Where it does not, and from then on, all is as without it.

    For the main thread. What a process ignores, or lets the system do, stays so.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: handler for number, handler in before.items() if callable(handler)}

    def restore() -> None:
        for number, handler in ours.items():
            signal.signal(number, handler)

    def interrupted(number: int, frame: FrameType | None) -> None:
        restore()
        if not take():
            ours[signal.Signals(number)](number, frame)

    for number in ours:
        signal.signal(number, interrupted)
    try:
        yield
    finally:
        restore()


def _interrupt(_: int, frame: FrameType | None) -> None:
    # What handles SIGINT now: an event loop cancels its main task. A program in the background of a script ignores it.
    handler = signal.getsignal(signal.SIGINT)
    (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)
