"""Commands that are under way: room for one, its reply or stream, its time-out, and what it is told when it is lost.

Owns what an outbox keeps of its commands. They travel in the outbox's batches, as events do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec
from msgspec.structs import replace

from shardbus.arguments import check_seconds
from shardbus.config import Limits
from shardbus.errors import ClientClosed, CommandFailed, CommandLost, UsageError
from shardbus.gate import Gate
from shardbus.messages import Command, WireKey
from shardbus.outboxes import Call, Outbox, Outboxes
from shardbus.packing import Packing, Route
from shardbus.streams import Flow, Stream
from shardbus.timeouts import Timeouts
from shardbus.wire.codec import Extra
from shardbus.wire.frames import REPLY_EXPIRED, REPLY_OK, Items, More, encode_frame
from shardbus.wire.session import State

ReplyT = TypeVar("ReplyT")

_NS: Final = 1_000_000_000

_decode_total: Final = msgspec.msgpack.Decoder(int).decode
_decode_failure: Final = msgspec.msgpack.Decoder(tuple[str, str, str]).decode


class Calls:
    """The commands of a client. Bounded: one more than an outbox may have under way waits."""

    def __init__(self, gate: Gate, outboxes: Outboxes, packing: Packing, limits: Limits) -> None:
        self._gate = gate
        self._outboxes = outboxes
        self._packing = packing
        self._limits = limits
        self._timeouts = Timeouts()
        self._more_told_ns = 0

    # -- for who calls

    async def execute(self, command: Command[ReplyT], timeout_s: float, headers: dict[str, str] | None) -> ReplyT:
        """See `Client.execute`."""
        loop = self._gate.check_here()
        check_seconds("timeout", timeout_s)
        route, key, body, own_headers, size = self._packing.pack_command(command, headers)
        outbox = self._outboxes.of(key)
        reply: asyncio.Future[ReplyT] = loop.create_future()
        self._timeouts.add(reply, timeout_s, loop)
        left_ns = int(timeout_s * _NS) or 1
        seq = -1
        try:
            if self._may_append(outbox):
                self._outboxes.weigh(outbox, size)
            else:
                end = loop.time() + timeout_s
                async with asyncio.timeout_at(end):
                    outbox = await self.wait_for_room(key, size)
                left_ns = max(1, int((end - loop.time()) * _NS))
            extra = Extra(len(outbox.batch), own_headers, left_ns, route.idempotent)
            seq = self.append(outbox, route, key, body, extra, Call(route.name, route.decode_reply, reply))
            return await reply
        except TimeoutError:
            raise TimeoutError(_unanswered(route, outbox, seq, timeout_s)) from None
        finally:
            self._timeouts.remove(reply, timeout_s)
            self.leave(outbox, seq)

    def stream(
        self, command: Command[ReplyT], timeout_s: float, window: int, headers: dict[str, str] | None
    ) -> Stream[ReplyT]:
        """See `Client.stream`."""
        loop = self._gate.check_here()
        check_seconds("timeout", timeout_s)
        route, key, body, own_headers, _ = self._packing.pack_command(command, headers)
        if type(window) is not int or not 1 <= window <= self._limits.stream_items_max:
            raise UsageError(f"window={window!r}: take 1 to {self._limits.stream_items_max:,}")
        flow = Flow(route.name, window)
        end = loop.time() + timeout_s
        caller = _Caller(
            self, self._outboxes, route, key, body, flow, Extra(0, own_headers, 0, False, window=window), end
        )
        return Stream(flow, caller, route.decode_reply, timeout_s)

    def _may_append(self, outbox: Outbox) -> bool:
        return not outbox.paused and len(outbox.commands) < self._limits.commands_in_flight_max

    async def wait_for_room(self, key: WireKey, size: int) -> Outbox:
        """The outbox of a key, with room for a command of so many bytes. Raises as `Outboxes.wait_for_room`."""
        outbox = self._outboxes.of(key)
        while not self._may_append(outbox):
            if outbox.paused:
                await self._outboxes.wait_for_room(outbox)
            else:
                await self._gate.wait_for_progress()
            outbox = self._outboxes.present(outbox, key)
        self._outboxes.weigh(outbox, size)
        return outbox

    def append(self, outbox: Outbox, route: Route, key: WireKey, body: bytes, extra: Extra, call: Call) -> int:
        """Put a command into an outbox that has room; return its sequence."""
        batch = outbox.batch
        batch.add(route.name, key, body)
        batch.extras.append(extra)
        seq = outbox.session.next_seq + extra.at
        outbox.commands[seq] = call
        (outbox.open_idempotent if extra.idempotent else outbox.open_commands).append(seq)
        outbox.command_seqs.add(seq)
        self._outboxes.appended(outbox)
        return seq

    def leave(self, outbox: Outbox, seq: int) -> None:
        """Nobody waits for this command any more: where it has no outcome, it is cancelled."""
        if outbox.commands.pop(seq, None) is not None:
            outbox.session.abandon(seq)
            self._outboxes.pump(outbox)
            self._gate.made_progress()
        if len(outbox.command_seqs) > 2 * self._limits.commands_in_flight_max:
            outbox.unfinished_commands()

    # -- for what happens to them

    def replied(self, outbox: Outbox, replies: Sequence[tuple[int, str, bytes]]) -> None:
        """Outcomes have arrived: of each its sequence, status and body."""
        for seq, status, body in replies:
            call = outbox.commands.pop(seq, None)
            if call is not None and not call.reply.done():
                _settle(call, status, body)

    def streamed(self, outbox: Outbox, frame: Items) -> None:
        """Items of a stream have arrived. Raises `RemoteProtocolError`: they are more than was allowed."""
        call = outbox.commands.get(frame.seq)
        if call is not None and call.flow is not None:
            call.flow.put(frame.first, frame.items)

    def lose(self, outbox: Outbox, seq: int) -> None:
        """The worker that had a command is gone."""
        call = outbox.commands.pop(seq, None)
        if call is not None and not call.reply.done():
            call.reply.set_exception(CommandLost(call.name))

    def lose_all(self) -> None:
        """The bus came back with other shards, and knows none of them."""
        for outbox in self._outboxes:
            for seq in list(outbox.commands):
                self.lose(outbox, seq)

    def fail(self, error: Exception) -> None:
        """Everybody who waits for a reply hears this."""
        for outbox in self._outboxes:
            for call in outbox.commands.values():
                if not call.reply.done():
                    call.reply.set_exception(error)

    def end_streams(self) -> None:
        """The client closes: what is read on until then would keep it."""
        for outbox in self._outboxes:
            for seq, call in list(outbox.commands.items()):
                if call.flow is not None:
                    if not call.reply.done():
                        call.reply.set_exception(ClientClosed("the client was closed while the stream was under way"))
                    self.leave(outbox, seq)
            self._outboxes.pump(outbox)

    def repeat_more(self, now_ns: int) -> None:
        """Say once a second again how far waiting streams may go on: what said it may be lost."""
        if now_ns - self._more_told_ns < _NS:
            return
        self._more_told_ns = now_ns
        for outbox in self._outboxes:
            session = outbox.session
            if session.state is not State.GREETING:
                for seq, call in outbox.commands.items():
                    if call.flow is not None and call.flow.waits:
                        self._outboxes.send(outbox, encode_frame(More(session.epoch, seq, call.flow.allow_more())))


class _Caller:
    """A streaming command, as its `Stream` sees the client."""

    def __init__(
        self,
        calls: Calls,
        outboxes: Outboxes,
        route: Route,
        key: WireKey,
        body: bytes,
        flow: Flow,
        extra: Extra,
        end: float,
    ) -> None:
        self._calls = calls
        self._outboxes = outboxes
        self._route = route
        self._key = key
        self._body = body
        self._flow = flow
        self._extra = extra
        self._end = end
        self._outbox: Outbox | None = None
        self._seq = -1

    async def begin(self) -> None:
        size = len(self._body) + sum(map(len, self._extra.headers.values()))
        outbox = await self._calls.wait_for_room(self._key, size)
        left_s = self._end - asyncio.get_running_loop().time()
        extra = replace(self._extra, at=len(outbox.batch), timeout_ns=max(1, int(left_s * _NS)))
        call = Call(self._route.name, _decode_total, self._flow.reply, self._flow)
        self._seq = self._calls.append(outbox, self._route, self._key, self._body, extra, call)
        self._outbox = outbox

    def more(self, allowed: int) -> None:
        # A worker that drains takes nothing new, and goes on with what it has.
        if self._outbox is not None and self._outbox.session.state is not State.GREETING:
            self._outboxes.send(self._outbox, encode_frame(More(self._outbox.session.epoch, self._seq, allowed)))

    def leave(self) -> None:
        if self._outbox is not None:
            self._calls.leave(self._outbox, self._seq)


def _settle(call: Call, status: str, body: bytes) -> None:
    try:
        if status == REPLY_OK:
            call.reply.set_result(call.decode(body))
        elif status == REPLY_EXPIRED:
            pass  # its caller is about to time out, by the same deadline
        else:
            call.reply.set_exception(CommandFailed(call.name, *_decode_failure(body)))
    except Exception as error:  # what a reply type's own checks raise
        told = f"its reply is not as declared: {error}"
        call.reply.set_exception(CommandFailed(call.name, type(error).__name__, told))


def _unanswered(route: Route, outbox: Outbox, seq: int, timeout_s: float) -> str:
    """What the caller of a command is told whose time was over."""
    told = f"{route.name}: no reply within {timeout_s:g} s; "
    session = outbox.session
    if seq >= 0 and session.was_sent(seq):
        return told + "it may have run, in part or wholly, and is cancelled where it still runs"
    if seq >= session.next_seq and session.state is State.OPEN:
        return told + "its deadline was over before it could be sent"
    why = "has not answered yet" if session.state is State.GREETING else "takes nothing now"
    return told + f"it was never sent, because shard {outbox.shard} {why} (see `shardbus status`)"
