"""Processor time and memory of processes. The only file that imports psutil."""

from __future__ import annotations

import msgspec
import psutil


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a process has used: seconds of processor time since it began, bytes of memory now."""

    cpu_s: float
    rss_bytes: int


class Watched:
    """Processes by pid, each looked at again and again."""

    def __init__(self) -> None:
        self._known: dict[int, psutil.Process] = {}

    def look(self, pid: int) -> Usage | None:
        """What a process has used so far; None where it is gone, or not ours to look at."""
        try:
            process = self._known.get(pid) or self._known.setdefault(pid, psutil.Process(pid))
            with process.oneshot():
                times, memory = process.cpu_times(), process.memory_info()
        except psutil.Error:
            return None
        return Usage(cpu_s=times.user + times.system, rss_bytes=memory.rss)
