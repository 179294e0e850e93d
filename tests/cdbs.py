"""CDBs and parameter lists as an initiator writes them, straight from SPC-4 and SBC-3.

An independent reading: nothing here comes from ``protocol.scsi``. LBAs and lengths are in blocks where
the field is, allocation and parameter list lengths in bytes. Every builder takes ``byte1`` (or a named
flag) raw, so that a test can set what no well-behaved initiator would.
"""

from collections.abc import Iterable
from struct import pack

__all__ = [
    "DPO",
    "FUA",
    "compare_and_write",
    "extended_copy",
    "get_lba_status",
    "inquiry",
    "log_sense",
    "mode_select6",
    "mode_select10",
    "mode_sense6",
    "mode_sense10",
    "orwrite",
    "persistent_reserve_in",
    "persistent_reserve_out",
    "persistent_reserve_parameters",
    "prefetch10",
    "prefetch16",
    "prevent_allow",
    "read6",
    "read10",
    "read12",
    "read16",
    "read_capacity10",
    "read_capacity16",
    "release6",
    "report_luns",
    "report_supported_operation_codes",
    "report_supported_task_management_functions",
    "report_target_port_groups",
    "request_sense",
    "reserve6",
    "sanitize",
    "start_stop_unit",
    "synchronize_cache10",
    "synchronize_cache16",
    "test_unit_ready",
    "unmap",
    "unmap_parameters",
    "verify10",
    "verify12",
    "verify16",
    "write6",
    "write10",
    "write12",
    "write16",
    "write_and_verify10",
    "write_and_verify12",
    "write_and_verify16",
    "write_same10",
    "write_same16",
]

FUA = 0x08
"""Force unit access, byte 1 of READ and WRITE (SBC-3 §5.7)."""
DPO = 0x10
"""Disable page out, the same byte."""


def _cdb6(opcode: int, byte1: int, middle: int, length: int, control: int = 0) -> bytes:
    return pack("!BBHBB", opcode, byte1, middle, length, control)


def _cdb10(opcode: int, byte1: int, lba: int, length: int, group: int = 0) -> bytes:
    return pack("!BBIBHB", opcode, byte1, lba, group, length, 0)


def _cdb12(opcode: int, byte1: int, lba: int, length: int, group: int = 0) -> bytes:
    return pack("!BBIIBB", opcode, byte1, lba, length, group, 0)


def _cdb16(opcode: int, byte1: int, lba: int, length: int, group: int = 0) -> bytes:
    return pack("!BBQIBB", opcode, byte1, lba, length, group, 0)


# -- SPC-4 ------------------------------------------------------------------------------------------


def test_unit_ready() -> bytes:
    """TEST UNIT READY."""
    return bytes(6)


test_unit_ready.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


def request_sense(length: int = 252, *, descriptor: bool = False) -> bytes:
    """REQUEST SENSE; ``descriptor`` is DESC."""
    return _cdb6(0x03, int(descriptor), 0, length)


def inquiry(page: int | None = None, length: int = 255, *, evpd: bool | None = None) -> bytes:
    """INQUIRY; a page asks for VPD unless ``evpd`` says otherwise."""
    vital = page is not None if evpd is None else evpd
    return pack("!BBBHB", 0x12, int(vital), page or 0, length, 0)


def mode_select6(length: int, *, page_format: bool = True, save: bool = False) -> bytes:
    """MODE SELECT(6)."""
    return _cdb6(0x15, page_format << 4 | int(save), 0, length)


def mode_select10(length: int, *, page_format: bool = True, save: bool = False) -> bytes:
    """MODE SELECT(10)."""
    return _cdb10(0x55, page_format << 4 | int(save), 0, length)


def mode_sense6(
    page: int, length: int = 255, *, control: int = 0, subpage: int = 0, dbd: bool = False
) -> bytes:
    """MODE SENSE(6); ``control`` is PC: 0 current, 1 changeable, 2 default, 3 saved."""
    return pack("!BBBBBB", 0x1A, dbd << 3, control << 6 | page, subpage, length, 0)


def mode_sense10(
    page: int,
    length: int = 65535,
    *,
    control: int = 0,
    subpage: int = 0,
    dbd: bool = False,
    llbaa: bool = False,
) -> bytes:
    """MODE SENSE(10)."""
    return pack("!BBBB3xHB", 0x5A, llbaa << 4 | dbd << 3, control << 6 | page, subpage, length, 0)


def log_sense(
    page: int, length: int = 65535, *, subpage: int = 0, control: int = 1, pointer: int = 0
) -> bytes:
    """LOG SENSE; ``control`` is PC, 1 cumulative values."""
    return pack("!BBBBxHHB", 0x4D, 0, control << 6 | page, subpage, pointer, length, 0)


def reserve6() -> bytes:
    """RESERVE(6)."""
    return _cdb6(0x16, 0, 0, 0)


def release6() -> bytes:
    """RELEASE(6)."""
    return _cdb6(0x17, 0, 0, 0)


def persistent_reserve_in(service_action: int, length: int = 65535) -> bytes:
    """PERSISTENT RESERVE IN: 0 keys, 1 reservation, 2 capabilities, 3 full status."""
    return _cdb10(0x5E, service_action, 0, length)


def persistent_reserve_out(service_action: int, kind: int = 0, length: int = 24, *, scope: int = 0) -> bytes:
    """PERSISTENT RESERVE OUT."""
    return pack("!BBB2xIB", 0x5F, service_action, scope << 4 | kind, length, 0)


def persistent_reserve_parameters(
    key: int = 0,
    service_action_key: int = 0,
    *,
    aptpl: bool = False,
    all_tg_pt: bool = False,
    transport_ids: bytes | None = None,
) -> bytes:
    """The basic parameter list; ``transport_ids`` sets SPEC_I_PT and is appended with its length."""
    flags = (transport_ids is not None) << 3 | all_tg_pt << 2 | int(aptpl)
    basic = pack("!QQ4xBxxx", key, service_action_key, flags)
    return basic if transport_ids is None else basic + pack("!I", len(transport_ids)) + transport_ids


def report_luns(length: int = 65536, *, select: int = 0) -> bytes:
    """REPORT LUNS."""
    return pack("!BxB3xIxx", 0xA0, select, length)


def report_supported_operation_codes(
    options: int = 0, opcode: int = 0, service_action: int = 0, length: int = 65535, *, rctd: bool = False
) -> bytes:
    """REPORT SUPPORTED OPERATION CODES."""
    return pack("!BBBBHIxx", 0xA3, 0x0C, rctd << 7 | options, opcode, service_action, length)


def report_supported_task_management_functions(length: int = 16, *, repd: bool = False) -> bytes:
    """REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS."""
    return pack("!BBB3xIxx", 0xA3, 0x0D, repd << 7, length)


def report_target_port_groups(length: int = 65535, *, extended: bool = False) -> bytes:
    """REPORT TARGET PORT GROUPS."""
    return pack("!BB4xIxx", 0xA3, extended << 5 | 0x0A, length)


# -- SBC-3 ------------------------------------------------------------------------------------------


def read6(lba: int, blocks: int) -> bytes:
    """READ(6): 21 bits of LBA, 0 blocks means 256."""
    return _cdb6(0x08, lba >> 16, lba & 0xFFFF, blocks)


def write6(lba: int, blocks: int) -> bytes:
    """WRITE(6)."""
    return _cdb6(0x0A, lba >> 16, lba & 0xFFFF, blocks)


def read10(lba: int, blocks: int, byte1: int = 0, group: int = 0) -> bytes:
    """READ(10)."""
    return _cdb10(0x28, byte1, lba, blocks, group)


def write10(lba: int, blocks: int, byte1: int = 0, group: int = 0) -> bytes:
    """WRITE(10)."""
    return _cdb10(0x2A, byte1, lba, blocks, group)


def read12(lba: int, blocks: int, byte1: int = 0, group: int = 0) -> bytes:
    """READ(12)."""
    return _cdb12(0xA8, byte1, lba, blocks, group)


def write12(lba: int, blocks: int, byte1: int = 0, group: int = 0) -> bytes:
    """WRITE(12)."""
    return _cdb12(0xAA, byte1, lba, blocks, group)


def read16(lba: int, blocks: int, byte1: int = 0, group: int = 0) -> bytes:
    """READ(16)."""
    return _cdb16(0x88, byte1, lba, blocks, group)


def write16(lba: int, blocks: int, byte1: int = 0, group: int = 0) -> bytes:
    """WRITE(16)."""
    return _cdb16(0x8A, byte1, lba, blocks, group)


def write_and_verify10(lba: int, blocks: int, byte1: int = 0) -> bytes:
    """WRITE AND VERIFY(10)."""
    return _cdb10(0x2E, byte1, lba, blocks)


def write_and_verify12(lba: int, blocks: int, byte1: int = 0) -> bytes:
    """WRITE AND VERIFY(12)."""
    return _cdb12(0xAE, byte1, lba, blocks)


def write_and_verify16(lba: int, blocks: int, byte1: int = 0) -> bytes:
    """WRITE AND VERIFY(16)."""
    return _cdb16(0x8E, byte1, lba, blocks)


def verify10(lba: int, blocks: int, byte1: int = 0) -> bytes:
    """VERIFY(10); BYTCHK is bits 2-1 of ``byte1``."""
    return _cdb10(0x2F, byte1, lba, blocks)


def verify12(lba: int, blocks: int, byte1: int = 0) -> bytes:
    """VERIFY(12)."""
    return _cdb12(0xAF, byte1, lba, blocks)


def verify16(lba: int, blocks: int, byte1: int = 0) -> bytes:
    """VERIFY(16)."""
    return _cdb16(0x8F, byte1, lba, blocks)


def prefetch10(lba: int, blocks: int, byte1: int = 0, group: int = 0) -> bytes:
    """PRE-FETCH(10)."""
    return _cdb10(0x34, byte1, lba, blocks, group)


def prefetch16(lba: int, blocks: int, byte1: int = 0, group: int = 0) -> bytes:
    """PRE-FETCH(16)."""
    return _cdb16(0x90, byte1, lba, blocks, group)


def synchronize_cache10(lba: int = 0, blocks: int = 0, byte1: int = 0) -> bytes:
    """SYNCHRONIZE CACHE(10); 0 blocks means to the end."""
    return _cdb10(0x35, byte1, lba, blocks)


def synchronize_cache16(lba: int = 0, blocks: int = 0, byte1: int = 0) -> bytes:
    """SYNCHRONIZE CACHE(16)."""
    return _cdb16(0x91, byte1, lba, blocks)


def read_capacity10() -> bytes:
    """READ CAPACITY(10)."""
    return _cdb10(0x25, 0, 0, 0)


def read_capacity16(length: int = 32) -> bytes:
    """READ CAPACITY(16)."""
    return pack("!BB8xIxx", 0x9E, 0x10, length)


def get_lba_status(lba: int, length: int = 24) -> bytes:
    """GET LBA STATUS."""
    return pack("!BBQIxx", 0x9E, 0x12, lba, length)


def write_same10(lba: int, blocks: int, *, unmap: bool = False, anchor: bool = False) -> bytes:
    """WRITE SAME(10)."""
    return _cdb10(0x41, anchor << 4 | unmap << 3, lba, blocks)


def write_same16(
    lba: int, blocks: int, *, unmap: bool = False, anchor: bool = False, ndob: bool = False
) -> bytes:
    """WRITE SAME(16); ``ndob``: no data-out buffer, write zeros."""
    return _cdb16(0x93, anchor << 4 | unmap << 3 | int(ndob), lba, blocks)


def unmap(length: int, *, anchor: bool = False) -> bytes:
    """UNMAP; ``length`` is that of the parameter list."""
    return _cdb10(0x42, int(anchor), 0, length)


def unmap_parameters(ranges: Iterable[tuple[int, int]]) -> bytes:
    """The UNMAP parameter list of (lba, blocks) pairs."""
    descriptors = b"".join(pack("!QI4x", lba, blocks) for lba, blocks in ranges)
    return pack("!HH4x", len(descriptors) + 6, len(descriptors)) + descriptors


def compare_and_write(lba: int, blocks: int, byte1: int = 0) -> bytes:
    """COMPARE AND WRITE; the data are ``blocks`` to compare, then as many to write."""
    return pack("!BBQ3xBxx", 0x89, byte1, lba, blocks)


def orwrite(lba: int, blocks: int, byte1: int = 0) -> bytes:
    """ORWRITE(16)."""
    return _cdb16(0x8B, byte1, lba, blocks)


def start_stop_unit(
    *, start: bool = True, load_eject: bool = False, immediate: bool = False, power_condition: int = 0
) -> bytes:
    """START STOP UNIT."""
    return pack("!BB2xBx", 0x1B, int(immediate), power_condition << 4 | load_eject << 1 | int(start))


def prevent_allow(prevent: int) -> bytes:
    """PREVENT ALLOW MEDIUM REMOVAL."""
    return _cdb6(0x1E, 0, 0, prevent)


def sanitize(service_action: int, length: int = 0, *, immediate: bool = False, ause: bool = False) -> bytes:
    """SANITIZE: 1 overwrite, 2 block erase, 3 cryptographic erase, 1Fh exit failure mode."""
    return pack("!BB5xHx", 0x48, immediate << 7 | ause << 5 | service_action, length)


# -- third-party copies (SPC-4 §6.4.3, §6.6) -----------------------------------------------------------


def extended_copy(
    source: bytes, destination: bytes, ranges: Iterable[tuple[int, int, int]], block_size: int = 512
) -> tuple[bytes, bytes]:
    """EXTENDED COPY (LID1), block to block: CDB and parameter list.

    ``source`` and ``destination`` are NAA designators, ``ranges`` (from LBA, to LBA, blocks).
    """
    cscds = b""
    for naa in (source, destination):
        identifier = bytes((1, 3, 0, len(naa))) + naa.ljust(20, b"\0")
        cscds += bytes((0xE4, 0, 0, 0)) + identifier + b"\0" + block_size.to_bytes(3, "big")
    segments = b""
    for from_lba, to_lba, blocks in ranges:
        segments += bytes.fromhex("0200 0018 0000 0001 0000") + blocks.to_bytes(2, "big")
        segments += from_lba.to_bytes(8, "big") + to_lba.to_bytes(8, "big")
    data = bytes((1, 0)) + len(cscds).to_bytes(2, "big") + bytes(4)
    data += len(segments).to_bytes(4, "big") + bytes(4) + cscds + segments
    return bytes((0x83, 0)) + bytes(8) + len(data).to_bytes(4, "big") + bytes(2), data
