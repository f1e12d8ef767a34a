"""Every error that shardbus raises, by whose fault it is.

    ShardbusError
    ├── UsageError                  you did: the program or the call is wrong
    │   ├── RegistrationError       a handler, a type or a key that cannot be registered
    │   ├── InvalidKey              a key that cannot be routed
    │   ├── InvalidMessage          a message whose fields are not what its type declares
    │   ├── MessageTooLarge         one message above the limit
    │   ├── ClientClosed            a call on a client that has been closed
    │   └── ConfigError             an option or an address that cannot be used
    ├── RemoteProtocolError         the peer did: bytes that no sound peer sends
    ├── BusUnreachable              the world did: nobody answers at the address
    ├── BusRejected                 the bus answered, and said no
    ├── OutboxFull                  a shard takes no more now, and the client does not wait
    ├── NotDelivered                events that were published and not finished
    ├── CommandFailed               the remote handler raised
    ├── CommandLost                 the worker died; whether the command ran is unknown
    ├── SubscriptionLost            a subscription that has ended, by a worker or because its reader was too slow
    └── BootError                   a bus that cannot start here

Errors carry their facts as fields, and keep them through pickling.
"""

from __future__ import annotations

from typing import Any

from shardbus.wording import counted, encodable


class ShardbusError(Exception):
    """Base of all errors raised by shardbus."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by calling the class with `args`; subclasses here take named fields.
        return (_rebuild, (self.__class__, self.args, self.__dict__.copy()))


def _rebuild(cls: type[ShardbusError], args: tuple[Any, ...], fields: dict[str, Any]) -> ShardbusError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class UsageError(ShardbusError):
    """The calling program did something that cannot work."""


class RegistrationError(UsageError):
    """A message type or a handler cannot be registered; raised where it is declared."""


class InvalidKey(UsageError):
    """A key is none of `str`, `int` (64 bits), `bytes` (up to 1,024) and `UUID`."""


class InvalidMessage(UsageError):
    """A message's fields are not what its type declares; raised by `Validation`. It was not published."""

    def __init__(self, type_name: str, error: str) -> None:
        super().__init__(f"{type_name} is not as it is declared, so it was not published: {error}")
        self.type_name = type_name
        self.error = error


class MessageTooLarge(UsageError):
    """One encoded message is larger than the limit. It was not published."""

    def __init__(self, type_name: str, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"{type_name}: the encoded message has {size_bytes:,} bytes, the limit is {limit_bytes:,}; "
            "send a reference to the data instead of the data"
        )
        self.type_name = type_name
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class ClientClosed(UsageError):
    """The client was closed, or its block was left, before this call."""


class ConfigError(UsageError):
    """An option, an address or a store URL cannot be used as given."""


class RemoteProtocolError(ShardbusError):
    """The peer sent bytes that no sound peer sends."""


class BusUnreachable(ShardbusError):
    """No bus answered at the address in the given time; or of one that was found, the worker of `shard` did not."""

    def __init__(self, address: str, timeout_s: float, shard: int | None = None) -> None:
        super().__init__(
            f"no bus answered at {address} within {timeout_s:g} s; start one with `shardbus serve`, or name another "
            "address: connect(ADDRESS) in Python, --connect in a shell, $SHARDBUS_URL in both"
            if shard is None
            else f"shard {shard} of the bus at {address} did not answer within {timeout_s:g} s; see `shardbus status` for "
            "what its worker does"
        )
        self.address = address
        self.timeout_s = timeout_s
        self.shard = shard


class BusRejected(ShardbusError):
    """The bus refused this client for good; the message says why."""


class OutboxFull(ShardbusError):
    """The outbox of a shard is full, and the client was told to reject instead of waiting. The event was not published."""

    def __init__(self, shard: int, held_events: int) -> None:
        super().__init__(
            f"the outbox of shard {shard} is full ({counted(held_events, 'event', 'is')} not finished); publish it again "
            'later, or connect with on_full="wait"'
        )
        self.shard = shard
        self.held_events = held_events


class NotDelivered(ShardbusError):
    """Events were published and are neither handled, dead nor waiting when the time was up.

    `in_flight` is how many. They may or may not have been handled.
    """

    def __init__(self, in_flight: int, timeout_s: float) -> None:
        super().__init__(
            f"{counted(in_flight, 'event', 'was')} published and not finished within {timeout_s:g} s; "
            f"{'it' if in_flight == 1 else 'they'} may or may not be handled (see `shardbus status`)"
        )
        self.in_flight = in_flight
        self.timeout_s = timeout_s


class CommandFailed(ShardbusError):
    """The command's handler raised, or there is none.

    `error_type` and `error` are the remote exception's class name and text, `remote_traceback` its traceback
    as text (empty where the handler was never entered). `error_type` is `"UnknownCommand"` where the application has no
    handler of it, and `"KeyParked"` where its key is parked.
    """

    def __init__(self, command: str, error_type: str, error: str, remote_traceback: str = "") -> None:
        super().__init__(f"{command} failed: {error_type}: {error}")
        self.command = command
        self.error_type = error_type
        self.error = error
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n\n{self.remote_traceback.rstrip()}" if self.remote_traceback else text


class CommandLost(ShardbusError):
    """The worker died after the command was sent: it may have run, wholly, partly or not at all."""

    def __init__(self, command: str) -> None:
        super().__init__(
            f"{command}: the worker died after the command was sent, so its outcome is unknown; "
            "ask the application's state before sending it again"
        )
        self.command = command


class SubscriptionLost(ShardbusError):
    """A subscription has ended: its reader was too slow and asked for this, or a worker does not feed it."""

    def __init__(self, types: str, why: str) -> None:
        super().__init__(f"the subscription to {types} has ended: {why}")
        self.types = types
        self.why = why


class BootError(ShardbusError):
    """The bus cannot start: its application does not import, its lifespan raised, or another bus runs at the address."""


def text_of(error: BaseException) -> str:
    """An error's text, a plain `str` that can be sent, whatever its own `__str__` does: that must not take down who tells of
    it."""
    try:
        return encodable(str.__str__(str(error)))  # which may be of a class of its own, with methods of its own
    except BaseException as broken:  # SystemExit, too: it only was to be told of
        return f"<its text cannot be shown: {type(broken).__name__}>"
