"""A worker process, as far as it can be without one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import pytest

import shardbus.worker
from shardbus.outgoing import Outgoing
from shardbus.quarantine import UNKNOWN_END
from shardbus.reports import Alive, Assignment, Boot, Report, decode_report, encode_assignment

SLOW = """
import asyncio
from shardbus import Bus

bus = Bus("slow")
begun = asyncio.Event()

@bus.lifespan
async def load(worker):
    begun.set()
    await asyncio.Event().wait()
    yield
"""

ASSIGNMENT = Assignment(
    shard=0,
    shards=1,
    epoch=b"e" * 24,
    layout=1,
    address="",
    bus="",
    control="",
    evidence_path="",
    journal_path="",
    predecessor=UNKNOWN_END,
    store_url="",
    store_rows_max=1,
    store_bytes_max=1,
    store_full="stop",
    waits_for_store=False,
    drain_s=1.0,
)


def no_outgoing(*_: object) -> Outgoing:
    raise AssertionError("the lifespan has ended")


async def test_a_worker_beats_while_it_waits_for_its_shard_and_while_its_lifespan_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "slow_lifespan.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(shardbus.worker, "configure_logging", lambda *_: None)
    monkeypatch.setattr(shardbus.worker, "BEAT_S", 0.001)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    boot = Boot(application="slow_lifespan:bus", log_level="warning", log_format="text", parent=os.getppid())
    with contextlib.closing(ours):
        worker = asyncio.create_task(shardbus.worker.run_worker(boot, theirs.detach(), no_outgoing))
        reader, writer = await asyncio.open_connection(sock=ours)

        async def heard() -> Report:
            size = int.from_bytes(await reader.readexactly(4), "big")
            return decode_report(await reader.readexactly(size))

        async with asyncio.timeout(20.0):
            assert await heard() == Alive()
            message = encode_assignment(ASSIGNMENT)
            writer.write(len(message).to_bytes(4, "big") + message)
            import slow_lifespan  # type: ignore[import-not-found]  # written above, loaded by the worker

            await slow_lifespan.begun.wait()
            for _ in range(100):  # more than were on their way
                assert await heard() == Alive()
        worker.cancel()
        await worker
        writer.close()
