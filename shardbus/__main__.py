"""`shardbus`, and `python -m shardbus`. Imports first what makes an interrupt of the other imports a line."""

from shardbus.interrupts import EndedByInterrupts


def main() -> None:
    """Entry of the `shardbus` command."""
    with EndedByInterrupts("shardbus"):
        from shardbus.cli import main as command
    command()


if __name__ == "__main__":
    main()
