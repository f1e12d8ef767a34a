"""Standard streams as they are for commands: they are there, all that is printed arrives, and one that nobody reads any more
ends nothing. Comes before all else that opens a file."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import TextIO


def open_standard_streams() -> None:
    """Open those that this process was started without, as nothing: what is opened next would be taken for them, and libuv
    aborts where it is to close it."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free: this one
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - it stays open


def buffer_output() -> None:
    """Buffer what is printed by lines where Python does not buffer it at all (`python -u`, PYTHONUNBUFFERED).

    There, `print` hands a text to the system once, and what that does not take is lost without a word.
    """
    out = sys.stdout
    raw = getattr(out, "buffer", None)
    if isinstance(raw, io.RawIOBase):  # which `sys.__stdout__` keeps open
        writer = io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(writer, encoding=out.encoding, errors=out.errors, line_buffering=True)


def written(write: Callable[[], object], stream: TextIO) -> OSError | None:
    """Write to a standard stream, and what it has buffered. Returns why that cannot be; not where its reader has left, as
    `| tee` does at the same Ctrl-C: nothing is wrong then. What cannot be written is a stream into nothing from then on."""
    try:
        write()
        stream.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # or the interpreter tries once more at its end
        os.close(nowhere)
        return None if isinstance(error, BrokenPipeError) else error
    return None
