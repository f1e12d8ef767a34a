"""When a scheduled event is due, what its handle says, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from shardbus.errors import RemoteProtocolError, UsageError
from shardbus.scheduled_events import (
    CANCEL,
    at_time,
    decode_cancel,
    decode_cancelled,
    due_ns,
    encode_cancel,
    event_of,
    scheduled,
)
from shardbus.wire.codec import Batch, decode_batch
from shardbus.wire.frames import Ask

NOW_NS = 1_800_000_000_123_456_789
PUBLISHER = bytes(range(16))

DUE = {
    "a delay": ({"delay": 1.5}, NOW_NS + 1_500_000_000),
    "no delay": ({"delay": 0}, NOW_NS),
    "a delay that is over": ({"delay": -3}, NOW_NS - 3_000_000_000),
    "seconds since 1970": ({"at": 12.5}, 12_500_000_000),
    "before 1970: long past": ({"at": -12.5}, 1),
    "a time": ({"at": datetime(2030, 1, 1, 0, 0, 0, 123456, tzinfo=UTC)}, 1_893_456_000_123_456_000),
    "a time elsewhere": ({"at": datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))}, 1_893_456_000_000_000_000),
}


@pytest.mark.parametrize(("when", "expected"), DUE.values(), ids=DUE)
def test_when_an_event_is_due(when, expected):
    assert due_ns(when.get("at"), when.get("delay"), NOW_NS) == expected


REFUSED = {
    "no time": ({}, "say when, once"),
    "two times": ({"at": 1.0, "delay": 1.0}, "say when, once"),
    "a time without its zone": ({"at": datetime(2030, 1, 1)}, "give a time with its zone"),  # noqa: DTZ001
    "text": ({"at": "tomorrow"}, "at='tomorrow': give a datetime with its zone"),
    "text for a delay": ({"delay": "1"}, "delay='1': give seconds as a number"),
    "a truth": ({"delay": True}, "delay=True"),
    "no number": ({"delay": float("nan")}, "delay=nan"),
    "for ever": ({"delay": float("inf")}, "delay=inf"),
    "too far": ({"delay": 1e10}, "beyond the year 2116"),
}


@pytest.mark.parametrize(("when", "told"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_time_is_refused(when, told):
    with pytest.raises(UsageError, match=told):
        due_ns(when.get("at"), when.get("delay"), NOW_NS)


def test_a_handle_says_which_event_and_when():
    handle = scheduled(PUBLISHER, 3, 77, NOW_NS)
    assert handle.due_at == at_time(NOW_NS) == datetime(2027, 1, 15, 8, 0, 0, 123456, tzinfo=UTC)
    assert event_of(handle) == event_of(handle.id) == (3, (PUBLISHER, 77))
    for wrong in ("42", None, 7):
        with pytest.raises(UsageError, match="no scheduled event"):
            event_of(wrong)


def test_a_question_travels_and_what_is_none_is_not_sound():
    assert decode_cancel(Ask(1, CANCEL, encode_cancel((PUBLISHER, 5)))) == (PUBLISHER, 5)
    assert decode_cancelled(b"\xc3") is True
    events = [(b"short", 1), (PUBLISHER, -1), (PUBLISHER, 2**62)]
    for body in (b"", b"\xc0", *map(encode_cancel, events)):
        with pytest.raises(RemoteProtocolError, match="not a question"):
            decode_cancel(Ask(1, CANCEL, body))


def test_a_due_time_that_is_none_makes_a_batch_unsound():
    from shardbus.wire.codec import Extra

    for due, sound in ((0, True), (2**62 - 1, True), (-1, False), (2**62, False)):
        batch = Batch()
        batch.add("Name", "key", b"\xc0")
        batch.extras.append(Extra(0, {}, 0, False, due_ns=due))
        if sound:
            assert decode_batch(batch.seal(), 1).extras[0].due_ns == due
        else:
            with pytest.raises(RemoteProtocolError, match="not a batch"):
                decode_batch(batch.seal(), 1)
