"""What travels: events and commands, typed, frozen, each with a name on the wire and perhaps a key.

Owns the declaration of messages and the normal form of keys. Knows nothing of routing, sessions or handlers.
"""

from __future__ import annotations

import operator
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Final, Generic, TypeVar, dataclass_transform
from uuid import UUID

import msgspec

from shardbus.config import DEFAULT_LIMITS
from shardbus.errors import InvalidKey, RegistrationError

ReplyT = TypeVar("ReplyT")

WireKey = str | int | bytes | tuple[bytes] | None
"""A key as it travels: a UUID becomes a 1-tuple of its 16 bytes, so that it equals no `bytes` key; None: no key."""

_INT_MIN: Final = -(2**63)
_INT_MAX: Final = 2**64 - 1


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class MessageMeta(msgspec.StructMeta):
    """Adds the class keywords `key=` (a field's name), `name=` (the name on the wire) and, for commands, `idempotent=`
    to `msgspec.Struct`.
    """

    def __new__(
        mcls,
        class_name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        key: str | None = None,
        name: str | None = None,
        idempotent: bool | None = None,
        **options: Any,
    ) -> Any:
        for option in ("frozen", "kw_only"):
            if options.setdefault(option, True) is not True:
                raise RegistrationError(f"{class_name}: messages are always {option}; remove {option}=False")
        if name is not None and not name:
            raise RegistrationError(f"{class_name}: name= must not be empty")
        cls = super().__new__(mcls, class_name, bases, namespace, **options)
        wire_name = name or class_name
        if len(wire_name.encode()) > DEFAULT_LIMITS.name_bytes_max:
            raise RegistrationError(
                f"{class_name}: its name on the wire has more than {DEFAULT_LIMITS.name_bytes_max} bytes; shorten name="
            )
        if idempotent is not None:
            if not issubclass(cls, Command):
                raise RegistrationError(f"{class_name}: idempotent= is for commands; events are always sent again")
            type.__setattr__(cls, "__shardbus_idempotent__", bool(idempotent))
        # Struct instances have slots; plain attributes of the class may still be set on it after creation.
        type.__setattr__(cls, "__shardbus_name__", wire_name)
        if key is not None:
            fields = cls.__struct_fields__
            if key not in fields:
                known = ", ".join(fields) or "none"
                raise RegistrationError(f"{class_name}: key={key!r} is not one of its fields ({known})")
            type.__setattr__(cls, "__shardbus_key__", key)
        return cls


class Message(msgspec.Struct, metaclass=MessageMeta):
    """Base of `Event` and `Command`; declare those."""

    __shardbus_name__: ClassVar[str]
    __shardbus_key__: ClassVar[str | None] = None
    __shardbus_idempotent__: ClassVar[bool] = False


class Event(Message):
    """A fact: any number of handlers, nothing comes back.

    Declare one with `class OrderPlaced(Event, key="order_id")`. The class is a frozen, keyword-only `msgspec.Struct`
    whose fields are checked when it is decoded. `key=` names the field that routes and orders it (`str`, `int`,
    `bytes` or `UUID`); without one the event has no order. `name=` is its name on the wire (default: the class name).
    Unknown fields are ignored by older programs; new fields need defaults.
    """


class Command(Message, Generic[ReplyT]):
    """An intent: exactly one handler, which replies with a `ReplyT`.

    Declare one with `class GetTotal(Command[float], key="order_id")`; options as for `Event`. The reply is checked
    against `ReplyT` where it arrives. `idempotent=True` declares that running it twice does no harm: where its worker dies
    it is sent again to the successor, until its deadline, instead of being lost.
    """


def wire_name(message_type: type[Message]) -> str:
    """The name under which a message type travels."""
    return message_type.__shardbus_name__


def reply_type(command_type: type[Command[Any]]) -> Any:
    """The declared reply type of a command; `Any` where it declares none."""
    for base in command_type.__mro__:
        for origin in getattr(base, "__orig_bases__", ()):
            arguments = typing.get_args(origin)
            if arguments and typing.get_origin(origin) is Command:
                return Any if isinstance(arguments[0], TypeVar) else arguments[0]
    return Any


def to_wire_key(key: Any, *, key_bytes_max: int = DEFAULT_LIMITS.key_bytes_max) -> WireKey:
    """The normal form of a user's key.

    Raises:
        InvalidKey: it is not `str`, `int`, `bytes`, `UUID` or None, or is too long or out of range.
    """
    if key is None:
        return None
    if isinstance(key, UUID):
        return (key.bytes,)
    if isinstance(key, str):
        text = str.__str__(key)  # an enum member or another subclass routes as its plain value
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise InvalidKey(f"{text[:40]!r} is no sound text: it has half of a surrogate pair; use bytes") from None
        if size > key_bytes_max:
            raise InvalidKey(f"a key of more than {key_bytes_max:,} bytes: {text[:40]!r}…; use a digest of it as the key")
        return text
    if isinstance(key, bool):
        raise InvalidKey(f"{key!r} is a bool; a key is a str, an int, bytes or a UUID")
    if isinstance(key, int):
        if not _INT_MIN <= key <= _INT_MAX:
            raise InvalidKey(f"the key {key} does not fit into 64 bits; use a str")
        return int(key)
    if isinstance(key, bytes):
        if len(key) > key_bytes_max:
            raise InvalidKey(f"a key of {len(key):,} bytes; the limit is {key_bytes_max:,}; use a digest of it as the key")
        return bytes(key)
    raise InvalidKey(f"{key!r} is a {type(key).__name__}; a key is a str, an int, bytes or a UUID")


def from_wire_key(key: WireKey) -> str | int | bytes | UUID | None:
    """A wire key as its user wrote it."""
    return UUID(bytes=key[0]) if isinstance(key, tuple) else key


def key_getter(message_type: type[Message]) -> Callable[[Any], Any] | None:
    """A function from a message to its key as the user wrote it, or None for a type without key."""
    field = message_type.__shardbus_key__
    return None if field is None else operator.attrgetter(field)


def may_have_key(message_type: type[Message], key: WireKey) -> bool:
    """Whether a message of a keyed type may have this key, as far as the annotation of its key field says."""
    field = message_type.__shardbus_key__
    if field is None:
        return False
    try:
        annotation = _annotation_of(message_type, field)
    except NameError:  # as for `check_key_type`
        return True
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    plain = from_wire_key(key)
    for option in options:
        option = getattr(option, "__supertype__", option)
        if not isinstance(option, type) or not issubclass(option, (*_KEY_TYPES, type(None))):
            return True  # nothing so plain
        if any(issubclass(option, kind) and isinstance(plain, kind) for kind in _KEY_TYPES):
            return True
    return False


_KEY_TYPES: Final = (str, int, bytes, UUID)


def check_key_type(message_type: type[Message]) -> None:
    """Refuse a key field whose annotation can hold no key.

    Raises:
        RegistrationError: the annotation names a type that is not a key type.
    """
    field = message_type.__shardbus_key__
    if field is None:
        return
    try:
        annotation = _annotation_of(message_type, field)
    except NameError:  # a forward reference to a local class; checked by value when it is published
        return
    for option in typing.get_args(annotation) if _is_union(annotation) else (annotation,):
        option = getattr(option, "__supertype__", option)  # what a NewType stands for
        if isinstance(option, type) and option is not bool and issubclass(option, _KEY_TYPES):
            continue
        if typing.get_origin(option) is typing.Annotated or option is Any:
            continue
        if typing.get_origin(option) is typing.Literal:
            continue
        if option is type(None):
            continue
        shown = getattr(option, "__name__", str(option))
        raise RegistrationError(
            f"{message_type.__name__}: its key field {field!r} is a {shown}; a key is a str, an int, bytes or a UUID"
        )


def _annotation_of(message_type: type[Message], field: str) -> Any:
    """A field's annotation, whether or not those of other fields can be resolved. Raises `NameError`."""
    owner = next(base for base in message_type.__mro__ if field in getattr(base, "__annotations__", {}))
    alone = types.SimpleNamespace(__annotations__={field: owner.__annotations__[field]})
    module = sys.modules.get(owner.__module__)
    return typing.get_type_hints(alone, {} if module is None else vars(module))[field]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
