"""Standard streams as they are for commands: they are there, and all that is printed arrives. Imports next to nothing, and
comes before all else."""

from __future__ import annotations

import io
import os
import sys


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
