"""The publisher's side of a bus: what programs call, and the connections to the workers that the supervisor names.

Owns a client's life, its channels and what comes back through them. What is published waits in `outboxes`, commands are in
`calls`, questions in `questions`. Carried by a `Connector`, which opens channels to addresses and knows nothing of what they
carry; `zmq_transport` has one, and so has `local`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from functools import partial
from itertools import repeat
from types import TracebackType
from typing import Any, Final, NoReturn, TypeVar, cast
from uuid import UUID

import msgspec

from shardbus.arguments import check_seconds
from shardbus.calls import Calls
from shardbus.clock import NowNs, monotonic_ns, wall_ns
from shardbus.config import DEFAULT_LIMITS, Limits
from shardbus.dead_letters import DeadLetter, DeadLetterFilter
from shardbus.errors import (
    BusRejected,
    BusUnreachable,
    ClientClosed,
    ConfigError,
    MessageTooLarge,
    NotDelivered,
    OutboxFull,
    RemoteProtocolError,
    UsageError,
)
from shardbus.gate import Gate
from shardbus.messages import Command, Event, WireKey, to_wire_key
from shardbus.metrics import Evidence
from shardbus.outboxes import (
    SMALL_BYTES,
    Bound,
    Channel,
    Connector,
    Ledger,
    OnFull,
    Outbox,
    Outboxes,
    Statistics,
    check_full,
    publishers_bound,
)
from shardbus.packing import (
    UNENCODABLE,
    Packed,
    Packing,
    Part,
    cannot_encode,
    check_stamp,
    deadline_ns,
    encode,
    events_of,
    packed_parts,
    packed_stamps,
    sound_headers,
    tell_which,
)
from shardbus.questions import Questions
from shardbus.routing import ShardAddress, Table
from shardbus.scheduled_events import CANCEL, Scheduled, decode_cancelled, due_ns, encode_cancel, event_of, scheduled
from shardbus.sessions import OpenSessions, Session
from shardbus.streams import Stream
from shardbus.subscriptions import OnSlow, Subscription, Subscriptions
from shardbus.wire.codec import Extra
from shardbus.wire.frames import (
    REASONS,
    Answer,
    Ask,
    Feed,
    Items,
    Subscribed,
    TableChanged,
    ToListener,
    Unsubscribed,
    Welcome,
    decode_to_client,
    decode_to_publisher,
    encode_frame,
)
from shardbus.wire.session import Lost, PublisherSession, Rejected, Replied, State
from shardbus.wording import counted

log = logging.getLogger("shardbus.client")

ReplyT = TypeVar("ReplyT")
EventT = TypeVar("EventT", bound=Event)

_TICK_S: Final = 0.1
_SILENT_TICKS_MAX: Final = 30  # a bus is asked once a second; one that says nothing for so long is gone
_MALFORMED_MAX: Final = 3  # a worker that calls our frames unsound more often than that is not one of ours
_NS: Final = 1_000_000_000

_decode_table: Final = msgspec.msgpack.Decoder(Table).decode


class _Lines:
    """The shards, as subscriptions see the client."""

    def __init__(self, outboxes: Outboxes) -> None:
        self._outboxes = outboxes

    def route(self, key: WireKey) -> list[int]:
        return [outbox.shard for outbox in self._outboxes] if key is None else [self._outboxes.shard_of(key)]

    def line(self, shard: int) -> tuple[bytes, Callable[[bytes], object]] | None:
        outbox = self._outboxes[shard]
        if outbox.session.state is not State.OPEN:
            return None
        return outbox.session.epoch, lambda frame: self._outboxes.send(outbox, frame)


class Client:
    """Publishes events and executes commands. Made by `shardbus.connect` and `Bus.local`; use it in their block.

    One client belongs to the event loop that opened it, and its calls raise `UsageError` in another one or another thread
    (`publish`, whose price is what is paid for each event, looks once a turn of the loop); threads share a client of
    `shardbus.blocking`. Its events of one key are handled in the order of their `publish` calls.
    """

    def __init__(
        self,
        address: str,
        connector: Connector,
        control_address: str,
        *,
        limits: Limits = DEFAULT_LIMITS,
        now: NowNs = monotonic_ns,
        wall: NowNs = wall_ns,
        publisher: bytes | None = None,
        on_full: OnFull = "wait",
        on_pressure: Callable[[bool], object] | None = None,
        bound: Bound | None = None,
        ticks: bool = True,
    ) -> None:
        check_full(on_full, on_pressure)
        self.address = address
        self.publisher = os.urandom(16) if publisher is None else publisher
        """The identity of this client as a publisher; 16 bytes. Another one when the bus comes back with other shards."""
        self._connector = connector
        self._control_address = control_address
        self._limits = limits
        self._now = now
        self._wall = wall
        self._gate = Gate()
        self._outboxes = Outboxes(
            self._gate,
            limits,
            publishers_bound(limits) if bound is None else bound,
            self._make_session,
            on_full=on_full,
            on_pressure=on_pressure,
            now=now,
        )
        self._outbox_of = self._outboxes.by_key
        self._packing = Packing(limits, self._outbox_of, self._gate.check)
        self._routes = self._packing.events
        self._calls = Calls(self._gate, self._outboxes, self._packing, limits)
        self._questions = Questions(self._gate, self._outboxes, self._to_supervisor, address, wall)
        self._table: Table | None = None
        self._subscriptions = Subscriptions(_Lines(self._outboxes), limits)
        self._open_sessions = OpenSessions()
        self._published = 0
        self._control: Channel | None = None
        self._ticks = ticks
        self._ticker: asyncio.Task[None] | None = None
        self._table_wanted = True
        self._table_asked_ns = -(2**63)
        self._silent_ticks = 0  # since the bus was heard; by ticks, so that a program that blocks its loop blames nobody
        self._told_silent = False

    # -- life

    async def start(self, timeout_s: float, *, workers: bool = True) -> None:
        """Find the bus, and at least one worker of it; not `workers`: its supervisor will do.

        Raises:
            BusUnreachable: nobody answered in time.
            BusRejected: somebody answered, and said no.
        """
        self._gate.loop()  # it belongs to this one
        self._control = self._connector.open(self._control_address, self._on_control)
        if self._ticks:
            self._ticker = asyncio.get_running_loop().create_task(self._tick_for_ever(), name="shardbus-client-ticker")
        else:
            self.tick()
        try:
            async with asyncio.timeout(timeout_s):
                while self._table is None or (workers and not any(shard.epoch for shard in self._table.shards)):
                    await self._gate.wait_for_progress()
        except TimeoutError:
            await self.abort()
            raise BusUnreachable(self.address, timeout_s) from None
        except BaseException:
            await self.abort()
            raise

    async def close(self, timeout_s: float) -> None:
        """Flush, say good-bye, and let go.

        Raises:
            NotDelivered: events were left when the time was up.
        """
        try:
            if not self._gate.is_closed:
                self._gate.begin_closing()
                self._outboxes.pause()
                self._calls.end_streams()
                await self._flush(timeout_s)
        finally:
            await self.abort()

    async def abort(self) -> None:
        """Let go at once. What is unfinished is forgotten here; it may or may not be handled."""
        if self._gate.is_closed:
            return
        self._gate.close()
        if self._ticker is not None:
            self._ticker.cancel()
        self._outboxes.pause()
        for outbox in self._outboxes:
            for frame in outbox.session.leave():
                self._outboxes.send(outbox, frame)
            if outbox.channel is not None:
                outbox.channel.close()
        self._subscriptions.end(ClientClosed("the client was closed, and its subscriptions with it"))
        self._calls.fail(ClientClosed("the client was closed while the command was under way"))
        self._questions.fail(ClientClosed("the client was closed while the question was under way"))
        if self._control is not None:
            self._control.close()
        self._connector.close()
        self._gate.made_progress()
        if self._ticker is not None:  # last: whoever waits here may be cancelled
            await asyncio.wait([self._ticker])

    # -- events

    async def publish(
        self,
        event: Event,
        *,
        headers: dict[str, str] | None = None,
        deadline: float | None = None,
        ordinal: int = 0,
        intended_ns: int = 0,
        at: datetime | float | None = None,
        delay: float | None = None,
    ) -> None:
        """Publish an event: put it into its shard's outbox, and wait for room where that is full. Never drops.

        When this returns, the event will be handled, become a dead letter or wait in the shard's store, through any crash of
        workers or supervisor, while this client lives. If it is cancelled or raises, nothing was published.

        Args:
            event: any event; its key says where it goes.
            headers: text for the handlers' `context.headers`; up to 26 of them, a name with its value up to 4 KiB.
            deadline: seconds from this call after which it is too late: an event whose handlers have not begun by then, also
                for a retry, becomes a dead letter with the reason `expired`. Default: never.
            ordinal: for load generators: the number of this event among this client's events of its key, from 1.
            intended_ns: for load generators: the `time.monotonic_ns()` at which it should have been published; the shard
                measures the latency from there.
            at: not before then: a datetime with its zone, or seconds since 1970. See `schedule`, which can be cancelled.
            delay: likewise, seconds from now. Neither goes with a `deadline`.

        Raises:
            InvalidKey: the key's value cannot be one.
            OutboxFull: there is no room, and the client was connected with `on_full="reject"`.
            MessageTooLarge: the encoded event is above the limit.
            UsageError: not an event, or a value in it cannot be encoded.
            ClientClosed: the client was closed.
        """
        if at is not None or delay is not None:
            if ordinal or intended_ns:
                raise UsageError("an event with stamps cannot be scheduled: they say when it should be handled at once")
            if deadline is not None:
                raise UsageError("an event is either scheduled or has a deadline: give at=… or delay=…, or deadline=…")
            await self.schedule(event, at=at, delay=delay, headers=headers)
            return
        route = self._routes.get(event.__class__)
        if route is None:
            route = self._packing.learn_event(event)
        try:
            body = encode(event)
        except UNENCODABLE as error:
            raise cannot_encode(route, error) from error
        key: Any = None
        if route.key_of is not None:
            key = route.key_of(event)
            if key.__class__ is not route.key_class:
                key = to_wire_key(key)
            outbox = self._outbox_of.get(key) or self._outboxes.place(key)
        else:
            outbox = self._outboxes.keyless
        size = len(body)
        if headers is not None:
            headers, more_bytes = sound_headers(headers, self._limits)
            size += SMALL_BYTES + more_bytes  # what has headers is always counted
        end_ns = 0 if deadline is None else self._now() + deadline_ns(deadline)
        if ordinal or intended_ns:
            check_stamp(ordinal)
            check_stamp(intended_ns)
        if len(body) > self._limits.event_bytes_max:
            raise MessageTooLarge(route.name, len(body), self._limits.event_bytes_max)
        if outbox.paused:
            await self._outboxes.wait_for_room(outbox)
            outbox = self._outboxes.present(outbox, key)
        if not outbox.dirty:
            self._outboxes.mark(outbox)
        if size > SMALL_BYTES:
            self._outboxes.weigh(outbox, size)
        batch = outbox.batch
        batch.add(route.name, key, body)
        if ordinal or intended_ns:
            batch.stamp(ordinal, intended_ns)
        if headers or end_ns:
            left_ns = max(1, end_ns - self._now()) if end_ns else 0
            batch.extras.append(Extra(len(batch) - 1, headers or {}, 0, False, left_ns))
        self._published += 1
        if len(batch) >= self._limits.batch_events_max:
            self._outboxes.seal(outbox)

    async def publish_many(
        self,
        events: Sequence[Event],
        *,
        headers: dict[str, str] | None = None,
        deadline: float | None = None,
        ordinals: Sequence[int] | None = None,
        intended_ns: Sequence[int] | None = None,
    ) -> None:
        """Publish events one after another, as `publish` does, at a lower cost for each.

        Headers and a deadline, in seconds from this call, are those of every event, which then costs what `publish` does.
        Stamps, where given, are one for each event. If an event cannot be published, those before it have been, those behind
        it have not, and the error is that event's and says which it is. Cancelled while it waits for room, it has published
        a prefix.

        Raises:
            UsageError: stamps that are not one for each event, or none at all; else as for `publish`.
        """
        self._gate.check_here()  # else that were the error of an event
        if not isinstance(events, list | tuple):
            events = events_of(events)
        total = len(events)
        for stamps in (ordinals, intended_ns):
            if stamps is not None and len(stamps) != total:
                raise UsageError(f"{total} events and {len(stamps)} stamps; give one for each event, or none")
        all_ordinals, all_instants = packed_stamps(ordinals), packed_stamps(intended_ns)
        if headers is not None or deadline is not None:
            await self._publish_each(events, headers, deadline, all_ordinals, all_instants)
            return
        step = self._limits.batch_events_max
        for at in range(0, total, step):
            chunk = events[at : at + step]
            ordinals = None if all_ordinals is None else all_ordinals[at : at + step]
            instants = None if all_instants is None else all_instants[at : at + step]
            parts = self._parts_of(chunk)
            if parts is not None and await self._outboxes.wait_for_room_in([part.target for part in parts]):
                for part in parts:
                    self._outboxes.append(part, ordinals, instants)
                self._published += len(chunk)
                continue
            for event, ordinal, instant in zip(chunk, ordinals or repeat(0), instants or repeat(0), strict=False):
                try:
                    await self.publish(event, ordinal=ordinal, intended_ns=instant)
                except (UsageError, OutboxFull) as error:
                    tell_which(error, at, total, event)
                    raise
                at += 1

    async def _publish_each(
        self,
        events: Sequence[Event],
        headers: dict[str, str] | None,
        deadline: float | None,
        ordinals: Sequence[int] | None,
        instants: Sequence[int] | None,
    ) -> None:
        """What `publish_many` does where each event has more than itself."""
        end_ns = None if deadline is None else self._now() + deadline_ns(deadline)
        each = zip(events, ordinals or repeat(0), instants or repeat(0), strict=False)
        for at, (event, ordinal, instant) in enumerate(each):
            left = None if end_ns is None else max(1, end_ns - self._now()) / _NS
            try:
                await self.publish(event, headers=headers, deadline=left, ordinal=ordinal, intended_ns=instant)
            except (UsageError, OutboxFull) as error:
                tell_which(error, at, len(events), event)
                raise

    def pack(self, event: Event, headers: dict[str, str] | None = None) -> Packed:
        """Check an event and encode it, for `publish_packed`. Any thread may call it. Raises as `publish` does."""
        return self._packing.pack(event, headers)

    def publish_packed(self, events: Iterable[Packed]) -> None:
        """Put events into their outboxes at once, also into full ones, and also when the bus has refused this client.

        For who gave their publishers a promise already; whoever calls it looks at `has_room` before, and bounds how many.
        """
        appended = self._outboxes.appended
        for name, key, body, headers, size_bytes in events:
            if key is None:
                outbox = self._outboxes.keyless
            else:
                outbox = self._outbox_of.get(key) or self._outboxes.remember(key)
            size = size_bytes if headers is None else SMALL_BYTES + size_bytes  # what has headers is always counted
            if size > SMALL_BYTES:
                self._outboxes.weigh(outbox, size)
            batch = outbox.batch
            batch.add(name, key, body)
            if headers is not None:
                batch.extras.append(Extra(len(batch) - 1, headers, 0, False))
            self._published += 1
            appended(outbox)

    def has_room(self) -> bool:
        """Whether no outbox is full."""
        return self._outboxes.has_room()

    def _parts_of(self, chunk: Sequence[Event]) -> list[Part[Outbox]] | None:
        """Events of one keyed type, encoded outbox by outbox; None where they are not such, or one of them is not sound."""
        found = self._packing.alike(chunk)
        if found is None:
            return None
        route, keys = found
        try:
            outboxes = list(map(self._outbox_of.get, keys))
            distinct = set(outboxes)
            if None in distinct:
                outboxes = [self._outbox_of.get(key) or self._outboxes.place(key) for key in keys]
                distinct = set(outboxes)
            parts = packed_parts(route, chunk, keys, cast(list[Outbox], outboxes), cast(set[Outbox], distinct))
        except Exception:  # one of them cannot be published: one at a time finds which, behind those before it
            return None
        if any(len(part.bodies) > self._limits.batch_bytes_target for part in parts):
            return None
        return parts

    async def flush(self, timeout: float | None = None) -> Ledger:
        """Wait until every event published so far is handled, dead or waiting; return the counts.

        Commands whose callers wait for their replies are waited for as well, up to `timeout` seconds.

        Raises:
            NotDelivered: `timeout` seconds were not enough for the events.
            BusRejected: the bus has refused this client for good.
        """
        self._gate.check_here()
        if timeout is not None:
            check_seconds("timeout", timeout, zero=True)
        return await self._flush(timeout)

    async def _flush(self, timeout: float | None) -> Ledger:
        goals = []
        for outbox in self._outboxes:
            if len(outbox.batch):
                self._outboxes.seal(outbox)
            goals.append((outbox, outbox.session.next_seq))
            if not outbox.is_flushed(outbox.session.next_seq):
                outbox.session.hurry()
            self._outboxes.pump(outbox)
        waited_s = 0.0
        try:
            async with asyncio.timeout(timeout):
                while not (self._gate.is_closed or all(outbox.is_flushed(goal) for outbox, goal in goals)):
                    await self._gate.wait_for_progress()
        except TimeoutError:
            waited_s = timeout or 0.0
        if late := sum(outbox.unfinished_events(goal) for outbox, goal in goals):
            raise NotDelivered(late, waited_s)
        return self.ledger()

    def ledger(self) -> Ledger:
        """What became of this client's events so far, as far as it has heard."""
        return self._outboxes.ledger(self._published)

    def statistics(self) -> Statistics:
        """The ledger, what publishing waited for, and what is held for each shard."""
        return self._outboxes.statistics(self._published)

    # -- subscriptions

    def subscribe(
        self,
        *event_types: type[EventT],
        key: str | int | bytes | UUID | None = None,
        queue_events_max: int = 1024,
        on_slow: OnSlow = "drop_oldest",
    ) -> Subscription[EventT]:
        """Follow events of these types as they are handled: `async for event in client.subscribe(OrderShipped)`.

        An event comes once all its handlers have ended well, in the order of its key; dead letters do not come. There is no
        history, and nothing waits for a reader: where events were left out, a `Missed` says so in their place. After one
        whose count is None a worker was replaced, and an event may also come a second time, as its handlers see it.
        Leaving the loop unsubscribes. `async with client.subscribe(…) as events` begins when the workers have confirmed it,
        so what is published in the block comes.

        Args:
            *event_types: one or several types that the application handles.
            key: events of this key only; default: of all keys.
            queue_events_max: how many events wait for the reader here, up to 16 MiB.
            on_slow: what happens then. `"drop_oldest"`: the oldest make room, and are told as `Missed`. `"disconnect"`: the
                subscription ends with `SubscriptionLost`, behind what is waiting.

        Raises:
            UsageError: no event types, a bound or policy that is none, or more subscriptions than a client may have.
            InvalidKey, ClientClosed: as for `publish`.
        """
        self._gate.check_here()
        wire_key = None if key is None else to_wire_key(key)
        return self._subscriptions.open(event_types, wire_key, queue_events_max, on_slow, self._now())

    def session(self, key: str) -> Session:
        """A group of messages under one key: `async with client.session("chat-7") as session`. See `Session`.

        Raises:
            UsageError: the key is no text.
        """
        return Session(self, key, self._open_sessions)

    # -- scheduled events

    async def schedule(
        self,
        event: Event,
        *,
        at: datetime | float | None = None,
        delay: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> Scheduled:
        """Publish an event that is to be handled later, and return its handle, for `cancel`.

        It goes out at once, and its shard's store keeps it until it is due: `flush` waits for that, and the ledger counts it
        as `waiting`. It holds up no other event of its key: when it is due it joins the end of its key's lane, behind what
        was published until then. What is due already is handled at once. The clock is that of the shard's host.

        Args:
            event: any event.
            at: not before then: a datetime with its zone, or seconds since 1970.
            delay: instead: seconds from now.
            headers: text for the handlers' `context.headers`.

        Raises:
            UsageError: no time, or one without its zone; else as for `publish`.
        """
        due = due_ns(at, delay, self._wall())
        name, key, body, headers, size = self.pack(event, headers)
        outbox = self._outboxes.of(key)
        if outbox.paused:
            await self._outboxes.wait_for_room(outbox)
            outbox = self._outboxes.present(outbox, key)
        if not outbox.dirty:
            self._outboxes.mark(outbox)
        self._outboxes.weigh(outbox, SMALL_BYTES + size)
        batch = outbox.batch
        batch.add(name, key, body)
        batch.extras.append(Extra(len(batch) - 1, headers or {}, 0, False, due_ns=due))
        self._published += 1
        self._outboxes.appended(outbox)
        return scheduled(self.publisher, outbox.shard, outbox.last_seq, due)

    async def cancel(self, which: Scheduled | str, *, timeout: float = 30.0) -> bool:
        """Cancel a scheduled event; return whether that is done, so that it will never be handled.

        False: it was due, and was or will be handled; or it was cancelled before; or the store of its shard has none such:
        an event of another client must have arrived there, which that one's `flush` waits for. Where a worker dies in the
        middle, False may also be said of what has just been cancelled; True is always true.

        Args:
            which: what `schedule` returned, of this client or another, or the `id` of it.
            timeout: seconds to wait for its shard, and for an event of this client until the store has it.

        Raises:
            BusUnreachable: the shard's worker did not answer in time; whether it was cancelled is unknown.
            BusRejected: the shard's store cannot do that now; it was not cancelled.
            UsageError: it is no scheduled event's.
        """
        self._gate.check_here()
        check_seconds("timeout", timeout)
        shard, event = event_of(which)
        if shard >= len(self._outboxes):
            return False
        outbox = self._outboxes[shard]
        try:
            async with asyncio.timeout(timeout):
                if event[0] == self.publisher and event[1] <= outbox.last_seq:
                    if len(outbox.batch):
                        self._outboxes.seal(outbox)
                    if not outbox.session.is_finished(event[1]):
                        outbox.session.hurry()
                        self._outboxes.pump(outbox)
                    while not outbox.session.is_finished(event[1]):
                        await self._gate.wait_for_progress()
                        self._gate.check()
                return decode_cancelled(await self._questions.ask_worker(outbox, CANCEL, encode_cancel(event), timeout))
        except TimeoutError:
            raise BusUnreachable(self.address, timeout, shard) from None

    # -- commands

    async def execute(
        self, command: Command[ReplyT], *, timeout: float = 5.0, headers: dict[str, str] | None = None
    ) -> ReplyT:
        """Send a command and wait for its reply. It takes its place behind this client's earlier messages of its key.

        Whoever stops waiting, by the time-out or because its task is cancelled, cancels the command: its handler is
        cancelled where it runs, and where it has not begun it never does.

        Raises:
            TimeoutError: no reply within `timeout` seconds; the message says whether the command may have run.
            CommandFailed: its handler raised, or there is none; carries the remote traceback.
            CommandLost: the worker died after it was sent; whether it ran is unknown. Never of a command that was declared
                with `idempotent=True`, which is sent again.
            ClientClosed, InvalidKey, MessageTooLarge: as for `publish`.
        """
        return await self._calls.execute(command, timeout, headers)

    def stream(
        self,
        command: Command[ReplyT],
        *,
        timeout: float = 60.0,
        window: int = 64,
        headers: dict[str, str] | None = None,
    ) -> Stream[ReplyT]:
        """Send a command whose handler yields, and read its items: `async for token in client.stream(Chat(…))`.

        It takes its place as with `execute`, and is never sent again. The handler yields up to `window` items more than were
        read, and waits then. Leaving the loop ends it, as does the time-out, or this client's end.

        Args:
            command: one whose handler is an `async def` that yields.
            timeout: seconds from here to the end of the stream.
            window: how many items may wait here, 1 to 1,024; all of them together up to 4 MiB and one item.
            headers: as for `publish`.

        Raises:
            UsageError: a window or a time-out that is none; else as for `publish`. What comes later is in `Stream`.
        """
        return self._calls.stream(command, timeout, window, headers)

    # -- what the supervisor knows

    async def status(self, *, timeout: float = 5.0) -> dict[str, Any]:
        """The bus as its supervisor sees it: workers, rates, dead letters; the form of `shardbus status --json`.

        Raises:
            BusUnreachable: no answer in time.
        """
        return await self._questions.status(timeout)

    async def evidence(self, publishers: Sequence[bytes], *, timeout: float = 10.0) -> list[Evidence]:
        """What each shard can prove of the stamped events of these publishers (each client's `publisher`).

        Raises:
            BusUnreachable: no answer in time.
        """
        return await self._questions.evidence(publishers, timeout)

    async def ask(self, what: str, body: bytes, *, timeout: float) -> bytes:
        """Put a question to the supervisor. Raises `BusUnreachable` or, where it says no, `BusRejected`."""
        return await self._questions.ask_supervisor(what, body, timeout)

    # -- dead letters

    async def dead_letters(self, where: DeadLetterFilter | None = None, *, limit: int = 1000) -> list[DeadLetter]:
        """Dead letters of all shards, shard by shard, each shard's in the order in which they died.

        Args:
            where: which ones; default: all.
            limit: how many at most.

        Raises:
            BusUnreachable: a shard's worker did not answer in time.
        """
        return await self._questions.dead_letters(where, limit)

    async def redrive(self, where: DeadLetterFilter | None = None, *, rate: float | None = None) -> int:
        """Have dead letters handled again, by the handlers that gave up; return how many.

        Each joins the end of its key's lane, with its attempts counted on; one that parked its key (see
        `Bus.on(on_dead_letter="park")`) runs before all that wait behind it. It leaves the dead letters in the same
        transaction that makes it a waiting event, so a crash in the middle loses none. One that finds no room
        to wait stays dead, and is not counted.

        Args:
            where: which ones; default: all that are dead now.
            rate: how many a second at most; default: as fast as they are written.

        Raises:
            BusUnreachable: a shard's worker did not answer in time. Some may have been redriven.
        """
        return await self._questions.redrive(where, rate)

    async def purge(self, where: DeadLetterFilter | None = None) -> int:
        """Remove dead letters for good; return how many. Default: all. A key that one of them parked goes on.

        Raises:
            BusUnreachable: a shard's worker did not answer in time. Some may have been removed.
        """
        return await self._questions.purge(where)

    # -- inside: frames from workers

    def _on_worker(self, outbox: Outbox, data: bytes) -> None:
        self._heard()
        try:
            frame = decode_to_publisher(data)
            if isinstance(frame, (Answer, Items, Feed, Subscribed, Unsubscribed)):
                self._on_other(outbox, frame)
                return
            happened = outbox.session.receive(frame)
        except RemoteProtocolError as error:
            log.warning("shard %d sent what is not sound, and was ignored: %s", outbox.shard, error)
            return
        for what in happened:
            if isinstance(what, Replied):
                self._calls.replied(outbox, what.replies)
            elif isinstance(what, Lost):
                self._calls.lose(outbox, what.seq)
            else:
                self._rejected(outbox, what)
        if isinstance(frame, Welcome):
            self._subscriptions.pump(self._now())  # before data, which may be what somebody listens to
        self._outboxes.pump(outbox)
        self._outboxes.feel_pressure()
        self._gate.made_progress()

    def _on_other(self, outbox: Outbox, frame: Answer | Items | ToListener) -> None:
        """Take what does not belong to the outbox's session."""
        if isinstance(frame, Answer):
            self._answered(frame)
        elif frame.epoch != outbox.session.epoch:
            return  # a worker that is gone
        elif isinstance(frame, Items):
            self._calls.streamed(outbox, frame)
        else:
            self._subscriptions.receive(outbox.shard, frame, self._now())

    def _rejected(self, outbox: Outbox, what: Rejected) -> None:
        if what.reason in ("stale-epoch", "stale-layout"):
            self._table_wanted = True
        elif what.reason == "malformed" and outbox.malformed < _MALFORMED_MAX:
            # The worker ignores this connection from now on; a new one takes the session up again.
            outbox.malformed += 1
            self._reopen(outbox)
        elif what.reason == "too-many-publishers":
            if not outbox.told:
                outbox.told = True
                log.warning("shard %d serves as many publishers as it can; this one waits for a place", outbox.shard)
        else:
            self.end(BusRejected(f"shard {outbox.shard}: {REASONS.get(what.reason, what.reason)}"))

    def end(self, error: BusRejected) -> None:
        """The bus has refused this client for good: everybody who waits hears of it, and so does every later call."""
        self._gate.refuse(error)
        self._outboxes.pause()
        self._subscriptions.end(error)
        self._calls.fail(error)
        self._questions.fail(error)
        self._gate.made_progress()

    # -- inside: the supervisor

    def _to_supervisor(self, frame: bytes) -> None:
        if self._control is not None:
            self._control.send(frame)

    def _on_control(self, data: bytes) -> None:
        self._heard()
        try:
            frame = decode_to_client(data)
            if isinstance(frame, TableChanged):
                self._adopt(_decode_table(frame.body))
            elif isinstance(frame, Answer):
                self._answered(frame)
        except (RemoteProtocolError, msgspec.DecodeError) as error:
            log.warning("the supervisor sent what is not sound, and was ignored: %s", error)

    def _answered(self, frame: Answer) -> None:
        if frame.request == 0:
            self._adopt(_decode_table(frame.body))
        else:
            self._questions.answered(frame)

    def _adopt(self, table: Table) -> None:
        """Follow a routing table: greet workers that are new, leave those that are gone."""
        known = self._table
        if known is not None and known.incarnation == table.incarnation and table.version < known.version:
            return
        if known is not None and known.slots != table.slots:
            if self.ledger().in_flight:
                self.end(
                    BusRejected(
                        f"the bus came back with {len(table.shards)} shards instead of {len(known.shards)}, while events "
                        "were under way; connect again and publish them again"
                    )
                )
                return
            self._calls.lose_all()
            self.publisher = os.urandom(16)  # sequences begin anew
            self._outboxes.forget()
        moved = known is not None and not len(self._outboxes)
        self._table = table
        self._table_wanted = False
        self._outboxes.follow(table)
        self._gate.open()
        for address in table.shards:
            self._follow(self._outboxes[address.shard], address, table.layout)
        if moved:
            self._subscriptions.reroute()
        self._gate.made_progress()

    def _make_session(self, _shard: int) -> PublisherSession:
        return PublisherSession(self.publisher, self._limits)

    def _follow(self, outbox: Outbox, address: ShardAddress, layout: int) -> None:
        session = outbox.session
        if not address.epoch:
            session.close()
            return
        if session.epoch == address.epoch:
            return
        for lost in session.open(address.epoch, layout):
            self._calls.lose(outbox, lost.seq)
        self._connect(outbox, address.address)
        if not self._gate.is_closing:
            self._open_sessions.tell(
                lambda key: self._outboxes.shard_of(key) == address.shard,
                partial(self._publish_at_once, outbox),
            )

    def _publish_at_once(self, outbox: Outbox, event: Event) -> Callable[[], bool]:
        """Publish an event of this outbox, also into a full one; returns what says whether it is finished."""
        self.publish_packed((self.pack(event),))
        return partial(outbox.session.is_finished, outbox.last_seq)

    def _reopen(self, outbox: Outbox) -> None:
        assert self._table is not None  # a worker has spoken
        outbox.session.greet_again()
        self._connect(outbox, self._table.shards[outbox.shard].address)

    def _connect(self, outbox: Outbox, address: str) -> None:
        if outbox.channel is not None:
            outbox.channel.close()
            outbox.channel = None
        try:
            # A new socket for every incarnation: what is queued in the old one must not reach the new worker out of order.
            outbox.channel = self._connector.open(address, lambda data: self._on_worker(outbox, data))
        except ConfigError as error:
            if not outbox.told:
                outbox.told = True
                log.warning("no connection to shard %d, which is tried again: %s", outbox.shard, error)
            return
        outbox.session.tick(self._now())
        self._outboxes.pump(outbox)

    async def _tick_for_ever(self) -> None:
        while True:
            self.tick()
            await asyncio.sleep(_TICK_S)

    def tick(self) -> None:
        """Do what time asks for: greetings and questions that are due again. One that was made without `ticks` does not call
        it itself."""
        now_ns = self._now()
        # Asked once a second in any case: a supervisor that was replaced knows nobody to tell.
        if self._control is not None and now_ns - self._table_asked_ns >= (_NS // 10 if self._table_wanted else _NS):
            self._table_asked_ns = now_ns
            self._control.send(encode_frame(Ask(0, "table", b"")))
        for outbox in self._outboxes:
            if outbox.channel is None and outbox.session.state is State.GREETING and self._table is not None:
                self._connect(outbox, self._table.shards[outbox.shard].address)
            outbox.session.tick(now_ns)
            self._outboxes.pump(outbox)
        self._subscriptions.pump(now_ns)
        self._calls.repeat_more(now_ns)
        self._note_silence()

    def _heard(self) -> None:
        self._silent_ticks = 0
        if self._told_silent:
            self._told_silent = False
            log.info("the bus at %s is back", self.address)

    def _note_silence(self) -> None:
        """Say once that the bus is gone, where something waits for it: its program may stand still for that."""
        self._silent_ticks += 1
        if self._silent_ticks < _SILENT_TICKS_MAX or self._told_silent or self._table is None:
            return
        events, commands = self.ledger().in_flight, sum(len(outbox.commands) for outbox in self._outboxes)
        if events or commands:
            self._told_silent = True
            log.warning(
                "waiting for the bus at %s, which has said nothing for %g s (not finished: %s, %s); events go out when "
                "it is back",
                self.address,
                self._silent_ticks * _TICK_S,
                counted(events, "event"),
                counted(commands, "command"),
            )


@contextlib.asynccontextmanager
async def open_client(client: Client, *, timeout_s: float, close_timeout_s: float) -> AsyncIterator[Client]:
    """Start a client, hand it out, and close it: flushed where the block ended well, and tried for as long where not."""
    await client.start(timeout_s)
    try:
        yield client
    except BaseException as error:
        # The block's own error is what its caller must see; what was not delivered is a note to it.
        try:
            await client.close(close_timeout_s)
        except (NotDelivered, BusRejected) as left:
            error.add_note(str(left))
        raise
    else:
        await client.close(close_timeout_s)


class ClientBlock(AbstractAsyncContextManager[Client]):
    """A client that is not open yet: `async with` opens it. Whoever uses it otherwise is told how to write it."""

    def __init__(self, block: AbstractAsyncContextManager[Client], call: str) -> None:
        self._block = block
        self._call = call

    async def __aenter__(self) -> Client:
        return await self._block.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> bool | None:
        return await self._block.__aexit__(kind, error, stack)

    def _misused(self) -> UsageError:
        return UsageError(f"write: async with {self._call} as client")

    def __await__(self) -> NoReturn:
        raise self._misused()

    def __enter__(self) -> NoReturn:
        raise self._misused()

    def __exit__(self, *_: object) -> None:
        """Only there so that `with` comes as far as `__enter__`."""

    def __getattr__(self, name: str) -> NoReturn:
        if not name.startswith("_") and hasattr(Client, name):
            raise self._misused()
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
