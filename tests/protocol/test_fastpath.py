"""The fast path answers what the general path answers, byte for byte and counter for counter."""

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.digest import digest
from protocol.enums import Opcode
from protocol.scsi.device import LogicalUnit
from tests import cdbs
from tests.initiator import MemoryPeer
from tests.protocol.target import MemoryTarget, connection_of

BLOCKS = 64
BLOCK = 512

Digests = tuple[bool, bool]
"""Header digest, data digest."""
DIGESTS: tuple[Digests, ...] = ((False, False), (True, True), (True, False), (False, True))


def pair(digests: Digests) -> tuple[list[MemoryTarget], list[MemoryPeer]]:
    """Two targets alike, each with one initiator; the second has no fast path."""
    targets = [MemoryTarget(size=BLOCKS * BLOCK) for _ in range(2)]
    keys = dict(
        zip(("HeaderDigest", "DataDigest"), ("CRC32C" if on else "None" for on in digests), strict=True)
    )
    peers = [target.logged_in(keys=keys) for target in targets]
    slow = connection_of(peers[1])
    slow.framer.handlers[Opcode.SCSI_COMMAND] = slow._scsi_command
    return targets, peers


def state(unit: LogicalUnit) -> dict[str, Any]:
    """All that an operator could see of a unit."""
    names = ("reads", "writes", "bytes_read", "bytes_written", "commands", "failures", "read_errors")
    return {name: getattr(unit, name) for name in names}


COMMANDS = st.tuples(
    st.sampled_from((0x28, 0x88, 0x2A, 0x8A, 0x08, 0x12)),
    st.integers(0, BLOCKS + 2),  # LBA, sometimes beyond the end
    st.integers(0, 5),  # blocks
    st.sampled_from((0, 0, 0, 0x08, 0x10, 0x01, 0x20)),  # FUA, DPO, reserved, RDPROTECT
    st.sampled_from((0, 0, 0, 3, 0x40)),  # group
    st.sampled_from((1, 1, 1, 0, 2, 3)),  # attribute
    st.sampled_from((0, 0, 0, -1, 1, 512, -512)),  # what EDTL differs by
    st.sampled_from((0, 0, 0, 7)),  # LUN
    st.booleans(),  # immediate delivery
)


def command_pdu(
    number: int, cmd_sn: int, operation: int, lba: int, blocks: int, byte1: int, group: int, attribute: int,
    difference: int, lun: int, immediate: bool, digests: Digests = (False, False),
) -> bytes:  # fmt: skip
    """One SCSI Command PDU, all its data in it."""
    if operation in (0x88, 0x8A):
        cdb = struct.pack("!BBQIBB", operation, byte1, lba, blocks, group, 0)
    else:
        cdb = struct.pack("!BBIBHB6x", operation, byte1, lba, group, blocks, 0)
    write = operation in (0x2A, 0x8A)
    length = max(blocks * BLOCK + difference, 0)
    data = bytes((number * 7 + i) % 256 for i in range(length)) if write else b""
    flags = 0x80 | (0x20 if write else 0x40) | attribute
    header = struct.pack(
        "!BB2xI8sIIII16s", 0x41 if immediate else 0x01, flags, len(data),
        bytes((0, lun)) + bytes(6), number, length, cmd_sn, 0, cdb,
    )  # fmt: skip
    data += bytes(-len(data) % 4)
    return (
        header
        + (digest(header) if digests[0] else b"")
        + data
        + (digest(data) if data and digests[1] else b"")
    )


@settings(deadline=None)
@given(st.lists(COMMANDS, min_size=1, max_size=12), st.integers(1, 4000), st.sampled_from(DIGESTS))
def test_same_traffic_same_answers(commands: list[tuple[Any, ...]], split: int, digests: Digests) -> None:
    targets, peers = pair(digests)
    cmd_sn = peers[0].session.cmd_sn
    stream = b""
    for number, command in enumerate(commands, 100):
        stream += command_pdu(number, cmd_sn, *command, digests=digests)
        cmd_sn += not command[-1]
    answers = []
    for peer in peers:
        said = b""
        for at in range(0, len(stream), split):
            peer.send(stream[at : at + split])
            said += b"".join(bytes(part) for part in peer.target.data_to_send())
        answers.append(said)
    assert sorted(pdus(answers[0], digests)) == sorted(pdus(answers[1], digests))
    assert state(targets[0].units[0]) == state(targets[1].units[0])
    assert bytes(targets[0].backends[0].read(0, BLOCKS * BLOCK)) == bytes(
        targets[1].backends[0].read(0, BLOCKS * BLOCK)
    )
    sessions = [next(iter(target.sessions.sessions.values())) for target in targets]
    for name in ("commands", "bytes_read", "bytes_written", "exp_cmd_sn", "max_cmd_sn"):
        assert getattr(sessions[0], name) == getattr(sessions[1], name)


@pytest.mark.parametrize("second", [0x28, 0x2A])
def test_what_was_said_before_is_begun_before(second: int) -> None:
    """A command that goes the general way waits for the end of the wake-up; what stands behind it in the same
    wake-up, at the same place, does not pass it."""
    targets, peers = pair((False, False))
    cmd_sn = peers[0].session.cmd_sn
    stream = command_pdu(100, cmd_sn, 0x2A, 0, 1, 0x08, 0, 1, 0, 0, False)  # FUA
    stream += command_pdu(101, cmd_sn + 1, second, 0, 1, 0, 0, 1, 0, 0, False)
    answers = []
    for peer in peers:
        peer.send(stream)
        answers.append(b"".join(bytes(part) for part in peer.target.data_to_send()))
    assert answers[0] == answers[1]
    media = [bytes(target.backends[0].read(0, BLOCK)) for target in targets]
    assert media[0] == media[1] != bytes(BLOCK)


def pdus(stream: bytes, digests: Digests) -> list[bytes]:
    """Each PDU without what only tells the order of answers (StatSN and the window), which among commands
    that run at once and commands that go the long way is free (SAM-5 §8.6). Digests are right."""
    found = []
    at = 0
    while at < len(stream):
        header = stream[at : at + 48]
        at += 48
        if digests[0]:
            assert stream[at : at + 4] == digest(header)
            at += 4
        end = at + (int.from_bytes(header[5:8], "big") + 3 & ~3)
        data = stream[at:end]
        at = end
        if data and digests[1]:
            assert stream[at : at + 4] == digest(data)
            at += 4
        found.append(header[:24] + bytes(12) + header[36:] + data)
    return found


@pytest.mark.parametrize("digests", DIGESTS)
def test_plain_traffic_is_the_same_to_the_byte_and_takes_the_fast_path(digests: Digests) -> None:
    """PDU by PDU, the numbers of the answers are the same too; and no task is ever made."""
    targets, peers = pair(digests)
    fast, slow = (connection_of(peer) for peer in peers)
    plain = [(op, 8 * i, 3, 0, 0, 1, 0, 0, False) for i, op in enumerate((0x2A, 0x28, 0x8A, 0x88) * 2)]
    cmd_sn = peers[0].session.cmd_sn
    for number, command in enumerate(plain):
        stream = memoryview(command_pdu(100 + number, cmd_sn + number, *command, digests=digests))
        fast.receive_data(stream, 0.0)
        assert fast.events == []
        peers[1].send(bytes(stream))
        assert b"".join(fast.data_to_send()) == b"".join(slow.data_to_send()) != b""
    assert state(targets[0].units[0]) == state(targets[1].units[0])


def test_with_digests_what_is_sent_is_never_mapped_memory() -> None:
    """A digest looks at every byte, and a byte of a mapping may be a fault: it is read into memory first."""
    target = MemoryTarget()
    peer = target.logged_in(keys={"DataDigest": "CRC32C", "HeaderDigest": "CRC32C"})
    backend = target.backends[0]
    lent: list[int] = []
    read_nowait = backend.read_nowait

    def spy(offset: int, length: int) -> Any:
        lent.append(offset)
        return read_nowait(offset, length)

    backend.read_nowait = spy  # type: ignore[method-assign]
    assert peer.command(cdbs.read10(4, 8), read=8 * BLOCK).good
    assert lent == []
