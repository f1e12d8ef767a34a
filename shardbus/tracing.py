"""W3C Trace Context (level 1) in headers: which trace a message belongs to, handed on from publisher to handler and further.

    with shardbus.trace(traceparent):                       # in a program that has one, from its HTTP framework say
        await client.publish(…)                             # of a client made with middleware=[propagate_trace]

    bus.use(continue_trace)                                 # around handlers: what they publish so belongs to the trace, too

It needs no tracing library, and what records spans needs none of this: OpenTelemetry's `inject` and `extract` take the same
headers. A program that uses neither pays nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

import msgspec

from shardbus.context import Context
from shardbus.errors import UsageError
from shardbus.messages import Message
from shardbus.pipeline import CallNext

HEADER: Final = "traceparent"
STATE_HEADER: Final = "tracestate"
_STATE_CHARS_MAX: Final = 512  # what everybody has to hand on; a longer one may be left out
# Version 00 ends there; a later one may go on behind a hyphen. Version ff is none.
_FORM: Final = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Traceparent(msgspec.Struct, frozen=True, kw_only=True):
    """A position in a trace, in lower-case hexadecimal digits: the trace's 32, the span's 16; and the flags (1: sampled).

    `str()` is its text for a header.
    """

    trace_id: str
    span_id: str
    flags: int = 1

    @staticmethod
    def parse(text: str | None) -> Traceparent | None:
        """What a header says; None: nothing, or nothing sound, and then a new trace begins."""
        found = None if text is None else _FORM.fullmatch(text)
        if found is None:
            return None
        version, trace_id, span_id, flags, rest = found.groups()
        if (version == "00" and rest is not None) or not trace_id.strip("0") or not span_id.strip("0"):
            return None
        return Traceparent(trace_id=trace_id, span_id=span_id, flags=int(flags, 16))

    @staticmethod
    def new(*, sampled: bool = True) -> Traceparent:
        """The first position of a new trace."""
        return Traceparent(trace_id=_digits(16), span_id=_digits(8), flags=int(sampled))

    def child(self) -> Traceparent:
        """A new span of the same trace."""
        return Traceparent(trace_id=self.trace_id, span_id=_digits(8), flags=self.flags & 1)

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def _digits(size: int) -> str:
    """Random ones, not all 0."""
    while not any(drawn := os.urandom(size)):
        pass
    return drawn.hex()


class _Current(NamedTuple):
    traceparent: Traceparent
    state: str | None


_current: Final[ContextVar[_Current | None]] = ContextVar("shardbus_trace", default=None)


def current_trace() -> Traceparent | None:
    """Where the running task is in a trace; None: in none."""
    current = _current.get()
    return None if current is None else current.traceparent


@contextlib.contextmanager
def trace(traceparent: Traceparent | str, tracestate: str | None = None) -> Iterator[Traceparent]:
    """Be at this position of a trace within the block; tasks that begin there are, too.

    Args:
        traceparent: it, or its text.
        tracestate: the header of that name that came with it, which is handed on as it is.

    Raises:
        UsageError: a text that is no traceparent.
    """
    found = Traceparent.parse(str(traceparent))
    if found is None:
        raise UsageError(
            f"{str(traceparent)!r:.100} is no traceparent; one is 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01; "
            "Traceparent.new() begins a trace"
        )
    token = _current.set(_Current(found, tracestate))
    try:
        yield found
    finally:
        _current.reset(token)


def propagate_trace(_message: Message, headers: dict[str, str]) -> None:
    """Middleware of a client: a message published within a trace carries it, unless its headers have one already."""
    current = _current.get()
    if current is not None and HEADER not in headers:
        headers[HEADER] = str(current.traceparent)
        if current.state and len(current.state) <= _STATE_CHARS_MAX:
            headers.setdefault(STATE_HEADER, current.state)


async def continue_trace(message: Any, context: Context, call_next: CallNext) -> Any:
    """Middleware of a bus: a handler runs in a new span of its message's trace, which `current_trace()` says.

    A message without a trace, or with one that is not sound, is handled outside of any.
    """
    found = trace_of(context.headers)
    if found is None:
        return await call_next(message, context)
    with trace(found.child(), context.headers.get(STATE_HEADER)):
        return await call_next(message, context)


def trace_of(headers: Mapping[str, str]) -> Traceparent | None:
    """Where the publisher of a message with these headers was in a trace; for a batch handler, which has many."""
    return Traceparent.parse(headers.get(HEADER))
