"""A hundred writers of the configuration at once while I/O runs, and the daemon killed under them.

Each writer walks through the same cycle of requests with objects of its own name and keeps what was
acknowledged. What the daemon then has must be exactly that, or, after a kill, that with the one request
that was under way either all done or not at all (design.md §1, §6).
"""

import asyncio
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientConnectionError, ClientSession, ClientTimeout, TCPConnector

from tests import cdbs
from tests.daemon import HOST, Daemon, Disk
from tests.initiator import ConnectionClosed, SocketInitiator
from tests.targetd.forked import ForkedDaemon

WRITERS = 100
KILLS = 50
PACE_S = 0.005
"""Between two commands of the I/O that goes on meanwhile: it is to be there, not to take the processor."""
BLOCK = 512
BLOCKS = 64
MB = 1 << 20
COLLECTIONS = ("extent", "target", "targetgroup", "targettoextent", "authorizedinitiator", "authcredential")

# -- Writers -------------------------------------------------------------------------------------------


@dataclass
class Writer:
    """One client: where it is in its cycle, and what was acknowledged to it."""

    number: int
    root: Path
    step: int = 0
    has: dict[str, Any] = field(default_factory=dict)
    """What ``seen`` finds of its objects when all that was acknowledged is there, and nothing else."""
    ids: dict[str, int] = field(default_factory=dict)
    """Resource → id of its object."""
    pending: "Step | None" = None
    """Asked for and not answered."""

    @property
    def name(self) -> str:
        return f"w{self.number}"

    @property
    def path(self) -> Path:
        return self.root / f"{self.name}.img"


Body = Callable[[Writer], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One request of the cycle, and what it does to ``Writer.has``."""

    method: str
    resource: str
    body: Body = lambda writer: {}
    gains: Body = lambda writer: {}
    loses: tuple[str, ...] = ()

    def after(self, writer: Writer) -> dict[str, Any]:
        kept = {name: value for name, value in writer.has.items() if name not in self.loses}
        return {**kept, **self.gains(writer)}


CYCLE = (
    Step(
        "POST",
        "extent",
        lambda w: {
            "iscsi_target_extent_name": w.name,
            "iscsi_target_extent_type": "File",
            "iscsi_target_extent_path": str(w.path),
            "iscsi_target_extent_filesize": "1MB",
        },
        lambda w: {"size": "1MB"},
    ),
    Step(
        "POST",
        "target",
        lambda w: {
            "iscsi_target_name": w.name,
            "iscsi_target_portalgroup": 1,
            "iscsi_target_initiatorgroup": 1,
        },
        lambda w: {"alias": None, "grants": 1},
    ),
    Step(
        "POST",
        "targettoextent",
        lambda w: {"iscsi_target": w.ids["target"], "iscsi_extent": w.ids["extent"]},
        lambda w: {"lun": 0},
    ),
    Step(
        "POST",
        "authorizedinitiator",
        lambda w: {"iscsi_target_initiator_comment": w.name},
        lambda w: {"initiators": "ALL"},
    ),
    Step(
        "PUT",
        "target",
        lambda w: {"iscsi_target_alias": w.name},
        lambda w: {"alias": w.name},
    ),
    Step("PUT", "globalconfiguration", lambda w: {"iscsi_iotimeout": 100 + w.number}),
    Step("PUT", "extent", lambda w: {"iscsi_target_extent_filesize": "2MB"}, lambda w: {"size": "2MB"}),
    Step(
        "POST",
        "authcredential",
        lambda w: {"iscsi_target_auth_user": w.name, "iscsi_target_auth_secret": "twelve-chars"},
        lambda w: {"user": 1},
    ),
    Step(
        "PUT",
        "authorizedinitiator",
        lambda w: {"iscsi_target_initiator_initiators": f"iqn.2003-01.org.example:{w.name}"},
        lambda w: {"initiators": f"iqn.2003-01.org.example:{w.name}"},
    ),
    Step(
        "PUT",
        "targettoextent",
        lambda w: {"iscsi_lunid": w.number + 1},
        lambda w: {"lun": w.number + 1},
    ),
    Step("DELETE", "authcredential", loses=("user",)),
    Step("DELETE", "target", loses=("alias", "grants", "lun")),
    Step("DELETE", "authorizedinitiator", loses=("initiators",)),
    Step("DELETE", "extent", lambda w: {"delete": True}, loses=("size",)),
)
"""Every kind of write; the DELETE of a target takes its grant and its LUN along (api-semantics §6.4)."""
STATUS = {"POST": 201, "PUT": 202, "DELETE": 204}


async def ask(session: ClientSession, writer: Writer) -> Step:
    """The writer's next request, its answer right in every word, and what it means kept."""
    step = CYCLE[writer.step % len(CYCLE)]
    body = step.body(writer)
    url = f"/api/v1.0/services/iscsi/{step.resource}/"
    if step.method != "POST" and step.resource != "globalconfiguration":
        url += f"{writer.ids[step.resource]}/"
    writer.pending = step
    async with session.request(step.method, url, json=body) as response:
        raw = await response.read()
        assert response.status == STATUS[step.method], (step, response.status, raw)
        if step.method != "DELETE":
            shown = await response.json()
            assert {name: shown[name] for name in body} == body, step
            writer.ids[step.resource] = shown["id"]
    writer.has, writer.pending = step.after(writer), None
    writer.step += 1
    return step


def client(daemon: Daemon) -> ClientSession:
    return ClientSession(
        f"http://{HOST}:{daemon.api_port}",
        headers=daemon.authorization(),
        connector=TCPConnector(limit=WRITERS + 1),
        timeout=ClientTimeout(total=100),
    )


# -- What the daemon has -------------------------------------------------------------------------------


async def everything(daemon: Daemon) -> dict[str, list[dict[str, Any]]]:
    async with client(daemon) as session:
        found = {}
        for resource in COLLECTIONS:
            async with session.get(f"/api/v1.0/services/iscsi/{resource}/?limit=0") as response:
                assert response.status == 200
                found[resource] = await response.json()
        return found


def seen(found: Mapping[str, list[dict[str, Any]]], writer: Writer) -> dict[str, Any]:
    """The writer's objects as ``Writer.has`` would have them; ``Writer.ids`` is brought up to date."""
    has: dict[str, Any] = {}

    def mine(resource: str, key: str, value: object) -> Iterator[dict[str, Any]]:
        for shown in found[resource]:
            if shown[key] == value:
                writer.ids[resource] = shown["id"]
                yield shown

    for extent in mine("extent", "iscsi_target_extent_name", writer.name):
        has["size"] = extent["iscsi_target_extent_filesize"]
        assert extent["iscsi_target_extent_status"] == "ok"
        assert writer.path.stat().st_size >= MB
    for target in mine("target", "iscsi_target_name", writer.name):
        has["alias"] = target["iscsi_target_alias"]
        has["grants"] = sum(1 for _ in mine("targetgroup", "iscsi_target", target["id"]))
        for mapping in mine("targettoextent", "iscsi_target", target["id"]):
            has["lun"] = mapping["iscsi_lunid"]
    for group in mine("authorizedinitiator", "iscsi_target_initiator_comment", writer.name):
        has["initiators"] = group["iscsi_target_initiator_initiators"]
    for _ in mine("authcredential", "iscsi_target_auth_user", writer.name):
        has["user"] = has.get("user", 0) + 1
    return has


def nothing_dangles(found: Mapping[str, list[dict[str, Any]]]) -> None:
    ids = {resource: {shown["id"] for shown in found[resource]} for resource in COLLECTIONS}
    assert {group["iscsi_target"] for group in found["targetgroup"]} <= ids["target"]
    assert {mapping["iscsi_target"] for mapping in found["targettoextent"]} <= ids["target"]
    assert {mapping["iscsi_extent"] for mapping in found["targettoextent"]} <= ids["extent"]


# -- I/O meanwhile -------------------------------------------------------------------------------------


class Load:
    """Writes and reads of one LUN, every block a number that is kept: what was sent, what was answered."""

    def __init__(self, daemon: Daemon, disk: Disk) -> None:
        self.daemon = daemon
        self.disk = disk
        self.sent = [0] * BLOCKS
        self.done = [0] * BLOCKS
        self.commands = 0
        self.enough = threading.Event()

    def _read(self, session: SocketInitiator, at: int) -> int:
        reply = session.command(cdbs.read10(at, 1), read=BLOCK)
        assert reply.good, reply
        number = int.from_bytes(reply.data[:8], "big")
        assert reply.data == number.to_bytes(8, "big") * (BLOCK // 8), "half a block"
        return number

    def run(self, killed: bool) -> None:
        """Until ``enough`` or, where the daemon is to be killed, the end of the connection."""
        with SocketInitiator((HOST, self.daemon.portal_port)) as session:
            session.login(self.disk.iqn)
            session.command(cdbs.test_unit_ready())  # POWER ON
            for at in range(BLOCKS):
                found = self._read(session, at)
                assert found in (self.done[at], self.sent[at]), "what was answered is gone"
                self.done[at] = found
            try:
                self._work(session)
            except (ConnectionClosed, ConnectionError):
                if not killed:
                    raise

    def _work(self, session: SocketInitiator) -> None:
        while not self.enough.wait(PACE_S):
            at = self.commands % BLOCKS
            self.commands += 1
            self.sent[at] += 1
            data = self.sent[at].to_bytes(8, "big") * (BLOCK // 8)
            assert session.command(cdbs.write10(at, 1), data).good
            self.done[at] = self.sent[at]
            assert self._read(session, at) == self.done[at]
        session.logout()


# -- The tests -----------------------------------------------------------------------------------------


async def prepare(daemon: Daemon) -> tuple[Load, list[Writer]]:
    disk = await asyncio.to_thread(daemon.create_disk, "busy", "1MB")
    settings = {"iscsi_maxsesh": 2 * WRITERS}
    await asyncio.to_thread(daemon.expect, 202, "PUT", "services/iscsi/globalconfiguration/", settings)
    return Load(daemon, disk), [Writer(number, daemon.extent_root) for number in range(WRITERS)]


def use(daemon: Daemon, writer: Writer) -> None:
    """Log in to the LUN that was acknowledged just now, and read its size."""
    iqn = f"iqn.2011-03.org.example.istgt:{writer.name}"
    with SocketInitiator((HOST, daemon.portal_port), timeout_s=60) as session:
        session.login(iqn)
        session.command(cdbs.test_unit_ready())
        capacity = session.command(cdbs.read_capacity16(), read=32)
        assert (int.from_bytes(capacity.data[:8], "big") + 1) * BLOCK == MB
        session.logout()


@pytest.mark.timeout(1800)
async def test_a_hundred_writers_while_io_runs(daemon: Daemon) -> None:
    """Every answer right, every 201 of use at once, no I/O error, and all of it there after a restart."""
    load, writers = await prepare(daemon)
    io = asyncio.create_task(asyncio.to_thread(load.run, False))

    async def work(session: ClientSession, writer: Writer) -> None:
        # Half of them end with nothing, half in the middle.
        for _ in range(len(CYCLE) - (writer.number % 2) * 4):
            if (await ask(session, writer)).resource == "targettoextent" and writer.has.get("lun") == 0:
                await asyncio.to_thread(use, daemon, writer)

    async with client(daemon) as session:
        await asyncio.gather(*(work(session, writer) for writer in writers))
    load.enough.set()
    await io
    assert load.commands > 0
    found = await everything(daemon)
    nothing_dangles(found)
    assert {w.name: seen(found, w) for w in writers} == {w.name: w.has for w in writers}
    await asyncio.to_thread(daemon.restart)
    assert await everything(daemon) == found


class Cut:
    """Kills the daemon a moment after so many more answers."""

    def __init__(self, daemon: ForkedDaemon, chance: random.Random) -> None:
        self.daemon = daemon
        self.left = chance.randrange(1, 2 * WRITERS)
        self.moment_s = chance.uniform(0, 0.004)

    def answered(self) -> None:
        self.left -= 1
        if self.left == 0:
            loop = asyncio.get_running_loop()
            loop.call_later(self.moment_s, os.kill, self.daemon.pid, signal.SIGKILL)


@pytest.mark.timeout(1800)
async def test_what_a_hundred_writers_were_told_survives_every_kill(tmp_path: Path) -> None:
    """Fifty kills at moments of chance, each in the middle of a hundred requests and of I/O."""
    chance = random.Random(7143)
    with ForkedDaemon(tmp_path) as daemon:
        await asyncio.to_thread(daemon.start)
        load, writers = await prepare(daemon)
        unheard = 0
        for _ in range(KILLS):
            cut = Cut(daemon, chance)
            io = asyncio.create_task(asyncio.to_thread(load.run, True))
            async with client(daemon) as session:

                async def work(session: ClientSession, writer: Writer, cut: Cut) -> None:
                    while True:
                        try:
                            await ask(session, writer)
                        except ClientConnectionError:
                            return
                        cut.answered()

                await asyncio.gather(*(work(session, writer, cut) for writer in writers))
            await io
            daemon.kill9()
            await asyncio.to_thread(daemon.start)
            found = await everything(daemon)
            nothing_dangles(found)
            for writer in writers:
                has, pending = seen(found, writer), writer.pending
                done = pending is not None and has == pending.after(writer) != writer.has
                assert done or has == writer.has, (writer, has)
                if done:
                    unheard += 1
                    writer.has, writer.step = has, writer.step + 1
        print(f"{sum(w.step for w in writers)} writes, {unheard} of them done and not heard of")
        print(f"{load.commands} commands")
        load.enough.set()
        await asyncio.to_thread(load.run, False)
        assert daemon.terminate() == 0
        assert "Traceback" not in daemon.output
