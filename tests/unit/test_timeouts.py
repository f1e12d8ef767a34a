"""Many time-outs and few timers: each future ends when it is due, and what has ended leaves nothing."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest

from shardbus.testing.clock import Clock
from shardbus.timeouts import Timeouts


@pytest.fixture
def timeouts() -> Timeouts:
    return Timeouts()


class Waits:
    """Futures that wait, and when each ended by the clock."""

    def __init__(self, timeouts: Timeouts, clock: Clock) -> None:
        self.ended_s: dict[str, float] = {}
        self._timeouts = timeouts
        self._clock = clock
        self._began_ns = clock.now_ns()

    def begin(self, name: str, timeout_s: float) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        future.add_done_callback(self._noted(name))
        self._timeouts.add(future, timeout_s, loop)
        return future

    def _noted(self, name: str) -> Callable[[asyncio.Future[Any]], None]:
        def note(_: asyncio.Future[Any]) -> None:
            self.ended_s[name] = round((self._clock.now_ns() - self._began_ns) / 1e9, 6)

        return note


async def test_each_ends_when_it_is_due_whatever_others_wait_for(timeouts: Timeouts) -> None:
    with Clock(lambda: None) as clock:
        waits = Waits(timeouts, clock)
        begun = [waits.begin("a", 5.0), waits.begin("b", 0.5)]
        await clock.advance(0.25)
        begun += [waits.begin("c", 5.0), waits.begin("d", 0.5), waits.begin("e", 1)]
        await clock.advance(10.0)
    assert waits.ended_s == {"a": 5.0, "b": 0.5, "c": 5.25, "d": 0.75, "e": 1.25}
    assert all(isinstance(future.exception(), TimeoutError) for future in begun)


async def test_what_was_removed_does_not_end_and_holds_up_nobody(timeouts: Timeouts) -> None:
    with Clock(lambda: None) as clock:
        waits = Waits(timeouts, clock)
        first = waits.begin("first", 1.0)
        await clock.advance(0.5)
        waits.begin("second", 1.0)
        timeouts.remove(first, 1.0)
        timeouts.remove(first, 1.0)  # again, and of a length that nobody waits for
        timeouts.remove(first, 7.0)
        await clock.advance(5.0)
    assert waits.ended_s == {"second": 1.5}
    assert not first.done()


async def test_what_is_done_when_it_is_due_stays_as_it_is_and_holds_up_nobody(timeouts: Timeouts) -> None:
    with Clock(lambda: None) as clock:
        waits = Waits(timeouts, clock)
        future, behind = waits.begin("done", 1.0), waits.begin("behind", 1.0)
        future.set_result("reply")
        await clock.advance(2.0)
    assert future.result() == "reply"
    assert waits.ended_s == {"done": 0.0, "behind": 1.0}
    assert isinstance(behind.exception(), TimeoutError)


async def test_short_ones_of_one_length_do_not_end_with_the_first_of_them(timeouts: Timeouts) -> None:
    with Clock(lambda: None) as clock:
        waits = Waits(timeouts, clock)
        for n in range(4):
            waits.begin(str(n), 0.001)
            await clock.advance(0.0003)
        await clock.advance(0.1)
    assert waits.ended_s == {"0": 0.001, "1": 0.0013, "2": 0.0016, "3": 0.0019}


async def test_one_that_nobody_sees_is_not_told_of_by_the_loop(timeouts: Timeouts) -> None:
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context))
    with Clock(lambda: None) as clock:
        timeouts.add(loop.create_future(), 1.0, loop)
        await clock.advance(2.0)
        gc.collect()
    assert not told


async def test_the_last_one_takes_its_timer_along(timeouts: Timeouts) -> None:
    with Clock(lambda: None) as clock:
        waits = Waits(timeouts, clock)
        for _ in range(2):
            begun = [(waits.begin(str(n), 0.1 * (1 + n % 3)), 0.1 * (1 + n % 3)) for n in range(30)]
            assert clock.next_s() is not None
            for future, timeout_s in begun:
                timeouts.remove(future, timeout_s)
            assert clock.next_s() is None
        last = waits.begin("last", 0.1)
        await clock.advance(1.0)
        timeouts.remove(last, 0.1)  # as its caller does when it hears of it
        assert clock.next_s() is None


async def test_equal_waits_share_one_timer(timeouts: Timeouts) -> None:
    loop = asyncio.get_running_loop()
    with Clock(lambda: None) as clock:
        made = 0
        real = loop.call_later

        def counted(*args: Any, **kwargs: Any) -> asyncio.TimerHandle:
            nonlocal made
            made += 1
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_later", counted)
            waits = Waits(timeouts, clock)
            begun = [waits.begin(str(n), 5.0) for n in range(1000)]
        assert made == 1
        await clock.advance(5.0)
    assert all(future.done() for future in begun)
