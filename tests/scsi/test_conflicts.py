"""Every command against every type of reservation: the tables of the standards, spelled out.

SPC-4 r37 table 54 and SBC-3 r36 table 13 for persistent reservations; SPC-2 r20 table 10 for RESERVE(6). The
service actions of PERSISTENT RESERVE OUT, RESERVE and RELEASE have rules of their own (SPC-4 table 55,
§5.13.3): ``test_reservations``.
"""

import pytest

from protocol.enums import ScsiStatus
from protocol.scsi.commands import Command, service_action_field
from protocol.scsi.registrations import Action, Type
from protocol.scsi.request import Nexus
from protocol.scsi.table import ROWS
from tests.scsi.support import Disk, Keeper, make_nexus

ALLOWED, CONFLICT = False, True

# What a command meets that comes from a nexus without access:
# (write exclusive types, exclusive access types, RESERVE(6) of another nexus)
ALWAYS = (ALLOWED, ALLOWED, ALLOWED)
UNLESS_RESERVED = (ALLOWED, ALLOWED, CONFLICT)
READING = (ALLOWED, CONFLICT, CONFLICT)
CHANGING = (CONFLICT, CONFLICT, CONFLICT)

TABLE = {
    "INQUIRY": ALWAYS,
    "REPORT LUNS": ALWAYS,
    "REQUEST SENSE": ALWAYS,
    "REPORT TARGET PORT GROUPS": ALWAYS,
    "PREVENT ALLOW MEDIUM REMOVAL": ALWAYS,  # with PREVENT 0, as it is sent here
    "TEST UNIT READY": UNLESS_RESERVED,
    "LOG SENSE": UNLESS_RESERVED,
    "READ CAPACITY(10)": UNLESS_RESERVED,
    "READ CAPACITY(16)": UNLESS_RESERVED,
    "REPORT IDENTIFYING INFORMATION": UNLESS_RESERVED,
    "REPORT TIMESTAMP": UNLESS_RESERVED,
    "READ KEYS": UNLESS_RESERVED,
    "READ RESERVATION": UNLESS_RESERVED,
    "REPORT CAPABILITIES": UNLESS_RESERVED,
    "READ FULL STATUS": UNLESS_RESERVED,
    "GET LBA STATUS": READING,
    "MODE SENSE(6)": READING,
    "MODE SENSE(10)": READING,
    "POPULATE TOKEN": READING,
    "PRE-FETCH(10)": READING,
    "PRE-FETCH(16)": READING,
    "READ BUFFER": READING,
    "READ DEFECT DATA(10)": READING,
    "READ DEFECT DATA(12)": READING,
    "READ(6)": READING,
    "READ(10)": READING,
    "READ(12)": READING,
    "READ(16)": READING,
    "RECEIVE COPY OPERATING PARAMETERS": READING,
    "RECEIVE COPY STATUS(LID1)": READING,
    "RECEIVE ROD TOKEN INFORMATION": READING,
    "REPORT SUPPORTED OPERATION CODES": READING,
    "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS": READING,
    "VERIFY(10)": READING,
    "VERIFY(12)": READING,
    "VERIFY(16)": READING,
    "COMPARE AND WRITE": CHANGING,
    "EXTENDED COPY(LID1)": CHANGING,
    "MODE SELECT(6)": CHANGING,
    "MODE SELECT(10)": CHANGING,
    "ORWRITE(16)": CHANGING,
    "FORMAT UNIT": CHANGING,
    "SANITIZE, BLOCK ERASE": CHANGING,
    "SANITIZE, CRYPTOGRAPHIC ERASE": CHANGING,
    "SANITIZE, EXIT FAILURE MODE": CHANGING,
    "SANITIZE, OVERWRITE": CHANGING,
    "SEND DIAGNOSTIC": CHANGING,
    "SET IDENTIFYING INFORMATION": CHANGING,
    "START STOP UNIT": CHANGING,  # with START 0, as it is sent here
    "SYNCHRONIZE CACHE(10)": CHANGING,
    "SYNCHRONIZE CACHE(16)": CHANGING,
    "UNMAP": CHANGING,
    "WRITE AND VERIFY(10)": CHANGING,
    "WRITE AND VERIFY(12)": CHANGING,
    "WRITE AND VERIFY(16)": CHANGING,
    "WRITE ATOMIC(16)": CHANGING,
    "WRITE BUFFER": CHANGING,
    "WRITE SAME(10)": CHANGING,
    "WRITE SAME(16)": CHANGING,
    "WRITE USING TOKEN": CHANGING,
    "WRITE(6)": CHANGING,
    "WRITE(10)": CHANGING,
    "WRITE(12)": CHANGING,
    "WRITE(16)": CHANGING,
}
THEIR_OWN_RULES = {0x5F, 0x16, 0x56, 0x17, 0x57}  # PERSISTENT RESERVE OUT, RESERVE, RELEASE

WRITE_EXCLUSIVE = (
    Type.WRITE_EXCLUSIVE,
    Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY,
    Type.WRITE_EXCLUSIVE_ALL_REGISTRANTS,
)
ONE_HOLDER = (Type.WRITE_EXCLUSIVE, Type.EXCLUSIVE_ACCESS)


def cdb_of(row: Command) -> bytes:
    """Nothing but the operation code and the service action: reservations come before fields."""
    cdb = bytearray(16)
    cdb[0] = row.opcode
    if row.service_action is not None:
        at, _ = service_action_field(row.opcode)
        cdb[at] |= row.service_action
    return bytes(cdb)


def make() -> tuple[Disk, Nexus, Nexus]:
    disk = Disk(keep=Keeper(), removable=True)
    holder, other = make_nexus(1), make_nexus(2)
    disk.login(holder)
    disk.login(other)
    return disk, holder, other


def persist(disk: Disk, nexus: Nexus, action: Action, key: int = 0, new_key: int = 0, type: int = 0) -> None:
    data = key.to_bytes(8, "big") + new_key.to_bytes(8, "big") + bytes(8)
    cdb = bytes((0x5F, action, type, 0, 0, 0, 0, 0, 24, 0))
    assert disk.run(cdb, data, nexus=nexus).status == ScsiStatus.GOOD


def conflicts(disk: Disk, row: Command, nexus: Nexus) -> bool:
    request = disk.request(cdb_of(row), nexus=nexus)
    outcome = disk.unit.admit(request)
    if outcome is None:
        disk.unit.abort(request)
        return False
    return outcome.status == ScsiStatus.RESERVATION_CONFLICT


def judged() -> list[Command]:
    return [row for row in ROWS if row.opcode not in THEIR_OWN_RULES]


def test_the_table_has_every_command() -> None:
    assert {row.name for row in judged()} == set(TABLE)


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("type", [type for type in Type if type is not Type.NONE])
def test_every_command_against_a_persistent_reservation(type: Type, registered: bool) -> None:
    """A registrant has access where the type says registrants; the holder always has."""
    disk, holder, other = make()
    persist(disk, holder, Action.REGISTER, 0, 0xA)
    if registered:
        persist(disk, other, Action.REGISTER, 0, 0xB)
    persist(disk, holder, Action.RESERVE, 0xA, type=type)
    has_access = registered and type not in ONE_HOLDER
    column = 0 if type in WRITE_EXCLUSIVE else 1
    expected = {name: verdicts[column] and not has_access for name, verdicts in TABLE.items()}
    assert {row.name: conflicts(disk, row, other) for row in judged()} == expected
    assert not any(conflicts(disk, row, holder) for row in judged())


def test_every_command_against_a_reserve_of_another() -> None:
    disk, holder, other = make()
    assert disk.run("160000000000", nexus=holder).status == ScsiStatus.GOOD
    assert {row.name: conflicts(disk, row, other) for row in judged()} == {
        name: verdicts[2] for name, verdicts in TABLE.items()
    }
    # the two ways of reserving exclude each other, for the holder too (SPC-2 §5.5.1)
    assert {row.name for row in judged() if conflicts(disk, row, holder)} == {
        "READ KEYS",
        "READ RESERVATION",
        "REPORT CAPABILITIES",
        "READ FULL STATUS",
    }
