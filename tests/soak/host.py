"""One initiator host of the soak: a session, its part of a LUN, and what must be on it.

The part is divided into units of 4 KiB. What was written where is known by a number that never comes twice,
so that old, foreign and misplaced data all show. Each block of a unit whose write was cut off may have what
was there or what was sent, and nothing else, until the unit is written again.
"""

import random
from collections import Counter
from collections.abc import Callable
from itertools import count

from protocol.enums import LogoutReason, ScsiStatus
from tests import cdbs
from tests.initiator import ConnectionClosed, LoginFailed, Rejected, Reply, SocketInitiator

__all__ = ["UNITS", "UNIT_BLOCKS", "Host", "WrongDataError"]

UNIT_BLOCKS = 8
UNIT = 512 * UNIT_BLOCKS
UNITS = 64
"""Of a host: 256 KiB."""
MOST = 16
"""Units of one command."""
PATIENCE_S = 90.0
ABORT_TASK, LOGICAL_UNIT_RESET = 1, 5
UNIT_ATTENTION = 6
RETRIES = 50
_numbers = count(1)


class WrongDataError(Exception):
    """The medium has not what was written."""


def pattern(number: int) -> bytes:
    """A unit's content; 0 is what was unmapped."""
    return number.to_bytes(8, "big") * (UNIT // 8)


class Host:
    """An initiator."""

    units = UNITS
    block = 512
    """Bytes of a logical block."""

    def __init__(
        self, address: tuple[str, int], iqn: str, name: str, base: int, source: random.Random
    ) -> None:
        self.address = address
        self.iqn = iqn
        self.name = name
        self.base = base
        """LBA of its first unit."""
        self.source = source
        self.content = [frozenset((0,))] * self.units
        """The numbers that blocks of each unit may have: one, unless a write of it was cut off."""
        self.done: Counter[str] = Counter()
        self.verified = 0
        """Bytes."""
        self.peer: SocketInitiator | None = None

    # -- sessions ---------------------------------------------------------------------------------

    def login(self, peer: SocketInitiator | None = None) -> SocketInitiator:
        """Log in, trying again as long as the target asks to (RFC 7143 §11.13.5)."""
        digest = self.source.choice(("None", "None", "CRC32C"))
        keys = {"HeaderDigest": digest, "DataDigest": digest}
        if self.source.random() < 0.5:
            keys |= {"ImmediateData": "No", "InitialR2T": "Yes", "MaxBurstLength": "16384"}
            keys["FirstBurstLength"] = "16384"
        while True:
            peer = peer or SocketInitiator(self.address, timeout_s=PATIENCE_S)
            try:
                peer.login(self.iqn, self.name, keys=keys)
            except ConnectionClosed:
                peer.close()
            except LoginFailed as failed:
                peer.close()
                if failed.response.status_class != 3:
                    raise
            else:
                self.peer = peer
                return peer
            peer = None

    def leave(self) -> None:
        """Log out, if still there."""
        if self.peer is not None:
            try:
                self.peer.logout(LogoutReason.CLOSE_SESSION)
            except ConnectionClosed:
                pass
            self.peer.close()
            self.peer = None

    def warm_up(self) -> None:
        """Log in, write, read, flush, log out; often enough for what is done to pages in memory only."""
        peer = self.login()
        for action in (Host._write, Host._read, Host._flush, Host._unmap) * 8:
            action(self, peer)
        self.leave()

    # -- one step ---------------------------------------------------------------------------------

    def step(self) -> None:
        """Something at random; after a lost connection once more."""
        (action,) = self.source.choices(_ACTIONS, _WEIGHTS)
        while True:
            try:
                action(self, self.peer or self.login())
            except ConnectionClosed:
                if self.peer is not None:
                    self.peer.close()
                    self.peer = None
                self.done[LOST] += 1
            else:
                self.done[action.__name__.strip("_")] += 1
                return

    def command(self, peer: SocketInitiator, cdb: bytes, data: bytes = b"", read: int = 0) -> Reply:
        """To its end, past unit attentions."""
        for _ in range(RETRIES):
            reply = peer.command(cdb, data, read)
            if reply.status != ScsiStatus.CHECK_CONDITION or reply.sense_key != UNIT_ATTENTION:
                assert reply.status == ScsiStatus.GOOD, (cdb.hex(), reply)
                return reply
        raise AssertionError(f"{cdb.hex()}: unit attentions without end")

    def _some(self) -> tuple[int, int]:
        size = self.source.randint(1, MOST)
        return self.source.randint(0, self.units - size), size

    def _blocks(self, units: int) -> int:
        return units * UNIT // self.block

    def _lba(self, at: int) -> int:
        return self.base * 512 // self.block + self._blocks(at)

    def _sends(self, at: int, numbers: list[int]) -> None:
        """From now on it may be there."""
        for index, number in enumerate(numbers, at):
            self.content[index] |= {number}

    def _has_sent(self, at: int, numbers: list[int]) -> None:
        """The target has said that it is there."""
        self.content[at : at + len(numbers)] = [frozenset((number,)) for number in numbers]

    # -- work -------------------------------------------------------------------------------------

    def _write(self, peer: SocketInitiator) -> None:
        at, size = self._some()
        numbers = [next(_numbers) for _ in range(size)]
        self._sends(at, numbers)
        data = b"".join(map(pattern, numbers))
        self.command(peer, cdbs.write10(self._lba(at), self._blocks(size)), data)
        self._has_sent(at, numbers)

    def _read(self, peer: SocketInitiator) -> None:
        at, size = self._some()
        self.verify(peer, at, size)

    def verify(self, peer: SocketInitiator, at: int = 0, size: int = 0) -> None:
        """Read, and compare with what must be there; all of it, unless told which units.

        Raises:
            WrongDataError: it is not.
        """
        size = size or self.units
        cdb = cdbs.read10(self._lba(at), self._blocks(size))
        data = self.command(peer, cdb, read=size * UNIT).data
        assert len(data) == size * UNIT, (cdb.hex(), len(data))
        self.judge(self.content, data, at)

    def judge(self, content: list[frozenset[int]], data: bytes, at: int = 0) -> None:
        """Compare units from ``at`` on with what they may have; one that is found whole has that from now on.

        Raises:
            WrongDataError: one has something else.
        """
        for index in range(len(data) // UNIT):
            may, found = content[at + index], data[index * UNIT : (index + 1) * UNIT]
            number = int.from_bytes(found[:8], "big")
            if number in may and found == pattern(number):
                content[at + index] = frozenset((number,))
            elif len(may) == 1 or any(
                found[block : block + 512] not in {pattern(number)[:512] for number in may}
                for block in range(0, UNIT, 512)
            ):
                expected = " or ".join(f"{number:016x}" for number in sorted(may))
                raise WrongDataError(f"{self.name} unit {at + index}: {found[:16].hex()} for {expected}")
            self.verified += UNIT

    def _unmap(self, peer: SocketInitiator) -> None:
        at, size = self._some()
        self._sends(at, [0] * size)
        parameters = cdbs.unmap_parameters([(self._lba(at), self._blocks(size))])
        self.command(peer, cdbs.unmap(len(parameters)), parameters)
        self._has_sent(at, [0] * size)

    def _write_same(self, peer: SocketInitiator) -> None:
        at, size = self._some()
        number = next(_numbers)
        self._sends(at, [number] * size)
        cdb = cdbs.write_same10(self._lba(at), self._blocks(size))
        self.command(peer, cdb, pattern(number)[: self.block])
        self._has_sent(at, [number] * size)

    def _compare_and_write(self, peer: SocketInitiator) -> None:
        at = self.source.randrange(self.units)
        if len(self.content[at]) > 1:
            return
        (expected,), number = self.content[at], next(_numbers)
        self._sends(at, [number])
        data = pattern(expected)[: self.block] + pattern(number)[: self.block]
        for block in range(self._blocks(1)):
            self.command(peer, cdbs.compare_and_write(self._lba(at) + block, 1), data)
        self._has_sent(at, [number])

    def _flush(self, peer: SocketInitiator) -> None:
        self.command(peer, cdbs.synchronize_cache10())

    def _ping(self, peer: SocketInitiator) -> None:
        peer.nop(b"still there?")

    # -- faults -----------------------------------------------------------------------------------

    def _begin_write(self, peer: SocketInitiator) -> int:
        """A write whose data does not come; the tag of its task."""
        at, size = self._some()
        peer.answer_r2ts = False
        data = b"".join(pattern(next(_numbers)) for _ in range(size))
        cdb = cdbs.write10(self._lba(at), self._blocks(size))
        return peer.send_command(cdb, data, immediate_data=0, unsolicited=0).tag

    def _abort(self, peer: SocketInitiator) -> None:
        """What was there stays: none of the data was sent."""
        task = peer.tasks[self._begin_write(peer)]
        answer = peer.task_management(ABORT_TASK, task=task)
        peer.answer_r2ts = True
        if not task.done:
            assert answer in (0, 1), answer
            peer.tasks.pop(task.tag)

    def _reset(self, peer: SocketInitiator) -> None:
        assert peer.task_management(LOGICAL_UNIT_RESET) == 0

    def _relogin(self, peer: SocketInitiator) -> None:
        self.leave()
        self.login()

    def _cut(self, peer: SocketInitiator) -> None:
        """The cable, with a command under way and half of the next in the wire."""
        self._begin_write(peer)
        peer.send(peer.initiator.nop_out(b"x" * 64)[: self.source.randrange(1, 100)])
        peer.close()
        self.peer = None
        self.login()

    def _cut_while_writing(self, peer: SocketInitiator) -> None:
        at, size = self._some()
        numbers = [next(_numbers) for _ in range(size)]
        self._sends(at, numbers)
        data = b"".join(map(pattern, numbers))
        peer.send_command(cdbs.write10(self._lba(at), self._blocks(size)), data)
        peer.close()
        self.peer = None
        self.login()

    def _reinstate(self, peer: SocketInitiator) -> None:
        """The same port logs in again while its old session is there (RFC 7143 §6.3.5)."""
        self.login(peer.another_login())
        peer.close()

    def _half_login(self, peer: SocketInitiator) -> None:
        with SocketInitiator(self.address, timeout_s=PATIENCE_S) as other:
            request = other.initiator.login_request([("InitiatorName", self.name)], transit=False)
            other.send(request[: self.source.randrange(1, len(request))])

    def _garbage(self, peer: SocketInitiator) -> None:
        with SocketInitiator(self.address, timeout_s=PATIENCE_S) as other:
            try:
                other.send(self.source.randbytes(self.source.randrange(1, 4096)))
            except ConnectionClosed:
                pass

    def _garbage_after_login(self, peer: SocketInitiator) -> None:
        """Rubbish where a PDU should be: rejected or thrown out, and back again."""
        try:
            peer.send(b"\x3f" + self.source.randbytes(47))
            peer.nop()
        except (ConnectionClosed, Rejected):
            pass
        peer.close()
        self.peer = None
        self.login()

    def _discover(self, peer: SocketInitiator) -> None:
        with SocketInitiator(self.address, timeout_s=PATIENCE_S) as other:
            try:
                other.login(None, self.name)
                assert any(target.name == self.iqn for target in other.discover())
                other.logout()
            except (ConnectionClosed, LoginFailed):
                pass


_Action = Callable[[Host, SocketInitiator], None]
WORK: dict[_Action, int] = {
    Host._write: 30, Host._read: 40, Host._unmap: 3, Host._write_same: 2, Host._compare_and_write: 4,
    Host._flush: 1, Host._ping: 2,
}  # fmt: skip
FAULTS: dict[_Action, int] = {
    Host._abort: 3, Host._reset: 1, Host._relogin: 2, Host._cut: 2, Host._cut_while_writing: 2,
    Host._reinstate: 1, Host._half_login: 1, Host._garbage: 1, Host._garbage_after_login: 1,
    Host._discover: 1,
}  # fmt: skip
_ACTIONS = list((WORK | FAULTS).keys())
_WEIGHTS = list((WORK | FAULTS).values())
LOST = "connections lost"
ENDED = "sessions ended by an administrator"
FAULT_NAMES = frozenset((*(action.__name__.strip("_") for action in FAULTS), LOST, ENDED))
