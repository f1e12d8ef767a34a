"""What a shard can prove of its work, and the layout in which it says so.

A book is a flat buffer of 64-bit words, shared between a worker and its supervisor (`evidence` owns the mapping). It has

    counters of the shard
    a row for each publisher that stamps its events
    histograms of each publisher's response, service and queue times, in words of 32 bits
    the last ordinal of each (publisher, key), in a ring: when it is full, the key that entered first is forgotten
    a log: a ring of records that say which stamped events reached their outcome

The worker appends to the log, after the handlers and before the ack, outside the application's code, so it survives a
SIGKILL and holds for anybody's application. The supervisor folds the log into the rest. To append costs the worker a copy of
the columns that it has, a few nanoseconds an event; to hold every event against the last one of its key costs 0.2 µs, and is
done where no event waits for it.

An ordinal counts one publisher's events of one key: 1, 2, 3, … So the next ordinal is in order, a lower one is a repeat
(or a late one, if it was missing), and a gap is missing until it comes. `distinct` follows from the last ordinals alone,
one word a key, so that no kill at any instant can make it wrong.

An event's *response time* runs from its intended instant to the end of its handlers. It falls into the *queue time*, up to
where they begin, and the *service time*, which is that of the attempt that settled it. Where events are handled one straight
after another, each begins when the one before has ended, so a clock is read once an event for all three.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import compress, repeat
from operator import add, eq, floordiv, rshift, sub
from typing import Final

import msgspec

from shardbus.config import DEFAULT_LIMITS
from shardbus.messages import WireKey
from shardbus.routing import stable_hash
from shardbus.wire.codec import KEYS_BYTES_MAX, pack_keys, unpack_keys

# -- buckets of times: whole microseconds up to 2,047, then 1,024 buckets for each power of two (3 significant digits,
#    as in HdrHistogram, http://hdrhistogram.org), up to 2³⁶ µs (19 hours)

_LINEAR: Final = 2048
_HALF: Final = 1024
_BITS_MAX: Final = 36
BUCKETS: Final = _LINEAR + _HALF * (_BITS_MAX - 11)


def bucket_index(value_us: int) -> int:
    """The bucket that counts a time of `value_us` microseconds; negative ones count as 0."""
    if value_us < _LINEAR:
        return max(0, value_us)
    shift = value_us.bit_length() - 11
    return min(BUCKETS - 1, _LINEAR + (shift - 1) * _HALF + (value_us >> shift) - _HALF)


def bucket_indices(values_us: Sequence[int]) -> Iterable[int]:
    """The bucket of each; there is at least one value."""
    low, high = min(values_us), max(values_us)
    if low >= 0 and high < _LINEAR:
        return values_us
    bits = low.bit_length()
    if low >= _LINEAR and bits == high.bit_length() <= _BITS_MAX:  # neighbours mostly are of one size
        shift = bits - 11
        first = _LINEAR + (shift - 1) * _HALF - _HALF
        return map(add, map(rshift, values_us, repeat(shift)), repeat(first))
    return [value if 0 <= value < _LINEAR else bucket_index(value) for value in values_us]


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
    came back. `dead` events were dead letters at their first outcome: no repeat counts again. `samples` events have times,
    as (bucket, count): in `latency` their response times, in `service` and `queue` the two parts of them. A bucket
    counts no further than 4,294,967,295.

    Where more publishers at once stamp their events than a book has rows, some have none, or had to give it away; theirs is
    not `complete`: more has happened than it says, so it proves no loss.
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
    service: list[tuple[int, int]]
    queue: list[tuple[int, int]]
    complete: bool = True


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard has done since its book was made, over all its workers."""

    handled: int
    dead: int
    stored: int
    malformed: int
    ignored: int
    rejected: int


COUNTERS: Final = Counters.__struct_fields__
_MAGIC: Final = 0x5348415244423034  # "SHARDB04"
_HEADER: Final = 16  # words: magic, keys, publishers, size of the log, place in the ring of keys, head, tail, counters
_KEY_RING_AT: Final = 4
_HEAD_AT: Final = 5  # bytes that were ever appended to the log; the worker's
_TAIL_AT: Final = 6  # of them, those that are folded; the supervisor's
_COUNTERS_AT: Final = 8
_COUNTER_AT: Final = {name: at for at, name in enumerate(COUNTERS, _COUNTERS_AT)}
_ROW: Final = 16  # words a publisher
_ID, _USED, _RETIRED, _REPEATS, _ANNOUNCED, _OUT_OF_ORDER, _MISSING, _UNCHECKED, _DEAD, _SAMPLES, _INCOMPLETE = (
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
    11,
)
_TIMES_KEPT: Final = 3  # of an event: response, service, queue
_HISTOGRAM_WORDS: Final = _TIMES_KEPT * BUCKETS // 2  # a publisher; two counts a word
_COUNT_MAX: Final = 2**32 - 1  # of a bucket; it stays there
_ORDINAL_MAX: Final = 2**40  # of one publisher's events of one key
_TOGETHER_MIN: Final = 64  # times of fewer events are counted together with others
_UNKNOWN: Final = -1  # the place of a key that has none: behind the ring
_UNMARKED_MAX: Final = 16  # records that are folded before they are marked as such
_UNWRITTEN_MAX: Final = 16_384  # events whose times may be lost with the supervisor
_IN_USE_NS: Final = 1_000_000_000  # a row that was used since is nobody else's: to give it away and back costs milliseconds
_WITHOUT_ROW_MAX: Final = 1024  # publishers that are remembered for having none, or for having lost it
_OVERTAKEN_MAX: Final = 8192  # ordinals that were overtaken and are remembered one by one, for each publisher: 1 MB

# A record: its size in bytes, publisher, events, bytes of keys, attempt, which are dead, which columns follow the keys.
# The dead ones are a set of bits, the first event's the lowest: only events that were noted one by one can be dead.
# The first field alone, with the highest bit set, is a gap up to the end of the ring.
_RECORD: Final = struct.Struct("<Q16sIIIII4x")
_GAP: Final = 1 << 63
# With times come the intended instants, and when the first event began and each one ended: a column that is longer by one.
# Where each has a beginning of its own, the beginnings are a column, and the ends another.
_ORDINALS, _TIMES, _BEGINNINGS = 1, 2, 4
_LOG_BYTES: Final = 1280 * 1024  # at 500,000 events/s of short keys: 0.19 s, with intended instants 0.09 s
_GATHERED_MAX: Final = 32  # events that were noted one by one, to a record: what a killed worker may take with it
assert _GATHERED_MAX <= 32  # a bit each
_RECORD_BYTES_MAX: Final = _RECORD.size + KEYS_BYTES_MAX + 4 * 8 * (DEFAULT_LIMITS.batch_events_max + 1)
# Where one would not fit before the end of the ring, it leaves that as a gap, and has to fit into the rest.
assert 2 * _RECORD_BYTES_MAX <= _LOG_BYTES


class _Mapped:
    """The parts of a book's buffer, which starts as zeros and may already hold what predecessors wrote."""

    def __init__(self, buffer: memoryview, *, keys: int, publishers: int, log_bytes: int = _LOG_BYTES) -> None:
        octets = buffer.cast("B")
        words = octets.cast("Q")
        assert len(octets) == book_bytes(keys=keys, publishers=publishers, log_bytes=log_bytes)
        if words[:4].tolist() != [_MAGIC, keys, publishers, log_bytes]:
            if any(words[:_HEADER]):  # another layout was here; a buffer that is new is zeros, and stays untouched
                words[:] = memoryview(bytes(len(octets))).cast("Q")
            words[1], words[2], words[3] = keys, publishers, log_bytes
            words[0] = _MAGIC
        self._words = words
        self._keys = keys
        self._publishers = publishers
        self._log_bytes = log_bytes
        self._log = octets[len(octets) - log_bytes :]
        octets.release()

    def counters(self) -> Counters:
        """The shard's counters now."""
        return Counters(**{name: self._words[_COUNTERS_AT + at] for at, name in enumerate(COUNTERS)})

    def release(self) -> None:
        """Let go of the buffer."""
        self._log.release()
        self._words.release()


class Recorder(_Mapped):
    """The worker's side of a book: counts, and appends to the log.

    Where the log is full, `full` is called until there is room: it waits for the supervisor, or does its work.
    """

    def __init__(
        self,
        buffer: memoryview,
        *,
        keys: int,
        publishers: int,
        full: Callable[[], object],
        log_bytes: int = _LOG_BYTES,
    ) -> None:
        super().__init__(buffer, keys=keys, publishers=publishers, log_bytes=log_bytes)
        self._full = full
        self._head = self._words[_HEAD_AT]
        self._tail = self._words[_TAIL_AT]  # as it was seen last
        # Single events of one publisher and attempt, gathered until something else comes, or an ack.
        self._of: tuple[bytes, int] = (b"", 0)
        self._noted_keys: list[WireKey] = []
        self._ordinals: list[int] = []
        self._intended_ns: list[int] = []
        self._began_ns: list[int] = []
        self._ended_ns: list[int] = []
        self._dead = 0  # a bit for each that is

    def count(self, counter: str, by: int = 1) -> None:
        """Add to one of `COUNTERS`."""
        self._words[_COUNTER_AT[counter]] += by

    def add_handled(self, by: int) -> None:
        """Add to `handled`: the counter that is written once a slice."""
        self._words[_COUNTERS_AT] += by

    def note(
        self,
        publisher: bytes,
        key: WireKey,
        ordinal: int,
        attempt: int,
        intended_ns: int,
        began_ns: int,
        ended_ns: int,
        *,
        dead: bool,
    ) -> None:
        """An event reached its outcome; 0: it has no ordinal, or no intended instant. Written by `flush`.

        Its handlers ran from `began_ns` to `ended_ns`; nobody looks at these without an intended instant.
        """
        if self._of != (publisher, attempt) or len(self._noted_keys) >= _GATHERED_MAX:
            self.flush()
            self._of = (publisher, attempt)
        self._dead |= dead << len(self._noted_keys)
        self._noted_keys.append(key)
        self._ordinals.append(ordinal)
        self._intended_ns.append(0 if dead else intended_ns)
        self._began_ns.append(began_ns)
        self._ended_ns.append(ended_ns)

    def flush(self) -> None:
        """Write what was noted one by one: before an ack says that it is finished."""
        keys = self._noted_keys
        if keys:
            dead, self._dead = self._dead, 0
            packed = struct.Struct(f"<{len(keys)}q").pack
            columns, which = packed(*self._ordinals), _ORDINALS
            if any(self._intended_ns):
                columns += packed(*self._intended_ns) + packed(*self._began_ns) + packed(*self._ended_ns)
                which |= _TIMES | _BEGINNINGS
            self._append(*self._of, len(keys), pack_keys(keys), columns, which, dead)
            for column in (keys, self._ordinals, self._intended_ns, self._began_ns, self._ended_ns):
                column.clear()

    def note_all(
        self,
        publisher: bytes,
        attempt: int,
        packed_keys: bytes | memoryview,
        events: int,
        ordinals: bytes | None,
        intended_ns: bytes | None,
        began_ns: int,
        ended_ns: Sequence[int],
    ) -> None:
        """Events were handled in this order. Keys and stamps as they came: 8 bytes a stamp, 0 for none; None: no stamps.

        The first one's handler began at `began_ns`, and every other when the one before had ended.
        """
        if self._noted_keys:
            self.flush()  # what was noted before comes before
        columns, which = (b"", 0) if ordinals is None else (ordinals, _ORDINALS)
        if intended_ns is not None:
            columns += intended_ns + struct.pack(f"<{len(ended_ns) + 1}q", began_ns, *ended_ns)
            which |= _TIMES
        self._append(publisher, attempt, events, packed_keys, columns, which, 0)

    def _append(
        self,
        publisher: bytes,
        attempt: int,
        events: int,
        packed_keys: bytes | memoryview,
        columns: bytes,
        which: int,
        dead: int,
    ) -> None:
        """Write a record of packed keys, and then the columns that `which` says."""
        key_bytes = len(packed_keys)
        size = _RECORD.size + key_bytes + len(columns)
        size += -size % 8
        at = self._head % self._log_bytes
        if at + size > self._log_bytes or self._head + size - self._tail > self._log_bytes:
            at = self._room_for(size)
        log = self._log
        _RECORD.pack_into(log, at, size, publisher, events, key_bytes, attempt, dead, which)
        at += _RECORD.size
        end = at + key_bytes
        log[at:end] = packed_keys
        log[end : end + len(columns)] = columns
        self._head += size
        self._words[_HEAD_AT] = self._head  # last: now it is there

    def _room_for(self, size: int) -> int:
        """Where a record of `size` bytes is to be written, in one piece."""
        at = self._head % self._log_bytes
        gap = self._log_bytes - at if self._log_bytes - at < size else 0
        while self._head + gap + size - self._tail > self._log_bytes:
            self._tail = self._words[_TAIL_AT]
            if self._head + gap + size - self._tail > self._log_bytes:
                self._full()
        if gap:
            self._log[at : at + 8] = (_GAP | gap).to_bytes(8, "little")
            self._head += gap
            at = 0
        return at


class Book(_Mapped):
    """The supervisor's side: folds the log, and tells what the shard can prove."""

    def __init__(self, buffer: memoryview, *, keys: int, publishers: int, log_bytes: int = _LOG_BYTES) -> None:
        super().__init__(buffer, keys=keys, publishers=publishers, log_bytes=log_bytes)
        words = self._words
        at = _HEADER
        self._rows = words[at : at + publishers * _ROW]
        at += publishers * _ROW
        histograms = words[at : at + publishers * _HISTOGRAM_WORDS]
        self._histograms = histograms.cast("B").cast("I")  # a container has little room on RAM
        histograms.release()
        at += publishers * _HISTOGRAM_WORDS
        self._hashes = words[at : at + keys]
        at += keys
        self._owners = words[at : at + keys]  # the publisher's row + 1; 0: free
        at += keys
        self.last = words[at : at + keys]
        # What the buffer holds already, until its key is seen again.
        self._inherited: dict[tuple[int, int], int] = {
            (owner, self._hashes[at]): at for at, owner in enumerate(self._owners) if owner
        }
        # Of each place in the ring, whose key is there, if this process has seen it, and which.
        self._seen: list[PublisherBook | None] = [None] * keys
        self._keys_seen: list[WireKey] = [None] * keys
        # The last ordinals of the keys that this process has seen, by their places. The buffer has them after
        # `write_ordinals`: to write there costs as much as all else, and one word a key will do for what is folded together.
        # Behind the ring is one that no ordinal follows.
        self.ordinals: list[int] = [*([0] * keys), -2]
        self._books: dict[bytes, PublisherBook] = {}
        # Of these something happened that is nowhere. A supervisor's successor does not know them: of a publisher that has
        # lost its row and says nothing more, it then tells what a bus does that never saw it.
        self._without_row: dict[bytes, None] = {}
        # A predecessor may have been killed while it folded what it had not marked as folded.
        self._doubtful_until = self.written if self._inherited else 0

    def release(self) -> None:
        """Let go of the buffer."""
        for book in self._books.values():
            book.write_ordinals()
            book.write_times()
        self._books.clear()
        for view in (self._rows, self._histograms, self._hashes, self._owners, self.last):
            view.release()
        super().release()

    # -- the log

    @property
    def written(self) -> int:
        """Bytes that were ever written to the log; `folded` follows it."""
        return self._words[_HEAD_AT]

    @property
    def folded(self) -> int:
        """Of these, those that are folded."""
        return self._words[_TAIL_AT]

    @property
    def fullness(self) -> float:
        """How much of the log waits to be folded, from 0 to 1."""
        return (self.written - self.folded) / self._log_bytes

    def fold(self, now_ns: int, records: int = 2**62) -> bool:
        """Fold up to so many records, at most what is there now; whether more are left.

        A kill in between may cost the times of up to 16,384 events, and counts nothing twice that came in order.
        """
        words = self._words
        head, tail = words[_HEAD_AT], words[_TAIL_AT]
        unmarked = 0
        try:
            while tail < head and records:
                at = tail % self._log_bytes
                size = int.from_bytes(self._log[at : at + 8], "little")
                is_gap, size = size & _GAP, size & ~_GAP
                if not 8 <= size <= head - tail:
                    raise ValueError(f"a record of {size} bytes, where {head - tail} were written")
                if not is_gap:
                    self._fold_record(at, now_ns, doubtful=tail < self._doubtful_until)
                    records -= 1
                tail += size
                unmarked += 1
                if unmarked >= _UNMARKED_MAX:
                    self._mark(tail)
                    unmarked = 0
            self._mark(tail)
        except Exception:
            self._mark(head)  # somebody has written over it: a worker must not wait for ever
            raise
        for book in self._books.values():
            if book.unwritten > _UNWRITTEN_MAX:
                book.write_times()
        return tail < head

    def _mark(self, tail: int) -> None:
        """Write what was folded to the buffer, and then that it is: whoever comes in between takes it for doubtful."""
        for book in self._books.values():
            book.write_ordinals()
        self._words[_TAIL_AT] = tail

    def _fold_record(self, at: int, now_ns: int, *, doubtful: bool) -> None:
        _, publisher, events, key_bytes, attempt, dead, which = _RECORD.unpack_from(self._log, at)
        at += _RECORD.size
        book = self.publisher(publisher, now_ns)
        if book is None:
            return
        column = struct.Struct(f"<{events}q")
        ordinals_at = at + key_bytes
        times_at = ordinals_at + (column.size if which & _ORDINALS else 0)
        if which & _ORDINALS:
            keys = unpack_keys(self._log[at:ordinals_at])
            ordinals: Sequence[int] = column.unpack_from(self._log, ordinals_at)
            if doubtful:
                # What is in already would look like a repeat.
                fresh = [ordinal > book.last_of(key) for key, ordinal in zip(keys, ordinals, strict=True)]
                keys, ordinals = list(compress(keys, fresh)), list(compress(ordinals, fresh))
                dead_ones = list(compress(_bits(dead, events), fresh))
            else:
                dead_ones = _bits(dead, events) if dead else []
            if any(dead_ones):
                book.note_some_dead(keys, ordinals, attempt, dead_ones)
            else:
                book.note_all(keys, ordinals, attempt)
        if which & _TIMES:
            intended_ns = column.unpack_from(self._log, times_at)
            times_at += column.size
            if which & _BEGINNINGS:
                began_ns = column.unpack_from(self._log, times_at)
                ended_ns = column.unpack_from(self._log, times_at + column.size)
            else:
                instants_ns = struct.unpack_from(f"<{events + 1}q", self._log, times_at)
                began_ns, ended_ns = instants_ns[:-1], instants_ns[1:]
            book.measure_all(intended_ns, began_ns, ended_ns)

    def publisher(self, publisher: bytes, now_ns: int) -> PublisherBook | None:
        """The book of a publisher, used now. When all rows are taken, the one that was used least recently is given away, if
        that was not just now; else there is none.
        """
        book = self._books.get(publisher)
        if book is None:
            row = self._row_of(publisher)
            if row is None:
                row = self._vacate_row(now_ns)
                if row is None:
                    self._lost_row(publisher)
                    return None
                self._rows[row * _ROW + _ID] = int.from_bytes(publisher[:8], "little")
                self._rows[row * _ROW + _ID + 1] = int.from_bytes(publisher[8:], "little")
                if publisher in self._without_row:
                    del self._without_row[publisher]
                    self._rows[row * _ROW + _INCOMPLETE] = 1
            book = self._books[publisher] = PublisherBook(self, row, publisher)
        self._rows[book.row * _ROW + _USED] = now_ns
        return book

    def _lost_row(self, publisher: bytes) -> None:
        self._without_row[publisher] = None
        if len(self._without_row) > _WITHOUT_ROW_MAX:
            del self._without_row[next(iter(self._without_row))]

    def _row_of(self, publisher: bytes) -> int | None:
        low, high = int.from_bytes(publisher[:8], "little"), int.from_bytes(publisher[8:], "little")
        for row in range(self._publishers):
            at = row * _ROW
            if self._rows[at + _USED] and self._rows[at + _ID] == low and self._rows[at + _ID + 1] == high:
                return row
        return None

    def _vacate_row(self, now_ns: int) -> int | None:
        row = min(range(self._publishers), key=lambda candidate: self._rows[candidate * _ROW + _USED])
        used_ns = self._rows[row * _ROW + _USED]
        if used_ns and 0 <= now_ns - used_ns < _IN_USE_NS:  # a clock that has started anew says nothing
            return None
        if used_ns:
            low, high = self._rows[row * _ROW + _ID], self._rows[row * _ROW + _ID + 1]
            self._lost_row(low.to_bytes(8, "little") + high.to_bytes(8, "little"))
            book = next((one for one in self._books.values() if one.row == row), None)
            if book is not None:
                del self._books[book.publisher]
            inherited = [at for (owner, _), at in self._inherited.items() if owner == row + 1]
            for at in [*inherited, *(() if book is None else book.positions.values())]:
                self._forget(at)
            self._rows[row * _ROW : (row + 1) * _ROW] = memoryview(bytes(_ROW * 8)).cast("Q")
            size = _TIMES_KEPT * BUCKETS
            self._histograms[row * size : (row + 1) * size] = memoryview(bytes(4 * size)).cast("I")
        return row

    def _forget(self, at: int) -> None:
        owner = self._owners[at]
        seen = self._seen[at]
        if seen is None:
            self._inherited.pop((owner, self._hashes[at]), None)
        else:
            self.last[at] = self.ordinals[at]
            del seen.positions[self._keys_seen[at]]
            self._seen[at] = self._keys_seen[at] = None
        # Retired first: a kill in between counts a key twice, and never reports a loss that was none.
        at_row = (owner - 1) * _ROW + _RETIRED
        self._rows[at_row] = (self._rows[at_row] + self.last[at]) % 2**64
        self.last[at] = 0
        self._owners[at] = 0

    def _place(self, book: PublisherBook, key: WireKey) -> int:
        """Find the word of a key that this process has not seen, or make one."""
        digest = stable_hash(key)
        at = self._inherited.pop((book.row + 1, digest), None)
        if at is None:
            at = self._words[_KEY_RING_AT]
            self._words[_KEY_RING_AT] = (at + 1) % self._keys
            if self._owners[at]:
                self._forget(at)
            self.last[at] = 0
            self._hashes[at] = digest
            self._owners[at] = book.row + 1
        book.positions[key] = at
        self.ordinals[at] = self.last[at]
        self._seen[at], self._keys_seen[at] = book, key
        return at

    # -- what it tells

    def evidence(self, shard: int, publisher: bytes) -> Evidence | None:
        """What this shard can say of a publisher; None: it has seen nothing stamped of it."""
        row = self._row_of(publisher)
        if row is None:
            return _nothing_of(shard, publisher) if publisher in self._without_row else None
        if publisher in self._books:
            self._books[publisher].write_times()
        words = self._rows[row * _ROW : (row + 1) * _ROW].tolist()
        # Before the ring has come round once, what lies behind its position was never used: loadgen asks every second.
        used = self._keys if self._hashes[self._keys - 1] else self._words[_KEY_RING_AT]
        of_row = map(eq, self._owners[:used].tolist(), repeat(row + 1))
        # A gap's ordinals are part of the last ordinal and never came; what was retired was counted when it was forgotten.
        last = sum(compress(self.last[:used].tolist(), of_row))
        latency, service, queue = (self._counted(row, which) for which in range(_TIMES_KEPT))
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
            latency=latency,
            service=service,
            queue=queue,
            complete=not words[_INCOMPLETE],
        )

    def _counted(self, row: int, which: int) -> list[tuple[int, int]]:
        first = (row * _TIMES_KEPT + which) * BUCKETS
        histogram = self._histograms[first : first + BUCKETS].tolist()
        return list(compress(enumerate(histogram), histogram))


class PublisherBook:
    """One publisher's part of a book."""

    __slots__ = (
        "_book",
        "_dead",
        "_instants_ns",
        "_overtaken",
        "_samples",
        "_times",
        "_unwritten_keys",
        "last",
        "ordinals",
        "positions",
        "publisher",
        "row",
    )

    def __init__(self, book: Book, row: int, publisher: bytes) -> None:
        self._book = book
        self.row = row
        self.publisher = publisher
        self.positions: dict[WireKey, int] = {}
        self._unwritten_keys: list[Sequence[WireKey]] = []
        # How often response, service and queue times fell into each bucket, and of how many events, since they were written.
        self._times: tuple[Counter[int], ...] = tuple(Counter() for _ in range(_TIMES_KEPT))
        self._dead = 0  # since the ordinals were written
        self._samples = 0
        self._instants_ns: tuple[list[int], ...] = ([], [], [])  # intended, beginnings and ends that are not counted yet
        self.last = book.last
        self.ordinals = book.ordinals
        self._overtaken: set[tuple[WireKey, int]] = set()

    def note_all(self, keys: Sequence[WireKey], ordinals: Iterable[int], attempt: int) -> None:
        """Events with these keys and ordinals reached their outcomes in this order; ordinal 0: it has none."""
        place_of, last = self.positions.get, self.ordinals
        self._unwritten_keys.append(keys)
        for key, ordinal in zip(keys, ordinals, strict=True):
            at = place_of(key, _UNKNOWN)
            if last[at] == ordinal - 1:
                last[at] = ordinal
            elif ordinal:
                self.irregular(key, ordinal, attempt)

    def note_some_dead(
        self, keys: Sequence[WireKey], ordinals: Sequence[int], attempt: int, dead: Sequence[int]
    ) -> None:
        """As `note_all`, of events some of which became dead letters: 1 for each that did, else 0.

        A worker that is killed in the transaction of its dead letters has written their evidence, and its successor writes
        it again. So one counts when its event is counted as distinct, or cannot be told from others for want of an ordinal.
        """
        place_of, last = self.positions.get, self.ordinals
        self._unwritten_keys.append(keys)
        for key, ordinal, is_dead in zip(keys, ordinals, dead, strict=True):
            at = place_of(key, _UNKNOWN)
            if last[at] == ordinal - 1:
                last[at] = ordinal
                self._dead += is_dead
            elif not ordinal or self.irregular(key, ordinal, attempt):
                self._dead += is_dead

    def write_ordinals(self) -> None:
        """Write the last ordinals of the keys that were noted since the last time, and how many of those were dead.

        A kill between the two has the dead ones of up to 16 records counted as handled.
        """
        self._write_last()
        if self._dead:
            self._add(_DEAD, self._dead)
            self._dead = 0

    def _write_last(self) -> None:
        unwritten, self._unwritten_keys = self._unwritten_keys, []
        positions, last, ordinals = self.positions, self.last, self.ordinals
        many = sum(map(len, unwritten)) >= len(positions)
        for at in positions.values() if many else map(positions.get, set().union(*unwritten)):
            if at is not None:
                last[at] = ordinals[at]

    def measure_all(self, intended_ns: Sequence[int], began_ns: Sequence[int], ended_ns: Sequence[int]) -> None:
        """Events with these intended instants were handled from when to when; 0: it has none."""
        if len(intended_ns) < _TOGETHER_MIN:
            for column, part in zip(self._instants_ns, (intended_ns, began_ns, ended_ns), strict=True):
                column.extend(part)
        else:
            self._count_times(intended_ns, began_ns, ended_ns)

    def _count_times(self, intended_ns: Sequence[int], began_ns: Sequence[int], ended_ns: Sequence[int]) -> None:
        """In loops that run in C: for many events they take a third of the time of one in Python."""
        if 0 in intended_ns:
            began_ns, ended_ns = list(compress(began_ns, intended_ns)), list(compress(ended_ns, intended_ns))
            intended_ns = list(filter(None, intended_ns))
        if not intended_ns:
            return
        response_us = list(map(floordiv, map(sub, ended_ns, intended_ns), repeat(1000)))
        service_us = list(map(floordiv, map(sub, ended_ns, began_ns), repeat(1000)))
        queue_us = list(map(sub, response_us, service_us))
        for counts, times_us in zip(self._times, (response_us, service_us, queue_us), strict=True):
            counts.update(bucket_indices(times_us))
        self._samples += len(response_us)

    @property
    def unwritten(self) -> int:
        """How many events' times are not in the histograms yet."""
        return self._samples + len(self._instants_ns[0])

    def last_of(self, key: WireKey) -> int:
        """The last ordinal of a key."""
        return self.ordinals[self._place_of(key)]

    def _place_of(self, key: WireKey) -> int:
        at = self.positions.get(key)
        return self._book._place(self, key) if at is None else at

    def irregular(self, key: WireKey, ordinal: int, attempt: int) -> bool:
        """An outcome that is not simply the next of a key that this process knows; whether it is counted as distinct."""
        if ordinal > _ORDINAL_MAX:  # nobody counts so far; sums of such numbers would not fit
            self._add(_UNCHECKED, 1)
            return False
        at = self._place_of(key)
        last = self.ordinals[at]
        if ordinal == last + 1:
            self.ordinals[at] = ordinal
        elif ordinal <= last:
            return self._come_back(key, ordinal, attempt)
        elif last == 0 and self._word(_RETIRED):
            # Keys of this publisher were forgotten, and this may be one: its past was counted when it was retired.
            self._add(_RETIRED, 1 - ordinal)
            self._add(_UNCHECKED, 1)
            self.ordinals[at] = ordinal
        else:
            self._add(_MISSING, ordinal - last - 1)
            room = _OVERTAKEN_MAX - len(self._overtaken)
            self._overtaken.update((key, number) for number in range(last + 1, min(ordinal, last + 1 + room)))
            self.ordinals[at] = ordinal
        return True

    def _come_back(self, key: WireKey, ordinal: int, attempt: int) -> bool:
        if (key, ordinal) in self._overtaken:
            self._overtaken.discard((key, ordinal))
            self._add(_MISSING, -1)
            self._add(_OUT_OF_ORDER, 1)
            return True
        self._add(_REPEATS, 1)
        if attempt > 1:
            self._add(_ANNOUNCED, 1)
        return False

    def write_times(self) -> None:
        """Add what was measured since the last time to the histograms."""
        self._count_times(*self._instants_ns)
        for column in self._instants_ns:
            column.clear()
        histograms = self._book._histograms
        for which, counts in enumerate(self._times):
            first = (self.row * _TIMES_KEPT + which) * BUCKETS
            for bucket, count in counts.items():
                histograms[first + bucket] = min(_COUNT_MAX, histograms[first + bucket] + count)
            counts.clear()
        self._add(_SAMPLES, self._samples)
        self._samples = 0

    def _word(self, field: int) -> int:
        return self._book._rows[self.row * _ROW + field]

    def _add(self, field: int, by: int) -> None:
        at = self.row * _ROW + field
        self._book._rows[at] = (self._book._rows[at] + by) % 2**64


def _nothing_of(shard: int, publisher: bytes) -> Evidence:
    """The evidence of a publisher that has no row."""
    return Evidence(
        shard=shard,
        publisher=publisher,
        distinct=0,
        repeats=0,
        announced=0,
        out_of_order=0,
        missing=0,
        unchecked=0,
        dead=0,
        samples=0,
        latency=[],
        service=[],
        queue=[],
        complete=False,
    )


def _bits(number: int, width: int) -> list[int]:
    """The lowest bits of a number, the lowest first."""
    return [number >> at & 1 for at in range(width)]


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def book_bytes(*, keys: int, publishers: int, log_bytes: int = _LOG_BYTES) -> int:
    """The size of a book's buffer."""
    return 8 * (_HEADER + publishers * (_ROW + _HISTOGRAM_WORDS) + 3 * keys) + log_bytes
