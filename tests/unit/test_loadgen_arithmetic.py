"""That the figures of loadgen are right, in virtual time: the real schedule, books and sums, with a server of arithmetic.

Nothing here runs, so nothing depends on the machine, and there may be as many events as a percentile needs.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from functools import partial

import pytest
from queueing import NS, differences, lindley, percentiles_of

from loadgen.collector import totals_of
from loadgen.pacer import Arrivals, Evenly, Poisson, Profile, Stage
from loadgen.report import Totals
from shardbus.metrics import Book, Recorder, book_bytes
from shardbus.wire.codec import pack_keys

DIGITS = 0.002  # what three significant digits leave open
NAMES = ("p50", "p90", "p99", "p99_9", "max")
START_NS = 7_000_000_123


def sent_on_time(arrivals: Arrivals, until_ns: int) -> list[int]:
    """The intended instants of a schedule, asked for as the driver does, at a clock that is moved by hand."""
    instants: list[int] = []
    now_ns = START_NS
    while now_ns < until_ns:
        due = arrivals.due(len(instants), now_ns)
        if due.count:
            instants += arrivals.intended_ns(len(instants), due.count)
        else:
            now_ns = min(now_ns + due.wait_ns, until_ns)
    return instants


def measured(intended_ns: Sequence[int], begins_ns: Sequence[int], ends_ns: Sequence[int]) -> Totals:
    """What loadgen says of events that were handled from when to when. Two shards tell it, one event by event, the other by
    parts in which each event begins when the one before has ended; they take such parts in turns."""
    buffers = [memoryview(bytearray(book_bytes(keys=8, publishers=2))) for _ in range(2)]
    books = [Book(buffer, keys=8, publishers=2) for buffer in buffers]
    folds = [partial(book.fold, START_NS) for book in books]
    recorders = [
        Recorder(buffer, keys=8, publishers=2, full=fold) for buffer, fold in zip(buffers, folds, strict=True)
    ]
    parts: list[list[int]] = []
    for at, begin_ns in enumerate(begins_ns):
        if parts and begin_ns == ends_ns[at - 1] and len(parts[-1]) < 100:
            parts[-1].append(at)
        else:
            parts.append([at])
    for number, part in enumerate(parts):
        first, behind = part[0], part[-1] + 1
        if number % 2:
            stamps = struct.pack(f"<{len(part)}q", *intended_ns[first:behind])
            keys = pack_keys(["key"] * len(part))
            ended_ns = ends_ns[first:behind]
            recorders[1].note_all(b"p" * 16, 1, keys, len(part), None, stamps, begins_ns[first], ended_ns)
        else:
            for at in part:
                recorders[0].note(b"p" * 16, "key", 0, 1, intended_ns[at], begins_ns[at], ends_ns[at], dead=False)
    evidence = []
    for shard, book in enumerate(books):
        recorders[shard].flush()
        folds[shard]()
        found = book.evidence(shard, b"p" * 16)
        assert found is not None
        evidence.append(found)
    totals = totals_of(evidence)
    assert totals.samples == len(intended_ns)
    return totals


def spans_of(intended_ns: Sequence[int], services_ns: Sequence[int]) -> tuple[list[int], list[int]]:
    """When one server has begun and ended each event: it begins when the event has come and the one before is done."""
    begins: list[int] = []
    ends: list[int] = []
    free_ns = 0
    for intended, service_ns in zip(intended_ns, services_ns, strict=True):
        begins.append(max(free_ns, intended))
        free_ns = begins[-1] + service_ns
        ends.append(free_ns)
    return begins, ends


def test_the_recursion_itself_is_right() -> None:
    # Arrivals at 0, 1, 2, 10; each takes 3: ends at 3, 6, 9, 13.
    assert lindley([0, NS, 2 * NS, 10 * NS], [3 * NS] * 4) == [3.0, 5.0, 7.0, 3.0]


@pytest.mark.parametrize("seed", range(5))
def test_response_queue_and_service_times_of_one_server_are_those_of_lindleys_recursion(seed: int) -> None:
    chance = random.Random(seed)
    arrivals = Poisson(START_NS, Profile((Stage(1000.0, 10.0),)), random.Random(f"{seed}/arrivals"))
    intended_ns = sent_on_time(arrivals, START_NS + 10 * NS)
    services_ns = [round(chance.expovariate(1 / 800_000)) for _ in intended_ns]  # busy for four fifths of the time
    responses_s = lindley(intended_ns, services_ns)
    assert len(intended_ns) > 9000
    waited = sum(response * NS > service + 1 for response, service in zip(responses_s, services_ns, strict=True))
    assert waited > len(intended_ns) / 2
    found = measured(intended_ns, *spans_of(intended_ns, services_ns))
    assert differences(found.latency_us, percentiles_of(responses_s), NAMES, within=DIGITS) == []
    services_s = [service_ns / NS for service_ns in services_ns]
    assert differences(found.service_us, percentiles_of(services_s), NAMES, within=DIGITS) == []
    waits_s = [response - service for response, service in zip(responses_s, services_s, strict=True)]
    assert differences(found.queue_us, percentiles_of(waits_s), NAMES, within=DIGITS) == []


def test_a_server_that_stands_still_is_late_for_every_event_that_was_due_meanwhile() -> None:
    rate, stop_ns, go_on_ns = 200, START_NS + NS, START_NS + 4 * NS
    intended_ns = sent_on_time(Evenly(START_NS, Profile((Stage(rate, 8.0),))), START_NS + 8 * NS)
    assert len(intended_ns) == 8 * rate
    ends_ns = [go_on_ns if stop_ns <= instant < go_on_ns else instant for instant in intended_ns]
    waits = [3.0 - n / rate for n in range(3 * rate)]
    expected = percentiles_of(waits + [0.0] * (5 * rate))
    found = measured(intended_ns, ends_ns, ends_ns)  # a handler that takes no time: all of it is waiting
    for times_us in (found.latency_us, found.queue_us):
        assert differences(times_us, expected, ("p90", "p99", "p99_9", "max"), within=DIGITS) == []
    assert found.service_us is not None
    assert found.service_us.max == 0
