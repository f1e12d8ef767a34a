"""The client through which the handlers of a worker send: an ordinary one, but that it never makes them wait for room.

It takes what they publish also above its outboxes' bounds, up to bounds of its own, and says when each event is finished, so
that what published it can be acked. It is made when a handler first sends something: an application whose handlers do not
costs nothing, and need not be reached.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final

from msgspec.structs import replace

from shardbus.client import Client
from shardbus.clock import NowNs, monotonic_ns
from shardbus.config import DEFAULT_LIMITS, Limits
from shardbus.errors import BusRejected, ClientClosed, OutboxFull, UsageError
from shardbus.messages import Command, Event
from shardbus.outboxes import Bound, Connector
from shardbus.outgoing import Children, Origin
from shardbus.packing import tell_which
from shardbus.wire.session import PublisherSession

_OPEN_S: Final = 10.0


class _ChildClient(Client):
    """A client that knows whose children its events are."""

    def __init__(self, *arguments: Any, on_end: Callable[[BusRejected], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._on_end = on_end
        self._born: dict[int, dict[int, tuple[Children, str]]] = {}  # by shard and sequence; as bounded as its outboxes

    def put(self, event: Event, headers: dict[str, str], origin: Origin) -> None:
        """Publish at once, as a child. Raises as `Outgoing.publish`."""
        packed = self._packing.pack(event, headers)
        outbox = self._outboxes.of(packed[1])
        if self._outboxes.is_full(outbox):
            outbox.session.thin_out()
            if self._outboxes.is_full(outbox):
                self._gate.check()
                raise OutboxFull(outbox.shard, outbox.session.held_events)
        self.publish_packed((packed,))
        children = origin.children
        if children is None:
            children = origin.children = Children()
        children.add(origin.runs)
        # Whether or not its batch was sealed, it is the last of this outbox.
        self._born[outbox.shard][outbox.last_seq] = (children, origin.runs)

    @property
    def needs_turn(self) -> bool:
        """Whether the event loop is to have a turn before more is published."""
        return self._outboxes.needs_turn

    def has_room(self) -> bool:
        """See `Outgoing.has_room`."""
        events_max, bytes_max = self._limits.outbox_events_max // 4, self._limits.outbox_bytes_max // 4
        sessions = [outbox.session for outbox in self._outboxes]
        return all(one.held_events <= events_max and one.held_bytes <= bytes_max for one in sessions)

    def end(self, error: BusRejected) -> None:
        """See `Client.end`. What was published cannot be finished any more, so the worker hears of it."""
        super().end(error)
        self._on_end(error)

    def _make_session(self, shard: int) -> PublisherSession:
        self._born[shard] = {}
        return PublisherSession(self.publisher, self._limits, partial(self._finished, self._born[shard]))

    @staticmethod
    def _finished(born: dict[int, tuple[Children, str]], low: int, high: int) -> None:
        for seq in range(low, high):
            child = born.pop(seq, None)  # commands are nobody's
            if child is not None:
                child[0].finish(child[1])


class HandlerClient:
    """Implements `Outgoing`. Make it in the worker's event loop.

    Args:
        address: the bus's, for errors.
        make_connector: of channels to it.
        control_address: where its supervisor, or what stands in its place, is asked.
        publisher: the worker's identity; see `outgoing.worker_publisher`.
        broken: called where the bus refuses it for good: what waits for its events would wait for ever.
        ticks: as for `Client`; whoever says False calls `tick`.
    """

    def __init__(
        self,
        address: str,
        make_connector: Callable[[], Connector],
        control_address: str,
        *,
        publisher: bytes,
        broken: Callable[[BaseException], None],
        limits: Limits = DEFAULT_LIMITS,
        now: NowNs = monotonic_ns,
        ticks: bool = True,
    ) -> None:
        self._make: Callable[[], _ChildClient] = lambda: _ChildClient(
            address,
            make_connector(),
            control_address,
            limits=replace(limits, own_headers_max=limits.headers_max),  # the handler's own were counted without the bus's
            now=now,
            publisher=publisher,
            bound=Bound(events_max=limits.children_events_max, bytes_max=limits.children_bytes_max),
            on_end=broken,
            ticks=ticks,
        )
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._clean = contextvars.copy_context()  # what it starts is not to run with the variables of a handler
        self._client: _ChildClient | None = None
        self._opening: asyncio.Task[_ChildClient] | None = None
        self._closed = False

    async def publish(self, events: Sequence[Event], headers: dict[str, str], origin: Origin) -> None:
        """See `Outgoing.publish`."""
        runs = origin.runs
        client = await self._opened()
        if origin.runs != runs:  # nobody would wait for what it publishes now
            raise UsageError("the handler has returned meanwhile; await what it publishes in the handler itself")
        if len(events) == 1:
            client.put(events[0], headers, origin)
            return
        waiting = enumerate(events)
        while chunk := list(islice(waiting, self._limits.batch_events_max)):
            for at, event in chunk:
                try:
                    client.put(event, headers, origin)
                except (UsageError, OutboxFull) as error:
                    tell_which(error, at, len(events), event)
                    raise
            if client.needs_turn:
                await asyncio.sleep(0)

    async def execute(self, command: Command[Any], timeout_s: float, headers: dict[str, str]) -> Any:
        """See `Outgoing.execute`."""
        client = await self._opened()
        return await client.execute(command, timeout=timeout_s, headers=headers)

    def has_room(self) -> bool:
        """See `Outgoing.has_room`."""
        return self._client is None or self._client.has_room()

    def tick(self) -> None:
        """See `Client.tick`."""
        if self._client is not None:
            self._client.tick()

    @property
    def in_flight(self) -> int:
        """How many events are not finished."""
        return 0 if self._client is None else self._client.ledger().in_flight

    async def close(self) -> None:
        """See `Outgoing.close`."""
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._client is not None:
            await self._client.abort()

    async def _opened(self) -> _ChildClient:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            raise UsageError("publish and execute are for `async def` handlers, in the worker's event loop, not its threads")
        if self._closed:
            raise ClientClosed("the worker ends; nothing can be sent any more")
        if self._client is None:
            if self._opening is None:
                self._opening = loop.create_task(self._open(), context=self._clean.copy())
                self._opening.add_done_callback(self._open_ended)
            return await asyncio.shield(self._opening)
        return self._client

    async def _open(self) -> _ChildClient:
        client = self._make()
        await client.start(_OPEN_S)
        return client

    def _open_ended(self, task: asyncio.Task[_ChildClient]) -> None:
        self._opening = None
        if not task.cancelled() and task.exception() is None:
            self._client = task.result()
