"""A shard and batches that are not sound: found when their turn comes, and nobody's trouble but their sender's."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from shardbus import Bus, Event
from shardbus.clock import monotonic_ns
from shardbus.config import DEFAULT_LIMITS, PROTOCOL, Limits
from shardbus.journal import Journal, journal_bytes
from shardbus.metrics import Recorder, book_bytes
from shardbus.shard import Shard
from shardbus.testing import MemoryStore
from shardbus.wire.codec import Batch, encode_bodies, pack_keys
from shardbus.wire.frames import Ack, Data, Hello, Ping, Reject, Subscribe, Welcome, decode_to_publisher, encode_frame

EPOCH = b"e"
BOOK = {"keys": 8, "publishers": 2, "log_bytes": 4096}
JOURNAL = {"suspended": 8, "suspects": 8}


class Step(Event, key="key"):
    key: str


def blob(count: int, key: str = "a") -> bytes:
    batch = Batch()
    batch.add_many("Step", [key] * count, encode_bodies([Step(key=key)] * count))
    return batch.seal()


def data(first: int, count: int, packed: bytes) -> bytes:
    return encode_frame(Data(EPOCH, 1, first, count, 1, (), packed, 0, True))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what it looks at tells nobody
            await asyncio.sleep(0.001)


def shard_that_notes(handled: list[str]) -> tuple[Shard, dict[bytes, list[Any]]]:
    """A shard whose handler notes keys, and what it sends to each peer."""
    bus = Bus("batches")
    bus.on(Step)(lambda event: handled.append(event.key))
    return shard_of(bus, monotonic_ns)


def shard_of(
    bus: Bus, now: Callable[[], int], limits: Limits = DEFAULT_LIMITS
) -> tuple[Shard, dict[bytes, list[Any]]]:
    """A shard of an application, and what it sends to each peer."""
    sent: dict[bytes, list[Any]] = defaultdict(list)
    shard = Shard(
        shard=0,
        epoch=EPOCH,
        layout=1,
        plans=bus.plans(),
        store=MemoryStore(),
        recorder=Recorder(memoryview(bytearray(book_bytes(**BOOK))), full=lambda: None, **BOOK),
        journal=Journal(memoryview(bytearray(journal_bytes(**JOURNAL))), **JOURNAL),
        send=lambda peer, frame: sent[peer].append(decode_to_publisher(frame)) or True,
        now=now,
        limits=limits,
        broken=lambda error: pytest.fail(f"the lanes are broken: {error!r}"),
    )
    return shard, sent


@pytest.mark.parametrize("unsound", [b"\x00", blob(2), blob(3)[:-1], blob(3) + b"\x00"])
async def test_a_batch_that_cannot_be_unpacked_ends_its_senders_session_and_nothing_else(unsound: bytes):
    handled: list[str] = []
    shard, sent = shard_that_notes(handled)
    await shard.start()
    for peer, publisher in ((b"bad", b"b" * 16), (b"good", b"g" * 16)):
        shard.receive(peer, encode_frame(Hello(PROTOCOL, publisher, 1, EPOCH, 0)))
        shard.receive(peer, data(0, 2, blob(2)))
    shard.receive(b"bad", data(2, 3, unsound))
    shard.receive(b"good", data(2, 3, blob(3)))
    await until(lambda: any(isinstance(frame, Ack) and frame.cumulative == 5 for frame in sent[b"good"]))
    await until(lambda: Reject(EPOCH, "malformed") in sent[b"bad"])
    assert len(handled) == 7
    shard.receive(b"bad", data(2, 3, blob(3)))
    assert (shard.recorder.counters().malformed, shard.recorder.counters().ignored) == (1, 1)

    # Its publisher may greet again, over another connection, and is told that the shard begins anew.
    shard.receive(b"again", encode_frame(Hello(PROTOCOL, b"b" * 16, 1, EPOCH, 2)))
    before = next(frame for frame in sent[b"bad"] if isinstance(frame, Welcome))
    now = next(frame for frame in sent[b"again"] if isinstance(frame, Welcome))
    assert (now.expected, now.session != before.session) == (2, True)
    shard.receive(b"again", data(2, 3, blob(3)))
    await until(lambda: len(handled) == 10)
    await shard.close()


async def test_a_connection_has_one_session_also_where_it_takes_up_another_publishers():
    handled: list[str] = []
    shard, sent = shard_that_notes(handled)
    await shard.start()
    hellos = {name: encode_frame(Hello(PROTOCOL, name * 16, 1, EPOCH, 0)) for name in (b"a", b"b")}
    shard.receive(b"one", hellos[b"a"])
    shard.receive(b"two", hellos[b"b"])
    shard.receive(b"two", data(0, 3, b"not a batch"))
    shard.receive(b"two", hellos[b"a"])  # b's session rests, with a batch whose turn has not come
    assert shard.publishers == 1
    shard.receive(b"two", data(0, 2, blob(2)))
    await until(lambda: any(isinstance(frame, Ack) and frame.cumulative == 2 for frame in sent[b"two"]))
    assert (len(handled), shard.backlog) == (2, 0)
    assert Reject(EPOCH, "malformed") not in sent[b"two"]
    await shard.close()


@pytest.mark.parametrize("suspends", [False, True])
async def test_a_publisher_whose_events_take_long_leaves_others_their_turn(suspends: bool):
    clock, handled = 1, list[str]()
    bus = Bus("turns")

    @bus.on(Step)
    async def step(event: Step) -> None:
        nonlocal clock
        handled.append(event.key)
        clock += 1_000_000 if event.key == "slow" else 1000
        if suspends:
            await asyncio.sleep(0)

    shard, _ = shard_of(bus, lambda: clock)
    await shard.start()
    for peer in (b"1", b"2", b"3"):
        shard.receive(peer, encode_frame(Hello(PROTOCOL, peer * 16, 1, EPOCH, 0)))
    for first in range(0, 1024, 512):
        shard.receive(b"1", data(first, 512, blob(512, "slow")))
    for seq in range(50):
        shard.receive(b"2", data(seq, 1, blob(1, "quick")))
        shard.receive(b"3", data(seq, 1, blob(1, "quick too")))
    await until(lambda: len(handled) == 1124)
    assert handled[:40].count("slow") < 5  # 100 of the others were there when it began
    assert handled[:110].count("quick") == handled[:110].count("quick too") == 50
    await shard.close()


@pytest.mark.parametrize("suspends", [False, True])
async def test_a_publisher_has_not_had_the_time_in_which_nothing_of_it_ran(suspends: bool):
    clock, begun, handled = 1, 0, 0
    gate = asyncio.Event()
    bus = Bus("turns")

    @bus.on(Step)
    async def step(event: Step) -> None:
        nonlocal clock, begun, handled
        begun += 1
        clock += 1000
        if suspends:
            await gate.wait()
        handled += 1

    shard, _ = shard_of(bus, lambda: clock)
    await shard.start()
    for peer in (b"1", b"2"):
        shard.receive(peer, encode_frame(Hello(PROTOCOL, peer * 16, 1, EPOCH, 0)))
    for seq in range(3):
        shard.receive(b"1", data(seq, 1, blob(1, f"k{seq}")))
        await until(lambda seq=seq: begun == seq + 1)
        await asyncio.sleep(0.01)
        clock += 1_000_000_000
    gate.set()
    await until(lambda: handled == 3)
    shard.receive(b"2", data(0, 1, blob(1)))
    await until(lambda: handled == 4)
    assert shard._peers[b"1"].session.clock_ns == 3000
    await shard.close()


async def test_a_key_that_catches_up_leaves_others_their_turn():
    clock, handled, gate = 1, list[str](), asyncio.Event()
    bus = Bus("turns")

    @bus.on(Step)
    async def step(event: Step) -> None:
        nonlocal clock
        if event.key == "slow":
            await gate.wait()
            clock += 1_000_000
        handled.append(event.key)

    shard, _ = shard_of(bus, lambda: clock)
    await shard.start()
    for peer in (b"1", b"2"):
        shard.receive(peer, encode_frame(Hello(PROTOCOL, peer * 16, 1, EPOCH, 0)))
    shard.receive(b"1", data(0, 512, blob(512, "slow")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gate.set()
    for seq in range(50):
        shard.receive(b"2", data(seq, 1, blob(1, "quick")))
    await until(lambda: len(handled) == 562)
    assert handled.index("quick") < 20
    assert handled[:130].count("quick") == 50
    await shard.close()


def few_publishers() -> tuple[Shard, dict[bytes, list[Any]], list[int]]:
    """A shard with room for three publishers, and its clock."""
    clock = [1]
    bus = Bus("crowded")

    @bus.on(Step)
    async def step(event: Step) -> None:
        if event.key == "long":
            await asyncio.Event().wait()

    return *shard_of(bus, lambda: clock[0], Limits(sessions_max=3)), clock


def greet(shard: Shard, sent: dict[bytes, list[Any]], peer: bytes, publisher: bytes, first: int = 0) -> bool:
    """Whether there was a place."""
    shard.receive(peer, encode_frame(Hello(PROTOCOL, publisher * 16, 1, EPOCH, first)))
    frame = next(frame for frame in reversed(sent[peer]) if isinstance(frame, Welcome | Reject))
    return isinstance(frame, Welcome)


async def test_who_comes_takes_the_place_of_who_was_idle_longest_and_that_one_comes_back():
    shard, sent, clock = few_publishers()
    await shard.start()
    for peer in (b"1", b"2", b"3"):
        assert greet(shard, sent, peer, peer)
    assert not greet(shard, sent, b"4", b"4")  # all have only just come
    clock[0] += 2_000_000_000
    shard.receive(b"1", data(0, 1, blob(1)))
    for peer in (b"2", b"3"):  # to be there is not to do something
        shard.receive(peer, encode_frame(Ping(EPOCH, 0, 1)))
    assert greet(shard, sent, b"4", b"4")
    shard.receive(b"2", data(0, 1, blob(1)))
    assert sent[b"2"][-1] == Reject(EPOCH, "unknown-session")
    assert greet(shard, sent, b"2", b"2")  # in the place of the third
    shard.receive(b"3", encode_frame(Ping(EPOCH, 0, 2)))
    assert sent[b"3"][-1] == Reject(EPOCH, "unknown-session")
    assert shard.publishers == 3
    await shard.close()


async def test_who_has_something_unfinished_or_listens_keeps_its_place():
    shard, sent, clock = few_publishers()
    await shard.start()
    for peer in (b"1", b"2", b"3"):
        assert greet(shard, sent, peer, peer)
    shard.receive(b"1", data(0, 1, blob(1, "long")))
    for peer in (b"2", b"3"):
        shard.receive(peer, encode_frame(Subscribe(EPOCH, 1, ("Step",), pack_keys(["a"]))))
    clock[0] += 5_000_000_000
    assert not greet(shard, sent, b"4", b"4")
    await shard.close()


async def test_those_who_were_silent_and_come_back_all_at_once_are_no_more_than_there_is_room_for():
    shard, sent, clock = few_publishers()
    await shard.start()
    for number in range(12):
        peer = bytes([65 + number])
        greet(shard, sent, peer, peer)
        clock[0] += 31_000_000_000
        shard.tick()
    assert shard.publishers == 0
    came_back = [greet(shard, sent, bytes([97 + number]), bytes([65 + number])) for number in range(12)]
    assert (sum(came_back), shard.publishers) == (3, 3)
    await shard.close()
