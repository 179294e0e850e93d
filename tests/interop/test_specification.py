"""The specification's own examples against the real daemon on a fresh store, its files really made."""

from dataclasses import dataclass

from aiohttp import ClientSession

from tests.api.conftest import Api, basic
from tests.api.engine import MemoryEngine
from tests.api.test_spec_examples import walk
from tests.daemon import HOST, Daemon


@dataclass
class Place:
    host: str
    port: int | None


async def test_every_example_of_the_specification_on_a_fresh_store(daemon: Daemon) -> None:
    """The print has its extents under /mnt/tank; here they are under the daemon's extent root."""
    async with ClientSession(skip_auto_headers=("Content-Type",)) as session:
        api = Api(session, Place(HOST, daemon.api_port), MemoryEngine())
        api.authorization = basic("root", daemon.password)
        await walk(api, str(daemon.extent_root))
    assert (daemon.extent_root / "iscsi").exists(), "a deleted extent keeps its file (api-semantics §6.3)"
