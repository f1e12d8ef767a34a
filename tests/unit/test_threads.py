"""Threads for handlers: what they carry, what a cancellation waits for, and how many there are."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import Any

import pytest

from shardbus.threads import Threads

name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="")


async def test_a_function_runs_in_a_thread_with_the_callers_context_variables():
    threads = Threads(2)
    name.set("caller")

    def look(first: int, second: int) -> tuple[int, str, bool]:
        seen = name.get()
        name.set("thread")
        return first + second, seen, threading.current_thread() is threading.main_thread()

    with threads.open():
        assert await threads.run(look, 1, 2) == (3, "caller", False)
    assert name.get() == "caller"


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
async def test_what_a_function_raises_is_raised_where_it_is_awaited(error: BaseException):
    threads = Threads(1)

    def fail() -> None:
        raise error

    with threads.open(), pytest.raises(type(error)) as raised:
        await threads.run(fail)
    assert raised.value is error


async def test_an_iteration_that_ends_by_mistake_is_an_error_and_no_hang():
    with (threads := Threads(1)).open(), pytest.raises(RuntimeError, match="StopIteration"):
        await threads.run(next, iter(()))


async def test_no_more_than_the_bound_run_at_a_time():
    threads = Threads(2)
    lock, release = threading.Lock(), threading.Event()
    running = most = 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        release.wait(30)
        with lock:
            running -= 1

    with threads.open():
        tasks = [asyncio.create_task(threads.run(work)) for _ in range(6)]
        while most < 2:  # noqa: ASYNC110 - the test ends by its time-out
            await asyncio.sleep(0.001)
        release.set()
        await asyncio.gather(*tasks)
    assert most == 2


async def test_whoever_is_cancelled_waits_for_what_has_begun():
    threads = Threads(1)
    began, release = threading.Event(), threading.Event()
    ended: list[str] = []

    def work() -> None:
        began.set()
        release.wait(30)
        ended.append("first")

    with threads.open():
        first = asyncio.create_task(threads.run(work))
        await asyncio.to_thread(began.wait, 30)
        second = asyncio.create_task(threads.run(ended.append, "second"))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        await asyncio.wait([second])
        first.cancel()  # again, while it waits
        await asyncio.sleep(0)
        assert not first.done()
        release.set()
        await asyncio.wait([first])
    assert first.cancelled()
    assert second.cancelled()
    assert ended == ["first"]


async def test_the_threads_end_with_the_last_who_keeps_them():
    threads = Threads(1)
    with threads.open():
        with threads.open():
            thread: Any = await threads.run(threading.current_thread)
        assert thread.is_alive()
    assert not thread.is_alive()
    with threads.open():
        assert (await threads.run(threading.current_thread)) is not thread
