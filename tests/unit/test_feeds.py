"""A worker's feeds, and the numbers from which a listener knows what it missed: no socket, no loop."""

from __future__ import annotations

from typing import Any

import pytest

from shardbus.config import Limits
from shardbus.errors import RemoteProtocolError
from shardbus.feeds import Feeds
from shardbus.subscriptions import Fed, Missed, Queue
from shardbus.wire.codec import decode_batch, pack_keys
from shardbus.wire.frames import Feed, Subscribe, Subscribed, Taken, Unsubscribe, Unsubscribed, decode_to_publisher

E = b"epoch"
S = 1_000_000_000


class Worker:
    """Feeds whose frames are kept, by peer."""

    def __init__(self, **limits: Any) -> None:
        self.sent: list[tuple[bytes, Any]] = []
        self.due = 0
        self.feeds = Feeds(E, Limits(**limits), lambda name: name != "unknown", self._send, self._due)

    def _send(self, peer: bytes, frame: bytes) -> None:
        self.sent.append((peer, decode_to_publisher(frame)))

    def _due(self) -> None:
        self.due += 1

    def subscribe(self, peer: bytes = b"p", number: int = 1, *names: str, key: Any = None, now_ns: int = 0) -> Any:
        packed = b"" if key is None else pack_keys([key])
        self.feeds.receive(peer, Subscribe(E, number, names or ("A",), packed), now_ns)
        return self.sent.pop()[1]

    def taken(self, upto: int, peer: bytes = b"p", number: int = 1, now_ns: int = 0) -> list[Any]:
        self.sent.clear()
        self.feeds.receive(peer, Taken(E, number, upto), now_ns)
        return [frame for _, frame in self.sent]

    def add(self, *bodies: bytes, name: str = "A", key: Any = "k") -> None:
        for body in bodies:
            self.feeds.add(name, key, body)

    def flushed(self) -> list[tuple[bytes, int, list[bytes]]]:
        """To whom, the first number, and the bodies of what was fed."""
        self.feeds.flush()
        sent, self.sent = self.sent, []
        return [
            (peer, frame.first, decode_batch(frame.blob, frame.count).apart() if frame.count else [])
            for peer, frame in sent
            if isinstance(frame, Feed)
        ]


A, B, C = b"\x01", b"\x02", b"\x03"


def test_events_go_to_those_who_listen_to_their_type_and_key():
    worker = Worker()
    worker.subscribe(b"p", 1, "A", "B")
    worker.subscribe(b"q", 1, "A", key="k")
    worker.subscribe(b"r", 1, "A", key=b"k")
    worker.add(A)
    worker.add(B, key="other")
    worker.add(C, name="B")
    worker.add(C, name="C")
    assert worker.flushed() == [(b"p", 0, [A, B, C]), (b"q", 0, [A])]
    assert worker.due == 1
    assert worker.flushed() == []


def test_nobody_is_concerned_by_a_type_that_nobody_listens_to():
    worker = Worker()
    assert not worker.feeds.index
    worker.subscribe(b"p", 1, "A", "B")
    concerned = [worker.feeds.concern(names) for names in ("A", "C", ["C", "B"], ["C", "D"])]
    assert concerned == [True, False, True, False]
    worker.feeds.receive(b"p", Unsubscribe(E, 1), 0)
    assert not worker.feeds.index
    worker.add(A)
    assert worker.flushed() == []


def test_what_comes_on_top_of_the_window_is_dropped_and_its_numbers_are_missing():
    worker = Worker(feed_events_max=64)
    worker.subscribe()
    worker.add(*[A] * 70)
    assert [(first, len(bodies)) for _, first, bodies in worker.flushed()] == [(0, 64)]
    assert worker.taken(10) == [Feed(E, 1, 70, 0, b"")]  # it knows nothing of the last six
    assert worker.taken(64) == []
    worker.add(B)
    assert worker.flushed() == [(b"p", 70, [B])]


def test_a_gap_within_a_turn_ends_the_frame_before_it():
    worker = Worker(feed_events_max=64)
    worker.subscribe()
    worker.add(*[A] * 60)
    worker.flushed()
    worker.add(*[B] * 6)
    assert worker.taken(60) == []
    worker.add(C)
    sent = [frame for _, frame in worker.sent]
    assert [(frame.first, frame.count) for frame in sent] == [(60, 4)]
    assert worker.flushed()[1:] == [(b"p", 66, [C])]


def test_a_frame_that_was_lost_does_not_use_the_window_up():
    worker = Worker(feed_events_max=64)
    worker.subscribe()
    worker.add(*[A] * 64)
    worker.flushed()  # is lost
    assert worker.taken(0) == [Feed(E, 1, 64, 0, b"")]
    worker.taken(64)
    worker.add(B)
    assert worker.flushed() == [(b"p", 64, [B])]


def test_a_window_is_bounded_by_bytes_too_and_all_of_them_together():
    large = bytes([0xC6]) + (400_000).to_bytes(4, "big") + bytes(400_000)
    worker = Worker(feed_bytes_max=1_000_000)
    worker.subscribe()
    worker.add(large, large, large)
    assert sum(len(bodies) for _, _, bodies in worker.flushed()) == 2
    many = Worker(feeds_bytes_max=33_554_432, subscriptions_max=1024)
    for number in range(1, 1025):
        many.subscribe(number.to_bytes(2, "big"), number)
    many.add(large, large)
    sent = many.flushed()  # a share is smaller than this event: one goes to each, as long as all are within their bound
    assert len(sent) == 33_554_432 // 400_017
    assert all(len(bodies) == 1 for _, _, bodies in sent)


def test_a_subscription_that_is_asked_for_again_is_the_same():
    worker = Worker()
    assert worker.subscribe() == Subscribed(E, 1)
    worker.add(A)
    assert worker.subscribe() == Subscribed(E, 1)
    assert worker.flushed() == [(b"p", 0, [A])]
    assert len(worker.feeds) == 1


def test_who_is_silent_or_has_left_is_forgotten_and_told_when_it_speaks():
    worker = Worker()
    for peer in (b"p", b"q", b"r"):
        worker.subscribe(peer)
    worker.taken(0, b"q", now_ns=20 * S)
    worker.taken(0, b"r", now_ns=20 * S)
    worker.feeds.tick(31 * S)
    worker.feeds.leave(b"q")
    worker.add(A)
    assert [peer for peer, _, _ in worker.flushed()] == [b"r"]
    assert worker.taken(0, b"p") == worker.taken(0, b"q") == [Unsubscribed(E, 1, "forgotten")]


def test_a_worker_and_a_client_have_only_so_many():
    worker = Worker(subscriptions_client_max=2, subscriptions_max=3)
    kinds = [type(worker.subscribe(peer, number)) for peer in (b"p", b"q") for number in (1, 2, 3)]
    assert kinds == [Subscribed, Subscribed, Unsubscribed, Subscribed, Unsubscribed, Unsubscribed]
    assert worker.subscribe(b"q", 4, "unknown") == Unsubscribed(E, 4, "unknown-type")


@pytest.mark.parametrize("key", [b"\xc1", b"\x90", b"\x91\xc0", b"\x92\x01\x02", b"\x91\xc3"])
def test_a_key_that_is_none_is_refused(key: bytes):
    with pytest.raises(RemoteProtocolError):
        Worker().feeds.receive(b"p", Subscribe(E, 1, ("A",), key), 0)


def test_nobody_takes_what_does_not_exist():
    worker = Worker()
    worker.subscribe()
    with pytest.raises(RemoteProtocolError):
        worker.taken(1)


# -- the listener's queue


def fed(n: int, size: int = 1) -> Fed:
    return Fed("A", bytes([n]), {}, size)


def all_of(queue: Queue) -> list[Any]:
    found = []
    while (item := queue.take()) is not None:
        found.append(item.count if isinstance(item, Missed) else item.body[0])
    return found


def test_a_full_queue_drops_the_oldest_and_says_where():
    queue = Queue(3, 1000)
    for n in range(5):
        queue.put(fed(n))
    assert all_of(queue) == [2, 2, 3, 4]


def test_what_is_missing_in_one_place_is_told_once():
    queue = Queue(2, 1000)
    queue.miss(5)
    queue.miss(1)
    queue.put(fed(10))
    queue.miss(3)
    queue.put(fed(11))
    assert [queue.take()] == [Missed(6)]
    queue.put(fed(12))
    assert all_of(queue) == [4, 11, 12]  # one that was dropped, and the three behind it


def test_an_unknown_number_stays_unknown():
    queue = Queue(1, 1000)
    queue.put(fed(1))
    queue.miss(None)
    queue.put(fed(2))
    queue.put(fed(3))
    assert all_of(queue) == [None, 3]


def test_a_queue_is_bounded_by_bytes_and_holds_one_event_of_any_size():
    queue = Queue(100, 10)
    for n in range(3):
        queue.put(fed(n, 4))
    assert (len(queue), queue.bytes) == (2, 8)
    queue.put(fed(9, 1000))
    assert (len(queue), all_of(queue)) == (1, [3, 9])
