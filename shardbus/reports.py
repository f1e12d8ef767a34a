"""What supervisor and worker tell each other: how to boot, which shard to serve, reports after it. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

from shardbus.config import StoreFull
from shardbus.quarantine import Ended
from shardbus.store import StoreCounts
from shardbus.wording import counted

WORKER: Final = "shardbus.worker_process"
"""The module that is run as a worker."""


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker process is told when it starts, before it is known which shard it will serve."""

    application: str
    log_level: str
    log_format: str
    parent: int


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """The shard that a worker is to serve, once in its life.

    `address` is its own, `bus` the bus's as people write it, and `control` where its supervisor listens. `predecessor` is
    how the worker before it ended; `waits_for_store`: for as long as that cannot be opened.
    """

    shard: int
    shards: int
    epoch: bytes
    layout: int
    address: str
    bus: str
    control: str
    evidence_path: str
    journal_path: str
    predecessor: Ended
    store_url: str
    store_rows_max: int
    store_bytes_max: int
    store_full: StoreFull
    waits_for_store: bool
    drain_s: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker takes messages."""


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The worker's loop turns, whatever it does: it boots, or it closes."""


class BootFailed(msgspec.Struct, frozen=True, tag="boot-failed"):
    """The worker cannot start, and ends; `error` is for people."""

    error: str


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag="beat"):
    """The worker's loop turns; what it holds now. Cumulative or instantaneous, so that a lost one costs nothing."""

    backlog: int
    busy_keys: int
    publishers: int
    store: StoreCounts
    store_failing: str
    next_due_ns: int = 0
    sessions: int = 0


class AtRest(msgspec.Struct, frozen=True, tag="at-rest"):
    """The worker drains and has nothing left to do; what handlers of others publish may still come to it."""


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


def told_left(dead: int, waiting: int, kept: str) -> str:
    """What a bus that has ended leaves in its stores, for people; empty: nothing. `kept`: where; empty: in memory."""
    if not (dead or waiting):
        return ""
    kinds = ((dead, "dead letter"), (waiting, "waiting event"))
    parts = [counted(count, what) for count, what in kinds if count]
    left = f"{' and '.join(parts)} {'is' if dead + waiting == 1 else 'are'}"
    if not kept:
        return f"{left} gone, with the memory in which they were; `serve --dead-letters URL` keeps them"
    return f"{left} kept {kept}; the next `shardbus serve` there has them again"


Report = Ready | Alive | BootFailed | Beat | AtRest | Drained | Stalled

encode_report: Final = msgspec.msgpack.Encoder().encode
decode_report: Final = msgspec.msgpack.Decoder(Report).decode
encode_boot: Final = msgspec.json.Encoder().encode
decode_boot: Final = msgspec.json.Decoder(Boot).decode
encode_assignment: Final = msgspec.msgpack.Encoder().encode
END: Final = b"end"
"""What a supervisor tells workers that drain once all of them are at rest."""

decode_assignment: Final = msgspec.msgpack.Decoder(Assignment).decode
