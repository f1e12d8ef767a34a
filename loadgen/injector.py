"""Faults of a bus' workers, and how long until the bus is over them. Signals go through `processes`.

The one injector of `loadgen --fault` and `benchmarks.chaos`. It knows workers by what the bus says of them, so it can harm
a bus on this host only.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, Final

import shardbus
from loadgen.processes import Fault, inject
from loadgen.spec import LoadError

_POLL_S: Final = 0.005
_ASK_S: Final = 2.0
RECOVERED_S_MAX: Final = 30.0  # a shard that has handled nothing for longer has not recovered


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for so long, or until the event is set; whether it is."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


class Injector:
    """Does things to the workers of a bus, through a client that asks it about them."""

    def __init__(self, client: shardbus.Client) -> None:
        self._client = client

    async def worker(self, shard: int) -> dict[str, Any]:
        """The worker of a shard, as `status` has it, once it is up.

        Raises:
            LoadError: the supervisor has given the shard up.
        """
        while True:
            try:
                worker: dict[str, Any] = (await self._client.status(timeout=_ASK_S))["workers"][shard]
            except shardbus.BusUnreachable:
                continue
            if worker["state"] == "up":
                return worker
            if worker["state"] == "given-up":
                raise LoadError(f"shard {shard} was given up ({worker['last_exit']})")
            await asyncio.sleep(2 * _POLL_S)

    async def kill(self, shard: int) -> float | None:
        """SIGKILL; returns the seconds until the successor has handled something, None where it has not."""
        return await self._end(shard, Fault.KILL)

    async def terminate(self, shard: int) -> float | None:
        """SIGTERM: the worker drains and ends; else as `kill`."""
        return await self._end(shard, Fault.TERMINATE)

    async def stop(self, shard: int, seconds: float, over: asyncio.Event | None = None) -> float:
        """SIGSTOP, and SIGCONT after so many seconds, or when all is `over`; returns how many it really were."""
        pid = (await self._harm(shard, Fault.STOP))["pid"]
        began_ns = time.monotonic_ns()
        try:
            await is_set_within(over or asyncio.Event(), seconds)
        finally:
            inject(pid, Fault.CONTINUE)
        return (time.monotonic_ns() - began_ns) / 1e9

    async def _end(self, shard: int, fault: Fault) -> float | None:
        before = await self._harm(shard, fault)
        try:
            async with asyncio.timeout(RECOVERED_S_MAX):
                return await self._recovery(before)
        except TimeoutError:
            return None

    async def _harm(self, shard: int, fault: Fault) -> dict[str, Any]:
        """Do it to the worker that a shard has now, and return that."""
        while True:
            worker = await self.worker(shard)
            if inject(worker["pid"], fault):
                return worker
            await asyncio.sleep(_POLL_S)  # it ended by itself just now

    async def _recovery(self, before: dict[str, Any]) -> float:
        began = time.monotonic()
        first: int | None = None
        while True:
            now = await self.worker(before["shard"])
            if now["pid"] != before["pid"]:
                if first is not None and now["handled"] > first:
                    return time.monotonic() - began
                first = now["handled"] if first is None else first
            await asyncio.sleep(_POLL_S)
