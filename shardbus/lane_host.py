"""What lanes ask of the worker around them: whatever is behind it, they are the same over sockets and without.

An interface only: `Shard` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from shardbus.context import States
from shardbus.errors import RemoteProtocolError
from shardbus.inbound import Delivery, Inbound
from shardbus.messages import WireKey
from shardbus.outgoing import Outgoing
from shardbus.store import Failure
from shardbus.wire.session import WorkerSession


class LaneHost(Protocol):
    """No call blocks; what is written is acked by the host once committed."""

    shard: int
    outgoing: Outgoing | None
    """How handlers send messages; None: they cannot."""

    @property
    def states(self) -> States:
        """What sessions have in this worker."""

    async def concluded(self, delivery: Delivery) -> None:
        """All handlers of a message whose plan `concludes` have ended, and its key still waits for it."""

    def conclusion_failed(self, delivery: Delivery, error: BaseException) -> None:
        """That has raised."""

    def touched(self, session: WorkerSession) -> None:
        """Something of this session finished: an ack is due at the end of the turn."""

    def reply(self, delivery: Delivery, status: str, body: bytes) -> None:
        """Send a command's outcome."""

    def items(self, delivery: Delivery, first: int, items: tuple[bytes, ...]) -> None:
        """Send what a streaming command yielded, from its item `first` on."""

    def bury(self, delivery: Delivery, failure: Failure, *, parks: bool = False) -> None:
        """Make it a dead letter; when that is committed, finish it. Where it parks its key, call `parked` then."""

    def bury_row(self, inbound: Inbound, failure: Failure) -> None:
        """As `bury`, of the present row of a batch, which has no delivery: it was never apart."""

    def can_keep(self, deliveries: Sequence[Delivery]) -> bool:
        """Whether the store has room for them as waiting events."""

    def put_off(self, delivery: Delivery) -> bool:
        """Write an event that is due later to the store, in no lane; when that is committed, finish it as waiting. False: it
        is due, or a command, and nothing was done."""

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        """Give each a position and write it to the store as waiting; when that is committed, finish it as waiting."""

    def amend(self, delivery: Delivery) -> None:
        """A waiting event goes on waiting, with another attempt, due time or handlers: write that."""

    def take_due(self) -> Delivery | None:
        """The next scheduled event that is due; None: there is none now."""

    def forget(self, delivery: Delivery) -> None:
        """A waiting event, or a scheduled one that was due, was handled; its row may go."""

    def defer(self, delivery: Delivery, failure: Failure | None, *, parks: bool) -> None:
        """It reached its outcome, and what its handlers have published is not finished: settle it when that is.

        A failure is to be buried then; where that parks its key, call `parked` once the store has it.
        """

    def load(self, key: WireKey, after: int, upto: int, limit: int, then: Callable[[list[Delivery]], None]) -> None:
        """Read waiting events of a key back, behind `after`, once the one at `upto` is written; hand them to `then`."""

    def note(self, delivery: Delivery, *, dead: bool) -> None:
        """A stamped event reached its outcome: write the evidence before it is acked."""

    def handled(self, count: int) -> None:
        """So many messages reached an outcome."""

    def malformed(self, session: WorkerSession, error: RemoteProtocolError) -> None:
        """A batch of this session cannot be unpacked."""

    def broken(self, error: BaseException) -> None:
        """A defect: what runs here cannot be trusted any more."""
