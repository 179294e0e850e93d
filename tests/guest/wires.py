"""The network between guest and host side: three wires, each a network of its own.

The addresses are those reserved for documentation (RFC 5737), so that none can be anybody's; they exist
only in the network namespace that the stage runs in. ``inside/addresses`` has the guest's ends.
"""

from typing import Final, NamedTuple


class Wire(NamedTuple):
    """One tap device: ``device`` on the host side, an ``eth`` of the same rank in the guest."""

    device: str
    address: str


CONTROL: Final = Wire("control", "192.0.2.1")
"""Reports and requests of the checks. Never cut."""
SAN: Final = (Wire("san1", "198.51.100.1"), Wire("san2", "203.0.113.1"))
"""Where the portals are; checks cut and restore them."""
WIRES: Final = (CONTROL, *SAN)
CONTROL_PORT: Final = 7000
PORTAL_PORT: Final = 3260
PORTALS: Final = tuple(f"{wire.address}:{PORTAL_PORT}" for wire in SAN)
GUEST_PORTAL: Final = f"198.51.100.2:{PORTAL_PORT}"
"""Of a daemon that runs in the guest, on its end of the first SAN wire (``inside/addresses``)."""
