"""`loadgen`, and `python -m loadgen`. Imports first what makes an interrupt of the other imports a line."""

from shardbus.interrupts import EndedByInterrupts
from shardbus.standard_output import buffer_output


def main() -> None:
    """Entry of the `loadgen` command."""
    with EndedByInterrupts("loadgen"):
        from loadgen.cli import main as command
    buffer_output()
    command()


if __name__ == "__main__":
    main()
