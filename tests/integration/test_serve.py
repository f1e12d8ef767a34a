"""The real processes: serve, publish, execute, kill, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import zmq
from buses import APPLICATION, RunningBus, free_port, is_alive, state_of, wait_until

import shardbus
from shardbus.addresses import parse_address
from shardbus.rundir import RunDir

MakeBus = Callable[..., RunningBus]

_space: dict[str, object] = {}
exec(compile(APPLICATION, "accounts.py", "exec"), _space)  # noqa: S102 - the same message types as the served application
Added, Stumbled, Slept, Blocked, GetTotal, Die = (
    _space[name] for name in ("Added", "Stumbled", "Slept", "Blocked", "GetTotal", "Die")
)


async def publish_stamped(client: shardbus.Client, count: int, keys: int, pause_s: float = 0.0) -> None:
    ordinals = [0] * keys
    for number in range(count):
        key = number * 7 % keys
        ordinals[key] += 1
        await client.publish(Added(account=f"a{key}"), ordinal=ordinals[key])
        if pause_s and number % 20 == 0:
            await asyncio.sleep(pause_s)


async def assert_nothing_lost(client: shardbus.Client, published: int) -> None:
    evidence = await client.evidence([client.publisher])
    assert sum(one.distinct for one in evidence) == published
    assert sum(one.missing for one in evidence) == 0
    assert sum(one.out_of_order for one in evidence) == 0
    assert sum(one.repeats for one in evidence) == sum(one.announced for one in evidence)


def left_on_ram(address: str) -> set[str]:
    """What a bus that does not run keeps for its next supervisor."""
    rundir = RunDir(parse_address(address))
    names = set(os.listdir(rundir.state)) - {"lock"}  # which is ours
    rundir.close(forget=not names)
    return names


async def test_events_reach_their_handlers_and_commands_their_callers(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "2")
    assert bus.wait_ready().startswith("ready: 2 workers of accounts:bus at ipc://")
    async with shardbus.connect(bus.address) as client:
        await publish_stamped(client, 3000, 30)
        ledger = await client.flush(30)
        assert (ledger.published, ledger.handled, ledger.in_flight) == (3000, 3000, 0)
        assert [await client.execute(GetTotal(account=f"a{key}")) for key in range(30)] == [100] * 30
        await assert_nothing_lost(client, 3000)
    code, errors = bus.end()
    assert code == 0, errors
    assert not (bus.directory / "bus").exists(), "sockets were left behind"
    assert not left_on_ram(bus.address), "a bus that leaves nothing undone leaves nothing on RAM"


async def test_nothing_is_lost_while_workers_are_killed(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "2")
    bus.wait_ready()
    chance = random.Random(1)
    async with shardbus.connect(bus.address) as client:
        publishing = asyncio.create_task(publish_stamped(client, 6000, 40, pause_s=0.01))
        killed: set[int] = set()
        while len(killed) < 4:
            await asyncio.sleep(0.6)
            workers = (await client.status())["workers"]
            up = [worker["pid"] for worker in workers if worker["state"] == "up" and worker["pid"] not in killed]
            if up:
                os.kill(pid := chance.choice(up), signal.SIGKILL)
                killed.add(pid)
        await publishing
        ledger = await client.flush(60)
        assert ledger.handled + ledger.dead + ledger.waiting == 6000
        await assert_nothing_lost(client, 6000)
        while sum(worker["restarts"] for worker in (await client.status())["workers"]) < len(killed):  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # the test ends by its time-out


async def test_a_new_supervisor_takes_over_after_the_old_one_was_killed(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "2")
    bus.wait_ready()
    workers = bus.worker_pids()
    async with shardbus.connect(bus.address) as client:
        publishing = asyncio.create_task(publish_stamped(client, 4000, 40, pause_s=0.01))
        await asyncio.sleep(0.5)
        bus.process.kill()
        await asyncio.to_thread(bus.process.communicate)
        await asyncio.to_thread(wait_until, lambda: not any(map(is_alive, workers)))
        bus.start()
        await asyncio.to_thread(bus.wait_ready)
        await publishing
        assert (await client.flush(60)).in_flight == 0
        await assert_nothing_lost(client, 4000)


async def test_dead_letters_outlive_an_abort_after_a_worker_had_once_drained(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    pid = bus.worker_pids()[0]
    os.kill(pid, signal.SIGTERM)
    await asyncio.to_thread(wait_until, lambda: bus.worker_pids()[0] not in (0, pid) and bus.status()["healthy"])
    async with shardbus.connect(bus.address, close_timeout=1.0) as client:
        await client.publish(Stumbled(account="a"))
        assert (await client.flush(30)).dead == 1
        for _ in range(2):
            bus.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(bus.process.communicate)
    bus.start()
    await asyncio.to_thread(bus.wait_ready)
    await asyncio.to_thread(wait_until, lambda: bus.status()["dead_letters"] == 1)


async def test_dead_letters_outlive_a_killed_worker(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    async with shardbus.connect(bus.address) as client:
        for number in range(50):
            await client.publish(Stumbled(account=f"a{number}"))
        assert (await client.flush(30)).dead == 50
        pid = bus.worker_pids()[0]
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(wait_until, lambda: bus.worker_pids()[0] not in (0, pid) and bus.status()["healthy"])
        await client.publish(Stumbled(account="a"))
        assert (await client.flush(30)).dead == 51
    await asyncio.to_thread(wait_until, lambda: bus.status()["dead_letters"] == 51)


async def test_a_command_that_kills_its_worker_is_lost_and_not_repeated(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    async with shardbus.connect(bus.address) as client:
        with pytest.raises(shardbus.CommandLost, match="outcome is unknown"):
            await client.execute(Die(account="a"), timeout=30)
        assert await client.execute(GetTotal(account="a"), timeout=30) == 0
        assert (await client.status())["workers"][0]["restarts"] == 1


async def test_a_full_lane_survives_its_worker_in_order(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    async with shardbus.connect(bus.address) as client:
        await client.publish(Slept(account="a0", seconds=3.0))
        for ordinal in range(1, 3001):
            await client.publish(Added(account="a0"), ordinal=ordinal)
        ledger = await client.flush(30)
        assert ledger.waiting > 1024
        os.kill(bus.worker_pids()[0], signal.SIGKILL)
        while sum(one.distinct for one in await client.evidence([client.publisher])) < 3000:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # the test ends by its time-out
        await assert_nothing_lost(client, 3000)
        await asyncio.to_thread(wait_until, lambda: bus.status()["waiting"] == 0 and bus.status()["healthy"], 60)


def test_a_second_bus_at_an_address_is_refused(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    second = bus.shardbus("serve", "accounts:bus", "--bind", bus.address, "--workers", "1")
    assert second.returncode == 1
    assert "a bus runs at" in second.stderr
    assert "Traceback" not in second.stderr
    assert bus.status()["healthy"]


def test_an_application_that_cannot_start_is_told_in_one_line(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1", application="accounts:nothing")  # the rest is in `tests/unit/test_application.py`
    assert bus.ended() == (2, "shardbus: accounts has no Bus named 'nothing'; it has bus\n")


POOLS = """\
import asyncio
from shardbus import Bus

bus = Bus("pools")


class Away(OSError):
    def __getattr__(self, name):
        raise KeyError(name)


async def stay():
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass


@bus.lifespan
async def pool(worker):
"""


def serve_pools(make_bus: MakeBus, directory: Path, life: str, *arguments: str) -> RunningBus:
    """Serve an application whose lifespan is this."""
    (directory / "pools.py").write_text(POOLS + textwrap.indent(textwrap.dedent(life), "    "))
    return make_bus("--workers", "1", *arguments, application="pools:bus")


@pytest.mark.parametrize(
    ("life", "told"),
    [
        (
            r"""
            raise Away("no database \udce9 here")
            yield
            """,
            r"its lifespan raised Away: no database \udce9 here",
        ),
        (
            """
            task = asyncio.ensure_future(stay())
            await asyncio.sleep(0)
            raise ConnectionError("no database")
            yield
            """,
            "its lifespan raised ConnectionError: no database",
        ),
    ],
    ids=["at once", "whatever it has begun"],
)
def test_a_lifespan_that_cannot_be_opened_ends_the_start(
    make_bus: MakeBus, short_path: Path, life: str, told: str
) -> None:
    bus = serve_pools(make_bus, short_path, life, "--workers", "2")
    code, errors = bus.ended()
    assert code == 1
    assert told in errors.splitlines()[-1]
    assert "silent" not in errors
    assert not os.path.exists(bus.state)


def test_a_lifespan_that_cannot_be_closed_is_told_and_what_was_drained_is_drained(
    make_bus: MakeBus, short_path: Path
) -> None:
    bus = serve_pools(make_bus, short_path, """
        task = asyncio.ensure_future(stay())
        await asyncio.sleep(0)
        yield
        raise ConnectionError("the pool is gone")
    """)
    bus.wait_ready()
    code, errors = bus.end()
    assert (code, os.path.exists(bus.state)) == (0, False)
    assert "the application's lifespan failed when it was to be closed" in errors
    assert "ConnectionError: the pool is gone" in errors
    assert errors.splitlines()[-1].endswith("supervisor: drained")


class Polled(shardbus.Event, key="key"):
    key: str


POLLS = POOLS.partition("@bus.lifespan")[0] + """
import os


class Polled(Event, key="key"):
    key: str


begun = asyncio.Event()
fails = False


def has_failed():  # asked where a worker begins: a spare one has read this file before
    return os.path.getsize("failed") if os.path.exists("failed") else 0


@bus.on(Polled)
async def polled(event):
    begun.set()
    await asyncio.sleep(600 if fails else 0)


async def poll():
    await begun.wait()
    with open("failed", "a") as file:
        file.write("x")
    raise ConnectionError("the poller is gone")


@bus.lifespan
async def poller(worker):
    global fails
    fails = has_failed() < 3
    task = asyncio.ensure_future(stay())
    async with asyncio.TaskGroup() as group:
        if fails:
            group.create_task(poll())
        yield
"""


async def test_a_lifespan_that_ends_its_worker_is_told_and_no_handler_is_blamed(make_bus: MakeBus, short_path: Path) -> None:
    (short_path / "polls.py").write_text(POLLS.replace("import Bus\n", "import Bus, Event\n"))
    bus = make_bus("--workers", "1", application="polls:bus")
    bus.wait_ready()
    async with shardbus.connect(bus.address) as client:
        await client.publish(Polled(key="a"))
        ledger = await client.flush()
    assert (ledger.handled, ledger.dead) == (1, 0)
    code, errors = await asyncio.to_thread(bus.end)
    assert code == 0
    assert errors.count("ConnectionError: the poller is gone") == errors.count("the worker was ended from within") == 3
    assert "found to end workers" not in errors
    assert "silent" not in errors


async def test_a_log_that_nobody_reads_any_more_changes_no_exit_code(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    async with shardbus.connect(bus.address) as client:
        await client.publish(Stumbled(account="a"))
        assert (await client.flush(30)).dead == 1  # which is told at the end
    assert bus.process.stderr is not None
    bus.process.stderr.close()  # as `2>&1 | tee log` does at Ctrl-C
    bus.process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(bus.process.wait, 60) == 0


def test_a_lifespan_that_has_no_time_to_close_is_told(make_bus: MakeBus, short_path: Path) -> None:
    bus = serve_pools(make_bus, short_path, """
        yield
        await asyncio.sleep(600)
    """, "--drain-timeout", "0.5")
    bus.wait_ready()
    code, errors = bus.end()
    assert (code, errors.splitlines()[-1]) == (1, "shard 0: its lifespan may not have been closed: there was no time left")
    assert not os.path.exists(bus.state)


def test_a_bus_that_is_stopped_before_it_is_ready_leaves_nothing(make_bus: MakeBus, short_path: Path) -> None:
    bus = serve_pools(make_bus, short_path, """
        await asyncio.sleep(600)
        yield
    """)
    wait_until(lambda: os.path.exists(bus.state) and len(os.listdir(bus.state)) > 2)
    bus.end()
    assert not os.path.exists(bus.state)


def test_a_bus_one_of_whose_ports_is_taken_leaves_nothing(make_bus: MakeBus) -> None:
    port = free_port(3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 2))
        taken.listen()
        bus = make_bus("--workers", "2", "--bind", f"tcp://127.0.0.1:{port}")
        code, errors = bus.ended(120)
    assert code == 1
    assert f"tcp://127.0.0.1:{port + 2} is in use: another program listens there" in errors
    assert not os.path.exists(state_of(f"tcp://127.0.0.1:{port}"))


def test_a_host_that_cannot_be_found_is_told_as_that(make_bus: MakeBus) -> None:
    # Of an option that is given twice the last one counts.
    code, errors = make_bus("--workers", "1", "--bind", "tcp://nohost.invalid:9999").ended(120)
    assert code == 2
    assert "cannot listen at tcp://nohost.invalid:9999: its host cannot be found here" in errors


async def test_a_client_without_a_bus_says_so(short_path: Path) -> None:
    with pytest.raises(shardbus.BusUnreachable, match="no bus answered at ipc://"):
        async with shardbus.connect(f"ipc://{short_path}", timeout=0.3):
            pass


async def test_garbage_to_both_sockets_disturbs_nobody(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    sockets = sorted(path for path in (bus.directory / "bus").iterdir() if path.is_socket())
    assert len(sockets) == 2
    chance = random.Random(3)
    async with shardbus.connect(bus.address) as client:
        with zmq.Context() as context:
            for path in sockets:
                with context.socket(zmq.DEALER) as garbage:
                    garbage.set(zmq.LINGER, 30_000)
                    garbage.connect(f"ipc://{path}")
                    for _ in range(300):
                        garbage.send(chance.randbytes(chance.randrange(200)))
                    garbage.send_multipart([b"", b"two", b"three"])
            await publish_stamped(client, 500, 5)
            assert (await client.flush(30)).handled == 500
        await assert_nothing_lost(client, 500)
    await asyncio.to_thread(
        wait_until, lambda: sum(bus.status()["workers"][0][what] for what in ("malformed", "ignored")) == 301
    )
    assert bus.status()["workers"][0]["restarts"] == 0


async def test_a_bus_over_tcp_serves_alike(make_bus: MakeBus) -> None:
    address = f"tcp://127.0.0.1:{free_port(2)}"
    bus = make_bus("--workers", "1", "--bind", address)
    bus.wait_ready()
    async with shardbus.connect(address) as client:
        await publish_stamped(client, 1000, 10, pause_s=0.005)
        os.kill((await client.status())["workers"][0]["pid"], signal.SIGKILL)
        await publish_stamped_more(client, 1000)
        assert (await client.flush(60)).handled == 2000
    assert bus.end()[0] == 0


async def publish_stamped_more(client: shardbus.Client, count: int) -> None:
    for number in range(count):
        await client.publish(Added(account=f"b{number % 10}"))


async def test_a_handler_that_blocks_its_event_loop_is_named(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    async with shardbus.connect(bus.address) as client:
        await client.publish(Blocked(account="a0", seconds=3.5))
        await asyncio.sleep(0)

        async def stalled_in() -> str:
            return str((await client.status())["workers"][0]["stalled_in"])

        while not (named := await stalled_in()):  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.05)
        assert named == "accounts.block (key 'a0')"
        await client.flush(30)
        while await stalled_in():  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.05)
        assert (await client.status())["workers"][0]["restarts"] == 0
    _, errors = bus.end()
    assert "the event loop has stood still" in errors
    assert "time.sleep(event.seconds)" in errors or "in block" in errors


async def test_a_silent_worker_is_replaced(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    pid = bus.worker_pids()[0]
    os.kill(pid, signal.SIGSTOP)
    await asyncio.to_thread(wait_until, lambda: bus.worker_pids()[0] not in (0, pid), 40)
    assert not is_alive(pid)


def children_of(pid: int) -> dict[int, str]:
    """The command line of each child, by pid, the first started first."""
    found = {}
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found[child.pid] = (child.create_time(), " ".join(child.cmdline()))
    return {pid: line for pid, (_, line) in sorted(found.items(), key=lambda one: one[1][0])}


async def test_a_bus_whose_fork_server_was_killed_starts_workers_otherwise(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    server, *_ = first = children_of(bus.process.pid)
    assert first[bus.worker_pids()[0]] == first[server]  # a copy of it
    os.kill(server, signal.SIGKILL)
    async with shardbus.connect(bus.address) as client:
        for killed in range(2):  # the spare that was forked before comes first
            await client.publish(Added(account="a"))
            assert (await client.flush(30)).handled == killed + 1
            pid = bus.worker_pids()[0]
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(wait_until, lambda: bus.worker_pids()[0] not in (0, pid) and bus.status()["healthy"])  # noqa: B023
        assert bus.worker_pids()[0] not in first
        children = children_of(bus.process.pid)
        line = children[bus.worker_pids()[0]]
        copies = {pid for pid, other in children.items() if other == line}
        assert "--fork" not in line or not copies & set(first)  # there may be another server by now
        assert await client.execute(GetTotal(account="a"), timeout=30) == 0
    assert bus.end()[0] == 0


async def test_drain_says_what_it_could_not_finish(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1", "--drain-timeout", "0.5")
    bus.wait_ready()
    with pytest.raises(shardbus.NotDelivered, match="1 event was"):  # noqa: PT012 - leaving the client's block raises
        async with shardbus.connect(bus.address, close_timeout=1.0) as client:
            await client.publish(Slept(account="sleeper", seconds=60))
            await asyncio.to_thread(wait_until, lambda: bus.status()["workers"][0]["backlog"] == 1)
            drained = await asyncio.to_thread(bus.shardbus, "drain")
            assert drained.returncode == 1
            assert "key 'sleeper': Slept is running" in drained.stderr
    _, errors = await asyncio.to_thread(bus.process.communicate)
    assert bus.process.returncode == 1
    assert "key 'sleeper': Slept is running" in errors
