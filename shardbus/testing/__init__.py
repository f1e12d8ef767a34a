"""What applications are tested with, and the store in memory. Nothing else of shardbus imports it."""

from shardbus.testing.memory_store import MemoryRows, MemoryStore

__all__ = ["MemoryRows", "MemoryStore"]
