"""The blocking client's sessions: messages of one key, and handlers for what is handled under it.

The messages go through an asyncio `Session` on the client's loop. Owns the threads in which handlers run: one for each, so a
handler may block, and may use the client.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, TypeVar

from shardbus.blocking_readers import BlockingStream, BlockingSubscription, Leave, Wait, open_stream
from shardbus.errors import ClientClosed, UsageError
from shardbus.messages import Command, Event
from shardbus.sessions import Session
from shardbus.signatures import is_coroutine_function
from shardbus.subscriptions import Missed
from shardbus.tracebacks import log_error

log = logging.getLogger("shardbus.blocking")

ReplyT = TypeVar("ReplyT")
HandlerT = TypeVar("HandlerT", bound=Callable[[Any], Any])


class BlockingSession:
    """Messages of one key: `with client.session("chat-7") as session`. Made by `BlockingClient.session`. See `Session`.

    Entering publishes `SessionStarted`, leaving `SessionEnded`, both under the session's key. Many threads may use it.
    """

    def __init__(
        self, session: Session, subscribe: Callable[..., BlockingSubscription[Any]], wait: Wait, leave: Leave
    ) -> None:
        self.key = session.key
        """The key that all its messages have."""
        self._session = session
        self._subscribe = subscribe
        self._wait = wait
        self._leave = leave
        self._lock = threading.Lock()  # who registers, and the end, come one after another
        self._is_open = False
        self._listeners: dict[threading.Thread, BlockingSubscription[Any]] = {}

    def __enter__(self) -> BlockingSession:
        self._wait(lambda _: self._session.__aenter__())
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        try:
            with self._lock:
                self._is_open = False
                listeners = dict(self._listeners)
                self._listeners.clear()
            for events in listeners.values():
                events.close()
            for thread in listeners:
                if thread is not threading.current_thread():
                    thread.join()
        finally:
            try:
                self._wait(lambda _: self._session.__aexit__(kind, error, stack))
            except (ClientClosed, UsageError):  # the latter in a child of `os.fork()`
                if error is None:
                    raise

    def publish(
        self,
        event: Event,
        *,
        headers: dict[str, str] | None = None,
        deadline: float | None = None,
        at: datetime | float | None = None,
        delay: float | None = None,
    ) -> None:
        """As `Session.publish`; a round trip to the loop, and waits for room without end."""
        self._wait(
            lambda _: self._session.publish(event, headers=headers, deadline=deadline, at=at, delay=delay)
        )

    def publish_many(
        self, events: Sequence[Event], *, headers: dict[str, str] | None = None, deadline: float | None = None
    ) -> None:
        """As `Session.publish_many`."""
        self._wait(lambda _: self._session.publish_many(events, headers=headers, deadline=deadline))

    def execute(
        self, command: Command[ReplyT], *, timeout: float = 5.0, headers: dict[str, str] | None = None
    ) -> ReplyT:
        """As `Session.execute`."""
        return self._wait(lambda _: self._session.execute(command, timeout=timeout, headers=headers))

    def stream(
        self,
        command: Command[ReplyT],
        *,
        timeout: float = 60.0,
        window: int = 64,
        headers: dict[str, str] | None = None,
    ) -> BlockingStream[ReplyT]:
        """As `BlockingClient.stream`, of a command with the session's key."""
        return open_stream(
            command,
            lambda _, ahead: self._session.stream(command, timeout=timeout, window=ahead, headers=headers),
            window,
            self._wait,
            self._leave,
        )

    def on(self, event_type: type[Event], handler: HandlerT) -> HandlerT:
        """Call a handler, in a thread of its own, with each event of a type and the session's key that the bus has handled.

        It is a plain `def` of `(event)`, called for one event after another, in their order; it may block, and may use the
        client. That it raises is logged, and what it missed, because it is slow or a worker was replaced. What is published
        after this call comes to it, until the block is left; that waits for a call that is under way.

        Raises:
            UsageError: the session is not open, or the handler is none; else as for `BlockingClient.subscribe`.
            SubscriptionLost: the type cannot be followed.
        """
        if not callable(handler) or is_coroutine_function(handler):
            raise UsageError(
                f"session.on({event_type!r}, {handler!r}): a handler of a blocking session is a plain `def` of (event), "
                "which is called in a thread of its own; `async def` is for the asyncio client"
            )
        self._check_open()
        events = self._subscribe(event_type, key=self.key)
        events.__enter__()
        thread = threading.Thread(
            target=self._listen, args=(events, handler), name=f"shardbus-session {self.key}", daemon=True
        )
        try:
            with self._lock:
                self._check_open()
                thread.start()
                self._listeners[thread] = events
        except BaseException:
            events.close()
            raise
        return handler

    def _check_open(self) -> None:
        if not self._is_open:
            raise UsageError(f"the session {self.key!r} is not open; use it inside its `with` block")

    def _listen(self, events: BlockingSubscription[Any], handler: Callable[[Any], Any]) -> None:
        try:
            for event in events:
                if isinstance(event, Missed):
                    log.warning("the session %r has missed events (%s)", self.key, event)
                else:
                    self._call(handler, event)
        except Exception as error:  # the subscription has ended
            log.warning("the session %r hears no more: %s", self.key, error)

    def _call(self, handler: Callable[[Any], Any], event: Event) -> None:
        try:
            handler(event)
        except BaseException as error:  # the application's, in a thread of its own
            log_error(log, error, "a handler of the session %r failed with %s", self.key, type(event).__name__)
