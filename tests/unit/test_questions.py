"""What a client is told whose question nobody answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from shardbus.errors import BusUnreachable
from shardbus.gate import Gate
from shardbus.questions import Questions


async def test_a_worker_that_does_not_answer_is_told_from_a_bus_that_is_not_there():
    gate, asked = Gate(), cast(list[Any], [])
    gate.loop()
    gate.open()
    outboxes = cast(Any, SimpleNamespace(send=lambda outbox, _frame: asked.append(outbox.shard)))
    questions = Questions(gate, outboxes, lambda _frame: asked.append("supervisor"), "ipc:///run/bus", lambda: 0)
    with pytest.raises(BusUnreachable, match="shard 3 of the bus at ipc:///run/bus did not answer within"):
        await questions.ask_worker(cast(Any, SimpleNamespace(shard=3)), "dead-letters", b"", 0.01)
    with pytest.raises(BusUnreachable, match="no bus answered at ipc:///run/bus"):
        await questions.ask_supervisor("status", b"", 0.01)
    assert asked == [3, "supervisor"]
