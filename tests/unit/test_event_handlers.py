"""The handlers of one event: what a copy of the worker, which one of them has made, runs of them."""

from __future__ import annotations

from typing import cast

import msgspec
import pytest

from shardbus import Bus, Event
from shardbus.event_handlers import EventHandlers
from shardbus.failures import Failures
from shardbus.handler_calls import HandlerTasks
from shardbus.inbound import Delivery
from shardbus.lane_host import LaneHost
from shardbus.registry import Plan


class Step(Event, key="key"):
    key: str


class Host:
    """What handlers ask of their shard; it notes which events are concluded."""

    shard = 0
    outgoing = None
    states = None

    def __init__(self) -> None:
        self.concluded_events: list[Delivery] = []

    async def concluded(self, delivery: Delivery) -> None:
        self.concluded_events.append(delivery)


@pytest.mark.parametrize(
    ("copies", "runs", "is_concluded"),
    [("", ["first", "last"], True), ("first", ["first"], False), ("last", ["first", "last"], False)],
)
async def test_a_copy_that_a_handler_makes_runs_no_more_of_its_event(copies: str, runs: list[str], is_concluded: bool):
    bus, tasks, host = Bus("copies"), HandlerTasks(), Host()
    called: list[str] = []

    def call(name: str) -> None:
        called.append(name)
        tasks.disowned = name == copies  # as where it forks

    @bus.on(Step, priority=1)
    def first(event: Step) -> None:
        call("first")

    @bus.on(Step)
    def last(event: Step) -> None:
        call("last")

    plan = Plan(Step, bus.plans()["Step"].handlers, concludes=True)
    handlers = EventHandlers(cast(LaneHost, host), tasks, Failures(()), lambda: 1, lambda: 0.0)
    event = Delivery(None, b"p" * 16, 1, "Step", plan, "k", msgspec.msgpack.encode(Step(key="k")), 0, 0, 1)
    assert await handlers.run(event) is None
    assert called == runs
    assert host.concluded_events == [event] * is_concluded
