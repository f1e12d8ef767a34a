"""Who ended a worker: what is concluded from a death, and how suspects run until it is known. Pure.

The journal shows what was under way when a worker died. All of that is suspected, and what finishes is cleared. Suspects
run again alone: one a stretch, and a few at a time, so that each further death leaves an eighth of them. The one that is
left, and is under way when it happens again, is the culprit. Where others were under way that nobody had suspected yet, one
of them may have done it instead: then it runs once more, and for a while nothing begins beside it.

A death by SIGKILL, or another signal that anybody may send, says little. It accuses only what had just begun, and convicts
only who was alone each time, several times in a row, and begun at an instant that chance had chosen: a handler that kills
its process does so every time, and somebody outside cannot know the instant. Where the kernel says that it ran out of
memory, or the event loop stood still, less is enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec

from shardbus.wording import counted

Identity = tuple[bytes, int]
"""A message: its publisher and sequence."""

SUSPECTS_MAX: Final = 4096  # more are not remembered, those with the fewest deaths first; a journal has as many rows
_ALONE: Final[Mapping[str, int]] = {"crashed": 1, "memory": 2, "silent": 2, "killed": 7}
"""How often a suspect must have been alone in a death of this kind to be convicted, once more where another had begun too.

Signals from outside make a row of seven by chance only: once it was alone, a suspect begins at an instant that chance has
chosen within 2 s (`_HOLD_S`), and is in the next death only if that comes within 150 ms (`_JUST_BEGUN_NS`). Whatever their
rhythm, that is at most (0.15 / 2)^6 = 1.8e-7 for each row that begins, and at most one begins with each death.
"""
PULSE_S: Final = 0.05  # a worker writes so often that it lives
_PULSE_NS: Final = 50_000_000
_JUST_BEGUN_NS: Final = 150_000_000  # what had run for longer when a SIGKILL came did not bring it about
_SHARE: Final = 8  # one in so many suspects is under way at once
_HOLD_MIN_S: Final = 0.1
_HOLD_S: Final = 2.0  # at random, above that: how long one waits that was alone in a death
_TRIAL_NS: Final = 5_000_000_000  # a suspect that has run for so long makes room for the next; twice as long each death
_TRIAL_NS_MAX: Final = 300_000_000_000
_ALONE_S: Final = 1.0  # for so long nothing else runs beside one that was alone in a death; twice as long each such death
_ALONE_S_MAX: Final = 16.0
_FORGET_NS: Final = 60_000_000_000  # what has not come by then had finished, or is a command, or has lost its publisher


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker ended, as its supervisor saw it.

    `crashed`: by a signal that processes bring upon themselves, or an exit code. `memory`: by SIGKILL, while the kernel was
    out of memory. `silent`: replaced, because its event loop stood still. `killed`: by a signal that anybody may send.
    Empty: in good order, or nobody knows. `told` says it in words, `at_ns` when that was noticed, by the clock of all
    processes (0: nobody knows).
    """

    how: Literal["", "crashed", "memory", "silent", "killed"] = ""
    told: str = ""
    at_ns: int = 0


UNKNOWN_END: Final = Ended()


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """What is held against a message.

    It was under way in some deaths (`died`: a bit for each of the last 64, by their number), and in `alone` of them it was
    the only suspect that was. `free`: it need not wait for others, nor others for it, because another one was convicted of
    all of them (`explained`), or because it has run for long since the last. `verdict` says how it ended its worker, once it
    is convicted.
    """

    died: int = 0
    alone: int = 0
    free: bool = False
    explained: bool = False
    verdict: str = ""

    @property
    def deaths(self) -> int:
        """How many workers have died while it was under way."""
        return self.died.bit_count()


class UnderWay(msgspec.Struct, frozen=True):
    """Messages of a publisher, from `first` to below `end`, one of which was running; since `began_ns` (0: unknown)."""

    publisher: bytes
    first: int
    end: int
    began_ns: int

    @property
    def identities(self) -> list[Identity]:
        """All of them."""
        return [(self.publisher, seq) for seq in range(self.first, self.end)]


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """What a journal shows: the stretch that ran synchronously, handlers that were suspended, messages that had failed and
    waited for their next attempt, and earlier suspects.

    `death` is the number of the death that left it so; at `alive_ns` the worker lived for certain (0: unknown).
    """

    death: int
    alive_ns: int = 0
    running: UnderWay | None
    suspended: list[UnderWay]
    waiting: list[UnderWay] = []
    suspects: dict[Identity, Suspect]


def judge(scene: Scene, ended: Ended) -> dict[Identity, Suspect]:
    """The suspects after a death, the convicted among them."""
    suspects = dict(scene.suspects)
    assert ended.told or not ended.how  # a verdict in no words would be none
    accused = _accused(scene, ended)
    known = [one for one in accused if one in suspects and not suspects[one].verdict]
    if len(accused) > 1:
        known = [one for one in known if not suspects[one].free]
    only = known[0] if len(known) == 1 else None
    # What nobody has suspected before may have done it as well; so may one whose deaths another explains, but not this one.
    certain = all(one == only or (one in suspects and _ran_long(suspects[one])) for one in accused)
    if ended.how == "killed":
        # It happens without them, too: what was alone before was so by chance.
        for identity, one in suspects.items():
            if identity != only and not one.verdict and one.alone:
                suspects[identity] = msgspec.structs.replace(one, alone=0)
    for identity in accused:
        before = suspects.get(identity, Suspect())
        if not before.verdict:
            alone = before.alone + (identity == only)
            enough = _ALONE[ended.how] + (len(accused) > 1)
            convicted = identity == only and alone >= enough and (certain or ended.how == "killed")
            died = before.died | 1 << scene.death % 64
            suspects[identity] = Suspect(died=died, alone=alone, verdict=ended.told if convicted else "")
    if only is not None and (culprit := suspects[only]).verdict:
        for identity, one in suspects.items():
            if not (one.verdict or one.free or one.died & ~culprit.died):
                suspects[identity] = msgspec.structs.replace(one, free=True, explained=True)
    if len(suspects) > SUSPECTS_MAX:
        by_weight = sorted(suspects.items(), key=lambda item: (bool(item[1].verdict), item[1].deaths), reverse=True)
        suspects = dict(by_weight[:SUSPECTS_MAX])
    return suspects


def told_after(suspected: int, convicted: int) -> str:
    """What follows from a death, for people."""
    parts = []
    if suspected:
        what = "runs alone now" if suspected == 1 else "run alone now, a few at a time,"
        one = "it ends" if suspected == 1 else "one of them ends"
        parts.append(f"{counted(suspected, 'message', 'was')} under way and {what} to see whether {one} workers")
    if convicted:
        becomes = "becomes a dead letter" if convicted == 1 else "become dead letters"
        parts.append(f"{counted(convicted, 'message', 'was')} found to end workers, and {becomes} without running again")
    return "; ".join(parts) or "no message is suspected"


def _ran_long(suspect: Suspect) -> bool:
    return suspect.free and not suspect.explained


def _accused(scene: Scene, ended: Ended) -> list[Identity]:
    """Who may have ended it."""
    if not ended.how:
        return []
    running = [] if scene.running is None else [scene.running]
    if ended.how in ("memory", "killed"):
        under_way = running + scene.suspended  # memory may be anybody's, not only his who asked for the last of it
    else:
        under_way = running or scene.suspended  # while one runs synchronously, no other does anything
    if ended.how == "killed":
        # A supervisor that is short of time itself notices late, a handler that does not await lets nobody write.
        died_ns = min(ended.at_ns, scene.alive_ns + _PULSE_NS) if scene.alive_ns else ended.at_ns
        since_ns = died_ns - _JUST_BEGUN_NS
        under_way = [one for one in under_way if not one.began_ns or one.began_ns >= since_ns]
    if ended.how == "crashed" and not any(
        identity in scene.suspects and not scene.suspects[identity].verdict
        for one in under_way
        for identity in one.identities
    ):
        # Nobody under way is known for it: it may be the work of one that had failed, and left a thread or damage behind.
        under_way = under_way + scene.waiting
    return list(dict.fromkeys(identity for one in under_way for identity in one.identities))


class Run(msgspec.Struct, frozen=True):
    """It may run now; if it is a suspect, its trial has begun. For `alone_s` seconds, nothing else is to run beside it."""

    alone_s: float = 0.0


class Hold(msgspec.Struct, frozen=True):
    """It runs after `delay_s` seconds."""

    delay_s: float


class Crowded(msgspec.Struct, frozen=True):
    """It runs when another suspect makes room; of those that wait, the one with most deaths comes first."""

    deaths: int


class Convicted(msgspec.Struct, frozen=True):
    """It never runs: `deaths` workers have died of it, the last one by `verdict`."""

    verdict: str
    deaths: int


class Quarantine:
    """The suspects of one worker's life: who of them may run when. Bounded by `SUSPECTS_MAX`; with none it costs a look.

    Args:
        suspects: what was concluded from the predecessor's death.
        note: called with each change: a suspect as it is now, or None where it is cleared.
        now_ns: the time.
        chance: random numbers from 0 to 1.
    """

    def __init__(
        self,
        suspects: Mapping[Identity, Suspect],
        note: Callable[[Identity, Suspect | None], None],
        now_ns: int,
        chance: Callable[[], float],
    ) -> None:
        self._note = note
        self._chance = chance
        self._met: set[Identity] = set()
        self._held: set[Identity] = set()
        self._trials: dict[Identity, int] = {}  # under way, and since when
        self._paused: set[Identity] = set()  # wait for their next attempt, and so make room for others
        self.adopt(suspects, now_ns, solos=True)

    def adopt(self, suspects: Mapping[Identity, Suspect], now_ns: int, *, solos: bool) -> None:
        """Begin with these; `solos`: whoever was alone in a death runs without anything beside it.

        Not after a kill from outside, perhaps: waiting for others to end, it would begin at an instant that is not chance's.
        """
        self.suspects = dict(suspects)
        self.convicted = sum(1 for one in suspects.values() if one.verdict)  # to become dead letters
        self._solos = solos
        self._since_ns = now_ns
        self._by_publisher: dict[bytes, set[int]] = {}
        for publisher, seq in suspects:
            self._by_publisher.setdefault(publisher, set()).add(seq)
        self._group = Counter(one.deaths for one in suspects.values() if not (one.verdict or one.free))
        self._left = Counter(self._group)  # of each group, those that are neither cleared nor free

    def touches(self, publisher: bytes, first: int, end: int) -> bool:
        """Whether a batch has a suspect in it."""
        return any(first <= seq < end for seq in self._by_publisher.get(publisher, ()))

    def room(self) -> int:
        """How many more may be under way now: an eighth of those that most deaths speak against, at least one."""
        worst = max((deaths for deaths, left in self._left.items() if left), default=0)
        return max(1, self._group[worst] // _SHARE) - len(self._trials)

    def admit(self, identity: Identity, now_ns: int) -> Run | Hold | Crowded | Convicted:
        """Whether a message whose turn it is may run."""
        suspect = self.suspects.get(identity)
        if suspect is None:
            return Run()
        self._met.add(identity)
        if suspect.free:
            return Run()
        if suspect.verdict:
            return Convicted(suspect.verdict, suspect.deaths)
        if identity in self._trials:
            return Run()
        if identity in self._paused:
            self._paused.discard(identity)
            self._left[suspect.deaths] += 1
        if suspect.alone and identity not in self._held:
            self._held.add(identity)
            return Hold(_HOLD_MIN_S + self._chance() * _HOLD_S)
        if self.room() <= 0:
            return Crowded(suspect.deaths)
        self._trials[identity] = now_ns
        if suspect.alone and self._solos:
            return Run(min(_ALONE_S_MAX, _ALONE_S * 2 ** min(suspect.alone - 1, 16)))
        return Run()

    def pause(self, identity: Identity) -> None:
        """It is postponed: its trial ends and others may have its place, but nothing speaks for it yet."""
        if self._trials.pop(identity, None) is not None:
            self._paused.add(identity)
            self._held.discard(identity)  # its next attempt begins at an instant of chance, too
            self._left[self.suspects[identity].deaths] -= 1

    def clear(self, identity: Identity) -> None:
        """Nothing is held against it any more: it has reached an outcome, or is redriven and starts over."""
        suspect = self.suspects.pop(identity, None)
        if suspect is None:
            return
        publisher, seq = identity
        of_publisher = self._by_publisher[publisher]
        of_publisher.discard(seq)
        if not of_publisher:
            del self._by_publisher[publisher]
        self._trials.pop(identity, None)
        if suspect.verdict:
            self.convicted -= 1
        elif identity in self._paused:
            self._paused.discard(identity)
        elif not suspect.free:
            self._left[suspect.deaths] -= 1
        self._note(identity, None)

    def tick(self, now_ns: int) -> None:
        """Free those that have run for long, and forget those that do not come, but for the convicted."""
        for identity, began_ns in list(self._trials.items()):
            suspect = self.suspects[identity]
            if now_ns - began_ns >= min(_TRIAL_NS_MAX, _TRIAL_NS << min(suspect.deaths - 1, 16)):
                del self._trials[identity]
                self._left[suspect.deaths] -= 1
                freed = self.suspects[identity] = msgspec.structs.replace(suspect, free=True)
                self._note(identity, freed)
        if now_ns - self._since_ns >= _FORGET_NS:
            self._since_ns = now_ns
            for identity in self.suspects.keys() - self._met:
                if not self.suspects[identity].verdict:  # it may lie in the store, or its publisher may come back
                    self.clear(identity)
