"""The `shardbus` command. With `command_line`, which ends it, the only file of the package that imports click."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar, cast, get_args
from uuid import UUID

import click
import msgspec
from click.core import ParameterSource

from shardbus import blocking
from shardbus.addresses import check_ports, default_address, parse_address
from shardbus.application import DEMO, load_application, load_message_type
from shardbus.client import Client
from shardbus.command_line import Interruptible, run_and_exit, tell, warn
from shardbus.config import DEFAULT_LIMITS, STORE_BYTES_LEAST, StoreFull
from shardbus.connecting import ask_bus, connect
from shardbus.dead_letters import DeadLetter, DeadLetterFilter
from shardbus.errors import CommandFailed, ConfigError, NotDelivered, ShardbusError, UsageError
from shardbus.event_loop import run
from shardbus.example_application import EXAMPLES, example_of, write_example
from shardbus.fork_server import ForkServer
from shardbus.interrupts import EXIT_INTERRUPTED, EndedByInterrupts
from shardbus.json_messages import JSON_BYTES_MAX, check_kind, choose_type, key_from_text, message_from_json
from shardbus.logs import FORMATS, LEVELS, configure_logging
from shardbus.messages import Command, Event, Message, wire_name
from shardbus.outboxes import Ledger
from shardbus.processes import check_platform, use_all_descriptors
from shardbus.reports import WORKER
from shardbus.store import DEAD_REASONS, StoreError
from shardbus.subscriptions import Missed
from shardbus.wording import counted

ResultT = TypeVar("ResultT")

_WORKERS_MAX: Final = 256
_UNHEALTHY: Final = 1
_UNSOUND: Final = 2
_CONNECT_S: Final = 10.0  # as `connect()`: a bus that runs answers in milliseconds, one that starts in seconds

# What `status` says of the stores, and how: every event that ever died is among the first, redriven, purged or dropped.
_LEDGER: Final = {
    "dead_letters": "dead letters",
    "redriven": "redriven",
    "purged": "purged",
    "dropped": "dropped",
    "waiting": "waiting",
    "scheduled": "scheduled",
    "parked": "parked keys",
}



class _FiniteRange(click.FloatRange):
    """A range of numbers that NaN is in none of: no comparison finds it, and a time-out of so many seconds never ends."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Fails where it is none, or out of range."""
        found: float = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is no number.", param, ctx)
        return found


_connect_option = click.option(
    "--connect",
    "address",
    metavar="URL",
    help="The bus: ipc://DIRECTORY or tcp://HOST:PORT. One that is just starting is waited for, up to "
    f"{_CONNECT_S:g} seconds (`status`: no longer than its --timeout). [env: SHARDBUS_URL]",
)


def _fail(message: str, code: int = 1) -> NoReturn:
    _warn(message)
    sys.exit(code)


def _warn(message: str) -> None:
    warn(f"shardbus: {message}")


def _scheduled_told(status: dict[str, Any]) -> str:
    """How many of the waiting events are scheduled, and when the next one is due."""
    if not status["scheduled"]:
        return ""
    at = datetime.fromtimestamp(status["next_due_ns"] / 1e9, UTC)
    return f" ({status['scheduled']:,} scheduled, the next for {at:%Y-%m-%d %H:%M:%S} UTC)"


@contextlib.contextmanager
def _telling(whose: str = "") -> Iterator[None]:
    """What goes wrong in the block is one line for people; `whose` says whose type was meant, which may be the mistake."""
    try:
        yield
    except UsageError as error:
        _fail(f"{error}{'' if isinstance(error, ConfigError) else whose}", 2)
    except (ShardbusError, StoreError, TimeoutError) as error:
        _fail(str(error))


def _run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    with _telling():
        return run(work)


class _Commands(Interruptible, click.Group):
    interrupted = "shardbus: interrupted"


@click.group(cls=_Commands, context_settings={"auto_envvar_prefix": "SHARDBUS", "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardbus")
def cli() -> None:
    """A message bus for Python applications that have outgrown one core."""


@cli.command()
@click.argument("application", metavar="[MODULE:BUS]", default=DEMO)
@click.option(
    "--workers",
    type=click.IntRange(1, _WORKERS_MAX),
    default=lambda: os.cpu_count() or 1,
    show_default="one for each core",
    help="Worker processes.",
)
@click.option("--bind", metavar="URL", help="Where to listen: ipc://DIRECTORY or tcp://HOST:PORT. [env: SHARDBUS_URL]")
@click.option(
    "--dead-letters",
    metavar="URL",
    help="Where dead letters and waiting events are kept, for instance sqlite+aiosqlite:///dead.db (one file a shard). "
    "Default: in memory; they outlive a worker, not the machine.",
)
@click.option(
    "--dead-letters-max-rows",
    type=click.IntRange(min=1),
    default=DEFAULT_LIMITS.store_rows_max,
    show_default=True,
    help="Dead letters and waiting events of a shard.",
)
@click.option(
    "--dead-letters-max-bytes",
    type=click.IntRange(min=STORE_BYTES_LEAST),
    default=DEFAULT_LIMITS.store_bytes_max,
    show_default=True,
    help="Bytes of their bodies, and 512 for each.",
)
@click.option(
    "--dead-letters-full",
    type=click.Choice([choice.replace("_", "-") for choice in get_args(StoreFull)]),
    default=DEFAULT_LIMITS.store_full,
    show_default=True,
    help="Then nothing more is acked as stored, so publishers wait; or the oldest dead letters are dropped, and counted.",
)
@click.option("--drain-timeout", type=_FiniteRange(0, 3600), default=30.0, show_default=True, help="Seconds.")
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True)
@click.option("--log-format", type=click.Choice(FORMATS), default="text", show_default=True)
# For a program that serves a bus for itself, and for one where nobody will look for what is left.
@click.option("--until-stdin-closes", is_flag=True, hidden=True, allow_from_autoenv=False)
@click.option("--leave-nothing", is_flag=True, hidden=True, allow_from_autoenv=False)
def serve(
    application: str,
    workers: int,
    bind: str | None,
    dead_letters: str | None,
    dead_letters_max_rows: int,
    dead_letters_max_bytes: int,
    dead_letters_full: str,
    drain_timeout: float,
    log_level: str,
    log_format: str,
    until_stdin_closes: bool,
    leave_nothing: bool,
) -> None:
    """Run an application on all cores, until SIGTERM or Ctrl-C; without one, the built-in demo.

    Prints one line on standard output when every worker is ready, however long a lifespan takes; logs to standard error. A
    first signal drains, a second one ends at once. Exit code 0: everything was drained.
    """
    use_all_descriptors()
    forks = ForkServer(WORKER)  # first, because it imports what workers need while this process does other things
    click.get_current_context().call_on_close(forks.close)
    # No other command is to wait for what only this one needs.
    with EndedByInterrupts("shardbus"):  # the fork server ends by itself
        from shardbus.supervisor import ServeOptions, Supervisor

    configure_logging(log_level, log_format, None)
    if leave_nothing:
        given = click.get_current_context().get_parameter_source("bind")
        if given is not ParameterSource.COMMANDLINE:  # the environment may name a real bus
            raise click.UsageError("--leave-nothing needs --bind: what lies at the default address is a real bus's")
        dead_letters = None  # from the environment: those stores are a real bus's
    try:
        check_platform()
        load_application(application)  # a mistake shows here, once, instead of in every worker
        if dead_letters is not None:
            from shardbus.sql.urls import shard_url

            shard_url(dead_letters, 0)
        where = parse_address(default_address(os.environ) if bind is None else bind)
        check_ports(where, workers)
        options = ServeOptions(
            application=application,
            workers=workers,
            address=where,
            dead_letters=dead_letters,
            store_rows_max=dead_letters_max_rows,
            store_bytes_max=dead_letters_max_bytes,
            store_full=cast(StoreFull, dead_letters_full.replace("-", "_")),
            drain_s=drain_timeout,
            log_level=log_level,
            log_format=log_format,
            until_stdin_closes=until_stdin_closes,
            leave_nothing=leave_nothing,
        )
    except ShardbusError as error:
        _fail(str(error), 2)
    supervisor = Supervisor(options, forks)
    left = _run(supervisor.run(tell))
    for line in left:
        warn(line)
    if told := supervisor.told_left():
        warn(told)
    sys.exit(1 if left else 0)


async def _ask(address: str | None, timeout_s: float, what: str) -> Any:
    answer = await ask_bus(address, what, connect_timeout=min(timeout_s, _CONNECT_S), timeout=timeout_s)
    return msgspec.msgpack.decode(answer)


@cli.command()
@_connect_option
@click.option("--json", "as_json", is_flag=True, help="All of it, as JSON.")
@click.option(
    "--timeout", type=_FiniteRange(0.1, 600), default=3.0, show_default=True, help="Seconds to wait for an answer."
)
def status(address: str | None, as_json: bool, timeout: float) -> None:
    """Show workers, rates, and what the shards' stores hold. Exit code 0: healthy."""
    found = _run(_ask(address, timeout, "status"))
    if as_json:
        tell(json.dumps(found, indent=2))
    else:
        how = "draining" if found["draining"] else "healthy" if found["healthy"] else "UNHEALTHY"
        tell(
            f"{found['bus']} at {found['address']}: {how}, up {found['uptime_s']:g} s, "
            f"{found['handled_per_s']:,.0f} events/s, {counted(found['dead_letters'], 'dead letter')}, "
            f"{found['waiting']:,} waiting{_scheduled_told(found)}"
            f"{', ' + counted(found['parked'], 'parked key') if found['parked'] else ''}"
        )
        tell("shard     state      pid restarts        outcomes  backlog sessions     dead     MB  last exit")
        for one in found["workers"]:
            tell(
                f"{one['shard']:>5} {one['state']:>9} {one['pid']:>8} {one['restarts']:>8} {one['handled']:>15,} "
                f"{one['backlog']:>8,} {one['sessions']:>8,} {one['dead_letters']:>8,} "
                f"{one['rss_bytes'] / 1e6:>6.0f}  {one['last_exit']}"
            )
            if one["store_failing"]:
                tell(f"      its store cannot write: {one['store_failing']}")
            if one["stalled_in"]:
                tell(f"      its event loop stands still in {one['stalled_in']}")
            if one["suspects"] or one["quarantined"]:
                alone = counted(one["suspects"], "message")
                tell(f"      after a crash: {alone} to be run alone, {one['quarantined']:,} never again")
        if any(found[name] for name in _LEDGER):
            tell("shard" + "".join(f"{name:>13}" for name in _LEDGER.values()))
            for title, one in [*((f"{worker['shard']:>5}", worker) for worker in found["workers"]), ("total", found)]:
                tell(title + "".join(f"{one[name]:>13,}" for name in _LEDGER))
    sys.exit(0 if found["healthy"] else _UNHEALTHY)


@cli.command()
@_connect_option
@click.option(
    "--timeout", type=_FiniteRange(0.1, 7200), default=60.0, show_default=True, help="Seconds to wait for the end."
)
def drain(address: str | None, timeout: float) -> None:
    """Have the bus finish what it has accepted, and stop. Exit code 0: everything was drained.

    Says how many dead letters and waiting events its stores hold, and whether they are kept.
    """
    answer = _run(_ask(address, timeout, "drain"))
    left = answer["left"]
    for line in left:
        warn(line)
    told = f"; {answer['stores']}" if answer["stores"] else ""
    tell(("stopped, not wholly drained" if left else "drained") + told)
    sys.exit(1 if left else 0)


# -- messages


def _parse_header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise click.BadParameter(f"{text!r} is not NAME=VALUE")
    return name, value


_app_option = click.option(
    "--app",
    "application",
    metavar="MODULE:BUS",
    envvar="SHARDBUS_APP",
    help="Whose types are meant. Default: the demo's. [env: SHARDBUS_APP]",
)


def _message_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--header", "headers", type=_parse_header, metavar="NAME=VALUE", multiple=True, help="May come several times."
        ),
        _app_option,
        _connect_option,
        click.argument("text", metavar="JSON"),
        click.argument("type_", metavar="TYPE"),
    ):
        command = option(command)
    return command


def _find_type(name: str, application: str | None, wanted: type[Event] | type[Command[Any]]) -> type[Message]:
    """The type that is meant: a name on the wire, of the application's; or MODULE:CLASS."""
    try:
        known = {} if application is None and ":" in name else load_application(application or DEMO).plans()
        if name in known or ":" not in name:
            types = {one: plan.message_type for one, plan in known.items()}
            kind = choose_type(types, name, application or "the demo application")
        else:
            kind = load_message_type(name)
        check_kind(kind, wanted)
    except ShardbusError as error:
        _fail(str(error), 2)
    return kind


def _whose(kind: type[Message], name: str, application: str | None) -> str:
    """That a type was taken for the demo's, where nobody said so; else nothing."""
    if application is not None or ":" in name:
        return ""
    return f"; this is the demo application's {wire_name(kind)}: name yours with --app MODULE:BUS, or as MODULE:CLASS"


@cli.command()
@_message_options
@click.option(
    "--timeout",
    type=_FiniteRange(0.1, 86_400),
    default=60.0,
    show_default=True,
    help="Seconds to wait until all is handled, once it is published.",
)
def publish(
    type_: str,
    text: str,
    address: str | None,
    application: str | None,
    headers: tuple[tuple[str, str], ...],
    timeout: float,
) -> None:
    """Publish an event, and wait until it is handled: shardbus publish shop:OrderPlaced '{"order_id": "42"}'

    TYPE is MODULE:CLASS, or the event's name in the application of --app. JSON is an object with its fields, or - for one a
    line from standard input, up to the first that is not sound. It is checked before it is sent.

    Prints the report as JSON. Exit code 0: all were handled, or wait in the store (for a retry, for their key), and may
    die later; 1: dead letters, or not finished in time, or the report cannot be written; 2: something was not sound, and
    neither it nor what follows was published.
    """
    kind = _find_type(type_, application, Event)
    whose = _whose(kind, type_, application)
    refused, left, is_interrupted = None, "", False
    with _telling(whose):
        event = None if text == "-" else message_from_json(kind, text)
        # What is left when `flush` gives up, or is interrupted, is told, and not waited for once more.
        with (
            contextlib.suppress(NotDelivered),
            blocking.connect(address, timeout=_CONNECT_S, close_timeout=0.0) as client,
        ):
            if event is None:
                refused = _publish_lines(client, kind, dict(headers))
            else:
                client.publish(cast(Event, event), headers=dict(headers))
            try:
                ledger = client.flush(timeout)
            except NotDelivered as error:
                ledger, left = client.ledger(), str(error)
            except KeyboardInterrupt:
                ledger, is_interrupted = client.ledger(), True
    if is_interrupted:
        _tell_counts(ledger)
        _fail(_told_interrupted(ledger), EXIT_INTERRUPTED)
    _tell_outcome(ledger, wire_name(kind), whose, left, refused)


def _publish_lines(
    client: blocking.BlockingClient, kind: type[Message], headers: dict[str, str]
) -> tuple[str, int] | None:
    """Publish what standard input has, up to a line that is not sound, or an interrupt; say which, and the exit code."""
    number = 0
    try:
        while line := sys.stdin.buffer.readline(JSON_BYTES_MAX + 1):
            number += 1
            if not line.isspace():
                client.publish(cast(Event, message_from_json(kind, line)), headers=headers)
    except UsageError as error:
        return f"line {number}: {error}", _UNSOUND
    except KeyboardInterrupt:
        return "interrupted", EXIT_INTERRUPTED
    return None


def _told_interrupted(ledger: Ledger) -> str:
    """What somebody who did not wait for the outcome has to know."""
    published = counted(ledger.published, "event", "was")
    if not ledger.in_flight:
        return f"interrupted; {published} published, and finished"
    whose = "its outcome" if ledger.published == 1 else f"the outcome of {ledger.in_flight:,} of them"
    return f"interrupted; {published} published, and {whose} is not known (see `shardbus status`)"


def _tell_counts(ledger: Ledger) -> bool:
    """Print a ledger, and say where it cannot be written. What else there is to say is said all the same."""
    try:
        tell(json.dumps(msgspec.to_builtins(ledger)))
    except OSError as error:
        _warn(f"standard output cannot be written: {error.strerror or error}")
        return False
    return True


def _tell_outcome(ledger: Ledger, name: str, whose: str, left: str, refused: tuple[str, int] | None) -> NoReturn:
    """Print the counts, say what was not handled and what was not published, and exit as that asks for."""
    is_told = _tell_counts(ledger)
    if left:
        _warn(left)
    if ledger.dead:
        _warn(f"{counted(ledger.dead, 'dead letter')}; see `shardbus dead-letters list --type {name}`{whose}")
    if refused is not None:
        told, code = refused
        told += whose if code == _UNSOUND else ""
        _fail(f"{told}; {counted(ledger.published, 'event')} before that had been published", code)
    sys.exit(1 if ledger.dead or left or not is_told else 0)


@cli.command()
@_message_options
@click.option(
    "--timeout", type=_FiniteRange(0.001, 86_400), default=5.0, show_default=True, help="Seconds to wait for the reply."
)
def execute(
    type_: str,
    text: str,
    address: str | None,
    application: str | None,
    headers: tuple[tuple[str, str], ...],
    timeout: float,
) -> None:
    """Execute a command and print its reply as JSON: shardbus execute shop:GetTotal '{"order_id": "42"}'

    TYPE is MODULE:CLASS, or the command's name in the application of --app. JSON is an object with its fields, or - for
    standard input. It is checked before it is sent. Exit code 1: the command failed, with the remote traceback; or there was
    no reply in time. A command that streams its reply is for Python: the shell shows one reply.
    """
    kind = _find_type(type_, application, Command)
    with _telling(_whose(kind, type_, application)):
        command = message_from_json(kind, sys.stdin.buffer.read(JSON_BYTES_MAX + 1) if text == "-" else text)
        with blocking.connect(address, timeout=_CONNECT_S, close_timeout=0.0) as client:
            try:
                reply = client.execute(cast(Command[Any], command), timeout=timeout, headers=dict(headers))
            except CommandFailed as error:
                if error.error_type == "StreamingCommand":
                    told = "streams its reply, which the shell cannot show; read it in Python, with client.stream(…)"
                    _fail(f"{wire_name(kind)} {told}")
                raise
    try:
        tell(msgspec.json.encode(reply).decode())
    except (TypeError, ValueError, msgspec.EncodeError) as error:
        _fail(f"the command was executed, and its reply is no JSON: {error}: {reply!r}")


@cli.command()
@_connect_option
@_app_option
@click.option("--key", help="Events of this key only.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many.")
@click.argument("types", metavar="TYPE…", nargs=-1, required=True)
def tail(
    address: str | None, application: str | None, key: str | None, count: int | None, types: tuple[str, ...]
) -> None:
    """Follow events as they are handled, one JSON object a line: shardbus tail shop:OrderPlaced --key 42

    TYPE is MODULE:CLASS, or the event's name in the application of --app. Begins now, until Ctrl-C; nothing waits for it:
    where it was too slow, or a worker was replaced, a line on standard error says what is missing.
    """
    kinds = [cast(type[Event], _find_type(one, application, Event)) for one in types]
    with _telling():
        keys = set() if key is None else {key_from_text(kind, key) for kind in kinds}
    if len(keys) > 1:
        _fail(f"the keys of {', '.join(types)} are of several types; follow them apart", 2)
    _run(_tail(address, kinds, keys.pop() if keys else None, count))


async def _tail(address: str | None, kinds: list[type[Event]], key: Any, count: int | None) -> None:
    async with (
        connect(address, timeout=_CONNECT_S, close_timeout=0.0) as client,
        client.subscribe(*kinds, key=key) as events,
    ):
        left = count
        async for event in events:
            if isinstance(event, Missed):
                missed = "events may be" if event.count is None else f"{counted(event.count, 'event')}"
                _warn(f"{missed} missing here")
                continue
            click.echo(msgspec.json.encode({"type": wire_name(type(event)), "event": event}))
            left = None if left is None else left - 1
            if left == 0:
                return


@cli.command()
@click.option(
    "--example",
    type=click.Choice(list(EXAMPLES)),
    help="orders: events, a command, a publisher; chat: a web process that streams replies from workers. "
    "Default: the one that NAME names, else orders.",
)
@click.argument("name")
def init(example: str | None, name: str) -> None:
    """Write an example application, with a test, into the new directory NAME; `shardbus init chat` writes a chat."""
    chosen = example or example_of(name)
    with _telling():
        write_example(chosen, name, Path())
    tell(f"{name}/ has {', '.join(EXAMPLES[chosen].files)}. Next:\n\n  cd {name}\n{EXAMPLES[chosen].next_steps}")


# -- dead letters


_KEYS_SHOWN: Final = 5
_NAMES_SHOWN: Final = 5
_HINT_LETTERS_MAX: Final = 1000  # are looked at for what might have been meant
_ERROR_SHOWN: Final = 200  # characters of an error in a list; `show` has all
_AGO: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _parse_since(text: str) -> datetime:
    """A time: `90s`, `10m`, `2h`, `3d` ago, or ISO 8601; without a zone it is local."""
    if text[:-1].isascii() and text[:-1].isdigit() and text[-1] in _AGO:
        try:
            return datetime.now(UTC) - timedelta(seconds=int(text[:-1]) * _AGO[text[-1]])
        except (OverflowError, ValueError):
            raise click.BadParameter(f"{text!r} is longer ago than there are dates; leave it out for all") from None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no time; write 10m, 2h, 3d or 2026-01-31T12:00:00+01:00") from None
    return found if found.tzinfo is not None else found.astimezone()


def _parse_key(text: str) -> Any:
    """A key: text, or `int:42`, `bytes:0a0b`, `uuid:…`; `text:int:42` is the text."""
    kind, _, rest = text.partition(":")
    parse: dict[str, Callable[[str], Any]] = {"int": int, "bytes": bytes.fromhex, "uuid": UUID, "text": str}
    if kind == text or kind not in parse:
        return text
    try:
        return parse[kind](rest)
    except ValueError:
        raise click.BadParameter(f"{rest!r} is no {kind}") from None


def _once(_context: click.Context, parameter: click.Parameter, values: tuple[Any, ...]) -> Any:
    """Refuse an option that came twice: of two filters one would be left out without a word, also from a purge."""
    if len(values) > 1:
        raise click.BadParameter(f"it may come once, and came {len(values)} times", param=parameter)
    return values[0] if values else None


_filter_option = functools.partial(click.option, multiple=True, callback=_once)


def _filter_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        _filter_option(
            "--since",
            type=_parse_since,
            metavar="TIME",
            help="Died last since: 10m, 2h or 3d ago, or ISO 8601, local time where it has no zone.",
        ),
        _filter_option("--handler", help="A handler that gave up, by its full name."),
        _filter_option("--reason", type=click.Choice(DEAD_REASONS), help="Why it is dead."),
        _filter_option("--key", type=_parse_key, metavar="KEY", help="Text, or int:42, bytes:0a0b, uuid:…, text:int:42."),
        _filter_option("--type", "type_", help="The event's name on the wire."),
        _connect_option,
    ):
        command = option(command)
    return command


def _filter_of(
    type_: str | None,
    key: Any,
    reason: str | None,
    handler: str | None,
    since: datetime | None,
    ids: tuple[str, ...] = (),
) -> DeadLetterFilter:
    try:
        return DeadLetterFilter(
            type=type_,
            key=None if key is None else (key,),
            reason=reason,
            handler=handler,
            since=since,
            ids=ids or None,
        )
    except ShardbusError as error:
        _fail(str(error), 2)


def _as_json(letter: DeadLetter) -> dict[str, Any]:
    plain = msgspec.to_builtins(letter, builtin_types=(bytes,))
    return {**plain, "body": letter.body.hex(), "event": _readable(letter.event), "key": _readable(letter.key)}


def _readable(value: Any) -> Any:
    return json.loads(msgspec.json.encode(value)) if value is not None else None


def _told_names(where: DeadLetterFilter, letters: list[DeadLetter]) -> str:
    """Which names there are of what is asked for: one is easily mistyped, or half of one. Empty: nothing is to be said."""
    asked = (
        ("types", where.type, Counter(letter.type for letter in letters)),
        ("handlers", where.handler, Counter(name for letter in letters for name in letter.handlers)),
    )
    told = []
    for what, given, found in asked:
        if given is not None and found:
            more = ", …" if len(found) > _NAMES_SHOWN else ""
            told.append(f"the {what} {', '.join(name for name, _ in found.most_common(_NAMES_SHOWN))}{more}")
    return f"there are {' and '.join(told)}" if told else ""


async def _hint(client: Client, where: DeadLetterFilter) -> str:
    """What somebody may have meant who has asked for dead letters that are not there."""
    if where.type is None and where.handler is None:
        return ""
    return _told_names(where, await client.dead_letters(limit=_HINT_LETTERS_MAX))


async def _find(client: Client, where: DeadLetterFilter, limit: int) -> tuple[list[DeadLetter], str]:
    """Those that are meant; and a hint, where there are none."""
    found = await client.dead_letters(where, limit=limit)
    return found, "" if found else await _hint(client, where)


@cli.group("dead-letters")
def dead_letters() -> None:
    """Events that their handlers gave up: look at them, have them handled again, remove them."""


@dead_letters.command("list")
@_filter_options
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=10_000, show_default=True, help="Look at so many.")
@click.option("--json", "as_json", is_flag=True, help="Each of them, as a JSON array, not grouped.")
def list_(
    address: str | None,
    type_: str | None,
    key: Any,
    reason: str | None,
    handler: str | None,
    since: datetime | None,
    limit: int,
    as_json: bool,
) -> None:
    """Show dead letters of all shards, grouped by type, reason, handlers and type of error, the most frequent first.

    Of each group's messages the last is shown, and how many others there are.
    """
    where = _filter_of(type_, key, reason, handler, since)
    found, hint = _run(_with_client(address, lambda client: _find(client, where, limit)))
    if as_json:
        tell(json.dumps([_as_json(letter) for letter in found], indent=2))
        return
    groups: dict[tuple[Any, ...], list[DeadLetter]] = {}
    for letter in found:
        groups.setdefault((letter.type, letter.reason, letter.handlers, letter.error_type), []).append(letter)
    for (name, why, handlers, error_type), letters in sorted(groups.items(), key=lambda item: -len(item[1])):
        last = max(letters, key=lambda letter: letter.last_at)
        where_to = f" in {', '.join(handlers)}" if handlers else ""
        error = f"{error_type}: {last.error}" if error_type else last.error
        first_line, _, _ = error.partition("\n")
        tell(f"{len(letters):>8,} × {name}: {why}{where_to}")
        others = len({letter.error for letter in letters}) - 1
        more = f" (the last message; {others:,} other{'' if others == 1 else 's'})" if others else ""
        tell(f"           {first_line[:_ERROR_SHOWN]}{more}")
        tell(f"           last {last.last_at.astimezone():%Y-%m-%d %H:%M:%S}, key {last.key!r}, id {last.id}")
        if parked := [letter.key for letter in letters if letter.parked]:
            more = f" and {len(parked) - _KEYS_SHOWN:,} more" if len(parked) > _KEYS_SHOWN else ""
            tell(f"           parked: {', '.join(map(repr, parked[:_KEYS_SHOWN]))}{more}")
    more = f"; there may be more, see --limit {limit:,}" if len(found) == limit else ""
    tell(f"{counted(len(found), 'dead letter')}{more}{f' match; {hint}' if hint else ''}")


@dead_letters.command()
@click.argument("id_", metavar="ID")
@_connect_option
@click.option("--json", "as_json", is_flag=True)
def show(id_: str, address: str | None, as_json: bool) -> None:
    """Show all of one dead letter, with its traceback."""
    where = _filter_of(None, None, None, None, None, (id_,))
    found = _run(_with_client(address, lambda client: client.dead_letters(where)))
    if not found:
        _fail(f"no dead letter has the id {id_}; it may have been redriven or purged")
    letter = found[0]
    if as_json:
        tell(json.dumps(_as_json(letter), indent=2))
        return
    for name, value in (
        ("id", letter.id),
        ("type", letter.type),
        ("key", repr(letter.key)),
        ("event", json.dumps(_readable(letter.event)) if letter.event is not None else f"{len(letter.body)} bytes"),
        ("headers", json.dumps(letter.headers)),
        ("reason", letter.reason),
        ("handlers", ", ".join(letter.handlers) or "none ran"),
        ("attempts", letter.attempts),
        ("parked", "yes: later events of its key wait until it is redriven or purged" if letter.parked else "no"),
        ("first", f"{letter.first_at.astimezone():%Y-%m-%d %H:%M:%S}"),
        ("last", f"{letter.last_at.astimezone():%Y-%m-%d %H:%M:%S}"),
        ("error", f"{letter.error_type}: {letter.error}" if letter.error_type else letter.error),
    ):
        tell(f"{name:>9}  {value}")
    if letter.traceback:
        tell(f"\n{letter.traceback.rstrip()}")


@dead_letters.command()
@click.argument("ids", metavar="[ID…]", nargs=-1)
@_filter_options
@click.option("--all", "everything", is_flag=True, help="All that are dead now.")
@click.option("--rate", type=_FiniteRange(0.1, 1e6), help="At most so many a second.")
@click.option("--dry-run", is_flag=True, help="Say how many it would be.")
def redrive(
    ids: tuple[str, ...],
    address: str | None,
    type_: str | None,
    key: Any,
    reason: str | None,
    handler: str | None,
    since: datetime | None,
    everything: bool,
    rate: float | None,
    dry_run: bool,
) -> None:
    """Have dead letters handled again, by the handlers that gave up; each joins the end of its key's lane, or runs first
    where it has parked that.

    Name them by ID or by what they are, or say --all.
    """
    where = _chosen(_filter_of(type_, key, reason, handler, since, ids), everything)
    _dispose("redriven", address, where, lambda client: client.redrive(where, rate=rate), dry_run)


@dead_letters.command()
@click.argument("ids", metavar="[ID…]", nargs=-1)
@_filter_options
@click.option("--all", "everything", is_flag=True, help="All that are dead now.")
@click.option("--dry-run", is_flag=True, help="Say how many it would be.")
def purge(
    ids: tuple[str, ...],
    address: str | None,
    type_: str | None,
    key: Any,
    reason: str | None,
    handler: str | None,
    since: datetime | None,
    everything: bool,
    dry_run: bool,
) -> None:
    """Remove dead letters for good; keys that they parked go on. Name them by ID or by what they are, or say --all."""
    where = _chosen(_filter_of(type_, key, reason, handler, since, ids), everything)
    _dispose("purged", address, where, lambda client: client.purge(where), dry_run)


@dead_letters.command()
@click.argument("file", type=click.File("w", encoding="utf-8", lazy=True))
@_filter_options
def export(
    file: Any,
    address: str | None,
    type_: str | None,
    key: Any,
    reason: str | None,
    handler: str | None,
    since: datetime | None,
) -> None:
    """Write dead letters to a FILE (- is standard output), one JSON object a line. They stay where they are.

    `body` is the event as it travelled, msgpack in hexadecimal; `event` shows its fields where it decodes.
    """
    where = _filter_of(type_, key, reason, handler, since)
    found = _run(_with_client(address, lambda client: client.dead_letters(where, limit=sys.maxsize)))
    os.umask(0o077)  # a file that is made now holds what events hold, so it is its owner's alone
    file.writelines(json.dumps(_as_json(letter)) + "\n" for letter in found)  # opens the FILE, also where none is
    file.flush()
    warn(f"{len(found):,} exported")


def _chosen(where: DeadLetterFilter, everything: bool) -> DeadLetterFilter:
    if everything == (where != DeadLetterFilter()):
        _fail("name dead letters by ID, or by --type, --key, --reason, --handler or --since; or else say --all", 2)
    return where


def _dispose(
    done: str,
    address: str | None,
    where: DeadLetterFilter,
    dispose: Callable[[Client], Coroutine[Any, Any, int]],
    dry_run: bool,
) -> None:
    async def disposed(client: Client) -> tuple[int, str]:
        if dry_run:
            found, hint = await _find(client, where, sys.maxsize)
            return len(found), hint
        count = await dispose(client)
        return count, "" if count else await _hint(client, where)

    count, hint = _run(_with_client(address, disposed))
    none = "" if count or where == DeadLetterFilter() else f": nothing matches{'; ' + hint if hint else ''}"
    tell(f"{count:,} {'would be ' if dry_run else ''}{done}{none}")


async def _with_client(address: str | None, work: Callable[[Client], Coroutine[Any, Any, ResultT]]) -> ResultT:
    async with connect(address, timeout=_CONNECT_S) as client:
        return await work(client)


def main() -> None:
    """Entry of the `shardbus` command."""
    run_and_exit(cli, "shardbus", unwritten=1)
