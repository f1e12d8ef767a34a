"""The blocking client against a real bus: killed workers, forks, and processes that end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from buses import APPLICATION, PAYMENTS, RunningBus, wait_until

from shardbus import CommandLost, blocking

MakeBus = Callable[..., RunningBus]

_space: dict[str, object] = {}
exec(compile(APPLICATION, "accounts.py", "exec"), _space)  # noqa: S102 - the same message types as the served application
Added, GetTotal = _space["Added"], _space["GetTotal"]
exec(compile(PAYMENTS, "payments.py", "exec"), _space)  # noqa: S102 - likewise
Paid = _space["Paid"]


def run_script(bus: RunningBus, script: str) -> subprocess.CompletedProcess[str]:
    (bus.directory / "script.py").write_text(script)
    return subprocess.run(
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", "script.py"],  # of forks beside threads
        cwd=bus.directory,
        env=bus.environment() | {"SHARDBUS_URL": bus.address},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_two_threads_lose_nothing_and_keep_their_order_when_workers_are_killed(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "2", application="payments:bus")
    bus.wait_ready()
    (bus.directory / "mended").touch()  # handlers write down what they take
    each, workers = 3000, bus.worker_pids()

    with blocking.connect(bus.address, close_timeout=60) as client:

        def work(thread: int) -> None:
            for number in range(each):
                if number == each // 2:
                    os.kill(workers[thread], signal.SIGKILL)
                event = Paid(account=f"t{thread}-{number % 5}", n=number)  # type: ignore[operator]
                if number % 500 == 0:
                    client.publish_many([event])
                else:
                    client.publish(event)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, (0, 1)))
        ledger = client.flush(60)
        assert (ledger.published, ledger.handled, ledger.in_flight) == (2 * each, 2 * each, 0)

    taken: dict[str, list[int]] = {}
    for file in sorted(bus.directory.glob("taken-*.txt"), key=lambda file: file.stat().st_mtime_ns):
        for line in file.read_text().splitlines():
            account, n, redelivered = line.split()
            if not int(redelivered) or int(n) not in taken.get(account, []):
                taken.setdefault(account, []).append(int(n))
    for thread in (0, 1):
        for part in range(5):
            assert taken[f"t{thread}-{part}"] == list(range(part, each, 5))


def test_a_client_goes_on_when_its_bus_is_back(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    with blocking.connect(bus.address) as client:
        client.publish(Added(account="a"))  # type: ignore[operator]
        assert client.flush(30).handled == 1
        bus.end()
        client.publish(Added(account="a"))  # type: ignore[operator]
        bus.start()
        bus.wait_ready()
        for lost in range(2):
            try:
                assert client.execute(GetTotal(account="a"), timeout=30) == 1  # type: ignore[operator]
                break
            except CommandLost:  # rightly: it was sent before the client had heard that there are other workers
                assert not lost


def test_a_client_is_refused_in_a_forked_child_and_goes_on_in_the_parent(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    done = run_script(
        bus,
        """
import os, threading
import shardbus
from accounts import Added, GetTotal

with shardbus.blocking.connect() as client:
    client.publish(Added(account="fork"))
    events = client.subscribe(Added)
    with client._lock:  # as if another thread were just publishing
        child = os.fork()
    if child == 0:
        events.close()  # the parent's to end
        for call in (lambda: client.publish(Added(account="fork")), client.flush):
            try:
                call()
            except shardbus.UsageError as error:
                print(error, flush=True)
        with shardbus.blocking.connect() as own:
            own.publish(Added(account="fork"))
    else:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        client.publish(Added(account="fork"))
        while next(events) != Added(account="fork"):
            pass
        print(client.flush(30).handled, client.execute(GetTotal(account="fork")))
""",
    )
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert first.startswith("this client was made in another process, before os.fork() made this one")
    assert first.endswith("connect after the fork, for instance in gunicorn's post_fork")
    assert last == "2 3"
    assert done.stderr == ""


def test_a_client_that_nobody_closes_is_flushed_at_the_end_of_the_process(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    done = run_script(
        bus,
        """
import threading, time
import shardbus
from accounts import Added

client = shardbus.blocking.connect()

def work():
    threading.main_thread().join()
    for _ in range(1000):
        client.publish(Added(account="exit"))

threading.Thread(target=work).start()
client.publish(Added(account="exit"))
""",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with blocking.connect(bus.address) as client:
        assert client.execute(GetTotal(account="exit"), timeout=30) == 1001  # type: ignore[operator]


def test_what_the_end_of_the_process_does_not_deliver_is_logged(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    done = run_script(
        bus,
        """
import shardbus
from accounts import Slept

client = shardbus.blocking.connect(close_timeout=0.1)
client.publish(Slept(account="exit", seconds=2.0))
""",
    )
    assert done.returncode == 0
    assert "at the end of the process: 1 event was published and not finished within 0.1 s" in done.stderr


def test_ctrl_c_ends_a_script_that_waits(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    (bus.directory / "script.py").write_text(
        """
import shardbus
from accounts import GetTotal, Slept

with shardbus.blocking.connect(close_timeout=0.1) as client:
    client.publish(Slept(account="slow", seconds=3600.0))
    print("waiting", flush=True)
    client.execute(GetTotal(account="slow"), timeout=3600)
"""
    )
    script = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=bus.directory,
        env=bus.environment() | {"SHARDBUS_URL": bus.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert script.stdout is not None
    assert script.stdout.readline() == "waiting\n"
    wait_until(lambda: bus.status()["workers"][0]["backlog"] >= 1)
    script.send_signal(signal.SIGINT)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == -signal.SIGINT
    assert errors.splitlines()[-2] == "KeyboardInterrupt"
    assert "1 event was published and not finished within 0.1 s" in errors.splitlines()[-1]
