"""The login phase as a state machine (RFC 7143 §6.3, §11.12, §11.13). Sans-IO; asks an ``Authorizer``.

One machine serves one connection: ``receive`` takes each Login Request and makes its one response. Stages
follow ``_NEXT``; what must be true before a stage may be left is in ``_may_leave``. Every way to fail is a
``ProtocolViolation`` with a status of §11.13.5, which becomes the reply in one place, or a ``Refusal`` by
those who know accounts, targets and sessions.

Rules:

* Until a peer has proven itself everything it can make us keep is bounded (``LoginLimits``).
* Who may not log in learns no more than the status; the reason in words is for the operator.
* A CHAP exchange that has begun must succeed; there is no way round it through another stage.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from protocol import chap, names
from protocol.access import Authorizer, Credential, Grant, Refusal, SessionDirectory
from protocol.bhs import LoginRequest
from protocol.enums import AuthMethod, LoginStage, LoginStatus
from protocol.errors import ProtocolViolation
from protocol.limits import MAX_CHAP_BINARY, MAX_LOGIN_DATA, LoginLimits
from protocol.negotiation import (
    KEYS,
    SECURITY_KEYS,
    TARGET_KEYS,
    ConnectionKeys,
    Negotiator,
    SessionKeys,
)
from protocol.textkeys import TextError, build, cut, encode_binary, parse, read_binary, read_number

__all__ = ["LoginMachine", "LoginReply", "LoginResult"]

VERSION = 0
"""The only version there is (RFC 7143 §11.12.4)."""

_TRANSIT = 0x80
_CONTINUE = 0x40

_NEXT: dict[int, tuple[int, ...]] = {
    LoginStage.SECURITY: (LoginStage.OPERATIONAL, LoginStage.FULL_FEATURE),
    LoginStage.OPERATIONAL: (LoginStage.FULL_FEATURE,),
}
"""CSG → the NSGs that may follow (RFC 7143 §11.12.3)."""

_IDENTITY = frozenset(("InitiatorName", "InitiatorAlias", "TargetName", "SessionType"))
"""Who and what; some initiators say it again in the next stage, which is harmless if it is the same."""
_NEVER = TARGET_KEYS | {"SendTargets"}
"""Keys that no Login Request may carry."""


@dataclass(frozen=True, slots=True)
class LoginResult:
    """A login that succeeds."""

    initiator_name: str
    initiator_alias: str
    isid: bytes
    requested_tsih: int
    """0: a new session is wanted."""
    cid: int
    discovery: bool
    grant: Grant
    session_keys: SessionKeys
    connection_keys: ConnectionKeys
    user: str
    """The CHAP user; empty without CHAP."""

    @property
    def leading(self) -> bool:
        """The first connection of its session."""
        return self.requested_tsih == 0


@dataclass(slots=True)
class LoginReply:
    """What a Login Response says; numbering is the connection's."""

    flags: int = 0
    tsih: int = 0
    status: LoginStatus = LoginStatus.SUCCESS
    data: bytes = b""
    version_active: int = VERSION
    result: LoginResult | None = None
    """Set when full feature phase begins with this reply."""
    reason: str = ""
    """Why a login was refused, in words for the operator."""
    bug: Exception | None = None
    """What nobody foresaw (0300h), for the owner's log."""


class _Proof(Enum):
    """How far authentication has come."""

    OPEN = "no method chosen"
    NONE = "AuthMethod=None"
    ALGORITHM = "CHAP chosen, CHAP_A awaited"
    CHALLENGED = "challenge sent, CHAP_N and CHAP_R awaited"
    DONE = "CHAP succeeded"
    MUTUAL = "CHAP succeeded, and we answered its challenge with the peer secret"


_PROVEN = (_Proof.DONE, _Proof.MUTUAL)


@dataclass(slots=True)
class _Chap:
    """One CHAP exchange."""

    algorithm: int = 0
    identifier: int = 0
    challenge: bytes = field(default=b"", repr=False)


class LoginMachine:
    """The login of one connection."""

    def __init__(
        self,
        authorizer: Authorizer,
        directory: SessionDirectory,
        randomness: Callable[[int], bytes],
        limits: LoginLimits,
    ) -> None:
        """
        Args:
            directory: asked once, when the login is about to succeed.
            randomness: n → n bytes that nobody can predict.
        """
        self._authorizer = authorizer
        self._directory = directory
        self._randomness = randomness
        self._limits = limits
        self.initiator_name = ""
        self.initiator_alias = ""
        self.target_name = ""
        self._discovery = False
        self.first: LoginRequest | None = None
        """Its ISID, TSIH, CID and tag hold for the whole login (RFC 7143 §11.12.5 to 11.12.7)."""
        self._stage: int | None = None
        self._grant: Grant | None = None
        self._negotiator: Negotiator | None = None
        self._proof = _Proof.OPEN
        self._chap = _Chap()
        self._user = ""
        self._told_alias = False
        self._seen: dict[str, str] = {}
        self._gathered = bytearray()
        self._unsent: bytes = b""
        self._pdus = 0
        self._bytes = 0

    # -- one request, one reply ---------------------------------------------------------------

    @property
    def so_far(self) -> str:
        """How far authentication has come, in words for the operator."""
        return self._proof.value

    def receive(self, request: LoginRequest, data: bytes | memoryview) -> LoginReply:
        """Take one Login Request. A reply with a status that is no success ends the connection."""
        try:
            return self._receive(request, data)
        except ProtocolViolation as violation:
            status = violation.reason
            if not isinstance(status, LoginStatus):
                status = LoginStatus.INITIATOR_ERROR
            return LoginReply(status=status, reason=violation.message, tsih=request.tsih)
        except Exception as error:  # whatever it is, it is this login's end and nobody else's
            status, reason = LoginStatus.TARGET_ERROR, f"a bug of ours: {error!r}"
            return LoginReply(status=status, reason=reason, tsih=request.tsih, bug=error)

    def _receive(self, request: LoginRequest, data: bytes | memoryview) -> LoginReply:
        self._judge_header(request, len(data))
        csg = request.flags >> 2 & 3
        if self._unsent:
            if data or request.flags & _CONTINUE:
                raise _bad("a login answer under way was interrupted")
            return self._reply(request, self._unsent)
        self._gathered += data
        if request.flags & _CONTINUE:
            return LoginReply(flags=csg << 2, tsih=request.tsih)
        try:
            pairs = parse(self._gathered)
        except TextError as error:
            raise _bad(str(error)) from None
        self._gathered.clear()
        grant_or_refusal = self._grant or self._identify(request, pairs)
        if isinstance(grant_or_refusal, Refusal):
            return self._refuse(grant_or_refusal, request)
        answers = self._answer(csg, pairs)
        if csg == LoginStage.OPERATIONAL:
            self._demand_proof()
        return self._reply(request, build(answers))

    def _judge_header(self, request: LoginRequest, size: int) -> None:
        """Everything that can be said before the text is looked at."""
        self._pdus += 1
        self._bytes += size
        limits = self._limits
        if self._pdus > limits.pdus or self._bytes > limits.bytes:
            raise _bad(f"more than {limits.pdus} PDUs or {limits.bytes} bytes of login")
        if request.version_min > VERSION:
            raise ProtocolViolation(
                LoginStatus.UNSUPPORTED_VERSION,
                f"the initiator speaks versions {request.version_min} to {request.version_max}, we {VERSION}",
                fatal=True,
            )
        first = self.first
        if first is None:
            self.first = first = request
        if (request.isid, request.tsih, request.cid, request.initiator_task_tag) != (
            first.isid, first.tsih, first.cid, first.initiator_task_tag,
        ):  # fmt: skip
            raise _bad("ISID, TSIH, CID or Initiator Task Tag changed within the login")
        flags = request.flags
        csg, nsg = flags >> 2 & 3, flags & 3
        if self._proof in (_Proof.ALGORITHM, _Proof.CHALLENGED) and csg != LoginStage.SECURITY:
            raise _unproven(f"the initiator left the security stage with CHAP open ({self._proof.value})")
        if csg not in _NEXT or (self._stage is not None and csg != self._stage):
            raise _bad(f"CSG {csg} where the stage is {self._stage}")
        if flags & _TRANSIT:
            if flags & _CONTINUE:
                raise _bad("T and C are both set")
            if nsg not in _NEXT[csg]:
                raise _bad(f"NSG {nsg} cannot follow CSG {csg}")
        self._stage = csg

    def _reply(self, request: LoginRequest, data: bytes) -> LoginReply:
        """Say ``data``, piece by piece if it is longer than one PDU (RFC 7143 §6.2, C bit). With the last
        piece the stage ends, if the request at hand asks for that (§11.13.3)."""
        stage = request.flags & 0x0C
        piece, self._unsent = cut(data, MAX_LOGIN_DATA)
        reply = LoginReply(flags=stage, tsih=request.tsih, data=piece)
        if self._unsent:
            reply.flags |= _CONTINUE
        elif request.flags & _TRANSIT and self._may_leave(stage >> 2):
            nsg = request.flags & 3
            if nsg == LoginStage.FULL_FEATURE:
                changed = self._ask_again()
                if changed is not None:
                    return self._refuse(changed, request)
                result = self._result(request)
                admitted = self._directory.admit(result)
                if isinstance(admitted, Refusal):
                    return self._refuse(admitted, request)
                reply.tsih = admitted
                reply.result = result
            reply.flags |= _TRANSIT | nsg
            self._stage = nsg
        return reply

    def _refuse(self, refusal: Refusal, request: LoginRequest) -> LoginReply:
        data = build([("TargetAddress", refusal.target_address)]) if refusal.target_address else b""
        return LoginReply(status=refusal.status, reason=refusal.reason, data=data, tsih=request.tsih)

    def _ask_again(self) -> Refusal | None:
        """A login can take as long as ``LoginLimits.seconds``: what was granted when it began must still be
        when it ends. What has changed of the offer or the credentials meanwhile is for the next one."""
        assert self._grant is not None
        answer = (
            self._authorizer.discovery(self.initiator_name)
            if self._discovery
            else self._authorizer.target(self.initiator_name, self.target_name)
        )
        if isinstance(answer, Refusal):
            if answer.status == LoginStatus.NOT_FOUND:
                return Refusal(LoginStatus.TARGET_REMOVED, f"removed during the login: {answer.reason}")
            return answer
        if answer.target != self._grant.target:
            return Refusal(
                LoginStatus.TARGET_REMOVED, "removed during the login, and another made in its place"
            )
        if self._proof not in _PROVEN and not answer.methods & AuthMethod.NONE:
            return Refusal(LoginStatus.AUTHENTICATION_FAILURE, "CHAP was made a must during the login")
        self._grant = replace(self._grant, queue_depth=answer.queue_depth)  # nothing that is negotiated
        return None

    def _result(self, request: LoginRequest) -> LoginResult:
        assert self._grant is not None and self._negotiator is not None
        self._negotiator.finish()
        return LoginResult(
            initiator_name=self.initiator_name,
            initiator_alias=self.initiator_alias,
            isid=request.isid,
            requested_tsih=request.tsih,
            cid=request.cid,
            discovery=self._discovery,
            grant=self._grant,
            session_keys=self._negotiator.session,
            connection_keys=self._negotiator.connection,
            user=self._user,
        )

    # -- who ----------------------------------------------------------------------------------

    def _identify(self, request: LoginRequest, pairs: list[tuple[str, str]]) -> Grant | Refusal:
        """The first request names the initiator and what it wants (RFC 7143 §6.3)."""
        first = dict(pairs)
        if any(first[key] != value for key, value in pairs if key in _IDENTITY):
            raise _bad("the initiator names itself or the target in two ways")
        name = first.get("InitiatorName", "")
        kind = first.get("SessionType", "Normal")
        if not name:
            raise _missing("InitiatorName")
        try:
            self.initiator_name = names.normalise(name)
        except ValueError as error:
            raise _bad(f"InitiatorName {name[:60]!a} is no iSCSI name: it {error}") from None
        if kind not in ("Normal", "Discovery"):
            raise ProtocolViolation(
                LoginStatus.SESSION_TYPE_NOT_SUPPORTED, f"SessionType {kind[:40]!a}", fatal=True
            )
        self._discovery = kind == "Discovery"
        if self._discovery:
            answer = self._authorizer.discovery(self.initiator_name)
        else:
            self.target_name = names.fold(first.get("TargetName", ""))
            if not self.target_name:
                raise _missing("TargetName")
            answer = self._authorizer.target(self.initiator_name, self.target_name)
        if isinstance(answer, Grant):
            self._grant = answer
            self._negotiator = Negotiator(answer.offer, leading=request.tsih == 0, discovery=self._discovery)
        return answer

    # -- what is said -------------------------------------------------------------------------

    def _answer(self, csg: int, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Go through the keys of one message."""
        first = not self._seen
        answers: list[tuple[str, str]] = []
        security: dict[str, str] = {}
        negotiator = self._negotiator
        grant = self._grant
        assert negotiator is not None and grant is not None
        # MaxOutstandingR2T last: what it may be depends on ErrorRecoveryLevel (``Negotiator``).
        for name, value in sorted(pairs, key=lambda pair: pair[0] == "MaxOutstandingR2T"):
            if name in self._seen:
                if name in _IDENTITY and self._seen[name] == value:
                    continue
                raise _bad(f"{name} is given twice")
            self._seen[name] = value
            if len(self._seen) > self._limits.keys:
                raise _bad(f"more than {self._limits.keys} keys")
            if name in _IDENTITY:
                if not first and name != "InitiatorAlias":
                    raise _bad(f"{name} comes after the first request")
                if name == "InitiatorAlias":
                    self.initiator_alias = value
            elif name in _NEVER:
                raise _bad(f"{name} from an initiator in login")
            elif name in SECURITY_KEYS:
                if csg != LoginStage.SECURITY:
                    raise _bad(f"{name} outside the security stage")
                security[name] = value
            elif name in KEYS and csg != LoginStage.OPERATIONAL:
                raise _bad(f"{name} outside the operational stage")
            else:
                answer = negotiator.receive(name, value)
                if answer is not None:
                    answers.append((name, answer))
        if csg == LoginStage.SECURITY:
            answers += self._authenticate(security)
        elif csg == LoginStage.OPERATIONAL:
            answers += negotiator.declarations()
        if first and not self._discovery:
            # RFC 7143 §13.9: with the first response of the leading login.
            answers.insert(0, ("TargetPortalGroupTag", str(grant.target_portal_group_tag)))
        if grant.target_alias and not self._told_alias and self._may_know(csg):
            self._told_alias = True
            answers.append(("TargetAlias", grant.target_alias))
        return answers

    def _may_know(self, csg: int) -> bool:
        """Whether the peer has proven itself, or need not; what is written about a target is for those."""
        assert self._grant is not None
        return (
            csg == LoginStage.OPERATIONAL
            or self._proof in _PROVEN
            or (self._proof in (_Proof.OPEN, _Proof.NONE) and bool(self._grant.methods & AuthMethod.NONE))
        )

    def _may_leave(self, csg: int) -> bool:
        """Whether nothing is open in this stage."""
        assert self._negotiator is not None
        if csg == LoginStage.OPERATIONAL:
            return not self._negotiator.waiting
        if self._proof is _Proof.OPEN:
            self._demand_proof()
        return self._proof in (_Proof.OPEN, _Proof.NONE, *_PROVEN)

    # -- authentication (RFC 7143 §12.1) ------------------------------------------------------

    def _demand_proof(self) -> None:
        """The peer wants to go on: it must have proven itself, unless it need not."""
        assert self._grant is not None
        if self._proof in (*_PROVEN, _Proof.NONE):
            return
        if self._proof is _Proof.OPEN and self._grant.methods & AuthMethod.NONE:
            return
        raise _unproven(f"the initiator went on without CHAP ({self._proof.value}), which is required")

    def _authenticate(self, keys: dict[str, str]) -> list[tuple[str, str]]:
        answers: list[tuple[str, str]] = []
        if "AuthMethod" in keys:
            answers.append(("AuthMethod", self._choose_method(keys["AuthMethod"])))
        if "CHAP_A" in keys:
            answers += self._challenge(keys["CHAP_A"])
        if keys.keys() & {"CHAP_N", "CHAP_R"}:
            answers += self._check(keys)
        elif keys.keys() & {"CHAP_I", "CHAP_C"}:
            raise _bad("CHAP_I and CHAP_C come with CHAP_N and CHAP_R")
        return answers

    def _choose_method(self, offered: str) -> str:
        assert self._grant is not None
        if self._proof is not _Proof.OPEN:
            raise _bad("AuthMethod is negotiated again")
        allowed = {
            "None": (AuthMethod.NONE, _Proof.NONE),
            "CHAP": (AuthMethod.CHAP, _Proof.ALGORITHM),
        }
        for method in offered.split(","):
            flag, proof = allowed.get(method, (None, None))
            if flag is not None and proof is not None and self._grant.methods & flag:
                self._proof = proof
                return method
        raise _unproven(f"none of the methods offered ({offered[:60]!a}) is allowed here")

    def _challenge(self, offered: str) -> list[tuple[str, str]]:
        assert self._grant is not None
        if self._proof is not _Proof.ALGORITHM:
            raise _bad(f"CHAP_A where {self._proof.value}")
        try:
            numbers = [read_number(number) for number in offered.split(",")]
        except TextError:
            raise _unproven(f"CHAP_A={offered[:40]!a} is no list of algorithms") from None
        algorithm = chap.choose_algorithm(numbers, self._grant.chap_algorithms)
        if algorithm is None:
            raise _unproven(f"no CHAP algorithm of {offered[:40]!a} is allowed")
        identifier = self._randomness(1)[0]
        challenge = self._randomness(chap.CHALLENGE_LENGTH[algorithm])
        self._chap = _Chap(algorithm, identifier, challenge)
        self._proof = _Proof.CHALLENGED
        return [
            ("CHAP_A", str(algorithm)),
            ("CHAP_I", str(identifier)),
            ("CHAP_C", encode_binary(challenge)),
        ]

    def _check(self, keys: dict[str, str]) -> list[tuple[str, str]]:
        """The initiator's answer to our challenge, and its own challenge if it has one."""
        assert self._grant is not None
        if self._proof is not _Proof.CHALLENGED:
            raise _bad(f"CHAP_N or CHAP_R where {self._proof.value}")
        name, answer = keys.get("CHAP_N"), keys.get("CHAP_R")
        if name is None or answer is None:
            raise _unproven("CHAP_N and CHAP_R come together")
        exchange = self._chap
        digest_size = chap.ALGORITHMS[exchange.algorithm](b"").digest_size
        try:
            response = read_binary(answer, digest_size)
        except TextError as error:
            raise _unproven(f"CHAP_R: {error}") from None
        wait_s = self._authorizer.chap_wait_s(name)
        if wait_s:
            raise ProtocolViolation(
                LoginStatus.SERVICE_UNAVAILABLE,
                f"CHAP user {name[:60]!a} has given too many wrong answers from this address; the next one "
                f"is looked at in {wait_s:.0f} s",
                fatal=True,
            )
        known = next((user for user in self._grant.credentials if user.user == name), None)
        # An unknown user costs as much time as a wrong secret.
        secret = known.secret if known is not None else exchange.challenge
        right = chap.verify(exchange.algorithm, exchange.identifier, secret, exchange.challenge, response)
        self._authorizer.chap_judged(name, known is not None and right)
        if known is None:
            raise _unproven(f"CHAP user {name[:60]!a} is unknown in this group")
        if not right:
            raise _unproven(f"CHAP user {name[:60]!a} gave a wrong secret")
        proof = self._prove_ourselves(known, keys)
        self._proof = _Proof.MUTUAL if proof else _Proof.DONE
        self._user = name
        return proof

    def _prove_ourselves(self, user: Credential, keys: dict[str, str]) -> list[tuple[str, str]]:
        """Mutual CHAP: answer the initiator's challenge (RFC 7143 §12.1.3)."""
        assert self._grant is not None
        identifier_text, challenge_text = keys.get("CHAP_I"), keys.get("CHAP_C")
        if identifier_text is None and challenge_text is None:
            if self._grant.methods & AuthMethod.CHAP_MUTUAL:
                raise _unproven("mutual CHAP is required and the initiator did not challenge us")
            return []
        if identifier_text is None or challenge_text is None:
            raise _unproven("CHAP_I and CHAP_C come together")
        try:
            identifier = read_number(identifier_text)
            challenge = read_binary(challenge_text, MAX_CHAP_BINARY)
        except TextError as error:
            raise _unproven(f"CHAP_I or CHAP_C: {error}") from None
        if identifier > 255:
            raise _unproven(f"CHAP_I={identifier}")
        if not user.peer_user or not user.peer_secret:
            raise _unproven(f"the initiator challenges us, but CHAP user {user.user!r} has no peer secret")
        if challenge == self._chap.challenge:
            # RFC 7143 §12.1.3: a reflected challenge would have us compute the answer to our own.
            raise _unproven("the initiator sent our own challenge back")
        if user.secret == user.peer_secret:
            raise _unproven(f"CHAP user {user.user!r} and its peer have the same secret")
        return [
            ("CHAP_N", user.peer_user),
            (
                "CHAP_R",
                encode_binary(chap.response(self._chap.algorithm, identifier, user.peer_secret, challenge)),
            ),
        ]


def _bad(message: str) -> ProtocolViolation:
    return ProtocolViolation(LoginStatus.INITIATOR_ERROR, message, fatal=True)


def _missing(name: str) -> ProtocolViolation:
    return ProtocolViolation(LoginStatus.MISSING_PARAMETER, f"{name} is missing", fatal=True)


def _unproven(message: str) -> ProtocolViolation:
    return ProtocolViolation(LoginStatus.AUTHENTICATION_FAILURE, message, fatal=True)
