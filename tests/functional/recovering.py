"""Sessions with error recovery: a proxy that damages PDUs, and the story of a connection that is cut.

Shared by the tests of what comes of it and the one that has Wireshark read it.
"""

import random
import socket
import struct
import threading
from types import TracebackType
from typing import Self

from protocol import bhs
from protocol.enums import LogoutReason, SnackType
from protocol.enums import TaskManagementResponseCode as Response
from tests import cdbs
from tests.daemon import HOST, Daemon
from tests.functional.sessions import BLOCK, attention
from tests.initiator import SessionState, SocketInitiator, Task
from tests.initiator_recovery import reassign

LEVEL_2 = {
    "ErrorRecoveryLevel": "2",
    "MaxConnections": "2",
    "DefaultTime2Wait": "0",
    "DefaultTime2Retain": "60",
    "MaxRecvDataSegmentLength": "4096",
    "MaxBurstLength": "16384",
    "FirstBurstLength": "8192",
}
LINGER_0 = struct.pack("ii", 1, 0)


def cut(initiator: SocketInitiator) -> None:
    """The connection is gone at once, with everything that was not read (RST)."""
    initiator.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    initiator.close()


def join(one: SocketInitiator, target: str, cid: int) -> SocketInitiator:
    """One more connection of the session."""
    peer = one.another_connection(cid)
    peer.login(target, one.initiator_name, keys={"MaxRecvDataSegmentLength": "4096"})
    return peer


def pair(daemon: Daemon, target: str, **keys: str) -> tuple[SocketInitiator, SocketInitiator]:
    """A session with two connections."""
    one = single(daemon, target, **keys)
    return one, join(one, target, 2)


def single(daemon: Daemon, target: str, **keys: str) -> SocketInitiator:
    """A session that may have two."""
    one = SocketInitiator((HOST, daemon.portal_port), session=SessionState())
    one.login(target, keys={**LEVEL_2, **keys})
    assert attention(one) == (0x29, 0x00)
    return one


class Model:
    """What a disk must hold, and I/O at random that is held to it."""

    def __init__(self, size: int, seed: int) -> None:
        self.content = bytearray(size)
        self.dice = random.Random(seed)
        self.busy: set[int] = set()
        """Blocks of commands outstanding: no two of them touch the same."""

    def choose(self) -> tuple[int, int]:
        """(LBA, blocks) that nothing outstanding touches."""
        while True:
            blocks = self.dice.randrange(1, 64)
            lba = self.dice.randrange(len(self.content) // BLOCK - blocks)
            span = set(range(lba, lba + blocks))
            if not span & self.busy:
                self.busy |= span
                return lba, blocks

    def begin(self, peer: SocketInitiator) -> tuple[Task, bytes, tuple[int, int]]:
        """Send one READ or WRITE; the task, what a READ must bring, and where."""
        lba, blocks = self.choose()
        start, size = lba * BLOCK, blocks * BLOCK
        if self.dice.randrange(2):
            data = self.dice.randbytes(size)
            unasked = self.dice.choice([0, min(size, 4096), min(size, 8192)])
            options = {"unsolicited": unasked, "immediate_data": min(unasked, self.dice.choice([0, 4096]))}
            task = peer.send_command(cdbs.write10(lba, blocks), data, **options)
            self.content[start : start + size] = data
            return task, b"", (lba, blocks)
        task = peer.send_command(cdbs.read10(lba, blocks), read=size)
        return task, bytes(self.content[start : start + size]), (lba, blocks)

    def done(self, where: tuple[int, int]) -> None:
        """Nothing is outstanding there any more."""
        self.busy -= set(range(where[0], sum(where)))

    def io(self, peer: SocketInitiator) -> None:
        """One command to its end."""
        task, expected, where = self.begin(peer)
        reply = peer.wait(task)
        assert reply.good, reply
        assert reply.data == expected
        self.done(where)


def cut_and_carry_on(daemon: Daemon, target: str, size: int) -> Model:
    """Interleaved verified I/O on two connections; one is cut with commands in every state; they are
    reassigned, some to the other connection, some to a new one with the same CID; I/O goes on."""
    one, two = pair(daemon, target)
    model = Model(size, seed=7143)
    for n in range(40):
        model.io((one, two)[n % 2])
    two.answer_r2ts = False
    waiting = [model.begin(two) for _ in range(12)]
    model.io(one)  # by now the daemon has said much on the other connection, which nobody reads
    cut(two)
    again = join(one, target, 2)
    for n, (task, expected, where) in enumerate(waiting):
        peer = (one, again)[n % 2]
        assert reassign(task, peer) == Response.FUNCTION_COMPLETE
        reply = peer.wait(task)
        assert reply.good, reply
        assert reply.data == expected
        model.done(where)
    for n in range(20):
        model.io((one, again)[n % 2])
    again.logout(LogoutReason.CLOSE_CONNECTION)
    again.close()
    for _ in range(5):
        model.io(one)
    one.logout()
    one.close()
    return model


def ask_again(daemon: Daemon, target: str) -> None:
    """One SNACK of every kind that brings something."""
    one = single(daemon, target)
    one.initiator.strict = False
    tag = one.session.new_tag()
    read = one.initiator.scsi_command(
        cdbs.read10(0, 16), read=True, expected=8192, initiator_task_tag=tag, exp_stat_sn=0
    )
    pdus = [one.request(read), one.receive(), one.receive()]
    stat_sn = pdus[-1].expect(bhs.ScsiResponse).stat_sn
    for kind, fields in (
        (SnackType.DATA_R2T, {"tag": tag, "begin": 1, "run": 1}),
        (SnackType.STATUS, {"begin": stat_sn, "run": 1}),
        (SnackType.R_DATA, {"tag": tag, "target_transfer_tag": 0x77}),
        (SnackType.STATUS, {"begin": stat_sn + 100, "run": 1}),
    ):
        one.send(one.initiator.snack(kind, exp_stat_sn=0, **fields))
    kinds = []
    while bhs.Reject not in kinds:
        kinds.append(type(one.receive().header))
    # One PDU, one status; with R-Data all the data and the status; what was never sent is refused.
    data = [bhs.DataIn, bhs.DataIn]
    assert kinds == [bhs.DataIn, bhs.ScsiResponse, *data, bhs.ScsiResponse, bhs.Reject]
    one.close()


class DamagingProxy:
    """Passes connections on and damages one PDU in so many, each way, once digests are on.

    A bit of the header, the data or a digest is flipped; never in the lengths of a header, which leaves
    nothing to recover (RFC 7143 §7.8), and never in two PDUs in a row.

    Attributes:
        covered: whether headers and data have digests, for connections that come from now on; what has none
            is not damaged.
    """

    def __init__(self, address: tuple[str, int], one_in: int, seed: int | str) -> None:
        self._to = address
        self._one_in = one_in
        self._dice = random.Random(seed)
        self.covered = (True, True)
        self.damaged = {"in": 0, "out": 0}
        self.passed = 0
        self._server = socket.create_server((HOST, 0))
        self.address: tuple[str, int] = self._server.getsockname()
        self._sockets: set[socket.socket] = {self._server}
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in list(self._sockets):
            self._hang_up(sock)
            sock.close()
        for thread in self._threads:
            thread.join(10)

    @staticmethod
    def _hang_up(sock: socket.socket) -> None:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._to)
            except OSError:
                client.close()
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets |= {client, server}
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            digests, covered = threading.Event(), self.covered
            for source, to, way in ((client, server, "out"), (server, client, "in")):
                thread = threading.Thread(
                    target=self._pass, args=(source, to, way, digests, covered), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _pass(
        self,
        source: socket.socket,
        to: socket.socket,
        way: str,
        digests: threading.Event,
        covered: tuple[bool, bool],
    ) -> None:
        stream = source.makefile("rb")
        since = 0
        try:
            while len(header := stream.read(48)) == 48:
                of_header, of_data = covered if digests.is_set() else (False, False)
                head = 48 + 4 * header[4] + 4 * of_header
                size = int.from_bytes(header[5:8], "big") + 3 & ~3
                rest = stream.read(head - 48 + size + 4 * (of_data and size > 0))
                pdu = bytearray(header + rest)
                if len(pdu) < head + size:
                    break  # cut off: the peer of a half PDU sees the end of the connection
                self.passed += 1
                since += 1
                if since > 1 and not self._dice.randrange(self._one_in):
                    places = [at for at in range(head) if not 4 <= at < 8] if of_header else []
                    places += range(head, len(pdu)) if of_data else ()
                    if places:
                        pdu[self._dice.choice(places)] ^= 1 << self._dice.randrange(8)
                        self.damaged[way] += 1
                        since = 0
                if header[0] == 0x23 and header[1] & 0x83 == 0x83 and not header[36]:
                    digests.set()  # the last Login Response: what follows has digests
                to.sendall(pdu)
        except OSError:
            pass
        finally:
            stream.close()
            for sock in (source, to):
                self._hang_up(sock)
            source.close()
            self._sockets.discard(source)
