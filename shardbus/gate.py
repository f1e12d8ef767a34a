"""Whether a client takes anything, and in which event loop; why not, and who waits until something changes."""

from __future__ import annotations

import asyncio

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

    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the client, which runs.

        Raises:
            UsageError: another one runs here, or none.
        """
        if self._loop is None:
            self._loop = asyncio._get_running_loop()
        return check_loop(self._loop)

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
        """As `check`, and return the client's event loop; refuse another one. Not for what is published: it costs 0.4 µs,
        most of it for the system call by which Python 3.11 finds out whether it was forked."""
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
