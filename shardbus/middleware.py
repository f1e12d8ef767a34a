"""Middleware that many applications need: a log line, times, rates, duplicates; and a check of what is published.

    bus.use(Logging())                                         # around handlers, in each worker
    shardbus.connect(middleware=[Validation()])                # around publishing, in the client's process

Each keeps what it knows in the memory of its process, bounded, and loses it with the process. Times are arguments of what
decides, so that it can be tested without waiting.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Final

import msgspec

from shardbus.arguments import is_count, is_number, told_number
from shardbus.clock import NowNs, monotonic_ns
from shardbus.context import Context
from shardbus.errors import InvalidMessage, RegistrationError, text_of
from shardbus.messages import Message, wire_name
from shardbus.pipeline import CallNext
from shardbus.wording import one_line

_NS: Final = 1_000_000_000
_ERROR_CHARS_MAX: Final = 200  # of an error, in one line of the log
_encode: Final = msgspec.msgpack.Encoder().encode


class Logging:
    """One line in the log for each call of a handler: type, key, handler, attempt and duration; of a failure, its error.

    Args:
        logger: where to. Default: `shardbus.handlers`.
        level: of a call that returned.
        failure_level: of one that raised, or was cancelled.
    """

    def __init__(
        self, logger: logging.Logger | None = None, *, level: int = logging.INFO, failure_level: int = logging.WARNING
    ) -> None:
        for name, given in (("level", level), ("failure_level", failure_level)):
            if not is_count(given):
                raise RegistrationError(f"Logging({name}={given!r}): give a level's number, for instance logging.INFO")
        if logger is not None and not isinstance(logger, logging.Logger | logging.LoggerAdapter):
            raise RegistrationError(f"Logging({logger!r}): give a logger, for instance logging.getLogger('shop')")
        self._logger = logging.getLogger("shardbus.handlers") if logger is None else logger
        self._level = level
        self._failure_level = failure_level

    async def __call__(self, message: Any, context: Context, call_next: CallNext) -> Any:
        """Call the handler, and log what became of it."""
        began_ns = monotonic_ns()
        try:
            outcome = await call_next(message, context)
        except BaseException as error:
            self._log(self._failure_level, "failed", message, context, call_next, began_ns, error)
            raise
        self._log(self._level, "handled", message, context, call_next, began_ns, None)
        return outcome

    def _log(
        self,
        level: int,
        what: str,
        message: Any,
        context: Context,
        call_next: CallNext,
        began_ns: int,
        error: BaseException | None,
    ) -> None:
        if not self._logger.isEnabledFor(level):
            return
        took_ms = (monotonic_ns() - began_ns) / 1e6
        told = "" if error is None else f": {type(error).__name__}: {one_line(_text_of(error))}"
        name, key, attempt = type(message).__name__, context.key, context.attempt
        self._logger.log(
            level, "%s %s key=%r attempt=%d in %.3f ms by %s%s", name, what, key, attempt, took_ms, call_next.handler, told
        )


class HandlerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """How long the calls of one handler with one message type took, in seconds. Quantiles are within a sixteenth."""

    type: str
    handler: str
    calls: int
    failed: int
    total_s: float
    max_s: float
    p50_s: float
    p99_s: float


class Durations:
    """Durations, counted in buckets that are a sixteenth wide: at most a thousand numbers."""

    def __init__(self) -> None:
        self.calls = 0
        self.failed = 0
        self.total_ns = 0
        self.max_ns = 0
        self._buckets: Counter[int] = Counter()

    def add(self, duration_ns: int, *, failed: bool) -> None:
        """Count one."""
        self.calls += 1
        self.failed += failed
        self.total_ns += duration_ns
        self.max_ns = max(self.max_ns, duration_ns)
        shift = max(0, duration_ns.bit_length() - 5)
        self._buckets[(shift << 4) + (duration_ns >> shift)] += 1

    def quantile_ns(self, share: float) -> int:
        """The end of the bucket in which this share of all is reached, but not above the longest; 0: there are none."""
        left = math.ceil(self.calls * share)
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                shift = max(0, (bucket >> 4) - 1)
                return min(self.max_ns, ((bucket - (shift << 4) + 1) << shift) - 1)
        return 0


class Timing:
    """How long handlers take, by message type and handler, for the application to read: `timing.times()`.

    What is kept is bounded by the number of handlers. It is this worker's, and counts from its start or from `reset`.
    """

    def __init__(self) -> None:
        self._durations: dict[tuple[str, str], Durations] = {}

    async def __call__(self, message: Any, context: Context, call_next: CallNext) -> Any:
        """Call the handler, and count how long it took."""
        failed = True
        began_ns = monotonic_ns()
        try:
            outcome = await call_next(message, context)
            failed = False
            return outcome
        finally:
            took_ns = monotonic_ns() - began_ns
            name = (wire_name(type(message)), call_next.handler)
            durations = self._durations.get(name)
            if durations is None:
                durations = self._durations[name] = Durations()
            durations.add(took_ns, failed=failed)

    def times(self) -> list[HandlerTimes]:
        """What was counted, the longest total first."""
        found = sorted(self._durations.items(), key=lambda item: -item[1].total_ns)
        return [
            HandlerTimes(
                type=name,
                handler=handler,
                calls=one.calls,
                failed=one.failed,
                total_s=one.total_ns / _NS,
                max_s=one.max_ns / _NS,
                p50_s=one.quantile_ns(0.5) / _NS,
                p99_s=one.quantile_ns(0.99) / _NS,
            )
            for (name, handler), one in found
        ]

    def reset(self) -> None:
        """Begin anew."""
        self._durations.clear()


class TokenBuckets:
    """When the next message of a key may go: a token bucket for each key, full at first. Pure: time is an argument.

    A bucket is one number, the instant at which it is full again (the generic cell rate algorithm, ITU-T I.371). Who comes
    while it is empty is given an instant to come, one after another.

    The keys are bounded: beyond `keys_max` the one longest unused is forgotten, and starts over with a full bucket. That
    changes nothing where its bucket was full again by then.
    """

    def __init__(self, limit: float, per_s: float, burst: int, keys_max: int) -> None:
        self._interval_ns = math.ceil(per_s * _NS / limit)
        self._burst_ns = burst * self._interval_ns
        self._keys_max = keys_max
        self._full_ns: OrderedDict[Hashable, int] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._full_ns)

    def reserve(self, key: Hashable, now_ns: int) -> int:
        """Take a token of a key; return the instant from which it is there, which is never before `now_ns`."""
        full_ns = self._full_ns[key] = max(self._full_ns.get(key, 0), now_ns) + self._interval_ns
        self._full_ns.move_to_end(key)
        if len(self._full_ns) > self._keys_max:
            self._full_ns.popitem(last=False)
        return max(now_ns, full_ns - self._burst_ns)


class RateLimit:
    """Calls handlers no more often than this; what comes earlier waits, in its key's lane, and holds up no other key.

    `RateLimit(100)` is a hundred calls a second, evenly in the long run; `RateLimit(per_key=5, per_s=60)` five a minute for
    each key, wherever it lives, because it lives in one process; after a pause up to `burst` follow each other at once, so
    that a period which begins so has up to twice its calls. Both may be given. `limit` is this worker's: N workers together
    do N times as much. Each call of a handler counts, so a retry, too, and each handler of an event; `bus.use(…, on=…)`
    names the types that matter. Messages without a key have no rate of a key. A wait counts for the handler's `timeout_s`.

    Args:
        limit: calls in `per_s` seconds, in this worker.
        per_key: calls in `per_s` seconds, for each key.
        per_s: the period, in seconds.
        burst: how many may follow each other at once after a pause. Default: what one period allows; 1 spaces all.
        keys_max: how many keys are remembered. Beyond it the one longest unused is, where it was used within the last
            period, allowed more than its rate.

    Raises:
        RegistrationError: a value that makes no sense.
    """

    def __init__(
        self,
        limit: float | None = None,
        *,
        per_key: float | None = None,
        per_s: float = 1.0,
        burst: int | None = None,
        keys_max: int = 100_000,
    ) -> None:
        if limit is None and per_key is None:
            raise RegistrationError("RateLimit() needs a rate: RateLimit(100), or RateLimit(per_key=5, per_s=60)")
        for rate in (limit, per_key, per_s):
            if rate is not None and not (is_number(rate) and 0 < rate < math.inf):
                raise RegistrationError(f"RateLimit(…, {rate!r}): rates and periods are numbers above 0")
        if not all(is_count(one) and one >= 1 for one in (1 if burst is None else burst, keys_max)):
            raise RegistrationError(f"RateLimit(burst={burst!r}, keys_max={keys_max!r}): both start at 1")

        def buckets(rate: float | None, keys_max: int) -> TokenBuckets | None:
            if rate is None:
                return None
            return TokenBuckets(rate, per_s, max(1, int(rate)) if burst is None else burst, keys_max)

        self._whole = buckets(limit, 1)
        self._keys = buckets(per_key, keys_max)

    async def __call__(self, message: Any, context: Context, call_next: CallNext) -> Any:
        """Wait until it may be, and call the handler."""
        if self._keys is not None and (key := context.key) is not None:
            await _sleep_until(self._keys.reserve(key, monotonic_ns()))
        if self._whole is not None:
            await _sleep_until(self._whole.reserve(None, monotonic_ns()))
        return await call_next(message, context)


async def _sleep_until(instant_ns: int) -> None:
    while (left_ns := instant_ns - monotonic_ns()) > 0:  # noqa: ASYNC110 - a timer may be early by its resolution
        await asyncio.sleep(left_ns / _NS)


class Done(msgspec.Struct, frozen=True):
    """Something that was done, and what came of it."""

    outcome: Any


class Remembered:
    """What was done within the last `window_ns`, at most `entries_max`; beyond that the oldest is forgotten. Pure."""

    def __init__(self, window_ns: int, entries_max: int) -> None:
        self._window_ns = window_ns
        self._entries_max = entries_max
        self._entries: OrderedDict[Hashable, tuple[int, Done]] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, identity: Hashable, now_ns: int) -> Done | None:
        """What came of it, if it was done within the window."""
        entry = self._entries.get(identity)
        return entry[1] if entry is not None and now_ns - entry[0] < self._window_ns else None

    def add(self, identity: Hashable, outcome: Any, now_ns: int) -> None:
        """It is done now."""
        entries = self._entries
        entries[identity] = (now_ns, Done(outcome))
        entries.move_to_end(identity)
        while len(entries) > self._entries_max or now_ns - next(iter(entries.values()))[0] >= self._window_ns:
            entries.popitem(last=False)


class Idempotency:
    """Does not call a handler again for what it has handled: a duplicate is one whose key function gives the same.

    For publishers that may publish the same thing twice. A duplicate of an event counts as handled; of a command, its caller
    gets the reply that the first one got. One that comes while the first is being handled waits for its end; what fails is
    not remembered, so it is tried again. Each handler of an event is asked for by itself.

    It remembers in this worker's memory. So duplicates are found where both have the same message key, which brings them to
    one worker; and not after that worker has died, or the window is over. What must hold beyond that belongs in a store of
    the application's own, written in one transaction with the effect.

    Args:
        key: from a message, what makes another the same: `lambda event: event.payment_id`. Where it is None, nothing does.
        window_s: for how long it is remembered, in seconds.
        entries_max: how many are; beyond that the oldest is forgotten. Replies of commands are kept whole.
        now: the clock, in nanoseconds.

    Raises:
        RegistrationError: a value that makes no sense.
    """

    def __init__(
        self,
        key: Callable[[Any], Hashable],
        *,
        window_s: float = 3600.0,
        entries_max: int = 100_000,
        now: NowNs = monotonic_ns,
    ) -> None:
        if not callable(key):
            raise RegistrationError(f"Idempotency({key!r}): give a function of the message: lambda event: event.payment_id")
        if not (is_number(window_s) and 0 < window_s < math.inf and is_count(entries_max) and entries_max >= 1):
            raise RegistrationError(
                f"Idempotency(window_s={told_number(window_s)}, entries_max={entries_max!r}): a window is above 0 seconds, "
                "entries start at 1"
            )
        self._key = key
        self._now = now
        self._done = Remembered(math.ceil(window_s * _NS), entries_max)
        self._running: dict[Hashable, asyncio.Event] = {}  # bounded by what a worker has under way

    async def __call__(self, message: Any, context: Context, call_next: CallNext) -> Any:
        """Call the handler, unless it has handled this."""
        key = self._key(message)
        if key is None:
            return await call_next(message, context)
        identity = (wire_name(type(message)), call_next.handler, key)
        while (running := self._running.get(identity)) is not None:
            await running.wait()
        done = self._done.find(identity, self._now())
        if done is not None:
            return done.outcome
        ended = self._running[identity] = asyncio.Event()
        try:
            outcome = await call_next(message, context)
            self._done.add(identity, outcome, self._now())
            return outcome
        finally:
            del self._running[identity]
            ended.set()


class Validation:
    """Refuses to publish what its worker could not decode: for `connect(middleware=…)` and `bus.local(middleware=…)`.

    Messages are checked where they are decoded, not where they are built, so a wrong type in a field becomes a dead letter.
    This decodes each message as a worker does, before it is published; publishing then costs about three times as much.
    """

    def __init__(self) -> None:
        self._decoders: dict[type, Callable[[bytes], Any]] = {}  # by message type

    def __call__(self, message: Message, _headers: dict[str, str]) -> None:
        """Check a message.

        Raises:
            InvalidMessage: its fields are not what its type declares.
        """
        kind = type(message)
        decode = self._decoders.get(kind)
        if decode is None:
            decode = self._decoders[kind] = msgspec.msgpack.Decoder(kind).decode
        try:
            decode(_encode(message))
        except Exception as error:  # also what a message's own checks raise
            raise InvalidMessage(wire_name(kind), _text_of(error)) from error


def _text_of(error: BaseException) -> str:
    text = text_of(error)
    return text if len(text) <= _ERROR_CHARS_MAX else f"{text[:_ERROR_CHARS_MAX]}…"
