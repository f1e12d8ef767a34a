"""Batch handlers: what they are called with, and what becomes of each event, whatever fails."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from shardbus import (
    Breaker,
    Bus,
    Client,
    Command,
    CommandFailed,
    Context,
    Event,
    RegistrationError,
    Retry,
    UsageError,
)
from shardbus.local import run_local
from shardbus.testing import MemoryRows, MemoryStore

FAST = Retry(base_s=0.001)


class Step(Event, key="key"):
    key: str
    n: int = 0
    kind: str = ""


class Other(Event, key="key"):
    key: str
    n: int = 0


class Loose(Event):
    n: int = 0


class Ask(Command[int], key="key"):
    key: str


Run = Callable[[Bus], AbstractAsyncContextManager[Client]]


@pytest.fixture
def bus() -> Bus:
    return Bus("batches")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what it looks at tells nobody
            await asyncio.sleep(0.001)


def dead(rows: MemoryRows) -> list[tuple[int, str, str]]:
    return sorted((row.envelope.seq, row.reason, row.error) for row in rows.dead.values())


# -- what they are called with


async def test_it_gets_what_is_there_each_keys_in_order(bus: Bus, run: Run):
    sizes: list[int] = []
    seen: dict[str, list[int]] = defaultdict(list)

    @bus.on(Step, batch=64)
    async def step(events: list[Step]) -> None:
        sizes.append(len(events))
        for event in events:
            seen[event.key].append(event.n)
        await asyncio.sleep(0)

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{n % 7}", n=n) for n in range(1000)])
        ledger = await client.flush(10)
    assert ledger.handled == 1000
    assert max(sizes) == 64
    assert len(sizes) < 50
    assert all(numbers == sorted(numbers) for numbers in seen.values())
    assert sum(map(len, seen.values())) == 1000


async def test_rows_that_came_together_are_not_taken_apart_to_fill_a_call(bus: Bus, run: Run):
    calls: list[list[Step]] = []

    @bus.on(Step, batch=64)
    def step(events: list[Step]) -> None:
        calls.append(events)

    async with run(bus) as client:
        for first in range(0, 3000, 100):
            await client.publish_many([Step(key=f"k{n % 7}", n=n) for n in range(first, first + 100)])
            if first % 600 == 500:
                await asyncio.sleep(0)
        assert (await client.flush(10)).handled == 3000
    sizes = [len(events) for events in calls]
    assert min(sizes) >= 32  # half of what a call takes is enough
    assert any(size < 64 for size in sizes)
    assert [event.n for events in calls for event in events] == list(range(3000))


async def test_one_event_is_a_batch_and_nobody_waits_for_more(bus: Bus, run: Run):
    batches: list[int] = []
    bus.on(Step, batch=4096)(lambda events: batches.append(len(events)))
    async with run(bus) as client:
        await client.publish(Step(key="a"))
        await client.flush(10)
    assert batches == [1]


async def test_a_batch_that_lingers_departs_when_it_is_full_or_its_time_is_over(bus: Bus, run: Run):
    batches: list[list[int]] = []

    @bus.on(Step, batch=3, linger_s=1.0)
    async def step(events: list[Step]) -> None:
        batches.append([event.n for event in events])

    async with run(bus) as client:
        for n in range(4):
            await client.publish(Step(key=f"k{n}", n=n))
        await until(lambda: batches)
        assert batches == [[0, 1, 2]]
        await client.publish(Step(key="k3", n=4))
        assert (await client.flush(10)).handled == 5
    assert batches == [[0, 1, 2], [3, 4]]


async def test_a_bus_that_ends_waits_for_nothing_that_lingers(bus: Bus, rows: MemoryRows):
    batches: list[int] = []

    @bus.on(Step, batch=3, linger_s=60.0)
    async def step(events: list[Step]) -> None:
        batches.append(len(events))

    async with asyncio.timeout(20):
        async with run_local(bus, stores=[MemoryStore(rows)], close_timeout_s=0.5) as client:
            await client.publish(Step(key="k"))
            await until(lambda: client.ledger().in_flight)
            shard = client._connector._bus.shards[0]  # type: ignore[attr-defined]
            await until(lambda: shard.backlog)
            assert await shard.drain(10) == []
    assert batches == [1]


async def test_by_key_a_batch_has_one_key(bus: Bus, run: Run):
    batches: list[set[str]] = []
    count = 0

    @bus.on(Step, batch=100, batch_by="key")
    async def step(events: list[Step]) -> None:
        nonlocal count
        batches.append({event.key for event in events})
        count += len(events)

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{n % 5}", n=n) for n in range(500)])
        await client.flush(10)
    assert count == 500
    assert all(len(keys) == 1 for keys in batches)
    assert len(batches) < 100


async def test_it_gets_a_context_for_each_and_may_be_plain_or_in_a_thread(bus: Bus, run: Run):
    seen: list[tuple[int, str | None, int]] = []

    @bus.on(Step, batch=10, in_thread=True)
    def step(events: list[Step], contexts: list[Context]) -> None:
        for event, context in zip(events, contexts, strict=True):
            assert context.key == event.key
            seen.append((event.n, context.headers.get("at"), context.attempt))

    async with run(bus) as client:
        for n in range(20):
            await client.publish(Step(key=f"k{n % 3}", n=n), headers={"at": str(n)})
        await client.flush(10)
    assert sorted(seen) == [(n, str(n), 1) for n in range(20)]


async def test_events_without_a_key_and_of_several_types_gather_too(bus: Bus, run: Run):
    sizes: dict[str, list[int]] = defaultdict(list)

    @bus.on(Loose, Other, batch=50)
    async def both(events: list[Any]) -> None:
        assert len({type(event) for event in events}) == 1
        sizes[type(events[0]).__name__].append(len(events))
        await asyncio.sleep(0)

    async with run(bus) as client:
        for n in range(200):
            await client.publish(Loose(n=n))
            await client.publish(Other(key=f"k{n}"))
        assert (await client.flush(10)).handled == 400
    assert {name: sum(one) for name, one in sizes.items()} == {"Loose": 200, "Other": 200}
    assert all(len(one) < 100 for one in sizes.values())


async def test_a_filter_is_asked_of_each_and_others_count_as_handled(bus: Bus, run: Run):
    seen: list[int] = []

    @bus.on(Step, batch=10, where=lambda event: event.n % 2)
    async def step(events: list[Step]) -> None:
        seen.extend(event.n for event in events)

    async with run(bus) as client:
        await client.publish_many([Step(key="k", n=n) for n in range(10)])
        assert (await client.flush(10)).handled == 10
    assert seen == [1, 3, 5, 7, 9]


async def test_while_it_is_suspended_other_keys_go_on_and_its_own_wait(bus: Bus, run: Run):
    go_on, seen = asyncio.Event(), list[tuple[str, int]]()

    @bus.on(Step, batch=2)
    async def step(events: list[Step]) -> None:
        if events[0].kind == "waits":
            await go_on.wait()
        seen.extend((event.key, event.n) for event in events)

    @bus.on(Other)
    async def other(event: Other) -> None:
        seen.append((event.key, event.n))

    async with run(bus) as client:
        await client.publish(Step(key="a", n=0, kind="waits"))
        await client.publish(Step(key="b", n=0))
        await until(lambda: client._connector._bus.shards[0].lanes.busy_keys == 2)  # type: ignore[attr-defined]
        await client.publish(Other(key="a", n=1))
        await client.publish(Other(key="c", n=1))
        await client.publish(Step(key="c", n=2))
        await client.publish(Step(key="d", n=2))
        await until(lambda: len(seen) == 3)
        assert seen == [("c", 1), ("c", 2), ("d", 2)]
        go_on.set()
        await client.flush(10)
    assert seen[3:] == [("a", 0), ("b", 0), ("a", 1)]


async def test_a_command_takes_its_place_behind_the_earlier_events_of_its_key(bus: Bus, run: Run):
    totals: dict[str, int] = defaultdict(int)

    @bus.on(Step, batch=16)
    async def step(events: list[Step]) -> None:
        for event in events:
            totals[event.key] += 1
        await asyncio.sleep(0.001)

    @bus.command(Ask)
    async def ask(command: Ask) -> int:
        return totals[command.key]

    async with run(bus) as client:
        asked = []
        for n in range(1, 101):
            for key in "abc":
                await client.publish(Step(key=key, n=n))
                if n % 10 == 0:
                    asked.append((n, asyncio.create_task(client.execute(Ask(key=key)))))
                    await asyncio.sleep(0)
        for n, task in asked:
            assert await task == n


# -- what becomes of them


async def test_only_what_failed_is_called_again_and_by_itself(bus: Bus, run: Run, rows: MemoryRows):
    calls: list[list[tuple[int, int]]] = []

    @bus.on(Step, batch=10, linger_s=5.0, retry=FAST)
    async def step(events: list[Step], contexts: list[Context]) -> list[Exception | None]:
        calls.append([(event.n, context.attempt) for event, context in zip(events, contexts, strict=True)])
        return [ValueError(f"{event.n} is bad") if event.n == 3 else None for event in events]

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{n}", n=n) for n in range(10)])
        await until(lambda: client.ledger().dead)
        assert client.ledger().handled == 9
    assert calls == [[(n, 1) for n in range(10)], [(3, 2)], [(3, 3)]]
    assert dead(rows) == [(3, "failed", "3 is bad")]
    [letter] = rows.dead.values()
    assert (letter.error_type, letter.handlers[0].rpartition(".")[2]) == ("ValueError", "step")


async def test_where_it_raises_each_is_called_again_alone_and_only_the_bad_one_dies(bus: Bus, run: Run, rows: MemoryRows):
    calls: list[list[int]] = []

    @bus.on(Step, batch=10, retry=FAST)
    async def step(events: list[Step]) -> None:
        calls.append([event.n for event in events])
        if any(event.n == 3 for event in events):
            raise ValueError("one of them")

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{n % 3}", n=n) for n in range(9)])
        await until(lambda: client.ledger().dead)
        await client.flush(10)
        assert client.ledger().handled == 8
    assert calls[0] == list(range(9))
    assert all(len(call) == 1 for call in calls[1:])
    assert sorted(call[0] for call in calls[1:]) == [0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8]  # behind 0, 3 had not failed
    assert dead(rows) == [(3, "failed", "one of them")]


@pytest.mark.parametrize(
    ("retry", "error"),
    [(Retry(attempts=3, base_s=0.001, on=ConnectionError), ValueError), (FAST, SystemExit), (FAST, KeyboardInterrupt)],
)
async def test_an_error_that_is_not_retried_is_laid_on_nobody_before_it_was_called_alone(
    bus: Bus, run: Run, rows: MemoryRows, retry: Retry, error: type[BaseException]
):
    @bus.on(Step, batch=10, retry=retry)
    async def step(events: list[Step]) -> None:
        if any(event.n == 3 for event in events):
            raise error("one of them")

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{n}", n=n) for n in range(9)])
        ledger = await client.flush(10)
    assert (ledger.handled, ledger.dead) == (8, 1)
    assert dead(rows) == [(3, "failed", "one of them")]


async def test_without_retries_all_of_a_call_that_raised_are_dead(bus: Bus, run: Run, rows: MemoryRows):
    @bus.on(Step, batch=10, retry=Retry(attempts=1))
    def step(events: list[Step]) -> None:
        raise ValueError("no")

    async with run(bus) as client:
        await client.publish_many([Step(key="k", n=n) for n in range(10)])
        assert (await client.flush(10)).dead == 10
    assert dead(rows) == [(n, "failed", "no") for n in range(10)]


async def test_an_answer_of_the_wrong_length_is_a_failure_of_all(bus: Bus, run: Run, rows: MemoryRows):
    @bus.on(Step, batch=10, retry=Retry(attempts=1))
    def step(events: list[Step]) -> list[None]:
        return [None] * (len(events) + 1)

    async with run(bus) as client:
        await client.publish_many([Step(key="k", n=n) for n in range(3)])
        assert (await client.flush(10)).dead == 3
    assert all("was called with 3 events and returned a list of 4" in error for _, _, error in dead(rows))


async def test_a_call_that_takes_too_long_is_a_failure_of_all_of_its_events(bus: Bus, run: Run, rows: MemoryRows):
    calls: list[int] = []

    @bus.on(Step, batch=10, timeout_s=0.02, retry=FAST)
    async def step(events: list[Step]) -> None:
        calls.append(len(events))
        if len(events) > 1:
            await asyncio.sleep(10)

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{n}", n=n) for n in range(5)])
        assert (await client.flush(10)).handled == 5
    assert calls == [5, 1, 1, 1, 1, 1]


async def test_behind_an_event_that_is_called_again_those_of_its_key_come_again_and_no_others(bus: Bus, run: Run):
    calls: list[list[tuple[str, int, int]]] = []

    @bus.on(Step, batch=8, linger_s=0.3, retry=FAST)
    async def step(events: list[Step], contexts: list[Context]) -> list[Exception | None]:
        calls.append([(one.key, one.n, its.attempt) for one, its in zip(events, contexts, strict=True)])
        return [ValueError() if called == ("a", 2, 1) else None for called in calls[-1]]

    async with run(bus) as client:
        await client.publish_many([Step(key=key, n=n) for n in range(1, 5) for key in "ab"])
        assert (await client.flush(10)).handled == 8
    assert calls == [
        [(key, n, 1) for n in range(1, 5) for key in "ab"],
        [("a", 2, 2)],
        [("a", 3, 2), ("a", 4, 2)],
    ]


async def test_an_event_that_does_not_decode_costs_only_itself(bus: Bus, run: Run, rows: MemoryRows):
    seen: list[int] = []

    @bus.on(Step, batch=10, retry=FAST)
    async def step(events: list[Step]) -> None:
        seen.extend(event.n for event in events)

    async with run(bus) as client:
        await client.publish_many([Step(key="k", n="x" if n == 2 else n) for n in range(5)])  # type: ignore[arg-type]
        ledger = await client.flush(10)
    assert (ledger.handled, ledger.dead, seen) == (4, 1, [0, 1, 3, 4])
    assert [reason for _, reason, _ in dead(rows)] == ["undecodable"]


async def test_what_is_too_late_when_its_batch_begins_is_not_in_it(bus: Bus, run: Run, rows: MemoryRows):
    seen: list[int] = []

    @bus.on(Step, batch=10, linger_s=0.1)
    async def step(events: list[Step]) -> None:
        seen.extend(event.n for event in events)

    async with run(bus) as client:
        for n in range(4):
            await client.publish(Step(key="k", n=n), deadline=0.01 if n == 2 else 60.0)
        ledger = await client.flush(10)
    assert (ledger.handled, ledger.dead, seen) == (3, 1, [0, 1, 3])
    assert [reason for _, reason, _ in dead(rows)] == ["expired"]


async def test_a_circuit_counts_calls_and_what_it_holds_up_is_a_batch_again(bus: Bus, run: Run):
    sizes: list[int] = []
    broken = True

    @bus.on(Step, batch=10, retry=Retry(attempts=5, base_s=0.001), breaker=Breaker(failures=1, open_s=0.4, successes=1))
    async def step(events: list[Step]) -> None:
        sizes.append(len(events))
        if broken:
            raise ConnectionError

    async with run(bus) as client:
        await client.publish(Step(key="first"))
        await until(lambda: sizes)
        await client.publish_many([Step(key="k", n=n) for n in range(10)])
        await asyncio.sleep(0.02)
        assert len(sizes) == 1
        broken = False
        assert (await client.flush(10)).handled == 11
    assert sorted(sizes) == [1, 1, 10]


async def test_a_key_parks_behind_an_event_that_gave_up_and_what_came_with_it_waits(bus: Bus, run: Run):
    handled: list[int] = []
    mended = False

    @bus.on(Step, batch=10, retry=Retry(attempts=1), on_dead_letter="park")
    async def step(events: list[Step]) -> list[Exception | None]:
        outcomes = [ValueError() if event.n == 2 and not mended else None for event in events]
        first = next((at for at, one in enumerate(outcomes) if one is not None), len(events))
        handled.extend(event.n for event in events[:first])
        return outcomes

    async with run(bus) as client:
        await client.publish_many([Step(key="k", n=n) for n in range(6)])
        ledger = await client.flush(10)
        assert (ledger.handled, ledger.dead, ledger.waiting) == (2, 1, 3)
        mended = True
        await client.redrive()
        await until(lambda: len(handled) == 6)
    assert handled == list(range(6))


async def test_what_a_batch_left_unfinished_is_handled_by_the_next_bus_over_the_same_store(bus: Bus, rows: MemoryRows):
    calls: list[list[int]] = []

    # The delay is anything up to that; it must be far more than a second.
    @bus.on(Step, batch=10, retry=Retry(attempts=2, base_s=1e9, cap_s=1e9))
    async def step(events: list[Step]) -> list[Exception | None]:
        calls.append([event.n for event in events])
        return [ValueError() if event.n == 1 and len(calls) == 1 else None for event in events]

    async with run_local(bus, stores=[MemoryStore(rows)]) as client:
        await client.publish_many([Step(key="k", n=n) for n in range(4)])
        ledger = await client.flush(10)
        assert (ledger.handled, ledger.waiting) == (1, 3)
    assert [row.envelope.attempt for row in rows.waiting.values()] == [2, 2, 2]


async def test_cancellation_from_inside_is_a_failure_and_the_bus_goes_on(bus: Bus, run: Run):
    calls: list[int] = []

    @bus.on(Step, batch=10, retry=FAST)
    async def step(events: list[Step]) -> None:
        calls.append(len(events))
        if len(calls) == 1:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(1)

    async with run(bus) as client:
        await client.publish_many([Step(key=f"k{n}") for n in range(4)])
        assert (await client.flush(10)).handled == 4
    assert calls == [4, 1, 1, 1, 1]


async def test_evidence_is_that_of_single_events(bus: Bus, run: Run):
    @bus.on(Step, batch=32, retry=FAST)
    async def step(events: list[Step], contexts: list[Context]) -> list[Exception | None]:
        await asyncio.sleep(0)
        attempts = [context.attempt for context in contexts]
        return [ValueError() if one.n % 7 == 0 and at == 1 else None for one, at in zip(events, attempts, strict=True)]

    async with run(bus) as client:
        loop = asyncio.get_running_loop()
        ordinals: dict[str, int] = defaultdict(int)
        for n in range(300):
            key = f"k{n % 5}"
            ordinals[key] += 1
            await client.publish(Step(key=key, n=n), ordinal=ordinals[key], intended_ns=int(loop.time() * 1e9))
        assert (await client.flush(10)).handled == 300
        [evidence] = await client.evidence([client.publisher])
    assert (evidence.distinct, evidence.missing, evidence.out_of_order) == (300, 0, 0)
    assert evidence.repeats == evidence.announced


# -- order, by a model


@pytest.mark.parametrize("seed", range(60))
async def test_whatever_fails_each_key_has_its_outcomes_in_order(seed: int, rows: MemoryRows):
    """Kinds of events: what a handler does with them follows from kind and call, so a model knows every outcome."""
    chance = random.Random(seed)
    bus = Bus("model")
    policy: dict[str, Any] = {
        "batch": chance.choice([2, 3, 16]),
        "batch_by": chance.choice(["type", "type", "key"]),
        "linger_s": chance.choice([0.0, 0.0, 0.002]),
        "retry": Retry(attempts=3, base_s=chance.choice([0.0, 0.002])),
    }
    raises = chance.random() < 0.4
    suspends = chance.choice([0.0, 0.5, 1.0])
    calls: dict[tuple[str, int], int] = defaultdict(int)
    first_calls: dict[str, list[int]] = defaultdict(list)
    failures: dict[tuple[str, int], int] = defaultdict(int)
    order: dict[str, list[int]] = defaultdict(list)  # in which they reached their outcomes

    @bus.on(Step, **policy)
    async def step(events: list[Step], contexts: list[Context]) -> list[Exception | None] | None:
        if chance.random() < suspends:
            await asyncio.sleep(chance.random() * 0.002)
        outcomes: list[Exception | None] = []
        for event, context in zip(events, contexts, strict=True):
            known = calls[event.key, event.n]
            assert context.attempt == known + 1  # it was never called without saying so
            calls[event.key, event.n] += 1
            if not known:
                first_calls[event.key].append(event.n)
            fails = event.kind == "bad" or (event.kind == "flaky" and known == 0)
            outcomes.append(ValueError(event.kind) if fails else None)
        raised = next((one for one in outcomes if one is not None), None) if raises else None
        waiting: set[str] = set()
        for event, outcome in zip(events, outcomes, strict=True):
            if event.key in waiting:
                continue
            if outcome is not None or raised is not None:
                failures[event.key, event.n] += 1
                if failures[event.key, event.n] < 3:
                    waiting.add(event.key)
                    continue
            order[event.key].append(event.n)
        if raised is not None:
            raise raised
        return outcomes

    @bus.on(Other)
    async def other(event: Other) -> None:
        if chance.random() < suspends:
            await asyncio.sleep(0)
        order[event.key].append(event.n)

    @bus.command(Ask)
    def ask(command: Ask) -> int:
        return len(order[command.key])

    keys = [f"k{at}" for at in range(chance.choice([1, 3, 10]))]
    sent: dict[str, int] = defaultdict(int)
    bad = 0
    asked = []
    async with run_local(bus, stores=[MemoryStore(rows)]) as client:
        for _ in range(150):
            key = chance.choice(keys)
            sent[key] += 1
            if chance.random() < 0.15:
                await client.publish(Other(key=key, n=sent[key]))
            else:
                kind = chance.choices(["good", "flaky", "bad"], [85, 8, 7])[0]
                bad += kind == "bad"
                await client.publish(Step(key=key, n=sent[key], kind=kind))
            if chance.random() < 0.05:
                asked.append((sent[key], asyncio.create_task(client.execute(Ask(key=key), timeout=30))))
                await asyncio.sleep(0)
            if chance.random() < 0.1:
                await asyncio.sleep(chance.random() * 0.003)
        for count, task in asked:
            assert await task == count
        ledger = await client.flush(30)
        await until(client._connector._bus.shards[0].lanes.idle)  # type: ignore[attr-defined]
    assert (ledger.handled + ledger.dead + ledger.waiting, len(rows.dead)) == (150, bad)
    for key in keys:
        assert first_calls[key] == sorted(first_calls[key])
        assert order[key] == list(range(1, sent[key] + 1))
    assert not rows.waiting


# -- what its handlers send


async def test_a_command_of_a_key_in_the_batch_is_refused_at_once_and_of_another_is_executed(bus: Bus, run: Run):
    told: list[str] = []
    replies: list[int] = []

    @bus.on(Step, batch=3, linger_s=60.0)
    async def step(events: list[Step], contexts: list[Context]) -> None:
        for context in (contexts[0], contexts[0].with_headers({"a": "b"})):
            for event in events:
                with pytest.raises(UsageError) as raised:
                    await context.execute(Ask(key=event.key), timeout=3600)
                told.append(str(raised.value))
            replies.append(await context.execute(Ask(key="elsewhere"), timeout=3600))

    @bus.command(Ask)
    async def answer(command: Ask) -> int:
        return 7

    async with run(bus) as client:
        await client.publish_many([Step(key=key) for key in ("a", "b", "c")])
        assert (await client.flush(10)).handled == 3
    assert replies == [7, 7]
    assert [line.partition(" and ")[0] for line in told] == 2 * [
        f"Ask has the key {key!r} of an event of the batch that is being handled," for key in ("a", "b", "c")
    ]
    assert all("Call what that command's handler calls, or publish an event" in line for line in told)


class Through(Command[int], key="key"):
    """Its handler executes a command of the key `to`."""

    key: str
    to: str


async def test_a_ring_through_another_key_of_the_batch_is_refused_where_it_would_close(bus: Bus, run: Run):
    told: list[str] = []

    @bus.on(Step, batch=3, linger_s=60.0)
    async def step(events: list[Step], contexts: list[Context]) -> None:
        with pytest.raises(CommandFailed) as raised:
            await contexts[0].execute(Through(key="elsewhere", to=events[-1].key), timeout=3600)
        told.append(raised.value.error)

    @bus.command(Through)
    async def through(command: Through, context: Context) -> int:
        return await context.execute(Ask(key=command.to), timeout=3600)

    bus.command(Ask)(lambda command: 7)
    async with run(bus) as client:
        await client.publish_many([Step(key=key) for key in ("a", "b", "c")])
        assert (await client.flush(10)).handled == 3
    assert [line.partition(",")[0] for line in told] == [
        "Ask would close a ring: its key 'c' is held by a handler that waits"
    ]


# -- middleware


async def test_a_middleware_may_leave_out_what_goes_together(bus: Bus, run: Run):
    around: list[str] = []

    async def middleware(message: Any, context: Context, call_next: Any) -> Any:
        around.append(type(message).__name__)
        return await call_next(message, context)

    bus.on(Step, batch=8)(lambda events: None)
    with pytest.raises(RegistrationError, match=r"Step has a batch handler, .* say bus\.use\(…, skip_batches=True\)"):
        bus.use(middleware)
    bus.use(middleware, skip_batches=True)
    bus.on(Other)(lambda event: None)
    bus.on(Loose, batch=8)(lambda events: None)
    async with run(bus) as client:
        for event in (Step(key="a"), Other(key="a"), Loose()):
            await client.publish(event)
        assert (await client.flush(10)).handled == 3
    assert around == ["Other"]


def test_a_batch_handler_behind_a_middleware_for_all_is_refused_with_what_to_say(bus: Bus):
    async def middleware(message: Any, context: Context, call_next: Any) -> Any:
        return await call_next(message, context)

    bus.use(middleware)
    with pytest.raises(RegistrationError, match="to have it around all others, or name its types"):
        bus.on(Step, batch=8)
