"""How a run is told while it goes, and its report, on a terminal or as plain lines. The only file that imports rich.

It shows what the collector found and looks at nothing itself, so the figures are the same with and without it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loadgen.histogram import Percentiles
from loadgen.report import FaultRecord, Interval, Report
from loadgen.spec import LoadSpec
from loadgen.tables import rows_of

_PLAIN_EVERY: Final = 5  # intervals that go to a file or a pipe: one of so many
_SHARDS_MAX: Final = 16  # backlogs that are shown one by one
_STYLES: Final = {"ok": "green", "failed": "red", "generator-bound": "yellow", "saturated": "yellow"}
_ROW_STYLES: Final = {"PASS": "green", "FAIL": "red"}


def _ms(percentiles: Percentiles | None) -> str:
    """Provisional figures, so marked: the verdict at the end may be that they are somebody else's."""
    if percentiles is None:
        return "–"
    three = (percentiles.p50, percentiles.p99, percentiles.p99_9)
    return "~ " + " / ".join(f"{value / 1000:,.2f}" for value in three) + " ms"


def cells_of(interval: Interval) -> dict[str, str]:
    """An interval for people: caption → figure."""
    offered = f" of {interval.offered_rate:,.0f}" if interval.offered_rate else ""  # none is when the load has ended
    backlog = " ".join(f"{count:,}" for count in interval.backlog[:_SHARDS_MAX])
    more = len(interval.backlog) - _SHARDS_MAX
    counts = interval.counts
    cells = {
        "rate": f"{interval.achieved_rate:,.0f}{offered} events/s",
        "p50/p99/p99.9": "warming up" if interval.warming_up else _ms(interval.latency_us),
        "handled": f"{counts.handled:,}",
        "in flight": f"{counts.in_flight:,}",
        "backlog": (backlog or "–") + (f" and {more} more shards" if more > 0 else ""),
    }
    if counts.dead:
        cells["dead"] = f"{counts.dead:,}"
    if interval.waiting:
        cells["waiting"] = f"{interval.waiting:,}"
    return cells


def line_of(interval: Interval) -> str:
    """An interval as one line."""
    return f"{interval.at_s:7.1f} s  " + "  ".join(f"{caption} {text}" for caption, text in cells_of(interval).items())


class _Console(Console):
    """One that raises where its reader has left: others end the program then, with 1, and take standard output along."""

    def on_broken_pipe(self) -> None:
        """See `Console.on_broken_pipe`."""
        raise BrokenPipeError


class View:
    """Tells on stderr how a run goes: a table that stays in place on a terminal, lines now and then elsewhere.

    See `runner.Watcher`. Close it before anything else is written there.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._planned_s = 0.0
        self._planned: int | None = None
        self._intervals = 0
        self._faults: list[str] = []

    def say(self, text: str) -> None:
        """See `Watcher.say`."""
        self._print(text)

    def begin(self, spec: LoadSpec, planned: int | None) -> None:
        """See `Watcher.begin`."""
        self._planned_s = 0.0 if spec.duration_s is None and not spec.stages else spec.planned_s
        self._planned = planned
        if self._console.is_terminal:
            live = Live(console=self._console, auto_refresh=False, transient=True)
            with self._heard():
                live.start()
                self._live = live

    def progress(self, interval: Interval) -> None:
        """See `Watcher.progress`."""
        self._intervals += 1
        if self._live is not None:
            with self._heard():
                self._live.update(self._table(interval), refresh=True)
        elif not self._console.is_terminal and self._intervals % _PLAIN_EVERY == 0:
            self._print(line_of(interval))

    def fault(self, record: FaultRecord) -> None:
        """See `Watcher.fault`."""
        after = "" if record.recovery_s is None else f": handled again after {record.recovery_s:.3f} s"
        text = f"{record.fault}, shard {record.shard}{after}"
        self._faults.append(text)
        self._print(text)

    def close(self) -> None:
        """End the live table."""
        if self._live is not None:
            live, self._live = self._live, None
            self._console.quiet = False  # if only to show the cursor again
            with self._heard():
                live.stop()

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        """What is shown in the block. Where nobody reads it any more, or a disk is full, a run does not end for that, and
        the table is shown no more: rich would keep what it cannot write."""
        try:
            yield
        except OSError:
            self._console.quiet = True

    def _table(self, interval: Interval) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row(f"{interval.at_s:.0f} s", self._bar(interval))
        for caption, text in cells_of(interval).items():
            table.add_row(caption, text)
        return table

    def _bar(self, interval: Interval) -> ProgressBar | Text:
        if self._planned:
            return ProgressBar(total=self._planned, completed=interval.counts.published, width=40)
        if self._planned_s:
            return ProgressBar(total=self._planned_s, completed=min(interval.at_s, self._planned_s), width=40)
        return Text("until it ends")

    def _print(self, text: str) -> None:
        with self._heard():
            if self._console.is_terminal:
                self._console.print(text, markup=False, soft_wrap=True)
            else:
                # Lines for files and pipes are not wrapped at a width that they do not have.
                print(text, file=sys.stderr, flush=True)


def show(report: Report) -> None:
    """Write a report to stdout: a table on a terminal, lines elsewhere. Raises `BrokenPipeError` where nobody reads it."""
    console = _Console(highlight=False)
    rows = rows_of(report)
    if not console.is_terminal:
        for caption, value in rows:
            print(f"{caption:<14}{value}")
        return
    table = Table.grid(padding=(0, 2))
    for caption, value in rows:
        style = _STYLES[report.verdict] if caption == "verdict" else _ROW_STYLES.get(caption)
        table.add_row(caption, Text(value), style=style)
    console.print(table)
