"""Keeps the configuration, and what else must survive a restart, in SQLite; nothing else knows the database.

One table for each resource, its columns derived from the model's declarations (``migrations`` beside this
file has them spelled out, version by version). The model has checked everything before it comes here: the
database holds no rule but types.

What is promised:

- When ``save`` or ``put`` returns, the change is on the medium: WAL mode with ``synchronous=FULL`` syncs
  the log at every commit. A change is one transaction, so after kill -9 or power loss all of it is there or
  none of it. A cancelled caller does not cancel the transaction under way.
- The file and everything beside it is readable by its owner alone (0600), because CHAP needs the secrets in
  clear and they are in it. What is deleted is overwritten (``secure_delete``).
- One daemon a store: the second is refused.
- A file that is no store of ours, is damaged, or was written by a newer version is refused and left exactly
  as it is, not even opened for writing: it is looked at through a connection that cannot write, or in a copy
  where a log or journal beside it has to be played back first.
- An older schema is migrated in one transaction, after a copy of the file was put beside it.
- A state directory can be renamed or moved: files of extents below it are kept relative to it.
- A file system without any room left keeps nobody from reading what is stored, at the start too: then there
  is no shared index of the log (``locking_mode=EXCLUSIVE``), and changes are refused until there is room.
"""

import asyncio
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from targetd.config import (
    COLLECTIONS,
    Collection,
    Configuration,
    Extent,
    FieldRule,
    GlobalConfiguration,
    Resource,
    diff,
    rules,
)
from targetd.persistence import migrations
from targetd.persistence.interface import UNITS, StoreError, StoreFullError
from targetd.system.threads import run_in_thread

__all__ = ["METADATA", "Store", "StoreError"]

log = logging.getLogger("targetd.store")

_APPLICATION_ID = int.from_bytes(b"iSTd", "big")
"""In the file's header: tells our stores from other people's databases."""


# -- Tables --------------------------------------------------------------------------------------------


class _Strings(sa.types.TypeDecorator[tuple[str, ...]]):
    """A tuple of strings, as a JSON list."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> tuple[str, ...] | None:
        return None if value is None else tuple(json.loads(value))


_COLUMN_TYPES: Mapping[type, type[sa.types.TypeEngine[Any]]] = {
    int: sa.Integer,
    str: sa.Text,
    bool: sa.Boolean,
    tuple: _Strings,
}


def _column(rule: FieldRule) -> "sa.Column[Any]":
    if rule.attribute == "id":
        return sa.Column("id", sa.Integer, primary_key=True)
    return sa.Column(rule.attribute, _COLUMN_TYPES[rule.type], nullable=rule.nullable)


METADATA = sa.MetaData()
"""What this program expects in the file."""

_TABLES: Mapping[Collection, sa.Table] = {
    collection: sa.Table(collection, METADATA, *map(_column, rules(cls).values()))
    for collection, cls in COLLECTIONS.items()
}
_GLOBALS = sa.Table(
    "globals",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    *map(_column, rules(GlobalConfiguration).values()),
    sa.Column("service_enabled", sa.Boolean, nullable=False),
)
"""One row, with id 1; none in a fresh store."""
_LAST_IDS = sa.Table(
    "last_ids",
    METADATA,
    sa.Column("collection", sa.Text, primary_key=True),
    sa.Column("last_id", sa.Integer, nullable=False),
)
_KEPT = sa.Table(
    "kept",
    METADATA,
    sa.Column("namespace", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),
)


_FORGET = sa.delete(_KEPT).where(_KEPT.c.namespace == UNITS, _KEPT.c.key.op("GLOB")(sa.bindparam("gone")))
"""All that the units of an extent had kept."""


def _put(table: sa.Table) -> sa.Insert:
    """Insert, or replace the row of the same primary key."""
    return sa.insert(table).prefix_with("OR REPLACE")


def _values(obj: Resource | GlobalConfiguration) -> dict[str, Any]:
    return {name: getattr(obj, name) for name in rules(type(obj))}


def _row(obj: Resource, directory: Path) -> dict[str, Any]:
    """As it is kept; the file of an extent below ``directory``, that of the store, relative to it."""
    values = _values(obj)
    if isinstance(obj, Extent) and obj.type == "File":
        values["path"] = migrations.relative(obj.path, directory)
    return values


def _object(cls: type[Resource], row: Mapping[str, Any], directory: Path) -> Resource:
    """What ``_row`` has kept."""
    if cls is Extent:
        return cls(**{**row, "path": migrations.absolute(row["path"], directory)})
    return cls(**row)


# -- The store -----------------------------------------------------------------------------------------


class Store:
    """The configuration on disk. ``await Store.open(path)`` makes one."""

    def __init__(self, path: Path, lock: int, engine: AsyncEngine, connection: AsyncConnection) -> None:
        self.path = path
        self.fresh = True
        """No configuration was ever saved here."""
        self._lock = lock
        self._engine = engine
        self._connection = connection
        self._turn = asyncio.Lock()
        self._closed = False

    @classmethod
    async def open(cls, path: Path) -> "Store":
        """Open the store at ``path``, making it if there is none and migrating it if it is older.

        Raises:
            StoreError: it cannot or must not be used; the file is as it was.
        """
        lock = await run_in_thread(_prepare, path)
        try:
            try:
                return await cls._opened(path, lock, _async_engine(path))
            except (SQLAlchemyError, StoreError) as error:
                if not await run_in_thread(_is_full, path, error):
                    raise
                store = await cls._opened(path, lock, _async_engine(path, alone=True))
        except BaseException as error:
            os.close(lock)
            if isinstance(error, SQLAlchemyError):
                raise _failure(path, error) from error
            raise
        log.error(
            "%s: its file system is full. What is stored is served; changes wait for room",
            path,
        )
        return store

    @classmethod
    async def _opened(cls, path: Path, lock: int, engine: AsyncEngine) -> "Store":
        try:
            store = cls(path, lock, engine, await engine.connect())
            async with store._transaction() as connection:
                rows = await connection.scalar(sa.select(sa.func.count()).select_from(_GLOBALS))
            store.fresh = not rows
        except BaseException:
            await engine.dispose()
            raise
        return store

    async def load(self) -> Configuration:
        """Everything as it was last saved; an empty ``Configuration`` from a fresh store."""
        parts: dict[str, Any] = {}
        async with self._transaction() as connection:
            for collection, cls in COLLECTIONS.items():
                rows = await connection.execute(sa.select(_TABLES[collection]).order_by("id"))
                found = (_object(cls, dict(row._mapping), self.path.parent) for row in rows)
                parts[collection] = {obj.id: obj for obj in found}
            rows = await connection.execute(sa.select(_LAST_IDS))
            parts["last_ids"] = {row.collection: row.last_id for row in rows}
            row = (await connection.execute(sa.select(_GLOBALS))).first()
        if row is not None:
            values = dict(row._mapping)
            del values["id"]
            parts["service_enabled"] = values.pop("service_enabled")
            parts["globals"] = GlobalConfiguration(**values)
        return Configuration(**parts)

    async def save(self, old: Configuration, new: Configuration) -> None:
        """Make the stored configuration, which is ``old``, into ``new``: all of it, durably, or none of it.

        With an extent goes what its units had kept.

        Raises:
            StoreError: the disk is full or fails; what is stored is still ``old``.
        """

        async def write(connection: AsyncConnection) -> None:
            for collection, change in diff(old, new).items():
                table = _TABLES[collection]
                if change.removed:
                    gone = sa.delete(table).where(table.c.id == sa.bindparam("gone"))
                    await connection.execute(gone, [{"gone": id} for id in change.removed])
                    if collection == "extents":
                        await connection.execute(_FORGET, [{"gone": f"{id}/*"} for id in change.removed])
                if change.written:
                    written = [_row(obj, self.path.parent) for obj in change.written.values()]
                    await connection.execute(_put(table), written)
            ids = [
                {"collection": collection, "last_id": id}
                for collection, id in new.last_ids.items()
                if old.last_ids.get(collection) != id
            ]
            if ids:
                await connection.execute(_put(_LAST_IDS), ids)
            same = (old.globals, old.service_enabled) == (new.globals, new.service_enabled)
            if self.fresh or not same:
                row = {"id": 1, **_values(new.globals), "service_enabled": new.service_enabled}
                await connection.execute(_put(_GLOBALS), row)

        await self._write(write)
        self.fresh = False

    async def put(self, namespace: str, key: str, value: bytes | None) -> None:
        """Keep these bytes under this name, durably; None forgets them. Raises as ``save`` does."""

        async def write(connection: AsyncConnection) -> None:
            if value is None:
                await connection.execute(
                    sa.delete(_KEPT).where(_KEPT.c.namespace == namespace, _KEPT.c.key == key)
                )
            else:
                await connection.execute(_put(_KEPT), {"namespace": namespace, "key": key, "value": value})

        await self._write(write)

    async def items(self, namespace: str) -> dict[str, bytes]:
        """Everything kept under a namespace: key → bytes."""
        async with self._transaction() as connection:
            rows = await connection.execute(
                sa.select(_KEPT).where(_KEPT.c.namespace == namespace).order_by("key")
            )
            return {row.key: row.value for row in rows}

    async def forget_traces(self, name: str) -> None:
        """Forget what all units have kept under a name."""

        async def write(connection: AsyncConnection) -> None:
            await connection.execute(_FORGET, {"gone": f"*/{name}"})

        await self._write(write)

    async def close(self) -> None:
        """Let transactions under way finish, fold the log into the file, let the next daemon in."""
        async with self._turn:
            if self._closed:
                return
            self._closed = True
            try:
                await self._connection.close()
                await self._engine.dispose()
            finally:
                os.close(self._lock)

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
        """One transaction at a time: there is one connection, hence one thread."""
        async with self._turn:
            if self._closed:
                raise StoreError(f"{self.path}: the store is closed")
            try:
                async with self._connection.begin():
                    yield self._connection
            except (SQLAlchemyError, ValueError, TypeError) as error:
                raise _failure(self.path, error) from error

    async def _write(self, work: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        async def transaction() -> None:
            async with self._transaction() as connection:
                await work(connection)

        # a caller that goes away leaves a transaction that ends by itself, never half of one
        await asyncio.shield(asyncio.ensure_future(transaction()))


# -- Connections ---------------------------------------------------------------------------------------

_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "busy_timeout=5000")
_ALONE = "locking_mode=EXCLUSIVE"
"""Before all others: the index of the log is then in memory, not in a file beside it that takes 32 KiB. Only
for a full file system, as it keeps the operator's own tools out."""


def _on_connect(pragmas: tuple[str, ...], connection: Any, record: object) -> None:
    # SQLite's module would begin transactions by its own rules, and none before CREATE TABLE; we begin them
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in pragmas:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _on_begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _listen(engine: sa.Engine, *first: str) -> None:
    sa.event.listen(engine, "connect", partial(_on_connect, (*first, *_PRAGMAS)))
    sa.event.listen(engine, "begin", _on_begin)


def _async_engine(path: Path, *, alone: bool = False) -> AsyncEngine:
    engine = create_async_engine(sa.URL.create("sqlite+aiosqlite", database=str(path)), poolclass=NullPool)
    _listen(engine.sync_engine, *((_ALONE,) if alone else ()))
    return engine


def _reason(error: BaseException) -> str:
    # never str() of SQLAlchemy's own errors: they quote the statement's parameters, secrets too
    if isinstance(error, OSError | sqlite3.Error):
        return str(error)
    return str(getattr(error, "orig", None) or type(error).__name__)


def _is_full(path: Path, error: BaseException) -> bool:
    """Whether it went wrong for want of room. SQLite has a word for that where it writes; where it makes its
    files larger, and over quota, it says that reading or writing failed."""
    cause = getattr(error, "orig", None) or error
    if isinstance(cause, StoreError):
        return cause.full
    if isinstance(cause, OSError):
        return cause.errno in (errno.ENOSPC, errno.EDQUOT)
    name = getattr(cause, "sqlite_errorname", "")
    if name == "SQLITE_FULL":
        return True
    return name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")) and not _has_room(path)


def _has_room(path: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=path.parent) as trial:
            os.posix_fallocate(trial.fileno(), 0, _ROOM)
    except OSError as error:
        return error.errno not in (errno.ENOSPC, errno.EDQUOT)
    return True


_ROOM = 65536
"""Bytes that SQLite makes its files larger by at the most."""


def _failure(path: Path, error: BaseException) -> StoreError:
    """The error for an operator."""
    if _is_full(path, error):
        return StoreFullError(
            f"{path}: there is no space left on its file system, or its quota is used up ({_reason(error)}); "
            "nothing was changed. Make room there and try again"
        )
    return StoreError(f"{path}: {_reason(error)}")


# -- Before it is opened -------------------------------------------------------------------------------


def _prepare(path: Path) -> int:
    """Claim, judge, make and migrate the file; returns the descriptor that holds the claim."""
    lock = _claim(path)
    try:
        try:
            version = _judge(path)
            _make_private(path)
            if version != migrations.HEAD:
                _migrate(path, version)
        except (OSError, sqlite3.Error, SQLAlchemyError) as error:
            if _is_full(path, error):
                raise _failure(path, error) from error
            raise StoreError(f"{path}: cannot be used as a store: {_reason(error)}") from error
    except BaseException:
        os.close(lock)
        raise
    return lock


def _claim(path: Path) -> int:
    """One daemon a store. The lock is on a file beside it, as SQLite has locks of its own on the file."""
    beside = _beside(path, ".lock")
    try:
        lock = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{beside}: {error.strerror}; the state directory must be writable") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(lock, 32).decode("ascii", "replace").strip()
        os.close(lock)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise StoreError(f"{beside}: {error.strerror}") from error
        raise StoreError(
            f"{path} is in use by another iscsi-targetd (process {owner or 'unknown'}); stop that one, "
            "or give this one its own --state-dir"
        ) from None
    try:
        # Not emptied first: on a full file system the block that it has might not come back.
        os.pwrite(lock, f"{os.getpid():<20}\n".encode(), 0)
    except OSError as error:
        log.warning(
            "%s does not name this process: %s", beside, error.strerror
        )  # it is the lock all the same
    return lock


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _judge(path: Path) -> str | None:
    """The file's schema version, None if there is nothing in it yet; the file is not written to.

    Raises:
        StoreError: it is not to be touched.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{path} is not a regular file; move it away, or give another --state-dir")
    logs = [log for log in (_beside(path, "-wal"), _beside(path, "-journal")) if _size(log)]
    if not status.st_size and not logs:
        return None
    advice = "restore it from a backup, or move it away to start with an empty configuration"
    try:
        with _read_only(path, logs) as connection:
            faults = [row[0] for row in connection.execute("PRAGMA quick_check(1)")]
            if faults != ["ok"]:
                raise StoreError(f"{path} is damaged ({faults[0]}); {advice}")
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema")}
            if not tables:
                return None
            (owner,) = connection.execute("PRAGMA application_id").fetchone()
            if owner != _APPLICATION_ID or "alembic_version" not in tables:
                raise StoreError(f"{path} is a database, but not one of iscsi-targetd; {advice}")
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            version = str(row[0]) if row else ""
    except sqlite3.DatabaseError as error:
        raise StoreError(f"{path} is damaged or not a store at all ({error}); {advice}") from error
    if not re.fullmatch("[0-9]{4}", version):
        raise StoreError(f"{path} is damaged (its schema version is {version!r}); {advice}")
    if version > migrations.HEAD:
        raise StoreError(
            f"{path} was written by a newer iscsi-targetd (schema {version}, this one knows up to "
            f"{migrations.HEAD}); install that version or a later one, or put back the copy that it made "
            "beside the file when it upgraded it"
        )
    return version


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def _read_only(path: Path, logs: list[Path]) -> Iterator[sqlite3.Connection]:
    """A connection that leaves the file alone, and makes no file beside it.

    After a crash the truth is in the file and its log together, and SQLite can only put them together by
    writing; so that is done to a copy. A store is some megabytes at the most. Where its own file system has
    no room for it, the copy is in memory (/dev/shm).
    """
    if not logs:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as it:
            yield it
        return
    with ExitStack() as stack:
        for place in (path.parent, Path("/dev/shm")):
            try:
                directory = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix=path.name + ".", dir=place, ignore_cleanup_errors=True)
                )
                for source in (path, *logs):
                    shutil.copyfile(source, Path(directory, source.name))
                it = stack.enter_context(closing(sqlite3.connect(Path(directory, path.name))))
                it.execute(f"PRAGMA {_ALONE}")
                it.execute("SELECT count(*) FROM sqlite_schema")  # plays back what is in the logs
                break
            except (OSError, sqlite3.Error) as error:
                if place != path.parent or not _is_full(path, error):
                    raise
        yield it


def _make_private(path: Path) -> None:
    """Owner only; SQLite gives its log and its shared memory the mode of the file itself."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    for each in (path, _beside(path, "-wal"), _beside(path, "-shm"), _beside(path, "-journal")):
        if each.exists():
            each.chmod(0o600)
    _sync(path.parent)


def _migrate(path: Path, version: str | None) -> None:
    if version is not None:
        _copy(path, _beside(path, f".{version}.bak"))
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), poolclass=NullPool)
    _listen(engine)
    try:
        with engine.begin() as connection:
            if version is None:
                METADATA.create_all(connection, checkfirst=False)
                migrations.stamp(connection)
            else:
                migrations.upgrade(connection, directory=path.parent)
            connection.exec_driver_sql(f"PRAGMA application_id={_APPLICATION_ID}")
    finally:
        engine.dispose()


def _copy(path: Path, to: Path) -> None:
    """A whole copy of the store, its log folded in, durable and private; replaces an older one."""
    making = _beside(to, ".new")
    making.unlink(missing_ok=True)
    os.close(os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(making)) as copy:
        source.backup(copy)
    _sync(making)
    making.replace(to)
    _sync(to.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
