"""`shardbus publish`, `execute`, `tail` and `init`, against a real bus."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from buses import RunningBus, wait_until

MakeBus = Callable[..., RunningBus]


@pytest.fixture(scope="module")
def bus(idle_bus: RunningBus) -> RunningBus:
    """Its accounts are each test's own."""
    return idle_bus


def run(
    bus: RunningBus, *arguments: str, text: str = "", out: IO[str] | int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardbus", *arguments],
        cwd=bus.directory,
        env=bus.environment() | {"SHARDBUS_URL": bus.address} | environment,
        input=text,
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


def report(**counts: int) -> dict[str, int]:
    return dict.fromkeys(("published", "handled", "dead", "waiting", "dropped", "in_flight"), 0) | counts


# -- publish and execute


def test_an_event_is_published_and_a_command_executed(bus: RunningBus) -> None:
    done = run(bus, "publish", "accounts:Added", '{"account": "one", "amount": 7}', "--header", "trace=a=b")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == report(published=1, handled=1)
    done = run(bus, "execute", "accounts:GetTotal", '{"account": "one"}')
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")


def test_what_was_not_published_is_told_though_nobody_reads_the_counts(bus: RunningBus, unread: IO[str]) -> None:
    done = run(bus, "publish", "accounts:Added", "-", text='{"account": "unread"}\nnonsense\n', out=unread)
    assert done.returncode == 2
    assert done.stderr.startswith("shardbus: line 2: ")
    assert done.stderr.endswith("; 1 event before that had been published\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("execute", "accounts:GetTotal", '{"account": "unread"}'),
        ("publish", "accounts:Added", '{"account": "u"}'),
        ("dead-letters", "list"),
        ("dead-letters", "purge", "--type", "Nope"),
    ],
    ids=" ".join,
)
def test_where_nobody_reads_what_a_command_says_its_exit_code_says_how_it_went(
    bus: RunningBus, unread: IO[str], arguments: tuple[str, ...]
) -> None:
    done = run(bus, *arguments, out=unread)
    assert (done.returncode, done.stderr) == (0, "")


def test_counts_that_cannot_be_written_are_told_and_take_the_exit_code(bus: RunningBus, full: IO[str]) -> None:
    done = run(bus, "publish", "accounts:Added", '{"account": "full"}', out=full)
    assert (done.returncode, done.stderr) == (1, "shardbus: standard output cannot be written: No space left on device\n")


def test_a_type_is_named_as_on_the_wire_where_the_application_is_known(bus: RunningBus) -> None:
    done = run(bus, "publish", "--app", "accounts:bus", "Added", '{"account": "wire"}')
    assert json.loads(done.stdout) == report(published=1, handled=1)
    done = run(bus, "execute", "GetTotal", "-", text='{"account": "wire"}\n', SHARDBUS_APP="accounts:bus")
    assert (done.returncode, done.stdout) == (0, "1\n")


def test_events_are_followed_as_they_are_handled(bus: RunningBus) -> None:
    command = [sys.executable, "-m", "shardbus", "tail", "accounts:Added", "--key", "followed", "--count", "2"]
    environment = bus.environment() | {"SHARDBUS_URL": bus.address}
    with subprocess.Popen(command, cwd=bus.directory, env=environment, stdout=subprocess.PIPE, text=True) as tail:
        try:
            while tail.poll() is None:  # it begins some time after it was started, and gets two of these then
                run(bus, "publish", "accounts:Added", "-", text='{"account": "followed"}\n{"account": "another"}\n')
            assert tail.stdout is not None
            lines = [json.loads(line) for line in tail.stdout]
        finally:
            tail.kill()
    assert (tail.returncode, lines) == (0, [{"type": "Added", "event": {"account": "followed", "amount": 1}}] * 2)
    done = run(bus, "tail", "accounts:GetTotal")
    assert (done.returncode, done.stderr) == (2, "shardbus: GetTotal is a command; use `shardbus execute`\n")


def test_lines_are_published_up_to_the_first_that_is_not_sound(bus: RunningBus) -> None:
    sound = "".join(f'{{"account": "lines", "amount": {number}}}\n' for number in range(1, 2001))
    done = run(bus, "publish", "accounts:Added", "-", text=sound)
    assert (done.returncode, json.loads(done.stdout)) == (0, report(published=2000, handled=2000))
    done = run(bus, "publish", "accounts:Added", "-", text='{"account": "lines"}\n{"account": 1}\n{"account": "lines"}\n')
    assert (done.returncode, json.loads(done.stdout)) == (2, report(published=1, handled=1))
    assert done.stderr == (
        "shardbus: line 2: Added: field account: expected `str`, got `int`; 1 event before that had been published\n"
    )
    too_long = f'{{"account": "lines"}}\n{{"account": "{"k" * 1025}"}}\n'
    done = run(bus, "publish", "accounts:Added", "-", text=too_long)
    assert done.returncode == 2
    assert done.stderr.startswith("shardbus: line 2: a key of more than 1,024 bytes")
    endless = '{"account": "lines"}\n\n' + "x" * 5_000_000
    done = run(bus, "publish", "accounts:Added", "-", text=endless)
    assert (done.returncode, json.loads(done.stdout)) == (2, report(published=1, handled=1))
    assert done.stderr.startswith("shardbus: line 3: Added: more than 4,194,304 bytes of JSON; 1 event before")
    assert run(bus, "execute", "accounts:GetTotal", '{"account": "lines"}').stdout == f"{2000 * 2001 // 2 + 3}\n"
    assert json.loads(run(bus, "publish", "accounts:Added", "-").stdout) == report()


def test_dead_letters_are_said_and_told_by_the_exit_code(bus: RunningBus) -> None:
    done = run(bus, "publish", "accounts:Stumbled", '{"account": "dead"}')
    assert (done.returncode, json.loads(done.stdout)) == (1, report(published=1, dead=1))
    assert done.stderr == "shardbus: 1 dead letter; see `shardbus dead-letters list --type Stumbled`\n"
    assert run(bus, "dead-letters", "purge", "--type", "Stumbled").stdout == "1 purged\n"


def test_what_is_not_finished_in_time_is_said(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    done = run(bus, "publish", "accounts:Slept", '{"account": "slow", "seconds": 60}', "--timeout", "0.1")
    assert (done.returncode, json.loads(done.stdout)) == (1, report(published=1, in_flight=1))
    assert done.stderr.startswith("shardbus: 1 event was published and not finished within 0.1 s")
    lines = '{"account": "slow", "seconds": 60}\n{}\n'
    done = run(bus, "publish", "accounts:Slept", "-", "--timeout", "0.1", text=lines)
    assert (done.returncode, json.loads(done.stdout)) == (2, report(published=1, in_flight=1))
    unfinished, refused = done.stderr.splitlines()
    assert unfinished.startswith("shardbus: 1 event was published and not finished within 0.1 s")
    assert refused.startswith("shardbus: line 2: Slept: Object missing required field `account`")
    done = run(bus, "execute", "accounts:GetTotal", '{"account": "slow"}', "--timeout", "0.1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("shardbus: GetTotal: no reply within 0.1 s; ")


def test_a_command_that_fails_is_told_with_the_remote_traceback(make_bus: MakeBus, short_path: Path) -> None:
    (short_path / "failing.py").write_text(
        "from shardbus import Bus, Command\n"
        "class Fail(Command[None]):\n    pass\n"
        "bus = Bus('failing')\n"
        "@bus.command(Fail)\n"
        "def fail(command):\n    raise KeyError('no such thing')\n"
    )
    bus = make_bus("--workers", "1", application="failing:bus")
    bus.wait_ready()
    done = run(bus, "execute", "failing:Fail", "{}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("shardbus: Fail failed: KeyError: 'no such thing'\n\nTraceback")
    assert "in fail" in done.stderr
    assert "blocking.py" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        # What is wrong without a bus is in `tests/unit/test_cli.py`.
        (("publish", "accounts:Nope", "{}"), "accounts has no event or command 'Nope'; it has Added, Stumbled, Slept"),
        (("publish", "accounts:Added", '{"account": "a"}', "--header", f"x={'y' * 5000}"), "together up to 4,096 bytes"),
        (("init", "../shop"), "'../shop' cannot be the name of an application"),
        (("init", "--example", "shop", "shop"), "'shop' is not one of 'orders', 'chat'"),
    ],
)
def test_what_is_asked_wrongly_is_told_in_a_line_before_anything_is_sent(
    bus: RunningBus, arguments: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bus.directory)
    monkeypatch.syspath_prepend(bus.directory)
    try:
        done = bus.told(*arguments)
    finally:
        sys.modules.pop("accounts", None)
    assert done.exit_code == 2, done.stderr
    assert told in done.stderr
    assert done.stdout == ""


def test_what_is_asked_wrongly_leaves_no_traceback(bus: RunningBus) -> None:
    done = run(bus, "publish", "accounts:Added", '{"account": 1}')
    assert done.returncode == 2
    assert done.stderr == "shardbus: Added: field account: expected `str`, got `int`\n"


def test_ctrl_c_while_it_reads_delivers_what_was_published(bus: RunningBus) -> None:
    publishing = subprocess.Popen(
        [sys.executable, "-m", "shardbus", "publish", "accounts:Added", "-"],
        cwd=bus.directory,
        env=bus.environment() | {"SHARDBUS_URL": bus.address},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert publishing.stdin is not None
    publishing.stdin.write('{"account": "interrupted"}\n')
    publishing.stdin.flush()

    def total() -> str:
        return run(bus, "execute", "accounts:GetTotal", '{"account": "interrupted"}').stdout

    wait_until(lambda: total() == "1\n")  # published while the pipe is open
    publishing.send_signal(signal.SIGINT)
    out, errors = publishing.communicate(timeout=60)
    assert (publishing.returncode, json.loads(out)) == (130, report(published=1, handled=1))
    assert errors == "shardbus: interrupted; 1 event before that had been published\n"


def test_ctrl_c_while_it_waits_says_that_the_event_was_published_and_its_outcome_is_not_known(make_bus: MakeBus) -> None:
    bus = make_bus("--workers", "1")
    bus.wait_ready()
    event = '{"account": "given up", "seconds": 60}'
    with subprocess.Popen(
        [sys.executable, "-m", "shardbus", "publish", "accounts:Slept", event],
        cwd=bus.directory,
        env=bus.environment() | {"SHARDBUS_URL": bus.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as publishing:
        wait_until(lambda: any(worker["backlog"] for worker in bus.status()["workers"]))
        publishing.send_signal(signal.SIGINT)
        out, errors = publishing.communicate(timeout=60)
    assert (publishing.returncode, json.loads(out)) == (130, report(published=1, in_flight=1))
    assert errors == (
        "shardbus: interrupted; 1 event was published, and its outcome is not known (see `shardbus status`)\n"
    )


def test_a_command_that_streams_is_not_for_the_shell(make_bus: MakeBus, short_path: Path) -> None:
    (short_path / "streaming.py").write_text(
        "from shardbus import Bus, Command\n"
        "class Count(Command[int]):\n    pass\n"
        "bus = Bus('streaming')\n"
        "@bus.command(Count)\n"
        "async def count(command):\n    yield 1\n"
    )
    bus = make_bus("--workers", "1", application="streaming:bus")
    bus.wait_ready()
    done = run(bus, "execute", "streaming:Count", "{}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "shardbus: Count streams its reply, which the shell cannot show; read it in Python, with client.stream(…)\n"
    )


# -- init


def test_the_example_is_written_tested_served_and_used(make_bus: MakeBus, short_path: Path) -> None:
    bus = make_bus("--workers", "2", application="app:bus")
    bus.close()  # only its environment, for now
    done = bus.shardbus("init", "shop")
    assert done.returncode == 0, done.stderr
    assert "  cd shop\n  pip install pytest && pytest " in done.stdout
    directory = short_path / "shop"
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    assert before.keys() == {"app.py", "publish.py", "test_app.py", "pyproject.toml", "README.md"}
    assert b'Bus("shop")' in before["app.py"]
    done = bus.shardbus("init", "shop")
    assert (done.returncode, done.stderr) == (
        2,
        "shardbus: shop is there already, and nothing is overwritten; name another\n",
    )
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        # Not with warnings as errors: what is installed for pytest in this environment may have some of its own.
        environment: dict[str, Any] = bus.environment() | {"SHARDBUS_URL": bus.address, "PYTHONWARNINGS": "default"}
        environment.pop("PYTHONSAFEPATH", None)
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    tested = python("-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "2 passed" in tested.stdout

    bus.directory = directory  # where it is served, and found by the module's name
    bus.start()
    assert bus.wait_ready().startswith("ready")
    published = python("publish.py")
    assert published.stdout == (
        "Ledger(published=1000, handled=1000, dead=0, waiting=0, dropped=0, in_flight=0)\n100.0\n"
    )
    for line in before["README.md"].decode().splitlines():
        if line.startswith(("shardbus publish", "shardbus execute")):
            done = subprocess.run(
                [sys.executable, "-m", *_words(line)],
                cwd=directory,
                env=bus.environment() | {"SHARDBUS_URL": bus.address},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, done.stderr
    assert done.stdout == "9.5\n"
    assert bus.end()[0] == 0


def _words(line: str) -> list[str]:
    head, _, rest = line.partition(" '")
    return [*head.split(), rest.removesuffix("'")]
