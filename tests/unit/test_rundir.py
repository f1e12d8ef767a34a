"""The directories of a bus: whose they are, and how long they stay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardbus.addresses import Address, parse_address
from shardbus.errors import BootError
from shardbus.rundir import RunDir


@pytest.fixture
def address(tmp_path: Path) -> Iterator[Address]:
    address = parse_address(f"ipc://{tmp_path}/bus")
    yield address
    RunDir(address).close(forget=True)


def test_one_supervisor_at_a_time_holds_an_address(address: Address):
    holder = RunDir(address)
    with pytest.raises(BootError, match=f"runs at ipc://.* already .supervisor {os.getpid()}"):
        RunDir(address)
    holder.close(forget=False)
    RunDir(address).close(forget=False)


def test_state_stays_for_the_next_unless_there_is_nothing_to_keep(address: Address):
    first = RunDir(address)
    first.remember_shards(3)
    Path(first.evidence_path(0)).touch()
    first.close(forget=False)
    second = RunDir(address)
    assert second.shards_before() == 3
    assert os.path.exists(second.evidence_path(0))
    second.close(forget=True)
    assert not os.path.exists(second.state)
    third = RunDir(address)
    assert third.shards_before() == 0
    third.close(forget=False)


def test_whoever_holds_a_lock_that_was_removed_meanwhile_takes_the_new_one(
    address: Address, monkeypatch: pytest.MonkeyPatch
):
    ending = RunDir(address)
    opened = os.open

    def open_and_lose(path: str, *arguments: int) -> int:
        """The bus that ends removes its state between our opening its lock and our locking it."""
        monkeypatch.undo()
        descriptor = opened(path, *arguments)
        ending.close(forget=True)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_lose)
    taken = RunDir(address)
    with pytest.raises(BootError):
        RunDir(address)
    taken.close(forget=True)
