"""Errors that an application may well raise, and that cannot be looked at as others can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final


class Odd(Exception):
    """As some applications write them: for what it does not know it raises another error than Python expects."""

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__("odd")
        self.fields = fields

    def __getattr__(self, name: str) -> str:
        return self.fields[name]


class SafeText(str):
    """Text as template engines have it: what is made of it is of its class, too."""

    def __getitem__(self, at: Any) -> SafeText:
        return SafeText(str.__getitem__(self, at))

    def __str__(self) -> str:
        return self


class Marked(Exception):
    """Its text is of a class of its own."""

    def __str__(self) -> str:
        return SafeText("marked")


class Leaving(Exception):
    """To tell of it raises what ends programs."""

    def __str__(self) -> str:
        raise SystemExit(3)

    def __getattr__(self, name: str) -> str:
        raise SystemExit(4)


class Closed(Exception):
    """Nothing of it can be looked at, not even its class."""

    def __getattribute__(self, name: str) -> object:
        raise KeyError(name)


class Hopeless(Exception):
    """Even what every error has cannot be looked at."""

    @property
    def __cause__(self) -> BaseException | None:  # type: ignore[override]
        raise KeyError("cause")


ODD_ERRORS: Final[dict[str, Callable[[], Exception]]] = {
    "odd": lambda: Odd({}),
    "hopeless": Hopeless,
    "marked": Marked,
    "leaving": Leaving,
    "closed": Closed,
}
