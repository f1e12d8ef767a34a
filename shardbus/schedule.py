"""When what a shard has scheduled is due: reads of the store ahead of that, and one timer.

Owns that timer. What is to be read, and what may begin, is decided in `lookahead`. Times are the wall clock's, because they
outlive processes; `tick` looks at it, too, because it may be set forward.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from shardbus.clock import NowNs
from shardbus.config import Limits
from shardbus.lookahead import LookAhead
from shardbus.store import ScheduledEvent, Store, StoredScheduled, StoreError
from shardbus.store_writer import StoreWriter

_SOON_NS: Final = 10_000_000  # rows of what has ended wait for those of what is due so soon
_REST_NS: Final = 50_000_000  # but no longer
_TIMER_S_MAX: Final = 86_400.0  # event loops take no timer of years
_NS: Final = 1_000_000_000


class Schedule:
    """The scheduled events of one shard. `start`, then `add`, `cancel`, and `take` as `wake` says; `close`.

    Whatever was taken has `ended`, and then `remove` or `gone` is called for its row. Reads are the store writer's, behind
    what that writes.
    """

    def __init__(self, store: Store, writer: StoreWriter, limits: Limits, wall: NowNs, wake: Callable[[], None]) -> None:
        self._store = store
        self._writer = writer
        self._wall = wall
        self._wake = wake
        self._ahead = LookAhead(limits)
        self._timer: asyncio.TimerHandle | None = None
        self._reading = False
        self._marking = False
        self._more = False  # something was taken, and more is to be, soon
        self._hurried_ns = 0
        self._closed = False
        writer.when_left(self._left)
        self._clean = contextvars.copy_context()

    async def start(self) -> None:
        """Find the first. Before the writer runs, which is the store's only caller from then on; then call `tick`."""
        state = await self._store.schedule_state()
        self._ahead.begin(state.next_due_ns, state.row_max, state.begun_until_ns)

    def close(self) -> None:
        """Let nothing begin any more."""
        self._closed = True
        self._cancel_timer()
        self._rest()

    @property
    def next_due_ns(self) -> int:
        """When the next one is due that has not begun, since 1970; 0: there is none."""
        return self._ahead.next_due_ns

    @property
    def begun(self) -> int:
        """How many have begun whose rows are not gone."""
        return self._ahead.begun

    def add(self, event: ScheduledEvent, then: Callable[[], None]) -> None:
        """Write an event; call `then` once it is committed."""

        def committed() -> None:
            then()
            if self._ahead.stored(event.due_ns):
                self._go_on()

        self._write_mark(self._ahead.mark_for(event.due_ns, self._wall()))  # in one transaction with it
        self._writer.add_scheduled(event, committed)

    def take(self) -> tuple[StoredScheduled, bool] | None:
        """The next event that is due, and whether it may have begun before; None: there is none now."""
        now_ns = self._wall()
        taken = None if self._closed else self._ahead.take(now_ns)
        if taken is not None:
            self._more = True
            return taken
        next_ns = self._ahead.next_due_ns
        if not 0 < next_ns - now_ns < _SOON_NS or now_ns - self._hurried_ns > _REST_NS:
            self._hurried_ns = now_ns
            self._rest()
        self._go_on()
        return None

    def ended(self, row: int) -> None:
        """The handlers of an event have ended, or its lane goes to the store."""
        if self._ahead.ended(row):
            self._go_on()

    def remove(self, row: int) -> None:
        """An event has reached its outcome: remove its row, soon."""
        self.ended(row)
        self._writer.add_leaving(row, more=self._more)

    def gone(self, row: int) -> None:
        """Its row is gone."""
        self._left((row,))

    def tick(self) -> None:
        """Look at the wall clock; call it about once a second."""
        self._writer.hurry()
        self._go_on()

    async def cancel(self, publisher: bytes, seq: int) -> bool:
        """Remove an event that has not begun; False: it has, or there is none. To be called from a read of the writer's.

        Raises:
            StoreError: it was not removed.
        """
        if not self._ahead.withdraw(publisher, seq):
            return False
        rows: list[int] | None = None
        try:
            rows = await self._writer.unschedule(publisher, seq)
        finally:
            known = self._ahead.withdrawn(rows or ())
            self._go_on()
        if not known:
            try:
                self._ahead.nothing_before(await self._store.next_due(self._ahead.reach_ns))
            except StoreError:
                pass  # it is done; the timer rings for nothing, and looks then
        return rows is not None

    # -- inside

    def _left(self, rows: Sequence[int]) -> None:
        if self._ahead.gone(rows):
            self._go_on()

    def _rest(self) -> None:
        """Nothing more is taken for now: what has ended goes at once."""
        self._more = False
        self._writer.hurry()

    def _go_on(self) -> None:
        """Do what is to be done now, and set the timer for the rest."""
        if self._closed:
            return
        now_ns = self._wall()
        if not self._reading and self._ahead.wants(now_ns):
            self._reading = True
            self._writer.add_read(self._read)
        self._write_mark(self._ahead.mark_wanted(now_ns))
        if self._ahead.is_due(now_ns):
            self._wake()
        self._cancel_timer()
        wake_ns = self._ahead.wake_ns(now_ns)
        if wake_ns:
            delay_s = min((wake_ns - now_ns) / _NS, _TIMER_S_MAX)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._ring, context=self._clean)

    def _ring(self) -> None:
        self._timer = None
        self._go_on()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _write_mark(self, mark_ns: int) -> None:
        if mark_ns and not self._marking:
            self._marking = True
            self._writer.add_mark(mark_ns, partial(self._marked, mark_ns))

    def _marked(self, mark_ns: int) -> None:
        self._marking = False
        self._ahead.marked(mark_ns)
        self._go_on()

    async def _read(self) -> None:
        """A page; one between two transactions, so that others are not held up."""
        page = None if self._closed else self._ahead.page(self._wall())
        if page is not None:
            if page.new:
                found = await self._store.due_above(page.above, page.until_ns, page.rows, page.bytes)
            else:
                found = await self._store.due(page.until_ns, page.after, page.rows, page.bytes)
            if not self._ahead.took(page, found):
                self._ahead.nothing_before(await self._store.next_due(self._ahead.reach_ns))
        self._reading = False
        self._go_on()
