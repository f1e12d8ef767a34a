"""A worker process, put together: the worker, and the client that its handlers send through. Neither knows the other."""

from __future__ import annotations

from collections.abc import Callable

from shardbus import *  # noqa: F403 - all that an application may ask for is there before a fork server copies itself
from shardbus.handler_client import HandlerClient
from shardbus.outgoing import worker_publisher
from shardbus.reports import Assignment
from shardbus.worker import main
from shardbus.zmq_transport import ZmqConnector


def make_outgoing(spec: Assignment, broken: Callable[[BaseException], None]) -> HandlerClient:
    """What the handlers of this worker send through: a client of its own bus, as any other program's."""
    return HandlerClient(spec.bus, ZmqConnector, spec.control, publisher=worker_publisher(spec.epoch), broken=broken)


if __name__ == "__main__":
    main(make_outgoing)
