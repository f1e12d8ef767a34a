"""Which of the events that wait for their children go to the store, and which come first."""

from __future__ import annotations

from shardbus.deferral import Deferrals, Deferred
from shardbus.inbound import UNKNOWN, Delivery
from shardbus.store import Failure

FAILURE = Failure(handlers=("h",), reason="failed", error_type="E", error="")


def deferred(at_ns: int, *, of_worker: bool = True, body: bytes = b"", failure: Failure | None = None) -> Deferred:
    delivery = Delivery(None, b"p" * 16, 0, "T", UNKNOWN, "k", body, 0, 0, 1)
    return Deferred(delivery, failure, False, 1, of_worker, at_ns)


def test_the_oldest_go_first_and_workers_are_counted_apart():
    deferrals = Deferrals()
    mine = [deferred(at) for at in range(3)]
    others = [deferred(at, of_worker=False) for at in range(2)]
    for one in (*mine, *others):
        deferrals.add(one)
    assert deferrals.are_many(True, 2, 100)
    assert not deferrals.are_many(False, 2, 100)
    assert deferrals.oldest(True) is mine[0]
    deferrals.stored(mine[0])
    assert not deferrals.are_many(True, 2, 100)
    assert deferrals.oldest(True) is mine[1]
    assert (len(deferrals), deferrals.in_memory) == (5, 4)


def test_large_events_are_many_sooner():
    deferrals = Deferrals()
    large = deferred(0, body=b"x" * 101)
    deferrals.add(large)
    assert deferrals.are_many(True, 2, 100)
    deferrals.remove(large)
    assert not deferrals.are_many(True, 2, 100)
    assert (len(deferrals), deferrals.in_memory) == (0, 0)


def test_what_has_waited_or_failed_is_to_be_stored_and_what_is_stored_is_not_again():
    deferrals = Deferrals()
    old, new, failed = (deferred(at, of_worker=False, failure=why) for at, why in ((1, None), (9, None), (9, FAILURE)))
    for one in (old, new, failed):
        deferrals.add(one)
    assert list(deferrals.overdue(10, 5)) == [old, failed]
    for one in (old, failed):
        deferrals.stored(one)
        deferrals.stored(one)  # once more does no harm
    assert list(deferrals.overdue(10, 5)) == []
    assert list(deferrals.overdue(14, 5)) == [new]


def test_what_workers_have_published_waits_longer():
    deferrals = Deferrals()
    of_worker, of_program = deferred(0), deferred(0, of_worker=False)
    for one in (of_worker, of_program):
        deferrals.add(one)
    assert list(deferrals.overdue(24, 5)) == [of_program]
    assert list(deferrals.overdue(25, 5)) == [of_worker, of_program]
    assert list(deferrals.overdue(0, 0)) == [of_worker, of_program]
