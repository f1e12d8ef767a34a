"""Events whose handling kills their worker, with real processes: who did it becomes a dead letter, and nobody else."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable

import pytest
from buses import RunningBus

import shardbus

MakeBus = Callable[..., RunningBus]

CRASHING = """
import asyncio
import ctypes
import os
import signal
import threading
import time
from collections.abc import AsyncIterator

from shardbus import Bus, Command, Context, Event, Retry


class Step(Event, key="walk"):
    walk: str
    how: str = ""
    sleeps_s: float = 0.0


class Loose(Event):
    how: str = ""


class Split(Event, key="path"):
    path: str


class End(Command[None], key="walk"):
    walk: str


class Copies(Command[int], key="walk"):
    walk: str


bus = Bus("crashing")
tasks: list[asyncio.Task[None]] = []


async def stay() -> None:
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass


def end(how: str) -> None:
    if how == "abort":
        os.abort()
    elif how == "exit":
        os._exit(3)
    elif how == "exit 0":
        os._exit(0)
    elif how == "segv":
        ctypes.string_at(0)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "late":
        threading.Thread(target=lambda: (time.sleep(0.005), os.abort())).start()
        raise ValueError("before the damage shows")
    elif how == "fork":
        os.fork()
    elif how == "leave a callback":
        asyncio.get_running_loop().call_soon(os.abort)
    elif how == "leave a task":
        tasks.append(asyncio.get_running_loop().create_task(stay()))


@bus.on(Step, retry=Retry(attempts=50, cap_s=0.5))  # it is not given up in the 5 ms before the worker aborts
async def step(event: Step, context: Context) -> None:
    if event.sleeps_s:
        await asyncio.sleep(event.sleeps_s)
    end(event.how)


@bus.on(Loose)
def loose(event: Loose) -> None:
    end(event.how)


@bus.on(Split, priority=1)
def split(event: Split) -> None:
    os.fork()


@bus.on(Split)
def note(event: Split) -> None:
    with open(event.path, "a") as notes:
        notes.write("once\\n")


@bus.command(End)
def end_all(command: End) -> None:
    os.abort()


@bus.command(Copies)
async def copies(command: Copies) -> AsyncIterator[int]:
    yield -1  # is to be sent when the copy is made
    copy = os.fork()
    yield os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) if copy else -2
"""
_space: dict[str, object] = {}
exec(compile(CRASHING, "crashing.py", "exec"), _space)  # noqa: S102 - the same message types as the served application
Step, Loose, Split, End, Copies = (_space[name] for name in ("Step", "Loose", "Split", "End", "Copies"))


def crashing(make_bus: MakeBus, *arguments: str) -> RunningBus:
    bus = make_bus(*arguments, application="crashing:nothing")
    bus.close()
    (bus.directory / "crashing.py").write_text(CRASHING)
    bus._command[bus._command.index("crashing:nothing")] = "crashing:bus"
    bus.start()
    bus.wait_ready()
    return bus


async def publish(client: shardbus.Client, count: int, keys: int, poison: dict[int, str]) -> None:
    """So many stamped events; where a number is in `poison`, one with that way of ending its worker."""
    ordinals = [0] * keys
    for number in range(count):
        key = number * 7 % keys
        ordinals[key] += 1
        await client.publish(Step(walk=f"w{key}", how=poison.get(number, "")), ordinal=ordinals[key])


async def check(client: shardbus.Client, published: int, dead: int, restarts_max: int) -> list[shardbus.DeadLetter]:
    ledger = await client.flush(60)
    assert (ledger.published, ledger.dead, ledger.in_flight) == (published, dead, 0)
    assert ledger.handled + ledger.waiting == published - dead
    workers = (await client.status())["workers"]
    while any(worker["waiting"] or worker["suspects"] or worker["state"] != "up" for worker in workers):
        await asyncio.sleep(0.1)
        workers = (await client.status())["workers"]
    letters = await client.dead_letters()
    assert [letter.reason for letter in letters] == ["crashed"] * dead
    assert all(worker["quarantined"] == 0 for worker in workers)
    assert sum(worker["restarts"] for worker in workers) <= restarts_max
    return letters


async def check_evidence(client: shardbus.Client, published: int, dead: int) -> None:
    evidence = await client.evidence([client.publisher])
    assert sum(one.distinct for one in evidence) == published
    assert sum(one.missing for one in evidence) == 0
    assert sum(one.out_of_order for one in evidence) == 0
    assert sum(one.repeats for one in evidence) == sum(one.announced for one in evidence)
    assert sum(one.dead for one in evidence) >= dead  # one that was not committed yet when the next crash came counts again


@pytest.mark.parametrize("poison", [{5_000: "abort"}, {4_000: "abort", 4_001: "abort", 4_070: "abort"}])
async def test_of_ten_thousand_events_only_those_that_abort_become_dead_letters(
    make_bus: MakeBus, poison: dict[int, str]
) -> None:
    bus = crashing(make_bus, "--workers", "2")
    published = 10_000 + len(poison)
    async with shardbus.connect(bus.address) as client:
        await publish(client, published, 100, poison)
        letters = await check(client, published, len(poison), 3 * len(poison))
        await check_evidence(client, published, len(poison))
        assert all("SIGABRT" in letter.error for letter in letters)
        assert sorted(letter.key for letter in letters) == sorted(f"w{number * 7 % 100}" for number in poison)
        assert all(letter.handlers == ("crashing.step",) for letter in letters)
    _, errors = bus.end()
    assert errors.count("dead letter: Step") >= len(poison)  # again where a crash came before it was committed


@pytest.mark.parametrize(
    ("how", "told", "restarts_max"),
    [("exit", "exit code 3", 3), ("exit 0", "exit code 0", 3), ("segv", "SIGSEGV", 3), ("kill", "SIGKILL", 12)],
)
async def test_the_dead_letter_says_how_the_worker_ended(
    make_bus: MakeBus, how: str, told: str, restarts_max: int
) -> None:
    bus = crashing(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address) as client:
        await publish(client, 500, 10, {100: how})
        [letter] = await check(client, 500, 1, restarts_max)
        assert told in letter.error
        await check_evidence(client, 500, 1)


async def test_an_event_that_aborts_after_it_awaited_is_found_among_others_that_sleep(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address) as client:
        for number in range(200):
            how = "abort" if number == 77 else ""
            await client.publish(Step(walk=f"w{number}", how=how, sleeps_s=0.1 if how else 0.5))
        [letter] = await check(client, 200, 1, 6)
        assert letter.key == "w77"


async def test_an_event_without_a_key_and_a_plain_handler_are_found_too(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address) as client:
        await client.publish_many([Loose(how="abort" if number == 300 else "") for number in range(600)])
        [letter] = await check(client, 600, 1, 3)
        assert letter.key is None


async def test_an_event_that_waited_in_the_store_is_found_and_its_key_goes_on(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address) as client:
        await client.publish(Step(walk="w", sleeps_s=1.5), ordinal=1)
        for ordinal in range(2, 3001):
            await client.publish(Step(walk="w", how="abort" if ordinal == 2500 else ""), ordinal=ordinal)
        assert (await client.flush(30)).waiting > 1000
        status = await client.status()
        while status["waiting"] or not status["dead_letters"]:
            await asyncio.sleep(0.1)
            status = await client.status()
        assert status["workers"][0]["restarts"] <= 3
        [letter] = await client.dead_letters()
        assert (letter.reason, letter.key) == ("crashed", "w")
        await check_evidence(client, 3000, 1)


async def test_what_is_redriven_has_a_clean_record(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address) as client:
        await publish(client, 50, 5, {20: "abort"})
        await check(client, 50, 1, 3)
        before = (await client.status())["workers"][0]["restarts"]
        assert await client.redrive() == 1
        while (await client.status())["workers"][0]["restarts"] < before + 2:  # noqa: ASYNC110 - ended by the time-out
            await asyncio.sleep(0.05)
        while not (await client.dead_letters()):  # noqa: ASYNC110 - ended by the time-out
            await asyncio.sleep(0.05)
        assert (await client.status())["workers"][0]["restarts"] == before + 2


async def test_a_command_that_aborts_is_not_repeated_and_accuses_nobody(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address) as client:
        await publish(client, 100, 10, {})
        with pytest.raises(shardbus.CommandLost):
            await client.execute(End(walk="w1"), timeout=30)
        await publish_more(client, 100)
        assert (await client.flush(30)).dead == 0
        assert (await client.status())["workers"][0]["restarts"] == 1


async def publish_more(client: shardbus.Client, count: int) -> None:
    for number in range(count):
        await client.publish(Step(walk=f"more{number}"))


async def test_kills_from_outside_accuse_nobody(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    chance = random.Random(5)
    async with shardbus.connect(bus.address) as client:
        for number in range(40):
            await client.publish(Step(walk=f"w{number}", sleeps_s=1.0))
        for number in range(10):
            worker = (await client.status())["workers"][0]
            await client.publish(Step(walk=f"quick{number}"))
            while (now := (await client.status())["workers"][0])["handled"] == worker["handled"] or not now["pid"]:  # noqa: ASYNC110
                await asyncio.sleep(chance.random() * 0.1)
            os.kill(now["pid"], signal.SIGKILL)
        assert (await client.flush(60)).handled == 50
        assert not await client.dead_letters()


async def test_one_that_fails_and_ends_its_worker_while_it_waits_for_its_retry_is_found(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address) as client:
        await publish(client, 200, 10, {100: "late"})
        [letter] = await check(client, 200, 1, 4)
        assert "SIGABRT" in letter.error
        await check_evidence(client, 200, 1)


async def test_crashes_of_nobodys_doing_are_told_and_waited_after_and_others_are_served(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address, close_timeout=0) as poisoned:
        await poisoned.publish(Step(walk="w", how="leave a callback"))  # its handler ends before the worker does
        while (await poisoned.status())["workers"][0]["restarts"] < 6:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.02)
        async with shardbus.connect(bus.address) as client:
            await client.publish(Step(walk="other"))
            assert (await client.flush(60)).handled == 1
        await poisoned.abort()
    _, errors = bus.end()
    assert "shard 0 has crashed 5 times in a row while none of its handlers ran: a task, a callback or a thread" in errors
    assert "shard 0 ended (SIGABRT); starting it again in 0.1 s" in errors
    assert "is given up" not in errors


async def test_a_copy_of_the_worker_that_a_handler_makes_handles_nothing(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address) as client:
        await publish(client, 500, 10, dict.fromkeys((100, 101, 250), "fork"))
        assert (await client.flush(60)).handled == 500
        await check_evidence(client, 500, 0)
        assert [worker["restarts"] for worker in (await client.status())["workers"]] == [0]


async def test_a_copy_ends_where_its_handler_is_left_though_something_was_to_be_sent(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address) as client:
        for _ in range(5):
            assert [item async for item in client.stream(Copies(walk="w"))] == [-1, 0]
    code, errors = bus.end()
    assert code == 0
    assert "Traceback" not in errors


async def test_a_copy_that_a_handler_makes_does_not_run_the_next_handler_of_its_event(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    notes = bus.directory / "notes"
    async with shardbus.connect(bus.address) as client:
        for _ in range(3):
            await client.publish(Split(path=str(notes)))
        assert (await client.flush(60)).handled == 3
    assert bus.end()[0] == 0
    assert notes.read_text() == "once\n" * 3


async def test_a_task_that_a_handler_leaves_behind_does_not_hold_up_the_end(make_bus: MakeBus) -> None:
    bus = crashing(make_bus, "--workers", "1")
    async with shardbus.connect(bus.address) as client:
        await publish(client, 20, 10, {10: "leave a task"})
        assert (await client.flush(60)).handled == 20
    assert bus.end()[0] == 0
