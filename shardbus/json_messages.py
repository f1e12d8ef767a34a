"""Messages as people write them: a JSON object of a known type, checked before anything is sent. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

from shardbus.config import DEFAULT_LIMITS
from shardbus.errors import UsageError
from shardbus.messages import Command, Event, Message, wire_name

MessageT = TypeVar("MessageT", bound=Message)

JSON_BYTES_MAX: Final = 4 * DEFAULT_LIMITS.event_bytes_max
"""JSON takes more room than msgpack; what is longer is refused."""

_SHOWN: Final = 60  # characters of what is no JSON
_decode_object: Final = msgspec.json.Decoder(dict[str, Any]).decode


def choose_type(known: Mapping[str, type[Message]], name: str, application: str) -> type[Message]:
    """The message type that an application calls by this name.

    Raises:
        UsageError: it has none of this name; the message says which it has.
    """
    found = known.get(name)
    if found is not None:
        return found
    has = [
        f"the {what} {', '.join(names)}"
        for what, base in (("events", Event), ("commands", Command))
        if (names := sorted(one for one, kind in known.items() if issubclass(kind, base)))
    ]
    raise UsageError(
        f"{application} has no handler of {name!r}; it has {' and '.join(has) or 'none at all'}. Name another application "
        "with --app MODULE:BUS or $SHARDBUS_APP, or the type itself as MODULE:CLASS"
    )


def check_kind(kind: type[Message], wanted: type[Event] | type[Command[Any]]) -> None:
    """Refuse a command where an event is wanted, and the other way round. Raises `UsageError`."""
    if not issubclass(kind, wanted):
        told = ("a command", "execute") if issubclass(kind, Command) else ("an event", "publish")
        raise UsageError(f"{wire_name(kind)} is {told[0]}; use `shardbus {told[1]}`")


def message_from_json(kind: type[MessageT], text: str | bytes) -> MessageT:
    """A message from a JSON object. Bytes are written in base64, times in ISO 8601, as msgspec has them.

    Raises:
        UsageError: no JSON object, or too long; a field that is missing, unknown or of another type, with its name.
    """
    name = wire_name(kind)
    if len(text) > JSON_BYTES_MAX:
        raise UsageError(f"{name}: more than {JSON_BYTES_MAX:,} bytes of JSON")
    try:
        fields = _decode_object(text)
    except msgspec.ValidationError:
        raise UsageError(f"{_shown(text)} is no JSON object; {_takes(kind)}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{_shown(text)} is no JSON: {error}; {_takes(kind)}") from None
    tag = kind.__struct_config__.tag_field
    unknown = [field for field in fields if field not in kind.__struct_encode_fields__ and field != tag]
    if unknown:
        # A worker ignores them, because programs of several versions talk to each other; whoever types one has mistyped.
        raise UsageError(f"{name} has no field {unknown[0]!r}; {_takes(kind)}")
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).rpartition(" - at `$.")
        told = f"field {path.rstrip('`')}: {what[:1].lower()}{what[1:]}" if what else f"{error}; {_takes(kind)}"
        raise UsageError(f"{name}: {told}") from None


def key_from_text(kind: type[Message], text: str) -> Any:
    """A key as people type it, as the message's type has it.

    Raises:
        UsageError: the type has no key, or it cannot be this.
    """
    field = next((one for one in msgspec.structs.fields(kind) if one.name == kind.__shardbus_key__), None)
    if field is None:
        raise UsageError(f"{wire_name(kind)} has no key")
    try:
        return msgspec.convert(text, field.type, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"the key {text!r} of {wire_name(kind)}: {error}") from None


def _takes(kind: type[Message]) -> str:
    fields = ", ".join(kind.__struct_encode_fields__)
    return f"{wire_name(kind)} takes an object with {fields}" if fields else f"{wire_name(kind)} takes {{}}"


def _shown(text: str | bytes) -> str:
    plain = (text if isinstance(text, str) else text.decode(errors="replace")).strip()
    return repr(plain if len(plain) <= _SHOWN else plain[:_SHOWN] + "…")
