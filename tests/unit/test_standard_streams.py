"""What is printed arrives, however little the system takes at a time, and what nobody reads ends nothing."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from shardbus.standard_streams import buffer_output, written


class Narrow(io.RawIOBase):
    """Takes ten bytes at a time."""

    def __init__(self) -> None:
        self.taken = b""

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        part = bytes(memoryview(data)[:10])  # type: ignore[arg-type]  # bytes, or what has some
        self.taken += part
        return len(part)


def test_all_of_a_long_text_arrives_where_python_does_not_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Narrow()
    before = io.TextIOWrapper(narrow, encoding="utf-8", write_through=True)  # type: ignore[arg-type]  # as `python -u` does
    monkeypatch.setattr(sys, "stdout", before)
    buffer_output()
    sys.stdout.write("x" * 1000 + "\n")
    assert narrow.taken == b"x" * 1000 + b"\n"  # at the end of the line


def test_what_is_buffered_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", before)
    buffer_output()
    assert sys.stdout is before


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_command_runs_though_it_was_started_without_a_standard_stream(tmp_path: Path, closed: tuple[int, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shardbus", "status", "--connect", f"ipc://{tmp_path}/nobody", "--timeout", "0.1"],
        capture_output=True,
        preexec_fn=lambda: [os.close(descriptor) for descriptor in closed],
        check=False,
    )
    assert done.returncode == 1  # nobody answers; not libuv's abort
    assert (b"no bus answered" in done.stderr) == (2 not in closed)


def test_what_a_full_stream_does_not_take_is_told_once(full: IO[str]) -> None:
    error = written(lambda: full.write("x"), full)
    assert error is not None
    assert error.errno == errno.ENOSPC
    assert written(lambda: full.write("x"), full) is None
    full.close()  # raises nothing either


def test_that_nobody_reads_is_nothing_to_tell(unread: IO[str]) -> None:
    assert written(lambda: unread.write("x"), unread) is None


@pytest.mark.parametrize("errors", ["unread", "full"])
@pytest.mark.parametrize(
    "command",
    [
        ("shardbus", "serve", "nothing_of_this_name:bus"),
        ("shardbus", "status", "--timeout", "soon"),
        ("loadgen", "--rate", "100", "--connect", "nowhere"),
        ("loadgen", "--rate", "many"),
    ],
    ids=" ".join,
)
def test_a_mistake_ends_with_its_exit_code_where_nobody_is_told(
    command: tuple[str, ...], errors: str, request: pytest.FixtureRequest
) -> None:
    nowhere = request.getfixturevalue(errors)
    done = subprocess.run([sys.executable, "-m", *command], stderr=nowhere, stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("command", [("shardbus", "publish", "shop:Order"), ("loadgen", "--rate", "5", "--type")])
def test_an_argument_that_is_no_text_is_a_mistake_told_in_a_line(command: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *command, b"\xff"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{command[0]}: the argument '\\udcff' is no text in UTF-8\n"


@pytest.mark.parametrize(("command", "code"), [("shardbus", 1), ("loadgen", 2)])
def test_what_cannot_be_printed_is_told_once(command: str, code: int, full: IO[str]) -> None:
    program = [sys.executable, "-m", command, "--help"]
    done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, f"{command}: cannot go on: No space left on device\n")
