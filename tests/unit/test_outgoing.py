"""What a child inherits, which commands close a ring, who is a worker, and when the last child is finished."""

from __future__ import annotations

import pytest

from shardbus.errors import UsageError
from shardbus.outgoing import HOLDS, Children, check_ring, child_headers, is_worker, keys_held, worker_publisher

PARENT = {"tenant": "a", "traceparent": "00-1", "tracestate": "x=1", "correlation-id": "c"}


@pytest.mark.parametrize(
    ("parent", "own", "expected"),
    [
        ({}, None, {"correlation-id": "m"}),
        ({"correlation-id": ""}, {}, {"correlation-id": "m"}),
        (PARENT, None, {"traceparent": "00-1", "tracestate": "x=1", "correlation-id": "c"}),
        (PARENT, {"by": "me"}, {"by": "me", "traceparent": "00-1", "tracestate": "x=1", "correlation-id": "c"}),
        (PARENT, {"traceparent": "00-2"}, {"traceparent": "00-2", "correlation-id": "c"}),
        (PARENT, {"tracestate": "y=2"}, {"traceparent": "00-1", "tracestate": "y=2", "correlation-id": "c"}),
        ({}, {"correlation-id": "mine"}, {"correlation-id": "mine"}),
        ({}, {"causation-id": "x", "shardbus-repeated": "1", "shardbus-holds": "0"}, {"correlation-id": "m"}),
    ],
)
def test_a_child_has_its_own_headers_and_those_of_its_chain(
    parent: dict[str, str], own: dict[str, str] | None, expected: dict[str, str]
) -> None:
    given = None if own is None else own.copy()
    assert child_headers(parent, "m", repeated=False, own=own) == expected | {"causation-id": "m"}
    assert own == given
    repeated = child_headers(parent, "m", repeated=True, own=own)
    assert repeated == expected | {"causation-id": "m", "shardbus-repeated": "1"}


def test_keys_are_held_through_a_chain_of_commands_and_only_there() -> None:
    first = keys_held({}, "a")
    assert len(first) == 1
    second = keys_held({HOLDS: " ".join(first)}, 7)
    assert second[:1] == first
    assert len(second) == 2
    assert keys_held({HOLDS: " ".join(second)}, None) == second
    assert keys_held({}, None) == ()


@pytest.mark.parametrize(
    ("key", "told"),
    [("a", "would close a ring"), (7, "of its own key"), ("7", None), (b"a", None), (None, None), ((b"a" * 16,), None)],
)
def test_a_command_is_refused_whose_key_waits_for_it(key: str | int | bytes | tuple[bytes] | None, told: str | None) -> None:
    held = (*keys_held({}, "a"), *keys_held({}, 7))
    if told is None:
        check_ring("Total", key, held, 7)
        return
    with pytest.raises(UsageError, match=told):
        check_ring("Total", key, held, 7)


def test_a_chain_of_commands_has_an_end() -> None:
    held: tuple[str, ...] = ()
    for at in range(65):
        held = keys_held({HOLDS: " ".join(held)}, at) if held else keys_held({}, at)
        if at < 64:
            check_ring("Total", "next", held, at)
    with pytest.raises(UsageError, match="the limit is 64"):
        check_ring("Total", "next", held, 64)


def test_a_worker_is_known_by_its_bus_and_every_incarnation_is_another() -> None:
    def epoch(incarnation: bytes, shard: int, counter: int) -> bytes:
        return incarnation + shard.to_bytes(2, "big") + counter.to_bytes(6, "big")

    ours, others = b"o" * 16, b"x" * 16
    publishers = {worker_publisher(epoch(ours, shard, counter)) for shard in range(3) for counter in (1, 2, 70_000)}
    assert len(publishers) == 9
    assert all(len(publisher) == 16 for publisher in publishers)
    assert all(is_worker(publisher, epoch(ours, 9, 9)) for publisher in publishers)
    assert not any(is_worker(publisher, epoch(others, 0, 1)) for publisher in publishers)
    assert len(worker_publisher(ours + b"\0\1")) == 16  # a shard of the local engine has no incarnations


def test_the_last_child_is_told_of_once() -> None:
    children = Children()
    told: list[dict[str, int]] = []
    children.then = lambda: told.append(dict(children.pending))
    children.add("a")
    children.add("b", 2)
    children.finish("b")
    children.finish("a")
    assert children.pending == {"b": 1}
    assert not told
    children.finish("b")
    assert told == [{}]
