"""INQUIRY and the vital product data pages (SPC-4 §6.4, §7.8; SBC-3 §6.6)."""

from dataclasses import replace

import pytest

from storage.memory import Memory
from tests.scsi.support import BLOCK, BLOCKS, Disk, make_nexus, pointer_of, sense_of

INVALID_FIELD_IN_CDB = (5, 0x24, 0x00)


class Opaque(Memory):
    """Cannot tell its holes."""

    def __init__(self, size_bytes: int, *, read_only: bool = False) -> None:
        super().__init__(size_bytes, read_only=read_only)
        self.capabilities = replace(self.capabilities, map_query=False)


def page(disk: Disk, code: int) -> bytes:
    data = disk.read(bytes((0x12, 0x01, code, 0x10, 0x00, 0)))
    assert data[:2] == bytes((0, code))
    assert int.from_bytes(data[2:4], "big") == len(data) - 4
    return data


def test_standard_inquiry_describes_an_spc4_disk() -> None:
    data = Disk(vendor="FreeBSD").read("1200 00 0200 00")
    assert data[0] == 0  # connected, direct access block device
    assert data[1] == 0
    assert data[2] in (4, 5, 6)
    assert data[3] & 0x0F == 2  # response data format
    assert data[4] == len(data) - 5
    assert data[5] & 0x30 == 0x10  # TPGS implicit
    assert data[5] & 0x01 == 0  # PROTECT
    assert data[7] & 0x02  # CMDQUE
    assert data[8:16] == b"FreeBSD "
    assert data[16:32] == b"iSCSI Disk      "
    descriptors = {int.from_bytes(data[at : at + 2], "big") for at in range(58, 74, 2)}
    assert descriptors & {0x04C0, 0x04C3, 0x04C5, 0x04C8}, "an SBC-3 descriptor goes with B0h of 3Ch bytes"


@pytest.mark.parametrize("allocation", [0, 4, 5, 36, 95, 96, 255])
def test_inquiry_data_is_cut_and_its_length_is_not(allocation: int) -> None:
    """SPC-4 §4.2.5.6: ADDITIONAL LENGTH is not adjusted to the truncation."""
    disk = Disk()
    whole = disk.read("1200 00 0200 00")
    assert disk.read(bytes((0x12, 0, 0)) + allocation.to_bytes(2, "big") + b"\0") == whole[:allocation]


def test_a_page_code_without_evpd_is_refused() -> None:
    outcome = Disk().run("1200 83 00FF 00")
    assert sense_of(outcome) == INVALID_FIELD_IN_CDB
    assert pointer_of(outcome) == (2, None, True)


def test_removable_media_are_told() -> None:
    assert Disk(removable=True).read("1200 00 0024 00")[1] == 0x80


def test_every_supported_page_can_be_read_in_255_bytes_and_the_list_ascends() -> None:
    disk = Disk()
    codes = page(disk, 0)[4:]
    assert list(codes) == sorted(set(codes))
    assert {0x00, 0x80, 0x83, 0x86, 0x87, 0x8F, 0xB0, 0xB1, 0xB2} <= set(codes)
    for code in codes:
        data = disk.read(bytes((0x12, 0x01, code, 0x00, 0xFF, 0)))
        assert data[1] == code
        assert len(data) == min(255, 4 + int.from_bytes(data[2:4], "big"))
    for code in set(range(256)) - set(codes):
        assert sense_of(disk.run(bytes((0x12, 0x01, code, 0x00, 0xFF, 0)))) == INVALID_FIELD_IN_CDB


def test_the_serial_number_is_that_of_the_extent() -> None:
    assert page(Disk(serial="1234567890ABCDEF"), 0x80)[4:] == b"1234567890ABCDEF"


def designators(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """(association, type, code set, value) in order."""
    found = []
    at = 4
    while at < len(data):
        length = data[at + 3]
        association = data[at + 1] >> 4 & 3
        if association:
            assert data[at + 1] & 0x80 and data[at] >> 4 == 5, "PIV, iSCSI"
        found.append((association, data[at + 1] & 0x0F, data[at] & 0x0F, data[at + 4 : at + 4 + length]))
        at += 4 + length
    return found


NAA = bytes.fromhex("6589cfc000000a1b2c3d4e5f60718293")


def test_the_unit_is_identified_in_every_usual_way() -> None:
    """SPC-4 §7.8.5: NAA, EUI-64, T10, name strings, relative port, port group."""
    disk = Disk(eui64=bytes.fromhex("0011223344556677"))
    nexus = make_nexus(9, group=7)
    disk.login(nexus)
    data = disk.read("1201 83 0400 00", nexus=nexus)
    found = {(association, kind): value for association, kind, _, value in designators(data)}
    assert found[0, 3] == NAA
    assert found[0, 2] == bytes.fromhex("0011223344556677")
    assert found[0, 1] == b"TARGETD iSCSI Disk      10000001" + b" " * 23
    assert found[1, 4] == b"\0\0\0\x07"
    assert found[1, 5] == b"\0\0\0\x01"
    assert found[1, 8].rstrip(b"\0") == f"{disk.target.name},t,0x0007".encode()
    assert found[2, 8].rstrip(b"\0") == disk.target.name.encode()
    for association, kind, code_set, value in designators(data):
        if kind == 8:
            assert code_set == 3 and value.endswith(b"\0") and len(value) % 4 == 0, association


def test_a_xen_guest_gets_its_device_id_unpadded() -> None:
    found = {(a, kind): value for a, kind, _, value in designators(page(Disk(xen=True), 0x83))}
    assert found[0, 1] == b"TARGETD iSCSI Disk      10000001"


@pytest.mark.parametrize("eui64", [b"", bytes(8)])
def test_what_copy_managers_take_for_the_address_is_the_naa(eui64: bytes) -> None:
    """conformance, EXTENDED COPY: the last designator of the highest type among 0-3 of at most 20 bytes."""
    usable = [d for d in designators(page(Disk(eui64=eui64), 0x83)) if d[1] <= 3 and len(d[3]) <= 20]
    chosen = [d for d in usable if d[1] == max(d[1] for d in usable)][-1]
    assert chosen[3] == NAA
    assert [d[0] for d in usable if d[1] == 3] == [0], "NAA for the unit only"


# -- what udev's scsi_id makes of page 83h -------------------------------------------------------------

SCSI_ID_BUFFER = 254
"""The allocation length that scsi_id asks with (SCSI_INQ_BUFF_LEN)."""
SEARCH_LIST = ((3, 6, 1), (3, 5, 1), (3, None, 1), (2, None, 1), (1, None, 2), (1, None, 1))
"""(designator type, NAA or any, code set) in the order in which scsi_id prefers them."""
LOW_BYTE_ONLY, BOTH_BYTES = 0x00FF, 0xFFFF
"""Older releases of udev read the low byte of PAGE LENGTH alone, later ones both."""


def scsi_id(page_83: bytes, length_mask: int = BOTH_BYTES) -> str:
    """ID_SERIAL: the first designator of the unit that the list prefers; empty: none was found."""
    seen = page_83[:SCSI_ID_BUFFER].ljust(SCSI_ID_BUFFER + 4, b"\0")
    end = (int.from_bytes(page_83[2:4], "big") & length_mask) + 3
    for kind, naa, code_set in SEARCH_LIST:
        at = 4
        while at <= min(end, SCSI_ID_BUFFER - 4):
            value = seen[at + 4 : at + 4 + seen[at + 3]]
            if (
                not seen[at + 1] & 0x30
                and (seen[at + 1] & 15, seen[at] & 15) == (kind, code_set)
                and naa in (None, value[0] >> 4)
            ):
                return f"{kind}{value.decode() if code_set == 2 else value.hex()}"
            at += 4 + seen[at + 3]
    return ""


def _of_length(length: int) -> str:
    """A target's name of so many characters, as FreeNAS and CSI drivers make them."""
    return ("iqn.2011-03.org.example.istgt:" + "pvc-8d1d9f52-0a8b-4d3e-93f3" * 8)[:length].ljust(length, "x")


@pytest.mark.parametrize("length", [6, 51, 63, 96, 200, 223])
def test_scsi_id_tells_two_units_of_a_target_apart_whatever_its_name(length: int) -> None:
    """The unit's designators stand first: a long name moves none of them out of a short buffer."""
    nexus = make_nexus(target="eui.02" if length == 6 else _of_length(length))
    serials = []
    for number in (1, 2):
        naa = f"0x6025447{number:025x}"
        disk = Disk(naa=naa, serial=f"SERIAL{number}")
        disk.login(nexus)
        data = disk.read("1201 83 0400 00", nexus=nexus)
        assert scsi_id(data) == f"3{naa[2:]}"
        serials.append(scsi_id(data, LOW_BYTE_ONLY))
    assert serials[0] != serials[1]


def test_the_unit_comes_before_its_port_and_its_target() -> None:
    """SPC-4 leaves the order open; T10, NAA and name within the first 128 bytes whoever the target is."""
    nexus = make_nexus(target=_of_length(223))
    disk = Disk()
    disk.login(nexus)
    data = disk.read("1201 83 0400 00", nexus=nexus)
    assert [d[:2] for d in designators(data)] == [(0, 1), (0, 3), (0, 8), (1, 4), (1, 5), (1, 8), (2, 8)]
    assert [d[:2] for d in designators(data[:127])] == [(0, 1), (0, 3), (0, 8)]


def field(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length], "big")


@pytest.mark.parametrize("block_size", [512, 1024, 2048, 4096])
def test_block_limits_are_such_as_initiators_accept(block_size: int) -> None:
    data = page(Disk(block_size=block_size), 0xB0)
    assert len(data) == 64
    maximum = field(data, 8, 4)
    assert maximum >= 256
    assert 1 <= data[5] <= 255  # MAXIMUM COMPARE AND WRITE LENGTH
    assert field(data, 6, 2) == 8  # OPTIMAL TRANSFER LENGTH GRANULARITY: the physical block
    assert 256 <= field(data, 44, 4) <= maximum  # MAXIMUM ATOMIC TRANSFER LENGTH
    assert 8 <= field(data, 20, 4) <= 1 << 20  # MAXIMUM UNMAP LBA COUNT
    assert 2 <= field(data, 24, 4) <= 1 << 20
    assert field(data, 28, 4) == max(1, 4096 // block_size)  # OPTIMAL UNMAP GRANULARITY
    assert field(data, 32, 4) == 0x80000000
    assert 65536 <= field(data, 36, 8) < 256 * 1024 * 1024 // 512


def test_a_unit_that_is_not_thin_promises_no_unmap() -> None:
    """With LBPU=0 both unmap limits are 0 (SBC-3 §6.6.3)."""
    for disk in (Disk(thin=False), Disk(backend=Opaque(BLOCK * BLOCKS, read_only=True))):
        limits, provisioning = page(disk, 0xB0), page(disk, 0xB2)
        assert limits[20:36] == bytes(16)
        assert provisioning[4:] == bytes(4)


def test_a_thin_medium_stays_thin_where_it_is_open_for_reading_alone() -> None:
    """LBPME and LBPU say what the unit is; UNMAP meets the write protection (SBC-3 §4.7.3)."""
    disk = Disk(backend=Memory(BLOCK * BLOCKS, read_only=True))
    assert page(disk, 0xB2)[5] == 0xE4
    assert disk.read("9E10 0000000000000000 00000020 0000")[14] & 0x80
    assert sense_of(disk.run("4200 00000000 00 0018 00", bytes(24))) == (7, 0x27, 0)


@pytest.mark.parametrize(("exponent", "blocks"), [(0, 0), (3, 8)])
def test_atomic_writes_are_of_whole_physical_blocks(exponent: int, blocks: int) -> None:
    """SBC-4 §6.6.4: ATOMIC ALIGNMENT, ATOMIC TRANSFER LENGTH GRANULARITY."""
    data = page(Disk(physical_block_exponent=exponent), 0xB0)
    assert field(data, 48, 4) == field(data, 52, 4) == blocks


def test_a_thin_unit_says_what_its_medium_can() -> None:
    data = page(Disk(threshold=20), 0xB2)
    assert data[4] == 11  # threshold sets of 1 MiB
    assert data[5] == 0xE4  # LBPU, LBPWS, LBPWS10; LBPRZ 001b; no anchor
    assert data[6] & 0x07 == 2  # thin
    assert data[7] == 80


@pytest.mark.parametrize(("rate", "expected"), [(0, b"\0\0"), (1, b"\0\x01"), (7200, b"\x1c\x20")])
def test_the_rotation_rate_is_the_extents(rate: int, expected: bytes) -> None:
    data = page(Disk(rotation_rate=rate), 0xB1)
    assert len(data) == 64
    assert data[4:6] == expected
    assert data[7] >> 6 == 1  # WABEREQ


def test_a_hidden_physical_block_is_no_granularity() -> None:
    assert field(page(Disk(physical_block_exponent=0), 0xB0), 6, 2) == 1


def test_extended_inquiry_tells_task_attributes_and_the_cache() -> None:
    data = page(Disk(), 0x86)
    assert len(data) == 64
    assert data[5] & 0x07 == 0x07
    assert data[6] & 0x01


def test_all_mode_pages_are_shared() -> None:
    assert page(Disk(), 0x87)[4:] == bytes((0x3F, 0xFF, 0, 0))
