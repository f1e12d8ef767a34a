"""The tables of a store, and which versions of them there were."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

SCHEMA_VERSION: Final = 7
"""Raise it with every change of the tables below; a store of another version is refused unless it is empty."""

GROWS_FROM: Final = ("5", "6")  # what this version has beyond these are tables and an index, made where they are missing

# SQLite numbers its rows itself where a primary key is exactly INTEGER, and keeps no second index for it.
_RowNumber: Final = BigInteger().with_variant(Integer(), "sqlite")

METADATA: Final = MetaData()


def _envelope_columns() -> list[Column[Any]]:
    return [
        Column("publisher", LargeBinary, nullable=False),
        Column("seq", BigInteger, nullable=False),
        Column("slot", Integer, nullable=False),
        Column("type", Text, nullable=False),
        Column("key", LargeBinary, nullable=False),  # msgpack, which tells 42 from "42" and holds 64 bits unsigned
        Column("body", LargeBinary, nullable=False),
        Column("headers", LargeBinary),  # msgpack
        Column("ordinal", BigInteger, nullable=False),
        Column("intended_ns", BigInteger, nullable=False),
        Column("attempt", Integer, nullable=False),
    ]


ENVELOPE_WIDTH: Final = len(_envelope_columns())

DEAD: Final = Table(
    "dead_letters",
    METADATA,
    *_envelope_columns(),
    Column("handlers", Text, nullable=False),  # one a line, each line with both its ends, so that LIKE finds a name
    Column("reason", Text, nullable=False),
    Column("error_type", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("place", Text, nullable=False),
    Column("first_ns", BigInteger, nullable=False),
    Column("last_ns", BigInteger, nullable=False),
    Column("epoch", LargeBinary, nullable=False),
    Column("position", BigInteger, nullable=False),  # above 0: its key is parked, and this is its place in the lane
    Column("id", _RowNumber, primary_key=True),  # given by the database: the order in which they died
    UniqueConstraint("publisher", "seq"),
    Index("dead_letters_by_place", "place"),  # a traceback goes with the last dead letter of its place
    Index("dead_letters_parked", "position", sqlite_where=text("position > 0"), postgresql_where=text("position > 0")),
    sqlite_autoincrement=True,  # a number is never given twice: what was asked about one row must not hit another
)

WAITING: Final = Table(
    "waiting",
    METADATA,
    *_envelope_columns(),
    Column("progress", LargeBinary),  # msgpack of a `_Progress`
    Column("due_ns", BigInteger, nullable=False),
    Column("position", _RowNumber, primary_key=True, autoincrement=False),
    Index("waiting_by_key", "key", "position"),
    Index("waiting_by_publisher", "publisher", "seq"),
)

SCHEDULED: Final = Table(
    "scheduled",
    METADATA,
    *_envelope_columns(),
    Column("due_ns", BigInteger, nullable=False),
    Column("id", _RowNumber, primary_key=True),
    Index("scheduled_by_due", "due_ns", "id"),
    Index("scheduled_by_publisher", "publisher", "seq"),
    sqlite_autoincrement=True,  # a number is never given twice: what begins by it must be what was read
)

TRACEBACKS: Final = Table(
    "tracebacks",
    METADATA,
    Column("place", Text, primary_key=True),
    Column("traceback", Text, nullable=False),
)

REMOVED: Final = Table(
    "removed",
    METADATA,
    Column("publisher", LargeBinary, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("was_dead", Integer, nullable=False),
    Column("id", _RowNumber, primary_key=True),  # the order in which they were removed: the first are forgotten first
    Index("removed_by_publisher", "publisher", "seq"),
)

META: Final = Table(
    "meta",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

DEAD_COLUMNS: Final = tuple(column.name for column in DEAD.columns if column is not DEAD.c.id)
SCHEDULED_COLUMNS: Final = tuple(column.name for column in SCHEDULED.columns if column is not SCHEDULED.c.id)
