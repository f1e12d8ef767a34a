"""A client's outboxes: where a key's messages go, when they leave, and what happens where there is no room.

Owns one outbox and one session for each shard. Who opens their channels, and what comes back through them, it does not know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, Protocol, get_args

import msgspec

from shardbus.clock import NowNs
from shardbus.config import DEFAULT_LIMITS, Limits
from shardbus.errors import OutboxFull, UsageError
from shardbus.gate import Gate
from shardbus.messages import WireKey, from_wire_key, to_wire_key
from shardbus.packing import Part, picked
from shardbus.routing import Table
from shardbus.streams import Flow
from shardbus.wire.codec import Batch
from shardbus.wire.session import PublisherSession, State

SMALL_BYTES: Final = DEFAULT_LIMITS.batch_bytes_target // DEFAULT_LIMITS.batch_events_max
"""As many smaller bodies as a batch may have fit into it unweighed."""

_TURN_SEALS: Final = 8  # a publisher that never waits gives the event loop a turn after so many batches
_HIGH_WATER: Final = 0.75  # of an outbox's bound
_LOW_WATER: Final = 0.25
_NS: Final = 1_000_000_000


class Channel(Protocol):
    """One way to a peer. Frames go out in order, or are lost with the connection."""

    def send(self, frame: bytes) -> bool:
        """Hand over a frame; False where it cannot be taken now. Never blocks."""

    def close(self) -> None:
        """Let go at once; what was not sent is dropped."""


class Connector(Protocol):
    """Opens channels. `on_frame` is called from the event loop with each frame that comes back."""

    def open(self, address: str, on_frame: Callable[[bytes], None]) -> Channel:
        """A channel to an address, connected or connecting."""

    def close(self) -> None:
        """Close all that is left open."""


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a client's events: `published = handled + dead + waiting + dropped + in_flight`.

    Counted from acks. `waiting` events were taken over by a shard's store, and are counted so for ever: what becomes of them
    then, `status` and the dead letters tell. `dropped` is 0 unless the client may drop.
    """

    published: int
    handled: int
    dead: int
    waiting: int
    dropped: int
    in_flight: int


class OutboxState(msgspec.Struct, frozen=True, kw_only=True):
    """What a client holds for one shard: not finished, sent or not."""

    shard: int
    connected: bool
    held_events: int
    held_bytes: int


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """A client's ledger, and what keeping it took.

    `waits` publish calls waited for room, `waited_s` seconds together; `rejected` were refused instead.
    """

    ledger: Ledger
    waits: int
    waited_s: float
    rejected: int
    outboxes: tuple[OutboxState, ...]


OnFull = Literal["wait", "reject", "drop_oldest"]


def check_full(on_full: OnFull, on_pressure: object) -> None:
    """Refuse what is no policy for a full outbox, and what cannot be called when one fills. Raises `UsageError`."""
    if on_full not in get_args(OnFull):
        raise UsageError(f"on_full={on_full!r}: it is 'wait', 'reject' or 'drop_oldest'")
    if on_pressure is not None and not callable(on_pressure):
        raise UsageError(f"on_pressure={on_pressure!r}: give a function of (under_pressure), which is True or False")


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """An outbox whose session holds more than one of these is full."""

    events_max: int
    bytes_max: int


def publishers_bound(limits: Limits) -> Bound:
    """The bound of what programs publish: an open batch may come on top, and who finds room appends up to another one."""
    return Bound(
        events_max=limits.outbox_events_max - 2 * limits.batch_events_max,
        bytes_max=limits.outbox_bytes_max,
    )


class Call(msgspec.Struct):
    """A command whose reply is awaited."""

    name: str
    decode: Callable[[bytes], Any]
    reply: asyncio.Future[Any]
    flow: Flow | None = None  # of a stream


class Outbox:
    """Everything one shard has not finished: an open batch, and the session that keeps the sealed ones.

    What happens when it is full is told in `Outboxes`.
    """

    __slots__ = (
        "batch",
        "big_bytes",
        "channel",
        "command_seqs",
        "commands",
        "dirty",
        "malformed",
        "open_commands",
        "open_idempotent",
        "paused",
        "session",
        "shard",
        "told",
    )

    def __init__(self, shard: int, session: PublisherSession) -> None:
        self.shard = shard
        self.session = session
        self.batch = Batch()
        self.big_bytes = 0
        self.channel: Channel | None = None
        self.commands: dict[int, Call] = {}
        self.command_seqs: set[int] = set()  # of commands that may be unfinished, awaited or not
        self.open_commands: list[int] = []
        self.open_idempotent: list[int] = []  # likewise, those that may be sent twice
        self.dirty = False
        self.paused = False  # publishers must look before they append
        self.malformed = 0
        self.told = False  # that it has no connection, or no place at its worker

    @property
    def last_seq(self) -> int:
        """The sequence of what was appended last, sealed or not."""
        return self.session.next_seq + len(self.batch) - 1

    def unfinished_commands(self) -> int:
        """Commands that the worker has not finished."""
        self.command_seqs = {seq for seq in self.command_seqs if not self.session.is_finished(seq)}
        return len(self.command_seqs)

    def is_flushed(self, goal: int) -> bool:
        """Whether all before `goal` is finished, but for commands whose callers wait no more."""
        left = self.session.unfinished_below(goal)
        if not left:
            return True
        self.unfinished_commands()
        return left == sum(seq < goal and not self._is_awaited(seq) for seq in self.command_seqs)

    def unfinished_events(self, goal: int) -> int:
        """How many events before `goal` are not finished."""
        self.unfinished_commands()
        return self.session.unfinished_below(goal) - sum(seq < goal for seq in self.command_seqs)

    def _is_awaited(self, seq: int) -> bool:
        """Whether somebody waits for the end of a command; that of a stream is its reader's own affair."""
        call = self.commands.get(seq)
        return call is not None and call.flow is None


class Outboxes:
    """The outboxes of a client, one for each shard, in their order.

    A full one makes publishers wait, refuses what they publish, or drops what no worker has seen, as `on_full` says.

    Args:
        gate: shut, all of them are full.
        limits: of batches, and of how many keys are remembered.
        bound: when one is full.
        make_session: with a shard.
        on_full: what happens then.
        on_pressure: called in a turn of its own with whether the fullest one is above its high water mark.
        now: the monotonic clock.
    """

    def __init__(
        self,
        gate: Gate,
        limits: Limits,
        bound: Bound,
        make_session: Callable[[int], PublisherSession],
        *,
        on_full: OnFull,
        on_pressure: Callable[[bool], object] | None,
        now: NowNs,
    ) -> None:
        self.by_key: dict[WireKey, Outbox] = {}
        """As far as remembered; bounded by `route_cache_max`. Always the same object, so that publishers may keep it."""
        self.keyless: Outbox
        """Where what has no key goes in this turn."""
        self._all: list[Outbox] = []
        self._table: Table
        self._gate = gate
        self._limits = limits
        self._bound = bound
        self._make_session = make_session
        self._on_full = on_full
        self._on_pressure = on_pressure
        self._now = now
        self._under_pressure = False
        self._dirty: list[Outbox] = []
        self._seals = 0
        self._dropped = 0
        self._dead_before = 0  # of sessions with shards that are gone
        self._waiting_before = 0
        self._refused = 0
        self._waits = 0
        self._waited_ns = 0

    def __iter__(self) -> Iterator[Outbox]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, shard: int) -> Outbox:
        return self._all[shard]

    # -- whose outbox

    def follow(self, table: Table) -> None:
        """Place keys by this table; a shard that has no outbox gets one."""
        self._table = table
        for address in table.shards:
            if address.shard == len(self._all):
                self._all.append(Outbox(address.shard, self._make_session(address.shard)))
                if len(self._all) == 1:
                    self.keyless = self._all[0]

    def forget(self) -> None:
        """Let go of all outboxes, but keep their counts: the bus came back with other shards."""
        for outbox in self._all:
            if outbox.channel is not None:
                outbox.channel.close()
            self._dead_before += outbox.session.dead
            self._waiting_before += outbox.session.waiting
        self._all = []
        self.by_key.clear()

    def shard_of(self, key: WireKey) -> int:
        """The shard that owns a key."""
        return self._table.shard_of(key)

    def of(self, key: WireKey) -> Outbox:
        """The outbox for what has this key. Raises as `place`."""
        return self.keyless if key is None else self.by_key.get(key) or self.place(key)

    def place(self, key: WireKey) -> Outbox:
        """The outbox of a key that is not remembered.

        Raises:
            InvalidKey: it cannot be one.
            ClientClosed, BusRejected: the client takes nothing.
        """
        self._gate.check()
        return self.remember(to_wire_key(from_wire_key(key)))

    def remember(self, key: WireKey) -> Outbox:
        """The outbox of a sound key, also where the client takes nothing."""
        outbox = self._all[self._table.shard_of(key)]
        if len(self.by_key) >= self._limits.route_cache_max:
            self.by_key.clear()
        self.by_key[key] = outbox
        return outbox

    def present(self, outbox: Outbox, key: WireKey) -> Outbox:
        """The outbox of a key after a wait, in which the bus may have come back with another number of shards."""
        return outbox if outbox in self._all else self.of(key)

    # -- appending and sending

    def weigh(self, outbox: Outbox, size: int) -> None:
        """Make sure that a batch which is about to take so many bytes more stays below its bound."""
        outbox.big_bytes += size
        if outbox.big_bytes > self._limits.batch_bytes_target and len(outbox.batch):
            self.seal(outbox)
            outbox.big_bytes = size

    def append(self, part: Part[Outbox], ordinals: Sequence[int] | None, instants: Sequence[int] | None) -> None:
        """Append a part to the open batch of its outbox, which has room for it; where the batch has not, it leaves first."""
        outbox, count = part.target, len(part.keys)
        if not outbox.dirty:
            self.mark(outbox)
        if len(outbox.batch) + count > self._limits.batch_events_max:
            self.seal(outbox)
        if len(part.bodies) > count * SMALL_BYTES:
            self.weigh(outbox, len(part.bodies))
        batch = outbox.batch
        batch.add_many(part.name, part.keys, part.bodies)
        batch.stamp_many(picked(ordinals, part.places), picked(instants, part.places), count)
        if len(batch) >= self._limits.batch_events_max:
            self.seal(outbox)

    def appended(self, outbox: Outbox) -> None:
        """Something was appended to the open batch: it leaves now where it is full, else at the end of the turn."""
        if len(outbox.batch) >= self._limits.batch_events_max:
            self.seal(outbox)
        elif not outbox.dirty:
            self.mark(outbox)

    def mark(self, outbox: Outbox) -> None:
        """Have this outbox sealed and sent at the end of the loop's turn.

        What programs publish calls it before it appends anything, once a turn: so another event loop is refused at no cost.

        Raises:
            UsageError: it is not the client's loop that runs.
        """
        loop = self._gate.loop()
        outbox.dirty = True
        if not self._dirty:
            loop.call_soon(self._end_of_turn)
        self._dirty.append(outbox)

    def _end_of_turn(self) -> None:
        dirty, self._dirty = self._dirty, []
        for outbox in dirty:
            outbox.dirty = False
            if len(outbox.batch):
                self.seal(outbox)
        self._seals = 0
        for outbox in dirty:
            outbox.paused = self.is_full(outbox)
        self.keyless = self._next_keyless()

    def _next_keyless(self) -> Outbox:
        """For what has no key and comes in the next turn: the next with room, or else the next that is up."""
        count = len(self._all)
        if not count:
            return self.keyless
        following = self._all[(self.keyless.shard + 1) % count]
        if following.session.state is State.OPEN and not following.paused:
            return following
        after = [self._all[(self.keyless.shard + step) % count] for step in range(1, count + 1)]
        up = [outbox for outbox in after if outbox.session.state is State.OPEN] or after
        return next((outbox for outbox in up if not outbox.paused), up[0])

    def seal(self, outbox: Outbox) -> None:
        """Close the open batch, hand it to the session, and send what may be sent."""
        batch = outbox.batch
        commands, idempotent = tuple(outbox.open_commands), tuple(outbox.open_idempotent)
        now_ns = self._now() if batch.extras else 0
        # First: were it to fail, nothing would be lost without a word.
        outbox.session.offer(batch.seal(), len(batch), commands, now_ns, idempotent)
        outbox.batch = Batch()
        outbox.big_bytes = 0
        outbox.open_commands = []
        outbox.open_idempotent = []
        self.pump(outbox)
        self.feel_pressure()
        self._seals += 1
        if self._seals >= _TURN_SEALS or self.is_full(outbox):
            outbox.paused = True
        if not outbox.dirty:
            self.mark(outbox)

    @property
    def needs_turn(self) -> bool:
        """Whether the event loop is to have a turn before more is published."""
        return self._seals >= _TURN_SEALS

    def pump(self, outbox: Outbox) -> None:
        """Send what the session may send now."""
        if outbox.channel is not None:
            for frame in outbox.session.frames_to_send(self._now()):
                self.send(outbox, frame)

    @staticmethod
    def send(outbox: Outbox, frame: bytes) -> None:
        """Send a frame to the outbox's worker."""
        # A frame that the channel does not take is as lost as one that the network loses: the session sends it again.
        if outbox.channel is not None:
            outbox.channel.send(frame)

    # -- room

    def is_full(self, outbox: Outbox) -> bool:
        """Whether nothing more is to be appended, because of the bound or because the client takes nothing."""
        session, bound = outbox.session, self._bound
        return session.held_events > bound.events_max or session.held_bytes > bound.bytes_max or not self._gate.is_open

    def has_room(self) -> bool:
        """Whether none is full."""
        return not any(map(self.is_full, self._all))

    def pause(self) -> None:
        """Have whoever publishes next look, and hear why nothing is taken."""
        for outbox in self._all:
            outbox.paused = True

    async def wait_for_room(self, outbox: Outbox) -> None:
        """Get room in a paused outbox, as the policy says, and give the loop a turn, so that acks can come in.

        Raises:
            OutboxFull: the policy is to refuse.
            ClientClosed, BusRejected: the client takes nothing.
            UsageError: it is not the client's loop that runs.
        """
        self._gate.check_here()
        if not self.is_full(outbox):
            await asyncio.sleep(0)
        outbox.session.thin_out()
        if self.is_full(outbox):
            self.feel_pressure()
            if self._on_full != "wait":
                self._apply_policy(outbox)
            began_ns, waits = self._now(), self.is_full(outbox)
            while self.is_full(outbox):
                self._gate.check()
                await self._gate.wait_for_progress()
                outbox.session.thin_out()
            self._waits += waits
            self._waited_ns += self._now() - began_ns
        self._gate.check()
        outbox.paused = False

    async def wait_for_room_in(self, outboxes: Sequence[Outbox]) -> bool:
        """Wait until each of these has room; False where that is for each event to decide. Raises as `wait_for_room`."""
        while any(outbox.paused for outbox in outboxes):
            if self._on_full != "wait":
                return False
            for outbox in outboxes:
                if outbox.paused:
                    await self.wait_for_room(outbox)
        return all(outbox in self._all for outbox in outboxes)  # a bus that came back with others has none of these

    def _apply_policy(self, outbox: Outbox) -> None:
        """Refuse, or drop what no worker has seen; where there is nothing to drop, publishing waits."""
        self._gate.check()
        if self._on_full == "reject":
            self._refused += 1
            raise OutboxFull(outbox.shard, outbox.session.held_events)
        while self.is_full(outbox) and (dropped := outbox.session.drop_oldest()):
            self._dropped += dropped

    def feel_pressure(self) -> None:
        """Tell whoever wants to know when the fullest outbox passes the high water mark, and the low one on its way down."""
        if self._on_pressure is None:
            return
        limits = self._limits
        fullest = max(
            max(one.session.held_events / limits.outbox_events_max, one.session.held_bytes / limits.outbox_bytes_max)
            for one in self._all
        )
        under = fullest >= (_LOW_WATER if self._under_pressure else _HIGH_WATER)
        if under != self._under_pressure:
            self._under_pressure = under
            asyncio.get_running_loop().call_soon(self._on_pressure, under)

    # -- counts

    def ledger(self, published: int) -> Ledger:
        """What became of so many events, as far as the workers have told."""
        dead = self._dead_before + sum(outbox.session.dead for outbox in self._all)
        waiting = self._waiting_before + sum(outbox.session.waiting for outbox in self._all)
        held = sum(outbox.session.held_events + len(outbox.batch) - outbox.unfinished_commands() for outbox in self._all)
        return Ledger(
            published=published,
            handled=published - held - dead - waiting - self._dropped,
            dead=dead,
            waiting=waiting,
            dropped=self._dropped,
            in_flight=held,
        )

    def statistics(self, published: int) -> Statistics:
        """That, what publishing waited for, and what is held for each shard."""
        return Statistics(
            ledger=self.ledger(published),
            waits=self._waits,
            waited_s=self._waited_ns / _NS,
            rejected=self._refused,
            outboxes=tuple(
                OutboxState(
                    shard=outbox.shard,
                    connected=outbox.session.state is State.OPEN,
                    held_events=outbox.session.held_events + len(outbox.batch),
                    held_bytes=outbox.session.held_bytes,
                )
                for outbox in self._all
            ),
        )
