"""The fast path answers what the general path answers, byte for byte and counter for counter."""

import struct
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.enums import Opcode
from protocol.scsi.device import LogicalUnit
from tests import cdbs
from tests.initiator import MemoryPeer
from tests.protocol.target import MemoryTarget, connection_of

BLOCKS = 64
BLOCK = 512


def pair() -> tuple[list[MemoryTarget], list[MemoryPeer]]:
    """Two targets alike, each with one initiator; the second has no fast path."""
    targets = [MemoryTarget(size=BLOCKS * BLOCK) for _ in range(2)]
    peers = [target.logged_in() for target in targets]
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
    difference: int, lun: int, immediate: bool,
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
    return header + data + bytes(-len(data) % 4)


@settings(deadline=None)
@given(st.lists(COMMANDS, min_size=1, max_size=12), st.integers(1, 4000))
def test_same_traffic_same_answers(commands: list[tuple[Any, ...]], split: int) -> None:
    targets, peers = pair()
    cmd_sn = peers[0].session.cmd_sn
    stream = b""
    for number, command in enumerate(commands, 100):
        stream += command_pdu(number, cmd_sn, *command)
        cmd_sn += not command[-1]
    answers = []
    for peer in peers:
        said = b""
        for at in range(0, len(stream), split):
            peer.send(stream[at : at + split])
            said += b"".join(bytes(part) for part in peer.target.data_to_send())
        answers.append(said)
    assert sorted(pdus(answers[0])) == sorted(pdus(answers[1]))
    assert state(targets[0].units[0]) == state(targets[1].units[0])
    assert bytes(targets[0].backends[0].read(0, BLOCKS * BLOCK)) == bytes(
        targets[1].backends[0].read(0, BLOCKS * BLOCK)
    )
    sessions = [next(iter(target.sessions.sessions.values())) for target in targets]
    for name in ("commands", "bytes_read", "bytes_written", "exp_cmd_sn", "max_cmd_sn"):
        assert getattr(sessions[0], name) == getattr(sessions[1], name)


def pdus(stream: bytes) -> list[bytes]:
    """Each PDU without what only tells the order of answers (StatSN and the window), which among commands
    that run at once and commands that go the long way is free (SAM-5 §8.6)."""
    found = []
    at = 0
    while at < len(stream):
        end = at + 48 + (int.from_bytes(stream[at + 4 : at + 8], "big") + 3 & ~3)
        found.append(stream[at : at + 24] + bytes(12) + stream[at + 36 : end])
        at = end
    return found


def test_plain_traffic_is_the_same_to_the_byte_and_takes_the_fast_path() -> None:
    """PDU by PDU, the numbers of the answers are the same too; and no task is ever made."""
    targets, peers = pair()
    fast, slow = (connection_of(peer) for peer in peers)
    plain = [(op, 8 * i, 3, 0, 0, 1, 0, 0, False) for i, op in enumerate((0x2A, 0x28, 0x8A, 0x88) * 2)]
    cmd_sn = peers[0].session.cmd_sn
    for number, command in enumerate(plain):
        stream = memoryview(command_pdu(100 + number, cmd_sn + number, *command))
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
