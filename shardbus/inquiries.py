"""What clients ask a shard about its store: to list, redrive or purge dead letters, to cancel a scheduled event.

Owns who waits for which answer, the answers given last, and which dead letters are on their way back into lanes. The store's
writer answers questions, behind what it writes. Their words are in `dead_letters` and `scheduled_events`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from shardbus.acks import Send
from shardbus.clock import NowNs
from shardbus.dead_letters import Request, decode_request, encode_answer, page_of
from shardbus.envelopes import Envelopes
from shardbus.errors import RemoteProtocolError
from shardbus.lane_rows import LaneRows
from shardbus.lanes import Lanes
from shardbus.messages import WireKey
from shardbus.quarantine import Quarantine
from shardbus.schedule import Schedule
from shardbus.scheduled_events import CANCEL, decode_cancel
from shardbus.store import DeadLetter, Store, StoredDeadLetter, StoreError
from shardbus.store_writer import StoreWriter
from shardbus.wire.frames import Answer, Ask, encode_frame

_ASKED_MAX: Final = 256
_ANSWERS_MAX: Final = 64  # of up to a megabyte
_ASKED_NS: Final = 20_000_000_000  # somebody who wants an answer asks again sooner
_PAGE_ROWS_MAX: Final = 256  # dead letters a question and answer
_PAGE_BYTES_MAX: Final = 1024 * 1024  # of their bodies, so that a page of large ones neither blocks nor bloats a worker

_Asked = tuple[bytes, int]
"""A question: who asks, and its number."""


class Inquiries:
    """The questions to one shard. One more than `_ASKED_MAX` at a time is ignored: whoever wants an answer asks again. The
    last answers are remembered, for whoever missed them."""

    def __init__(
        self,
        shard: int,
        store: Store,
        writer: StoreWriter,
        schedule: Schedule,
        lanes: Lanes,
        rows: LaneRows,
        envelopes: Envelopes,
        quarantine: Quarantine,
        send: Send,
        now: NowNs,
    ) -> None:
        self._shard = shard
        self._store = store
        self._writer = writer
        self._schedule = schedule
        self._lanes = lanes
        self._rows = rows
        self._envelopes = envelopes
        self._quarantine = quarantine
        self._send = send
        self._now = now
        self._asked: dict[_Asked, int] = {}  # what waits for its answer, and when it was asked last
        self._answers: OrderedDict[_Asked, bytes] = OrderedDict()
        self._leaving: set[int] = set()  # rows of dead letters that are being redriven

    def ask(self, peer: bytes, ask: Ask) -> None:
        """Answer once the store has; at once what was answered before, and what is no question."""
        asked = (peer, ask.request)
        known = self._answers.get(asked)
        if known is not None:
            self._send(peer, known)
            return
        is_new = asked not in self._asked
        if is_new and len(self._asked) >= _ASKED_MAX:
            return
        self._asked[asked] = self._now()
        if is_new:
            try:
                if ask.what == CANCEL:
                    self._writer.add_read(partial(self._cancel_scheduled, asked, decode_cancel(ask)))
                else:
                    self._writer.add_read(partial(self._answer_from_store, asked, ask.what, decode_request(ask)))
            except RemoteProtocolError as error:
                self._deny(asked, str(error))

    async def _cancel_scheduled(self, asked: _Asked, event: tuple[bytes, int]) -> None:
        if self._is_stale(asked):
            return
        try:
            cancelled = await self._schedule.cancel(*event)
        except StoreError as error:
            self._deny(asked, self._told(error))
            return
        self._answer(asked, cancelled)

    async def _answer_from_store(self, asked: _Asked, what: str, request: Request) -> None:
        if self._is_stale(asked):
            return
        limit = min(request.limit, _PAGE_ROWS_MAX)
        try:
            found = await self._store.dead_letters(request.where, request.after, limit, _PAGE_BYTES_MAX)
            if what == "dead-letters":
                self._answer(asked, page_of(found))
                return
            last = found[-1].row if found else 0
            found = [one for one in found if one.row not in self._leaving]
            if what == "purge":
                self._answer(asked, (await self._purge(found), last))
                return
        except StoreError as error:
            self._deny(asked, self._told(error))
            return
        self._redrive(found, lambda count: self._answer(asked, (count, last)))

    async def _purge(self, found: Sequence[StoredDeadLetter]) -> int:
        """Remove dead letters; those that parked a lane do so no longer. Return how many there were.

        Raises:
            StoreError: they were not removed.
        """
        purged = await self._writer.purge([one.row for one in found])
        for one in found:
            if one.letter.position:
                self._lanes.unpark(one.letter.envelope.key)
        return purged

    def _redrive(self, found: Sequence[StoredDeadLetter], answer: Callable[[int], None]) -> None:
        """Put dead letters back at the end of their lanes, and what parked its lane at the head of that; answer once all is
        committed."""
        left = 0
        redriven = 0

        def committed(one: StoredDeadLetter) -> None:
            nonlocal left
            self._leaving.discard(one.row)
            if one.letter.position:
                self._lanes.unpark(one.letter.envelope.key, one.letter.position)
            left -= 1
            if not left:
                answer(redriven)

        for one in found:
            key, parks = one.letter.envelope.key, one.letter.position > 0
            if not parks and not self._may_rejoin(key, one.letter):
                continue  # it stays dead
            event = self._envelopes.revived(one, 0 if parks else self._rows.new_position())
            self._quarantine.clear((event.envelope.publisher, event.envelope.seq))
            self._leaving.add(one.row)
            left += 1
            redriven += 1
            if parks:
                self._writer.add_revived(event, partial(committed, one), one.row)
            else:
                self._writer.add_waiting(event, partial(committed, one), one.row)
                self._lanes.rejoin(key, event.position)
        if not redriven:
            answer(0)

    def _may_rejoin(self, key: WireKey, letter: DeadLetter) -> bool:
        """Whether a dead letter may wait at the end of its lane: that can go to the store now, and there is room."""
        may_redrive = self._writer.may_redrive
        # Asked again, because the lane may go to the store for it, and need room there.
        return may_redrive(letter) and self._lanes.can_rejoin(key) and may_redrive(letter)

    # -- answers

    def _is_stale(self, asked: _Asked) -> bool:
        """Whether nobody waits for this answer any more; who did has been told so."""
        stale = self._now() - self._asked[asked] > _ASKED_NS
        if stale:
            del self._asked[asked]
        return stale

    def _told(self, error: StoreError) -> str:
        return f"the store of shard {self._shard} cannot do that now: {error}"

    def _answer(self, asked: _Asked, body: object) -> None:
        self._say(asked, Answer(asked[1], "", encode_answer(body)))

    def _deny(self, asked: _Asked, why: str) -> None:
        self._say(asked, Answer(asked[1], why, b""))

    def _say(self, asked: _Asked, answer: Answer) -> None:
        del self._asked[asked]
        frame = self._answers[asked] = encode_frame(answer)
        if len(self._answers) > _ANSWERS_MAX:
            self._answers.popitem(last=False)
        self._send(asked[0], frame)
