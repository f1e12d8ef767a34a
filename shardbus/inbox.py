"""Whose batch is next: the publishers of a worker share what time it has for what has just come.

Start-time fair queueing (P. Goyal, H. M. Vin, H. Chen, "Start-time Fair Queueing", SIGCOMM 1996), by the time that handlers
take instead of the length of packets. Pure; time comes from outside.

Nobody's are the time of a handler once it has been suspended, that of events which have waited behind their key, and that
of a batch handler whose batch has lingered; that of a batch that was filled is its last event's publisher's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import chain
from typing import Final

from shardbus.inbound import Inbound
from shardbus.wire.session import WorkerSession

# One session runs for so long (and a stride) before another that waits: by time, because one may send batches of three
# events and another batches of 512, of handlers that fail.
_SHARE_NS: Final = 1_000_000
# So long at most may one that asked for less than its part go before the others, to catch up; and so long must one wait in
# return whose handler has taken more, because it may have been the process that stood still.
_APART_NS: Final = 20_000_000
_NO_END: Final = 2**63


class Inbox:
    """Batches whose turn has not come: each session's in their order.

    Each session has a clock that runs while its messages do (`WorkerSession.clock_ns`). The one whose clock is furthest
    behind is next, for a share, or until nothing of it is left. So one that asks for little does not wait for those that
    ask for more than there is, and these get equal parts. Clocks of sessions that join are set to within 20 ms of the time
    that has come; one that is new is set to that time.
    """

    def __init__(self) -> None:
        self.share_ends_ns = 0
        """Until when what `take` returned may run; a leader's slice ends before that, where nobody waits."""
        self.served: WorkerSession | None = None
        """Whose that was."""
        self._queues: dict[WorkerSession, deque[Inbound]] = {}
        self._waiting: list[tuple[int, int, WorkerSession]] = []  # a heap: of those with a queue, but for the served one
        self._joined = 0  # tells equal ones apart: first come, first served
        self._come_ns = 0  # the latest time on the clock of one whose share began: it never goes back
        self._began_ns = 0  # 0: it does not run now
        self._used_ns = 0  # of its share

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __iter__(self) -> Iterator[Inbound]:
        return chain.from_iterable(self._queues.values())

    def push(self, inbound: Inbound) -> None:
        """Put a batch behind those of its session."""
        session = inbound.session
        queue = self._queues.get(session)
        if queue is None:
            queue = self._queues[session] = deque()
            if session is not self.served:
                self._wait(session)
        queue.append(inbound)

    def take(self, begun: Inbound | None, now_ns: int) -> Inbound:
        """The batch that runs from now on: `begun`, of which some has run, where that may go on, else the next. The inbox is
        not empty where nothing is begun."""
        self.rest(now_ns)
        served = self.served
        if served is not None:
            is_over = self._used_ns >= _SHARE_NS
            if begun is not None:
                if is_over and self._waiting and self._waiting[0][0] < served.clock_ns:
                    self._queues.setdefault(served, deque()).appendleft(begun)
                else:
                    return self._run(begun, now_ns, 0 if is_over else self._used_ns)
            elif served in self._queues and not is_over:
                return self._run(self._next_of(served), now_ns, self._used_ns)
            if served in self._queues:
                self._wait(served)
        _, _, session = heappop(self._waiting)
        self.served = session
        return self._run(self._next_of(session), now_ns, 0)

    def rest(self, now_ns: int) -> None:
        """What was taken last does not run any more."""
        if self._began_ns and self.served is not None:
            ran_ns = now_ns - self._began_ns
            self._used_ns += ran_ns
            self.served.clock_ns += ran_ns
        self._began_ns = 0

    def clear(self) -> None:
        """Forget them all."""
        self._queues.clear()
        self._waiting.clear()
        self.served = None

    def _wait(self, session: WorkerSession) -> None:
        come_ns = self._come_ns
        first_ns = come_ns - _APART_NS if session.clock_ns else come_ns
        session.clock_ns = min(max(session.clock_ns, first_ns), come_ns + _APART_NS)
        self._joined += 1
        heappush(self._waiting, (session.clock_ns, self._joined, session))

    def _next_of(self, session: WorkerSession) -> Inbound:
        queue = self._queues[session]
        inbound = queue.popleft()
        if not queue:
            del self._queues[session]
        return inbound

    def _run(self, inbound: Inbound, now_ns: int, used_ns: int) -> Inbound:
        if not used_ns:
            self._come_ns = max(self._come_ns, inbound.session.clock_ns)
        self._began_ns = now_ns
        self._used_ns = used_ns
        # To end a share within a batch cuts it in two, each with evidence of its own: only for one who waits.
        self.share_ends_ns = now_ns + _SHARE_NS - used_ns if self._waiting else _NO_END
        return inbound
