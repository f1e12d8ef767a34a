"""Trace contexts: which texts are one, and how one goes from a program through handlers to what these publish."""

from __future__ import annotations

import asyncio

import pytest

from shardbus import Bus, Client, Context, Event, UsageError
from shardbus.tracing import Traceparent, continue_trace, current_trace, propagate_trace, trace, trace_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TEXT = f"00-{TRACE}-{SPAN}-01"


class Placed(Event, key="key"):
    key: str


class Billed(Event, key="key"):
    key: str


# -- the text


@pytest.mark.parametrize("text", [TEXT, f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-ff"])
def test_what_is_one_is_written_as_it_was_read(text: str):
    found = Traceparent.parse(text)
    assert found is not None
    assert (found.trace_id, found.span_id, str(found)) == (TRACE, SPAN, text)


@pytest.mark.parametrize("text", [f"01-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01-what-comes-later"])
def test_of_a_later_version_what_is_known_is_read_and_written_as_ours(text: str):
    assert str(Traceparent.parse(text)) == TEXT


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "garbage",
        f"00-{TRACE}-{SPAN}",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"01-{TRACE}-{SPAN}-01.more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0x",
        f" {TEXT}",
        f"{TEXT}\n",
        TEXT.replace("1", "\N{ARABIC-INDIC DIGIT ONE}"),
    ],
)
def test_what_is_none_is_no_trace(text: str | None):
    assert Traceparent.parse(text) is None


def test_a_child_is_another_span_of_the_same_trace_with_the_flags_that_are_known():
    parent = Traceparent(trace_id=TRACE, span_id=SPAN, flags=0xFF)
    child = parent.child()
    assert (child.trace_id, child.flags) == (TRACE, 1)
    assert child.span_id != SPAN
    assert Traceparent.parse(str(child)) == child
    assert Traceparent.parse(str(fresh := Traceparent.new(sampled=False))) == fresh
    assert fresh.flags == 0


# -- on the way


def test_a_trace_is_current_within_its_block():
    assert current_trace() is None
    with trace(TEXT) as outer:
        with trace(outer.child()) as inner:
            assert current_trace() == inner
        assert current_trace() == outer
    assert current_trace() is None


def test_a_text_that_is_no_traceparent_is_refused_by_the_program_that_gives_it():
    with pytest.raises(UsageError, match="'garbage' is no traceparent"), trace("garbage"):
        pass


def test_a_message_carries_the_trace_that_is_current_and_none_that_it_has_been_given():
    def headers_after(**before: str) -> dict[str, str]:
        headers = dict(before)
        propagate_trace(Placed(key="a"), headers)
        return headers

    assert headers_after() == {}
    with trace(TEXT, "vendor=1"):
        assert headers_after(tenant="x") == {"tenant": "x", "traceparent": TEXT, "tracestate": "vendor=1"}
        assert headers_after(traceparent="own") == {"traceparent": "own"}
    with trace(TEXT, "v=" + "1" * 600):
        assert headers_after() == {"traceparent": TEXT}


async def test_what_a_handler_publishes_belongs_to_the_trace_of_its_event():
    bus, seen = Bus("traced"), dict[str, Traceparent | None]()
    clients: list[Client] = []
    bus.use(continue_trace)

    @bus.on(Placed)
    async def place(event: Placed, context: Context) -> None:
        await asyncio.sleep(0)
        seen["place"] = current_trace()
        seen["published"] = trace_of(context.headers)
        await clients[0].publish(Billed(key=event.key))

    @bus.on(Billed)
    async def bill(event: Billed, context: Context) -> None:
        seen["bill"] = current_trace()
        seen["placed"] = trace_of(context.headers)
        assert context.headers.get("tracestate") == ("vendor=1" if current_trace() else None)

    async with bus.local(middleware=[propagate_trace]) as client:
        clients.append(client)
        with trace(TEXT, "vendor=1"):
            await client.publish(Placed(key="a"))
        while "bill" not in seen:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.001)
        assert {one.trace_id for one in seen.values() if one is not None} == {TRACE}
        assert str(seen["published"]) == TEXT
        assert seen["placed"] == seen["place"]
        assert len({one.span_id for one in seen.values() if one is not None}) == 3
        seen.clear()
        await client.publish(Placed(key="b"))
        await client.publish(Placed(key="b"), headers={"traceparent": "garbage"})
        await client.flush(10)
        while "bill" not in seen:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.001)
        assert set(seen.values()) == {None}
