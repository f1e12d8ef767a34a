"""Which handlers an application has for which message, what runs around them, and what is checked when they are registered.

Owns the declarations of an application. Knows nothing of lanes, processes or transports; a worker asks it once for
`plans`, and runs those.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Final, Literal, TypeVar, get_args, overload

import msgspec
from msgspec.structs import replace

from shardbus.batching import BatchBy, Batching, batching
from shardbus.breaker import Breaker, Circuit
from shardbus.errors import RegistrationError
from shardbus.filters import Filter, Matches, as_filter
from shardbus.messages import Command, Event, Message, check_key_type, reply_type, wire_name
from shardbus.pipeline import Layer, Middleware, compose, layer
from shardbus.retry import Retry
from shardbus.signatures import (
    is_coroutine_function,
    is_stream_function,
    parameters_of,
    positional_count,
    shown,
    wants_context,
)
from shardbus.threads import THREADS_MAX, Threads

Handler = Callable[..., Any]
HandlerT = TypeVar("HandlerT", bound=Handler)
MiddlewareT = TypeVar("MiddlewareT", bound=Middleware)
Lifespan = Callable[["WorkerInfo"], AsyncIterator[None]]
OnDeadLetter = Literal["continue", "park"]
"""What a key's later events do when one of them became a dead letter: go on, or wait until that is disposed of."""

LifespanT = TypeVar("LifespanT", bound=Callable[..., AsyncIterator[None]])
SessionT = TypeVar("SessionT", bound=Callable[..., AsyncIterator[Any]])
StateOf = AsyncGenerator[Any, None]
"""The life of one session's state: yields it once, and goes on when the session has ended."""

IDLE_SECONDS: Final = 900.0

_ENCODE_REPLY: Final = msgspec.msgpack.Encoder().encode


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a lifespan learns of the worker that it runs in."""

    bus: str
    shard: int
    shards: int


class StateMaker(msgspec.Struct, frozen=True, kw_only=True):
    """How an application makes the state of a session in one worker, and how long that may be idle."""

    name: str
    make: Callable[[str], StateOf]
    idle_s: float


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
    where: Matches | None = None
    """Which messages concern it; None: all."""
    priority: int = 0
    in_thread: bool = False
    batching: Batching | None = None
    """How its events are put together; None: it takes one at a time."""
    streams: bool = False
    """It yields its reply, item by item; its `call` runs it to the end."""


class Plan:
    """All that a worker needs to run one message type: how to decode it, and what to call.

    `simple` is the handler itself where there is exactly one, for an event, `async def`, without context: the lanes await it
    directly, because that costs 62 ns and the general path three times as much. Otherwise it is None.
    `dies_at_once` says of such an event that whatever its handler raises makes it a dead letter, which parks nothing.
    `batching` is that of the handler, which then is the only one; `together` says that nothing has to be known of each event
    before it is called, so that a stretch of a publisher's batch may be handed over as it came.
    `concludes` says that something is to be done in the message's place in its lane after its last handler.
    `circuits` has one for each handler that asked for a breaker; they are this worker's.
    """

    __slots__ = (
        "_parking",
        "batching",
        "circuits",
        "concludes",
        "decode",
        "decode_all",
        "dies_at_once",
        "encode_reply",
        "handlers",
        "is_command",
        "message_type",
        "name",
        "simple",
        "streams",
        "together",
    )

    def __init__(self, message_type: type[Message], handlers: tuple[Registered, ...], *, concludes: bool = False) -> None:
        self.name = wire_name(message_type)
        self.message_type = message_type
        self.decode: Callable[[bytes], Any] = msgspec.msgpack.Decoder(message_type).decode
        self.decode_all: Callable[[bytes | memoryview], list[Any]] = msgspec.msgpack.Decoder(list[message_type]).decode  # type: ignore[valid-type]
        self.encode_reply: Callable[[Any], bytes] = _ENCODE_REPLY
        self.handlers = handlers
        self.concludes = concludes
        self.circuits = {one.name: Circuit(one.breaker) for one in handlers if one.breaker is not None}
        self.is_command = issubclass(message_type, Command)
        self.streams = any(one.streams for one in handlers)
        self._parking = frozenset(one.name for one in handlers if one.on_dead_letter == "park")
        only = handlers[0] if len(handlers) == 1 and not self.is_command else None
        is_plain = (
            only is not None
            and only.is_async
            and only.where is None
            and not (concludes or only.wants_context or only.timeout_s or only.breaker or only.batching)
        )
        self.batching = None if only is None else only.batching
        self.together = (
            only is not None
            and only.batching is not None
            and not concludes
            and not (only.batching.by_key or only.batching.linger_s or only.where or only.breaker)
        )
        self.simple: Callable[[Any], Awaitable[None]] | None = only.call if only is not None and is_plain else None
        self.dies_at_once = only is not None and is_plain and only.retry.attempts == 1 and not self._parking

    def parks(self, gave_up: tuple[str, ...]) -> bool:
        """Whether a dead letter parks its key: a handler that gave up asks for it, or any does, where none could run."""
        return bool(self._parking) and (not gave_up or not self._parking.isdisjoint(gave_up))


class Registry:
    """Handlers by message type. `Bus` is this, and the ways to run it.

    Args:
        name: the application's.
        threads_max: how many `in_thread` handlers run at a time in one worker.
    """

    def __init__(self, name: str, *, threads_max: int = THREADS_MAX) -> None:
        if not isinstance(name, str) or not name:
            raise RegistrationError("a bus needs a name, for instance Bus('shop')")
        if type(threads_max) is not int or threads_max < 1:
            raise RegistrationError(f"threads_max={threads_max!r}: a handler that asks for a thread needs at least one")
        self.name = name
        self._handlers: dict[type[Message], list[Registered]] = {}
        self._types: dict[str, type[Message]] = {}
        self._layers: list[Layer] = []
        self._threads = Threads(threads_max)
        self._lifespans: list[Callable[[WorkerInfo], contextlib.AbstractAsyncContextManager[None]]] = []
        self._session: tuple[Callable[..., StateOf], bool, float] | None = None  # whether it takes the worker, idle seconds

    def on(
        self,
        *event_types: type[Event],
        where: Filter | Callable[..., Any] | None = None,
        priority: int = 0,
        in_thread: bool = False,
        retry: Retry | None = None,
        timeout_s: float | None = None,
        breaker: Breaker | None = None,
        on_dead_letter: OnDeadLetter = "continue",
        batch: int | None = None,
        batch_by: BatchBy = "type",
        linger_s: float = 0.0,
    ) -> Callable[[HandlerT], HandlerT]:
        """Register an event handler: `@bus.on(OrderPlaced)`.

        The handler takes `(event)` or `(event, context)` and is `async def` or plain `def`. Handlers of one event run one
        after another, by priority, and of one priority in the order of their registration. One that fails is called again by
        its own policy, while those that succeeded are not; its key waits meanwhile, other keys go on.

        Args:
            *event_types: the event; or several, each as if it were registered alone.
            where: which events concern it: a filter of `shardbus.filters`, or a function of the event. It is asked in the
                worker, also before a retry. Others pass the handler by; an event that concerns none counts as handled. One
                that raises is this handler's failure, of which a breaker hears nothing.
            priority: among the handlers of one event, the higher runs first.
            in_thread: run a plain `def`, which blocks, in a thread of the worker, so that other keys go on. At most
                `Bus(threads_max=…)` run at a time. It has the context variables of whoever calls it. A thread cannot be
                cancelled: its key, and a worker that drains, wait for its end.
            retry: how often it is called for one event, and after which waits. Default: `Retry()`, three times.
            timeout_s: seconds after which the handler, with the middleware around it, is cancelled and has failed; only for
                `async def`. Default: none.
            breaker: when to stop calling a handler that keeps failing. Default: never.
            on_dead_letter: what becomes of the key when this handler gives one of its events up. `"continue"`: its later
                events go on. `"park"`: they wait in the store until that dead letter is redriven, and then runs first, or
                purged; commands to the key fail at once meanwhile. Of several handlers, those that gave up decide, and
                one that parks is enough; an event that does not decode parks where any of its handlers would. One whose
                deadline was over parks nothing, unless such a handler had given it up before: nothing has failed. Only for
                an event with a key: without one there are no later events.
            batch: call it with up to so many events at once, from 2 to 4,096: it takes `(events)` or `(events, contexts)`,
                both lists, and is the only handler of its type. It gets what is there, of many keys, each key's in order.
                It returns None, and all are handled; or a list with None or an exception for each event; or raises, and
                all have failed. Of a key, what stands behind an event that is called again is called again behind it,
                whatever was said of it. Where it raised, all are called again one by one. `retry` is for each event,
                `timeout_s` for the call; a breaker counts calls, of which one has failed where it raised or handled nothing.
            batch_by: `"key"`: all events of a batch have the same key.
            linger_s: wait so long for a batch to fill, from its first event on. Default: never wait.

        Raises:
            RegistrationError: no event type, or what is none, a key that cannot be one, a name that another type has, a
                signature that cannot be called so or is for another type, or options that make no sense.
        """
        kinds = event_types
        if not kinds:
            raise RegistrationError("@bus.on() names no event; write @bus.on(EventType)")
        for kind in kinds:
            if not (isinstance(kind, type) and issubclass(kind, Event) and kind is not Event):
                raise RegistrationError(f"@bus.on takes a subclass of Event, not {shown(kind)}; write @bus.on(EventType)")
        if on_dead_letter not in get_args(OnDeadLetter):
            raise RegistrationError(f"on_dead_letter={on_dead_letter!r}: say 'continue' or 'park'")
        for kind in kinds:
            if on_dead_letter == "park" and kind.__shardbus_key__ is None:
                raise RegistrationError(
                    f"{kind.__name__} has no key that on_dead_letter='park' could park; declare one with key=…"
                )
        _check_policy("retry", retry, Retry, "attempts", 3)
        _check_policy("breaker", breaker, Breaker, "failures", 5)
        together = batching(batch, batch_by, linger_s)
        if together is not None:
            for kind in kinds:
                if together.by_key and kind.__shardbus_key__ is None:
                    raise RegistrationError(f"{kind.__name__} has no key for batch_by='key'; declare one with key=…")
                for one in self._layers:
                    if one.is_for(kind) and not one.skip_batches:
                        raise _no_middleware(kind, one)
        if type(priority) is not int:
            raise RegistrationError(f"priority={priority!r}: write a whole number; the higher runs first")
        matches = None if where is None else as_filter(where)
        if matches is not None:
            for kind in kinds:
                matches.check(kind)
        return self._registrar(
            kinds,
            _Options(
                retry=retry or Retry(),
                timeout_s=timeout_s,
                breaker=breaker,
                on_dead_letter=on_dead_letter,
                where=None if matches is None else matches.matches,
                priority=priority,
                in_thread=in_thread,
                batching=together,
            ),
        )

    def command(
        self, command_type: type[Command[Any]], *, in_thread: bool = False, timeout_s: float | None = None
    ) -> Callable[[HandlerT], HandlerT]:
        """Register the one handler of a command: `@bus.command(GetTotal)`. What it returns is the reply.

        One that yields (an `async def` generator) streams its reply to `client.stream(…)`, each item a `ReplyT` of the
        `Command[ReplyT]`. It is not advanced beyond what its reader takes, and closed when that leaves. Its key waits for
        as long as it runs.

        Args:
            command_type: the command.
            in_thread: as for `on`.
            timeout_s: seconds after which the handler is cancelled, whatever its caller would wait. Default: none.

        Raises:
            RegistrationError: as for `on`, or the command has a handler already.
        """
        if not (isinstance(command_type, type) and issubclass(command_type, Command) and command_type is not Command):
            raise RegistrationError(
                f"@bus.command takes a subclass of Command, not {shown(command_type)}; write @bus.command(CommandType)"
            )
        return self._registrar(
            (command_type,), _Options(retry=Retry(attempts=1), timeout_s=timeout_s, in_thread=in_thread)
        )

    def use(
        self,
        middleware: MiddlewareT,
        *,
        on: type[Message] | tuple[type[Message], ...] = (),
        skip_batches: bool = False,
    ) -> MiddlewareT:
        """Put a middleware around the handlers: `bus.use(Logging())`, or `@bus.use` on a function. The first is outermost.

        A middleware is `async def middleware(message, context, call_next)`. It is called for each call of a handler, so
        again for a retry and for each handler of an event, and goes on with `await call_next(message, context)`, which
        returns what the handler does: of a command, the reply. It may hand on another message, or another context
        (`context.with_headers(…)`), which what is further in gets; return something else; or not call `call_next`, and then
        the handler counts as having succeeded. What it raises is the handler's failure. `call_next.handler` is the name of
        the handler. A handler that a filter keeps from an event is not called, and so neither is what is around it.

        It applies to all handlers, whenever they are registered, of a bus that starts later. Each worker has its own.

        Args:
            middleware: an `async def`, or an object that is called as one.
            on: message types, and subclasses, that it is for. Default: all.
            skip_batches: leave out those with a batch handler, of which there is no call for a single message; else it is
                refused where it is for one.

        Raises:
            RegistrationError: it cannot be called so, is used already, or `on` names what is no message type; or it is for a
                type with a batch handler, of which there is no call for a single message.
        """
        made = layer(middleware, on, skip_batches=skip_batches)
        for kind, handlers in self._handlers.items():
            if made.is_for(kind) and not skip_batches and any(one.batching is not None for one in handlers):
                raise _no_middleware(kind, made)
        if any(known.middleware is middleware for known in self._layers):
            raise RegistrationError(f"{shown(middleware)} is used already; name all its types at once: on=(A, B)")
        self._layers.append(made)
        return middleware

    def lifespan(self, function: LifespanT) -> LifespanT:
        """Register what opens before a worker's first message and closes after its last: an async generator function.

        It takes a `WorkerInfo`, or nothing, and yields once. Several open in order and close in reverse. What is raised
        meanwhile, in the block of `bus.local()` for instance, or a cancellation, is not raised at the `yield`: they close
        as usual.
        """
        is_lifespan: bool = inspect.isasyncgenfunction(function)
        if not is_lifespan:
            raise RegistrationError(f"@bus.lifespan takes an `async def` that yields once, not {shown(function)}")
        takes = positional_count(function)
        if not (takes[0] <= 1 and takes[1] >= 0):
            raise RegistrationError(f"{shown(function)}: a lifespan takes (worker) or nothing")
        manager: Callable[..., contextlib.AbstractAsyncContextManager[None]] = contextlib.asynccontextmanager(function)
        self._lifespans.append(manager if takes[1] >= 1 else lambda _worker: manager())
        return function

    @overload
    def session(self, function: SessionT, /) -> SessionT: ...

    @overload
    def session(self, function: None = None, /, *, idle_seconds: float = IDLE_SECONDS) -> Callable[[SessionT], SessionT]: ...

    def session(
        self, function: SessionT | None = None, /, *, idle_seconds: float = IDLE_SECONDS
    ) -> SessionT | Callable[[SessionT], SessionT]:
        """Register what makes a session's state in its worker, and ends it: an async generator function that yields it once.

        It takes the session's key, a text, or that and a `WorkerInfo`. A handler of a message with the key has the state of
        `await context.session()`, which makes it where there is none: if that raises, so has the handler, and the next call
        begins anew. Nothing else of the key runs while the state is made, used or ended.

        What stands behind the `yield` runs once the session has ended: after the handlers of its last `SessionEnded`, or
        where the worker drains, for all sessions together within 10 seconds. What it raises is logged. It does not run in
        the task in which the state was made, so no `TaskGroup` or `timeout` may be open around the `yield`. A worker that
        dies runs none: the state is a cache, and its successor makes it again.

        Args:
            function: what is registered.
            idle_seconds: a session ends for which nobody has asked for so long, since it was opened or a handler called
                `context.session()`: the worker publishes its `SessionEnded`, with the reason `"idle"`. A worker has at most
                65,536 sessions; above that, the one that is idle for longest ends.

        Raises:
            RegistrationError: it cannot be called so, does not yield, the application has a session's state already, or
                `idle_seconds` is not a number above 0.
        """
        is_number = isinstance(idle_seconds, int | float) and not isinstance(idle_seconds, bool)
        if not (is_number and 0 < idle_seconds < math.inf):
            raise RegistrationError(f"idle_seconds={idle_seconds!r}: write seconds above 0, for instance idle_seconds=900.0")

        def register(function: SessionT) -> SessionT:
            is_generator: bool = inspect.isasyncgenfunction(function)
            if not is_generator:
                raise RegistrationError(
                    f"@bus.session takes an `async def` that yields the session's state once, not {shown(function)}"
                )
            least, most = positional_count(function)
            if least > 2 or most < 1:
                raise RegistrationError(f"{shown(function)}: a session's state is made from (session) or (session, worker)")
            if self._session is not None:
                raise RegistrationError(
                    f"{shown(function)}: {shown(self._session[0])} makes the state of this application's sessions; they "
                    "have one, which may hold several things"
                )
            made: Any = function
            self._session = (made, most >= 2, float(idle_seconds))
            return function

        return register if function is None else register(function)

    def session_states(self, worker: WorkerInfo) -> StateMaker | None:
        """How a worker makes the states of its sessions; None: they have none."""
        if self._session is None:
            return None
        function, takes_worker, idle_s = self._session
        make = (lambda key: function(key, worker)) if takes_worker else function
        return StateMaker(name=shown(function), make=make, idle_s=idle_s)

    @contextlib.asynccontextmanager
    async def running(self, worker: WorkerInfo) -> AsyncIterator[None]:
        """Open all lifespans, and close them in reverse. What the block raises is nothing that they would hear of."""
        async with contextlib.AsyncExitStack() as stack:
            for lifespan in self._lifespans:
                await stack.enter_async_context(_deaf(lifespan(worker)))
            stack.enter_context(self._threads.open())  # closed first: what runs there uses what was opened
            yield

    def plans(self) -> dict[str, Plan]:
        """A plan for each message type that has a handler, by its name on the wire."""
        return {wire_name(kind): self._plan(kind, handlers) for kind, handlers in self._handlers.items()}

    def _plan(self, message_type: type[Message], handlers: list[Registered]) -> Plan:
        batched = any(one.batching is not None for one in handlers)
        layers = tuple(
            one for one in self._layers if one.is_for(message_type) and not (batched and one.skip_batches)
        )
        in_turn = sorted(handlers, key=lambda one: -one.priority)  # stable: of one priority as registered
        return Plan(message_type, tuple(self._composed(one, layers) for one in in_turn))

    def _composed(self, handler: Registered, layers: tuple[Layer, ...]) -> Registered:
        """The handler with what runs around it; itself where that is nothing."""
        if not layers and not handler.in_thread and not handler.streams:
            return handler
        call = compose(
            handler.call,
            name=handler.name,
            is_async=handler.is_async,
            wants_context=handler.wants_context,
            layers=layers,
            threads=self._threads if handler.in_thread else None,
            streams=handler.streams,
        )
        return replace(handler, call=call, is_async=True, wants_context=True)

    def _registrar(self, kinds: tuple[type[Message], ...], options: _Options) -> Callable[[HandlerT], HandlerT]:
        timeout_s = options.timeout_s
        if timeout_s is not None and (isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float)):
            raise RegistrationError(f"timeout_s={timeout_s!r}: write seconds as a number, for instance timeout_s=10.0")
        types = dict(self._types)
        for kind in kinds:
            check_key_type(kind)
            name = wire_name(kind)
            known = types.get(name)
            if known is not None and known is not kind:
                raise RegistrationError(
                    f"two message types have the name {name!r}: {_place(known)} and {_place(kind)}; "
                    "give one of them another with name=…"
                )
            types[name] = kind
        if len(set(kinds)) < len(kinds):
            raise RegistrationError("@bus.on names a type twice")

        def register(function: HandlerT) -> HandlerT:
            made = [self._registered(function, kind, options) for kind in kinds]  # before any is kept: all, or none
            for kind, registered in zip(kinds, made, strict=True):
                self._types[wire_name(kind)] = kind
                self._handlers.setdefault(kind, []).append(registered)
            return function

        return register

    def _registered(self, function: Handler, message_type: type[Message], options: _Options) -> Registered:
        handlers = self._handlers.get(message_type, [])
        if handlers and issubclass(message_type, Command):
            raise RegistrationError(
                f"{message_type.__name__} has a handler already ({handlers[0].name}); a command has exactly one"
            )
        if handlers and (options.batching is not None or handlers[0].batching is not None):
            raise RegistrationError(
                f"{message_type.__name__} has the handler {handlers[0].name}; a batch handler is the only one of its type, "
                "because what one of several has failed with is retried while the others are not"
            )
        call = _inspect(function, message_type, takes_batch=options.batching is not None)
        timeout_s = options.timeout_s
        if options.in_thread and (call.is_async or timeout_s is not None):
            why = "an `async def` needs no thread" if call.is_async else "it cannot be cancelled there; drop timeout_s"
            raise RegistrationError(f"{shown(function)}: in_thread=True is for a plain `def` without a time-out: {why}")
        if timeout_s is not None and not (timeout_s > 0 and call.is_async):
            why = "a time is above 0" if call.is_async else "a plain `def` cannot be cancelled; make it `async def`"
            raise RegistrationError(f"{shown(function)}: timeout_s={timeout_s:g}: {why}")
        if issubclass(message_type, Command):
            _check_reply(message_type)
        return Registered(
            name=_unique(call.name, {handler.name for handler in handlers}),
            call=function,
            is_async=call.is_async,
            wants_context=call.wants_context,
            retry=options.retry,
            timeout_s=timeout_s,
            breaker=options.breaker,
            on_dead_letter=options.on_dead_letter,
            where=options.where,
            priority=options.priority,
            in_thread=options.in_thread,
            batching=options.batching,
            streams=call.streams,
        )


class _Options(msgspec.Struct, frozen=True, kw_only=True):
    """What was said of a handler where it was registered."""

    retry: Retry
    timeout_s: float | None = None
    breaker: Breaker | None = None
    on_dead_letter: OnDeadLetter = "continue"
    where: Matches | None = None
    priority: int = 0
    in_thread: bool = False
    batching: Batching | None = None


class _Call(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    is_async: bool
    wants_context: bool
    streams: bool


def _unique(name: str, taken: set[str]) -> str:
    """A name that none of `taken` is: functions made in a loop, or lambdas, share theirs."""
    number = 1
    while (candidate := name if number == 1 else f"{name}#{number}") in taken:
        number += 1
    return candidate


def _inspect(function: Handler, message_type: type[Message], *, takes_batch: bool) -> _Call:
    told = shown(function)
    takes = "(events) or (events, contexts)" if takes_batch else "(message) or (message, context)"
    whose = "a batch handler" if takes_batch else "a handler"
    if not callable(function):
        raise RegistrationError(f"{told} is not callable; {whose} is a function of {takes}")
    streams = is_stream_function(function)
    if (streams and not issubclass(message_type, Command)) or inspect.isgeneratorfunction(function):
        hint = "; to stream a reply, make it `async def`" if issubclass(message_type, Command) else ""
        raise RegistrationError(f"{told} yields; a handler of {message_type.__name__} returns{hint}")
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    least, most = positional_count(function)
    if least > 2 or most < 1:
        found = ", ".join(parameter.name for parameter in parameters_of(function))
        raise RegistrationError(f"{whose} takes {takes}, and {name} takes ({found})")
    wanted = _annotated_message(function, message_type)
    if takes_batch and (wanted is not None or parameters_of(function)[0].annotation == message_type.__name__):
        one = message_type.__name__ if wanted is None else wanted.__name__
        raise RegistrationError(f"{name} takes one {one}; a batch handler takes list[{one}]")
    if wanted is not None and not issubclass(message_type, wanted):
        raise RegistrationError(
            f"{name} takes {wanted.__name__}, but is registered for {message_type.__name__}; change one of the two"
        )
    is_async = streams or is_coroutine_function(function)
    return _Call(name=name, is_async=is_async, wants_context=wants_context(function), streams=streams)


def _no_middleware(kind: type[Message], one: Layer) -> RegistrationError:
    return RegistrationError(
        f"{kind.__name__} has a batch handler, and the middleware {shown(one.middleware)} is called for one message at a "
        "time; say bus.use(…, skip_batches=True) to have it around all others, or name its types: bus.use(…, on=(Type, …))"
    )


def _annotated_message(function: Handler, message_type: type[Message]) -> type[Message] | None:
    """The one message class that a handler says it takes; None: it says nothing, or nothing so plain.

    An annotation that is text is looked up in the handler's module. Where the text is the name of the registered type it is
    taken for that: a class inside a function is not found there, and one of its name may be.
    """
    first = parameters_of(function)[0]
    annotation = first.annotation
    if isinstance(annotation, str) and annotation != message_type.__name__:
        annotation = getattr(function, "__globals__", {}).get(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Message) else None


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


def _place(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@contextlib.asynccontextmanager
async def _deaf(manager: contextlib.AbstractAsyncContextManager[None]) -> AsyncIterator[None]:
    """A context that closes as if nothing had been raised in it: a lifespan need not expect that at its `yield`.

    Nor a cancellation. A `TaskGroup` of its own one of whose tasks has failed knows without that it has cancelled, and
    raises what that came of; `asyncio.timeout` does not, so around a `yield` it ends what runs there as a cancellation.
    """
    await manager.__aenter__()
    try:
        yield
    finally:
        await manager.__aexit__(None, None, None)
