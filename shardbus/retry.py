"""Whether and when a handler that failed is called again. Pure: history and chance are arguments."""

from __future__ import annotations

import asyncio

import msgspec

from shardbus.arguments import is_count, is_number, told_number
from shardbus.errors import RegistrationError


class RetryIn(msgspec.Struct, frozen=True):
    """Call the handler again after `delay_s` seconds."""

    delay_s: float


class GiveUp(msgspec.Struct, frozen=True):
    """Do not call it again; `why` says which rule ended it."""

    why: str


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """How often a handler is called for one event, and how long it waits in between.

    The wait is exponential with full jitter: a random time between 0 and `base_s · factorⁿ`, at most `cap_s`
    (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015). An error that is none of `on` is not
    retried. `Retry(attempts=1)` never retries. A cancellation that reaches the handler from what it awaits is a failure too.

    Raises:
        RegistrationError: a value that makes no sense.
    """

    attempts: int = 3
    base_s: float = 0.1
    factor: float = 2.0
    cap_s: float = 30.0
    on: type[BaseException] | tuple[type[BaseException], ...] = (Exception, asyncio.CancelledError)

    def __post_init__(self) -> None:
        if not is_count(self.attempts) or self.attempts < 1:
            raise RegistrationError(
                f"Retry(attempts={self.attempts!r}): a handler is called at least once; give a whole number from 1 on"
            )
        numbers = (self.base_s, self.factor, self.cap_s)
        if not (all(map(is_number, numbers)) and 0 <= self.base_s <= self.cap_s and self.factor >= 1):
            base_s, factor, cap_s = map(told_number, numbers)
            raise RegistrationError(
                f"Retry(base_s={base_s}, factor={factor}, cap_s={cap_s}): needs numbers, 0 ≤ base_s ≤ cap_s and factor ≥ 1"
            )
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
            raise RegistrationError(f"Retry(on={self.on!r}): name exception classes")

    def decide(self, failures: int, error: BaseException, chance: float) -> RetryIn | GiveUp:
        """What follows a failure.

        Args:
            failures: how often this handler has failed with this event, this time included.
            error: what it raised now.
            chance: a random number from 0 to 1.
        """
        if failures >= self.attempts:
            return GiveUp(f"failed {failures} times")
        if not issubclass(type(error), self.on):
            return GiveUp(f"{type(error).__name__} is not retried")
        try:
            longest_s = min(self.cap_s, self.base_s * self.factor ** (failures - 1))
        except OverflowError:
            longest_s = self.cap_s
        return RetryIn(chance * longest_s)
