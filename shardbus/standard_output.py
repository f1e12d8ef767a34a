"""Standard output as it is for commands: all that is printed arrives. Imports next to nothing, and comes before all else."""

from __future__ import annotations

import io
import sys


def buffer_output() -> None:
    """Buffer what is printed by lines where Python does not buffer it at all (`python -u`, PYTHONUNBUFFERED).

    There, `print` hands a text to the system once, and what that does not take is lost without a word.
    """
    out = sys.stdout
    raw = getattr(out, "buffer", None)
    if isinstance(raw, io.RawIOBase):  # which `sys.__stdout__` keeps open
        writer = io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(writer, encoding=out.encoding, errors=out.errors, line_buffering=True)
