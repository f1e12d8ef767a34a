"""An interrupt before a command runs, and after: one line, and the exit code that says so. Owns SIGINT then.

What a command needs takes half a second to import, and a `KeyboardInterrupt` then is a traceback, or nothing at all where it
meets code that cannot raise. Imports next to nothing itself: until it is there, the interpreter answers.
"""

from __future__ import annotations

import os
import signal

EXIT_INTERRUPTED = 130
"""The exit code of a command that Ctrl-C has ended."""


class EndedByInterrupts:
    """A block in which SIGINT ends this process at once, with one line: nothing in it is to be undone.

    For the main thread. A process that ignores the signal, or handles it otherwise, is left as it is.

    Args:
        command: what the line begins with.
    """

    def __init__(self, command: str) -> None:
        self._told = f"{command}: interrupted\n".encode()
        self._is_ours = False

    def __enter__(self) -> None:
        self._is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._is_ours:
            signal.signal(signal.SIGINT, self)

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self, *_: object) -> None:
        """Answer the signal."""
        try:
            os.write(2, self._told)
        finally:
            os._exit(EXIT_INTERRUPTED)


class HandedOver:
    """A block, inside one that interrupts end, which answers them itself: they are raised in it, as Python does it."""

    def __init__(self) -> None:
        handler = signal.getsignal(signal.SIGINT)
        self._outer = handler if isinstance(handler, EndedByInterrupts) else None

    def __enter__(self) -> None:
        if self._outer is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._outer is not None:  # one that has ended the block is told once, whatever else comes
            signal.signal(signal.SIGINT, signal.SIG_IGN if kind is KeyboardInterrupt else self._outer)
