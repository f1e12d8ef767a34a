"""The `loadgen` command: options, environment, exit codes. The run itself is replaced by one that returns at once."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
from click.testing import CliRunner, Result

import loadgen.cli
from loadgen.expect import Expectation
from loadgen.histogram import Histogram
from loadgen.machine import Machine
from loadgen.pacer import Stage
from loadgen.report import EXIT_CODES, Report, Verdict
from loadgen.runner import Watcher
from loadgen.spec import FaultSpec, LoadError, LoadSpec, Payload, Recording, Skew, Template
from shardbus import BusUnreachable

REPORT = Report(
    verdict="ok",
    reasons=(),
    notes=(),
    offered_rate=5.0,
    achieved_rate=5.0,
    published=60,
    handled=60,
    dead_lettered=0,
    lost=0,
    not_delivered=0,
    waiting=0,
    duplicates=0,
    redelivered=0,
    out_of_order=0,
    unchecked=0,
    latency_us=None,
    latency_samples=50,
    send_lag_us=None,
    publish_wait_s=0.0,
    flush_s=0.0,
    window_s=10.0,
    generator_cpu=0.1,
    generator_rss_bytes=50_000_000,
    load=LoadSpec(rate=5.0),
    address="ipc:///run/bus",
    workers=(),
    machine=Machine(cpu_count=2, cpu_model="a processor", system="Linux", python="3.11", versions={}),
)


class Command:
    """Runs the command; `spec` is what the run was asked for, `outcome` what it returns or raises."""

    def __init__(self) -> None:
        self.spec: LoadSpec | None = None
        self.expectations: tuple[str, ...] = ()
        self.outcome: Report | Exception = REPORT
        self.is_timed = True

    def run(
        self,
        spec: LoadSpec,
        watcher: Watcher,
        *,
        expectations: tuple[Expectation, ...],
        histogram: Histogram,
        report_on_interrupt: bool,
    ) -> Report:
        assert report_on_interrupt
        self.spec = spec
        self.expectations = tuple(expectation.text for expectation in expectations)
        if self.is_timed:
            histogram.add([(1500, 3)])
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def __call__(self, *arguments: str, **environment: str) -> Result:
        return CliRunner().invoke(loadgen.cli.cli, arguments, env=environment, catch_exceptions=False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    made = Command()
    monkeypatch.delenv("SHARDBUS_URL", raising=False)
    monkeypatch.setattr(loadgen.cli, "run", made.run)
    monkeypatch.setattr(loadgen.cli, "end_as_on_interrupt", lambda: None)
    return made


OPTIONS = [
    # option, what is typed, field, what it means
    ("rate", "20000", "rate", 20_000.0),
    ("rate", "20k", "rate", 20_000.0),
    ("rate", "1.5M", "rate", 1_500_000.0),
    ("rate", "20_000", "rate", 20_000.0),
    ("rate", "max", "rate", None),
    ("connect", "tcp://127.0.0.1:7400", "address", "tcp://127.0.0.1:7400"),
    ("arrivals", "poisson", "arrivals", "poisson"),
    ("duration", "0.5", "duration_s", 0.5),
    ("duration", "2m", "duration_s", 120.0),
    ("warmup", "0", "warmup_s", 0.0),
    ("keys", "7", "keys", 7),
    ("keys", "10k", "keys", 10_000),
    ("keys", "unique", "keys", None),
    ("skew", "zipf:1.1", "skew", Skew(kind="zipf", by=1.1)),
    ("payload", "100", "payload", Payload(low=100)),
    ("payload", "10-1kB", "payload", Payload(kind="uniform", low=10, high=1000)),
    ("workers", "8", "workers", 8),
    ("drivers", "3", "drivers", 3),
    ("call", "publish", "call", "publish"),
    ("seed", "9", "seed", 9),
    ("flush", "1", "flush_s", 1.0),
    ("timeout", "200ms", "timeout_s", 0.2),
    ("fault", "kill:worker@5s", "faults", (FaultSpec(kind="kill", at_s=5.0),)),
    ("app", "shop:bus", "application", "shop:bus"),
]


@pytest.mark.parametrize(("option", "text", "field", "value"), OPTIONS)
def test_every_option_is_also_read_from_the_environment(command, option: str, text: str, field: str, value: Any):
    other = () if option == "rate" else ("--rate", "5")
    assert command(*other, f"--{option}", text).exit_code == 0
    typed = command.spec
    variable = {"fault": "FAULTS", "app": "APPLICATION"}.get(option, option.upper())
    assert command(*other, **{f"LOADGEN_{variable}": text}).exit_code == 0
    assert typed == command.spec
    assert getattr(typed, field) == value


def test_shardbus_url_names_the_default_bus_which_is_started_where_none_runs(command):
    command("--rate", "5", SHARDBUS_URL="ipc:///run/a")
    assert command.spec.address is None
    command("--rate", "5", SHARDBUS_URL="ipc:///run/a", LOADGEN_CONNECT="ipc:///run/b")
    assert command.spec.address == "ipc:///run/b"


def test_stages_stand_in_place_of_the_rate(command):
    assert command("--stages", "5k:10s,1k-50k:20s").exit_code == 0
    assert command.spec.rate is None
    assert command.spec.stages == (Stage(5000.0, 10.0), Stage(1000.0, 20.0, 50_000.0))


def test_messages_of_the_users_own_are_named_by_type_and_key(command):
    body = '{"amount": 9.5, "n": "{n}"}'
    assert command("--rate", "5", "--type", "OrderPlaced", "--key", "order_id", "--body", body).exit_code == 0
    expected = Template(type="OrderPlaced", key="order_id", body={"amount": 9.5, "n": "{n}"})
    assert command.spec.template == expected


def test_a_recording_is_not_warmed_up_and_runs_to_its_end(command):
    assert command("--replay", "/data/a.jsonl", "--type", "Changed", "--key", "path", "--speed", "1000").exit_code == 0
    assert command.spec.recording == Recording(path="/data/a.jsonl", type="Changed", key="path", speed=1000.0)
    assert (command.spec.duration_s, command.spec.warmup_s, command.spec.rate) == (None, 0.0, None)


def test_expectations_are_handed_over_as_they_were_typed(command):
    assert command("--rate", "5", "--expect", "p99<10ms", "--expect", "lost==0").exit_code == 0
    assert command.expectations == ("p99<10ms", "lost==0")


MISTAKES = [
    ((), "--rate"),
    (("--rate", "5", "--stages", "5:1s"), "a rate or stages, not both"),
    (("--stages", "5k"), "'5k' is no stage"),
    (("--rate", "5", "--skew", "steep"), "'steep' is no skew"),
    (("--rate", "5", "--payload", "big"), "'big' is no size"),
    (("--rate", "5", "--fault", "kill:supervisor@1s"), "is no fault"),
    (("--rate", "5", "--fault", "stop:worker@1s"), "is no fault"),
    (("--rate", "5", "--expect", "p99"), "is no expectation"),
    (("--rate", "5", "--expect", "p98<10ms"), "p99_9"),
    (("--rate", "5", "--expect", "p99<10"), "says no unit"),
    (("--rate", "5", "--key", "order_id"), "--type, which is missing"),
    (("--rate", "5", "--type", "OrderPlaced"), "--type needs --key"),
    (("--rate", "5", "--type", "A", "--key", "b", "--body", "[1]"), "is no JSON object"),
    (("--rate", "5", "--replay", "a.jsonl"), "--replay needs --type and --key"),
    (("--rate", "5", "--speed", "2"), "--replay, which is missing"),
    (("--rate", "5", "--replay", "a", "--type", "A", "--key", "b", "--speed", "2"), "a rate or a speed, not both"),
    (("--rate", "max", "--commands"), "commands need a rate"),
    (("--rate", "max", "--arrivals", "poisson"), "random arrivals need a rate"),
    (("--rate", "5", "--drivers", "9"), "1<=x<=8"),
    (("--rate", "5", "--app", "shop:bus", "--connect", "ipc:///run/a"), "a running bus or an application, not both"),
    (("--rate", "5", "--csv", "/no/such/directory/series.csv"), "cannot be written"),
    (("--rate", "fast"), "'fast' is no rate"),
    (("--rate", "0"), "the rate must be from 0.001"),
    (("--rate", "nan"), "'nan' is no rate"),
    (("--rate", "5", "--keys", "many"), "'many' is no number of keys"),
    (("--rate", "5", "--keys", "0"), "the number of keys must be from 1"),
    (("--rate", "5", "--duration", "0"), "the duration must be from 0.1"),
    (("--rate", "5", "--json", "/no/such/directory/report.json"), "cannot be written"),
    (("--rate", "5", "--json", "/"), "'/' is a directory; name a file in it"),
    (("--rate", "5", "--hgrm", "/"), "'/' is a directory"),
    (("--rate", "5", "--json", "a", "--csv", "b", "--hgrm", "./a"), "for --hgrm: './a' is another report's, too; name"),
    (("--rate", "5", "--json", "-", "--csv", "-"), "for --csv: '-' is another report's, too"),
    (("--rate", "-5"), "'-5' is no rate"),
    (("--rate", "inf"), "'inf' is no rate"),
    (("--rate", "5", "--duration", "nan"), "'nan' is no time"),
    (("--rate", "5", "--duration", "-1"), "'-1' is no time"),
    (("--rate", "5", "--warmup", "-1"), "'-1' is no time"),
    (("--rate", "5", "--workers", "0"), "0 is not in the range 1<=x<=256"),
    (("--rate", "5", "--timeout", "0"), "the time for a reply must be from 0.001"),
    (("--rate", "5", "--payload", "5MB"), "the payload must be from 0 to"),
    (("--rate", "5", "--stages", "5:-1s"), "'-1s' is no time"),
    (("--rate", "5", "--seed", "x"), "'x' is not a valid integer"),
    (("--rate", "5", "--type", "", "--key", "b"), "Invalid value for --type: '' is no name"),
    (("--rate", "5", "--type", "A", "--key", ""), "Invalid value for --key: '' is no name"),
    (("--rate", "5", "--replay", "a", "--type", "A", "--key", "b", "--speed", "0"), "the speed must be from"),
    (("--rate", "5", "--fault", "kill:worker@12s"), "kill:worker@12s: the run is over after 12 s, so it would never happen"),
    (("--stages", "5:3s", "--fault", "kill:worker2@6s"), "kill:worker2@6s: the run is over after 5 s"),
    (("--rate", "5", "--fault", "kill:worker@-1s"), "'-1s' is no time"),
    (("--rate", "5", "--type", "A", "--key", "b", "--body", '{"b": "z"}'), "the body has 'b', which is the key's field"),
    (("--rate", "5", "--type", "A", "--key", "b", "--body", '{"b": 7}'), 'leave it out, or put "{key}" into it'),
    (("--rate", "5", "--type", "A", "--key", "b", "--payload", "9"), 'no place: put "{payload}" into a field of the body'),
    (("--rate", "5", "--commands", "--payload", "9"), "only the demo's events, and a body of your own, have a payload"),
    (("--rate", "5", "--expect", "p99<nanms"), "'nanms' is no time"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES)
def test_a_mistake_is_told_before_the_run_and_exits_with_2(command, arguments: tuple[str, ...], said: str):
    result = command(*arguments)
    assert (result.exit_code, command.spec) == (2, None)
    assert said in result.stderr


@pytest.mark.parametrize(
    "error", [LoadError("the bus did not start"), BusUnreachable("ipc:///run/a", 5.0)], ids=["load", "unreachable"]
)
def test_a_run_that_cannot_be_made_is_one_line_and_exits_with_2(command, error: Exception):
    command.outcome = error
    result = command("--rate", "5")
    assert (result.exit_code, result.stderr) == (2, f"loadgen: {error}\n")


@pytest.mark.parametrize("verdict", EXIT_CODES)
def test_the_verdict_is_the_exit_code(command, verdict: Verdict):
    command.outcome = msgspec.structs.replace(REPORT, verdict=verdict, reasons=("why",))
    result = command("--rate", "5")
    assert result.exit_code == EXIT_CODES[verdict]
    assert result.stdout.splitlines()[-1].split(maxsplit=1) == ["verdict", f"{verdict}; why"]


def test_json_on_stdout_stands_there_alone(command):
    result = command("--rate", "5", "--json", "-")
    assert json.loads(result.stdout)["published"] == 60


def test_json_in_a_file_stands_beside_the_table(command, tmp_path: Path):
    path = tmp_path / "report.json"
    result = command("--rate", "5", "--json", str(path))
    assert json.loads(path.read_text(encoding="utf-8"))["handled"] == 60
    assert "published     60" in result.stdout


def test_the_time_series_and_the_distribution_are_written_to_files(command, tmp_path: Path):
    csv_path, hgrm_path = tmp_path / "series.csv", tmp_path / "times.hgrm"
    assert command("--rate", "5", "--csv", str(csv_path), "--hgrm", str(hgrm_path)).exit_code == 0
    assert csv_path.read_text(encoding="utf-8").startswith("at_s,warming_up,offered_rate,achieved_rate,published")
    assert "TotalCount" in hgrm_path.read_text(encoding="utf-8")


def test_a_run_without_latencies_says_that_it_writes_no_distribution(command, tmp_path: Path):
    command.is_timed = False
    path = tmp_path / "times.hgrm"
    result = command("--rate", "5", "--hgrm", str(path))
    assert result.stderr == f"loadgen: {path} was not written: the run quotes no latency\n"
    assert not path.exists()


def test_the_help_lists_what_can_be_expected() -> None:
    told = CliRunner().invoke(loadgen.cli.cli, ["--help"]).output
    assert [figure for figure in loadgen.cli.expect.FIGURES if figure not in told] == []


@pytest.mark.parametrize("option", ["--json", "--csv", "--hgrm"])
def test_a_disk_that_is_full_is_a_line_and_the_report_is_shown_all_the_same(command, monkeypatch, option: str):
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shown: list[Report] = []
    monkeypatch.setattr(loadgen.cli, "show", shown.append)
    monkeypatch.setattr(loadgen.cli, "open", full, raising=False)
    result = command("--rate", "5", option, "report")
    assert (result.exit_code, shown) == (2, [REPORT])
    assert result.stderr == "loadgen: the run was made, but report cannot be written: No space left on device\n"
