"""The `loadgen` command. The only file of the package that imports click or rich, and that writes to a terminal."""

from __future__ import annotations

import os
import sys
from typing import Any, Final, NoReturn

import click
import msgspec
from rich.console import Console
from rich.table import Table

import shardbus
from loadgen.processes import end_as_on_interrupt
from loadgen.report import EXIT_USAGE, BusState, Report, rows_of
from loadgen.runner import run
from loadgen.spec import KEYS_MAX, PAYLOAD_BYTES_MAX, WORKERS_MAX, Call, LoadError, LoadSpec, Progress

_PLAIN_EVERY: Final = 5  # progress lines that go to a file or a pipe: one of so many
_STYLES: Final = {"ok": "green", "failed": "red", "generator-bound": "yellow", "saturated": "yellow"}
_SUFFIXES: Final = {"k": 1e3, "m": 1e6}


class _Rate(click.ParamType[float | None]):
    """Events per second: `20000`, `20k`, `1.5M`; `max` is None."""

    name = "N|max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        text = str(value).strip().lower().replace(",", "").replace("_", "")
        if text == "max":
            return None
        factor = _SUFFIXES.get(text[-1:], 1.0)
        try:
            return float(text[:-1] if text[-1:] in _SUFFIXES else text) * factor
        except ValueError:
            self.fail(f"{value!r} is no rate; give events per second, for instance 20000 or 20k, or max", param, ctx)


class _Keys(click.ParamType[int | None]):
    """How many keys; `unique` is None."""

    name = "N|unique"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if str(value).strip().lower() == "unique":
            return None
        try:
            return int(str(value).replace(",", "").replace("_", ""))
        except ValueError:
            self.fail(f"{value!r} is no number of keys; give one up to {KEYS_MAX:,}, or unique", param, ctx)


class _Live:
    """Tells on stderr how a run goes: one line that is overwritten on a terminal, plain lines now and then elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._rewrites = self._console.is_terminal
        self._lines = 0
        self._handled = 0
        self._at_s = 0.0
        self._open = False

    def say(self, text: str) -> None:
        """A line of its own."""
        self.close()
        click.echo(text, err=True)

    def progress(self, progress: Progress, bus: BusState) -> None:
        """See `runner.Watcher.progress`. The rate is since the line before."""
        self._lines += 1
        if not self._rewrites and self._lines % _PLAIN_EVERY:
            return
        counts = progress.counts
        rate = (counts.finished - self._handled) / max(progress.at_s - self._at_s, 1e-9)
        self._handled, self._at_s = counts.finished, progress.at_s
        text = (
            f"{progress.at_s:6.1f} s  {rate:>11,.0f} events/s  handled {counts.finished:,}  in flight {counts.in_flight:,}"
            f"  backlog {bus.backlog:,}{'  warming up' if progress.warming_up else ''}"
        )
        if self._rewrites:
            click.echo(f"\r\x1b[2K{text[: self._console.width - 1]}", err=True, nl=False)
            self._open = True
        else:
            click.echo(text, err=True)

    def close(self) -> None:
        """End the live line, so that what follows stands below it."""
        if self._open:
            click.echo(err=True)
            self._open = False


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"loadgen: {message}", err=True)
    sys.exit(code)


def _show(report: Report) -> None:
    rows = rows_of(report)
    console = Console(highlight=False)
    if not console.is_terminal:
        for caption, value in rows:
            click.echo(f"{caption:<14}{value}")
        return
    table = Table.grid(padding=(0, 2))
    for caption, value in rows:
        table.add_row(caption, value, style=_STYLES[report.verdict] if caption == "verdict" else None)
    console.print(table)


def _check_target(path: str | None) -> None:
    """A report that cannot be written is a mistake to be told before the run, not after."""
    if path is None or path == "-":
        return
    directory = os.path.dirname(path) or "."
    if not os.path.isdir(directory) or not os.access(path if os.path.exists(path) else directory, os.W_OK):
        raise click.BadParameter(f"{path!r} cannot be written", param_hint="--json")


def _write(report: Report, path: str) -> None:
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    if path == "-":
        click.echo(text)
        return
    with open(path, "wb") as file:
        file.write(text + b"\n")


def _run(spec: LoadSpec) -> Report:
    """Run to the end; what went wrong is one line for people."""
    live = _Live()
    try:
        return run(spec, live)
    except KeyboardInterrupt:
        live.close()
        _fail("interrupted; what this run had started was ended", 130)
    except (LoadError, shardbus.ShardbusError) as error:
        live.close()
        _fail(str(error), EXIT_USAGE)
    finally:
        live.close()


@click.command(context_settings={"auto_envvar_prefix": "LOADGEN", "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardbus")
@click.option(
    "--rate", metavar="N|max", type=_Rate(), required=True, help="Events per second, or max: as many as the bus takes."
)
@click.option(
    "--connect",
    metavar="URL",
    envvar=["LOADGEN_CONNECT", "SHARDBUS_URL"],
    help="A running bus: ipc://DIRECTORY or tcp://HOST:PORT. [env: SHARDBUS_URL] Default: this user's, which is started for "
    "the run if none runs.",
)
@click.option("--duration", metavar="S", type=float, default=10.0, show_default=True, help="Seconds that are measured.")
@click.option("--warmup", metavar="S", type=float, default=2.0, show_default=True, help="Seconds before, not measured.")
@click.option(
    "--keys", metavar="N|unique", type=_Keys(), default="1000", show_default=True, help="Unique: a new key every event."
)
@click.option(
    "--payload",
    metavar="BYTES",
    type=click.IntRange(0, PAYLOAD_BYTES_MAX),
    default=0,
    show_default=True,
    help="What each event carries besides its key.",
)
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(1, WORKERS_MAX),
    default=1,
    show_default=True,
    help="Of a bus that is started for the run; one that runs has its own.",
)
@click.option(
    "--call",
    type=click.Choice(["publish_many", "publish"]),
    default="publish_many",
    help="The client's call that sends.",
)
@click.option(
    "--seed", metavar="N", type=int, default=1, show_default=True, help="The same seed makes the same events."
)
@click.option("--flush", metavar="S", type=float, default=30.0, show_default=True, help="Seconds to wait for the rest.")
@click.option(
    "--json", "path", metavar="FILE", envvar="LOADGEN_JSON", help="Write the report; - is stdout, without table."
)
def cli(
    rate: float | None,
    connect: str | None,
    duration: float,
    warmup: float,
    keys: int | None,
    payload: int,
    workers: int,
    call: Call,
    seed: int,
    flush: float,
    path: str | None,
) -> None:
    """Drive a bus with events on a schedule that never slips, and report what became of them.

    Every option is also read from LOADGEN_…, for instance LOADGEN_RATE. Exit code 0: ok; 1: events were lost, overtaken,
    repeated unannounced or not finished; 2: the run could not be made; 3: this machine could not offer the rate;
    4: the bus did not keep up.
    """
    _check_target(path)
    end_as_on_interrupt()
    try:
        spec = LoadSpec(
            rate=rate,
            duration_s=duration,
            warmup_s=warmup,
            keys=keys,
            payload_bytes=payload,
            call=call,
            seed=seed,
            address=connect,
            workers=workers,
            flush_s=flush,
        )
    except LoadError as error:
        _fail(str(error), EXIT_USAGE)
    report = _run(spec)
    if path is not None:
        _write(report, path)
    if path != "-":
        _show(report)
    sys.exit(report.exit_code)


def main() -> None:
    """Entry of the `loadgen` command."""
    cli()
