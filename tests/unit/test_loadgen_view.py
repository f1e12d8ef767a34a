"""What is seen while a run goes: a table on a terminal, plain lines elsewhere, the same figures in both."""

from __future__ import annotations

import errno
import io
import re

import msgspec
import pytest
from rich.console import Console

from loadgen.histogram import Percentiles
from loadgen.report import FaultRecord, Interval
from loadgen.spec import Counts, LoadSpec
from loadgen.view import View, cells_of

INTERVAL = Interval(
    at_s=3.0,
    warming_up=False,
    offered_rate=20_000.0,
    achieved_rate=19_998.0,
    counts=Counts(published=60_010, handled=60_000, dead=0, waiting=0, dropped=0, in_flight=10),
    latency_us=Percentiles(p50=140, p90=300, p99=410, p99_9=900, max=1200),
    send_lag_p99_us=120,
    backlog=(3, 0, 14),
    waiting=0,
    processes=(),
)


def view(*, terminal: bool) -> tuple[View, io.StringIO]:
    out = io.StringIO()
    return View(Console(file=out, force_terminal=terminal, width=100, highlight=False)), out


def told(capsys: pytest.CaptureFixture[str], out: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()) + capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_and_a_pipe_show_the_same_figures(capsys: pytest.CaptureFixture[str], terminal: bool) -> None:
    made, out = view(terminal=terminal)
    made.begin(LoadSpec(rate=20_000.0), None)
    for _ in range(5):
        made.progress(INTERVAL)
    made.close()
    text = told(capsys, out)
    for caption, figure in cells_of(INTERVAL).items():
        assert caption in text
        assert figure in text


def test_plain_lines_come_now_and_then_only(capsys: pytest.CaptureFixture[str]) -> None:
    made, out = view(terminal=False)
    made.begin(LoadSpec(rate=20_000.0), None)
    for _ in range(20):
        made.progress(INTERVAL)
    assert len(told(capsys, out).splitlines()) == 4


def test_the_figures_are_rate_percentiles_and_the_backlog_of_each_shard() -> None:
    cells = cells_of(INTERVAL)
    assert cells["rate"] == "19,998 of 20,000 events/s"
    assert cells["p50/p99/p99.9"] == "~ 0.14 / 0.41 / 0.90 ms"
    assert cells["backlog"] == "3 0 14"
    assert "dead" not in cells


class Failing(io.StringIO):
    """Takes nothing while it is full."""

    full = False
    asked = 0

    def write(self, text: str) -> int:
        self.asked += 1
        if self.full:
            raise OSError(errno.ENOSPC, "full")
        return super().write(text)


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_table_that_cannot_be_shown_is_dropped_and_the_cursor_is_shown_again(from_the_start: bool) -> None:
    out = Failing()
    made = View(Console(file=out, force_terminal=True, width=100, highlight=False))
    out.full = from_the_start
    made.begin(LoadSpec(rate=20_000.0), None)
    made.progress(INTERVAL)
    out.full = True
    made.progress(INTERVAL)
    asked = out.asked
    for _ in range(10):
        made.progress(INTERVAL)
        made.say("something")
    assert out.asked == asked
    out.full = False
    made.close()
    assert ("\x1b[?25h" in out.getvalue()) is not from_the_start


def test_what_is_unusual_is_shown_too() -> None:
    counts = msgspec.structs.replace(INTERVAL.counts, dead=7)
    odd = msgspec.structs.replace(
        INTERVAL, counts=counts, waiting=5, latency_us=None, offered_rate=None, backlog=tuple(range(20))
    )
    cells = cells_of(odd)
    assert (cells["dead"], cells["waiting"], cells["p50/p99/p99.9"]) == ("7", "5", "–")
    assert cells["backlog"].endswith("15 and 4 more shards")


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_said_and_done_is_told_at_once(capsys: pytest.CaptureFixture[str], terminal: bool) -> None:
    made, out = view(terminal=terminal)
    made.say("no bus runs at [ipc:///run/bus]; starting one")
    made.begin(LoadSpec(rate=None), 100)
    made.fault(FaultRecord(fault="kill:worker@1s", shard=2, at_s=1.0, recovery_s=0.25))
    made.progress(INTERVAL)
    made.close()
    text = told(capsys, out)
    assert "no bus runs at [ipc:///run/bus]; starting one" in text
    assert "kill:worker@1s, shard 2: handled again after 0.250 s" in text
