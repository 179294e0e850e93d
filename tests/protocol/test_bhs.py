"""Every header both ways, and where its fields lie (RFC 7143 §11)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import bhs
from protocol.wire import Header
from protocol.wire import bhs as declare

HEADERS = list(bhs.BY_OPCODE.values())

# (header, field, value, first byte on the wire, bytes on the wire), read off the figures of §11.3 to §11.19.
POSITIONS = [
    (bhs.ScsiCommand, "lun", b"12345678", 8, b"12345678"),
    (bhs.ScsiCommand, "expected_data_transfer_length", 0x01020304, 20, b"\1\2\3\4"),
    (bhs.ScsiCommand, "cmd_sn", 0x01020304, 24, b"\1\2\3\4"),
    (bhs.ScsiCommand, "cdb", bytes(range(16)), 32, bytes(range(16))),
    (bhs.ScsiResponse, "status", 2, 3, b"\2"),
    (bhs.ScsiResponse, "exp_data_sn", 7, 36, b"\0\0\0\7"),
    (bhs.ScsiResponse, "bidirectional_read_residual", 7, 40, b"\0\0\0\7"),
    (bhs.ScsiResponse, "residual", 7, 44, b"\0\0\0\7"),
    (bhs.TaskManagementRequest, "referenced_task_tag", 9, 20, b"\0\0\0\11"),
    (bhs.TaskManagementRequest, "ref_cmd_sn", 9, 32, b"\0\0\0\11"),
    (bhs.TaskManagementResponse, "response", 5, 2, b"\5"),
    (bhs.DataOut, "target_transfer_tag", 9, 20, b"\0\0\0\11"),
    (bhs.DataOut, "data_sn", 9, 36, b"\0\0\0\11"),
    (bhs.DataOut, "buffer_offset", 9, 40, b"\0\0\0\11"),
    (bhs.DataIn, "status", 8, 3, b"\10"),
    (bhs.DataIn, "data_sn", 9, 36, b"\0\0\0\11"),
    (bhs.DataIn, "residual", 9, 44, b"\0\0\0\11"),
    (bhs.ReadyToTransfer, "r2t_sn", 9, 36, b"\0\0\0\11"),
    (bhs.ReadyToTransfer, "desired_data_transfer_length", 9, 44, b"\0\0\0\11"),
    (bhs.AsyncMessage, "async_event", 1, 36, b"\1"),
    (bhs.AsyncMessage, "async_vcode", 1, 37, b"\1"),
    (bhs.AsyncMessage, "parameter3", 0x0102, 42, b"\1\2"),
    (bhs.LoginRequest, "isid", b"abcdef", 8, b"abcdef"),
    (bhs.LoginRequest, "tsih", 0x0102, 14, b"\1\2"),
    (bhs.LoginRequest, "cid", 0x0102, 20, b"\1\2"),
    (bhs.LoginResponse, "version_active", 3, 3, b"\3"),
    (bhs.LoginResponse, "status_class", 2, 36, b"\2"),
    (bhs.LoginResponse, "status_detail", 1, 37, b"\1"),
    (bhs.LogoutRequest, "cid", 0x0102, 20, b"\1\2"),
    (bhs.LogoutResponse, "time2wait", 0x0102, 40, b"\1\2"),
    (bhs.LogoutResponse, "time2retain", 0x0102, 42, b"\1\2"),
    (bhs.SnackRequest, "beg_run", 9, 40, b"\0\0\0\11"),
    (bhs.SnackRequest, "run_length", 9, 44, b"\0\0\0\11"),
    (bhs.Reject, "reason", 4, 2, b"\4"),
    (bhs.Reject, "data_sn", 9, 36, b"\0\0\0\11"),
    (bhs.NopIn, "stat_sn", 9, 24, b"\0\0\0\11"),
    (bhs.TextResponse, "max_cmd_sn", 9, 32, b"\0\0\0\11"),
]


@pytest.mark.parametrize(
    ("header", "field", "value", "at", "wire"), POSITIONS, ids=[f"{p[0].__name__}.{p[1]}" for p in POSITIONS]
)
def test_fields_lie_where_the_figures_have_them(
    header: type[Header], field: str, value: object, at: int, wire: bytes
) -> None:
    parsed = header.parse(bytes(at) + wire + bytes(48 - at - len(wire)))
    assert getattr(parsed, field) == value
    assert parsed.build()[at : at + len(wire)] == wire


@pytest.mark.parametrize("header", HEADERS)
@given(data=st.binary(min_size=48, max_size=48))
def test_what_is_parsed_builds_the_same_header_again(header: type[Header], data: bytes) -> None:
    parsed = header.parse(data)
    assert header.parse(parsed.build()) == parsed


@pytest.mark.parametrize("header", HEADERS)
def test_reserved_bytes_go_out_as_zero(header: type[Header]) -> None:
    """RFC 7143 §11: reserved fields MUST be zero when sent."""
    zeroed = header.parse(bytes(48)).build()
    ones = header.parse(b"\xff" * 48).build()
    assert zeroed == bytes(48)
    assert len(ones) == 48


def test_a_declaration_that_does_not_fit_its_layout_fails_at_import() -> None:
    with pytest.raises(TypeError, match="2 values; fields"):

        @declare(0x3E, "!BB46x")
        class Short(Header):
            opcode: int
            flags: int
            lengths: int
