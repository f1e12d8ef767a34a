"""What the bus says of a run: its workers' state meanwhile, the shards' evidence of its publishers, and what all that costs.

A publisher is new with every run, so its evidence starts from nothing and belongs to this run alone, whoever else
publishes on the same bus. Evidence only grows, so an interval is the difference of two answers, and one that was lost costs
nothing but its interval's sharpness.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec.structs import replace

import shardbus
from loadgen.histogram import Histogram, Percentiles, difference, percentiles_us
from loadgen.machine import MachineLoad
from loadgen.meters import merged
from loadgen.report import Absence, BusState, Interval, ProcessUse, Totals, WorkerState
from loadgen.resources import MachineMeter, Usage, Watched
from loadgen.spec import Counts, LoadError, Progress
from shardbus.metrics import Evidence, bucket_bounds_us

_POLL_S: Final = 0.2
_ASK_S: Final = 2.0  # a supervisor that is being replaced answers later; asked again until the deadline

_COUNTS: Final = ("distinct", "repeats", "announced", "out_of_order", "missing", "unchecked", "dead", "samples")

_TIMES: Final = ("latency", "service", "queue")  # of an event, as `Evidence` calls them


def totals_of(evidence: Iterable[Evidence]) -> Totals:
    """Add up what the shards say of some publishers, and merge their buckets into a histogram of each kind of time."""
    shards = list(evidence)
    counts = {name: sum(getattr(shard, name) for shard in shards) for name in _COUNTS}
    latency, service, queue = (
        percentiles_us(pair for table in _tables(shards, of).values() for pair in table.items()) for of in _TIMES
    )
    return Totals(**counts, latency_us=latency, service_us=service, queue_us=queue)


class _Seen:
    """What was heard last, by shard and publisher: evidence only grows, unless it was begun anew."""

    def __init__(self) -> None:
        self._distinct: dict[tuple[int, bytes], int] = {}

    def check(self, evidence: Iterable[Evidence]) -> None:
        """Refuse evidence that has lost what it had.

        Raises:
            LoadError: a shard has forgotten what it had told.
        """
        distinct = {(one.shard, one.publisher): one.distinct for one in evidence}
        for (shard, publisher), before in self._distinct.items():
            if distinct.get((shard, publisher), 0) < before:
                raise LoadError(
                    f"the evidence of shard {shard} has begun anew in the middle of the run, so nobody can tell what was "
                    "lost: the bus was drained and served again; make the run again while it stays up"
                )
        self._distinct |= distinct


def check_complete(evidence: Iterable[Evidence]) -> None:
    """Refuse evidence that proves nothing.

    Raises:
        LoadError: a shard had no room for some of it.
    """
    without = [one for one in evidence if not one.complete]
    if without:
        publishers = len({one.publisher for one in without})
        raise LoadError(
            f"shard {without[0].shard} had no room for the evidence of {publishers} of this run's publishers, so nobody can "
            "tell what was lost: too many publishers stamp their events at once, as another loadgen at this bus does; make "
            "one run after the other, or each with fewer --drivers"
        )


def _tables(evidence: Iterable[Evidence], of: str = "latency") -> dict[int, Counter[int]]:
    """By shard: times in microseconds → how many, of all publishers."""
    tables: dict[int, Counter[int]] = {}
    for one in evidence:
        table = tables.setdefault(one.shard, Counter())
        for bucket, count in getattr(one, of):
            # Both ends of a bucket fall into the same bucket of the histogram, which has the same three digits.
            table[bucket_bounds_us(bucket)[0]] += count
    return tables


class Collector:
    """Asks a bus about a run, through a client of its own that publishes nothing.

    Args:
        local: whether the bus runs on this host, so that its processes can be looked at.
    """

    def __init__(self, client: shardbus.Client, *, local: bool = True) -> None:
        self._client = client
        self._local = local
        self.latest = BusState(workers=(), waiting=0)
        self.publishers: list[bytes] = []
        self.histogram = Histogram()
        """The response times of all workers together, as last heard."""
        self.by_shard: dict[int, Histogram] = {}
        """The same for each shard."""
        self._tables: dict[str, dict[int, Counter[int]]] = {of: {} for of in _TIMES}
        self._scratch = Histogram(), Histogram()  # each holds itself in a circle, and so would pile up
        self._processes = Processes()
        self._machine = MachineMeter()
        self._supervisor = 0
        self._unanswered_s: float | None = None  # when the first question was asked that has had no answer
        self.absence = Absence()
        """Of the supervisor, as far as it was asked."""
        self._before: tuple[float, Counts, int | None] | None = None
        self._seen = _Seen()

    async def state(self) -> BusState:
        """The bus now, or, where nobody answers in time, as it was last seen."""
        asked_s = time.monotonic() if self._unanswered_s is None else self._unanswered_s
        try:
            status = await self._client.status(timeout=_ASK_S)
        except shardbus.BusUnreachable:  # a supervisor may be away for a while without harm to the run
            self._unanswered_s = asked_s
            self._note_absence(asked_s)
            return self.latest
        supervisor = status.get("pid", 0)
        if self._unanswered_s is not None:
            self._unanswered_s = None
            self._note_absence(asked_s)
        if self._supervisor not in (0, supervisor):
            self.absence = replace(self.absence, successors=self.absence.successors + 1)
        self._supervisor = supervisor
        self.latest = _state_of(status)
        return self.latest

    def _note_absence(self, since_s: float) -> None:
        self.absence = replace(self.absence, silent_s=max(self.absence.silent_s, time.monotonic() - since_s))

    async def interval(self, drivers: Sequence[Progress], driver_pids: Mapping[int, int]) -> Interval | None:
        """What has happened since the last call; None where the drivers have said nothing new since.

        Args:
            drivers: each driver's latest word.
            driver_pids: the processes of those that run, by their number; looked up when the bus has answered.

        Raises:
            LoadError: the evidence is not whole.
        """
        state = await self.state()
        gained = await self._gained()
        uses = self._look(state, driver_pids)
        at_s = max(one.at_s for one in drivers)
        counts = Counts.sum(one.counts for one in drivers)
        scheduled = None
        if all(one.scheduled is not None for one in drivers):
            scheduled = sum(one.scheduled or 0 for one in drivers)
        before_s, before, scheduled_before = self._before or (0.0, _NOTHING, 0 if scheduled is not None else None)
        self._before = (at_s, counts, scheduled)
        passed_s = at_s - before_s
        if passed_s <= 0:
            return None
        offered = None
        if scheduled is not None and scheduled_before is not None:
            offered = (scheduled - scheduled_before) / passed_s
        lag_us = percentiles_us(merged([one.send_lag_us for one in drivers]).items())
        return Interval(
            at_s=at_s,
            warming_up=any(one.warming_up for one in drivers),
            offered_rate=offered,
            achieved_rate=(counts.finished - before.finished) / passed_s,
            counts=counts,
            latency_us=percentiles_us(merged([one.replies_us for one in drivers]).items()) or gained["latency"],
            service_p99_us=_p99(gained["service"]),
            queue_p99_us=_p99(gained["queue"]),
            send_lag_p99_us=_p99(lag_us),
            backlog=tuple(worker.backlog for worker in state.workers),
            waiting=state.waiting,
            processes=uses,
        )

    def begin(self, driver_pids: Mapping[int, int]) -> None:
        """Look at all processes and the machine now, so that the first interval has a beginning."""
        self._machine = MachineMeter()
        self._look(self.latest, driver_pids)

    async def _gained(self) -> dict[str, Percentiles | None]:
        """The times since the last look, of all shards; keeps the histograms of the whole run.

        Raises:
            LoadError: the evidence is not whole.
        """
        nothing: dict[str, Percentiles | None] = dict.fromkeys(_TIMES)
        if not self.publishers:
            return nothing
        try:
            evidence = await self._client.evidence(self.publishers, timeout=_ASK_S)
        except shardbus.BusUnreachable:
            return nothing
        self._check(evidence)
        return self._take(evidence)

    def _check(self, evidence: Sequence[Evidence]) -> None:
        check_complete(evidence)
        self._seen.check(evidence)

    def _take(self, evidence: Sequence[Evidence]) -> dict[str, Percentiles | None]:
        """Merge what is new of every shard."""
        gained = {}
        for of in _TIMES:
            tables, before = _tables(evidence, of), self._tables[of]
            interval, part = self._scratch
            interval.clear()
            for shard, table in tables.items():
                part.clear()
                part.add(difference(table, before.get(shard, {})))
                if of == "latency":
                    self.by_shard.setdefault(shard, Histogram()).merge(part)
                interval.merge(part)
            before |= tables
            if of == "latency":
                self.histogram.merge(interval)
            gained[of] = interval.percentiles()
        return gained

    def _look(self, state: BusState, driver_pids: Mapping[int, int]) -> tuple[ProcessUse, ...]:
        named = {f"driver {at}": pid for at, pid in driver_pids.items()}
        named["collector"] = os.getpid()
        if self._local:
            named |= {f"worker {worker.shard}": worker.pid for worker in state.workers}
            named["supervisor"] = self._supervisor
        return self._processes.look(named, time.monotonic())

    def machine_load(self) -> MachineLoad:
        """How busy this machine was since the beginning."""
        return self._machine.load()

    def unseen(self) -> tuple[str, ...]:
        """Processes that could not be looked at, at least once."""
        return self._processes.unseen()

    def processes(self) -> tuple[ProcessUse, ...]:
        """What every process used over the whole time that it was looked at; memory is the most that was seen."""
        return self._processes.total()

    async def settle(self, final: Counts, deadline_s: float, enough: asyncio.Event | None = None) -> Totals:
        """The evidence of publishers that have flushed, once it accounts for every event, and at the latest in `deadline_s`,
        or when somebody has had `enough` of that.

        Events that a publisher knows as waiting are acked long before they are handled, so only their evidence tells.

        Raises:
            BusUnreachable: nobody has answered by then.
            LoadError: the evidence is not whole.
        """
        expected = final.published - final.dropped - final.in_flight
        deadline = time.monotonic() + deadline_s
        while True:
            evidence = await self._evidence(deadline)
            self._check(evidence)
            totals = totals_of(evidence)
            over = time.monotonic() >= deadline or (enough is not None and enough.is_set())
            if totals.distinct >= expected or not final.waiting or over:
                self._take(evidence)
                return totals
            await asyncio.sleep(_POLL_S)

    async def _evidence(self, deadline: float) -> list[Evidence]:
        while True:
            try:
                return await self._client.evidence(self.publishers, timeout=_ASK_S)
            except shardbus.BusUnreachable:
                if time.monotonic() >= deadline:
                    raise


def _p99(times_us: Percentiles | None) -> int | None:
    return None if times_us is None else times_us.p99


_NOTHING: Final = Counts(published=0, handled=0, dead=0, waiting=0, dropped=0, in_flight=0)


class Processes:
    """Processor time and memory of processes by name. A name may pass to another process, as a dead worker's does."""

    def __init__(self) -> None:
        self._watched = Watched()
        self._last: dict[str, tuple[int, float, Usage]] = {}
        self._cpu_s: Counter[str] = Counter()
        self._time_s: Counter[str] = Counter()
        self._rss: dict[str, int] = {}
        self._unseen: dict[str, None] = {}

    def look(self, named: dict[str, int], now_s: float) -> tuple[ProcessUse, ...]:
        """What each has used since the last look. What could not be seen is not in it."""
        found = []
        for name, pid in named.items():
            usage = self._watched.look(pid)
            if usage is None:
                self._unseen[name] = None
                continue
            before = self._last.get(name)
            if not usage.rss_bytes and before is not None and before[0] == pid:
                usage = replace(usage, rss_bytes=before[2].rss_bytes)  # it has just ended, and what it had last counts
            self._rss[name] = max(usage.rss_bytes, self._rss.get(name, 0))
            self._last[name] = (pid, now_s, usage)
            if before is None or before[0] != pid or now_s <= before[1]:
                continue
            cpu_s, time_s = usage.cpu_s - before[2].cpu_s, now_s - before[1]
            self._cpu_s[name] += cpu_s  # type: ignore[assignment]  # a counter of seconds counts in fractions
            self._time_s[name] += time_s  # type: ignore[assignment]  # likewise
            found.append(ProcessUse(name=name, pid=pid, cpu_share=cpu_s / time_s, rss_bytes=usage.rss_bytes))
        return tuple(found)

    def unseen(self) -> tuple[str, ...]:
        """The names that were looked for in vain, at least once."""
        return tuple(self._unseen)

    def total(self) -> tuple[ProcessUse, ...]:
        """Over all looks; one that was never seen twice has no share of a core."""
        return tuple(
            ProcessUse(
                name=name,
                pid=self._last[name][0],
                cpu_share=self._cpu_s[name] / self._time_s[name] if self._time_s[name] else None,
                rss_bytes=rss,
            )
            for name, rss in self._rss.items()
        )


def _state_of(status: dict[str, Any]) -> BusState:
    workers = msgspec.convert(status["workers"], tuple[WorkerState, ...])
    return BusState(workers=workers, waiting=status["waiting"])
