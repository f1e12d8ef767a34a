"""Which scheduled events of a shard are in memory, and which of them may begin. Pure.

Scheduled events lie in the store. Those that are due soon are read ahead, so that what is due costs neither a read nor a
write before its handlers run: its row stands for it until they have ended. What is known:

    the reach       every row up to it, in the order of (due time, row), is here, or has begun, or is gone
    what is new     rows that were stored later, and are due within the reach; their rows are above all that were read
    what is beyond  when the first row behind the reach is due, as far as that is known

A successor must know which rows may have begun. So nothing begins that is due after the *mark*, which is committed before;
it lies a little ahead, so that one write serves many events. A death calls what is due up to the mark, and did not begin,
repeats; that is at most a third of a second's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Final, NamedTuple

from shardbus.config import Limits
from shardbus.store import ROW_OVERHEAD_BYTES, ScheduledEvent, StoredScheduled, row_bytes

MARK_EARLY_NS: Final = 50_000_000
"""So long before an event is due its mark is written, so that it need not wait for that."""
MARK_AHEAD_NS: Final = 250_000_000  # what is due in so much more time needs no further mark

PAGE_ROWS: Final = 512
PAGE_BYTES: Final = 1024 * 1024  # of their bodies

_LAST_ROW: Final = 2**63 - 1
_NS: Final = 1_000_000_000


class Page(NamedTuple):
    """What to read: up to `rows` rows and `bytes` of bodies, above `after`, due by `until_ns`.

    `new`: those that were stored later, of rows above `above`, in the order of rows; else in the order of (due time, row).
    """

    new: bool
    above: int
    after: tuple[int, int]
    until_ns: int
    rows: int
    bytes: int


class LookAhead:
    """The scheduled events in memory: up to `ahead_rows_max` and `ahead_bytes_max`. When full, the rest stays in the store
    until some have gone, and what is due earlier takes the place of what is due last.

    All times are in nanoseconds since 1970. `begun` rows are in memory, too, until they are `gone`.
    """

    def __init__(self, limits: Limits) -> None:
        self._rows_max = limits.ahead_rows_max
        self._bytes_max = limits.ahead_bytes_max
        self._running_max = limits.due_events_max
        self._ahead_ns = int(limits.ahead_s_max * _NS)
        # (due time, row) of what has not begun: in order, as pages came, and a heap of what came late; one of all would cost
        # 1 µs an event. What is not among the events was cancelled.
        self._line: deque[tuple[int, int]] = deque()
        self._late: list[tuple[int, int]] = []
        self._events: dict[int, ScheduledEvent] = {}  # by row: those that have not begun
        self._begun: dict[int, ScheduledEvent] = {}  # by row, until that is gone
        self._running: set[int] = set()  # of those, what has not ended
        self._bytes = 0  # of both
        self._reach = (0, _LAST_ROW)
        self._row_read = 0  # the highest
        self._new = 0  # how many rows are new
        self._new_due_ns = 0  # the first of them
        self._beyond_ns = 0
        self._mark_ns = 0
        self._inherited = (0, 0)  # up to which row, and which due time, one may have begun before
        self._leaving: tuple[bytes, int] | None = None  # whose rows are being removed
        self._held_back: list[tuple[int, int]] = []  # of that one: were due meanwhile

    def begin(self, next_due_ns: int, row_max: int, mark_ns: int) -> None:
        """What a predecessor has left: when the first row is due, the highest row, and the mark."""
        self._beyond_ns = next_due_ns
        self._mark_ns = mark_ns
        self._inherited = (row_max, mark_ns)

    # -- what there is

    @property
    def next_due_ns(self) -> int:
        """When the next one is due that has not begun; 0: there is none."""
        return min((at for at in (self._head_ns(), self._new_due_ns, self._beyond_ns) if at), default=0)

    @property
    def begun(self) -> int:
        """How many have begun whose rows are not gone."""
        return len(self._begun)

    def is_due(self, now_ns: int) -> bool:
        """Whether `take` has something."""
        return 0 < self._head_ns() <= min(now_ns, self._mark_ns) and len(self._running) < self._running_max

    def take(self, now_ns: int) -> tuple[StoredScheduled, bool] | None:
        """The next one that is due, which begins now, and whether it may have begun before."""
        running, leaving = self._running, self._leaving
        while len(running) < self._running_max:
            at = self._head()
            if at is None or at[0] > now_ns or at[0] > self._mark_ns:
                break
            if self._line and self._line[0] == at:
                self._line.popleft()
            else:
                heappop(self._late)
            due_ns, row = at
            event = self._events[row]
            if leaving is not None and leaving == (event.envelope.publisher, event.envelope.seq):
                self._held_back.append(at)
                continue
            del self._events[row]
            self._begun[row] = event
            running.add(row)
            inherited_row, inherited_ns = self._inherited
            return StoredScheduled(row, event), row <= inherited_row and due_ns <= inherited_ns
        return None

    def ended(self, row: int) -> bool:
        """Its handlers have ended, or its lane is in the store; whether others may begin that had to wait for that."""
        if row not in self._running:
            return False
        was_full = len(self._running) >= self._running_max
        self._running.remove(row)
        return was_full

    def gone(self, rows: Sequence[int]) -> bool:
        """These rows, which had begun, are gone; whether there is room for a page that was missing."""
        had_room = self._has_room
        for row in rows:
            self._bytes -= row_bytes(self._begun.pop(row).envelope)
        return not had_room and self._has_room

    # -- what to write

    def mark_wanted(self, now_ns: int) -> int:
        """The mark that is to be committed now; 0: none."""
        head_ns = self._head_ns()
        return self.mark_for(head_ns, now_ns) if head_ns else 0

    def mark_for(self, due_ns: int, now_ns: int) -> int:
        """The mark that has to be committed before an event begins; 0: none, or not now."""
        if due_ns <= self._mark_ns or due_ns > now_ns + MARK_EARLY_NS:
            return 0
        return max(due_ns, now_ns) + MARK_AHEAD_NS

    def marked(self, mark_ns: int) -> None:
        """This mark is committed."""
        self._mark_ns = max(self._mark_ns, mark_ns)

    # -- what to read

    def stored(self, due_ns: int) -> bool:
        """An event was written that is due then; whether there may be something else to do now."""
        if due_ns <= self.reach_ns:
            self._new += 1
            if not self._new_due_ns or due_ns < self._new_due_ns:
                self._new_due_ns = due_ns
            return True
        if self._beyond_ns and self._beyond_ns <= due_ns:
            return False
        self._beyond_ns = due_ns
        return True

    def wants(self, now_ns: int) -> bool:
        """Whether there is something to read."""
        if self._new:
            return len(self._begun) < self._rows_max
        return 0 < self._beyond_ns <= now_ns + self._early_ns and self._has_room

    def page(self, now_ns: int) -> Page | None:
        """What to read now; `took` follows."""
        if not self.wants(now_ns):
            return None
        if self._new:
            rows, size = self._make_way()
            return Page(True, self._row_read, (0, 0), self.reach_ns, rows, size)
        rows, size = self._room()
        return Page(False, 0, self._reach, now_ns + self._ahead_ns, rows, size)

    def took(self, page: Page, found: Sequence[StoredScheduled]) -> bool:
        """What was read; whether it is known now what is behind it. If not, ask when the first behind `reach_ns` is due, and
        say so by `nothing_before`."""
        for one in found:
            self._row_read = max(self._row_read, one.row)
            if one.row not in self._events and one.row not in self._begun:
                self._events[one.row] = one.event
                self._bytes += row_bytes(one.event.envelope)
                at = (one.event.due_ns, one.row)
                if page.new:
                    heappush(self._late, at)
                else:
                    self._line.append(at)
        if page.new:
            self._new = max(0, self._new - len(found)) if found else 0
            if not self._new:
                self._new_due_ns = 0
            return True
        if found:
            self._reach = (found[-1].event.due_ns, found[-1].row)
            self._beyond_ns = self._reach[0]  # perhaps
            return True
        self._reach = max(self._reach, (page.until_ns, _LAST_ROW))
        self._beyond_ns = self._reach[0]  # until it is known
        return False

    @property
    def reach_ns(self) -> int:
        """All that is due up to then is known."""
        due_ns, row = self._reach
        return due_ns if row == _LAST_ROW else due_ns - 1

    def nothing_before(self, due_ns: int) -> None:
        """The first one behind the reach is due then; 0: there is none."""
        self._beyond_ns = due_ns

    def wake_ns(self, now_ns: int) -> int:
        """When there is something to do that is not to be done now; 0: never."""
        head_ns = self._head_ns()
        times = [self._beyond_ns - self._early_ns if self._beyond_ns else 0]
        if head_ns:
            times += [head_ns, head_ns - MARK_EARLY_NS if head_ns > self._mark_ns else 0]
        return min((at for at in times if at > now_ns), default=0)

    # -- cancelling

    def withdraw(self, publisher: bytes, seq: int) -> bool:
        """Let an event not begin until `withdrawn`, which follows; False: it has begun."""
        if any((one.envelope.publisher, one.envelope.seq) == (publisher, seq) for one in self._begun.values()):
            return False
        self._leaving = (publisher, seq)
        return True

    def withdrawn(self, rows: Sequence[int]) -> bool:
        """These rows were removed; whether all of them were here."""
        self._leaving = None
        known = True
        for row in rows:
            event = self._events.pop(row, None)
            if event is None:
                known = False
            else:
                self._bytes -= row_bytes(event.envelope)
        for at in self._held_back:
            heappush(self._late, at)
        self._held_back.clear()
        return known

    # -- inside

    def _head(self) -> tuple[int, int] | None:
        """The first that has not begun."""
        line, late, events = self._line, self._late, self._events
        while line and line[0][1] not in events:
            line.popleft()
        while late and late[0][1] not in events:
            heappop(late)
        if not late:
            return line[0] if line else None
        return min(line[0], late[0]) if line else late[0]

    def _head_ns(self) -> int:
        head = self._head()
        return 0 if head is None else head[0]

    @property
    def _early_ns(self) -> int:
        """How long before it is due more is read: half of the time that it may be, so as to read seldom; all, to go on."""
        return self._ahead_ns // 2 if self._reach[1] == _LAST_ROW else self._ahead_ns

    def _room(self) -> tuple[int, int]:
        """Rows and bytes of bodies of a page that fit."""
        rows = max(0, min(PAGE_ROWS, self._rows_max - len(self._events) - len(self._begun)))
        return rows, max(0, min(PAGE_BYTES, self._bytes_max - self._bytes - ROW_OVERHEAD_BYTES * rows))

    @property
    def _has_room(self) -> bool:
        """Whether a page is worth its reading: a whole one fits, or nothing is here."""
        rows, size = self._room()
        return (rows == PAGE_ROWS and size == PAGE_BYTES) or not (self._events or self._begun)

    def _make_way(self) -> tuple[int, int]:
        """As `_room`; where a page is more, the later half of what could begin is left to the store again."""
        rows, size = self._room()
        if rows == PAGE_ROWS and size == PAGE_BYTES:
            return rows, size
        order = sorted(at for at in (*self._line, *self._late) if at[1] in self._events)
        keep = len(order) // 2
        if keep < len(order):
            self._beyond_ns = order[keep][0]
            self._reach = (order[keep][0], order[keep][1] - 1)
            for _, row in order[keep:]:
                self._bytes -= row_bytes(self._events.pop(row).envelope)
        self._line, self._late = deque(order[:keep]), []
        return self._room()
