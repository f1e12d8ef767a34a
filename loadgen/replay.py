"""Recorded events as a load: a file of JSON lines, read twice, never held.

The first reading checks every line, learns the fields, and lays the events on a schedule (8 bytes each); the second one
publishes. Of several drivers each reads the whole file and sends the keys that are its own, so a key's events keep their
order.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from array import array
from collections.abc import Generator, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final

import msgspec

from loadgen.pacer import Arrivals
from loadgen.source import Load, make_type
from loadgen.spec import LoadError, Recording

EVENTS_MAX: Final = 20_000_000  # of a recording with a schedule: 160 MB
LINE_BYTES_MAX: Final = 4 * 1024 * 1024
_FIELDS_MAX: Final = 256
_NS: Final = 1_000_000_000
_EPOCH_UNITS: Final = ((1e17, 1), (1e14, 1_000), (1e11, 1_000_000))  # numbers so large are ns, µs, ms since 1970
_AT_ONCE: Final = 1024

_decode_line: Final = msgspec.json.Decoder(dict[str, Any]).decode


class Scan(msgspec.Struct, frozen=True, kw_only=True):
    """What the first reading found.

    `events` are this driver's, `offsets_ns` their places on the schedule (None: unpaced), `total` and `length_ns` are of all
    drivers together: at a rate, up to where the next event would be.
    """

    fields: tuple[str, ...]
    key_class: Any
    events: int
    total: int
    offsets_ns: Any  # array[int] | None
    length_ns: int


class Reader:
    """Reads a recording's lines. Raises `LoadError` with the number of a line that is not sound."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def lines(self) -> Generator[tuple[int, bytes], None, None]:
        """Line numbers from 1, and lines that are not empty."""
        path = self._recording.path
        try:
            with contextlib.closing(self._open(path)) as file:
                number = 0
                while line := file.readline(LINE_BYTES_MAX + 1):
                    number += 1
                    if len(line) > LINE_BYTES_MAX:
                        raise self.fault(number, f"is longer than {LINE_BYTES_MAX:,} bytes")
                    if not line.isspace():
                        yield number, line
        except (OSError, EOFError, zlib.error) as error:
            raise LoadError(f"{path} cannot be read: {error}") from error

    def fault(self, number: int, said: str) -> LoadError:
        """The error for a line."""
        return LoadError(f"{self._recording.path}, line {number:,} {said}")

    @staticmethod
    def _open(path: str) -> io.BufferedIOBase | gzip.GzipFile:
        return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def check_readable(recording: Recording) -> None:
    """Read a recording's first line: a file that is not there is to be told before anything is started for it.

    Raises:
        LoadError: it cannot be read.
    """
    with contextlib.closing(Reader(recording).lines()) as lines:
        next(lines, None)


def is_mine(key: Any, driver: int, drivers: int) -> bool:
    """Whether one of several drivers sends the events of a key."""
    return drivers == 1 or zlib.crc32(f"{type(key).__name__}:{key}".encode()) % drivers == driver


def scan(
    recording: Recording, arrivals: Arrivals | None, *, driver: int = 0, drivers: int = 1, until_ns: int | None = None
) -> Scan:
    """Read a recording for the first time.

    Args:
        arrivals: when its events go, all drivers' together, from 0; None: by their own times, or, without a speed, unpaced.
        until_ns: events after that are left out.

    Raises:
        LoadError: the file cannot be read, or a line in it is no event; the text says which.
    """
    reader = Reader(recording)
    clock = None if recording.speed is None else _Clock(recording)
    offsets_ns = array("q")
    fields: dict[str, None] = {}
    key_classes: set[type] = set()
    total = events = last_ns = 0
    beyond_ns = -1  # where the first event that is left out, or would come next, is on the schedule
    coming = None if arrivals is None else _instants(arrivals)
    paced = clock is not None or coming is not None
    for number, line in reader.lines():
        record = _record_of(reader, number, line)
        if recording.key not in record:
            raise reader.fault(number, f"has no field {recording.key!r}, which should be the key")
        at_ns = 0
        if clock is not None:
            at_ns = clock.offset_ns(reader, number, record)
        elif coming is not None:
            at_ns = next(coming, -1)
        if at_ns < 0 or (until_ns is not None and at_ns >= until_ns):
            beyond_ns = until_ns if until_ns is not None else -1
            break
        total += 1
        last_ns = at_ns
        if paced and total > EVENTS_MAX:
            raise LoadError(f"{recording.path} has more than {EVENTS_MAX:,} events; cut it, or give --duration")
        fields |= dict.fromkeys(record)
        if len(fields) > _FIELDS_MAX:
            raise reader.fault(number, f"brings the fields to more than {_FIELDS_MAX}")
        key = record[recording.key]
        if type(key) not in (str, int):
            raise reader.fault(number, f"has the key {key!r}; a key is a text or a whole number")
        key_classes.add(type(key))
        if is_mine(key, driver, drivers):
            events += 1
            if paced:
                offsets_ns.append(at_ns)
    else:
        if coming is not None:  # the schedule itself may end there
            beyond_ns = next(coming, -1 if until_ns is None else until_ns)
    if not total:
        raise LoadError(f"{recording.path} has no events to send")
    return Scan(
        fields=tuple(fields),
        key_class=key_classes.pop() if len(key_classes) == 1 else Any,
        events=events,
        total=total,
        offsets_ns=offsets_ns if paced else None,
        length_ns=max(beyond_ns, last_ns + 1),
    )


def _instants(arrivals: Arrivals) -> Iterator[int]:
    """All instants of a schedule that begins at 0, in order."""
    first = 0
    while count := min(_AT_ONCE, arrivals.due(first, 2**62).count):
        yield from arrivals.intended_ns(first, count)
        first += count


def _record_of(reader: Reader, number: int, line: bytes) -> dict[str, Any]:
    try:
        record: dict[str, Any] = _decode_line(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise reader.fault(number, f"is no JSON object: {error}") from None
    return record


class _Clock:
    """The recorded times as offsets from the first one, so many times as fast, without long pauses, never decreasing."""

    def __init__(self, recording: Recording) -> None:
        assert recording.speed is not None
        self._field = recording.time
        self._speed = recording.speed
        self._gap_max_ns = int(recording.gap_s * _NS)
        self._before_ns: int | None = None
        self._offset_ns = 0

    def offset_ns(self, reader: Reader, number: int, record: dict[str, Any]) -> int:
        time_ns = _time_ns(record.get(self._field))
        if time_ns is None:
            raise reader.fault(
                number,
                f"has no time in its field {self._field!r} (name it with --time): a number since 1970, or ISO 8601",
            )
        if self._before_ns is not None and time_ns > self._before_ns:
            self._offset_ns += min(self._gap_max_ns, int((time_ns - self._before_ns) / self._speed))
        self._before_ns = max(time_ns, self._before_ns or 0)
        return self._offset_ns


def _time_ns(value: Any) -> int | None:
    """Nanoseconds since 1970; None where the value is no time."""
    if isinstance(value, str):
        try:
            when = datetime.fromisoformat(value)
        except ValueError:
            return None
        return int(when.replace(tzinfo=when.tzinfo or UTC).timestamp() * 1e6) * 1000
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e19 < value < 1e19:
        return None
    return int(value * next((unit for bound, unit in _EPOCH_UNITS if abs(value) >= bound), _NS))


class Replay:
    """One driver's part of a recording, as a `Source`."""

    def __init__(self, recording: Recording, found: Scan, *, driver: int = 0, drivers: int = 1) -> None:
        message_type = make_type(recording.type, recording.key, found.fields, key_class=found.key_class)
        self._decode = msgspec.json.Decoder(message_type).decode
        self._key_field = message_type.__shardbus_key__
        self._reader = Reader(recording)
        self._mine = (driver, drivers)
        self._left = found.events
        self._seen: dict[Any, int] = {}
        self._messages = self._read()

    def take(self, count: int) -> Load:
        """See `Source.take`.

        Raises:
            LoadError: the file is no longer what it was at the first reading.
        """
        count = min(count, self._left)
        messages = list(islice(self._messages, count))
        self._left -= len(messages)
        return Load(messages, self._ordinals(messages))

    def _ordinals(self, messages: Iterable[Any]) -> list[int]:
        seen, field = self._seen, self._key_field
        ordinals = []
        for message in messages:
            key = getattr(message, field)
            seen[key] = ordinal = seen.get(key, 0) + 1
            ordinals.append(ordinal)
        return ordinals

    def _read(self) -> Iterator[Any]:
        for number, line in self._reader.lines():
            try:
                message = self._decode(line)
            except msgspec.DecodeError as error:
                raise self._reader.fault(number, f"has changed since it was read first: {error}") from None
            if is_mine(getattr(message, self._key_field), *self._mine):
                yield message
