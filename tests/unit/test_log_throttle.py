"""Which log lines are told, and when how many were not."""

from __future__ import annotations

import logging
from itertools import count

import pytest

from shardbus.log_throttle import LogThrottle

S = 1_000_000_000


class World:
    def __init__(self) -> None:
        self.now_ns = S
        self.told: list[str] = []
        log = logging.getLogger("throttled")
        log.handlers, log.propagate = [handler := logging.Handler()], False
        handler.emit = lambda record: self.told.append(record.getMessage())  # type: ignore[method-assign]
        self.throttle = LogThrottle(lambda: self.now_ns, log)

    def warn(self, kind: object, times: int = 1) -> list[str]:
        """What is told where a line comes so many times."""
        for _ in range(times):
            self.throttle.warning(kind, lambda: f"{kind}!")
        return self.heard()

    def tick(self, after_ns: int) -> list[str]:
        self.now_ns += after_ns
        self.throttle.tick()
        return self.heard()

    def close(self) -> list[str]:
        self.throttle.close()
        return self.heard()

    def heard(self) -> list[str]:
        heard, self.told = self.told, []
        return heard


def more(count: str, kind: str = "a") -> list[str]:
    return [f"{kind}! (and {count} more of the kind since the last such line)"]


@pytest.fixture
def world() -> World:
    return World()


def test_the_first_of_a_kind_is_told_and_a_minute_later_how_many_more_there_were(world: World):
    assert world.warn("a", 1501) == ["a!"]
    assert world.tick(60 * S - 1) == []
    assert world.tick(1) == more("1,500")
    assert world.warn("a", 2) == []
    assert world.tick(60 * S) == more("2")


def test_one_that_comes_after_a_quiet_minute_is_told_at_once(world: World):
    assert world.warn("a") == ["a!"]
    assert world.tick(60 * S) == []
    assert world.warn("a") == ["a!"]


def test_kinds_do_not_hold_up_each_other(world: World):
    assert [world.warn(kind) for kind in ("a", ("a",), ("a", "b"), "a")] == [["a!"], ["('a',)!"], ["('a', 'b')!"], []]


def test_what_was_counted_is_told_at_the_end(world: World):
    world.warn("a", 3)
    world.warn("b")
    assert world.close() == more("2")
    assert world.close() == []


def test_where_there_are_more_kinds_than_are_remembered_what_was_counted_is_told_and_all_are_told_anew(world: World):
    world.warn("a", 2)
    told = next(made for made in count(1) if len(world.warn(made)) == 2)
    assert told == 1024
    assert world.warn("a") == ["a!"]
