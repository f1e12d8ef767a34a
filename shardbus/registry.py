"""Which handlers an application has for which message, and what is checked when they are registered.

Owns the declarations of an application. Knows nothing of lanes, processes or transports; a worker asks it once for
`plans`, and runs those.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Literal, TypeVar, get_args

import msgspec

from shardbus.breaker import Breaker, Circuit
from shardbus.errors import RegistrationError
from shardbus.messages import Command, Event, Message, check_key_type, reply_type, wire_name
from shardbus.retry import Retry

Handler = Callable[..., Any]
HandlerT = TypeVar("HandlerT", bound=Handler)
Lifespan = Callable[["WorkerInfo"], AsyncIterator[None]]
OnDeadLetter = Literal["continue", "park"]
"""What a key's later events do when one of them became a dead letter: go on, or wait until that is disposed of."""

LifespanT = TypeVar("LifespanT", bound=Callable[..., AsyncIterator[None]])

_ENCODE_REPLY: Final = msgspec.msgpack.Encoder().encode


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a lifespan learns of the worker that it runs in."""

    bus: str
    shard: int
    shards: int


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """One handler of one message type, and what is done when it fails.

    `name` is unique among the handlers of its type, and the same after a restart: attempts and dead letters refer to it.
    """

    name: str
    call: Handler
    is_async: bool
    wants_context: bool
    retry: Retry
    timeout_s: float | None
    breaker: Breaker | None
    on_dead_letter: OnDeadLetter = "continue"


class Plan:
    """All that a worker needs to run one message type: how to decode it, and what to call.

    `simple` is the handler itself where there is exactly one, for an event, `async def`, without context: the lanes await it
    directly, because that costs 62 ns and the general path three times as much. Otherwise it is None.
    `circuits` has one for each handler that asked for a breaker; they are this worker's.
    """

    __slots__ = (
        "_parking",
        "circuits",
        "decode",
        "decode_all",
        "encode_reply",
        "handlers",
        "is_command",
        "message_type",
        "name",
        "simple",
    )

    def __init__(self, message_type: type[Message], handlers: tuple[Registered, ...]) -> None:
        self.name = wire_name(message_type)
        self.message_type = message_type
        self.decode: Callable[[bytes], Any] = msgspec.msgpack.Decoder(message_type).decode
        self.decode_all: Callable[[bytes | memoryview], list[Any]] = msgspec.msgpack.Decoder(list[message_type]).decode  # type: ignore[valid-type]
        self.encode_reply: Callable[[Any], bytes] = _ENCODE_REPLY
        self.handlers = handlers
        self.circuits = {one.name: Circuit(one.breaker) for one in handlers if one.breaker is not None}
        self.is_command = issubclass(message_type, Command)
        self._parking = frozenset(one.name for one in handlers if one.on_dead_letter == "park")
        only = handlers[0] if len(handlers) == 1 and not self.is_command else None
        is_plain = only is not None and not (only.wants_context or only.timeout_s or only.breaker) and only.is_async
        self.simple: Callable[[Any], Awaitable[None]] | None = only.call if only is not None and is_plain else None

    def parks(self, gave_up: tuple[str, ...]) -> bool:
        """Whether a dead letter parks its key: a handler that gave up asks for it, or any does, where none could run."""
        return bool(self._parking) and (not gave_up or not self._parking.isdisjoint(gave_up))


class Registry:
    """Handlers by message type. `Bus` is this, and the ways to run it."""

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise RegistrationError("a bus needs a name, for instance Bus('shop')")
        self.name = name
        self._handlers: dict[type[Message], list[Registered]] = {}
        self._types: dict[str, type[Message]] = {}
        self._lifespans: list[Callable[[WorkerInfo], contextlib.AbstractAsyncContextManager[None]]] = []

    def on(
        self,
        event_type: type[Event],
        *,
        retry: Retry | None = None,
        timeout_s: float | None = None,
        breaker: Breaker | None = None,
        on_dead_letter: OnDeadLetter = "continue",
    ) -> Callable[[HandlerT], HandlerT]:
        """Register an event handler: `@bus.on(OrderPlaced)`.

        The handler takes `(event)` or `(event, context)` and is `async def` or plain `def`. Handlers of one event run one
        after another, in the order of their registration. One that fails is called again by its own policy, while those
        that succeeded are not; its key waits meanwhile, other keys go on.

        Args:
            event_type: the event.
            retry: how often it is called for one event, and after which waits. Default: `Retry()`, three times.
            timeout_s: seconds after which the handler is cancelled and has failed; only for `async def`. Default: none.
            breaker: when to stop calling a handler that keeps failing. Default: never.
            on_dead_letter: what becomes of the key when this handler gives one of its events up. `"continue"`: its later
                events go on. `"park"`: they wait in the store until that dead letter is redriven, and then runs first, or
                purged; commands to the key fail at once meanwhile. Of several handlers, those that gave up decide, and
                one that parks is enough; an event that does not decode parks where any of its handlers would. Only for an
                event with a key: without one there are no later events.

        Raises:
            RegistrationError: not an event type, a key that cannot be one, a name that another type has, a signature
                that cannot be called so or is for another type, or options that make no sense.
        """
        if not (isinstance(event_type, type) and issubclass(event_type, Event) and event_type is not Event):
            raise RegistrationError(
                f"@bus.on takes a subclass of Event, not {_shown(event_type)}; write @bus.on(EventType)"
            )
        if on_dead_letter not in get_args(OnDeadLetter):
            raise RegistrationError(f"on_dead_letter={on_dead_letter!r}: say 'continue' or 'park'")
        if on_dead_letter == "park" and event_type.__shardbus_key__ is None:
            raise RegistrationError(
                f"{event_type.__name__} has no key that on_dead_letter='park' could park; declare one with key=…"
            )
        _check_policy("retry", retry, Retry, "attempts", 3)
        _check_policy("breaker", breaker, Breaker, "failures", 5)
        return self._registrar(event_type, retry or Retry(), timeout_s, breaker, on_dead_letter)

    def command(
        self, command_type: type[Command[Any]], *, timeout_s: float | None = None
    ) -> Callable[[HandlerT], HandlerT]:
        """Register the one handler of a command: `@bus.command(GetTotal)`. What it returns is the reply.

        Args:
            command_type: the command.
            timeout_s: seconds after which the handler is cancelled, whatever its caller would wait. Default: none.

        Raises:
            RegistrationError: as for `on`, or the command has a handler already.
        """
        if not (isinstance(command_type, type) and issubclass(command_type, Command) and command_type is not Command):
            raise RegistrationError(
                f"@bus.command takes a subclass of Command, not {_shown(command_type)}; write @bus.command(CommandType)"
            )
        return self._registrar(command_type, Retry(attempts=1), timeout_s, None, "continue")

    def lifespan(self, function: LifespanT) -> LifespanT:
        """Register what opens before a worker's first message and closes after its last: an async generator function.

        It takes a `WorkerInfo`, or nothing, and yields once. Several open in order and close in reverse.
        """
        is_lifespan: bool = inspect.isasyncgenfunction(function)
        if not is_lifespan:
            raise RegistrationError(f"@bus.lifespan takes an `async def` that yields once, not {_shown(function)}")
        takes = _positional_count(function)
        if not (takes[0] <= 1 and takes[1] >= 0):
            raise RegistrationError(f"{_shown(function)}: a lifespan takes (worker) or nothing")
        manager: Callable[..., contextlib.AbstractAsyncContextManager[None]] = contextlib.asynccontextmanager(function)
        self._lifespans.append(manager if takes[1] >= 1 else lambda _worker: manager())
        return function

    @contextlib.asynccontextmanager
    async def running(self, worker: WorkerInfo) -> AsyncIterator[None]:
        """Open all lifespans, and close them in reverse."""
        async with contextlib.AsyncExitStack() as stack:
            for lifespan in self._lifespans:
                await stack.enter_async_context(lifespan(worker))
            yield

    def plans(self) -> dict[str, Plan]:
        """A plan for each message type that has a handler, by its name on the wire."""
        return {wire_name(kind): Plan(kind, tuple(handlers)) for kind, handlers in self._handlers.items()}

    def _registrar(
        self,
        message_type: type[Message],
        retry: Retry,
        timeout_s: float | None,
        breaker: Breaker | None,
        on_dead_letter: OnDeadLetter,
    ) -> Callable[[HandlerT], HandlerT]:
        check_key_type(message_type)
        if timeout_s is not None and (isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float)):
            raise RegistrationError(f"timeout_s={timeout_s!r}: write seconds as a number, for instance timeout_s=10.0")
        name = wire_name(message_type)
        known = self._types.get(name)
        if known is not None and known is not message_type:
            raise RegistrationError(
                f"two message types have the name {name!r}: {_place(known)} and {_place(message_type)}; "
                "give one of them another with name=…"
            )

        def register(function: HandlerT) -> HandlerT:
            handlers = self._handlers.get(message_type, [])
            if handlers and issubclass(message_type, Command):
                raise RegistrationError(
                    f"{message_type.__name__} has a handler already ({handlers[0].name}); a command has exactly one"
                )
            call = _inspect(function, message_type)
            if timeout_s is not None and not (timeout_s > 0 and call.is_async):
                why = "a time is above 0" if call.is_async else "a plain `def` cannot be cancelled; make it `async def`"
                raise RegistrationError(f"{_shown(function)}: timeout_s={timeout_s:g}: {why}")
            registered = Registered(
                name=_unique(call.name, {handler.name for handler in handlers}),
                call=function,
                is_async=call.is_async,
                wants_context=call.wants_context,
                retry=retry,
                timeout_s=timeout_s,
                breaker=breaker,
                on_dead_letter=on_dead_letter,
            )
            if issubclass(message_type, Command):
                _check_reply(message_type)
            self._types[name] = message_type
            self._handlers.setdefault(message_type, []).append(registered)
            return function

        return register


class _Call(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    is_async: bool
    wants_context: bool


def _unique(name: str, taken: set[str]) -> str:
    """A name that none of `taken` is: functions made in a loop, or lambdas, share theirs."""
    number = 1
    while (candidate := name if number == 1 else f"{name}#{number}") in taken:
        number += 1
    return candidate


def _inspect(function: Handler, message_type: type[Message]) -> _Call:
    shown = _shown(function)
    if not callable(function):
        raise RegistrationError(f"{shown} is not callable; a handler is a function of (message) or (message, context)")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise RegistrationError(f"{shown} yields; a handler of {message_type.__name__} returns")
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    least, most = _positional_count(function)
    if least > 2 or most < 1:
        found = ", ".join(inspect.signature(function).parameters)
        raise RegistrationError(f"a handler takes (message) or (message, context), and {name} takes ({found})")
    wanted = _annotated_message(function, message_type)
    if wanted is not None and not issubclass(message_type, wanted):
        raise RegistrationError(
            f"{name} takes {wanted.__name__}, but is registered for {message_type.__name__}; change one of the two"
        )
    target = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004 - the method itself is inspected
    return _Call(
        name=name,
        is_async=inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(target),
        wants_context=_wants_context(function, least, most),
    )


def _annotated_message(function: Handler, message_type: type[Message]) -> type[Message] | None:
    """The one message class that a handler says it takes; None: it says nothing, or nothing so plain.

    An annotation that is text is looked up in the handler's module. Where the text is the name of the registered type it is
    taken for that: a class inside a function is not found there, and one of its name may be.
    """
    first = next(iter(inspect.signature(function).parameters.values()))
    annotation = first.annotation
    if isinstance(annotation, str) and annotation != message_type.__name__:
        annotation = getattr(function, "__globals__", {}).get(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Message) else None


def _wants_context(function: Handler, least: int, most: int) -> bool:
    """A second positional parameter is the context, unless it has a default and another name."""
    if most < 2:
        return False
    if least == 2:
        return True
    parameters = list(inspect.signature(function).parameters.values())
    return len(parameters) > 1 and parameters[1].name == "context"


def _positional_count(function: Handler) -> tuple[int, int]:
    """How many positional arguments a callable needs at least, and takes at most."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise RegistrationError(f"{_shown(function)}: its signature cannot be read") from error
    least = most = 0
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            least += parameter.default is parameter.empty
        elif parameter.kind is parameter.VAR_POSITIONAL:
            most += 2
        elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise RegistrationError(f"{_shown(function)}: the keyword-only parameter {parameter.name!r} has no default")
    return least, most


def _check_policy(option: str, value: object, kind: type[Retry | Breaker], count: str, usual: int) -> None:
    """Refuse what is no policy; a plain number is most likely meant as its `count`."""
    if value is not None and not isinstance(value, kind):
        number = value if type(value) is int and value > 0 else usual
        told = f"write {option}={kind.__name__}({count}={number})"
        raise RegistrationError(f"{option}={value!r} is no {kind.__name__}; {told}")


def _check_reply(command_type: type[Command[Any]]) -> None:
    try:
        msgspec.msgpack.Decoder(reply_type(command_type))
    except TypeError as error:
        raise RegistrationError(f"{command_type.__name__}: its reply cannot travel: {error}") from error


def _shown(thing: object) -> str:
    return f"{getattr(thing, '__qualname__', None) or repr(thing)}"


def _place(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
