"""What the supervisor does about processes that cannot be started or take long to: with children that are none."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

import shardbus.supervisor
from shardbus.addresses import Address, parse_address
from shardbus.errors import BootError
from shardbus.fork_server import ForkServer
from shardbus.reports import Alive, Beat, Ready, Report, encode_report
from shardbus.restart import RestartPolicy
from shardbus.rundir import RunDir
from shardbus.store import NOTHING_STORED
from shardbus.supervisor import BOOT_SILENCE_S, ServeOptions, Supervisor

BEAT = Beat(backlog=7, busy_keys=0, publishers=0, store=NOTHING_STORED, store_failing="")
SOON = RestartPolicy(deaths_max=4, delay_s=0.001, delay_s_max=0.001)


class Machine:
    """Gives children that do nothing by themselves; fails to, `fails` times from now on."""

    def __init__(self) -> None:
        self.children: list[FakeChild] = []
        self.fails = 0

    def start(
        self,
        _module: str,
        _argument: str,
        _forks: ForkServer,
        on_report: Callable[[bytes], None],
        on_exit: Callable[[int], None],
    ) -> FakeChild:
        if self.fails:
            self.fails -= 1
            raise BlockingIOError(errno.EAGAIN, "fork: resource temporarily unavailable")
        self.children.append(FakeChild(len(self.children) + 1, on_report, on_exit))
        return self.children[-1]


class FakeChild:
    def __init__(self, pid: int, on_report: Callable[[bytes], None], on_exit: Callable[[int], None]) -> None:
        self.pid = pid
        self.assigned = False
        self._on_report = on_report
        self._on_exit = on_exit
        self._ended = False

    def says(self, *reports: Report) -> None:
        for report in reports:
            self._on_report(encode_report(report))

    def ends(self, code: int) -> None:
        if not self._ended:
            self._ended = True
            self._on_exit(code)

    def tell(self, message: bytes) -> None:
        self.assigned = True

    def kill(self) -> None:
        asyncio.get_running_loop().call_soon(self.ends, -9)

    def terminate(self) -> None:
        asyncio.get_running_loop().call_soon(self.ends, 0)

    def rss_bytes(self) -> int:
        return 0

    def pin(self, core: int) -> None: ...


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(shardbus.supervisor, "Child", machine.start)
    monkeypatch.setattr(shardbus.supervisor, "_CHECK_S", 0.01)
    monkeypatch.setattr(shardbus.supervisor, "_SPARE_RETRY_S", 0.001)
    return machine


@pytest.fixture
def address() -> Iterator[Address]:
    with tempfile.TemporaryDirectory(prefix="sb") as directory:  # short enough for a socket's path
        address = parse_address(f"ipc://{directory}/bus")
        yield address
        RunDir(address).close(forget=True)


def supervisor_at(address: Address) -> Supervisor:
    options = ServeOptions(
        application="shardbus.demo:bus",
        workers=1,
        address=address,
        dead_letters=None,
        store_rows_max=1000,
        store_bytes_max=10**7,
        store_full="stop",
        drain_s=1.0,
        log_level="warning",
        log_format="text",
    )
    return Supervisor(options, ForkServer(None), policy=SOON, starts=SOON)


@contextlib.asynccontextmanager
async def running(address: Address) -> AsyncIterator[Supervisor]:
    supervisor = supervisor_at(address)
    run = asyncio.create_task(supervisor.run(lambda line: None))
    try:
        yield supervisor
    finally:
        supervisor._on_signal()
        await run


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20.0):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)


async def ready(supervisor: Supervisor, machine: Machine) -> FakeChild:
    """The first worker is, and a spare stands by."""
    await until(lambda: machine.children)
    machine.children[0].says(Ready())
    await until(lambda: len(machine.children) == 2)
    return machine.children[0]


def state(supervisor: Supervisor) -> str:
    return supervisor.status()["workers"][0]["state"]


async def test_a_worker_for_which_the_system_has_no_process_is_started_once_it_has(address: Address, machine: Machine):
    async with running(address) as supervisor:
        first = await ready(supervisor, machine)
        machine.children[1].ends(-9)  # the spare; no other is made before it is needed
        machine.fails = 3
        first.ends(-9)
        await until(lambda: len(machine.children) == 3)
        assert machine.children[2].assigned
        machine.children[2].says(Ready())
        assert state(supervisor) == "up"
        assert supervisor.status()["workers"][0]["restarts"] == 1


async def test_a_system_that_never_has_a_process_again_has_the_shard_given_up_loudly(
    address: Address, machine: Machine, caplog: pytest.LogCaptureFixture
):
    async with running(address) as supervisor:
        first = await ready(supervisor, machine)
        machine.children[1].ends(-9)
        machine.fails = 10**9
        with caplog.at_level(logging.ERROR):
            first.ends(-9)
            await until(lambda: state(supervisor) == "given-up")
        assert "shard 0 is given up: 4 deaths in a row" in caplog.text
        assert "resource temporarily unavailable" in supervisor.status()["workers"][0]["last_exit"]


async def test_the_readme_has_every_key_of_the_status(address: Address, machine: Machine):
    table = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").partition("| key | what |")[2]
    table = table.partition("\n\n")[0]
    async with running(address) as supervisor:
        await ready(supervisor, machine)
        status = supervisor.status()
        keys = {*status, *status["workers"][0]}
    assert [key for key in sorted(keys) if f"`{key}`" not in table] == []


async def test_a_spare_that_cannot_be_made_is_tried_again_and_loses_no_report(address: Address, machine: Machine):
    async with running(address) as supervisor:
        first = await ready(supervisor, machine)
        first.ends(-9)
        machine.fails = 3
        await until(lambda: machine.children[1].assigned)
        machine.children[1].says(Ready(), BEAT)  # at once, as out of one read
        assert state(supervisor) == "up"
        assert supervisor.status()["workers"][0]["backlog"] == 7
        await until(lambda: len(machine.children) == 3)
        assert not machine.children[2].assigned


async def test_a_worker_that_boots_for_long_and_beats_is_waited_for_and_told_of_once(
    address: Address, machine: Machine, caplog: pytest.LogCaptureFixture
):
    async with running(address) as supervisor:
        await until(lambda: machine.children)
        (worker,) = supervisor._workers
        for _ in range(3):
            worker.started_at = worker.heard_at = time.monotonic() - 2 * BOOT_SILENCE_S
            machine.children[0].says(Alive())
            supervisor._check_silence(time.monotonic())
        assert not worker.replaced
        assert caplog.text.count("is waited for: its lifespan or its store takes long") == 1
        await ready(supervisor, machine)


async def test_a_worker_that_boots_and_does_not_beat_ends_the_bus_with_words(address: Address, machine: Machine):
    supervisor = supervisor_at(address)
    run = asyncio.create_task(supervisor.run(lambda line: None))
    await until(lambda: machine.children)
    supervisor._workers[0].heard_at -= 2 * BOOT_SILENCE_S
    with pytest.raises(BootError, match="its event loop stood still for 30 s, in the application's import or lifespan"):
        await run


async def test_a_bus_whose_first_worker_cannot_be_started_says_so_and_ends(address: Address, machine: Machine):
    machine.fails = 1
    with pytest.raises(BootError, match=r"shard 0 cannot be started: .*resource temporarily unavailable"):
        await supervisor_at(address).run(lambda line: None)


async def test_a_fork_server_that_cannot_be_replaced_is_given_up_after_a_few_tries_and_the_bus_goes_on(
    machine: Machine, address: Address, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def refuse(_forks: ForkServer) -> None:
        raise BlockingIOError(errno.EAGAIN, "no process")

    monkeypatch.setattr(ForkServer, "restart", refuse)
    async with running(address) as supervisor:
        await until(lambda: machine.children)
        machine.children[0].says(Ready(), BEAT)
        await until(lambda: supervisor.status()["healthy"])
        supervisor._on_forks_end(-9)
        given_up = "the fork server cannot be started: [Errno 11] no process, the last of 4 in a row"
        await until(lambda: given_up in caplog.text)
        assert caplog.text.count("starting another in") == 3
        assert "the fork server ended (SIGKILL); starting another in 0.001 s" in caplog.text
        assert supervisor.status()["healthy"]


@pytest.mark.parametrize(("most", "told"), [(327, True), (328, False)])
async def test_too_few_descriptors_for_all_clients_are_told_with_their_number_and_what_to_do(
    address: Address,
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    told: bool,
):
    monkeypatch.setattr(shardbus.supervisor, "descriptors_max", lambda: most)
    async with running(address):
        await until(lambda: machine.children)
    line = "a process may have 327 open files here, and one of this bus takes up to 328 for 256 clients"
    assert ("ulimit -n 65536" in caplog.text and line in caplog.text) is told
