"""Every row of the command table, against REPORT SUPPORTED OPERATION CODES and its own usage mask."""

import pytest

from protocol.scsi.commands import Command, Needs, Runs, service_action_field
from protocol.scsi.table import ROWS
from tests.scsi.support import Disk, Keeper, pointer_of, sense_of

INVALID_OPCODE = (5, 0x20, 0x00)
INVALID_FIELD_IN_CDB = (5, 0x24, 0x00)
CDB_LENGTHS = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}  # by group code (SPC-4 §4.2.5.1)
ALL = {"keep": Keeper(), "removable": True}


def ident(row: object) -> str:
    return row.name if isinstance(row, Command) else str(row)


@pytest.mark.parametrize("row", ROWS, ids=ident)
def test_usage_data_has_the_length_of_its_group(row: Command) -> None:
    """SPC-4 §6.35.3, §4.2.5.1."""
    assert row.usage[0] == row.opcode
    assert len(row.usage) == CDB_LENGTHS.get(row.opcode >> 5, 32)
    if row.service_action is not None:
        at, mask = service_action_field(row.opcode)
        assert row.usage[at] & mask == row.service_action


@pytest.mark.parametrize("row", ROWS, ids=ident)
def test_a_command_on_the_medium_says_so_and_never_runs_inline(row: Command) -> None:
    if row.needs & Needs.LBA_RANGE:
        assert row.needs & Needs.MEDIUM
        assert row.runs is not Runs.INLINE
        assert row.prepare is not None
    assert (row.nowait is not None) == (row.runs is Runs.NOWAIT)


@pytest.mark.parametrize("row", ROWS, ids=ident)
def test_every_bit_outside_the_usage_mask_is_refused_and_pointed_at(row: Command) -> None:
    """SPC-4 §4.2.4: reserved bits are INVALID FIELD IN CDB; §4.5.2.4.2: pointer to byte and bit."""
    disk = Disk(**ALL)
    base = bytearray(len(row.usage))
    base[0] = row.opcode
    if row.service_action is not None:
        base[1] |= row.service_action
    for position in range(8 * len(base)):
        at, bit = position // 8, 7 - position % 8
        if not row.reserved >> (8 * len(base) - 1 - position) & 1:
            continue
        cdb = bytearray(base)
        cdb[at] |= 1 << bit
        outcome = disk.unit.admit(disk.request(bytes(cdb)))
        assert outcome is not None
        assert sense_of(outcome) == INVALID_FIELD_IN_CDB, (at, bit)
        assert pointer_of(outcome) == (at, bit, True)
    assert not disk.unit.tasks


def test_an_opcode_without_a_row_is_invalid() -> None:
    """SPC-4 §4.2.5.1: INVALID COMMAND OPERATION CODE."""
    disk = Disk()
    known = {row.opcode for row in ROWS}
    for opcode in set(range(256)) - known:
        assert sense_of(disk.run(bytes((opcode, *bytes(15))))) == INVALID_OPCODE


@pytest.mark.parametrize("opcode", [0x9E, 0xA3, 0xA4, 0x5E, 0x5F])
def test_an_unknown_service_action_is_an_invalid_field(opcode: int) -> None:
    """conformance: for 9Eh and A3h the pointer tells it from a missing opcode."""
    outcome = Disk(keep=Keeper()).run(bytes((opcode, 0x1E, *bytes(14))))
    assert sense_of(outcome) == INVALID_FIELD_IN_CDB
    assert pointer_of(outcome) == (1, 4, True)


# -- REPORT SUPPORTED OPERATION CODES (SPC-4 §6.35) ----------------------------------------------------


def all_commands(disk: Disk, rctd: bool) -> dict[tuple[int, int | None], tuple[int, bytes]]:
    data = disk.read(bytes((0xA3, 0x0C, 0x80 if rctd else 0, 0, 0, 0, 0, 0, 0xFF, 0xFF)))
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    found = {}
    at = 4
    while at < len(data):
        opcode, action, flags = data[at], int.from_bytes(data[at + 2 : at + 4], "big"), data[at + 5]
        length = int.from_bytes(data[at + 6 : at + 8], "big")
        at += 8
        assert bool(flags & 0x02) == rctd  # CTDP
        timeouts = data[at : at + 12] if rctd else b""
        at += len(timeouts)
        assert action == 0 or flags & 0x01  # SERVACTV clear: service action 0
        key = (opcode, action if flags & 0x01 else None)
        assert key not in found
        found[key] = (length, timeouts)
    return found


@pytest.mark.parametrize("rctd", [False, True])
def test_the_list_of_all_commands_is_the_table(rctd: bool) -> None:
    found = all_commands(Disk(**ALL), rctd)
    assert found.keys() == {(row.opcode, row.service_action) for row in ROWS}
    for length, timeouts in found.values():
        assert length in (6, 10, 12, 16, 32)
        assert not rctd or timeouts[:2] == b"\x00\x0a"


@pytest.mark.parametrize("row", ROWS, ids=ident)
def test_one_command_is_told_with_its_usage_data(row: Command) -> None:
    """Reporting options 1 and 2, and 3 which takes either."""
    disk = Disk(**ALL)
    own, other = (1, 2) if row.service_action is None else (2, 1)
    action = (row.service_action or 0).to_bytes(2, "big")
    for option in (own, 3):
        cdb = bytes((0xA3, 0x0C, option, row.opcode)) + action + bytes((0, 0, 1, 0))
        data = disk.read(cdb)
        assert data[1] == 0x03
        assert data[2:4] == len(row.usage).to_bytes(2, "big")
        assert data[4:] == row.usage
    outcome = disk.run(bytes((0xA3, 0x0C, other, row.opcode)) + action + bytes((0, 0, 1, 0)))
    assert sense_of(outcome) == INVALID_FIELD_IN_CDB
    assert pointer_of(outcome)[0] != 1, "the tool takes 1 for: no such service action"


def test_a_command_we_lack_is_told_as_not_supported() -> None:
    disk = Disk()
    assert disk.read("A30C 01FF 0000 00000100") == bytes((0, 0x01, 0, 0))
    assert disk.read("A30C 029E 001F 00000100") == bytes((0, 0x01, 0, 0))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"removable": False}, (0x1E, None)),
        ({"thin": False}, (0x42, None)),
        ({"keep": None}, (0xA4, 0x06)),
    ],
)
def test_what_the_unit_cannot_do_is_neither_offered_nor_done(
    settings: dict[str, object], key: tuple[int, int | None]
) -> None:
    disk = Disk(**(ALL | settings))
    assert key not in all_commands(disk, False)
    assert key in all_commands(Disk(**ALL), False)
    outcome = disk.run(bytes((key[0], key[1] or 0, *bytes(14))))
    assert sense_of(outcome) == INVALID_OPCODE
