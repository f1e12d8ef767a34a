"""The cursor over a batch: what it notes as evidence, where rows are skipped, and for whom it takes no times."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from shardbus.errors import RemoteProtocolError
from shardbus.inbound import Inbound
from shardbus.metrics import Book, Evidence, Recorder, book_bytes
from shardbus.wire.codec import Batch, encode_bodies
from shardbus.wire.frames import Data

PUBLISHER = b"p" * 16
SIZES = {"keys": 8, "publishers": 2, "log_bytes": 1024}
US = 1000


def data(first: int, count: int, blob: bytes) -> Data:
    return Data(epoch=b"", layout=1, first=first, count=count, attempt=1, skip=(), blob=blob)


class Cursor:
    """A cursor over five rows, 1 to 5, each due at 1 µs, and the book behind it."""

    def __init__(self, skip: tuple[int, ...] = (), intended_ns: Sequence[int] | None = (US,) * 5) -> None:
        buffer = memoryview(bytearray(book_bytes(**SIZES)))
        self.book = Book(buffer, **SIZES)
        self.recorder = Recorder(buffer, full=lambda: None, **SIZES)
        session: Any = SimpleNamespace(publisher=PUBLISHER, unopened_bytes=0, finish_range=lambda first, end: end - first)
        batch = Batch()
        batch.add_many("Step", ["k"] * 5, encode_bodies([None] * 5))
        batch.stamp_many([1, 2, 3, 4, 5], intended_ns, 5)
        self.inbound = Inbound(session, self.recorder, data(1, 5, batch.seal()), skip, 0)
        self.inbound.open({}, careful=True)

    def run(self, rows: int, began_us: int, *ended_us: int) -> None:
        """As a leader does: it begins, rows end, and one more is under way where it stops in one."""
        self.inbound.began_ns = began_us * US
        for _ in range(rows):
            next(self.inbound.rows)
        if self.inbound.timed:
            self.inbound.ended_ns.extend(us * US for us in ended_us)

    def evidence(self) -> Evidence:
        self.recorder.flush()
        self.book.fold(1)
        found = self.book.evidence(0, PUBLISHER)
        assert found is not None
        return found


@pytest.mark.parametrize("skip", [(), (2, 4)])
def test_rows_that_follow_each_other_share_out_the_time(skip: tuple[int, ...]):
    cursor = Cursor(skip)
    ends_us = (13, 17, 28)
    cursor.run(3, 11, *ends_us)
    cursor.inbound.finish_before(cursor.inbound.next_seq)
    found = cursor.evidence()
    assert (found.service, found.queue) == ([(2, 1), (4, 1), (11, 1)], [(10, 1), (12, 1), (16, 1)])
    assert found.latency == [(12, 1), (16, 1), (27, 1)]
    assert found.samples == 3


@pytest.mark.parametrize("skip", [(), (2, 4)])
def test_a_row_that_is_taken_out_began_when_the_one_before_it_ended(skip: tuple[int, ...]):
    cursor = Cursor(skip)
    cursor.run(2, 11, 13)
    cursor.inbound.hold()
    assert cursor.inbound.delivery().began_ns == 13 * US
    cursor.run(1, 20, 26)  # somebody goes on later
    cursor.inbound.finish_before(cursor.inbound.next_seq)
    assert cursor.evidence().service == [(2, 1), (6, 1)]


def test_a_first_row_that_is_taken_out_began_with_its_leader():
    cursor = Cursor()
    cursor.run(1, 11)
    cursor.inbound.hold()
    assert cursor.inbound.delivery().began_ns == 11 * US


@pytest.mark.parametrize("skip", [(), (2, 4)])
def test_rows_without_intended_instants_have_no_times(skip: tuple[int, ...]):
    cursor = Cursor(skip, None)
    assert not cursor.inbound.timed
    cursor.run(3, 0)
    cursor.inbound.finish_before(cursor.inbound.next_seq)
    found = cursor.evidence()
    assert (found.samples, found.latency, found.service, found.queue) == (0, [], [], [])


@pytest.mark.parametrize("blob", [b"", b"\x00", Batch().seal(), b"\xc1" * 100])
def test_a_batch_that_is_not_sound_is_found_when_its_turn_comes(blob: bytes):
    cursor = Cursor()
    inbound = Inbound(cursor.inbound.session, cursor.recorder, data(6, 2, blob), (), 0)
    assert inbound.next_seq == 6
    with pytest.raises(RemoteProtocolError):
        inbound.open({}, careful=False)
