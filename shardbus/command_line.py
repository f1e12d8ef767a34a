"""How a command of a shell ends: with an exit code and at most one line, whatever ends it, and whether or not anybody reads
the line."""

from __future__ import annotations

import asyncio
import sys
from typing import IO, Any, ClassVar, NoReturn

import click

from shardbus.interrupts import EXIT_INTERRUPTED, hand_over
from shardbus.standard_streams import warn, written


class _Interrupted(click.ClickException):
    exit_code = EXIT_INTERRUPTED

    def show(self, file: IO[Any] | None = None) -> None:  # noqa: ARG002 - as click calls it
        """Say it, on standard error."""
        warn(self.message)


class Interruptible(click.Command):
    """A command that answers interrupts from where it knows its options, with the line `interrupted`."""

    interrupted: ClassVar[str]

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        try:
            hand_over()
            return super().invoke(ctx)
        except (KeyboardInterrupt, asyncio.CancelledError):  # a loop that was interrupted twice may raise the latter
            raise _Interrupted(self.interrupted) from None


def run_and_exit(command: Interruptible, name: str, *, unwritten: int) -> NoReturn:
    """Run a command with the arguments of this process, and end this process.

    Args:
        command: returns nothing, or exits.
        name: what its other lines begin with.
        unwritten: the exit code where something cannot be written: a full disk, a pipe that nobody reads.
    """
    try:
        code = command.main(prog_name=name, standalone_mode=False) or 0
    except click.Abort:  # an interrupt where it has just ended
        warn(command.interrupted)
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
