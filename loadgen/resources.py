"""Processor time and memory of processes, and of the machine as a whole. The only file that imports psutil."""

from __future__ import annotations

import msgspec
import psutil

from loadgen.machine import MachineLoad


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a process has used: seconds of processor time since it began, bytes of memory now: 0 once it has ended."""

    cpu_s: float
    rss_bytes: int


class MachineMeter:
    """How busy the machine is from now on."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    def load(self) -> MachineLoad:
        """What it was since the meter was made."""
        before, after = self._before._asdict(), psutil.cpu_times()._asdict()
        # Linux counts a guest's time as the user's, too.
        spent_s = {name: after[name] - before[name] for name in after if not name.startswith("guest")}
        total_s = sum(spent_s.values()) or 1.0
        idle_s = spent_s["idle"] + spent_s.get("iowait", 0.0)
        return MachineLoad(
            busy=1.0 - idle_s / total_s,
            stolen=spent_s.get("steal", 0.0) / total_s,
            load_average=psutil.getloadavg()[0],
        )


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
