"""The README's programs, as they stand there, run for real.

The state that survives a crash is checked with made-up history; `SHARDBUS_HISTORY=DIRECTORY` takes `history.jsonl.gz` and
`history.truth.json` from there instead.
"""

from __future__ import annotations

import ast
import asyncio
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from buses import RunningBus, wait_until

import shardbus

MakeBus = Callable[..., RunningBus]

PUBLISHER = """
import asyncio, json, sys, zlib
import shardbus
from history import Changed

async def main(part):
    async with shardbus.connect(close_timeout=120) as client:
        with open("history.jsonl") as lines:
            for number, line in enumerate(lines):
                event = json.loads(line)
                if zlib.crc32(event["path"].encode()) % 2 == part:
                    event.pop("commit", None)
                    await client.publish(Changed(**event))
                if number % 100 == 0 and len(sys.argv) > 2:
                    await asyncio.sleep(float(sys.argv[2]))

asyncio.run(main(int(sys.argv[1])))
"""


def write_programs(directory: Path) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    for name, program in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL):
        (directory / name).write_text(program)
    (directory / "publisher.py").write_text(PUBLISHER)


def made_up_history() -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    chance = random.Random(5)
    truth: dict[str, list[int]] = {}
    events = []
    for time in range(4000):
        path = f"src/file{min(int(chance.expovariate(0.02)), 200)}.py"
        state = truth.setdefault(path, [0, 0])
        added, deleted = chance.randrange(50), chance.randrange(10)
        state[0] += 1
        state[1] += added - deleted
        events.append({"path": path, "revision": state[0], "time": time, "added": added, "deleted": deleted})
    return events, truth


def history() -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    directory = os.environ.get("SHARDBUS_HISTORY")
    if directory is None:
        return made_up_history()
    with gzip.open(f"{directory}/history.jsonl.gz", "rt") as lines:
        events = [json.loads(line) for line in lines]
    return events, json.loads(Path(f"{directory}/history.truth.json").read_text())


def test_the_small_program_prints_the_total(make_bus: MakeBus) -> None:
    ran = run_program(make_bus, "small.py")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "9.5\n", "")


def test_the_tested_program_needs_no_bus_and_no_time(tmp_path: Path) -> None:
    write_programs(tmp_path)
    ran = subprocess.run(
        [sys.executable, "tested.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "an hour and a crash later: reminded\n"), ran.stderr


def test_the_guarded_program_prints_what_ran(make_bus: MakeBus) -> None:
    ran = run_program(make_bus, "guarded.py")
    assert (ran.returncode, ran.stderr) == (0, "")
    *lines, counted = ran.stdout.splitlines()
    assert lines == ["book 1", "report 1", "book 2"]
    assert sorted(ast.literal_eval(counted)) == [("__main__.book", 3), ("__main__.report", 2)]


def run_program(make_bus: MakeBus, name: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the README in a process of its own, without a bus."""
    bus = make_bus(application="accounts:none")  # only its directory and environment
    bus.close()
    write_programs(bus.directory)
    return subprocess.run(
        [sys.executable, name],
        cwd=bus.directory,
        env=bus.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_bulk_program_inserts_all_but_the_one_that_cannot_be(make_bus: MakeBus) -> None:
    ran = run_program(make_bus, "bulk.py")
    assert (ran.returncode, ran.stdout) == (0, "999 1 999\n")
    assert "CHECK constraint" in ran.stderr  # the log says which one is dead


def test_the_program_whose_handlers_publish_prints_what_they_did(make_bus: MakeBus) -> None:
    ran = run_program(make_bus, "checkout.py")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "42 2 request-7 True\n", "")


def test_the_program_whose_sessions_have_a_state_prints_what_they_left(make_bus: MakeBus) -> None:
    ran = run_program(make_bus, "rooms.py")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "{'room-1': ['hello', 'again']}\n", "")


def test_the_listening_program_prints_what_it_hears_and_is_told(make_bus: MakeBus) -> None:
    bus = make_bus(application="accounts:none")  # only its directory and environment
    bus.close()
    write_programs(bus.directory)
    ran = subprocess.run(
        [sys.executable, "listen.py"],
        cwd=bus.directory,
        env=bus.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "heard: hello\nHOW\nARE\nYOU\n1\n", "")


def test_the_served_programs_print_ledger_and_total(make_bus: MakeBus, short_path: Path) -> None:
    write_programs(short_path)
    bus = make_bus("--workers", "2", application="shop:bus")
    bus.wait_ready()
    for program, count, total in (("publish.py", 1000, 100.0), ("script.py", 1, 9.5)):
        ran = subprocess.run(
            [sys.executable, program],
            cwd=bus.directory,
            env=bus.environment() | {"SHARDBUS_URL": bus.address},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.stderr == ""
        assert ran.stdout == (
            f"Ledger(published={count}, handled={count}, dead=0, waiting=0, dropped=0, in_flight=0)\n{total}\n"
        )


def test_the_following_program_prints_what_it_is_told_and_hears(make_bus: MakeBus, short_path: Path) -> None:
    write_programs(short_path)
    bus = make_bus("--workers", "1", application="listen:bus")
    bus.wait_ready()
    ran = subprocess.run(
        [sys.executable, "follow.py"],
        cwd=bus.directory,
        env=bus.environment() | {"SHARDBUS_URL": bus.address},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == "HOW\nARE\nYOU\nSaid(chat='7', text='hello') {'from': 'me'}\n"


@pytest.mark.parametrize("kills", [0, 4])
async def test_state_in_a_store_of_its_own_is_exact(make_bus: MakeBus, short_path: Path, kills: int) -> None:
    write_programs(short_path)
    events, truth = history()
    (short_path / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    bus = make_bus("--workers", "4", application="history:bus")
    bus.wait_ready()
    pause = ["0.05" if len(events) < 10_000 else "0.02"] if kills else []
    publishers = [
        subprocess.Popen(  # noqa: ASYNC220 - it only starts; the test goes on beside it
            [sys.executable, "publisher.py", str(part), *pause],
            cwd=short_path,
            env=bus.environment() | {"SHARDBUS_URL": bus.address},
        )
        for part in (0, 1)
    ]
    killed = 0
    chance = random.Random(9)
    async with shardbus.connect(bus.address) as client:
        while any(publisher.poll() is None for publisher in publishers):
            await asyncio.sleep(0.5 if kills else 0.05)
            up = [worker["pid"] for worker in (await client.status())["workers"] if worker["state"] == "up"]
            if kills and up and any(publisher.poll() is None for publisher in publishers):
                os.kill(chance.choice(up), signal.SIGKILL)
                killed += 1
                await asyncio.sleep(0.5)
        assert [publisher.returncode for publisher in publishers] == [0, 0]
        assert killed >= min(kills, 1)
        await asyncio.to_thread(wait_until, lambda: bus.status()["healthy"] and bus.status()["waiting"] == 0)
        sys.path.insert(0, str(short_path))
        try:
            import history as application  # type: ignore[import-not-found]
        finally:
            sys.path.remove(str(short_path))
            sys.modules.pop("history", None)
        found = {path: list(await client.execute(application.GetFile(path=path), timeout=30)) for path in truth}
    assert found == truth
