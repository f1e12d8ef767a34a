"""Whether a client takes anything, and in which event loop; why not, and who waits until something changes."""

from __future__ import annotations

import asyncio
from threading import get_ident

from shardbus.errors import BusRejected, ClientClosed, UsageError


def check_loop(own: asyncio.AbstractEventLoop | None) -> asyncio.AbstractEventLoop:
    """The event loop that runs, which is the one that a client, or what was made by it, belongs to.

    Raises:
        UsageError: another one runs here, or none.
    """
    # Not `get_running_loop`, which raises where there is none, in a thread for instance.
    running = asyncio._get_running_loop()
    if running is None or running is not own:
        raise UsageError(
            "a client belongs to the event loop that opened it, and this is another one, or another thread; open a client "
            "in each loop (async with shardbus.connect() as client), or use shardbus.blocking, whose client is for all "
            "threads"
        )
    return running


class Gate:
    """Shut until the bus was found, and once the client closes or the bus has refused it.

    It belongs to the event loop in which `loop` is first called.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.is_closing = False  # what is published now would not be waited for
        self.is_closed = False
        self._refusal: BusRejected | None = None
        self._progress = asyncio.Event()
        self._waiters = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0

    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the client, which runs.

        Raises:
            UsageError: another one runs here, or none.
        """
        own = self._loop
        if own is None:
            own = self._loop = asyncio._get_running_loop()
            self._thread = get_ident()
        # If the client's own loop runs, and in this thread, no other one does. To ask which one runs is a system call in
        # Python 3.11 (`getpid`), a twentieth of what a command costs.
        elif self._thread == get_ident() and own.is_running():
            return own
        return check_loop(own)

    def open(self) -> None:
        """The bus was found, perhaps again. What has been shut stays so."""
        self.is_open = not self.is_closing and not self.is_closed and self._refusal is None

    def begin_closing(self) -> None:
        """Nothing more is taken; what was taken may still be waited for."""
        self.is_closing = True
        self.is_open = False

    def close(self) -> None:
        """Nothing more happens."""
        self.is_closed = True
        self.is_open = False

    def refuse(self, error: BusRejected) -> None:
        """The bus has refused the client for good."""
        self._refusal = error
        self.is_open = False

    def check(self) -> None:
        """Raise why nothing is taken, if so: `ClientClosed`, or what `refuse` was given."""
        if not self.is_open:
            self._check_refusal()
            raise ClientClosed("the client is closed; use it inside its `async with` block")

    def check_here(self) -> asyncio.AbstractEventLoop:
        """As `check`, and refuse another event loop than the client's, which is returned. Not for what is published: it
        costs 0.2 µs."""
        self.check()
        return self.loop()

    def made_progress(self) -> None:
        """Something has changed that somebody may wait for."""
        if self._waiters:
            self._progress.set()

    async def wait_for_progress(self) -> None:
        """Wait until something has changed. Raises what `refuse` was given: nothing will come any more."""
        self._check_refusal()
        self._waiters += 1
        try:
            self._progress.clear()
            await self._progress.wait()
        finally:
            self._waiters -= 1
        self._check_refusal()

    def _check_refusal(self) -> None:
        if self._refusal is not None:
            raise self._refusal
