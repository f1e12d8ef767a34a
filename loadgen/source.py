"""What is sent: keys and sizes made into messages, of the demo application or of a type that only its name is known of.

A message type of the user's own is made here from its name and fields, so nothing of the application is imported: what
travels is a name, a key and a body, and those are the same.
"""

from __future__ import annotations

import random
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgspec
from msgspec.structs import replace

from loadgen.spec import LoadError, LoadSpec, Template
from loadgen.workload import Sizes, Stretch, Workload, workload_of
from shardbus import Command, Event
from shardbus.demo import GetCount, Tick

_HOLE: Final = re.compile(r"\{(key|n|payload)\}")
_BASES: Final[dict[str, tuple[type, ...]]] = {"event": (Event,), "command": (Command[Any],)}
_KEY_NUMBER: Final = re.compile(r"\d+")


class Load(msgspec.Struct, frozen=True):
    """Consecutive messages, and each one's number among those of its key."""

    messages: list[Any]
    ordinals: Sequence[int]


class Source(Protocol):
    """Messages, as many as are asked for, until there are no more."""

    def take(self, count: int) -> Load:
        """The next messages: at most `count`, none at the end. Fewer are no sign of it; ask again."""


class Made:
    """Messages made from a workload's keys by `make`; they never end."""

    def __init__(self, workload: Workload, make: Callable[[Stretch], list[Any]]) -> None:
        self._workload = workload
        self._make = make

    def take(self, count: int) -> Load:
        """See `Source.take`."""
        stretch = self._workload.take(count)
        return Load(self._make(stretch), stretch.ordinals)


def ticks(sizes: Sizes, pool: bytes) -> Callable[[Stretch], list[Any]]:
    """Makes the demo's events, with payloads from `pool`."""
    # `replace` builds an event in 90 ns. Calling the class takes 400 on Python 3.11, because a class whose metaclass
    # is written in Python is called without vectorcall there.
    template = Tick(key="", payload=pool[: sizes.fixed or 0])

    def same(stretch: Stretch) -> list[Any]:
        return [replace(template, key=key, n=n) for n, key in enumerate(stretch.keys, stretch.first)]

    def sized(stretch: Stretch) -> list[Any]:
        numbers = range(stretch.first, stretch.first + len(stretch))
        columns = zip(stretch.keys, numbers, sizes.take(len(stretch)), strict=True)
        return [replace(template, key=key, n=n, payload=pool[:size]) for key, n, size in columns]

    return same if sizes.fixed is not None else sized


def questions(stretch: Stretch) -> list[Any]:
    """The demo's commands."""
    return [GetCount(key=key) for key in stretch.keys]


def filled(template: Template, kind: str, sizes: Sizes, pool: str) -> Callable[[Stretch], list[Any]]:
    """Makes messages of the user's own from a template.

    In the body, a text `{key}`, `{n}` (the number of the message, from 0) or `{payload}` stands for that value; within a
    longer text it stands for its digits or letters. The key's field need not be in the body.

    Raises:
        LoadError: the template cannot be made into a message.
    """
    body = {template.key: "{key}", **template.body}
    key_class = _KEY_CLASSES[template.key_type]
    message_type = make_type(template.type, template.key, list(body), kind=kind, key_class=key_class)
    names = dict(zip(body, message_type.__struct_fields__, strict=True))
    fields = {names[field]: _compiled(value) for field, value in body.items()}
    changing = {name: fill for name, fill in fields.items() if callable(fill)}
    start = message_type(**{name: None if name in changing else value for name, value in fields.items()})
    number_keys = template.key_type == "int"

    def make(stretch: Stretch) -> list[Any]:
        made = []
        for n, key, size in zip(
            range(stretch.first, stretch.first + len(stretch)), stretch.keys, sizes.take(len(stretch)), strict=True
        ):
            values = {"key": int(_digits(key)) if number_keys else key, "n": n, "payload": pool[:size]}
            made.append(replace(start, **{name: fill(values) for name, fill in changing.items()}))
        return made

    return make


_KEY_CLASSES: Final[dict[str, type]] = {"str": str, "int": int}


def _digits(key: str) -> str:
    return "".join(_KEY_NUMBER.findall(key))


def _compiled(value: Any) -> Any:
    """A value of a template: itself, or a function of what fills its holes."""
    if isinstance(value, str):
        names = _HOLE.findall(value)
        if not names:
            return value
        if value == "{%s}" % names[0]:  # noqa: UP031 - braces in a format need more braces
            return lambda values, name=names[0]: values[name]
        return lambda values: _HOLE.sub(lambda hole: str(values[hole[1]]), value)
    if isinstance(value, dict):
        inner = {name: _compiled(part) for name, part in value.items()}
        if not any(map(callable, inner.values())):
            return value
        return lambda values: {name: part(values) if callable(part) else part for name, part in inner.items()}
    if isinstance(value, list):
        parts = [_compiled(part) for part in value]
        if not any(map(callable, parts)):
            return value
        return lambda values: [part(values) if callable(part) else part for part in parts]
    return value


def make_type(name: str, key: str, fields: Sequence[str], *, kind: str = "event", key_class: type = str) -> Any:
    """A message type with these fields of any value, as its application would declare it.

    Args:
        name: on the wire.
        key: which field holds the key.
        fields: their names on the wire, in any spelling. The attributes are `f0`, `f1`, … in this order.
        kind: `event` or `command`.
        key_class: what the keys are.

    Raises:
        LoadError: there can be no such type.
    """
    if key not in fields:
        raise LoadError(f"the key's field {key!r} is none of {', '.join(map(repr, fields)) or 'nothing'}")
    attributes = {field: f"f{at}" for at, field in enumerate(fields)}
    annotations: dict[str, Any] = dict.fromkeys(attributes.values(), Any)
    annotations[attributes[key]] = key_class
    namespace: dict[str, Any] = {"__annotations__": annotations, "__module__": __name__}
    namespace |= {attribute: msgspec.UNSET for attribute in attributes.values() if attribute != attributes[key]}
    rename = {attribute: field for field, attribute in attributes.items()}
    try:
        return types.new_class(
            "Loaded",
            _BASES[kind],
            {"key": attributes[key], "name": name, "rename": rename},
            lambda body: body.update(namespace),
        )
    except (TypeError, ValueError) as error:
        raise LoadError(f"no message {name!r} can be made: {error}") from None


def made(spec: LoadSpec, driver: int) -> Source:
    """What one driver of a run without a recording sends."""
    seed = spec.seed + driver
    sizes = Sizes(spec.payload, seed)
    workload = workload_of(spec, driver)
    if spec.template is not None:
        kind = "command" if spec.commands else "event"
        return Made(workload, filled(spec.template, kind, sizes, "x" * sizes.largest))
    if spec.commands:
        return Made(workload, questions)
    return Made(workload, ticks(sizes, _random_bytes(seed, sizes.largest)))


def _random_bytes(seed: int, count: int) -> bytes:
    return random.Random(seed).randbytes(count)
