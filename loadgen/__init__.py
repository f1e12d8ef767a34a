"""An open-loop load generator for shardbus that tells the truth, or says why it cannot.

It sends events on a schedule that never slips, measures each from the instant at which it should have gone to the end of
its handler, tells the handler's own time from the wait before it, and checks from the shards' own evidence that none was
lost, repeated unannounced or overtaken by a later one of its key. A run in which the generator or the bus fell behind says
so, and quotes no latency.
"""

from loadgen.report import Report, Verdict
from loadgen.runner import run, run_async
from loadgen.spec import LoadError, LoadSpec

__all__ = ["LoadError", "LoadSpec", "Report", "Verdict", "run", "run_async"]
