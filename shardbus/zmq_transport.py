"""ZeroMQ sockets in an asyncio event loop. The only file that imports zmq.

A message is one part (behind a ROUTER's identity). Sockets never block: what cannot be sent now is lost, and the session
above sends it again. The socket's descriptor is edge-triggered, so it is drained until nothing is left, under a budget, and
looked at again after every send. In a child of `os.fork()` all that were open are closed: there libzmq answers every call as
interrupted, and it would be made again for ever.
"""

from __future__ import annotations

import asyncio
import errno
import os
import weakref
from collections.abc import Callable
from typing import Any, Final

import zmq

from shardbus.config import DEFAULT_LIMITS
from shardbus.errors import ConfigError

_DRAIN_FRAMES: Final = 64  # frames a turn and socket, so that one peer cannot hold the loop
# Credit bounds what is under way; the mark stands well above it and is never meant to be reached. At its mark a ROUTER drops
# without a word, and a connecting socket with a receive mark can abort the process when it reconnects (libzmq #3937).
_SEND_MARK: Final = 100_000
_HANDSHAKE_MS: Final = 5_000
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_NOBLOCK: Final = int(zmq.NOBLOCK)  # plain numbers: combining enumeration members took 1 % of a busy worker
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK) | int(zmq.SNDMORE)


class _Socket:
    """What dealer and router share: a socket, drained from the event loop."""

    def __init__(self, context: zmq.Context[Any], kind: int) -> None:
        try:
            self._socket: zmq.Socket[bytes] = context.socket(kind)
        except zmq.ZMQError as error:  # no descriptor is left
            raise ConfigError(f"no socket can be opened: {error}") from error
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.MAXMSGSIZE, DEFAULT_LIMITS.frame_bytes_max)
        self._socket.set(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.SNDHWM, _SEND_MARK)
        self._loop = asyncio.get_running_loop()
        self._fd = -1
        self._scheduled = False
        self._closed = False
        _open.add(self)

    def _listen(self) -> None:
        self._fd = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._look_soon()

    def _look_soon(self) -> None:
        """A send may have swallowed the edge that announces a frame."""
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._scheduled = False
        try:
            for _ in range(_DRAIN_FRAMES):
                # Asked first: an exception for each time that nothing is there took three times as long.
                if self._closed or not int(self._socket.get(_EVENTS)) & _POLLIN:
                    return
                self._receive()
        except zmq.Again:
            return  # a peer has gone with what it had sent
        except BaseException:
            self._look_soon()  # what follows must not wait for the next edge
            raise
        self._look_soon()

    def _receive(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Let go at once; what was not sent is dropped."""
        if not self._closed:
            self._closed = True
            if self._fd >= 0:
                self._loop.remove_reader(self._fd)
            self._socket.close(0)


_open: Final[weakref.WeakSet[_Socket]] = weakref.WeakSet()


def _close_in_a_child() -> None:
    for one in list(_open):
        one._closed = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_a_child)


class Dealer(_Socket):
    """A connecting socket: one channel to one peer."""

    def __init__(self, context: zmq.Context[Any], address: str, on_frame: Callable[[bytes], None]) -> None:
        super().__init__(context, zmq.DEALER)
        self._on_frame = on_frame
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise ConfigError(f"cannot connect to {address}: {error}") from error
        self._listen()

    def send(self, frame: bytes) -> bool:
        """Hand over a frame; False where it cannot be taken now."""
        if self._closed:
            return False
        try:
            self._socket.send(frame, _NOBLOCK)
        except zmq.Again:
            return False
        self._look_soon()
        return True

    def _receive(self) -> None:
        self._on_frame(self._socket.recv(_NOBLOCK))


class Router(_Socket):
    """A bound socket: many peers, each with an identity that ZeroMQ gives it.

    Raises:
        ConfigError: the address is in use, its host cannot be found, or it cannot be bound.
    """

    def __init__(self, context: zmq.Context[Any], address: str, on_frame: Callable[[bytes, bytes], None]) -> None:
        super().__init__(context, zmq.ROUTER)
        self._on_frame = on_frame
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close(0)
            if error.errno == zmq.EADDRINUSE:
                raise ConfigError(
                    f"{address} is in use: another program listens there; name another with --bind"
                ) from error
            if error.errno == errno.ENODEV:
                raise ConfigError(
                    f"cannot listen at {address}: its host cannot be found here; name an address of this machine, for "
                    "instance tcp://127.0.0.1:7400"
                ) from error
            raise ConfigError(f"cannot listen at {address}: {error}") from error
        self._listen()

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Send a frame to a peer; one that is gone gets nothing."""
        if self._closed:
            return False
        try:
            self._socket.send(peer, _NOBLOCK_MORE)
            self._socket.send(frame, _NOBLOCK)
        except zmq.Again:
            return False
        self._look_soon()
        return True

    def _receive(self) -> None:
        peer = self._socket.recv(_NOBLOCK)
        # A frame object knows whether more follows; asking the socket costs a system call for each part.
        part: zmq.Frame = self._socket.recv(_NOBLOCK, copy=False)
        data = part.bytes
        while part.more:
            # Our peers send one part. What has more is read to its end, and found not to be sound.
            data = b""
            part = self._socket.recv(_NOBLOCK, copy=False)
        self._on_frame(peer, data)


class ZmqConnector:
    """Opens dealers in a context of its own; a client's way to a bus."""

    def __init__(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self._open: list[Dealer] = []

    def open(self, address: str, on_frame: Callable[[bytes], None]) -> Dealer:
        """A channel to an address, connecting."""
        self._open = [dealer for dealer in self._open if not dealer._closed]
        dealer = Dealer(self._context, address, on_frame)
        self._open.append(dealer)
        return dealer

    def close(self) -> None:
        """Close all channels and the context."""
        for dealer in self._open:
            dealer.close()
        self._context.destroy(0)


class ZmqListener:
    """Binds routers in a context of its own; a worker's or a supervisor's ear."""

    def __init__(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self._bound: list[Router] = []

    def bind(self, address: str, on_frame: Callable[[bytes, bytes], None]) -> Router:
        """A router at an address. Raises `ConfigError` where it cannot be bound."""
        router = Router(self._context, address, on_frame)
        self._bound.append(router)
        return router

    def close(self) -> None:
        """Close all routers and the context."""
        for router in self._bound:
            router.close()
        self._context.destroy(0)

