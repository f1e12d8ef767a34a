"""The directories of a bus: its sockets, its lock, its evidence and stores. The only file that locks files.

A bus owns `ipc://DIRECTORY`. What must outlive a worker lies in a state directory on RAM, found again by the next `serve` at
the same address: one evidence file, one journal and, by default, one store for each shard.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import tempfile
from typing import Final

from shardbus.addresses import Address, IpcAddress, is_socket_name
from shardbus.errors import BootError, ConfigError

_RAM: Final = "/dev/shm"  # noqa: S108 - the point is that it is on RAM; what is made in it is private


class RunDir:
    """The directories of the bus at an address, locked for one supervisor.

    Raises:
        BootError: another supervisor holds the address.
        ConfigError: a directory is not this user's alone, or holds other things.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        base = _RAM if os.path.isdir(_RAM) and os.access(_RAM, os.W_OK) else tempfile.gettempdir()
        self.on_ram = base == _RAM
        place = f"ipc://{os.path.realpath(address.directory)}" if isinstance(address, IpcAddress) else address.url
        digest = hashlib.sha256(place.encode()).hexdigest()[:16]
        self.state = os.path.join(base, f"shardbus-{os.getuid()}-{digest}")
        if isinstance(address, IpcAddress):
            _check_ours(address.directory)
            _make_private(address.directory)
        self._lock = self._take_lock()
        if isinstance(address, IpcAddress):
            _make_private(address.directory)  # a bus that ended just now may have removed it
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _take_lock(self) -> int:
        path = os.path.join(self.state, "lock")
        while True:
            _make_private(self.state)
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # a bus that ended has removed its state just now
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                pid = os.pread(lock, 32, 0).decode().strip() or "?"
                os.close(lock)
                raise BootError(
                    f"a bus runs at {self._address.url} already (supervisor {pid}); stop it with `shardbus drain --connect "
                    f"{self._address.url}`, or give this one another address with --bind"
                ) from None
            if _is_file_at(path, lock):
                return lock
            os.close(lock)  # likewise

    def evidence_path(self, shard: int) -> str:
        """The file of a shard's evidence."""
        return os.path.join(self.state, f"evidence-{shard}")

    def journal_path(self, shard: int) -> str:
        """The file of a shard's journal."""
        return os.path.join(self.state, f"journal-{shard}")

    def store_path(self, shard: int) -> str:
        """The file of a shard's store, where no URL was given."""
        return os.path.join(self.state, f"store-{shard}.db")

    def shards_before(self) -> int:
        """How many shards the bus had that was here before; 0: none was."""
        try:
            with open(os.path.join(self.state, "shards"), encoding="ascii") as file:
                return int(file.read())
        except (OSError, ValueError):
            return 0

    def remember_shards(self, shards: int) -> None:
        """Note the number of shards for the next supervisor."""
        path = os.path.join(self.state, "shards")
        with open(path + ".new", "w", encoding="ascii") as file:
            file.write(str(shards))
        os.replace(path + ".new", path)

    def remove_evidence(self) -> None:
        """Start over with what a bus of another number of shards left as evidence, and as journals."""
        for name in os.listdir(self.state):
            if name.startswith(("evidence-", "journal-")):
                os.unlink(os.path.join(self.state, name))

    def clear(self) -> None:
        """Start over with all that a bus left here: stores, evidence, journals."""
        for name in os.listdir(self.state):
            if name != "lock":
                os.unlink(os.path.join(self.state, name))

    def remove_sockets(self) -> None:
        """Remove sockets that a predecessor left; call it only while the lock is held."""
        if isinstance(self._address, IpcAddress):
            for entry in os.scandir(self._address.directory):
                if is_socket_name(entry.name) and stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(entry.path)

    def remove_socket(self, address: str) -> None:
        """Remove the socket of a worker that is gone."""
        if address.startswith("ipc://"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.removeprefix("ipc://"))

    def close(self, *, forget: bool) -> None:
        """Remove the sockets with their directory, and give the lock back. State stays for the next, unless it is to be
        forgotten."""
        self.remove_sockets()
        if isinstance(self._address, IpcAddress):
            with contextlib.suppress(OSError):  # it is not empty, or is in a place of somebody else's
                os.rmdir(self._address.directory)
        if forget:
            self.clear()
            # The lock goes last, and with it the directory: whoever waits for it makes a new one.
            os.unlink(os.path.join(self.state, "lock"))
            with contextlib.suppress(OSError):  # somebody has made its lock again
                os.rmdir(self.state)
        os.close(self._lock)


def _is_file_at(path: str, descriptor: int) -> bool:
    try:
        there, ours = os.stat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _check_ours(directory: str) -> None:
    """Refuse a directory that holds anything but a bus's sockets: it would be closed to others, and is somebody's."""
    try:
        foreign = next((name for name in sorted(os.listdir(directory)) if not is_socket_name(name)), None)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot use the directory {directory}: {error.strerror}") from error
    if foreign is not None:
        raise ConfigError(
            f"{directory} holds other things ({foreign!r}), and a bus owns its directory; name one that is empty or not "
            f"there yet, for instance ipc://{directory}/shardbus"
        )


def _make_private(directory: str) -> None:
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        found = os.lstat(directory)
    except OSError as error:
        raise ConfigError(f"cannot use the directory {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{directory} is not a directory of this user's; remove it, or name another with --bind")
    if stat.S_IMODE(found.st_mode) & 0o077:
        try:
            os.chmod(directory, 0o700)
        except OSError as error:
            raise ConfigError(f"cannot make {directory} private: {error.strerror}") from error
