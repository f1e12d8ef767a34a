"""A message bus for Python applications that have outgrown one core.

A name is imported when it is first asked for, so that a command is in charge of its interrupts before half a second of
imports begins. `__init__.pyi` beside this tells type checkers the same; a test holds the two together.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "BootError": "shardbus.errors",
    "Breaker": "shardbus.breaker",
    "Bus": "shardbus.bus",
    "BusRejected": "shardbus.errors",
    "BusUnreachable": "shardbus.errors",
    "CallNext": "shardbus.pipeline",
    "Client": "shardbus.client",
    "ClientClosed": "shardbus.errors",
    "Command": "shardbus.messages",
    "CommandFailed": "shardbus.errors",
    "CommandLost": "shardbus.errors",
    "ConfigError": "shardbus.errors",
    "Context": "shardbus.context",
    "DeadLetter": "shardbus.dead_letters",
    "DeadLetterFilter": "shardbus.dead_letters",
    "Event": "shardbus.messages",
    "Filter": "shardbus.filters",
    "HandlerTimes": "shardbus.middleware",
    "Idempotency": "shardbus.middleware",
    "InvalidKey": "shardbus.errors",
    "InvalidMessage": "shardbus.errors",
    "Ledger": "shardbus.outboxes",
    "Logging": "shardbus.middleware",
    "MessageTooLarge": "shardbus.errors",
    "Middleware": "shardbus.pipeline",
    "Missed": "shardbus.subscriptions",
    "NotDelivered": "shardbus.errors",
    "OnSlow": "shardbus.subscriptions",
    "OutboxFull": "shardbus.errors",
    "PublishMiddleware": "shardbus.publishing",
    "RateLimit": "shardbus.middleware",
    "RegistrationError": "shardbus.errors",
    "RemoteProtocolError": "shardbus.errors",
    "Retry": "shardbus.retry",
    "Scheduled": "shardbus.scheduled_events",
    "Session": "shardbus.sessions",
    "SessionEnded": "shardbus.session_events",
    "SessionStarted": "shardbus.session_events",
    "ShardbusError": "shardbus.errors",
    "Statistics": "shardbus.outboxes",
    "Stream": "shardbus.streams",
    "Subscription": "shardbus.subscriptions",
    "SubscriptionLost": "shardbus.errors",
    "Timing": "shardbus.middleware",
    "Traceparent": "shardbus.tracing",
    "UsageError": "shardbus.errors",
    "Validation": "shardbus.middleware",
    "WorkerInfo": "shardbus.registry",
    "blocking": "shardbus.blocking",
    "connect": "shardbus.connecting",
    "continue_trace": "shardbus.tracing",
    "current_trace": "shardbus.tracing",
    "header_matches": "shardbus.filters",
    "is_type": "shardbus.filters",
    "key_matches": "shardbus.filters",
    "propagate_trace": "shardbus.tracing",
    "run": "shardbus.event_loop",
    "trace": "shardbus.tracing",
    "trace_of": "shardbus.tracing",
    "where": "shardbus.filters",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = globals()[name] = module if name == "blocking" else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
