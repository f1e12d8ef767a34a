"""Writes an example application into a new directory. Its files lie beside this one, as `example/EXAMPLE/*.txt`."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Final

import msgspec

from shardbus.errors import UsageError

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", re.ASCII)


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """An application that can be written: its files, and the commands that come next."""

    files: tuple[str, ...]
    next_steps: str


EXAMPLES: Final = {
    "orders": Example(
        files=("app.py", "publish.py", "test_app.py", "pyproject.toml", "README.md"),
        next_steps="""\
  pip install pytest && pytest  # the application in one process
  shardbus serve app:bus        # on all cores, until Ctrl-C
  python publish.py             # in another terminal
  shardbus execute app:GetTotal '{"order_id": "7"}'""",
    ),
    "chat": Example(
        files=("chat.py", "test_chat.py", "pyproject.toml"),
        next_steps="""\
  pip install 'shardbus[chat]' pytest && pytest
  shardbus serve chat:bus --workers 2  # the chat's workers, until Ctrl-C
  python chat.py                       # in another terminal: the web process; open http://localhost:8080""",
    ),
}


def example_of(name: str) -> str:
    """The example that a directory of this name gets where none is asked for: the one of that name, else `orders`."""
    return name if name in EXAMPLES else "orders"


def write_example(example: str, name: str, parent: Path) -> Path:
    """Write the files of an example into a new directory `name`; return it.

    Raises:
        UsageError: a name that is none, or something of that name is there.
        OSError: it cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of an application, which is that of its directory here: take letters, digits, _ "
            "and -, no - first, for instance my-shop"
        )
    directory = parent / name
    try:
        directory.mkdir()
    except FileExistsError:
        raise UsageError(f"{directory} is there already, and nothing is overwritten; name another") from None
    for file in EXAMPLES[example].files:
        text = resources.files("shardbus").joinpath("example", example, f"{file}.txt").read_text(encoding="utf-8")
        (directory / file).write_text(text.replace("{name}", name), encoding="utf-8")
    return directory
