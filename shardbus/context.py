"""What a handler may know of the message it was called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final
from uuid import UUID

from shardbus.messages import WireKey, from_wire_key

_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})


class Context:
    """Facts about one delivery. Built only for handlers that ask for it."""

    __slots__ = ("_key", "_left_s", "_publisher", "_seq", "attempt", "headers", "shard")

    def __init__(
        self,
        key: WireKey,
        publisher: bytes,
        seq: int,
        attempt: int,
        shard: int,
        headers: Mapping[str, str] | None = None,
        left_s: Callable[[], float] | None = None,
    ) -> None:
        self._key = key
        self._publisher = publisher
        self._seq = seq
        self.attempt = attempt
        """1 for the first delivery, one more for each that may have run before; goes on over retries and redrives."""
        self.shard = shard
        """The number of the shard that handles the message."""
        self.headers: Mapping[str, str] = _NO_HEADERS if headers is None else headers
        """What the publisher sent beside the message."""
        self._left_s = left_s

    @property
    def key(self) -> str | int | bytes | UUID | None:
        """The message's key as its publisher wrote it."""
        return from_wire_key(self._key)

    @property
    def redelivered(self) -> bool:
        """Whether the message may have been handled before: true for every call after the first, whether that is a retry, a
        redrive, or a worker's in the place of one that died."""
        return self.attempt > 1

    @property
    def message_id(self) -> str:
        """The message's identity, the same for every delivery of it: its publisher, shard and sequence."""
        return message_id(self._publisher, self.shard, self._seq)

    @property
    def remaining_s(self) -> float | None:
        """How many seconds are left, now: of a command until its caller waits no more, of an event until the deadline that
        it was published with; 0 where that is over, None where there is none."""
        return None if self._left_s is None else max(0.0, self._left_s())

    def with_headers(self, headers: Mapping[str, str]) -> Context:
        """The same facts with these headers added, or in the place of others; for a middleware to hand on."""
        added = {**self.headers, **headers}
        return Context(self._key, self._publisher, self._seq, self.attempt, self.shard, added, self._left_s)

    def __repr__(self) -> str:
        return f"Context({self.message_id}, key={self.key!r}, attempt={self.attempt})"


def message_id(publisher: bytes, shard: int, seq: int) -> str:
    """The identity of a message as people see it."""
    return f"{publisher.hex()}-{shard}-{seq}"
