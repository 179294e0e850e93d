"""Numbers of RFC 7143, RFC 7144 and SAM-5, and their names. Knows no behaviour.

Hot code compares plain integers: ``IntEnum`` members compare equal to them, and nobody calls
``Opcode(n)`` per PDU (0.24 µs); tables are dicts keyed by int.
"""

from enum import IntEnum, IntFlag

__all__ = [
    "RESERVED_TAG",
    "AsyncEvent",
    "AuthMethod",
    "LoginStage",
    "LoginStatus",
    "LogoutReason",
    "LogoutResponseCode",
    "Opcode",
    "RejectReason",
    "ScsiResponse",
    "ScsiStatus",
    "SnackType",
    "TaskAttribute",
    "TaskManagementFunction",
    "TaskManagementResponseCode",
]

RESERVED_TAG = 0xFFFFFFFF
"""The tag value that names no task (RFC 7143 §11.2.1.8, §11.5.4, §11.7.4)."""


class Opcode(IntEnum):
    """PDU opcodes without the I bit (RFC 7143 §11.2.1.2)."""

    NOP_OUT = 0x00
    SCSI_COMMAND = 0x01
    TASK_MANAGEMENT_REQUEST = 0x02
    LOGIN_REQUEST = 0x03
    TEXT_REQUEST = 0x04
    SCSI_DATA_OUT = 0x05
    LOGOUT_REQUEST = 0x06
    SNACK_REQUEST = 0x10
    NOP_IN = 0x20
    SCSI_RESPONSE = 0x21
    TASK_MANAGEMENT_RESPONSE = 0x22
    LOGIN_RESPONSE = 0x23
    TEXT_RESPONSE = 0x24
    SCSI_DATA_IN = 0x25
    LOGOUT_RESPONSE = 0x26
    READY_TO_TRANSFER = 0x31
    ASYNC_MESSAGE = 0x32
    REJECT = 0x3F


class TaskAttribute(IntEnum):
    """ATTR field of a SCSI Command PDU (RFC 7143 §11.3.1)."""

    UNTAGGED = 0
    SIMPLE = 1
    ORDERED = 2
    HEAD_OF_QUEUE = 3
    ACA = 4


class ScsiStatus(IntEnum):
    """SCSI status codes (SAM-5 §5.3.1)."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    CONDITION_MET = 0x04
    BUSY = 0x08
    RESERVATION_CONFLICT = 0x18
    TASK_SET_FULL = 0x28
    ACA_ACTIVE = 0x30
    TASK_ABORTED = 0x40


class ScsiResponse(IntEnum):
    """Response field of a SCSI Response PDU (RFC 7143 §11.4.3)."""

    COMPLETED = 0x00
    TARGET_FAILURE = 0x01


class TaskManagementFunction(IntEnum):
    """Functions of a Task Management Function Request (RFC 7143 §11.5.1; RFC 7144 §4)."""

    ABORT_TASK = 1
    ABORT_TASK_SET = 2
    CLEAR_ACA = 3
    CLEAR_TASK_SET = 4
    LOGICAL_UNIT_RESET = 5
    TARGET_WARM_RESET = 6
    TARGET_COLD_RESET = 7
    TASK_REASSIGN = 8
    QUERY_TASK = 9
    QUERY_TASK_SET = 10
    I_T_NEXUS_RESET = 11
    QUERY_ASYNC_EVENT = 12


class TaskManagementResponseCode(IntEnum):
    """Responses to a task management function (RFC 7143 §11.6.1; RFC 7144 §5)."""

    FUNCTION_COMPLETE = 0
    TASK_DOES_NOT_EXIST = 1
    LUN_DOES_NOT_EXIST = 2
    TASK_STILL_ALLEGIANT = 3
    TASK_ALLEGIANCE_REASSIGNMENT_NOT_SUPPORTED = 4
    FUNCTION_NOT_SUPPORTED = 5
    FUNCTION_AUTHORIZATION_FAILED = 6
    FUNCTION_SUCCEEDED = 7
    FUNCTION_REJECTED = 255


class LogoutReason(IntEnum):
    """Reason codes of a Logout Request (RFC 7143 §11.14.1)."""

    CLOSE_SESSION = 0
    CLOSE_CONNECTION = 1
    REMOVE_CONNECTION_FOR_RECOVERY = 2


class LogoutResponseCode(IntEnum):
    """Responses of a Logout Response (RFC 7143 §11.15.1)."""

    CLOSED = 0
    CID_NOT_FOUND = 1
    RECOVERY_NOT_SUPPORTED = 2
    CLEANUP_FAILED = 3


class AsyncEvent(IntEnum):
    """Event codes of an Asynchronous Message (RFC 7143 §11.9.1)."""

    SCSI_EVENT = 0
    LOGOUT_REQUEST = 1
    CONNECTION_DROP = 2
    SESSION_DROP = 3
    NEGOTIATION_REQUEST = 4
    TASKS_TERMINATED = 5


class SnackType(IntEnum):
    """Types of SNACK (RFC 7143 §11.16.1)."""

    DATA_R2T = 0
    STATUS = 1
    DATA_ACK = 2
    R_DATA = 3


class RejectReason(IntEnum):
    """Reason codes of a Reject PDU (RFC 7143 §11.17.1)."""

    DATA_DIGEST_ERROR = 0x02
    SNACK_REJECT = 0x03
    PROTOCOL_ERROR = 0x04
    COMMAND_NOT_SUPPORTED = 0x05
    IMMEDIATE_COMMAND_REJECT = 0x06
    TASK_IN_PROGRESS = 0x07
    INVALID_DATA_ACK = 0x08
    INVALID_PDU_FIELD = 0x09
    LONG_OPERATION_REJECT = 0x0A
    NEGOTIATION_RESET = 0x0B
    WAITING_FOR_LOGOUT = 0x0C


class LoginStage(IntEnum):
    """CSG and NSG values of a Login PDU (RFC 7143 §11.12.3)."""

    SECURITY = 0
    OPERATIONAL = 1
    FULL_FEATURE = 3


class LoginStatus(IntEnum):
    """Status-Class << 8 | Status-Detail of a Login Response (RFC 7143 §11.13.5)."""

    SUCCESS = 0x0000
    TARGET_MOVED_TEMPORARILY = 0x0101
    TARGET_MOVED_PERMANENTLY = 0x0102
    INITIATOR_ERROR = 0x0200
    AUTHENTICATION_FAILURE = 0x0201
    AUTHORIZATION_FAILURE = 0x0202
    NOT_FOUND = 0x0203
    TARGET_REMOVED = 0x0204
    UNSUPPORTED_VERSION = 0x0205
    TOO_MANY_CONNECTIONS = 0x0206
    MISSING_PARAMETER = 0x0207
    CANNOT_INCLUDE_IN_SESSION = 0x0208
    SESSION_TYPE_NOT_SUPPORTED = 0x0209
    SESSION_DOES_NOT_EXIST = 0x020A
    INVALID_DURING_LOGIN = 0x020B
    TARGET_ERROR = 0x0300
    SERVICE_UNAVAILABLE = 0x0301
    OUT_OF_RESOURCES = 0x0302


class AuthMethod(IntFlag):
    """What a grant lets an initiator choose as AuthMethod (RFC 7143 §12.1)."""

    NONE = 1
    CHAP = 2
    CHAP_MUTUAL = 4
    """CHAP, and the initiator must challenge the target."""
