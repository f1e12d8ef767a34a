"""Events whose handlers have ended, and whose children are not finished: who of them waits in memory, and who in the store.

Such an event is not acked, so its publisher's credit is not given back, and that is what holds publishers up where what
handlers publish is not taken fast enough. Workers that publish to each other must not be held up so: each would wait for the
other. So events of workers go to the store where they wait for long or are many, and are acked as waiting; events of others
only while there is room for what handlers publish. Pure: `settling` stores them and finishes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from shardbus.inbound import Delivery
from shardbus.store import Failure

_WORKERS_WAITS: Final = 5  # so many times as long as those of programs


class Deferred:
    """A message that has reached its outcome and is not settled."""

    __slots__ = ("delivery", "failure", "is_stored", "is_untied", "is_written", "of_worker", "parks", "place", "since_ns")

    def __init__(
        self, delivery: Delivery, failure: Failure | None, parks: bool, place: int, of_worker: bool, since_ns: int
    ) -> None:
        self.delivery = delivery
        self.failure = failure
        self.parks = parks
        self.place = place  # where it stands in its lane, if it goes to the store: before all that came behind it
        self.of_worker = of_worker
        self.since_ns = since_ns
        self.is_stored = False  # or about to be: nobody waits for room for it
        self.is_written = False
        self.is_untied = False  # its children are finished


class Deferrals:
    """All that are deferred in a shard. Bounded by the children of a worker's handlers, which its client bounds."""

    def __init__(self) -> None:
        self._all: dict[Deferred, None] = {}
        # In memory only, the oldest first, and their bytes; of workers, and of others.
        self._in_memory: dict[bool, dict[Deferred, None]] = {True: {}, False: {}}
        self._bytes = {True: 0, False: 0}

    def __len__(self) -> int:
        return len(self._all)

    @property
    def in_memory(self) -> int:
        """How many are lost to this worker's successor: it hears of them from their publishers."""
        return len(self._in_memory[True]) + len(self._in_memory[False])

    def add(self, one: Deferred) -> None:
        """Take one that is in memory only."""
        self._all[one] = None
        self._in_memory[one.of_worker][one] = None
        self._bytes[one.of_worker] += len(one.delivery.body)

    def stored(self, one: Deferred) -> None:
        """The store has it, or is about to."""
        one.is_stored = True
        group = self._in_memory[one.of_worker]
        if one in group:
            del group[one]
            self._bytes[one.of_worker] -= len(one.delivery.body)

    def remove(self, one: Deferred) -> None:
        """It is settled."""
        self.stored(one)
        del self._all[one]

    def are_many(self, of_worker: bool, events_max: int, bytes_max: int) -> bool:
        """Whether so many are in memory that one of them has to go."""
        return len(self._in_memory[of_worker]) > events_max or self._bytes[of_worker] > bytes_max

    def oldest(self, of_worker: bool) -> Deferred:
        """The one that is first to go; there is one."""
        return next(iter(self._in_memory[of_worker]))

    def overdue(self, now_ns: int, wait_ns: int) -> Iterator[Deferred]:
        """Those in memory that have waited so long, five times as long where they are of workers; and those that failed.

        Events of workers hold up no program, and where many wait most are finished by then; each would cost two rows.
        """
        for of_worker, group in self._in_memory.items():
            before_ns = now_ns - wait_ns * (_WORKERS_WAITS if of_worker else 1)
            yield from [one for one in group if one.since_ns <= before_ns or one.failure is not None]
