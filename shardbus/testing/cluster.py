"""Shards in one process that die and have successors, the channels to them, and what a supervisor does for both.

The simulation of the bus's own tests lives on it, and so does the kit for those of applications: each says how frames are
carried, what a store is, and when which shard dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from shardbus.config import Limits
from shardbus.handler_client import HandlerClient
from shardbus.journal import Journal, journal_bytes
from shardbus.metrics import Book, Recorder, book_bytes
from shardbus.outboxes import Channel
from shardbus.outgoing import worker_publisher
from shardbus.quarantine import Ended
from shardbus.registry import Plan, StateMaker
from shardbus.routing import ShardAddress, Table, even_slots
from shardbus.shard import Shard
from shardbus.testing.memory_store import MemoryRows, MemoryStore
from shardbus.wire.frames import Answer, TableChanged, decode_to_supervisor, encode_frame

CONTROL: Final = "control"
"""The supervisor's address."""


class ClusterChannel:
    """One way to a peer."""

    def __init__(self, cluster: Cluster, deliver: Callable[[bytes], None]) -> None:
        self._cluster = cluster
        self._deliver = deliver
        self.open = True

    def send(self, frame: bytes) -> bool:
        """Have the cluster carry a frame."""
        self._cluster.carry(frame, self._arrive)
        return True

    def _arrive(self, frame: bytes) -> None:
        if self.open or self._cluster.lingers:
            self._deliver(frame)

    def close(self) -> None:
        """What is on its way arrives no more, unless the cluster says that it does."""
        self.open = False


class ClusterConnector:
    """Opens channels to a cluster; a `client.Connector`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def open(self, address: str, on_frame: Callable[[bytes], None]) -> Channel:
        """See `Connector.open`."""
        cluster = self._cluster
        back = ClusterChannel(cluster, on_frame)
        if address == CONTROL:
            cluster.control.append(back)
            return ClusterChannel(cluster, lambda frame: cluster.answer(frame, back))
        cluster.peers += 1
        peer = cluster.peers.to_bytes(4, "big")
        cluster.back[peer] = back
        at, counter = map(int, address.split("/"))
        return ClusterChannel(cluster, lambda frame: cluster.to_shard(at, counter, peer, frame))

    def close(self) -> None:
        """See `Connector.close`."""


class _MortalConnector(ClusterConnector):
    """A shard's own: nothing leaves a process that has been killed."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self._dead = False

    def open(self, address: str, on_frame: Callable[[bytes], None]) -> Channel:
        """See `Connector.open`."""
        return _MortalChannel(self, super().open(address, lambda frame: None if self._dead else on_frame(frame)))

    def die(self) -> None:
        """Its process is killed."""
        self._dead = True

    def send(self, channel: Channel, frame: bytes) -> bool:
        """Send what a process that lives may send."""
        return self._dead or channel.send(frame)


class _MortalChannel:
    def __init__(self, connector: _MortalConnector, channel: Channel) -> None:
        self._connector = connector
        self._channel = channel

    def send(self, frame: bytes) -> bool:
        return self._connector.send(self._channel, frame)

    def close(self) -> None:
        self._channel.close()


class Cluster:
    """Shards by number, None where one is dead; their rows, journals and evidence, which outlive them.

    Subclasses say the rest: `carry`, `plans`, `limits_now` and, where they differ, `session_states`, `new_store` and
    `new_book`.
    """

    ticks = True
    """Whether the clients of its handlers tick by themselves."""
    lingers = False
    """Whether what a client has sent arrives when it closes, its last words too."""

    def __init__(
        self,
        shards_count: int,
        *,
        now_ns: Callable[[], int],
        wall_ns: Callable[[], int],
        chance: Callable[[], float],
        book: Mapping[str, int],
        journal: Mapping[str, int],
    ) -> None:
        self.shards_count = shards_count
        self.now_ns = now_ns
        self.wall_ns = wall_ns
        self.control: list[ClusterChannel] = []
        self.peers = 0
        self.back: dict[bytes, ClusterChannel] = {}
        self.rows = [MemoryRows() for _ in range(shards_count)]
        self.shards: list[Shard | None] = [None] * shards_count
        self.stores: list[MemoryStore | None] = [None] * shards_count
        self.journals = [bytearray(journal_bytes(**journal)) for _ in range(shards_count)]
        self.buffers = [bytearray(book_bytes(**book)) for _ in range(shards_count)]
        self.live_journals: dict[int, Journal] = {}
        self._book = book
        self._journal = journal
        self._chance = chance
        self.books = [self.new_book(buffer) for buffer in self.buffers]
        self.outgoing: dict[int, HandlerClient] = {}  # of each shard's handlers
        self._connectors: dict[int, _MortalConnector] = {}
        self.ends = [Ended() for _ in range(shards_count)]
        self.starting: set[int] = set()
        self.counters = [0] * shards_count  # incarnations
        self.version = 0
        self.slots = even_slots(shards_count)
        self.packed: tuple[object, bytes] = (None, b"")  # the table, and of what it is one
        self.broken: list[BaseException] = []
        self.deaths: list[asyncio.Task[None]] = []

    # -- what subclasses say

    def carry(self, frame: bytes, deliver: Callable[[bytes], None]) -> None:
        """Bring a frame to its peer, now, later, or never."""
        raise NotImplementedError

    def plans(self, at: int) -> Mapping[str, Plan]:
        """What a shard runs."""
        raise NotImplementedError

    def limits_now(self) -> Limits:
        """The limits of a shard that starts now."""
        raise NotImplementedError

    def session_states(self, at: int) -> StateMaker | None:  # noqa: ARG002 - for subclasses
        """How the sessions of a shard get their state."""
        return None

    def new_store(self, at: int) -> MemoryStore:
        """A store over the shard's rows."""
        return MemoryStore(self.rows[at])

    def new_book(self, buffer: bytearray) -> Book:
        """The supervisor's side of a shard's evidence."""
        return Book(memoryview(buffer), **self._book)

    # -- the supervisor

    def table(self) -> bytes:
        """The routing table, packed; kept, because it is asked for much more often than it changes."""
        live = tuple(counter if shard is not None else 0 for counter, shard in zip(self.counters, self.shards, strict=True))
        if self.packed[0] != (self.version, live):
            shards = [
                ShardAddress(shard=at, epoch=self.epoch(at) if counter else b"", address=f"{at}/{self.counters[at]}")
                for at, counter in enumerate(live)
            ]
            table = Table(incarnation=b"i" * 16, layout=1, version=self.version, slots=self.slots, shards=shards)
            self.packed = ((self.version, live), msgspec.msgpack.encode(table))
        return self.packed[1]

    def epoch(self, shard: int) -> bytes:
        """The epoch of a shard's present incarnation."""
        return b"i" * 16 + shard.to_bytes(2, "big") + self.counters[shard].to_bytes(6, "big")

    def announce(self) -> None:
        """Tell all clients that the table has changed."""
        self.version += 1
        for back in self.control:
            back.send(encode_frame(TableChanged(self.table())))

    def answer(self, frame: bytes, back: ClusterChannel) -> None:
        """Answer a question to the supervisor."""
        ask = decode_to_supervisor(frame)
        if ask.what == "table":
            back.send(encode_frame(Answer(ask.request, "", self.table())))
        else:
            back.send(encode_frame(Answer(ask.request, f"this bus cannot be asked for {ask.what!r}", b"")))

    def to_shard(self, at: int, counter: int, peer: bytes, frame: bytes) -> None:
        """A frame arrives at an incarnation of a shard."""
        shard = self.shards[at]
        if shard is not None and counter == self.counters[at]:
            shard.receive(peer, frame)

    def from_shard(self, at: int, counter: int) -> Callable[[bytes, bytes], bool]:
        """How an incarnation of a shard sends."""

        def send(peer: bytes, frame: bytes) -> bool:
            if counter == self.counters[at] and self.shards[at] is not None:
                self.back[peer].send(frame)
            return True

        return send

    # -- births and deaths

    def new_shard(self, at: int) -> Shard:
        """The next incarnation of a shard, not started yet."""
        self.counters[at] += 1
        self.starting.add(at)
        store = self.stores[at] = self.new_store(at)
        journal = self.live_journals[at] = Journal(memoryview(self.journals[at]), **self._journal)
        connector = self._connectors[at] = _MortalConnector(self)
        epoch = self.epoch(at)
        outgoing = self.outgoing[at] = HandlerClient(
            "cluster",
            lambda: connector,
            CONTROL,
            publisher=worker_publisher(epoch),
            broken=self.broken.append,
            limits=self.limits_now(),
            now=self.now_ns,
            ticks=self.ticks,
        )
        return Shard(
            shard=at,
            epoch=epoch,
            layout=1,
            plans=self.plans(at),
            store=store,
            recorder=Recorder(memoryview(self.buffers[at]), full=lambda: self.fold(at), **self._book),
            journal=journal,
            send=self.from_shard(at, self.counters[at]),
            now=self.now_ns,
            limits=self.limits_now(),
            broken=self.broken.append,
            wall=self.wall_ns,
            chance=self._chance,
            predecessor=self.ends[at],
            outgoing=outgoing,
            states=self.session_states(at),
        )

    def fold(self, at: int) -> None:
        """Take in what a shard has noted."""
        self.books[at].fold(self.now_ns())

    async def start_shard(self, at: int) -> None:
        """Start the next incarnation of a shard, and tell everybody."""
        shard = self.shards[at] = self.new_shard(at)
        await shard.start()
        self.starting.discard(at)
        self.announce()

    def kill_shard(self, at: int, ended: Ended) -> None:
        """End a shard as SIGKILL would: nothing is committed or sent any more."""
        shard, self.shards[at] = self.shards[at], None
        if shard is None:
            return
        store = self.stores[at]
        assert store is not None
        store.dead = True
        self.live_journals[at].pulse(self.now_ns())
        self.ends[at] = ended
        self.journals[at] = bytearray(self.journals[at])  # as it is now: the dead write no more
        self.bury_evidence(at)
        self.buffers[at] = bytearray(self.buffers[at])
        self.books[at] = self.new_book(self.buffers[at])  # as if the supervisor had died, too
        self._connectors[at].die()
        for life in (shard.close(killed=True), self.outgoing[at].close()):
            self.deaths.append(asyncio.get_running_loop().create_task(life))
        self.announce()

    def bury_evidence(self, at: int) -> None:
        """A shard has died: take in what it has noted."""
        self.fold(at)
