"""What a worker sends to those who listen: the events that were handled, one feed for each subscription. Does no I/O.

A feed is never waited for. Every event that it is meant to get has a number; while more is on the way than its window
takes, events are dropped, and the next frame's number says how many. So a listener that stands still costs its window and
nothing else, and knows what it missed.

Owns which event goes to whom, and the windows. Who calls it has handled the events, and sends what it makes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from shardbus.config import Limits
from shardbus.errors import RemoteProtocolError
from shardbus.messages import WireKey
from shardbus.wire.codec import Batch, Extra, Headers, unpack_keys
from shardbus.wire.frames import (
    Feed,
    FromListener,
    Subscribe,
    Subscribed,
    Taken,
    Unsubscribe,
    Unsubscribed,
    encode_frame,
)

_NS: Final = 1_000_000_000
_ANY: Final = object()  # in the place of a key: all of them


class Window:
    """One feed: the numbers of its events, and what is on the way."""

    __slots__ = (
        "_batch",
        "_batch_bytes",
        "_first",
        "_sent",
        "_taken",
        "_told",
        "bytes",
        "events",
        "heard_ns",
        "key",
        "names",
        "next",
        "number",
        "peer",
        "queued",
    )

    def __init__(self, peer: bytes, number: int, names: tuple[str, ...], key: object) -> None:
        self.peer = peer
        self.number = number
        self.names = names
        self.key = key
        self.heard_ns = 0
        self.next = 0  # the number of the event that comes next
        self.events = 0  # on the way, or about to be
        self.bytes = 0
        self.queued = False  # its frame waits to be sent
        self._batch = Batch()
        self._batch_bytes = 0
        self._first = 0  # the number of the first event in it
        self._sent: deque[tuple[int, int, int]] = deque()  # number behind the last event, events, bytes
        self._told = 0  # the listener will hear that all below it exist
        self._taken = 0

    @property
    def is_open(self) -> bool:
        """Whether a frame is being filled."""
        return bool(len(self._batch))

    @property
    def has_gap(self) -> bool:
        """Whether events were dropped since the last that was not."""
        return self._first + len(self._batch) != self.next

    def is_full(self, size: int, limits: Limits) -> bool:
        """Whether so many bytes more do not fit into the frame."""
        return len(self._batch) >= limits.batch_events_max or self._batch_bytes + size > limits.batch_bytes_target

    def add(self, name: str, key: WireKey, body: bytes, headers: Headers | None, size: int) -> None:
        """Put the next event into the frame; who calls has made sure that there is room, and no gap before it."""
        batch = self._batch
        if not len(batch):
            self._first = self.next
        batch.add(name, key, body)
        if headers:
            batch.extras.append(Extra(len(batch) - 1, headers, 0, False))
        self.next += 1
        self.events += 1
        self.bytes += size
        self._batch_bytes += size

    def drop(self) -> None:
        """Leave the next event out."""
        self.next += 1

    def seal(self, epoch: bytes) -> bytes:
        """The frame as it is filled so far; an empty one says what the next number is."""
        batch, count = self._batch, len(self._batch)
        if not count:
            self._first = self._told = self.next
            return encode_frame(Feed(epoch, self.number, self.next, 0, b""))
        first = self._first
        self._first = self._told = first + count
        self._sent.append((first + count, count, self._batch_bytes))
        self._batch, self._batch_bytes = Batch(), 0
        return encode_frame(Feed(epoch, self.number, first, count, batch.seal()))

    def taken(self, upto: int) -> bool:
        """The listener has all below `upto`; return whether it must be told of what it cannot know of.

        That is what was dropped, or, where it says the same again, what was lost on its way.

        Raises:
            RemoteProtocolError: there is no such event yet.
        """
        if upto > self.next:
            raise RemoteProtocolError(f"a subscriber took {upto} events of {self.next}")
        sent = self._sent
        while sent and sent[0][0] <= upto:
            _, events, size = sent.popleft()
            self.events -= events
            self.bytes -= size
        again, self._taken = upto == self._taken, upto
        return not self.is_open and (self._told < self.next or (again and upto < self.next))


class Feeds:
    """The feeds of one worker. Bounded: one more subscription than it takes is refused, and an event for a full one dropped.

    `is_event` says whether this application handles events of a name; `due` is called when frames wait for `flush`.
    """

    def __init__(
        self,
        epoch: bytes,
        limits: Limits,
        is_event: Callable[[str], bool],
        send: Callable[[bytes, bytes], object],
        due: Callable[[], object],
    ) -> None:
        self.index: dict[str, dict[object, list[Window]]] = {}  # by name and key; empty: nobody listens
        self._epoch = epoch
        self._limits = limits
        self._is_event = is_event
        self._send = send
        self._due = due
        self._windows: dict[tuple[bytes, int], Window] = {}
        self._peers: dict[bytes, set[int]] = {}  # the numbers of each
        self._open: list[Window] = []
        self._bytes = 0  # on the way to all of them

    def __len__(self) -> int:
        return len(self._windows)

    # -- listeners

    def receive(self, peer: bytes, frame: FromListener, now_ns: int) -> None:
        """Take what a listener says.

        Raises:
            RemoteProtocolError: it is not sound.
        """
        match frame:
            case Subscribe():
                self._subscribe(peer, frame, now_ns)
            case Taken():
                self._taken(peer, frame, now_ns)
            case Unsubscribe():
                self._forget(self._windows.get((peer, frame.subscription)))

    def listens(self, peer: bytes) -> bool:
        """Whether a peer has a subscription."""
        return bool(self._peers.get(peer))

    def leave(self, peer: bytes) -> None:
        """Forget all that a peer listens to: it is gone."""
        for number in list(self._peers.get(peer, ())):
            self._forget(self._windows[peer, number])

    def tick(self, now_ns: int) -> None:
        """Forget who has been silent for long."""
        before = now_ns - int(self._limits.subscription_silence_s * _NS)
        for window in [one for one in self._windows.values() if one.heard_ns < before]:
            self._forget(window)

    def _subscribe(self, peer: bytes, frame: Subscribe, now_ns: int) -> None:
        number = frame.subscription
        window = self._windows.get((peer, number))
        if window is None:
            key = _key_of(frame.key)
            if not all(map(self._is_event, frame.names)):
                self._send(peer, encode_frame(Unsubscribed(self._epoch, number, "unknown-type")))
                return
            numbers = self._peers.get(peer, set())
            if len(self) >= self._limits.subscriptions_max or len(numbers) >= self._limits.subscriptions_client_max:
                self._send(peer, encode_frame(Unsubscribed(self._epoch, number, "too-many")))
                return
            window = self._windows[peer, number] = Window(peer, number, tuple(dict.fromkeys(frame.names)), key)
            numbers.add(number)
            self._peers[peer] = numbers
            for name in window.names:
                self.index.setdefault(name, {}).setdefault(key, []).append(window)
        window.heard_ns = now_ns
        self._send(peer, encode_frame(Subscribed(self._epoch, number)))

    def _taken(self, peer: bytes, frame: Taken, now_ns: int) -> None:
        window = self._windows.get((peer, frame.subscription))
        if window is None:
            self._send(peer, encode_frame(Unsubscribed(self._epoch, frame.subscription, "forgotten")))
            return
        window.heard_ns = now_ns
        before = window.bytes
        tell = window.taken(frame.upto)
        self._bytes += window.bytes - before
        if tell:
            self._send(peer, window.seal(self._epoch))

    def _forget(self, window: Window | None) -> None:
        if window is None:
            return
        del self._windows[window.peer, window.number]
        self._bytes -= window.bytes
        self._peers[window.peer].remove(window.number)
        if not self._peers[window.peer]:
            del self._peers[window.peer]
        for name in window.names:
            by_key = self.index[name]
            by_key[window.key].remove(window)
            if not by_key[window.key]:
                del by_key[window.key]
            if not by_key:
                del self.index[name]

    # -- events

    def concern(self, names: str | Sequence[str]) -> bool:
        """Whether somebody listens to one of these types."""
        index = self.index
        return names in index if isinstance(names, str) else not index.keys().isdisjoint(names)

    def add(self, name: str, key: WireKey, body: bytes, headers: Headers | None = None) -> None:
        """An event was handled: feed it to those who listen."""
        by_key = self.index.get(name)
        if by_key is None:
            return
        size = -1
        for windows in (by_key.get(_ANY), by_key.get(key)):
            if windows is not None:
                if size < 0:
                    size = _size_of(key, body, headers)
                for window in windows:
                    self._add(window, name, key, body, headers, size)

    def flush(self) -> None:
        """Send the frames that were begun."""
        filled, self._open = self._open, []
        for window in filled:
            window.queued = False
            if window.is_open and self._windows.get((window.peer, window.number)) is window:
                self._send(window.peer, window.seal(self._epoch))

    def _add(
        self, window: Window, name: str, key: WireKey, body: bytes, headers: Headers | None, size: int
    ) -> None:
        limits = self._limits
        share = min(limits.feed_bytes_max, limits.feeds_bytes_max // len(self._windows))
        if window.events >= limits.feed_events_max or (
            window.bytes + size > share
            # One event that is larger than a share still goes, alone, while all together are within their bound.
            and (window.events or self._bytes + size > limits.feeds_bytes_max)
        ):
            window.drop()
            return
        if window.is_open and (window.has_gap or window.is_full(size, limits)):
            self._send(window.peer, window.seal(self._epoch))
        if not window.queued:
            window.queued = True
            if not self._open:
                self._due()
            self._open.append(window)
        window.add(name, key, body, headers, size)
        self._bytes += size


def _key_of(packed: bytes) -> object:
    if not packed:
        return _ANY
    try:
        keys = unpack_keys(packed)
    except msgspec.DecodeError:
        keys = ()
    if len(keys) != 1 or keys[0] is None:
        raise RemoteProtocolError("a subscription to what is not one key")
    return keys[0]


def _size_of(key: WireKey, body: bytes, headers: Headers | None) -> int:
    size = len(body) + 16
    if isinstance(key, str | bytes):
        size += len(key)
    if headers:
        size += sum(4 * (len(name) + len(value)) + 8 for name, value in headers.items())
    return size
