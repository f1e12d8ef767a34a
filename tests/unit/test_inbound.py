"""The cursor over a batch: what it notes as evidence, where rows are skipped, and for whom it takes no times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shardbus.inbound import Inbound
from shardbus.metrics import Book, Evidence, Recorder, book_bytes
from shardbus.wire.codec import Columns, pack_keys

PUBLISHER = b"p" * 16
SIZES = {"keys": 8, "publishers": 2, "log_bytes": 1024}
US = 1000


def column(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)


class Cursor:
    """A cursor over five rows, 1 to 5, each due at 1 µs, and the book behind it."""

    def __init__(self, skip: tuple[int, ...] = (), intended_ns: bytes | None = column(*[US] * 5)) -> None:
        buffer = memoryview(bytearray(book_bytes(**SIZES)))
        self.book = Book(buffer, **SIZES)
        self.recorder = Recorder(buffer, full=lambda: None, **SIZES)
        session: Any = SimpleNamespace(publisher=PUBLISHER, finish_range=lambda first, end: end - first)
        keys = ["k"] * 5
        packed = memoryview(pack_keys(keys))
        columns = Columns("Step", keys, packed, (b"",) * 5, column(1, 2, 3, 4, 5), intended_ns, {})
        self.inbound = Inbound(session, self.recorder, 1, 5, 1, skip, columns, 0)
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
