"""What supervisor and worker tell, in words for people."""

from __future__ import annotations

import pytest

from shardbus.reports import told_left


@pytest.mark.parametrize(
    ("dead", "waiting", "kept", "told"),
    [
        (0, 0, "in sqlite+aiosqlite:///dead.db", ""),
        (0, 0, "", ""),
        (1, 0, "in sqlite+aiosqlite:///dead.db", "1 dead letter is kept in sqlite+aiosqlite:///dead.db; the next"),
        (1200, 1, "on RAM", "1,200 dead letters and 1 waiting event are kept on RAM; the next `shardbus serve` there has"),
        (0, 2, "", "2 waiting events are gone, with the memory in which they were; `serve --dead-letters URL` keeps them"),
    ],
)
def test_what_a_bus_leaves_is_said_with_where_it_is(dead: int, waiting: int, kept: str, told: str):
    found = told_left(dead, waiting, kept)
    assert found.startswith(told)
    assert bool(found) == bool(told)
