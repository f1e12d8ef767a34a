"""When what a shard has scheduled is due: one timer for the earliest, and pages of the store when it rings.

Owns that timer, and how much of what is due may be on its way: scheduled events lie in the store, however many they are, and
only a page of them, and the lanes that they have made and not begun yet, are in memory. Times are the wall clock's, because
they outlive processes; `tick` looks at it, too, because it may be set forward.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Final

from shardbus.clock import NowNs
from shardbus.store import ScheduledEvent, Store, StoredScheduled, StoreError
from shardbus.store_writer import StoreWriter

_PAGE_ROWS: Final = 256
_PAGE_BYTES: Final = 1024 * 1024  # of their bodies
_WINDOW: Final = 1024  # lanes that due events have made and that have not begun; when full, what is due stays scheduled
_RUNNING_MAX: Final = 16_384  # that have begun and wait for something; above it, they count among the others
_AGAIN_S: Final = 1.0  # what cannot join its lane, because the store has no room for that, tries again
_TIMER_S_MAX: Final = 86_400.0  # event loops take no timer of years
_NEVER_NS: Final = 2**63 - 1
_NS: Final = 1_000_000_000

Identity = tuple[bytes, int]
Join = Callable[[ScheduledEvent, int, Callable[[], None]], tuple[int, bool] | None]
"""Have an event join the end of its lane, and its row too; call back once that is committed. Returns its position, and
whether it made the lane; None: it cannot join now."""


class Schedule:
    """The scheduled events of one shard. `start`, then `add`, `cancel` and `ended`; `close`.

    Its reads are the store writer's, behind what that writes.
    """

    def __init__(self, store: Store, writer: StoreWriter, wall: NowNs, join: Join) -> None:
        self.next_due_ns = 0
        """When the next one is due, since 1970; 0: there is none. Exact but while some are on their way."""
        self._store = store
        self._writer = writer
        self._wall = wall
        self._join = join
        self._timer: asyncio.TimerHandle | None = None
        self._looking = False
        self._again = False  # something that is due came while it looked
        self._stalled = False  # the window is full
        self._left_behind = False  # something could not join its lane
        self._after = (0, 0)  # how far this look has come
        self._leaving: dict[int, Identity] = {}  # rows that were read and are not committed as waiting yet
        self._made: set[int] = set()  # positions of those that have made lanes and have not begun; up to the window
        self._running: set[int] = set()
        self._closed = False
        self._clean = contextvars.copy_context()

    async def start(self) -> None:
        """Find the first. Before the writer runs, which is the store's only caller from then on."""
        self._expect(await self._store.next_due(0))

    def close(self) -> None:
        """Let nothing begin any more."""
        self._closed = True
        self._cancel_timer()

    def add(self, event: ScheduledEvent, then: Callable[[], None]) -> None:
        """Write an event; call `then` once it is committed."""

        def committed() -> None:
            then()
            self._expect(event.due_ns)

        self._writer.add_scheduled(event, committed)

    def begun(self, position: int) -> None:
        """The handlers of a waiting event begin: where it had made its lane, there is room for another."""
        if position in self._made and len(self._running) < _RUNNING_MAX:
            self._running.add(position)
            self._make_room(position)

    def ended(self, position: int) -> None:
        """A waiting event was handled, is dead, or waits again."""
        self._running.discard(position)
        self._make_room(position)

    def _make_room(self, position: int) -> None:
        if position in self._made:
            self._made.remove(position)
            if self._stalled and len(self._made) <= _WINDOW // 2:
                self._stalled = False
                self._look()

    def tick(self) -> None:
        """Look at the wall clock; call it about once a second."""
        if self._timer is not None and self.next_due_ns <= self._wall():
            self._ring()

    async def cancel(self, publisher: bytes, seq: int) -> bool:
        """Remove an event that is not due; False: it was, or there is none. To be called from a read of the writer's."""
        if (publisher, seq) in self._leaving.values() or not await self._writer.unschedule(publisher, seq):
            return False
        try:
            next_ns = await self._store.next_due(0)
        except StoreError:
            return True  # it is done; the timer rings for nothing, and looks then
        if not self._looking and not self._stalled:
            self.next_due_ns = 0
            self._cancel_timer()
            self._expect(next_ns)
        return True

    # -- inside

    def _expect(self, due_ns: int) -> None:
        """Something is due at that time (0: nothing)."""
        if not due_ns or self._closed:
            return
        if self._looking:
            self._again = True
        elif not self.next_due_ns or due_ns < self.next_due_ns:
            self.next_due_ns = due_ns
            self._cancel_timer()
            if not self._stalled:  # else it looks when there is room
                self._arm((due_ns - self._wall()) / _NS)

    def _arm(self, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(min(max(0.0, delay_s), _TIMER_S_MAX), self._ring, context=self._clean)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._cancel_timer()
        wait_ns = self.next_due_ns - self._wall()
        if wait_ns > 0:  # the clock was set back, or the timer could not be that long
            self._arm(wait_ns / _NS)
        else:
            self._look()

    def _look(self) -> None:
        if self._looking or self._closed:
            return
        self._looking = True
        self._again = self._left_behind = False
        self._after = (0, 0)
        self._writer.add_read(self._read, behind_writes=True)

    async def _read(self) -> None:
        """A page of what is due; one page between two transactions, so that what was read is written first."""
        if self._closed:
            return
        now_ns = self._wall()
        limit = min(_PAGE_ROWS, _WINDOW - len(self._made))
        page = await self._store.due(now_ns, self._after, limit, _PAGE_BYTES) if limit > 0 else []
        for found in page:
            self._after = (found.event.due_ns, found.row)
            if found.row not in self._leaving:
                self._begin(found)
        if page and len(self._made) < _WINDOW:
            self._writer.add_read(self._read, behind_writes=True)
            return
        next_ns = await self._store.next_due(now_ns)
        self._looking = False
        self.next_due_ns = next_ns
        if len(self._made) >= _WINDOW:
            self._stalled = True
            self.next_due_ns = now_ns
        elif self._again:
            self._look()
        elif self._left_behind:
            self.next_due_ns = now_ns
            self._arm(_AGAIN_S if not next_ns else min(_AGAIN_S, (next_ns - now_ns) / _NS))
        elif next_ns:
            self._arm((next_ns - now_ns) / _NS)

    def _begin(self, found: StoredScheduled) -> None:
        def committed() -> None:
            del self._leaving[found.row]

        envelope = found.event.envelope
        self._leaving[found.row] = (envelope.publisher, envelope.seq)
        joined = self._join(found.event, found.row, committed)
        if joined is None:
            del self._leaving[found.row]
            self._left_behind = True
            return
        position, made_lane = joined
        if made_lane:
            self._made.add(position)
