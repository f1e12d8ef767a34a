"""The directories of a bus: whose they are, and how long they stay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardbus.addresses import Address, parse_address
from shardbus.errors import BootError, ConfigError
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
    assert os.path.isdir(address.directory)  # which the other has removed as well
    with pytest.raises(BootError):
        RunDir(address)
    taken.close(forget=True)


def test_the_directory_of_the_sockets_goes_with_them_unless_something_else_is_there(address: Address):
    RunDir(address).close(forget=False)
    assert not os.path.exists(address.directory)
    holder = RunDir(address)
    note = Path(address.directory, "note")
    note.touch()
    holder.close(forget=True)
    assert note.exists()
    note.unlink()


def test_a_directory_with_other_things_in_it_is_not_taken(tmp_path: Path):
    (tmp_path / "letters.txt").touch()
    with pytest.raises(ConfigError) as raised:
        RunDir(parse_address(f"ipc://{tmp_path}"))
    assert str(raised.value) == (
        f"{tmp_path} holds other things ('letters.txt'), and a bus owns its directory; name one that is empty or not there "
        f"yet, for instance ipc://{tmp_path}/shardbus"
    )


def test_a_file_in_the_place_of_the_directory_is_told(tmp_path: Path):
    (tmp_path / "bus").touch()
    with pytest.raises(ConfigError, match=f"cannot use the directory {tmp_path}/bus: Not a directory"):
        RunDir(parse_address(f"ipc://{tmp_path}/bus"))


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: str, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(ConfigError, match=f"cannot use the directory {tmp_path}/bus: Permission denied"):
        RunDir(parse_address(f"ipc://{tmp_path}/bus"))


def test_a_directory_that_cannot_be_closed_to_others_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: str, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "bus").mkdir(mode=0o755)
    monkeypatch.setattr(os, "chmod", refuse)
    with pytest.raises(ConfigError, match=f"cannot make {tmp_path}/bus private: Operation not permitted"):
        RunDir(parse_address(f"ipc://{tmp_path}/bus"))


def test_a_directory_of_another_user_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bus").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    with pytest.raises(ConfigError, match="bus is not a directory of this user's; remove it, or name another with --bind"):
        RunDir(parse_address(f"ipc://{tmp_path}/bus"))
