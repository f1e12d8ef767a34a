"""How a run is shared by processes, and how property tests choose their examples: the same ones in every run, so that no
verdict depends on luck or speed.

To look further than a test run does, with other examples each time: `pytest --hypothesis-profile=search`. To have all in
one process: `pytest -n 0`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,  # a slow machine is no failure
    database=None,  # nothing is carried from one run to the next
    suppress_health_check=[HealthCheck.too_slow],  # likewise
)
settings.register_profile("search", settings.get_profile("repeatable"), derandomize=False, max_examples=5_000)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Let the processes that tests start find their modules compiled: of hundreds, that is up to half of their start.

    Where nobody is to leave compiled modules beside the sources (PYTHONDONTWRITEBYTECODE), they go with the run.
    """
    if hasattr(config, "workerinput") or not sys.dont_write_bytecode:
        return
    if "PYTHONPYCACHEPREFIX" not in os.environ:
        cache = os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="shardbus-tests-")
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


_PROCESSES_MAX: Final = 4  # each may have buses of several processes


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A run of directories is shared by some processes; single files, and what `-k` picks, are sooner done by one."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # the plugin reads it
    if config.option.keyword or any(".py" in given for given in config.option.file_or_dir):
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(cores, _PROCESSES_MAX) if cores > 1 else 0


@pytest.fixture
def full() -> Iterator[IO[str]]:
    """A file that takes nothing, as on a disk that is full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs a device that is always full")
    with open("/dev/full", "w") as file:
        yield file


@pytest.fixture
def unread() -> Iterator[IO[str]]:
    """A pipe whose reader has left."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as file:
        yield file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that mostly wait first. They are one process's; the others take what needs a core, and then their rest.

    Before them those that must be alone: later, they would have a process wait for what others have begun, up to a minute.
    """
    items.sort(key=lambda item: (item.get_closest_marker("alone") is None, "integration" not in item.path.parts))


_GATE: Final = Path(__file__)
_ROOM: Final = Path(__file__).parent
"""What the processes of a run have in common, and so may lock: it is there, and nothing has to be removed."""


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around the time-out: a test's time does not run while it waits
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Whoever is marked `alone` has the room to itself. Who waits for it holds the gate, so that nobody overtakes."""
    if not hasattr(item.config, "workerinput"):
        return (yield)  # the only process
    gate = os.open(_GATE, os.O_RDONLY)
    room = os.open(_ROOM, os.O_RDONLY)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_SH if item.get_closest_marker("alone") is None else fcntl.LOCK_EX)
        fcntl.flock(gate, fcntl.LOCK_UN)
        return (yield)
    finally:
        fcntl.flock(room, fcntl.LOCK_UN)  # also where a child has taken the descriptor along
        os.close(room)
        os.close(gate)
