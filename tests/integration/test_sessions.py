"""Sessions over real workers: a client and a worker that get SIGKILL with sessions open, and a bus that drains."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from buses import RunningBus, wait_until

import shardbus
from shardbus import Command, Event, SessionEnded

MakeBus = Callable[..., RunningBus]

SESSIONS = 200
SILENCE_S = 10.0  # the client says every 3 s that it is there

APPLICATION = """
import os

from msgspec.structs import replace

import shardbus.worker
from shardbus import Bus, Command, Context, Event, SessionEnded

silence_s = float(os.environ.get("TEST_SILENCE_S", "30"))
shardbus.worker.DEFAULT_LIMITS = replace(shardbus.worker.DEFAULT_LIMITS, session_silence_s=silence_s)


class Said(Event, key="chat"):
    chat: str
    text: str


class Length(Command[int], key="chat"):
    chat: str


bus = Bus("chats")


def note(line):
    with open("told.txt", "a") as file:
        file.write(line + "\\n")


@bus.session(idle_seconds=600.0)
async def chat(session):
    note(f"open {session}")
    history = []
    yield history
    note(f"end {session} {len(history)}")


@bus.on(Said)
async def say(event: Said, context: Context) -> None:
    (await context.session()).append(event.text)


@bus.on(SessionEnded)
async def ended(event: SessionEnded) -> None:
    note(f"ended {event.session} {event.reason}")


@bus.command(Length)
async def length(command: Length, context: Context) -> int:
    return len(await context.session())
"""

CLIENT = f"""
import asyncio
import shardbus
from chats import Said

async def main():
    async with shardbus.connect() as client:
        for n in range({SESSIONS}):
            await client.session(f"chat-{{n}}").__aenter__()
            await client.publish(Said(chat=f"chat-{{n}}", text="x"))
        await client.flush()
        print("open", flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


class Said(Event, key="chat"):
    chat: str
    text: str


class Length(Command[int], key="chat"):
    chat: str


def told(directory: Path) -> list[str]:
    path = directory / "told.txt"
    return path.read_text().splitlines() if path.exists() else []


def open_sessions(bus: RunningBus) -> int:
    return sum(worker["sessions"] for worker in bus.status()["workers"])


@pytest.fixture
def chats(short_path: Path) -> Path:
    (short_path / "chats.py").write_text(APPLICATION)
    (short_path / "client.py").write_text(CLIENT)
    return short_path


def test_the_sessions_of_a_client_that_was_killed_are_gone_in_the_stated_time(
    chats: Path, make_bus: MakeBus, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TEST_SILENCE_S", str(SILENCE_S))
    bus = make_bus("--workers", "2", application="chats:bus")
    bus.wait_ready()
    client = subprocess.Popen(
        [sys.executable, "client.py"],
        cwd=chats,
        env=bus.environment() | {"SHARDBUS_URL": bus.address},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "open\n"
        wait_until(lambda: open_sessions(bus) == SESSIONS)  # workers say so once a second
        status = bus.shardbus("status")
        assert "sessions" in status.stdout.splitlines()[1]
        assert not [line for line in told(chats) if not line.startswith("open")]
    finally:
        client.kill()
        client.communicate(timeout=30)
    wait_until(lambda: open_sessions(bus) == 0)
    lines = told(chats)
    keys = {f"chat-{n}" for n in range(SESSIONS)}
    assert sorted(lines) == sorted(
        line for key in keys for line in (f"open {key}", f"ended {key} client gone", f"end {key} 1")
    )
    assert all(lines.index(f"ended {key} client gone") < lines.index(f"end {key} 1") for key in keys)


def test_a_state_is_made_again_by_the_successor_of_a_killed_worker_and_ended_when_that_drains(
    chats: Path, make_bus: MakeBus
):
    bus = make_bus("--workers", "1", application="chats:bus")
    bus.wait_ready()

    async def talk() -> None:
        async with shardbus.connect(bus.address) as client:
            left = client.session("left")
            for session in (left, client.session("stays")):
                await session.__aenter__()
            await left.publish(Said(chat="left", text="before"))
            await client.flush()
            (pid,) = bus.worker_pids()
            os.kill(pid, signal.SIGKILL)
            await left.publish(Said(chat="left", text="after"))
            await client.flush(60)
            assert await client.execute(Length(chat="left"), timeout=30) == 1
            await client.publish(Said(chat="stays", text="x"))
            async with client.subscribe(SessionEnded, key="left") as ends:
                await left.__aexit__(None, None, None)
                async with asyncio.timeout(30):
                    assert await anext(ends) == SessionEnded(session="left")
            await client.flush(60)
            assert told(chats) == ["open left", "open left", "open stays", "ended left left", "end left 1"]
            code, _ = await asyncio.to_thread(bus.end)
            assert code == 0

    asyncio.run(talk())
    assert told(chats)[5:] == ["end stays 1"]
