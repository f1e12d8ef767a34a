"""Middleware, filters and threads in workers of their own, and middleware in the client of another process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from buses import RunningBus

import shardbus

MakeBus = Callable[..., RunningBus]

GUARDED = """
import threading

import msgspec

from shardbus import Bus, Command, Context, Event, Idempotency, Logging, Retry, Timing, header_matches, key_matches, where


class Paid(Event, key="account"):
    account: str
    payment: int
    amount: float = 1.0


class Look(Command[dict[str, list[str]]], key="account"):
    account: str


class Times(Command[list[tuple[str, int, int]]], key="account"):
    account: str


bus = Bus("guarded", threads_max=2)
seen: dict[str, list[str]] = {}
timing = Timing()
bus.use(Logging())
bus.use(timing, on=Event)
bus.use(Idempotency(lambda event: (event.account, event.payment)), on=Paid)


@bus.use
async def refuse(message, context: Context, call_next):
    if context.headers.get("tenant") == "closed":
        raise PermissionError("this tenant is closed")
    return await call_next(message, context)


@bus.on(Paid, where=where(lambda event: event.amount >= 1000) & ~key_matches("test-*"), retry=Retry(attempts=1))
def report(event: Paid) -> None:
    seen.setdefault(event.account, []).append(f"report {event.payment}")


@bus.on(Paid, priority=10, in_thread=True, retry=Retry(attempts=1))
def book(event: Paid) -> None:
    where = "main" if threading.current_thread() is threading.main_thread() else "a thread"
    seen.setdefault(event.account, []).append(f"book {event.payment} in {where}")


@bus.command(Look)
async def look(command: Look) -> dict[str, list[str]]:
    return {command.account: seen.get(command.account, [])}


@bus.command(Times)
async def times(command: Times) -> list[tuple[str, int, int]]:
    return [(one.handler, one.calls, one.failed) for one in timing.times()]
"""


async def test_a_served_application_has_all_of_it(make_bus: MakeBus, short_path: Path, monkeypatch: pytest.MonkeyPatch):
    (short_path / "guarded.py").write_text(GUARDED)
    monkeypatch.syspath_prepend(short_path)
    import guarded  # type: ignore[import-not-found]

    monkeypatch.delitem(sys.modules, "guarded")

    def name_tenant(message: Any, headers: dict[str, str]) -> None:
        headers.setdefault("tenant", "acme")

    bus = make_bus("--workers", "2", application="guarded:bus")
    bus.wait_ready()
    accounts = [f"a{at}" for at in range(8)] + ["test-1"]
    async with shardbus.connect(bus.address, middleware=[shardbus.Validation(), name_tenant]) as client:
        with pytest.raises(shardbus.InvalidMessage, match=r"Expected `float`, got `str` - at `\$\.amount`"):
            await client.publish(guarded.Paid(account="a0", payment=1, amount="9"))
        await client.publish_many([guarded.Paid(account=one, payment=1, amount=5000.0) for one in accounts])
        await client.publish_many([guarded.Paid(account=one, payment=1, amount=5000.0) for one in accounts])  # again
        await client.publish_many([guarded.Paid(account=one, payment=2) for one in accounts])
        await client.publish(guarded.Paid(account="a0", payment=3), headers={"tenant": "closed"})
        ledger = await client.flush(30)
        assert (ledger.published, ledger.handled, ledger.dead) == (28, 27, 1)
        found: dict[str, list[str]] = {}
        for one in accounts:
            found |= await client.execute(guarded.Look(account=one))
        (letter,) = await client.dead_letters()
        assert (letter.handlers, letter.error) == (("guarded.book",), "this tenant is closed")
        counted = [await client.execute(guarded.Times(account=one)) for one in accounts]
    whole = ["book 1 in a thread", "report 1", "book 2 in a thread"]
    assert found == dict.fromkeys(accounts[:-1], whole) | {"test-1": ["book 1 in a thread", "book 2 in a thread"]}
    workers = {tuple(map(tuple, one)) for one in counted}
    assert sum(calls for one in workers for _, calls, _ in one) == 27 + 1 + 16
    assert sum(failed for one in workers for _, _, failed in one) == 1
    code, errors = await asyncio.to_thread(bus.end)
    assert code == 0
    assert errors.count("Paid handled key='a1' attempt=1 in ") == 5
    assert errors.count("Paid failed key='a0' attempt=1 in ") == 1
