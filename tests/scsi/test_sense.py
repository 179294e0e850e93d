"""Sense data on the wire (SPC-4 §4.5) and what errors of the backing store become."""

import errno

import pytest

from protocol.scsi.sense import CheckCondition, Sense, from_os_error
from tests.scsi.support import triple

FORMATS = [
    # (condition, fixed format, descriptor format)
    (
        CheckCondition(Sense.LBA_OUT_OF_RANGE),
        "7000 05 00000000 0a 00000000 21 00 00 000000",
        "72 05 21 00 000000 00",
    ),
    (
        CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2, bit=5),
        "7000 05 00000000 0a 00000000 24 00 00 cd0002",
        "72 05 24 00 000000 08 0206 0000 cd0002 00",
    ),
    (
        CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST, field=0x123, in_parameters=True),
        "7000 05 00000000 0a 00000000 26 00 00 800123",
        "72 05 26 00 000000 08 0206 0000 800123 00",
    ),
    (
        CheckCondition(Sense.MISCOMPARE_DURING_VERIFY, information=0x01020304),
        "f000 0e 01020304 0a 00000000 1d 00 00 000000",
        "72 0e 1d 00 000000 0c 000a 8000 0000000001020304",
    ),
    (
        CheckCondition(Sense.UNRECOVERED_READ_ERROR, information=1 << 32),
        "7000 03 00000000 0a 00000000 11 00 00 000000",
        "72 03 11 00 000000 0c 000a 8000 0000000100000000",
    ),
    (
        CheckCondition(Sense.SANITIZE_IN_PROGRESS, progress=0x8000),
        "7000 02 00000000 0a 00000000 04 1b 00 808000",
        "72 02 04 1b 000000 08 0206 0000 808000 00",
    ),
    (
        CheckCondition(Sense.WRITE_ERROR, deferred=True),
        "7100 03 00000000 0a 00000000 0c 00 00 000000",
        "73 03 0c 00 000000 00",
    ),
    (
        CheckCondition(
            Sense.COPY_ABORTED_NO_ADDITIONAL_SENSE, command_specific=0x10000, field=4, in_segment=True
        ),
        "7000 0a 00000000 0a 00010000 00 00 00 a00004",
        "72 0a 00 00 000000 14 010a 0000 0000000000010000 0206 0000 a00004 00",
    ),
]


@pytest.mark.parametrize(("condition", "fixed", "descriptor"), FORMATS, ids=lambda value: str(value)[:40])
def test_sense_data_has_the_bytes_of_its_format(
    condition: CheckCondition, fixed: str, descriptor: str
) -> None:
    """SPC-4 §4.5.2 (descriptor), §4.5.3 (fixed, 18 bytes)."""
    assert condition.build(descriptor=False).hex() == fixed.replace(" ", "")
    assert condition.build(descriptor=True).hex() == descriptor.replace(" ", "")


READ_ERROR, WRITE_ERROR = (3, 0x11, 0x00), (3, 0x0C, 0x00)
SPACE = (7, 0x27, 0x07)
PROTECTED = (7, 0x27, 0x00)
GONE = (2, 0x3A, 0x00)
ERRORS = [
    (errno.ENOSPC, False, SPACE),
    (errno.ENOSPC, True, SPACE),
    (errno.EDQUOT, True, SPACE),
    (errno.EROFS, True, PROTECTED),
    (errno.EIO, False, READ_ERROR),
    (errno.EIO, True, WRITE_ERROR),
    (errno.ENODEV, False, GONE),
    (errno.ENXIO, True, GONE),
    (errno.ESTALE, False, (2, 0x04, 0x00)),
    (errno.EINVAL, True, (4, 0x44, 0x00)),
]


@pytest.mark.parametrize(("number", "write", "expected"), ERRORS)
def test_an_error_of_the_store_has_its_own_sense(
    number: int, write: bool, expected: tuple[int, int, int]
) -> None:
    condition = from_os_error(OSError(number, "x"), write=write, lba=77)
    assert triple(condition.sense) == expected


def test_only_a_medium_error_names_the_block() -> None:
    """SBC-3 §4.18.1: INFORMATION is the LBA of a medium error."""
    assert from_os_error(OSError(errno.EIO, "x"), lba=77).information == 77
    assert from_os_error(OSError(errno.ENOSPC, "x"), write=True, lba=77).information is None


def test_no_two_names_mean_the_same_condition() -> None:
    assert len(Sense.__members__) == len(list(Sense))
