"""What is written of a message that failed: the outcome that a dead letter holds, or the reply that a command's caller gets.

Decides what is told and how long it may be, and remembers the places where handlers raise. Knows nothing of lanes, retries
or the store; nothing here has an effect.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any, Final, Literal, TypeGuard

import msgspec
import xxhash
from msgspec.structs import replace

from shardbus.errors import text_of
from shardbus.inbound import Delivery
from shardbus.pipeline import OUR_FILES
from shardbus.store import Failure
from shardbus.tracebacks import TRACEBACK_CHARS_MAX, shortened, stack_of, steps_of
from shardbus.wording import encodable

CRASHED: Final = "crashed"  # the reason of a dead letter whose handling ends its worker
EXPIRED: Final = "expired"  # of one whose deadline was over

_ERROR_CHARS_MAX: Final = 2000
_REPLY_TRACEBACK_CHARS_MAX: Final = 16_000
_PLACES_MAX: Final = 1024
_TOGETHER_MAX: Final = 16  # handlers whose errors are told of, where not all have room
_LED_TO_MAX: Final = 15  # errors that led to one, or are in it: more are not told

_How = Literal["", "caused by", "while handling", "in it"]
_Link = tuple[_How, BaseException, BaseException]
"""How an error belongs to another (empty: it is the one that is told of), itself, and the other."""

_BETWEEN: Final[dict[_How, str]] = {
    "": "",
    "caused by": "\n\nThe above exception was the direct cause of the following exception:\n\n",
    "while handling": "\n\nDuring handling of the above exception, another exception occurred:\n\n",
    "in it": "\n\nThe above exception is in the group below:\n\n",
}


class HandlerTimeout(TimeoutError):
    """A handler ran longer than its `timeout_s`."""


class Failures:
    """What is told of handlers that raise, and where they did.

    Args:
        our_files: whose frames stand between the loop and a handler, besides those of middleware; a traceback begins behind.
    """

    def __init__(self, our_files: tuple[str, ...]) -> None:
        self._our_files = frozenset((*our_files, asyncio.timeouts.__file__, *OUR_FILES))
        self._places: dict[tuple[Any, ...], tuple[str, str, list[CodeType]]] = {}

    def of_handler(self, name: str, error: BaseException, reason: str) -> Failure:
        """The outcome of an event that a handler gave up, whatever it raised: without an outcome, all would stop."""
        led: Sequence[_Link]
        try:
            led = _led_to(error)
            told = _text_of_all(error, led)
        except BaseException as odd:  # of a kind of the application's own, whose attributes raise
            led, told = (), _untold(error, odd)
        place, text = self._place_of(error, led)
        kind = _type_name(error)
        return Failure(handlers=(name,), reason=reason, error_type=kind, error=told, place=place, traceback=text)

    def reply_to(self, error: BaseException) -> bytes:
        """The reply of a command whose handler raised, whatever that is."""
        try:
            text = "".join(self._told_from_the_handler(error).format())
        except BaseException:  # of it, or of what led to it
            told = self.of_handler("", error, "")
            text = f"{told.traceback or told.error_type}: {told.error}"
        end = encodable(text[-_REPLY_TRACEBACK_CHARS_MAX:])[-_REPLY_TRACEBACK_CHARS_MAX:]
        return failed_reply(_type_name(error), _text_of(error), end)

    def _place_of(self, error: BaseException, led: Sequence[_Link]) -> tuple[str, str]:
        """The identity of where an error was raised, and its stack as text, formatted once for each distinct place.

        So it has types of errors in it, and no texts: all dead letters of a place share it, and with a text each would be a
        place of its own. Formatting takes 37 µs, finding the place 1. Code is known by its id, because its hash is that of
        all its constants; what is remembered holds the code, so that no other gets it.
        """
        identity: list[Any] = [_type_name(error)]
        _add_stack(identity, error)
        for how, one, _ in led:
            identity += (how, _type_name(one))
            _add_stack(identity, one)
        known = self._places.get(tuple(identity))
        if known is None:
            links: list[_Link] = [("", error, error), *led]
            code = [frame.f_code for _, one, _ in links for frame, _ in traceback.walk_tb(stack_of(one))]
            if len(self._places) >= _PLACES_MAX:
                self._places.clear()
            text = "".join(self._stacks(links))
            text = shortened(text, TRACEBACK_CHARS_MAX)
            place = xxhash.xxh3_128_hexdigest(encodable(text).encode())
            known = self._places[tuple(identity)] = (place, text, code)
        return known[:2]

    def _stacks(self, links: list[_Link]) -> Iterator[str]:
        """The stacks of an error and of what led to it, which comes first; without the frames of ours before a handler's."""
        for how, one, _ in reversed(links):
            stack = steps_of(one)
            self._cut(stack)
            if stack:
                yield "Traceback (most recent call last):\n"
                yield from stack.format()
            yield _type_name(one) + _BETWEEN[how]

    def _told_from_the_handler(self, error: BaseException) -> traceback.TracebackException:
        """An error and what caused it, without the frames of ours that led to the handler."""
        told = traceback.TracebackException.from_exception(error)
        chain: list[traceback.TracebackException | None] = [told]
        while chain:
            one = chain.pop()
            if one is not None:
                self._cut(one.stack)
                chain += (one.__cause__, one.__context__)
        return told

    def _cut(self, stack: traceback.StackSummary) -> None:
        """Remove the frames of ours that led to the handler."""
        ours = self._our_files
        del stack[: next((at for at, frame in enumerate(stack) if frame.filename not in ours), len(stack))]


def failed_reply(kind: str, told: str, stack: str = "") -> bytes:
    """The body of a reply that says why a command failed."""
    return msgspec.msgpack.encode((kind, told, stack))


def unknown_type(delivery: Delivery) -> Failure:
    """The outcome of an event that nothing here takes."""
    told = f"no handler of this application takes the event {delivery.name!r}"
    return Failure(handlers=(), reason="unknown-type", error_type="", error=told)


def undecodable(error: BaseException) -> Failure:
    """The outcome of an event that is not what its handlers take."""
    return Failure(handlers=(), reason="undecodable", error_type=type(error).__name__, error=_text_of(error))


def circuit_open(name: str, state: str) -> Failure:
    """The outcome of an event whose handler is not called, and is not to wait for that."""
    told = f"the circuit of {name} is {state}"
    return Failure(handlers=(name,), reason="circuit-open", error_type="", error=told)


def together(gave_up: Sequence[Failure]) -> Failure:
    """The outcome of an event that several handlers gave up: that of the first, with what the others have raised."""
    first, *others = gave_up
    if not others:
        return first
    told = [f"{', '.join(one.handlers)}: {one.error_type}{one.error_type and ': '}{one.error}" for one in others]
    parts = [first.error, *told]
    if len("; ".join(parts)) > _ERROR_CHARS_MAX:  # each has a part of it, as far as there is room for parts
        more = len(parts) - _TOGETHER_MAX
        parts = [part[: _ERROR_CHARS_MAX // min(len(parts), _TOGETHER_MAX) - 4] for part in parts[:_TOGETHER_MAX]]
        parts += [f"and {more} more"] if more > 0 else []
    error = "; ".join(parts)
    return replace(first, handlers=tuple(name for one in gave_up for name in one.handlers), error=error)


def crashed(delivery: Delivery, verdict: str, deaths: int) -> Failure:
    """The outcome of an event that is not run any more; a redrive runs the handlers that it had left, or gave up."""
    left = [one.name for one in delivery.plan.handlers if delivery.todo is None or one.name in delivery.todo]
    return Failure(
        handlers=tuple(dict.fromkeys([*_given_up(delivery), *left])),
        reason=CRASHED,
        error_type="",
        error=f"its handling ended the worker with {verdict}; {deaths} workers have died while it was under way",
    )


def expired(delivery: Delivery) -> Failure:
    """The outcome of an event whose deadline is over; a redrive runs the handlers that it had left, or gave up."""
    return Failure(
        handlers=tuple(dict.fromkeys([*_given_up(delivery), *(delivery.todo or ())])),
        reason=EXPIRED,
        error_type="",
        error="its deadline was over before its handlers could begin",
    )


def parks_its_key(delivery: Delivery, failure: Failure) -> bool:
    """Whether what an event died of parks its key.

    Where its deadline was over, only a handler that had given it up before does: nothing else has failed, and what is too
    late was of no use any more by its publisher's own word.
    """
    if failure.reason != EXPIRED:
        return delivery.plan.parks(failure.handlers)
    gave_up = _given_up(delivery)
    return bool(gave_up) and delivery.plan.parks(gave_up)


def _given_up(delivery: Delivery) -> tuple[str, ...]:
    return tuple(name for one in delivery.gave_up for name in one.handlers)


def _type_name(error: BaseException) -> str:
    # By its type here and elsewhere: what asks an error for its class asks the application.
    return TimeoutError.__name__ if issubclass(type(error), HandlerTimeout) else type(error).__name__


def _is_group(error: BaseException) -> TypeGuard[BaseExceptionGroup[Any]]:
    return issubclass(type(error), BaseExceptionGroup)


def _add_stack(identity: list[Any], error: BaseException) -> None:
    step = stack_of(error)
    while step is not None:
        identity += (id(step.tb_frame.f_code), step.tb_lasti)  # and not its line: that has to be looked for
        step = step.tb_next


def _led_to(error: BaseException) -> Sequence[_Link]:
    """What led to an error, or is in it, as far as that is told: nothing, for nearly all."""
    if error.__cause__ is None and error.__context__ is None and not _is_group(error):
        return ()
    links: list[_Link] = []
    seen = {id(error)}
    ahead = _steps_from(error)
    while ahead and len(links) < _LED_TO_MAX:
        link = ahead.pop()
        one = link[1]
        if id(one) not in seen:
            seen.add(id(one))
            links.append(link)
            ahead += _steps_from(one)
    return links


def _steps_from(error: BaseException) -> list[_Link]:
    """What led to an error at once, what is told first as the last one: its cause, because a traceback, which is told from
    behind, says that the next one came of it."""
    found: list[_Link] = []
    if _is_group(error):
        found += [("in it", one, error) for one in reversed(error.exceptions)]
    if error.__cause__ is not None:
        found.append(("caused by", error.__cause__, error))
    elif error.__context__ is not None and not error.__suppress_context__:
        found.append(("while handling", error.__context__, error))
    return found


def _text_of_all(error: BaseException, led: Sequence[_Link]) -> str:
    """The text of an error, its notes, and the same of what led to it: none of that is in the traceback."""
    notes = _notes_of(error)
    if issubclass(type(error), HandlerTimeout) or not (led or notes):
        return _text_of(error)  # what led to a time-out is how handlers are ended
    parts = [text_of(error), *notes]
    last: _Link = ("", error, error)
    for link in led:
        how, one, other = link
        text = text_of(one)
        is_next = other is last[1] or (last[0] == "in it" and other is last[2])
        words = f"in the group {other.message!r}" if _is_group(other) and not is_next else how
        parts += [f"{words} {_type_name(one)}{text and ': '}{text}", *_notes_of(one)]
        last = link
    return _head("; ".join(parts))


def _untold(error: BaseException, odd: BaseException) -> str:
    return f"{_text_of(error)} <more of it cannot be told: {type(odd).__name__}>"


def _notes_of(error: BaseException) -> list[str]:
    try:
        notes = getattr(error, "__notes__", ())  # whatever somebody has put there
    except BaseException:  # a `__getattr__` of the application's, which has another for what it does not know
        return []
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list | tuple) else []


def _text_of(error: BaseException) -> str:
    return _head(text_of(error))


def _head(text: str) -> str:
    return encodable(text[:_ERROR_CHARS_MAX])[:_ERROR_CHARS_MAX]
