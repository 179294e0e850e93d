"""Named sense conditions, and the two formats they take on the wire (SPC-4 §4.5).

Nobody writes a bare sense key, ASC or ASCQ outside this file. A body raises ``CheckCondition`` with a
member of ``Sense``; a failing backend raises ``OSError`` and ``from_os_error`` says what that means to
an initiator. ``LogicalUnit`` turns both into an ``Outcome`` in the format that D_SENSE asks for.
"""

import errno
from enum import Enum, IntEnum

__all__ = ["CheckCondition", "ReservationConflict", "Sense", "SenseKey", "from_os_error"]


class SenseKey(IntEnum):
    """Sense keys (SPC-4 §4.5.6)."""

    NO_SENSE = 0x0
    RECOVERED_ERROR = 0x1
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    BLANK_CHECK = 0x8
    COPY_ABORTED = 0xA
    ABORTED_COMMAND = 0xB
    MISCOMPARE = 0xE
    COMPLETED = 0xF


class Sense(Enum):
    """A condition: sense key, additional sense code and qualifier (SPC-4 annex F)."""

    def __init__(self, key: SenseKey, asc: int, ascq: int) -> None:
        self.key = key
        self.asc = asc
        self.ascq = ascq

    NO_ADDITIONAL_SENSE = SenseKey.NO_SENSE, 0x00, 0x00
    SANITIZE_IN_PROGRESS_NO_SENSE = SenseKey.NO_SENSE, 0x04, 0x1B

    NOT_READY_CAUSE_NOT_REPORTABLE = SenseKey.NOT_READY, 0x04, 0x00
    BECOMING_READY = SenseKey.NOT_READY, 0x04, 0x01
    INITIALIZING_COMMAND_REQUIRED = SenseKey.NOT_READY, 0x04, 0x02
    FORMAT_IN_PROGRESS = SenseKey.NOT_READY, 0x04, 0x04
    OPERATION_IN_PROGRESS = SenseKey.NOT_READY, 0x04, 0x07
    SANITIZE_IN_PROGRESS = SenseKey.NOT_READY, 0x04, 0x1B
    MEDIUM_NOT_PRESENT = SenseKey.NOT_READY, 0x3A, 0x00

    UNRECOVERED_READ_ERROR = SenseKey.MEDIUM_ERROR, 0x11, 0x00
    WRITE_ERROR = SenseKey.MEDIUM_ERROR, 0x0C, 0x00
    MEDIUM_FORMAT_CORRUPTED = SenseKey.MEDIUM_ERROR, 0x31, 0x00
    FORMAT_COMMAND_FAILED = SenseKey.MEDIUM_ERROR, 0x31, 0x01
    SANITIZE_COMMAND_FAILED = SenseKey.MEDIUM_ERROR, 0x31, 0x03

    FAILED_SELF_TEST = SenseKey.HARDWARE_ERROR, 0x3E, 0x03
    INTERNAL_TARGET_FAILURE = SenseKey.HARDWARE_ERROR, 0x44, 0x00

    LIST_IDENTIFIER_IN_USE = SenseKey.ILLEGAL_REQUEST, 0x00, 0x16  # OPERATION IN PROGRESS
    PARAMETER_LIST_LENGTH_ERROR = SenseKey.ILLEGAL_REQUEST, 0x1A, 0x00
    INVALID_OPCODE = SenseKey.ILLEGAL_REQUEST, 0x20, 0x00
    LBA_OUT_OF_RANGE = SenseKey.ILLEGAL_REQUEST, 0x21, 0x00
    INVALID_TOKEN_OPERATION_UNSUPPORTED_TOKEN_TYPE = SenseKey.ILLEGAL_REQUEST, 0x23, 0x01
    INVALID_TOKEN_OPERATION = SenseKey.ILLEGAL_REQUEST, 0x23, 0x00
    REMOTE_TOKEN_USAGE_NOT_SUPPORTED = SenseKey.ILLEGAL_REQUEST, 0x23, 0x02
    REMOTE_TOKEN_CREATION_NOT_SUPPORTED = SenseKey.ILLEGAL_REQUEST, 0x23, 0x03
    TOKEN_UNKNOWN = SenseKey.ILLEGAL_REQUEST, 0x23, 0x04
    TOKEN_CORRUPT = SenseKey.ILLEGAL_REQUEST, 0x23, 0x05
    TOKEN_REVOKED = SenseKey.ILLEGAL_REQUEST, 0x23, 0x06
    TOKEN_EXPIRED = SenseKey.ILLEGAL_REQUEST, 0x23, 0x07
    TOKEN_CANCELLED = SenseKey.ILLEGAL_REQUEST, 0x23, 0x08
    TOKEN_DELETED = SenseKey.ILLEGAL_REQUEST, 0x23, 0x09
    INVALID_TOKEN_LENGTH = SenseKey.ILLEGAL_REQUEST, 0x23, 0x0A
    INVALID_FIELD_IN_CDB = SenseKey.ILLEGAL_REQUEST, 0x24, 0x00
    LOGICAL_UNIT_NOT_SUPPORTED = SenseKey.ILLEGAL_REQUEST, 0x25, 0x00
    INVALID_FIELD_IN_PARAMETER_LIST = SenseKey.ILLEGAL_REQUEST, 0x26, 0x00
    PARAMETER_NOT_SUPPORTED = SenseKey.ILLEGAL_REQUEST, 0x26, 0x01
    PARAMETER_VALUE_INVALID = SenseKey.ILLEGAL_REQUEST, 0x26, 0x02
    INVALID_RELEASE_OF_PERSISTENT_RESERVATION = SenseKey.ILLEGAL_REQUEST, 0x26, 0x04
    TOO_MANY_TARGET_DESCRIPTORS = SenseKey.ILLEGAL_REQUEST, 0x26, 0x06
    UNSUPPORTED_TARGET_DESCRIPTOR_TYPE = SenseKey.ILLEGAL_REQUEST, 0x26, 0x07
    TOO_MANY_SEGMENT_DESCRIPTORS = SenseKey.ILLEGAL_REQUEST, 0x26, 0x08
    UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE = SenseKey.ILLEGAL_REQUEST, 0x26, 0x09
    INLINE_DATA_LENGTH_EXCEEDED = SenseKey.ILLEGAL_REQUEST, 0x26, 0x0B
    INVALID_OPERATION_FOR_COPY_SOURCE_OR_DESTINATION = SenseKey.ILLEGAL_REQUEST, 0x26, 0x0C
    COPY_SEGMENT_GRANULARITY_VIOLATION = SenseKey.ILLEGAL_REQUEST, 0x26, 0x0D
    COMMAND_SEQUENCE_ERROR = SenseKey.ILLEGAL_REQUEST, 0x2C, 0x00
    SAVING_PARAMETERS_NOT_SUPPORTED = SenseKey.ILLEGAL_REQUEST, 0x39, 0x00
    MEDIUM_REMOVAL_PREVENTED = SenseKey.ILLEGAL_REQUEST, 0x53, 0x02
    INSUFFICIENT_RESOURCES = SenseKey.ILLEGAL_REQUEST, 0x55, 0x03
    INSUFFICIENT_REGISTRATION_RESOURCES = SenseKey.ILLEGAL_REQUEST, 0x55, 0x04
    INVALID_INFORMATION_UNIT = SenseKey.ILLEGAL_REQUEST, 0x0E, 0x03

    MEDIUM_MAY_HAVE_CHANGED = SenseKey.UNIT_ATTENTION, 0x28, 0x00
    POWER_ON_RESET = SenseKey.UNIT_ATTENTION, 0x29, 0x00
    POWER_ON_OCCURRED = SenseKey.UNIT_ATTENTION, 0x29, 0x01
    SCSI_BUS_RESET = SenseKey.UNIT_ATTENTION, 0x29, 0x02
    BUS_DEVICE_RESET = SenseKey.UNIT_ATTENTION, 0x29, 0x03
    DEVICE_INTERNAL_RESET = SenseKey.UNIT_ATTENTION, 0x29, 0x04
    I_T_NEXUS_LOSS = SenseKey.UNIT_ATTENTION, 0x29, 0x07
    MODE_PARAMETERS_CHANGED = SenseKey.UNIT_ATTENTION, 0x2A, 0x01
    LOG_PARAMETERS_CHANGED = SenseKey.UNIT_ATTENTION, 0x2A, 0x02
    RESERVATIONS_PREEMPTED = SenseKey.UNIT_ATTENTION, 0x2A, 0x03
    RESERVATIONS_RELEASED = SenseKey.UNIT_ATTENTION, 0x2A, 0x04
    REGISTRATIONS_PREEMPTED = SenseKey.UNIT_ATTENTION, 0x2A, 0x05
    ASYMMETRIC_ACCESS_STATE_CHANGED = SenseKey.UNIT_ATTENTION, 0x2A, 0x06
    CAPACITY_DATA_CHANGED = SenseKey.UNIT_ATTENTION, 0x2A, 0x09
    TIMESTAMP_CHANGED = SenseKey.UNIT_ATTENTION, 0x2A, 0x10
    COMMANDS_CLEARED_BY_ANOTHER_INITIATOR = SenseKey.UNIT_ATTENTION, 0x2F, 0x00
    THIN_PROVISIONING_SOFT_THRESHOLD = SenseKey.UNIT_ATTENTION, 0x38, 0x07
    INQUIRY_DATA_CHANGED = SenseKey.UNIT_ATTENTION, 0x3F, 0x03
    DEVICE_IDENTIFIER_CHANGED = SenseKey.UNIT_ATTENTION, 0x3F, 0x05
    REPORTED_LUNS_DATA_CHANGED = SenseKey.UNIT_ATTENTION, 0x3F, 0x0E
    OPERATOR_MEDIUM_REMOVAL_REQUEST = SenseKey.UNIT_ATTENTION, 0x5A, 0x01

    WRITE_PROTECTED = SenseKey.DATA_PROTECT, 0x27, 0x00
    HARDWARE_WRITE_PROTECTED = SenseKey.DATA_PROTECT, 0x27, 0x01
    SOFTWARE_WRITE_PROTECTED = SenseKey.DATA_PROTECT, 0x27, 0x02
    SPACE_ALLOCATION_FAILED = SenseKey.DATA_PROTECT, 0x27, 0x07

    COPY_ABORTED_NO_ADDITIONAL_SENSE = SenseKey.COPY_ABORTED, 0x00, 0x00
    UNREACHABLE_COPY_TARGET = SenseKey.COPY_ABORTED, 0x08, 0x04
    THIRD_PARTY_DEVICE_FAILURE = SenseKey.COPY_ABORTED, 0x0D, 0x01
    COPY_TARGET_DEVICE_NOT_REACHABLE = SenseKey.COPY_ABORTED, 0x0D, 0x02
    INCORRECT_COPY_TARGET_DEVICE_TYPE = SenseKey.COPY_ABORTED, 0x0D, 0x03
    COPY_TARGET_DATA_UNDERRUN = SenseKey.COPY_ABORTED, 0x0D, 0x04
    COPY_TARGET_DATA_OVERRUN = SenseKey.COPY_ABORTED, 0x0D, 0x05

    # iSCSI conditions (RFC 7143 §11.4.7.2)
    UNEXPECTED_UNSOLICITED_DATA = SenseKey.ABORTED_COMMAND, 0x0C, 0x0C
    INCORRECT_AMOUNT_OF_DATA = SenseKey.ABORTED_COMMAND, 0x0C, 0x0D
    SNACK_REJECTED = SenseKey.ABORTED_COMMAND, 0x11, 0x13
    SOME_COMMANDS_CLEARED = SenseKey.UNIT_ATTENTION, 0x47, 0x7F
    """By an iSCSI protocol event: the connection that they came on is gone (RFC 7143 §7.11)."""
    PROTOCOL_SERVICE_CRC_ERROR = SenseKey.ABORTED_COMMAND, 0x47, 0x05

    COMMUNICATION_TIME_OUT = SenseKey.ABORTED_COMMAND, 0x08, 0x01
    SYSTEM_RESOURCE_FAILURE = SenseKey.ABORTED_COMMAND, 0x55, 0x00
    COMMAND_TIMEOUT = SenseKey.ABORTED_COMMAND, 0x2E, 0x02
    COPY_OPERATION_CANCELLED = SenseKey.ABORTED_COMMAND, 0x2E, 0x01

    MISCOMPARE_DURING_VERIFY = SenseKey.MISCOMPARE, 0x1D, 0x00


_VALID = 0x80
_SKSV = 0x80
_BPV = 0x08


class CheckCondition(Exception):  # noqa: N818 - SAM calls it that, and it is no error of ours
    """A command ends with CHECK CONDITION and this sense.

    Args:
        sense: what it is.
        field: the byte in error, in the CDB or, with ``in_parameters``, in the parameter list: it
            becomes the field pointer (SPC-4 §4.5.2.4.2). Only with ILLEGAL REQUEST.
        bit: the most significant bit of the field in error.
        information: INFORMATION: an LBA or the offset of a difference, as the condition defines it.
        command_specific: COMMAND-SPECIFIC INFORMATION.
        progress: 0..65535, how far an operation has come (NOT READY and NO SENSE only).
        segment_pointer: for COPY ABORTED, the byte in error: ``field``, ``bit`` and SD apply (SPC-4
            §4.5.2.4.5); ``in_segment`` says it counts from the segment descriptor.
        deferred: the error is that of an earlier command (response codes 71h and 73h).
    """

    __slots__ = ("command_specific", "deferred", "information", "progress", "sense", "specific")

    def __init__(
        self,
        sense: Sense,
        *,
        field: int | None = None,
        bit: int | None = None,
        in_parameters: bool = False,
        in_segment: bool = False,
        information: int | None = None,
        command_specific: int | None = None,
        progress: int | None = None,
        deferred: bool = False,
    ) -> None:
        super().__init__(sense)
        self.sense = sense
        self.information = information
        self.command_specific = command_specific
        self.progress = progress
        self.deferred = deferred
        self.specific = b""
        """The three bytes of SENSE KEY SPECIFIC with SKSV set, or nothing."""
        if progress is not None:
            self.specific = bytes((_SKSV,)) + min(progress, 0xFFFF).to_bytes(2, "big")
        elif field is not None:
            flags = _SKSV
            if sense.key == SenseKey.COPY_ABORTED:
                flags |= 0x20 if in_segment else 0
            elif not in_parameters:
                flags |= 0x40  # C/D
            if bit is not None:
                flags |= _BPV | bit
            self.specific = bytes((flags,)) + min(field, 0xFFFF).to_bytes(2, "big")

    def __str__(self) -> str:
        sense = self.sense
        return f"{sense.key.name} {sense.asc:02X}h/{sense.ascq:02X}h {sense.name}"

    def build(self, descriptor: bool = False) -> bytes:
        """The sense data: fixed format, 18 bytes (SPC-4 §4.5.3), or descriptor format (§4.5.2).

        An INFORMATION or COMMAND-SPECIFIC INFORMATION beyond 32 bits does not fit the fixed format
        and is left out there, VALID being zero.
        """
        return self._descriptor() if descriptor else self._fixed()

    def _fixed(self) -> bytes:
        sense = self.sense
        data = bytearray(18)
        data[0] = 0x71 if self.deferred else 0x70
        data[2] = sense.key
        if self.information is not None and self.information <= 0xFFFFFFFF:
            data[0] |= _VALID
            data[3:7] = self.information.to_bytes(4, "big")
        data[7] = 10
        if self.command_specific is not None and self.command_specific <= 0xFFFFFFFF:
            data[8:12] = self.command_specific.to_bytes(4, "big")
        data[12] = sense.asc
        data[13] = sense.ascq
        if self.specific:
            data[15:18] = self.specific
        return bytes(data)

    def _descriptor(self) -> bytes:
        sense = self.sense
        descriptors = b""
        if self.information is not None:
            descriptors += b"\x00\x0a\x80\x00" + self.information.to_bytes(8, "big")
        if self.command_specific is not None:
            descriptors += b"\x01\x0a\x00\x00" + self.command_specific.to_bytes(8, "big")
        if self.specific:
            descriptors += b"\x02\x06\x00\x00" + self.specific + b"\x00"
        code = 0x73 if self.deferred else 0x72
        return bytes((code, sense.key, sense.asc, sense.ascq, 0, 0, 0, len(descriptors))) + descriptors


class ReservationConflict(Exception):  # noqa: N818 - a status of SAM
    """A command ends with RESERVATION CONFLICT status and no sense (SAM-5 §5.3.1)."""


_ERRNO_SENSE: dict[int, tuple[Sense, Sense]] = {
    # errno: (of a command that reads, of a command that writes)
    errno.ENOSPC: (Sense.SPACE_ALLOCATION_FAILED, Sense.SPACE_ALLOCATION_FAILED),
    errno.EDQUOT: (Sense.SPACE_ALLOCATION_FAILED, Sense.SPACE_ALLOCATION_FAILED),
    errno.EFBIG: (Sense.SPACE_ALLOCATION_FAILED, Sense.SPACE_ALLOCATION_FAILED),
    errno.EROFS: (Sense.WRITE_PROTECTED, Sense.WRITE_PROTECTED),
    errno.EPERM: (Sense.WRITE_PROTECTED, Sense.WRITE_PROTECTED),
    errno.EACCES: (Sense.WRITE_PROTECTED, Sense.WRITE_PROTECTED),
    errno.EIO: (Sense.UNRECOVERED_READ_ERROR, Sense.WRITE_ERROR),
    errno.EREMOTEIO: (Sense.UNRECOVERED_READ_ERROR, Sense.WRITE_ERROR),
    errno.EILSEQ: (Sense.UNRECOVERED_READ_ERROR, Sense.WRITE_ERROR),
    errno.EBADMSG: (Sense.UNRECOVERED_READ_ERROR, Sense.WRITE_ERROR),
    errno.ENODATA: (Sense.UNRECOVERED_READ_ERROR, Sense.WRITE_ERROR),
    errno.ENODEV: (Sense.MEDIUM_NOT_PRESENT, Sense.MEDIUM_NOT_PRESENT),
    errno.ENXIO: (Sense.MEDIUM_NOT_PRESENT, Sense.MEDIUM_NOT_PRESENT),
    errno.ENOENT: (Sense.MEDIUM_NOT_PRESENT, Sense.MEDIUM_NOT_PRESENT),
    errno.ENOMEDIUM: (Sense.MEDIUM_NOT_PRESENT, Sense.MEDIUM_NOT_PRESENT),
    errno.ESTALE: (Sense.NOT_READY_CAUSE_NOT_REPORTABLE, Sense.NOT_READY_CAUSE_NOT_REPORTABLE),
    errno.ETIMEDOUT: (Sense.COMMUNICATION_TIME_OUT, Sense.COMMUNICATION_TIME_OUT),
    errno.ENOMEM: (Sense.SYSTEM_RESOURCE_FAILURE, Sense.SYSTEM_RESOURCE_FAILURE),
    errno.EAGAIN: (Sense.SYSTEM_RESOURCE_FAILURE, Sense.SYSTEM_RESOURCE_FAILURE),
    errno.EMFILE: (Sense.SYSTEM_RESOURCE_FAILURE, Sense.SYSTEM_RESOURCE_FAILURE),
    errno.ENFILE: (Sense.SYSTEM_RESOURCE_FAILURE, Sense.SYSTEM_RESOURCE_FAILURE),
}
_UNKNOWN = (Sense.INTERNAL_TARGET_FAILURE, Sense.INTERNAL_TARGET_FAILURE)


def from_os_error(error: OSError, *, write: bool = False, lba: int | None = None) -> CheckCondition:
    """What a failure of the backing store means to the initiator.

    Args:
        error: as the backend raised it, with the true ``errno``.
        write: the command changes the medium.
        lba: first block of the command, for INFORMATION of a medium error (SBC-3 §4.18.1).
    """
    sense = _ERRNO_SENSE.get(error.errno or 0, _UNKNOWN)[write]
    return CheckCondition(sense, information=lba if sense.key == SenseKey.MEDIUM_ERROR else None)
