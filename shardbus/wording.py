"""How many of what, in the words of people, and texts of others as a part of a line of ours. Pure."""

from __future__ import annotations

import re
from typing import Final

_CONTROL: Final = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")
_PLURALS: Final = {"was": "were", "is": "are"}


def counted(number: int, what: str, verb: str = "") -> str:
    """`1 event`, `1,000 events`; with the verb `was` or `is` behind it, in the form that the number asks for."""
    one = number == 1
    told = f"{number:,} {what}{'' if one else 's'}"
    return f"{told} {verb if one else _PLURALS[verb]}" if verb else told


def one_line(text: str, chars_max: int = 500) -> str:
    """Somebody's text as a part of a line: no end of one is in it, nor what moves a terminal; it is cut where it is long."""
    told = _CONTROL.sub(lambda found: repr(found[0])[1:-1], text[:chars_max])
    return told if len(text) <= chars_max else f"{told} … ({len(text):,} characters)"


def encodable(text: str) -> str:
    """Somebody's text such that it can be sent and stored: half of a surrogate pair is told by its number."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
