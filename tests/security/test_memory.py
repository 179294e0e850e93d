"""What large commands may hold: a peer that asks for much and reads nothing, or announces much and sends
nothing, has its share of the daemon's memory and no more, and everybody else is served.

The peaks are the kernel's own (VmHWM of proc(5)), of the real daemon.
"""

import socket
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from protocol import bhs
from protocol.enums import Opcode
from protocol.enums import TaskManagementFunction as Function
from protocol.limits import MAX_IN_FLIGHT, MAX_PLAIN_REPLIES
from protocol.scsi.limits import MAXIMUM_TRANSFER_BYTES
from tests.daemon import HOST, Daemon, Disk
from tests.initiator import SocketInitiator
from tests.protocol.target import Endpoint, MemoryTarget, connection_of

MIB = 1 << 20
BLOCK = 512
LARGEST = MAXIMUM_TRANSFER_BYTES
DEPTH = 32
"""The daemon's queue depth unless an operator sets another."""
ONE = MAX_IN_FLIGHT // 2 + LARGEST
"""What one connection may hold for one direction."""
REST = 48 * MIB
"""Everything else that moves meanwhile: windows of small commands, socket buffers are the kernel's."""


def read_16(offset: int, length: int) -> bytes:
    return b"\x88\0" + (offset // BLOCK).to_bytes(8, "big") + (length // BLOCK).to_bytes(4, "big") + b"\0\0"


def write_16(offset: int, length: int) -> bytes:
    return b"\x8a" + read_16(offset, length)[1:]


FUA_WRITE_16 = b"\x8a\x08"
"""It waits for the medium, so a worker has it."""


class Peak:
    """The most memory a process has had since this was made."""

    def __init__(self, daemon: Daemon) -> None:
        assert daemon.process is not None
        self._process = Path(f"/proc/{daemon.process.pid}")
        (self._process / "clear_refs").write_text("5", encoding="ascii")
        self._before = self._kib("VmHWM")

    def _kib(self, name: str) -> int:
        lines = (self._process / "status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    @property
    def growth(self) -> int:
        """Bytes."""
        return (self._kib("VmHWM") - self._before) * 1024


@pytest.fixture(scope="module")
def disk(shared_daemon: Daemon) -> Disk:
    return shared_daemon.create_disk("one", "1GB")


@pytest.fixture
def peers(
    shared_daemon: Daemon, disk: Disk, request: pytest.FixtureRequest
) -> Iterator[list[SocketInitiator]]:
    """As many as the test's parameter says, with data digests: every reply is a copy in memory."""
    with ExitStack() as stack:
        found = []
        for number in range(request.param):
            peer = stack.enter_context(SocketInitiator((HOST, shared_daemon.portal_port)))
            peer.login(
                disk.iqn,
                f"iqn.2026-11.example:host{number}",
                keys={"DataDigest": "CRC32C", "InitialR2T": "Yes", "ImmediateData": "No"},
            )
            peer.command(bytes(6))
            found.append(peer)
        yield found


@pytest.fixture
def other(shared_daemon: Daemon, disk: Disk) -> Iterator[SocketInitiator]:
    with SocketInitiator((HOST, shared_daemon.portal_port)) as peer:
        peer.login(disk.iqn)
        peer.command(bytes(6))
        yield peer


def works(peer: SocketInitiator, at: int) -> None:
    """Writes and reads behind what others have asked for: the unit's workers take them in order."""
    for number in range(16):
        data = bytes([number + 1]) * 4096
        assert peer.command(write_16(at + 4096 * number, 4096), data).good
        assert peer.command(read_16(at + 4096 * number, 4096), read=4096).data == data
    assert peer.command(read_16(at + MIB, MIB), read=MIB).data == bytes(MIB)


@pytest.mark.parametrize("peers", [1, 6], ids=["one", "six"], indirect=True)
def test_replies_that_nobody_reads(
    shared_daemon: Daemon, peers: list[SocketInitiator], other: SocketInitiator
) -> None:
    """A window full of the largest READs, and not a byte of the answers taken."""
    peak = Peak(shared_daemon)
    for peer in peers:
        for number in range(DEPTH):
            cdb = read_16(number % 16 * LARGEST, LARGEST)
            peer.send(peer.initiator.scsi_command(cdb, read=True, expected=LARGEST))
    for peer in peers:
        assert peer.socket.recv(1, socket.MSG_PEEK)
    works(other, 600 * MIB)
    assert peak.growth < len(peers) * ONE + REST


@pytest.mark.parametrize("peers", [1, 6], ids=["one", "six"], indirect=True)
def test_writes_that_nobody_sends(
    shared_daemon: Daemon, peers: list[SocketInitiator], other: SocketInitiator
) -> None:
    """A window full of the largest WRITEs, and no Data-Out."""
    peak = Peak(shared_daemon)
    for peer in peers:
        for _ in range(DEPTH):
            peer.send(peer.initiator.scsi_command(write_16(0, LARGEST), write=True, expected=LARGEST))
        peer.send(peer.initiator.nop_out(immediate=True))
        asked = set()
        while (pdu := peer.receive()).opcode != Opcode.NOP_IN:
            asked.add(pdu.expect(bhs.ReadyToTransfer).initiator_task_tag)
        assert len(asked) == 1
    works(other, 600 * MIB)
    assert peak.growth < len(peers) * ONE + REST


@pytest.mark.parametrize("peers", [1], ids=[""], indirect=True)
def test_what_was_held_back_comes_whole(peers: list[SocketInitiator]) -> None:
    """More than there is room for, then all of it is read. A small command does not wait behind it."""
    (peer,) = peers
    assert peer.command(write_16(0, MIB), bytes(range(256)) * 4096).good
    tasks = [peer.send_command(read_16(0, 4 * MIB), read=4 * MIB) for _ in range(12)]
    small = peer.send_command(read_16(0, BLOCK), read=BLOCK)
    done = []
    while not small.done:
        peer._dispatch(peer.receive())
        done = [task for task in tasks if task.done]
    assert len(done) < len(tasks)
    expected = bytes(range(256)) * 4096 + bytes(3 * MIB)
    assert all(peer.wait(task).data == expected for task in tasks)


@pytest.mark.parametrize("peers", [1], ids=[""], indirect=True)
def test_writes_wait_for_memory_and_all_arrive(peers: list[SocketInitiator]) -> None:
    (peer,) = peers
    tasks = [
        peer.send_command(write_16(4 * MIB * number, 4 * MIB), bytes([number + 1]) * (4 * MIB))
        for number in range(12)
    ]
    assert all(peer.wait(task).good for task in tasks)
    for number in range(12):
        data = peer.command(read_16(4 * MIB * number, 4 * MIB), read=4 * MIB).data
        assert data == bytes([number + 1]) * (4 * MIB)


@pytest.mark.parametrize("peers", [1], ids=[""], indirect=True)
def test_reads_held_back_can_be_aborted(peers: list[SocketInitiator]) -> None:
    """One in the middle by ABORT TASK, the rest by LOGICAL UNIT RESET; the unit goes on."""
    (peer,) = peers
    tasks = [peer.send_command(read_16(0, LARGEST), read=LARGEST) for _ in range(5)]
    assert peer.task_management(Function.ABORT_TASK, task=tasks[3]) == 0
    peer.wait(tasks[0])
    assert peer.task_management(Function.LOGICAL_UNIT_RESET) == 0
    assert not tasks[3].pdus and not tasks[4].done
    peer.command(bytes(6))
    assert peer.command(read_16(0, LARGEST), read=LARGEST).good


@pytest.mark.parametrize("peers", [1], ids=[""], indirect=True)
def test_logout_does_not_wait_for_what_is_held_back(peers: list[SocketInitiator]) -> None:
    (peer,) = peers
    for _ in range(4):
        peer.send_command(read_16(0, LARGEST), read=LARGEST)
    assert peer.logout().response == 0


# -- Without sockets ----------------------------------------------------------------------------------

SIZE = 6 * MIB


CROWD, LIMIT = 12, 64 * MIB
"""Sessions, and ``--memory-limit``: 2.7 MiB a session for each direction, where one alone has 16."""


def test_a_crowd_shares_the_memory_of_the_process(tmp_path: Path) -> None:
    """Writes that are announced get memory, and an R2T, by shares; all of them end well."""
    daemon = Daemon(tmp_path, options=("--memory-limit", "64M", "--workers", "1")).start()
    try:
        disk = daemon.create_disk("one", "1GB")
        with ExitStack() as stack:
            crowd = []
            for number in range(CROWD):
                peer = stack.enter_context(SocketInitiator((HOST, daemon.portal_port)))
                name = f"iqn.2026-11.example:host{number}"
                peer.login(disk.iqn, name, keys={"InitialR2T": "Yes", "ImmediateData": "No"})
                peer.command(bytes(6))
                peer.answer_r2ts = False
                crowd.append(peer)
            peak = Peak(daemon)
            tasks = [
                [
                    peer.send_command(
                        write_16((16 * number + at) * MIB, MIB), bytes((16 * number + at + 1,)) * MIB
                    )
                    for at in range(16)
                ]
                for number, peer in enumerate(crowd)
            ]
            share = LIMIT // (2 * CROWD) // MIB
            for peer, own in zip(crowd, tasks, strict=True):
                peer.nop(immediate=True)
                assert [bool(task.r2ts) for task in own] == [True] * share + [False] * (16 - share)
                peer.answer_r2ts = True
                for task in own[:share]:
                    while task.r2ts:
                        peer.answer_r2t(task, task.r2ts.pop(0))
            for peer, own in zip(crowd, tasks, strict=True):
                assert all(peer.wait(task).good for task in own)
            assert peak.growth < LIMIT + REST
            for number, peer in enumerate(crowd):
                for at in (0, 15):
                    value = 16 * number + at
                    data = peer.command(read_16(value * MIB, MIB), read=MIB).data
                    assert data == bytes((value + 1,)) * MIB
    finally:
        daemon.kill9()


@pytest.fixture
def target() -> MemoryTarget:
    return MemoryTarget(size=64 * MIB, initial_r2t=True, immediate_data=False)


def test_a_third_write_waits_until_the_first_is_over(target: MemoryTarget) -> None:
    peer = target.logged_in(keys={"MaxOutstandingR2T": "4"})  # R2Ts of a connection are 32 in all
    peer.answer_r2ts = False
    tasks = [peer.send_command(write_16(SIZE * n, SIZE), bytes([n]) * SIZE) for n in range(4)]
    small = peer.send_command(write_16(4 * SIZE, 65536), bytes(65536))
    peer.nop(immediate=True)
    assert [bool(task.r2ts) for task in tasks] == [True, True, False, False]
    assert small.r2ts
    while not tasks[0].done:
        if tasks[0].r2ts:
            peer.answer_r2t(tasks[0], tasks[0].r2ts.pop(0))
        else:
            peer._dispatch(peer.receive())
    peer.nop(immediate=True)
    assert [bool(task.r2ts) for task in tasks[1:]] == [True, True, False]


@pytest.mark.parametrize(
    ("victim", "asked"), [(0, [True, True, True, False]), (2, [True, True, False, False])]
)
def test_abort_makes_room(target: MemoryTarget, victim: int, asked: list[bool]) -> None:
    """Of one that has its buffer: the next one gets it. Of one that waits: it never asks."""
    peer = target.logged_in()
    peer.answer_r2ts = False
    tasks = [peer.send_command(write_16(SIZE * n, SIZE), bytes([n]) * SIZE) for n in range(4)]
    peer.nop(immediate=True)
    assert peer.task_management(Function.ABORT_TASK, task=tasks[victim]) == 0
    peer.nop(immediate=True)
    assert [bool(task.r2ts) for task in tasks] == asked


def test_data_of_an_aborted_write_counts_while_a_worker_has_it(target: MemoryTarget) -> None:
    """An abort does not wait for the disk; who aborts as fast as he writes gets no second share."""
    peer = target.logged_in()
    target.lane.hold = True
    first = [peer.send_command(FUA_WRITE_16 + write_16(SIZE * n, SIZE)[2:], bytes(SIZE)) for n in range(2)]
    while len(target.lane.held) < 2:
        peer._dispatch(peer.receive())
    assert all(peer.task_management(Function.ABORT_TASK, task=task) == 0 for task in first)
    peer.answer_r2ts = False
    second = peer.send_command(write_16(0, SIZE), bytes(SIZE))
    peer.nop(immediate=True)
    assert not second.r2ts
    target.lane.release()
    target.pass_time(1)
    peer.wait_for_r2t(second)


def test_unsolicited_data_of_a_write_that_waits_is_kept(target: MemoryTarget) -> None:
    peer = MemoryTarget(size=64 * MIB, initial_r2t=False, immediate_data=True).logged_in()
    peer.answer_r2ts = False
    first = [peer.send_command(write_16(SIZE * n, SIZE), bytes([1]) * SIZE) for n in range(2)]
    third = peer.send_command(write_16(0, SIZE), bytes([3]) * SIZE)
    peer.nop(immediate=True)
    assert not third.r2ts
    peer.answer_r2ts = True
    for task in first:
        while task.r2ts:
            peer.answer_r2t(task, task.r2ts.pop(0))
        assert peer.wait(task).good
    for r2t in third.r2ts:
        peer.answer_r2t(third, r2t)
    assert peer.wait(third).good
    assert peer.command(read_16(0, SIZE), read=SIZE).data == bytes([3]) * SIZE


def test_memory_that_comes_amid_a_data_segment_loses_none_of_it() -> None:
    """The segment was on its way to the buffer that the write had before."""
    target = MemoryTarget(
        size=64 * MIB, initial_r2t=False, immediate_data=False, max_recv_data_segment_length=1 << 16
    )
    peer = target.logged_in()
    target.lane.hold = True
    for number in range(2):
        peer.send_command(FUA_WRITE_16 + write_16(SIZE * number, SIZE)[2:], bytes(SIZE))
    while len(target.lane.held) < 2:
        peer._dispatch(peer.receive())
    sent: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "send", sent.append)
        third = peer.send_command(write_16(0, SIZE), bytes([3]) * SIZE)
    (stream,) = sent
    half = 2 * 48 + 20000  # the command, the header of its unsolicited Data-Out, and some of that
    peer.send(stream[:half])
    target.lane.release()
    target.lane.hold = False
    peer.send(stream[half:])
    assert peer.wait(third).good
    assert peer.command(read_16(0, SIZE), read=SIZE).data == bytes([3]) * SIZE


def test_a_short_answer_does_not_keep_a_long_one() -> None:
    """READ of 1 MiB into room for one block: what waits to be read is a block."""
    target = MemoryTarget(size=2 * MIB)
    peer = target.logged_in()
    connection = connection_of(peer)
    tracemalloc.start()
    try:
        for _ in range(8):
            connection.receive_data(
                memoryview(peer.initiator.scsi_command(read_16(0, MIB), read=True, expected=BLOCK)), 0.0
            )
        assert isinstance(peer.target, Endpoint)
        peer.target.serve()
        assert tracemalloc.get_traced_memory()[0] < MIB
    finally:
        tracemalloc.stop()
    assert sum(map(len, connection.data_to_send())) == 8 * (48 + BLOCK)


def test_one_turn_of_reads_is_answered_within_the_command_window() -> None:
    """48 bytes ask for 256 KiB; a turn brings thousands, with numbers that were not given out yet."""
    target = MemoryTarget(max_recv_data_segment_length=1 << 18)
    peer = target.logged_in(strict=False, keys={"MaxRecvDataSegmentLength": "262144"})
    first = peer.session.cmd_sn
    cdb = read_16(0, 1 << 18)
    flood = b"".join(
        peer.initiator.scsi_command(cdb, read=True, expected=1 << 18, cmd_sn=first + n, initiator_task_tag=n)
        for n in range(2000)
    )
    connection = connection_of(peer)
    connection.receive_data(memoryview(flood), 0.0)
    assert isinstance(peer.target, Endpoint)
    peer.target.serve()
    replies = [each for each in connection.data_to_send() if len(each) == 1 << 18]
    assert 8 <= len(replies) <= MAX_PLAIN_REPLIES
