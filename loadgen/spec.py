"""What a run is asked to do, and what its processes tell each other: frozen data, and JSON lines.

Knows nothing of buses, processes or terminals. Every line that a driver writes is one of `DriverLine`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal

import msgspec

from loadgen.pacer import Stage

Call = Literal["publish_many", "publish"]
"""Which call of the client sends the events."""

Arrivals = Literal["even", "poisson"]
"""When they are due: at equal distances, or at random ones."""

RATE_MAX: Final = 10_000_000.0  # events per second; above what any process here can offer
RATE_MIN: Final = 0.001  # events per second; the pacer's resolution
STAGES_MAX: Final = 1000
KEYS_MAX: Final = 1_000_000  # keys of a load; more would cost the driver over 200 MB
PAYLOAD_BYTES_MAX: Final = 1_000_000  # a bus refuses messages above 1 MiB
SECONDS_MAX: Final = 7 * 24 * 3600.0
WORKERS_MAX: Final = 256
DRIVERS_MAX: Final = 8  # publishers of one run; a shard keeps the evidence of 10 at once


class LoadError(Exception):
    """The run cannot be made as asked, or not be finished; the text is for the person who asked."""


def _check(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # not true of nan either
        raise LoadError(f"{what} must be from {low:,g} to {high:,g}, not {value:,g}")


class Skew(msgspec.Struct, frozen=True, kw_only=True):
    """How events are spread over keys.

    `uniform`: evenly. `zipf`: the key of rank r gets a part in proportion to 1 / r^`by`. `hot`: one key gets the share `by`,
    the others the rest, evenly.
    """

    kind: Literal["uniform", "zipf", "hot"] = "uniform"
    by: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "zipf":
            _check("the exponent of zipf", self.by, 0.0, 10.0)
        if self.kind == "hot":
            _check("the share of the hot key", self.by, 0.0, 1.0)


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """How many bytes each event carries besides its key.

    `fixed`: `low`. `uniform`: from `low` to `high`, each as often. `lognormal`: with the median `low`, and `sigma` the
    deviation of its logarithm, cut off at a megabyte.
    """

    kind: Literal["fixed", "uniform", "lognormal"] = "fixed"
    low: int = 0
    high: int = 0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        _check("the payload", self.low, 0, PAYLOAD_BYTES_MAX)
        if self.kind == "uniform":
            _check("the largest payload", self.high, self.low, PAYLOAD_BYTES_MAX)
        if self.kind == "lognormal":
            _check("the payload's sigma", self.sigma, 0.0, 10.0)


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """Messages of the user's own application: `type` is their name on the wire, `key` the field that holds their key.

    `body` is a JSON object with the other fields; see `loadgen.source` for what stands in braces.

    Raises:
        LoadError: the body has the key's field, and the key is not in it: order, losses and repeats are looked for by key.
    """

    type: str
    key: str
    body: dict[str, Any] = {}
    key_type: Literal["str", "int"] = "str"

    def __post_init__(self) -> None:
        of_key = self.body.get(self.key, "{key}")
        if not (isinstance(of_key, str) and "{key}" in of_key):
            raise LoadError(f'the body has {self.key!r}, which is the key\'s field: leave it out, or put "{{key}}" into it')


def _has_place(value: Any, hole: str) -> bool:
    """Whether a body has this in one of its texts; names of fields are not filled in."""
    if isinstance(value, str):
        return hole in value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_has_place(part, hole) for part in parts)


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """Events that were recorded, one JSON object a line, in `path` (gzip where it ends in .gz).

    They are published as `type`, with the field `key` as their key, at the run's rate, or, where `speed` is given, at their
    own times, so many times as fast; a pause between two is cut to `gap_s` then. `time` is the field with the time.
    """

    path: str
    type: str
    key: str
    time: str = "time"
    speed: float | None = None
    gap_s: float = SECONDS_MAX

    def __post_init__(self) -> None:
        if self.speed is not None:
            _check("the speed", self.speed, 1e-6, 1e12)
        _check("the longest pause", self.gap_s, 0.0, SECONDS_MAX)


class FaultSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to a worker `at_s` seconds after the first event was due.

    `kill` (SIGKILL) and `term` (SIGTERM) end it, `stop` stops it (SIGSTOP) for so many `seconds`. `shard` None: of any
    shard, by the run's seed.
    """

    kind: Literal["kill", "stop", "term"]
    at_s: float
    shard: int | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        _check("the time of a fault", self.at_s, 0.0, SECONDS_MAX)
        _check("the time that a worker is stopped", self.seconds, 0.0, 3600.0)

    def __str__(self) -> str:
        length = f":{self.seconds:g}s" if self.kind == "stop" else ""
        return f"{self.kind}:worker{'' if self.shard is None else self.shard}{length}@{self.at_s:g}s"


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. Valid once built.

    `rate` is events per second, None for as many as the bus takes; `stages`, where there are any, stand in place of rate and
    duration. A recording ends the run at its own end, its `duration_s` may be None; with a speed it needs no rate. `keys` is
    how many keys the events are spread over, None for a new key with every event. `template` makes them messages of the
    user's own, otherwise they are the demo's; `commands` are executed instead of published. Each of `drivers` processes
    sends its part. `address` names a running bus; None is the default address, where a bus of `workers` workers is started
    for the run if none answers. `application` (MODULE:BUS) is served for the run, at an address of its own.

    Raises:
        LoadError: a value is out of its range; the text names it and the range.
    """

    rate: float | None
    stages: tuple[Stage, ...] = ()
    arrivals: Arrivals = "even"
    duration_s: float | None = 10.0
    warmup_s: float = 2.0
    keys: int | None = 1000
    skew: Skew = Skew()
    payload: Payload = Payload()
    call: Call = "publish_many"
    commands: bool = False
    template: Template | None = None
    recording: Recording | None = None
    faults: tuple[FaultSpec, ...] = ()
    drivers: int = 1
    seed: int = 1
    address: str | None = None
    application: str | None = None
    workers: int = 1
    flush_s: float = 30.0  # how long unfinished events are waited for after the last was sent
    timeout_s: float = 5.0  # how long a command's reply is waited for

    def __post_init__(self) -> None:
        if self.rate is not None:
            _check("the rate", self.rate, RATE_MIN, RATE_MAX)
        _check("the number of stages", len(self.stages), 0, STAGES_MAX)
        for stage in self.stages:
            _check("the rate of a stage", stage.rate, RATE_MIN, RATE_MAX)
            _check("the rate of a stage", stage.rate if stage.to is None else stage.to, RATE_MIN, RATE_MAX)
            _check("the duration of a stage", stage.seconds, 0.01, SECONDS_MAX)
        if self.duration_s is not None:
            _check("the duration", self.duration_s, 0.1, SECONDS_MAX)
        _check("the warm-up", self.warmup_s, 0.0, SECONDS_MAX)
        if self.keys is not None:
            _check("the number of keys", self.keys, 1, KEYS_MAX)
        _check("the number of workers", self.workers, 1, WORKERS_MAX)
        _check("the number of drivers", self.drivers, 1, DRIVERS_MAX)
        _check("the time for the flush", self.flush_s, 0.1, SECONDS_MAX)
        _check("the time for a reply", self.timeout_s, 0.001, SECONDS_MAX)
        _check("the whole run", self.planned_s, 0.0, SECONDS_MAX)
        for fault in self.faults if self.recording is None else ():
            if fault.at_s >= self.planned_s:
                raise LoadError(f"{fault}: the run is over after {self.planned_s:g} s, so it would never happen")
        for wrong, said in self._contradictions():
            if wrong:
                raise LoadError(said)

    def _contradictions(self) -> tuple[tuple[bool, str], ...]:
        recording, paced, by_time = self.recording, self._has_rate, self._is_by_time
        return (
            (self.duration_s is None and recording is None, "a duration is needed: only a recording ends by itself"),
            (recording is not None and self.template is not None, "a recording has its own fields: give no body for it"),
            (recording is not None and self.commands, "a recording is of events, not of commands"),
            (by_time and paced, "give a recording a rate or a speed, not both"),
            (by_time and self.arrivals != "even", "a recording with a speed has its own arrivals"),
            (bool(self.stages) and self.rate is not None, "give a rate or stages, not both"),
            (self.arrivals != "even" and not paced, "random arrivals need a rate"),
            (self.commands and not paced, "commands need a rate: each waits for its reply, so none is sent 'at will'"),
            (
                self.payload != Payload() and not self._has_payload,
                'the payload has no place: put "{payload}" into a field of the body'
                if self.template is not None
                else "only the demo's events, and a body of your own, have a payload",
            ),
            (self.keys is None and self.skew.kind != "uniform", "keys that are all new have no skew"),
            (self.application is not None and self.address is not None, "give a running bus or an application, not both"),
        )

    @property
    def planned_s(self) -> float:
        """Seconds from the first event to the end of the schedule, as far as it is known beforehand."""
        if self.stages:
            return self.warmup_s + sum(stage.seconds for stage in self.stages)
        return self.warmup_s + (self.duration_s or 0.0)

    @property
    def is_paced(self) -> bool:
        """Whether there is a schedule, which can be kept or not."""
        return self._has_rate or self._is_by_time

    @property
    def _has_payload(self) -> bool:
        if self.template is not None:
            return _has_place(self.template.body, "{payload}")
        return self.recording is None and not self.commands

    @property
    def _has_rate(self) -> bool:
        return self.rate is not None or bool(self.stages)

    @property
    def _is_by_time(self) -> bool:
        return self.recording is not None and self.recording.speed is not None


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

    @staticmethod
    def sum(parts: Iterable[Counts]) -> Counts:
        """The ledgers of several publishers as one."""
        ledgers = list(parts)
        return Counts(**{name: sum(getattr(one, name) for one in ledgers) for name in Counts.__struct_fields__})


# -- what a driver is told


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """The first line that a driver reads: the run, which of its drivers it is, and whether the bus outlives the run."""

    spec: LoadSpec
    driver: int
    lives_on: bool = True


class Go(msgspec.Struct, frozen=True, kw_only=True, tag="go"):
    """The second line, once all drivers are connected: the `time.monotonic_ns()` at which the schedule begins."""

    start_ns: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """A third line, where somebody wants no more: the schedule ends now."""


Word = Go | Stop


# -- what a driver says


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """The driver is connected and ready. `publisher` is its name in the bus' evidence, in hexadecimal.

    `planned` events are on its schedule, where that is known: a recording's.
    """

    publisher: str
    pid: int
    planned: int | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """About once a second: the ledger `at_s` seconds after the first event was due, and since the last such line how late
    events went, and when commands were answered.

    `scheduled` events were due so far (None: unpaced). `over`: no more are sent.
    """

    at_s: float
    warming_up: bool
    counts: Counts
    scheduled: int | None = None
    send_lag_us: dict[int, int] = {}
    replies_us: dict[int, int] = {}
    over: bool = False


class DriverResult(msgspec.Struct, frozen=True, kw_only=True, tag="result"):
    """What a driver saw of its own run.

    The window is the measured part, behind the warm-up. `before` and `after` are the ledger at its edges, `final` the ledger
    after the flush, which took `flush_s`. `scheduled` events were due in the `scheduled_s` behind the warm-up (None:
    unpaced), and `sent` were sent in the window, which is longer where the last of them had to wait for room. `send_lag_us`
    counts the measured ones by how late the publish call of their batch began, in microseconds. `waited_s` of the window
    passed inside publish calls that waited for room. `cpu_share` is the processor time that the driver took in the window
    (1.0: one whole core), `rss_bytes` the most memory that it ever held. Commands, where it sent any, stand in the ledger as
    events do: `dead` failed, what got no reply is in none but `published`; `replies_us` counts the measured ones by when
    their reply came. It was `interrupted` where its schedule ended before its time.
    """

    scheduled: int | None
    scheduled_s: float = 0.0
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
    replies_us: dict[int, int] = {}
    interrupted: bool = False


class DriverFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The driver gave up; `error` is for the person who asked."""

    error: str


DriverLine = Started | Progress | DriverResult | DriverFailed

encode_line: Final = msgspec.json.Encoder().encode
"""Any line between driver and starter to JSON without a line end."""

decode_line: Final = msgspec.json.Decoder(DriverLine).decode
"""JSON to a `DriverLine`."""

decode_part: Final = msgspec.json.Decoder(Part).decode
"""JSON to a `Part`."""

decode_word: Final = msgspec.json.Decoder(Word).decode
"""JSON to a `Word`."""
