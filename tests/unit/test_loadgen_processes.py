"""What SIGTERM does to a program that starts others, and when a bus that it has started is ready."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardbus
from loadgen.processes import _until_ready, end_as_on_interrupt, first_interrupt, own_address
from loadgen.spec import LoadError


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_cancels_what_runs_and_its_end_is_waited_for():
    told: list[str] = []

    async def main() -> None:
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            told.append("cancelled")
            raise

    end_as_on_interrupt()
    with pytest.raises(KeyboardInterrupt):
        shardbus.run(main())
    assert told == ["cancelled"]


def test_sigterm_ends_a_program_that_ignores_interrupts_too():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_as_on_interrupt()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_is_taken_and_the_second_ends_the_program(number: signal.Signals):
    told: list[str] = []

    def take() -> bool:
        told.append("taken")
        return True

    async def main() -> None:
        with first_interrupt(take):
            signal.raise_signal(number)
            await asyncio.sleep(0)
            told.append("goes on")
            signal.raise_signal(number)
            await asyncio.sleep(60)

    end_as_on_interrupt()
    with pytest.raises(KeyboardInterrupt):
        shardbus.run(main())
    assert told == ["taken", "goes on"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_is_not_taken_ends_the_program(number: signal.Signals):
    async def main() -> None:
        with first_interrupt(lambda: False):
            signal.raise_signal(number)
            await asyncio.sleep(60)

    end_as_on_interrupt()
    with pytest.raises(KeyboardInterrupt):
        shardbus.run(main())


def test_what_signals_do_is_as_before_behind_the_block_and_what_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_as_on_interrupt()
    before = signal.getsignal(signal.SIGTERM)
    with first_interrupt(lambda: True):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_bus_for_one_run_has_its_socket_where_those_of_the_user_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with own_address("loadgen-1") as address:
        assert address == f"ipc://{tmp_path}/loadgen-1"
        (tmp_path / "loadgen-1").mkdir()
    assert not (tmp_path / "loadgen-1").exists()


def test_a_bus_is_ready_whatever_its_application_has_printed_before(capfd: pytest.CaptureFixture[str]):
    async def read(told: bytes) -> None:
        stream = asyncio.StreamReader()
        stream.feed_data(told)
        stream.feed_eof()
        await _until_ready(stream, 42)

    asyncio.run(read(b"not ready: yet\nloading, 50 % ready: 1 worker of a:bus at ipc:///a (pid 42)\n more\n"))
    assert capfd.readouterr().err == "not ready: yet\nloading, 50 %  more\n"
    asyncio.run(read(b"booting (pid 42)\ncache ready: 500 rows (pid 42)\nready: 2 workers of a:bus at ipc:///a (pid 42)\n"))
    assert capfd.readouterr().err == "booting (pid 42)\ncache ready: 500 rows (pid 42)\n"
    asyncio.run(read(b"." * 9_000_000 + b"ready: 1 worker of a:bus at ipc:///a (pid 42)\n"))
    assert capfd.readouterr().err == "." * 9_000_000
    with pytest.raises(LoadError, match="did not start"):
        asyncio.run(read(b"ready: 1 worker of a:bus at ipc:///a (pid 41)\nbooting (pid 42)\n"))
    assert capfd.readouterr().err == "ready: 1 worker of a:bus at ipc:///a (pid 41)\nbooting (pid 42)\n"


def test_what_an_application_prints_costs_no_more_than_to_look_at_it(capfd: pytest.CaptureFixture[str]):
    async def read() -> None:
        stream = asyncio.StreamReader()
        for _ in range(100):
            stream.feed_data(b"ready: 1 worker of " * 3449)
        stream.feed_data(b"\nready: 1 worker of a:bus at ipc:///a (pid 42)\n")
        await asyncio.wait_for(_until_ready(stream, 42), 30)

    asyncio.run(read())
    assert capfd.readouterr().err.endswith("ready: 1 worker of \n")


def test_what_an_application_prints_is_seen_at_once_and_not_when_it_is_ready(capfd: pytest.CaptureFixture[str]):
    async def see() -> None:
        stream = asyncio.StreamReader()
        reading = asyncio.create_task(_until_ready(stream, 42))
        stream.feed_data(b"waiting for the database\nrea")
        await asyncio.sleep(0.01)
        assert capfd.readouterr().err == "waiting for the database\n"
        stream.feed_data(b"dy: 1 worker of a:bus at ipc:///a (pid 42)\n")
        await reading
        assert capfd.readouterr().err == ""

    asyncio.run(see())
