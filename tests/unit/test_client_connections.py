"""What a client does with its connections when the bus changes under it, over channels that lead nowhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from shardbus import CommandLost
from shardbus.client import Client
from shardbus.config import Limits
from shardbus.errors import ConfigError
from shardbus.messages import Command, Event
from shardbus.routing import ShardAddress, Table, even_slots
from shardbus.wire.frames import Ack, Reject, TableChanged, Welcome, encode_frame
from shardbus.wire.session import State

LIMITS = Limits(batch_events_max=4, outbox_events_max=32, session_credit_events_max=24)
CREDIT = (1000, 10**6)


class Keyed(Event, key="key"):
    key: str


class Keyless(Event):
    n: int


class Ask(Command[int], key="key"):
    key: str


class Channel:
    def __init__(self, network: Network) -> None:
        self._network = network

    def send(self, _frame: bytes) -> bool:
        return True

    def close(self) -> None:
        self._network.open_channels -= 1


class Network:
    """A `Connector`; the next `failures` channels to workers cannot be opened."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.open_channels = 0
        self.failures = 0
        self.closed = False

    def open(self, address: str, on_frame: Callable[[bytes], None]) -> Channel:
        if self.failures and address != "control":
            self.failures -= 1
            raise ConfigError("no socket can be opened: Too many open files")
        self.opened.append(address)
        self.open_channels += 1
        return Channel(self)

    def close(self) -> None:
        self.closed = True


def table(version: int, *epochs: bytes, incarnation: bytes = b"i" * 16) -> bytes:
    """What a supervisor says: a shard for each epoch; an empty one is down."""
    shards = [ShardAddress(shard=at, epoch=epoch, address=f"w{at}-{epoch!r}") for at, epoch in enumerate(epochs)]
    found = Table(incarnation=incarnation, layout=1, version=version, slots=even_slots(len(epochs)), shards=shards)
    return encode_frame(TableChanged(msgspec.msgpack.encode(found)))


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
async def client(network: Network) -> AsyncIterator[Client]:
    client = Client("nowhere", network, "control", limits=LIMITS, ticks=False)
    yield client
    await client.abort()


async def start(client: Client, *epochs: bytes) -> None:
    starting = asyncio.create_task(client.start(5.0))
    await asyncio.sleep(0)
    client._on_control(table(1, *epochs))
    await starting


def welcome(client: Client, shard: int, epoch: bytes) -> None:
    client._on_worker(client._outboxes[shard], encode_frame(Welcome(epoch, 0, 1, *CREDIT)))


async def test_a_channel_that_could_not_be_opened_is_opened_later_and_said_once(
    client: Client, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    await start(client, b"e1", b"f1")
    network.failures = 3
    client._on_control(table(2, b"e2", b"f1"))
    client._on_control(table(2, b"e2", b"f1"))
    assert network.open_channels == 2
    assert [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING] == [
        "no connection to shard 0, which is tried again: no socket can be opened: Too many open files"
    ]
    for _ in range(3):
        client.tick()
    assert network.opened[-1] == "w0-b'e2'"
    assert network.open_channels == 3
    welcome(client, 0, b"e2")
    assert client._outboxes[0].session.state is State.OPEN


async def test_one_shard_that_cannot_be_reached_does_not_keep_the_others_from_being_followed(
    client: Client, network: Network
) -> None:
    await start(client, b"e1", b"f1")
    network.failures = 1
    client._on_control(table(2, b"e2", b"f2"))
    assert network.opened[-1] == "w1-b'f2'"


async def test_after_a_change_of_shards_the_ledger_goes_on_and_commands_under_way_are_lost(client: Client) -> None:
    await start(client, b"e1")
    welcome(client, 0, b"e1")
    for _ in range(3):
        await client.publish(Keyed(key="a"))
    await asyncio.sleep(0)
    client._on_worker(client._outboxes[0], encode_frame(Ack(b"e1", 3, 3, (), True, 2, 1, *CREDIT)))
    identity = client.publisher
    asking = asyncio.create_task(client.execute(Ask(key="a")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    client._on_control(table(1, b"f1", b"f2", incarnation=b"j" * 16))
    ledger = client.ledger()
    assert (ledger.published, ledger.handled, ledger.dead, ledger.waiting, ledger.in_flight) == (3, 0, 2, 1, 0)
    with pytest.raises(CommandLost):
        await asking
    assert client.publisher != identity  # sequences begin anew, and must not be taken for those of before


async def test_who_is_cancelled_while_letting_go_has_let_go(network: Network) -> None:
    client = Client("nowhere", network, "control")
    starting = asyncio.create_task(client.start(5.0))
    await asyncio.sleep(0.01)
    starting.cancel()
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert (network.open_channels, network.closed) == (0, True)


async def test_events_without_a_key_go_where_there_is_room_while_a_shard_is_down(client: Client) -> None:
    await start(client, b"e1", b"")
    welcome(client, 0, b"e1")
    session = client._outboxes[0].session
    async with asyncio.timeout(10):
        for n in range(500):
            await client.publish(Keyless(n=n))
            await asyncio.sleep(0)
            done = session.next_seq
            client._on_worker(client._outboxes[0], encode_frame(Ack(b"e1", done, done, (), True, 0, 0, *CREDIT)))
    assert client._outboxes[1].session.held_events <= 1


async def test_a_client_that_finds_no_place_at_a_worker_says_so_once(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    await start(client, b"e1")
    for _ in range(3):
        client._on_worker(client._outboxes[0], encode_frame(Reject(b"e1", "too-many-publishers")))
    assert [one.getMessage() for one in caplog.records] == [
        "shard 0 serves as many publishers as it can; this one waits for a place"
    ]
