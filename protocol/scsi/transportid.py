"""TransportIDs of iSCSI initiator ports (SPC-4 §7.6.4.6): names as PERSISTENT RESERVE carries them."""

from collections.abc import Iterable

from protocol.scsi.registrations import in_parameters
from protocol.scsi.request import Nexus

__all__ = ["initiator_ports", "transport_id"]

_ISCSI = 0x05
_DEVICE, _PORT = 0x00, 0x40
_MINIMUM_NAME_BYTES = 20


def transport_id(initiator_port: str) -> bytes:
    """The TransportID of an iSCSI initiator port: its name with ISID, FORMAT CODE 01b. What stands behind a
    NUL is no part of the name (``registrations.Ports``)."""
    name = initiator_port.partition("\0")[0].encode() + b"\0"
    name = name.ljust(max(_MINIMUM_NAME_BYTES, -(-len(name) // 4) * 4), b"\0")
    return bytes((_PORT | _ISCSI, 0)) + len(name).to_bytes(2, "big") + name


def initiator_ports(data: bytes, at: int, nexuses: Iterable[Nexus]) -> tuple[list[str], int]:
    """The initiator ports of the TransportID at ``at``, and its length.

    FORMAT CODE 00b names an initiator device: all ports of it among ``nexuses``, the sessions there are.
    """
    if len(data) < at + 4:
        raise in_parameters(at)
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    if length < _MINIMUM_NAME_BYTES or length % 4 or len(data) < at + 4 + length:
        raise in_parameters(at + 2)
    try:
        name = data[at + 4 : at + 4 + length].split(b"\0", 1)[0].decode().lower()
    except UnicodeDecodeError:
        raise in_parameters(at + 4) from None
    code = data[at] & 0xCF
    device, separator, isid = name.partition(",i,0x")
    if code == _PORT | _ISCSI:
        if not device or not separator or len(isid) != 12 or set(isid) - set("0123456789abcdef"):
            raise in_parameters(at + 4)
        return [name], 4 + length
    if code != _DEVICE | _ISCSI:
        raise in_parameters(at)
    found = sorted({nexus.initiator_port for nexus in nexuses if nexus.initiator_name == name})
    if not found:
        raise in_parameters(at + 4)
    return found, 4 + length
