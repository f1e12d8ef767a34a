"""Finds an application: `MODULE:BUS` to its registry."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Final

from shardbus.errors import BootError, ShardbusError
from shardbus.registry import Registry

DEMO: Final = "shardbus.demo:bus"


def load_application(name: str) -> Registry:
    """Import `MODULE:BUS`; the present directory is on the path, as for `python -m`.

    Raises:
        BootError: it is not of that form, does not import, or is not a Bus; the message says which, with the place.
    """
    module_name, separator, attribute = name.partition(":")
    if not separator or not module_name or not attribute:
        raise BootError(f"{name!r} is not MODULE:BUS, for instance shop:bus")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise BootError(f"there is no module {module_name!r} here ({os.getcwd()}) or on the Python path") from None
        raise BootError(f"{module_name} does not import: {error} ({_place(error)})") from None
    except ShardbusError as error:
        raise BootError(f"{module_name} does not import: {error} ({_place(error)})") from None
    except BaseException as error:  # whatever the user's module raises while it is imported
        if isinstance(error, KeyboardInterrupt):
            raise
        raise BootError(f"{module_name} does not import: {type(error).__name__}: {error} ({_place(error)})") from None
    found = module
    for part in attribute.split("."):
        found = getattr(found, part, None)  # type: ignore[assignment]  # modules and objects alike
    if not isinstance(found, Registry):
        others = [key for key, value in vars(module).items() if isinstance(value, Registry)]
        hint = f"; it has {', '.join(others)}" if others else ""
        raise BootError(f"{module_name} has no Bus named {attribute!r}{hint}")
    return found


def _place(error: BaseException) -> str:
    """The last place of the user's own code that an import went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    own = [frame for frame in frames if f"{os.sep}shardbus{os.sep}" not in frame.filename] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "no place"
