"""Both ends of a session, joined in memory through the real encoding: no socket, no clock, no sleep.

A message is one byte of its batch's blob. `Pair.exchange` carries frames to and fro until both ends are silent, and loses
those that a test names.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import msgspec
import pytest

from shardbus.config import PROTOCOL, Limits
from shardbus.errors import RemoteProtocolError
from shardbus.wire.codec import Batch, Extra, decode_batch, stamp_at
from shardbus.wire.frames import (
    Ack,
    Bye,
    Cancel,
    Data,
    Frame,
    Hello,
    Nack,
    Ping,
    Reject,
    Replies,
    ToPublisher,
    Welcome,
    decode_to_publisher,
    decode_to_worker,
    encode_frame,
)
from shardbus.wire.session import Happened, Lost, PublisherSession, Rejected, Replied, State, WorkerSession

PUBLISHER = b"p" * 16
S = 1_000_000_000
LIMITS = Limits()
Lose = Callable[[Frame], bool]


def nothing(frame: Frame) -> bool:
    return False


def everything(frame: Frame) -> bool:
    return True


def only(kind: type) -> Lose:
    return lambda frame: isinstance(frame, kind)


class Worker:
    """As much of a worker as its sessions need: it greets, takes batches, and runs what it should run."""

    def __init__(self, epoch: bytes, *, credit: tuple[int, int] = (10_000, 1 << 20), sessions_max: int = 10) -> None:
        self.epoch = epoch
        self.credit = credit
        self.sessions_max = sessions_max
        self.sessions: dict[bytes, WorkerSession] = {}
        self.sessions_made = 0
        self.ran: list[tuple[str, int]] = []  # message and attempt
        self.seen: list[Frame] = []

    @property
    def session(self) -> WorkerSession:
        return self.sessions[PUBLISHER]

    def receive(self, data: bytes) -> list[bytes]:
        frame = decode_to_worker(data)
        self.seen.append(frame)
        if frame.epoch != self.epoch:
            return [encode_frame(Reject(frame.epoch, "stale-epoch"))]
        if isinstance(frame, Hello):
            return self._greet(frame)
        if PUBLISHER not in self.sessions:
            return [encode_frame(Reject(self.epoch, "unknown-session"))]
        match frame:
            case Data():
                return self._take(frame)
            case Ping(number=number):
                return [self.session.ack(self.credit, full=True, ping=number)]
            case Bye():
                del self.sessions[PUBLISHER]
        return []

    def _greet(self, frame: Hello) -> list[bytes]:
        if frame.publisher not in self.sessions:
            if len(self.sessions) >= self.sessions_max:
                return [encode_frame(Reject(self.epoch, "too-many-publishers"))]
            self.sessions_made += 1
            self.sessions[frame.publisher] = WorkerSession(
                frame.publisher, self.epoch, frame.first, LIMITS, self.sessions_made
            )
        return [self.sessions[frame.publisher].welcome(self.credit)]

    def _take(self, frame: Data) -> list[bytes]:
        skip = self.session.accept(frame)
        if skip is None:
            answer = self.session.answer_to_refused(frame)
            return [] if answer is None else [answer]
        skipped = {seq for at in range(0, len(skip), 2) for seq in range(skip[at], skip[at + 1])}
        self.ran += [
            (chr(letter), frame.attempt) for seq, letter in enumerate(frame.blob, frame.first) if seq not in skipped
        ]
        return []

    def letters(self) -> str:
        return "".join(letter for letter, _ in self.ran)

    def of(self, kind: type) -> list[Frame]:
        return [frame for frame in self.seen if isinstance(frame, kind)]


class Pair:
    """A publisher's session and a worker, and what travels between them."""

    def __init__(self, *, credit: tuple[int, int] = (10_000, 1 << 20)) -> None:
        self.publisher = PublisherSession(PUBLISHER, LIMITS)
        self.worker = Worker(b"epoch-1", credit=credit)
        self.happened: list[Happened] = []
        self.now_ns = 1000 * S

    def open(self, *, lose: Lose = nothing) -> list[Lost]:
        lost = self.publisher.open(self.worker.epoch, 1)
        self.tick(lose=lose)
        return lost

    def tick(self, seconds: float = 0.0, *, lose: Lose = nothing) -> None:
        self.now_ns += int(seconds * S)
        self.publisher.tick(self.now_ns)
        self.exchange(lose=lose)

    def publish(self, letters: str, *, commands: tuple[int, ...] = (), lose: Lose = nothing) -> None:
        self.publisher.offer(letters.encode(), len(letters), commands)
        self.exchange(lose=lose)

    def exchange(self, *, lose: Lose = nothing) -> None:
        for _ in range(1000):
            sent = list(self.publisher.frames_to_send())
            if not sent:
                return
            for data in sent:
                if not lose(decode_to_worker(data)):
                    for answer in self.worker.receive(data):
                        self.answer(answer, lose=lose)
        raise AssertionError("the two ends never fall silent")

    def answer(self, data: bytes, *, lose: Lose = nothing) -> None:
        frame = decode_to_publisher(data)
        if not lose(frame):
            self.happened += self.publisher.receive(frame)

    def ack(self, *, full: bool = False, lose: Lose = nothing) -> Ack:
        data = self.worker.session.ack(self.worker.credit, full=full)
        self.answer(data, lose=lose)
        self.exchange(lose=lose)
        frame = decode_to_publisher(data)
        assert isinstance(frame, Ack)
        return frame

    def finish(self, *seqs: int) -> None:
        for seq in seqs:
            self.worker.session.finish(seq)

    def replace_worker(self, epoch: bytes = b"epoch-2", *, lose: Lose = nothing) -> list[Lost]:
        self.worker = Worker(epoch, credit=self.worker.credit)
        return self.open(lose=lose)


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture
def opened(pair: Pair) -> Pair:
    pair.open()
    return pair


# -- greeting


def test_nothing_is_sent_before_a_worker_is_known(pair: Pair):
    pair.publish("ab")
    pair.tick()
    assert pair.worker.seen == []
    assert pair.publisher.state is State.CLOSED


def test_a_greeting_names_the_protocol_the_publisher_and_its_first_unfinished_message(pair: Pair):
    pair.open()
    assert pair.worker.seen[0] == Hello(PROTOCOL, PUBLISHER, 1, b"epoch-1", 0)
    assert pair.publisher.state is State.OPEN


def test_what_was_published_before_the_welcome_is_sent_after_it(pair: Pair):
    pair.publish("ab")
    pair.open(lose=only(Welcome))
    assert pair.worker.ran == []
    pair.tick(LIMITS.hello_interval_s)
    assert pair.worker.ran == [("a", 1), ("b", 1)]


def test_an_unanswered_greeting_is_repeated_but_not_hastily(pair: Pair):
    pair.open(lose=only(Hello))
    pair.tick(LIMITS.hello_interval_s / 2)
    assert pair.worker.seen == []
    pair.tick(LIMITS.hello_interval_s / 2)
    assert len(pair.worker.of(Hello)) == 1
    assert pair.publisher.state is State.OPEN


def test_a_repeated_greeting_finds_the_session_that_the_first_one_opened(pair: Pair):
    pair.open(lose=only(Welcome))
    first = pair.worker.session
    pair.tick(LIMITS.hello_interval_s)
    assert pair.worker.session is first
    assert pair.publisher.state is State.OPEN


def test_a_second_welcome_changes_nothing(opened: Pair):
    opened.publish("ab")
    opened.answer(encode_frame(Welcome(b"epoch-1", 0, 1, 10_000, 1 << 20)))
    opened.exchange()
    assert opened.worker.ran == [("a", 1), ("b", 1)]
    assert len(opened.worker.of(Data)) == 1


def test_frames_of_another_epoch_are_ignored(opened: Pair):
    opened.publish("ab")
    for frame in (
        Ack(b"epoch-0", 2, 2, (), True, 0, 0, 1, 1),
        Nack(b"epoch-0", 0),
        Reject(b"epoch-0", "protocol"),
        Replies(b"epoch-0", ((0, "ok", b""),)),
        Welcome(b"epoch-0", 0, 1, 1, 1),
    ):
        assert opened.publisher.receive(frame) == []
    assert opened.publisher.held_events == 2
    assert opened.publisher.state is State.OPEN


EARLY: list[ToPublisher] = [
    Ack(b"epoch-1", 2, 2, (), True, 0, 0, 1, 1),
    Nack(b"epoch-1", 0),
    Replies(b"epoch-1", ((0, "ok", b""),)),
]


@pytest.mark.parametrize("frame", EARLY, ids=lambda frame: type(frame).__name__)
def test_a_frame_that_the_state_does_not_know_is_ignored(frame: ToPublisher, pair: Pair):
    pair.publish("ab")
    pair.publisher.open(b"epoch-1", 1)
    assert pair.publisher.receive(frame) == []
    assert pair.publisher.state is State.GREETING
    assert pair.publisher.held_events == 2


def test_a_closed_end_still_hears_what_became_of_what_it_sent_and_sends_nothing(opened: Pair):
    # So it is with a worker that drains: it refuses what is new, and finishes what it has.
    opened.publish("ab")
    opened.publisher.close()
    opened.finish(0)
    opened.ack()
    assert opened.publisher.held_events == 1
    opened.publish("c")
    assert list(opened.publisher.frames_to_send()) == []


# -- refusals


def test_a_publisher_too_many_is_told_and_tries_again(pair: Pair):
    pair.worker.sessions_max = 0
    pair.publish("a")
    pair.open()
    assert pair.happened == [Rejected("too-many-publishers")]
    assert pair.publisher.state is State.GREETING
    pair.worker.sessions_max = 1
    pair.tick(LIMITS.hello_interval_s)
    assert pair.worker.letters() == "a"


@pytest.mark.parametrize("reason", ["protocol", "stale-epoch", "stale-layout", "malformed"])
def test_a_refusal_closes_the_session_and_keeps_what_is_unfinished(reason: str, opened: Pair):
    opened.publish("ab")
    opened.answer(encode_frame(Reject(b"epoch-1", reason)))
    assert opened.happened == [Rejected(reason)]
    assert opened.publisher.state is State.CLOSED
    assert opened.publisher.held_events == 2


def test_a_worker_that_forgot_the_session_is_greeted_again_and_sent_everything_unfinished(opened: Pair):
    opened.publish("abc")
    opened.finish(0)
    opened.ack()
    opened.worker.sessions.clear()
    opened.publish("d")  # refused: greet first
    assert opened.publisher.state is State.GREETING
    opened.tick()
    assert opened.worker.ran == [("a", 1), ("b", 1), ("c", 1), ("b", 2), ("c", 2), ("d", 2)]


def test_a_new_connection_takes_the_session_up_where_the_worker_stands(opened: Pair):
    opened.publish("ab")
    opened.publish("cd", lose=everything)
    opened.publisher.greet_again()
    opened.tick()
    assert opened.worker.ran == [("a", 1), ("b", 1), ("c", 1), ("d", 1)]


def test_the_greeting_after_a_new_connection_names_the_same_session(opened: Pair):
    opened.publish("a")
    welcome = decode_to_publisher(opened.worker.session.welcome(opened.worker.credit))
    assert isinstance(welcome, Welcome)
    assert (welcome.session, welcome.expected) == (opened.worker.session.number, 1)


def test_leaving_says_good_bye_once(opened: Pair):
    assert [decode_to_worker(data) for data in opened.publisher.leave()] == [Bye(b"epoch-1")]
    assert opened.publisher.leave() == []


# -- acks


def test_an_ack_releases_what_is_finished(opened: Pair):
    opened.publish("abc")
    assert (opened.publisher.held_events, opened.publisher.held_bytes) == (3, 3)
    opened.finish(0, 1, 2)
    opened.ack()
    assert (opened.publisher.held_events, opened.publisher.held_bytes) == (0, 0)
    assert opened.publisher.unfinished_below(3) == 0


def test_a_batch_is_kept_until_all_of_it_is_finished(opened: Pair):
    opened.publish("abc")
    opened.finish(0, 1)
    opened.ack()
    assert (opened.publisher.held_events, opened.publisher.held_bytes) == (1, 3)
    opened.finish(2)
    opened.ack()
    assert (opened.publisher.held_events, opened.publisher.held_bytes) == (0, 0)


def test_messages_may_finish_in_any_order(opened: Pair):
    opened.publish("abcd")
    opened.publish("efgh")
    for seq, cumulative in ((6, 0), (1, 0), (5, 0), (3, 0), (0, 2), (7, 2), (2, 4), (4, 8)):
        opened.finish(seq)
        assert opened.ack().cumulative == cumulative
        assert opened.publisher.is_finished(seq)
        assert opened.publisher.unfinished_below(cumulative) == 0
        assert opened.publisher.unfinished_below(cumulative + 1) == 1
    assert (opened.publisher.held_events, opened.publisher.held_bytes) == (0, 0)


def test_a_batch_in_the_middle_is_released_before_its_neighbours(opened: Pair):
    for letters in ("ab", "cd", "ef"):
        opened.publish(letters)
    opened.finish(2, 3)
    opened.ack()
    assert (opened.publisher.held_events, opened.publisher.held_bytes) == (4, 4)
    opened.replace_worker()
    assert opened.worker.letters() == "abef"


def test_an_ack_lists_only_what_is_new_and_a_full_one_everything(opened: Pair):
    opened.publish("abcdef")
    opened.finish(1)
    assert opened.ack().finished == (1, 2)
    opened.finish(3, 4)
    assert opened.ack().finished == (3, 5)
    assert opened.ack().finished == ()
    assert opened.ack(full=True).finished == (1, 2, 3, 5)


def test_what_the_cumulative_part_says_is_not_listed_again(opened: Pair):
    opened.publish("abcd")
    opened.finish(1, 3, 0)
    ack = opened.ack()
    assert (ack.cumulative, ack.finished) == (2, (3, 4))


def test_a_repeated_ack_changes_nothing(opened: Pair):
    opened.publish("abc")
    opened.finish(1)
    data = opened.worker.session.ack(opened.worker.credit)
    for _ in range(3):
        opened.answer(data)
    assert opened.publisher.held_events == 2


def test_an_ack_that_was_overtaken_changes_nothing(opened: Pair):
    opened.publish("abc")
    opened.finish(0)
    earlier = opened.worker.session.ack(opened.worker.credit)
    opened.finish(1, 2)
    opened.ack()
    opened.answer(earlier)
    assert opened.publisher.unfinished_below(3) == 0
    assert opened.publisher.held_events == 0


def test_a_message_that_finishes_twice_is_counted_once(opened: Pair):
    opened.publish("abc")
    session = opened.worker.session
    assert [session.finish(2), session.finish(2), session.finish(0), session.finish(0)] == [1, 0, 1, 0]
    assert session.unfinished == 1


def test_outcomes_are_counted_by_both_ends(opened: Pair):
    opened.publish("abcd")
    opened.worker.session.finish_dead(1)
    opened.worker.session.finish_dead(1)
    opened.worker.session.finish_waiting(2)
    opened.ack()
    assert (opened.publisher.dead, opened.publisher.waiting) == (1, 1)


def test_outcomes_of_earlier_epochs_stay_counted(opened: Pair):
    opened.publish("ab")
    opened.worker.session.finish_dead(0)
    opened.ack()
    opened.replace_worker()
    opened.worker.session.finish_dead(1)
    opened.worker.session.finish_waiting(1)
    opened.ack()
    assert (opened.publisher.dead, opened.publisher.waiting) == (2, 0)


def test_an_ack_of_what_was_never_sent_is_the_workers_fault(opened: Pair):
    opened.publish("a")
    with pytest.raises(RemoteProtocolError, match="only 1 were ever used"):
        opened.publisher.receive(Ack(b"epoch-1", 9, 9, (), False, 0, 0, 1, 1))


# -- what is lost on the way


def test_a_gap_is_answered_once_and_filled(opened: Pair):
    opened.publish("ab", lose=everything)
    opened.publish("cd")
    assert opened.worker.letters() == "abcd"
    assert [attempt for _, attempt in opened.worker.ran] == [1, 1, 1, 1]


def test_further_batches_above_a_gap_are_not_answered_again(opened: Pair):
    opened.publish("ab", lose=everything)
    session = opened.worker.session
    above = Data(b"epoch-1", 1, 2, 2, 1, (), b"cd")
    far_above = Data(b"epoch-1", 1, 4, 2, 1, (), b"ef")
    assert session.accept(above) is None
    assert session.answer_to_refused(above) == encode_frame(Nack(b"epoch-1", 0))
    assert session.accept(far_above) is None
    assert session.answer_to_refused(far_above) is None


def test_only_what_the_worker_has_not_taken_is_sent_again(opened: Pair):
    opened.publish("ab")
    opened.publish("cd", lose=everything)
    opened.publish("ef")
    assert opened.worker.letters() == "abcdef"
    firsts = [frame.first for frame in opened.worker.of(Data) if isinstance(frame, Data)]
    assert firsts == [0, 4, 2, 4]


def test_a_ping_heals_a_lost_answer_to_a_gap(opened: Pair):
    opened.publish("ab", lose=everything)
    opened.publish("cd", lose=only(Nack))
    assert opened.worker.letters() == ""
    opened.tick(LIMITS.ping_interval_s)
    assert opened.worker.letters() == "abcd"


def test_a_ping_heals_a_lost_tail(opened: Pair):
    opened.publish("ab")
    opened.publish("cd", lose=everything)
    opened.tick(LIMITS.ping_interval_s)
    assert opened.worker.letters() == "abcd"


def test_a_ping_heals_a_lost_ack(opened: Pair):
    opened.publish("abcd")
    opened.finish(0, 2)
    opened.ack(lose=everything)
    assert opened.publisher.held_events == 4
    opened.tick(LIMITS.ping_interval_s)
    assert opened.publisher.held_events == 2
    assert opened.worker.letters() == "abcd"


def test_a_ping_tells_what_is_not_taken_only_if_it_was_sent_before_the_ping(opened: Pair):
    opened.publish("ab")
    opened.tick(LIMITS.ping_interval_s, lose=only(Ack))
    answer = opened.worker.session.ack(opened.worker.credit, full=True)
    opened.publish("cd", lose=everything)  # on its way, behind the ping
    opened.answer(answer)
    assert list(opened.publisher.frames_to_send()) == []


def test_an_idle_publisher_pings_rarely_and_before_it_is_forgotten(opened: Pair):
    opened.tick()
    before = len(opened.worker.of(Ping))
    opened.tick(LIMITS.ping_interval_s)
    assert len(opened.worker.of(Ping)) == before
    opened.tick(LIMITS.session_silence_s / 2)
    assert len(opened.worker.of(Ping)) == before + 1


def test_a_publisher_with_unfinished_messages_pings_often(opened: Pair):
    opened.publish("a")
    opened.tick()
    before = len(opened.worker.of(Ping))
    for _ in range(3):
        opened.tick(LIMITS.ping_interval_s)
    assert len(opened.worker.of(Ping)) == before + 3


def test_a_batch_that_arrives_twice_runs_once(opened: Pair):
    opened.publish("ab")
    again = Data(b"epoch-1", 1, 0, 2, 1, (), b"ab")
    assert opened.worker.receive(encode_frame(again)) == []
    assert opened.worker.letters() == "ab"


def test_of_a_batch_that_was_partly_taken_only_the_rest_runs(opened: Pair):
    opened.publish("abc")
    opened.worker.receive(encode_frame(Data(b"epoch-1", 1, 1, 4, 1, (), b"bcde")))
    assert opened.worker.letters() == "abcde"
    assert opened.worker.session.received == 5
    assert opened.worker.session.unfinished == 5


def test_a_partly_taken_batch_may_have_finished_ranges_on_both_sides(opened: Pair):
    opened.publish("abc")
    frame = Data(b"epoch-1", 1, 0, 8, 1, (1, 2, 4, 5, 7, 8), b"abcdefgh")
    opened.worker.receive(encode_frame(frame))
    assert opened.worker.letters() == "abcdfg"
    session = opened.worker.session
    assert [seq for seq in range(8) if session.is_finished(seq)] == [4, 7]
    assert session.unfinished == 6


def test_a_finished_range_that_a_resend_names_does_not_finish_what_is_running(opened: Pair):
    opened.publish("abc")
    session = opened.worker.session
    session.accept(Data(b"epoch-1", 1, 0, 4, 1, (0, 4), b"abcd"))
    assert session.unfinished == 3
    assert not session.is_finished(0)


# -- a new epoch


def test_a_new_worker_gets_everything_unfinished_in_order_with_the_next_attempt(opened: Pair):
    for letters in ("ab", "cd"):
        opened.publish(letters)
    opened.replace_worker()
    opened.publish("ef")
    assert opened.worker.ran == [("a", 2), ("b", 2), ("c", 2), ("d", 2), ("e", 1), ("f", 1)]


def test_attempts_count_every_worker_that_may_have_seen_a_message(opened: Pair):
    opened.publish("a")
    for number in range(2, 5):
        opened.replace_worker(f"epoch-{number}".encode())
        assert opened.worker.ran == [("a", number)]


def test_what_was_never_sent_is_still_the_first_attempt(pair: Pair):
    pair.publish("a")
    pair.open(lose=only(Welcome))
    pair.replace_worker()
    assert pair.worker.ran == [("a", 1)]


def test_a_worker_that_dies_before_its_welcome_arrives_counts_no_attempt_twice(opened: Pair):
    opened.publish("a")
    opened.replace_worker(b"epoch-2", lose=only(Welcome))
    opened.replace_worker(b"epoch-3")
    assert opened.worker.ran == [("a", 2)]


def test_finished_ranges_are_not_sent_again(opened: Pair):
    opened.publish("abcdef")
    opened.finish(0, 2, 4)
    opened.ack()
    opened.replace_worker()
    assert opened.worker.letters() == "bdf"
    (data,) = opened.worker.of(Data)
    assert isinstance(data, Data)
    assert data.skip == (0, 1, 2, 3, 4, 5)
    assert opened.worker.session.unfinished == 3


def test_a_batch_that_is_wholly_finished_travels_as_a_stretch(opened: Pair):
    for letters in ("ab", "cd", "ef", "gh"):
        opened.publish(letters)
    opened.finish(2, 3, 4, 5)
    opened.ack()
    opened.replace_worker()
    assert opened.worker.letters() == "abgh"
    stretches = [frame for frame in opened.worker.of(Data) if isinstance(frame, Data) and not frame.blob]
    assert [(frame.first, frame.count, frame.skip) for frame in stretches] == [(2, 4, (2, 6))]
    assert (opened.worker.session.received, opened.worker.session.unfinished) == (8, 4)


def test_a_stretch_may_be_longer_than_any_batch_and_any_credit(pair: Pair):
    pair.worker.credit = (64, 1 << 20)
    pair.open()
    pair.publish("a")
    for _ in range(300):
        pair.publish("x" * 63)
        seq = pair.publisher.next_seq
        pair.worker.session.finish_range(seq - 63, seq)
        pair.ack()
    pair.publish("b")
    pair.replace_worker()
    assert pair.worker.letters() == "ab"
    assert pair.worker.session.received == 300 * 63 + 2


def test_the_new_worker_is_acked_for_like_the_old_one(opened: Pair):
    opened.publish("abcd")
    opened.finish(1)
    opened.ack()
    opened.replace_worker()
    opened.finish(0, 2, 3)
    assert opened.ack().cumulative == 4
    assert opened.publisher.held_events == 0


def test_a_greeting_begins_at_the_first_unfinished_message(opened: Pair):
    opened.publish("ab")
    opened.publish("cd")
    opened.finish(0, 1, 2)
    opened.ack()
    opened.replace_worker()
    (hello,) = opened.worker.of(Hello)
    assert isinstance(hello, Hello)
    assert hello.first == 3
    assert opened.worker.letters() == "d"


def test_what_the_store_adopted_does_not_run_again_and_is_counted(opened: Pair):
    opened.publish("abcd")
    opened.worker = Worker(b"epoch-2")
    session = WorkerSession(PUBLISHER, b"epoch-2", 0, LIMITS)
    session.adopt(dead=[1], waiting=[2])
    opened.worker.sessions[PUBLISHER] = session
    opened.open()
    assert opened.worker.letters() == "ad"
    assert session.unfinished == 2
    opened.ack()
    assert (opened.publisher.dead, opened.publisher.waiting, opened.publisher.held_events) == (1, 1, 2)


def test_what_the_store_adopted_and_the_publisher_knows_is_not_counted_twice(opened: Pair):
    opened.publish("abcd")
    opened.worker.session.finish_dead(1)
    opened.ack()
    opened.worker = Worker(b"epoch-2")
    session = WorkerSession(PUBLISHER, b"epoch-2", 0, LIMITS)
    session.adopt(dead=[1], waiting=[])
    opened.worker.sessions[PUBLISHER] = session
    opened.open()
    opened.ack()
    assert opened.publisher.dead == 1


def test_a_batch_that_the_worker_had_taken_is_announced_as_repeated_even_after_going_back(opened: Pair):
    # The worker is slow: its answer to the first ping arrives after a second batch and a second ping have left.
    opened.publish("ab")
    answer = opened.worker.session.ack(opened.worker.credit, full=True)
    opened.publish("cd")
    opened.tick(LIMITS.ping_interval_s, lose=only(Ack))
    opened.answer(answer)
    # Credit or the socket holds back the resend, and then the worker dies.
    opened.replace_worker()
    assert opened.worker.ran == [("a", 2), ("b", 2), ("c", 2), ("d", 2)]


def test_the_answer_to_an_earlier_ping_does_not_send_again_what_left_after_it(opened: Pair):
    opened.publish("ab")
    opened.publisher.hurry()
    (ping,) = opened.publisher.frames_to_send()
    (answer,) = opened.worker.receive(ping)
    opened.publish("cd", lose=everything)  # still on its way
    opened.tick(LIMITS.ping_interval_s, lose=everything)
    opened.answer(answer)
    assert list(opened.publisher.frames_to_send()) == []


def test_answers_to_pings_of_before_it_went_back_do_not_make_it_go_back_again(opened: Pair):
    opened.publish("ab", lose=everything)
    opened.publisher.hurry()
    opened.publisher.hurry()
    first, second = (opened.worker.receive(ping)[0] for ping in opened.publisher.frames_to_send())
    opened.answer(first)
    assert len(list(opened.publisher.frames_to_send())) == 1  # the batch, on its way again
    opened.answer(second)
    assert list(opened.publisher.frames_to_send()) == []


def test_what_a_worker_that_has_died_may_have_run_is_not_dropped_and_was_sent(pair: Pair):
    pair.open()
    pair.publish("ab")
    pair.replace_worker(lose=only(Welcome))
    assert pair.publisher.drop_oldest() == 0
    assert pair.publisher.was_sent(0)
    pair.publisher.offer(b"cd", 2)
    assert not pair.publisher.was_sent(2)
    assert not pair.publisher.was_sent(4)  # of a batch that is still open
    assert pair.publisher.drop_oldest() == 2


def test_a_peer_that_sends_more_bytes_than_any_credit_ends_its_session():
    session = WorkerSession(PUBLISHER, b"e", 0, LIMITS)
    blob = bytes(LIMITS.frame_bytes_max // 2)
    fits = LIMITS.credit_bytes_max // len(blob) + 1
    for seq in range(fits):
        assert session.accept(Data(b"e", 1, seq, 1, 1, (), blob)) == ()
    with pytest.raises(RemoteProtocolError, match="more than any credit"):
        session.accept(Data(b"e", 1, fits, 1, 1, (), blob))


def packed(count: int) -> bytes:
    batch = Batch()
    for at in range(count):
        batch.add("Step", f"k{at}", msgspec.msgpack.encode(f"{at:4}" * 100))
    batch.extras.append(Extra(count - 1, {"a": "b"}, 0, False))
    batch.stamp(7, 9)
    return batch.seal()


def test_a_batch_of_which_little_is_left_lets_go_of_the_rest_and_is_sent_again_without_it(opened: Pair):
    session = opened.publisher
    session.offer(packed(16), 16)
    (frame,) = session.frames_to_send()
    whole = session.held_bytes
    opened.worker.session.accept(decode_to_worker(frame))
    opened.finish(*range(3), *range(4, 15))
    opened.ack()
    session.thin_out()
    assert session.held_events == 2
    assert session.held_bytes < whole / 4
    opened.worker = Worker(b"epoch-2")
    session.open(b"epoch-2", 1)
    session.tick(opened.now_ns)
    sent = [decode_to_worker(data) for data in session.frames_to_send()]
    opened.answer(opened.worker.receive(encode_frame(sent[0]))[0])
    (again,) = (decode_to_worker(data) for data in session.frames_to_send())
    assert isinstance(again, Data)
    assert again.skip == (0, 3, 4, 15)
    columns = decode_batch(again.blob, 16)
    bodies = columns.apart()
    assert [msgspec.msgpack.decode(bodies[at]) for at in (3, 15)] == ["   3" * 100, "  15" * 100]
    assert (columns.keys[3], columns.keys[15], columns.extras[15].headers) == ("k3", "k15", {"a": "b"})
    assert stamp_at(columns.ordinals, 15) == 7
    assert {bodies[at] for at in range(16) if at not in (3, 15)} == {b"\xc0"}
    for seq in (3, 15):
        session.receive(Ack(b"epoch-2", 16, 3, (3, 4, 4, 15) if seq == 3 else (3, 16), False, 0, 0, *opened.worker.credit))
    assert (session.held_events, session.held_bytes) == (0, 0)


def test_a_batch_that_is_mostly_unfinished_stays_as_it_is(opened: Pair):
    session = opened.publisher
    session.offer(packed(16), 16)
    opened.worker.session.accept(decode_to_worker(next(iter(session.frames_to_send()))))
    whole = session.held_bytes
    opened.finish(*range(5))
    opened.ack()
    session.thin_out()
    assert session.held_bytes == whole


# -- commands


def test_a_reply_reaches_the_caller(opened: Pair):
    opened.publish("a", commands=(0,))
    opened.answer(encode_frame(Replies(b"epoch-1", ((0, "ok", b"\x2a"),))))
    assert opened.happened == [Replied(((0, "ok", b"\x2a"),))]


def test_a_command_that_was_sent_is_lost_with_its_worker_and_not_sent_again(opened: Pair):
    opened.publish("abc", commands=(1,))
    assert opened.replace_worker() == [Lost(1)]
    assert opened.worker.ran == [("a", 2), ("c", 2)]
    assert opened.publisher.held_events == 2


def test_a_command_that_was_finished_is_not_lost(opened: Pair):
    opened.publish("abc", commands=(1,))
    opened.finish(1)
    opened.ack()
    assert opened.replace_worker() == []
    assert opened.worker.letters() == "ac"


def test_a_command_that_was_never_sent_goes_to_the_new_worker(pair: Pair):
    pair.publish("a", commands=(0,))
    pair.open(lose=only(Welcome))
    assert pair.replace_worker() == []
    assert pair.worker.ran == [("a", 1)]


def test_commands_that_are_lost_together_are_finished_together():
    """One by one they would take time in the square of their number, and the client's loop would stand still for it."""
    finished: list[tuple[int, int]] = []
    session = PublisherSession(PUBLISHER, LIMITS, lambda start, end: finished.append((start, end)))
    session.open(b"epoch-1", 1)
    for seq in range(12):
        session.offer(packed(1), 1, (seq,) if seq != 6 else ())
    for _ in session.frames_to_send():  # the greeting
        pass
    session.receive(Welcome(b"epoch-1", 0, 1, 100, 1_000_000))
    assert len(list(session.frames_to_send())) == 12
    session.abandon(3)
    assert session.open(b"epoch-2", 1) == [Lost(seq) for seq in range(12) if seq != 6]
    assert finished == [(0, 6), (7, 12)]
    assert (session.held_events, session.was_sent(6), session.was_sent(7)) == (1, True, True)


def test_commands_that_were_not_sent_are_given_up_wherever_they_lie(pair: Pair):
    session = pair.publisher
    for seq in range(9):
        session.offer(packed(1), 1, (seq,))
    for seq in (4, 0, 8, 2):
        assert not session.was_sent(seq)
        session.abandon(seq)
    assert session.held_events == 5
    pair.open()
    assert session.held_events == 5
    assert all(session.was_sent(seq) for seq in range(9))


def test_a_command_is_lost_once(opened: Pair):
    opened.publish("abc", commands=(1,))
    opened.replace_worker(b"epoch-2")
    assert opened.replace_worker(b"epoch-3") == []
    assert opened.worker.letters() == "ac"


def test_a_command_is_lost_when_the_worker_has_forgotten_the_session(opened: Pair):
    opened.publish("ab", commands=(0,))
    opened.worker.sessions.clear()
    opened.publish("c")
    opened.tick()
    assert opened.happened == [Lost(0)]
    assert opened.worker.letters() == "ab" + "bc"


def test_after_a_lost_command_at_the_end_the_session_goes_on(opened: Pair):
    opened.publish("a", commands=(0,))
    opened.replace_worker()
    assert opened.publisher.held_events == 0
    opened.publish("b")
    assert opened.worker.ran == [("b", 1)]


def test_a_command_that_the_worker_had_taken_is_not_sent_again_even_after_going_back(opened: Pair):
    opened.publish("a")
    answer = opened.worker.session.ack(opened.worker.credit, full=True)
    opened.publish("b", commands=(1,))
    opened.tick(LIMITS.ping_interval_s, lose=only(Ack))
    opened.answer(answer)
    assert opened.replace_worker() == [Lost(1)]
    assert opened.worker.letters() == "a"


def test_a_lost_stretch_is_sent_again(opened: Pair):
    # The worker forgot the session, a command is lost, and the stretch that stands for it does not arrive.
    opened.publish("a", commands=(0,))
    opened.worker.sessions.clear()
    opened.publish("b")
    opened.tick(lose=lambda frame: isinstance(frame, Data) and not frame.blob)
    for _ in range(3):
        opened.tick(LIMITS.ping_interval_s)
    assert opened.worker.letters() == "ab"


# -- credit


def test_no_more_is_sent_than_the_credit_allows():
    pair = Pair(credit=(4, 1 << 20))
    pair.open()
    for letters in ("ab", "cd", "ef"):
        pair.publish(letters)
    assert pair.worker.letters() == "abcd"
    pair.finish(0, 1)
    pair.ack()
    assert pair.worker.letters() == "abcdef"


def test_credit_counts_bytes_too():
    pair = Pair(credit=(1000, 4))
    pair.open()
    for letters in ("abc", "d", "e"):
        pair.publish(letters)
    assert pair.worker.letters() == "abcd"
    pair.finish(0, 1)
    pair.ack()
    assert pair.worker.letters() == "abcd", (
        "the batch is kept whole, so its bytes are spent until all of it is finished"
    )
    pair.finish(2)
    pair.ack()
    assert pair.worker.letters() == "abcde"


def test_credit_counts_what_is_unfinished_and_not_how_far_apart_it_is():
    pair = Pair(credit=(4, 1 << 20))
    pair.open()
    pair.publish("a")  # stays unfinished for ever
    for _ in range(100):
        pair.publish("xyz")
        seq = pair.publisher.next_seq
        pair.finish(seq - 3, seq - 2, seq - 1)
        pair.ack()
    assert len(pair.worker.ran) == 301
    assert pair.publisher.held_events == 1


def test_one_batch_leaves_while_nothing_is_in_flight_however_small_the_credit():
    pair = Pair(credit=(0, 0))
    pair.open()
    pair.publish("abcd")
    pair.publish("ef")
    assert pair.worker.letters() == "abcd"


def test_credit_is_absolute_so_a_repeated_ack_grants_nothing():
    pair = Pair(credit=(2, 1 << 20))
    pair.open()
    for letters in ("ab", "cd", "ef"):
        pair.publish(letters)
    for _ in range(3):
        pair.ack()
    assert pair.worker.letters() == "ab"


def test_credit_may_shrink_and_grow():
    pair = Pair(credit=(4, 1 << 20))
    pair.open()
    pair.publish("abcd")
    pair.publish("ef")
    pair.worker.credit = (2, 1 << 20)
    pair.finish(0, 1)
    pair.ack()
    assert pair.worker.letters() == "abcd"
    pair.worker.credit = (4, 1 << 20)
    pair.ack()
    assert pair.worker.letters() == "abcdef"


def test_finished_messages_of_a_resent_batch_cost_no_credit():
    pair = Pair(credit=(4, 1 << 20))
    pair.open()
    pair.publish("abcd")
    pair.finish(1, 2, 3)
    pair.ack()
    pair.publish("efg")
    pair.replace_worker()
    assert pair.worker.letters() == "aefg"


def test_a_publisher_beyond_any_credit_is_refused():
    limits = Limits(session_credit_events_max=1024)
    session = WorkerSession(PUBLISHER, b"e", 0, limits)
    for first in range(0, 1536, 512):
        assert session.accept(Data(b"e", 1, first, 512, 1, (), b"x")) == ()
    with pytest.raises(RemoteProtocolError, match="more than any credit"):
        session.accept(Data(b"e", 1, 1536, 1, 1, (), b"x"))
    assert session.received == 1536


# -- all of it at once


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_lost_every_message_runs_once_in_order_and_ends(seed: int):
    pair = Pair(credit=(5, 1 << 20))
    published = "abcdefghijklmnopqrstuvwxyz"
    chance = random.Random(seed)

    def unlucky(frame: Frame) -> bool:
        return chance.random() < 0.3

    pair.open(lose=unlucky)
    waiting = deque(published[at : at + 2] for at in range(0, 26, 2))
    for _ in range(200):
        if waiting:
            pair.publish(waiting.popleft(), lose=unlucky)
        if PUBLISHER in pair.worker.sessions:
            session = pair.worker.session
            unfinished = [seq for seq in range(session.cumulative, session.received) if not session.is_finished(seq)]
            for seq in chance.sample(unfinished, len(unfinished) // 2 + len(unfinished) % 2):
                session.finish(seq)
                pair.ack(lose=unlucky)
        pair.tick(LIMITS.ping_interval_s, lose=unlucky)
    for _ in range(3):
        pair.tick(LIMITS.ping_interval_s)  # at last the way is clear
    assert pair.worker.letters() == published
    assert {attempt for _, attempt in pair.worker.ran} == {1}
    assert (pair.publisher.held_events, pair.publisher.held_bytes) == (0, 0)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_dies_every_message_ends_and_every_repeat_is_announced(seed: int):
    pair = Pair(credit=(9, 1 << 20))
    published = "abcdefghijklmnopqrstuvwxyz"
    chance = random.Random(seed)
    ran: list[tuple[str, int]] = []
    pair.open()
    waiting = deque(published[at : at + 3] for at in range(0, 26, 3))
    for round_number in range(60):
        if waiting:
            pair.publish(waiting.popleft())
        session = pair.worker.session
        unfinished = [seq for seq in range(session.cumulative, session.received) if not session.is_finished(seq)]
        for seq in chance.sample(unfinished, len(unfinished) // 2):
            session.finish(seq)
            pair.ack(lose=lambda frame: chance.random() < 0.5)
        pair.tick(LIMITS.ping_interval_s / 2)
        if chance.random() < 0.3:
            ran += pair.worker.ran
            pair.replace_worker(f"epoch-{round_number}-again".encode())
    session = pair.worker.session
    session.finish_range(session.cumulative, session.received)
    pair.ack()
    ran += pair.worker.ran
    first = [letter for at, (letter, _) in enumerate(ran) if letter not in {seen for seen, _ in ran[:at]}]
    assert "".join(first) == published
    unannounced = [at for at, (letter, attempt) in enumerate(ran) if attempt == 1 and letter in dict(ran[:at])]
    assert unannounced == []
    assert pair.publisher.held_events == 0


# -- commands that nobody waits for, and those that may be sent again


def cancelled(pair: Pair) -> list[int]:
    return [frame.seq for frame in pair.worker.of(Cancel) if isinstance(frame, Cancel)]


def test_a_command_that_was_sent_and_is_abandoned_is_cancelled_at_its_worker(opened: Pair):
    opened.publish("abc", commands=(1, 2))
    opened.finish(2)
    opened.ack()
    opened.publisher.abandon(1)
    opened.publisher.abandon(2)
    opened.exchange()
    assert cancelled(opened) == [1]


def test_a_command_that_is_abandoned_before_it_is_offered_is_never_run(opened: Pair):
    opened.publisher.abandon(1)
    opened.publish("abc", commands=(1,))
    assert opened.worker.letters() == "ac"
    assert cancelled(opened) == []
    assert opened.publisher.held_events == 2


def test_an_abandoned_command_is_cancelled_before_it_is_sent_again_on_a_new_connection(opened: Pair):
    opened.publish("ab", commands=(0, 1), lose=only(Data))
    opened.publisher.greet_again()
    opened.publisher.abandon(0)
    opened.tick()
    assert cancelled(opened) == [0]
    kinds = [type(frame) for frame in opened.worker.seen]
    assert kinds.index(Cancel) < kinds.index(Data)


def test_an_idempotent_command_is_sent_again_to_the_successor_with_its_time_counted(opened: Pair):
    opened.publisher.offer(b"abc", 3, (0,), opened.now_ns, (2,))
    opened.exchange()
    opened.now_ns += 3 * S
    assert opened.replace_worker() == [Lost(0)]
    opened.worker.seen.clear()
    for data in opened.publisher.frames_to_send(opened.now_ns):
        opened.worker.receive(data)
    assert opened.worker.ran == [("b", 2), ("c", 2)]
    resent = opened.worker.of(Data)[-1] if opened.worker.of(Data) else None
    assert resent is None or (isinstance(resent, Data) and resent.attempt == 2)


def test_an_idempotent_command_that_nobody_waits_for_is_not_sent_again(opened: Pair):
    opened.publisher.offer(b"abc", 3, (), opened.now_ns, (1, 2))
    opened.exchange()
    opened.publisher.abandon(1)
    assert opened.replace_worker() == []
    assert opened.worker.ran == [("a", 2), ("c", 2)]


def test_a_batch_with_an_idempotent_command_is_not_dropped(pair: Pair):
    pair.publisher.offer(b"ab", 2, (), 1, (1,))
    assert pair.publisher.drop_oldest() == 0


def test_a_worker_remembers_as_many_cancelled_commands_as_credit_allows_and_none_that_has_ended():
    session = WorkerSession(PUBLISHER, b"e", 0, LIMITS)
    credit = LIMITS.session_credit_events_max + LIMITS.batch_events_max
    session.accept(Data(b"e", 1, 0, 512, 1, (), b"x" * 512))
    session.finish_range(0, 100)
    for seq in range(2 * credit):
        session.cancel(seq)
    assert list(session.cancelled) == list(range(credit, 2 * credit))
    session.cancel(50)
    assert 50 not in session.cancelled
