"""Whether a client takes anything, and who hears that it does not."""

from __future__ import annotations

import asyncio

import pytest

from shardbus.errors import BusRejected, ClientClosed
from shardbus.gate import Gate


def test_nothing_is_taken_before_the_bus_was_found() -> None:
    gate = Gate()
    with pytest.raises(ClientClosed):
        gate.check()
    gate.open()
    gate.check()


@pytest.mark.parametrize("shut", [Gate.begin_closing, Gate.close, lambda gate: gate.refuse(BusRejected("no"))])
def test_what_was_shut_stays_so_when_the_bus_is_found_again(shut: object) -> None:
    gate = Gate()
    gate.open()
    shut(gate)  # type: ignore[operator]
    gate.open()
    assert not gate.is_open
    with pytest.raises((ClientClosed, BusRejected)):
        gate.check()


def test_what_the_bus_has_refused_is_told_also_of_a_client_that_closes() -> None:
    gate = Gate()
    gate.begin_closing()
    gate.refuse(BusRejected("no"))
    gate.close()
    with pytest.raises(BusRejected, match="no"):
        gate.check()


async def test_everybody_who_waits_hears_of_progress_and_of_a_refusal() -> None:
    gate = Gate()
    waiting = [asyncio.create_task(gate.wait_for_progress()) for _ in range(2)]
    await asyncio.sleep(0)
    gate.made_progress()
    await asyncio.gather(*waiting)
    waiting = [asyncio.create_task(gate.wait_for_progress()) for _ in range(2)]
    await asyncio.sleep(0)
    gate.refuse(BusRejected("no"))
    gate.made_progress()
    outcomes = await asyncio.gather(*waiting, gate.wait_for_progress(), return_exceptions=True)
    assert [str(one) for one in outcomes] == ["no"] * 3
