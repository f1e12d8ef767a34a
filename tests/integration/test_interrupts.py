"""Commands that are interrupted while they start: a line at most, the usual exit code, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from buses import state_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what is left")

ROOT = Path(__file__).parents[2]

# Runs before the command. What the interpreter itself imports before that is not ours to answer for.
SITE = """
import os, signal, sys

at, number = os.environ.pop("INTERRUPTED_AT", ""), int(os.environ.pop("INTERRUPTED_BY", "0"))

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == at:
            sys.meta_path.remove(self)
            if number:
                os.kill(os.getpid(), number)
            else:
                os.write(1, b"here\\n")

if at:
    sys.meta_path.insert(0, Watch())
"""
COMMANDS = {
    "shardbus": ("serve", "--workers", "1", "--bind", "{address}"),
    "loadgen": ("--rate", "100", "--duration", "1", "--connect", "{address}"),
}


class Started:
    """A command, as `python -m` and as the script that an installation makes start it."""

    def __init__(self, directory: Path, command: str, *, at: str, by: int = 0, script: bool = False) -> None:
        (directory / "site").mkdir(exist_ok=True)
        (directory / "site" / "sitecustomize.py").write_text(SITE)
        self.address = f"ipc://{directory}/bus"
        self._mark = f"INTERRUPTED_MARK={directory}"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(directory / "site"), str(ROOT)]),
            "INTERRUPTED_MARK": str(directory),
            "INTERRUPTED_AT": at,
            "INTERRUPTED_BY": str(by),
        }
        how = ["-c", f"import sys; from {command}.__main__ import main; sys.exit(main())"] if script else ["-m", command]
        arguments = [text.format(address=self.address) for text in COMMANDS.get(command, ())]
        self.process = subprocess.Popen(
            [sys.executable, *how, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def told(self) -> tuple[int, str]:
        """Its exit code and what it said on standard error, once it and all that it started have ended."""
        _, errors = self.process.communicate(timeout=60)
        end = time.monotonic() + 30
        while time.monotonic() < end and any(self._left()):
            time.sleep(0.02)
        assert not list(self._left())
        bus = Path(self.address.removeprefix("ipc://"))
        assert not bus.exists() or not list(bus.iterdir())
        assert not os.path.exists(state_of(self.address))
        return self.process.returncode, errors

    def _left(self) -> Iterator[str]:
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    if self._mark in (entry / "environ").read_text(errors="replace").split("\0"):
                        yield (entry / "cmdline").read_text()
                except OSError:
                    continue


INTERRUPTED = {"shardbus": "shardbus: interrupted\n", "loadgen": "loadgen: interrupted\n"}


@pytest.mark.parametrize("script", [False, True], ids=["module", "script"])
@pytest.mark.parametrize(
    ("command", "at"),
    [
        ("shardbus", "shardbus.cli"),
        ("shardbus", "zmq"),
        ("shardbus", "shardbus.supervisor"),
        ("loadgen", "loadgen.cli"),
        ("loadgen", "hdrh"),
    ],
)
def test_an_interrupt_while_modules_are_imported_is_a_line(short_path: Path, command: str, at: str, script: bool):
    started = Started(short_path, command, at=at, by=signal.SIGINT, script=script)
    assert started.told() == (130, INTERRUPTED[command])


@pytest.mark.parametrize("at", ["benchmarks.quick_benchmark", "benchmarks.scenarios", "hdrh", "shardbus.event_loop"])
def test_an_interrupt_while_a_benchmark_is_imported_is_a_line(short_path: Path, at: str):
    started = Started(short_path, "benchmarks.quick_benchmark", at=at, by=signal.SIGINT)
    assert started.told() == (130, "benchmarks: interrupted\n")


def test_an_interrupt_at_the_end_of_the_imports_is_a_line_too(short_path: Path):
    started = Started(short_path, "shardbus", at="shardbus.demo", by=signal.SIGINT)
    assert started.told() == (130, "shardbus: interrupted\n")


# A command that is interrupted when it reads its options, or while its mistake is told.
AT = """
import os, signal
import click
import {command}.cli
from {command}.__main__ import main

before = click.{at}

def interrupted(self, *arguments, **named):
    if getattr(self, "name", "{name}") == "{name}":
        os.kill(os.getpid(), signal.SIGINT)
    return before(self, *arguments, **named)

click.{at} = interrupted
main()
"""


@pytest.mark.parametrize(
    ("at", "command", "name", "arguments"),
    [
        ("Command.parse_args", "shardbus", "cli", ["--version"]),
        ("Command.parse_args", "shardbus", "status", ["status", "--timeout", "soon"]),
        ("Command.parse_args", "loadgen", "cli", ["--version"]),
        ("UsageError.show", "shardbus", "", ["status", "--timeout", "soon"]),
        ("UsageError.show", "loadgen", "", ["--rate", "many"]),
    ],
)
def test_an_interrupt_while_options_are_read_or_their_mistake_is_told_is_a_line(
    at: str, command: str, name: str, arguments: list[str]
):
    program = [sys.executable, "-c", AT.format(at=at, command=command, name=name), *arguments]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", INTERRUPTED[command])


# One that was interrupted and is interrupted once more before that is told; and one where nothing else answers, at its end.
AGAIN = """
import os, signal
import shardbus.command_line
from shardbus.__main__ import main

class Interrupted(shardbus.command_line._Interrupted):
    def __init__(self, message):
        os.kill(os.getpid(), signal.SIGINT)
        super().__init__(message)

def interrupted(self, ctx):
    raise KeyboardInterrupt

shardbus.command_line._Interrupted = Interrupted
shardbus.command_line.click.Command.invoke = interrupted
main()
"""
LATE = """
import shardbus.cli

def interrupted(*arguments, **named):
    raise KeyboardInterrupt

shardbus.cli.cli.invoke = interrupted
shardbus.cli.main()
"""


@pytest.mark.parametrize("script", [AGAIN, LATE], ids=["again", "late"])
def test_an_interrupt_is_told_once_whenever_it_comes(script: str):
    program = [sys.executable, "-c", script, "status"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    # At its end click ends the line in which a terminal shows ^C.
    assert (done.returncode, done.stdout, done.stderr.lstrip("\n")) == (130, "", INTERRUPTED["shardbus"])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whenever_a_command_is_interrupted_there_is_no_traceback(short_path: Path, command: str, number: int):
    for delay_s in (0.02, 0.06, 0.12, 0.25, 0.5):
        started = Started(short_path, command, at=f"{command}.cli")
        assert started.process.stdout is not None
        assert started.process.stdout.readline() == "here\n"
        time.sleep(delay_s)
        started.process.send_signal(number)
        code, errors = started.told()
        assert "Traceback" not in errors
        if code == 0:  # it served by then, and has drained
            assert (command, "draining" in errors) == ("shardbus", True)
        else:  # a SIGTERM that nobody handles yet ends it without a word
            assert code == 130 or (code, errors) == (-number, "")
            assert errors.count("\n") <= 1
