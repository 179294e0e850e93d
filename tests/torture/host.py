"""One initiator host of the torture: a soak's host behind a wire that flips bits, which bears what an
administrator does to its disk.

It knows which medium it is at, and what a block is there, as a host in the field does: after a login and
after every unit attention it reads the capacity and a label before it does anything else. So each write is
known to belong on one medium, at one place; a target that carries one command out on another medium, or by
another block size, before it has told so, is found out.
"""

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from protocol.enums import LogoutReason, ScsiStatus
from tests import cdbs
from tests.functional.recovering import DamagingProxy
from tests.functional.test_edits import NO_BLOCK, NO_MEDIUM, NO_UNIT, PROTECTED, SECRET
from tests.initiator import (
    Breach,
    ConnectionClosed,
    LoginFailed,
    Rejected,
    Reply,
    SessionState,
    SocketInitiator,
)
from tests.initiator_recovery import RecoveringSocket
from tests.soak.host import LOST, PATIENCE_S, RETRIES, UNIT, UNIT_ATTENTION, WORK, Host, WrongDataError

__all__ = ["FAULT_NAMES", "LABEL_AT", "UNITS", "HangError", "PatientHost", "label"]

UNITS = 16
"""Of a host, on every medium."""
LABEL_AT = (1 << 20) - UNIT
"""Bytes from the start of a medium to its label: in the first MiB, which no edit takes away."""
LABEL = b"torture!"
IDLE_S = 1.0
"""Above level 0: silence after which what is missing is asked for again."""
PAUSE_S, LOGIN_PAUSE_S = 0.02, 0.5
LOGIN_PATIENCE_S = 180.0
"""Over edits that lock everybody out, kills and starts."""
ENDED = {NO_UNIT, NO_MEDIUM, NO_BLOCK, PROTECTED}
"""(ASC, ASCQ) of commands that an edit ends, which may be while one is carried out."""
UNMAP, NO_COMMAND = 0x42, (0x20, 0x00)
"""An extent that is edited to have all its space allocated unmaps none."""
REFUSED, ATTENTIONS, DAMAGED = (
    "refused while edited",
    "unit attentions",
    "connections given up for a flipped bit",
)
LOGINS = "logins tried again"
_CONFLICTS = {
    ScsiStatus.BUSY,
    ScsiStatus.RESERVATION_CONFLICT,
    ScsiStatus.TASK_SET_FULL,
    ScsiStatus.TASK_ABORTED,
}


class HangError(Exception):
    """No answer in a time in which there must be one."""


class RefusedError(Exception):
    """The command was not carried out, and why; ``harmless``: not a byte of it."""

    def __init__(self, why: str, *, harmless: bool) -> None:
        super().__init__(why)
        self.harmless = harmless


def label(medium: int) -> bytes:
    """The unit that tells which medium this is."""
    return (LABEL + medium.to_bytes(8, "big")) * (UNIT // 16)


class PatientSocket(RecoveringSocket):
    """Recovers for as long as a host is patient."""

    def idle(self, error: Exception) -> None:
        if isinstance(error, TimeoutError) and time.monotonic() > self.deadline:
            raise HangError(f"no answer for {PATIENCE_S} s at level {self.keys['ErrorRecoveryLevel']}")
        super().idle(error)

    def send(self, data: bytes) -> None:
        self.socket.settimeout(PATIENCE_S)
        super().send(data)
        self.socket.settimeout(IDLE_S if self.session.tsih else PATIENCE_S)

    def wait(self, task: Any) -> Reply:
        self.deadline = time.monotonic() + PATIENCE_S
        return super().wait(task)


class PatientHost(Host):
    """An initiator at one error recovery level (RFC 7143 §7.1.4)."""

    units = UNITS

    def __init__(
        self,
        one_in: int,
        address: tuple[str, int],
        iqn: str,
        name: str,
        region: int,
        level: int,
        source: random.Random,
    ) -> None:
        super().__init__(address, iqn, name, region * UNITS * UNIT // 512, source)
        self.level = level
        self.relay = DamagingProxy(address, one_in, source.randrange(1 << 32))
        self.session = SessionState()
        self.contents: defaultdict[int, list[frozenset[int]]] = defaultdict(
            lambda: [frozenset((0,))] * self.units
        )
        """Medium → what must be in our part of it."""
        self.medium: int | None = None
        """None: to be asked for."""
        self.damage_before = 0
        self.history: deque[str] = deque(maxlen=80)
        """What was sent, and how it ended: told with a wrong byte."""
        actions = WORK | (PLAIN_FAULTS if level == 0 else LOSSY_FAULTS)
        if level:
            del actions[Host._ping]
        self._actions, self._weights = list(actions), list(actions.values())

    # -- sessions ---------------------------------------------------------------------------------

    def login(self, peer: SocketInitiator | None = None) -> SocketInitiator:
        """Log in through the relay, trying again while an edit locks us out or nobody listens.

        It is always the same port, so that the session before it, if it is there still, ends first (RFC 7143
        §6.3.5), and with it each command that it had under way.
        """
        deadline = time.monotonic() + LOGIN_PATIENCE_S
        pause = 2 * PAUSE_S
        while True:
            if peer is None:
                peer = self._connect()
            try:
                self._log_in(peer)
            except (LoginFailed, ConnectionClosed) as error:
                peer.close()
                if time.monotonic() > deadline:
                    raise HangError(f"{self.name}: no login for {LOGIN_PATIENCE_S} s: {error}") from error
            else:
                self.peer, self.medium = peer, None
                self.damage_before = self.damaged
                return peer
            peer = None
            self.done[LOGINS] += 1
            time.sleep(pause)
            pause = min(2 * pause, LOGIN_PAUSE_S)

    def _connect(self) -> SocketInitiator:
        self.relay.covered = (self.source.random() < 0.8, self.source.random() < 0.8)
        fresh = SessionState(isid=self.session.isid)
        kind = PatientSocket if self.level else SocketInitiator
        return kind(self.relay.address, timeout_s=PATIENCE_S, session=fresh)

    def _log_in(self, peer: SocketInitiator) -> None:
        offer = dict(zip(("HeaderDigest", "DataDigest"), self._digests(), strict=True))
        offer["ErrorRecoveryLevel"] = str(self.level)
        offer["MaxRecvDataSegmentLength"] = "8192"
        if self.source.random() < 0.5:
            offer |= {"ImmediateData": "No", "InitialR2T": "Yes", "MaxBurstLength": "16384"}
            offer["FirstBurstLength"] = "16384"
        peer.login(self.iqn, self.name, keys=offer, chap=SECRET)
        for key in ("HeaderDigest", "DataDigest", "ErrorRecoveryLevel"):
            assert peer.keys[key] == offer[key], (key, offer, peer.keys)

    def _digests(self) -> tuple[str, ...]:
        return tuple("CRC32C" if covered else "None" for covered in self.relay.covered)

    def leave(self) -> None:
        try:
            super().leave()
        except (TimeoutError, Breach, Rejected):
            self._give_up()

    def close(self) -> None:
        """Log out, and take the relay away."""
        self.leave()
        self.relay.__exit__(None, None, None)

    @property
    def damaged(self) -> int:
        """PDUs that the wire has damaged."""
        return sum(self.relay.damaged.values())

    def _give_up(self) -> None:
        if self.peer is not None:
            self.peer.close()
            self.peer = None

    # -- one step ---------------------------------------------------------------------------------

    def step(self) -> None:
        """Something at random, once."""
        (action,) = self.source.choices(self._actions, self._weights)
        self.attempt(action)

    def attempt(self, action: Callable[[Any, SocketInitiator], None]) -> bool:
        """Whether it was carried out."""
        content, before = self.content, list(self.content)
        self.history.append(action.__name__)
        try:
            peer = self.peer or self.login()
            if self.medium is None:
                self.probe(peer)
            content, before = self.content, list(self.content)
            action(self, peer)
        except RefusedError as refused:
            self.history.append(f"refused: {refused}")
            if refused.harmless and action is not Host._compare_and_write:
                content[:] = before
            self.done[REFUSED] += 1
            time.sleep(PAUSE_S)
        except ConnectionClosed:
            self.history.append("connection lost")
            self._give_up()
            self.done[LOST] += 1
        except WrongDataError as error:
            error.add_note("\n".join(self.history))
            raise
        except ConnectionRefusedError:
            self.done[LOST] += 1  # nobody listens: a second connection, beside the relay
        except (Breach, Rejected) as error:
            # At level 0 a bit flipped is the end of the connection; nothing else may break a rule.
            if self.damaged == self.damage_before:
                raise
            if isinstance(error, Breach) and "digest" not in str(error):
                raise
            self._give_up()
            self.done[DAMAGED] += 1
        except TimeoutError as error:
            if self.level == 0 or self.damaged == self.damage_before:
                raise HangError(f"{self.name}: {action.__name__}: no answer for {PATIENCE_S} s") from error
            self._give_up()  # of what is not repeated: only commands are
            self.done[DAMAGED] += 1
        else:
            self.done[action.__name__.strip("_")] += 1
            return True
        return False

    def verify_all(self) -> None:
        """All of our part of the medium that is there, however often it takes."""
        deadline = time.monotonic() + LOGIN_PATIENCE_S
        while not self.attempt(Host.verify):
            if time.monotonic() > deadline:
                raise HangError(f"{self.name}: nothing to be read for {LOGIN_PATIENCE_S} s")

    def judge_file(self, medium: int, data: bytes) -> None:
        """Our part of a medium, from the file."""
        start = self.base * 512
        self.judge(self.contents[medium], data[start : start + self.units * UNIT])

    # -- commands ---------------------------------------------------------------------------------

    def command(self, peer: SocketInitiator, cdb: bytes, data: bytes = b"", read: int = 0) -> Reply:
        """To its end, past unit attentions that change nothing for us.

        Raises:
            RefusedError: an edit is in the way, or the medium or its blocks have become others.
        """
        where = self.medium, self.block
        for _ in range(RETRIES):
            reply = peer.command(cdb, data, read)
            if self._attention(reply):
                self.probe(peer)
                if (self.medium, self.block) != where:
                    raise RefusedError("another medium or block size", harmless=True)
                continue
            return self._good(cdb, reply)
        raise AssertionError(f"{cdb.hex()}: unit attentions without end")

    def probe(self, peer: SocketInitiator) -> None:
        """Ask for the size of a block, and which medium it is."""
        self.medium = None
        for _ in range(RETRIES):
            cdb = cdbs.read_capacity16()
            reply = peer.command(cdb, read=32)
            if self._attention(reply):
                continue
            self.block = int.from_bytes(self._good(cdb, reply).data[8:12], "big")
            cdb = cdbs.read10(LABEL_AT // self.block, UNIT // self.block)
            reply = peer.command(cdb, read=UNIT)
            if self._attention(reply):
                continue
            found = self._good(cdb, reply).data
            medium = int.from_bytes(found[8:16], "big")
            if found == bytes(UNIT):
                raise RefusedError("a medium of no label: that of an edit to Memory", harmless=True)
            assert found == label(medium), f"{self.name}: half a label: {found[:32].hex()}"
            self.medium, self.content = medium, self.contents[medium]
            self.history.append(f"  at medium {medium}, block {self.block}")
            return
        raise AssertionError("unit attentions without end")

    def _sends(self, at: int, numbers: list[int]) -> None:
        super()._sends(at, numbers)
        spelt = " ".join(f"{number:x}" for number in numbers)
        self.history.append(f"  medium {self.medium}, block {self.block}, unit {at}: {spelt}")

    def _attention(self, reply: Reply) -> bool:
        told = reply.status == ScsiStatus.CHECK_CONDITION and reply.sense_key == UNIT_ATTENTION
        self.done[ATTENTIONS] += told
        return told

    def _good(self, cdb: bytes, reply: Reply) -> Reply:
        if reply.status == ScsiStatus.GOOD:
            assert reply.residuals == (0, 0), f"{self.name}: {cdb.hex()}: not all of it: {reply.residuals}"
            return reply
        said = f"{cdb.hex()}: {reply}"
        thick = cdb[0] == UNMAP and reply.additional_sense == NO_COMMAND
        if thick or reply.status == ScsiStatus.RESERVATION_CONFLICT:
            raise RefusedError(said, harmless=True)
        if reply.additional_sense in ENDED or reply.status in _CONFLICTS:
            raise RefusedError(said, harmless=False)
        raise AssertionError(f"{self.name}: {said}")

    # -- more that a host does --------------------------------------------------------------------

    def _abort(self, peer: SocketInitiator) -> None:
        """What was there stays: none of the data was sent."""
        task = peer.tasks[self._begin_write(peer)]
        peer.task_management(1, task=task)
        peer.answer_r2ts = True
        peer.tasks.pop(task.tag, None)
        if task.reply is not None and self._attention(task.reply):
            self.medium = None  # what it told is told once

    def _reserve(self, peer: SocketInitiator) -> None:
        """For one write; whoever comes meanwhile has a conflict."""
        self.command(peer, cdbs.reserve6())
        try:
            self._write(peer)
        except RefusedError:
            self._release(peer)
            raise
        self._release(peer)

    def _release(self, peer: SocketInitiator) -> None:
        while self._attention(peer.command(cdbs.release6())):
            self.medium = None

    def _log_out(self, peer: SocketInitiator) -> None:
        """Of the connection; the next step logs in."""
        peer.logout(LogoutReason.CLOSE_SESSION)
        self._give_up()


PLAIN_FAULTS: dict[Any, int] = {
    PatientHost._abort: 2, PatientHost._reserve: 2, PatientHost._log_out: 2, Host._cut: 2,
    Host._cut_while_writing: 4, Host._half_login: 1, Host._garbage: 1, Host._garbage_after_login: 1,
}  # fmt: skip
LOSSY_FAULTS: dict[Any, int] = {
    Host._cut: 2, Host._cut_while_writing: 4, Host._half_login: 1, Host._garbage: 1,
}  # fmt: skip
FAULT_NAMES = frozenset(
    (*(action.__name__.strip("_") for action in PLAIN_FAULTS if action is not PatientHost._reserve),
     LOST, REFUSED, ATTENTIONS, DAMAGED, LOGINS)
)  # fmt: skip
