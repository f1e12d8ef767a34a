"""The sessions of one shard: makes the state of each when a handler first asks for it, ends it in the key's lane, and
publishes the ends of those whose client does not.

What ends is decided in `session_table`. The end of an idle session, or of one whose client is gone, is published as what a
handler publishes, so it takes its place in the key's lane, and everybody who follows `SessionEnded` sees it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from shardbus.cancellation import is_own_cancellation, uncancel
from shardbus.clock import NowNs
from shardbus.config import Limits
from shardbus.errors import ShardbusError, UsageError
from shardbus.messages import WireKey, wire_name
from shardbus.outgoing import Children, Outgoing
from shardbus.registry import StateMaker, StateOf
from shardbus.session_events import SessionEnded, SessionKept, SessionStarted
from shardbus.session_table import SessionTable
from shardbus.tracebacks import log_error
from shardbus.wording import counted

log = logging.getLogger("shardbus.sessions")

_NS: Final = 1_000_000_000
_STARTED: Final = wire_name(SessionStarted)
_KEPT: Final = wire_name(SessionKept)
_decode_kept: Final = msgspec.msgpack.Decoder(SessionKept).decode
_LOOK_S_MAX: Final = 86_400.0  # not every event loop has timers for years
_AGAIN_S: Final = 1.0  # after which an end is published again that could not be
_PUBLISHED_A_TURN: Final = 64  # ends, before the event loop has a turn
_ENDS_AT_A_TIME: Final = 64  # of a worker that ends


class _Ends:
    """What the ends that are published here are the children of; see `outgoing.Origin`."""

    def __init__(self) -> None:
        self.children: Children | None = None
        self.runs = "shardbus.sessions"


class _State:
    """A state that is open."""

    __slots__ = ("_generator", "value")

    def __init__(self, generator: StateOf, value: Any) -> None:
        self._generator = generator
        self.value = value

    async def end(self) -> None:
        """Run what stands behind the `yield`. Raises what that raises."""
        try:
            await anext(self._generator)
        except StopAsyncIteration:
            return
        await self._generator.aclose()
        raise UsageError("it yields twice; a session has one state")

    async def drop(self) -> None:
        """End it without that: as where it is thrown away."""
        await self._generator.aclose()


class SessionStates:
    """The sessions of one shard, and their states.

    Args:
        maker: how the application makes a state; None: it has none.
        outgoing: through which ends are published; None: none are.
    """

    def __init__(self, maker: StateMaker | None, limits: Limits, now: NowNs, outgoing: Outgoing | None) -> None:
        self._maker = maker
        self._now = now
        self._outgoing = outgoing
        self._silence_ns = int(limits.session_silence_s * _NS)
        self._table = SessionTable(limits.session_states_max, 0 if maker is None else int(maker.idle_s * _NS))
        self._states: dict[str, _State] = {}  # of sessions that the table has
        self._opening: dict[str, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._origin = _Ends()
        self._due: deque[SessionEnded] = deque()  # not more than there are sessions
        self._publishing: asyncio.Task[None] | None = None
        self._resting = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clean: contextvars.Context | None = None

    def __len__(self) -> int:
        return len(self._table)

    def start(self) -> None:
        """Belong to the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._clean = contextvars.copy_context()  # what is started is not to run with the variables of a handler

    # -- handlers

    async def state(self, key: WireKey) -> Any:
        """The state of the session of a key, made if there is none. Its lane waits for the caller.

        Raises:
            UsageError: the application has no state, the key is none that a session has, or this is not the worker's event
                loop; else whatever makes it raises, and then there is none.
        """
        maker = self._maker
        if maker is None:
            raise UsageError("context.session(): this application says nowhere what a session's state is; use @bus.session")
        if not isinstance(key, str):
            told = "no key" if key is None else f"the key {key!r}"
            raise UsageError(f"context.session(): this message has {told}; a session's key is a text")
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError("context.session() is for `async def` handlers, in the worker's event loop, not its threads")
        while (state := self._states.get(key)) is None:
            opening = self._opening.get(key)
            if opening is None:
                state = await self._open(maker, key)
                break
            await asyncio.wait([opening])  # where that fails, the next makes it
        self._table.used(key, self._now())
        self._look_soon()
        return state.value

    async def _open(self, maker: StateMaker, key: str) -> _State:
        """Make a state, in the task of who asks: if that is cancelled, so is this, and there is none."""
        assert self._loop is not None
        opening = self._opening[key] = self._loop.create_future()
        try:
            generator = maker.make(key)
            try:
                value = await anext(generator)
            except StopAsyncIteration:
                raise UsageError(f"{maker.name} made no state of the session {key!r}: it ended before its yield") from None
            state = self._states[key] = _State(generator, value)
            return state
        finally:
            del self._opening[key]
            opening.set_result(None)

    async def concluded(self, name: str, key: WireKey, publisher: bytes, seq: int, body: bytes) -> None:
        """All handlers of an event of a session have ended: note who has it open; where that is nobody any more, end its
        state. Raises what that raises; the state is gone all the same."""
        if not isinstance(key, str):
            return
        if name == _STARTED:
            self._table.started(key, publisher, seq, self._now())
            self._look_soon()
        elif name == _KEPT:
            self._table.kept(key, publisher, seq, _decode_kept(body).times, self._now())
            self._look_soon()
        elif self._table.ended(key, publisher, self._now()):
            await self._end(key)

    async def _end(self, key: str) -> None:
        while (opening := self._opening.get(key)) is not None:  # by a task that its handler has left behind
            await asyncio.wait([opening])
        state = self._states.pop(key, None)
        if state is not None:
            await state.end()

    def failed(self, key: WireKey, error: BaseException) -> None:
        """The end of a session's state has raised."""
        log_error(log, error, "the end of the session %r failed; its state is gone", key)

    # -- what ends by itself

    @property
    def has_openers(self) -> bool:
        """Whether a client has a session open here."""
        return self._table.has_openers

    @property
    def pending(self) -> bool:
        """Whether ends that were published here are not handled yet."""
        children = self._origin.children
        return bool(self._due) or self._publishing is not None or (children is not None and bool(children.pending))

    def tick(self, heard: Callable[[bytes], int | None]) -> None:
        """End the sessions of publishers that are gone; `heard` is as for `SessionTable.silent`."""
        if self._table.has_openers and not self._resting:
            self._publish(self._table.silent(heard, self._now() - self._silence_ns))

    def rest(self) -> None:
        """The worker drains: nothing more ends by itself."""
        self._resting = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_soon(self) -> None:
        """A session was used: those that it crowds out end now, and the first that is idle in its time."""
        if self._resting:
            return
        self._publish(self._table.crowded())
        due_ns = self._table.next_idle_ns if self._timer is None else 0
        if due_ns:
            assert self._loop is not None
            wait_s = min(max(0.0, (due_ns - self._now()) / _NS), _LOOK_S_MAX)
            self._timer = self._loop.call_later(wait_s, self._look, context=self._clean)

    def _look(self) -> None:
        self._timer = None
        self._publish(self._table.idle(self._now()))
        self._look_soon()

    def _publish(self, ends: Sequence[SessionEnded]) -> None:
        if not ends or self._outgoing is None:
            return
        self._due.extend(ends)
        if self._publishing is None:
            assert self._loop is not None
            assert self._clean is not None
            work = self._publish_due(self._outgoing)
            self._publishing = self._loop.create_task(work, name="session ends", context=self._clean.copy())

    async def _publish_due(self, outgoing: Outgoing) -> None:
        try:
            published = 0
            while self._due:
                try:
                    await outgoing.publish((self._due[0],), {}, self._origin)
                except ShardbusError as error:  # the bus is out of reach, or takes no more of what handlers publish
                    log.warning("sessions that have ended cannot be told yet: %d (%s)", len(self._due), error)
                    await asyncio.sleep(_AGAIN_S)
                    continue
                self._due.popleft()
                published += 1
                if published % _PUBLISHED_A_TURN == 0:
                    await asyncio.sleep(0)
        finally:
            self._publishing = None

    # -- the end of the worker

    async def close(self, timeout_s: float) -> int:
        """Run the ends of all states that are open, many at a time; returns how many there was no time for.

        Nothing of the lanes may run any more.
        """
        await self._stop()
        tasks = [asyncio.ensure_future(self._end_all()) for _ in range(min(_ENDS_AT_A_TIME, len(self._states)))]
        left = 0
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            left = len(late) + len(self._states)
            self._states.clear()  # first: whatever an end makes of its cancellation, no other is begun
            await self._give_up(late)
        if left:
            log.error("of %s the end was not run: there was no time for it (%g s)", counted(left, "session"), timeout_s)
        return left

    async def abort(self) -> None:
        """Let go of all states, as a killed worker does."""
        await self._stop()
        for state in self._states.values():
            try:
                await state.drop()
            except BaseException as error:  # the application's
                if is_own_cancellation(error):
                    raise
            uncancel(asyncio.current_task())
        self._states.clear()

    async def _stop(self) -> None:
        self.rest()
        if self._publishing is not None:
            await self._give_up({self._publishing})
        self._due.clear()

    async def _end_all(self) -> None:
        while self._states:
            key = next(iter(self._states))
            try:
                await self._end(key)
            except BaseException as error:  # the application's; SystemExit, too, must not end all others
                if is_own_cancellation(error):
                    raise
                self.failed(key, error)
            uncancel(asyncio.current_task())

    @staticmethod
    async def _give_up(tasks: set[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
