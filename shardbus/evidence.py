"""The shared mappings behind a shard's book and its journal. The only file that maps memory.

The supervisor makes the files; worker and supervisor map them. They lie on RAM where there is such a place, and outlive
their worker. Their room is taken when they are made: a page that the place has no room for would end whoever touches it
(SIGBUS).
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Generic, Protocol, TypeVar

from shardbus.journal import Journal, journal_bytes
from shardbus.metrics import Book, Recorder, book_bytes

# A row takes 0.33 MB of each shard's mapping, and a container has 64 MB on RAM unless it is given more: ten are enough for
# one loadgen with all its drivers, and who has none is told so.
_BOOK: Final = {"keys": 65_536, "publishers": 10}
_FULL_S: Final = 0.0005
EVIDENCE_BYTES: Final = book_bytes(**_BOOK) + journal_bytes()


def _take_room(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _map_file(path: str, size: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, 0)
            _take_room(descriptor, size)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def _wait(parent: int) -> None:
    """For the supervisor, which makes room; without it, this worker is to end."""
    if os.getppid() != parent:
        os._exit(1)
    time.sleep(_FULL_S)


class _Layout(Protocol):
    def release(self) -> None: ...


_LayoutT = TypeVar("_LayoutT", bound=_Layout)


class _Shared(Generic[_LayoutT]):
    """A mapped file, and what lies in it. Close it when done; the file stays."""

    def __init__(self, path: str, size: int, lay_out: Callable[[memoryview], _LayoutT]) -> None:
        self._map = _map_file(path, size)
        self._view = memoryview(self._map)
        self._layout = lay_out(self._view)

    def close(self) -> None:
        """Unmap it."""
        self._layout.release()
        self._view.release()
        self._map.close()


class SharedRecorder(_Shared[Recorder]):
    """A worker's side of a book in a file. Where the log is full, it waits for the supervisor.

    Raises:
        OSError: the file cannot be made or mapped.
    """

    def __init__(self, path: str) -> None:
        full = partial(_wait, os.getppid())
        super().__init__(path, book_bytes(**_BOOK), lambda view: Recorder(view, full=full, **_BOOK))
        self.recorder = self._layout


class SharedBook(_Shared[Book]):
    """The supervisor's side of a book in a file.

    Raises:
        OSError: the file cannot be made or mapped.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, book_bytes(**_BOOK), lambda view: Book(view, **_BOOK))
        self.book = self._layout


class SharedJournal(_Shared[Journal]):
    """A journal in a file.

    Raises:
        OSError: the file cannot be made or mapped.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, journal_bytes(), Journal)
        self.journal = self._layout
