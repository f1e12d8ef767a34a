"""The events that every application knows, whether or not it handles them: a client's session began, or ended."""

from __future__ import annotations

from typing import Final

from shardbus.messages import Event

LEFT: Final = "left"
IDLE: Final = "idle"
CLIENT_GONE: Final = "client gone"
FULL: Final = "full"


class SessionStarted(Event, key="session", name="shardbus.SessionStarted"):
    """A client has opened a session; its key is the session's."""

    session: str


class SessionEnded(Event, key="session", name="shardbus.SessionEnded"):
    """A session has ended.

    `reason` is `"left"`: its client has left it; or the session's worker has ended it, because it was `"idle"` for the
    `idle_seconds` of `Bus.session`, its `"client gone"` (closed without having left it, or not heard of for 30 seconds), or
    the worker `"full"` of sessions, of which it was idle for longest.
    """

    session: str
    reason: str = LEFT


class SessionKept(Event, key="session", name="shardbus.SessionKept"):
    """A client has a session open, `times` times. It tells so a worker that has taken the place of another; it is for the
    bus itself, and reaches no handler."""

    session: str
    times: int = 1


BUILT_IN: Final[tuple[type[Event], ...]] = (SessionStarted, SessionEnded, SessionKept)
