"""What is fuzzed: for each entry point a function of bytes that must return, whatever they are.

Any exception is a finding, and so is what ``_over`` looks for when the bytes are spent: that nobody is owed
more than he sent reason for, and that another initiator of the same target is served as if nothing had been.

``make fuzz`` runs them led by coverage (``tests.fuzz``); without atheris the same functions are called with
the corpus and with mutations of it by ``test_harnesses.py``, as part of every test run.
"""

import asyncio
import base64
import json
import logging
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from aiohttp import StreamReader, web
from aiohttp.test_utils import make_mocked_request

from api.app import make_app
from api.auth import Account, Authenticator, hash_password
from protocol import dataout
from protocol.access import Credential
from protocol.bhs import ReadyToTransfer
from protocol.chap import response
from protocol.enums import AuthMethod, Opcode
from protocol.events import LoginRefused
from protocol.limits import KEPT_COST
from protocol.session import SessionTable
from protocol.textkeys import TextError, parse, read_binary, read_number
from targetd.config import validate
from targetd.luc.protocol import Conversation, Policy
from tests.api.engine import MemoryEngine
from tests.initiator import ConnectionClosed, LoginFailed, MemoryPeer, Pdu, frame
from tests.protocol.target import TARGET, Endpoint, MemoryTarget, connection_of
from tests.targetd.test_luc import ALICE, Shelf, fixed_randomness

CORPUS = Path(__file__).parent / "corpus"
SIZE = 1 << 16
"""Bytes of a LUN: every LBA that fits a byte has a chance to be on it or just beyond."""
KEPT = 4 << 20
"""More than this waiting to be sent, and all that commands of the bytes received may read, would be an
amplifier."""
ASKED = 8
"""Inputs of a length that divides by this end with the login of another, which costs as much as they do."""
TEST_UNIT_READY = bytes(6)


def _over(target: MemoryTarget, peer: MemoryPeer, received: int) -> None:
    """The bytes are spent: let time pass, take the connection away, and ask another initiator."""
    connection = connection_of(peer)
    waiting = sum(map(len, connection.data_to_send()))
    assert waiting <= KEPT + received // 48 * 2 * SIZE, f"{waiting} bytes wait to be sent"
    connection.tick(target.now + 21)
    connection.tick(target.now + 200)
    connection.lost("over")
    endpoint = peer.target
    assert isinstance(endpoint, Endpoint)
    endpoint.serve()
    for event in endpoint.events:  # an exception within a login is answered (0300h) and told
        if isinstance(event, LoginRefused) and event.bug is not None:
            raise event.bug
    session = connection.session
    if session is not None:
        assert session.ended
        assert not session.tasks
    if received % ASKED:
        return
    other = target.connect()
    other.login(TARGET, "iqn.2026-11.example:other")
    other.command(TEST_UNIT_READY)


def _deliver(target: MemoryTarget, peer: MemoryPeer, data: bytes) -> None:
    """All of it, in two pieces at a place the data itself names."""
    connection = connection_of(peer)
    cut = data[0] * len(data) // 256 if data else 0
    for piece in (data[:cut], data[cut:]):
        if piece and not connection.closing:
            peer.send(piece)
    _over(target, peer, len(data))


def _pieces(data: bytes) -> list[tuple[int, bytes]]:
    """Flags and text of each request, pieces parted by FFh."""
    return [(piece[0] if piece else 0x80, piece[1:8192]) for piece in data.split(b"\xff")[:16]]


# -- The connection ---------------------------------------------------------------------------------


def before_login(data: bytes) -> None:
    """Any bytes as the first of a connection."""
    target = MemoryTarget(size=SIZE)
    _deliver(target, target.connect(strict=False), data)


def login_text(data: bytes) -> None:
    """Well-formed Login Requests, their flags and text from the data."""
    target = MemoryTarget(size=SIZE)
    peer = target.connect(strict=False)
    for flags, text in _pieces(data):
        if connection_of(peer).closing:
            break
        peer.send(peer.initiator.login_request(text, flags=flags, initiator_task_tag=1))
    _over(target, peer, len(data))


CHAP = Credential("user", b"secret of 16 ch.", "peer", b"another 16 chars")


def chap(data: bytes) -> None:
    """The same where CHAP is owed. ``@R`` in the text becomes the right answer to our challenge, since no
    search would find that; ``@I`` and ``@C`` what we sent, as a reflection would have it."""
    target = MemoryTarget(size=SIZE)
    mutual = bool(data[:1] and data[0] & 1)
    credential = CHAP if mutual else Credential(CHAP.user, CHAP.secret)
    open_grant = target.access.grant
    target.access.grant = replace(open_grant, methods=AuthMethod.CHAP, credentials=(credential,))
    peer = target.connect(strict=False)
    told: dict[str, str] = {}
    for flags, text in _pieces(data[1:]):
        if connection_of(peer).closing:
            break
        if "CHAP_C" in told:
            challenge = bytes.fromhex(told["CHAP_C"].removeprefix("0x"))
            algorithm, identifier = int(told["CHAP_A"]), int(told["CHAP_I"])
            right = response(algorithm, identifier, CHAP.secret, challenge)
            text = text.replace(b"@R", b"0x" + right.hex().encode())
            text = text.replace(b"@I", told["CHAP_I"].encode()).replace(b"@C", told["CHAP_C"].encode())
        peer.send(peer.initiator.login_request(text, flags=flags, initiator_task_tag=1))
        for pdu in peer.pending():
            if pdu.opcode == Opcode.LOGIN_RESPONSE:
                told.update(pdu.text)
    target.access.grant = open_grant
    _over(target, peer, len(data))


def after_login(data: bytes) -> None:
    """Any bytes in full feature phase."""
    target = MemoryTarget(size=SIZE)
    _deliver(target, target.logged_in(strict=False), data)


def digests(data: bytes) -> None:
    """The same with both digests: headers from the data, digests right but where the data says otherwise."""
    target = MemoryTarget(size=SIZE)
    peer = target.logged_in(strict=False, keys={"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"})
    connection = connection_of(peer)
    for at in range(0, min(len(data), 49 * 16), 49):
        if connection.closing or connection.session is None:
            break
        spoilt, header = data[at], data[at + 1 : at + 49].ljust(48, b"\0")
        body = header[32:48] * (header[7] % 5)
        header = header[:4] + len(body).to_bytes(4, "big") + header[8:]
        if header[0] & 0x3F != Opcode.SCSI_DATA_OUT:
            header = header[:24] + connection.session.exp_cmd_sn.to_bytes(4, "big") + header[28:]
        pdu = bytearray(frame(header, body, header_digest=True, data_digest=True))
        if spoilt & 1:
            pdu[48 + (spoilt >> 1) % (len(pdu) - 48)] ^= 0x10
        peer.send(bytes(pdu))
    _over(target, peer, len(data))


def pdus(data: bytes) -> None:
    """Headers from the data, 48 bytes each, with lengths and CmdSN made right so that they get somewhere.

    Work for threads is held back from the start and done where a header says so, as a slow medium would."""
    target = MemoryTarget(size=SIZE)
    peer = target.logged_in(strict=False)
    peer.answer_r2ts = False
    connection = connection_of(peer)
    target.lane.hold = True
    for at in range(0, min(len(data), 48 * 32), 48):
        header = bytearray(data[at : at + 48].ljust(48, b"\0"))
        body = bytes(header[32:48]) * (header[7] % 65)
        header[4:8] = len(body).to_bytes(4, "big")
        if connection.session is None or connection.closing:
            break
        if header[0] & 0x80:
            target.lane.release()
        if header[0] & 0x3F != Opcode.SCSI_DATA_OUT:
            header[24:28] = connection.session.exp_cmd_sn.to_bytes(4, "big")
        peer.send(bytes(header) + body)
    target.lane.release()
    target.lane.hold = False
    _over(target, peer, len(data))


STEP = 49
"""What to do, and a header."""


class _Recovering:
    """A session of level 1 or 2, with digests and with little memory for writes as the first byte says."""

    def __init__(self, how: int) -> None:
        self.level = 1 + (how & 1)
        self.digests = "CRC32C" if how & 2 else "None"
        self.target = MemoryTarget(
            size=SIZE,
            error_recovery_level=2,
            max_connections=2,
            default_time2wait=2,
            default_time2retain=20,
            initial_r2t=bool(how & 8),
            max_burst_length=1024,
            first_burst_length=1024,
            max_recv_data_segment_length=512,
        )
        keys = {
            "ErrorRecoveryLevel": str(self.level),
            "MaxConnections": "2",
            "DefaultTime2Wait": "2",
            "DefaultTime2Retain": "20",
            "HeaderDigest": self.digests,
            "DataDigest": self.digests,
        }
        self.peers = [self.target.logged_in(strict=False, keys=keys)]
        self.r2t: Pdu | None = None

    def send(self, peer: MemoryPeer, what: int, header: bytearray) -> None:
        """One PDU, with numbers that get somewhere: CmdSN in turn, tags of a few, Data-Out as asked for."""
        connection = connection_of(peer)
        session = connection.session
        if connection.closing or session is None:
            return
        body = bytes(header[32:48]) * (header[7] % 33)
        header[4:8] = len(body).to_bytes(4, "big")
        header[16:19] = b"\0\0\0"
        header[19] &= 7
        opcode = header[0] & 0x3F
        if opcode != Opcode.SCSI_DATA_OUT:
            header[24:28] = session.exp_cmd_sn.to_bytes(4, "big")
        elif what & 0x08 and self.r2t is not None:
            asked = self.r2t.expect(ReadyToTransfer)
            offset = asked.buffer_offset + (header[47] & 3) * 512
            header[16:24] = asked.initiator_task_tag.to_bytes(4, "big") + asked.target_transfer_tag.to_bytes(
                4, "big"
            )
            header[36:48] = bytes(3) + bytes((header[47] & 3,)) + offset.to_bytes(4, "big") + bytes(4)
        header[28:32] = (connection.stat_sn - (what >> 4 & 7) & 0xFFFFFFFF).to_bytes(4, "big")
        digests = self.digests != "None"
        pdu = bytearray(frame(bytes(header), body, header_digest=digests, data_digest=digests))
        if what & 7 == 3:
            pdu[48 + header[46] % max(1, len(pdu) - 48) if digests else header[46] % 48] ^= 0x10
        peer.send(bytes(pdu))

    def join(self, what: int) -> None:
        """One more connection, or one in the place of another, whether that was cut or not."""
        peer = self.target.connect(session=self.peers[0].session, strict=False)
        peer.initiator.cid = 1 + (what >> 4 & 3)
        try:
            peer.login(TARGET, keys={"HeaderDigest": self.digests, "DataDigest": self.digests})
        except (LoginFailed, ConnectionClosed):
            return
        self.peers.append(peer)

    def look(self) -> None:
        """Take what the target says, and hold it to its own accounts."""
        for peer in self.peers:
            self.r2t = next(
                (pdu for pdu in peer.pending() if pdu.opcode == Opcode.READY_TO_TRANSFER), self.r2t
            )
            recovery = connection_of(peer).recovery
            if recovery is not None:
                pdus = [pdu for sent in recovery.sent.values() for pdu in sent.pdus.values()]
                kept = sum(KEPT_COST + len(data) for _, data in [*pdus, *recovery.answers.values()])
                kept += sum(len(outcome.data_in) for outcome in recovery.waiting.values())
                assert recovery.size == kept, f"{kept} bytes are kept, {recovery.size} counted"


def recovery(data: bytes) -> None:
    """Error recovery levels 1 and 2: PDUs lost and damaged, SNACKs, time that passes, connections cut and
    others that take their place."""
    how = data[0] if data else 0
    with ExitStack() as stack:
        if how & 4:
            stack.enter_context(patch.object(dataout, "LARGE_COMMAND", 512))
            stack.enter_context(patch.object(SessionTable, "in_flight", return_value=2048))
        run = _Recovering(how)
        target = run.target
        for at in range(1, min(len(data), STEP * 24), STEP):
            what, header = data[at], bytearray(data[at + 1 : at + STEP].ljust(48, b"\0"))
            peer = run.peers[-1 - (header[46] >> 6) % len(run.peers)]
            match what & 7:
                case 4:
                    target.pass_time(3.0)
                case 5:
                    connection_of(peer).lost("cut")
                    target.lane.hold = True
                case 6:
                    target.lane.hold = False
                    target.lane.release()
                case 7:
                    run.join(what)
                case _:
                    run.send(peer, what, header)
            run.look()
        target.lane.hold = False
        target.lane.release()
        for peer in run.peers:
            connection_of(peer).lost("over")
        target.pass_time(100.0)
        assert not any(unit.tasks for unit in target.units)
        _over(target, run.peers[0], len(data))


def text_requests(data: bytes) -> None:
    """Text Requests in full feature phase, pieces parted by FFh."""
    target = MemoryTarget(size=SIZE)
    peer = target.logged_in(strict=False)
    for flags, text in _pieces(data):
        peer.send(peer.initiator.text_request(text, flags=flags, initiator_task_tag=9))
    _over(target, peer, len(data))


# -- Commands ---------------------------------------------------------------------------------------


def commands(data: bytes) -> None:
    """CDB of 16 bytes (32 for 7Fh) and, behind it, the data to write; FFFFh parts commands."""
    target = MemoryTarget(luns=2, size=SIZE)
    peer = target.logged_in(strict=False)
    for part in data.split(b"\xff\xff")[:8]:
        size = 32 if part[:1] == b"\x7f" else 16
        _command(peer, part[:size].ljust(size, b"\0"), part[size : size + 4096])
    _over(target, peer, len(data))


def _command(peer: MemoryPeer, cdb: bytes, parameters: bytes) -> None:
    if connection_of(peer).closing:
        return
    write = bool(parameters)
    expected = len(parameters) if write else 65535
    peer.send(peer.initiator.scsi_command(cdb, parameters, write=write, read=not write, expected=expected))


LISTS: tuple[tuple[str, int, int], ...] = (
    ("42000000000000000000", 7, 2),  # UNMAP
    ("15100000000000", 4, 1),  # MODE SELECT(6)
    ("15110000000000", 4, 1),
    ("55100000000000000000", 7, 2),  # MODE SELECT(10)
    ("55110000000000000000", 7, 2),
    *((f"5f{action:02x}{kind:02x}00000000000000", 5, 4) for action in range(9) for kind in (0, 1, 3, 5, 7)),
    ("83000000000000000000000000000000", 10, 4),  # EXTENDED COPY(LID1)
    ("83100000000000000000000000000000", 10, 4),  # POPULATE TOKEN
    ("83110000000000000000000000000000", 10, 4),  # WRITE USING TOKEN
    ("48010000000000000000", 7, 2),  # SANITIZE, OVERWRITE
    ("48020000000000000000", 7, 2),
    ("4c000000000000000000", 7, 2),  # LOG SELECT
    ("3b0a0000000000000000", 6, 3),  # WRITE BUFFER, echo
    ("a406000000000000000000000000", 6, 4),  # SET IDENTIFYING INFORMATION
    ("a40a000000000000000000000000", 6, 4),  # SET TARGET PORT GROUPS
    ("89000000000000000000000000010000", 13, 1),  # COMPARE AND WRITE
    ("93080000000000000000000000010000", 13, 1),  # WRITE SAME(16), UNMAP
)
"""CDB, and where its parameter list length stands: offset and bytes."""


def parameter_lists(data: bytes) -> None:
    """A command of those with a parameter list, named by the first byte; its list, with the length made
    right; and the command that tells what came of it."""
    target = MemoryTarget(luns=2, size=SIZE)
    peer = target.logged_in(strict=False)
    for part in data.split(b"\xff\xff\xff")[:6]:
        if not part:
            continue
        text, at, width = LISTS[part[0] % len(LISTS)]
        cdb = bytearray(bytes.fromhex(text).ljust(16, b"\0"))
        parameters = part[1:4097]
        if cdb[0] not in (0x89, 0x93):
            cdb[at : at + width] = (len(parameters) & (256**width - 1)).to_bytes(width, "big")
        _command(peer, bytes(cdb), parameters)
    for cdb_text in (
        "84030000000000000000000000ff",
        "84070000000000000000000000ff",
        "5e000000000000ffff",
        "03000000ff",
    ):
        _command(peer, bytes.fromhex(cdb_text).ljust(16, b"\0"), b"")
    _over(target, peer, len(data))


# -- Text, the controller, the API ------------------------------------------------------------------


def text_keys(data: bytes) -> None:
    """The text of keys, and values read as numbers and binary (CHAP)."""
    try:
        pairs = parse(data)
    except TextError:
        return
    for _, value in pairs:
        for read in (read_number, lambda text: read_binary(text, 1024)):
            try:
                read(value)
            except TextError:
                pass


def _at_once(work: Coroutine[Any, Any, bytes]) -> bytes:
    """What comes of a coroutine that waits for nobody: ``Shelf`` has all answers."""
    try:
        work.send(None)
    except StopIteration as over:
        answer: bytes = over.value
        return answer
    raise AssertionError("it waits")


def luc_lines(data: bytes) -> None:
    """Bytes to the logical unit controller; the first one says what login it asks for and how they come."""
    how = data[0] if data else 0
    policy = Policy(("None", "Auto", "CHAP", "CHAP Mutual")[how % 4], (ALICE,))
    conversation = Conversation(Shelf(policy), fixed_randomness, "127.0.0.1", "127.0.0.2")
    step = how >> 2 or len(data) or 1
    answered = 0
    for at in range(1, len(data), step):
        if conversation.closing:
            break
        answered += len(_at_once(conversation.receive(data[at : at + step])))
    assert answered <= 4096 * (1 + len(data)), "an amplifier"


class _Application:
    """The API over an engine in memory, asked without sockets."""

    def __init__(self) -> None:
        self.engine = MemoryEngine()
        self.first = self.engine.configuration
        self.runner = asyncio.Runner()
        account = Account("root", hash_password("secret"))
        self.app = make_app(self.engine, Authenticator({"root": account}), version="0")
        self.app.freeze()
        model = make_mocked_request("GET", "/", app=self.app)
        # Mocks are slow to make, and these hold nothing.
        self.mocks = {"protocol": model.protocol, "transport": model.transport, "writer": model.writer}
        self.token = "Basic " + base64.b64encode(b"root:secret").decode()

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> web.StreamResponse:
        try:
            return self.runner.run(self._ask(method, path, body, headers))
        finally:
            for mock in self.mocks.values():  # each remembers every call, with what it was given
                mock.reset_mock()

    async def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> web.StreamResponse:
        payload = StreamReader(self.mocks["protocol"], 1 << 21, loop=asyncio.get_running_loop())
        payload.feed_data(body)
        payload.feed_eof()
        headers = {"Authorization": self.token, "Content-Length": str(len(body)), **headers}
        request = make_mocked_request(
            method, path, headers, app=self.app, payload=payload, client_max_size=1 << 20, **self.mocks
        )
        return await self.app._handle(request)


_application: list[_Application] = []
RESOURCES = (
    "extent", "authorizedinitiator", "authcredential", "target", "portal", "targettoextent", "targetgroup",
    "globalconfiguration",
)  # fmt: skip
METHODS = ("POST", "PUT", "DELETE")
KINDS = ("application/json", "", "text/json; charset=utf-16", "application/json; charset=x", "text/xml")


def api_bodies(data: bytes) -> None:
    """Bodies, parted by FFh: the first byte of each names resource, method and how it is declared. What is
    no body is a 4xx, what is taken leaves a configuration that is one and that every GET can show."""
    if not _application:
        logging.getLogger("audit").setLevel(logging.CRITICAL)
        logging.getLogger("api").setLevel(logging.CRITICAL)
        _application.append(_Application())
    (application,) = _application
    application.engine.configuration = application.first
    for part in data.split(b"\xff")[:8]:
        how = part[0] if part else 0
        resource, method = RESOURCES[how & 7], METHODS[(how >> 3) % 3]
        path = f"/api/v1.0/services/iscsi/{resource}/"
        if method != "POST" and resource != "globalconfiguration":
            path += "1/"
        kind = KINDS[(how >> 5) % len(KINDS)]
        reply: Any = application.ask(method, path, part[1:], {"Content-Type": kind} if kind else {})
        assert reply.status < 500, f"{method} {path}: {reply.status} {reply.text}"
        validate(application.engine.configuration)
        shown: Any = application.ask("GET", path, b"", {})
        assert shown.status in (200, 404, 405), f"GET {path}: {shown.status} {shown.text}"


HARNESSES: dict[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (
        before_login, login_text, chap, after_login, digests, pdus, recovery, text_requests, commands,
        parameter_lists, text_keys, luc_lines, api_bodies,
    )
}  # fmt: skip

DRIVES: dict[str, str] = {
    "before_login": "protocol/framer.py protocol/login.py",
    "login_text": "protocol/login.py protocol/negotiation.py",
    "chap": "protocol/login.py protocol/chap.py",
    "after_login": "protocol/framer.py protocol/connection.py",
    "digests": "protocol/framer.py protocol/connection.py protocol/digest.py",
    "pdus": "protocol/connection.py protocol/dataout.py protocol/session.py protocol/management.py",
    "recovery": "protocol/recovery.py protocol/dataout_recovery.py protocol/allegiance.py",
    "text_requests": "protocol/text.py",
    "commands": "protocol/scsi/unit.py protocol/scsi/block.py protocol/scsi/control.py"
    " protocol/scsi/inquiry.py",
    "parameter_lists": "protocol/scsi/provisioning.py protocol/scsi/mode.py protocol/scsi/reserve.py"
    " protocol/scsi/thirdparty.py protocol/scsi/odx.py",
    "text_keys": "protocol/textkeys.py",
    "luc_lines": "targetd/luc/protocol.py",
    "api_bodies": "api/fields.py api/errors.py api/resources/*.py",
}
"""Harness → the modules that it is for."""


def seeds(name: str) -> list[bytes]:
    """What to begin with: the corpus of a harness."""
    path = CORPUS / f"{name}.json"
    return [bytes.fromhex(text) for text in json.loads(path.read_text(encoding="utf-8"))]
