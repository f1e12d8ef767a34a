"""A message bus for Python applications that have outgrown one core."""

from shardbus import blocking
from shardbus.breaker import Breaker
from shardbus.bus import Bus
from shardbus.client import Client, Ledger, Statistics
from shardbus.connecting import connect
from shardbus.context import Context
from shardbus.dead_letters import DeadLetter, DeadLetterFilter
from shardbus.errors import (
    BootError,
    BusRejected,
    BusUnreachable,
    ClientClosed,
    CommandFailed,
    CommandLost,
    ConfigError,
    InvalidKey,
    MessageTooLarge,
    NotDelivered,
    OutboxFull,
    RegistrationError,
    RemoteProtocolError,
    ShardbusError,
    UsageError,
)
from shardbus.event_loop import run
from shardbus.messages import Command, Event
from shardbus.registry import WorkerInfo
from shardbus.retry import Retry

__all__ = [
    "BootError",
    "Breaker",
    "Bus",
    "BusRejected",
    "BusUnreachable",
    "Client",
    "ClientClosed",
    "Command",
    "CommandFailed",
    "CommandLost",
    "ConfigError",
    "Context",
    "DeadLetter",
    "DeadLetterFilter",
    "Event",
    "InvalidKey",
    "Ledger",
    "MessageTooLarge",
    "NotDelivered",
    "OutboxFull",
    "RegistrationError",
    "RemoteProtocolError",
    "Retry",
    "ShardbusError",
    "Statistics",
    "UsageError",
    "WorkerInfo",
    "blocking",
    "connect",
    "run",
]
__version__ = "0.1.0"
