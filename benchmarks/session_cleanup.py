"""What sessions leave behind in a worker: nothing. Part of `benchmark_documented`, and runs by itself.

10,000 sessions, each with a state of 4 KiB in the worker, are open at once, and are left, again and again: counts are 0, and
the worker's memory is back. Then a client process with 1,000 sessions open gets SIGKILL: how long until they are gone? The
silence limit is 30 seconds, so this takes about 75 seconds in all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from statistics import fmean
from typing import Any, Final

import msgspec

import shardbus
from benchmarks import scenarios
from benchmarks.scenarios import Check, at_least_one, counted
from loadgen.processes import started
from loadgen.spec import LoadError
from shardbus import Bus, Command, Context, Event

SESSIONS: Final = 10_000
KILLED: Final = 1_000
GROWTH_MB_MAX: Final = 4.0  # what four more rounds may add to a worker: 100 bytes a session, whose state has 4 KiB
BACK_MB_MAX: Final = 25.0  # what is resident at the end and was not at first; with all open it is 95 MB
GONE_S_MAX: Final = 33.0  # 30 s of silence, up to a second until the worker looks, and one until it says so; one to spare
ROUNDS: Final = 12
COMPARED: Final = 4  # the mean of so many rounds at the end with that of as many before: one swings by 2 MB from the next
_STATE_BYTES: Final = 4096
_GIVE_BACK: Final = "MALLOC_MMAP_THRESHOLD_"  # each object of so many bytes has pages of its own
_LOOK_S: Final = 0.2
_PATIENCE_S: Final = 120.0


# -- an application whose sessions have a state


class Said(Event, key="chat"):
    """Something that a handler adds to the state of its session."""

    chat: str
    text: str


class GetCounts(Command[tuple[int, int]], key="chat"):
    """How many states this worker has open, and has ended since it started."""

    chat: str


bus = Bus("session-cleanup")
_counts = {"open": 0, "ended": 0}


@bus.session(idle_seconds=3600.0)
async def state(session: str) -> AsyncIterator[dict[str, Any]]:
    """What a session has."""
    _counts["open"] += 1
    yield {"session": session, "buffer": bytearray(_STATE_BYTES), "said": []}
    _counts["open"] -= 1
    _counts["ended"] += 1


@bus.on(Said)
async def say(event: Said, context: Context) -> None:
    """Use the state of the session."""
    (await context.session())["said"].append(event.text)


@bus.command(GetCounts)
async def get_counts(_: GetCounts) -> tuple[int, int]:
    """Reply with the counts of this worker."""
    return _counts["open"], _counts["ended"]


# -- what is measured


class Killed(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the sessions of a client that was killed: how many the worker had before and has at last, and after how
    many seconds."""

    before: int
    left: int
    gone_s: float


class Cleanup(msgspec.Struct, frozen=True, kw_only=True):
    """What was found: sessions and states that the worker had while `sessions` were open, and after they had been left; how
    many states it has ended in all; its memory, in bytes, at first, while all were open, and after each round; what became
    of those of a killed client, None: none was killed."""

    sessions: int
    open_at_once: int
    states_at_once: int
    left: int
    states_left: int
    states_ended: int
    rss_first: int
    rss_open: int
    rss_after: tuple[int, ...]
    session_us: float
    killed: Killed | None


async def measure(sessions: int, killed: int) -> Cleanup:
    """Measure, on a bus with one worker: so many sessions in each round, and of the client that is killed; 0: none is.

    Raises:
        LoadError: the bus, or the client that is to be killed, did not start.
    """
    with _memory_given_back():
        async with (
            scenarios.private_bus(1, "benchmarks.session_cleanup:bus", log_level="error") as address,
            shardbus.connect(address) as client,
        ):
            first = await _worker(client)
            after: list[int] = []
            taken_s = 0.0
            for number in range(ROUNDS):
                began_s = time.perf_counter()
                async with _all_open(client, sessions):
                    await client.flush(_PATIENCE_S)
                    taken_s += time.perf_counter() - began_s
                    opened = await _worker(client, sessions)
                    at_once, _ = await client.execute(GetCounts(chat="counts"), timeout=_PATIENCE_S)
                    began_s = time.perf_counter()
                await client.flush(_PATIENCE_S)
                taken_s += time.perf_counter() - began_s
                closed = await _worker(client, 0)
                after.append(closed["rss_bytes"])
                print(f"round {number + 1} of {ROUNDS}: {closed['rss_bytes'] / 1e6:.1f} MB", file=sys.stderr)
            left, ended = await client.execute(GetCounts(chat="counts"), timeout=_PATIENCE_S)
            of_killed = await _kill_a_client(client, address, killed) if killed else None
    return Cleanup(
        sessions=sessions,
        open_at_once=opened["sessions"],
        states_at_once=at_once,
        left=closed["sessions"],
        states_left=left,
        states_ended=ended,
        rss_first=first["rss_bytes"],
        rss_open=opened["rss_bytes"],
        rss_after=tuple(after),
        session_us=taken_s * 1e6 / (ROUNDS * sessions),
        killed=of_killed,
    )


@contextlib.contextmanager
def _memory_given_back() -> Iterator[None]:
    """Have processes that are started in the block give back what they free: glibc keeps most of it otherwise, and what is
    resident then says little of what is used."""
    before = os.environ.get(_GIVE_BACK)
    os.environ[_GIVE_BACK] = str(_STATE_BYTES)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_GIVE_BACK]
        else:
            os.environ[_GIVE_BACK] = before


@contextlib.asynccontextmanager
async def _all_open(client: shardbus.Client, count: int) -> AsyncIterator[None]:
    """So many sessions with a state, all open at once."""
    async with contextlib.AsyncExitStack() as stack:
        for number in range(count):
            session = await stack.enter_async_context(client.session(f"chat-{number}"))
            await session.publish(Said(chat=session.key, text="hello"))
        yield


async def _worker(client: shardbus.Client, sessions: int | None = None) -> dict[str, Any]:
    """What the status says of the worker, once it says that it has so many sessions; at the latest when patience ends."""
    end_s = time.monotonic() + _PATIENCE_S
    while True:
        worker: dict[str, Any] = (await client.status())["workers"][0]
        if sessions in (None, worker["sessions"]) or time.monotonic() > end_s:
            return worker
        await asyncio.sleep(_LOOK_S)


async def _kill_a_client(client: shardbus.Client, address: str, count: int) -> Killed:
    """Kill a client process with so many sessions open."""
    print(f"killing a client with {count:,} sessions; they are gone in about 30 s", file=sys.stderr)
    arguments = ["benchmarks.session_cleanup", "--hold", address, "--killed", str(count)]
    async with started(arguments, piped_stdin=False) as process:
        assert process.stdout is not None  # it is a pipe
        if (await process.stdout.readline()).strip() != b"open":
            raise LoadError("the client that is to be killed did not open its sessions")
        opened = await _worker(client, count)
        began_s = time.monotonic()
        process.kill()
        await process.wait()
        closed = await _worker(client, 0)
        return Killed(before=opened["sessions"], left=closed["sessions"], gone_s=time.monotonic() - began_s)


async def _hold(address: str, count: int) -> int:
    """Open sessions, say so, and wait for SIGKILL."""
    async with shardbus.connect(address) as client, _all_open(client, count):
        await client.flush(_PATIENCE_S)
        print("open", flush=True)
        await asyncio.sleep(2 * _PATIENCE_S)
    return 1


# -- how it is told


def checks_of(found: Cleanup, options: argparse.Namespace) -> list[Check]:
    """The targets: every count exact, memory back, and the killed client's sessions gone in the stated time."""
    rounds = len(found.rss_after)
    back_mb = (found.rss_after[-1] - found.rss_first) / 1e6
    growth_mb = (fmean(found.rss_after[-COMPARED:]) - fmean(found.rss_after[-2 * COMPARED : -COMPARED])) / 1e6
    checks = [
        counted("sessions open at once", found.open_at_once, found.sessions),
        counted("states open at once", found.states_at_once, found.sessions),
        counted("sessions open once all were left", found.left),
        counted("states open once all were left", found.states_left),
        counted(f"states ended, in {rounds} rounds", found.states_ended, rounds * found.sessions),
        Check(
            name="worker's memory at the end against the beginning",
            measured=f"{back_mb:+.1f} MB",
            target=f"≤ {options.back_mb:+.1f} MB",
            passed=back_mb <= options.back_mb,
        ),
        Check(
            name=f"worker's memory, the last {COMPARED} rounds against the {COMPARED} before",
            measured=f"{growth_mb:+.1f} MB",
            target=f"≤ {options.growth_mb:+.1f} MB",
            passed=growth_mb <= options.growth_mb,
        ),
    ]
    killed = found.killed
    if killed is not None:
        checks += [
            counted("sessions of a client before it was killed", killed.before, options.killed),
            counted("sessions of a client after it was killed", killed.left),
            Check(
                name="killed client: its sessions gone after",
                measured=f"{killed.gone_s:.1f} s",
                target=f"≤ {options.gone_s:.1f} s",
                passed=killed.gone_s <= options.gone_s and not killed.left,
            ),
        ]
    return checks


def method_of(found: Cleanup) -> tuple[str, ...]:
    """How it was measured, and what else was found."""
    after = ", ".join(f"{rss / 1e6:.1f}" for rss in found.rss_after)
    opened = f"{found.rss_first / 1e6:.1f} MB at first, {found.rss_open / 1e6:.1f} MB with all sessions open"
    return (
        f"sessions with state: {ROUNDS} rounds of {found.sessions:,} at once, {_STATE_BYTES:,} bytes and one event each",
        f"the worker's memory: {opened}, {after} MB after each round ({_GIVE_BACK}={_STATE_BYTES})",
        f"a session, from its beginning to its end: {found.session_us:.0f} µs, one after another, of one client",
        "a killed client: SIGKILL with sessions open; until the worker says that it has none, which it does once a second",
    )


async def benchmark(options: argparse.Namespace) -> int:
    """Measure, and print; the exit code."""
    found = await measure(options.sessions, options.killed)
    return scenarios.show("session cleanup", checks_of(found, options), method_of(found))


def add_options(parser: argparse.ArgumentParser) -> None:
    """How much this part does, and its targets, as options."""
    parser.add_argument("--sessions", type=at_least_one, default=SESSIONS, metavar="N", help="sessions at once, each round")
    parser.add_argument(
        "--killed", type=int, default=KILLED, metavar="N", help="sessions of the client that is killed; 0: none is killed"
    )
    parser.add_argument(
        "--back-mb", type=float, default=BACK_MB_MAX, metavar="MB", help="memory of a worker above that at its beginning"
    )
    parser.add_argument(
        "--growth-mb", type=float, default=GROWTH_MB_MAX, metavar="MB", help="memory that further rounds may add to a worker"
    )
    parser.add_argument(
        "--gone-s", type=float, default=GONE_S_MAX, metavar="S", help="until the sessions of a killed client are gone"
    )


def main() -> int:
    """Parse options and run."""
    parser = scenarios.parser("session_cleanup", __doc__)
    add_options(parser)
    parser.add_argument("--hold", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    return scenarios.main(benchmark(options) if options.hold is None else _hold(options.hold, options.killed))


if __name__ == "__main__":
    sys.exit(main())
