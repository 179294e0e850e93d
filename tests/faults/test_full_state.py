"""The file system of the state directory has no room left: what is stored is served, changes say why not."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from targetd.config import Configuration, fresh
from targetd.persistence.interface import StoreFullError
from targetd.persistence.store import Store
from tests.daemon import Daemon
from tests.functional.sessions import log_in, read, write
from tests.media import small_tmpfs

ROOM = 3 * 1024 * 1024


def fill(directory: Path) -> Path:
    """The file that takes all that is left."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    assert os.statvfs(directory).f_bavail == 0
    return ballast


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_tmpfs(tmp_path, ROOM) as small:
        yield small


@pytest.fixture
def daemon(small: Path, tmp_path: Path) -> Iterator[Daemon]:
    """Its state is on the small file system, its extents are not."""
    daemon = Daemon(tmp_path / "daemon")
    (small / "state").mkdir(mode=0o700)
    daemon.state_dir.symlink_to(small / "state")
    yield daemon
    daemon.kill9()


@pytest.mark.parametrize("end", [Daemon.kill9, Daemon.terminate], ids=["crash", "in order"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_it_starts_and_serves(
    daemon: Daemon, small: Path, end: Callable[[Daemon], object], workers: str
) -> None:
    daemon.options = ["--workers", workers]
    daemon.start()
    disk = daemon.create_disk("disk", "8MB")
    end(daemon)
    ballast = fill(small)
    for _ in range(2):  # what the first start left behind is not in the way of the second
        daemon.start()
        with log_in(daemon, disk.iqn) as initiator:
            write(initiator, 0, b"x" * 512)
            assert read(initiator, 0, 1) == b"x" * 512
        refused = daemon.expect(507, "POST", "services/iscsi/target/", {"iscsi_target_name": "new"})
        assert (
            "no space left" in refused["error_message"] and "Nothing was changed" in refused["error_message"]
        )
        assert len(daemon.expect(200, "GET", "services/iscsi/target/")) == 1
        end(daemon)
    ballast.unlink()
    daemon.start()
    daemon.create("target", iscsi_target_name="new")


def test_a_change_is_made_as_soon_as_there_is_room(daemon: Daemon, small: Path) -> None:
    """Without a restart; and users of the API are told in words as well."""
    daemon.start()
    ballast = fill(small)
    users = "account/users/"
    body = {"name": "eve", "password": "eves-password"}
    for _ in range(3):
        assert "no space left" in daemon.expect(507, "POST", users, body)["error_message"]
        refused = daemon.expect(507, "POST", "services/iscsi/target/", {"iscsi_target_name": "new"})
        assert "no space left" in refused["error_message"]
    assert daemon.tracebacks() == []
    ballast.unlink()
    daemon.expect(201, "POST", users, body)
    daemon.create("target", iscsi_target_name="new")


async def test_a_store_is_read_and_not_changed(small: Path) -> None:
    path = small / "store.sqlite"
    store = await Store.open(path)
    config = fresh("127.0.0.1:3260")
    await store.save(Configuration(), config)
    await store.close()
    ballast = fill(small)
    store = await Store.open(path)
    assert await store.load() == config
    with pytest.raises(StoreFullError, match="no space left"):
        for number in range(100):  # pages of the file that were free are used up first
            await store.put("test", str(number), bytes(4096))
    assert await store.load() == config
    ballast.unlink()
    await store.put("test", "key", bytes(4096))
    await store.close()


async def test_a_first_start_says_that_there_is_no_room(small: Path) -> None:
    fill(small)
    with pytest.raises(StoreFullError, match="no space left"):
        await Store.open(small / "store.sqlite")
