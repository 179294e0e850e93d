"""ErrorRecoveryLevel 1: what is lost on the way comes again (RFC 7143 §7.1.4, §7.8, §7.9, §11.16)."""

from typing import Any

import pytest

from protocol import bhs
from protocol.enums import RESERVED_TAG, RejectReason, ScsiStatus, SnackType
from protocol.limits import KEPT_COST, MAX_FRUITLESS, MAX_KEPT, SEQUENCE_TIMEOUT_S
from protocol.recovery import Recovery
from tests import cdbs
from tests.initiator import MemoryPeer, Pdu, Task
from tests.protocol.target import TARGET, MemoryTarget, connection_of

LEVEL_1 = {"ErrorRecoveryLevel": "1"}
DIGESTS = {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}
SMALL = {"MaxRecvDataSegmentLength": "512", "MaxBurstLength": "1024", "FirstBurstLength": "1024"}
PROTOCOL_SERVICE_CRC_ERROR = (0x47, 0x05)


def pattern(size: int) -> bytes:
    return bytes(n * 7 % 251 for n in range(size))


def log_in(target: MemoryTarget | None = None, **keys: str) -> MemoryPeer:
    """A session of level 1 whose initiator takes down what the target says, right or twice."""
    target = target or MemoryTarget(error_recovery_level=2)
    peer = target.logged_in(keys={**LEVEL_1, **keys}, strict=False)
    assert peer.keys["ErrorRecoveryLevel"] == "1"
    return peer


def recovery_of(peer: MemoryPeer) -> Recovery:
    recovery = connection_of(peer).recovery
    assert recovery is not None
    return recovery


def kept(peer: MemoryPeer) -> int:
    """Bytes kept, counted anew."""
    recovery = recovery_of(peer)
    pdus = [pdu for sent in recovery.sent.values() for pdu in sent.pdus.values()]
    return sum(KEPT_COST + len(data) for _, data in [*pdus, *recovery.answers.values()])


def read(peer: MemoryPeer, lba: int, blocks: int) -> tuple[int, list[Pdu]]:
    """A READ whose PDUs nobody looks at; its tag and they."""
    tag = peer.session.new_tag()
    peer.send(
        peer.initiator.scsi_command(
            cdbs.read10(lba, blocks), read=True, expected=512 * blocks, initiator_task_tag=tag, exp_stat_sn=0
        )
    )
    return tag, peer.pending()


def snack(peer: MemoryPeer, kind: int, **fields: Any) -> list[Pdu]:
    """What a SNACK brings, without acknowledging anything."""
    peer.send(peer.initiator.snack(kind, **{"exp_stat_sn": 0, **fields}))
    return peer.pending()


def refused(peer: MemoryPeer, kind: int, **fields: Any) -> int:
    """The reason of the Reject that a SNACK brings."""
    (pdu,) = snack(peer, kind, **fields)
    return pdu.expect(bhs.Reject).reason


def but_window(pdu: Pdu) -> tuple[bytes, bytes]:
    """A PDU without ExpCmdSN and MaxCmdSN, which are as they are now (RFC 7143 §11.16)."""
    header = pdu.header.build()
    return header[:28] + header[36:], pdu.data


# -- negotiation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "settled"), [(0, 2, 0), (1, 2, 1), (2, 1, 1), (2, 2, 2), (2, 0, 0)]
)
def test_the_lower_level_is_settled(ours: int, theirs: int, settled: int) -> None:
    """RFC 7143 §13.20: the target decides what it offers."""
    target = MemoryTarget(error_recovery_level=ours)
    peer = target.logged_in(keys={"ErrorRecoveryLevel": str(theirs)})
    assert peer.keys["ErrorRecoveryLevel"] == str(settled)
    assert (connection_of(peer).recovery is not None) == (settled > 0)


@pytest.mark.parametrize("keys", [LEVEL_1, {"ErrorRecoveryLevel": "0"}])
def test_above_level_0_only_one_r2t_is_outstanding(keys: dict[str, str]) -> None:
    """RFC 7143 §13.19: with DataSequenceInOrder=Yes MaxOutstandingR2T MUST be 1 then, wherever it is said."""
    peer = MemoryTarget(error_recovery_level=1).logged_in(keys={"MaxOutstandingR2T": "16", **keys})
    assert peer.keys["MaxOutstandingR2T"] == ("1" if keys is LEVEL_1 else "16")


def test_level_0_stays_when_several_r2ts_were_settled_before() -> None:
    """The same rule, with the keys in two messages."""
    peer = MemoryTarget(error_recovery_level=2).connect()
    names = {"InitiatorName": "iqn.2016-04.com.example:two", "TargetName": TARGET}
    first = peer.request(
        peer.initiator.login_request({**names, "MaxOutstandingR2T": "4"}, transit=False, initiator_task_tag=1)
    )
    assert dict(first.text)["MaxOutstandingR2T"] == "4"
    second = peer.request(peer.initiator.login_request(LEVEL_1, transit=False, initiator_task_tag=1))
    assert dict(second.text)["ErrorRecoveryLevel"] == "0"


# -- SNACK ------------------------------------------------------------------------------------------


def test_data_in_comes_again_as_it_was() -> None:
    """RFC 7143 §11.16: exact replicas, one, some, or all that is not acknowledged."""
    peer = log_in(**SMALL)
    peer.command(cdbs.write10(0, 4), pattern(2048))
    tag, pdus = read(peer, 0, 4)
    data = [but_window(pdu) for pdu in pdus[:-1]]
    assert [pdu.expect(bhs.DataIn).data_sn for pdu in pdus[:-1]] == [0, 1, 2, 3]
    assert pdus[-1].expect(bhs.ScsiResponse).exp_data_sn == 4
    run = {"tag": tag}
    assert [but_window(pdu) for pdu in snack(peer, SnackType.DATA_R2T, begin=1, run=1, **run)] == data[1:2]
    assert [but_window(pdu) for pdu in snack(peer, SnackType.DATA_R2T, begin=2, run=0, **run)] == data[2:]
    assert [but_window(pdu) for pdu in snack(peer, SnackType.DATA_R2T, begin=0, run=0, **run)] == data


def test_data_in_that_was_not_sent_or_is_acknowledged_is_refused() -> None:
    """RFC 7143 §11.16: "MUST be rejected with a reason code of Protocol Error"."""
    peer = log_in(**SMALL)
    tag, pdus = read(peer, 0, 4)
    assert refused(peer, SnackType.DATA_R2T, tag=tag, begin=3, run=2) == RejectReason.PROTOCOL_ERROR
    assert refused(peer, SnackType.DATA_R2T, tag=tag + 99, begin=0, run=1) == RejectReason.PROTOCOL_ERROR
    status = pdus[-1].expect(bhs.ScsiResponse).stat_sn
    peer.send(peer.initiator.nop_out(immediate=True, exp_stat_sn=status + 1))
    peer.pending()
    assert refused(peer, SnackType.DATA_R2T, tag=tag, begin=0, run=0) == RejectReason.PROTOCOL_ERROR
    assert not recovery_of(peer).sent


def test_statuses_come_again_with_the_window_of_now() -> None:
    """RFC 7143 §11.16.1, Status SNACK: of every kind of response, with what StatSN it had."""
    peer = log_in()
    begin = connection_of(peer).stat_sn
    old = {"exp_stat_sn": 0}
    peer.send(peer.initiator.scsi_command(bytes(6), **old))
    peer.send(peer.initiator.scsi_command(b"\x7f" + bytes(15), **old))  # CHECK CONDITION with sense
    peer.send(peer.initiator.nop_out(b"ping", **old))
    peer.send(peer.initiator.text_request({"SendTargets": "All"}, **old))
    peer.send(peer.initiator.task_management(5, **old))
    peer.send(peer.initiator.pdu(bhs.DataOut, initiator_task_tag=0x7777, target_transfer_tag=3))  # Reject
    sent = peer.pending()
    assert [type(pdu.header) for pdu in sent] == [
        bhs.ScsiResponse, bhs.ScsiResponse, bhs.NopIn, bhs.TextResponse, bhs.TaskManagementResponse,
        bhs.Reject,
    ]  # fmt: skip
    again = snack(peer, SnackType.STATUS, begin=begin, run=len(sent))
    assert [but_window(pdu) for pdu in again] == [but_window(pdu) for pdu in sent]
    assert {pdu.header.exp_cmd_sn for pdu in again} == {peer.session.exp_cmd_sn}  # type: ignore[attr-defined]
    assert snack(peer, SnackType.STATUS, begin=begin + 1, run=1)[0].data == sent[1].data
    assert len(snack(peer, SnackType.STATUS)) == len(recovery_of(peer).answers)
    assert len(snack(peer, SnackType.STATUS, begin=begin + 4)) == 2


def test_a_status_not_sent_or_acknowledged_is_refused() -> None:
    """RFC 7143 §11.16: Protocol Error."""
    peer = log_in()
    peer.nop(b"x")
    now = connection_of(peer).stat_sn
    assert refused(peer, SnackType.STATUS, begin=now, run=1) == RejectReason.PROTOCOL_ERROR
    assert refused(peer, SnackType.STATUS, begin=now - 5 & 0xFFFFFFFF, run=1) == RejectReason.PROTOCOL_ERROR
    peer.nop(b"y")
    assert refused(peer, SnackType.STATUS, begin=now, run=1) == RejectReason.PROTOCOL_ERROR


def test_an_exp_stat_sn_from_the_future_or_the_past_acknowledges_nothing() -> None:
    """RFC 7143 §4.2.2.2."""
    peer = log_in()
    recovery = recovery_of(peer)
    read(peer, 0, 1)
    before = dict(recovery.answers)
    for wrong in (connection_of(peer).stat_sn + 1, 0, connection_of(peer).stat_sn + (1 << 31)):
        peer.send(peer.initiator.nop_out(initiator_task_tag=RESERVED_TAG, immediate=True, exp_stat_sn=wrong))
    assert recovery.answers == before
    assert kept(peer) == recovery.size


def test_r_data_cuts_the_data_anew_and_tags_the_response() -> None:
    """RFC 7143 §11.16.3: after MaxRecvDataSegmentLength became less; same StatSN, the SNACK Tag in it."""
    peer = log_in(MaxRecvDataSegmentLength="4096", MaxBurstLength="8192", FirstBurstLength="8192")
    peer.command(cdbs.write10(0, 16), pattern(8192))
    tag, pdus = read(peer, 0, 16)
    response = pdus[-1].expect(bhs.ScsiResponse)
    assert len(pdus) == 3
    peer.send(peer.initiator.text_request({"MaxRecvDataSegmentLength": "1024"}, exp_stat_sn=0))
    peer.pending()
    assert refused(peer, SnackType.DATA_R2T, tag=tag, begin=0, run=1) == RejectReason.PROTOCOL_ERROR
    *data, last = snack(peer, SnackType.R_DATA, tag=tag, target_transfer_tag=0x51)
    assert [pdu.expect(bhs.DataIn).data_sn for pdu in data] == list(range(8))
    assert b"".join(pdu.data for pdu in data) == pattern(8192)
    tagged = last.expect(bhs.ScsiResponse)
    assert (tagged.stat_sn, tagged.snack_tag, tagged.exp_data_sn) == (response.stat_sn, 0x51, 8)
    (again,) = snack(peer, SnackType.STATUS, begin=response.stat_sn, run=1)
    assert again.header == last.header  # "the latest content known to the target"
    assert len(snack(peer, SnackType.DATA_R2T, tag=tag, begin=7, run=1)) == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"begin": 1}, RejectReason.INVALID_PDU_FIELD),
        ({"run": 1}, RejectReason.INVALID_PDU_FIELD),
        ({"target_transfer_tag": 0}, RejectReason.INVALID_PDU_FIELD),
        ({"target_transfer_tag": RESERVED_TAG}, RejectReason.INVALID_PDU_FIELD),
        ({"tag": 0x999}, RejectReason.PROTOCOL_ERROR),
    ],
)
def test_r_data_that_cannot_be(fields: dict[str, int], reason: int) -> None:
    """RFC 7143 §11.16.5-7."""
    peer = log_in()
    tag, _ = read(peer, 0, 4)
    assert refused(peer, SnackType.R_DATA, **{"tag": tag, "target_transfer_tag": 5, **fields}) == reason


def test_an_unknown_type_of_snack_is_refused() -> None:
    peer = log_in()
    assert refused(peer, 9) == RejectReason.INVALID_PDU_FIELD


def test_at_level_0_every_snack_is_refused() -> None:
    """RFC 7143 §7.1.5: SNACK belongs to level 1."""
    peer = MemoryTarget(error_recovery_level=2).logged_in(strict=False)
    for kind in SnackType:
        assert refused(peer, kind) == RejectReason.SNACK_REJECT


def test_an_r2t_comes_again() -> None:
    """RFC 7143 §11.16: with its R2TSN and tag, and the StatSN of now; not once its data is here."""
    peer = log_in(**SMALL)
    peer.answer_r2ts = False
    task = peer.send_command(cdbs.write10(0, 4), pattern(2048), immediate_data=0, unsolicited=0)
    (first,) = peer.pending()
    peer.send(peer.initiator.nop_out(b"x", exp_stat_sn=0))
    peer.pending()
    (again,) = snack(peer, SnackType.DATA_R2T, tag=task.tag, begin=0, run=1)
    r2t = first.expect(bhs.ReadyToTransfer)
    moved = again.expect(bhs.ReadyToTransfer)
    assert (moved.r2t_sn, moved.target_transfer_tag) == (r2t.r2t_sn, r2t.target_transfer_tag)
    assert moved.stat_sn == connection_of(peer).stat_sn
    peer.answer_r2t(task, r2t)
    peer.pending()
    assert refused(peer, SnackType.DATA_R2T, tag=task.tag, begin=0, run=1) == RejectReason.PROTOCOL_ERROR
    assert len(snack(peer, SnackType.DATA_R2T, tag=task.tag, begin=1, run=0)) == 1


def test_all_that_was_sent_of_a_command_that_sent_nothing_is_nothing() -> None:
    """RFC 7143 §11.16.6-7: BegRun 0 and RunLength 0 ask for all that is not acknowledged."""
    peer = log_in()
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target)
    target.lane.hold = True
    task = peer.send_command(cdbs.synchronize_cache10())
    assert snack(peer, SnackType.DATA_R2T, tag=task.tag) == []
    assert refused(peer, SnackType.DATA_R2T, tag=task.tag, run=1) == RejectReason.PROTOCOL_ERROR


# -- bounds -----------------------------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> int:
    """Room for 64 KiB."""
    monkeypatch.setattr("protocol.recovery.MAX_KEPT", 1 << 16)
    return 1 << 16


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(little: int) -> None:
    """RFC 7143 §7.8: SNACK reject for what is kept no more. The status of it is."""
    peer = log_in()
    tags = []
    for _ in range(40):
        tag, pdus = read(peer, 0, 8)
        tags.append((tag, pdus[-1].expect(bhs.ScsiResponse).stat_sn))
        assert recovery_of(peer).size <= little
        assert recovery_of(peer).size == kept(peer)
    tag, status = tags[0]
    assert refused(peer, SnackType.DATA_R2T, tag=tag, begin=0, run=0) == RejectReason.SNACK_REJECT
    r_data = refused(peer, SnackType.R_DATA, tag=tag, target_transfer_tag=5)
    assert r_data == RejectReason.SNACK_REJECT
    assert len(snack(peer, SnackType.STATUS, begin=status, run=1)) == 1
    assert len(snack(peer, SnackType.DATA_R2T, tag=tags[-1][0], begin=0, run=0)) == 1


def test_an_initiator_that_never_acknowledges_costs_no_more_than_the_bound(little: int) -> None:
    """RFC 7143 §4.2.2.2: answers are forgotten too; a Status SNACK for them is refused, the rest goes on."""
    peer = log_in()
    first = connection_of(peer).stat_sn
    for _ in range(2 * little // KEPT_COST):
        peer.send(peer.initiator.nop_out(b"", exp_stat_sn=0))
        peer.pending()
    assert recovery_of(peer).size <= little
    assert refused(peer, SnackType.STATUS, begin=first, run=1) == RejectReason.SNACK_REJECT
    assert recovery_of(peer).size == kept(peer)


def test_with_half_of_it_full_data_in_asks_to_be_acknowledged(little: int) -> None:
    """RFC 7143 §11.7.2: the A bit with LUN and tag, once a sequence at most; DataACK frees."""
    peer = log_in(MaxRecvDataSegmentLength="4096", MaxBurstLength="8192", FirstBurstLength="8192")
    _, pdus = read(peer, 0, 120)
    asked = [pdu.expect(bhs.DataIn) for pdu in pdus[:-1] if pdu.header.flags & 0x40]  # type: ignore[attr-defined]
    assert asked
    assert all(header.flags & bhs.FINAL and header.target_transfer_tag != RESERVED_TAG for header in asked)
    assert asked[0].buffer_offset >= little // 2 - 8192
    plain = [pdu.expect(bhs.DataIn) for pdu in pdus[:-1] if not pdu.header.flags & 0x40]  # type: ignore[attr-defined]
    assert {header.target_transfer_tag for header in plain} == {RESERVED_TAG}
    before = recovery_of(peer).size
    begin = asked[-1].data_sn + 1
    acknowledge = {"target_transfer_tag": asked[-1].target_transfer_tag, "lun": asked[-1].lun}
    assert snack(peer, SnackType.DATA_ACK, begin=begin, **acknowledge) == []
    assert recovery_of(peer).size < before - 32768
    assert recovery_of(peer).size == kept(peer)
    tag = asked[-1].initiator_task_tag
    assert refused(peer, SnackType.DATA_R2T, tag=tag, begin=0, run=1) == RejectReason.PROTOCOL_ERROR
    for wrong in ({"begin": begin - 1}, {"begin": 999}, {"run": 1}, {"lun": b"\0\7" + bytes(6)}):
        fields = {"begin": begin, **acknowledge, **wrong}
        assert refused(peer, SnackType.DATA_ACK, **fields) == RejectReason.INVALID_DATA_ACK
    assert refused(peer, SnackType.DATA_ACK, target_transfer_tag=77) == RejectReason.INVALID_DATA_ACK


def test_small_reads_are_never_asked_to_be_acknowledged() -> None:
    """RFC 7143 §11.7.2: "moderately"."""
    peer = log_in()
    for _ in range(20):
        _, pdus = read(peer, 0, 8)
        assert not any(pdu.header.flags & 0x40 for pdu in pdus)  # type: ignore[attr-defined]


def test_snacks_without_end_are_not_answered_without_end(little: int) -> None:
    """A SNACK of 48 bytes asks for many times its size: in one turn no more is sent than may be kept."""
    peer = log_in(MaxRecvDataSegmentLength="4096")
    tag, _ = read(peer, 0, 64)
    ask = peer.initiator.snack(SnackType.DATA_R2T, tag=tag, exp_stat_sn=0)
    peer.send(ask * 100)
    connection = connection_of(peer)
    assert sum(map(len, connection.out)) < 2 * little + 100 * 96
    peer.pending()
    assert len(snack(peer, SnackType.DATA_R2T, tag=tag)) == 8


def test_an_acknowledged_status_frees_data_and_status() -> None:
    """RFC 7143 §11.7.2: the status acknowledges the data."""
    peer = log_in(**SMALL)
    for n in range(30):
        assert peer.command(cdbs.read10(n, 4), read=2048).good
    peer.send(peer.initiator.nop_out(initiator_task_tag=RESERVED_TAG, immediate=True))
    recovery = recovery_of(peer)
    assert (recovery.size, recovery.answers, recovery.sent, recovery.tags) == (0, {}, {}, {})


def test_a_tag_that_is_used_again_keeps_the_newer_data() -> None:
    peer = log_in()
    peer.command(cdbs.write10(0, 2), pattern(1024))
    for lba in (0, 1):
        peer.send(
            peer.initiator.scsi_command(
                cdbs.read10(lba, 1), read=True, expected=512, initiator_task_tag=0x42, exp_stat_sn=0
            )
        )
    peer.pending()
    (data,) = snack(peer, SnackType.DATA_R2T, tag=0x42)
    assert data.data == pattern(1024)[512:]
    assert recovery_of(peer).size == kept(peer)


def test_the_data_kept_is_that_which_was_sent() -> None:
    """An exact replica, even when the blocks were written to meanwhile (RFC 7143 §11.16)."""
    peer = log_in()
    peer.command(cdbs.write10(0, 1), pattern(512))
    tag, _ = read(peer, 0, 1)
    peer.send(
        peer.initiator.scsi_command(cdbs.write10(0, 1), bytes(512), write=True, expected=512, exp_stat_sn=0)
    )
    peer.pending()
    (data,) = snack(peer, SnackType.DATA_R2T, tag=tag)
    assert data.data == pattern(512)


# -- Data-Out ---------------------------------------------------------------------------------------


def spoil(pdu: bytes, at: int) -> bytes:
    """One bit is wrong."""
    return pdu[:at] + bytes((pdu[at] ^ 0x10,)) + pdu[at + 1 :]


def write_in_pieces(peer: MemoryPeer, **options: Any) -> tuple[Task, list[bytes]]:
    """A WRITE of eight blocks whose 16 Data-Out PDUs the test sends; and they."""
    peer.answer_r2ts = False
    peer.max_data_out = 256
    task = peer.send_command(cdbs.write10(0, 8), pattern(4096), immediate_data=0, unsolicited=0, **options)
    r2t = peer.wait_for_r2t(task)
    assert r2t.desired_data_transfer_length == 4096
    pdus = peer.data_outs(task, 0, 4096, transfer_tag=r2t.target_transfer_tag)
    return task, pdus


def finish(peer: MemoryPeer, target: MemoryTarget, task: Task) -> list[tuple[int, int]]:
    """Answer every R2T that comes; what they asked for."""
    asked = []
    while not task.done:
        while task.r2ts:
            r2t = task.r2ts.pop(0)
            asked.append((r2t.buffer_offset, r2t.desired_data_transfer_length))
            peer.answer_r2t(task, r2t)
        peer._dispatch(peer.receive())
    reply = peer.wait(task)
    assert reply.status == ScsiStatus.GOOD, reply
    assert bytes(target.backends[0].read(0, 4096)) == pattern(4096)
    return asked


@pytest.mark.parametrize(
    ("lost", "again"),
    [
        ({3}, [(768, 256)]),
        ({0}, [(0, 256)]),
        ({4, 5, 6}, [(1024, 768)]),
        ({1, 9}, [(256, 256), (2304, 256)]),
        ({0, 1, 14}, [(0, 512), (3584, 256)]),
    ],
)
def test_data_out_that_did_not_come_is_asked_for_again(lost: set[int], again: list[tuple[int, int]]) -> None:
    """RFC 7143 §7.9, §7.8: recovery R2Ts for what the DataSNs show to be missing, in order."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target)
    task, pdus = write_in_pieces(peer)
    peer.send(b"".join(pdu for n, pdu in enumerate(pdus) if n not in lost))
    assert finish(peer, target, task) == again


@pytest.mark.parametrize("digests", [DIGESTS, {"DataDigest": "CRC32C"}])
@pytest.mark.parametrize(
    ("wrong", "again"),
    [
        ({3}, [(768, 256)]),
        ({15}, [(3840, 256)]),
        ({2, 3, 15}, [(512, 256), (768, 256), (3840, 256)]),
        (set(range(16)), [(256 * n, 256) for n in range(16)]),
    ],
)
def test_data_out_with_a_wrong_data_digest_is_asked_for_again(
    digests: dict[str, str], wrong: set[int], again: list[tuple[int, int]]
) -> None:
    """RFC 7143 §7.8: Reject with Data Digest Error, and a recovery R2T; the data ends up right."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target, **digests)
    task, pdus = write_in_pieces(peer)
    peer.tasks[task.tag] = task
    at = len(pdus[0]) - 100
    peer.send(b"".join(spoil(pdu, at) if n in wrong else pdu for n, pdu in enumerate(pdus)))
    rejects = []
    asked = []
    while not task.done:
        pdu = peer.receive()
        if isinstance(pdu.header, bhs.Reject):
            rejects.append(pdu.header.reason)
            continue
        peer._dispatch(pdu)
        while task.r2ts:
            r2t = task.r2ts.pop(0)
            asked.append((r2t.buffer_offset, r2t.desired_data_transfer_length))
            peer.answer_r2t(task, r2t)
    assert rejects == [RejectReason.DATA_DIGEST_ERROR] * len(wrong)
    assert asked == again
    assert peer.wait(task).good
    assert bytes(target.backends[0].read(0, 4096)) == pattern(4096)


@pytest.mark.parametrize("lost", [{0}, {2}, {3}, {15}, {13, 15}, set(range(0, 16, 2))])
def test_a_wrong_header_digest_costs_the_pdu_only(lost: set[int]) -> None:
    """RFC 7143 §7.8: silently discarded, and the stream goes on where the digests show it to; the end of a
    sequence that does not come is found by the timeout (§7.1.4.1)."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target, **DIGESTS)
    task, pdus = write_in_pieces(peer)
    peer.send(b"".join(spoil(pdu, 30) if n in lost else pdu for n, pdu in enumerate(pdus)))
    assert peer.nop(b"still in step")
    assert not any(isinstance(pdu.header, bhs.Reject) for pdu in peer.rejects)
    if 15 in lost:
        target.pass_time(SEQUENCE_TIMEOUT_S + 1)
    assert sum(length for _, length in finish(peer, target, task)) == 256 * len(lost)


@pytest.mark.parametrize("cut", [1, 47, 100, 10_000])
@pytest.mark.parametrize("digests", [DIGESTS, {"HeaderDigest": "CRC32C"}])
def test_a_command_with_a_wrong_header_digest_is_found_missing(digests: dict[str, str], cut: int) -> None:
    """RFC 7143 §7.8, §7.2.1: ExpCmdSN stays; the retry with the same CmdSN is carried out, once."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target, **digests)
    peer.split = cut
    before = target.units[0].writes
    write = peer.initiator.scsi_command(
        cdbs.write10(0, 1), pattern(512), write=True, expected=512, initiator_task_tag=0x31
    )
    peer.send(spoil(write, 35) + peer.initiator.nop_out(b"behind it", initiator_task_tag=0x32))
    assert peer.pending() == []  # the ping waits for the command before it
    peer.send(write + write)
    assert sorted(pdu.initiator_task_tag for pdu in peer.pending()) == [0x31, 0x32]
    assert target.units[0].writes == before + 1
    assert bytes(target.backends[0].read(0, 512)) == pattern(512)


@pytest.mark.parametrize("at", [5, 6, 7, 4])
def test_a_header_whose_length_is_wrong_ends_the_connection(at: int) -> None:
    """RFC 7143 §7.8: no later PDU can be ascertained, so it closes; nothing of it is carried out."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target, **DIGESTS)
    write = peer.initiator.scsi_command(cdbs.write10(0, 1), pattern(512), write=True, expected=512)
    peer.send(spoil(write, at) + b"".join(peer.initiator.nop_out(bytes(4000)) for _ in range(20)))
    assert connection_of(peer).closing
    assert bytes(target.backends[0].read(0, 512)) == bytes(512)


def test_two_wrong_headers_in_a_row_end_the_connection() -> None:
    """RFC 7143 §7.8: no header with a right digest follows the first, so its length may not be believed."""
    peer = log_in(**DIGESTS)
    ping = peer.initiator.nop_out(bytes(8))
    peer.send(spoil(ping, 30) * 2 + peer.initiator.nop_out())
    assert connection_of(peer).closing == "header digest error"


def test_a_pdu_in_doubt_is_no_stalled_one() -> None:
    """``iscsi_iotimeout`` is for a PDU that is not all here; the one behind it may take its time."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target, **DIGESTS)
    ping = spoil(peer.initiator.nop_out(bytes(100), immediate=True), 30)
    peer.send(ping[:100])
    assert connection_of(peer).framer.in_pdu
    peer.send(ping[100:])
    assert not connection_of(peer).framer.in_pdu
    assert peer.nop(b"next", immediate=True)


def test_at_level_0_a_wrong_header_digest_ends_the_connection() -> None:
    """RFC 7143 §7.8, §7.1.5."""
    peer = MemoryTarget(error_recovery_level=2).logged_in(keys=DIGESTS)
    peer.send(spoil(peer.initiator.nop_out(), 30) + peer.initiator.nop_out())
    assert connection_of(peer).closing == "header digest error"


def test_a_command_with_a_wrong_data_digest_is_retried_with_its_data() -> None:
    """RFC 7143 §7.8: Reject; the immediate data is recovered with the command. Unsolicited data that comes
    behind the lost command belongs to nothing, and nothing is said of it."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target, **DIGESTS)
    peer.max_data_out = 512
    whole: list[bytes] = []
    send, peer.send = peer.send, whole.append  # type: ignore[method-assign]
    task = peer.send_command(cdbs.write10(0, 8), pattern(4096), immediate_data=512, unsolicited=4096)
    peer.send = send  # type: ignore[method-assign]
    peer.send(spoil(whole[0], 200))
    (reject,) = peer.pending()
    assert reject.expect(bhs.Reject).reason == RejectReason.DATA_DIGEST_ERROR
    peer.send(whole[0])
    assert peer.wait(task).good
    assert bytes(target.backends[0].read(0, 4096)) == pattern(4096)


def test_unsolicited_data_that_is_lost_is_asked_for() -> None:
    """RFC 7143 §7.1.4.1, with the last PDU of the sequence among what is lost."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target)
    peer.answer_r2ts = False
    peer.max_data_out = 512
    whole: list[bytes] = []
    send, peer.send = peer.send, whole.append  # type: ignore[method-assign]
    task = peer.send_command(cdbs.write10(0, 8), pattern(4096), immediate_data=512, unsolicited=4096)
    peer.send = send  # type: ignore[method-assign]
    pdus = [whole[0][at : at + 560] for at in range(0, len(whole[0]), 560)]
    assert len(pdus) == 8
    peer.send(b"".join(pdu for n, pdu in enumerate(pdus) if n not in (2, 7)))
    assert peer.pending() == []
    target.pass_time(SEQUENCE_TIMEOUT_S + 1)
    assert finish(peer, target, task) == [(1024, 512), (3584, 512)]


def test_an_r2t_that_brings_nothing_is_asked_again_and_late_data_does_no_harm() -> None:
    """RFC 7143 §7.1.4.1: the sequence reception timeout; a recovery R2T has the next R2TSN (§3.1)."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target)
    task, late = write_in_pieces(peer)
    target.pass_time(SEQUENCE_TIMEOUT_S + 1)
    r2t = peer.wait_for_r2t(task)
    assert (r2t.r2t_sn, r2t.buffer_offset, r2t.desired_data_transfer_length) == (1, 0, 4096)
    peer.send(late[0] + spoil(late[1], 60))
    peer.answer_r2t(task, r2t)
    assert peer.wait(task).good
    assert bytes(target.backends[0].read(0, 4096)) == pattern(4096)
    assert peer.rejects == []


def test_a_write_whose_data_never_comes_is_given_up() -> None:
    """Not for ever: then it ends with protocol service CRC error (RFC 7143 §7.8, §11.4.7.2)."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target)
    task, _ = write_in_pieces(peer)
    for _ in range(MAX_FRUITLESS + 1):
        target.pass_time(SEQUENCE_TIMEOUT_S + 1)
    reply = peer.wait(task)
    assert reply.additional_sense == PROTOCOL_SERVICE_CRC_ERROR
    assert not connection_of(peer).writes.bursts
    assert bytes(target.backends[0].read(0, 512)) == bytes(512)


def test_data_out_that_comes_twice_is_taken_once() -> None:
    """RFC 7143 §7.9: only a DataSN that is ahead shows a loss."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target)
    task, pdus = write_in_pieces(peer)
    peer.send(b"".join([*pdus[:5], pdus[2], pdus[4], *pdus[5:]]))
    assert finish(peer, target, task) == []


def test_swapped_data_out_ends_well() -> None:
    """RFC 7143 §7.9: what is late is as good as lost."""
    target = MemoryTarget(error_recovery_level=1)
    peer = log_in(target)
    task, pdus = write_in_pieces(peer)
    pdus[4], pdus[5] = pdus[5], pdus[4]
    peer.send(b"".join(pdus))
    assert finish(peer, target, task) == [(1024, 256)]


@pytest.mark.parametrize("change", [{"offset": 5000}, {"offset": 128}])
def test_data_out_that_contradicts_itself_still_ends_the_write(change: dict[str, int]) -> None:
    """A right DataSN with a wrong Buffer Offset is no loss (RFC 7143 §11.7.5)."""
    peer = log_in()
    task, pdus = write_in_pieces(peer)
    peer.send(pdus[0])
    r2t_tag = int.from_bytes(pdus[0][20:24], "big")
    peer.send(
        peer.initiator.data_out(
            bytes(256), tag=task.tag, data_sn=1, final=True, transfer_tag=r2t_tag, **{"offset": 0, **change}
        )
    )
    assert peer.wait(task).status == ScsiStatus.CHECK_CONDITION


def test_an_aborted_command_keeps_nothing() -> None:
    peer = log_in()
    task, _ = write_in_pieces(peer)
    assert recovery_of(peer).sent
    assert peer.task_management(1, task=task) == 0
    assert not recovery_of(peer).sent
    assert recovery_of(peer).size == kept(peer)


def test_the_bound_has_room_for_a_full_queue() -> None:
    """Its reason, held to: 32 commands of 256 KiB in 8 KiB segments, data and headers."""
    assert 32 * (2**18 + 2**18 // 8192 * KEPT_COST) < MAX_KEPT
