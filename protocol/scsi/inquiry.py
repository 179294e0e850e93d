"""INQUIRY: the standard data and a builder function per vital product data page (SPC-4 §6.4, §7.8).

A builder takes the unit and the nexus and answers the page without its four bytes of header. What the
pages promise comes from the unit's configuration and the backend's capabilities, so nothing is
advertised that is not there.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.scsi import limits, thirdparty
from protocol.scsi.cdb import cut
from protocol.scsi.mode import THRESHOLD_SET_BYTES
from protocol.scsi.request import Nexus, Outcome, Request
from protocol.scsi.sense import CheckCondition, Sense

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit, UnitConfig

__all__ = ["TARGET_PORT_GROUP", "inquiry"]

TARGET_PORT_GROUP = 1
"""The one asymmetric access group: all ports of a target lead to the same process."""

_DISK = 0x00
_NO_UNIT = 0x7F
"""PERIPHERAL QUALIFIER 011b and DEVICE TYPE 1Fh: there is no unit at this LUN (SPC-4 §6.4.2)."""
_VERSION_DESCRIPTORS = (
    0x00A0,  # SAM-5
    0x0960,  # iSCSI
    0x0460,  # SPC-4
    0x04C0,  # SBC-3
)


def _padded(text: str, length: int) -> bytes:
    """Left-aligned ASCII, padded with blanks (SPC-4 §4.3.1)."""
    return text.encode("ascii", "replace")[:length].ljust(length)


def inquiry(unit: "LogicalUnit", request: Request) -> Outcome:
    """INQUIRY (SPC-4 §6.4)."""
    cdb = request.cdb
    if not cdb[1] & 0x01:
        if cdb[2]:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2)
        return Outcome(data_in=cut(_standard(unit), cdb))
    builder = None if unit.absent and cdb[2] else _PAGES.get(cdb[2])
    if builder is None:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2)
    body = builder(unit, request.nexus)
    header = bytes((_NO_UNIT if unit.absent else _DISK, cdb[2])) + len(body).to_bytes(2, "big")
    return Outcome(data_in=cut(header + body, cdb))


def _standard(unit: "LogicalUnit") -> bytes:
    """Standard INQUIRY data, 96 bytes (SPC-4 §6.4.2)."""
    config = unit.config
    data = bytearray(96)
    data[0] = _NO_UNIT if unit.absent else _DISK
    data[1] = 0x80 if config.removable else 0
    data[2] = 0x06  # SPC-4
    data[3] = 0x12  # HISUP: LUNs are numbered by SAM-5's hierarchy; response data format 2
    data[4] = len(data) - 5
    data[5] = 0 if unit.absent else 0x10 | 0x08  # TPGS implicit, 3PC
    data[6] = 0x10  # MULTIP
    data[7] = 0x02  # CMDQUE
    data[8:16] = _padded(config.vendor, 8)
    data[16:32] = _padded(config.product, 16)
    data[32:36] = _padded(config.revision, 4)
    for index, descriptor in enumerate(_VERSION_DESCRIPTORS):
        data[58 + 2 * index : 60 + 2 * index] = descriptor.to_bytes(2, "big")
    return bytes(data)


def _supported_pages(unit: "LogicalUnit", nexus: Nexus) -> bytes:
    """00h (SPC-4 §7.8.11)."""
    return b"\x00" if unit.absent else bytes(sorted(_PAGES))


def _serial_number(unit: "LogicalUnit", nexus: Nexus) -> bytes:
    """80h (SPC-4 §7.8.16)."""
    return unit.config.serial.encode("ascii", "replace")


# -- 83h, Device Identification (SPC-4 §7.8.5) ---------------------------------------------------------

_BINARY, _ASCII, _UTF8 = 1, 2, 3
_UNIT, _PORT, _DEVICE = 0, 1, 2
_T10, _EUI64, _NAA, _RELATIVE_PORT, _PORT_GROUP, _NAME_STRING = 1, 2, 3, 4, 5, 8
_ISCSI = 5


def _designator(association: int, kind: int, code_set: int, value: bytes) -> bytes:
    first, second = code_set, association << 4 | kind
    if association != _UNIT:
        first |= _ISCSI << 4
        second |= 0x80  # PIV
    return bytes((first, second, 0, len(value))) + value


def _name_string(text: str) -> bytes:
    """A SCSI name string: UTF-8, ended by a null, padded with nulls to a multiple of four."""
    raw = text.encode() + b"\0"
    return raw + bytes(-len(raw) % 4)


def _naa(config: "UnitConfig") -> bytes:
    return bytes.fromhex(config.naa.removeprefix("0x"))


def _t10_identifier(config: "UnitConfig") -> bytes:
    """Vendor, product and serial number, padded to 31 unless the guest is Xen, which wants it bare."""
    serial = config.serial if config.xen else config.serial.ljust(31)
    return _padded(config.vendor, 8) + _padded(config.product, 16) + serial.encode("ascii", "replace")


def _device_identification(unit: "LogicalUnit", nexus: Nexus) -> bytes:
    """83h: the logical unit's designators first, whose place and length no name of a target changes.

    Who asks with a short allocation length (udev's scsi_id: 254 bytes) sees the unit whole. The NAA
    designator is the unit's only one of its kind: copy managers address the unit by it (SPC-4 §6.4.5.3).
    """
    config = unit.config
    page = _designator(_UNIT, _T10, _ASCII, _t10_identifier(config))
    naa = _naa(config)
    if naa:
        page += _designator(_UNIT, _NAA, _BINARY, naa)
        page += _designator(_UNIT, _NAME_STRING, _UTF8, _name_string("naa." + naa.hex().upper()))
    if config.eui64:
        page += _designator(_UNIT, _EUI64, _BINARY, config.eui64)
    page += _designator(
        _PORT, _RELATIVE_PORT, _BINARY, b"\0\0" + nexus.relative_target_port.to_bytes(2, "big")
    )
    page += _designator(_PORT, _PORT_GROUP, _BINARY, b"\0\0" + TARGET_PORT_GROUP.to_bytes(2, "big"))
    page += _designator(_PORT, _NAME_STRING, _UTF8, _name_string(nexus.target_port))
    page += _designator(_DEVICE, _NAME_STRING, _UTF8, _name_string(nexus.target_name))
    return page


def _extended_inquiry(unit: "LogicalUnit", nexus: Nexus) -> bytes:
    """86h (SPC-4 §7.8.7)."""
    page = bytearray(60)
    page[1] = 0x07  # HEADSUP, ORDSUP, SIMPSUP
    page[2] = 0x01  # V_SUP: there is a volatile cache
    page[3] = 0x01  # LUICLR: 3Fh/0Eh is reported once per nexus, not once per unit
    return bytes(page)


def _mode_page_policy(unit: "LogicalUnit", nexus: Nexus) -> bytes:
    """87h (SPC-4 §7.8.9): all pages and subpages are shared by all nexuses."""
    return bytes((0x3F, 0xFF, 0x00, 0x00))


def _third_party_copy(unit: "LogicalUnit", nexus: Nexus) -> bytes:
    """8Fh (SPC-4 §7.8.17)."""
    return thirdparty.third_party_copy_page(unit)


def _block_limits(unit: "LogicalUnit", nexus: Nexus) -> bytes:
    """B0h (SBC-3 §6.6.3): 60 bytes."""
    size = unit.block_size
    page = bytearray(60)

    def put(at: int, length: int, value: int) -> None:
        page[at - 4 : at - 4 + length] = value.to_bytes(length, "big")

    put(5, 1, limits.MAXIMUM_COMPARE_AND_WRITE_BLOCKS)
    put(6, 2, 1 << unit.config.physical_block_exponent)
    put(8, 4, limits.maximum_transfer_blocks(size))
    put(12, 4, limits.OPTIMAL_TRANSFER_BYTES // size)
    put(16, 4, limits.PREFETCH_BYTES // size)
    if unit.thin and unit.backend is not None:
        granularity = max(1, unit.backend.capabilities.unmap_granularity // size)
        put(20, 4, limits.MAXIMUM_UNMAP_BLOCKS)
        put(24, 4, limits.MAXIMUM_UNMAP_DESCRIPTORS)
        put(28, 4, granularity)
        put(32, 4, 0x80000000)  # UGAVALID: aligned to LBA 0
    put(36, 8, limits.MAXIMUM_WRITE_SAME_BLOCKS)
    put(44, 4, limits.MAXIMUM_ATOMIC_BLOCKS)
    atomic = limits.atomic_granularity_blocks(unit.config.physical_block_exponent)
    put(48, 4, atomic)  # ATOMIC ALIGNMENT
    put(52, 4, atomic)  # ATOMIC TRANSFER LENGTH GRANULARITY
    return bytes(page)


def _block_device_characteristics(unit: "LogicalUnit", nexus: Nexus) -> bytes:
    """B1h (SBC-3 §6.6.2): 60 bytes."""
    page = bytearray(60)
    page[0:2] = unit.config.rotation_rate.to_bytes(2, "big")
    page[3] = 0x40 | 0x10  # WABEREQ, WACEREQ 01b: what SANITIZE has erased can be read, as zeros
    return bytes(page)


def _logical_block_provisioning(unit: "LogicalUnit", nexus: Nexus) -> bytes:
    """B2h (SBC-3 §6.6.4)."""
    page = bytearray(4)
    backend = unit.backend
    if unit.thin and backend is not None:
        page[0] = (THRESHOLD_SET_BYTES // unit.block_size).bit_length() - 1
        page[1] = 0x80 | 0x40 | 0x20  # LBPU, LBPWS, LBPWS10
        if backend.capabilities.unmap_reads_zero:
            page[1] |= 0x04  # LBPRZ 001b
        page[2] = 0x02  # thin provisioned
        if unit.config.threshold is not None:
            page[3] = 100 - unit.config.threshold  # THRESHOLD PERCENTAGE: of the space in use
    return bytes(page)


_PAGES: dict[int, Callable[["LogicalUnit", Nexus], bytes]] = {
    0x00: _supported_pages,
    0x80: _serial_number,
    0x83: _device_identification,
    0x86: _extended_inquiry,
    0x87: _mode_page_policy,
    0x8F: _third_party_copy,
    0xB0: _block_limits,
    0xB1: _block_device_characteristics,
    0xB2: _logical_block_provisioning,
}
