"""What a shard has under way, and the layout in which that outlives its worker.

A journal is a flat buffer of 64-bit words, shared between a worker and its supervisor (`evidence` owns the mapping). The
worker writes down what it is about to run, and its successor reads what a dead one was running. It has

    the stretch that the leader runs synchronously now: publisher, first sequence, the one behind the last, since when
    when the worker lived for certain
    the messages whose handlers are suspended, and a batch that is not one stretch: publisher, sequence, how many, since when
    the messages whose handlers have failed and that wait for their next attempt, in the same rows
    the suspects: what earlier deaths say against a message (`quarantine`), over all incarnations

The lanes write the bounds of a stretch themselves, once a stride, so that it costs a few nanoseconds a message. Of several
words, the one that makes the others count is written last, and taken back first.
"""

from __future__ import annotations

from typing import Final

from shardbus.quarantine import SUSPECTS_MAX, Identity, Scene, Suspect, UnderWay

SUSPENDED: Final = 4096
FIRST: Final = 2  # of the stretch, in `Journal.running`
END: Final = 3
_BEGAN: Final = 4
ALIVE: Final = 5  # when the worker lived for certain: its leader writes it once a stride, its watchdog all the time

_MAGIC: Final = 0x534841524A4E4C32  # "SHARJNL2"
_HEADER: Final = 16  # words: magic, rows, rows, then the counters, then the stretch
_UNWRITTEN: Final = 3  # suspended handlers that found no room
_SUSPECTED: Final = 4
_CONVICTED: Final = 5
_DEATHS: Final = 6
_RUNNING_AT: Final = 8
_SUSPENDED_ROW: Final = 5  # words: publisher, since when, how many (0: one, which waits), sequence + 1 (0: free)
_SEQ_AT: Final = 4
_SUSPECT_ROW: Final = 10  # words: publisher, sequence, alone, free (2: explained), verdict, deaths (0: the row is vacant)
_VERDICT_AT: Final = 5
_VERDICT_CHARS: Final = 32
_DIED_AT: Final = 9
_STRETCH_MAX: Final = 4096  # more than any batch has; a longer one was never written by a worker


class Journal:
    """The journal of one shard, over a buffer that starts as zeros and may already hold a predecessor's.

    When all rows of suspended handlers are taken, further ones are counted and not written down. A death finds those that
    are there, and as they run alone from then on, the next one finds others.
    """

    def __init__(self, buffer: memoryview, *, suspended: int = SUSPENDED, suspects: int = SUSPECTS_MAX) -> None:
        words = buffer.cast("B").cast("Q")
        assert len(words) * 8 == journal_bytes(suspended=suspended, suspects=suspects)
        if words[0] != _MAGIC or words[1] != suspended or words[2] != suspects:
            if any(words[:_HEADER]):  # another layout was here; a buffer that is new is zeros, and stays untouched
                words[:] = memoryview(bytes(len(words) * 8)).cast("Q")
            words[1], words[2] = suspended, suspects
            words[0] = _MAGIC
        self._words = words
        self.running = words[_RUNNING_AT:_HEADER]
        at = _HEADER
        self._suspended = words[at : at + suspended * _SUSPENDED_ROW]
        at += suspended * _SUSPENDED_ROW
        self._suspects = words[at : at + suspects * _SUSPECT_ROW]
        self._rows_max = suspended
        self._free = list(range(suspended - 1, -1, -1))
        self._rows: dict[Identity, int] = {}  # of suspects
        self._vacant: list[int] = []
        self._packed: tuple[bytes, int, int] = (b"", 0, 0)  # the publisher that was packed last
        self._leading = b""

    def release(self) -> None:
        """Let go of the buffer."""
        for view in (self.running, self._suspended, self._suspects, self._words):
            view.release()

    # -- what runs

    def lead(self, publisher: bytes, first: int, end: int, now_ns: int = 0) -> None:
        """The leader is about to run some of these, synchronously; `now_ns` where it matters since when."""
        running = self.running
        running[END] = 0
        if publisher != self._leading:
            running[0], running[1] = self._pack(publisher)
            self._leading = publisher
        running[FIRST] = first
        running[_BEGAN] = now_ns
        running[END] = end

    def pulse(self, now_ns: int) -> None:
        """The worker lives now. Any thread may say so."""
        self.running[ALIVE] = now_ns

    def rest(self) -> None:
        """The leader runs nothing any more."""
        self.running[END] = 0

    def suspend(self, publisher: bytes, seq: int, now_ns: int, count: int = 1) -> int:
        """The handler of this message is suspended, or that of `count` from this on; returns the row for `resume`, or -1
        where there is none."""
        if not self._free:
            self._words[_UNWRITTEN] += 1
            return -1
        row = self._free.pop()
        at = row * _SUSPENDED_ROW
        suspended = self._suspended
        suspended[at], suspended[at + 1] = self._pack(publisher)
        suspended[at + 2] = now_ns
        suspended[at + 3] = count
        suspended[at + _SEQ_AT] = seq + 1
        return row

    def wait(self, publisher: bytes, seq: int, now_ns: int) -> int:
        """A handler of this message has failed, and it waits in memory for its next attempt; as `suspend`, but that half of
        the rows are left for those."""
        return self.suspend(publisher, seq, now_ns, 0) if 2 * len(self._free) > self._rows_max else -1

    def resume(self, row: int) -> None:
        """Its handlers have ended, or it waits no more."""
        self._suspended[row * _SUSPENDED_ROW + _SEQ_AT] = 0
        self._free.append(row)

    def _pack(self, publisher: bytes) -> tuple[int, int]:
        known, low, high = self._packed
        if publisher != known:
            low, high = int.from_bytes(publisher[:8], "little"), int.from_bytes(publisher[8:], "little")
            self._packed = (publisher, low, high)
        return low, high

    # -- what a death left

    def scene(self) -> Scene:
        """What it shows now."""
        low, high, first, end, began_ns, alive_ns, *_ = self.running.tolist()
        running = UnderWay(_publisher(low, high), first, end, began_ns) if first < end <= first + _STRETCH_MAX else None
        rows = self._suspended.tolist()
        suspended: list[UnderWay] = []
        waiting: list[UnderWay] = []
        for at in range(0, len(rows), _SUSPENDED_ROW):
            if (seq := rows[at + _SEQ_AT] - 1) >= 0:
                count = min(rows[at + 3], _STRETCH_MAX)
                one = UnderWay(_publisher(rows[at], rows[at + 1]), seq, seq + max(1, count), rows[at + 2])
                (suspended if count else waiting).append(one)
        for found in (suspended, waiting):
            found.sort(key=lambda one: (one.began_ns, one.first))
        return Scene(
            death=self._words[_DEATHS],
            alive_ns=alive_ns,
            running=running,
            suspended=suspended,
            waiting=waiting,
            suspects=self._read_suspects(),
        )

    def _read_suspects(self) -> dict[Identity, Suspect]:
        words = self._suspects.tolist()
        self._rows, self._vacant = {}, []
        found: dict[Identity, Suspect] = {}
        for at in range(0, len(words), _SUSPECT_ROW):
            if not words[at + _DIED_AT]:
                self._vacant.append(at)
            else:
                identity = (_publisher(words[at], words[at + 1]), words[at + 2])
                text = b"".join(word.to_bytes(8, "little") for word in words[at + _VERDICT_AT : at + _DIED_AT])
                self._rows[identity] = at
                found[identity] = Suspect(
                    died=words[at + _DIED_AT],
                    alone=words[at + 3],
                    free=words[at + 4] > 0,
                    explained=words[at + 4] > 1,
                    verdict=text.rstrip(b"\0").decode("ascii", "replace"),
                )
        return found

    def start_over(self, suspects: dict[Identity, Suspect]) -> None:
        """These are the suspects from now on, and nothing is under way."""
        for identity in self._rows.keys() - suspects.keys():
            self.note(identity, None)
        for identity, suspect in suspects.items():
            self.note(identity, suspect)
        self._words[_DEATHS] = (self._words[_DEATHS] + 1) % 64
        # Last: a kill before this line has the same death judged once more, as somebody else's.
        self.rest()
        self.running[ALIVE] = 0
        for at in range(_SEQ_AT, len(self._suspended), _SUSPENDED_ROW):
            if self._suspended[at]:
                self._suspended[at] = 0

    def note(self, identity: Identity, suspect: Suspect | None) -> None:
        """A suspect as it is now; None: it is none any more. Read the `scene` first: it finds the rows."""
        words = self._suspects
        at = self._rows.get(identity)
        if suspect is None:
            if at is not None:
                words[at + _DIED_AT] = 0
                self._vacant.append(self._rows.pop(identity))
        else:
            if at is None:
                if not self._vacant:
                    return  # `quarantine` remembers no more than there are rows
                at = self._rows[identity] = self._vacant.pop()
                words[at], words[at + 1] = self._pack(identity[0])
                words[at + 2] = identity[1]
            words[at + _DIED_AT] = 0  # a row that is half written counts for nothing
            words[at + 3] = suspect.alone
            words[at + 4] = suspect.free + suspect.explained
            text = suspect.verdict.encode("ascii", "replace")[:_VERDICT_CHARS].ljust(_VERDICT_CHARS, b"\0")
            for step in range(_VERDICT_CHARS // 8):
                words[at + _VERDICT_AT + step] = int.from_bytes(text[8 * step : 8 * step + 8], "little")
            words[at + _DIED_AT] = suspect.died

    def tell(self, suspected: int, convicted: int) -> None:
        """Let the supervisor know how many there are."""
        self._words[_SUSPECTED], self._words[_CONVICTED] = suspected, convicted

    # -- the supervisor's side

    def counts(self) -> tuple[int, int, int]:
        """Suspects; of the convicted, those that are not dead letters yet; suspended handlers that ever found no row."""
        return self._words[_SUSPECTED], self._words[_CONVICTED], self._words[_UNWRITTEN]

    @property
    def deaths(self) -> int:
        """How many deaths have been judged, of the last 64: it changes when a worker takes the journal over."""
        return self._words[_DEATHS]

    def names_somebody(self) -> bool:
        """Whether anything is under way, so that a death now says something."""
        scene = self.scene()
        return scene.running is not None or bool(scene.suspended or scene.waiting)


def _publisher(low: int, high: int) -> bytes:
    return low.to_bytes(8, "little") + high.to_bytes(8, "little")


def journal_bytes(*, suspended: int = SUSPENDED, suspects: int = SUSPECTS_MAX) -> int:
    """The size of a journal's buffer."""
    return 8 * (_HEADER + suspended * _SUSPENDED_ROW + suspects * _SUSPECT_ROW)
