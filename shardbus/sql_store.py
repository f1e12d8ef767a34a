"""The store over SQLAlchemy: SQLite in memory, on RAM or on disk. The only file that imports SQLAlchemy.

One connection, held open; one caller; one transaction a write. SQL and types are portable, pragmas are SQLite's alone.
`locking_mode=EXCLUSIVE` comes before WAL: then the WAL index lies in heap memory, and a full RAM disk cannot kill the
process that maps it. A WAL file survives SIGKILL at any `synchronous` level; NORMAL also keeps it consistent through a power cut.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import BigInteger, Column, Index, LargeBinary, MetaData, String, Table, Text, event, func, select, text
from sqlalchemy import exc as sql_errors
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from shardbus.errors import ConfigError
from shardbus.messages import WireKey
from shardbus.store import DeadLetter, Envelope, StoreCounts, StoreError, WaitingEvent, WaitingLane

MEMORY_URL: Final = "sqlite+aiosqlite:///:memory:"
SCHEMA: Final = 1
_BUSY_TIMEOUT_MS: Final = 250  # the caller tries again by itself
_PLACES_MAX: Final = 10_000  # places known to be written; when full, they are written again

_metadata = MetaData()
_meta = Table("meta", _metadata, Column("name", String(64), primary_key=True), Column("value", BigInteger, nullable=False))


def _envelope_columns(*, key_of_row: bool) -> list[Column[Any]]:
    return [
        Column("publisher", LargeBinary(16), primary_key=key_of_row, nullable=False),
        Column("seq", BigInteger, primary_key=key_of_row, nullable=False, autoincrement=False),
        Column("slot", BigInteger, nullable=False),
        Column("type", Text, nullable=False),
        Column("key", LargeBinary, nullable=False),  # msgpack, so that every kind of key comes back as it was
        Column("body", LargeBinary, nullable=False),
        Column("headers", LargeBinary, nullable=True),
        Column("ordinal", BigInteger, nullable=False),
        Column("intended_ns", BigInteger, nullable=False),
        Column("attempt", BigInteger, nullable=False),
        Column("handlers", LargeBinary, nullable=False),
    ]


_dead = Table(
    "dead_letters",
    _metadata,
    *_envelope_columns(key_of_row=True),
    Column("reason", String(64), nullable=False),
    Column("error_type", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("place", String(64), nullable=False),
    Column("first_ns", BigInteger, nullable=False),
    Column("last_ns", BigInteger, nullable=False),
    Column("epoch", LargeBinary, nullable=False),
)
_waiting = Table(
    "waiting",
    _metadata,
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    *_envelope_columns(key_of_row=False),
    Column("due_ns", BigInteger, nullable=False),
    Index("waiting_by_key", "key", "position"),
    Index("waiting_by_publisher", "publisher", "seq"),
)
_tracebacks = Table(
    "tracebacks", _metadata, Column("place", String(64), primary_key=True), Column("traceback", Text, nullable=False)
)


def _names(table: Table) -> tuple[str, ...]:
    return tuple(column.name for column in table.columns)


def _insert(table: Table, conflict: str = "") -> str:
    names = _names(table)
    values = ", ".join(":" + name for name in names)
    return f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({values}) {conflict}"  # noqa: S608 - names of columns


# An event that dies again keeps the time of its first death. The same words in SQLite and PostgreSQL.
_UPSERT_DEAD: Final = text(
    _insert(
        _dead,
        "ON CONFLICT (publisher, seq) DO UPDATE SET "
        + ", ".join(f"{name} = excluded.{name}" for name in _names(_dead) if name not in ("publisher", "seq", "first_ns")),
    )
)
_INSERT_WAITING: Final = text(_insert(_waiting))
_INSERT_TRACEBACK: Final = text(_insert(_tracebacks, "ON CONFLICT (place) DO NOTHING"))
_DELETE_WAITING: Final = text("DELETE FROM waiting WHERE position = :position")

_pack: Final = msgspec.msgpack.Encoder().encode
_unpack_headers: Final = msgspec.msgpack.Decoder(dict[str, str]).decode
_unpack_handlers: Final = msgspec.msgpack.Decoder(tuple[str, ...]).decode


def _unpack_key(packed: bytes) -> WireKey:
    key: Any = msgspec.msgpack.decode(packed)
    return (key[0],) if isinstance(key, list) else key


def shard_url(url: str, shard: int) -> str:
    """The URL of one shard's store: a file is one shard's alone, so its name gets the shard's number.

    Raises:
        ConfigError: not a URL of a store that this version can use.
    """
    try:
        parsed = make_url(url)
    except sql_errors.ArgumentError:
        raise ConfigError(f"{url!r} is not a database URL; try sqlite+aiosqlite:///dead-letters.db") from None
    if parsed.drivername != "sqlite+aiosqlite":
        raise ConfigError(f"{parsed.drivername!r} is not a store that shardbus knows; use sqlite+aiosqlite:///FILE")
    if parsed.database in (None, "", ":memory:"):
        return MEMORY_URL
    assert parsed.database is not None  # just checked
    root, suffix = os.path.splitext(os.path.abspath(parsed.database))
    return sqlite_file_url(f"{root}-{shard}{suffix or '.db'}")


def sqlite_file_url(path: str) -> str:
    """The URL of a store in a SQLite file."""
    return f"sqlite+aiosqlite:///{path}"


class SqlStore:
    """A shard's store in a SQL database; implements `store.Store`.

    Args:
        url: a SQLAlchemy URL with an asyncio driver, of a database that belongs to this shard alone.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._engine: AsyncEngine | None = None
        self._connection: AsyncConnection | None = None
        self._places: set[str] = set()

    async def open(self) -> StoreCounts:
        """See `Store.open`."""
        engine = create_async_engine(self._url, poolclass=StaticPool)
        event.listen(engine.sync_engine, "connect", _set_pragmas)
        self._engine = engine
        try:
            async with self._transaction() as connection:
                await connection.run_sync(_metadata.create_all)
                found = (await connection.execute(select(_meta.c.value).where(_meta.c.name == "schema"))).scalar()
                if found is None:
                    await connection.execute(_meta.insert(), {"name": "schema", "value": SCHEMA})
                elif found != SCHEMA:
                    raise StoreError(
                        f"{self._url}: its schema is version {found}, this program's is {SCHEMA}; "
                        "use the program that wrote it, or another --dead-letters URL"
                    )
                dead = (await connection.execute(select(func.count()).select_from(_dead))).scalar_one()
                waiting, position = (
                    await connection.execute(select(func.count(), func.max(_waiting.c.position)).select_from(_waiting))
                ).one()
        except BaseException:
            await self.close()
            raise
        return StoreCounts(dead=dead, waiting=waiting, position_max=position or 0)

    async def close(self) -> None:
        """See `Store.close`."""
        connection, self._connection = self._connection, None
        engine, self._engine = self._engine, None
        if connection is not None:
            try:
                await connection.close()
            except sql_errors.SQLAlchemyError:
                pass  # it was broken already; dispose lets go of it
        if engine is not None:
            await engine.dispose()

    async def write(self, *, dead: Sequence[DeadLetter], waiting: Sequence[WaitingEvent], done: Sequence[int]) -> None:
        """See `Store.write`."""
        places = {row.place: row.traceback for row in dead if row.place and row.place not in self._places}
        async with self._transaction() as connection:
            if places:
                await connection.execute(
                    _INSERT_TRACEBACK, [{"place": place, "traceback": words} for place, words in places.items()]
                )
            if dead:
                await connection.execute(_UPSERT_DEAD, [_dead_row(row) for row in dead])
            if waiting:
                await connection.execute(_INSERT_WAITING, [_waiting_row(row) for row in waiting])
            if done:
                await connection.execute(_DELETE_WAITING, [{"position": position} for position in done])
        if len(self._places) + len(places) > _PLACES_MAX:
            self._places.clear()
        self._places.update(places)

    async def waiting_lanes(self) -> list[WaitingLane]:
        """See `Store.waiting_lanes`."""
        query = (
            select(_waiting.c.key, func.count()).group_by(_waiting.c.key).order_by(func.min(_waiting.c.position))
        )
        async with self._transaction() as connection:
            rows = (await connection.execute(query)).all()
        return [WaitingLane(key=_unpack_key(key), count=count) for key, count in rows]

    async def load_waiting(self, key: WireKey, after: int, limit: int) -> list[WaitingEvent]:
        """See `Store.load_waiting`."""
        query = (
            select(_waiting)
            .where(_waiting.c.key == _pack(key), _waiting.c.position > after)
            .order_by(_waiting.c.position)
            .limit(limit)
        )
        async with self._transaction() as connection:
            rows = (await connection.execute(query)).all()
        return [
            WaitingEvent(
                position=row.position, envelope=_envelope(row), handlers=_unpack_handlers(row.handlers), due_ns=row.due_ns
            )
            for row in rows
        ]

    async def outcomes(self, publisher: bytes, first: int) -> tuple[list[int], list[int]]:
        """See `Store.outcomes`."""
        found: list[list[int]] = []
        async with self._transaction() as connection:
            for table in (_dead, _waiting):
                query = select(table.c.seq).where(table.c.publisher == publisher, table.c.seq >= first)
                found.append(sorted((await connection.execute(query)).scalars().all()))
        return found[0], found[1]

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """See `Store.dead_letters`."""
        query = (
            select(_dead, func.coalesce(_tracebacks.c.traceback, "").label("traceback"))
            .outerjoin(_tracebacks, _tracebacks.c.place == _dead.c.place)
            .order_by(_dead.c.first_ns, _dead.c.publisher, _dead.c.seq)
            .limit(limit)
        )
        async with self._transaction() as connection:
            rows = (await connection.execute(query)).all()
        return [
            DeadLetter(
                envelope=_envelope(row),
                handlers=_unpack_handlers(row.handlers),
                reason=row.reason,
                error_type=row.error_type,
                error=row.error,
                place=row.place,
                traceback=row.traceback,
                first_ns=row.first_ns,
                last_ns=row.last_ns,
                epoch=row.epoch,
            )
            for row in rows
        ]

    def _transaction(self) -> _Transaction:
        return _Transaction(self)


class _Transaction:
    """One transaction on the store's connection: commits, or rolls back and says `StoreError`."""

    def __init__(self, store: SqlStore) -> None:
        self._store = store

    async def __aenter__(self) -> AsyncConnection:
        store = self._store
        if store._engine is None:
            raise StoreError("the store is closed")
        if store._connection is None or store._connection.invalidated:
            try:
                store._connection = await store._engine.connect()
            except (sql_errors.SQLAlchemyError, OSError) as error:
                store._connection = None
                raise StoreError(_words_of(error)) from error
        return store._connection

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        connection = self._store._connection
        assert connection is not None  # `__aenter__` made it
        try:
            if error is None:
                await connection.commit()
                return
            await connection.rollback()
        except (sql_errors.SQLAlchemyError, OSError) as broken:
            # Nothing was committed. The next call connects anew.
            self._store._connection = None
            await connection.invalidate()
            await connection.close()
            raise StoreError(_words_of(broken)) from broken
        if isinstance(error, (sql_errors.SQLAlchemyError, OSError)):
            raise StoreError(_words_of(error)) from error


def _words_of(error: BaseException) -> str:
    original = getattr(error, "orig", None)
    return str(original if original is not None else error)


def _set_pragmas(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={_BUSY_TIMEOUT_MS}",
        "locking_mode=EXCLUSIVE",
        "journal_mode=WAL",
        "synchronous=NORMAL",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _envelope_row(envelope: Envelope, handlers: tuple[str, ...]) -> dict[str, Any]:
    return {
        "publisher": envelope.publisher,
        "seq": envelope.seq,
        "slot": envelope.slot,
        "type": envelope.type,
        "key": _pack(envelope.key),
        "body": envelope.body,
        "headers": None if envelope.headers is None else _pack(envelope.headers),
        "ordinal": envelope.ordinal,
        "intended_ns": envelope.intended_ns,
        "attempt": envelope.attempt,
        "handlers": _pack(handlers),
    }


def _dead_row(row: DeadLetter) -> dict[str, Any]:
    return _envelope_row(row.envelope, row.handlers) | {
        "reason": row.reason,
        "error_type": row.error_type,
        "error": row.error,
        "place": row.place,
        "first_ns": row.first_ns,
        "last_ns": row.last_ns,
        "epoch": row.epoch,
    }


def _waiting_row(row: WaitingEvent) -> dict[str, Any]:
    return _envelope_row(row.envelope, row.handlers) | {"position": row.position, "due_ns": row.due_ns}


def _envelope(row: Any) -> Envelope:
    return Envelope(
        publisher=row.publisher,
        seq=row.seq,
        slot=row.slot,
        type=row.type,
        key=_unpack_key(row.key),
        body=row.body,
        headers=None if row.headers is None else _unpack_headers(row.headers),
        ordinal=row.ordinal,
        intended_ns=row.intended_ns,
        attempt=row.attempt,
    )
