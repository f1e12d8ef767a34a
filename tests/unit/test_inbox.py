"""Whose batch is next: who asks for little is served at once, and who asks for more than there is shares."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbus.config import DEFAULT_LIMITS
from shardbus.inbound import Inbound
from shardbus.inbox import Inbox
from shardbus.wire.frames import Data
from shardbus.wire.session import WorkerSession

US = 1000
MS = 1_000_000


def session(number: int) -> WorkerSession:
    return WorkerSession(bytes([number]) * 16, b"", 1, DEFAULT_LIMITS)


def batch(of: WorkerSession, first: int = 1) -> Inbound:
    unused: Any = None
    frame = Data(epoch=b"", layout=1, first=first, count=1, attempt=1, skip=(), blob=b"")
    return Inbound(of, unused, frame, (), 0)


class Leader:
    """Runs batches, each for as long as it takes, in what the inbox lets it have, and in slices of its own."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.now_ns = 1
        self.left_ns: dict[Inbound, int] = {}
        self.begun: Inbound | None = None
        self.log: list[tuple[WorkerSession, int]] = []
        """Whose batch, and its first sequence."""
        self.ran_ns: Counter[WorkerSession] = Counter()

    def push(self, one: Inbound, takes_ns: int) -> None:
        self.left_ns[one] = takes_ns
        self.inbox.push(one)

    def step(self) -> Inbound:
        one = self.inbox.take(self.begun, self.now_ns)
        assert self.begun in (None, one) or self.begun in list(self.inbox)
        runs_ns = min(self.left_ns[one], self.inbox.share_ends_ns - self.now_ns, 2 * MS)
        self.now_ns += runs_ns
        self.left_ns[one] -= runs_ns
        self.begun = one if self.left_ns[one] else None
        self.ran_ns[one.session] += runs_ns
        self.log.append((one.session, one.first))
        return one

    def run(self, until_ns: int = 2**62) -> None:
        while (self.begun or self.inbox) and self.now_ns < until_ns:
            self.step()


@pytest.fixture
def leader() -> Leader:
    return Leader()


def test_those_that_ask_for_more_than_there_is_get_equal_parts_whatever_their_batches_are(leader: Leader):
    small, large, huge = map(session, range(3))
    for first in range(1, 4000):
        leader.push(batch(small, first), 30 * US)
    for first in range(1, 100):
        leader.push(batch(large, first), 1300 * US)
    leader.push(batch(huge), 500 * MS)
    leader.run(300 * MS)
    assert leader.inbox
    parts = [leader.ran_ns[one] for one in (small, large, huge)]
    assert max(parts) - min(parts) <= 2 * MS


def test_each_sessions_batches_come_in_their_order_also_one_that_was_broken_off(leader: Leader):
    one, other = session(1), session(2)
    for first in range(1, 50):
        leader.push(batch(one, first), 700 * US)
        leader.push(batch(other, first), 1500 * US)
    leader.run()
    for of in (one, other):
        firsts = [first for whose, first in leader.log if whose is of]
        assert firsts == sorted(firsts)
        assert len(set(firsts)) == 49


def beside_a_flood(leader: Leader, until_ns: int) -> WorkerSession:
    """One that has asked for little, while another floods."""
    flood, modest = session(1), session(2)
    leader.push(batch(flood), 2000 * MS)
    leader.push(batch(modest, 0), US)
    leader.run(until_ns)
    return modest


def test_one_that_asks_for_little_waits_for_no_more_than_a_share(leader: Leader):
    modest = beside_a_flood(leader, 20 * MS)
    for first in range(1, 100):
        due_ns = leader.now_ns
        leader.push(batch(modest, first), 100 * US)
        while leader.log[-1] != (modest, first):
            leader.step()
        assert leader.now_ns - due_ns <= MS + 100 * US
        leader.run(due_ns + 5 * MS)


def test_one_that_asks_for_little_catches_up_at_once_after_everything_stood_still(leader: Leader):
    modest = beside_a_flood(leader, 100 * MS)
    for first in range(1, 51):
        leader.push(batch(modest, first), 200 * US)  # of ten shares
    since_ns = leader.now_ns
    while leader.log[-1] != (modest, 50):
        leader.step()
    assert leader.now_ns - since_ns <= 10 * MS + MS


@pytest.mark.parametrize("count", [1, 2, 10])
def test_those_that_had_nothing_for_long_go_first_for_no_longer_than_their_credit(leader: Leader, count: int):
    steady, rare = session(0), [session(number) for number in range(1, count + 1)]
    for one in rare:
        leader.push(batch(one, 1), US)
    leader.push(batch(steady), 60_000 * MS)
    leader.run(30_000 * MS)
    for one in rare:
        leader.push(batch(one, 2), 1000 * MS)  # each while the one before runs
        leader.step()
    since_ns, before_ns = leader.now_ns, leader.ran_ns[steady]
    while leader.ran_ns[steady] == before_ns:
        leader.step()
    # The one who was alone had a slice instead of a share.
    assert leader.now_ns - since_ns <= count * (20 * MS + 2 * MS) + 2 * MS
    leader.run(leader.now_ns + 100 * MS)
    assert leader.ran_ns[steady] - before_ns >= 100 * MS // (count + 1) - 2 * MS


def test_one_that_is_new_has_no_credit_whoever_runs(leader: Leader):
    steady, rare, new = session(1), session(2), session(3)
    leader.push(batch(rare, 1), US)
    leader.push(batch(steady), 1000 * MS)
    leader.run(500 * MS)
    leader.push(batch(rare, 2), 1000 * MS)
    leader.run(leader.now_ns + 3 * MS)
    assert leader.log[-1] == (rare, 2)
    leader.push(batch(new), 1000 * MS)
    leader.run(leader.now_ns + 40 * MS)
    assert leader.ran_ns[new] <= leader.ran_ns[steady] - 500 * MS + 2 * MS


def test_one_whose_handler_took_very_long_waits_no_longer_than_others_may_be_ahead(leader: Leader):
    sessions = [session(number) for number in range(4)]
    stalled = batch(sessions[0])
    for one in sessions[1:]:
        leader.push(batch(one), 60_000 * MS)
    leader.push(stalled, 2 * MS)
    while leader.begun is not stalled:
        leader.step()
    leader.now_ns += 2000 * MS  # one call
    since_ns = leader.now_ns
    while leader.step() is not stalled:
        pass
    assert leader.now_ns - since_ns <= 3 * (20 * MS + 2 * MS)


def test_time_in_which_nothing_runs_is_nobodys(leader: Leader):
    light, other = session(1), session(2)
    for first in range(1, 11):
        leader.push(batch(light, first), 10 * US)
        leader.run()
        leader.inbox.rest(leader.now_ns)
        leader.now_ns += 50 * MS
    assert light.clock_ns == 100 * US
    leader.push(batch(other), 10 * MS)
    leader.push(batch(light, 11), 10 * US)
    leader.step()
    leader.step()
    assert light in [whose for whose, _ in leader.log[-2:]]


def test_only_for_one_who_waits_does_a_share_end_within_a_batch(leader: Leader):
    alone, other = batch(session(1)), batch(session(2))
    leader.push(alone, 10 * MS)
    leader.step()
    assert leader.inbox.share_ends_ns > leader.now_ns + 1000 * MS
    leader.push(other, 10 * MS)
    assert leader.step() is other
    assert leader.inbox.share_ends_ns <= leader.now_ns


def test_nothing_is_left_of_what_was_forgotten(leader: Leader):
    leader.push(batch(session(1)), MS)
    leader.push(batch(session(2)), MS)
    leader.step()
    leader.inbox.clear()
    assert not leader.inbox
    assert list(leader.inbox) == []
    leader.begun = None
    leader.push(batch(session(3)), MS)
    leader.run()
    assert not leader.inbox


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3 * MS), st.integers(0, 4)), max_size=60))
def test_whatever_comes_everything_runs_once_and_in_its_sessions_order(loads: list[tuple[int, int, int]]):
    leader = Leader()
    sessions = [session(number) for number in range(5)]
    pushed: dict[WorkerSession, list[int]] = {one: [] for one in sessions}
    for first, (of, takes_ns, steps) in enumerate(loads, 1):
        leader.push(batch(sessions[of], first), takes_ns)
        pushed[sessions[of]].append(first)
        for _ in range(steps):
            if leader.begun or leader.inbox:
                leader.step()
    leader.run()
    for one in sessions:
        firsts = [first for whose, first in leader.log if whose is one]
        assert list(dict.fromkeys(firsts)) == pushed[one]
        assert firsts == sorted(firsts)
    assert not any(leader.left_ns.values())
