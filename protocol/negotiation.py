"""The table of login keys and the function that settles them (RFC 7143 §13). Knows no PDU.

One row a key says who may send it, when, what values it can have, and how two values become one. Keys
that are not in the table are NotUnderstood, which is an answer and not an error (§6.2).

What is never agreed to: DataPDUInOrder and DataSequenceInOrder other than Yes (their function is OR and
ours is Yes), markers (obsolete, §13.25), TaskReporting other than RFC3720 (§13.23: FastAbort would have
multi-task aborts answered by §4.2.3.4, and ours are by §4.2.3.3).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum, Flag, auto
from typing import Any

from protocol.access import Offer
from protocol.enums import LoginStatus
from protocol.errors import ProtocolViolation
from protocol.textkeys import TextError, read_number

__all__ = ["KEYS", "ConnectionKeys", "Key", "Negotiator", "Scope", "SessionKeys", "Stage"]


class Scope(Enum):
    """How far a settled value reaches (RFC 7143 §13, "Scope")."""

    SESSION = "SW"
    CONNECTION = "CO"


class Stage(Flag):
    """When a key may be sent (RFC 7143 §13, "Use")."""

    LEADING = auto()
    """Leading connection only (LO)."""
    ANY_LOGIN = auto()
    """Any connection's login (IO)."""
    FULL_FEATURE = auto()
    """Text Requests after login."""
    SECURITY = auto()
    """Security stage too; without this the operational stage only."""


@dataclass(slots=True)
class SessionKeys:
    """What holds for the session. Lengths in bytes, times in seconds; defaults are those of §13."""

    max_connections: int = 1
    initial_r2t: bool = True
    immediate_data: bool = True
    max_burst_length: int = 262144
    first_burst_length: int = 65536
    default_time2wait: int = 2
    default_time2retain: int = 20
    max_outstanding_r2t: int = 1
    data_pdu_in_order: bool = True
    data_sequence_in_order: bool = True
    error_recovery_level: int = 0
    task_reporting: str = "RFC3720"
    iscsi_protocol_level: int = 1

    def as_dict(self) -> dict[str, str]:
        """Wire spelling → value."""
        return _shown(self)


@dataclass(slots=True)
class ConnectionKeys:
    """What holds for one connection."""

    header_digest: bool = False
    data_digest: bool = False
    max_recv_data_segment_length_initiator: int = 8192
    """The most the initiator takes: what we may send."""
    max_recv_data_segment_length_target: int = 8192
    """The most we take: what we declared."""

    def as_dict(self) -> dict[str, str]:
        """Wire spelling → value."""
        return {
            "HeaderDigest": "CRC32C" if self.header_digest else "None",
            "DataDigest": "CRC32C" if self.data_digest else "None",
            "MaxRecvDataSegmentLength": str(self.max_recv_data_segment_length_initiator),
        }


def _choose_list(offered: str, ours: Any) -> str | None:
    """The first of the initiator's list that we have (RFC 7143 §6.2.1)."""
    values = offered.split(",")
    if not all(values):
        raise TextError("an empty entry in a list")
    return next((value for value in values if value in ours), None)


@dataclass(frozen=True, slots=True)
class Key:
    """One row."""

    name: str
    kind: str
    """``number``, ``boolean``, ``list`` or ``declared`` (a number each side declares for itself)."""
    scope: Scope
    stages: Stage
    settle: Callable[[Any, Any], Any] | None = None
    """(theirs, ours) → the result."""
    low: int = 0
    high: int = 0
    attribute: str = ""
    """Where the result goes in SessionKeys or ConnectionKeys, and our value comes from in Offer."""
    irrelevant_in_discovery: bool = False
    """Answered so there (RFC 7143 §13, "Irrelevant when"). Not for numbers: initiators are in use that read
    the answer to one as a number, whatever the session, and a number answers an offer there as well."""


_LOGIN = Stage.ANY_LOGIN
_LEADING = Stage.LEADING
_MAX_LENGTH = 2**24 - 1


def _number(name: str, attribute: str, low: int, high: int, settle: Callable[[int, int], int]) -> Key:
    return Key(name, "number", Scope.SESSION, _LEADING, settle, low, high, attribute)


def _boolean(name: str, attribute: str, settle: Callable[[bool, bool], bool]) -> Key:
    return Key(name, "boolean", Scope.SESSION, _LEADING, settle, 0, 0, attribute, True)


def _either(theirs: bool, ours: bool) -> bool:
    return theirs or ours


def _both(theirs: bool, ours: bool) -> bool:
    return theirs and ours


KEYS: Mapping[str, Key] = {
    key.name: key
    for key in (
        Key("HeaderDigest", "list", Scope.CONNECTION, _LOGIN, _choose_list, attribute="header_digest"),
        Key("DataDigest", "list", Scope.CONNECTION, _LOGIN, _choose_list, attribute="data_digest"),
        Key(
            "MaxRecvDataSegmentLength", "declared", Scope.CONNECTION, _LOGIN | Stage.FULL_FEATURE, None,
            512, _MAX_LENGTH, "max_recv_data_segment_length_initiator",
        ),
        _number("MaxConnections", "max_connections", 1, 65535, min),
        _boolean("InitialR2T", "initial_r2t", _either),
        _boolean("ImmediateData", "immediate_data", _both),
        _number("MaxBurstLength", "max_burst_length", 512, _MAX_LENGTH, min),
        _number("FirstBurstLength", "first_burst_length", 512, _MAX_LENGTH, min),
        _number("DefaultTime2Wait", "default_time2wait", 0, 3600, max),
        _number("DefaultTime2Retain", "default_time2retain", 0, 3600, min),
        _number("MaxOutstandingR2T", "max_outstanding_r2t", 1, 65535, min),
        _boolean("DataPDUInOrder", "data_pdu_in_order", _either),
        _boolean("DataSequenceInOrder", "data_sequence_in_order", _either),
        _number("ErrorRecoveryLevel", "error_recovery_level", 0, 2, min),
        _number("iSCSIProtocolLevel", "iscsi_protocol_level", 0, 31, min),
        Key("TaskReporting", "list", Scope.SESSION, _LEADING, _choose_list, attribute="task_reporting",
            irrelevant_in_discovery=True),
    )
}  # fmt: skip
"""The keys that are negotiated or declared in the operational stage; those that name the parties are
``protocol.login``'s, SendTargets is ``protocol.text``'s."""

OBSOLETE = frozenset(("IFMarker", "OFMarker", "IFMarkInt", "OFMarkInt"))
"""RFC 7143 §13.25: answered Reject, never NotUnderstood."""

SECURITY_KEYS = frozenset(("AuthMethod", "CHAP_A", "CHAP_N", "CHAP_R", "CHAP_I", "CHAP_C"))
"""RFC 7143 §12."""

TARGET_KEYS = frozenset(("TargetAlias", "TargetAddress", "TargetPortalGroupTag"))
"""Only a target says them (RFC 7143 §13.6, §13.8, §13.9)."""

LOGIN_KEYS = SECURITY_KEYS | TARGET_KEYS | {"InitiatorName", "TargetName", "SessionType"}
"""Keys that are not in ``KEYS`` and have no place in a Text Request."""

RESPONSES = frozenset(("NotUnderstood", "Irrelevant", "Reject"))
"""Values that answer rather than offer (RFC 7143 §6.2)."""

_ATTRIBUTE_TO_WIRE = {
    key.attribute: key.name for key in KEYS.values() if key.scope is Scope.SESSION and key.attribute
}


def _shown(keys: SessionKeys) -> dict[str, str]:
    shown = {}
    for field in fields(keys):
        value = getattr(keys, field.name)
        text = ("Yes" if value else "No") if isinstance(value, bool) else str(value)
        shown[_ATTRIBUTE_TO_WIRE[field.name]] = text
    return shown


class Negotiator:
    """Settles the operational keys of one login."""

    def __init__(self, offer: Offer, *, leading: bool, discovery: bool) -> None:
        """
        Args:
            leading: the login makes a session; otherwise keys of session scope may not come.
            discovery: several keys mean nothing then.
        """
        self._offer = offer
        self._leading = leading
        self._discovery = discovery
        self.session = SessionKeys()
        self.connection = ConnectionKeys()
        self._asked: set[str] = set()
        """Keys we proposed and that wait for the initiator's answer."""
        self._settled: set[str] = set()
        self._finished = False
        self._rejected_length = False
        """MaxRecvDataSegmentLength was answered Reject: it cannot be said again, and ours is the default."""

    def _ours(self, key: Key) -> Any:
        """What we bring to a key."""
        match key.attribute:
            case "header_digest":
                return self._offer.header_digests
            case "data_digest":
                return self._offer.data_digests
            case "task_reporting":
                return ("RFC3720",)
            case "data_pdu_in_order" | "data_sequence_in_order":
                return True
            case "max_outstanding_r2t" if self.session.error_recovery_level:
                return 1  # "MUST be set to 1" above level 0 with DataSequenceInOrder=Yes (RFC 7143 §13.19)
            case "max_connections" if self._discovery:
                return 1
            case "error_recovery_level" if self._discovery or self.session.max_outstanding_r2t > 1:
                return 0
            case "first_burst_length":
                return min(self._offer.first_burst_length, self._offer.max_burst_length)
            case name:
                return getattr(self._offer, name)

    def receive(self, name: str, value: str) -> str | None:
        """Settle one key; returns the value to answer with, None for no answer.

        Raises:
            ProtocolViolation: 0200h, the initiator broke a rule of negotiation.
        """
        if name in OBSOLETE:
            return "Reject"
        key = KEYS.get(name)
        if key is None:
            return None if value in RESPONSES else "NotUnderstood"
        if name in self._settled:
            raise _violation(f"{name} is negotiated twice")
        if Stage.LEADING in key.stages and not self._leading:
            raise _violation(f"{name} on a connection that is not the session's first")
        self._settled.add(name)
        if key.irrelevant_in_discovery and self._discovery:
            return "Irrelevant"
        if name in self._asked:
            self._answered(key, value)
            return None
        if value in RESPONSES:
            raise _violation(f"{name}={value} answers nothing that was asked")
        return self._settle(key, value)

    def _settle(self, key: Key, value: str) -> str | None:
        try:
            theirs = _read(key, value)
            if key.kind == "declared":
                self.connection.max_recv_data_segment_length_initiator = theirs
                return None
            assert key.settle is not None
            result = key.settle(theirs, self._ours(key))
        except TextError as error:
            if key.kind == "declared":
                if self._finished:  # we have said ours: no answer may have a key twice (RFC 7143 §6.2)
                    raise _violation(f"{key.name}: {error}") from None
                self._rejected_length = True
            return "Reject"  # RFC 7143 §6.2.2: a value that cannot be is Rejected; the default holds
        if result is None:
            return "Reject"
        self._put(key, result)
        return _write(result)

    def _answered(self, key: Key, value: str) -> None:
        """The initiator's answer to what we proposed is the result (RFC 7143 §6.2.2)."""
        if value in RESPONSES:
            raise _violation(f"{key.name}: our proposal was answered {value}")
        try:
            theirs = _read(key, value)
        except TextError as error:
            raise _violation(f"{key.name}: {error}") from None
        assert key.settle is not None
        ours = self._ours(key)
        if key.settle(theirs, ours) != theirs:
            raise _violation(f"{key.name}={value} does not agree with our {_write(ours)}")
        self._put(key, theirs)

    def _put(self, key: Key, value: Any) -> None:
        if key.scope is Scope.SESSION:
            setattr(self.session, key.attribute, value)
        else:
            setattr(self.connection, key.attribute, value == "CRC32C")

    def declarations(self) -> list[tuple[str, str]]:
        """What we say unasked: the data segment length we take, and proposals for keys that the initiator
        left out although their default is not what we are configured to do. Call when the first
        operational keys are answered; later calls say nothing."""
        if self._finished:
            return []
        self._finished = True
        said = []
        if not self._rejected_length:
            length = self._offer.max_recv_data_segment_length
            self.connection.max_recv_data_segment_length_target = length
            said.append(("MaxRecvDataSegmentLength", str(length)))
        if not self._discovery:
            lengths = ("ImmediateData", "MaxBurstLength", "FirstBurstLength") if self._leading else ()
            for name in (*(name for name, _ in self._demanded()), *lengths):
                key = KEYS[name]
                if key.kind == "list":
                    if name not in self._settled:
                        self._asked.add(name)
                        said.append((name, self._ours(key)[0]))
                    continue
                ours = self._ours(key)
                default = getattr(self.session, key.attribute)
                assert key.settle is not None
                if name not in self._settled and key.settle(default, ours) != default:
                    self._asked.add(name)
                    said.append((name, _write(ours)))
        return said

    def _demanded(self) -> list[tuple[str, bool]]:
        """Digests that we do not do without, and whether they are agreed to."""
        digests = (
            ("HeaderDigest", self._offer.header_digests, self.connection.header_digest),
            ("DataDigest", self._offer.data_digests, self.connection.data_digest),
        )
        return [(name, agreed) for name, ours, agreed in digests if "None" not in ours]

    @property
    def waiting(self) -> bool:
        """We proposed something that is not answered yet."""
        return not self._asked <= self._settled

    def finish(self) -> None:
        """Make the result consistent.

        RFC 7143 §13.14: FirstBurstLength must not exceed MaxBurstLength. An initiator that lets it is
        held to the smaller one, which breaks no transfer it may begin in good faith: the excess is asked
        for by R2T.

        Raises:
            ProtocolViolation: it does exceed by both sides' own word; or a length that nobody spoke of, so
                that its default holds, is more than we are configured to take; or a digest that is demanded
                was not agreed to.
        """
        for name, agreed in self._demanded():
            if not agreed:
                raise _violation(f"{name}=CRC32C is demanded here, and was not agreed to")
        keys = self.session
        if self._leading and not self._discovery and not self._finished:  # the stage was never entered
            for name in ("MaxBurstLength", "FirstBurstLength"):
                length, ours = getattr(keys, KEYS[name].attribute), self._ours(KEYS[name])
                if length > ours:
                    raise _violation(
                        f"{name} was not negotiated; its default {length} is more than our {ours}"
                    )
        if keys.first_burst_length > keys.max_burst_length:
            if {"FirstBurstLength", "MaxBurstLength"} <= self._settled:
                raise _violation(
                    f"FirstBurstLength {keys.first_burst_length} exceeds "
                    f"MaxBurstLength {keys.max_burst_length}"
                )
            keys.first_burst_length = keys.max_burst_length


def _read(key: Key, value: str) -> Any:
    if key.kind == "boolean":
        if value not in ("Yes", "No"):
            raise TextError(f"not Yes or No: {value[:40]!a}")
        return value == "Yes"
    if key.kind == "list":
        return value
    number = read_number(value)
    if not key.low <= number <= key.high:
        raise TextError(f"{number} is not in {key.low} to {key.high}")
    return number


def _write(value: Any) -> str:
    if isinstance(value, bool):
        return "Yes" if value else "No"
    return str(value)


def _violation(message: str) -> ProtocolViolation:
    return ProtocolViolation(LoginStatus.INITIATOR_ERROR, message, fatal=True)
