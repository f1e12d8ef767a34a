"""`loadgen`, and `python -m loadgen`. Imports first what makes an interrupt of the other imports a line."""

from shardbus.interrupts import EndedByInterrupts
from shardbus.standard_output import buffer_output, open_standard_streams


def main() -> None:
    """Entry of the `loadgen` command, which takes interrupts over once it has read its options."""
    open_standard_streams()
    with EndedByInterrupts("loadgen"):
        from loadgen.cli import main as command

        buffer_output()
        command()


if __name__ == "__main__":
    main()
