"""The `loadgen` command: options, environment, exit codes. The run itself is replaced by one that returns at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

import loadgen.cli
from loadgen.machine import Machine
from loadgen.report import EXIT_CODES, Report, Verdict
from loadgen.runner import Watcher
from loadgen.spec import LoadError, LoadSpec
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
    duration_s=10.0,
    warmup_s=2.0,
    keys=1000,
    payload_bytes=0,
    call="publish_many",
    seed=1,
    address="ipc:///run/bus",
    workers=(),
    machine=Machine(cpu_count=2, cpu_model="a processor", system="Linux", python="3.11", versions={}),
)


class Command:
    """Runs the command; `spec` is what the run was asked for, `outcome` what it returns or raises."""

    def __init__(self) -> None:
        self.spec: LoadSpec | None = None
        self.outcome: Report | Exception = REPORT

    def run(self, spec: LoadSpec, watcher: Watcher) -> Report:
        self.spec = spec
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
    ("duration", "0.5", "duration_s", 0.5),
    ("warmup", "0", "warmup_s", 0.0),
    ("keys", "7", "keys", 7),
    ("keys", "unique", "keys", None),
    ("payload", "100", "payload_bytes", 100),
    ("workers", "8", "workers", 8),
    ("call", "publish", "call", "publish"),
    ("seed", "9", "seed", 9),
    ("flush", "1", "flush_s", 1.0),
]


@pytest.mark.parametrize(("option", "text", "field", "value"), OPTIONS)
def test_every_option_is_also_read_from_the_environment(command, option: str, text: str, field: str, value: Any):
    other = () if option == "rate" else ("--rate", "5")
    assert command(*other, f"--{option}", text).exit_code == 0
    typed = command.spec
    assert command(*other, **{f"LOADGEN_{option.upper()}": text}).exit_code == 0
    assert typed == command.spec
    assert getattr(typed, field) == value


def test_the_bus_is_also_named_by_shardbus_url(command):
    command("--rate", "5", SHARDBUS_URL="ipc:///run/a")
    assert command.spec.address == "ipc:///run/a"
    command("--rate", "5", SHARDBUS_URL="ipc:///run/a", LOADGEN_CONNECT="ipc:///run/b")
    assert command.spec.address == "ipc:///run/b"


MISTAKES = [
    ((), "--rate"),
    (("--rate", "fast"), "'fast' is no rate"),
    (("--rate", "0"), "the rate must be from 0.001"),
    (("--rate", "nan"), "the rate must be from 0.001"),
    (("--rate", "5", "--keys", "many"), "'many' is no number of keys"),
    (("--rate", "5", "--keys", "0"), "the number of keys must be from 1"),
    (("--rate", "5", "--duration", "0"), "the duration must be from 0.1"),
    (("--rate", "5", "--json", "/no/such/directory/report.json"), "cannot be written"),
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
