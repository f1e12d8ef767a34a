"""Filters: what they match, how they combine, and which types they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from shardbus.context import Context
from shardbus.errors import RegistrationError
from shardbus.filters import Filter, as_filter, header_matches, is_type, key_matches, where
from shardbus.messages import Event, to_wire_key


class Paid(Event, key="account"):
    account: str
    amount: float = 1.0
    country: str = "NL"


class Refunded(Paid):
    pass


class Noted(Event):
    text: str = ""


def context(key: Any = "a", **headers: str) -> Context:
    return Context(to_wire_key(key), b"p" * 16, 1, 1, 0, headers or None)


BIG = where(lambda event: event.amount > 10)
DUTCH = where(country="NL")
UUID_KEY = UUID(int=5)

# what is asked → (filter, message, context, whether it matches)
MATCHES: dict[str, tuple[Filter, Event, Context, bool]] = {
    "a function that is true": (BIG, Paid(account="a", amount=11), context(), True),
    "a function that is not": (BIG, Paid(account="a"), context(), False),
    "a function of the context too": (where(lambda event, context: context.attempt == 1), Noted(), context(), True),
    "a field": (DUTCH, Paid(account="a"), context(), True),
    "a field of another value": (DUTCH, Paid(account="a", country="BE"), context(), False),
    "two fields": (where(country="NL", amount=2.0), Paid(account="a", amount=2.0), context(), True),
    "one of two fields": (where(country="NL", amount=2.0), Paid(account="a"), context(), False),
    "fields and a function": (where(lambda e: e.amount > 10, country="NL"), Paid(account="a", amount=11), context(), True),
    "fields and a function that is not": (where(lambda e: e.amount > 10, country="NL"), Paid(account="a"), context(), False),
    "both": (BIG & DUTCH, Paid(account="a", amount=11), context(), True),
    "only one of both": (BIG & DUTCH, Paid(account="a"), context(), False),
    "one of either": (BIG | DUTCH, Paid(account="a"), context(), True),
    "none of either": (BIG | DUTCH, Paid(account="a", country="BE"), context(), False),
    "not": (~BIG, Paid(account="a"), context(), True),
    "not, of both": (~(BIG & DUTCH), Paid(account="a", amount=11), context(), False),
    "a function behind a filter": (DUTCH & (lambda event: event.amount == 3), Paid(account="a", amount=3), context(), True),
    "a key of text": (key_matches("chat-*"), Noted(), context("chat-7"), True),
    "a key of other text": (key_matches("chat-*"), Noted(), context("a-chat-7"), False),
    "a key in another case": (key_matches("chat-*"), Noted(), context("Chat-7"), False),
    "a key of several lines": (key_matches("a*"), Noted(), context("a\nb"), True),
    "a number": (key_matches("4?"), Noted(), context(42), True),
    "a UUID": (key_matches("00000000-*-000000000005"), Noted(), context(UUID_KEY), True),
    "bytes are no text": (key_matches("*"), Noted(), context(b"a"), False),
    "bytes": (key_matches(b"\xff[ab]"), Noted(), context(b"\xffb"), True),
    "text is no bytes": (key_matches(b"*"), Noted(), context("a"), False),
    "no key": (key_matches("*"), Noted(), context(None), False),
    "a header": (header_matches("tenant"), Noted(), context(tenant=""), True),
    "another header": (header_matches("tenant"), Noted(), context(trace="1"), False),
    "a header's value": (header_matches("tenant", "acme-*"), Noted(), context(tenant="acme-7"), True),
    "a header's other value": (header_matches("tenant", "acme-*"), Noted(), context(tenant="7"), False),
    "a type": (is_type(Noted, Paid), Paid(account="a"), context(), True),
    "a subclass": (is_type(Paid), Refunded(account="a"), context(), True),
    "another type": (is_type(Paid), Noted(), context(), False),
    "a field behind a type that is another": (is_type(Paid) & DUTCH, Noted(), context(), False),
}


@pytest.mark.parametrize(("filter_", "message", "context", "expected"), MATCHES.values(), ids=MATCHES)
def test_a_filter_matches_what_it_says(filter_: Filter, message: Event, context: Context, expected: bool):
    assert bool(filter_.matches(message, context)) is expected


def test_what_decides_is_asked_first_and_alone():
    def never(event: Any) -> bool:
        raise AssertionError("was asked")

    assert not (is_type(Paid) & never).matches(Noted(), context())
    assert (is_type(Noted) | never).matches(Noted(), context())


def test_a_filter_shows_what_it_asks():
    assert repr(is_type(Paid) & ~key_matches("test-*") | where(country="NL")) == (
        "((is_type(Paid) & ~key_matches('test-*')) | where(country='NL'))"
    )


# type → what is refused of it
CHECKED: dict[str, tuple[Filter, type[Event], str | None]] = {
    "a field that is there": (DUTCH, Paid, None),
    "a field that is not": (where(city="Delft"), Paid, "Paid has no field 'city' (it has account, amount, country)"),
    "a field that is not, in the middle": (BIG & ~(DUTCH | where(city="Delft")), Paid, "no field 'city'"),
    "a key that is there": (key_matches("a*"), Paid, None),
    "a key that is not": (key_matches("a*"), Noted, "Noted has no key"),
    "behind another type": (is_type(Paid) & DUTCH & key_matches("a*"), Noted, None),
    "in front of another type": (DUTCH & is_type(Paid), Noted, "Noted has no field 'country'"),
    "behind its own type": (is_type(Paid) & where(city="Delft"), Paid, "no field 'city'"),
    "behind one of two types": ((is_type(Paid) | is_type(Noted)) & DUTCH, Noted, "no field 'country'"),
}


@pytest.mark.parametrize(("filter_", "kind", "fault"), CHECKED.values(), ids=CHECKED)
def test_a_type_without_what_is_asked_for_is_refused(filter_: Filter, kind: type[Event], fault: str | None):
    if fault is None:
        filter_.check(kind)
        return
    with pytest.raises(RegistrationError) as raised:
        filter_.check(kind)
    assert fault in str(raised.value)
    assert repr(filter_) in str(raised.value)


async def waits(event: Any) -> bool:
    return True


REFUSED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "nothing": (where, ["where()", "country='NL'"]),
    "no function": (lambda: where(5), ["where(5)"]),  # type: ignore[arg-type]
    "a coroutine function": (lambda: where(waits), ["waits", "plain `def`"]),
    "a function of nothing": (lambda: where(lambda: True), ["(message) or (message, context)"]),
    "a filter that is none": (lambda: as_filter("a"), ["where='a'"]),  # type: ignore[arg-type]
    "a class": (lambda: as_filter(Paid), ["where=Paid"]),
    "a pattern that is none": (lambda: key_matches(5), ["key_matches(5)", "'chat-*'"]),  # type: ignore[arg-type]
    "a header that is none": (lambda: header_matches("a", 5), ["header_matches('a', 5)"]),  # type: ignore[arg-type]
    "a type that is none": (lambda: is_type(int), ["is_type", "int"]),  # type: ignore[arg-type]
    "no type": (is_type, ["is_type()"]),
    "and": (lambda: BIG and DUTCH, ["&, | and ~"]),
    "not": (lambda: not BIG, ["&, | and ~"]),
}


@pytest.mark.parametrize(("make", "parts"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_filter_is_refused_with_the_reason(make: Callable[[], Any], parts: list[str]):
    with pytest.raises(RegistrationError) as raised:
        make()
    assert [part for part in parts if part not in str(raised.value)] == []
