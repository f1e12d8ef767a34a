"""Errors: whose fault they are, what they say, and that they survive the way between processes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest

from shardbus import errors
from shardbus.errors import (
    BootError,
    BusRejected,
    BusUnreachable,
    ClientClosed,
    CommandFailed,
    CommandLost,
    ConfigError,
    InvalidKey,
    InvalidMessage,
    MessageTooLarge,
    NotDelivered,
    OutboxFull,
    RegistrationError,
    RemoteProtocolError,
    ShardbusError,
    SubscriptionLost,
    UsageError,
)

# One of each, with the fields that it must carry.
EXAMPLES: list[tuple[ShardbusError, dict[str, object]]] = [
    (ShardbusError("something"), {}),
    (UsageError("wrong"), {}),
    (RegistrationError("no such field"), {}),
    (InvalidKey("a float"), {}),
    (InvalidMessage("OrderPlaced", "Expected `float`"), {"type_name": "OrderPlaced", "error": "Expected `float`"}),
    (MessageTooLarge("OrderPlaced", 2_000_000, 1_048_576),
     {"type_name": "OrderPlaced", "size_bytes": 2_000_000, "limit_bytes": 1_048_576}),
    (ClientClosed("closed"), {}),
    (ConfigError("no such store"), {}),
    (RemoteProtocolError("not a frame"), {}),
    (BusUnreachable("tcp://127.0.0.1:5555", 2.5, 3), {"address": "tcp://127.0.0.1:5555", "timeout_s": 2.5, "shard": 3}),
    (BusRejected("protocol"), {}),
    (OutboxFull(3, 65_000), {"shard": 3, "held_events": 65_000}),
    (NotDelivered(1234, 5.0), {"in_flight": 1234, "timeout_s": 5.0}),
    (CommandFailed("GetTotal", "KeyError", "'42'", "Traceback: …"),
     {"command": "GetTotal", "error_type": "KeyError", "error": "'42'", "remote_traceback": "Traceback: …"}),
    (CommandLost("GetTotal"), {"command": "GetTotal"}),
    (SubscriptionLost("OrderPlaced", "too slow"), {"types": "OrderPlaced", "why": "too slow"}),
    (BootError("no module"), {}),
]  # fmt: skip

each_error = pytest.mark.parametrize(("error", "fields"), EXAMPLES, ids=lambda it: type(it).__name__)


def all_errors(kind: type[ShardbusError] = ShardbusError) -> Iterator[type[ShardbusError]]:
    yield kind
    for sub in kind.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield from all_errors(sub)


def test_every_error_stands_in_the_table_of_these_tests():
    assert {type(error) for error, _ in EXAMPLES} == set(all_errors())


def test_the_docstring_draws_every_error():
    drawn = errors.__doc__ or ""
    assert [kind.__name__ for kind in all_errors() if kind.__name__ not in drawn] == []


@each_error
def test_an_error_carries_its_facts_as_fields(error: ShardbusError, fields: dict[str, object]):
    assert vars(error) == fields


@each_error
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling_with_every_field(error: ShardbusError, fields: dict[str, object], protocol: int):
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert vars(again) == fields
    assert again.args == error.args
    assert str(again) == str(error)


@each_error
def test_an_error_survives_copying(error: ShardbusError, fields: dict[str, object]):
    again = copy.copy(error)
    assert type(again) is type(error)
    assert vars(again) == fields
    assert str(again) == str(error)


def test_notes_survive_pickling():
    error = CommandLost("GetTotal")
    error.add_note("while closing the till")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["while closing the till"]


def test_an_error_of_an_application_derived_from_ours_survives_pickling():
    again = pickle.loads(pickle.dumps(TillClosed(7)))
    assert isinstance(again, TillClosed)
    assert again.till == 7


class TillClosed(ShardbusError):
    """An error as an application might derive it, with a signature that its `args` do not match."""

    def __init__(self, till: int) -> None:
        super().__init__(f"till {till} is closed", "for good")
        self.till = till


@pytest.mark.parametrize("kind", [RegistrationError, InvalidKey, InvalidMessage, MessageTooLarge, ClientClosed, ConfigError])
def test_what_the_caller_did_is_a_usage_error(kind: type[ShardbusError]):
    assert issubclass(kind, UsageError)


@pytest.mark.parametrize("kind", [RemoteProtocolError, BusUnreachable, OutboxFull, NotDelivered, CommandFailed, CommandLost])
def test_what_others_did_is_no_usage_error(kind: type[ShardbusError]):
    assert not issubclass(kind, UsageError)


SAYS = [
    ("the size, the limit and the way out", MessageTooLarge("Photo", 2_000_000, 1_048_576),
     ["Photo", "2,000,000", "1,048,576", "reference"]),
    ("where nobody answered, and how to start a bus", BusUnreachable("ipc:///run/bus", 2.0),
     ["ipc:///run/bus", "2 s", "shardbus serve", "--connect"]),
    ("which shard of a bus that runs did not answer", BusUnreachable("ipc:///run/bus", 2.0, 3),
     ["shard 3 of the bus at ipc:///run/bus", "2 s", "shardbus status"]),
    ("which shard is full, and what else to do", OutboxFull(3, 65_000), ["shard 3", "65,000", 'on_full="wait"']),
    ("how many are unfinished, and where to look", NotDelivered(1234, 0.5), ["1,234", "0.5 s", "shardbus status"]),
    ("that the outcome is unknown", CommandLost("Pay"), ["Pay", "unknown"]),
    ("the remote error and its traceback", CommandFailed("Pay", "KeyError", "'42'", "Traceback\n  line\n"),
     ["Pay failed: KeyError: '42'", "\n\nTraceback\n  line"]),
]  # fmt: skip


@pytest.mark.parametrize(("error", "parts"), [row[1:] for row in SAYS], ids=[row[0] for row in SAYS])
def test_an_error_says(error: ShardbusError, parts: list[str]):
    assert [part for part in parts if part not in str(error)] == []


def test_a_failed_command_without_a_traceback_ends_with_the_error():
    assert str(CommandFailed("Pay", "KeyError", "'42'")) == "Pay failed: KeyError: '42'"
