"""A worker process: one shard, its application, a socket, and the way to the supervisor.

Started by the supervisor as `python -m shardbus.worker_process BOOT DESCRIPTOR`, or as a copy of one that has imported all
but the application (`shardbus/fork_server.py`). It imports that, and then waits for the shard that it is to serve: so a
spare one stands by, and a dead worker's successor is there at once. It beats once a second, from its first moment to its
last, from the very event loop that runs the handlers, so that a loop that hangs is silent, and one that awaits what takes
long, a lifespan or a large store, is not. SIGTERM drains it: it comes to rest, and ends when all workers have, because
handlers of others may publish to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final

import msgspec
from msgspec.structs import replace

from shardbus.application import load_application
from shardbus.clock import monotonic_ns
from shardbus.config import DEFAULT_LIMITS
from shardbus.errors import BootError, ConfigError, text_of
from shardbus.event_loop import run
from shardbus.evidence import SharedJournal, SharedRecorder
from shardbus.fork_server import FORK, serve_forks
from shardbus.logs import configure_logging
from shardbus.outgoing import Outgoing
from shardbus.processes import EXIT_BOOT, EXIT_BROKEN, ReportPipe, die_with_parent, end_soon, on_stop_signals
from shardbus.quarantine import PULSE_S
from shardbus.registry import Registry, WorkerInfo
from shardbus.reports import (
    END,
    Alive,
    Assignment,
    AtRest,
    Beat,
    Boot,
    BootFailed,
    Drained,
    Ready,
    Stalled,
    decode_assignment,
    decode_boot,
    encode_report,
)
from shardbus.shard import Shard
from shardbus.sql.store import SqlStore
from shardbus.store import StoreError
from shardbus.tracebacks import log_error, traceback_of
from shardbus.watchdog import Stall, Watchdog
from shardbus.wording import one_line
from shardbus.zmq_transport import Router, ZmqListener

log = logging.getLogger("shardbus.worker")

BEAT_S: Final = 1.0
STALL_S: Final = 1.0  # an event loop that stands still for longer is reported
_TOLD_CHARS_MAX: Final = 2000  # of an error, in a line
_STORE_RETRY_S: Final = 0.5
_TASKS_S: Final = 1.0  # for tasks that are left when all is done
_ENDS_LEAST_S: Final = 0.5  # for the ends of sessions, also where draining took all its time; the supervisor waits a second
# Young objects of a batch die young; a collection every 700 allocations costs a tenth of the throughput.
_GC_THRESHOLDS: Final = (50_000, 20, 20)


MakeOutgoing = Callable[[Assignment, Callable[[BaseException], None]], Outgoing]
"""What the handlers of a worker send through, and whom it tells that it has been refused for good."""


async def run_worker(boot: Boot, descriptor: int, make_outgoing: MakeOutgoing) -> int:
    """Serve until told to stop; return the exit code."""
    stop = asyncio.Event()
    end = asyncio.Event()
    assigned: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def on_message(message: bytes) -> None:
        if message == END:
            end.set()
        else:
            assigned.set_result(message)

    pipe = ReportPipe(descriptor, on_message=on_message, on_parent_gone=lambda: os._exit(1))
    alive = asyncio.get_running_loop().create_task(_stay_alive(pipe))
    try:
        registry = load_application(boot.application)
        spec = decode_assignment(await assigned)
        configure_logging(boot.log_level, boot.log_format, spec.shard)
        info = WorkerInfo(bus=registry.name, shard=spec.shard, shards=spec.shards)
        async with _application(registry, info):
            code = await _serve(spec, registry, info, pipe, stop, end, make_outgoing(spec, _broken))
    except (BootError, ConfigError, StoreError) as error:
        pipe.send(encode_report(BootFailed(str(error))))
        code = EXIT_BOOT
    finally:
        alive.cancel()
        pipe.close()
    return code


async def _run_to_the_end(boot: Boot, descriptor: int, make_outgoing: MakeOutgoing) -> int:
    """As `run_worker`; whatever the application has left behind, this process ends with that code soon after."""
    code = EXIT_BROKEN  # so that no handler is blamed
    try:
        code = await run_worker(boot, descriptor, make_outgoing)
    except asyncio.CancelledError:
        # By nobody of ours: by a scope of a lifespan, for instance a `TaskGroup`, which was told when that was closed.
        log.critical("the worker was ended from within: by a lifespan, or by a handler that cancels tasks of others")
    except BaseException as error:  # nothing else leaves it, unless we are wrong
        _broken(error)
    # A task or a thread of the application may not let itself be ended, and nothing is to be waited for any more.
    end_soon(code, _TASKS_S)
    return code


@contextlib.asynccontextmanager
async def _application(registry: Registry, info: WorkerInfo) -> AsyncIterator[None]:
    """What the application has around its messages. That it cannot be closed is told, and changes nothing of what was done.

    Raises:
        BootError: it cannot be opened.
    """
    lifespans = registry.running(info)
    try:
        await lifespans.__aenter__()
    except BaseException as error:  # the user's own
        log.error("the application cannot start: %s", traceback_of(error))
        told = one_line(text_of(error), _TOLD_CHARS_MAX)
        raise BootError(f"its lifespan raised {type(error).__name__}: {told}") from None
    try:
        yield
    finally:
        try:
            await lifespans.__aexit__(None, None, None)
        except BaseException as error:  # the user's own
            log_error(log, error, "the application's lifespan failed when it was to be closed")


async def _stay_alive(pipe: ReportPipe) -> None:
    while True:
        pipe.send(encode_report(Alive()))
        await asyncio.sleep(BEAT_S)


async def _serve(
    spec: Assignment,
    registry: Registry,
    info: WorkerInfo,
    pipe: ReportPipe,
    stop: asyncio.Event,
    end: asyncio.Event,
    outgoing: Outgoing,
) -> int:
    evidence = SharedRecorder(spec.evidence_path)
    journal = SharedJournal(spec.journal_path)
    listener = ZmqListener()
    routers: list[Router] = []
    shard = Shard(
        shard=spec.shard,
        epoch=spec.epoch,
        layout=spec.layout,
        plans=registry.plans(),
        store=SqlStore(spec.store_url, shards=spec.shards),
        recorder=evidence.recorder,
        journal=journal.journal,
        send=lambda peer, frame: routers[0].send(peer, frame),  # noqa: PLW0108 - the list is filled once the socket is bound
        now=monotonic_ns,
        limits=replace(
            DEFAULT_LIMITS,
            store_rows_max=spec.store_rows_max,
            store_bytes_max=spec.store_bytes_max,
            store_full=spec.store_full,
        ),
        broken=_broken,
        predecessor=spec.predecessor,
        outgoing=outgoing,
        states=registry.session_states(info),
    )
    os.register_at_fork(after_in_child=partial(_in_a_copy, shard, asyncio.get_running_loop()))
    watchdog = Watchdog(
        STALL_S,
        shard.lanes.current,
        tell=lambda stall: _stalled(stall, pipe),
        pulse=lambda: journal.journal.pulse(monotonic_ns()),
        pulse_s=PULSE_S,
    )
    try:
        await _start(shard, spec, pipe)
        # Bound last: what waits in the store is in its lanes before anything new can come.
        routers.append(listener.bind(spec.address, shard.receive))
        on_stop_signals(stop.set)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        watchdog.start()
        pipe.send(encode_report(_beat(shard)))  # first: who sees the bus ready is to see what its stores hold
        pipe.send(encode_report(Ready()))
        while not stop.is_set():
            shard.tick()
            pipe.send(encode_report(_beat(shard)))
            try:
                async with asyncio.timeout(BEAT_S):
                    await stop.wait()
            except TimeoutError:
                continue
        beats = asyncio.get_running_loop().create_task(_beat_on(shard, pipe))
        left = await _drain(shard, spec.drain_s, pipe, end)
        beats.cancel()
        pipe.send(encode_report(_beat(shard)))  # what its store holds in the end
        rows = shard.counts.dead + shard.counts.waiting
        pipe.send(encode_report(Drained(left[:20], len(left), shard.backlog, rows)))
        return 0
    finally:
        watchdog.close()
        await shard.close()
        await outgoing.close()  # after its shard, whose handlers would fail
        listener.close()
        evidence.close()
        journal.close()


def _in_a_copy(shard: Shard, loop: asyncio.AbstractEventLoop) -> None:
    """This process is a copy of the worker that a handler has made. Where it goes on as the handler, as another program or
    not at all, that is its own affair; where it comes back from the handler, it ends, and handles nothing."""
    shard.disown()
    loop.call_soon(os._exit, 0)


async def _drain(shard: Shard, deadline_s: float, pipe: ReportPipe, end: asyncio.Event) -> list[str]:
    """Come to rest, say so, wait until the others have too, and end what sessions have; return what was not drained, in
    words."""
    loop = asyncio.get_running_loop()
    until = loop.time() + deadline_s
    left = await shard.drain(deadline_s)
    if left:
        return left
    while not end.is_set() and loop.time() < until:
        pipe.send(encode_report(AtRest()))  # again and again: one that does not fit into the pipe is lost
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(min(until, loop.time() + BEAT_S)):
                await end.wait()
    left = await shard.drain(max(0.0, until - loop.time()))
    return left or await shard.end_sessions(max(_ENDS_LEAST_S, until - loop.time()))


async def _start(shard: Shard, spec: Assignment, pipe: ReportPipe) -> None:
    """Open the store. A successor's has been in use: where it cannot be opened now (another has locked it, the disk is
    full), wait and say so instead of dying again and again, until the shard would be given up.

    Raises:
        StoreError: the shard's first worker cannot open it.
    """
    failing = ""
    while True:
        try:
            await shard.start()
            return
        except StoreError as error:
            if not spec.waits_for_store:
                raise
            if not failing:
                log.error("the store cannot be opened: %s; publishers wait until it can", error)
            failing = str(error)
        pipe.send(encode_report(replace(_beat(shard), store_failing=failing)))
        await asyncio.sleep(_STORE_RETRY_S)


async def _beat_on(shard: Shard, pipe: ReportPipe) -> None:
    while True:
        shard.tick()
        pipe.send(encode_report(_beat(shard)))
        await asyncio.sleep(BEAT_S)


def _beat(shard: Shard) -> Beat:
    return Beat(
        backlog=shard.backlog,
        busy_keys=shard.lanes.busy_keys,
        publishers=shard.publishers,
        sessions=shard.open_sessions,
        store=shard.counts,
        store_failing=shard.store_failing,
        next_due_ns=shard.next_due_ns,
    )


def _stalled(stall: Stall, pipe: ReportPipe) -> None:
    """The event loop stands still: say where, here and to the supervisor."""
    pipe.send(encode_report(Stalled(stall.what)))
    log.warning(
        "the event loop has stood still for %.1f s, so no other key goes on; %s runs, and does not await:\n%s",
        stall.seconds,
        stall.what,
        stall.stack.rstrip(),
    )


def _broken(error: BaseException) -> None:
    """A defect of ours: end here and now; the supervisor starts anew and publishers resend."""
    try:
        log.critical("defect: %s", traceback_of(error))
    finally:
        os._exit(EXIT_BROKEN)


def main(make_outgoing: MakeOutgoing) -> None:
    """Entry of the process: how to boot, as JSON, and the descriptor of the pipe; or how to be the server of such."""
    try:
        if sys.argv[1] == FORK:
            die_with_parent(int(sys.argv[2]))
            sys.argv[1:] = map(str, serve_forks(int(sys.argv[3])))
        boot, descriptor = decode_boot(sys.argv[1]), int(sys.argv[2])
    except (IndexError, ValueError, msgspec.DecodeError):
        sys.exit("shardbus.worker is started by `shardbus serve`")
    die_with_parent(boot.parent)
    configure_logging(boot.log_level, boot.log_format, None)
    sys.exit(run(_run_to_the_end(boot, descriptor, make_outgoing)))
