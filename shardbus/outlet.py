"""What a streaming command's handler yields, on its way to one reader: as much at a time as that takes.

Owns the window of one stream. Knows nothing of frames or sessions; `send` is somebody else's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from typing import Any, Final

from shardbus.config import Limits


class Outlet:
    """Bounded: while as many items, or bytes, as the window takes are not read, the handler waits.

    Args:
        encode: an item to bytes.
        window: how many items the reader takes ahead.
        send: the number of the first, and encoded items, in order.
    """

    def __init__(
        self,
        encode: Callable[[Any], bytes],
        window: int,
        limits: Limits,
        send: Callable[[int, tuple[bytes, ...]], object],
    ) -> None:
        self.count = 0
        """Items so far."""
        self._encode = encode
        self._window = window
        self._limits = limits
        self._send = send
        self._allowed = window
        self._unread: deque[int] = deque()  # the bytes of each item that was not read yet
        self._unread_bytes = 0
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._room: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def has_room(self) -> bool:
        """Whether the reader takes one more."""
        return self.count < self._allowed and self._unread_bytes < self._limits.stream_bytes_max

    def allow(self, upto: int) -> None:
        """The reader takes the items below this number, so it has read all but the window's."""
        self._allowed = max(self._allowed, upto)
        while self._unread and self.count - len(self._unread) < self._allowed - self._window:
            self._unread_bytes -= self._unread.popleft()
        if self._room is not None and not self._room.done() and self.has_room:
            self._room.set_result(None)

    async def drain(self, items: AsyncGenerator[Any, None]) -> None:
        """Take items and hand them on, each when there is room for it; close the generator in the end, however that comes.

        Raises what the generator raises, and `ValueError` for an item that is too large.
        """
        try:
            await self._wait()
            async for item in items:
                if self._closed:
                    break  # it has gone on in spite of its cancellation
                self._put(item)
                await self._wait()
        finally:
            await items.aclose()

    def close(self) -> None:
        """Nobody reads any more: take nothing from a generator that goes on all the same."""
        self._closed = True

    def flush(self) -> None:
        """Send what was yielded so far; happens by itself at the end of the loop's turn."""
        if self._unsent:
            unsent, self._unsent = tuple(self._unsent), []
            self._unsent_bytes = 0
            self._send(self.count - len(unsent), unsent)

    async def _wait(self) -> None:
        while not self.has_room:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def _put(self, item: Any) -> None:
        body = self._encode(item)
        size, limits = len(body), self._limits
        if size > limits.event_bytes_max:
            raise ValueError(f"an item has {size:,} bytes, the limit is {limits.event_bytes_max:,}")
        if len(self._unsent) >= limits.batch_events_max or self._unsent_bytes + size > limits.batch_bytes_target:
            self.flush()
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self.flush)
        self.count += 1
        self._unsent.append(body)
        self._unsent_bytes += size
        self._unread.append(size)
        self._unread_bytes += size


OUTLET: Final[ContextVar[Outlet]] = ContextVar("shardbus-outlet")
"""Where the handler that runs yields to; set around a streaming command, and only there."""
