"""What a shard can prove of its work, and the layout in which it says so.

A book is a flat buffer of 64-bit words, shared between a worker and its supervisor (`evidence` owns the mapping). The
worker writes it after the handler and before the ack, outside the application's code, so it survives a SIGKILL and holds
for anybody's application. It has

    counters of the shard
    a row for each publisher that stamps its events, and its latency histogram
    the last ordinal of each (publisher, key), in a ring: when it is full, the key that entered first is forgotten

An ordinal counts one publisher's events of one key: 1, 2, 3, … So the next ordinal is in order, a lower one is a repeat
(or a late one, if it was missing), and a gap is missing until it comes. `distinct` follows from the last ordinals alone,
one word a key, so that no kill at any instant can make it wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress, repeat
from operator import eq
from typing import Final

import msgspec

from shardbus.messages import WireKey
from shardbus.routing import stable_hash

# -- latency buckets: whole microseconds up to 2,047, then 1,024 buckets for each power of two (3 significant digits,
#    as in HdrHistogram, http://hdrhistogram.org), up to 2³⁶ µs (19 hours)

_LINEAR: Final = 2048
_HALF: Final = 1024
_BITS_MAX: Final = 36
BUCKETS: Final = _LINEAR + _HALF * (_BITS_MAX - 11)


def bucket_index(value_us: int) -> int:
    """The bucket that counts a latency of `value_us` microseconds; negative ones count as 0."""
    if value_us < _LINEAR:
        return max(0, value_us)
    shift = value_us.bit_length() - 11
    return min(BUCKETS - 1, _LINEAR + (shift - 1) * _HALF + (value_us >> shift) - _HALF)


def bucket_bounds_us(index: int) -> tuple[int, int]:
    """The lowest and the highest value that bucket `index` counts, in microseconds."""
    if index < _LINEAR:
        return index, index
    shift, rest = divmod(index - _LINEAR, _HALF)
    low = (rest + _HALF) << (shift + 1)
    return low, low + (1 << (shift + 1)) - 1


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What one shard can say of one publisher's stamped events.

    `distinct` events reached an outcome; `repeats` came again, `announced` of them said so; `out_of_order` came after a
    later one of their key; `missing` were overtaken and have not come; `unchecked` are of keys that were forgotten and
    came back. `samples` latencies were recorded, in `latency` as (bucket, count).
    """

    shard: int
    publisher: bytes
    distinct: int
    repeats: int
    announced: int
    out_of_order: int
    missing: int
    unchecked: int
    dead: int
    samples: int
    latency: list[tuple[int, int]]


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard has done since its book was made, over all its workers."""

    handled: int
    dead: int
    stored: int
    malformed: int
    ignored: int
    rejected: int


COUNTERS: Final = Counters.__struct_fields__
_MAGIC: Final = 0x5348415244423031  # "SHARDB01"
_HEADER: Final = 16  # words: magic, keys, publishers, ring position, then the counters
_COUNTERS_AT: Final = 8
_ROW: Final = 16  # words a publisher
_ID, _USED, _RETIRED, _REPEATS, _ANNOUNCED, _OUT_OF_ORDER, _MISSING, _UNCHECKED, _DEAD, _SAMPLES = (
    0,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
)
_ORDINAL_MAX: Final = 2**40  # of one publisher's events of one key
_USE_NOTE_NS: Final = 100_000_000  # how exactly it is known when a row was used last
_OVERTAKEN_MAX: Final = 65_536  # ordinals that were overtaken and are remembered one by one, for each publisher


class Book:
    """The evidence of one shard, over a buffer that starts as zeros and may already hold a predecessor's evidence."""

    def __init__(self, buffer: memoryview, *, keys: int, publishers: int) -> None:
        words = buffer.cast("B").cast("Q")
        assert len(words) * 8 == book_bytes(keys=keys, publishers=publishers)
        if words[0] != _MAGIC or words[1] != keys or words[2] != publishers:
            if any(words[:_HEADER]):  # another layout was here; a buffer that is new is zeros, and stays untouched
                words[:] = memoryview(bytes(len(words) * 8)).cast("Q")
            words[1], words[2] = keys, publishers
            words[0] = _MAGIC
        self._words = words
        self._keys = keys
        self._publishers = publishers
        at = _HEADER
        self._rows = words[at : at + publishers * _ROW]
        at += publishers * _ROW
        self._histograms = words[at : at + publishers * BUCKETS]
        at += publishers * BUCKETS
        self._hashes = words[at : at + keys]
        at += keys
        self._owners = words[at : at + keys]  # the publisher's row + 1; 0: free
        at += keys
        self.last = words[at : at + keys]
        self.known: list[int] = self.last.tolist()  # the same to read: a list's element costs a third of a view's
        # What the buffer holds already, until its key is seen again.
        self._inherited: dict[tuple[int, int], int] = {
            (owner, self._hashes[at]): at for at, owner in enumerate(self._owners) if owner
        }
        self._seen: list[tuple[PublisherBook, WireKey] | None] = [None] * keys
        self._books: dict[bytes, PublisherBook] = {}

    def release(self) -> None:
        """Let go of the buffer."""
        self._books.clear()
        for view in (self._rows, self._histograms, self._hashes, self._owners, self.last, self._words):
            view.release()

    # -- the worker's side

    def count(self, counter: str, by: int = 1) -> None:
        """Add to one of `COUNTERS`."""
        self._words[_COUNTERS_AT + COUNTERS.index(counter)] += by

    def add_handled(self, by: int) -> None:
        """Add to `handled`: the counter that is written once a slice."""
        self._words[_COUNTERS_AT] += by

    def write_latencies(self) -> None:
        """Write what was measured since the last time."""
        for book in self._books.values():
            if book.latencies_us:
                book.write_latencies()

    def publisher(self, publisher: bytes, now_ns: int) -> PublisherBook:
        """The book of a publisher, used now. When all rows are taken, the one that was used least recently is given away."""
        book = self._books.get(publisher)
        if book is None:
            row = self._row_of(publisher)
            if row is None:
                row = self._vacate_row()
                self._rows[row * _ROW + _ID] = int.from_bytes(publisher[:8], "little")
                self._rows[row * _ROW + _ID + 1] = int.from_bytes(publisher[8:], "little")
            book = self._books[publisher] = PublisherBook(self, row, publisher)
        self._rows[book.row * _ROW + _USED] = now_ns
        return book

    def _row_of(self, publisher: bytes) -> int | None:
        low, high = int.from_bytes(publisher[:8], "little"), int.from_bytes(publisher[8:], "little")
        for row in range(self._publishers):
            at = row * _ROW
            if self._rows[at + _USED] and self._rows[at + _ID] == low and self._rows[at + _ID + 1] == high:
                return row
        return None

    def _vacate_row(self) -> int:
        row = min(range(self._publishers), key=lambda candidate: self._rows[candidate * _ROW + _USED])
        if self._rows[row * _ROW + _USED]:
            for publisher, book in list(self._books.items()):
                if book.row == row:
                    del self._books[publisher]
                    book.retired = True
            for at, owner in enumerate(self._owners):
                if owner == row + 1:
                    self._forget(at)
            self._rows[row * _ROW : (row + 1) * _ROW] = memoryview(bytes(_ROW * 8)).cast("Q")
            zeros = memoryview(bytes(BUCKETS * 8)).cast("Q")
            self._histograms[row * BUCKETS : (row + 1) * BUCKETS] = zeros
        return row

    def _forget(self, at: int) -> None:
        owner = self._owners[at]
        seen = self._seen[at]
        if seen is None:
            self._inherited.pop((owner, self._hashes[at]), None)
        else:
            book, key = seen
            book.positions.pop(key, None)
            self._seen[at] = None
        # Retired first: a kill in between counts a key twice, and never reports a loss that was none.
        at_row = (owner - 1) * _ROW + _RETIRED
        self._rows[at_row] = (self._rows[at_row] + self.last[at]) % 2**64
        self.last[at] = self.known[at] = 0
        self._owners[at] = 0

    def _place(self, book: PublisherBook, key: WireKey) -> int:
        """Find the word of a key that this process has not seen, or make one."""
        digest = stable_hash(key)
        at = self._inherited.pop((book.row + 1, digest), None)
        if at is None:
            at = self._words[3]
            self._words[3] = (at + 1) % self._keys
            if self._owners[at]:
                self._forget(at)
            self.last[at] = self.known[at] = 0
            self._hashes[at] = digest
            self._owners[at] = book.row + 1
        book.positions[key] = at
        self._seen[at] = (book, key)
        return at

    # -- the supervisor's side

    def counters(self) -> Counters:
        """The shard's counters now."""
        return Counters(**{name: self._words[_COUNTERS_AT + at] for at, name in enumerate(COUNTERS)})

    def evidence(self, shard: int, publisher: bytes) -> Evidence | None:
        """What this shard can say of a publisher; None: it has seen nothing stamped of it."""
        row = self._row_of(publisher)
        if row is None:
            return None
        words = self._rows[row * _ROW : (row + 1) * _ROW].tolist()
        # Before the ring has come round once, what lies behind its position was never used: loadgen asks every second.
        used = self._keys if self._owners[self._keys - 1] else self._words[3]
        of_row = map(eq, self._owners[:used].tolist(), repeat(row + 1))
        # A gap's ordinals are part of the last ordinal and never came; what was retired was counted when it was forgotten.
        last = sum(compress(self.last[:used].tolist(), of_row))
        histogram = self._histograms[row * BUCKETS : (row + 1) * BUCKETS].tolist()
        return Evidence(
            shard=shard,
            publisher=publisher,
            distinct=_signed(words[_RETIRED]) + last - words[_MISSING],
            repeats=words[_REPEATS],
            announced=words[_ANNOUNCED],
            out_of_order=words[_OUT_OF_ORDER],
            missing=words[_MISSING],
            unchecked=words[_UNCHECKED],
            dead=words[_DEAD],
            samples=words[_SAMPLES],
            latency=list(compress(enumerate(histogram), histogram)),
        )


class PublisherBook:
    """One publisher's part of a book.

    Where an ordinal is the next one, that is a word to write, because that is every event; all else is `irregular`.
    `latencies_us` (microseconds → how often) is written before the ack, because there many events share a value. A retired
    book has lost its row and takes nothing more.
    """

    __slots__ = (
        "_book",
        "_overtaken",
        "_use_ns",
        "known",
        "last",
        "latencies_us",
        "positions",
        "publisher",
        "retired",
        "row",
    )

    def __init__(self, book: Book, row: int, publisher: bytes) -> None:
        self._book = book
        self.row = row
        self.publisher = publisher
        self.positions: dict[WireKey, int] = {}
        self.latencies_us: dict[int, int] = {}
        self.last = book.last
        self.known = book.known
        self.retired = False
        self._overtaken: set[tuple[WireKey, int]] = set()
        self._use_ns = 0

    def note_all(self, keys: Iterable[WireKey], ordinals: Iterable[int], attempt: int) -> None:
        """Events with these keys and ordinals reached their outcomes in this order; ordinal 0: it has none."""
        positions, known, last = self.positions, self.known, self.last
        for key, ordinal in zip(keys, ordinals, strict=True):
            if ordinal:
                at = positions.get(key)
                if at is not None and known[at] == ordinal - 1:
                    known[at] = last[at] = ordinal
                else:
                    self.irregular(key, ordinal, attempt)

    def measure_all(self, intended_ns: Iterable[int], ended_ns: Iterable[int]) -> None:
        """Events with these intended instants were handled at those; 0: it has none."""
        latencies = self.latencies_us
        for ended, intended in zip(ended_ns, intended_ns, strict=True):
            if intended:
                latency_us = (ended - intended) // 1000
                latencies[latency_us] = latencies.get(latency_us, 0) + 1

    def note(self, key: WireKey, ordinal: int, attempt: int) -> None:
        """An event with this ordinal reached its outcome."""
        at = self.positions.get(key)
        if at is not None and self.known[at] == ordinal - 1:
            self.known[at] = self.last[at] = ordinal
        else:
            self.irregular(key, ordinal, attempt)

    def irregular(self, key: WireKey, ordinal: int, attempt: int) -> None:
        """An outcome that is not simply the next of a key that this process knows."""
        if self.retired:
            return
        if ordinal > _ORDINAL_MAX:  # nobody counts so far; sums of such numbers would not fit
            self._add(_UNCHECKED, 1)
            return
        at = self.positions.get(key)
        if at is None:
            at = self._book._place(self, key)
        last = self.known[at]
        if ordinal == last + 1:
            self.known[at] = self.last[at] = ordinal
        elif ordinal <= last:
            self._come_back(key, ordinal, attempt)
        elif last == 0 and self._word(_RETIRED):
            # Keys of this publisher were forgotten, and this may be one: its past was counted when it was retired.
            self._add(_RETIRED, 1 - ordinal)
            self._add(_UNCHECKED, 1)
            self.known[at] = self.last[at] = ordinal
        else:
            self._add(_MISSING, ordinal - last - 1)
            room = _OVERTAKEN_MAX - len(self._overtaken)
            self._overtaken.update((key, number) for number in range(last + 1, min(ordinal, last + 1 + room)))
            self.known[at] = self.last[at] = ordinal

    def _come_back(self, key: WireKey, ordinal: int, attempt: int) -> None:
        if (key, ordinal) in self._overtaken:
            self._overtaken.discard((key, ordinal))
            self._add(_MISSING, -1)
            self._add(_OUT_OF_ORDER, 1)
        else:
            self._add(_REPEATS, 1)
            if attempt > 1:
                self._add(_ANNOUNCED, 1)

    def used(self, now_ns: int) -> None:
        """Something of this publisher came: its row is not the one to give away."""
        if now_ns >= self._use_ns and not self.retired:
            self._use_ns = now_ns + _USE_NOTE_NS
            self._book._rows[self.row * _ROW + _USED] = now_ns

    def note_dead(self) -> None:
        """A stamped event became a dead letter."""
        if not self.retired:
            self._add(_DEAD, 1)

    def measured(self, latency_us: int) -> None:
        """An event was handled so long after its intended instant."""
        self.latencies_us[latency_us] = self.latencies_us.get(latency_us, 0) + 1

    def write_latencies(self) -> None:
        """Add `latencies_us` to the histogram."""
        if not self.retired:
            base = self.row * BUCKETS
            histograms = self._book._histograms
            for value_us, count in self.latencies_us.items():
                histograms[base + bucket_index(value_us)] += count
            self._add(_SAMPLES, sum(self.latencies_us.values()))
        self.latencies_us.clear()

    def _word(self, field: int) -> int:
        return self._book._rows[self.row * _ROW + field]

    def _add(self, field: int, by: int) -> None:
        at = self.row * _ROW + field
        self._book._rows[at] = (self._book._rows[at] + by) % 2**64


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def book_bytes(*, keys: int, publishers: int) -> int:
    """The size of a book's buffer."""
    return 8 * (_HEADER + publishers * (_ROW + BUCKETS) + 3 * keys)
