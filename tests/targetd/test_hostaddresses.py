"""What netlink tells of the host's addresses, in a network namespace of the test's own."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from targetd.net.host_addresses import HostAddresses
from tests.network import Network, needs_networks

pytestmark = needs_networks

Told = asyncio.Queue[tuple[str, str]]
EVERYTHING = ("", "")


@pytest.fixture
async def heard() -> AsyncIterator[tuple[Network, HostAddresses, Told]]:
    network, told = Network(), Told()
    network.ip("link", "add", "veth-a", "type", "veth", "peer", "name", "veth-b")
    for name in ("veth-a", "veth-b"):
        network.ip("link", "set", name, "addrgenmode", "none")
        network.ip("link", "set", name, "up")
    addresses = HostAddresses(asyncio.get_running_loop(), lambda host, why: told.put_nowait((host, why)))
    with network.entered():
        await addresses.open()
    assert await told.get() == EVERYTHING
    yield network, addresses, told
    addresses.close()
    network.close()


async def test_it_tells_when_an_address_comes_and_when_it_goes(
    heard: tuple[Network, HostAddresses, Told],
) -> None:
    network, _, told = heard
    for host, length in (("10.77.0.1", 24), ("fd00:77::1", 64)):
        network.ip("addr", "add", f"{host}/{length}", "dev", "veth-a", *(["nodad"] if ":" in host else []))
        assert await told.get() == (host, "")
        network.ip("addr", "del", f"{host}/{length}", "dev", "veth-a")
        assert await told.get() == (host, "")


async def test_it_says_why_an_ipv6_address_cannot_be_bound_yet(
    heard: tuple[Network, HostAddresses, Told],
) -> None:
    """RFC 4862 §5.4: an address is tentative until nobody else has answered for it; here somebody does."""
    network, _, told = heard
    network.ip("addr", "add", "fd00:77::1/64", "dev", "veth-b", "nodad")
    assert await told.get() == ("fd00:77::1", "")
    network.ip("addr", "add", "fd00:77::1/64", "dev", "veth-a")
    assert await told.get() == ("fd00:77::1", "is being checked for duplicates on its network")
    network.ip("addr", "add", "fd00:77::2/64", "dev", "veth-a")
    said = [await told.get() for _ in range(3)]
    assert ("fd00:77::2", "is being checked for duplicates on its network") in said
    assert ("fd00:77::2", "") in said
    assert ("fd00:77::1", "is in use by another host too (duplicate address detection)") in said


async def test_what_was_lost_is_a_reason_to_look_at_everything(
    heard: tuple[Network, HostAddresses, Told],
) -> None:
    """More messages than the socket holds: ENOBUFS, and nothing but a look can tell what they said."""
    network, addresses, told = heard
    addresses._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for number in range(1, 40):  # the loop reads nothing meanwhile
        network.ip("addr", "add", f"10.77.0.{number}/24", "dev", "veth-a")
    said = set()
    while EVERYTHING not in said:
        said.add(await told.get())


async def test_without_netlink_it_says_so_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pyroute2.IPRSocket.bind", refuse)
    addresses = HostAddresses(asyncio.get_running_loop(), lambda host, why: pytest.fail("told"))
    await addresses.open()
    assert "noticed late: no netlink" in caplog.text
    addresses.close()
