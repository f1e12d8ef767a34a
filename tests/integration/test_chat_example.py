"""`shardbus init chat`: the application in under 80 lines, served by two workers, its web process read over HTTP."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import pytest
from buses import RunningBus, free_port, wait_until

from shardbus.example_application import write_example

GATED = '''
"""The chat with another model: each token waits for a file of its name, so that the test says when it comes."""
import asyncio
import pathlib
import chat

async def model(text, history):
    with open(f"log-{text}", "w", buffering=1) as log:
        print("begun", file=log)
        try:
            for token in (f"{text}-1", f"{text}-2"):
                while not pathlib.Path(token).exists():
                    await asyncio.sleep(0.005)
                yield f"{token} of message {len(history) + 1};"
        finally:
            print("ended", file=log)

chat.model = model
bus = chat.bus
'''


@pytest.fixture(scope="module")
def chat(short_module_path: Path) -> Iterator[RunningBus]:
    """The application as `shardbus init chat` writes it, served with a model that waits; each test has its own chats."""
    done = subprocess.run(
        [sys.executable, "-m", "shardbus", "init", "chat"],
        cwd=short_module_path,
        env=checkout_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "  shardbus serve chat:bus --workers 2 " in done.stdout
    directory = short_module_path / "chat"
    (directory / "gated.py").write_text(GATED)
    bus = RunningBus(directory, "--workers", "2", application="gated:bus")
    try:
        bus.wait_ready()
        yield bus
        assert bus.end()[0] == 0
    finally:
        bus.close()


def checkout_environment() -> dict[str, str]:
    path = filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


@contextmanager
def web_process(bus: RunningBus, logs: str = "") -> Iterator[str]:
    """`python chat.py`, at a port that is free; yields its URL. Standard error has `logs`, or nothing."""
    port = free_port()
    program = bus.directory / f"chat_at_{port}.py"
    program.write_text(re.sub(r"\b8080\b", str(port), (bus.directory / "chat.py").read_text()))
    with subprocess.Popen(
        [sys.executable, "-u", program.name],
        cwd=bus.directory,
        env=bus.environment() | {"SHARDBUS_URL": bus.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "Running on" in line, process.communicate()
            yield f"http://localhost:{port}"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            assert logs in errors if logs else not errors, errors
        finally:
            process.kill()


class Browser:
    """Says something in one chat, and reads the reply piece by piece."""

    def __init__(self, http: aiohttp.ClientSession, bus: RunningBus, url: str) -> None:
        self._http = http
        self._directory = bus.directory
        self.url = url

    @asynccontextmanager
    async def say(self, text: str) -> AsyncIterator[aiohttp.StreamReader]:
        async with self._http.post(self.url, data=text) as response:
            assert response.status == 200
            yield response.content
            response.close()

    async def history(self) -> list[str]:
        async with self._http.get(self.url) as response:
            found: list[str] = await response.json()
            return found

    def let(self, *tokens: str) -> None:
        for token in tokens:
            (self._directory / token).touch()

    def log(self, text: str) -> list[str]:
        file = self._directory / f"log-{text}"
        return file.read_text().split() if file.exists() else []


async def token(reply: aiohttp.StreamReader) -> str:
    return (await reply.readuntil(b";")).decode()


async def test_replies_are_streamed_token_by_token_to_browsers_of_several_chats(chat: RunningBus) -> None:
    with web_process(chat) as url:
        async with aiohttp.ClientSession() as http:
            async with http.get(url) as page:
                assert "<form" in await page.text()
            one, also_one, two = (Browser(http, chat, f"{url}/chats/{name}") for name in ("one", "one", "two"))

            # Each token is here before the model may make the next one; two chats are under way beside each other.
            one.let("a-1")
            async with one.say("a") as a:
                assert await token(a) == "a-1 of message 1;"
                two.let("b-1")
                async with two.say("b") as b:
                    assert await token(b) == "b-1 of message 1;"
                    assert (one.log("a"), two.log("b")) == (["begun"], ["begun"])

                    # What a second browser says in the first chat waits for its turn, and knows what was said before.
                    also_one.let("c-1", "c-2")

                    async def say_c() -> bytes:
                        async with also_one.say("c") as c:
                            return await c.read()

                    c = asyncio.create_task(say_c())
                    await asyncio.to_thread(wait_until, lambda: backlog(chat) == 3)
                    assert also_one.log("c") == []
                    two.let("b-2")
                    assert await token(b) == "b-2 of message 1;"
                    assert await b.read() == b""
                assert not c.done()
                one.let("a-2")
                assert await token(a) == "a-2 of message 1;"
                assert await a.read() == b""
            assert await c == b"c-1 of message 2;c-2 of message 2;"
            assert await one.history() == [
                "a → a-1 of message 1;a-2 of message 1;",
                "c → c-1 of message 2;c-2 of message 2;",
            ]
            assert await two.history() == ["b → b-1 of message 1;b-2 of message 1;"]


def backlog(bus: RunningBus) -> int:
    return sum(worker["backlog"] for worker in bus.status()["workers"])


async def test_a_browser_that_leaves_ends_the_model_and_the_chat_goes_on(chat: RunningBus) -> None:
    with web_process(chat) as url:
        async with aiohttp.ClientSession() as http:
            browser = Browser(http, chat, f"{url}/chats/left")
            browser.let("d-1", "e-1", "e-2")
            async with browser.say("d") as d:
                assert await token(d) == "d-1 of message 1;"
                assert browser.log("d") == ["begun"]
            await asyncio.to_thread(wait_until, lambda: browser.log("d") == ["begun", "ended"])  # nobody lets d-2 come
            async with browser.say("e") as e:
                assert await e.read() == b"e-1 of message 2;e-2 of message 2;"
            assert (await browser.history())[0] == "d → d-1 of message 1;"


async def test_a_worker_that_dies_breaks_off_its_replies_and_the_chat_begins_again(chat: RunningBus) -> None:
    with web_process(chat, logs="CommandLost") as url:
        async with aiohttp.ClientSession() as http:
            browser = Browser(http, chat, f"{url}/chats/lost")
            browser.let("f-1", "g-1", "g-2")
            async with browser.say("f") as f:
                assert await token(f) == "f-1 of message 1;"
                for pid in chat.worker_pids():
                    os.kill(pid, signal.SIGKILL)
                with pytest.raises(aiohttp.ClientPayloadError):
                    await f.read()
            async with browser.say("g") as g:
                assert await g.read() == b"g-1 of message 1;g-2 of message 1;"


async def test_a_history_is_told_by_the_successor_of_a_worker_that_dies(chat: RunningBus) -> None:
    with web_process(chat, logs="CommandLost") as url:
        async with aiohttp.ClientSession() as http:
            browser = Browser(http, chat, f"{url}/chats/reread")
            browser.let("h-1")
            async with browser.say("h") as h:
                assert await token(h) == "h-1 of message 1;"
                history = asyncio.create_task(browser.history())
                await asyncio.to_thread(wait_until, lambda: backlog(chat) == 2)  # it waits behind the reply
                for pid in chat.worker_pids():
                    os.kill(pid, signal.SIGKILL)
                assert await history == []


async def test_a_bus_that_is_gone_gives_the_browser_a_line(chat: RunningBus) -> None:
    other = RunningBus(chat.directory, "--workers", "1", "--bind", f"{chat.address}-gone", application="chat:bus")
    other.address += "-gone"
    try:
        other.wait_ready()
        with web_process(other) as url:
            assert other.end()[0] == 0
            async with aiohttp.ClientSession() as http:
                for answer in (http.get(f"{url}/chats/gone"), http.post(f"{url}/chats/gone", data="hello")):
                    async with answer as response:
                        assert (response.status, await response.text()) == (503, "(the bus is gone; try again later)")
    finally:
        other.close()


def test_the_test_that_is_written_beside_it_passes(tmp_path: Path) -> None:
    directory = write_example("chat", "chat", tmp_path)
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=directory,
        env=checkout_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "2 passed" in tested.stdout
