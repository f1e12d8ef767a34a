"""The `local` engine: the whole bus in the calling process, without sockets.

The same client, sessions, encoding, lanes and store as everywhere; frames pass through the event loop instead of a socket,
so no handler ever runs inside `publish`. For tests and small programs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final

import msgspec

from shardbus.client import Client, open_client
from shardbus.clock import monotonic_ns
from shardbus.config import DEFAULT_LIMITS, Limits
from shardbus.errors import BusRejected, ConfigError, RemoteProtocolError, text_of
from shardbus.handler_client import HandlerClient
from shardbus.journal import Journal, journal_bytes
from shardbus.metrics import Book, Evidence, Recorder, book_bytes
from shardbus.outboxes import Channel, OnFull
from shardbus.outgoing import worker_publisher
from shardbus.registry import Registry, WorkerInfo
from shardbus.routing import ShardAddress, Table, even_slots
from shardbus.shard import Shard
from shardbus.store import MEMORY_URL, Store, StoreError, first_due, store_ledger, total_ledger
from shardbus.wire.frames import Answer, decode_to_supervisor, encode_frame

log = logging.getLogger("shardbus.local")

_CONTROL: Final = "local:control"
_BOOK: Final = {"keys": 4096, "publishers": 4, "log_bytes": 1024 * 1024}
_JOURNAL: Final = {"suspended": 1, "suspects": 1}  # nobody survives to read it
_SILENCE_CHECK_S: Final = 1.0
_encode: Final = msgspec.msgpack.Encoder().encode


def _fold(book: Book) -> None:
    book.fold(monotonic_ns())


class _LocalChannel:
    """One client's way to one peer: each frame is delivered by a turn of the event loop of its own."""

    def __init__(self, deliver: Callable[[bytes], None]) -> None:
        self._deliver: Callable[[bytes], None] | None = deliver
        self._loop = asyncio.get_running_loop()

    def send(self, frame: bytes) -> bool:
        if self._deliver is None:
            return False
        self._loop.call_soon(self._deliver, frame)  # it arrives, also where this is closed next
        return True

    def close(self) -> None:
        self._deliver = None


class _LocalBus:
    """The shards, and in the supervisor's place a few answers."""

    def __init__(self, name: str, table: Table) -> None:
        self.shards: list[Shard] = []
        self.books: list[Book] = []
        self._name = name
        self._table = table
        self._peers: dict[bytes, Callable[[bytes], None]] = {}
        self._channels = 0

    def to_control(self, on_frame: Callable[[bytes], None]) -> Channel:
        back = _LocalChannel(on_frame)
        return _LocalChannel(lambda frame: self._answer(frame, back))

    def join(self, shard: Shard, on_frame: Callable[[bytes], None]) -> tuple[bytes, Channel]:
        """A new peer of a shard, and its way there."""
        self._channels += 1
        peer = self._channels.to_bytes(8, "big")
        self._peers[peer] = _LocalChannel(on_frame).send  # type: ignore[assignment]  # its result is always True
        return peer, _LocalChannel(lambda frame: shard.receive(peer, frame))

    def leave(self, peer: bytes) -> None:
        """Nothing reaches this peer any more."""
        self._peers.pop(peer, None)

    def send(self, peer: bytes, frame: bytes) -> bool:
        deliver = self._peers.get(peer)
        if deliver is not None:
            deliver(frame)
        return deliver is not None

    def _answer(self, data: bytes, back: _LocalChannel) -> None:
        try:
            ask = decode_to_supervisor(data)
        except RemoteProtocolError as error:
            log.warning("not a question: %s", error)
            return
        bodies: dict[str, Callable[[], Any]] = {
            "table": lambda: self._table,
            "status": self._status,
            "evidence": lambda: self._evidence(msgspec.msgpack.decode(ask.body, type=list[bytes])),
        }
        body = bodies.get(ask.what)
        if body is None:
            back.send(encode_frame(Answer(ask.request, f"a local bus cannot be asked for {ask.what!r}", b"")))
        else:
            back.send(encode_frame(Answer(ask.request, "", _encode(body()))))

    def _evidence(self, publishers: list[bytes]) -> list[Evidence]:
        for book in self.books:
            _fold(book)
        return [
            found
            for publisher in publishers
            for shard, book in enumerate(self.books)
            if (found := book.evidence(shard, publisher)) is not None
        ]

    def _status(self) -> dict[str, Any]:
        ledgers = [store_ledger(shard.counts) for shard in self.shards]
        workers = [
            {
                "shard": shard.shard,
                "pid": os.getpid(),
                "epoch": 1,
                "restarts": 0,
                "handled": shard.recorder.counters().handled,
                "backlog": shard.backlog,
                "sessions": shard.open_sessions,
                "rss_bytes": 0,
                "store_failing": shard.store_failing,
                **ledger,
                "next_due_ns": shard.next_due_ns,
            }
            for shard, ledger in zip(self.shards, ledgers, strict=True)
        ]
        return {
            "bus": self._name,
            "healthy": True,
            "workers": workers,
            **total_ledger(ledgers),
            "next_due_ns": first_due(workers),
        }


class _LocalConnector:
    """One client's ways to the shards: the program's, or that of a shard's handlers."""

    def __init__(self, bus: _LocalBus) -> None:
        self._bus = bus
        self._joined: list[bytes] = []

    def open(self, address: str, on_frame: Callable[[bytes], None]) -> Channel:
        if address == _CONTROL:
            return self._bus.to_control(on_frame)
        peer, channel = self._bus.join(self._bus.shards[int(address.removeprefix("local:"))], on_frame)
        self._joined.append(peer)
        return channel

    def close(self) -> None:
        for peer in self._joined:
            self._bus.leave(peer)


@contextlib.asynccontextmanager
async def run_local(
    registry: Registry,
    *,
    shards: int = 1,
    dead_letters: str | None = None,
    stores: list[Store] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    close_timeout_s: float = 30.0,
    on_full: OnFull = "wait",
    on_pressure: Callable[[bool], object] | None = None,
    make_client: Callable[..., Client] = Client,
) -> AsyncIterator[Client]:
    """Run an application in this process and hand out a client of it; see `Bus.local`.

    A defect of what runs here ends the client, so that nobody waits for it, and is raised where the block is left.
    """
    defects: list[BaseException] = []
    clients: list[Client] = []

    def on_broken(error: BaseException) -> None:
        defects.append(error)
        for client in clients:
            client.end(BusRejected(f"the local bus has a defect and cannot go on: {type(error).__name__}: {text_of(error)}"))

    try:
        async with _running(
            registry, shards, dead_letters, stores, limits, close_timeout_s, on_full, on_pressure, make_client, on_broken
        ) as client:
            clients.append(client)
            yield client
    except Exception as error:
        if defects:
            raise defects[0] from error
        raise
    if defects:
        raise defects[0]


@contextlib.asynccontextmanager
async def _running(
    registry: Registry,
    shards: int,
    dead_letters: str | None,
    stores: list[Store] | None,
    limits: Limits,
    close_timeout_s: float,
    on_full: OnFull,
    on_pressure: Callable[[bool], object] | None,
    make_client: Callable[..., Client],
    on_broken: Callable[[BaseException], None],
) -> AsyncIterator[Client]:
    incarnation = os.urandom(16)
    loop = asyncio.get_running_loop()
    table = Table(
        incarnation=incarnation,
        layout=1,
        version=1,
        slots=even_slots(shards),
        shards=[
            ShardAddress(shard=shard, epoch=incarnation + shard.to_bytes(2, "big"), address=f"local:{shard}")
            for shard in range(shards)
        ],
    )
    bus = _LocalBus(registry.name, table)
    running = bus.shards
    async with contextlib.AsyncExitStack() as stack:
        for address in table.shards:
            worker = WorkerInfo(bus=registry.name, shard=address.shard, shards=shards)
            await stack.enter_async_context(registry.running(worker))
            buffer = memoryview(bytearray(book_bytes(**_BOOK)))
            book = Book(buffer, **_BOOK)
            outgoing = HandlerClient(
                "local",
                partial(_LocalConnector, bus),
                _CONTROL,
                publisher=worker_publisher(address.epoch),
                broken=on_broken,
                limits=limits,
            )
            stack.push_async_callback(outgoing.close)  # after its shard, whose handlers would fail
            shard = Shard(
                shard=address.shard,
                epoch=address.epoch,
                layout=1,
                plans=registry.plans(),
                store=stores[address.shard] if stores else _sql_store(dead_letters, address.shard),
                recorder=Recorder(buffer, full=partial(_fold, book), **_BOOK),
                journal=Journal(memoryview(bytearray(journal_bytes(**_JOURNAL))), **_JOURNAL),
                send=bus.send,
                now=monotonic_ns,
                limits=limits,
                broken=on_broken,
                outgoing=outgoing,
                states=registry.session_states(worker),
            )
            stack.push_async_callback(shard.close)
            try:
                await shard.start()
            except StoreError as error:
                raise ConfigError(f"{error}; name another with dead_letters=URL, or leave it out: in memory") from error
            running.append(shard)
            bus.books.append(book)
        if stores is None and dead_letters is None:
            stack.callback(_tell_what_ends, running)
        ticker = loop.create_task(_tick(running))
        stack.callback(ticker.cancel)
        connector = _LocalConnector(bus)
        client = make_client("local", connector, _CONTROL, limits=limits, on_full=on_full, on_pressure=on_pressure)
        async with open_client(client, timeout_s=10.0, close_timeout_s=close_timeout_s):
            yield client
        # Together: each takes what the handlers of the others publish until all have come to rest.
        await asyncio.gather(*(shard.drain(close_timeout_s) for shard in running))


def _tell_what_ends(shards: list[Shard]) -> None:
    """What lies in the memory of this process only ends with the block: say how much that is."""
    dead = sum(shard.counts.dead for shard in shards)
    waiting = sum(shard.counts.waiting for shard in shards)
    if dead or waiting:
        log.warning(
            "the local bus ends, and with it what its store has in memory: dead letters: %d, waiting events: %d; "
            "bus.local(dead_letters=URL) keeps them",
            dead,
            waiting,
        )


async def _tick(shards: list[Shard]) -> None:
    while True:
        await asyncio.sleep(_SILENCE_CHECK_S)
        for shard in shards:
            shard.tick()


def _sql_store(dead_letters: str | None, shard: int) -> Store:
    # SQLAlchemy is more than half of what a program would wait for at its start, and who talks to a bus needs none of it.
    from shardbus.sql.store import SqlStore
    from shardbus.sql.urls import shard_url

    return SqlStore(MEMORY_URL if dead_letters is None else shard_url(dead_letters, shard))
