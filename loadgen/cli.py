"""The `loadgen` command. The only file of the package that imports click; what people see while it runs is `view`'s."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

import click
import msgspec

import shardbus
from loadgen import expect, notation
from loadgen.expect import Expectation
from loadgen.histogram import Histogram
from loadgen.pacer import Stage
from loadgen.processes import end_as_on_interrupt
from loadgen.report import EXIT_USAGE, Report
from loadgen.runner import run
from loadgen.spec import (
    DRIVERS_MAX,
    SECONDS_MAX,
    WORKERS_MAX,
    Call,
    FaultSpec,
    LoadError,
    LoadSpec,
    Payload,
    Recording,
    Skew,
    Template,
)
from loadgen.tables import csv_of
from loadgen.view import View, show
from shardbus.command_line import Interruptible, run_and_exit, warn
from shardbus.standard_streams import written

_WARMUP_S: Final = 2.0
_DURATION_S: Final = 10.0


def _reads(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A parser of `notation` as click takes it: its error names the option."""

    def read(text: Any) -> Any:
        try:
            return parse(str(text))
        except LoadError as error:
            raise click.BadParameter(str(error)) from None

    read.__name__ = parse.__name__
    return read


def _body(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        example = '{"amount": 9.5, "number": "{n}"}'
        raise LoadError(f"{text!r} is no JSON object: {error}; for instance '{example}'") from None


def _fail(message: str, code: int) -> NoReturn:
    _warn(message)
    sys.exit(code)


def _check_target(option: str, path: str | None) -> None:
    """A report that cannot be written is a mistake to be told before the run, not after."""
    if path is None or path == "-":
        return
    if os.path.isdir(path):
        raise click.BadParameter(f"{path!r} is a directory; name a file in it", param_hint=option)
    directory = os.path.dirname(path) or "."
    if not os.path.isdir(directory) or not os.access(path if os.path.exists(path) else directory, os.W_OK):
        raise click.BadParameter(f"{path!r} cannot be written", param_hint=option)


def _tell(write: Callable[[], None]) -> list[str]:
    """Write to standard output; returns what is wrong, in words."""
    error = written(write, sys.stdout)
    return [] if error is None else [_unwritten("standard output", error)]


def _warn(message: str) -> None:
    warn(f"loadgen: {message}")


def _write(text: str, path: str) -> list[str]:
    """Write a file, or to standard output; returns what is wrong, in words."""
    if path == "-":
        return _tell(lambda: print(text, end=""))
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:  # it could be written before the run; a disk that is full meanwhile, for instance
        return [_unwritten(path, error)]
    return []


def _unwritten(what: str, error: OSError) -> str:
    return f"{what} cannot be written: {error.strerror or error}"


def _json(report: Report) -> str:
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"


def _run(spec: LoadSpec, expectations: tuple[Expectation, ...], histogram: Histogram) -> Report:
    """Run to the end; what went wrong is one line for people."""
    view = View()
    try:
        return run(spec, view, expectations=expectations, histogram=histogram, report_on_interrupt=True)
    except (LoadError, shardbus.ShardbusError) as error:
        view.close()
        _fail(str(error), EXIT_USAGE)
    finally:
        view.close()


class _Command(Interruptible):
    interrupted = "loadgen: interrupted; what this run had started was ended"


@click.command(cls=_Command, context_settings={"auto_envvar_prefix": "LOADGEN", "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardbus")
# -- how much, when
@click.option(
    "--rate",
    metavar="N|max",
    type=_reads(notation.rate_or_max),
    help="Events per second, or max: as many as the bus takes.",
)
@click.option(
    "--stages",
    metavar="LIST",
    type=_reads(notation.stages),
    default=None,
    help="Rates and how long each, instead of --rate: 5k:10s,20k:30s; a ramp: 1k-50k:20s.",
)
@click.option(
    "--arrivals",
    type=click.Choice(["even", "poisson"]),
    default="even",
    show_default=True,
    help="At equal intervals, or at random as independent users come.",
)
@click.option(
    "--duration",
    metavar="S",
    type=_reads(notation.seconds),
    help="Time that is measured. [default: 10; a recording: to its end]",
)
@click.option(
    "--warmup", metavar="S", type=_reads(notation.seconds), help="Time before, not measured. [default: 2; a recording: 0]"
)
# -- what
@click.option(
    "--keys",
    metavar="N|unique",
    type=_reads(notation.keys),
    default="1000",
    show_default=True,
    help="Unique: a new key every event.",
)
@click.option(
    "--skew",
    metavar="SKEW",
    type=_reads(notation.skew),
    default="uniform",
    show_default=True,
    help="How events are spread over keys: uniform, zipf:EXPONENT, hot:SHARE (of one key).",
)
@click.option(
    "--payload",
    metavar="BYTES",
    type=_reads(notation.payload),
    default="0",
    show_default=True,
    help="What each event carries besides its key: BYTES, LOW-HIGH, lognormal:MEDIAN:SIGMA.",
)
@click.option("--type", "type_", metavar="NAME", help="Messages of your own application, by their name on the wire.")
@click.option("--key", metavar="FIELD", help="The field of --type that holds the key.")
@click.option(
    "--body",
    metavar="JSON",
    type=_reads(_body),
    help='The other fields of --type, an object; "{key}", "{n}" and "{payload}" in it are filled in.',
)
@click.option(
    "--key-type", type=click.Choice(["str", "int"]), default="str", show_default=True, help="What the keys of --type are."
)
@click.option("--commands", is_flag=True, help="Execute commands instead of publishing events.")
@click.option(
    "--replay", metavar="FILE", help="Publish the events of a file as --type by --key: a JSON object a line, perhaps gzip."
)
@click.option(
    "--speed",
    metavar="X",
    type=click.FLOAT,
    help="Replay at the events' own times, so many times as fast, instead of --rate.",
)
@click.option("--time", "time_", metavar="FIELD", default="time", show_default=True, help="The field with an event's time.")
@click.option(
    "--gap", metavar="S", type=_reads(notation.seconds), help="With --speed: cut every pause between two events to this."
)
@click.option(
    "--call",
    type=click.Choice(["publish_many", "publish"]),
    default="publish_many",
    show_default=True,
    help="The client's call that sends.",
)
@click.option(
    "--drivers",
    metavar="N",
    type=click.IntRange(1, DRIVERS_MAX),
    default=1,
    show_default=True,
    help="Processes that send, each a publisher of its own.",
)
@click.option("--seed", metavar="N", type=int, default=1, show_default=True, help="The same seed makes the same events.")
# -- whom
@click.option(
    "--connect",
    metavar="URL",
    help="A running bus: ipc://DIRECTORY or tcp://HOST:PORT. Default: $SHARDBUS_URL or this user's; if none runs there, the "
    "demo is served for the run, at an address of its own.",
)
@click.option(
    "--app",
    "application",
    metavar="MODULE:BUS",
    help="Serve this application for the run, at an address of its own, instead of driving a bus that runs.",
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
    "--fault",
    "faults",
    metavar="FAULT",
    multiple=True,
    type=_reads(notation.fault),
    help="kill:worker@5s, term:worker@5s or stop:worker:1s@10s; worker2 is that of shard 2. May be repeated.",
)
# -- how long to wait, what to expect, where to write
@click.option(
    "--flush",
    metavar="S",
    type=_reads(notation.seconds),
    default="30",
    show_default=True,
    help="Time to wait for the rest; of commands, --timeout is.",
)
@click.option(
    "--timeout",
    metavar="S",
    type=_reads(notation.seconds),
    default="5",
    show_default=True,
    help="Time for a command's reply.",
)
@click.option(
    "--expect",
    "expectations",
    metavar="EXPR",
    multiple=True,
    type=_reads(expect.parse),
    help="What the run must reach, for instance 'p99<10ms', 'service_p99<2ms' or 'achieved_rate>=19k'. May be repeated. "
    f"Of {', '.join(expect.FIGURES)}.",
)
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    envvar="LOADGEN_JSON",
    help="Write the report; - is stdout, without table.",
)
@click.option("--csv", "csv_path", metavar="FILE", envvar="LOADGEN_CSV", help="Write the time series, a line a second.")
@click.option(
    "--hgrm",
    "hgrm_path",
    metavar="FILE",
    envvar="LOADGEN_HGRM",
    help="Write the response times for the HdrHistogram plotter.",
)
def cli(
    rate: float | None,
    stages: tuple[Stage, ...] | None,
    arrivals: Any,
    duration: float | None,
    warmup: float | None,
    keys: int | None,
    skew: Skew,
    payload: Payload,
    type_: str | None,
    key: str | None,
    body: dict[str, Any] | None,
    key_type: Any,
    commands: bool,
    replay: str | None,
    speed: float | None,
    time_: str,
    gap: float | None,
    call: Call,
    drivers: int,
    seed: int,
    connect: str | None,
    application: str | None,
    workers: int,
    faults: tuple[FaultSpec, ...],
    flush: float,
    timeout: float,
    expectations: tuple[Expectation, ...],
    json_path: str | None,
    csv_path: str | None,
    hgrm_path: str | None,
) -> None:
    """Drive a bus with events on a schedule that never slips, and report what became of them.

    The response time of an event, from the instant at which it should have gone, is told as a whole and in its two parts:
    queue time until its handler begins, send lag included, and service time from there to the handler's end.

    Without --type it sends events of the built-in demo application. Every option is also read from LOADGEN_…, for instance
    LOADGEN_RATE. Exit code 0: ok; 1: events were lost, overtaken, repeated unannounced, or not finished by a bus that had
    kept up; or none was handled; or an --expect was not met; 2: the run could not be made or judged, or its report not be
    written; 3: this machine could not offer the rate; 4: the bus did not keep up; 130: interrupted. Ctrl-C from the first
    measured second on ends the load, and the report is of what was done until then; once more, and there is none.
    """
    targets: set[str] = set()
    for option, path in (("--json", json_path), ("--csv", csv_path), ("--hgrm", hgrm_path)):
        _check_target(option, path)
        if path is not None:
            if (target := os.path.realpath(path)) in targets:
                raise click.BadParameter(f"{path!r} is another report's, too; name a file for each", param_hint=option)
            targets.add(target)
    _check_name("--type", type_)
    _check_name("--key", key)
    if rate is None and stages is None and speed is None and not _was_given("rate"):
        raise click.UsageError("say how much: --rate N, --rate max, --stages, or --replay with --speed")
    end_as_on_interrupt()
    try:
        spec = LoadSpec(
            rate=rate,
            stages=stages or (),
            arrivals=arrivals,
            duration_s=duration if duration is not None else None if replay else _DURATION_S,
            warmup_s=warmup if warmup is not None else 0.0 if replay else _WARMUP_S,
            keys=keys,
            skew=skew,
            payload=payload,
            call=call,
            commands=commands,
            template=_template(type_, key, body, key_type) if not replay else None,
            recording=_recording(replay, type_, key, time_, speed, gap),
            faults=faults,
            drivers=drivers,
            seed=seed,
            address=connect,
            application=application,
            workers=workers,
            flush_s=flush,
            timeout_s=timeout,
        )
        for expectation in expectations:
            expect.check_measurable(expectation, spec)
    except LoadError as error:
        _fail(str(error), EXIT_USAGE)
    histogram = Histogram()
    report = _run(spec, expectations, histogram)
    wrong = []
    if "-" not in (json_path, csv_path, hgrm_path):
        wrong += _tell(lambda: show(report))
    if json_path is not None:
        wrong += _write(_json(report), json_path)
    if csv_path is not None:
        wrong += _write(csv_of(report.intervals), csv_path)
    if hgrm_path is not None and histogram.total:
        wrong += _write(histogram.hgrm(), hgrm_path)
    elif hgrm_path is not None:
        _warn(f"{hgrm_path} was not written: the run quotes no latency")
    if wrong:
        _fail(f"the run was made, but {'; '.join(wrong)}", EXIT_USAGE)
    sys.exit(report.exit_code)


def _was_given(option: str) -> bool:
    """Whether an option was given; `max` is None, too."""
    return click.get_current_context().get_parameter_source(option) is not click.core.ParameterSource.DEFAULT


def _check_name(option: str, value: str | None) -> None:
    if value == "":
        raise click.BadParameter("'' is no name", param_hint=option)


def _template(type_: str | None, key: str | None, body: dict[str, Any] | None, key_type: Any) -> Template | None:
    if type_ is None:
        if key is not None or body is not None:
            raise click.UsageError("--key and --body are of --type, which is missing")
        return None
    if key is None:
        raise click.UsageError("--type needs --key: the field that says which messages belong together")
    return Template(type=type_, key=key, body=body or {}, key_type=key_type)


def _recording(
    replay: str | None, type_: str | None, key: str | None, time_: str, speed: float | None, gap: float | None
) -> Recording | None:
    if replay is None:
        if speed is not None or gap is not None:
            raise click.UsageError("--speed and --gap are of --replay, which is missing")
        return None
    if type_ is None or key is None:
        raise click.UsageError("--replay needs --type and --key: the events' name on the wire, and the field with their key")
    gap_s = SECONDS_MAX if gap is None else gap
    return Recording(path=os.path.abspath(replay), type=type_, key=key, time=time_, speed=speed, gap_s=gap_s)


def main() -> None:
    """Entry of the `loadgen` command."""
    run_and_exit(cli, "loadgen", unwritten=EXIT_USAGE)
