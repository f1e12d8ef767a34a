"""Holds the arrows and the owners: who may import whom, and which file alone owns an effect.

The two tables below are the architecture. `faults` judges any mapping of paths to sources by them, so the tests that break
an arrow on purpose run the same code as the test of the real tree.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shardbus", "loadgen", "benchmarks")

FACE = "shardbus"
"""The public face (`shardbus/__init__.py`): names anything, and is imported only by code that could be a user's."""

# Lowest first. A module imports modules of earlier lines only; those on one line do not know each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("interrupts", "standard_streams", "wording"),
    ("command_line",),
    ("errors",),
    ("config", "arguments", "tracebacks", "cancellation"),
    ("clock",),
    ("addresses", "log_throttle"),
    ("messages",),
    ("routing", "session_events", "restart", "retry", "breaker", "json_messages", "batching"),
    ("quarantine", "session_table"),
    ("journal",),
    ("wire",),  # the package itself, which holds nothing
    ("wire.ranges",),
    ("wire.frames",),
    ("wire.codec",),
    ("wire.session",),
    ("outgoing", "packing", "gate", "timeouts"),
    ("context",),
    ("signatures", "threads", "outlet"),
    ("filters",),
    ("pipeline",),
    ("registry", "middleware", "tracing"),
    ("store", "session_states"),
    ("lane_reads",),
    ("store_writer",),
    ("lookahead",),
    ("schedule",),
    ("dead_letters", "reports"),
    ("scheduled_events",),
    ("metrics", "feeds"),
    ("inbound",),
    ("inbox", "lane_host", "failures"),
    ("handler_calls",),
    ("event_handlers", "command_handlers"),
    ("batch_handlers",),
    ("lane_book",),
    ("trials", "open_batches"),
    ("outcomes",),
    ("lanes", "deferral", "envelopes", "acks"),
    ("publishers", "lane_rows"),
    ("settling", "inquiries", "adoption"),
    # adapters: one effect each
    ("fork_server",),
    ("sql",),  # the package itself, which holds nothing
    ("sql.tables",),
    ("sql.rows",),
    ("sql.statements", "sql.urls"),
    ("evidence", "sql.store", "zmq_transport", "processes", "rundir", "logs", "application", "event_loop", "watchdog"),
    ("example_application",),
    ("shard",),
    ("subscriptions", "streams"),
    ("sessions",),
    ("outboxes",),
    ("calls", "questions"),
    ("client", "worker", "supervisor"),  # roles
    ("publishing", "handler_client"),
    ("local", "connecting", "worker_process"),
    ("bus",),
    ("blocking_readers",),
    ("blocking_sessions",),
    ("blocking", "testing.clock", "testing.memory_store"),
    ("testing.cluster",),
    ("testing.kit",),
    ("testing", "testing.fixtures"),
    ("demo",),
    ("cli",),
    ("__main__",),
)

# Arrows that point down the list and are forbidden all the same: (from, to) → why.
NEVER: dict[tuple[str, str], str] = {
    ("client", "shard"): "a publisher must not know what a worker does with its frames",
    ("outboxes", "shard"): "a publisher must not know what a worker does with its frames",
    ("calls", "shard"): "a publisher must not know what a worker does with its frames",
    ("questions", "shard"): "a publisher must not know what a worker does with its frames",
    ("supervisor", "shard"): "the supervisor is never on the data path",
    ("local", "worker"): "the local engine has no processes",
    ("local", "supervisor"): "the local engine has no processes",
    ("handler_client", "shard"): "what handlers publish travels as everybody's does",
    ("handler_client", "worker"): "`worker_process` alone puts the two together",
    ("bus", "worker"): "an application does not know who runs it",
    ("bus", "supervisor"): "an application does not know who runs it",
}

# Modules of shardbus that import the face, as a user's code would.
FACE_USERS = ("demo", "worker_process")

# What the other packages may import of ours; "x.*" is x and everything below it.
FOREIGN: dict[str, tuple[str, ...]] = {
    "loadgen": (
        "loadgen.*",
        "shardbus",
        "shardbus.addresses",
        "shardbus.demo",
        "shardbus.metrics",
        "shardbus.errors",
        "shardbus.command_line",
        "shardbus.interrupts",
        "shardbus.standard_streams",
    ),
    "benchmarks": (
        "benchmarks.*",
        "loadgen.*",
        "shardbus",
        "shardbus.demo",
        "shardbus.metrics",
        "shardbus.errors",
        "shardbus.interrupts",
        "shardbus.testing",
    ),
}


class Owner(NamedTuple):
    """An effect: the modules that have it, and the only files that may import them."""

    effect: str
    modules: tuple[str, ...]
    files: tuple[str, ...]


OWNERS: tuple[Owner, ...] = (
    # The bare loop is what the bus is compared with, so it has none of the bus.
    Owner("sockets", ("zmq",), ("shardbus/zmq_transport.py", "benchmarks/bare_loop.py")),
    # Chaos locks a store as a stranger would, and the handlers of an application have a database of their own.
    Owner(
        "stores",
        ("sqlalchemy", "aiosqlite", "sqlite3"),
        (
            "shardbus/sql/store.py",
            "shardbus/sql/tables.py",
            "shardbus/sql/statements.py",
            "shardbus/sql/urls.py",
            "benchmarks/chaos.py",
            "benchmarks/features.py",
        ),
    ),
    Owner(
        "processes",
        ("signal", "subprocess", "multiprocessing"),
        ("shardbus/processes.py", "shardbus/fork_server.py", "shardbus/interrupts.py", "loadgen/processes.py"),
    ),
    Owner("other processes' use", ("psutil",), ("shardbus/processes.py", "loadgen/resources.py")),
    Owner("shared memory", ("mmap",), ("shardbus/evidence.py",)),
    Owner("command lines", ("click",), ("shardbus/command_line.py", "shardbus/cli.py", "loadgen/cli.py")),
    Owner(
        "threads",
        ("threading",),
        (
            "shardbus/watchdog.py",
            "shardbus/processes.py",
            "shardbus/blocking.py",
            "shardbus/blocking_readers.py",
            "shardbus/blocking_sessions.py",
        ),
    ),
    Owner("pools of threads", ("concurrent",), ("shardbus/threads.py",)),
    Owner("event loops", ("uvloop",), ("shardbus/event_loop.py",)),
    Owner("fixtures of pytest", ("pytest", "pytest_asyncio"), ("shardbus/testing/fixtures.py",)),
    Owner("locks on files", ("fcntl",), ("shardbus/rundir.py",)),
)

# Nothing is ever unpickled, so nobody owns it.
FORBIDDEN_MODULES = ("pickle", "marshal", "shelve", "dill", "cloudpickle")


class Import(NamedTuple):
    """One import: of which module, and on which line."""

    module: str
    line: int


def faults(sources: Mapping[str, str]) -> list[str]:
    """Everything in `sources` (path → text) that breaks an arrow or takes an owner's effect, one sentence each."""
    ours = {module_of(path) for path in sources}
    ours |= {f"{FACE}.{name}" for layer in LAYERS for name in layer}
    found: list[str] = []
    for path, source in sorted(sources.items()):
        for imported in imports_of(path, source, ours):
            found += [f"{path}:{imported.line}: {fault}" for fault in _judge(path, imported.module)]
        module = module_of(path)
        if module.startswith(f"{FACE}.") and _layer_of(module.removeprefix(f"{FACE}.")) is None:
            found.append(f"{path}:1: {module} is in no layer")
    return found


def idle_owners(sources: Mapping[str, str]) -> list[str]:
    """Owners in `sources` that have lost their effect: the table should lose them too."""
    return [
        f"{file} owns {owner.effect} and imports none of {', '.join(owner.modules)}"
        for owner in OWNERS
        for file in owner.files
        if file in sources
        and not any(_is_in(imported.module, owner.modules) for imported in imports_of(file, sources[file], set()))
    ]


def imports_of(path: str, source: str, ours: set[str]) -> Iterator[Import]:
    """Every import of a file, also inside functions, under TYPE_CHECKING, and by a literal name at run time."""
    for node in ast.walk(ast.parse(source, path)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, node.lineno)
            case ast.ImportFrom(level=0, module=str() as module, names=names):
                for alias in names:
                    # `from package import module` imports the module; `from module import name` only that.
                    full = f"{module}.{alias.name}"
                    yield Import(full if full in ours else module, node.lineno)
            case ast.ImportFrom():
                yield Import("." * node.level + (node.module or ""), node.lineno)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str() as module), *_],
            ):
                yield Import(module, node.lineno)


def module_of(path: str) -> str:
    """The dotted name of a file."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _judge(path: str, imported: str) -> Iterator[str]:
    package = path.split("/", 1)[0]
    if imported.startswith("."):
        yield f"the relative import of {imported!r} hides where its arrow points"
    if _is_in(imported, FORBIDDEN_MODULES):
        yield f"{imported} is forbidden everywhere"
    for owner in OWNERS:
        if _is_in(imported, owner.modules) and path not in owner.files:
            yield f"imports {imported}, but {owner.effect} belong to {' and '.join(owner.files)}"
    if not _is_in(imported, PACKAGES):
        return
    if package in FOREIGN:
        if not any(_matches(imported, pattern) for pattern in FOREIGN[package]):
            yield f"{package} imports {imported}, which is not for it"
    elif not _is_in(imported, (FACE,)):
        yield f"{FACE} imports {imported}, which is built on it"
    elif module_of(path) != FACE:
        yield from _judge_arrow(module_of(path).removeprefix(f"{FACE}."), imported)


def _judge_arrow(importer: str, imported: str) -> Iterator[str]:
    if imported == FACE:
        if importer not in FACE_USERS:
            yield f"{importer} imports the public face, which imports {importer}"
        return
    name = imported.removeprefix(f"{FACE}.")
    here, there = _layer_of(importer), _layer_of(name)
    if there is None:
        yield f"{importer} imports {name}, which is in no layer"
    elif here is not None and there > here:
        yield f"{importer} imports {name}, which lies above it"
    elif here is not None and there == here and importer != name:
        yield f"{importer} imports {name}, which stands beside it"
    elif (importer, name) in NEVER:
        yield f"{importer} imports {name}: {NEVER[importer, name]}"


def _layer_of(name: str) -> int | None:
    return next((at for at, layer in enumerate(LAYERS) if name in layer), None)


def _is_in(module: str, tops: tuple[str, ...]) -> bool:
    return module.split(".", 1)[0] in tops


def _matches(module: str, pattern: str) -> bool:
    stem = pattern.removesuffix(".*")
    return module == stem or (stem != pattern and module.startswith(f"{stem}."))


def tree() -> dict[str, str]:
    """The sources of the checkout, by their path in it."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


# -- the tree


def test_every_arrow_points_down_and_every_effect_has_its_owner():
    assert faults(tree()) == []


def test_every_owner_still_has_its_effect():
    assert idle_owners(tree()) == []


def test_the_tree_was_found():
    assert {"shardbus/errors.py", "shardbus/wire/session.py"} <= tree().keys()


# -- the tables


def test_no_module_stands_in_two_layers():
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))


def test_every_forbidden_arrow_would_otherwise_point_down():
    for importer, imported in NEVER:
        here, there = _layer_of(importer), _layer_of(imported)
        assert here is not None
        assert there is not None
        assert there < here, (importer, imported)


def test_every_owner_of_shardbus_stands_in_a_layer():
    for owner in OWNERS:
        for file in owner.files:
            if file.startswith(f"{FACE}/"):
                assert _layer_of(module_of(file).removeprefix(f"{FACE}.")) is not None, file


# -- the checker

BROKEN = {
    "an arrow that points up": (
        {"shardbus/errors.py": "import shardbus.lanes\n"},
        "shardbus/errors.py:1: errors imports lanes, which lies above it",
    ),
    "an arrow that points up from inside a package": (
        {"shardbus/wire/codec.py": "from shardbus.wire.session import State\n"},
        "shardbus/wire/codec.py:1: wire.codec imports wire.session, which lies above it",
    ),
    "a module taken from its package": (
        {"shardbus/wire/codec.py": "from shardbus.wire import session\n"},
        "shardbus/wire/codec.py:1: wire.codec imports wire.session, which lies above it",
    ),
    "an arrow inside a function": (
        {"shardbus/config.py": "def f():\n    from shardbus.bus import Bus\n"},
        "shardbus/config.py:2: config imports bus, which lies above it",
    ),
    "an arrow for the type checker only": (
        {"shardbus/config.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import shardbus.bus\n"},
        "shardbus/config.py:3: config imports bus, which lies above it",
    ),
    "an arrow drawn at run time": (
        {"shardbus/config.py": "import importlib\nimportlib.import_module('shardbus.bus')\n"},
        "shardbus/config.py:2: config imports bus, which lies above it",
    ),
    "two roles": (
        {"shardbus/client.py": "from shardbus.worker import Worker\n"},
        "shardbus/client.py:1: client imports worker, which stands beside it",
    ),
    "two adapters": (
        {"shardbus/evidence.py": "import mmap\nfrom shardbus.rundir import x\n"},
        "shardbus/evidence.py:2: evidence imports rundir, which stands beside it",
    ),
    "an arrow that is forbidden by name": (
        {"shardbus/supervisor.py": "from shardbus.shard import Shard\n"},
        "shardbus/supervisor.py:1: supervisor imports shard: the supervisor is never on the data path",
    ),
    "the face from inside": (
        {"shardbus/client.py": "from shardbus import connect\n"},
        "shardbus/client.py:1: client imports the public face, which imports client",
    ),
    "a relative import": (
        {"shardbus/config.py": "from .bus import Bus\n"},
        "shardbus/config.py:1: the relative import of '.bus' hides where its arrow points",
    ),
    "a module in no layer": (
        {"shardbus/misc.py": ""},
        "shardbus/misc.py:1: shardbus.misc is in no layer",
    ),
    "an import of a module in no layer": (
        {"shardbus/cli.py": "import click\nimport shardbus.elsewhere\n"},
        "shardbus/cli.py:2: cli imports elsewhere, which is in no layer",
    ),
    "shardbus built on its own user": (
        {"shardbus/cli.py": "import click\nimport loadgen.driver\n"},
        "shardbus/cli.py:2: shardbus imports loadgen.driver, which is built on it",
    ),
    "a private module of shardbus in loadgen": (
        {"loadgen/driver.py": "from shardbus.lanes import Lanes\n"},
        "loadgen/driver.py:1: loadgen imports shardbus.lanes, which is not for it",
    ),
    "a private module of shardbus in a benchmark": (
        {"benchmarks/quick.py": "import shardbus.wire.codec\n"},
        "benchmarks/quick.py:1: benchmarks imports shardbus.wire.codec, which is not for it",
    ),
    "loadgen built on a benchmark": (
        {"loadgen/report.py": "import benchmarks.shared\n"},
        "loadgen/report.py:1: loadgen imports benchmarks.shared, which is not for it",
    ),
    "an owner's effect taken": (
        {"shardbus/client.py": "import sqlalchemy.orm\n"},
        (
            "shardbus/client.py:1: imports sqlalchemy.orm, but stores belong to shardbus/sql/store.py and "
            "shardbus/sql/tables.py and shardbus/sql/statements.py and shardbus/sql/urls.py and benchmarks/chaos.py and "
            "benchmarks/features.py"
        ),
    ),
    "an effect that a neighbour of its owner takes": (
        {"loadgen/driver.py": "import zmq\n"},
        "loadgen/driver.py:1: imports zmq, but sockets belong to shardbus/zmq_transport.py and benchmarks/bare_loop.py",
    ),
    "an owner's effect taken inside a function": (
        {"loadgen/driver.py": "def f():\n    from subprocess import run\n"},
        (
            "loadgen/driver.py:2: imports subprocess, but processes belong to shardbus/processes.py and "
            "shardbus/fork_server.py and shardbus/interrupts.py and loadgen/processes.py"
        ),
    ),
    "pickle": (
        {"loadgen/report.py": "import pickle\n"},
        "loadgen/report.py:1: pickle is forbidden everywhere",
    ),
}


@pytest.mark.parametrize(("sources", "fault"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_on_purpose_is_reported(sources: dict[str, str], fault: str):
    assert faults(sources) == [fault]


SOUND = {
    "an arrow that points down": {"shardbus/lanes.py": "from shardbus.wire.session import State\n"},
    "a worker put together": {
        "shardbus/worker_process.py": "from shardbus.worker import main\nfrom shardbus.handler_client import HandlerClient\n"
    },
    "the core of a worker": {"shardbus/worker.py": "from shardbus.shard import Shard\n"},
    "the local engine": {"shardbus/local.py": "from shardbus.client import Client\nfrom shardbus.shard import Shard\n"},
    "the face": {"shardbus/__init__.py": "from shardbus.bus import Bus\nfrom shardbus.cli import main\n"},
    "the demo as a user": {"shardbus/demo.py": "import shardbus\nfrom shardbus import Bus\n"},
    "loadgen on the public names": {
        "loadgen/driver.py": "import shardbus\nfrom shardbus import Event, demo\nimport loadgen.pacer\n"
    },
    "an owner at home": {"shardbus/zmq_transport.py": "import zmq\n"},
    "each package's own owner": {"loadgen/cli.py": "import click\n", "shardbus/cli.py": "import click\n"},
    "a module whose name only begins like an effect": {"shardbus/lanes.py": "import signaling, zmqtools\n"},
}


@pytest.mark.parametrize("sources", SOUND.values(), ids=SOUND)
def test_what_is_sound_is_not_reported(sources: dict[str, str]):
    assert faults(sources) == []


def test_an_owner_without_its_effect_is_reported():
    assert idle_owners({"shardbus/rundir.py": "import os\n"}) == [
        "shardbus/rundir.py owns locks on files and imports none of fcntl"
    ]
