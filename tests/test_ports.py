"""The ports that daemons under test listen on."""

import pytest

from tests.daemon import Ports


@pytest.mark.parametrize(
    ("clients", "first", "last"),
    [
        ((32768, 60999), 10000, 64800),
        ((32768, 65535), 10000, 32000),
        ((1024, 29999), 30000, 64800),
        ((1024, 65535), 10000, 64800),
    ],
)
def test_they_lie_apart_from_those_of_clients_if_that_can_be(
    clients: tuple[int, int], first: int, last: int
) -> None:
    """``net.ipv4.ip_local_port_range``: what a client is given between choice and use is in use."""
    blocks = Ports.blocks(*clients)
    assert (blocks[0], blocks[-1]) == (first, last)
    if clients != (1024, 65535):
        low, high = clients
        assert all(block + Ports.BLOCK <= low or block > high for block in blocks)
