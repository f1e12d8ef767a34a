"""The shared mappings behind a shard's book and its journal. The only file that maps memory.

The supervisor makes the files; worker and supervisor map them. They lie on RAM where there is such a place, and outlive
their worker. Their room is taken when they are made: a page that the place has no room for would end whoever touches it
(SIGBUS).
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from shardbus.journal import Journal, journal_bytes
from shardbus.metrics import Book, book_bytes

KEYS: Final = 65_536
PUBLISHERS: Final = 16
EVIDENCE_BYTES: Final = book_bytes(keys=KEYS, publishers=PUBLISHERS) + journal_bytes()


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


class SharedBook:
    """A book in a file. Close it when done; the file stays.

    Raises:
        OSError: the file cannot be made or mapped.
    """

    def __init__(self, path: str, *, keys: int = KEYS, publishers: int = PUBLISHERS) -> None:
        self._map = _map_file(path, book_bytes(keys=keys, publishers=publishers))
        self._view = memoryview(self._map)
        self.book = Book(self._view, keys=keys, publishers=publishers)

    def close(self) -> None:
        """Unmap it."""
        self.book.release()
        self._view.release()
        self._map.close()


class SharedJournal:
    """A journal in a file. Close it when done; the file stays.

    Raises:
        OSError: the file cannot be made or mapped.
    """

    def __init__(self, path: str) -> None:
        self._map = _map_file(path, journal_bytes())
        self._view = memoryview(self._map)
        self.journal = Journal(self._view)

    def close(self) -> None:
        """Unmap it."""
        self.journal.release()
        self._view.release()
        self._map.close()
