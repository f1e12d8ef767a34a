"""The events that every application knows, whether or not it handles them: a client's session began, or ended."""

from __future__ import annotations

from typing import Final

from shardbus.messages import Event


class SessionStarted(Event, key="session", name="shardbus.SessionStarted"):
    """A client has opened a session; its key is the session's."""

    session: str


class SessionEnded(Event, key="session", name="shardbus.SessionEnded"):
    """A client has left a session. Of one that was killed there is none."""

    session: str


BUILT_IN: Final[tuple[type[Event], ...]] = (SessionStarted, SessionEnded)
