"""Questions to the supervisor and to workers: numbered, asked again until they are answered, and what is asked so.

Owns the questions that are under way: the bus's status, its evidence, and all that is done with dead letters.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from shardbus.arguments import check_count, check_seconds, is_number
from shardbus.clock import NowNs
from shardbus.dead_letters import (
    EVENTS_MAX,
    DeadLetter,
    DeadLetterFilter,
    Request,
    decode_count,
    decode_page,
    encode_request,
)
from shardbus.errors import BusRejected, BusUnreachable, UsageError
from shardbus.gate import Gate
from shardbus.metrics import Evidence
from shardbus.outboxes import Outbox, Outboxes
from shardbus.packing import encode
from shardbus.store import DeadFilter
from shardbus.wire.frames import Answer, Ask, encode_frame

_PAGE_ROWS: Final = 256
_ASK_AGAIN_S: Final = 1.0  # a question is lost with the worker that it was put to
_DEAD_LETTERS_S: Final = 30.0  # a worker that is being replaced answers late

_decode_evidence: Final = msgspec.msgpack.Decoder(list[Evidence]).decode


class Questions:
    """What a client has asked, and waits for the answer of.

    Args:
        gate: shut, nothing is asked.
        outboxes: the ways to the workers.
        to_supervisor: sends a frame there.
        address: the bus's, for errors.
        wall: the clock of dead letters.
    """

    def __init__(
        self, gate: Gate, outboxes: Outboxes, to_supervisor: Callable[[bytes], object], address: str, wall: NowNs
    ) -> None:
        self._gate = gate
        self._outboxes = outboxes
        self._to_supervisor = to_supervisor
        self._address = address
        self._wall = wall
        self._number = 0
        self._asked: dict[int, asyncio.Future[bytes]] = {}

    async def ask_supervisor(self, what: str, body: bytes, timeout_s: float) -> bytes:
        """The answer of the supervisor. Raises `BusUnreachable` or, where it says no, `BusRejected`."""
        return await self._ask(what, body, self._to_supervisor, timeout_s)

    async def ask_worker(self, outbox: Outbox, what: str, body: bytes, timeout_s: float = _DEAD_LETTERS_S) -> bytes:
        """The answer of a shard's worker. Raises as `ask_supervisor`."""
        return await self._ask(what, body, lambda frame: self._outboxes.send(outbox, frame), timeout_s, outbox.shard)

    async def _ask(
        self, what: str, body: bytes, send: Callable[[bytes], object], timeout_s: float, shard: int | None = None
    ) -> bytes:
        self._gate.check_here()
        check_seconds("timeout", timeout_s)
        self._number += 1
        number = self._number
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        frame = encode_frame(Ask(number, what, body))
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    send(frame)
                    done, _ = await asyncio.wait([future], timeout=min(max(0.5, timeout_s / 4), _ASK_AGAIN_S))
                    if done:
                        return future.result()
        except TimeoutError:
            raise BusUnreachable(self._address, timeout_s, shard) from None
        finally:
            self._asked.pop(number, None)

    def answered(self, frame: Answer) -> None:
        """An answer has arrived."""
        future = self._asked.get(frame.request)
        if future is not None and not future.done():
            if frame.error:
                future.set_exception(BusRejected(frame.error))
            else:
                future.set_result(frame.body)

    def fail(self, error: Exception) -> None:
        """Everybody who waits for an answer hears this."""
        for future in self._asked.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever asked may be gone

    # -- what the supervisor knows

    async def status(self, timeout_s: float) -> dict[str, Any]:
        """See `Client.status`."""
        return msgspec.msgpack.decode(await self.ask_supervisor("status", b"", timeout_s), type=dict[str, Any])

    async def evidence(self, publishers: Sequence[bytes], timeout_s: float) -> list[Evidence]:
        """See `Client.evidence`."""
        # One question each: an answer is one frame, and the histograms of many publishers would not fit into it.
        asked = (self.ask_supervisor("evidence", encode([publisher]), timeout_s) for publisher in publishers)
        return [one for answer in await asyncio.gather(*asked) for one in _decode_evidence(answer)]

    # -- dead letters

    async def dead_letters(self, where: DeadLetterFilter | None, limit: int) -> list[DeadLetter]:
        """See `Client.dead_letters`."""
        check_count("limit", limit, 1)
        found: list[DeadLetter] = []
        for outbox, filter_ in self._asked_shards(where):
            after = 0
            while len(found) < limit:
                body = encode_request(Request(filter_, after, min(_PAGE_ROWS, limit - len(found))))
                page, after = decode_page(await self.ask_worker(outbox, "dead-letters", body), outbox.shard)
                if not page:
                    break
                found += page
        return found[:limit]

    async def redrive(self, where: DeadLetterFilter | None, rate: float | None) -> int:
        """See `Client.redrive`."""
        if rate is not None and not (is_number(rate) and 0 < rate < math.inf):
            raise UsageError(f"rate={rate!r}: give dead letters a second, above 0; None is as fast as they are written")
        return await self._dispose("redrive", where, rate)

    async def purge(self, where: DeadLetterFilter | None) -> int:
        """See `Client.purge`."""
        return await self._dispose("purge", where, None)

    async def _dispose(self, what: str, where: DeadLetterFilter | None, rate: float | None) -> int:
        """Page by page, up to what has died by now: what dies meanwhile, perhaps again, is not meant."""
        until_ns = self._wall()
        total = 0
        began = asyncio.get_running_loop().time()
        for outbox, filter_ in self._asked_shards(where):
            filter_ = replace(filter_, until_ns=until_ns)
            step = _PAGE_ROWS if rate is None else max(1, min(_PAGE_ROWS, int(rate / 4)))
            after = 0
            while True:
                answer = await self.ask_worker(outbox, what, encode_request(Request(filter_, after, step)))
                count, after = decode_count(answer)
                if not after:
                    break
                total += count
                if rate is not None:
                    await asyncio.sleep(max(0.0, began + total / rate - asyncio.get_running_loop().time()))
        return total

    def _asked_shards(self, where: DeadLetterFilter | None) -> list[tuple[Outbox, DeadFilter]]:
        """Each shard that is meant, with what to ask it: more than once where many events are named."""
        if where is not None and not isinstance(where, DeadLetterFilter):
            raise UsageError(f"where={where!r:.100}: give a filter, for instance DeadLetterFilter(type='OrderPlaced')")
        filter_, shards = (where or DeadLetterFilter()).for_shards()
        if shards is None:
            return [(outbox, filter_) for outbox in self._outboxes]
        return [
            (outbox, replace(filter_, events=named[at : at + EVENTS_MAX]))
            for outbox in self._outboxes
            for named in (shards.get(outbox.shard, []),)
            for at in range(0, len(named), EVENTS_MAX)
        ]
