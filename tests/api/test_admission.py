"""Connections of the API: how many there may be, and who makes room."""

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from api.admission import Guest, GuestList, Limits
from tests.api.conftest import Api
from tests.daemon import HOST, Daemon


def guest(put_out: list[str], name: str, address: str, *, busy: bool = False, served: bool = False) -> Guest:
    made = Guest(address, lambda: put_out.append(name))
    made.busy = lambda: busy
    made.served = served
    return made


def test_the_oldest_that_has_said_nothing_makes_room_first() -> None:
    put_out: list[str] = []
    door = GuestList(Limits(4, 4))
    assert door.enter(guest(put_out, "at work", "192.0.2.1", busy=True))
    assert door.enter(guest(put_out, "idle", "192.0.2.1", served=True))
    assert door.enter(guest(put_out, "silent", "192.0.2.1"))
    assert door.enter(guest(put_out, "later", "192.0.2.1"))
    for _ in range(3):
        assert door.enter(guest(put_out, "new", "192.0.2.1", busy=True))
    assert put_out == ["silent", "later", "idle"]
    assert not door.enter(guest(put_out, "new", "192.0.2.1"))
    assert (len(put_out), door.refused) == (3, 1)


def test_one_address_has_a_share() -> None:
    put_out: list[str] = []
    door = GuestList(Limits(6, 3))
    for number in range(5):
        assert door.enter(guest(put_out, f"a{number}", "192.0.2.1"))
    assert put_out == ["a0", "a1"]
    for number in range(3):
        assert door.enter(guest(put_out, f"b{number}", "192.0.2.2", busy=True))
    assert door.enter(guest(put_out, "c", "192.0.2.3")), "of two that have their share one is at work"
    assert len(put_out) == 3 or put_out[2:] == ["a2"]


def test_an_address_without_connections_costs_nothing() -> None:
    door = GuestList(Limits(4, 4))
    for number in range(100):
        one = guest([], "x", f"192.0.2.{number}")
        assert door.enter(one)
        door.leave(one)
        door.leave(one)
    assert len(door) == 0 and not door._of


def test_limits_follow_the_descriptors_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for descriptors, most in ((10, 16), (512, 64), (1 << 20, 512)):
        monkeypatch.setattr("resource.getrlimit", lambda which, n=descriptors: (n, n))
        assert Limits.here().connections == most


def test_silent_connections_keep_nobody_out(tmp_path: Path) -> None:
    """More than there may be, half of them in the middle of a header; each request finds a place."""
    daemon = Daemon(tmp_path).start()
    try:
        with ExitStack() as stack:
            for number in range(Limits().of_one + 20):
                silent = stack.enter_context(socket.create_connection((HOST, daemon.api_port)))
                if number % 2:
                    silent.sendall(b"GET / HTTP/1.1\r\nX: ")
            for _ in range(3):
                daemon.expect(200, "GET", "services/iscsi/target/")
    finally:
        daemon.kill9()


async def test_a_first_request_has_to_come_in_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.server.FIRST_REQUEST_S", 0.05)
    for said in (b"", b"GET / HTTP/1.1\r\nX: "):
        reader, writer = await asyncio.open_connection(api.server.host, api.server.port)
        writer.write(said)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 10)
        writer.close()
    assert (await api.get("target/")).status == 200
