"""The login phase of our test initiator: its key table, and the exchanges of RFC 7143 §6.3 and §12.1."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from protocol import bhs
from protocol.enums import LoginStage
from tests.initiator_wire import (
    LOGIN_SEGMENT,
    Breach,
    LoginFailed,
    chap_response,
    decode_binary,
    decode_text,
    encode_binary,
    encode_text,
)

if TYPE_CHECKING:
    from tests.initiator import Conversation

__all__ = ["DEFAULTS", "DISCOVERY_OFFER", "LEADING_ONLY", "OFFER", "Login", "Secret"]

Secret = tuple[str, str]
"""CHAP name and secret."""

OFFER: dict[str, str] = {
    "HeaderDigest": "None",
    "DataDigest": "None",
    "MaxConnections": "1",
    "InitialR2T": "No",
    "ImmediateData": "Yes",
    "MaxRecvDataSegmentLength": "262144",
    "MaxBurstLength": "262144",
    "FirstBurstLength": "262144",
    "MaxOutstandingR2T": "16",
    "DefaultTime2Wait": "0",
    "DefaultTime2Retain": "0",
    "DataPDUInOrder": "Yes",
    "DataSequenceInOrder": "Yes",
    "ErrorRecoveryLevel": "0",
}
"""What a normal login offers unless its ``keys`` say otherwise."""

DISCOVERY_OFFER: dict[str, str] = {
    "HeaderDigest": "None",
    "DataDigest": "None",
    "MaxRecvDataSegmentLength": "32768",
    "DefaultTime2Wait": "0",
    "DefaultTime2Retain": "0",
    "ErrorRecoveryLevel": "0",
}
"""The keys that are not irrelevant when SessionType=Discovery (RFC 7143 §13)."""

LEADING_ONLY = frozenset({
    "MaxConnections", "InitialR2T", "ImmediateData", "MaxBurstLength", "FirstBurstLength",
    "MaxOutstandingR2T", "DefaultTime2Wait", "DefaultTime2Retain", "DataPDUInOrder",
    "DataSequenceInOrder", "ErrorRecoveryLevel",
})  # fmt: skip
"""Keys of use LO: only on the leading connection of a session (RFC 7143 §13)."""

DEFAULTS: dict[str, str] = {
    "HeaderDigest": "None",
    "DataDigest": "None",
    "MaxConnections": "1",
    "InitialR2T": "Yes",
    "ImmediateData": "Yes",
    "MaxRecvDataSegmentLength": "8192",
    "MaxBurstLength": "262144",
    "FirstBurstLength": "65536",
    "MaxOutstandingR2T": "1",
    "DefaultTime2Wait": "2",
    "DefaultTime2Retain": "20",
    "DataPDUInOrder": "Yes",
    "DataSequenceInOrder": "Yes",
    "ErrorRecoveryLevel": "0",
    "iSCSIProtocolLevel": "1",
}
"""What holds for a key that nobody negotiates (RFC 7143 §13)."""

SETTLE: dict[str, Callable[[str, str], str]] = {
    "MaxConnections": lambda ours, theirs: str(min(int(ours), int(theirs))),
    "InitialR2T": lambda ours, theirs: "Yes" if "Yes" in (ours, theirs) else "No",
    "ImmediateData": lambda ours, theirs: "Yes" if ours == theirs == "Yes" else "No",
    "MaxBurstLength": lambda ours, theirs: str(min(int(ours), int(theirs))),
    "FirstBurstLength": lambda ours, theirs: str(min(int(ours), int(theirs))),
    "MaxOutstandingR2T": lambda ours, theirs: str(min(int(ours), int(theirs))),
    "DefaultTime2Wait": lambda ours, theirs: str(max(int(ours), int(theirs))),
    "DefaultTime2Retain": lambda ours, theirs: str(min(int(ours), int(theirs))),
    "DataPDUInOrder": lambda ours, theirs: "Yes" if "Yes" in (ours, theirs) else "No",
    "DataSequenceInOrder": lambda ours, theirs: "Yes" if "Yes" in (ours, theirs) else "No",
    "ErrorRecoveryLevel": lambda ours, theirs: str(min(int(ours), int(theirs))),
    "iSCSIProtocolLevel": lambda ours, theirs: str(min(int(ours), int(theirs))),
}
"""Result functions of the negotiated keys (RFC 7143 §13). Applied to an answer they change nothing."""

LISTS = frozenset({"HeaderDigest", "DataDigest"})
"""The answer is one of the values offered (RFC 7143 §6.2.1)."""

DECLARED = frozenset({
    "MaxRecvDataSegmentLength", "TargetAlias", "TargetAddress", "TargetPortalGroupTag", "TargetName",
})  # fmt: skip
"""The target states these; nobody answers them."""

REFUSALS = frozenset({"NotUnderstood", "Irrelevant", "Reject"})


class Login:
    """One login phase, step by step (RFC 7143 §6.3)."""

    def __init__(self, peer: "Conversation", segment: int) -> None:
        self.peer = peer
        self.segment = segment
        self.tag = peer.session.new_tag()
        self.tsih = peer.session.tsih
        self.offer: dict[str, str] = {}
        self.settled: dict[str, str] = {}
        self.declared: dict[str, str] = {}
        peer.initiator.max_data_in = LOGIN_SEGMENT

    def step(
        self, keys: Mapping[str, str], stage: int, next_stage: int, transit: bool
    ) -> tuple[dict[str, str], bool]:
        """Say ``keys``, in several requests if they are long; the answer and whether it transits."""
        initiator = self.peer.initiator
        text = encode_text(keys)
        pieces = [text[at : at + self.segment] for at in range(0, len(text), self.segment)] or [b""]
        common: dict[str, Any] = {"stage": stage, "next_stage": next_stage, "initiator_task_tag": self.tag}
        for piece in pieces[:-1]:
            header, data = self._exchange(initiator.login_request(piece, transit=False, more=True, **common))
            if data or header.flags & 0xC0:
                initiator.breach(f"while we continue, an answer has no data, T or C (§6.2): {header}")
        header, data = self._exchange(initiator.login_request(pieces[-1], transit=transit, **common))
        while header.flags & 0x40:
            if header.flags & 0x80:
                initiator.breach("C and T both set (§11.13.2)")
            header, more = self._exchange(initiator.login_request(transit=False, **common))
            data += more
        if header.flags >> 2 & 3 != stage:
            initiator.breach(f"CSG {header.flags >> 2 & 3}, we are in {stage}")
        moved = bool(header.flags & 0x80)
        if moved and (not transit or header.flags & 3 != next_stage):
            initiator.breach(f"transit to {header.flags & 3}; we asked for {next_stage if transit else None}")
        pairs = decode_text(data)
        answer = dict(pairs)
        if len(answer) != len(pairs):
            initiator.breach(f"a key twice in {pairs}")
        return answer, moved

    def _exchange(self, request: bytes) -> tuple[bhs.LoginResponse, bytes]:
        pdu = self.peer.request(request)
        header = pdu.expect(bhs.LoginResponse)
        if header.status_class:
            raise LoginFailed(header, dict(pdu.text))
        if header.initiator_task_tag != self.tag:
            self.peer.initiator.breach(f"tag {header.initiator_task_tag:#x}, ours is {self.tag:#x}")
        if header.isid != self.peer.session.isid:
            self.peer.initiator.breach(f"ISID {header.isid.hex()} is not ours")
        if header.version_active or header.version_max:
            self.peer.initiator.breach(f"only version 0 exists: {header}")
        self.tsih = header.tsih
        return header, pdu.data

    def security(
        self,
        keys: Mapping[str, str],
        chap: Secret | None,
        mutual: Secret | None,
        algorithms: Sequence[int],
        encoding: str,
    ) -> None:
        """The security stage (RFC 7143 §6.3.2, §12.1)."""
        security, operational = LoginStage.SECURITY, LoginStage.OPERATIONAL
        answer, moved = self.step(keys, security, operational, transit="CHAP" not in keys["AuthMethod"])
        self._declare(answer)
        method = answer.get("AuthMethod")
        if method not in keys["AuthMethod"].split(","):
            self.peer.initiator.breach(f"AuthMethod={method}, offered {keys['AuthMethod']}")
        if method == "CHAP":
            self._chap(chap, mutual, algorithms, encoding)
        elif not moved:
            _, moved = self.step({}, security, operational, transit=True)
            if not moved:
                self.peer.initiator.breach("AuthMethod=None is settled and the target stays in security")

    def _chap(
        self, chap: Secret | None, mutual: Secret | None, algorithms: Sequence[int], encoding: str
    ) -> None:
        assert chap is not None, "the target chose CHAP and the test gave no secret"
        stages = (LoginStage.SECURITY, LoginStage.OPERATIONAL)
        answer, _ = self.step({"CHAP_A": ",".join(map(str, algorithms))}, *stages, transit=False)
        missing = {"CHAP_A", "CHAP_I", "CHAP_C"} - answer.keys()
        if missing:
            raise Breach(f"{missing} missing from {answer} (§12.1.3)")
        algorithm, identifier = int(answer["CHAP_A"], 0), int(answer["CHAP_I"], 0)
        challenge = decode_binary(answer["CHAP_C"])
        if algorithm not in algorithms:
            raise Breach(f"CHAP_A={algorithm}, offered {algorithms}")
        if not 0 <= identifier <= 255 or not 0 < len(challenge) <= 1024:
            self.peer.initiator.breach(f"CHAP_I={identifier}, challenge of {len(challenge)} bytes")
        user, secret = chap
        response = chap_response(algorithm, identifier, secret, challenge)
        keys = {"CHAP_N": user, "CHAP_R": encode_binary(response, encoding)}
        ours, ours_id = os.urandom(16), os.urandom(1)[0]
        if mutual:
            keys |= {"CHAP_I": str(ours_id), "CHAP_C": encode_binary(ours, encoding)}
        answer, moved = self.step(keys, *stages, transit=True)
        if not moved:
            self.peer.initiator.breach("authentication is done and the target stays in security")
        self._declare(answer)
        if not mutual:
            return
        proof = chap_response(algorithm, ours_id, mutual[1], ours)
        if answer.get("CHAP_N") != mutual[0] or decode_binary(answer.get("CHAP_R", "0x")) != proof:
            raise Breach(f"the target does not prove itself as {mutual[0]}: {answer}")

    def operational(self, keys: Mapping[str, str], offer: Mapping[str, str]) -> None:
        """The operational stage; ends in the full feature phase."""
        stages = (LoginStage.OPERATIONAL, LoginStage.FULL_FEATURE)
        self.offer = dict(offer)
        say: dict[str, str] = dict(keys)
        asked: set[str] = set()
        for _ in range(16):
            answer, moved = self.step(say, *stages, transit=True)
            self._declare(answer)
            say = {}
            for key, value in answer.items():
                if key in DECLARED or key == "AuthMethod":
                    continue
                self._settle(key, value, asked, say)
            if moved:
                if say:
                    self.peer.initiator.breach(f"login ended while {say} waits for our answer")
                unanswered = self.offer.keys() - asked - DECLARED
                if unanswered:
                    self.peer.initiator.breach(f"no answer to {', '.join(sorted(unanswered))} (§6.2)")
                if not self.tsih:
                    self.peer.initiator.breach("TSIH is 0 in the last Login Response (§11.13.3)")
                return
        raise Breach("login does not end after 16 exchanges")

    def _declare(self, answer: Mapping[str, str]) -> None:
        self.declared.update({key: value for key, value in answer.items() if key in DECLARED})

    def _settle(self, key: str, value: str, asked: set[str], say: dict[str, str]) -> None:
        """An answer to what we offered, or an offer of the target's own that we must answer."""
        breach = self.peer.initiator.breach
        ours = self.offer.get(key)
        if ours is not None and key not in asked:
            asked.add(key)
            if value in REFUSALS:
                if key in DEFAULTS and value == "NotUnderstood":
                    breach(f"{key}={value}: a key every target knows")
                return
            if key in LISTS:
                if value not in ours.split(","):
                    breach(f"{key}={value}, offered {ours}")
            elif key in SETTLE and not self._is_result(key, ours, value):
                breach(f"{key}={value} is not a result for the offer {ours} (§13)")
            self.settled[key] = value
        elif key in LISTS:
            say[key] = self.settled[key] = "None"
        elif key in SETTLE:
            say[key] = self.settled[key] = SETTLE[key](DEFAULTS[key], value)
        else:
            say[key] = "NotUnderstood"

    @staticmethod
    def _is_result(key: str, ours: str, value: str) -> bool:
        try:
            return SETTLE[key](ours, value) == value
        except ValueError:
            return False
