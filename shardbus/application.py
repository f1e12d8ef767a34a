"""Finds an application, or one of its message types: `MODULE:BUS` and `MODULE:CLASS`."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any, Final

from shardbus.errors import BootError, ShardbusError, text_of
from shardbus.messages import Command, Event, Message
from shardbus.registry import Registry
from shardbus.tracebacks import steps_of
from shardbus.wording import encodable, one_line

DEMO: Final = "shardbus.demo:bus"
_TOLD_CHARS_MAX: Final = 2000  # of what a module raises
_SYNTAX: Final = (SyntaxError, IndentationError, TabError)


def load_application(name: str) -> Registry:
    """Import `MODULE:BUS`; the present directory is on the path, as for `python -m`.

    Raises:
        BootError: it is not of that form, does not import, or is not a Bus; the message says which, with the place.
    """
    module, attribute = _import(name, "MODULE:BUS, for instance shop:bus")
    found = _attribute(module, attribute)
    if not issubclass(type(found), Registry):
        # By their types: to ask an object for its class is to ask the application, and a proxy may raise.
        others = [key for key, value in vars(module).items() if issubclass(type(value), Registry)]
        hint = f"; it has {', '.join(others)}" if others else ""
        raise BootError(f"{module.__name__} has no Bus named {attribute!r}{hint}")
    registry: Registry = found
    return registry


def load_message_type(name: str) -> type[Message]:
    """Import `MODULE:CLASS`, an event or a command, in the same way.

    Raises:
        BootError: it is not of that form, does not import, or is neither; the message says which.
    """
    module, attribute = _import(name, "MODULE:CLASS, for instance shop:OrderPlaced")
    found = _attribute(module, attribute)
    if not _is_declared(found):
        others = ", ".join(key for key, value in vars(module).items() if _is_declared(value))
        raise BootError(f"{module.__name__} has no event or command {attribute!r}{'; it has ' + others if others else ''}")
    declared: type[Message] = found
    return declared


def _import(name: str, form: str) -> tuple[ModuleType, str]:
    """The module before the colon, and the name behind it."""
    module_name, separator, attribute = name.partition(":")
    if not separator or not module_name or not attribute:
        raise BootError(f"{name!r} is not {form}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name), attribute
    except ModuleNotFoundError as error:
        missing = error.name
        if isinstance(missing, str) and f"{module_name}.".startswith(f"{missing}."):
            told = f"there is no module {module_name!r} here ({os.getcwd()}) or on the Python path"
            if module_name.endswith(".py"):
                told += f"; a module is named without that: {module_name[:-3]}:{attribute}"
            raise BootError(told) from None
        raise _raised(f"{module_name} does not import", error) from None
    except BaseException as error:  # whatever the user's module raises while it is imported
        raise _raised(f"{module_name} does not import", error) from None


def _attribute(module: ModuleType, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part, None)
        except BaseException as error:  # a module may import what is asked for only then
            raise _raised(f"{module.__name__} has no {name!r}", error) from None
    return found


def _raised(what: str, error: Any) -> BootError:
    """What the user's code has raised, as a line; an interrupt is raised itself."""
    if issubclass(type(error), KeyboardInterrupt):
        raise error
    # A `SyntaxError` has its place in its text, too, where it is not the user's own class, or made by hand.
    is_parsers = type(error) in _SYNTAX and isinstance(error.msg, str)
    told = one_line(encodable(error.msg) if is_parsers else text_of(error), _TOLD_CHARS_MAX)
    kind = "" if issubclass(type(error), ImportError | ShardbusError) else f"{type(error).__name__}: "
    return BootError(f"{what}: {kind}{told} ({_place(error)})")


def _is_declared(thing: Any) -> bool:
    """Whether it is an event or a command of somebody's."""
    return issubclass(type(thing), type) and issubclass(thing, Message) and thing not in (Event, Command, Message)


def _place(error: Any) -> str:
    """The last place of the user's own code that an import went through; of a `SyntaxError`, where it stands."""
    if type(error) in _SYNTAX and error.filename and error.lineno:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in steps_of(error) if "importlib" not in frame.filename]
    own = [frame for frame in frames if f"{os.sep}shardbus{os.sep}" not in frame.filename] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "no place"
