"""sd_notify(3), against a real datagram socket."""

import os
import socket
from pathlib import Path

import pytest

from targetd.system.notify import notify, ready, status, stopping


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path):
    """(the service manager's socket, the environment it gives us)."""
    name = f"@iscsi-targetd-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + name[1:] if name.startswith("@") else name)
        receiver.settimeout(5)
        yield receiver, {"NOTIFY_SOCKET": name}


def test_each_message_is_one_datagram(manager) -> None:
    receiver, environ = manager
    assert ready("2 portals, 3 targets", environ)
    assert receiver.recv(4096) == b"READY=1\nSTATUS=2 portals, 3 targets"
    assert status("serving", environ)
    assert receiver.recv(4096) == b"STATUS=serving"
    assert stopping(environ=environ)
    assert receiver.recv(4096) == b"STOPPING=1"


def test_a_status_cannot_smuggle_an_assignment(manager) -> None:
    receiver, environ = manager
    assert status("target iqn\nMAINPID=1", environ)
    assert receiver.recv(4096) == b"STATUS=target iqn MAINPID=1"


def test_without_a_listener_nothing_happens(tmp_path: Path) -> None:
    assert not notify("READY=1", environ={})
    assert not notify("READY=1", environ={"NOTIFY_SOCKET": str(tmp_path / "gone")})
    assert not notify("READY=1", environ={"NOTIFY_SOCKET": "relative"})


def test_a_manager_that_does_not_read_holds_nobody_up(manager) -> None:
    """A full socket is a lost notice, not a stalled daemon."""
    _, environ = manager
    answers = {notify("STATUS=" + "x" * 1000, environ=environ) for _ in range(2000)}
    assert answers == {True, False}
