"""`python -m shardbus`."""

from shardbus.cli import main

if __name__ == "__main__":
    main()
