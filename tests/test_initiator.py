"""The test initiator itself: its framing, its numbers, and that it sees what a target does wrong."""

import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from protocol import bhs
from protocol.enums import RESERVED_TAG, LoginStatus, ScsiStatus
from protocol.wire import Header
from tests.cdbs import inquiry, read10, write10
from tests.initiator import (
    Breach,
    ConnectionClosed,
    Initiator,
    LoginFailed,
    MemoryPeer,
    Rejected,
    SocketInitiator,
    chap_response,
    decode_binary,
    decode_text,
    encode_binary,
    encode_lun,
    encode_text,
    frame,
)
from tests.initiator_wire import digest, serial_lt

IMMEDIATE = bhs.IMMEDIATE


def nop_in(stat_sn: int = 1, tag: int = 7, data: bytes = b"", **fields: int) -> bhs.NopIn:
    values = {"exp_cmd_sn": 1, "max_cmd_sn": 32, "target_transfer_tag": RESERVED_TAG, "flags": 0x80} | fields
    return bhs.NopIn(
        opcode=0x20,
        lengths=len(data),
        lun=bytes(8),
        initiator_task_tag=tag,
        stat_sn=stat_sn,
        **values,
    )


class Scripted:
    """A target that answers each delivery with what a function makes of it."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self.answer = answer
        self.received = b""
        self.out: list[bytes] = []

    def receive_data(self, view: memoryview, now: float) -> None:
        self.received += bytes(view)
        self.out.append(self.answer(bytes(view)))

    def data_to_send(self) -> list[bytes]:
        sent, self.out = self.out, []
        return [part for part in sent if part]


class TinyTarget:
    """The least target there is: logs anyone in, holds 64 KiB at LUN 0, asks for data in bursts.

    Written without our framer or session, so that the initiator is tested by neither.
    """

    KEYS = (
        ("HeaderDigest", "None"), ("DataDigest", "None"), ("MaxConnections", "1"), ("InitialR2T", "No"),
        ("ImmediateData", "Yes"), ("MaxBurstLength", "4096"), ("FirstBurstLength", "2048"),
        ("MaxOutstandingR2T", "1"), ("DefaultTime2Wait", "0"), ("DefaultTime2Retain", "0"),
        ("DataPDUInOrder", "Yes"), ("DataSequenceInOrder", "Yes"), ("ErrorRecoveryLevel", "0"),
        ("MaxRecvDataSegmentLength", "1024"),
    )  # fmt: skip

    def __init__(self) -> None:
        self.buffer = b""
        self.out: list[bytes] = []
        self.medium = bytearray(65536)
        self.stat_sn = 100
        self.exp_cmd_sn = 0
        self.writes: dict[int, dict[str, int]] = {}
        self.seen: list[Header] = []

    def receive_data(self, view: memoryview, now: float) -> None:
        self.buffer += bytes(view)
        while len(self.buffer) >= 48:
            header = bhs.BY_OPCODE[self.buffer[0] & 0x3F].parse(self.buffer)
            length = header.data_segment_length
            end = 48 + length + -length % 4
            if len(self.buffer) < end:
                return
            body, self.buffer = self.buffer[48 : 48 + length], self.buffer[end:]
            self.seen.append(header)
            getattr(self, "take_" + type(header).__name__)(header, body)

    def data_to_send(self) -> list[bytes]:
        sent, self.out = self.out, []
        return sent

    def numbers(self, counts: bool = True) -> dict[str, Any]:
        stat_sn = self.stat_sn
        self.stat_sn += counts
        return {"stat_sn": stat_sn, "exp_cmd_sn": self.exp_cmd_sn, "max_cmd_sn": self.exp_cmd_sn + 3}

    def send(self, kind: type[Header], data: bytes = b"", **fields: Any) -> None:
        self.out.append(Initiator().pdu(kind, data, **fields))

    def take_LoginRequest(self, header: bhs.LoginRequest, body: bytes) -> None:  # noqa: N802
        self.exp_cmd_sn = header.cmd_sn
        last = header.flags & 0x83 == 0x83
        keys = self.KEYS if last else (("AuthMethod", "None"),)
        self.send(
            bhs.LoginResponse,
            encode_text(keys),
            flags=header.flags,
            isid=header.isid,
            tsih=9 if last else 0,
            initiator_task_tag=header.initiator_task_tag,
            **self.numbers(),
        )

    def take_ScsiCommand(self, header: bhs.ScsiCommand, body: bytes) -> None:  # noqa: N802
        assert header.cmd_sn == self.exp_cmd_sn
        self.exp_cmd_sn += 1
        lba, blocks = struct.unpack_from("!2xIxH", header.cdb)
        at, end = lba * 512, (lba + blocks) * 512
        tag = header.initiator_task_tag
        if header.cdb[0] == 0x28:
            data = bytes(self.medium[at:end])[: header.expected_data_transfer_length]
            under = header.expected_data_transfer_length - len(data)
            self.send(
                bhs.DataIn,
                data,
                flags=0x81 | (under > 0) << 1,
                residual=under,
                initiator_task_tag=tag,
                target_transfer_tag=RESERVED_TAG,
                **self.numbers(),
            )
            return
        self.medium[at : at + len(body)] = body
        self.writes[tag] = {"at": at, "got": len(body), "length": end - at, "r2ts": 0, "burst": 0}
        if header.flags & 0x80:
            self.go_on(tag)

    def take_DataOut(self, header: bhs.DataOut, body: bytes) -> None:  # noqa: N802
        write = self.writes[header.initiator_task_tag]
        assert header.buffer_offset == write["got"]
        assert header.data_sn == write["burst"]
        assert len(body) <= 1024
        write["burst"] += 1
        at = write["at"] + write["got"]
        self.medium[at : at + len(body)] = body
        write["got"] += len(body)
        if header.flags & 0x80:
            self.go_on(header.initiator_task_tag)

    def go_on(self, tag: int) -> None:
        write = self.writes[tag]
        left = write["length"] - write["got"]
        write["burst"] = 0
        if left:
            self.send(
                bhs.ReadyToTransfer,
                flags=0x80,
                lun=encode_lun(0),
                initiator_task_tag=tag,
                target_transfer_tag=0x500 + write["r2ts"],
                r2t_sn=write["r2ts"],
                buffer_offset=write["got"],
                desired_data_transfer_length=min(left, 4096),
                **self.numbers(counts=False),
            )
            write["r2ts"] += 1
        else:
            self.send(
                bhs.ScsiResponse,
                flags=0x80,
                initiator_task_tag=tag,
                exp_data_sn=write["r2ts"],
                **self.numbers(),
            )

    def take_LogoutRequest(self, header: bhs.LogoutRequest, body: bytes) -> None:  # noqa: N802
        self.exp_cmd_sn += 1
        self.send(
            bhs.LogoutResponse, flags=0x80, initiator_task_tag=header.initiator_task_tag, **self.numbers()
        )

    def take_NopOut(self, header: bhs.NopOut, body: bytes) -> None:  # noqa: N802
        if header.initiator_task_tag != RESERVED_TAG:
            self.exp_cmd_sn += not header.opcode & IMMEDIATE
            self.send(
                bhs.NopIn,
                body,
                flags=0x80,
                initiator_task_tag=header.initiator_task_tag,
                target_transfer_tag=RESERVED_TAG,
                **self.numbers(),
            )


@pytest.fixture
def tiny() -> TinyTarget:
    return TinyTarget()


# -- words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "wire"),
    [
        (bytes(32), "aa36918a"),
        (b"\xff" * 32, "43aba862"),
        (bytes(range(32)), "4e79dd46"),
        (bytes(range(31, -1, -1)), "5cdb3f11"),
    ],
)
def test_digests_are_the_examples_of_the_rfc(data: bytes, wire: str) -> None:
    """RFC 7143 appendix A.4 (RFC 3720 B.4)."""
    assert digest(data).hex() == wire


def test_binary_values_have_two_spellings() -> None:
    """RFC 7143 §6.1."""
    value = bytes(range(20))
    assert decode_binary(encode_binary(value)) == decode_binary(encode_binary(value, "base64")) == value
    assert decode_binary("0X0aB") == b"\x00\xab"
    with pytest.raises(Breach):
        decode_binary("10")


def test_text_must_end_with_a_null_and_hold_pairs() -> None:
    """RFC 7143 §6.1."""
    assert decode_text(encode_text({"A": "1=2", "B": ""})) == [("A", "1=2"), ("B", "")]
    for wrong in (b"A=1", b"A\0", b"=1\0"):
        with pytest.raises(Breach):
            decode_text(wrong)


@pytest.mark.parametrize(
    ("algorithm", "response"),
    [
        (5, "46e47770030e2b4e26a0db72a7efec00"),
        (8, "9444877c4dff778ed2add0f102dcd561e11944e7e948ee1b89508451a9e680ad"),
    ],
)
def test_chap_hashes_identifier_secret_and_challenge(algorithm: int, response: str) -> None:
    """RFC 1994 §4.1; the values were made with ``openssl dgst`` from 01h, ``secret``, ``challenge``."""
    assert chap_response(algorithm, 1, "secret", b"challenge").hex() == response


def test_luns_above_255_use_flat_addressing() -> None:
    """SAM-5 §4.7.7.3."""
    assert encode_lun(5) == bytes.fromhex("0005000000000000")
    assert encode_lun(300) == bytes.fromhex("412c000000000000")


def test_serial_numbers_wrap() -> None:
    """RFC 1982 §3.2."""
    assert serial_lt(0xFFFFFFFF, 0)
    assert not serial_lt(0, 0xFFFFFFFF)
    assert not serial_lt(5, 5)


# -- framing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_digest", [False, True])
@pytest.mark.parametrize("header_digest", [False, True])
@pytest.mark.parametrize("split", [1, 3, 48, 1000])
def test_any_split_of_the_stream_gives_the_same_pdus(
    split: int, header_digest: bool, data_digest: bool
) -> None:
    """Padding and digests are where RFC 7143 §11.1 and §11.2.3-4 have them."""
    bodies = [b"", b"a", b"four", bytes(range(250))]
    stream = b"".join(
        frame(nop_in(sn, data=body), body, header_digest=header_digest, data_digest=data_digest)
        for sn, body in enumerate(bodies)
    )
    digests = 4 * len(bodies) * header_digest + 4 * 3 * data_digest
    assert len(stream) == 48 * 4 + 4 + 4 + 252 + digests
    initiator = Initiator()
    initiator.header_digest, initiator.data_digest = header_digest, data_digest
    pdus = [pdu for at in range(0, len(stream), split) for pdu in initiator.feed(stream[at : at + split])]
    assert [pdu.data for pdu in pdus] == bodies
    assert [pdu.expect(bhs.NopIn).stat_sn for pdu in pdus] == [0, 1, 2, 3]
    assert initiator.unread == 0


@pytest.mark.parametrize("kind", list(bhs.BY_OPCODE.values()), ids=lambda kind: kind.__name__)
def test_every_header_can_be_built_with_any_field(kind: type[Header]) -> None:
    """``parse(build(x)) == x`` through the generic builder, lengths following from the data."""
    raw = Initiator().pdu(kind, b"12345")
    header = kind.parse(raw)
    assert header.data_segment_length == 5
    assert len(raw) == 48 + 8
    assert raw[0] == kind.OPCODE
    with pytest.raises(TypeError):
        Initiator().pdu(kind, no_such_field=1)


def test_a_wrong_length_digest_or_padding_goes_out_as_asked() -> None:
    """Rule 2: able to misbehave at will."""
    raw = Initiator().pdu(
        bhs.NopOut, b"x", lengths=99, header_digest=b"HEAD", data_digest=b"DATA", padding=b"!!!"
    )
    assert bhs.NopOut.parse(raw).lengths == 99
    assert raw[48:] == b"HEADx!!!DATA"


def test_a_cdb_above_16_bytes_goes_on_in_an_extended_cdb_ahs() -> None:
    """RFC 7143 §11.2.2.3: AHSLength counts the reserved byte."""
    raw = Initiator().scsi_command(bytes(range(32)))
    assert bhs.ScsiCommand.parse(raw).lengths == 5 << 24
    assert raw[48:] == struct.pack("!HBx", 17, 1) + bytes(range(16, 32))


# -- numbers ----------------------------------------------------------------------------------------


def test_immediate_requests_carry_cmd_sn_and_leave_it() -> None:
    """RFC 7143 §4.2.2.1."""
    initiator = Initiator()
    initiator.session.cmd_sn = 0xFFFFFFFF
    sent = [
        initiator.nop_out(immediate=True), initiator.nop_out(), initiator.nop_out(immediate=True),
        initiator.nop_out(cmd_sn=77), initiator.nop_out(),
    ]  # fmt: skip
    assert [bhs.NopOut.parse(raw).cmd_sn for raw in sent] == [0xFFFFFFFF, 0xFFFFFFFF, 0, 77, 0]
    assert [bool(raw[0] & IMMEDIATE) for raw in sent] == [True, False, True, False, False]
    assert len({bhs.NopOut.parse(raw).initiator_task_tag for raw in sent}) == 5


BREACHES: dict[str, tuple[bytes, ...]] = {
    "StatSN repeated": (nop_in(5).build(), nop_in(5).build()),
    "StatSN skipped": (nop_in(5).build(), nop_in(7).build()),
    "StatSN advanced by a ping": (
        nop_in(5).build(), nop_in(6, RESERVED_TAG, target_transfer_tag=1).build(), nop_in(7).build(),
    ),
    "MaxCmdSN below ExpCmdSN - 1": (nop_in(exp_cmd_sn=10, max_cmd_sn=8).build(),),
    "opcode of an initiator": (bytes(48),),
    "I bit": (b"\x60" + nop_in().build()[1:],),
    "reserved bytes": (nop_in().build()[:47] + b"\x01",),
    "padding": (nop_in(data=b"x").build() + b"x\0\0\1",),
    "data segment longer than declared": (frame(nop_in(data=bytes(8193)), bytes(8193)),),
}  # fmt: skip


@pytest.mark.parametrize("stream", BREACHES.values(), ids=BREACHES.keys())
def test_what_a_target_may_never_do_is_a_breach(stream: tuple[bytes, ...]) -> None:
    """RFC 7143 §4.2.2, §11.1, §11.19."""
    initiator = Initiator()
    for good in stream[:-1]:
        assert len(initiator.feed(good)) == 1
    with pytest.raises(Breach):
        initiator.feed(stream[-1])


@pytest.mark.parametrize("at", [3, 50, 53, 58])
def test_one_flipped_bit_is_seen_by_a_digest(at: int) -> None:
    """RFC 7143 §13.1: header, header digest, data, data digest."""
    raw = bytearray(frame(nop_in(data=b"data"), b"data", header_digest=True, data_digest=True))
    raw[at] ^= 0x10
    initiator = Initiator(strict=False)
    initiator.header_digest = initiator.data_digest = True
    initiator.feed(bytes(raw))
    assert any("digest" in breach for breach in initiator.breaches)


def test_a_ping_of_the_target_does_not_advance_stat_sn() -> None:
    """RFC 7143 §11.19.3."""
    initiator = Initiator()
    for header in (nop_in(5), nop_in(6, RESERVED_TAG, target_transfer_tag=1), nop_in(6)):
        initiator.feed(header.build())
    assert initiator.exp_stat_sn == 7


def test_the_window_only_moves_forward() -> None:
    """RFC 7143 §4.2.2.1: a smaller MaxCmdSN that arrives late is ignored."""
    initiator = Initiator()
    initiator.feed(nop_in(1, exp_cmd_sn=1, max_cmd_sn=9).build())
    initiator.feed(nop_in(2, exp_cmd_sn=0, max_cmd_sn=5).build())
    assert (initiator.session.exp_cmd_sn, initiator.session.max_cmd_sn) == (1, 9)
    assert initiator.session.window == 9


# -- conversations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [None, 1, 7])
def test_a_write_goes_out_as_immediate_unsolicited_and_solicited_data(
    tiny: TinyTarget, split: int | None
) -> None:
    """RFC 7143 §4.2.5.2 with FirstBurstLength 2048, MaxBurstLength 4096 and 1024 bytes a PDU."""
    peer = MemoryPeer(tiny, split=split)
    keys = peer.login("iqn.2016-04.com.example:tiny")
    assert (keys["FirstBurstLength"], keys["MaxBurstLength"]) == ("2048", "4096")
    assert peer.session.tsih == 9
    data = bytes(range(256)) * 40
    assert peer.command(write10(1, 20), data).good
    assert tiny.medium[512:10752] == data
    outs = [header for header in tiny.seen if isinstance(header, bhs.DataOut)]
    assert [header.target_transfer_tag for header in outs] == [RESERVED_TAG] + [0x500] * 4 + [0x501] * 4
    assert peer.command(read10(1, 2), read=1024).data == data[:1024]
    status, got, sense, residuals = peer.command(read10(0, 1), read=600)
    assert (status, len(got), sense, residuals) == (ScsiStatus.GOOD, 512, b"", (88, 0))
    assert peer.nop(b"ping").data == b"ping"
    assert peer.logout().response == 0


def test_more_commands_than_the_window_takes_wait_for_it(tiny: TinyTarget) -> None:
    """RFC 7143 §4.2.2.1; the target takes 4 at a time."""
    peer = MemoryPeer(tiny)
    peer.login("iqn.2016-04.com.example:tiny")
    tasks = []
    for _ in range(20):
        tasks.append(peer.send_command(read10(0, 1), read=512))
        assert not serial_lt(cast(int, peer.session.max_cmd_sn), tasks[-1].cmd_sn)
    assert all(reply.good for reply in peer.wait_all())
    assert all(task.done for task in tasks)


def test_nothing_to_read_is_an_error_and_not_a_wait(tiny: TinyTarget) -> None:
    """In memory time does not pass."""
    with pytest.raises(ConnectionClosed):
        MemoryPeer(tiny).receive()
    assert MemoryPeer(tiny).pending() == []


def test_a_target_that_keeps_what_was_lent_finds_it_overwritten() -> None:
    """Received bytes are borrowed until the next delivery, as from a receive buffer."""

    class Keeper:
        kept: memoryview | None = None

        def receive_data(self, view: memoryview, now: float) -> None:
            self.kept = self.kept or view

        def data_to_send(self) -> list[bytes]:
            return []

    keeper = Keeper()
    peer = MemoryPeer(keeper)
    peer.send(b"first")
    assert bytes(keeper.kept or b"") == b"first"
    peer.send(b"second")
    assert bytes(keeper.kept or b"") == b"\xee" * 5


def test_a_refused_login_tells_status() -> None:
    """RFC 7143 §11.13.5."""

    def refuse(request: bytes) -> bytes:
        header = bhs.LoginRequest.parse(request)
        return Initiator().pdu(
            bhs.LoginResponse,
            isid=header.isid,
            initiator_task_tag=header.initiator_task_tag,
            status_class=2,
            status_detail=1,
        )

    with pytest.raises(LoginFailed) as failure:
        MemoryPeer(Scripted(refuse)).login("iqn.2016-04.com.example:tiny")
    assert failure.value.status == LoginStatus.AUTHENTICATION_FAILURE


def test_a_reject_ends_the_request_it_returns(tiny: TinyTarget) -> None:
    """RFC 7143 §11.17: the data segment is the header of what was rejected."""
    peer = MemoryPeer(tiny)
    peer.login("iqn.2016-04.com.example:tiny")

    def reject(header: bhs.ScsiCommand, body: bytes) -> None:
        tiny.send(
            bhs.Reject,
            header.build(),
            flags=0x80,
            reason=5,
            initiator_task_tag=RESERVED_TAG,
            **tiny.numbers(),
        )

    cast(Any, tiny).take_ScsiCommand = reject
    with pytest.raises(Rejected) as rejected:
        peer.command(inquiry(), read=36)
    assert rejected.value.reason == 5


def test_the_same_conversation_goes_over_a_socket(tiny: TinyTarget) -> None:
    """What ``SocketInitiator`` adds is only the socket."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(65536):
                tiny.receive_data(memoryview(data), 0.0)
                connection.sendall(b"".join(tiny.data_to_send()))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener, SocketInitiator(listener.getsockname()) as initiator:
        initiator.login("iqn.2016-04.com.example:tiny")
        assert initiator.command(write10(0, 8), bytes(range(256)) * 16).good
        assert initiator.command(read10(0, 8), read=4096).data == bytes(range(256)) * 16
        initiator.logout()
        initiator.socket.shutdown(socket.SHUT_WR)
        assert initiator.wait_closed() == []
    thread.join(5)
    assert not thread.is_alive()
