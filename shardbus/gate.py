"""Whether a client takes anything, why not, and who waits until something changes."""

from __future__ import annotations

import asyncio

from shardbus.errors import BusRejected, ClientClosed


class Gate:
    """Shut until the bus was found, and once the client closes or the bus has refused it."""

    def __init__(self) -> None:
        self.is_open = False
        self.is_closing = False  # what is published now would not be waited for
        self.is_closed = False
        self._refusal: BusRejected | None = None
        self._progress = asyncio.Event()
        self._waiters = 0

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
