"""A message bus for Python applications that have outgrown one core."""

from shardbus import blocking
from shardbus.breaker import Breaker
from shardbus.bus import Bus
from shardbus.client import Client
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
from shardbus.event_loop import run
from shardbus.filters import Filter, header_matches, is_type, key_matches, where
from shardbus.messages import Command, Event
from shardbus.middleware import HandlerTimes, Idempotency, Logging, RateLimit, Timing, Validation
from shardbus.outboxes import Ledger, Statistics
from shardbus.pipeline import CallNext, Middleware
from shardbus.publishing import PublishMiddleware
from shardbus.registry import WorkerInfo
from shardbus.retry import Retry
from shardbus.scheduled_events import Scheduled
from shardbus.session_events import SessionEnded, SessionStarted
from shardbus.sessions import Session
from shardbus.streams import Stream
from shardbus.subscriptions import Missed, OnSlow, Subscription
from shardbus.tracing import Traceparent, continue_trace, current_trace, propagate_trace, trace, trace_of

__all__ = [
    "BootError",
    "Breaker",
    "Bus",
    "BusRejected",
    "BusUnreachable",
    "CallNext",
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
    "Filter",
    "HandlerTimes",
    "Idempotency",
    "InvalidKey",
    "InvalidMessage",
    "Ledger",
    "Logging",
    "MessageTooLarge",
    "Middleware",
    "Missed",
    "NotDelivered",
    "OnSlow",
    "OutboxFull",
    "PublishMiddleware",
    "RateLimit",
    "RegistrationError",
    "RemoteProtocolError",
    "Retry",
    "Scheduled",
    "Session",
    "SessionEnded",
    "SessionStarted",
    "ShardbusError",
    "Statistics",
    "Stream",
    "Subscription",
    "SubscriptionLost",
    "Timing",
    "Traceparent",
    "UsageError",
    "Validation",
    "WorkerInfo",
    "blocking",
    "connect",
    "continue_trace",
    "current_trace",
    "header_matches",
    "is_type",
    "key_matches",
    "propagate_trace",
    "run",
    "trace",
    "trace_of",
    "where",
]
__version__ = "0.1.0"
