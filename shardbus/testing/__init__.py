"""What applications are tested with: `run`, time that a test controls, workers that die on demand. And the store in memory.

Nothing else of shardbus imports it. `shardbus.testing.fixtures` has it for pytest.
"""

from shardbus.testing.kit import Handled, Kit, Published, run
from shardbus.testing.memory_store import MemoryRows, MemoryStore

__all__ = ["Handled", "Kit", "MemoryRows", "MemoryStore", "Published", "run"]
