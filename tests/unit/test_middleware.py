"""What the shipped middleware decides, without waiting for it; and what it refuses."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from shardbus.context import Context
from shardbus.errors import InvalidMessage, RegistrationError
from shardbus.messages import Command, Event
from shardbus.middleware import Durations, Idempotency, Logging, RateLimit, Remembered, Timing, TokenBuckets, Validation

S = 1_000_000_000
CONTEXT = Context("a", b"p" * 16, 1, 2, 0)


class Paid(Event, key="account"):
    account: str
    amount: float = 1.0
    payment: str | None = None


class Positive(Event):
    numbers: list[int]

    def __post_init__(self) -> None:
        if min(self.numbers) < 0:
            raise ValueError("numbers are above 0")


class Ask(Command[int], key="account"):
    account: str


class Next:
    """A `CallNext` that notes what it is called with."""

    def __init__(self, outcome: Any = None, handler: str = "app.pay") -> None:
        self.outcome = outcome
        self.handler = handler
        self.calls: list[Any] = []

    async def __call__(self, message: Any, context: Context) -> Any:
        self.calls.append(message)
        await asyncio.sleep(0)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


# -- rates


def test_a_bucket_lets_a_burst_pass_and_spaces_the_rest():
    buckets = TokenBuckets(10, 1.0, 3, 1)
    assert [buckets.reserve(None, 5 * S) - 5 * S for _ in range(6)] == [0, 0, 0, S // 10, 2 * S // 10, 3 * S // 10]


def test_a_bucket_fills_while_nobody_comes_but_not_above_its_burst():
    buckets = TokenBuckets(10, 1.0, 3, 1)
    for _ in range(3):
        buckets.reserve(None, 0)
    assert [buckets.reserve(None, S // 10) - S // 10 for _ in range(2)] == [0, S // 10]
    assert [buckets.reserve(None, 100 * S) - 100 * S for _ in range(4)] == [0, 0, 0, S // 10]


def test_however_they_come_no_period_has_more_than_its_rate_and_one_burst():
    chance = random.Random(7)
    limit, burst = 20, 5
    buckets = TokenBuckets(limit, 1.0, burst, 1)
    now, gone = 0, []
    for _ in range(2000):
        now += chance.choice((0, 0, S // 50, S // 5))
        gone.append(buckets.reserve(None, now))
    assert gone == sorted(gone)
    most = max(sum(other < start + S for other in gone[at : at + 60]) for at, start in enumerate(gone))
    assert most <= limit + burst


def test_each_key_has_a_bucket_of_its_own_and_42_is_not_text():
    buckets = TokenBuckets(1, 60.0, 1, 100)
    assert [buckets.reserve(key, 0) for key in ("42", 42, b"42", "42")] == [0, 0, 0, 60 * S]


def test_the_key_longest_unused_is_forgotten_beyond_the_bound():
    buckets = TokenBuckets(1, 1.0, 1, 2)
    for key in ("a", "b", "a", "c"):  # "b" goes
        buckets.reserve(key, 0)
    assert len(buckets) == 2
    assert buckets.reserve("a", 0) == 2 * S
    assert buckets.reserve("b", 0) == 0


async def test_a_key_that_waits_holds_up_no_other_and_no_place_in_the_whole_rate():
    limit = RateLimit(1000, per_key=1, per_s=3600)
    call_next = Next()
    await limit(Paid(account="a"), CONTEXT, call_next)
    waits = asyncio.create_task(limit(Paid(account="a"), CONTEXT, call_next))
    await asyncio.sleep(0)
    await limit(Paid(account="b"), Context("b", b"p" * 16, 1, 1, 0), call_next)
    await limit(Paid(account="b"), Context(None, b"p" * 16, 1, 1, 0), call_next)
    await limit(Paid(account="b"), Context(None, b"p" * 16, 1, 1, 0), call_next)  # no key, no rate of a key
    assert len(call_next.calls) == 4
    waits.cancel()


# -- duplicates


def test_what_was_done_is_remembered_for_the_window():
    done = Remembered(10 * S, 100)
    done.add("a", 5, 0)
    found = done.find("a", 9 * S)
    assert found is not None
    assert found.outcome == 5
    assert done.find("a", 10 * S) is None
    assert done.find("b", 0) is None


def test_what_is_past_the_window_or_the_bound_is_forgotten():
    done = Remembered(10 * S, 3)
    for at, name in enumerate("abcd"):
        done.add(name, None, at * S)
    assert (len(done), done.find("a", 3 * S)) == (3, None)
    done.add("b", None, 4 * S)  # it is the newest now
    done.add("e", None, 5 * S)
    assert done.find("c", 5 * S) is None
    assert done.find("b", 5 * S) is not None
    done.add("f", None, 100 * S)
    assert len(done) == 1


def payment_of(message: Paid) -> str | None:
    return message.payment


async def test_a_duplicate_is_not_handled_again_until_the_window_is_over():
    now = 0
    once = Idempotency(payment_of, window_s=10, now=lambda: now)
    call_next = Next("reply")
    event = Paid(account="a", payment="1")
    assert [await once(event, CONTEXT, call_next) for _ in range(3)] == ["reply"] * 3
    assert len(call_next.calls) == 1
    now = 10 * S
    await once(event, CONTEXT, call_next)
    assert len(call_next.calls) == 2


async def test_each_handler_and_type_is_asked_for_by_itself_and_none_is_no_duplicate():
    once = Idempotency(lambda message: getattr(message, "payment", "1"))
    one, two = Next(), Next(handler="app.tell")
    for call_next in (one, two):
        for message in (Paid(account="a", payment="1"), Ask(account="a"), Paid(account="a"), Paid(account="a")):
            await once(message, CONTEXT, call_next)
    assert (len(one.calls), len(two.calls)) == (4, 4)


async def test_what_failed_is_handled_again():
    once = Idempotency(payment_of)
    event = Paid(account="a", payment="1")
    with pytest.raises(ValueError, match="no"):
        await once(event, CONTEXT, Next(ValueError("no")))
    call_next = Next()
    await once(event, CONTEXT, call_next)
    assert len(call_next.calls) == 1


async def test_a_duplicate_waits_for_the_one_that_runs_and_runs_where_that_fails():
    once = Idempotency(payment_of)
    event = Paid(account="a", payment="1")
    failing, sound = Next(ValueError("no")), Next("done")
    outcomes = await asyncio.gather(
        once(event, CONTEXT, failing),
        once(event, CONTEXT, sound),
        once(event, CONTEXT, sound),
        return_exceptions=True,
    )
    assert (len(failing.calls), len(sound.calls)) == (1, 1)
    assert [str(one) for one in outcomes] == ["no", "done", "done"]


# -- times


def test_durations_are_counted_within_a_sixteenth():
    durations = Durations()
    chance = random.Random(3)
    values = sorted(int(10 ** chance.uniform(0, 11)) for _ in range(3000))
    for value in values:
        durations.add(value, failed=False)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = values[max(0, -(-len(values) * share // 1).__int__() - 1)]
        assert exact <= durations.quantile_ns(share) <= exact * 17 / 16
    assert durations.quantile_ns(1.0) == durations.max_ns == values[-1]
    assert Durations().quantile_ns(0.5) == 0


async def test_times_are_kept_by_type_and_handler_with_their_failures():
    timing = Timing()
    for _ in range(3):
        await timing(Paid(account="a"), CONTEXT, Next())
    with pytest.raises(ValueError, match="no"):
        await timing(Paid(account="a"), CONTEXT, Next(ValueError("no")))
    assert await timing(Ask(account="a"), CONTEXT, Next(5, "app.ask")) == 5
    found = {(one.type, one.handler): one for one in timing.times()}
    assert {name: (one.calls, one.failed) for name, one in found.items()} == {
        ("Paid", "app.pay"): (4, 1),
        ("Ask", "app.ask"): (1, 0),
    }
    paid = found["Paid", "app.pay"]
    assert 0 < paid.p50_s <= paid.p99_s <= paid.max_s <= paid.total_s
    timing.reset()
    assert timing.times() == []


# -- the log


async def test_a_handled_message_is_one_line_and_so_is_a_failure(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, "shardbus.handlers")
    log = Logging(level=logging.DEBUG, failure_level=logging.ERROR)
    assert await log(Paid(account="a"), CONTEXT, Next(5)) == 5
    with pytest.raises(ValueError, match="no"):
        await log(Paid(account="a"), CONTEXT, Next(ValueError("no")))
    done, failed = caplog.records
    assert (done.levelno, failed.levelno) == (logging.DEBUG, logging.ERROR)
    assert done.getMessage().startswith("Paid handled key='a' attempt=2 in ")
    assert done.getMessage().endswith(" ms by app.pay")
    assert failed.getMessage().startswith("Paid failed key='a' attempt=2 in ")
    assert failed.getMessage().endswith(" ms by app.pay: ValueError: no")


async def test_an_error_that_cannot_be_shown_or_is_long_is_one_line_too(caplog: pytest.LogCaptureFixture):
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    for error in (Mute(), ValueError("x" * 1000), ValueError("a\nb \x1b[2J")):
        with pytest.raises(type(error)):
            await Logging()(Paid(account="a"), CONTEXT, Next(error))
    mute, long, forged = (record.getMessage() for record in caplog.records)
    assert mute.endswith("Mute: <its text cannot be shown: RuntimeError>")
    assert long.endswith("x…")
    assert len(long) < 400
    assert forged.endswith("ValueError: a\\nb \\x1b[2J")


async def test_a_level_that_is_off_costs_no_line(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "shardbus.handlers")
    await Logging()(Paid(account="a"), CONTEXT, Next())
    assert caplog.records == []


# -- what is published

CHANGED = Positive(numbers=[1])
CHANGED.numbers.append(-1)

INVALID: dict[str, tuple[Any, str]] = {
    "a field of another type": (Paid(account="a", amount="9"), "Expected `float`, got `str` - at `$.amount`"),
    "a key of another type": (Paid(account=5), "Expected `str`, got `int` - at `$.account`"),
    "what the message itself refuses": (CHANGED, "numbers are above 0"),
    "what cannot be encoded": (Paid(account="a", payment=object()), "unsupported"),
}


@pytest.mark.parametrize(("message", "error"), INVALID.values(), ids=INVALID)
def test_what_a_worker_could_not_decode_is_refused(message: Any, error: str):
    with pytest.raises(InvalidMessage) as raised:
        Validation()(message, {})
    assert raised.value.type_name == type(message).__name__
    assert error in raised.value.error


def test_what_a_worker_takes_is_taken():
    check = Validation()
    for message in (Paid(account="a", amount=9), Ask(account="a"), Positive(numbers=[1])):  # a whole number is a float
        assert check(message, {}) is None  # type: ignore[func-returns-value]


# -- what is refused

REFUSED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no rate": (RateLimit, ["RateLimit(100)", "per_key=5"]),
    "a rate of nothing": (lambda: RateLimit(0), ["0", "above 0"]),
    "a rate that is no number": (lambda: RateLimit("5"), ["'5'"]),  # type: ignore[arg-type]
    "a period of nothing": (lambda: RateLimit(5, per_s=0), ["above 0"]),
    "a burst of nothing": (lambda: RateLimit(5, burst=0), ["burst=0", "start at 1"]),
    "no keys": (lambda: RateLimit(per_key=5, keys_max=0), ["keys_max=0"]),
    "a key that is no function": (lambda: Idempotency("id"), ["'id'", "lambda event"]),  # type: ignore[arg-type]
    "a window of nothing": (lambda: Idempotency(payment_of, window_s=0), ["window_s=0"]),
    "no entries": (lambda: Idempotency(payment_of, entries_max=0), ["entries_max=0"]),
}


@pytest.mark.parametrize(("make", "parts"), REFUSED.values(), ids=REFUSED)
def test_values_that_make_no_sense_are_refused_with_the_reason(make: Callable[[], Any], parts: list[str]):
    with pytest.raises(RegistrationError) as raised:
        make()
    assert [part for part in parts if part not in str(raised.value)] == []
