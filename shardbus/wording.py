"""How many of what, in the words of people. Pure."""

from __future__ import annotations

from typing import Final

_PLURALS: Final = {"was": "were", "is": "are"}


def counted(number: int, what: str, verb: str = "") -> str:
    """`1 event`, `1,000 events`; with the verb `was` or `is` behind it, in the form that the number asks for."""
    one = number == 1
    told = f"{number:,} {what}{'' if one else 's'}"
    return f"{told} {verb if one else _PLURALS[verb]}" if verb else told
