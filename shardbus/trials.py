"""When suspects run, and what else does meanwhile: acts on what the quarantine decides.

A suspect's message is the head of a lane of its own while it waits: for its instant, for room among those that are tried at
once, or for silence, in which nothing else begins. Knows nothing of handlers; the leader runs what it lets run.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable
from typing import Final

from shardbus.clock import NowNs
from shardbus.inbound import Delivery
from shardbus.lane_book import Lane, LaneBook
from shardbus.quarantine import Convicted, Crowded, Hold, Identity, Quarantine, Run

_NS: Final = 1_000_000_000


class Trials:
    """The suspects of a shard that wait for their turn, or run in silence. Bounded by `SUSPECTS_MAX`.

    Args:
        clean: in whose copy timers run.
        wake: called when something may begin again.
    """

    def __init__(
        self,
        quarantine: Quarantine,
        book: LaneBook,
        now: NowNs,
        clean: contextvars.Context,
        wake: Callable[[], None],
    ) -> None:
        self.hush: asyncio.TimerHandle | None = None
        """While it is armed, nothing begins but a suspect that is to be alone."""
        self.solo: Lane | None = None
        """The lane of that one, until what was under way has ended."""
        self._soloist: tuple[Identity, float] | None = None  # that one, and for how many seconds
        self._quarantine = quarantine
        self._book = book
        self._now = now
        self._clean = clean
        self._wake = wake
        self._crowded: dict[int, deque[Lane]] = {}  # by its head's deaths: a suspect that waits for others
        self._closing = False

    def close(self) -> None:
        """Let nothing end its waiting any more."""
        self._closing = True
        if self.hush is not None:
            self.hush.cancel()

    def set_apart(self, delivery: Delivery) -> None:
        """A suspect's turn came in a batch: give it a lane, whose head runs when it may."""
        lane = self._book.open(delivery.key)
        self._book.put(lane, delivery)
        self._book.proceed(lane)

    def admit(self, lane: Lane, head: Delivery) -> Run | Convicted | None:
        """Whether a head that was taken from its lane may run now, or is not run any more; None: it is where it belongs."""
        if not head.is_event and not (head.extra is not None and head.extra.idempotent):
            return Run()  # it is never sent again, so it cannot be a suspect
        verdict = self._quarantine.admit(head.identity, self._now())
        match verdict:
            case Convicted():
                return verdict
            case Run(alone_s=alone_s) if not alone_s:
                return verdict
            case Run(alone_s=alone_s):
                self._book.put_back(lane, (head,))
                self.solo = lane
                self._soloist = (head.identity, alone_s)
                self._keep_silent(alone_s)
            case Crowded(deaths=deaths):
                self._book.put_back(lane, (head,))
                self._crowded.setdefault(deaths, deque()).append(lane)
            case Hold(delay_s=delay_s):
                head.due_ns = self._now() + int(delay_s * _NS)
                self._book.put_back(lane, (head,))
                self._book.proceed(lane)
        return None

    def begin_solo(self) -> tuple[Lane, Delivery]:
        """Nothing else is under way: take the soloist from its lane, to run it."""
        lane, self.solo = self.solo, None
        assert lane is not None
        assert self._soloist is not None
        self._keep_silent(self._soloist[1])
        return lane, self._book.take(lane)

    def ended(self, identity: Identity, *, for_good: bool) -> None:
        """A message's handlers have ended and the worker lives; so others may run."""
        if for_good:
            self._quarantine.clear(identity)
        else:
            self._quarantine.pause(identity)
        if self._soloist is not None and self._soloist[0] == identity:
            self._break_silence()
        self.release()

    def release(self) -> None:
        """Let suspects run that there is room for now."""
        room = self._quarantine.room()
        while room > 0 and self._crowded:
            worst = max(self._crowded)
            self._book.proceed(self._crowded[worst].popleft())
            if not self._crowded[worst]:
                del self._crowded[worst]
            room -= 1

    def _keep_silent(self, seconds: float) -> None:
        """Let nothing begin but the soloist, for so long: what else is under way when it dies may have done it."""
        if self.hush is not None:
            self.hush.cancel()
        if not self._closing:
            self.hush = asyncio.get_running_loop().call_later(seconds, self._break_silence, context=self._clean)

    def _break_silence(self) -> None:
        """Go on with everything; a soloist that still waits for the end of others begins beside them."""
        if self.hush is not None:
            self.hush.cancel()
        self.hush = self._soloist = None
        lane, self.solo = self.solo, None
        if lane is not None:
            self._book.proceed(lane)
        self._wake()
