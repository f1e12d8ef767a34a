"""Which events a batch handler is called with, and what follows for each. Pure: no clock, no handler, no event loop.

Events of a type gather as their turns come, and depart together: when there are as many as a batch may have, or when nothing
else is there to run, or at the latest at the leader's next turn. A handler that asks for it lets them linger for more.

The order of a key holds inside a batch as well. Where an event is to be called again, those of its key behind it in the
batch are held back: they come again behind it, whatever the handler said of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, Final, Generic, Literal, TypeVar, get_args

import msgspec

from shardbus.errors import RegistrationError, UsageError
from shardbus.wording import counted

EVENTS_MAX: Final = 4096  # in one batch; as many as a journal takes for one stretch
LINGER_S_MAX: Final = 60.0  # a flush and a drain wait for what lingers

BatchBy = Literal["type", "key"]
"""What the events of one batch have in common."""

MemberT = TypeVar("MemberT")


class Batching(msgspec.Struct, frozen=True, kw_only=True):
    """How the events of a batch handler are put together.

    Raises:
        RegistrationError: a value that makes no sense.
    """

    events_max: int
    by_key: bool = False
    linger_s: float = 0.0

    def __post_init__(self) -> None:
        if type(self.events_max) is not int or not 2 <= self.events_max <= EVENTS_MAX:
            raise RegistrationError(f"batch={self.events_max!r}: take 2 to {EVENTS_MAX:,} events")
        linger_s = self.linger_s
        if isinstance(linger_s, bool) or not isinstance(linger_s, int | float) or not 0 <= linger_s <= LINGER_S_MAX:
            raise RegistrationError(f"linger_s={linger_s!r}: give seconds from 0, which never waits, to {LINGER_S_MAX:g}")


def batching(events_max: int | None, batch_by: str, linger_s: float) -> Batching | None:
    """What was asked for where a handler was registered; None: one event at a time.

    Raises:
        RegistrationError: a value that makes no sense.
    """
    if batch_by not in get_args(BatchBy):
        raise RegistrationError(f"batch_by={batch_by!r}: say 'type' or 'key'")
    if events_max is None:
        if batch_by != "type" or linger_s:
            raise RegistrationError("batch_by= and linger_s= are for a batch handler; say how many with batch=256")
        return None
    return Batching(events_max=events_max, by_key=batch_by == "key", linger_s=linger_s)


def outcomes_of(returned: Any, events: int, handler: str) -> list[BaseException | None]:
    """What a batch handler says of each event: None is handled, an exception is its failure.

    Raises:
        UsageError: it returned neither None, for all, nor a list with one such value for each.
    """
    if returned is None:
        return [None] * events
    told = f"{handler} was called with {counted(events, 'event')} and returned "
    rule = "; a batch handler returns None, or a list with None or an exception for each event"
    if not isinstance(returned, list | tuple):
        raise UsageError(f"{told}a {type(returned).__name__}{rule}")
    if len(returned) != events:
        raise UsageError(f"{told}a list of {len(returned)}{rule}")
    wrong = [one for one in returned if not (one is None or isinstance(one, BaseException))]
    if wrong:
        raise UsageError(f"{told}a list with {type(wrong[0]).__name__} {wrong[0]!r:.100} in it{rule}")
    return list(returned)


class KeyOrder:
    """Of events in their order, which stand behind one of their key that has to wait. Without a key there is no order."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: set[Hashable] = set()

    def wait(self, key: Hashable) -> None:
        """An event of this key has to wait, and so do those behind it."""
        if key is not None:
            self._waiting.add(key)

    def holds(self, key: Hashable) -> bool:
        """Whether an event of this key stands behind one that waits."""
        return key in self._waiting


class Gathering(Generic[MemberT]):
    """Events that depart together. `is_open` until it is full, or departs."""

    __slots__ = ("_slot", "is_open", "members", "policy")

    def __init__(self, policy: Batching, slot: Hashable, members: list[MemberT]) -> None:
        self.policy = policy
        self.members = members  # at most `policy.events_max`
        self.is_open = False
        self._slot = slot

    @property
    def is_full(self) -> bool:
        """Whether there are as many as a batch may have."""
        return len(self.members) >= self.policy.events_max


GatheringT = TypeVar("GatheringT", bound=Gathering[Any])


class Gatherings(Generic[GatheringT]):
    """Those that are open, one a slot (a type, or a key of a type), and those whose turn it is to depart, in order.

    Bounded by what publishers' credit lets into a worker. One that departs may still be joined until it does.
    """

    __slots__ = ("_open", "departing")

    def __init__(self) -> None:
        self._open: dict[Hashable, GatheringT] = {}
        self.departing: dict[GatheringT, None] = {}
        """Those that are to depart now, the first one first."""

    def __bool__(self) -> bool:
        return bool(self._open or self.departing)

    def lingering(self) -> Iterator[GatheringT]:
        """Those whose turn has not come."""
        return (one for one in list(self._open.values()) if one not in self.departing)

    def find(self, slot: Hashable) -> GatheringT | None:
        """The one that is open there."""
        return self._open.get(slot)

    def open(self, gathering: GatheringT) -> None:
        """Let others join it."""
        self._open[gathering._slot] = gathering
        gathering.is_open = True

    def joined(self, gathering: GatheringT) -> None:
        """It has one member more. A full one is closed, and is to depart."""
        if gathering.is_full:
            self.close(gathering)
            self.departing[gathering] = None

    def due(self, gathering: GatheringT) -> None:
        """Its turn has come."""
        self.departing[gathering] = None

    def close(self, gathering: GatheringT) -> None:
        """Nobody joins it any more."""
        if gathering.is_open:
            gathering.is_open = False
            del self._open[gathering._slot]

    def depart(self, gathering: GatheringT) -> None:
        """It begins now."""
        self.close(gathering)
        self.departing.pop(gathering, None)

    def clear(self) -> None:
        """Forget them all."""
        self._open.clear()
        self.departing.clear()
