"""`shardbus`, and `python -m shardbus`. Imports first what makes an interrupt of the other imports a line."""

from shardbus.interrupts import EndedByInterrupts


def main() -> None:
    """Entry of the `shardbus` command, which takes interrupts over once it knows which command is meant."""
    with EndedByInterrupts("shardbus"):
        from shardbus.standard_streams import buffer_output, open_standard_streams

        open_standard_streams()
        from shardbus.cli import main as command

        buffer_output()
        command()


if __name__ == "__main__":
    main()
