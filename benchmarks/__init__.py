"""Benchmarks of shardbus: `python -m benchmarks.NAME`. Method and results: README.md beside this file."""
