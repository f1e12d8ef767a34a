"""Which scheduled events are read ahead, which may begin, and which may have begun before: over rows in a dictionary."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from shardbus.config import DEFAULT_LIMITS, Limits
from shardbus.lookahead import MARK_AHEAD_NS, MARK_EARLY_NS, PAGE_ROWS, LookAhead
from shardbus.store import Envelope, ScheduledEvent, StoredScheduled, fitting

S = 1_000_000_000
NOW = 1_000_000 * S
LIMITS = replace(DEFAULT_LIMITS, ahead_rows_max=1024, due_events_max=1024)
PUBLISHER = b"p" * 16


def event(due_ns: int, row: int = 0, body: bytes = b"") -> ScheduledEvent:
    envelope = Envelope(
        publisher=PUBLISHER,
        seq=row,
        slot=0,
        type="T",
        key="k",
        body=body,
        headers=None,
        ordinal=0,
        intended_ns=0,
        attempt=1,
    )
    return ScheduledEvent(envelope=envelope, due_ns=due_ns)


class Rows:
    """A store as a dictionary, and a look-ahead over it whose reads and marks are done at once."""

    def __init__(self, limits: Limits = LIMITS, dues: tuple[int, ...] = ()) -> None:
        self.rows = {row: event(due_ns, row) for row, due_ns in enumerate(dues, 1)}
        self.row_max = len(dues)
        self.mark_ns = 0
        self.reads = 0
        self.most = 0
        self.limits = limits
        self.ahead = LookAhead(limits)
        self.restart()

    def restart(self) -> None:
        self.ahead = LookAhead(self.limits)
        self.ahead.begin(self.next_due(0), max(self.rows, default=0), self.mark_ns)

    def next_due(self, after_ns: int) -> int:
        return min((one.due_ns for one in self.rows.values() if one.due_ns > after_ns), default=0)

    def add(self, due_ns: int, body: bytes = b"") -> int:
        self.row_max += 1
        self.rows[self.row_max] = event(due_ns, self.row_max, body)
        self.ahead.stored(due_ns)
        return self.row_max

    def read(self, now_ns: int) -> None:
        while (page := self.ahead.page(now_ns)) is not None:
            self.reads += 1
            if page.new:
                order = sorted(row for row, one in self.rows.items() if row > page.above and one.due_ns <= page.until_ns)
            else:
                due = ((one.due_ns, row) for row, one in self.rows.items() if one.due_ns <= page.until_ns)
                order = [row for at, row in sorted(due) if (at, row) > page.after]
            found = [StoredScheduled(row, self.rows[row]) for row in order[: page.rows]]
            found = found[: fitting((len(one.event.envelope.body) for one in found), page.bytes)]
            if not self.ahead.took(page, found):
                self.ahead.nothing_before(self.next_due(self.ahead.reach_ns))
            self.most = max(self.most, len(self.ahead._events) + self.ahead.begun)

    def mark(self, now_ns: int) -> None:
        if wanted := self.ahead.mark_wanted(now_ns):
            self.mark_ns = wanted
            self.ahead.marked(wanted)

    def take(self, now_ns: int) -> tuple[int, bool] | None:
        taken = self.ahead.take(now_ns)
        return None if taken is None else (taken[0].row, taken[1])

    def end(self, row: int) -> None:
        self.ahead.ended(row)
        del self.rows[row]
        self.ahead.gone((row,))

    def run(self, now_ns: int) -> list[int]:
        """All that is due at an instant, in turn."""
        ran: list[int] = []
        while True:
            self.read(now_ns)
            self.mark(now_ns)
            taken = self.take(now_ns)
            if taken is None:
                return ran
            ran.append(taken[0])
            self.end(taken[0])


def test_what_is_due_soon_is_read_and_what_is_due_later_is_not():
    rows = Rows(dues=(NOW + 2 * S, NOW + 4 * S, NOW + 60 * S))
    assert rows.ahead.next_due_ns == NOW + 2 * S
    assert not rows.ahead.wants(NOW - S)
    assert rows.ahead.wake_ns(NOW - 60 * S) == NOW + 2 * S - 5 * S // 2
    rows.read(NOW)
    assert sorted(rows.ahead._events) == [1, 2]
    assert rows.ahead.wake_ns(NOW) == NOW + 2 * S - MARK_EARLY_NS
    rows.reads = 0
    rows.read(NOW + S)
    assert rows.reads == 0
    assert rows.run(NOW + 10 * S) == [1, 2]
    assert rows.ahead.next_due_ns == NOW + 60 * S


def test_nothing_begins_before_it_is_due_and_before_its_mark_is_committed():
    rows = Rows(dues=(NOW + S,))
    rows.read(NOW)
    assert rows.ahead.mark_wanted(NOW) == 0
    wanted = rows.ahead.mark_wanted(NOW + S - MARK_EARLY_NS)
    assert wanted == NOW + S + MARK_AHEAD_NS
    assert rows.take(NOW + 2 * S) is None
    assert not rows.ahead.is_due(NOW + 2 * S)
    rows.ahead.marked(wanted)
    assert rows.take(NOW + S - 1) is None
    assert rows.ahead.is_due(NOW + S)
    assert rows.take(NOW + S) == (1, False)
    assert rows.ahead.mark_for(wanted, NOW + S) == 0


def test_they_begin_by_due_time_and_then_as_they_were_stored_however_they_are_read():
    chance = random.Random(7)
    dues = tuple(NOW + chance.randrange(6) * S for _ in range(3000))
    rows = Rows(dues=dues)
    rows.read(NOW)
    late = [rows.add(NOW + chance.randrange(6) * S) for _ in range(700)]
    expected = sorted(range(1, 3701), key=lambda row: (rows.rows[row].due_ns, row))
    assert len(late) == 700
    assert rows.run(NOW + 10 * S) == expected
    assert rows.most <= LIMITS.ahead_rows_max
    assert not rows.rows


def test_a_million_rows_do_not_come_into_memory_at_once():
    # As pages of a store that has no end, because a million rows in a dictionary would take a minute.
    ahead = LookAhead(DEFAULT_LIMITS)
    ahead.begin(NOW, 1_000_000, 0)
    read = 0
    while (page := ahead.page(NOW)) is not None:
        ahead.took(page, [StoredScheduled(row, event(NOW, row)) for row in range(read + 1, read + 1 + page.rows)])
        read += page.rows
    assert DEFAULT_LIMITS.ahead_rows_max - PAGE_ROWS < read <= DEFAULT_LIMITS.ahead_rows_max


def test_large_events_are_bounded_by_their_bytes():
    limits = replace(LIMITS, ahead_bytes_max=4 * 1024 * 1024)
    rows = Rows(limits)
    for _ in range(20):
        rows.add(NOW, b"x" * 1024 * 1024)
    rows.read(NOW)
    assert 1 <= len(rows.ahead._events) <= 4
    assert rows.run(NOW) == list(range(1, 21))


def test_what_is_due_earlier_takes_the_place_of_what_is_due_last():
    rows = Rows(dues=tuple(NOW + 2 * S for _ in range(2000)))
    rows.read(NOW)
    assert len(rows.ahead._events) == 1024
    first = rows.add(NOW)
    assert rows.run(NOW) == [first]
    assert rows.run(NOW + 2 * S) == list(range(1, 2001))


def test_so_many_are_under_way_at_most_and_others_begin_when_one_has_ended():
    rows = Rows(replace(LIMITS, due_events_max=2), (NOW, NOW, NOW))
    rows.read(NOW)
    rows.mark(NOW)
    assert [rows.take(NOW) for _ in range(3)] == [(1, False), (2, False), None]
    assert not rows.ahead.is_due(NOW)
    assert rows.ahead.ended(1) is True
    assert rows.take(NOW) == (3, False)
    assert rows.ahead.ended(1) is False
    assert rows.ahead.begun == 3  # their rows are still there


def test_a_successor_calls_a_repeat_what_may_have_begun_and_nothing_else():
    rows = Rows(dues=(NOW, NOW + S // 10, NOW + S, NOW + 2 * S))
    rows.read(NOW)
    rows.mark(NOW)
    assert rows.take(NOW) == (1, False)  # and it dies
    rows.restart()
    new = rows.add(NOW + S // 5)
    rows.read(NOW + S)
    taken = [rows.take(NOW + S) for _ in range(3)]
    rows.mark(NOW + S)
    taken += [rows.take(NOW + S) for _ in range(2)]
    # The second was within the mark; the third fell due while nobody was there; the last is nobody else's.
    assert taken == [(1, True), (2, True), (new, False), (3, False), None]


def test_a_clock_that_is_set_back_takes_nothing_from_what_is_known_of_a_death():
    rows = Rows(dues=(NOW, NOW + 1))
    rows.run(NOW)
    assert list(rows.rows) == [2]
    rows.mark(NOW + 1)
    rows.take(NOW + 1)  # and it dies, and the clock is set back by an hour
    rows.restart()
    assert rows.run(NOW - 3600 * S) == []
    rows.read(NOW + 1)
    rows.mark(NOW + 1)
    assert rows.take(NOW + 1) == (2, True)


@pytest.mark.parametrize("leap_s", [-3600, 3600])
def test_the_wall_clock_may_jump(leap_s: int):
    rows = Rows(dues=(NOW + S, NOW + 4 * S, NOW + 1800 * S))
    rows.read(NOW)
    leapt = NOW + leap_s * S
    assert rows.run(leapt) == ([1, 2, 3] if leap_s > 0 else [])
    assert rows.run(NOW + 1800 * S) == ([] if leap_s > 0 else [1, 2, 3])


def test_what_is_cancelled_does_not_begin_and_what_has_begun_is_not_cancelled():
    rows = Rows(dues=(NOW, NOW, NOW + 60 * S))
    rows.read(NOW)
    rows.mark(NOW)
    assert rows.take(NOW) == (1, False)
    assert rows.ahead.withdraw(PUBLISHER, 1) is False
    assert rows.ahead.withdraw(PUBLISHER, 2) is True
    assert rows.take(NOW) is None  # while its row is being removed
    del rows.rows[2]
    assert rows.ahead.withdrawn([2]) is True
    assert rows.ahead.withdraw(PUBLISHER, 3) is True
    assert rows.ahead.withdrawn([3]) is False  # the store is asked what is next
    rows.end(1)
    assert rows.take(NOW) is None
    assert rows.ahead._bytes == 0


def test_what_could_not_be_cancelled_begins_all_the_same():
    rows = Rows(dues=(NOW,))
    rows.read(NOW)
    rows.mark(NOW)
    assert rows.ahead.withdraw(PUBLISHER, 1) is True
    assert rows.take(NOW) is None
    rows.ahead.withdrawn([])
    assert rows.take(NOW) == (1, False)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_each_begins_once_and_in_time(seed: int):
    chance = random.Random(seed)
    rows = Rows(replace(LIMITS, due_events_max=chance.choice([1, 3, 1024])))
    now_ns, running, ran = NOW, list[int](), list[int]()
    gone: set[int] = set()
    due: dict[int, int] = {}
    for _ in range(1500):
        match chance.choice(["add", "add", "many", "pass", "take", "take", "end", "cancel", "leap"]):
            case "add":
                at = now_ns + chance.randrange(8 * S)
                due[rows.add(at)] = at
            case "many" if chance.random() < 0.05:
                at = now_ns + chance.randrange(6 * S)
                due |= {rows.add(at): at for _ in range(chance.randrange(1500))}
            case "pass":
                now_ns += chance.randrange(S // 4)
            case "take":
                rows.read(now_ns)
                rows.mark(now_ns)
                while chance.random() < 0.9 and (taken := rows.take(now_ns)) is not None:
                    assert due[taken[0]] <= now_ns
                    running.append(taken[0])
                    ran.append(taken[0])
            case "end" if running:
                rows.end(running.pop(chance.randrange(len(running))))
            case "cancel" if due:
                row = chance.choice(list(due))
                if row in rows.rows and rows.ahead.withdraw(PUBLISHER, row):
                    del rows.rows[row]
                    if not rows.ahead.withdrawn([row]):
                        rows.ahead.nothing_before(rows.next_due(rows.ahead.reach_ns))
                    gone.add(row)
            case "leap" if chance.random() < 0.02:
                now_ns += chance.choice([-1, 1]) * 3600 * S
    for row in running:
        rows.end(row)
    ran += rows.run(max([now_ns, *due.values()]))
    assert sorted(ran) == sorted(due.keys() - gone)
    assert not rows.rows
    assert (rows.ahead._bytes, rows.ahead.begun, rows.ahead.next_due_ns) == (0, 0, 0)
    assert rows.most <= LIMITS.ahead_rows_max
