"""Every PDU header of RFC 7143 §11, declared once. Knows no order of PDUs and no state.

``opcode`` is the whole first byte, with the I bit (40h) in requests; ``flags`` the whole second byte;
``lengths`` is TotalAHSLength (in words) << 24 | DataSegmentLength (in bytes).
"""

from protocol.enums import Opcode
from protocol.wire import Header, bhs

__all__ = [
    "BY_OPCODE",
    "FINAL",
    "IMMEDIATE",
    "AsyncMessage",
    "DataIn",
    "DataOut",
    "LoginRequest",
    "LoginResponse",
    "LogoutRequest",
    "LogoutResponse",
    "NopIn",
    "NopOut",
    "ReadyToTransfer",
    "Reject",
    "ScsiCommand",
    "ScsiResponse",
    "SnackRequest",
    "TaskManagementRequest",
    "TaskManagementResponse",
    "TextRequest",
    "TextResponse",
]

IMMEDIATE = 0x40
"""I bit of the first byte (RFC 7143 §11.2.1.1)."""
FINAL = 0x80
"""F bit of the second byte (RFC 7143 §11.2.1.3); T in Login PDUs."""


@bhs(Opcode.NOP_OUT, "!BB2xI8sIIII16x")
class NopOut(Header):
    """NOP-Out (RFC 7143 §11.18)."""

    opcode: int
    flags: int
    lengths: int
    lun: bytes
    initiator_task_tag: int
    target_transfer_tag: int
    cmd_sn: int
    exp_stat_sn: int


@bhs(Opcode.NOP_IN, "!BB2xI8sIIIII12x")
class NopIn(Header):
    """NOP-In (RFC 7143 §11.19)."""

    opcode: int
    flags: int
    lengths: int
    lun: bytes
    initiator_task_tag: int
    target_transfer_tag: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int


@bhs(Opcode.SCSI_COMMAND, "!BB2xI8sIIII16s")
class ScsiCommand(Header):
    """SCSI Command (RFC 7143 §11.3)."""

    opcode: int
    flags: int  # bit 7 F, bit 6 R, bit 5 W, bits 2-0 ATTR
    lengths: int
    lun: bytes
    initiator_task_tag: int
    expected_data_transfer_length: int  # bytes
    cmd_sn: int
    exp_stat_sn: int
    cdb: bytes


@bhs(Opcode.SCSI_RESPONSE, "!BBBBI8xIIIIIIII")
class ScsiResponse(Header):
    """SCSI Response (RFC 7143 §11.4)."""

    opcode: int
    flags: int  # bit 7 always, bit 4 o, bit 3 u, bit 2 O, bit 1 U
    response: int
    status: int
    lengths: int
    initiator_task_tag: int
    snack_tag: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    exp_data_sn: int
    bidirectional_read_residual: int
    residual: int


@bhs(Opcode.TASK_MANAGEMENT_REQUEST, "!BB2xI8sIIIIII8x")
class TaskManagementRequest(Header):
    """Task Management Function Request (RFC 7143 §11.5)."""

    opcode: int
    flags: int  # bit 7 always, bits 6-0 the function
    lengths: int
    lun: bytes
    initiator_task_tag: int
    referenced_task_tag: int
    cmd_sn: int
    exp_stat_sn: int
    ref_cmd_sn: int
    exp_data_sn: int


@bhs(Opcode.TASK_MANAGEMENT_RESPONSE, "!BBBxI8xI4xIII12x")
class TaskManagementResponse(Header):
    """Task Management Function Response (RFC 7143 §11.6); RFC 7144 §5 uses bytes 5-7 of the reserved area."""

    opcode: int
    flags: int
    response: int
    lengths: int
    initiator_task_tag: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int


@bhs(Opcode.SCSI_DATA_OUT, "!BB2xI8sII4xI4xII4x")
class DataOut(Header):
    """SCSI Data-Out (RFC 7143 §11.7)."""

    opcode: int
    flags: int  # bit 7 F: last PDU of its sequence
    lengths: int
    lun: bytes
    initiator_task_tag: int
    target_transfer_tag: int
    exp_stat_sn: int
    data_sn: int
    buffer_offset: int


@bhs(Opcode.SCSI_DATA_IN, "!BBxBI8sIIIIIIII")
class DataIn(Header):
    """SCSI Data-In (RFC 7143 §11.7)."""

    opcode: int
    flags: int  # bit 7 F, bit 6 A, bit 2 O, bit 1 U, bit 0 S
    status: int
    lengths: int
    lun: bytes
    initiator_task_tag: int
    target_transfer_tag: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    data_sn: int
    buffer_offset: int
    residual: int


@bhs(Opcode.READY_TO_TRANSFER, "!BB2xI8sIIIIIIII")
class ReadyToTransfer(Header):
    """Ready To Transfer (RFC 7143 §11.8)."""

    opcode: int
    flags: int
    lengths: int
    lun: bytes
    initiator_task_tag: int
    target_transfer_tag: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    r2t_sn: int
    buffer_offset: int
    desired_data_transfer_length: int


@bhs(Opcode.ASYNC_MESSAGE, "!BB2xI8sI4xIIIBBHHH4x")
class AsyncMessage(Header):
    """Asynchronous Message (RFC 7143 §11.9)."""

    opcode: int
    flags: int
    lengths: int
    lun: bytes
    initiator_task_tag: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    async_event: int
    async_vcode: int
    parameter1: int
    parameter2: int
    parameter3: int


@bhs(Opcode.TEXT_REQUEST, "!BB2xI8sIIII16x")
class TextRequest(Header):
    """Text Request (RFC 7143 §11.10)."""

    opcode: int
    flags: int  # bit 7 F, bit 6 C
    lengths: int
    lun: bytes
    initiator_task_tag: int
    target_transfer_tag: int
    cmd_sn: int
    exp_stat_sn: int


@bhs(Opcode.TEXT_RESPONSE, "!BB2xI8sIIIII12x")
class TextResponse(Header):
    """Text Response (RFC 7143 §11.11)."""

    opcode: int
    flags: int
    lengths: int
    lun: bytes
    initiator_task_tag: int
    target_transfer_tag: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int


@bhs(Opcode.LOGIN_REQUEST, "!BBBBI6sHIH2xII16x")
class LoginRequest(Header):
    """Login Request (RFC 7143 §11.12)."""

    opcode: int
    flags: int  # bit 7 T, bit 6 C, bits 3-2 CSG, bits 1-0 NSG
    version_max: int
    version_min: int
    lengths: int
    isid: bytes
    tsih: int
    initiator_task_tag: int
    cid: int
    cmd_sn: int
    exp_stat_sn: int


@bhs(Opcode.LOGIN_RESPONSE, "!BBBBI6sHI4xIIIBB10x")
class LoginResponse(Header):
    """Login Response (RFC 7143 §11.13)."""

    opcode: int
    flags: int
    version_max: int
    version_active: int
    lengths: int
    isid: bytes
    tsih: int
    initiator_task_tag: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    status_class: int
    status_detail: int


@bhs(Opcode.LOGOUT_REQUEST, "!BB2xI8xIH2xII16x")
class LogoutRequest(Header):
    """Logout Request (RFC 7143 §11.14)."""

    opcode: int
    flags: int  # bit 7 always, bits 6-0 the reason
    lengths: int
    initiator_task_tag: int
    cid: int
    cmd_sn: int
    exp_stat_sn: int


@bhs(Opcode.LOGOUT_RESPONSE, "!BBBxI8xI4xIII4xHH4x")
class LogoutResponse(Header):
    """Logout Response (RFC 7143 §11.15)."""

    opcode: int
    flags: int
    response: int
    lengths: int
    initiator_task_tag: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    time2wait: int  # seconds
    time2retain: int  # seconds


@bhs(Opcode.SNACK_REQUEST, "!BB2xI8sII4xI8xII")
class SnackRequest(Header):
    """SNACK Request (RFC 7143 §11.16)."""

    opcode: int
    flags: int  # bit 7 always, bits 3-0 the type
    lengths: int
    lun: bytes
    initiator_task_tag: int
    target_transfer_tag: int
    exp_stat_sn: int
    beg_run: int
    run_length: int


@bhs(Opcode.REJECT, "!BBBxI8xI4xIIII8x")
class Reject(Header):
    """Reject (RFC 7143 §11.17); its data segment is the header of the rejected PDU."""

    opcode: int
    flags: int
    reason: int
    lengths: int
    initiator_task_tag: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    data_sn: int


BY_OPCODE: dict[int, type[Header]] = {
    header.OPCODE: header
    for header in (
        NopOut, NopIn, ScsiCommand, ScsiResponse, TaskManagementRequest, TaskManagementResponse,
        DataOut, DataIn, ReadyToTransfer, AsyncMessage, TextRequest, TextResponse,
        LoginRequest, LoginResponse, LogoutRequest, LogoutResponse, SnackRequest, Reject,
    )
}  # fmt: skip
"""Opcode without the I bit → its header."""
