"""Data transfer: immediate, unsolicited and solicited data, residuals (RFC 7143 §4.2.5, §11.3 to §11.8)."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from protocol import bhs
from protocol.enums import RESERVED_TAG, RejectReason, ScsiStatus, TaskManagementFunction
from tests import cdbs
from tests.initiator import MemoryPeer, Residuals, Task
from tests.protocol.target import MemoryTarget, connection_of

BLOCK = 512
OLD = b"\x5a"
UNSOLICITED, INCORRECT_AMOUNT, CRC_ERROR = (0x0C, 0x0C), (0x0C, 0x0D), (0x47, 0x05)
"""RFC 7143 §11.4.7.2."""


def pattern(size: int) -> bytes:
    return bytes(n * 7 % 251 for n in range(size))


def filled(**offer: Any) -> MemoryTarget:
    """A target whose medium is not all zeros."""
    target = MemoryTarget(**offer)
    target.backends[0].write(0, OLD * 65536)
    return target


def content(target: MemoryTarget, at: int, size: int) -> bytes:
    return bytes(target.backends[0].read(at, size))


# -- the ways data can come -------------------------------------------------------------------------

KEYS: list[dict[str, str]] = [
    {"InitialR2T": r2t, "ImmediateData": immediate, "FirstBurstLength": first, "MaxBurstLength": burst}
    for r2t, immediate, (first, burst) in product(
        ("Yes", "No"), ("Yes", "No"), (("512", "1024"), ("4096", "4096"), ("65536", "262144"))
    )
]


@pytest.mark.parametrize("keys", KEYS, ids=lambda keys: "-".join(keys.values()))
@pytest.mark.parametrize("segment", [512, 1000, 262144])
def test_a_write_arrives_whole_whatever_was_negotiated(keys: dict[str, str], segment: int) -> None:
    """The test initiator holds every R2T and every number to the rules (RFC 7143 §11.8)."""
    target = MemoryTarget(max_recv_data_segment_length=segment)
    peer = target.logged_in(keys=keys)
    for blocks in (1, 2, 9, 64):
        data = pattern(blocks * BLOCK)
        assert peer.command(cdbs.write10(blocks, blocks), data).good
        assert content(target, blocks * BLOCK, len(data)) == data
        assert peer.command(cdbs.read10(blocks, blocks), read=len(data)).data == data


@pytest.mark.parametrize("immediate", [0, 512, 1536])
@pytest.mark.parametrize("unsolicited", [0, 512, 1536, 4096])
def test_less_may_come_unasked_than_was_allowed(immediate: int, unsolicited: int) -> None:
    """The rest is asked for."""
    target = filled()
    peer = target.logged_in()
    data = pattern(8192)
    assert peer.command(
        cdbs.write10(0, 16), data, immediate_data=immediate, unsolicited=max(immediate, unsolicited)
    ).good
    assert content(target, 0, 8704) == data + OLD * 512


@pytest.mark.parametrize("outstanding", [1, 2, 3])
def test_r2ts_outstanding(outstanding: int) -> None:
    """RFC 7143 §13.17: as many as were negotiated, and the next when one is answered."""
    target = MemoryTarget(max_outstanding_r2t=16, max_burst_length=1024, first_burst_length=512)
    peer = target.logged_in(keys={"MaxOutstandingR2T": str(outstanding), "MaxBurstLength": "1024"})
    peer.answer_r2ts = False
    data = pattern(8192)
    task = peer.send_command(cdbs.write10(0, 16), data, immediate_data=0, unsolicited=0)
    asked = []
    while not task.done:
        for pdu in peer.pending():
            peer._dispatch(pdu)
        if task.r2ts:
            assert len(task.r2ts) <= outstanding
            assert len(asked) > 6 - outstanding or len(task.r2ts) == outstanding
            r2t = task.r2ts.pop(0)
            asked.append((r2t.r2t_sn, r2t.buffer_offset, r2t.desired_data_transfer_length))
            peer.answer_r2t(task, r2t)
    assert asked == [(n, n * 1024, 1024) for n in range(8)]
    assert content(target, 0, 8192) == data


def test_data_in_comes_in_bursts_and_segments() -> None:
    """RFC 7143 §11.7, §13.12, §13.13: checked by the test initiator."""
    target = MemoryTarget()
    target.backends[0].write(0, pattern(20480))
    peer = target.logged_in(
        keys={"FirstBurstLength": "512", "MaxBurstLength": "3072", "MaxRecvDataSegmentLength": "1000"}
    )
    task = peer.send_command(cdbs.read10(0, 40), read=20480)
    assert peer.wait(task).data == pattern(20480)
    finals = [pdu.header.flags >> 7 for pdu in task.pdus]  # type: ignore[attr-defined]
    assert finals == [0, 0, 0, 1] * 6 + [0, 0, 1]


# -- what is wrong with the data --------------------------------------------------------------------


def solicited(target: MemoryTarget) -> tuple[MemoryPeer, Task, bhs.ReadyToTransfer]:
    peer = target.logged_in()
    peer.answer_r2ts = False
    task = peer.send_command(cdbs.write10(0, 8), pattern(4096), immediate_data=0, unsolicited=0)
    return peer, task, peer.wait_for_r2t(task)


Piece = tuple[int, int, int, bool]
"""DataSN, offset, length, F."""

BROKEN: dict[str, tuple[list[Piece], tuple[int, int]]] = {
    "DataSN skipped": ([(0, 0, 2048, False), (2, 2048, 2048, True)], CRC_ERROR),
    "DataSN repeated": ([(0, 0, 2048, False), (0, 2048, 2048, True)], CRC_ERROR),
    "DataSN not from 0": ([(1, 0, 4096, True)], CRC_ERROR),
    "swapped": ([(1, 2048, 2048, False), (0, 0, 2048, True)], CRC_ERROR),
    "the same twice": ([(0, 0, 2048, False), (0, 0, 2048, False), (1, 2048, 2048, True)], CRC_ERROR),
    "offset too far": ([(0, 512, 3584, True)], INCORRECT_AMOUNT),
    "a hole": ([(0, 0, 1024, False), (1, 2048, 2048, True)], INCORRECT_AMOUNT),
    "an overlap": ([(0, 0, 2048, False), (1, 1024, 3072, True)], INCORRECT_AMOUNT),
    "too long": ([(0, 0, 4608, True)], INCORRECT_AMOUNT),
    "beyond the end": ([(0, 0, 4096, False), (1, 4096, 512, True)], INCORRECT_AMOUNT),
    "too short": ([(0, 0, 3584, True)], INCORRECT_AMOUNT),
    "nothing": ([(0, 0, 0, True)], INCORRECT_AMOUNT),
    "far away": ([(0, 0xFFFFFE00, 512, True)], INCORRECT_AMOUNT),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_sequence_never_ends_good_and_writes_nothing(name: str) -> None:
    """RFC 7143 §7.9, §11.4.7.2, §11.7.5, §11.7.6."""
    pieces, sense = BROKEN[name]
    target = filled()
    peer, task, r2t = solicited(target)
    for sn, offset, length, final in pieces:
        peer.send(
            peer.initiator.data_out(
                bytes(length), tag=task.tag, offset=offset, data_sn=sn, final=final,
                transfer_tag=r2t.target_transfer_tag,
            )
        )  # fmt: skip
    reply = peer.wait(task)
    assert reply.status == ScsiStatus.CHECK_CONDITION
    assert reply.additional_sense == sense
    assert content(target, 0, 8192) == OLD * 8192
    assert not connection_of(peer).writes.bursts
    assert peer.nop(b"still here")


def test_an_initiator_that_would_have_any_order_is_held_to_the_one_negotiated() -> None:
    """RFC 7143 §13.18, §13.19: the result is OR, and ours is Yes."""
    target = filled()
    peer = target.logged_in(keys={"DataPDUInOrder": "No", "DataSequenceInOrder": "No"})
    assert (peer.keys["DataPDUInOrder"], peer.keys["DataSequenceInOrder"]) == ("Yes", "Yes")
    peer.answer_r2ts = False
    task = peer.send_command(cdbs.write10(0, 8), pattern(4096), immediate_data=0, unsolicited=0)
    r2t = peer.wait_for_r2t(task)
    for number, at in ((0, 2048), (1, 0)):
        peer.send(
            peer.initiator.data_out(
                pattern(4096)[at : at + 2048],
                tag=task.tag,
                transfer_tag=r2t.target_transfer_tag,
                data_sn=number,
                offset=at,
                final=number == 1,
            )
        )
    assert peer.wait(task).additional_sense == INCORRECT_AMOUNT
    assert content(target, 0, 4096) == OLD * 4096


def test_without_the_final_bit_the_command_waits() -> None:
    """It is not GOOD, and an abort ends it."""
    target = filled()
    peer, task, r2t = solicited(target)
    peer.send(
        peer.initiator.data_out(
            bytes(4096), tag=task.tag, offset=0, data_sn=0, final=False, transfer_tag=r2t.target_transfer_tag
        )
    )
    assert peer.pending() == []
    assert peer.task_management(1, task=task) == 0
    assert content(target, 0, 4096) == OLD * 4096


def test_sequences_answered_in_another_order() -> None:
    """DataSequenceInOrder=Yes (RFC 7143 §13.19)."""
    target = filled(max_burst_length=1024, first_burst_length=512)
    peer = target.logged_in()
    peer.answer_r2ts = False
    task = peer.send_command(cdbs.write10(0, 8), pattern(4096), immediate_data=0, unsolicited=0)
    for pdu in peer.pending():
        peer._dispatch(pdu)
    for r2t in reversed(task.r2ts):
        peer.answer_r2t(task, r2t)
    assert peer.wait(task).additional_sense == CRC_ERROR
    assert content(target, 0, 4096) == OLD * 4096


@pytest.mark.parametrize(
    ("keys", "options", "sense"),
    [
        ({"ImmediateData": "No"}, {"immediate_data": 512, "unsolicited": 512}, UNSOLICITED),
        ({"InitialR2T": "Yes"}, {"immediate_data": 0, "unsolicited": 4096}, UNSOLICITED),
        ({"FirstBurstLength": "1024"}, {"immediate_data": 2048, "unsolicited": 2048}, UNSOLICITED),
        ({"FirstBurstLength": "1024"}, {"immediate_data": 0, "unsolicited": 4096}, INCORRECT_AMOUNT),
        ({"FirstBurstLength": "1024"}, {"immediate_data": 512, "unsolicited": 2048}, INCORRECT_AMOUNT),
    ],
)
def test_unsolicited_data_that_was_not_allowed(
    keys: dict[str, str], options: dict[str, int], sense: tuple[int, int]
) -> None:
    """RFC 7143 §13.10, §13.11, §13.14."""
    target = filled(max_recv_data_segment_length=4096)
    peer = target.logged_in(keys=keys)
    reply = peer.command(cdbs.write10(0, 8), pattern(4096), **options)
    assert (reply.status, reply.additional_sense) == (ScsiStatus.CHECK_CONDITION, sense)
    assert content(target, 0, 4096) == OLD * 4096


def test_more_immediate_data_than_the_command_expects() -> None:
    target = filled()
    peer = target.logged_in()
    tag = peer.session.new_tag()
    pdu = peer.request(
        peer.initiator.scsi_command(
            cdbs.write10(0, 8), pattern(4096), write=True, expected=2048, initiator_task_tag=tag
        )
    )
    assert pdu.expect(bhs.ScsiResponse).status == ScsiStatus.CHECK_CONDITION
    assert content(target, 0, 4096) == OLD * 4096


@pytest.mark.parametrize("what", ["tag", "transfer tag", "no transfer tag", "another task's transfer tag"])
def test_data_for_no_transfer_is_rejected_and_the_command_goes_on(what: str) -> None:
    """RFC 7143 §11.17.1: Invalid PDU field; the Reject carries the header."""
    target = filled()
    peer, task, r2t = solicited(target)
    tag, transfer_tag = task.tag, r2t.target_transfer_tag
    if what == "tag":
        tag += 100
    elif what == "transfer tag":
        transfer_tag += 1
    elif what == "no transfer tag":
        transfer_tag = RESERVED_TAG
    else:
        other = peer.send_command(cdbs.write10(8, 8), pattern(4096), immediate_data=0, unsolicited=0)
        transfer_tag = peer.wait_for_r2t(other).target_transfer_tag
    stray = peer.initiator.data_out(
        bytes(512), tag=tag, offset=0, data_sn=0, final=True, transfer_tag=transfer_tag
    )
    pdu = peer.request(stray)
    assert pdu.expect(bhs.Reject).reason == RejectReason.INVALID_PDU_FIELD
    assert pdu.data == stray[:48]
    peer.answer_r2t(task, r2t)
    assert peer.wait(task).good
    assert content(target, 0, 4096) == pattern(4096)


def test_data_that_comes_late_for_an_aborted_command_is_dropped() -> None:
    """RFC 7143 §11.5.1: the initiator may have sent it before it learned."""
    target = filled()
    peer, task, r2t = solicited(target)
    assert peer.task_management(1, task=task) == 0
    peer.answer_r2t(task, r2t)
    assert peer.pending() == []
    assert content(target, 0, 4096) == OLD * 4096


def test_a_command_that_has_failed_already_takes_its_unsolicited_data_and_asks_for_none() -> None:
    """RFC 7143 §4.2.5.2."""
    target = filled()
    peer = target.logged_in(keys={"FirstBurstLength": "1024"})
    reply = peer.command(cdbs.write10(1 << 30, 8), pattern(4096), immediate_data=512, unsolicited=1024)
    assert reply.additional_sense == (0x21, 0x00)
    (session,) = target.sessions.sessions.values()
    assert not session.tasks
    assert peer.nop(b"x")


# -- digests ----------------------------------------------------------------------------------------

DIGESTS = {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}


@pytest.mark.parametrize("split", [None, 1, 47, 1000])
def test_digests_both_ways(split: int | None) -> None:
    target = MemoryTarget()
    peer = target.logged_in(keys=DIGESTS, split=split)
    for size in (512, 4096, 65536 if split != 1 else 2048):
        assert peer.command(cdbs.write10(0, size // 512), pattern(size)).good
        assert peer.command(cdbs.read10(0, size // 512), read=size).data == pattern(size)
    assert peer.nop(b"odd")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("size", [2048, 65536])
def test_a_damaged_data_out_fails_its_command_alone(which: int, size: int) -> None:
    """RFC 7143 §7.8: Reject, then CHECK CONDITION with "Protocol Service CRC error" once all data is in."""
    target = filled()
    peer = target.logged_in(keys=DIGESTS)
    peer.answer_r2ts = False
    data = pattern(2 * size)
    task = peer.send_command(cdbs.write10(0, len(data) // 512), data, immediate_data=0, unsolicited=0)
    r2t = peer.wait_for_r2t(task)
    for n in range(2):
        peer.send(
            peer.initiator.data_out(
                data[n * size : n * size + size], tag=task.tag, offset=n * size, data_sn=n, final=n == 1,
                transfer_tag=r2t.target_transfer_tag, data_digest=b"\0\0\0\0" if n == which else None,
            )
        )  # fmt: skip
    reject, response = peer.pending()
    assert reject.expect(bhs.Reject).reason == RejectReason.DATA_DIGEST_ERROR
    assert response.expect(bhs.ScsiResponse).status == ScsiStatus.CHECK_CONDITION
    assert (response.data[14], response.data[15]) == CRC_ERROR  # behind the length of the sense data
    assert content(target, 0, len(data) // 2) == OLD * min(len(data) // 2, 65536)
    assert peer.nop(b"x")


@pytest.mark.parametrize("level", [1, 2])
def test_a_damaged_command_never_happened(level: int) -> None:
    """RFC 7143 §7.8: the initiator sends it again, with the same CmdSN."""
    target = filled(error_recovery_level=2)
    peer = target.logged_in(keys={**DIGESTS, "ErrorRecoveryLevel": str(level)})
    number = peer.session.cmd_sn
    fields: dict[str, Any] = {"write": True, "expected": 512, "initiator_task_tag": 900}
    write = lambda **more: peer.initiator.scsi_command(cdbs.write10(0, 1), pattern(512), **fields, **more)  # noqa: E731
    pdu = peer.request(write(data_digest=b"bad!"))
    assert pdu.expect(bhs.Reject).reason == RejectReason.DATA_DIGEST_ERROR
    assert content(target, 0, 512) == OLD * 512
    peer.session.cmd_sn = number
    assert peer.request(write()).expect(bhs.ScsiResponse).status == 0
    assert content(target, 0, 512) == pattern(512)


def damaged_immediate_data(peer: MemoryPeer) -> bytes:
    return peer.initiator.scsi_command(
        cdbs.write10(0, 1), pattern(512), write=True, expected=512, data_digest=b"bad!"
    )


def damaged_immediate_command(peer: MemoryPeer) -> bytes:
    """With the I bit: no CmdSN is missing, but nobody would answer it."""
    return peer.initiator.scsi_command(
        cdbs.write10(0, 1), pattern(512), write=True, expected=512, immediate=True, data_digest=b"bad!"
    )


def damaged_ping(peer: MemoryPeer) -> bytes:
    return peer.initiator.nop_out(b"data", data_digest=b"bad!")


def damaged_text(peer: MemoryPeer) -> bytes:
    return peer.initiator.text_request(b"SendTargets=\0", data_digest=b"bad!")


def damaged_unsolicited_data_of_a_command_that_waits_for_its_turn(peer: MemoryPeer) -> bytes:
    number, tag = peer.session.cmd_sn, peer.session.new_tag()
    fields: dict[str, Any] = {"write": True, "expected": 512, "initiator_task_tag": tag}
    early = peer.initiator.scsi_command(cdbs.write10(0, 1), cmd_sn=number + 1, final=False, **fields)
    return early + peer.initiator.data_out(
        pattern(512), tag=tag, offset=0, data_sn=0, final=True, data_digest=b"bad!"
    )


@pytest.mark.parametrize(
    "damaged",
    [
        damaged_immediate_data,
        damaged_immediate_command,
        damaged_ping,
        damaged_text,
        damaged_unsolicited_data_of_a_command_that_waits_for_its_turn,
    ],
)
def test_what_cannot_be_recovered_at_level_0_ends_the_connection(
    damaged: Callable[[MemoryPeer], bytes],
) -> None:
    """RFC 7143 §7.1.5, §7.8: nobody sends it again, so it would be waited for for ever."""
    target = filled()
    peer = target.logged_in(keys=DIGESTS)
    peer.send(damaged(peer))
    peer.send(peer.initiator.scsi_command(cdbs.write10(0, 1), pattern(512), write=True, expected=512))
    (reject,) = peer.pending()
    assert reject.expect(bhs.Reject).reason == RejectReason.DATA_DIGEST_ERROR
    assert "data digest error" in connection_of(peer).closing
    assert content(target, 0, 512) == OLD * 512
    connection_of(peer).lost("closed")
    assert not target.sessions.sessions
    again = target.logged_in(keys=DIGESTS)
    assert again.command(cdbs.write10(0, 1), pattern(512)).good


def test_damaged_data_of_a_task_that_was_aborted_harms_nobody() -> None:
    target = filled()
    peer = target.logged_in(keys=DIGESTS)
    peer.answer_r2ts = False
    task = peer.send_command(cdbs.write10(0, 1), pattern(512), immediate_data=0, unsolicited=0)
    r2t = peer.wait_for_r2t(task)
    assert peer.task_management(TaskManagementFunction.ABORT_TASK, referenced_task_tag=task.tag) == 0
    peer.send(
        peer.initiator.data_out(
            pattern(512), tag=task.tag, offset=0, data_sn=0, final=True,
            transfer_tag=r2t.target_transfer_tag, data_digest=b"bad!",
        )
    )  # fmt: skip
    assert [pdu.expect(bhs.Reject).reason for pdu in peer.pending()] == [RejectReason.DATA_DIGEST_ERROR]
    assert peer.command(cdbs.write10(0, 1), pattern(512)).good


def test_a_damaged_header_ends_the_connection() -> None:
    """RFC 7143 §7.8."""
    target = filled()
    peer = target.logged_in(keys=DIGESTS)
    peer.send(
        peer.initiator.scsi_command(
            cdbs.write10(0, 1), pattern(512), write=True, expected=512, header_digest=b"bad!"
        )
    )
    assert peer.pending() == []
    assert "digest" in connection_of(peer).closing
    assert content(target, 0, 512) == OLD * 512


# -- R2Ts of a connection ---------------------------------------------------------------------------


def waiting_writes(target: MemoryTarget, count: int, keys: dict[str, str]) -> tuple[MemoryPeer, list[Task]]:
    """Writes of 4 KiB in bursts of 1 KiB, of which none is answered yet."""
    short = {"MaxBurstLength": "1024", "FirstBurstLength": "512", "InitialR2T": "Yes", "ImmediateData": "No"}
    peer = target.logged_in(keys={**short, **keys})
    peer.answer_r2ts = False
    tasks = [
        peer.send_command(cdbs.write10(8 * n, 8), pattern(4096), immediate_data=0, unsolicited=0)
        for n in range(count)
    ]
    return peer, tasks


@pytest.mark.parametrize("level", ["0", "1", "2"])
@pytest.mark.parametrize("limit", [0, 1, 2, 5, 100])
def test_r2ts_are_counted_over_all_writes_of_a_connection(limit: int, level: str) -> None:
    """Every write gets its data in the end, and is carried out once."""
    target = filled(max_outstanding_r2t=3, error_recovery_level=2)
    target.access.grant = replace(target.access.grant, r2ts=limit)
    keys = {"MaxOutstandingR2T": "3", "ErrorRecoveryLevel": level}
    peer, tasks = waiting_writes(target, 6, keys)
    writes = connection_of(peer).writes
    ended: dict[int, int] = {}
    most = 0
    open_r2ts: list[bhs.ReadyToTransfer] = []
    while True:
        for pdu in peer.pending():
            if isinstance(pdu.header, bhs.ReadyToTransfer):
                open_r2ts.append(pdu.header)
            else:
                header = pdu.expect(bhs.ScsiResponse)
                ended[header.initiator_task_tag] = header.status
        most = max(most, len(open_r2ts))
        assert len(open_r2ts) == len(writes.bursts)
        if not open_r2ts:
            break
        r2t = open_r2ts.pop(0)
        at = r2t.buffer_offset
        peer.send(
            peer.initiator.data_out(
                pattern(4096)[at : at + r2t.desired_data_transfer_length],
                tag=r2t.initiator_task_tag, offset=at, data_sn=0, final=True,
                transfer_tag=r2t.target_transfer_tag,
            )
        )  # fmt: skip
    per_task = 1 if level != "0" else 3
    assert most == min(max(limit, 1), 6 * per_task)
    assert ended == dict.fromkeys((task.tag for task in tasks), 0)
    assert content(target, 0, 6 * 4096) == pattern(4096) * 6
    assert not writes._wanting


def test_an_aborted_write_leaves_its_r2ts_to_those_that_wait() -> None:
    target = filled(max_outstanding_r2t=1)
    target.access.grant = replace(target.access.grant, r2ts=1)
    peer, (first, second, third) = waiting_writes(target, 3, {})
    assert peer.wait_for_r2t(first)
    assert (
        peer.task_management(TaskManagementFunction.ABORT_TASK, referenced_task_tag=second.tag) == 0
    )  # one that waits
    assert peer.task_management(TaskManagementFunction.ABORT_TASK, referenced_task_tag=first.tag) == 0
    assert peer.wait_for_r2t(third)
    assert [burst.task.initiator_task_tag for burst in connection_of(peer).writes.bursts.values()] == [
        third.tag
    ]


# -- residuals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [0, 1, 200, 511, 512, 513, 1024, 1600, 10000])
@pytest.mark.parametrize("way", ["immediate", "unsolicited", "solicited"])
def test_a_write_takes_exactly_what_both_agree_on(expected: int, way: str) -> None:
    """RFC 7143 §11.4.5: EDTL against a CDB of two blocks; the residual is exact."""
    target = filled()
    peer = target.logged_in()
    options = {
        "immediate": {},
        "unsolicited": {"immediate_data": 0},
        "solicited": {"immediate_data": 0, "unsolicited": 0},
    }[way]
    reply = peer.command(
        cdbs.write10(0, 2), pattern(expected or 1)[:expected], expected=expected, write=True, **options
    )
    assert reply.status == ScsiStatus.GOOD
    assert reply.residuals == Residuals(max(expected - 1024, 0), max(1024 - expected, 0))
    moved = min(expected, 1024)
    assert content(target, 0, 2048) == pattern(moved) + OLD * (2048 - moved)


@pytest.mark.parametrize("expected", [0, 1, 200, 512, 513, 1024, 1600, 10000])
def test_a_read_sends_exactly_what_both_agree_on(expected: int) -> None:
    target = MemoryTarget()
    target.backends[0].write(0, pattern(4096))
    reply = target.logged_in().command(cdbs.read10(0, 2), read=expected)
    assert reply.status == ScsiStatus.GOOD
    assert reply.data == pattern(1024)[:expected]
    assert reply.residuals == Residuals(max(expected - 1024, 0), max(1024 - expected, 0))


def raw(
    peer: MemoryPeer, cdb: bytes, data: bytes = b"", **fields: Any
) -> tuple[bytes, bhs.ScsiResponse | bhs.DataIn]:
    """A command as it is; its Data-In and the PDU with the status."""
    tag = peer.session.new_tag()
    peer.send(peer.initiator.scsi_command(cdb, data, initiator_task_tag=tag, **fields))
    pdus = peer.pending()
    received = b"".join(pdu.data for pdu in pdus if isinstance(pdu.header, bhs.DataIn))
    header = pdus[-1].header
    assert isinstance(header, (bhs.ScsiResponse, bhs.DataIn))
    return received, header


@pytest.mark.parametrize(
    ("cdb", "fields", "flags", "residual"),
    [
        (cdbs.read10(0, 2), {}, 0x04, 1024),  # neither R nor W: nothing can be sent
        (cdbs.write10(0, 2), {}, 0x04, 1024),
        (bytes(6), {}, 0, 0),
        (bytes(6), {"read": True, "expected": 512}, 0x02, 512),
        (bytes(6), {"write": True, "expected": 512}, 0x02, 512),
        (cdbs.write10(0, 2), {"read": True, "expected": 512}, 0x02, 512),
        (cdbs.read10(0, 0), {"read": True, "expected": 512}, 0x02, 512),
    ],
)
def test_residuals_of_commands_whose_flags_disagree(
    cdb: bytes, fields: dict[str, Any], flags: int, residual: int
) -> None:
    target = filled()
    peer = target.logged_in()
    data = bytes(fields.get("expected", 0)) if fields.get("write") else b""
    received, header = raw(peer, cdb, data, **fields)
    assert isinstance(header, bhs.ScsiResponse)
    assert (header.status, header.flags & 0x1E, header.residual, received) == (0, flags, residual, b"")
    assert content(target, 0, 1024) == OLD * 1024


def test_a_read_flagged_as_a_write_ends_good() -> None:
    target = filled()
    received, header = raw(target.logged_in(), cdbs.read10(0, 1), bytes(512), write=True, expected=512)
    assert isinstance(header, bhs.ScsiResponse)
    assert (header.status, received) == (ScsiStatus.GOOD, b"")
    assert (header.flags & 0x06, header.residual) == (0x02, 512)


@pytest.mark.parametrize(
    ("room", "flags", "write_residual", "read_residual"),
    [(512, 0x80 | 0x02, 512, 0), (1024, 0x8A, 512, 512), (100, 0x92, 512, 412), (None, 0x92, 512, 512)],
)
def test_both_directions_at_once(
    room: int | None, flags: int, write_residual: int, read_residual: int
) -> None:
    """RFC 7143 §11.2.2.4, §11.3.4, §11.4.1: the read's length is in an AHS, and counts of its own."""
    target = filled()
    ahs = b"" if room is None else (5).to_bytes(2, "big") + b"\x02\0" + room.to_bytes(4, "big")
    received, header = raw(
        target.logged_in(), cdbs.read10(0, 1), bytes(512), read=True, write=True, expected=512, ahs=ahs
    )
    assert isinstance(header, bhs.ScsiResponse)
    assert header.status == 0
    assert received == OLD * min(room or 0, 512)
    assert header.flags == flags
    assert (header.residual, header.bidirectional_read_residual) == (write_residual, read_residual)


LENGTHS = (0, 1, 3, 511, 512, 513, 1023, 1024, 1025, 4096, 5000, 8192, 70000)


def counted(expected: int, length: int) -> tuple[int, int]:
    """(o or u as bits 2 and 1, count) as RFC 7143 §11.4.5.1 has it."""
    return (0x04 if length > expected else 0x02 if length < expected else 0), abs(expected - length)


@pytest.mark.parametrize("blocks", [0, 1, 2, 9, 16])
def test_residuals_of_every_combination(blocks: int) -> None:
    """RFC 7143 §11.4.5: what the initiator expects against what the CDB asks, in each direction and in both
    at once, where the read has bits and a count of its own (§11.4.5.2)."""
    length = blocks * BLOCK
    target = filled()
    peer = target.logged_in()
    for expected in LENGTHS:
        bits, count = counted(expected, length)
        read = peer.command(cdbs.read10(0, blocks), read=expected)
        assert read.status == ScsiStatus.GOOD
        assert read.residuals == Residuals(*((count, 0) if bits == 0x02 else (0, count)))
        assert read.data == OLD * min(expected, length)
        data = bytes([expected % 250]) * expected
        write = peer.command(cdbs.write10(64, blocks), data, expected=expected, write=True)
        assert write.status == ScsiStatus.GOOD
        assert write.residuals == read.residuals
        moved = min(expected, length)
        assert content(target, 64 * BLOCK, moved) == data[:moved]
        for room in LENGTHS if expected <= 65536 else ():  # as much may come unasked
            ahs = (5).to_bytes(2, "big") + b"\x02\0" + room.to_bytes(4, "big")
            fields = {"read": True, "write": True, "expected": expected, "ahs": ahs}
            for cdb, taken, sent in (
                (cdbs.read10(0, blocks), 0, length),
                (cdbs.write10(64, blocks), length, 0),
            ):
                received, header = raw(peer, cdb, data, **fields)
                assert isinstance(header, bhs.ScsiResponse)
                out_bits, out_count = counted(expected, taken)
                in_bits, in_count = counted(room, sent)
                assert (header.status, header.flags) == (0, 0x80 | out_bits | in_bits << 2)
                assert (header.residual, header.bidirectional_read_residual) == (out_count, in_count)
                assert received == OLD * min(room, sent)


def test_a_cdb_longer_than_16_bytes_comes_whole() -> None:
    """RFC 7143 §11.2.2.3: the rest is in an AHS."""
    target = MemoryTarget()
    peer = target.logged_in()
    seen: list[bytes] = []
    admit = target.units[0].admit

    def look(request: Any) -> Any:
        seen.append(request.cdb)
        return admit(request)

    target.units[0].admit = look  # type: ignore[method-assign]  # the unit itself knows no such CDB
    for size in (17, 18, 19, 20, 32, 260):
        cdb = b"\x7f" + pattern(size)[1:]
        assert peer.command(cdb).sense_key == 5
        assert seen[-1][:size] == cdb
        assert len(seen[-1]) == size


@pytest.mark.parametrize("ahs", [b"\0\x09\x01\0", b"\xff\xff\x01\0", b"\0\x02\x01\0"])
def test_an_ahs_that_does_not_fit_ends_the_connection(ahs: bytes) -> None:
    peer = MemoryTarget().logged_in()
    peer.send(peer.initiator.scsi_command(bytes(6), ahs=ahs))
    assert bool(connection_of(peer).closing) == (int.from_bytes(ahs[:2], "big") > 1)


@pytest.mark.parametrize("big", [True, False])
def test_nothing_is_allocated_for_what_the_cdb_does_not_ask(big: bool) -> None:
    """A length of 4 GiB in the header costs nothing: the buffer has the size of the CDB's transfer."""
    target = MemoryTarget()
    peer = target.logged_in()
    peer.answer_r2ts = False
    peer.send(
        peer.initiator.scsi_command(
            cdbs.write10(0, 1), write=True, expected=0xFFFFFFFF if big else 512, initiator_task_tag=77
        )
    )
    (pdu,) = peer.pending()
    assert pdu.expect(bhs.ReadyToTransfer).desired_data_transfer_length == 512
    (session,) = target.sessions.sessions.values()
    transfer = session.tasks[77].transfer
    assert transfer is not None
    assert len(transfer.buffer) == 512


def test_a_long_write_that_brings_less_than_it_says_writes_no_more_than_it_brought() -> None:
    target = MemoryTarget(max_burst_length=65536, first_burst_length=512)
    peer = target.logged_in()
    assert peer.command(cdbs.write10(0, 128), b"\xa5" * 65536).good
    reply = peer.command(cdbs.write10(256, 128), b"\x11" * 1000, expected=1000)
    assert reply.residuals.overflow == 65536 - 1000
    assert bytes(target.backends[0].read(256 * 512, 65536)) == b"\x11" * 1000 + bytes(65536 - 1000)
