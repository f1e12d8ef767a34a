"""Errors that an application may well raise, and that cannot be looked at as others can."""

from __future__ import annotations


class Odd(Exception):
    """As some applications write them: for what it does not know it raises another error than Python expects."""

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__("odd")
        self.fields = fields

    def __getattr__(self, name: str) -> str:
        return self.fields[name]


class Hopeless(Exception):
    """Even what every error has cannot be looked at."""

    @property
    def __cause__(self) -> BaseException | None:  # type: ignore[override]
        raise KeyError("cause")
