"""Writes an example application into a new directory. Its files lie beside this one, as `example/*.txt`."""

from __future__ import annotations

import keyword
from importlib import resources
from pathlib import Path
from typing import Final

from shardbus.errors import UsageError

FILES: Final = ("app.py", "publish.py", "test_app.py", "pyproject.toml", "README.md")


def write_example(name: str, parent: Path) -> Path:
    """Write the files into a new directory `name`; return it.

    Raises:
        UsageError: a name that no Python module could have, or something of that name is there.
        OSError: it cannot be written.
    """
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise UsageError(
            f"{name!r} cannot be the name of a Python module: take letters, digits and _, no digit first, for instance shop"
        )
    directory = parent / name
    try:
        directory.mkdir()
    except FileExistsError:
        raise UsageError(f"{directory} is there already, and nothing is overwritten; name another") from None
    for file in FILES:
        text = resources.files("shardbus").joinpath("example", f"{file}.txt").read_text(encoding="utf-8")
        (directory / file).write_text(text.replace("{name}", name), encoding="utf-8")
    return directory
