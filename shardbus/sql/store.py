"""The store in an SQL database: SQLite through aiosqlite, and any other that SQLAlchemy reaches and that knows
`ON CONFLICT`. What is in which transaction, and what it comes to in counts; knows nothing of lanes, sessions or retries.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import wraps
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, TypeAlias, TypeVar

from msgspec.structs import replace
from sqlalchemy import (
    NullPool,
    bindparam,
    case,
    delete,
    func,
    insert,
    inspect,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from shardbus.errors import ConfigError
from shardbus.sql.rows import (
    dead_row,
    pack,
    progress_of,
    scheduled_row,
    storable,
    to_dead,
    to_waiting,
    unpack_key,
    waiting_row,
)
from shardbus.sql.statements import Pages, Statement, UnionStatement, insertion
from shardbus.sql.tables import (
    DEAD,
    DEAD_COLUMNS,
    GROWS_FROM,
    META,
    METADATA,
    REMOVED,
    SCHEDULED,
    SCHEDULED_COLUMNS,
    SCHEMA_VERSION,
    TRACEBACKS,
    WAITING,
)
from shardbus.store import (
    ANY_SIZE,
    REMOVED_MAX,
    ROW_OVERHEAD_BYTES,
    TAKEOVERS_MAX,
    DeadFilter,
    DeadLetter,
    LaneHead,
    ParkedKey,
    ScheduledEvent,
    ScheduleState,
    StoreCounts,
    StoredDeadLetter,
    StoredScheduled,
    StoreError,
    WaitingEvent,
    WaitingLane,
    fitting,
    fitting_lanes,
    row_bytes,
    traceback_bytes,
)

_PLACES_MAX: Final = 1024  # places whose traceback is known to be stored; when full, it starts over
_DROP_ROWS: Final = 256  # dropped at once: with their tracebacks they may free more room than their own size
_BUSY_TIMEOUT_S: Final = 0.3  # how long SQLite waits for another's lock before it says `database is locked`
_OPEN_TIMEOUT_S: Final = 2.0  # the same while it is opened: a predecessor that was cancelled lets go a little later

# EXCLUSIVE comes before WAL: only then does SQLite keep the index of the log in its own memory. On a RAM-backed place
# that is full, a mapped index would kill the process (SIGBUS). It also keeps a second worker out of the same file.
_SQLITE_PRAGMAS: Final = ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL")

_NO_POSITION: Final = 2**63

_PLACEHOLDERS: Final = {"qmark": "?", "numeric_dollar": "${}"}

_DEAD_IDENTITY: Final = ("publisher", "seq")
_CHANGING: Final = ("attempt", "progress", "due_ns")  # what may change of a waiting event

# Values are bound under other names than their columns, which SQLAlchemy keeps for itself in an UPDATE.
_replace_dead: Final = (
    update(DEAD)
    .where(*(DEAD.c[name] == bindparam(f"new_{name}") for name in _DEAD_IDENTITY))
    .values({name: bindparam(f"new_{name}") for name in DEAD_COLUMNS if name not in (*_DEAD_IDENTITY, "first_ns")})
)
_select_dead: Final = (
    select(DEAD.c.id, *(DEAD.c[name] for name in DEAD_COLUMNS), func.coalesce(TRACEBACKS.c.traceback, ""))
    .join(TRACEBACKS, TRACEBACKS.c.place == DEAD.c.place, isouter=True)
    .order_by(DEAD.c.id)
)
_body_bytes: Final = func.length(DEAD.c.body)
_select_oldest: Final = select(DEAD.c.id, _body_bytes).where(DEAD.c.position == 0).order_by(DEAD.c.id)
_measure_dead: Final = select(
    func.count(),
    func.coalesce(func.sum(_body_bytes), 0),
    func.count(func.nullif(DEAD.c.position, 0)),
    func.coalesce(func.sum(case((DEAD.c.position > 0, _body_bytes))), 0),
    func.coalesce(func.max(DEAD.c.position), 0),
)
_measure_waiting: Final = select(
    func.count(),
    func.coalesce(func.sum(func.length(WAITING.c.body)), 0),
    func.coalesce(func.max(WAITING.c.position), 0),
)
_measure_scheduled: Final = select(func.count(), func.coalesce(func.sum(func.length(SCHEDULED.c.body)), 0))
_select_lowest: Final = (
    select(func.min(WAITING.c.position)),
    select(func.min(DEAD.c.position)).where(text("position > 0")),  # as the index has it
)
# Above (due time, row), in two parts: where both are compared, SQLite searches the index by the first only, and so reads
# what is due at one instant from its beginning, again and again. The sum keeps a planner off that index, where rows count.
_DUE_WITH: Final = "FROM scheduled WHERE due_ns = {} AND id > {} ORDER BY id LIMIT {}"
_DUE_LATER: Final = "FROM scheduled WHERE due_ns > {} AND due_ns <= {} ORDER BY due_ns, id LIMIT {}"
_DUE_ABOVE: Final = "FROM scheduled WHERE id > {} AND due_ns + 0 <= {} ORDER BY id LIMIT {}"
_select_dead_sizes: Final = select(func.length(DEAD.c.body)).order_by(DEAD.c.id)
_change_waiting: Final = (
    update(WAITING)
    .where(WAITING.c.position == bindparam("at"))
    .values({name: bindparam(f"new_{name}") for name in _CHANGING})
)
# Sums over some rows; joined from literals, so nothing of them comes from outside.
_SUM_WAITING: Final = "SELECT count(*), coalesce(sum(length(body)), 0) FROM waiting"
_ROWS_WAITING: Final = f"SELECT {', '.join(WAITING.columns.keys())} FROM waiting"  # noqa: S608 - likewise
# The first events of a lane, each with its size; `{row}` is the number of the lane among those that are asked for.
_HEAD: Final = (
    "SELECT {row} AS lane, position, size FROM (SELECT position, length(body) AS size FROM waiting "
    "WHERE key = {0} AND position > {1} ORDER BY position LIMIT {2}) AS head_{row}"
)
_SUM_SCHEDULED: Final = "SELECT count(*), coalesce(sum(length(body)), 0) FROM scheduled"
_SUM_DEAD: Final = (
    "SELECT count(*), coalesce(sum(length(body)), 0), count(nullif(position, 0)), "
    "coalesce(sum(CASE WHEN position > 0 THEN length(body) END), 0) FROM dead_letters"
)
_heads: Final = (
    select(WAITING.c.key, func.count().label("count"), func.min(WAITING.c.position).label("first"))
    .where(WAITING.c.key > bindparam("after_key"))
    .group_by(WAITING.c.key)
    .order_by(WAITING.c.key)
    .limit(bindparam("lanes"))
    .subquery()
)
_select_lanes: Final = (
    select(_heads.c.key, _heads.c.count, WAITING.c.due_ns)
    .join(WAITING, WAITING.c.position == _heads.c.first)
    .order_by(_heads.c.key)
)

_SUM_TRACEBACKS: Final = "SELECT count(*), coalesce(sum(length(traceback)), 0) FROM tracebacks"
_NO_LETTER: Final = "NOT EXISTS (SELECT 1 FROM dead_letters WHERE dead_letters.place = tracebacks.place)"
_ROWS_ORPHANS: Final = f"SELECT place, length(traceback) FROM tracebacks WHERE {_NO_LETTER}"  # noqa: S608 - likewise
_DELETE_ORPHANS: Final = f"DELETE FROM tracebacks WHERE {_NO_LETTER}"  # noqa: S608 - likewise

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")
_Method: TypeAlias = "Callable[Concatenate[SqlStore, _Args], Coroutine[Any, Any, _Result]]"


def _to_its_end(method: _Method[_Args, _Result]) -> _Method[_Args, _Result]:
    """What was begun goes to its end even if its caller is cancelled, and `close()` waits for it.

    A driver that is cancelled within a transaction lets go of its connection, and the file stays locked for whoever comes
    next in this process.
    """

    @wraps(method)
    async def begun(self: SqlStore, /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        task = asyncio.get_running_loop().create_task(method(self, *args, **kwargs))
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    return begun


class SqlStore:
    """A `Store` at an SQLAlchemy URL, over one connection that is held open.

    Text that no database holds (lone surrogates, NUL) is escaped in errors, places and tracebacks. Rows in
    `sqlite+aiosqlite:///:memory:` end with `close()`; all others stay.
    """

    def __init__(self, url: str, *, shards: int | None = None) -> None:
        """Check the URL; nothing is opened yet.

        Args:
            url: as SQLAlchemy writes it.
            shards: how many shards the bus has. A store that holds rows of a bus with another number is refused: they
                belong to slots that are elsewhere now. None: do not look.

        Raises:
            ConfigError: it is no URL of a database that can be used here.
        """
        try:
            self._engine = create_async_engine(url, poolclass=NullPool, hide_parameters=True)
        except (SQLAlchemyError, ImportError) as error:
            raise ConfigError(f"the store URL cannot be used: {error}") from error
        self._name = self._engine.url.render_as_string(hide_password=True)
        dialect = self._engine.dialect
        if dialect.name not in ("sqlite", "postgresql") or dialect.paramstyle not in _PLACEHOLDERS:
            raise ConfigError(f"the store {self._name} cannot be used: only SQLite and PostgreSQL are known")
        self._sqlite = dialect.name == "sqlite"
        placeholder = _PLACEHOLDERS[dialect.paramstyle]
        # A dead letter that is there already is left alone here, so that the row count says how many are new.
        self._insert_dead = insertion(placeholder, DEAD, DEAD_COLUMNS, "ON CONFLICT (publisher, seq) DO NOTHING")
        self._insert_waiting = insertion(placeholder, WAITING, tuple(WAITING.columns.keys()), "")
        self._insert_tracebacks = insertion(
            placeholder, TRACEBACKS, ("place", "traceback"), "ON CONFLICT (place) DO NOTHING"
        )
        self._due_with = Pages(placeholder, _DUE_WITH)
        self._due_later = Pages(placeholder, _DUE_LATER)
        self._due_above = Pages(placeholder, _DUE_ABOVE)
        self._sum_tracebacks = Statement(placeholder, f"{_SUM_TRACEBACKS} WHERE place IN (", 1, ")")
        self._select_orphans = Statement(placeholder, f"{_ROWS_ORPHANS} AND place IN (", 1, ")")
        self._delete_tracebacks = Statement(placeholder, "DELETE FROM tracebacks WHERE place IN (", 1, ")")
        self._select_places = Statement(placeholder, "SELECT DISTINCT place FROM dead_letters WHERE id IN (", 1, ")")
        self._insert_scheduled = insertion(placeholder, SCHEDULED, SCHEDULED_COLUMNS, "")
        note = "INSERT INTO removed (publisher, seq, was_dead) SELECT publisher, seq,"
        self._note_purged = Statement(placeholder, f"{note} 1 FROM dead_letters WHERE id IN (", 1, ") ORDER BY id")
        self._note_cancelled = Statement(placeholder, f"{note} 0 FROM scheduled WHERE id IN (", 1, ")")
        self._delete_scheduled = Statement(placeholder, "DELETE FROM scheduled WHERE id IN (", 1, ")")
        self._sum_scheduled = Statement(placeholder, f"{_SUM_SCHEDULED} WHERE id IN (", 1, ")")
        self._delete_waiting = Statement(placeholder, "DELETE FROM waiting WHERE position IN (", 1, ")")
        self._find_heads = UnionStatement(placeholder, _HEAD, 3)
        self._select_waiting = Statement(placeholder, f"{_ROWS_WAITING} WHERE position IN (", 1, ")")
        self._delete_dead = Statement(placeholder, "DELETE FROM dead_letters WHERE id IN (", 1, ")")
        self._sum_waiting = Statement(placeholder, f"{_SUM_WAITING} WHERE position IN (", 1, ")")
        self._sum_dead = Statement(placeholder, f"{_SUM_DEAD} WHERE id IN (", 1, ")")
        self._shards = shards
        self._connection: AsyncConnection | None = None
        self._opened = False
        self._under_way: set[asyncio.Task[Any]] = set()
        self._known_places: set[str] = set()
        self._counts = StoreCounts(dead=0, waiting=0, position_max=0)

    async def open(self) -> StoreCounts:
        """Open or create the store, adopt what a predecessor left, and say what is in it.

        Raises:
            StoreError: it cannot be reached, is locked, was written by a shardbus with another schema, or holds rows of
                a bus with another number of shards. Everything is released; `open()` may be called again.
        """
        self._check_directory()  # the driver would leave a thread behind, which may outlive the event loop
        self._opened = True
        try:
            self._counts = await self._lay_out()
        except BaseException:
            await self.close()
            raise
        return self._counts

    def _check_directory(self) -> None:
        database = self._engine.url.database if self._sqlite else None
        directory = os.path.dirname(database or "")
        if directory and not os.path.isdir(directory):
            raise StoreError(f"the store {self._name}: unable to open database file: there is no directory {directory}")

    @_to_its_end
    async def _lay_out(self) -> StoreCounts:
        async with self._transaction() as connection:
            if self._sqlite:
                # The driver would commit each CREATE TABLE by itself, and a kill in between leave half a schema.
                await connection.exec_driver_sql("BEGIN IMMEDIATE")
            await self._check_version(connection)
            await connection.run_sync(METADATA.create_all)
            for index in DEAD.indexes:
                await connection.run_sync(index.create, checkfirst=True)
            await connection.exec_driver_sql(_DELETE_ORPHANS)
            await self._set_meta(connection, "schema_version", str(SCHEMA_VERSION))
            counts = await self._measure(connection)
            if self._shards is not None:
                await self._check_shards(connection, self._shards, holds_rows=bool(counts.dead or counts.waiting))
            return counts

    async def close(self) -> None:
        """Release everything. Rows stay. May be called at any time, and again."""
        self._opened = False
        self._known_places.clear()
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=_BUSY_TIMEOUT_S + 1.0)
        try:
            await self._disconnect()
        finally:
            await self._engine.dispose()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked may be gone

    def counts(self) -> StoreCounts:
        """What the store holds now, as of `open()` and every `write()` since. Asks nobody."""
        return self._counts

    @_to_its_end
    async def write(
        self,
        *,
        dead: Sequence[DeadLetter] = (),
        waiting: Sequence[WaitingEvent] = (),
        changed: Sequence[WaitingEvent] = (),
        done: Sequence[int] = (),
        redriven: Sequence[int] = (),
        scheduled: Sequence[ScheduledEvent] = (),
        begun: Sequence[int] = (),
        begun_until_ns: int = 0,
    ) -> None:
        """See `Store.write`. Fastest with 512 rows, or a multiple, of a kind.

        Raises:
            StoreError: nothing was committed; also where a position is in use already.
        """
        dead_rows = [dead_row(letter) for letter in dead]
        waiting_rows = [waiting_row(event) for event in waiting]
        places = self._new_places(dead)
        async with self._transaction() as connection:
            new_places = [(place,) for place in places]
            known = await self._sum_tracebacks.totals(connection, new_places, 2)
            await self._insert_tracebacks.run(connection, list(places.items()))
            stored = await self._sum_tracebacks.totals(connection, new_places, 2)
            new_tracebacks = ROW_OVERHEAD_BYTES * (stored[0] - known[0]) + stored[1] - known[1]
            added = await self._insert_dead.run(connection, dead_rows)
            if added < len(dead_rows):
                await connection.execute(
                    _replace_dead,
                    [
                        {f"new_{name}": value for name, value in zip(DEAD_COLUMNS, row, strict=True)}
                        for row in dead_rows
                    ],
                )
            await self._insert_waiting.run(connection, waiting_rows)
            if changed:
                await connection.execute(
                    _change_waiting,
                    [
                        {
                            "at": event.position,
                            "new_attempt": event.envelope.attempt,
                            "new_progress": progress_of(event),
                            "new_due_ns": event.due_ns,
                        }
                        for event in changed
                    ],
                )
            removed = [(position,) for position in done]
            removed_rows, removed_bodies = await self._sum_waiting.totals(connection, removed, 2)
            await self._delete_waiting.run(connection, removed)
            revived = await self._remove_dead(connection, redriven, "redriven") if redriven else _NOTHING
            await self._insert_scheduled.run(connection, [scheduled_row(event) for event in scheduled])
            begun_rows, begun_bytes = await self._remove_scheduled(connection, begun)
            if begun_until_ns:
                await self._set_meta(connection, "begun_until_ns", str(begun_until_ns))
            recounted = None
            if added < len(dead_rows):  # some may have died elsewhere before
                await connection.exec_driver_sql(_DELETE_ORPHANS)
                recounted = await self._measure(connection)
        # Only now is it committed, and true.
        if len(self._known_places) + len(places) > _PLACES_MAX:
            self._known_places.clear()
        self._known_places.update(places)
        if recounted is not None:
            self._known_places.clear()
            self._counts = recounted
            return
        counts = self._without(revived)
        dead_bytes = sum(row_bytes(letter.envelope) for letter in dead)
        parked_bytes = sum(row_bytes(letter.envelope) for letter in dead if letter.position)
        waiting_bytes = sum(row_bytes(event.envelope) for rows in (waiting, scheduled) for event in rows)
        removed_bytes = removed_bodies + ROW_OVERHEAD_BYTES * removed_rows + begun_bytes
        positions = [row.position for rows in (waiting, dead) for row in rows]
        self._counts = replace(
            counts,
            dead=counts.dead + added,
            waiting=counts.waiting + len(waiting_rows) - removed_rows + len(scheduled) - begun_rows,
            scheduled=counts.scheduled + len(scheduled) - begun_rows,
            parked=counts.parked + sum(letter.position > 0 for letter in dead),
            position_max=max(counts.position_max, *positions, 0),
            redriven=counts.redriven + revived.rows,
            bytes=counts.bytes + dead_bytes + new_tracebacks + waiting_bytes - removed_bytes,
            droppable_bytes=counts.droppable_bytes + dead_bytes + new_tracebacks - parked_bytes,
        )

    @_to_its_end
    async def take_over(self) -> tuple[int, ...]:
        """See `Store.take_over`. One row is written, however many there are.

        Raises:
            StoreError: nothing was noted.
        """
        async with self._transaction() as connection:
            found = await connection.scalar(select(META.c.value).where(META.c.name == "takeovers")) or ""
            before = [int(position) for position in found.split()]
            if not await self._counter(connection, "at_rest"):
                before.append(self._counts.position_max)
            lowest = [await connection.scalar(statement) for statement in _select_lowest]
            least = min((position for position in lowest if position is not None), default=_NO_POSITION)
            takeovers = tuple(sorted(position for position in before if position >= least))[-TAKEOVERS_MAX:]
            await self._set_meta(connection, "takeovers", " ".join(map(str, takeovers)))
            await self._set_meta(connection, "at_rest", "0")
        return takeovers

    @_to_its_end
    async def rest(self) -> None:
        """See `Store.rest`.

        Raises:
            StoreError: nothing was noted.
        """
        async with self._transaction() as connection:
            await self._set_meta(connection, "at_rest", "1")

    @_to_its_end
    async def waiting_lanes(self, after: WaitingLane | None, limit: int) -> list[WaitingLane]:
        """See `Store.waiting_lanes`. They come by their keys as they are packed, as the index has them.

        Raises:
            StoreError: the database could not say.
        """
        values = {"after_key": b"" if after is None else pack(after.key), "lanes": limit}
        async with self._transaction() as connection:
            rows = (await connection.execute(_select_lanes, values)).all()
        return [WaitingLane(key=unpack_key(key), count=count, due_ns=due_ns) for key, count, due_ns in rows]

    @_to_its_end
    async def parked_keys(self, after: int, limit: int) -> list[ParkedKey]:
        """See `Store.parked_keys`.

        Raises:
            StoreError: the database could not say.
        """
        position = DEAD.c.position
        # The first condition is the index's own: without it, that is not used.
        statement = select(DEAD.c.key, position).where(text("position > 0"), position > after).order_by(position)
        async with self._transaction() as connection:
            rows = (await connection.execute(statement.limit(limit))).all()
        return [ParkedKey(unpack_key(key), at) for key, at in rows]

    @_to_its_end
    async def load_waiting(self, lanes: Sequence[LaneHead], bytes_max: int = ANY_SIZE) -> list[list[WaitingEvent]]:
        """See `Store.load_waiting`.

        Two statements for many lanes: where their first events lie and how large those are, and then what fits of them.

        Raises:
            StoreError: the database could not say.
        """
        asked = [(pack(lane.key), lane.after, lane.limit) for lane in lanes]
        async with self._transaction() as connection:
            sizes: list[list[tuple[int, int]]] = [[] for _ in lanes]
            for first, found in await self._find_heads.rows(connection, asked):
                for lane, position, size in found:
                    sizes[first + lane].append((position, size))
            for lane_sizes in sizes:
                lane_sizes.sort()
            taken = fitting_lanes(sizes, lambda one: one[1], bytes_max)
            positions = [(position,) for lane_sizes in taken for position, _ in lane_sizes]
            rows = {
                row.position: row
                for _, found in await self._select_waiting.rows(connection, positions)
                for row in map(to_waiting, found)
            }
        return [[rows[position] for position, _ in lane_sizes] for lane_sizes in taken]

    @_to_its_end
    async def outcomes(self, publisher: bytes, first: int) -> tuple[list[int], list[int]]:
        """The sequences from `first` on that this publisher has among the dead and among the waiting and scheduled, sorted.

        Raises:
            StoreError: the database could not say.
        """
        async with self._transaction() as connection:
            dead, waiting, scheduled = [
                set(
                    await connection.scalars(
                        select(table.c.seq).where(table.c.publisher == publisher, table.c.seq >= first)
                    )
                )
                for table in (DEAD, WAITING, SCHEDULED)
            ]
            waiting |= scheduled
            if self._counts.removed:
                asked = select(REMOVED.c.seq, REMOVED.c.was_dead)
                asked = asked.where(REMOVED.c.publisher == publisher, REMOVED.c.seq >= first)
                for seq, was_dead in (await connection.execute(asked)).all():
                    (dead if was_dead else waiting).add(seq)
        return sorted(dead), sorted(waiting)

    @_to_its_end
    async def due(
        self, until_ns: int, after: tuple[int, int], limit: int, bytes_max: int = ANY_SIZE
    ) -> list[StoredScheduled]:
        """See `Store.due`.

        Raises:
            StoreError: the database could not say.
        """
        async with self._transaction() as connection:
            found = await self._due_with.read(connection, after, limit, bytes_max) if after[0] <= until_ns else []
            if len(found) < limit:
                left = bytes_max - sum(len(one.event.envelope.body) for one in found)
                later = await self._due_later.read(connection, (after[0], until_ns), limit - len(found), left)
                if found and later and len(later[0].event.envelope.body) > left:
                    later = []  # a page's first only may be larger than it
                found += later
        return found

    @_to_its_end
    async def due_above(self, row: int, until_ns: int, limit: int, bytes_max: int = ANY_SIZE) -> list[StoredScheduled]:
        """See `Store.due_above`.

        Raises:
            StoreError: the database could not say.
        """
        async with self._transaction() as connection:
            return await self._due_above.read(connection, (row, until_ns), limit, bytes_max)

    @_to_its_end
    async def schedule_state(self) -> ScheduleState:
        """See `Store.schedule_state`.

        Raises:
            StoreError: the database could not say.
        """
        async with self._transaction() as connection:
            lowest = await connection.scalar(select(func.min(SCHEDULED.c.due_ns)))
            row_max = await connection.scalar(select(func.max(SCHEDULED.c.id)))
            return ScheduleState(
                next_due_ns=lowest or 0,
                row_max=row_max or 0,
                begun_until_ns=await self._counter(connection, "begun_until_ns"),
            )

    @_to_its_end
    async def next_due(self, after_ns: int) -> int:
        """See `Store.next_due`.

        Raises:
            StoreError: the database could not say.
        """
        async with self._transaction() as connection:
            found = await connection.scalar(select(func.min(SCHEDULED.c.due_ns)).where(SCHEDULED.c.due_ns > after_ns))
        return found or 0

    @_to_its_end
    async def unschedule(self, publisher: bytes, seq: int) -> list[int]:
        """See `Store.unschedule`.

        Raises:
            StoreError: nothing was removed.
        """
        async with self._transaction() as connection:
            asked = await connection.scalars(
                select(SCHEDULED.c.id).where(SCHEDULED.c.publisher == publisher, SCHEDULED.c.seq == seq)
            )
            found = list(asked)
            known = await self._note_removed(connection, self._note_cancelled, found)
            rows, size = await self._remove_scheduled(connection, found)
        counts = self._counts
        self._counts = replace(
            counts,
            waiting=counts.waiting - rows,
            scheduled=counts.scheduled - rows,
            removed=known,
            bytes=counts.bytes - size,
        )
        return found

    @_to_its_end
    async def dead_letters(
        self, where: DeadFilter, after: int, limit: int, bytes_max: int = ANY_SIZE
    ) -> list[StoredDeadLetter]:
        """See `Store.dead_letters`.

        Raises:
            StoreError: the database could not say.
        """
        conditions = [DEAD.c.id > after]
        if where.type is not None:
            conditions.append(DEAD.c.type == where.type)
        if where.key is not None:
            conditions.append(DEAD.c.key == pack(where.key[0]))
        if where.reason is not None:
            conditions.append(DEAD.c.reason == where.reason)
        if where.handler is not None:
            conditions.append(DEAD.c.handlers.contains(f"\n{where.handler}\n", autoescape=True))
        if where.since_ns:
            conditions.append(DEAD.c.last_ns >= where.since_ns)
        if where.until_ns < 2**63 - 1:
            conditions.append(DEAD.c.last_ns <= where.until_ns)
        if where.events is not None:
            conditions.append(tuple_(DEAD.c.publisher, DEAD.c.seq).in_(where.events))
        async with self._transaction() as connection:
            if bytes_max < ANY_SIZE:
                # How large they are is asked first: a page of the largest would fill the memory of a worker.
                sizes = (await connection.execute(_select_dead_sizes.where(*conditions).limit(limit))).scalars().all()
                limit = fitting(sizes, bytes_max)
            rows = (await connection.execute(_select_dead.where(*conditions).limit(limit))).all()
        return [StoredDeadLetter(row[0], to_dead(row[1:])) for row in rows]

    @_to_its_end
    async def purge(self, rows: Sequence[int]) -> int:
        """See `Store.purge`.

        Raises:
            StoreError: nothing was removed.
        """
        async with self._transaction() as connection:
            known = await self._note_removed(connection, self._note_purged, rows)
            removed = await self._remove_dead(connection, rows, "purged")
        counts = self._without(removed)
        self._counts = replace(counts, purged=counts.purged + removed.rows, removed=known)
        return removed.rows

    @_to_its_end
    async def drop_oldest(self, *, rows: int, size: int, keep: Collection[int] = ()) -> int:
        """See `Store.drop_oldest`.

        Raises:
            StoreError: nothing was removed.
        """
        async with self._transaction() as connection:
            removed, last, limit = _NOTHING, 0, _DROP_ROWS + len(keep)
            while removed.rows < rows or removed.bytes < size:
                found = (await connection.execute(_select_oldest.where(DEAD.c.id > last).limit(limit))).all()
                oldest: list[int] = []
                freed = removed.bytes
                for row, body_bytes in found:
                    last = row
                    if row not in keep and (removed.rows + len(oldest) < rows or freed < size):
                        oldest.append(row)
                        freed += body_bytes + ROW_OVERHEAD_BYTES
                removed = removed.plus(await self._remove_dead(connection, oldest, "dropped"))
                if len(found) < limit:
                    break
        counts = self._without(removed)
        self._counts = replace(counts, dropped=counts.dropped + removed.rows)
        return removed.rows

    async def _remove_dead(self, connection: AsyncConnection, rows: Sequence[int], counter: str) -> _Removed:
        """Remove dead letters, and the tracebacks that were theirs alone, and count them as `counter`."""
        removed = [(row,) for row in rows]
        count, bodies, parked, parked_bodies = await self._sum_dead.totals(connection, removed, 4)
        places = {place for _, found in await self._select_places.rows(connection, removed) for (place,) in found}
        await self._delete_dead.run(connection, removed)
        orphans = {
            place: length
            for _, found in await self._select_orphans.rows(connection, [(place,) for place in sorted(places)])
            for place, length in found
        }
        await self._delete_tracebacks.run(connection, [(place,) for place in orphans])
        await self._set_meta(connection, counter, str(await self._counter(connection, counter) + count))
        size = bodies + ROW_OVERHEAD_BYTES * count + sum(map(traceback_bytes, orphans.values()))
        droppable = size - parked_bodies - ROW_OVERHEAD_BYTES * parked
        return _Removed(count, parked, size, droppable, frozenset(orphans))

    async def _note_removed(self, connection: AsyncConnection, note: Statement, rows: Sequence[int]) -> int:
        """Keep the identities of what is about to be removed; return of how many they are kept."""
        known = self._counts.removed + await note.run(connection, [(row,) for row in rows])
        if known > REMOVED_MAX:
            last = await connection.scalar(select(func.max(REMOVED.c.id)))
            await connection.execute(delete(REMOVED).where(REMOVED.c.id <= (last or 0) - REMOVED_MAX))
        return min(known, REMOVED_MAX)

    def _without(self, removed: _Removed) -> StoreCounts:
        """The counts without what was removed, once that is committed."""
        self._known_places -= removed.places
        counts = self._counts
        return replace(
            counts,
            dead=counts.dead - removed.rows,
            parked=counts.parked - removed.parked,
            bytes=counts.bytes - removed.bytes,
            droppable_bytes=counts.droppable_bytes - removed.droppable_bytes,
        )

    async def _remove_scheduled(self, connection: AsyncConnection, rows: Sequence[int]) -> tuple[int, int]:
        """Remove scheduled events; how many there were, and the bytes that they counted for."""
        removed = [(row,) for row in rows]
        count, bodies = await self._sum_scheduled.totals(connection, removed, 2)
        await self._delete_scheduled.run(connection, removed)
        return count, bodies + ROW_OVERHEAD_BYTES * count

    async def _measure(self, connection: AsyncConnection) -> StoreCounts:
        """Count everything: it reads all rows."""
        dead, bodies, parked, parked_bodies, parked_at = (await connection.execute(_measure_dead)).one()
        waiting, waiting_bodies, position_max = (await connection.execute(_measure_waiting)).one()
        scheduled, scheduled_bodies = (await connection.execute(_measure_scheduled)).one()
        waiting += scheduled
        waiting_bodies += scheduled_bodies
        places, characters = tuple((await connection.exec_driver_sql(_SUM_TRACEBACKS)).one())
        tracebacks = characters + ROW_OVERHEAD_BYTES * places
        droppable_bytes = bodies - parked_bodies + ROW_OVERHEAD_BYTES * (dead - parked) + tracebacks
        counters = {name: await self._counter(connection, name) for name in ("redriven", "purged", "dropped")}
        return StoreCounts(
            dead=dead,
            waiting=waiting,
            scheduled=scheduled,
            parked=parked,
            removed=await connection.scalar(select(func.count()).select_from(REMOVED)) or 0,
            position_max=max(position_max, parked_at),
            bytes=bodies + waiting_bodies + ROW_OVERHEAD_BYTES * (dead + waiting) + tracebacks,
            droppable_bytes=droppable_bytes,
            **counters,
        )

    @staticmethod
    async def _counter(connection: AsyncConnection, name: str) -> int:
        return int(await connection.scalar(select(META.c.value).where(META.c.name == name)) or 0)

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
        """One transaction: committed at the end, rolled back by any exception; a broken connection is let go.

        Raises:
            StoreError: the database refused something, or is gone.
        """
        assert self._opened, "open() comes first"
        try:
            connection = self._connection or await self._connect()
            async with connection.begin():
                yield connection
        except (DBAPIError, OSError) as error:
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                await self._disconnect()
            raise StoreError(f"the store {self._name}: {_reason(error)}") from error

    def _make_private(self) -> None:
        """Let a new file be its owner's alone: it holds what events hold. SQLite gives its log the mode of the file."""
        url = self._engine.url
        if self._sqlite and url.database not in (None, "", ":memory:") and not url.query.get("uri"):
            with suppress(OSError):  # it is there, or cannot be: then SQLite says why
                os.close(os.open(str(url.database), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    async def _connect(self) -> AsyncConnection:
        self._make_private()
        connection = await self._engine.connect()
        try:
            if self._sqlite:
                waits = [f"busy_timeout={int(seconds * 1000)}" for seconds in (_OPEN_TIMEOUT_S, _BUSY_TIMEOUT_S)]
                for pragma in (waits[0], *_SQLITE_PRAGMAS, waits[1]):
                    await connection.exec_driver_sql(f"PRAGMA {pragma}")
                await connection.commit()
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        return connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _check_version(self, connection: AsyncConnection) -> None:
        """Refuse tables of another version that hold something; remove those that hold nothing."""
        if not await connection.run_sync(lambda sync: inspect(sync).has_table(META.name)):
            return
        found = await connection.scalar(select(META.c.value).where(META.c.name == "schema_version"))
        if found is None or found == str(SCHEMA_VERSION) or found in GROWS_FROM:
            return
        there = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
        for table in (DEAD, WAITING, SCHEDULED):
            if table.name in there and await connection.scalar(select(func.count()).select_from(text(table.name))):
                raise StoreError(
                    f"the store {self._name} has schema version {found}, this shardbus knows {SCHEMA_VERSION}; open it with "
                    "the shardbus that wrote it to export what it holds, or name another store with --dead-letters"
                )
        await connection.run_sync(METADATA.drop_all)

    @staticmethod
    async def _set_meta(connection: AsyncConnection, name: str, value: str) -> None:
        changed = await connection.execute(update(META).where(META.c.name == name).values(value=value))
        if not changed.rowcount:
            await connection.execute(insert(META).values(name=name, value=value))

    async def _check_shards(self, connection: AsyncConnection, shards: int, *, holds_rows: bool) -> None:
        found = await connection.scalar(select(META.c.value).where(META.c.name == "shards"))
        if found not in (None, str(shards)) and holds_rows:
            raise StoreError(
                f"the store {self._name} holds dead letters or waiting events of a bus with {found} "
                f"shard{'' if found == '1' else 's'}; serve with --workers {found}, or name another store with "
                "--dead-letters"
            )
        await self._set_meta(connection, "shards", str(shards))

    def _new_places(self, dead: Sequence[DeadLetter]) -> dict[str, str]:
        """The tracebacks that may not be stored yet, by place. The first of a place stays."""
        places: dict[str, str] = {}
        for letter in dead:
            if letter.traceback and letter.place not in self._known_places:
                places.setdefault(storable(letter.place), storable(letter.traceback))
        return places


class _Removed(NamedTuple):
    """What dead letters that were removed had counted for."""

    rows: int
    parked: int
    bytes: int
    droppable_bytes: int
    places: frozenset[str]  # whose tracebacks went with them

    def plus(self, other: _Removed) -> _Removed:
        return _Removed(
            self.rows + other.rows,
            self.parked + other.parked,
            self.bytes + other.bytes,
            self.droppable_bytes + other.droppable_bytes,
            self.places | other.places,
        )


_NOTHING: Final = _Removed(0, 0, 0, 0, frozenset())


def _reason(error: DBAPIError | OSError) -> str:
    """The database's own words, without the statement and its values."""
    return str(error.orig) if isinstance(error, DBAPIError) else str(error)
