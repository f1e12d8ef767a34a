"""How a command of a shell tells what it has to, and ends with its exit code: whatever ends it, and whether or not anybody
reads that."""

from __future__ import annotations

import asyncio
import sys
from typing import IO, Any, ClassVar, NoReturn

import click

from shardbus.interrupts import EXIT_INTERRUPTED, HandedOver
from shardbus.standard_streams import written
from shardbus.wording import encodable


def tell(text: str) -> None:
    """Print something on standard output, if anybody reads it. Raises `OSError` where it cannot be written otherwise."""
    error = written(lambda: click.echo(text), sys.stdout)
    if error is not None:
        raise error


def warn(line: str) -> None:
    """Say something on standard error, if anybody listens: an exit code says it, too."""
    written(lambda: click.echo(line, err=True), sys.stderr)


class _Interrupted(click.ClickException):
    exit_code = EXIT_INTERRUPTED

    def show(self, file: IO[Any] | None = None) -> None:
        """Say it as it is, by default on standard error."""
        click.echo(self.message, file=file, err=True)


class Interruptible(click.Command):
    """A command that answers interrupts while it runs, with the line `interrupted`."""

    interrupted: ClassVar[str]

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        try:
            with HandedOver():
                return super().invoke(ctx)
        except (KeyboardInterrupt, asyncio.CancelledError):  # a loop that was interrupted twice may raise the latter
            raise _Interrupted(self.interrupted) from None


def run_and_exit(command: click.Command, name: str, *, unwritten: int) -> NoReturn:
    """Run a command with the arguments of this process, and end this process.

    Args:
        command: returns nothing, or exits.
        name: what a line begins with that says why it cannot go on.
        unwritten: the exit code of an `OSError`: something cannot be written, to a full disk for instance.
    """
    for argument in sys.argv[1:]:
        if argument != encodable(argument):  # it could be neither sent nor told
            warn(f"{name}: the argument {argument!r} is no text in UTF-8")
            sys.exit(2)
    try:
        code = command.main(standalone_mode=False) or 0
    except click.Abort:  # an interrupt where it has just ended
        warn(f"{name}: interrupted")
        code = EXIT_INTERRUPTED
    except click.ClickException as error:
        written(error.show, sys.stderr)
        code = error.exit_code
    except OSError as error:
        where = f" ({error.filename})" if isinstance(error.filename, str) else ""
        warn(f"{name}: cannot go on: {error.strerror or error}{where}")
        written(sys.stdout.flush, sys.stdout)  # what it still holds is not tried again
        code = unwritten
    sys.exit(code)
