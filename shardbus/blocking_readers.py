"""What the blocking client's threads read item by item: streamed replies, and the events of subscriptions.

The asyncio `Stream` or `Subscription` is read on the client's loop. A thread that has nothing in its hand makes a round trip
there, waits for one item, and takes what else is there with it: a round trip for each would bound a reader to some 6,000
items a second. Owns what is in the hand, and who may read: one thread at a time. Any thread may close.

**The hand** is bounded: of a stream, to the half of its window, so that the handler is never further ahead than the reader
allowed; of a subscription, to 64 events above what its queue holds. Nothing in it is lost where Ctrl-C ends the waiting.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Generic, Protocol, TypeVar

from shardbus.client import Client
from shardbus.config import DEFAULT_LIMITS
from shardbus.errors import ClientClosed, UsageError
from shardbus.messages import Command, Event
from shardbus.streams import Stream
from shardbus.subscriptions import Missed, Subscription

ResultT = TypeVar("ResultT")
SourceT = TypeVar("SourceT", covariant=True)
ReplyT = TypeVar("ReplyT")
EventT = TypeVar("EventT", bound=Event)
ReaderT = TypeVar("ReaderT", bound="_Reader")

_IN_HAND_EVENTS_MAX: Final = DEFAULT_LIMITS.in_hand_events_max


class Wait(Protocol):
    """Has the client's loop do something, and waits for the outcome. Raises as every call of the blocking client."""

    def __call__(self, work: Callable[[Client], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """Return what it returns, raise what it raises."""


Leave = Callable[[Callable[[Client], Coroutine[Any, Any, None]]], None]
"""As `Wait`, where something is left: a client that has ended, or is another process's, does nothing."""


class _Source(Protocol[SourceT]):
    """What is read on the loop."""

    @property
    def has_next(self) -> bool:
        """Whether the next item is here."""

    async def __anext__(self) -> SourceT:
        """The next item."""

    async def aclose(self) -> None:
        """Nobody reads any more."""


class _Reader:
    """An iterator over what the loop gives, and a block that ends it."""

    def __init__(self, source: _Source[Any], what: str, items_max: int, wait: Wait, leave: Leave) -> None:
        self._source = source  # where its reader is let go, it says so to its loop itself
        self._what = what
        self._items_max = items_max
        self._wait = wait
        self._leave = leave
        self._hand: deque[Any] = deque()  # filled on the loop, emptied by the thread that reads
        self._failure: Exception | None = None  # comes behind what is in the hand
        self._reading = threading.Lock()
        self._closed = False

    def __iter__(self: ReaderT) -> ReaderT:
        return self

    def _next(self) -> Any:
        if not self._reading.acquire(blocking=False):
            raise UsageError(f"{self._what} is being read by another thread; one at a time, or one of its own for each")
        try:
            if not self._closed and not self._hand and self._failure is None:
                self._wait_for_some()
            if not self._closed and self._hand:
                return self._hand.popleft()
            self._closed = True
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            raise StopIteration
        finally:
            self._reading.release()

    def _wait_for_some(self) -> None:
        try:
            self._wait(self._fill)
        except ClientClosed:
            if not self._closed:  # by another thread, while this one waited
                raise

    async def _fill(self, _: Client) -> None:
        """Wait for an item, and take what else is there; nothing where the end has come."""
        if self._hand:  # by a call that was interrupted
            return
        try:
            self._hand.append(await self._take())
        except StopAsyncIteration:
            return
        while self._source.has_next and len(self._hand) < self._items_max:
            try:
                self._hand.append(await self._take())
            except Exception as error:
                self._failure = error
                return

    async def _take(self) -> Any:
        return await self._source.__anext__()

    def close(self) -> None:
        """Read no more. A thread that waits for an item comes to the end. The second time, do nothing."""
        if not self._closed:
            self._closed = True
            self._leave(self._end)

    async def _end(self, _: Client) -> None:
        await self._source.aclose()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self.close()


class BlockingStream(_Reader, Generic[ReplyT]):
    """What a streaming command yields: `for token in client.stream(…)`, or as a block. See `shardbus.Stream`.

    One thread at a time reads it, and it raises what `Stream` raises. Leaving the block ends the handler, and so does
    leaving the loop where nothing else holds the stream.
    """

    def __next__(self) -> ReplyT:
        item: ReplyT = self._next()
        return item

    def __enter__(self) -> BlockingStream[ReplyT]:
        return self


def open_stream(
    command: Command[ReplyT], make: Callable[[Client, int], Stream[ReplyT]], window: int, wait: Wait, leave: Leave
) -> BlockingStream[ReplyT]:
    """Have a stream made on the loop, with what its hand leaves of the window; raises what `make` raises."""
    is_sound = type(window) is int and 1 <= window <= DEFAULT_LIMITS.stream_items_max  # else it is refused as it is
    half = window // 2 if is_sound else 0

    async def make_it(client: Client) -> Stream[ReplyT]:
        return make(client, window - half if half else window)

    # The first item of a hand is read at once, so that the rest of it and the window on the loop are the window.
    return BlockingStream(wait(make_it), f"the stream of {type(command).__name__}", half + 1, wait, leave)


class BlockingSubscription(_Reader, Generic[EventT]):
    """Events as they are handled, and `Missed` where some are missing: `for event in events`. See `shardbus.Subscription`.

    One thread at a time reads it, and it raises what `Subscription` raises. With a time-out, waiting longer raises
    `TimeoutError`, and the subscription goes on: ask again. Leaving the block unsubscribes, and so does leaving the loop
    where nothing else holds it.
    """

    def __init__(
        self, events: Subscription[EventT], name: str, timeout_s: float | None, wait: Wait, leave: Leave
    ) -> None:
        super().__init__(events, f"the subscription to {name}", _IN_HAND_EVENTS_MAX, wait, leave)
        self._events = events
        self._name = name
        self._timeout_s = timeout_s
        self.headers: dict[str, str] = events.headers
        """What was published beside the event that came last."""

    def __next__(self) -> EventT | Missed:
        event: EventT | Missed
        event, self.headers = self._next()
        return event

    def __enter__(self) -> BlockingSubscription[EventT]:
        """Wait until every worker that it concerns has confirmed it. Raises as iterating does."""
        self._wait(self._confirm)
        return self

    async def _confirm(self, _: Client) -> None:
        told = "its workers have not confirmed the subscription within {0:g} s, so it has ended; see `shardbus status`"
        await self._in_time(self._events.__aenter__(), told)

    async def _fill(self, client: Client) -> None:
        await self._in_time(super()._fill(client), "nothing came within {0:g} s; the subscription goes on")

    async def _take(self) -> Any:
        return await super()._take(), self._events.headers

    async def _in_time(self, work: Coroutine[Any, Any, object], told: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await work
        except TimeoutError:
            raise TimeoutError(f"{self._name}: {told.format(self._timeout_s)}") from None
