"""The `shardbus` command. The only file of the package that imports click."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Coroutine
from typing import Any, Final, NoReturn, TypeVar

import click
import msgspec

from shardbus.addresses import check_ports, default_address, parse_address
from shardbus.application import DEMO, load_application
from shardbus.connecting import connect
from shardbus.errors import ShardbusError, UsageError
from shardbus.logs import FORMATS, LEVELS, configure_logging
from shardbus.processes import check_platform
from shardbus.sql_store import shard_url
from shardbus.store import StoreError
from shardbus.supervisor import ServeOptions, Supervisor

ResultT = TypeVar("ResultT")

_WORKERS_MAX: Final = 256
_UNHEALTHY: Final = 1
_CONNECT_S: Final = 3.0  # a bus that runs answers in milliseconds

_connect_option = click.option(
    "--connect", "address", metavar="URL", help="The bus: ipc://DIRECTORY or tcp://HOST:PORT. [env: SHARDBUS_URL]"
)


def _fail(message: str, code: int = 1) -> NoReturn:
    click.echo(f"shardbus: {message}", err=True)
    sys.exit(code)


def _run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run to the end; what went wrong is one line for people."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except UsageError as error:
        _fail(str(error), 2)
    except (ShardbusError, StoreError) as error:
        _fail(str(error))


@click.group(context_settings={"auto_envvar_prefix": "SHARDBUS", "help_option_names": ["-h", "--help"]})
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
@click.option("--drain-timeout", type=click.FloatRange(0, 3600), default=30.0, show_default=True, help="Seconds.")
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True)
@click.option("--log-format", type=click.Choice(FORMATS), default="text", show_default=True)
def serve(
    application: str,
    workers: int,
    bind: str | None,
    dead_letters: str | None,
    drain_timeout: float,
    log_level: str,
    log_format: str,
) -> None:
    """Run an application on all cores, until SIGTERM or Ctrl-C; without one, the built-in demo.

    Prints one line on standard output when every worker is ready; logs to standard error. A first signal drains, a
    second one ends at once. Exit code 0: everything was drained.
    """
    configure_logging(log_level, log_format, None)
    try:
        check_platform()
        load_application(application)  # a mistake shows here, once, instead of in every worker
        if dead_letters is not None:
            shard_url(dead_letters, 0)
        where = parse_address(bind or default_address(os.environ))
        check_ports(where, workers)
        options = ServeOptions(
            application=application,
            workers=workers,
            address=where,
            dead_letters=dead_letters,
            drain_s=drain_timeout,
            log_level=log_level,
            log_format=log_format,
        )
    except ShardbusError as error:
        _fail(str(error), 2)
    left = _run(_serve(options))
    for line in left:
        click.echo(line, err=True)
    sys.exit(1 if left else 0)


async def _serve(options: ServeOptions) -> list[str]:
    return await Supervisor(options).run(click.echo)


async def _ask(address: str | None, timeout_s: float, what: str) -> Any:
    async with connect(address, timeout=min(timeout_s, _CONNECT_S)) as client:
        return msgspec.msgpack.decode(await client.ask(what, b"", timeout=timeout_s))


@cli.command()
@_connect_option
@click.option("--json", "as_json", is_flag=True, help="All of it, as JSON.")
@click.option(
    "--timeout", type=click.FloatRange(0.1, 600), default=3.0, show_default=True, help="Seconds to wait for an answer."
)
def status(address: str | None, as_json: bool, timeout: float) -> None:
    """Show workers, rates, dead letters and waiting events. Exit code 0: healthy."""
    found = _run(_ask(address, timeout, "status"))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(
            f"{found['bus']} at {found['address']}: {'healthy' if found['healthy'] else 'UNHEALTHY'}"
            f"{', draining' if found['draining'] else ''}, up {found['uptime_s']:g} s, "
            f"{found['handled_per_s']:,.0f} events/s, {found['dead_letters']:,} dead letters, {found['waiting']:,} waiting"
        )
        click.echo("shard     state      pid restarts         handled  backlog     dead     MB  last exit")
        for one in found["workers"]:
            click.echo(
                f"{one['shard']:>5} {one['state']:>9} {one['pid']:>8} {one['restarts']:>8} {one['handled']:>15,} "
                f"{one['backlog']:>8,} {one['dead_letters']:>8,} {one['rss_bytes'] / 1e6:>6.0f}  {one['last_exit']}"
            )
            if one["store_failing"]:
                click.echo(f"      its store cannot write: {one['store_failing']}")
    sys.exit(0 if found["healthy"] else _UNHEALTHY)


@cli.command()
@_connect_option
@click.option(
    "--timeout", type=click.FloatRange(0.1, 7200), default=60.0, show_default=True, help="Seconds to wait for the end."
)
def drain(address: str | None, timeout: float) -> None:
    """Have the bus finish what it has accepted, and stop. Exit code 0: everything was drained."""
    left = _run(_ask(address, timeout, "drain"))
    for line in left:
        click.echo(line, err=True)
    click.echo("drained" if not left else "stopped, not wholly drained")
    sys.exit(1 if left else 0)


def main() -> None:
    """Entry of the `shardbus` command."""
    try:
        cli()
    except OSError as error:  # what is written to: a full disk, a pipe that nobody reads
        _fail(f"cannot go on: {error.strerror or error}")


if __name__ == "__main__":
    main()
