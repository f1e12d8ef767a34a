"""Limits: what is shown of them, and which relations hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import shardbus
from shardbus import Bus, Client, blocking, testing
from shardbus.config import Limits


def test_limits_show_what_is_not_usual():
    assert repr(Limits()) == "Limits()"
    assert repr(Limits(lane_events_max=4, store_full="drop_oldest")) == "Limits(lane_events_max=4, store_full='drop_oldest')"
    assert eval(repr(Limits(lane_events_max=4))) == Limits(lane_events_max=4)  # noqa: S307 - it is what a repr is for


@pytest.mark.parametrize(
    "call",
    [shardbus.connect, blocking.connect, blocking.local, Bus, Bus.local, Bus.on, Bus.use, Client, testing.run],
    ids=lambda call: call.__qualname__,
)
def test_a_signature_can_be_read(call: Callable[..., Any]):
    assert len(str(inspect.signature(call))) < 900


def test_a_program_leaves_room_for_the_headers_of_the_bus():
    limits = Limits()
    assert limits.own_headers_max < limits.headers_max
    with pytest.raises(AssertionError):
        Limits(own_headers_max=33)
