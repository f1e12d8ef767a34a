"""The window of a stream, on both sides: what its handler may yield, and what its reader may get."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from shardbus.config import Limits
from shardbus.errors import CommandFailed, RemoteProtocolError
from shardbus.outlet import Outlet
from shardbus.streams import BROKEN, Flow


class Sink:
    """An outlet, and what it has sent."""

    def __init__(self, window: int, limits: Limits | None = None) -> None:
        self.sent: list[tuple[int, tuple[bytes, ...]]] = []
        self.outlet = Outlet(lambda item: item, window, limits or Limits(), lambda *sent: self.sent.append(sent))
        self.at = 0

    async def items(self, total: int, size: int = 1) -> AsyncGenerator[bytes, None]:
        for self.at in range(1, total + 1):
            yield bytes(size)

    async def settled(self) -> int:
        """How far the generator has come once nothing moves any more."""
        for _ in range(20):
            await asyncio.sleep(0)
        return self.at


async def test_a_generator_is_advanced_as_far_as_the_window_allows_and_not_further():
    sink = Sink(3)
    draining = asyncio.create_task(sink.outlet.drain(sink.items(10)))
    assert await sink.settled() == 3
    sink.outlet.allow(4)
    assert await sink.settled() == 4
    sink.outlet.allow(3)  # came late
    assert await sink.settled() == 4
    sink.outlet.allow(100)
    await draining
    assert sink.outlet.count == 10
    assert [(first, len(items)) for first, items in sink.sent] == [(0, 3), (3, 1), (4, 6)]


async def test_bytes_that_were_not_read_hold_a_generator_up():
    sink = Sink(100, Limits(stream_bytes_max=1000))
    draining = asyncio.create_task(sink.outlet.drain(sink.items(10, 400)))
    assert await sink.settled() == 3
    sink.outlet.allow(101)  # one was read
    assert await sink.settled() == 4
    draining.cancel()
    await asyncio.wait([draining])
    assert draining.cancelled()


async def test_frames_of_a_stream_are_bounded():
    sink = Sink(1024)
    await sink.outlet.drain(sink.items(1000))
    sink.outlet.flush()
    assert [(first, len(items)) for first, items in sink.sent] == [(0, 512), (512, 488)]
    large = Sink(10)
    await large.outlet.drain(large.items(3, 200_000))
    large.outlet.flush()
    assert [len(items) for _, items in large.sent] == [1, 1, 1]
    with pytest.raises(ValueError, match="an item has"):
        await large.outlet.drain(large.items(1, 1024 * 1024 + 1))


async def test_a_reader_allows_more_in_halves_of_its_window():
    flow = Flow("Chat", 8)
    flow.put(0, (b"a",) * 8)
    assert [flow.take()[1] for _ in range(8)] == [0, 0, 0, 12, 0, 0, 0, 16]


async def test_a_reader_is_never_left_waiting_by_a_window_of_one():
    flow = Flow("Chat", 1)
    for n in range(3):
        flow.put(n, (b"a",))
        assert flow.take() == (b"a", n + 2)


async def test_more_items_than_were_allowed_are_not_sound():
    flow = Flow("Chat", 2)
    with pytest.raises(RemoteProtocolError):
        flow.put(0, (b"a",) * 3)


@pytest.mark.parametrize("where", ["in the middle", "at the end"])
async def test_items_that_were_lost_end_a_stream_with_an_error(where: str):
    flow = Flow("Chat", 8)
    flow.put(0, (b"a", b"b"))
    if where == "in the middle":
        flow.put(3, (b"d",))
        await flow.change()
    else:
        flow.reply.set_result(3)
    assert [flow.take()[0] for _ in range(2)] == [b"a", b"b"]
    with pytest.raises(CommandFailed) as raised:
        flow.end()
    assert raised.value.error_type == BROKEN
