"""The `shardbus` command: what is typed wrongly is told in a line, before anything is started or sent. No bus runs here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import shardbus.cli
import shardbus.supervisor

SHOP = """
from shardbus import Bus, Command, Event

class Placed(Event, key="order"):
    order: str
    amount: float = 0.0

class Counted(Event, key="number"):
    number: int

class Logged(Event):
    text: str

class GetTotal(Command[float], key="order"):
    order: str

bus = Bus("cli_shop")

@bus.on(Placed, Counted, Logged)
async def note(event) -> None: ...

@bus.command(GetTotal)
async def total(command: GetTotal) -> float: ...
"""


class Shell:
    """Runs `shardbus` in a directory with an application in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.served = 0

    def __call__(self, *arguments: str, **environment: str) -> Result:
        env = {"SHARDBUS_URL": f"ipc://{self.directory}/none"} | environment
        return CliRunner().invoke(shardbus.cli.cli, arguments, input="", env=env)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    made = Shell(tmp_path)

    async def serve(self: shardbus.supervisor.Supervisor, on_ready: object) -> list[str]:
        made.served += 1
        return []

    (tmp_path / "cli_shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(shardbus.supervisor.Supervisor, "run", serve)
    monkeypatch.setattr(shardbus.cli, "configure_logging", lambda *_: None)  # it is the process's, so pytest's own
    monkeypatch.setattr(shardbus.cli, "_CONNECT_S", 0.05)
    yield made
    sys.modules.pop("cli_shop", None)


PLACED = '{"order": "7"}'
SERVE = ("serve", "cli_shop:bus")
PUBLISH = ("publish", "cli_shop:Placed")
LETTERS = ("dead-letters", "list")

MISTAKES = [
    (("serve", "nowhere:bus"), "there is no module 'nowhere' here"),
    (("serve", "cli_shop"), "'cli_shop' is not MODULE:BUS"),
    (("serve", "cli_shop:Placed"), "cli_shop has no Bus named 'Placed'; it has bus"),
    ((*SERVE, "--workers", "0"), "0 is not in the range 1<=x<=256"),
    ((*SERVE, "--workers", "-1"), "-1 is not in the range 1<=x<=256"),
    ((*SERVE, "--workers", "two"), "'two' is not a valid integer"),
    ((*SERVE, "--bind", ""), "'' is not an address; use ipc://DIRECTORY or tcp://HOST:PORT"),
    ((*SERVE, "--bind", "nowhere"), "'nowhere' is not an address"),
    ((*SERVE, "--bind", "tcp://127.0.0.1"), "tcp:// takes a host and a port"),
    ((*SERVE, "--bind", "tcp://127.0.0.1:65535", "--workers", "2"), "2 workers take the 2 ports after it"),
    ((*SERVE, "--dead-letters", "dead.db"), "'dead.db' is not a database URL; try sqlite+aiosqlite:///dead-letters.db"),
    ((*SERVE, "--dead-letters", "mysql://x/y"), "'mysql' is not a store that shardbus knows; use sqlite+aiosqlite:///FILE"),
    ((*SERVE, "--dead-letters-max-rows", "0"), "0 is not in the range x>=1"),
    ((*SERVE, "--dead-letters-max-bytes", "10"), "10 is not in the range x>=2097152"),
    ((*SERVE, "--dead-letters-full", "explode"), "'explode' is not one of 'stop', 'drop-oldest'"),
    ((*SERVE, "--drain-timeout", "-1"), "-1.0 is not in the range 0<=x<=3600"),
    ((*SERVE, "--drain-timeout", "nan"), "'nan' is no number"),
    ((*SERVE, "--log-level", "loud"), "'loud' is not one of 'debug', 'info', 'warning', 'error'"),
    ((*SERVE, "--log-format", "xml"), "'xml' is not one of 'text', 'json'"),
    (("status", "--connect", "nowhere"), "'nowhere' is not an address"),
    (("status", "--timeout", "0"), "0.0 is not in the range 0.1<=x<=600"),
    (("status", "--timeout", "nan"), "'nan' is no number"),
    (("drain", "--connect", "tcp://x"), "tcp:// takes a host and a port"),
    (("drain", "--timeout", "-1"), "-1.0 is not in the range"),
    (("publish", "Placed", PLACED), "the demo application has no handler of 'Placed'; it has the events Tick"),
    (("publish", "Tick", "{}"), "; this is the demo application's Tick: name yours with --app MODULE:BUS"),
    (("publish", "--app", "cli_shop:bus", "Nope", "{}"), "cli_shop:bus has no handler of 'Nope'; it has the events"),
    (("publish", "--app", "cli_shop:Placed", "Placed", "{}"), "cli_shop has no Bus named 'Placed'"),
    (("publish", "cli_shop:Nope", "{}"), "cli_shop has no event or command 'Nope'; it has Placed, Counted, "),
    (("publish", "cli_shop:GetTotal", PLACED), "GetTotal is a command; use `shardbus execute`"),
    ((*PUBLISH, '{"order"'), "is no JSON: "),
    ((*PUBLISH, ""), "'' is no JSON: "),
    ((*PUBLISH, "[1]"), "'[1]' is no JSON object; Placed takes an object with order, amount"),
    ((*PUBLISH, '{"order": 3}'), "Placed: field order: expected `str`, got `int`"),
    ((*PUBLISH, '{"amonut": 3}'), "Placed has no field 'amonut'; Placed takes an object with order, amount"),
    ((*PUBLISH, "{}"), "missing required field `order`"),
    ((*PUBLISH, PLACED, "--header", "tenant"), "'tenant' is not NAME=VALUE"),
    ((*PUBLISH, PLACED, "--header", "=acme"), "'=acme' is not NAME=VALUE"),
    ((*PUBLISH, PLACED, "--timeout", "nan"), "'nan' is no number"),
    ((*PUBLISH, PLACED, "--connect", "nowhere"), "'nowhere' is not an address"),
    (PUBLISH, "Missing argument 'JSON'"),
    (("execute", "cli_shop:Placed", PLACED), "Placed is an event; use `shardbus publish`"),
    (("execute", "cli_shop:GetTotal", "-"), "'' is no JSON"),
    (("execute", "cli_shop:GetTotal", PLACED, "--timeout", "0"), "0.0 is not in the range"),
    (("tail",), "Missing argument 'TYPE…'"),
    (("tail", "cli_shop:GetTotal"), "GetTotal is a command"),
    (("tail", "cli_shop:Placed", "--count", "0"), "0 is not in the range x>=1"),
    (("tail", "cli_shop:Counted", "--key", "x"), "the key 'x' of Counted: "),
    (("tail", "cli_shop:Logged", "--key", "x"), "Logged has no key"),
    (("tail", "cli_shop:Counted", "cli_shop:Placed", "--key", "7"), "are of several types; follow them apart"),
    (("init", "../shop"), "'../shop' cannot be the name of an application"),
    (("init", "my shop"), "'my shop' cannot be"),
    (("init", ""), "'' cannot be"),
    (("init", "there"), "there is there already, and nothing is overwritten; name another"),
    ((*LETTERS, "--limit", "0"), "0 is not in the range 1<=x<=1000000"),
    ((*LETTERS, "--since", "yesterday"), "'yesterday' is no time; write 10m, 2h, 3d or 2026-01-31T12:00:00+01:00"),
    ((*LETTERS, "--since", ""), "'' is no time"),
    ((*LETTERS, "--since", "-5m"), "'-5m' is no time"),
    ((*LETTERS, "--since", "99999999999d"), "'99999999999d' is longer ago than there are dates"),
    ((*LETTERS, "--key", "int:x"), "'x' is no int"),
    ((*LETTERS, "--key", "int:99999999999999999999"), "does not fit into 64 bits; use a str"),
    ((*LETTERS, "--key", "bytes:0"), "'0' is no bytes"),
    ((*LETTERS, "--key", "uuid:1"), "'1' is no uuid"),
    ((*LETTERS, "--reason", "bogus"), "'bogus' is not one of 'failed', 'timeout', 'circuit-open'"),
    ((*LETTERS, "--type", "A", "--type", "B"), "it may come once, and came 2 times"),
    (("dead-letters", "show", "x"), "'x' is no id of a dead letter; `shardbus dead-letters list` shows them"),
    (("dead-letters", "redrive"), "name dead letters by ID, or by --type, --key, --reason, --handler or "),
    (("dead-letters", "redrive", "--all", "--rate", "0"), "0.0 is not in the range"),
    (("dead-letters", "redrive", "--all", "--rate", "nan"), "'nan' is no number"),
    (("dead-letters", "purge"), "or else say --all"),
    (("dead-letters", "purge", "--all", "--type", "A"), "or else say --all"),
    (("dead-letters", "purge", "x"), "'x' is no id of a dead letter"),
    (("dead-letters", "export"), "Missing argument 'FILE'"),
    (("nonsense",), "No such command 'nonsense'"),
]


@pytest.mark.parametrize(("arguments", "told"), MISTAKES, ids=[" ".join(one)[:60] for one, _ in MISTAKES])
def test_a_mistake_is_told_in_a_line_and_exits_with_2(shell: Shell, arguments: tuple[str, ...], told: str):
    (shell.directory / "there").mkdir()
    result = shell(*arguments)
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert (result.stdout, shell.served) == ("", 0)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (SERVE, {"SHARDBUS_URL": "nowhere"}, "'nowhere' is not an address; use ipc://DIRECTORY or tcp://HOST:PORT"),
        (("status",), {"SHARDBUS_URL": "tcp://x"}, "'tcp://x': tcp:// takes a host and a port"),
        (SERVE, {"SHARDBUS_SERVE_WORKERS": "two"}, "'two' is not a valid integer"),
        (SERVE, {"SHARDBUS_SERVE_DRAIN_TIMEOUT": "nan"}, "'nan' is no number"),
        (SERVE, {"SHARDBUS_SERVE_BIND": "nowhere"}, "'nowhere' is not an address"),
        ((*SERVE, "--leave-nothing"), {"SHARDBUS_SERVE_BIND": "ipc:///run/real"}, "--leave-nothing needs --bind"),
        (("publish", "Placed", PLACED), {"SHARDBUS_APP": "nowhere:bus"}, "there is no module 'nowhere' here"),
        (("publish", "Placed", PLACED), {"SHARDBUS_APP": "cli_shop"}, "'cli_shop' is not MODULE:BUS"),
    ],
)
def test_a_mistake_in_the_environment_is_told_in_the_same_way(
    shell: Shell, arguments: tuple[str, ...], environment: dict[str, str], told: str
):
    result = shell(*arguments, **environment)
    assert (result.exit_code, result.stdout, shell.served) == (2, "", 0)
    assert told in result.stderr


def test_an_interrupt_while_the_application_is_imported_is_told_in_a_line(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    def interrupted(_name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shardbus.cli, "load_application", interrupted)
    result = shell(*SERVE)
    assert (result.exit_code, result.stderr, shell.served) == (130, "shardbus: interrupted\n", 0)


def test_what_is_typed_well_is_served(shell: Shell):
    result = shell(*SERVE, "--bind", f"ipc://{shell.directory}/bus", "--drain-timeout", "0")
    assert (result.exit_code, shell.served) == (0, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "--timeout", "0.1"),
        ("drain", "--timeout", "0.1"),
        (*PUBLISH, PLACED),
        (*PUBLISH, "-"),
        ("execute", "cli_shop:GetTotal", PLACED),
        ("tail", "cli_shop:Placed"),
        LETTERS,
        ("dead-letters", "show", f"{'0' * 32}-0-1"),
        ("dead-letters", "redrive", "--all"),
        ("dead-letters", "purge", "--all", "--dry-run"),
        ("dead-letters", "export", "out.jsonl"),
    ],
    ids=" ".join,
)
def test_a_bus_that_is_not_there_is_told_with_what_to_do(shell: Shell, arguments: tuple[str, ...]):
    result = shell(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"shardbus: no bus answered at ipc://{shell.directory}/none within 0.")
    assert "start one with `shardbus serve`, or name another address: " in result.stderr
    assert not os.path.exists("out.jsonl")


@pytest.mark.parametrize("command", ["publish", "execute", "tail", "drain"])
def test_the_help_says_how_long_a_bus_that_starts_is_waited_for(shell: Shell, command: str):
    assert "just starting is waited for, up to 10 seconds" in " ".join(shell(command, "--help").stdout.split())


def test_what_cannot_be_written_is_told_in_a_line(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(example: str, name: str, parent: Path) -> None:
        raise PermissionError(13, "Permission denied", "shop")

    monkeypatch.setattr(shardbus.cli, "write_example", refuse)
    monkeypatch.setattr(sys, "argv", ["shardbus", "init", "shop"])
    with pytest.raises(SystemExit) as ended:
        shardbus.cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "shardbus: cannot go on: Permission denied (shop)\n"
