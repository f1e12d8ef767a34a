"""Statements over many rows.

Rows are written by statements of many rows, not by `executemany`: the sqlite3 module gives up the interpreter's lock
once for each row there, and beside a busy event loop every return of it may wait (measured: 16,000–26,000 against
27,000–36,000 rows/s). Preparing such a statement costs more than running it, so their lengths are powers of two, and
each is prepared once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from shardbus.sql.rows import to_scheduled
from shardbus.sql.tables import SCHEDULED_COLUMNS
from shardbus.store import ANY_SIZE, StoredScheduled, fitting

_ROWS_MAX: Final = 512  # rows of one statement: 19 columns of them stay far below SQLite's 32,766 parameters


class Statement:
    """SQL that takes a list of rows, run in as few statements as powers of two allow."""

    def __init__(self, placeholder: str, head: str, width: int, tail: str) -> None:
        self._placeholder = placeholder
        self._head = head
        self._width = width
        self._tail = tail
        self._texts: dict[int, str] = {}  # by number of rows: at most ten

    async def run(self, connection: AsyncConnection, rows: Sequence[tuple[Any, ...]]) -> int:
        """Run it over all rows; returns how many rows the database changed."""
        changed = 0
        for start, count in _stretches(len(rows)):
            values = tuple([value for row in rows[start : start + count] for value in row])
            changed += (await connection.exec_driver_sql(self._text(count), values)).rowcount
        return changed

    async def totals(self, connection: AsyncConnection, rows: Sequence[tuple[Any, ...]], width: int) -> list[int]:
        """Run it, a SELECT of `width` numbers, over all rows; returns their sums."""
        totals = [0] * width
        for start, count in _stretches(len(rows)):
            values = tuple([value for row in rows[start : start + count] for value in row])
            found = (await connection.exec_driver_sql(self._text(count), values)).one()
            totals = [total + number for total, number in zip(totals, found, strict=True)]
        return totals

    async def rows(
        self, connection: AsyncConnection, rows: Sequence[tuple[Any, ...]]
    ) -> list[tuple[int, Sequence[Any]]]:
        """Run it, a SELECT, over all rows; returns what each statement found, and which row was its first."""
        found = []
        for start, count in _stretches(len(rows)):
            values = tuple([value for row in rows[start : start + count] for value in row])
            found.append((start, (await connection.exec_driver_sql(self._text(count), values)).all()))
        return found

    def _text(self, count: int) -> str:
        text = self._texts.get(count)
        if text is None:
            text = self._texts[count] = self._compose([self._places(row) for row in range(count)])
        return text

    def _places(self, row: int) -> list[str]:
        return [self._placeholder.format(row * self._width + at + 1) for at in range(self._width)]

    def _compose(self, places: list[list[str]]) -> str:
        groups = (", ".join(of_row) for of_row in places)
        return f"{self._head}({'), ('.join(groups)}){self._tail}"


class UnionStatement(Statement):
    """A SELECT for each row, as one."""

    def __init__(self, placeholder: str, each: str, width: int) -> None:
        super().__init__(placeholder, each, width, "")

    def _compose(self, places: list[list[str]]) -> str:
        return " UNION ALL ".join(self._head.format(*of_row, row=row) for row, of_row in enumerate(places))


def insertion(placeholder: str, table: Table, columns: tuple[str, ...], tail: str) -> Statement:
    head = f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES "  # noqa: S608 - names of this module's own tables
    return Statement(placeholder, head, len(columns), f" {tail}")


class Pages:
    """SQL that selects scheduled events, the last of whose values is how many at most."""

    def __init__(self, placeholder: str, where: str) -> None:
        values = [placeholder.format(at) for at in range(1, where.count("{}") + 1)]
        self._rows = f"SELECT id, {', '.join(SCHEDULED_COLUMNS)} {where.format(*values)}"
        self._sizes = f"SELECT length(body) {where.format(*values)}"

    async def read(
        self, connection: AsyncConnection, values: tuple[int, ...], limit: int, bytes_max: int
    ) -> list[StoredScheduled]:
        """Up to `limit` of them, of up to `bytes_max` bytes together, but for the first."""
        if bytes_max < ANY_SIZE:
            # How large they are is asked first: a page of the largest would fill the memory of a worker.
            sizes = (await connection.exec_driver_sql(self._sizes, (*values, limit))).all()
            if not sizes:
                return []
            limit = fitting((size for (size,) in sizes), bytes_max)
        found = await connection.exec_driver_sql(self._rows, (*values, limit))
        return [to_scheduled(row) for row in found.all()]


def _stretches(total: int) -> Iterator[tuple[int, int]]:
    """Start and length of each statement: the largest power of two that still fits, over and over."""
    start = 0
    while start < total:
        count = min(_ROWS_MAX, 1 << ((total - start).bit_length() - 1))
        yield start, count
        start += count
