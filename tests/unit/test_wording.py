"""How many of what is told, and how the texts of others are."""

from __future__ import annotations

import pytest

from shardbus.wording import counted, one_line


@pytest.mark.parametrize(
    ("number", "verb", "told"),
    [
        (0, "", "0 events"),
        (1, "", "1 event"),
        (1_000, "", "1,000 events"),
        (0, "was", "0 events were"),
        (1, "was", "1 event was"),
        (2, "was", "2 events were"),
        (1, "is", "1 event is"),
        (2, "is", "2 events are"),
    ],
)
def test_one_is_told_as_one_and_all_else_as_several(number: int, verb: str, told: str) -> None:
    assert counted(number, "event", verb) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("it fails: ü", "it fails: ü"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[2J\0", "\\x1b[2J\\x00"),
        ("a\u2028b\x85", "a\\u2028b\\x85"),
        ("x" * 501, "x" * 500 + " … (501 characters)"),
    ],
)
def test_a_text_of_others_stays_within_its_line(text: str, told: str) -> None:
    assert one_line(text) == told
