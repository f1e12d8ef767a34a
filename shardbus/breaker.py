"""Circuit breakers: whether a handler that keeps failing is called at all. Pure: time is an argument.

    closed ── `failures` within `window_s` ──▶ open ── after `open_s` ──▶ half-open ── `successes` in a row ──▶ closed
                                                ▲                            │
                                                └───────── a failure ────────┘

What counts is what the handler did. (M. Nygard, "Release It!", 2007, chapter 5.)
"""

from __future__ import annotations

import enum
import math
from collections import Counter, deque
from typing import Final, Literal

import msgspec

from shardbus.arguments import is_count, is_number, told_number
from shardbus.errors import RegistrationError

_NS: Final = 1_000_000_000
_PROBE_WAIT_S: Final = 1.0  # while others probe a half-open circuit


class Breaker(msgspec.Struct, frozen=True, kw_only=True):
    """When a handler's circuit opens and closes, and what becomes of its events meanwhile.

    While it is open, events wait (`while_open="wait"`), each in its key's lane, or become dead letters with the reason
    `circuit-open` (`while_open="dead"`). Each worker has its own circuit for each handler.

    Raises:
        RegistrationError: a value that makes no sense.
    """

    failures: int = 5
    window_s: float = 30.0
    open_s: float = 10.0
    successes: int = 2
    while_open: Literal["wait", "dead"] = "wait"

    def __post_init__(self) -> None:
        counts, times = (self.failures, self.successes), (self.window_s, self.open_s)
        if not (
            all(is_count(one) and one >= 1 for one in counts) and all(is_number(one) and 0 < one < math.inf for one in times)
        ):
            raise RegistrationError(
                f"Breaker(failures={self.failures!r}, window_s={told_number(self.window_s)}, "
                f"open_s={told_number(self.open_s)}, successes={self.successes!r}): counts start at 1, times above 0"
            )
        if self.while_open not in ("wait", "dead"):
            raise RegistrationError(f"Breaker(while_open={self.while_open!r}): it is 'wait' or 'dead'")


class CircuitState(enum.Enum):
    """Where a circuit stands."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Admitted(msgspec.Struct, frozen=True):
    """Call the handler, and report its outcome with this term."""

    term: int


class Blocked(msgspec.Struct, frozen=True):
    """Do not call it now; ask again after `delay_s` seconds."""

    delay_s: float


class Circuit:
    """The circuit of one handler in one worker.

    A term is a stay in one state. An outcome counts only in the term in which its call was admitted, so that one that
    comes late does not judge the circuit of now. Memory is bounded by the policy's `failures`.
    """

    def __init__(self, policy: Breaker) -> None:
        self.policy = policy
        self.state = CircuitState.CLOSED
        self.transitions: Counter[str] = Counter()
        """How often each state was entered."""
        self._term = 0
        self._failed_ns: deque[int] = deque(maxlen=policy.failures)
        self._opened_ns = 0
        self._probing = 0
        self._probed_ns = 0
        self._succeeded = 0

    def admit(self, now_ns: int) -> Admitted | Blocked:
        """Whether the handler may be called now."""
        if self.state is CircuitState.OPEN:
            left_ns = self._opened_ns + int(self.policy.open_s * _NS) - now_ns
            if left_ns > 0:
                return Blocked(left_ns / _NS)
            self._enter(CircuitState.HALF_OPEN)
        if self.state is CircuitState.HALF_OPEN:
            if self._probing + self._succeeded >= self.policy.successes:
                if now_ns - self._probed_ns < max(_PROBE_WAIT_S, self.policy.open_s) * _NS:
                    return Blocked(min(_PROBE_WAIT_S, self.policy.open_s))
                self._probing = 0  # they hang, and others may have more luck
            self._probing += 1
            self._probed_ns = now_ns
        return Admitted(self._term)

    def succeeded(self, term: int) -> None:
        """A call that was admitted in `term` returned."""
        if term == self._term and self.state is CircuitState.HALF_OPEN:
            self._probing = max(0, self._probing - 1)
            self._succeeded += 1
            if self._succeeded >= self.policy.successes:
                self._enter(CircuitState.CLOSED)

    def failed(self, term: int, now_ns: int) -> None:
        """A call that was admitted in `term` raised or ran out of time."""
        if term != self._term:
            return
        if self.state is CircuitState.HALF_OPEN:
            self._open(now_ns)
            return
        failed = self._failed_ns
        failed.append(now_ns)
        if len(failed) == self.policy.failures and now_ns - failed[0] <= self.policy.window_s * _NS:
            self._open(now_ns)

    def abandoned(self, term: int) -> None:
        """A call that was admitted in `term` was cancelled from outside; it says nothing of the handler."""
        if term == self._term and self.state is CircuitState.HALF_OPEN:
            self._probing = max(0, self._probing - 1)

    def _open(self, now_ns: int) -> None:
        self._opened_ns = now_ns
        self._enter(CircuitState.OPEN)

    def _enter(self, state: CircuitState) -> None:
        self.state = state
        self._term += 1
        self.transitions[state.value] += 1
        self._failed_ns.clear()
        self._probing = self._succeeded = 0
