"""What supervisor and worker tell each other: how to boot, which shard to serve, reports after it. Pure."""

from __future__ import annotations

from typing import Final, Literal

import msgspec


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker process is told when it starts, before it is known which shard it will serve."""

    application: str
    log_level: str
    log_format: str
    parent: int


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker ended, as its supervisor saw it.

    `crashed`: by a signal that processes bring upon themselves, or an exit code. `memory`: by SIGKILL, while the kernel was
    out of memory. `silent`: replaced, because its event loop stood still. `killed`: by SIGKILL, of whoever. Empty: in good
    order, or nobody knows. `told` says it in words, `at_ns` when, by the clock of all processes (0: nobody knows).
    """

    how: Literal["", "crashed", "memory", "silent", "killed"] = ""
    told: str = ""
    at_ns: int = 0


UNKNOWN_END: Final = Ended()


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """The shard that a worker is to serve, once in its life; `predecessor` is how the one before it ended."""

    shard: int
    shards: int
    epoch: bytes
    layout: int
    address: str
    evidence_path: str
    journal_path: str
    predecessor: Ended
    store_url: str
    drain_s: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker takes messages."""


class BootFailed(msgspec.Struct, frozen=True, tag="boot-failed"):
    """The worker cannot start, and ends; `error` is for people."""

    error: str


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag="beat"):
    """The worker's loop turns; what it holds now. Cumulative or instantaneous, so that a lost one costs nothing."""

    backlog: int
    busy_keys: int
    publishers: int
    dead: int
    waiting: int
    store_failing: str


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """The worker ends. `left` says of up to 20 keys what was not drained, of `keys` in all; `backlog` messages in all.

    `rows` dead letters and waiting events are in its store.
    """

    left: list[str]
    keys: int
    backlog: int
    rows: int

    @property
    def is_clean(self) -> bool:
        """Whether the shard leaves nothing behind."""
        return not (self.left or self.backlog or self.rows)


class Stalled(msgspec.Struct, frozen=True, tag="stalled"):
    """The worker's event loop stands still, while `what` runs; sent by a thread beside it."""

    what: str


Report = Ready | BootFailed | Beat | Drained | Stalled

encode_report: Final = msgspec.msgpack.Encoder().encode
decode_report: Final = msgspec.msgpack.Decoder(Report).decode
encode_boot: Final = msgspec.json.Encoder().encode
decode_boot: Final = msgspec.json.Decoder(Boot).decode
encode_assignment: Final = msgspec.msgpack.Encoder().encode
decode_assignment: Final = msgspec.msgpack.Decoder(Assignment).decode
