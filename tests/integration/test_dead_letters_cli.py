"""`shardbus dead-letters` against a real bus."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from buses import APPLICATION, RunningBus

import shardbus

MakeBus = Callable[..., RunningBus]

_space: dict[str, object] = {}
exec(compile(APPLICATION, "accounts.py", "exec"), _space)  # noqa: S102 - the same message types as the served application
Stumbled = _space["Stumbled"]


async def stumble(bus: RunningBus, count: int) -> None:
    async with shardbus.connect(bus.address) as client:
        for number in range(count):
            await client.publish(Stumbled(account=f"a{number % 7}"))
        assert (await client.flush(60)).dead == count


async def test_dead_letters_are_listed_shown_exported_redriven_and_purged(make_bus: MakeBus, tmp_path: Path) -> None:
    bus = make_bus("--workers", "2")
    bus.wait_ready()
    await stumble(bus, 21)

    def run(*arguments: str, code: int = 0) -> str:
        done = bus.shardbus("dead-letters", *arguments)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    listed = run("list")
    assert "21 × Stumbled: failed in accounts.stumble" in listed
    assert "21 dead letters" in listed
    assert "3 dead letters" in run("list", "--key", "a1", "--reason", "failed", "--handler", "accounts.stumble")
    assert "0 dead letters" in run("list", "--type", "Added")
    assert "0 dead letters" in run("list", "--key", "int:1")
    letters = json.loads(run("list", "--json", "--since", "1h"))
    assert {letter["event"]["account"] for letter in letters} == {f"a{number}" for number in range(7)}
    shown = run("show", letters[0]["id"])
    assert "ValueError" in shown
    assert "in stumble" in shown
    assert json.loads(run("show", letters[0]["id"], "--json"))["attempts"] == 3

    out = tmp_path / "dead.jsonl"
    run("export", str(out))
    assert sorted(json.loads(line)["id"] for line in out.read_text().splitlines()) == sorted(one["id"] for one in letters)

    assert "name dead letters by ID" in run("purge", code=2)
    assert "name dead letters by ID" in run("redrive", "--all", "--key", "a1", code=2)
    assert run("purge", "--key", "a1", "--dry-run") == "3 would be purged\n"
    assert run("purge", "--key", "a1") == "3 purged\n"
    assert run("redrive", letters[0]["id"], letters[1]["id"], "--dry-run").endswith("would be redriven\n")
    assert run("redrive", "--all", "--rate", "1000") == "18 redriven\n"
    while len(again := json.loads(run("list", "--json"))) < 18:  # noqa: ASYNC110 - the test ends by its time-out
        await asyncio.sleep(0.05)
    assert {letter["attempts"] for letter in again} == {6}
    assert run("purge", "--all") == "18 purged\n"
    assert "no dead letter has the id" in run("show", letters[0]["id"], code=1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("show", "nonsense"), "is no id of a dead letter"),
        (("list", "--since", "yesterday"), "is no time"),
        (("list", "--key", "int:x"), "'x' is no int"),
        (("purge", "--key", "uuid:1"), "'1' is no uuid"),
        (("redrive",), "or else say --all"),
        (("list", "--key", "x" * 2000), "more than 1,024 bytes"),
    ],
)
def test_what_is_asked_wrongly_is_told_in_a_line(make_bus: MakeBus, arguments: tuple[str, ...], told: str) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    done = bus.shardbus("dead-letters", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
