"""Lines of the log about sessions and commands carry the fields that ``targetd.system.logs`` documents."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import cdbs
from tests.daemon import Daemon
from tests.functional.sessions import log_in
from tests.initiator import LoginFailed, SocketInitiator

INITIATOR = "iqn.2003-01.org.example:one"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, ["--log-format", "json"]).start()
    yield daemon
    daemon.kill9()


def line(daemon: Daemon, *parts: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(daemon.wait_for_line(*parts))
    return found


def test_of_a_session(daemon: Daemon) -> None:
    disk = daemon.create_disk("disk", "8MB")
    with log_in(daemon, disk.iqn):
        came = line(daemon, "logged in to")
        assert (came["initiator"], came["target"]) == (INITIATOR, disk.iqn)
        assert came["peer"].startswith("127.0.0.1:") and came["connection"] >= 1
    gone = line(daemon, f"left {disk.iqn}")
    assert (gone["initiator"], gone["target"]) == (came["initiator"], disk.iqn)


def test_of_a_login_that_is_refused(daemon: Daemon) -> None:
    nowhere = daemon.full_name("nowhere")
    initiator = SocketInitiator(("127.0.0.1", daemon.portal_port))
    with pytest.raises(LoginFailed):
        initiator.login(nowhere, INITIATOR)
    refused = line(daemon, "refused (0203h)")
    assert (refused["initiator"], refused["target"]) == (INITIATOR, nowhere)
    assert refused["peer"].startswith("127.0.0.1:") and refused["connection"] >= 1


def test_of_a_command_that_its_medium_fails(daemon: Daemon) -> None:
    disk = daemon.create_disk("disk", "8MB")
    with log_in(daemon, disk.iqn) as initiator:
        with disk.path.open("r+b") as file:
            file.truncate(4096)

        assert initiator.command(cdbs.read10(8192, 8), read=4096).status == 2
        failed = line(daemon, "READ(10) at byte")
    assert (failed["initiator"], failed["target"]) == (INITIATOR, disk.iqn)
    assert (failed["lun"], failed["tag"].startswith("0x")) == (0, True)
