"""`shardbus dead-letters` and `status` against a real bus. As processes, commands are tested in `test_shell`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from buses import APPLICATION, PAYMENTS, RunningBus, wait_until

import shardbus

MakeBus = Callable[..., RunningBus]

_space: dict[str, object] = {}
exec(compile(APPLICATION, "accounts.py", "exec"), _space)  # noqa: S102 - the same message types as the served application
Stumbled = _space["Stumbled"]
exec(compile(PAYMENTS, "payments.py", "exec"), _space)  # noqa: S102 - likewise
Charged = _space["Charged"]


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
        done = bus.told("dead-letters", *arguments)
        assert done.exit_code == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    listed = run("list")
    assert "21 × Stumbled: failed in accounts.stumble" in listed
    assert "(the last message; 6 others)" in listed
    assert "21 dead letters" in listed
    assert "3 dead letters" in run("list", "--key", "a1", "--reason", "failed", "--handler", "accounts.stumble")
    assert run("list", "--type", "Added") == "0 dead letters match; there are the types Stumbled\n"
    assert run("list", "--handler", "stumble") == "0 dead letters match; there are the handlers accounts.stumble\n"
    assert run("list", "--key", "int:1") == "0 dead letters\n"
    nothing = "nothing matches; there are the types Stumbled"
    assert run("redrive", "--type", "Nope", "--dry-run") == f"0 would be redriven: {nothing}\n"
    assert run("redrive", "--type", "Nope") == f"0 redriven: {nothing}\n"
    assert run("purge", "--key", "none") == "0 purged: nothing matches\n"
    letters = json.loads(run("list", "--json", "--since", "1h"))
    assert {letter["event"]["account"] for letter in letters} == {f"a{number}" for number in range(7)}
    shown = run("show", letters[0]["id"])
    assert "ValueError" in shown
    assert "in stumble" in shown
    assert json.loads(run("show", letters[0]["id"], "--json"))["attempts"] == 3

    out = tmp_path / "dead.jsonl"
    run("export", str(out))
    assert out.stat().st_mode & 0o777 == 0o600  # it holds what events hold
    assert sorted(json.loads(line)["id"] for line in out.read_text().splitlines()) == sorted(one["id"] for one in letters)

    assert "name dead letters by ID" in run("purge", code=2)
    assert "name dead letters by ID" in run("redrive", "--all", "--key", "a1", code=2)
    assert run("purge", "--key", "a1", "--dry-run") == "3 would be purged\n"
    assert run("purge", "--key", "a1") == "3 purged\n"
    left = [letter["id"] for letter in letters if letter["event"]["account"] != "a1"]
    assert run("redrive", left[0], left[1], "--dry-run") == "2 would be redriven\n"
    assert run("redrive", "--all", "--rate", "1000") == "18 redriven\n"
    while len(again := json.loads(run("list", "--json"))) < 18:  # noqa: ASYNC110 - the test ends by its time-out
        await asyncio.sleep(0.05)
    assert {letter["attempts"] for letter in again} == {6}
    assert run("purge", "--all") == "18 purged\n"
    assert run("purge", "--all") == "0 purged\n"
    run("export", str(out))
    assert out.read_text() == ""  # what has been there before is there no more
    assert "No such file or directory" in run("export", str(tmp_path / "nowhere" / "dead.jsonl"), code=1)
    assert "no dead letter has the id" in run("show", left[0], code=1)


async def test_what_a_full_store_drops_is_counted_in_status(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1", "--dead-letters-max-rows", "10", "--dead-letters-full", "drop-oldest")
    bus.wait_ready()
    await stumble(bus, 30)
    first, *_ = json.loads(bus.told("dead-letters", "list", "--json").stdout)
    assert bus.told("dead-letters", "purge", first["id"]).stdout == "1 purged\n"
    wait_until(lambda: bus.status()["purged"] == 1)
    status = json.loads(bus.told("status", "--json").stdout)
    ledger = ("dead_letters", "redriven", "purged", "dropped", "waiting", "scheduled", "parked")
    assert [status[name] for name in ledger] == [9, 0, 1, 20, 0, 0, 0]
    assert [status["workers"][0][name] for name in ledger] == [9, 0, 1, 20, 0, 0, 0]
    table = [line.split() for line in bus.told("status").stdout.splitlines()[-2:]]
    assert table == [["0", "9", "0", "1", "20", "0", "0", "0"], ["total", "9", "0", "1", "20", "0", "0", "0"]]
    assert bus.shardbus("drain").stdout.startswith(f"drained; 9 dead letters are kept in {bus.state}, on RAM, ")


async def test_parked_keys_are_marked_counted_and_survive_the_bus(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "2", application="payments:bus")
    bus.wait_ready()
    async with shardbus.connect(bus.address) as client:
        for number in range(14):
            await client.publish(Charged(account=f"a{number % 7}", n=number))
        ledger = await client.flush(60)
        assert (ledger.dead, ledger.waiting) == (7, 7)
    wait_until(lambda: bus.status()["parked"] == 7)
    assert "7 parked keys" in bus.told("status").stdout
    assert "parked: 'a" in bus.told("dead-letters", "list").stdout
    letters = json.loads(bus.told("dead-letters", "list", "--json").stdout)
    assert all(letter["parked"] for letter in letters)
    assert "parked  yes" in bus.told("dead-letters", "show", letters[0]["id"]).stdout
    code, errors = bus.end()
    kept = f"7 dead letters and 7 waiting events are kept in {bus.state}, on RAM, until this machine restarts"
    assert (code, errors.splitlines()[-1]) == (0, f"{kept}; the next `shardbus serve` there has them again")
    bus.start()
    bus.wait_ready()
    wait_until(lambda: bus.status()["parked"] == 7)
    assert bus.told("dead-letters", "purge", "--key", "a1").stdout == "1 purged\n"
    wait_until(lambda: bus.status()["purged"] == 1)

    def held() -> tuple[int, int, int]:
        status = bus.status()
        return status["dead_letters"], status["waiting"], status["parked"]

    wait_until(lambda: held() == (7, 6, 7))  # the next one of its key parks it


def test_what_is_asked_wrongly_is_told_in_a_line(idle_bus: RunningBus) -> None:
    done = idle_bus.told("dead-letters", "purge", "--key", "x" * 2000)  # the rest is in `tests/unit/test_cli.py`
    assert (done.exit_code, done.stdout) == (2, "")
    assert "a key of more than 1,024 bytes" in done.stderr
