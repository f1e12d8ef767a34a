"""Registration: what is taken, what is refused, and what the user is told."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import operator
from collections.abc import AsyncIterator, Callable
from typing import Any, NewType

import pytest

from shardbus.breaker import Breaker
from shardbus.context import Context
from shardbus.errors import RegistrationError
from shardbus.filters import where
from shardbus.messages import Command, Event
from shardbus.registry import Registry, WorkerInfo
from shardbus.retry import Retry

WORKER = WorkerInfo(bus="shop", shard=1, shards=4)


Shelf = NewType("Shelf", str)


class Placed(Event, key="order_id"):
    order_id: str


class Shipped(Event):
    order_id: str


class GetTotal(Command[float], key="order_id"):
    order_id: str


class Unkeyable(Event, key="amount"):
    amount: float


class UnkeyableBesideWhatIsUnknown(Event, key="amount"):
    amount: float
    note: Unknown = None  # type: ignore[name-defined]  # noqa: F821 - only the type checker may know it


class UnkeyableCommand(Command[int], key="amount"):
    amount: float


class Untravellable(Command[list[int] | set[int]]):
    """A reply of which the bytes would not say which of the two it is."""


class OtherPlaced(Event, name="Placed"):
    pass


async def takes_event(event: Event) -> None: ...


async def takes_event_and_context(event: Event, context: Context) -> None: ...


async def takes_shipped(event: Shipped) -> None: ...


async def takes_either(event: Shipped | Placed) -> None: ...


def plain(event: Placed) -> None: ...


async def yields(event: Placed) -> AsyncIterator[int]:
    yield 1


def yields_plainly(event: Placed) -> Any:
    yield 1


async def takes_nothing() -> None: ...


async def takes_three(event: Placed, context: Context, more: int) -> None: ...


async def needs_a_keyword(event: Placed, *, pool: int) -> None: ...


async def total(command: GetTotal) -> float:
    return 0.0


@pytest.fixture
def bus() -> Registry:
    return Registry("shop")


# -- what is refused


@pytest.mark.parametrize("name", ["", None, 7], ids=repr)
def test_a_bus_needs_a_name(name: Any):
    with pytest.raises(RegistrationError, match=r"Bus\('shop'\)"):
        Registry(name)


REFUSED: dict[str, tuple[Callable[[Registry], Any], list[str]]] = {
    "an event handler of a command": (
        lambda bus: bus.on(GetTotal),  # type: ignore[arg-type]  # what this row is about
        ["@bus.on", "subclass of Event", "GetTotal"],
    ),
    "a handler of no event": (lambda bus: bus.on(), ["@bus.on() names no event", "write @bus.on(EventType)"]),
    "a batch handler of nothing": (
        lambda bus: bus.on(Placed, batch=8)(takes_nothing),
        ["a batch handler takes (events) or (events, contexts)", "takes_nothing takes ()"],
    ),
    "an event handler of every event": (lambda bus: bus.on(Event), ["@bus.on", "subclass of Event"]),
    "an event handler of an instance": (
        lambda bus: bus.on(Placed(order_id="1")),  # type: ignore[arg-type]  # what this row is about
        ["@bus.on", "Placed(order_id='1')"],
    ),
    "a decorator without its brackets": (
        lambda bus: bus.on(takes_event),  # type: ignore[arg-type]  # what this row is about
        ["@bus.on", "takes_event", "write @bus.on(EventType)"],
    ),
    "a command handler of an event": (
        lambda bus: bus.command(Placed),  # type: ignore[arg-type]  # what this row is about
        ["@bus.command", "subclass of Command", "Placed"],
    ),
    "a command handler of every command": (lambda bus: bus.command(Command), ["@bus.command", "subclass of Command"]),
    "a key field that can hold no key": (
        lambda bus: bus.on(Unkeyable),
        ["Unkeyable", "'amount'", "float", "a str, an int, bytes or a UUID"],
    ),
    "a key field that can hold no key, beside an annotation that is not known here": (
        lambda bus: bus.on(UnkeyableBesideWhatIsUnknown),
        ["UnkeyableBesideWhatIsUnknown", "'amount'", "float"],
    ),
    "a number in the place of a policy for retries": (
        lambda bus: bus.on(Placed, retry=4),  # type: ignore[arg-type]  # what this row is about
        ["retry=4", "write retry=Retry(attempts=4)"],
    ),
    "a number in the place of a breaker": (
        lambda bus: bus.on(Placed, breaker=2),  # type: ignore[arg-type]  # what this row is about
        ["breaker=2", "write breaker=Breaker(failures=2)"],
    ),
    "a time-out that is no number": (
        lambda bus: bus.on(Placed, timeout_s="10"),  # type: ignore[arg-type]  # what this row is about
        ["timeout_s='10'", "timeout_s=10.0"],
    ),
    "a command's time-out that is no number": (
        lambda bus: bus.command(GetTotal, timeout_s=True),
        ["timeout_s=True", "timeout_s=10.0"],
    ),
    "a filter of a field that is not there": (
        lambda bus: bus.on(Placed, where=where(amount=5)),
        ["where(amount=5)", "Placed has no field 'amount'", "order_id"],
    ),
    "a filter that is none": (lambda bus: bus.on(Placed, where="order_id"), ["where='order_id'", "lambda event"]),
    "a priority that is no number": (lambda bus: bus.on(Placed, priority="high"), ["priority='high'", "whole number"]),
    "a type twice": (lambda bus: bus.on(Placed, Placed), ["a type twice"]),
    "two types of one name at once": (lambda bus: bus.on(Placed, OtherPlaced), ["'Placed'", "name=…"]),
    "one of two types that the handler does not take": (
        lambda bus: bus.on(Shipped, Placed)(takes_shipped),
        ["takes Shipped", "registered for Placed"],
    ),
    "a thread for what needs none": (
        lambda bus: bus.on(Placed, in_thread=True)(takes_event),
        ["takes_event", "in_thread=True", "plain `def`"],
    ),
    "a thread with a time-out": (
        lambda bus: bus.command(GetTotal, in_thread=True, timeout_s=5)(lambda command: 0.0),
        ["in_thread=True", "cannot be cancelled", "drop timeout_s"],
    ),
    "parking without a key": (
        lambda bus: bus.on(Shipped, on_dead_letter="park"),
        ["Shipped has no key", "on_dead_letter='park'", "key=…"],
    ),
    "a handler of another event": (
        lambda bus: bus.on(Placed)(takes_shipped),
        [f"{__name__}.takes_shipped", "takes Shipped", "registered for Placed"],
    ),
    "a handler of an event for a command": (lambda bus: bus.command(GetTotal)(takes_event), ["takes Event", "GetTotal"]),
    "a key field of a command that can hold no key": (
        lambda bus: bus.command(UnkeyableCommand),
        ["UnkeyableCommand", "'amount'", "float"],
    ),
    "a handler that cannot be called": (
        lambda bus: bus.on(Placed)("handler"),  # type: ignore[type-var]  # what this row is about
        ["'handler'", "not callable", "(message) or (message, context)"],
    ),
    "an async generator": (lambda bus: bus.on(Placed)(yields), ["yields", "a handler of Placed returns"]),
    "a generator": (lambda bus: bus.on(Placed)(yields_plainly), ["yields_plainly", "a handler of Placed returns"]),
    "a handler without parameters": (
        lambda bus: bus.on(Placed)(takes_nothing),
        [f"{__name__}.takes_nothing", "takes ()", "(message) or (message, context)"],
    ),
    "a handler that needs three arguments": (
        lambda bus: bus.on(Placed)(takes_three),
        [f"{__name__}.takes_three", "takes (event, context, more)", "(message) or (message, context)"],
    ),
    "a handler with a keyword that nobody gives": (
        lambda bus: bus.on(Placed)(needs_a_keyword),
        ["needs_a_keyword", "'pool'", "no default"],
    ),
    "a second handler of a command": (
        lambda bus: (bus.command(GetTotal)(total), bus.command(GetTotal)(total)),
        ["GetTotal", "a handler already", f"{__name__}.total", "exactly one"],
    ),
    "a reply that cannot travel": (
        lambda bus: bus.command(Untravellable)(lambda command: None),
        ["Untravellable", "cannot travel"],
    ),
    "two types of one name": (
        lambda bus: (bus.on(Placed)(takes_event), bus.on(OtherPlaced)),
        ["'Placed'", f"{__name__}.Placed", f"{__name__}.OtherPlaced", "name=…"],
    ),
    "a lifespan that does not yield": (
        lambda bus: bus.lifespan(takes_nothing),  # type: ignore[type-var]  # what this row is about
        ["@bus.lifespan", "yields once", "takes_nothing"],
    ),
    "a lifespan that takes too much": (
        lambda bus: bus.lifespan(greedy_lifespan),
        ["greedy_lifespan", "(worker) or nothing"],
    ),
}


async def greedy_lifespan(worker: WorkerInfo, more: int) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize(("register", "parts"), REFUSED.values(), ids=REFUSED)
def test_a_registration_is_refused_with_the_reason(
    register: Callable[[Registry], Any], parts: list[str], bus: Registry
):
    with pytest.raises(RegistrationError) as raised:
        register(bus)
    assert [part for part in parts if part not in str(raised.value)] == []


def test_what_was_refused_leaves_nothing_behind(bus: Registry):
    for refused in (takes_nothing, takes_three, yields):
        with pytest.raises(RegistrationError):
            bus.on(Placed)(refused)
    with pytest.raises(RegistrationError):
        bus.command(Untravellable)(lambda command: None)
    assert bus.plans() == {}
    bus.on(OtherPlaced)(takes_event)  # the name is still free


# -- what is taken


def test_a_decorator_returns_the_function_itself(bus: Registry):
    assert bus.on(Placed)(takes_event) is takes_event
    assert bus.command(GetTotal)(total) is total


def test_handlers_of_an_event_stand_in_the_order_of_their_registration(bus: Registry):
    bus.on(Placed)(takes_event)
    bus.on(Placed)(plain)
    bus.on(Placed)(takes_event)
    assert [handler.call for handler in bus.plans()["Placed"].handlers] == [takes_event, plain, takes_event]


def test_handlers_of_an_event_stand_by_priority_first(bus: Registry):
    for priority in (0, 5, -1, 5):
        bus.on(Placed, priority=priority)(takes_event)
    numbers = [handler.name.partition("#")[2] for handler in bus.plans()["Placed"].handlers]
    assert numbers == ["2", "4", "", "3"]


def test_a_handler_behind_a_filter_or_in_a_thread_is_not_simple(bus: Registry):
    bus.on(Placed, where=where(order_id="42"))(takes_event)
    bus.on(Shipped, in_thread=True)(lambda event: None)
    assert bus.plans()["Placed"].simple is None
    assert bus.plans()["Shipped"].simple is None


def test_one_function_may_handle_several_events(bus: Registry):
    bus.on(Placed, Shipped)(takes_either)
    assert {name: [one.call for one in plan.handlers] for name, plan in bus.plans().items()} == {
        "Placed": [takes_either],
        "Shipped": [takes_either],
    }


def test_one_function_may_be_registered_for_several_events(bus: Registry):
    bus.on(Placed)(takes_event)
    bus.on(Shipped)(takes_event)
    assert set(bus.plans()) == {"Placed", "Shipped"}


def test_a_handler_of_a_union_handles_each_of_its_events(bus: Registry):
    bus.on(Placed)(takes_either)
    bus.on(Shipped)(takes_either)
    assert set(bus.plans()) == {"Placed", "Shipped"}


def test_a_class_inside_a_function_is_not_mistaken_for_one_of_its_name_outside(bus: Registry):
    class Shipped(Event, name="Inner"):
        pass

    @bus.on(Shipped)
    async def handle(event: Shipped) -> None: ...

    assert set(bus.plans()) == {"Inner"}


def test_a_key_may_be_a_new_type_over_a_key_type(bus: Registry):
    class Shelved(Event, key="at"):
        at: Shelf

    bus.on(Shelved)
    assert Shelved.__shardbus_key__ == "at"


def test_a_handler_is_named_by_its_module_and_name(bus: Registry):
    bus.on(Placed)(takes_event)
    assert bus.plans()["Placed"].handlers[0].name == f"{__name__}.takes_event"


class Till:
    async def method(self, event: Placed) -> None: ...

    async def method_with_context(self, event: Placed, context: Context) -> None: ...

    @staticmethod
    async def static(event: Placed) -> None: ...


class AsyncCallable:
    async def __call__(self, event: Placed) -> None: ...


class PlainCallable:
    def __call__(self, event: Placed, context: Context) -> None: ...


async def with_default(event: Placed, limit: int = 3) -> None: ...


async def with_context_by_default(event: Placed, context: Context | None = None) -> None: ...


async def with_optional_keyword(event: Placed, *, limit: int = 3) -> None: ...


async def takes_anything(*arguments: Any) -> None: ...


# handler → whether it is async, whether it gets the context
HANDLERS: dict[str, tuple[Callable[..., Any], bool, bool]] = {
    "async": (takes_event, True, False),
    "async with context": (takes_event_and_context, True, True),
    "plain": (plain, False, False),
    "a method": (Till().method, True, False),
    "a method with context": (Till().method_with_context, True, True),
    "a static method": (Till.static, True, False),
    "an object that is called": (AsyncCallable(), True, False),
    "an object that is called plainly": (PlainCallable(), False, True),
    "a second parameter with a default of its own": (with_default, True, False),
    "a context with a default": (with_context_by_default, True, True),
    "a keyword with a default": (with_optional_keyword, True, False),
    "any number of arguments": (takes_anything, True, False),
    "a partial": (functools.partial(takes_event_and_context, context=None), True, False),
    "a partial that still wants the context": (functools.partial(takes_three, more=1), True, True),
    "a lambda": (lambda event: None, False, False),
    "a builtin": (operator.truth, False, False),
}


@pytest.mark.parametrize(("handler", "is_async", "wants_context"), HANDLERS.values(), ids=HANDLERS)
def test_a_handler_is_called_as_it_is_declared(
    handler: Callable[..., Any], is_async: bool, wants_context: bool, bus: Registry
):
    bus.on(Placed)(handler)
    (registered,) = bus.plans()["Placed"].handlers
    assert registered.call is handler
    assert (registered.is_async, registered.wants_context) == (is_async, wants_context)


def test_only_a_single_async_event_handler_without_context_is_simple(bus: Registry):
    bus.on(Placed)(takes_event)
    bus.on(Shipped)(takes_event_and_context)
    bus.command(GetTotal)(total)
    plans = bus.plans()
    assert plans["Placed"].simple is takes_event
    assert plans["Shipped"].simple is None
    assert plans["GetTotal"].simple is None
    bus.on(Placed)(takes_event)
    assert bus.plans()["Placed"].simple is None


@pytest.mark.parametrize(
    ("handler", "options", "at_once"),
    [
        (takes_event, {"retry": Retry(attempts=1)}, True),
        (takes_event, {}, False),
        (takes_event, {"retry": Retry(attempts=2)}, False),
        (takes_event, {"retry": Retry(attempts=1), "on_dead_letter": "park"}, False),
        (takes_event, {"retry": Retry(attempts=1), "breaker": Breaker()}, False),
        (takes_event, {"retry": Retry(attempts=1), "timeout_s": 1.0}, False),
        (takes_event_and_context, {"retry": Retry(attempts=1)}, False),
    ],
)
def test_what_dies_at_once_is_called_once_and_leaves_nothing_to_look_after(
    bus: Registry, handler: Any, options: dict[str, Any], at_once: bool
):
    bus.on(Placed, **options)(handler)
    assert bus.plans()["Placed"].dies_at_once is at_once


def test_a_plan_decodes_its_type_and_encodes_a_reply(bus: Registry):
    bus.command(GetTotal)(total)
    plan = bus.plans()["GetTotal"]
    assert plan.is_command
    assert plan.decode(b"\x81\xa8order_id\xa242") == GetTotal(order_id="42")
    assert plan.encode_reply(1) == b"\x01"


def test_plans_made_earlier_do_not_change(bus: Registry):
    bus.on(Placed)(takes_event)
    earlier = bus.plans()
    bus.on(Placed)(plain)
    assert len(earlier["Placed"].handlers) == 1


def test_a_command_and_an_event_cannot_share_a_name(bus: Registry):
    class Asked(Command[None], name="Placed"):
        pass

    bus.on(Placed)(takes_event)
    with pytest.raises(RegistrationError, match="two message types have the name 'Placed'"):
        bus.command(Asked)


# -- lifespans


async def test_lifespans_open_in_order_and_close_in_reverse(bus: Registry):
    seen: list[str] = []

    @bus.lifespan
    async def first(worker: WorkerInfo) -> AsyncIterator[None]:
        seen.append(f"first opens in {worker.bus} {worker.shard}/{worker.shards}")
        yield
        seen.append("first closes")

    @bus.lifespan
    async def second() -> AsyncIterator[None]:
        seen.append("second opens")
        yield
        seen.append("second closes")

    async with bus.running(WORKER):
        seen.append("works")
    assert seen == ["first opens in shop 1/4", "second opens", "works", "second closes", "first closes"]


async def test_each_run_opens_its_lifespans_anew(bus: Registry):
    opened: list[int] = []

    @bus.lifespan
    async def pool(worker: WorkerInfo) -> AsyncIterator[None]:
        opened.append(worker.shard)
        yield

    async with bus.running(WORKER):
        pass
    async with bus.running(WORKER):
        pass
    assert opened == [1, 1]


async def test_what_was_opened_is_closed_when_a_later_lifespan_fails(bus: Registry):
    seen: list[str] = []

    @bus.lifespan
    async def sound() -> AsyncIterator[None]:
        try:
            yield
        finally:
            seen.append("closed")

    @bus.lifespan
    async def broken() -> AsyncIterator[None]:
        raise OSError("no database")
        yield

    with pytest.raises(OSError, match="no database"):
        async with bus.running(WORKER):
            seen.append("works")
    assert seen == ["closed"]


async def test_a_lifespan_closes_as_usual_whatever_the_block_has_raised(bus: Registry):
    seen: list[str] = []

    @bus.lifespan
    async def first() -> AsyncIterator[None]:
        yield  # without `try`
        seen.append("first closes")

    @bus.lifespan
    async def second() -> AsyncIterator[None]:
        yield
        seen.append("second closes")
        raise ValueError("cannot close")

    with pytest.raises(ValueError, match="cannot close") as raised:
        async with bus.running(WORKER):
            raise LookupError("in the block")
    assert isinstance(raised.value.__context__, LookupError)
    assert seen == ["second closes", "first closes"]


async def test_a_lifespan_closes_under_a_cancellation_too_and_swallows_none(bus: Registry):
    seen: list[str] = []

    @bus.lifespan
    async def pool() -> AsyncIterator[None]:
        yield  # without `try`
        seen.append("pool closes")

    @bus.lifespan
    async def tolerant() -> AsyncIterator[None]:
        with contextlib.suppress(asyncio.CancelledError):
            yield
        seen.append("tolerant closes")

    async def run() -> None:
        async with bus.running(WORKER):
            await asyncio.sleep(600)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(run(), 0.01)
    assert seen == ["tolerant closes", "pool closes"]


async def test_a_lifespan_whose_own_task_fails_ends_the_block(bus: Registry):
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ConnectionError("the poller is gone")

    @bus.lifespan
    async def poller() -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            group.create_task(asyncio.sleep(600))
            yield

    with pytest.raises(ExceptionGroup) as raised:
        async with bus.running(WORKER):
            await asyncio.sleep(600)
    assert raised.group_contains(ConnectionError, match="the poller is gone")


async def test_a_lifespan_that_never_yields_is_an_error(bus: Registry):
    @bus.lifespan
    async def silent() -> AsyncIterator[None]:
        if bus.name == "another":
            yield

    with pytest.raises(RuntimeError, match="didn't yield"):
        async with bus.running(WORKER):
            pass


# -- what becomes of a key


def test_a_policy_for_dead_letters_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(RegistrationError, match="on_dead_letter='stop': say 'continue' or 'park'"):
        Registry("shop").on(Placed, on_dead_letter="stop")  # type: ignore[arg-type]


def test_a_plan_says_which_handlers_park_a_key() -> None:
    registry = Registry("shop")
    registry.on(Placed)(plain)
    registry.on(Placed, on_dead_letter="park")(takes_event)
    goes_on, parks = (handler.name for handler in registry.plans()["Placed"].handlers)
    plan = registry.plans()["Placed"]
    assert (plan.parks((parks,)), plan.parks((goes_on, parks)), plan.parks((goes_on,))) == (True, True, False)
    assert plan.parks(())  # none of them could run
