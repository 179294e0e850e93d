"""The login phase, over the wire and as a machine (RFC 7143 §6.3, §11.12, §11.13, §12)."""

import contextlib
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import bhs
from protocol.access import Credential, Grant, Offer, Refusal, TargetList
from protocol.enums import AuthMethod, LoginStage, LoginStatus
from protocol.events import LoginRefused
from protocol.limits import LoginLimits
from protocol.login import LoginMachine, LoginReply, LoginResult
from protocol.negotiation import KEYS, SECURITY_KEYS
from tests.initiator import (
    INITIATOR_NAME,
    LoginFailed,
    MemoryPeer,
    SessionState,
    chap_response,
    encode_binary,
    encode_text,
)
from tests.protocol.target import TARGET, Endpoint, MemoryTarget, connection_of

USER, SECRET = "alice", "secret of alice!"
PEER_USER, PEER_SECRET = "target", "secret of target"
ALICE = Credential(USER, SECRET.encode(), PEER_USER, PEER_SECRET.encode())
BOB = Credential("bob", b"secret of bob...")
NAMES = {"InitiatorName": INITIATOR_NAME, "SessionType": "Normal", "TargetName": TARGET}


def chap_target(methods: AuthMethod = AuthMethod.CHAP, **more: Any) -> MemoryTarget:
    target = MemoryTarget()
    target.access.grant = replace(target.access.grant, methods=methods, credentials=(ALICE, BOB), **more)
    return target


def status_of(log_in: Callable[[], object]) -> LoginStatus:
    with pytest.raises(LoginFailed) as failed:
        log_in()
    return LoginStatus(failed.value.status)


def say(peer: MemoryPeer, keys: Any, **fields: Any) -> tuple[bhs.LoginResponse, dict[str, str]]:
    """One Login Request, and the answer."""
    fields.setdefault("initiator_task_tag", 5)
    pdu = peer.request(peer.initiator.login_request(keys, **fields))
    return pdu.expect(bhs.LoginResponse), dict(pdu.text)


def status(header: bhs.LoginResponse) -> int:
    return header.status_class << 8 | header.status_detail


def security(peer: MemoryPeer, keys: Any, **fields: Any) -> tuple[bhs.LoginResponse, dict[str, str]]:
    fields = {"stage": 0, "next_stage": 1, "transit": False} | fields
    return say(peer, keys, **fields)


# -- what works -------------------------------------------------------------------------------------


def test_every_key_offered_is_answered_and_holds_on_both_sides() -> None:
    target = MemoryTarget()
    peer = target.connect()
    keys = peer.login(TARGET, keys={"HeaderDigest": "CRC32C,None", "DataDigest": "CRC32C,None"})
    (session,) = target.sessions.sessions.values()
    connection = connection_of(peer)
    ours = session.keys.as_dict() | connection.keys.as_dict()
    for name in ours.keys() & keys.keys() - {"MaxRecvDataSegmentLength"}:
        assert ours[name] == keys[name], name
    assert keys["TargetPortalGroupTag"] == "1"
    assert (connection.framer.header_digest, connection.framer.data_digest) == (True, True)
    assert connection.send_limit == 262144
    assert peer.command(bytes(6)).status == 2


@pytest.mark.parametrize("segment", [1, 7, 64])
def test_a_request_in_pieces_is_one_request(segment: int) -> None:
    """RFC 7143 §6.2: the C bit; the answers in between are empty."""
    target = MemoryTarget()
    peer = MemoryPeer((endpoint := Endpoint(target)), endpoint.serve)
    endpoint.connection._login = LoginMachine(
        target.access, endpoint.connection, bytes, LoginLimits(pdus=2000)
    )
    peer.login(TARGET, segment=segment)
    assert len(target.sessions.sessions) == 1


def test_login_may_begin_in_the_operational_stage() -> None:
    """RFC 7143 §6.3."""
    peer = MemoryTarget().connect()
    assert peer.login(TARGET, skip_security=True)["TargetPortalGroupTag"] == "1"


def test_login_may_end_with_the_security_stage_and_then_the_defaults_hold() -> None:
    """RFC 7143 §11.12.3: NSG 3 may follow CSG 0."""
    target = MemoryTarget()
    peer = target.connect()
    header, keys = security(peer, {**NAMES, "AuthMethod": "None"}, transit=True, next_stage=3)
    assert (status(header), header.flags, keys["AuthMethod"]) == (0, 0x83, "None")
    assert header.tsih
    (session,) = target.sessions.sessions.values()
    assert session.keys.initial_r2t
    assert connection_of(peer).framer.max_data == connection_of(peer).send_limit == 8192


def test_defaults_beyond_what_we_take_do_not_hold_by_silence() -> None:
    """RFC 7143 §13.13: the default is 262144; less has to be agreed in the operational stage."""
    peer = MemoryTarget(max_burst_length=65536).connect()
    header, _ = security(peer, {**NAMES, "AuthMethod": "None"}, next_stage=3, transit=True)
    assert status(header) == LoginStatus.INITIATOR_ERROR


def test_chap_that_has_begun_cannot_be_left_for_the_next_stage() -> None:
    """It is a failure of authentication (0201h), whatever else is wrong with the request."""
    peer = chap_target(AuthMethod.NONE | AuthMethod.CHAP).connect()
    security(peer, {**NAMES, "AuthMethod": "CHAP"})
    header, _ = say(peer, {}, stage=1, next_stage=3, transit=True)
    assert status(header) == LoginStatus.AUTHENTICATION_FAILURE


def test_names_are_compared_without_case_and_kept_in_lower_case() -> None:
    """RFC 7143 §4.2.7.1 with RFC 3722."""
    target = MemoryTarget()
    target.connect().login(TARGET.upper(), INITIATOR_NAME.upper())
    (session,) = target.sessions.sessions.values()
    assert session.initiator_name == INITIATOR_NAME


def test_the_alias_is_remembered_whenever_it_comes() -> None:
    """RFC 7143 §13.7: declared, at any time."""
    target = MemoryTarget()
    peer = target.connect()
    security(peer, {**NAMES, "AuthMethod": "None"}, transit=True)
    header, _ = say(peer, {"InitiatorAlias": "Größe"})
    assert status(header) == 0
    (session,) = target.sessions.sessions.values()
    assert session.initiator_alias == "Größe"


def test_identity_said_again_is_harmless_if_it_is_the_same() -> None:
    peer = MemoryTarget().connect()
    security(peer, {**NAMES, "AuthMethod": "None"}, transit=True)
    header, _ = say(peer, NAMES)
    assert status(header) == 0


def test_the_alias_of_the_target_is_told() -> None:
    target = MemoryTarget()
    target.access.grant = replace(target.access.grant, target_alias="backup")
    assert target.connect().login(TARGET)["TargetAlias"] == "backup"


def test_the_alias_of_the_target_is_told_to_those_who_may_log_in() -> None:
    """What an administrator has written there is for nobody else; it comes with the proof."""
    target = chap_target(target_alias="backup of the safe")
    peer = target.connect()
    said, _ = challenged(peer)
    assert "TargetAlias" not in said
    again = target.connect()
    assert again.login(TARGET, chap=(USER, SECRET))["TargetAlias"] == "backup of the safe"


_VALUES = st.one_of(
    st.sampled_from(
        ["Yes", "No", "None", "CRC32C", "Reject", "NotUnderstood", "Irrelevant", "", "?", "RFC3720"]
    ),
    st.sampled_from([0, 1, 511, 512, 8192, 2**24 - 1, 2**24, 2**32]).map(str),
)
_SAID = st.dictionaries(
    st.sampled_from([*sorted(KEYS), "IFMarker", "OFMarkInt", "X-org.example.key"]), _VALUES
)


@given(st.lists(_SAID, min_size=1, max_size=3), st.booleans())
def test_no_answer_and_no_login_carries_a_key_twice(said: list[dict[str, str]], discovery: bool) -> None:
    """RFC 7143 §6.2: whatever is offered, and in how many requests."""
    peer = MemoryTarget().connect(strict=False)
    names = {"InitiatorName": INITIATOR_NAME, "SessionType": "Discovery"} if discovery else NAMES
    told: list[str] = []
    for number, keys in enumerate(said):
        more = number < len(said) - 1
        pdu = peer.request(
            peer.initiator.login_request(
                {**names, **keys} if not number else keys, initiator_task_tag=5, transit=not more
            )
        )
        header = pdu.expect(bhs.LoginResponse)
        if status(header):
            return
        told += [name for name, _ in pdu.text]
        assert len(told) == len(set(told))


def test_what_we_propose_holds_the_stage_until_it_is_answered() -> None:
    target = MemoryTarget(max_burst_length=65536, first_burst_length=4096, immediate_data=False)
    peer = target.connect()
    silent = dict.fromkeys(("MaxBurstLength", "FirstBurstLength", "ImmediateData"))
    keys = peer.login(TARGET, keys=silent)
    assert (keys["MaxBurstLength"], keys["FirstBurstLength"], keys["ImmediateData"]) == (
        "65536",
        "4096",
        "No",
    )
    (session,) = target.sessions.sessions.values()
    assert (session.keys.max_burst_length, session.keys.first_burst_length) == (65536, 4096)


def test_obsolete_and_unknown_keys_do_not_end_a_login() -> None:
    """RFC 7143 §13.25, §6.2."""
    peer = MemoryTarget().connect()
    header, keys = say(
        peer,
        {**NAMES, "IFMarker": "No", "OFMarkInt": "2048", "X-com.example": "1", "iSCSIProtocolLevel": "2"},
    )
    assert status(header) == 0
    assert keys["IFMarker"] == keys["OFMarkInt"] == "Reject"
    assert keys["X-com.example"] == "NotUnderstood"
    assert keys["iSCSIProtocolLevel"] == "2"


def test_an_answer_longer_than_a_pdu_comes_in_pieces() -> None:
    """RFC 7143 §6.2: the C bit, T only with the last piece; nothing begins before it."""
    target = MemoryTarget()
    peer = target.connect()
    unknown = {f"X-{n:03}-{'k' * 57}": "1" for n in range(110)}
    pdu = peer.request(peer.initiator.login_request({**NAMES, **unknown}, initiator_task_tag=5))
    header = pdu.expect(bhs.LoginResponse)
    assert (status(header), header.flags & 0xC0) == (0, 0x40)
    assert 8192 - 78 < header.data_segment_length <= 8192  # as many whole pairs as fit
    assert pdu.data.endswith(b"\0")
    assert not target.sessions.sessions
    pdu = peer.request(peer.initiator.login_request(b"", initiator_task_tag=5))
    header = pdu.expect(bhs.LoginResponse)
    assert (status(header), header.flags & 0xC0) == (0, 0x80)
    assert target.sessions.sessions


# -- every status of §11.13.5 -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"TargetName": TARGET}, LoginStatus.MISSING_PARAMETER),
        ({"InitiatorName": INITIATOR_NAME}, LoginStatus.MISSING_PARAMETER),
        ({"InitiatorName": "", "TargetName": TARGET}, LoginStatus.MISSING_PARAMETER),
        ({}, LoginStatus.MISSING_PARAMETER),
        ({**NAMES, "InitiatorName": "me"}, LoginStatus.INITIATOR_ERROR),
        ({**NAMES, "InitiatorName": "iqn.2026-11.example:" + "x" * 210}, LoginStatus.INITIATOR_ERROR),
        ({**NAMES, "TargetName": "iqn.2026-11.example:nothing"}, LoginStatus.NOT_FOUND),
        ({**NAMES, "SessionType": "Boot"}, LoginStatus.SESSION_TYPE_NOT_SUPPORTED),
        ({**NAMES, "CHAP_A": "5"}, LoginStatus.INITIATOR_ERROR),
        ({**NAMES, "AuthMethod": "None"}, LoginStatus.INITIATOR_ERROR),
        ({**NAMES, "SendTargets": "All"}, LoginStatus.INITIATOR_ERROR),
        ({**NAMES, "TargetAlias": "mine"}, LoginStatus.INITIATOR_ERROR),
        ({**NAMES, "FirstBurstLength": "4096", "MaxBurstLength": "512"}, LoginStatus.INITIATOR_ERROR),
        (encode_text([*NAMES.items(), ("TargetName", TARGET + "x")]), LoginStatus.INITIATOR_ERROR),
        (
            encode_text([*NAMES.items(), ("InitialR2T", "No"), ("InitialR2T", "No")]),
            LoginStatus.INITIATOR_ERROR,
        ),
        (b"no pair\0", LoginStatus.INITIATOR_ERROR),
        (encode_text(NAMES)[:-1], LoginStatus.INITIATOR_ERROR),
        (b"InitiatorName=\xff\0", LoginStatus.INITIATOR_ERROR),
        (encode_text(NAMES) + b"a=1\0" * 5, LoginStatus.INITIATOR_ERROR),
        (encode_text({**NAMES, **{f"X-{n}": "" for n in range(130)}}), LoginStatus.INITIATOR_ERROR),
    ],
)
def test_a_first_request_that_is_refused(keys: Any, expected: LoginStatus) -> None:
    target = MemoryTarget()
    peer = target.connect()
    header, _ = say(peer, keys)
    assert LoginStatus(status(header)) == expected
    assert header.flags == 0
    assert connection_of(peer).closing
    assert not target.sessions.sessions
    endpoint = peer.target
    assert isinstance(endpoint, Endpoint)
    (event,) = endpoint.events
    assert isinstance(event, LoginRefused)
    assert event.status == expected
    assert event.reason


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"version_min": 1, "version_max": 1}, LoginStatus.UNSUPPORTED_VERSION),
        ({"flags": 0x80 | 2 << 2 | 3}, LoginStatus.INITIATOR_ERROR),
        ({"flags": 0x80 | 3 << 2 | 3}, LoginStatus.INITIATOR_ERROR),
        ({"flags": 0x80 | 1 << 2 | 0}, LoginStatus.INITIATOR_ERROR),
        ({"flags": 0x80 | 1 << 2 | 1}, LoginStatus.INITIATOR_ERROR),
        ({"flags": 0x80 | 0 << 2 | 0}, LoginStatus.INITIATOR_ERROR),
        ({"flags": 0x80 | 1 << 2 | 2}, LoginStatus.INITIATOR_ERROR),
        ({"flags": 0xC0 | 1 << 2 | 3}, LoginStatus.INITIATOR_ERROR),
        ({"tsih": 77}, LoginStatus.SESSION_DOES_NOT_EXIST),
    ],
)
def test_a_header_that_is_refused(fields: dict[str, Any], expected: LoginStatus) -> None:
    """RFC 7143 §11.12.1 to §11.12.4, §11.12.6."""
    header, _ = say(MemoryTarget().connect(), NAMES, **fields)
    assert LoginStatus(status(header)) == expected


def test_an_initiator_that_speaks_later_versions_too_is_welcome() -> None:
    header, _ = say(MemoryTarget().connect(), NAMES, version_min=0, version_max=5)
    assert (status(header), header.version_active, header.version_max) == (0, 0, 0)


@pytest.mark.parametrize(
    "changed",
    [{"isid": bytes(6)}, {"tsih": 3}, {"cid": 9}, {"initiator_task_tag": 6}, {"stage": 0, "next_stage": 1}],
)
def test_what_may_not_change_within_a_login(changed: dict[str, Any]) -> None:
    """RFC 7143 §11.12.5 to §11.12.7, §6.3: nor may it go back a stage."""
    peer = MemoryTarget().connect()
    header, _ = say(peer, NAMES, transit=False)
    assert status(header) == 0
    header, _ = say(peer, b"", **changed)
    assert status(header) == LoginStatus.INITIATOR_ERROR


@pytest.mark.parametrize(
    "refusal",
    [
        LoginStatus.TARGET_MOVED_TEMPORARILY,
        LoginStatus.TARGET_MOVED_PERMANENTLY,
        LoginStatus.AUTHORIZATION_FAILURE,
        LoginStatus.TARGET_REMOVED,
        LoginStatus.CANNOT_INCLUDE_IN_SESSION,
        LoginStatus.TARGET_ERROR,
        LoginStatus.SERVICE_UNAVAILABLE,
        LoginStatus.OUT_OF_RESOURCES,
    ],
)
@pytest.mark.parametrize("discovery", [False, True])
def test_what_the_owner_decides_is_said(refusal: LoginStatus, discovery: bool) -> None:
    """Redirections say where to (RFC 7143 §11.13.5, §13.8)."""
    target = MemoryTarget()
    moved = refusal >> 8 == 1
    address = "[2001:db8::1]:3260" if moved else ""
    target.access.refusals[INITIATOR_NAME] = Refusal(refusal, "as the test wants it", address)
    with pytest.raises(LoginFailed) as failed:
        target.connect().login(None if discovery else TARGET)
    assert failed.value.status == refusal
    assert failed.value.keys == ({"TargetAddress": address} if moved else {})


def test_anything_else_during_login_is_answered_and_ends_it() -> None:
    """RFC 7143 §6.3: 020Bh once a login has begun."""
    peer = MemoryTarget().connect()
    say(peer, NAMES, transit=False)
    header = peer.request(peer.initiator.nop_out(b"x")).expect(bhs.LoginResponse)
    assert status(header) == LoginStatus.INVALID_DURING_LOGIN
    assert connection_of(peer).closing


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: target\r\n\r\n" + bytes(40),
        bytes(48),
        b"\xff" * 48,
        b"\x16\x03\x01" + bytes(60),
    ],
)
def test_anything_else_before_login_closes_without_a_word(garbage: bytes) -> None:
    """RFC 7143 §6.3: MUST immediately terminate the connection."""
    peer = MemoryTarget().connect()
    peer.send(garbage)
    assert peer.pending() == []
    assert connection_of(peer).closing


@pytest.mark.parametrize("lengths", [8193, 0xFFFFFF, 67 << 24])
def test_a_login_pdu_beyond_the_default_length_closes(lengths: int) -> None:
    """RFC 7143 §13.12: 8192 before it is negotiated. Nothing is allocated for it."""
    peer = MemoryTarget().connect()
    peer.send(peer.initiator.login_request(b"", lengths=lengths))
    assert peer.pending() == []
    assert "login" not in connection_of(peer).closing
    assert connection_of(peer).closing


def test_a_login_is_bounded_in_pdus_and_bytes() -> None:
    limits = LoginLimits()
    peer = MemoryTarget().connect()
    say(peer, NAMES, transit=False)
    said = [status(say(peer, b"", transit=False)[0]) for _ in range(limits.pdus)]
    assert said == [0] * (limits.pdus - 1) + [LoginStatus.INITIATOR_ERROR]
    peer = MemoryTarget().connect()
    many = limits.bytes // 8192
    said = [status(say(peer, b"A" * 8192, transit=False, more=True)[0]) for _ in range(many + 1)]
    assert said == [0] * many + [LoginStatus.INITIATOR_ERROR]
    assert len(connection_of(peer).framer._stash) == 0


def test_a_login_is_bounded_in_time() -> None:
    target = MemoryTarget()
    peer = target.connect()
    say(peer, NAMES, transit=False)
    connection = connection_of(peer)
    connection.tick(target.now + 15)
    assert not connection.closing
    connection.tick(target.now + 15.1)
    assert "no login" in connection.closing


def test_more_that_comes_with_a_refused_login_is_not_looked_at() -> None:
    target = MemoryTarget()
    peer = target.connect()
    peer.send(
        peer.initiator.login_request({"TargetName": TARGET})
        + peer.initiator.login_request(NAMES)
        + peer.initiator.nop_out(b"x")
    )
    (refused,) = peer.pending()
    assert status(refused.expect(bhs.LoginResponse)) == LoginStatus.MISSING_PARAMETER
    assert not target.sessions.sessions


# -- CHAP -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["hex", "base64"])
@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("algorithm", [5, 6, 7, 8])
def test_chap(algorithm: int, mutual: bool, encoding: str) -> None:
    """RFC 7143 §12.1.3, both directions; the test initiator checks the target's proof."""
    target = chap_target(AuthMethod.CHAP | AuthMethod.CHAP_MUTUAL if mutual else AuthMethod.CHAP)
    peer = target.connect()
    peer.login(
        TARGET,
        chap=(USER, SECRET),
        mutual=(PEER_USER, PEER_SECRET) if mutual else None,
        algorithms=[algorithm],
        encoding=encoding,
    )
    (session,) = target.sessions.sessions.values()
    assert session.user == USER


def test_mutual_chap_works_where_it_is_not_demanded_and_in_discovery() -> None:
    chap_target().connect().login(TARGET, chap=(USER, SECRET), mutual=(PEER_USER, PEER_SECRET))
    chap_target().connect().login(None, chap=(USER, SECRET))


@pytest.mark.parametrize(
    ("offered", "allowed", "chosen"),
    [("5,6,7,8", (8, 7, 6, 5), "5"), ("8,5", (5, 8), "8"), ("5,0x7", (7, 8), "7"), ("99,6", (5, 6), "6")],
)
def test_the_initiators_order_of_algorithms_decides(
    offered: str, allowed: tuple[int, ...], chosen: str
) -> None:
    peer = chap_target(chap_algorithms=allowed).connect()
    security(peer, {**NAMES, "AuthMethod": "CHAP"})
    _, keys = security(peer, {"CHAP_A": offered})
    assert keys["CHAP_A"] == chosen
    assert keys.keys() == {"CHAP_A", "CHAP_I", "CHAP_C"}


@pytest.mark.parametrize("offered", ["56", "", "5", ",", "md5", "5;6", "7" * 300])
def test_no_algorithm_in_common(offered: str) -> None:
    peer = chap_target(chap_algorithms=(7, 8)).connect()
    security(peer, {**NAMES, "AuthMethod": "CHAP"})
    header, _ = security(peer, {"CHAP_A": offered})
    assert status(header) in (LoginStatus.AUTHENTICATION_FAILURE, LoginStatus.INITIATOR_ERROR)
    assert connection_of(peer).closing


@pytest.mark.parametrize("name", ["0x616c696365", "0balice", "0xzz", "0X", "Ünïcode"])
def test_a_name_is_text_whatever_it_looks_like(name: str) -> None:
    """RFC 7143 §12.1.3: N is a text string."""
    target = MemoryTarget()
    credential = Credential(name, SECRET.encode(), "0bpeer", PEER_SECRET.encode())
    target.access.grant = replace(
        target.access.grant, methods=AuthMethod.CHAP, credentials=(ALICE, credential)
    )
    target.connect().login(TARGET, chap=(name, SECRET), mutual=("0bpeer", PEER_SECRET))


@pytest.mark.parametrize(
    "chap",
    [
        (USER, "wrong"),
        ("bob", SECRET),
        ("mallory", SECRET),
        ("", SECRET),
        ("ALICE ", SECRET),
        ("0x616c696365", SECRET),
    ],
)
def test_a_wrong_secret_and_an_unknown_user_look_the_same(chap: tuple[str, str]) -> None:
    target = chap_target()
    assert status_of(lambda: target.connect().login(TARGET, chap=chap)) == LoginStatus.AUTHENTICATION_FAILURE
    assert not target.sessions.sessions


@pytest.mark.parametrize(
    "log_in",
    [
        lambda peer: peer.login(TARGET),
        lambda peer: peer.login(TARGET, auth_method="KRB5,None"),
        lambda peer: peer.login(TARGET, skip_security=True),
        lambda peer: peer.login(None),
    ],
)
def test_without_chap_where_chap_is_demanded(log_in: Callable[[MemoryPeer], object]) -> None:
    peer = chap_target().connect()
    assert status_of(lambda: log_in(peer)) == LoginStatus.AUTHENTICATION_FAILURE


def test_a_challenge_where_none_is_wanted() -> None:
    """The method is chosen from both lists: CHAP is not ours."""
    peer = MemoryTarget().connect()
    log_in = lambda: peer.login(TARGET, chap=(USER, SECRET))  # noqa: E731
    assert status_of(log_in) == LoginStatus.AUTHENTICATION_FAILURE


def test_the_first_method_of_the_initiators_list_that_is_allowed() -> None:
    peer = chap_target(AuthMethod.NONE | AuthMethod.CHAP).connect()
    _, keys = security(peer, {**NAMES, "AuthMethod": "KRB5,CHAP,None"})
    assert keys["AuthMethod"] == "CHAP"


@pytest.mark.parametrize(
    ("methods", "chap", "mutual"),
    [
        (AuthMethod.CHAP | AuthMethod.CHAP_MUTUAL, (USER, SECRET), None),  # demanded and not done
        (AuthMethod.CHAP, ("bob", "secret of bob..."), (PEER_USER, PEER_SECRET)),  # no secret to prove
    ],
)
def test_mutual_in_the_wrong_direction(methods: AuthMethod, chap: Any, mutual: Any) -> None:
    peer = chap_target(methods).connect()
    log_in = lambda: peer.login(TARGET, chap=chap, mutual=mutual)  # noqa: E731
    assert status_of(log_in) == LoginStatus.AUTHENTICATION_FAILURE


def test_one_secret_in_both_directions_is_refused() -> None:
    """RFC 7143 §9.2.1."""
    target = MemoryTarget()
    same = Credential(USER, SECRET.encode(), PEER_USER, SECRET.encode())
    target.access.grant = replace(target.access.grant, methods=AuthMethod.CHAP, credentials=(same,))
    log_in = lambda: target.connect().login(TARGET, chap=(USER, SECRET), mutual=(PEER_USER, SECRET))  # noqa: E731
    assert status_of(log_in) == LoginStatus.AUTHENTICATION_FAILURE


def challenged(peer: MemoryPeer, algorithm: int = 5) -> tuple[dict[str, str], bytes]:
    """Up to the target's challenge: its keys, and the right answer."""
    security(peer, {**NAMES, "AuthMethod": "CHAP"})
    _, keys = security(peer, {"CHAP_A": str(algorithm)})
    challenge = bytes.fromhex(keys["CHAP_C"][2:])
    return keys, chap_response(algorithm, int(keys["CHAP_I"]), SECRET, challenge)


def test_our_own_challenge_reflected_is_refused() -> None:
    """RFC 7143 §9.2.1, §12.1.3: MUST check."""
    peer = chap_target().connect()
    keys, answer = challenged(peer)
    reflected = {
        "CHAP_N": USER,
        "CHAP_R": "0x" + answer.hex(),
        "CHAP_I": keys["CHAP_I"],
        "CHAP_C": keys["CHAP_C"],
    }
    header, said = security(peer, reflected, transit=True)
    assert status(header) == LoginStatus.AUTHENTICATION_FAILURE
    assert not said


def answers(right: bytes) -> Iterable[dict[str, str]]:
    text = "0x" + right.hex()
    good = {"CHAP_N": USER, "CHAP_R": text}
    yield {"CHAP_N": USER}
    yield {"CHAP_R": text}
    yield {"CHAP_I": "1", "CHAP_C": "0x" + "11" * 16}
    for wrong in (
        "",
        "0x",
        "0b",
        right.hex(),
        text[:-2],
        text + "00",
        text + "11" * 1000,
        "0x" + "zz" * 16,
        "0b" + b64encode(right + b"x").decode(),
        "0b" + b64encode(right).decode()[:-1],
        "0b" + "q" * 1366,
        str(int.from_bytes(right, "big")),
    ):
        yield good | {"CHAP_R": wrong}
    for identifier in ("256", "-1", "", "x"):
        yield good | {"CHAP_I": identifier, "CHAP_C": "0x" + "11" * 16}
    for challenge in ("", "0x", "abc", "0x" + "11" * 1025):
        yield good | {"CHAP_I": "1", "CHAP_C": challenge}
    yield good | {"CHAP_I": "1"}
    yield good | {"CHAP_C": "0x" + "11" * 16}


@pytest.mark.parametrize("number", range(len(list(answers(bytes(16))))))
def test_answers_to_a_challenge_that_are_none(number: int) -> None:
    peer = chap_target().connect()
    wrong = list(answers(challenged(peer)[1]))[number]
    header, said = security(peer, wrong, transit=True)
    assert status(header) in (LoginStatus.AUTHENTICATION_FAILURE, LoginStatus.INITIATOR_ERROR)
    assert not said


@pytest.mark.parametrize(
    "keys", [{"CHAP_A": "5"}, {"CHAP_N": USER, "CHAP_R": "0x00"}, {"AuthMethod": "CHAP"}]
)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_steps_of_chap_out_of_order(keys: dict[str, str], after: int) -> None:
    """Nothing may be done twice, or before its turn."""
    order = [{"AuthMethod": "CHAP"}, {"CHAP_A": "5"}, {"CHAP_N": USER, "CHAP_R": "0x00"}]
    if keys == order[after]:
        return
    peer = chap_target().connect()
    security(peer, NAMES)
    for step in order[:after]:
        security(peer, step)
    header, _ = security(peer, keys)
    assert status(header)


@pytest.mark.parametrize("nsg", [1, 3])
@pytest.mark.parametrize("steps", [1, 2])
def test_no_way_round_an_exchange_that_has_begun(nsg: int, steps: int) -> None:
    """Asking for the next stage does not get there."""
    target = chap_target()
    peer = target.connect()
    header, _ = security(peer, {**NAMES, "AuthMethod": "CHAP"}, transit=True, next_stage=nsg)
    assert (status(header), header.flags & 0x80) == (0, 0)
    if steps == 2:
        header, _ = security(peer, {"CHAP_A": "5"}, transit=True, next_stage=nsg)
        assert (status(header), header.flags & 0x80) == (0, 0)
    header, _ = security(peer, b"", transit=True, next_stage=nsg)
    assert header.flags & 0x80 == 0
    header, _ = say(peer, {"InitialR2T": "No"})
    assert status(header)
    assert not target.sessions.sessions


def test_every_challenge_is_new() -> None:
    target = chap_target()
    endpoint = Endpoint(target)
    one = MemoryPeer(endpoint, endpoint.serve)
    values = {challenged(one)[0]["CHAP_C"]}
    endpoint.connection._login = LoginMachine(
        target.access, endpoint.connection, lambda n: bytes([7]) * n, LoginLimits()
    )
    values.add(challenged(one, 7)[0]["CHAP_C"])
    assert len(values) == 2
    assert "0x" + "07" * 32 in values  # as many bytes as the hash has


def test_a_session_is_joined_only_by_its_own_user() -> None:
    """RFC 7143 §6.3.1 with §9.2: the same port name is no proof."""
    target = chap_target(offer=Offer(max_connections=2))
    one = target.connect()
    one.login(TARGET, chap=(USER, SECRET), keys={"MaxConnections": "2"})
    two = target.connect(session=one.session)
    two.initiator.cid = 2
    log_in = lambda: two.login(TARGET, chap=("bob", "secret of bob..."))  # noqa: E731
    assert status_of(log_in) == LoginStatus.AUTHORIZATION_FAILURE


def test_a_session_is_ended_by_a_login_of_its_own_user_alone() -> None:
    """RFC 7143 §6.3.5 with §9.2: initiator name and ISID are claimed, the user is proven."""
    target = chap_target(AuthMethod.CHAP | AuthMethod.NONE)
    alice = target.logged_in(chap=(USER, SECRET))

    def same(**login: Any) -> None:
        target.connect(session=SessionState(isid=alice.session.isid)).login(TARGET, **login)

    assert status_of(lambda: same(chap=("bob", "secret of bob..."))) == LoginStatus.AUTHORIZATION_FAILURE
    assert status_of(same) == LoginStatus.AUTHORIZATION_FAILURE
    assert alice.command(bytes(6)).good
    same(chap=(USER, SECRET))
    assert connection_of(alice).closing == "session reinstatement"


@pytest.mark.parametrize("change", ["proof is asked for now", "the user is no more"])
def test_a_session_that_nobody_can_prove_to_be_theirs_gives_way(change: str) -> None:
    """Otherwise a change of the accounts would lock an initiator out by its own old session."""
    target = chap_target(AuthMethod.NONE if change == "proof is asked for now" else AuthMethod.CHAP)
    one = target.logged_in(**({} if change == "proof is asked for now" else {"chap": (USER, SECRET)}))
    target.access.grant = replace(target.access.grant, methods=AuthMethod.CHAP, credentials=(BOB,))
    peer = target.connect(session=SessionState(isid=one.session.isid))
    peer.login(TARGET, chap=("bob", "secret of bob..."))
    assert connection_of(one).closing == "session reinstatement"


def test_answers_to_challenges_are_counted_and_who_must_wait_is_not_looked_at() -> None:
    """A right answer looks the same as a wrong one then: nothing is learnt by asking on."""
    target = chap_target()
    for user, secret in ((USER, SECRET), (USER, "wrong"), ("nobody", SECRET)):
        with contextlib.suppress(LoginFailed):
            target.connect().login(TARGET, chap=(user, secret))
    assert target.access.answers == [(USER, True), (USER, False), ("nobody", False)]
    target.access.wait_s = 5
    for secret in (SECRET, "wrong"):
        log_in = lambda secret=secret: target.connect().login(TARGET, chap=(USER, secret))  # noqa: E731
        assert status_of(log_in) == LoginStatus.SERVICE_UNAVAILABLE
    assert len(target.access.answers) == 3


# -- what changes while a login is under way --------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Refusal(LoginStatus.NOT_FOUND, "no such target"), LoginStatus.TARGET_REMOVED),
        (Refusal(LoginStatus.SERVICE_UNAVAILABLE, "stopped"), LoginStatus.SERVICE_UNAVAILABLE),
        (
            Refusal(LoginStatus.TARGET_MOVED_TEMPORARILY, "moved", "192.0.2.1:3260"),
            LoginStatus.TARGET_MOVED_TEMPORARILY,
        ),
        ({"target": object()}, LoginStatus.TARGET_REMOVED),
        ({"methods": AuthMethod.CHAP}, LoginStatus.AUTHENTICATION_FAILURE),
        ({"methods": AuthMethod.CHAP | AuthMethod.NONE}, LoginStatus.SUCCESS),
    ],
)
def test_what_is_granted_must_be_granted_still_when_the_login_ends(
    change: Refusal | dict[str, Any], expected: LoginStatus
) -> None:
    """RFC 7143 §11.13.5: "The requested iSCSI Target Name (ITN) has been removed at this location"."""
    target = MemoryTarget()
    peer = target.connect()
    header, _ = say(peer, NAMES, transit=False)
    assert status(header) == 0
    if isinstance(change, Refusal):
        target.access.refusals[INITIATOR_NAME] = change
    else:
        target.access.grant = replace(target.access.grant, **change)
    header, keys = say(peer, b"")
    assert LoginStatus(status(header)) == expected
    assert keys == ({"TargetAddress": "192.0.2.1:3260"} if expected >> 8 == 1 else {})
    assert bool(target.sessions.sessions) is (expected == LoginStatus.SUCCESS)


def test_a_bug_is_the_end_of_that_login_alone() -> None:
    """RFC 7143 §11.13.5: 0300h, "target hardware or software error"; the owner has what to log."""
    target = MemoryTarget()
    one = target.logged_in()
    peer = target.connect()
    target.access.grant = None  # type: ignore[assignment]  # nobody foresees this
    header, keys = say(peer, NAMES)
    assert (status(header), keys) == (LoginStatus.TARGET_ERROR, {})
    endpoint = peer.target
    assert isinstance(endpoint, Endpoint)
    (event,) = endpoint.events
    assert isinstance(event, LoginRefused)
    assert event.bug is not None
    assert connection_of(peer).closing
    assert one.nop(b"x")


@pytest.mark.parametrize("name", sorted(KEYS))
def test_operational_keys_have_no_place_in_the_security_stage(name: str) -> None:
    """RFC 7143 §12: what may be said there is listed, and of §13 only the names of the parties are."""
    header, _ = security(MemoryTarget().connect(), {**NAMES, "AuthMethod": "None", name: "1"})
    assert status(header) == LoginStatus.INITIATOR_ERROR


@pytest.mark.parametrize("name", sorted(SECURITY_KEYS))
def test_security_keys_have_no_place_in_the_operational_stage(name: str) -> None:
    """RFC 7143 §12."""
    header, _ = say(MemoryTarget().connect(), {**NAMES, name: "None"})
    assert status(header) == LoginStatus.INITIATOR_ERROR


# -- the machine, with anything ---------------------------------------------------------------------


class Open:
    """Lets everybody in."""

    def __init__(self, methods: AuthMethod = AuthMethod.CHAP) -> None:
        self.grant = Grant(methods, Offer(), 1, TARGET, credentials=(ALICE,))
        self.admitted: list[LoginResult] = []
        self.wait_s = 0.0
        self.answers: list[tuple[str, bool]] = []

    def discovery(self, initiator_name: str) -> Grant | Refusal:
        return replace(self.grant, target_name="")

    def target(self, initiator_name: str, target_name: str) -> Grant | Refusal:
        return self.grant

    def send_targets(self, initiator_name: str, target_name: str | None) -> TargetList:
        return TargetList(())

    def chap_wait_s(self, user: str) -> float:
        return self.wait_s

    def chap_judged(self, user: str, right: bool) -> None:
        self.answers.append((user, right))

    def admit(self, login: LoginResult) -> int | Refusal:
        self.admitted.append(login)
        return 17


def machine(owner: Open, limits: LoginLimits | None = None) -> LoginMachine:
    numbers = count(1)
    return LoginMachine(
        owner,
        owner,
        lambda n: next(numbers).to_bytes(n, "big"),
        limits or LoginLimits(pdus=10**6, bytes=10**7),
    )


def request(flags: int, **fields: Any) -> bhs.LoginRequest:
    values = {
        "opcode": 0x43,
        "flags": flags,
        "version_max": 0,
        "version_min": 0,
        "lengths": 0,
        "isid": b"abcdef",
        "tsih": 0,
        "initiator_task_tag": 1,
        "cid": 1,
        "cmd_sn": 1,
        "exp_stat_sn": 0,
    }
    return bhs.LoginRequest(**(values | fields))


def converse(owner: Open, cuts: Callable[[bytes], Iterable[bytes]]) -> list[LoginReply]:
    """A whole login with CHAP, each text said in pieces; the replies to the last of each."""
    login = machine(owner)
    replies = []
    answer = chap_response(5, 1, SECRET, (2).to_bytes(16, "big"))
    for flags, keys in (
        (0x00, {**NAMES, "InitiatorAlias": "Größe", "AuthMethod": "CHAP,None"}),
        (0x00, {"CHAP_A": "5,8"}),
        (0x81, {"CHAP_N": USER, "CHAP_R": encode_binary(answer, "base64")}),
        (
            0x87,
            {"HeaderDigest": "CRC32C,None", "InitialR2T": "No", "X-unknown": "1", "MaxBurstLength": "4096"},
        ),
    ):
        pieces = [*cuts(encode_text(keys))]
        for piece in pieces[:-1]:
            reply = login.receive(request(flags & 0x0C | 0x40), piece)
            assert (reply.status, reply.flags, reply.data) == (0, flags & 0x0C, b"")
        replies.append(login.receive(request(flags), pieces[-1]))
    return replies


@given(st.lists(st.integers(0, 200), max_size=5))
def test_login_text_may_be_cut_anywhere(cuts: list[int]) -> None:
    """RFC 7143 §6.2: a pair may begin in one PDU and end in another, even inside a character."""

    def cut(text: bytes) -> Iterable[bytes]:
        at = 0
        for end in (*sorted(min(place, len(text)) for place in cuts), len(text)):
            yield text[at:end]
            at = end

    whole, pieces = Open(), Open()
    expected = converse(whole, lambda text: [text])
    assert converse(pieces, cut) == expected
    assert expected[-1].result == whole.admitted[0] == pieces.admitted[0]
    assert whole.admitted[0].user == USER


TEXTS = st.one_of(
    st.binary(max_size=120),
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    *NAMES,
                    "AuthMethod",
                    "CHAP_A",
                    "CHAP_N",
                    "CHAP_R",
                    "CHAP_I",
                    "CHAP_C",
                    "HeaderDigest",
                    "InitialR2T",
                    "MaxBurstLength",
                    "FirstBurstLength",
                    "X-a",
                    "IFMarker",
                ]
            ),
            st.one_of(
                st.text(max_size=10), st.sampled_from(["CHAP", "None", "5", "Yes", "0x00", INITIATOR_NAME])
            ),
        ),
        max_size=6,
    ).map(lambda pairs: encode_text([(key, value.replace("\0", "")) for key, value in pairs])),
)


@given(st.lists(st.tuples(st.integers(0, 255), TEXTS), max_size=8), st.booleans())
def test_any_text_ends_in_a_reply_and_proves_nothing(said: list[tuple[int, bytes]], named: bool) -> None:
    """No exception, and nobody gets in who does not know the secret."""
    owner = Open()
    login = machine(owner)
    if named:
        login.receive(request(0x00), encode_text(NAMES))
    for flags, text in said:
        reply = login.receive(request(flags), text)
        assert reply.result is None
        if reply.status >> 8:
            assert reply.reason
            assert reply.flags == 0
            assert reply.bug is None
            break
    assert not owner.admitted


@pytest.mark.parametrize("stage", [LoginStage.SECURITY, LoginStage.OPERATIONAL])
def test_next_stage_is_reserved_without_transit(stage: LoginStage) -> None:
    """RFC 7143 §11.12.3: NSG is only valid with T."""
    owner = Open(AuthMethod.NONE)
    login = machine(owner)
    for nsg in (3, 2, 1, 0):
        text = encode_text(NAMES) if nsg == 3 else b""
        reply = login.receive(request(stage << 2 | nsg), text)
        assert (reply.status, reply.flags) == (0, stage << 2)
    assert not owner.admitted
