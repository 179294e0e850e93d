"""The store: what was saved is there, whatever happens; what is not ours is left alone."""

import asyncio
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, given, settings

from targetd.config import Configuration, Target, add, fresh, next_id, remove, rules, validate
from targetd.persistence import migrations
from targetd.persistence.interface import UNITS
from targetd.persistence.store import METADATA, Store, StoreError
from tests.targetd.configurations import any_configuration, extent, small

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new store, made once: the schema takes longer than most tests."""
    path = tmp_path_factory.mktemp("template") / "store.db"

    async def make() -> None:
        await (await Store.open(path)).close()

    asyncio.run(make())
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(template, tmp_path / "store.db"))


@pytest.fixture
async def store(path: Path) -> AsyncIterator[Store]:
    store = await Store.open(path)
    yield store
    await store.close()


def times(path: Path) -> int:
    return path.stat().st_mtime_ns


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the lock, which says nothing about the store."""
    return {each.name: each.read_bytes() for each in directory.iterdir() if not each.name.endswith(".lock")}


async def reopened(path: Path) -> Configuration:
    store = await Store.open(path)
    try:
        return await store.load()
    finally:
        await store.close()


# -- Saving and loading --------------------------------------------------------------------------------


async def test_a_new_store_is_fresh_until_something_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = await Store.open(path)
    assert store.fresh
    assert await store.load() == Configuration()
    await store.close()
    # a start that died before its first save left nothing
    store = await Store.open(path)
    assert store.fresh
    await store.save(Configuration(), fresh())
    assert not store.fresh
    await store.close()
    store = await Store.open(path)
    assert not store.fresh
    assert await store.load() == fresh()
    await store.close()


def test_any_configuration_is_loaded_as_it_was_saved(template: Path, tmp_path: Path) -> None:
    @given(any_configuration(), any_configuration())
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    def run(first: Configuration, second: Configuration) -> None:
        asyncio.run(round_trip(first, second))

    async def round_trip(first: Configuration, second: Configuration) -> None:
        path = Path(shutil.copy(template, tmp_path / "store.db"))
        store = await Store.open(path)
        await store.save(Configuration(), first)
        assert await store.load() == first
        # ids once given out stay given out
        merged = replace(second, last_ids={**first.last_ids, **second.last_ids})
        await store.save(first, merged)
        await store.close()
        loaded = await reopened(path)
        assert loaded == merged
        assert all(list(each) == sorted(each) for each in (loaded.extents, loaded.targets, loaded.portals))

    run()


async def test_files_below_the_state_directory_move_with_it(tmp_path: Path) -> None:
    """A renamed clone, a restored backup: what was beside the store is beside it still."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    paths = {  # before -> after
        f"{here}/extents/a.img": f"{there}/extents/a.img",
        f"{here}/extents//b.img": f"{there}/extents//b.img",
        f"{here}/../here/c.img": f"{here}/../here/c.img",
        f"{here}er/d.img": f"{here}er/d.img",
        "/mnt/e.img": "/mnt/e.img",
    }
    config = Configuration()
    for id, path in enumerate(paths, 1):
        config = add(config, "extents", extent(id, path=path))
    device = extent(6, type="Device", path=f"{here}/device")
    config = add(config, "extents", device)
    store = await Store.open(here / "store.db")
    await store.save(Configuration(), config)
    assert await store.load() == config
    await store.close()
    here.rename(there)
    moved = await reopened(there / "store.db")
    assert [moved.extents[id].path for id in range(1, 6)] == list(paths.values())
    assert moved.extents[6] == device


async def test_an_older_store_learns_which_files_are_below_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "here" / "store.db"
    path.parent.mkdir()
    make_at(path, "0006")
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        row = {**store_row(extent(1)), "path": f"{path.parent}/extents/a.img"}
        connection.execute(sa.insert(METADATA.tables["extents"]), row)
    engine.dispose()
    await (await Store.open(path)).close()
    path.parent.rename(tmp_path / "there")
    moved = await reopened(tmp_path / "there" / "store.db")
    assert moved.extents[1].path == f"{tmp_path}/there/extents/a.img"


def store_row(obj: Any) -> dict[str, Any]:
    return {name: getattr(obj, name) for name in rules(type(obj))}


async def test_ids_are_not_reused_after_a_restart(store: Store, path: Path) -> None:
    """api-semantics §5."""
    config = add(small(), "extents", extent(7))
    await store.save(Configuration(), config)
    await store.save(config, remove(config, "extents", 7))
    await store.close()
    loaded = await reopened(path)
    assert 7 not in loaded.extents
    assert next_id(loaded, "extents") == 8


async def test_only_the_difference_is_written(store: Store) -> None:
    written: list[str] = []
    engine = store._connection.sync_engine
    sa.event.listen(engine, "before_cursor_execute", lambda *args: written.append(args[2].split(" (")[0]))
    config = small()
    await store.save(Configuration(), config)
    written.clear()
    changed = add(config, "targets", Target(id=9, name="ninth"))
    await store.save(config, changed)
    assert written == ["BEGIN IMMEDIATE", "INSERT OR REPLACE INTO targets", "INSERT OR REPLACE INTO last_ids"]
    written.clear()
    await store.save(changed, changed)
    assert written == ["BEGIN IMMEDIATE"]


async def test_bytes_are_kept_by_name(store: Store, path: Path) -> None:
    await store.put("reservations", "0x6025447", b"\x00\xff")
    await store.put("reservations", "b", b"")
    await store.put("users", "root", b"hash")
    await store.put("reservations", "0x6025447", b"later")
    await store.put("users", "root", None)
    await store.put("users", "nobody", None)
    assert await store.items("reservations") == {"0x6025447": b"later", "b": b""}
    assert await store.items("users") == {}
    await store.close()
    store = await Store.open(path)
    assert await store.items("reservations") == {"0x6025447": b"later", "b": b""}
    await store.close()


async def test_with_an_extent_goes_what_its_units_had_kept(store: Store, path: Path) -> None:
    kept = {f"{extent}/{name}": b"x" for extent in (1, 2, 12, 21) for name in ("mode", "reservations")}
    for key, value in kept.items():
        await store.put(UNITS, key, value)
    await store.put("other", "1/mode", b"x")
    config = small()
    await store.save(Configuration(), config)
    assert await store.items(UNITS) == kept
    await store.save(config, remove(config, "extents", 1))
    assert await store.items(UNITS) == {key: b"x" for key in kept if not key.startswith("1/")}
    assert await store.items("other") == {"1/mode": b"x"}


async def test_many_writers_at_once_all_get_their_turn(store: Store) -> None:
    await asyncio.gather(*(store.put("n", str(number), b"%d" % number) for number in range(100)))
    assert len(await store.items("n")) == 100


async def test_a_full_disk_changes_nothing_and_says_so(store: Store) -> None:
    """design.md §1: either all of it happens or none of it."""
    config = small()
    await store.save(Configuration(), config)
    async with store._transaction() as connection:
        pages = await connection.exec_driver_sql("PRAGMA page_count")
        await connection.exec_driver_sql(f"PRAGMA max_page_count={pages.scalar()}")
    large = config
    for id in range(10, 300):
        large = add(large, "extents", extent(1, id=id, name=f"e{id}", comment="secret words" * 9))
    with pytest.raises(StoreError, match="full") as caught:
        await store.save(config, large)
    assert "secret words" not in str(caught.value)
    assert await store.load() == config
    async with store._transaction() as connection:
        await connection.exec_driver_sql("PRAGMA max_page_count=1000000")
    await store.save(config, large)
    assert await store.load() == large


async def test_a_caller_that_is_cancelled_leaves_no_half(store: Store) -> None:
    config = Configuration()
    for id in range(1, 200):
        config = add(config, "extents", extent(1, id=id, name=f"e{id}"))
    saving = asyncio.create_task(store.save(Configuration(), config))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert await store.load() in (Configuration(), config)
    await store.put("still", "works", b"1")


async def test_a_closed_store_says_that_it_is(store: Store) -> None:
    await store.close()
    await store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.put("a", "b", b"c")


# -- Crashes -------------------------------------------------------------------------------------------

SAVES_IN_A_LOOP = """
import asyncio, sys
from pathlib import Path
from typing import Any
from targetd.config import Configuration, LunMapping, Target, add, next_id, remove
from targetd.persistence.store import Store
from tests.targetd.configurations import extent

async def main():
    store = await Store.open(Path(sys.argv[1]))
    config = await store.load()
    while True:
        id = next_id(config, "targets")
        new = add(config, "targets", Target(id=id, name=f"t{id}"))
        new = add(new, "extents", extent(1, id=id, name=f"e{id}", path=f"/mnt/e{id}", naa=""))
        new = add(new, "lun_mappings", LunMapping(id=id, target_id=id, extent_id=id, lun=0))
        if id > 5:
            new = remove(new, "targets", id - 5)
        await store.save(config, new)
        await store.put("acknowledged", "last", str(id).encode())
        config = new
        print(id, flush=True)

asyncio.run(main())
"""


def kill_after(path: Path, acknowledged: int) -> int:
    """Let a process save until so many were acknowledged, then kill it; returns the last that was."""
    with subprocess.Popen(
        [sys.executable, "-c", SAVES_IN_A_LOOP, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        last = 0
        for _ in range(acknowledged):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        return int(rest[-2]) if len(rest) > 1 else last


def test_what_was_acknowledged_survives_kill_9(path: Path) -> None:
    """design.md §6: acknowledged configuration survives kill −9 at any instant; nothing is half there."""
    for acknowledged in (1, 8, 40, 90):
        last = kill_after(path, acknowledged)
        config = asyncio.run(reopened(path))
        validate(config)
        newest = max(config.targets)
        assert newest - last in (0, 1), "one more may have been stored than was heard of"
        assert config.last_ids["targets"] == newest
        assert set(config.targets) == set(range(max(1, newest - 4), newest + 1))
        assert {mapping.target_id for mapping in config.lun_mappings.values()} == set(config.targets)


def test_a_log_left_by_a_crash_is_judged_together_with_its_file(path: Path) -> None:
    last = kill_after(path, 3)
    assert path.with_name("store.db-wal").stat().st_size > 0
    assert max(asyncio.run(reopened(path)).targets) >= last
    assert sorted(contents(path.parent)) == ["store.db"], "the copy that was judged is gone"


# -- Files ---------------------------------------------------------------------------------------------


def loosen(path: Path) -> None:
    path.chmod(0o644)


def modes(directory: Path) -> dict[str, int]:
    return {each.name: stat.S_IMODE(each.stat().st_mode) for each in directory.iterdir()}


async def test_every_file_is_for_the_owner_alone(tmp_path: Path) -> None:
    """design.md §6: state files 0600, whatever the umask."""
    path = tmp_path / "store.db"
    umask = os.umask(0)
    try:
        store = await Store.open(path)
        await store.save(Configuration(), small())
        names = ("store.db", "store.db-wal", "store.db-shm", "store.db.lock")
        assert modes(tmp_path) == dict.fromkeys(names, 0o600)
        await store.close()
        loosen(path)
        await (await Store.open(path)).close()
        assert modes(tmp_path) == dict.fromkeys(("store.db", "store.db.lock"), 0o600)
    finally:
        os.umask(umask)


async def test_every_commit_is_synced(store: Store) -> None:
    """SQLite's documentation: in WAL mode only FULL syncs the log at each commit."""
    async with store._transaction() as connection:
        assert (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar() == "wal"
        assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar() == 2


async def test_a_deleted_secret_is_not_left_in_the_file(store: Store, path: Path) -> None:
    config = small()
    await store.save(Configuration(), config)
    await store.save(config, remove(config, "credentials", 1))
    await store.close()
    left = contents(path.parent)["store.db"]
    assert b"sesame" in left
    assert b"secretsecret" not in left


async def test_a_second_daemon_on_the_same_store_is_refused(store: Store, path: Path) -> None:
    with pytest.raises(StoreError, match=f"in use by another iscsi-targetd .process {os.getpid()}.; stop"):
        await Store.open(path)
    await store.put("first", "goes", b"on")
    await store.close()
    await (await Store.open(path)).close()


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone/store\.db\.lock: No such file or directory"):
        await Store.open(tmp_path / "gone" / "store.db")


def _text(path: Path) -> None:
    path.write_bytes(b"# settings\nportal = 0.0.0.0:3260\n" * 100)


def _damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:3000] = os.urandom(2900)
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (id INTEGER)")
    connection.close()


def _sql(*statements: str) -> object:
    def apply(path: Path) -> None:
        with sqlite3.connect(path) as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()

    return apply


REFUSED = [
    # the file                                                             what the operator reads
    ("text", _text, "damaged or not a store at all .*restore it from a backup, or move it away"),
    ("damaged", _damaged, "damaged.*restore it from a backup, or move it away"),
    ("cut short", _cut, "damaged.*restore it from a backup, or move it away"),
    ("foreign", _foreign, "is a database, but not one of iscsi-targetd"),
    (
        "newer",
        _sql("UPDATE alembic_version SET version_num = '9999'"),
        r"newer iscsi-targetd \(schema 9999, this one knows up to \d{4}\); install that version",
    ),
    ("unversioned", _sql("DELETE FROM alembic_version"), "damaged.*schema version"),
]


@pytest.mark.parametrize(
    ("spoil", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
async def test_a_file_that_is_not_to_be_touched_stays_as_it_is(
    path: Path, spoil: object, message: str
) -> None:
    """Issue 2, "Bad input": refuses to start, says what to do, leaves the file as it is."""
    assert callable(spoil)
    spoil(path)
    before, written = contents(path.parent), times(path)
    with pytest.raises(StoreError, match=message) as caught:
        await Store.open(path)
    assert str(caught.value).startswith(str(path))
    assert contents(path.parent) == before
    assert times(path) == written


async def test_a_newer_store_with_a_log_beside_it_stays_as_it_is_too(store: Store, path: Path) -> None:
    """Its version may stand only in the log."""
    async with store._transaction() as connection:
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    crashed = path.parent / "crashed"
    shutil.copytree(path.parent, crashed, ignore=shutil.ignore_patterns("*.lock", "*-shm"))
    before = contents(crashed)
    assert before["store.db-wal"]
    with pytest.raises(StoreError, match="newer"):
        await Store.open(crashed / "store.db")
    assert contents(crashed) == before


async def test_an_empty_file_is_a_new_store(tmp_path: Path) -> None:
    """What a crash between making the file and its first commit leaves."""
    path = Path(shutil.copy("/dev/null", tmp_path / "store.db"))
    store = await Store.open(path)
    assert store.fresh
    await store.close()


# -- Versions ------------------------------------------------------------------------------------------


def make_at(path: Path, version: str) -> None:
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        migrations.upgrade(connection, version)
        connection.exec_driver_sql(f"PRAGMA application_id={int.from_bytes(b'iSTd', 'big')}")
    engine.dispose()


async def test_an_older_store_is_migrated_and_a_copy_kept(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    make_at(path, "0001")
    with sqlite3.connect(path) as connection:
        connection.execute(
            "INSERT INTO targets VALUES"
            " (4, 'four', NULL, '10000004', 0, 'Disk', 'rw', 'Auto', 32, 512, 'iscsi')"
        )
    connection.close()
    store = await Store.open(path)
    assert (await store.load()).targets == {4: Target(id=4, name="four", serial="10000004")}
    await store.put("now", "possible", b"")
    await store.close()

    copy = tmp_path / "store.db.0001.bak"
    with sqlite3.connect(copy) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
        assert connection.execute("SELECT name FROM targets").fetchall() == [("four",)]
    connection.close()
    assert modes(tmp_path) == dict.fromkeys(("store.db", "store.db.0001.bak", "store.db.lock"), 0o600)


async def test_modes_of_targets_that_were_never_served_become_iscsi(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    make_at(path, "0001")
    modes = {1: "iscsi", 2: "fc", 3: "both"}
    with sqlite3.connect(path) as connection:
        connection.executemany(
            "INSERT INTO targets VALUES (?, ?, NULL, ?, 0, 'Disk', 'rw', 'Auto', 32, 512, ?)",
            [(id, f"t{id}", f"1000000{id}", mode) for id, mode in modes.items()],
        )
    connection.close()
    store = await Store.open(path)
    assert {id: target.mode for id, target in (await store.load()).targets.items()} == dict.fromkeys(
        modes, "iscsi"
    )
    await store.close()


async def test_a_migration_that_fails_leaves_the_older_store_working(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    make_at(path, "0001")
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE kept (in_the_way INTEGER)")
    connection.close()
    with pytest.raises(StoreError, match="table kept already exists"):
        await Store.open(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
        connection.execute("DROP TABLE kept")
    connection.close()
    await (await Store.open(path)).close()


def test_the_schema_made_by_the_migrations_is_the_one_derived_from_the_model(tmp_path: Path) -> None:
    """Migrations are spelled out and the columns derived; this keeps them the same."""
    path = tmp_path / "store.db"
    make_at(path, migrations.HEAD)
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
    engine.dispose()


def schema(path: Path) -> dict[str, Any]:
    """Every table with its columns (type, not null, part of the primary key), and the numbers of the file."""
    with closing(sqlite3.connect(path)) as connection:
        tables = [
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        found: dict[str, Any] = {
            table: {
                name: (kind, not_null, key)
                for _, name, kind, not_null, _, key in connection.execute(f"PRAGMA table_info({table})")
            }
            for table in tables
        }
        for pragma in ("application_id", "user_version", "encoding"):
            found[pragma] = connection.execute(f"PRAGMA {pragma}").fetchone()
        found["version"] = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    return found


async def test_a_fresh_store_is_what_the_migrations_make(tmp_path: Path) -> None:
    """It is made from the model, without Alembic."""
    fresh, migrated = tmp_path / "fresh.db", tmp_path / "migrated.db"
    await (await Store.open(fresh)).close()
    make_at(migrated, migrations.HEAD)
    assert schema(fresh) == schema(migrated)


def test_the_newest_migration_is_the_one_the_program_asks_for() -> None:
    script = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert script.get_heads() == [migrations.HEAD]


def test_an_ordinary_start_does_not_load_the_migration_tool(path: Path) -> None:
    """Restart: listening again in less than a second (design.md §6)."""
    program = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom targetd.persistence.store import Store\n"
        "asyncio.run(Store.open(Path(sys.argv[1])))\nprint('alembic' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False\n"
