"""Where messages go, when they leave, and what a full outbox does, over sessions that nobody answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from shardbus.config import Limits
from shardbus.errors import ClientClosed, OutboxFull
from shardbus.gate import Gate
from shardbus.outboxes import Bound, OnFull, Outbox, Outboxes, publishers_bound
from shardbus.routing import ShardAddress, Table, even_slots
from shardbus.wire.session import PublisherSession

LIMITS = Limits(batch_events_max=4, outbox_events_max=32, session_credit_events_max=24)


def table(shards: int) -> Table:
    addresses = [ShardAddress(shard=at, epoch=b"", address="") for at in range(shards)]
    return Table(incarnation=b"i" * 16, layout=1, version=1, slots=even_slots(shards), shards=addresses)


def outboxes_of(
    gate: Gate,
    shards: int = 1,
    on_full: OnFull = "wait",
    bound: Bound | None = None,
    on_pressure: Callable[[bool], object] | None = None,
) -> Outboxes:
    made = Outboxes(
        gate,
        LIMITS,
        bound or publishers_bound(LIMITS),
        lambda _shard: PublisherSession(b"p" * 16, LIMITS),
        on_full=on_full,
        on_pressure=on_pressure,
        now=lambda: 0,
    )
    made.follow(table(shards))
    gate.open()
    return made


def fill(outboxes: Outboxes, outbox: Outbox, events: int) -> None:
    for _ in range(events):
        outbox.batch.add("Step", "a", b"\x80")
        outboxes.appended(outbox)


@pytest.fixture
def gate() -> Gate:
    return Gate()


async def test_a_batch_leaves_when_it_is_full_and_else_at_the_end_of_the_turn(gate: Gate) -> None:
    outboxes = outboxes_of(gate)
    fill(outboxes, outboxes[0], 5)
    assert (outboxes[0].session.held_events, len(outboxes[0].batch)) == (4, 1)
    await asyncio.sleep(0)
    assert (outboxes[0].session.held_events, len(outboxes[0].batch)) == (5, 0)
    assert outboxes[0].last_seq == 4


async def test_a_publisher_waits_for_room_until_there_is_some_or_the_client_closes(gate: Gate) -> None:
    outboxes = outboxes_of(gate)
    outbox = outboxes[0]
    fill(outboxes, outbox, 28)
    assert outbox.paused
    assert not outboxes.has_room()
    waiting = asyncio.create_task(outboxes.wait_for_room(outbox))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    outbox.session.drop_oldest()
    gate.made_progress()
    await waiting
    assert not outbox.paused
    fill(outboxes, outbox, 4)
    waiting = asyncio.create_task(outboxes.wait_for_room(outbox))
    await asyncio.sleep(0)
    gate.close()
    gate.made_progress()
    with pytest.raises(ClientClosed):
        await waiting
    assert outboxes.statistics(32).waits == 1


async def test_a_full_outbox_refuses_or_drops_where_that_was_asked_for_and_counts_it(gate: Gate) -> None:
    refusing = outboxes_of(gate, on_full="reject")
    fill(refusing, refusing[0], 28)
    with pytest.raises(OutboxFull):
        await refusing.wait_for_room(refusing[0])
    assert not await refusing.wait_for_room_in([refusing[0]])  # each event is refused by itself
    assert refusing.statistics(28).rejected == 1
    dropping = outboxes_of(gate, on_full="drop_oldest")
    fill(dropping, dropping[0], 28)
    await dropping.wait_for_room(dropping[0])
    ledger = dropping.ledger(28)
    assert (ledger.dropped, ledger.in_flight, ledger.handled) == (4, 24, 0)


async def test_a_larger_bound_is_a_value(gate: Gate) -> None:
    outboxes = outboxes_of(gate, bound=Bound(events_max=100, bytes_max=10**6))
    fill(outboxes, outboxes[0], 100)
    assert outboxes.has_room()
    fill(outboxes, outboxes[0], 4)
    assert not outboxes.has_room()


async def test_a_client_that_is_shut_has_no_room_and_places_no_new_key(gate: Gate) -> None:
    outboxes = outboxes_of(gate)
    assert outboxes.of("a") is outboxes[0]
    gate.begin_closing()
    assert not outboxes.has_room()
    assert outboxes.of("a") is outboxes[0]
    with pytest.raises(ClientClosed):
        outboxes.of("b")
    assert outboxes.remember("b") is outboxes[0]  # for who gave a promise before


async def test_what_publishers_keep_is_the_same_when_the_bus_came_back_with_other_shards(gate: Gate) -> None:
    outboxes = outboxes_of(gate)
    by_key, before = outboxes.by_key, outboxes.of("a")
    outboxes.forget()
    outboxes.follow(table(2))
    assert outboxes.by_key is by_key
    assert len(outboxes) == 2
    assert outboxes.keyless is outboxes[0]
    assert outboxes.present(before, "a") is outboxes[outboxes.shard_of("a")]
    assert outboxes.present(before, None) is outboxes.keyless


async def test_pressure_is_told_on_the_way_up_and_on_the_way_down(gate: Gate) -> None:
    told: list[bool] = []
    outboxes = outboxes_of(gate, on_pressure=told.append)
    fill(outboxes, outboxes[0], 24)
    await asyncio.sleep(0)
    assert told == [True]
    while outboxes[0].session.drop_oldest():
        outboxes.feel_pressure()
    await asyncio.sleep(0)
    assert told == [True, False]
