"""The supervisor: starts workers, watches them, restarts them, tells clients where they are. Never on the data path.

Owns the routing table, the evidence files and the control socket. Every child and every signal only posts facts; what
follows from them is decided in one place each: `_on_exit`, `_on_report`, `_check_silence`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

import msgspec

from shardbus.addresses import Address
from shardbus.config import DEFAULT_LIMITS, StoreFull
from shardbus.errors import BootError, ConfigError, RemoteProtocolError
from shardbus.evidence import EVIDENCE_BYTES, SharedBook, SharedJournal
from shardbus.fork_server import ForkServer
from shardbus.processes import (
    EXIT_BOOT,
    EXIT_BROKEN,
    Child,
    cores,
    descriptors_max,
    kernel_kills,
    on_stdin_closed,
    on_stop_signals,
    reap_orphans,
    signal_name,
    was_killed,
    was_own_fault,
)
from shardbus.quarantine import UNKNOWN_END, Ended
from shardbus.reports import (
    END,
    WORKER,
    Alive,
    Assignment,
    AtRest,
    Beat,
    Boot,
    BootFailed,
    Drained,
    Ready,
    Stalled,
    decode_report,
    encode_assignment,
    encode_boot,
    told_left,
)
from shardbus.restart import GiveUp, RestartIn, RestartPolicy
from shardbus.routing import ShardAddress, Table, even_slots
from shardbus.rundir import RunDir
from shardbus.store import FILE_URL, MEMORY_URL, NOTHING_STORED, first_due, store_ledger, total_ledger
from shardbus.wire.frames import Answer, TableChanged, decode_to_supervisor, encode_frame
from shardbus.wording import counted
from shardbus.zmq_transport import Router, ZmqListener

log = logging.getLogger("shardbus.supervisor")

SILENCE_S: Final = 5.0  # a worker whose loop is silent for longer is replaced
BOOT_SILENCE_S: Final = 30.0  # while it boots: between two beats, so an import may take as long, and a lifespan any time
_FOLD_S: Final = 0.05  # between two looks into the workers' logs
_FOLD_SOON_S: Final = 0.005  # where one was fuller than this, because it may be full before the next look
_FULL: Final = 0.2
_FOLD_RECORDS: Final = 16  # of each, at a time: a millisecond or two
_SETTLED_S: Final = 10.0  # a worker that was ready for so long has made progress
_CHECK_S: Final = 0.5
_NARROWING_MAX: Final = 24  # deaths in a row that count as progress because they tell who ended the worker
_MEMORY_S: Final = 5.0  # for so long after the kernel has ended a process for want of memory, a SIGKILL is taken for its own
_CLIENTS_MAX: Final = 4096
_SPARE_RETRY_S: Final = 5.0  # between two tries to start a spare process
_STARTS: Final = RestartPolicy(deaths_max=20)  # a machine that has no process to give has some again within 70 s, or trouble
_LAYOUT: Final = 1
_DESCRIPTORS_OWN: Final = 64  # of a process of the bus before any client comes: its store, pipes, and libzmq's own
_DESCRIPTORS_EACH: Final = 8  # for each worker besides: of the supervisor, or to the other workers
_encode: Final = msgspec.msgpack.Encoder().encode


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `shardbus serve` was told."""

    application: str
    workers: int
    address: Address
    dead_letters: str | None
    store_rows_max: int
    store_bytes_max: int
    store_full: StoreFull
    drain_s: float
    log_level: str
    log_format: str
    until_stdin_closes: bool = False
    """Stop as on a first signal when standard input comes to its end."""
    leave_nothing: bool = False
    """Begin with empty stores, and delete them at the end: those of the default place, whatever is in them."""


class _Worker:
    """One shard's worker, over all its incarnations."""

    def __init__(self, shard: int, evidence: SharedBook, journal: SharedJournal) -> None:
        self.shard = shard
        self.evidence = evidence
        self.journal = journal
        self.child: Child | None = None
        self.counter = 0  # incarnations started
        self.epoch = b""
        self.address = ""
        self.ready = False
        self.ready_at = 0.0
        self.started_at = 0.0
        self.heard_at = 0.0
        self.told_slow = False  # it was told that it takes long to boot
        self.handled_before = 0
        self.fruitless = 0
        self.not_started = 0  # tries in a row in which the system gave no process
        self.narrowing = 0  # deaths in a row that made no progress but named somebody
        self.unexplained = 0  # crashes in a row that named nobody, each soon
        self.replaced = False  # it was silent, so it is being ended
        self.ended = UNKNOWN_END  # how the last one ended that had taken the journal over
        self.judged = 0  # the journal's count of deaths when the present one started
        self.given_up = False
        self.boot_error = ""
        self.last_exit = ""
        self.beat: Beat | None = None
        self.stored = NOTHING_STORED  # what its store held when it was last heard of: that outlives a worker
        self.stalled_in = ""  # what blocks its event loop, as far as is known
        self.at_rest = False
        self.drained: Drained | None = None

    @property
    def restarts(self) -> int:
        return max(0, self.counter - 1)

    def is_slow_to_boot(self, now: float) -> bool:
        """Whether it boots for longer than one whose loop stands still may."""
        return self.child is not None and not self.ready and now - self.started_at > BOOT_SILENCE_S


class _Process:
    """A started process: a spare one until it is some worker's."""

    def __init__(self) -> None:
        self.child: Child | None = None
        self.worker: _Worker | None = None


class Supervisor:
    """Runs a bus until it is told to stop. Make one, then await `run`.

    Args:
        options: what to serve, and how.
        forks: of `WORKER`, started early, because it takes as long as all else until the bus is ready.
        policy: whether and when a worker that died is started again.
        starts: likewise of one for which the system has no process.
    """

    def __init__(
        self,
        options: ServeOptions,
        forks: ForkServer,
        *,
        policy: RestartPolicy | None = None,
        starts: RestartPolicy = _STARTS,
    ) -> None:
        self._options = options
        self._forks = forks
        self._policy = policy or RestartPolicy()
        self._starts = starts
        self._incarnation = os.urandom(16)
        self._version = 0
        self._workers: list[_Worker] = []
        self._router: Router | None = None
        self._clients: OrderedDict[bytes, None] = OrderedDict()
        self._stopping = False
        self._aborting = False
        self._changed = asyncio.Event()
        self._failure = ""
        self._drain_asked: list[tuple[bytes, int]] = []
        self._started_at = time.monotonic()
        self._rate: tuple[float, int, float] = (0.0, 0, 0.0)
        self._fold_timer: asyncio.TimerHandle | None = None
        self._spare: _Process | None = None
        self._forks_up_at = 0.0
        self._forks_fruitless = 0  # deaths of the fork server in a row that came soon
        self._kept = ""  # where the stores are, where that outlives this process
        self._kernel_kills = kernel_kills()
        self._kernel_killed_at = -_MEMORY_S  # when that count was seen to change

    async def run(self, on_ready: Callable[[str], None]) -> list[str]:
        """Start all workers, call `on_ready` with a line for people, serve, drain; return lines on what was not drained.

        Raises:
            ConfigError: a directory or store cannot be used.
            BootError: the application does not start, or another bus runs at the address.
        """
        on_stop_signals(self._on_signal)  # first: what is made from here on is to be removed
        if self._options.until_stdin_closes:
            on_stdin_closed(lambda: None if self._stopping else self._on_signal())
        self._check_descriptors()
        rundir = RunDir(self._options.address)
        if self._store_url(rundir, 0) != MEMORY_URL:
            on_ram = f"{rundir.state}, on RAM, until this machine restarts"
            self._kept = f"in {self._options.dead_letters or on_ram}"
        is_first = not rundir.shards_before()
        listener = ZmqListener()
        try:
            rundir.remove_sockets()
            if self._options.leave_nothing:
                rundir.clear()
            await self._adopt_state(rundir)
            for shard in range(self._options.workers):
                self._workers.append(_Worker(shard, *self._mappings(rundir, shard)))
            self._router = listener.bind(self._options.address.control, self._on_frame)
            self._fold_timer = asyncio.get_running_loop().call_later(_FOLD_S, self._fold_evidence)
            self._forks.watch(self._on_forks_up, self._on_forks_end)
            await self._until(lambda: self._stopping or not self._forks.is_starting)
            for worker in self._workers if not self._stopping else ():
                self._start(worker, rundir)
            await self._until(lambda: self._failure or self._stopping or all(one.ready for one in self._workers))
            if not self._failure and not self._stopping:
                self._start_spare(rundir)
                on_ready(self._ready_line())
            await self._serve()
            if self._failure:
                raise BootError(self._failure)
            return self._not_drained()
        finally:
            # What nobody will ask for again does not stay on RAM for ever; that a worker is killed for what it does beyond
            # its drain changes nothing of that.
            spent = bool(self._workers) and all(one.drained and one.drained.is_clean for one in self._workers)
            await self._end_all()
            self._forks.close()
            listener.close()
            if self._fold_timer is not None:
                self._fold_timer.cancel()
            for worker in self._workers:
                worker.evidence.close()
                worker.journal.close()
            unused = is_first and not (self._clients and any(one.ready_at for one in self._workers))
            rundir.close(forget=spent or unused or self._options.leave_nothing)

    @staticmethod
    def _mappings(rundir: RunDir, shard: int) -> tuple[SharedBook, SharedJournal]:
        try:
            return SharedBook(rundir.evidence_path(shard)), SharedJournal(rundir.journal_path(shard))
        except OSError as error:
            raise ConfigError(
                f"no room for shard {shard} in {rundir.state}: {error.strerror}; a shard takes "
                f"{EVIDENCE_BYTES / 1e6:.0f} MB there, and its dead letters (in a container, see --shm-size)"
            ) from error

    def _fold_evidence(self) -> None:
        """Fold what the workers have logged, a little at a time, and go on for as long as this process lives."""
        now_ns = time.monotonic_ns()
        delay_s = _FOLD_S
        try:
            for worker in self._workers:
                if worker.evidence.book.fullness > _FULL:
                    delay_s = min(delay_s, _FOLD_SOON_S)
                if worker.evidence.book.fold(now_ns, _FOLD_RECORDS):
                    delay_s = 0.0
        finally:
            self._fold_timer = asyncio.get_running_loop().call_later(delay_s, self._fold_evidence)

    # -- life

    async def _serve(self) -> None:
        checked_at = time.monotonic()
        while not (self._stopping or self._failure):
            await self._wait(_CHECK_S)
            late_s = time.monotonic() - checked_at - _CHECK_S
            checked_at = time.monotonic()
            if late_s < 1.0:
                self._check_silence(checked_at)
            else:
                # This process itself stood still; what the workers said meanwhile has yet to be read.
                for worker in self._workers:
                    worker.heard_at = checked_at
            self._measure_rate(checked_at)
            reap_orphans(self._own_pids())
        self._drop_spare()
        if self._failure:
            return
        log.info("draining, for up to %g s; a second signal ends it at once", self._options.drain_s)
        for worker in self._workers:
            if worker.child is not None:
                worker.child.terminate()
        end = time.monotonic() + self._options.drain_s + 1.0
        while any(one.child is not None for one in self._workers) and time.monotonic() < end and not self._aborting:
            await self._wait(0.1)
        lines = self._not_drained()
        if not lines:
            log.info("drained")
        for peer, request in self._drain_asked:
            self._answer(peer, request, {"left": lines, "stores": self.told_left()})
        self._announce()  # that no worker is up: who does not hear of it goes on sending to those that were
        if self._drain_asked or self._clients:
            await asyncio.sleep(0.1)  # the last frames leave with the socket's own thread

    def _check_descriptors(self) -> None:
        """Say so where there are fewer descriptors than all publishers take that a worker serves. How many connect cannot be
        bounded: libzmq accepts them by itself, and ends a process that has no descriptor left for the next one."""
        needed = DEFAULT_LIMITS.sessions_max + _DESCRIPTORS_OWN + _DESCRIPTORS_EACH * self._options.workers
        if (most := descriptors_max()) < needed:
            log.warning(
                "a process may have %d open files here, and one of this bus takes up to %d for %d clients; more clients "
                "than there is room for end it: raise the limit with `ulimit -n 65536`, or LimitNOFILE= in a systemd unit",
                most,
                needed,
                DEFAULT_LIMITS.sessions_max,
            )

    def _drop_spare(self) -> None:
        if self._spare is not None and self._spare.child is not None:
            self._spare.child.kill()

    async def _end_all(self) -> None:
        self._drop_spare()
        for worker in self._workers:
            if worker.child is not None:
                worker.child.kill()
        self._stopping = True
        end = time.monotonic() + 10.0
        while (self._spare or any(one.child is not None for one in self._workers)) and time.monotonic() < end:
            await self._wait(0.05)

    def _own_pids(self) -> set[int]:
        children = [one.child for one in self._workers]
        if self._spare is not None:
            children.append(self._spare.child)
        return {child.pid for child in children if child is not None}

    async def _until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await self._wait(_CHECK_S)
            self._check_silence(time.monotonic())

    async def _wait(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def _on_signal(self) -> None:
        self._aborting = self._stopping
        self._stopping = True
        self._changed.set()

    async def _adopt_state(self, rundir: RunDir) -> None:
        """A bus of another number of shards may have left rows here; they belong to slots that are elsewhere now."""
        served_before = before = rundir.shards_before()
        if self._options.dead_letters is not None:
            from shardbus.sql.urls import files_there

            before = max(before, files_there(self._options.dead_letters))
        if before and before != self._options.workers:
            from shardbus.sql.store import SqlStore

            for shard in range(before):
                url = self._store_url(rundir, shard)
                if url == MEMORY_URL:
                    continue
                store = SqlStore(url)  # one that was never there is made, and is empty
                counts = await store.open()
                await store.close()
                if counts.dead or counts.waiting:
                    raise ConfigError(
                        f"the stores of this bus hold dead letters or waiting events of {before} shards "
                        f"(shard {shard}: {counts.dead} dead, {counts.waiting} waiting, in {url}); serve with --workers "
                        f"{before}, or with another --bind or --dead-letters"
                    )
        if served_before != self._options.workers:
            rundir.remove_evidence()
        rundir.remember_shards(self._options.workers)

    def _store_url(self, rundir: RunDir, shard: int) -> str:
        if self._options.dead_letters is not None:
            # SQLAlchemy takes longer to import than all else here, and 25 MB: only who names a store has it in this process.
            from shardbus.sql.urls import shard_url

            return shard_url(self._options.dead_letters, shard)
        return f"{FILE_URL}{rundir.store_path(shard)}" if rundir.on_ram else MEMORY_URL

    # -- workers

    def _start(self, worker: _Worker, rundir: RunDir) -> None:
        try:
            process, self._spare = self._spare or self._spawn(rundir), None
        except OSError as error:
            self._on_no_process(worker, rundir, error)
            return
        worker.not_started = 0
        worker.counter += 1
        worker.epoch = self._incarnation + worker.shard.to_bytes(2, "big") + worker.counter.to_bytes(6, "big")
        worker.address = self._options.address.worker(worker.shard, worker.counter, self._incarnation)
        worker.ready = False
        worker.boot_error = ""
        worker.beat = None
        worker.stalled_in = ""
        worker.replaced = False
        worker.at_rest = False
        worker.drained = None
        worker.judged = worker.journal.journal.deaths
        worker.started_at = worker.heard_at = time.monotonic()
        worker.told_slow = False
        worker.handled_before = worker.evidence.book.counters().handled
        assignment = Assignment(
            shard=worker.shard,
            shards=self._options.workers,
            epoch=worker.epoch,
            layout=_LAYOUT,
            address=worker.address,
            bus=self._options.address.url,
            control=self._options.address.control,
            evidence_path=rundir.evidence_path(worker.shard),
            journal_path=rundir.journal_path(worker.shard),
            predecessor=worker.ended,
            store_url=self._store_url(rundir, worker.shard),
            store_rows_max=self._options.store_rows_max,
            store_bytes_max=self._options.store_bytes_max,
            store_full=self._options.store_full,
            waits_for_store=worker.counter > 1,
            drain_s=self._options.drain_s,
        )
        process.worker, worker.child = worker, process.child
        if worker.child is not None:
            worker.child.tell(encode_assignment(assignment))

    def _spawn(self, rundir: RunDir) -> _Process:
        """Start a process that imports everything and then waits for its shard.

        One stands by as a spare, so that a dead worker's successor needs no time to boot: that costs its memory, and saves
        most of the time in which the shard is not served.
        """
        process = _Process()
        boot = Boot(
            application=self._options.application,
            log_level=self._options.log_level,
            log_format=self._options.log_format,
            parent=os.getpid(),
        )

        def on_report(report: bytes) -> None:
            if process.worker is not None:
                self._on_report(process.worker, rundir, report)

        def on_exit(code: int) -> None:
            if process.worker is not None:
                self._on_exit(process.worker, rundir, code)
            elif self._spare is process:
                self._spare = None  # the next one is started when it is needed
                self._changed.set()

        process.child = Child(WORKER, encode_boot(boot).decode(), self._forks, on_report, on_exit)
        return process

    def _start_spare(self, rundir: RunDir) -> None:
        """Have a spare process stand by; where the system gives none, try again later: no shard depends on it yet."""
        if self._spare is not None or self._stopping or self._failure:
            return
        try:
            self._spare = self._spawn(rundir)
        except OSError as error:
            log.warning("no spare worker can be started (%s); trying again in %g s", error, _SPARE_RETRY_S)
            asyncio.get_running_loop().call_later(_SPARE_RETRY_S, self._start_spare, rundir)

    # -- the fork server

    def _on_forks_up(self) -> None:
        if self._forks_fruitless:
            log.info("the fork server is back")
        self._forks_up_at = time.monotonic()
        self._changed.set()

    def _on_forks_end(self, code: int | None) -> None:
        self._changed.set()
        self._replace_forks("did not answer" if code is None else f"ended ({signal_name(code)})")

    def _replace_forks(self, what: str) -> None:
        """The fork server is gone. No worker depends on it, and those that are started meanwhile are interpreters of their
        own. It runs nothing of the application, so its end is the machine's fault, and is taken as patiently."""
        if self._stopping or self._failure:
            return
        settled = self._forks_up_at and time.monotonic() - self._forks_up_at >= _SETTLED_S
        self._forks_fruitless = 1 if settled else self._forks_fruitless + 1
        self._forks_up_at = 0.0
        match self._starts.decide(self._forks_fruitless):
            case RestartIn(delay_s=delay_s):
                log.warning("the fork server %s; starting another in %g s", what, delay_s)
                asyncio.get_running_loop().call_later(delay_s, self._restart_forks)
            case GiveUp(deaths=deaths):
                log.error(
                    "the fork server %s, the last of %d in a row; there is none until `shardbus serve` is started again, "
                    "so a worker takes longer to start",
                    what,
                    deaths,
                )

    def _restart_forks(self) -> None:
        if self._stopping or self._failure:
            return
        try:
            self._forks.restart()
        except OSError as error:
            self._replace_forks(f"cannot be started: {error}")

    # -- workers that die

    def _on_no_process(self, worker: _Worker, rundir: RunDir, error: OSError) -> None:
        """The system has no process for a worker: as a death before any progress, but the machine's fault and no worker's,
        so it is counted apart, and with more patience.
        """
        worker.last_exit = f"no process can be started: {error}"
        self._changed.set()
        if worker.counter == 0:
            self._failure = f"the worker of shard {worker.shard} cannot be started: {error}"
            return
        worker.not_started += 1
        self._go_on(worker, rundir, "has no worker", self._starts.decide(worker.not_started))

    def _on_report(self, worker: _Worker, rundir: RunDir, data: bytes) -> None:
        report = decode_report(data)
        if not isinstance(report, Stalled):  # that is a thread's word; the loop itself is silent
            worker.heard_at = time.monotonic()
        match report:
            case Ready():
                worker.ready = True
                worker.ready_at = worker.heard_at
                log.info("shard %d is ready (pid %d)", worker.shard, worker.child.pid if worker.child else 0)
                usable = cores()
                if worker.child is not None and len(usable) > self._options.workers:
                    worker.child.pin(usable[1 + worker.shard])  # the first core is left to publishers
                self._announce()
                if worker.restarts:
                    self._start_spare(rundir)
            case Alive():
                pass
            case BootFailed(error=error):
                worker.boot_error = error
            case Beat() as beat:
                worker.beat = beat
                if worker.ready:  # else it waits for its store
                    worker.stored = beat.store
                worker.stalled_in = ""
            case Stalled(what=what):
                worker.stalled_in = what
            case AtRest():
                worker.at_rest = True
                self._end_at_rest()
            case Drained() as drained:
                worker.drained = drained
        self._changed.set()

    def _end_at_rest(self) -> None:
        """Have workers that drain end once all of them are at rest: handlers of the others may publish to them.

        One is at rest when what its handlers have published is finished, with all that this led to; so when the last one is,
        all are. A single one that was told to drain, by somebody else, does not wait for those that go on.
        """
        alive = [one for one in self._workers if one.child is not None]
        if not self._stopping or all(one.at_rest for one in alive):
            for one in alive:
                if one.at_rest and one.child is not None:
                    one.child.tell(END)

    def _on_exit(self, worker: _Worker, rundir: RunDir, code: int) -> None:
        """A worker is dead and reaped: decide whether and when its successor starts."""
        was_ready, worker.ready, worker.child = worker.ready, False, None
        worker.last_exit = worker.boot_error or signal_name(code)
        if code != 0:
            worker.drained = None  # whatever it said, it has not ended so
        # Else the journal still shows what the one before was running, and that one's end goes with it.
        took_over = worker.journal.journal.deaths != worker.judged
        if took_over:
            worker.ended = self._how_it_ended(worker, code)
        rundir.remove_socket(worker.address)
        self._changed.set()
        if self._stopping or self._failure:
            self._end_at_rest()
            return
        if worker.counter == 1 and not was_ready:
            # Its very first start: nothing depends on it yet, so say so and stop.
            told = f"the worker of shard {worker.shard} ended before it was ready: {worker.last_exit}"
            if worker.replaced:
                told += (
                    f", because its event loop stood still for {BOOT_SILENCE_S:g} s, in the application's import or "
                    "lifespan; a lifespan may take any time where it awaits, or uses asyncio.to_thread"
                )
            self._failure = worker.boot_error or told
            return
        handled = worker.evidence.book.counters().handled
        lived_s = time.monotonic() - worker.ready_at if was_ready else 0.0
        progressed = handled > worker.handled_before or lived_s >= _SETTLED_S
        # A death that names somebody brings the quarantine nearer to who it is, and so does not count; within bounds.
        named = took_over and worker.journal.journal.names_somebody()
        narrows = named and bool(worker.ended.how)
        worker.narrowing = 0 if progressed else worker.narrowing + narrows
        narrows = narrows and worker.narrowing <= _NARROWING_MAX
        worker.fruitless = 0 if progressed or narrows else worker.fruitless + 1
        if took_over:
            is_unexplained = worker.ended.how == "crashed" and not named and lived_s < _SETTLED_S
            worker.unexplained = worker.unexplained + 1 if is_unexplained else 0
        if took_over and self._policy.is_to_be_told(worker.unexplained):
            log.error(
                "shard %d has crashed %d times in a row while none of its handlers ran: a task, a callback or a thread that "
                "a handler left behind may do that; its message is not acknowledged by then, and comes again",
                worker.shard,
                worker.unexplained,
            )
        self._go_on(worker, rundir, "ended", self._policy.decide(worker.fruitless, worker.unexplained))

    def _go_on(self, worker: _Worker, rundir: RunDir, what: str, decision: RestartIn | GiveUp) -> None:
        """Do what a policy has decided of a worker that `what` says the end of."""
        match decision:
            case RestartIn(delay_s=delay_s):
                when = f"in {delay_s:g} s" if delay_s else "at once"
                log.warning("shard %d %s (%s); starting it again %s", worker.shard, what, worker.last_exit, when)
                if delay_s <= 0:
                    self._start(worker, rundir)
                else:
                    asyncio.get_running_loop().call_later(delay_s, self._restart, worker, rundir)
            case GiveUp(deaths=deaths):
                worker.given_up = True
                log.error(
                    "shard %d is given up: %d deaths in a row without progress, the last: %s; its keys are not served until "
                    "`shardbus serve` is started again",
                    worker.shard,
                    deaths,
                    worker.last_exit,
                )
                self._announce()

    def _how_it_ended(self, worker: _Worker, code: int) -> Ended:
        now_ns = time.monotonic_ns()
        if (code == 0 and worker.drained is not None) or code in (EXIT_BROKEN, EXIT_BOOT):
            return UNKNOWN_END  # in good order, or by a defect that is no handler's
        if worker.replaced:
            return Ended(how="silent", told=f"{worker.last_exit}, after {SILENCE_S:g} s of silence", at_ns=now_ns)
        if was_own_fault(code):
            return Ended(how="crashed", told=worker.last_exit, at_ns=now_ns)
        if not was_killed(code):
            return Ended(how="killed", told=worker.last_exit, at_ns=now_ns)
        if self._memory_ran_out():
            return Ended(how="memory", told=f"{worker.last_exit}, out of memory", at_ns=now_ns)
        return Ended(how="killed", told=worker.last_exit, at_ns=now_ns)

    def _memory_ran_out(self) -> bool:
        """Whether the kernel has ended processes for want of memory just now, as far as it says."""
        kills, now = kernel_kills(), time.monotonic()
        if kills != self._kernel_kills:
            self._kernel_kills, self._kernel_killed_at = kills, now
        return now - self._kernel_killed_at < _MEMORY_S

    def _restart(self, worker: _Worker, rundir: RunDir) -> None:
        if not (self._stopping or self._failure):
            self._start(worker, rundir)

    def _check_silence(self, now: float) -> None:
        for worker in self._workers:
            limit_s = SILENCE_S if worker.ready else BOOT_SILENCE_S
            if worker.child is not None and now - worker.heard_at > limit_s:
                log.error(
                    "shard %d (pid %d) was silent for %g s%s; it is replaced",
                    worker.shard,
                    worker.child.pid,
                    limit_s,
                    f", blocked by {worker.stalled_in}" if worker.stalled_in else "",
                )
                worker.heard_at = now
                worker.replaced = True
                worker.child.kill()
            elif worker.is_slow_to_boot(now) and not worker.told_slow:
                worker.told_slow = True
                log.warning(
                    "shard %d has not been ready for %g s, and is waited for: its lifespan or its store takes long",
                    worker.shard,
                    BOOT_SILENCE_S,
                )

    # -- clients

    def _table(self) -> Table:
        return Table(
            incarnation=self._incarnation,
            layout=_LAYOUT,
            version=self._version,
            slots=even_slots(self._options.workers),
            shards=[
                ShardAddress(shard=one.shard, epoch=one.epoch if one.ready else b"", address=one.address)
                for one in self._workers
            ],
        )

    def _announce(self) -> None:
        self._version += 1
        frame = encode_frame(TableChanged(_encode(self._table())))
        for peer in self._clients:
            self._send(peer, frame)

    def _send(self, peer: bytes, frame: bytes) -> None:
        if self._router is not None:
            self._router.send(peer, frame)

    def _answer(self, peer: bytes, request: int, body: Any) -> None:
        self._send(peer, encode_frame(Answer(request, "", _encode(body))))

    def _on_frame(self, peer: bytes, data: bytes) -> None:
        try:
            ask = decode_to_supervisor(data)
        except RemoteProtocolError as error:
            log.debug("a frame that is not sound was ignored: %s", error)
            return
        if ask.what == "table":
            self._clients[peer] = None
            self._clients.move_to_end(peer)
            if len(self._clients) > _CLIENTS_MAX:
                self._clients.popitem(last=False)
            self._answer(peer, ask.request, self._table())
        elif ask.what == "status":
            self._answer(peer, ask.request, self.status())
        elif ask.what == "evidence":
            self._answer_evidence(peer, ask.request, ask.body)
        elif ask.what == "drain":
            self._drain_asked.append((peer, ask.request))
            if not self._stopping:
                self._on_signal()
        else:
            self._send(peer, encode_frame(Answer(ask.request, f"this bus does not know the question {ask.what!r}", b"")))

    def _answer_evidence(self, peer: bytes, request: int, body: bytes) -> None:
        try:
            publishers = msgspec.msgpack.decode(body, type=list[bytes])[:64]
        except msgspec.DecodeError:
            self._send(peer, encode_frame(Answer(request, "evidence is asked for by a list of publishers", b"")))
            return
        wanted = [publisher for publisher in publishers if len(publisher) == 16]
        upto = [worker.evidence.book.written for worker in self._workers]
        self._tell_evidence(peer, request, wanted, upto)

    def _tell_evidence(self, peer: bytes, request: int, publishers: list[bytes], upto: list[int]) -> None:
        """Answer once the logs are folded as far as they were written when that was asked; a turn for a part of them."""
        now_ns = time.monotonic_ns()
        behind = False
        for worker, written in zip(self._workers, upto, strict=True):
            book = worker.evidence.book
            if book.folded < written:
                book.fold(now_ns, _FOLD_RECORDS)
                behind = behind or book.folded < written
        if behind:
            asyncio.get_running_loop().call_soon(self._tell_evidence, peer, request, publishers, upto)
            return
        found = [
            evidence
            for publisher in publishers
            for worker in self._workers
            if (evidence := worker.evidence.book.evidence(worker.shard, publisher)) is not None
        ]
        self._answer(peer, request, found)

    # -- for people

    def status(self) -> dict[str, Any]:
        """What `shardbus status --json` prints."""
        workers = [self._status_of(one) for one in self._workers]
        return {
            "bus": self._options.application,
            "address": self._options.address.url,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started_at, 1),
            "healthy": not self._stopping and all(one["state"] == "up" and not one["store_failing"] for one in workers),
            "draining": self._stopping,
            "workers": workers,
            **total_ledger(workers),
            "next_due_ns": first_due(workers),
            "handled": sum(one["handled"] for one in workers),
            "handled_per_s": round(self._rate[2], 1),
        }

    def _status_of(self, worker: _Worker) -> dict[str, Any]:
        counters = worker.evidence.book.counters()
        suspects, convicted, unjournalled = worker.journal.journal.counts()
        beat = worker.beat
        state = "given-up" if worker.given_up else "up" if worker.ready else "starting" if worker.child else "down"
        return {
            "shard": worker.shard,
            "state": state,
            "pid": worker.child.pid if worker.child is not None else 0,
            "epoch": worker.counter,
            "restarts": worker.restarts,
            "handled": counters.handled,
            "backlog": beat.backlog if beat else 0,
            "busy_keys": beat.busy_keys if beat else 0,
            "publishers": beat.publishers if beat else 0,
            "sessions": beat.sessions if beat else 0,
            **store_ledger(worker.stored),
            "next_due_ns": beat.next_due_ns if beat and worker.stored.scheduled else 0,
            "store_failing": beat.store_failing if beat else "",
            "stalled_in": worker.stalled_in,
            "suspects": suspects,
            "quarantined": convicted,
            "unjournalled": unjournalled,
            "malformed": counters.malformed,
            "ignored": counters.ignored,
            "rejected": counters.rejected,
            "rss_bytes": worker.child.rss_bytes() if worker.child is not None else 0,
            "last_exit": worker.last_exit,
        }

    def _measure_rate(self, now: float) -> None:
        at, handled, _ = self._rate
        if now - at >= 1.0:
            total = sum(one.evidence.book.counters().handled for one in self._workers)
            self._rate = (now, total, (total - handled) / (now - at) if at else 0.0)
            self._memory_ran_out()

    def told_left(self) -> str:
        """What is left in the stores, and where, in a line; empty: nothing is."""
        if self._options.leave_nothing:
            return ""
        stored = [worker.stored for worker in self._workers]
        return told_left(sum(one.dead for one in stored), sum(one.waiting for one in stored), self._kept)

    def _ready_line(self) -> str:
        workers = counted(self._options.workers, "worker")
        return f"ready: {workers} of {self._options.application} at {self._options.address.url} (pid {os.getpid()})"

    def _not_drained(self) -> list[str]:
        lines = []
        for worker in self._workers:
            if worker.drained is not None and not worker.drained.keys:
                if worker.child is not None:
                    why = "a second signal ended it" if self._aborting else "there was no time left"
                    lines.append(f"shard {worker.shard}: its lifespan may not have been closed: {why}")
                if worker.drained.backlog:
                    unfinished = counted(worker.drained.backlog, "message", "was")
                    lines.append(f"shard {worker.shard}: {unfinished} not finished")
                continue
            if worker.drained is None:
                if worker.ready_at and (worker.child is not None or not worker.given_up):
                    why = worker.last_exit or ("by a second signal" if self._aborting else "out of time")
                    lines.append(f"shard {worker.shard}: ended without having drained ({why})")
                continue
            more = worker.drained.keys - len(worker.drained.left)
            lines += [f"shard {worker.shard}: not drained: {line}" for line in worker.drained.left]
            if more > 0:
                lines.append(f"shard {worker.shard}: … and {counted(more, 'more key')}")
        return lines

