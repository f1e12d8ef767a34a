"""What a run is asked to do, and what its processes tell each other: frozen data, and JSON lines.

Knows nothing of buses, processes or terminals. Every line that a driver writes is one of `DriverLine`.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Call = Literal["publish_many", "publish"]
"""Which call of the client sends the events."""

RATE_MAX: Final = 10_000_000.0  # events per second; above what any process here can offer
RATE_MIN: Final = 0.001  # events per second; the pacer's resolution
KEYS_MAX: Final = 1_000_000  # keys of a uniform load; more would cost the driver over 200 MB
PAYLOAD_BYTES_MAX: Final = 1_000_000  # a bus refuses messages above 1 MiB
SECONDS_MAX: Final = 7 * 24 * 3600.0
WORKERS_MAX: Final = 256


class LoadError(Exception):
    """The run cannot be made as asked, or not be finished; the text is for the person who asked."""


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. Valid once built.

    `rate` is events per second, None for as many as the bus takes. `keys` is how many keys the events are spread over,
    None for a new key with every event. `address` names a running bus; None is the default address, where a bus of
    `workers` workers is started for the run if none answers.

    Raises:
        LoadError: a value is out of its range; the text names it and the range.
    """

    rate: float | None
    duration_s: float = 10.0
    warmup_s: float = 2.0
    keys: int | None = 1000
    payload_bytes: int = 0
    call: Call = "publish_many"
    seed: int = 1
    address: str | None = None
    workers: int = 1
    flush_s: float = 30.0  # how long unfinished events are waited for after the last was sent

    def __post_init__(self) -> None:
        if self.rate is not None:
            _check("the rate", self.rate, RATE_MIN, RATE_MAX)
        _check("the duration", self.duration_s, 0.1, SECONDS_MAX)
        _check("the warm-up", self.warmup_s, 0.0, SECONDS_MAX)
        if self.keys is not None:
            _check("the number of keys", self.keys, 1, KEYS_MAX)
        _check("the payload", self.payload_bytes, 0, PAYLOAD_BYTES_MAX)
        _check("the number of workers", self.workers, 1, WORKERS_MAX)
        _check("the time for the flush", self.flush_s, 0.1, SECONDS_MAX)


def _check(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # not true of nan either
        raise LoadError(f"{what} must be from {low:,g} to {high:,g}, not {value:,g}")


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """A publisher's ledger at one moment: events so far, by where they stand."""

    published: int
    handled: int
    dead: int
    waiting: int
    dropped: int
    in_flight: int

    @property
    def finished(self) -> int:
        """Events that reached their outcome; those that wait in a store have not."""
        return self.handled + self.dead


# -- what a driver says


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """The driver is connected and begins. `publisher` is its name in the bus' evidence, in hexadecimal."""

    publisher: str


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """About once a second: the ledger `at_s` seconds after the first event was due."""

    at_s: float
    warming_up: bool
    counts: Counts


class DriverResult(msgspec.Struct, frozen=True, kw_only=True, tag="result"):
    """What a driver saw of its own run.

    The window is the measured part, behind the warm-up. `before` and `after` are the ledger at its edges, `final` the
    ledger after the flush, which took `flush_s`. `scheduled` events should have been sent in the window (None: unpaced),
    `sent` were. `send_lag_us` counts the measured ones by how late they went, in microseconds. `waited_s` of the window
    passed inside publish calls that waited for room. `cpu_share` is the processor time that the driver took in the window
    (1.0: one whole core), `rss_bytes` the most memory that it ever held.
    """

    scheduled: int | None
    sent: int
    window_s: float
    before: Counts
    after: Counts
    final: Counts
    flush_s: float
    waited_s: float
    send_lag_us: dict[int, int]
    cpu_share: float
    rss_bytes: int


class DriverFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The driver gave up; `error` is for the person who asked."""

    error: str


DriverLine = Started | Progress | DriverResult | DriverFailed

encode_line: Final = msgspec.json.Encoder().encode
"""A `DriverLine` or a `LoadSpec` to JSON without a line end."""

decode_line: Final = msgspec.json.Decoder(DriverLine).decode
"""JSON to a `DriverLine`."""

decode_spec: Final = msgspec.json.Decoder(LoadSpec).decode
"""JSON to a `LoadSpec`."""
