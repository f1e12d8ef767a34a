"""Fixtures: real buses in directories of their own."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from buses import RunningBus, state_of

# Buses that are served for one run have their addresses in it, and tests that run at once shall not share them.
os.environ.pop("XDG_RUNTIME_DIR", None)

# What a shell has started in the background ignores it, and so would the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def short_directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="sb"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        state = state_of(f"ipc://{directory}/bus")
        for path in (state, f"{tempfile.gettempdir()}/{os.path.basename(state)}"):
            shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path is short enough for a socket's."""
    with short_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def short_module_path() -> Iterator[Path]:
    """One for all tests of a module."""
    with short_directory() as directory:
        yield directory


@pytest.fixture
def make_bus(short_path: Path) -> Iterator[Callable[..., RunningBus]]:
    """Start buses; end them with the test."""
    made: list[RunningBus] = []

    def make(*arguments: str, application: str | None = "accounts:bus") -> RunningBus:
        bus = RunningBus(short_path, *arguments, application=application)
        made.append(bus)
        return bus

    yield make
    for bus in made:
        bus.close()


@pytest.fixture(scope="module")
def idle_bus() -> Iterator[RunningBus]:
    """A bus for tests that leave it as it was."""
    with short_directory() as directory:
        bus = RunningBus(directory, "--workers", "1")
        try:
            bus.wait_ready()
            yield bus
        finally:
            bus.close()
