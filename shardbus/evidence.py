"""The shared mapping behind a shard's book. The only file that maps memory.

The supervisor makes the file; worker and supervisor map it. It lies on RAM where there is such a place, and outlives its
worker. Its room is taken when it is made: a page that the place has no room for would end whoever touches it (SIGBUS).
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from shardbus.metrics import Book, book_bytes

KEYS: Final = 65_536
PUBLISHERS: Final = 16
EVIDENCE_BYTES: Final = book_bytes(keys=KEYS, publishers=PUBLISHERS)


def _take_room(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


class SharedBook:
    """A book in a file. Close it when done; the file stays.

    Raises:
        OSError: the file cannot be made or mapped.
    """

    def __init__(self, path: str, *, keys: int = KEYS, publishers: int = PUBLISHERS) -> None:
        size = book_bytes(keys=keys, publishers=publishers)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size != size:
                os.ftruncate(descriptor, 0)
                _take_room(descriptor, size)
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._view = memoryview(self._map)
        self.book = Book(self._view, keys=keys, publishers=publishers)

    def close(self) -> None:
        """Unmap it."""
        self.book.release()
        self._view.release()
        self._map.close()
