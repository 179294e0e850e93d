"""Changes over several workers, in this process and theirs: all of it or none of it."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from targetd.config import (
    ConfigError,
    Configuration,
    Extent,
    LunMapping,
    Target,
    TargetGroup,
    add,
    fresh,
    make_naa,
    next_id,
    replace_object,
)
from targetd.net.loop import Loop
from targetd.persistence.interface import StoreError
from targetd.persistence.store import Store
from targetd.workers.supervisor import HUNG, Supervisor
from tests.daemon import HOST, free_ports
from tests.initiator import SocketInitiator

WORKERS = 2
PREFIX = "iqn.2011-03.org.example.istgt"


class FailingStore:
    """A ``Persistence`` that can be told to fail."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.full = False
        self.put, self.items = store.put, store.items

    async def save(self, old: Configuration, new: Configuration) -> None:
        if self.full:
            raise StoreError("no space left")
        await self._store.save(old, new)


class Site:
    """A fleet over a directory."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "extents"
        self.root.mkdir(exist_ok=True)
        self.path = directory / "store.sqlite"
        (self.port,) = free_ports(1)

    @asynccontextmanager
    async def up(self) -> AsyncIterator[tuple[Supervisor, FailingStore]]:
        store = await Store.open(self.path)
        config = await store.load()
        if store.fresh:
            config = fresh(f"{HOST}:{self.port}")
            config = replace(config, globals=replace(config.globals, max_sessions=100))
            await store.save(await store.load(), config)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        keeper = FailingStore(store)
        fleet = Supervisor(keeper, [self.root], loop, {}, WORKERS, "warning", "text")
        try:
            await fleet.start(config)
            yield fleet, keeper
        finally:
            await fleet.stop()
            await store.close()

    def extent(self, config: Configuration, name: str) -> Configuration:
        id = next_id(config, "extents")
        extent = Extent(
            id=id,
            name=name,
            type="File",
            path=str(self.root / name),
            file_size="1MB",
            size_bytes=1 << 20,
            naa=make_naa(id),
        )
        return add(config, "extents", extent)

    def disks(self, count: int) -> Callable[[Configuration], Configuration]:
        """An edit that adds so many targets of one LUN each."""

        def edit(config: Configuration) -> Configuration:
            for _ in range(count):
                id = next_id(config, "targets")
                config = self.extent(config, f"disk{id}")
                extent_id = config.last_ids["extents"]
                config = add(config, "targets", Target(id=id, name=f"disk{id}"))
                group = TargetGroup(id=id, target_id=id, portal_id=1)
                config = add(config, "target_groups", group)
                lun = LunMapping(id=id, target_id=id, extent_id=extent_id, lun=0)
                config = add(config, "lun_mappings", lun)
            return config

        return edit


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(asyncio.wait_for(main(), 120))


def test_what_one_worker_cannot_prepare_nobody_does(tmp_path: Path) -> None:
    site = Site(tmp_path)
    (site.root / "bad").mkdir()

    async def work() -> None:
        async with site.up() as (fleet, _):
            before = fleet.configuration
            with pytest.raises(ConfigError, match="not a directory"):
                await fleet.apply(lambda config: site.extent(site.extent(config, "good"), "bad"))
            assert fleet.configuration is before
            assert not (site.root / "good").exists(), "the other worker has undone it"
            after = await fleet.apply(lambda config: site.extent(site.extent(config, "good"), "also"))
            assert fleet.configuration is after
            assert await fleet.extent_statuses([1, 2]) == {1: "ok", 2: "ok"}
            assert {path.name for path in site.root.iterdir()} == {"bad", "good", "also"}

    run(work)


def test_what_cannot_be_saved_is_undone_everywhere(tmp_path: Path) -> None:
    site = Site(tmp_path)

    async def work() -> None:
        async with site.up() as (fleet, keeper):
            before = fleet.configuration
            keeper.full = True
            with pytest.raises(StoreError):
                await fleet.apply(site.disks(4))
            assert fleet.configuration is before
            assert list(site.root.iterdir()) == []
            assert (await fleet.statistics()).units == ()
            keeper.full = False
            await fleet.apply(site.disks(4))
            assert len((await fleet.statistics()).units) == 4

    run(work)


def test_a_change_goes_on_when_nobody_waits_for_it_any_more(tmp_path: Path) -> None:
    """The front must not decide one thing and save another."""
    site = Site(tmp_path)

    async def work() -> None:
        async with site.up() as (fleet, _):
            changing = asyncio.ensure_future(fleet.apply(site.disks(2)))
            await asyncio.sleep(0)
            changing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await changing
            await fleet.apply(site.disks(2))
            assert len(fleet.configuration.targets) == 4
            assert len((await fleet.statistics()).units) == 4

    run(work)


def test_the_end_of_a_worker_is_told_with_that_of_its_sessions(tmp_path: Path) -> None:
    site = Site(tmp_path)

    async def work() -> None:
        async with site.up() as (fleet, _):
            await fleet.apply(site.disks(1))
            happened = fleet.events()
            coming = asyncio.ensure_future(anext(happened))
            with SocketInitiator((HOST, site.port), timeout_s=60) as initiator:
                await asyncio.to_thread(
                    initiator.login, "iqn.2011-03.org.example.istgt:disk1", "iqn.2026-11.example:y"
                )
                assert (await coming).kind == "session.login"
                (session,) = await fleet.sessions()
                statistics = await fleet.statistics()
                victim = next(p for p in statistics.processes if p.name == str(fleet.owner(1)))
                os.kill(victim.pid, signal.SIGKILL)
                told = [await anext(happened) for _ in range(3)]
            assert [event.kind for event in told] == ["session.end", "worker.end", "worker.start"]
            assert (told[0].data["id"], told[0].data["initiator"]) == (session.id, "iqn.2026-11.example:y")
            assert told[1].data["status"] == "killed by SIGKILL"
            assert told[1].data["sessions"] == 1
            assert await fleet.sessions() == []
            assert await fleet.extent_statuses([1]) == {1: "ok"}

    run(work)


def test_a_worker_that_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    """One that gives signs of life is left alone, however often it is asked."""
    site = Site(tmp_path)

    async def work() -> None:
        async with site.up() as (fleet, _):
            await fleet.apply(site.disks(2))
            assert {fleet.owner(1), fleet.owner(2)} == {1, 2}
            happened = fleet.events()
            coming = asyncio.ensure_future(anext(happened))
            processes = (await fleet.statistics()).processes
            victim = next(process for process in processes if process.name == str(fleet.owner(1)))
            os.kill(victim.pid, signal.SIGSTOP)
            for _ in range(HUNG + 1):
                fleet.watch()
                assert await fleet.luns("iqn.2011-03.org.example.istgt:disk2"), "the other answers"
            told = [await coming, await anext(happened)]
            assert [(event.kind, event.data["worker"]) for event in told] == [
                ("worker.end", int(victim.name)),
                ("worker.start", int(victim.name)),
            ]
            assert told[0].data["status"] == "killed by SIGKILL"

    run(work)


def test_a_change_under_which_a_worker_stops_is_undone_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the change and that it is not to be at the same time."""
    site = Site(tmp_path)

    async def unasked(fleet: Supervisor, indices: Iterable[int]) -> None:
        """It stopped a moment after it was asked."""

    def rename(config: Configuration) -> Configuration:
        return replace_object(config, "targets", replace(config.targets[1], name="renamed"))

    async def work() -> None:
        async with site.up() as (fleet, _):
            await fleet.apply(site.disks(2))
            assert {fleet.owner(1), fleet.owner(2)} == {1, 2}
            before = fleet.configuration
            processes = (await fleet.statistics()).processes
            stopped = next(process for process in processes if process.name == str(fleet.owner(1)))
            os.kill(stopped.pid, signal.SIGSTOP)
            try:
                with monkeypatch.context() as patched:
                    patched.setattr(Supervisor, "_ready", unasked)
                    with pytest.raises(ConfigError, match=f"process {stopped.name} does not answer"):
                        await fleet.apply(rename)
                assert fleet.configuration is before
            finally:
                os.kill(stopped.pid, signal.SIGCONT)
            while (await fleet.statistics()).processes[int(stopped.name) - 1].told_s:
                pass
            peer = "iqn.2026-11.example:y", "127.0.0.1"
            assert [each.target_name for each in await fleet.explain(*peer, f"{PREFIX}:disk1")]
            assert not await fleet.explain(*peer, f"{PREFIX}:renamed")
            await fleet.apply(rename)
            assert [each.allowed for each in await fleet.explain(*peer, f"{PREFIX}:renamed")] == [True]

    run(work)


def test_many_targets_are_stored_spread_and_found_again(tmp_path: Path) -> None:
    site = Site(tmp_path)

    def names_of_luns() -> list[int]:
        found = []
        for number in (1, 57, 100):
            with SocketInitiator((HOST, site.port), timeout_s=60) as initiator:
                initiator.login(f"iqn.2011-03.org.example.istgt:disk{number}")
                found.append(number)
        with SocketInitiator((HOST, site.port), timeout_s=60) as initiator:
            initiator.login()
            assert len(initiator.discover()) == 100
        return found

    async def work() -> None:
        for _ in range(2):
            async with site.up() as (fleet, _):
                if not fleet.configuration.targets:
                    await fleet.apply(site.disks(100))
                statistics = await fleet.statistics()
                assert len(statistics.units) == 100
                assert [process.name for process in statistics.processes] == ["1", "2"]
                assert all(process.descriptors > 50 for process in statistics.processes)
                assert await asyncio.to_thread(names_of_luns) == [1, 57, 100]
                with pytest.raises(OSError), socket.create_server((HOST, site.port)):
                    pass

    run(work)
