"""Which sessions end, and when: plain calls."""

from __future__ import annotations

import random

import pytest

from shardbus.session_events import SessionEnded
from shardbus.session_table import GONE, SessionTable

A, B = b"a" * 16, b"b" * 16
IDLE_NS = 1000


def ended(reason: str, *keys: str) -> list[SessionEnded]:
    return [SessionEnded(session=key, reason=reason) for key in keys]


def test_a_session_is_over_when_its_opener_has_ended_it():
    table = SessionTable(10)
    table.started("7", A, 1, 0)
    assert (len(table), table.has_openers) == (1, True)
    assert table.ended("7", A, 1)
    assert (len(table), table.has_openers) == (0, False)


def test_a_session_of_several_openers_is_over_with_the_last():
    table = SessionTable(10)
    table.started("7", A, 1, 0)
    table.started("7", A, 2, 0)
    table.started("7", B, 1, 0)
    assert [table.ended("7", publisher, 1) for publisher in (A, B, A)] == [False, False, True]


def test_a_beginning_that_comes_again_is_one():
    table = SessionTable(10)
    table.started("7", A, 1, 0)
    table.started("7", A, 1, 5)
    assert table.ended("7", A, 6)


def test_an_end_of_what_is_not_open_or_by_somebody_else_is_over_unless_it_is_open():
    table = SessionTable(10)
    assert table.ended("7", A, 0)
    table.used("7", 0)
    assert table.ended("7", A, 1)
    table.started("7", A, 1, 2)
    assert not table.ended("7", B, 3)
    assert len(table) == 1


def test_what_a_publisher_says_that_it_has_open_stands_in_the_place_of_what_was_known():
    table = SessionTable(10)
    table.started("7", A, 1, 0)
    table.started("7", A, 2, 0)
    table.kept("7", A, 3, 2, 0)
    table.kept("8", A, 4, 0, 0)  # at least once, or it would not say so
    assert [table.ended(key, A, 1) for key in "778"] == [False, True, True]
    assert (len(table), table.has_openers) == (0, False)


def test_sessions_that_were_not_used_for_long_end_and_no_others():
    table = SessionTable(10, IDLE_NS)
    assert table.next_idle_ns == 0
    table.started("1", A, 1, 0)
    table.used("2", 10)
    table.used("3", 20)
    table.used("1", 30)
    assert table.next_idle_ns == 10 + IDLE_NS
    assert table.idle(9 + IDLE_NS) == []
    assert table.idle(20 + IDLE_NS) == ended("idle", "2", "3")
    assert table.idle(20 + IDLE_NS) == []  # they are on their way
    assert table.next_idle_ns == 30 + IDLE_NS
    assert len(table) == 3
    assert table.ended("2", B, 20 + IDLE_NS)
    assert len(table) == 2


def test_nothing_is_idle_without_a_limit():
    table = SessionTable(10)
    table.used("1", 0)
    assert table.next_idle_ns == 0
    assert table.idle(1 << 60) == []


def test_what_a_publisher_has_open_ends_when_it_is_gone_once():
    table = SessionTable(10)
    for key in "123":
        table.started(key, A, 1, 0)
    table.started("2", B, 1, 0)
    assert table.gone(A) == ended("client gone", "1", "2", "3")
    assert table.gone(A) == []
    assert [table.ended(key, b"worker", 5) for key in "123"] == [True, False, True]
    assert table.gone(B) == ended("client gone", "2")


def test_a_session_that_is_opened_while_it_ends_goes_on():
    table = SessionTable(10, IDLE_NS)
    table.started("1", A, 1, 0)
    assert table.idle(IDLE_NS) == ended("idle", "1")
    table.started("1", B, 1, IDLE_NS)
    assert not table.ended("1", b"worker", IDLE_NS + 1)
    assert table.next_idle_ns == 2 * IDLE_NS + 1
    assert table.gone(A) == []  # its session has ended
    assert table.ended("1", B, IDLE_NS + 2)
    assert (len(table), table.has_openers) == (0, False)


def test_a_session_that_is_used_while_it_ends_ends():
    table = SessionTable(10, IDLE_NS)
    table.used("1", 0)
    assert table.idle(IDLE_NS) == ended("idle", "1")
    table.used("1", IDLE_NS)
    assert table.idle(3 * IDLE_NS) == []
    assert table.ended("1", b"worker", IDLE_NS + 1)
    assert len(table) == 0


def test_a_publisher_that_nobody_has_heard_of_counts_from_what_it_opened_last():
    table = SessionTable(10)
    table.started("1", A, 1, 100)
    table.started("2", A, 2, 200)
    assert table.silent(lambda _: None, 200) == []
    assert table.silent(lambda _: None, 201) == ended("client gone", "1", "2")


@pytest.mark.parametrize(("heard_ns", "gone"), [(500, False), (50, True), (GONE, True)])
def test_a_publisher_counts_from_when_it_was_heard_of_last(heard_ns: int, gone: bool):
    table = SessionTable(10)
    table.started("1", A, 1, 100)
    assert bool(table.silent(lambda _: heard_ns, 60)) is gone


def test_a_publisher_that_says_that_it_goes_is_gone_whenever_it_was_heard_of():
    table = SessionTable(10)
    table.started("1", A, 1, 100)
    assert table.silent(lambda _: GONE, -1000) == ended("client gone", "1")


def test_a_publisher_that_was_heard_of_and_is_forgotten_is_gone_in_its_time():
    table = SessionTable(10)
    table.started("1", A, 1, 100)
    assert table.silent(lambda _: 500, 300) == []
    assert table.silent(lambda _: None, 500) == []
    assert table.silent(lambda _: None, 501) == ended("client gone", "1")


def test_when_full_the_session_that_is_idle_for_longest_makes_room():
    table = SessionTable(2)
    for at, key in enumerate("123"):
        table.started(key, A, at, at)
    assert table.crowded() == ended("full", "1")
    assert table.crowded() == []
    table.used("2", 4)
    table.used("4", 5)
    assert table.crowded() == ended("full", "3")
    assert len(table) == 4  # until their ends are handled
    assert table.ended("1", b"worker", 6)
    assert table.ended("3", b"worker", 6)
    assert len(table) == 2


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_nothing_is_left_once_all_have_gone_and_all_ends_are_handled(seed: int):
    chance = random.Random(seed)
    table = SessionTable(6, 50)
    ends: list[SessionEnded] = []
    for now in range(400):
        key, publisher = chance.choice("123456789"), chance.choice((A, B))
        match chance.randrange(7):
            case 0 | 1:
                table.started(key, publisher, now, now)
            case 2:
                table.ended(key, publisher, now)
            case 3:
                table.used(key, now)
            case 4:
                ends += table.idle(now)
            case 5:
                ends += table.gone(publisher) if chance.random() < 0.2 else []
            case 6:
                chance.shuffle(ends)
                for end in ends[: len(ends) // 2]:
                    table.ended(end.session, b"worker", now)
                del ends[: len(ends) // 2]
        ends += table.crowded()
    ends += table.gone(A) + table.gone(B)
    assert not table.has_openers
    ends += table.idle(1000)
    for end in ends:
        table.ended(end.session, b"worker", 1000)
    assert len(table) == 0
