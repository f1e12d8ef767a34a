"""What waits behind a busy key: what is in memory, what in the store, which heads may run, and which lanes sleep."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from shardbus.config import DEFAULT_LIMITS, Limits
from shardbus.inbound import UNKNOWN, Delivery, Later
from shardbus.journal import Journal, journal_bytes
from shardbus.lane_book import Lane, LaneBook, Rest
from shardbus.lane_host import LaneHost
from shardbus.messages import WireKey
from shardbus.outgoing import Children
from shardbus.wire.codec import Extra

JOURNAL = {"suspended": 8, "suspects": 8}


class Host:
    """A store that is written at once, and answers when it is told to."""

    def __init__(self) -> None:
        self.has_room = True
        self.kept: list[Delivery] = []
        self.asked: list[tuple[int, int, int, Callable[[list[Delivery]], None]]] = []
        self.refused: list[Delivery] = []
        self.amended: list[Delivery] = []

    def can_keep(self, deliveries: Sequence[Delivery]) -> bool:
        return self.has_room

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.kept.append(delivery)
            delivery.position = len(self.kept)

    def amend(self, delivery: Delivery) -> None:
        self.amended.append(delivery)

    def load(self, key: WireKey, after: int, upto: int, limit: int, then: Callable[[list[Delivery]], None]) -> None:
        self.asked.append((after, upto, limit, then))

    def reply(self, delivery: Delivery, status: str, body: bytes) -> None:
        self.refused.append(delivery)

    def handled(self, count: int) -> None:
        pass


class Book:
    """A book, and what it has told and asked."""

    def __init__(self, **limits: int) -> None:
        self.host, self.woken, self.now_ns = Host(), 0, 1
        journal = Journal(memoryview(bytearray(journal_bytes(**JOURNAL))), **JOURNAL)
        self.of = LaneBook(
            cast(LaneHost, self.host),
            Limits(**limits) if limits else DEFAULT_LIMITS,
            lambda: self.now_ns,
            journal,
            contextvars.copy_context(),
            self._wake,
        )

    def _wake(self) -> None:
        self.woken += 1

    def lane(self, *behind: Delivery, key: WireKey = "k") -> Lane:
        """A lane of which something runs, and these behind it."""
        lane = self.of.open(key)
        lane.running = event(key)
        for one in behind:
            self.of.append(lane, one)
        return lane

    def ended(self, lane: Lane) -> None:
        """What ran of a lane has ended."""
        lane.running = None
        self.of.proceed(lane)


def event(key: WireKey = "k", position: int = 0) -> Delivery:
    return Delivery(None, b"p" * 16, 0, "Step", UNKNOWN, key, b"", 0, 0, 1, position=position)


def command(key: WireKey = "k") -> Delivery:
    return Delivery(None, b"p" * 16, 0, "Ask", UNKNOWN, key, b"", 0, 0, 1, Extra(0, None, 1_000_000_000, False))


def told(lane: Lane) -> list[tuple[int, int, int] | int]:
    """What is in a lane: positions of what is in memory, and stretches as after, count, last."""
    return [one.position if isinstance(one, Delivery) else (one.after, one.count, one.last) for one in lane.queue]


# -- one lane


def test_what_follows_in_the_store_makes_one_stretch():
    lane = Lane("k", None)
    for position in (4, 7):
        lane.follow(position)
    assert told(lane) == [(3, 2, 7)]
    lane.opened().append(event(position=8))
    for position in (9, 10):
        lane.follow(position)
    assert told(lane) == [(3, 2, 7), 8, (8, 2, 10)]


def test_what_precedes_in_the_store_is_read_back_first():
    lane = Lane("k", None)
    lane.precede(5)
    assert told(lane) == [(4, 1, 5)]
    lane.precede(3)
    assert told(lane) == [(2, 2, 5)]
    lane = Lane("k", None)
    lane.opened().append(event(position=8))
    lane.precede(5)
    assert told(lane) == [(4, 1, 5), 8]


def test_a_lane_is_unloaded_from_where_it_is_asked_to_be():
    lane = Lane("k", None)
    lane.opened().extend([event(position=at) for at in (1, 2, 4)])
    lane.follow(6)
    assert [one.position for one in lane.unload(1)] == [2, 4]
    assert told(lane) == [1, (1, 3, 6)]
    assert [one.position for one in lane.unload(0)] == [1]
    assert told(lane) == [(0, 4, 6)]
    assert isinstance(lane.queue, tuple)  # of which there may be very many
    assert lane.unload(0) == []


@pytest.mark.parametrize("stays", ["a command", "an event that is not stored", "one that has published"])
def test_nothing_is_unloaded_where_the_store_has_not_all_of_it(stays: str):
    last = command() if stays == "a command" else event(position=0 if stays == "an event that is not stored" else 2)
    if stays == "one that has published":
        last.children = Children()
        last.children.pending["handler"] = 1
    lane = Lane("k", None)
    lane.opened().extend([event(position=1), last])
    assert lane.unload(0) == []
    assert told(lane) == [1, last.position]


def test_a_lane_sleeps_only_while_it_rests_and_the_store_has_all_of_it():
    lane = Lane("k", None)
    lane.opened().append(event(position=1))
    asleep = []
    for lane.stored in (False, True):
        for lane.rest in Rest:
            asleep += [(lane.stored, lane.rest)] if lane.is_asleep else []
    assert asleep == [(True, Rest.NOT_DUE), (True, Rest.PARKING), (True, Rest.PARKED)]
    lane.opened().append(command())
    assert not lane.is_asleep


# -- all lanes


def test_the_first_head_that_is_ready_wakes_the_leader_and_others_do_not():
    book = Book()
    first, second = (book.lane(event(key), key=key) for key in ("a", "b"))
    book.ended(first)
    book.ended(second)
    assert (list(book.of.ready), book.woken, book.of.queued) == ([first, second], 1, 2)
    for _ in range(2):
        book.of.take(book.of.ready.popleft())
    assert book.of.queued == 0
    book.of.append(first, event("a"))
    book.ended(first)
    assert book.woken == 2


def test_a_lane_whose_last_message_has_ended_is_gone():
    book = Book()
    keyed, loose = book.lane(), book.lane(key=None)
    assert not book.of.is_asleep
    book.ended(keyed)
    book.ended(loose)
    assert (book.of.busy, book.of.is_asleep, book.of.told()) == ({}, True, [])


def test_a_lane_that_grows_too_long_goes_to_the_store_with_what_runs():
    book = Book(lane_events_max=100)
    behind = [event() for _ in range(101)]
    lane = book.lane(*behind)
    assert lane.running is not None
    assert book.host.kept == [lane.running, *behind]
    assert told(lane) == [*range(2, 66), (65, 37, 102)]
    assert book.of.queued == 64
    last = event()
    book.of.append(lane, last)
    assert told(lane)[-1] == (65, 38, 103)


def test_a_lane_for_which_the_store_has_no_room_stays_in_memory():
    book = Book(lane_events_max=100)
    book.host.has_room = False
    lane = book.lane(*(event() for _ in range(101)))
    assert (book.host.kept, lane.stored, book.of.queued) == ([], False, 101)
    book.host.has_room = True
    book.of.append(lane, event())
    assert (lane.stored, len(book.host.kept)) == (True, 103)


def test_what_lies_in_the_store_is_read_back_before_it_runs():
    book = Book()
    book.of.adopt("k", 3, after=10, last=15)
    ((after, upto, limit, then),) = book.host.asked
    assert (after, upto, limit) == (10, 15, 3)
    assert not book.of.ready
    then([event(position=11), event(position=13)])
    (lane,) = book.of.ready
    assert told(lane) == [11, 13, (13, 1, 15)]


def test_rows_without_a_key_wait_each_for_itself():
    book = Book()
    book.of.adopt(None, 2)
    book.host.asked[0][-1]([event(None, 1), event(None, 2)])
    assert [told(lane) for lane in book.of.ready] == [[1], [2]]


async def test_a_lane_whose_head_is_not_due_sleeps_until_then_where_the_store_has_it():
    book = Book()
    lane = book.lane()
    head = event()
    book.of.postpone(head, Later(0.001, ran=True))
    assert (head.attempt, lane.rest, book.of.is_asleep) == (2, Rest.NOT_DUE, False)
    book.of.adopt("stored", 1, due_ns=2**62)
    assert book.of.busy["stored"].rest is Rest.NOT_DUE
    book.now_ns = head.due_ns
    async with asyncio.timeout(10):
        while not book.of.ready:  # noqa: ASYNC110 - its timer tells nobody
            await asyncio.sleep(0.001)
    assert (lane.rest, lane.timer, head.journalled) == (Rest.NONE, None, 0)
    assert book.of.take(book.of.ready.popleft()) is head
    book.of.begin(lane, head)
    assert head.journalled == -1
    book.ended(lane)
    assert book.of.is_asleep
    book.of.close()


async def test_a_long_wait_is_the_stores():
    book = Book()
    lane = book.lane()
    book.of.postpone(event(), Later(3600, ran=False))
    assert told(lane) == [(0, 1, 1)]
    assert (book.of.queued, book.of.is_asleep) == (0, True)
    book.of.close()


def test_a_parked_lane_goes_to_the_store_once_that_is_committed_and_takes_no_command():
    book = Book()
    asked, waits = command(), event()
    lane = book.lane(asked, waits)
    book.of.park("k")
    assert (lane.rest, book.host.refused, book.host.kept) == (Rest.PARKING, [asked], [])
    assert not book.of.can_rejoin("k")  # nothing of it may stand in the store before what parks it
    book.of.parked("k")
    assert (lane.rest, told(lane), book.of.parked_keys) == (Rest.PARKED, [(0, 1, 1)], 1)
    assert book.of.is_asleep
    late = command()
    book.of.append(lane, late)
    assert book.host.refused == [asked, late]
    book.of.append(lane, event())
    assert told(lane) == [(0, 2, 2)]
    book.of.unpark("k", 1)
    assert (lane.rest, book.of.parked_keys) == (Rest.NONE, 0)
    assert book.host.asked[0][:3] == (0, 2, 3)


async def test_a_parked_lane_without_room_in_the_store_is_awake_and_tries_again():
    book = Book()
    lane = book.lane(event())
    book.of.park("k")
    book.host.has_room = False
    book.of.parked("k")
    assert (lane.rest, book.of.is_asleep) == (Rest.PARKED, False)
    assert lane.timer is not None
    book.host.has_room = True
    lane.timer.cancel()
    book.of._lay_down(lane)  # as the timer does
    assert (lane.timer, told(lane), book.of.is_asleep) == (None, [(0, 1, 1)], True)


def test_what_is_put_back_is_first_again_in_its_order():
    book = Book()
    lane = book.lane(event(position=3))
    book.of.put_back(lane, [event(position=1), event(position=2)])
    assert (told(lane), book.of.queued) == ([1, 2, 3], 3)


def test_a_stretch_without_rows_ends_where_somebody_else_has_removed_them():
    book = Book()
    book.of.adopt("k", 2)
    book.host.asked[0][-1]([])
    assert (book.of.busy, book.of.is_asleep) == ({}, True)
