"""Which sessions are open in a worker, who has opened them, and which of them end now.

Pure: publishers, sequences and times are arguments. It says what ends; that a session has ended it hears from whoever has
handled the end in its place in the key's lane, so between the two a session is *ending*.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

from shardbus.session_events import CLIENT_GONE, FULL, IDLE, SessionEnded

GONE: Final = -1
"""Instead of the time at which a publisher was heard of: it has gone."""

_NO_STARTS: Final[tuple[int, ...]] = ()
_TIMES_MAX: Final = 65_536  # that a client is believed to have one session open


class _Open:
    """One session."""

    __slots__ = ("openers", "used_ns")

    def __init__(self, used_ns: int) -> None:
        self.openers: dict[bytes, tuple[int, ...]] = {}  # publisher → the sequences with which it has opened it
        self.used_ns = used_ns


class SessionTable:
    """The sessions of one worker, those that were used longest ago first.

    When full, the one that is idle for longest ends. It stays until its end is handled, so there may be as many more as
    messages are taken meanwhile, and as there are parked keys, behind which ends wait.

    Args:
        sessions_max: how many may be open.
        idle_ns: a session that was not used for so long ends; 0: never.
    """

    def __init__(self, sessions_max: int, idle_ns: int = 0) -> None:
        assert sessions_max > 0
        assert idle_ns >= 0
        self._sessions_max = sessions_max
        self._idle_ns = idle_ns
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._ending: dict[str, _Open] = {}
        self._opened_by: dict[bytes, dict[str, None]] = {}
        self._heard_ns: dict[bytes, int] = {}  # of each publisher that has a session open

    def __len__(self) -> int:
        return len(self._open) + len(self._ending)

    @property
    def has_openers(self) -> bool:
        """Whether a publisher has a session open here."""
        return bool(self._opened_by)

    @property
    def next_idle_ns(self) -> int:
        """When the first session ends unless it is used; 0: none does."""
        if not self._idle_ns or not self._open:
            return 0
        return next(iter(self._open.values())).used_ns + self._idle_ns

    def started(self, key: str, publisher: bytes, start: int, now_ns: int) -> None:
        """A publisher has opened a session, with the event of this sequence; that one may come again."""
        session = self._use(key, now_ns)
        starts = session.openers.get(publisher, _NO_STARTS)
        if start not in starts:
            session.openers[publisher] = (*starts, start)
        self._opened_by.setdefault(publisher, {})[key] = None
        self._heard_ns[publisher] = max(now_ns, self._heard_ns.get(publisher, now_ns))

    def kept(self, key: str, publisher: bytes, seq: int, times: int, now_ns: int) -> None:
        """A publisher has a session open so many times, whatever was known of it; this is the event of this sequence."""
        self.started(key, publisher, seq, now_ns)
        self._use(key, now_ns).openers[publisher] = (seq,) * max(1, min(times, _TIMES_MAX))

    def used(self, key: str, now_ns: int) -> None:
        """The state of a session was asked for."""
        self._use(key, now_ns)

    def ended(self, key: str, publisher: bytes, now_ns: int) -> bool:
        """The end of a session was handled that this publisher has published; returns whether the session is over.

        It is not while somebody else has it open, or the same publisher once more.
        """
        session = self._ending.get(key) or self._open.get(key)
        if session is None:
            return True
        starts = session.openers.get(publisher)
        if starts is not None:
            if len(starts) > 1:
                session.openers[publisher] = starts[1:]
            else:
                self._leave(key, session, publisher)
        if session.openers:
            if self._ending.pop(key, None) is not None:  # it was opened again meanwhile
                session.used_ns = now_ns
                self._open[key] = session
            return False
        self._ending.pop(key, None)
        self._open.pop(key, None)
        return True

    # -- what ends now

    def gone(self, publisher: bytes) -> list[SessionEnded]:
        """A publisher has gone: what it had open ends, as if it had left it."""
        ends = []
        for key in list(self._opened_by.get(publisher, ())):
            session = self._open.get(key) or self._ending[key]
            self._leave(key, session, publisher)
            ends.append(SessionEnded(session=key, reason=CLIENT_GONE))
            if not session.openers and self._open.pop(key, None) is not None:
                self._ending[key] = session
        return ends

    def silent(self, heard: Callable[[bytes], int | None], before_ns: int) -> list[SessionEnded]:
        """End the sessions of all publishers that were not heard of since `before_ns`.

        `heard` says when a publisher was heard of last; `GONE`: it has said that it goes; None: this worker does not know it
        (any more), so what counts is when it knew it, or it opened a session, last.
        """
        ends: list[SessionEnded] = []
        for publisher in list(self._opened_by):
            heard_ns = heard(publisher)
            if heard_ns is not None:
                self._heard_ns[publisher] = heard_ns
            if heard_ns == GONE or self._heard_ns[publisher] < before_ns:
                ends += self.gone(publisher)
        return ends

    def idle(self, now_ns: int) -> list[SessionEnded]:
        """Those that were not used for too long."""
        found = []
        if self._idle_ns:
            for key, session in self._open.items():
                if session.used_ns + self._idle_ns > now_ns:
                    break
                found.append(key)
        return list(self._end(found, IDLE))

    def crowded(self) -> list[SessionEnded]:
        """Those that make room for others, which were used later."""
        return list(self._end(list(islice(self._open, max(0, len(self._open) - self._sessions_max))), FULL))

    # -- inside

    def _use(self, key: str, now_ns: int) -> _Open:
        session = self._open.get(key)
        if session is None:
            session = self._ending.get(key)
            if session is None:
                session = self._open[key] = _Open(now_ns)
        else:
            self._open.move_to_end(key)
        session.used_ns = now_ns
        return session

    def _end(self, keys: Sequence[str], reason: str) -> Iterator[SessionEnded]:
        """Nobody has these open from now on; their ends are on their way."""
        for key in keys:
            session = self._ending[key] = self._open.pop(key)
            for publisher in list(session.openers):
                self._leave(key, session, publisher)
            yield SessionEnded(session=key, reason=reason)

    def _leave(self, key: str, session: _Open, publisher: bytes) -> None:
        del session.openers[publisher]
        opened = self._opened_by[publisher]
        del opened[key]
        if not opened:
            del self._opened_by[publisher]
            del self._heard_ns[publisher]
