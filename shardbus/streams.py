"""The reader's side of a streaming command: what arrived and was not read yet, and how much more may come.

Owns the order of the items and the credit. Knows nothing of outboxes; those are behind `Caller`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, Generic, Protocol, TypeVar

from shardbus.config import DEFAULT_LIMITS
from shardbus.errors import CommandFailed, RemoteProtocolError
from shardbus.gate import check_loop

ReplyT = TypeVar("ReplyT")

# Read, and not told yet: what a handler may yield is bounded by bytes, too, so it is not to wait for the half of a window.
_UNTOLD_BYTES_MAX: Final = DEFAULT_LIMITS.stream_bytes_max // 4

BROKEN = "StreamBroken"
"""The `error_type` where items were lost with a connection."""


class Caller(Protocol):
    """What a stream asks of the client."""

    async def begin(self) -> None:
        """Send the command; wait for room where there is none."""

    def more(self, allowed: int) -> None:
        """Let the handler yield up to so many items."""

    def leave(self) -> None:
        """Nobody reads any more."""


class Flow:
    """The items of one stream. Bounded: a worker that sends more than was allowed is not sound."""

    def __init__(self, name: str, window: int) -> None:
        self.name = name
        self.items: deque[bytes] = deque()
        self.reply: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Done once nothing more comes: how many items there were, or what went wrong."""
        self._window = window
        self._allowed = window
        self._expected = 0
        self._taken = 0
        self._untold_bytes = 0
        self._changed = asyncio.Event()
        self.reply.add_done_callback(self._ended)

    def put(self, first: int, items: tuple[bytes, ...]) -> None:
        """Items arrived.

        Raises:
            RemoteProtocolError: they are more than was allowed.
        """
        if first + len(items) > self._allowed:
            raise RemoteProtocolError(f"{first + len(items)} items of a stream, and {self._allowed} were allowed")
        if first != self._expected:
            self._break()
        if not self.reply.done():
            self._expected += len(items)
            self.items.extend(items)
        self._changed.set()

    def take(self) -> tuple[bytes, int]:
        """The next item, and how many may come in all: more than before, or 0 where there is nothing to say."""
        self._taken += 1
        self._untold_bytes += len(self.items[0])
        untold = self._taken + self._window - self._allowed
        if untold < (self._window + 1) // 2 and self._untold_bytes < _UNTOLD_BYTES_MAX:
            return self.items.popleft(), 0
        return self.items.popleft(), self.allow_more()

    @property
    def waits(self) -> bool:
        """Whether its reader may go on only when something arrives."""
        return not self.items and not self.reply.done()

    def allow_more(self) -> int:
        """How many items may come in all, as is told now."""
        self._allowed = self._taken + self._window
        self._untold_bytes = 0
        return self._allowed

    async def change(self) -> None:
        """Wait until there is an item, or nothing more comes."""
        while not self.items and not self.reply.done():
            self._changed.clear()
            await self._changed.wait()

    def end(self) -> None:
        """All items were read. Raises what went wrong."""
        if self.reply.result() != self._expected:
            raise CommandFailed(self.name, BROKEN, "some of its last items were lost with the connection")

    def close(self) -> None:
        """Nobody reads any more."""
        self.items.clear()
        self.reply.cancel()

    def _ended(self, reply: asyncio.Future[int]) -> None:
        if not reply.cancelled():
            reply.exception()  # where nobody reads any more, nobody is to be told
        self._changed.set()

    def _break(self) -> None:
        if not self.reply.done():
            told = f"items from {self._expected} on were lost with the connection"
            self.reply.set_exception(CommandFailed(self.name, BROKEN, told))


class Stream(Generic[ReplyT]):
    """What a streaming command yields. Made by `Client.stream`; iterate over it once, in one task.

    The command is sent when it is first asked for an item. Leaving the loop or the block ends the handler.
    """

    def __init__(
        self, flow: Flow, caller: Caller, decode: Callable[[bytes], ReplyT], timeout_s: float
    ) -> None:
        self._flow = flow
        self._caller = caller
        self._decode = decode
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout_s
        self._has_begun = False
        self._closed = False

    def __aiter__(self) -> Stream[ReplyT]:
        return self

    @property
    def has_next(self) -> bool:
        """Whether the next item has arrived, so that asking for it does not wait."""
        return bool(self._flow.items)

    async def __anext__(self) -> ReplyT:
        """The next item.

        Raises:
            TimeoutError: the stream has not ended in time; its handler is cancelled.
            CommandFailed: the handler raised, behind the items before; or there is none, or it does not stream.
            CommandLost: the worker died.
            ClientClosed, BusRejected: the client was closed, or refused by the bus.
            UsageError: it is not the client's event loop that runs.
        """
        check_loop(self._loop)
        if self._closed:
            raise StopAsyncIteration
        flow = self._flow
        if not flow.items:
            await self._wait()
        if not flow.items:
            try:
                flow.end()
            finally:
                self._close()
            raise StopAsyncIteration
        item, allowed = flow.take()
        if allowed:
            self._caller.more(allowed)
        try:
            return self._decode(item)
        except Exception as error:  # what a reply type's own checks raise
            self._close()
            told = f"an item of its reply is not as declared: {error}"
            raise CommandFailed(flow.name, type(error).__name__, told) from None

    async def _wait(self) -> None:
        limit: asyncio.Timeout | None = None
        try:
            async with asyncio.timeout_at(self._deadline) as limit:
                if not self._has_begun:
                    await self._caller.begin()
                    self._has_begun = True
                await self._flow.change()
        except TimeoutError:
            if limit is None or not limit.expired():
                raise
            self._close()
            told = "it is cancelled" if self._has_begun else "it was never sent"
            raise TimeoutError(
                f"{self._flow.name}: its stream has not ended within {self._timeout_s:g} s; {told}"
            ) from None

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._caller.leave()
            self._flow.close()

    async def aclose(self) -> None:
        """Read no more; the handler is ended.

        Raises:
            UsageError: it is not the client's event loop that runs.
        """
        check_loop(self._loop)
        self._close()

    async def __aenter__(self) -> Stream[ReplyT]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # Of a loop that was left nothing else tells; what collects it may be another thread.
        if not self._closed:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all with it
                self._loop.call_soon_threadsafe(_leave, self._caller, self._flow)


def _leave(caller: Caller, flow: Flow) -> None:
    caller.leave()
    flow.close()
