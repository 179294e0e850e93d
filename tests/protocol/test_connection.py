"""The connection in full feature phase: any split of the bytes, NOP, logout, Reject, time, and anything at
all from the network (RFC 7143 §4.2, §7, §11)."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import bhs
from protocol.connection import Phase
from protocol.enums import RESERVED_TAG, AsyncEvent, RejectReason, SnackType
from protocol.events import End, EndReason
from protocol.limits import MAX_IMMEDIATE_TASKS, PING_PATIENCE
from tests import cdbs
from tests.initiator import Initiator, MemoryPeer, Rejected, SessionState
from tests.protocol.target import TARGET, Endpoint, MemoryTarget, connection_of

ISID = b"\x80fixed"
DIGESTS = {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}


def pattern(size: int) -> bytes:
    return bytes(n * 7 % 251 for n in range(size))


# -- any split --------------------------------------------------------------------------------------


class Recorder(MemoryPeer):
    """Keeps what was sent, delivery by delivery, and what was received."""

    def __init__(self, endpoint: Endpoint, initiator: Initiator) -> None:
        super().__init__(endpoint, endpoint.serve, initiator=initiator)
        self.sent: list[bytes] = []
        self.received = b""

    def send(self, data: bytes) -> None:
        self.sent.append(data)
        super().send(data)

    def read_bytes(self) -> bytes:
        data = super().read_bytes()
        self.received += data
        return data


def script(keys: dict[str, str]) -> tuple[list[bytes], bytes]:
    """A conversation with everything in it, as bytes: what the initiator sent, what it got."""
    endpoint = Endpoint(MemoryTarget(error_recovery_level=2))
    peer = Recorder(endpoint, Initiator(SessionState(isid=ISID)))
    peer.login(TARGET, keys=keys)
    peer.command(bytes(6))
    for kind in SnackType:  # for nothing: rejected, or nothing is sent again
        peer.send(peer.initiator.snack(kind, tag=0x77, target_transfer_tag=0x77))
        peer.pending()
    peer.command(cdbs.write10(0, 3), pattern(1536), immediate_data=512, unsolicited=1024)
    peer.command(cdbs.write10(8, 80), pattern(40960), immediate_data=0, unsolicited=0)
    peer.command(cdbs.read10(0, 90), read=46080)
    peer.command(cdbs.read10(0, 4), read=1000)
    peer.command(cdbs.read10(1 << 30, 4), read=2048)
    peer.command(b"\x7f" + bytes(31))
    peer.command(cdbs.write10(4, 1), pattern(200), expected=200)
    peer.nop(b"odd number of by")
    peer.nop(pattern(777), immediate=True)
    peer.text({"SendTargets": "All", "X-com.example": "1"})
    peer.task_management(5)
    peer.command(bytes(6))
    with pytest.raises(Rejected):
        peer.text(b"nonsense\0")
    peer.logout()
    return peer.sent, peer.received


SCRIPTS = {
    name: script(keys)
    for name, keys in {
        "plain": {"MaxRecvDataSegmentLength": "8192"},
        "digests": DIGESTS,
        "header": {"HeaderDigest": "CRC32C"},
        "data": {"DataDigest": "CRC32C", "FirstBurstLength": "4096"},
        "recovery": {"ErrorRecoveryLevel": "2", **DIGESTS},
    }.items()
}


def replay(sent: bytes, cuts: list[int], straight_home: bool = False) -> bytes:
    """Deliver these bytes cut at these places through one buffer that is used again; the answers."""
    endpoint = Endpoint(MemoryTarget(error_recovery_level=2))
    connection = endpoint.connection
    answers = []
    at = 0
    for end in (*sorted(min(cut, len(sent)) for cut in cuts), len(sent)):
        while at < end:
            home = connection.framer.receive_target() if straight_home else None
            if home is not None:
                size = min(len(home), end - at)
                home[:size] = sent[at : at + size]
                connection.received_in_target(size, 0.0)
                endpoint.serve()
            else:
                size = end - at
                buffer = bytearray(sent[at:end])
                connection.receive_data(memoryview(buffer), 0.0)
                endpoint.serve()
                buffer[:] = b"\xee" * size
            at += size
        answers += [bytes(part) for part in connection.data_to_send()]
    return b"".join(answers)


def waits(sent: list[bytes]) -> list[int]:
    """Where the initiator waited for an answer: what is in one delivery may be answered in another order."""
    return list(accumulate(map(len, sent)))


@pytest.mark.parametrize("name", SCRIPTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cuts=st.lists(st.integers(0, 50_000), max_size=60), straight_home=st.booleans())
def test_any_split_of_the_bytes_gets_the_same_answers(
    name: str, cuts: list[int], straight_home: bool
) -> None:
    """Byte for byte."""
    sent, received = SCRIPTS[name]
    assert replay(b"".join(sent), cuts + waits(sent), straight_home) == received


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("size", [1, 47, 48, 1000])
def test_pieces_of_one_size_get_the_same_answers(name: str, size: int) -> None:
    sent, received = SCRIPTS[name]
    assert replay(b"".join(sent), [*range(0, sum(map(len, sent)), size), *waits(sent)]) == received


def by_tag(received: bytes, *, header_digest: bool, data_digest: bool) -> dict[int, list[Any]]:
    """What each request got, without the numbers that depend on who came first."""
    initiator = Initiator()
    answers: dict[int, list[Any]] = {}
    for pdu in initiator.feed(received):
        initiator.header_digest, initiator.data_digest = header_digest, data_digest
        answers.setdefault(pdu.initiator_task_tag, []).append((pdu.opcode, pdu.data))
    return answers


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 9000), max_size=8))
def test_many_requests_in_one_delivery_get_what_each_would_get(cuts: list[int]) -> None:
    endpoint = Endpoint(MemoryTarget())
    peer = Recorder(endpoint, Initiator(SessionState(isid=ISID)))
    peer.login(TARGET)
    peer.command(bytes(6))
    for n in range(4):
        peer.command(cdbs.write10(n, 1), pattern(512 + n)[n:])
        peer.nop(pattern(n))
        peer.command(cdbs.read10(n, 1), read=512)
        peer.text({"SendTargets": "All"})
    login = len(peer.sent[0] + peer.sent[1])
    answers = replay(b"".join(peer.sent), [len(peer.sent[0]), login, *(login + cut for cut in cuts)])
    plain = {"header_digest": False, "data_digest": False}
    assert by_tag(answers, **plain) == by_tag(peer.received, **plain)


# -- NOP --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("size", [0, 1, 4096])
def test_a_ping_is_echoed(immediate: bool, size: int) -> None:
    """RFC 7143 §11.18, §11.19."""
    peer = MemoryTarget().logged_in()
    assert peer.nop(pattern(size), immediate=immediate, lun=b"\0\x01" + bytes(6)).data == pattern(size)


def test_an_echo_is_cut_to_what_the_initiator_takes() -> None:
    peer = MemoryTarget().logged_in(keys={"MaxRecvDataSegmentLength": "512"})
    assert peer.nop(pattern(2000)).data == pattern(512)


def test_a_silent_initiator_is_asked_for_a_sign_of_life_and_dropped_without_one() -> None:
    """RFC 7143 §11.19.2: with a Target Transfer Tag of ours."""
    target = MemoryTarget()
    peer = target.logged_in()
    target.pass_time(20)
    assert peer.pending() == []
    target.pass_time(1)
    ping = peer.wait_for_ping().expect(bhs.NopIn)
    assert ping.target_transfer_tag != RESERVED_TAG
    target.pass_time(20)
    assert not connection_of(peer).closing  # answered
    target.pass_time(1)
    peer.answer_pings = False
    assert peer.wait_for_ping()
    target.pass_time(PING_PATIENCE * 20)
    assert not connection_of(peer).closing
    target.pass_time(1)
    assert "no answer to NOP-In" in connection_of(peer).closing
    assert not target.sessions.sessions


def test_an_initiator_that_talks_is_not_asked() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    for _ in range(10):
        target.pass_time(15)
        peer.nop(b"x")
    assert peer.pings == []


@pytest.mark.parametrize("tag", [5, 0])
def test_an_answer_to_a_ping_that_was_not_sent(tag: int) -> None:
    peer = MemoryTarget().logged_in()
    stray = peer.initiator.nop_out(initiator_task_tag=RESERVED_TAG, target_transfer_tag=tag, immediate=True)
    assert peer.request(stray).expect(bhs.Reject).reason == RejectReason.INVALID_PDU_FIELD


def test_a_sign_of_life_that_wants_no_answer() -> None:
    """RFC 7143 §11.18.2."""
    peer = MemoryTarget().logged_in()
    peer.send(peer.initiator.nop_out(initiator_task_tag=RESERVED_TAG, immediate=True))
    assert peer.pending() == []


def test_a_peer_that_stalls_inside_a_pdu_is_dropped() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    connection = connection_of(peer)
    connection.nop_interval_s = 0
    peer.send(peer.initiator.nop_out(b"x")[:50])
    target.pass_time(30)
    assert not connection.closing
    target.pass_time(1)
    assert "stalled" in connection.closing


def test_a_peer_whose_bytes_nobody_has_received_yet_does_not_stall() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    connection = connection_of(peer)
    unread = True
    connection.has_unread = lambda: unread
    connection.nop_interval_s = 0
    peer.send(peer.initiator.nop_out(b"x")[:50])
    target.pass_time(40)
    assert not connection.closing
    unread = False
    target.pass_time(1)
    assert "stalled" in connection.closing


def test_time_in_which_nobody_listened_counts_for_no_limit() -> None:
    target = MemoryTarget()
    inside_pdu, pinged, asked, new = (
        target.logged_in(initiator_name=f"iqn.2026-11.example:i{n}") for n in range(4)
    )
    newcomer = Endpoint(target).connection
    connection_of(inside_pdu).nop_interval_s = 0
    inside_pdu.send(inside_pdu.initiator.nop_out(b"x")[:50])
    target.pass_time(21)
    connection_of(asked).request_logout(10, End(EndReason.ADMINISTRATOR, "maintenance"))
    connection_of(new).request_negotiation(10)
    connections = [connection_of(peer) for peer in (inside_pdu, pinged, asked, new)]
    target.now += 1000
    for connection in connections:
        connection.excuse(1000)
        connection.tick(target.now)
        assert not connection.closing
    newcomer.excuse(1000 + 21)
    newcomer.tick(target.now)
    assert not newcomer.closing
    for connection in connections[1:]:
        connection.nop_interval_s = 1
        connection.tick(target.now + 100)
        assert connection.closing


def test_nothing_is_timed_when_the_times_are_0() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    connection = connection_of(peer)
    connection.nop_interval_s = connection.io_timeout_s = 0
    peer.send(peer.initiator.nop_out(b"x")[:50])
    target.pass_time(10**6)
    assert not connection.closing
    assert peer.pending() == []


# -- numbers ----------------------------------------------------------------------------------------


def test_stat_sn_counts_what_has_status() -> None:
    """RFC 7143 §4.2.2.2: the test initiator checks each; R2T, Data-In and our pings do not count."""
    target = MemoryTarget()
    peer = target.logged_in()
    before = connection_of(peer).stat_sn
    peer.command(cdbs.read10(0, 64), read=32768)
    peer.command(cdbs.write10(0, 64), pattern(32768), immediate_data=0, unsolicited=0)
    target.pass_time(21)
    peer.wait_for_ping()
    peer.nop(b"x")
    peer.text(b"")
    peer.task_management(3)
    assert connection_of(peer).stat_sn == before + 5


def test_immediate_commands_take_no_place_in_the_window_and_have_a_bound() -> None:
    """RFC 7143 §4.2.2.1; §11.17.1, reason 06h."""
    target = MemoryTarget()
    target.access.grant = replace(target.access.grant, r2ts=MAX_IMMEDIATE_TASKS)
    peer = target.logged_in()
    for n in range(MAX_IMMEDIATE_TASKS + 1):
        peer.send(
            peer.initiator.scsi_command(
                cdbs.write10(0, 1), write=True, expected=512, immediate=True, initiator_task_tag=1000 + n
            )
        )
    *r2ts, reject = peer.pending()
    assert len([pdu.expect(bhs.ReadyToTransfer) for pdu in r2ts]) == MAX_IMMEDIATE_TASKS
    assert reject.expect(bhs.Reject).reason == RejectReason.IMMEDIATE_COMMAND_REJECT
    assert peer.session.window == 8


# -- Reject -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [0x07, 0x1C, 0x1F, 0x20, 0x21, 0x25, 0x31, 0x3F, 0x03, 0x47])
def test_an_opcode_that_has_no_place_here_is_rejected(opcode: int) -> None:
    """RFC 7143 §11.17.1: Command not supported; the Reject carries the header."""
    peer = MemoryTarget().logged_in()
    pdu = bytes((opcode, 0x80)) + bytes(range(3)) + b"\0\0\4" + bytes(40) + b"data"
    pdu = pdu[:4] + b"\0" + pdu[5:]
    answer = peer.request(pdu)
    assert answer.expect(bhs.Reject).reason == RejectReason.COMMAND_NOT_SUPPORTED
    assert answer.data == pdu[:48]
    assert answer.initiator_task_tag == RESERVED_TAG
    assert peer.nop(b"x")


def test_snack_is_rejected_at_level_0() -> None:
    """RFC 7143 §11.16, §11.17.1, reason 03h."""
    peer = MemoryTarget().logged_in()
    assert peer.request(peer.initiator.snack(1)).expect(bhs.Reject).reason == RejectReason.SNACK_REJECT


def test_a_tag_in_use_is_rejected_and_its_task_goes_on() -> None:
    """RFC 7143 §11.17.1, reason 07h."""
    target = MemoryTarget()
    peer = target.logged_in()
    peer.answer_r2ts = False
    task = peer.send_command(cdbs.write10(0, 1), pattern(512), immediate_data=0, unsolicited=0)
    r2t = peer.wait_for_r2t(task)
    again = peer.initiator.scsi_command(bytes(6), initiator_task_tag=task.tag)
    assert peer.request(again).expect(bhs.Reject).reason == RejectReason.TASK_IN_PROGRESS
    peer.answer_r2t(task, r2t)
    assert peer.wait(task).good


@pytest.mark.parametrize("keys", [{}, DIGESTS])
def test_a_segment_longer_than_declared_ends_the_connection(keys: dict[str, str]) -> None:
    """RFC 7143 §13.12. Nothing is allocated for it."""
    target = MemoryTarget(max_recv_data_segment_length=4096)
    peer = target.logged_in(keys=keys)
    peer.send(peer.initiator.pdu(bhs.NopOut, lengths=4097))
    assert "4097" in connection_of(peer).closing
    assert not target.sessions.sessions
    assert peer.pending() == []


@pytest.mark.parametrize("attribute", range(8))
@pytest.mark.parametrize("cdb", [cdbs.inquiry(), cdbs.report_luns(), cdbs.request_sense(), bytes(6)])
def test_a_lun_that_does_not_exist_answers_whatever_the_attribute(attribute: int, cdb: bytes) -> None:
    """SAM-5 §5.11; found by the random PDUs below: ORDERED was never answered."""
    peer = MemoryTarget().logged_in()
    reply = peer.command(cdb, read=0 if cdb == bytes(6) else 255, lun=9, attribute=attribute)
    assert reply.additional_sense == (0x25, 0x00) if cdb == bytes(6) else reply.status == 0
    assert peer.command(cdb, lun=0).status == 0


# -- logout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [0, 1])
@pytest.mark.parametrize("immediate", [False, True])
def test_after_logout_nothing_is_looked_at(reason: int, immediate: bool) -> None:
    """RFC 7143 §11.14, §11.15: one answer, then silence, whatever follows."""
    target = MemoryTarget()
    peer = target.logged_in(keys=DIGESTS)
    initiator = peer.initiator
    peer.send(
        initiator.logout_request(reason, immediate=immediate, initiator_task_tag=50)
        + initiator.scsi_command(cdbs.write10(0, 1), pattern(512), write=True, expected=512)
        + initiator.nop_out(b"bad digest", data_digest=b"bad!")
        + initiator.nop_out(b"x")
        + b"garbage" * 100
    )
    (pdu,) = peer.pending()
    header = pdu.expect(bhs.LogoutResponse)
    assert (header.response, header.initiator_task_tag, header.time2wait) == (0, 50, 2)
    assert connection_of(peer).closing
    assert connection_of(peer).phase == Phase.LOGGED_OUT
    assert not target.sessions.sessions
    assert bytes(target.backends[0].read(0, 512)) == bytes(512)


def test_logout_for_recovery_is_not_for_level_0() -> None:
    """RFC 7143 §11.15.1, response 2."""
    peer = MemoryTarget().logged_in()
    assert peer.logout(2).response == 2
    assert peer.nop(b"x")


def test_logout_ends_what_is_under_way() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    peer.answer_r2ts = False
    task = peer.send_command(cdbs.write10(0, 1), pattern(512), immediate_data=0, unsolicited=0)
    peer.wait_for_r2t(task)
    assert peer.logout().response == 0
    assert not target.units[0].tasks
    assert not target.target.nexuses


def test_an_initiator_that_is_asked_to_log_out_and_does_not_is_dropped() -> None:
    """RFC 7143 §11.9.1, event 1: Parameter3 is the time it has."""
    target = MemoryTarget()
    peer = target.logged_in()
    connection = connection_of(peer)
    connection.request_logout(5, End(EndReason.STOPPED, "shutdown"))
    connection.request_logout(9, End(EndReason.STOPPED, "again"))
    message = peer.wait_for_async().expect(bhs.AsyncMessage)
    assert (message.async_event, message.parameter3) == (AsyncEvent.LOGOUT_REQUEST, 5)
    assert peer.command(cdbs.read10(0, 1), read=512).good
    assert peer.pending() == []
    target.pass_time(5)
    assert not connection.closing
    target.pass_time(1)
    assert connection.closing
    assert not target.sessions.sessions


# -- anything at all --------------------------------------------------------------------------------


def survives(target: MemoryTarget, peer: MemoryPeer, deliveries: list[bytes]) -> None:
    """Bytes in; out come PDUs of a target, or silence, or the end of this one connection."""
    connection = connection_of(peer)
    peer.answer_pings = False
    sent = 0
    for data in deliveries:
        peer.send(data)
        sent += len(data)
        queued = sum(map(len, connection.out))
        assert queued <= 64 * 1024 + 600 * 1024 + 48 * (len(data) // 48 + 1)
        peer.pending()
        assert len(connection.framer._stash) <= 48 + 264 + 4 + connection.framer.max_data + 8
    for session in target.sessions.sessions.values():
        assert len(session.tasks) <= 8 + MAX_IMMEDIATE_TASKS
        assert len(session.held) <= 8
        assert session.max_cmd_sn - session.exp_cmd_sn + 1 <= 8
        assert len(session.tasks) + session.max_cmd_sn - session.exp_cmd_sn + 1 >= 8
    other = target.logged_in()
    assert other.command(cdbs.read10(0, 1), read=512).status == 0


def fuzzed(keys: dict[str, str] | None = None) -> tuple[MemoryTarget, MemoryPeer]:
    target = MemoryTarget(size=65536, max_recv_data_segment_length=4096, error_recovery_level=2)
    peer = target.logged_in(strict=False, keys={"FirstBurstLength": "4096", **(keys or {})})
    return target, peer


@settings(max_examples=80, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5), st.booleans())
def test_any_bytes_in_full_feature_phase(deliveries: list[bytes], digests: bool) -> None:
    survives(*fuzzed(DIGESTS if digests else None), deliveries)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5))
def test_any_bytes_before_login(deliveries: list[bytes]) -> None:
    target = MemoryTarget(size=65536)
    survives(target, target.connect(strict=False), deliveries)


KINDS = [
    bhs.NopOut, bhs.ScsiCommand, bhs.TaskManagementRequest, bhs.TextRequest, bhs.DataOut, bhs.LogoutRequest,
    bhs.SnackRequest, bhs.LoginRequest,
]  # fmt: skip
SMALL = st.one_of(st.integers(0, 12), st.integers(0, 0xFFFFFFFF), st.just(RESERVED_TAG))
CDBS = st.sampled_from(
    [bytes(6), cdbs.read10(0, 1), cdbs.write10(0, 4), cdbs.write10(1, 16), cdbs.inquiry(), cdbs.report_luns()]
)


@st.composite
def random_pdus(draw: Callable[..., Any]) -> tuple[type, bytes, dict[str, int | bytes], bool]:
    kind = draw(st.sampled_from(KINDS[:-1] if draw(st.integers(0, 9)) else KINDS))
    data = draw(st.sampled_from([b"", bytes(5), bytes(512), bytes(2048), b"SendTargets=All\0"]))
    fields: dict[str, int | bytes] = {}
    for name in kind.__slots__:
        if name in ("opcode", "lengths", "cmd_sn", "isid", "lun"):
            continue
        if name == "cdb":
            fields[name] = draw(CDBS)[:16].ljust(16, b"\0")
        elif name == "flags":
            fields[name] = draw(st.sampled_from([0x80, 0xA1, 0xC1, 0x21, 0xE1, 0x81, 0x82, 0x85, 0x00, 0x40]))
        elif name in ("version_max", "version_min"):
            fields[name] = 0
        elif name in ("cid", "tsih"):
            fields[name] = draw(st.integers(0, 3))
        else:
            fields[name] = draw(SMALL)
    if kind is bhs.LogoutRequest and draw(st.integers(0, 3)):
        fields["flags"] = 0x82
    if draw(st.booleans()) and "lun" in kind.__slots__:
        fields["lun"] = draw(st.binary(min_size=8, max_size=8))
    return kind, data, fields, draw(st.booleans())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(random_pdus(), st.integers(-2, 10)), max_size=25),
    st.booleans(),
    st.sampled_from(
        [
            {},
            DIGESTS,
            {"InitialR2T": "Yes", "ImmediateData": "No"},
            {"ErrorRecoveryLevel": "1", **DIGESTS},
            {"ErrorRecoveryLevel": "2", "DefaultTime2Retain": "20"},
        ]
    ),
)
def test_valid_pdus_with_any_fields(said: list[tuple[Any, int]], stuck: bool, keys: dict[str, str]) -> None:
    """Whatever is asked in whatever order: documented answers, every bound kept, the others unharmed."""
    target, peer = fuzzed(keys)
    initiator = peer.initiator
    target.lane.hold = stuck
    deliveries = []
    number = peer.session.cmd_sn
    for (kind, data, fields, immediate), step in said:
        more = dict(fields)
        more["opcode"] = kind.OPCODE | (0x40 if immediate else 0)
        if "cmd_sn" in kind.__slots__:
            more["cmd_sn"] = (number + (step if step < 3 else 0)) & 0xFFFFFFFF
            if step >= 3 and not immediate:
                number += 1
        deliveries.append(initiator.pdu(kind, data, **more))  # type: ignore[arg-type]
    survives(target, peer, deliveries)
    target.lane.hold = False
    target.lane.release()
    peer.pending()
    for session in list(target.sessions.sessions.values()):
        target.sessions.end(session, "end of the test")
    assert not target.units[0].tasks


def test_a_long_random_conversation_of_one_that_behaves() -> None:
    """Reads, writes, pings and aborts at random, verified against a model."""
    dice = random.Random(3720)
    target = MemoryTarget(size=65536, max_burst_length=2048, first_burst_length=1024)
    peer = target.logged_in(split=777)
    model = bytearray(65536)
    for _ in range(300):
        block, blocks = dice.randrange(120), dice.randrange(9)
        size = blocks * 512
        match dice.randrange(4):
            case 0:
                assert (
                    peer.command(cdbs.read10(block, blocks), read=size).data
                    == model[block * 512 : block * 512 + size]
                )
            case 1 | 2:
                data = dice.randbytes(size)
                options = {"immediate_data": dice.choice([0, min(512, size)]), "unsolicited": min(1024, size)}
                assert peer.command(cdbs.write10(block, blocks), data, **options, write=True).good
                model[block * 512 : block * 512 + size] = data
            case _:
                assert peer.nop(dice.randbytes(dice.randrange(20)))
    assert bytes(target.backends[0].read(0, 65536)) == model


# -- how much an initiator has under way ---------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 0xFFFFFFFD], ids=["plain", "StatSN wraps"])
def test_who_had_nothing_else_under_way_is_told_from_his_exp_stat_sn(before: int) -> None:
    """RFC 7143 §11.3: it says which answers he has had. Behind one that was sent before the answer to
    another was there, that other was under way."""
    peer = MemoryTarget().logged_in()
    connection = connection_of(peer)
    if before:
        connection.stat_sn = peer.initiator.exp_stat_sn = before
    for _ in range(3):
        alone = peer.initiator.scsi_command(bytes(6))
        peer.send(alone)
        assert connection.was_alone(memoryview(alone))
        unread = peer.initiator.scsi_command(bytes(6))
        peer.send(unread)
        assert not connection.was_alone(memoryview(unread))
        assert len(peer.pending()) == 2


# -- what the target says unasked --------------------------------------------------------------------


def test_a_change_of_the_luns_is_told_once_a_session() -> None:
    """RFC 7143 §11.9.1, event 0, with the sense data of the unit attention, which stays (SPC-4 §6.33)."""
    target = MemoryTarget(luns=2, max_connections=2)
    one = target.logged_in(keys={"MaxConnections": "2"})
    two = target.connect(session=one.session)
    two.initiator.cid = 2
    two.login(TARGET)
    discovery = target.connect()
    discovery.login(None)
    target.target.replace_luns({0: target.units[0]})
    target.sessions.tell_luns_changed(target.target)
    event = one.wait_for_async()
    header = event.expect(bhs.AsyncMessage)
    assert (header.async_event, header.lun) == (AsyncEvent.SCSI_EVENT, bytes(8))
    length = int.from_bytes(event.data[:2], "big")
    sense = event.data[2:]
    assert (len(sense), sense[0], sense[2], sense[12:14]) == (length, 0x70, 0x06, b"\x3f\x0e")
    assert two.pending() == []
    assert discovery.pending() == []
    assert one.command(bytes(6)).additional_sense == (0x3F, 0x0E)
