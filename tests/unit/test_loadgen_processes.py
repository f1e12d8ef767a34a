"""What SIGTERM does to a program that starts others."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import pytest

import shardbus
from loadgen.processes import end_as_on_interrupt


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
