"""Text Requests in full feature phase (RFC 7143 §11.10, §11.11, appendix C)."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import bhs
from protocol.access import Credential, TargetList, TargetRecord
from protocol.enums import RESERVED_TAG, AsyncEvent, AuthMethod, RejectReason
from tests import cdbs
from tests.initiator import INITIATOR_NAME, MemoryPeer, Rejected, encode_text
from tests.protocol.target import TARGET, MemoryTarget, connection_of

OTHER = "iqn.2026-11.example:other"
V4, V6 = ("192.0.2.1:3260", 1), ("[2001:db8::1]:3260", 2)


def pattern(size: int) -> bytes:
    return bytes(n * 7 & 0xFF for n in range(size))


def discovery(target: MemoryTarget | None = None, **login: Any) -> MemoryPeer:
    target = target or two_targets()
    peer = target.connect()
    peer.login(None, **login)
    return peer


def two_targets() -> MemoryTarget:
    target = MemoryTarget()
    target.access.records = [TargetRecord(TARGET, (V4, V6)), TargetRecord(OTHER, (V4,))]
    return target


MINE = [
    ("TargetName", TARGET),
    ("TargetAddress", "192.0.2.1:3260,1"),
    ("TargetAddress", "[2001:db8::1]:3260,2"),
]
THE_OTHER = [("TargetName", OTHER), ("TargetAddress", "192.0.2.1:3260,1")]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("All", MINE + THE_OTHER),
        (TARGET, MINE),
        (OTHER.upper(), THE_OTHER),
        ("iqn.2026-11.example:nothing", []),
    ],
)
def test_send_targets_in_a_discovery_session(value: str, found: list[tuple[str, str]]) -> None:
    """RFC 7143 appendix C."""
    assert discovery().text({"SendTargets": value}) == found


@pytest.mark.parametrize(("value", "found"), [("All", MINE + THE_OTHER), ("", MINE), (TARGET, MINE)])
def test_send_targets_in_a_normal_session(value: str, found: list[tuple[str, str]]) -> None:
    """All is answered in full: libiscsi asks so."""
    assert two_targets().logged_in().text({"SendTargets": value}) == found


PROOF = Credential("alice", b"secret of alice!")


def discovery_needs_a_proof(target: MemoryTarget) -> None:
    target.access.discovery_grant = replace(
        target.access.grant, target_name="", target=None, methods=AuthMethod.CHAP, credentials=(PROOF,)
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [("All", MINE), ("", MINE), (TARGET, MINE), (OTHER, []), ("iqn.2026-11.example:no", [])],
)
def test_a_normal_session_is_told_of_its_own_target_alone_where_discovery_needs_a_proof(
    value: str, found: list[tuple[str, str]]
) -> None:
    """It would be a door beside the one that is locked."""
    target = two_targets()
    discovery_needs_a_proof(target)
    assert target.logged_in().text({"SendTargets": value}) == found


def test_discovery_by_proof_is_told_of_all_and_one_from_before_of_nothing() -> None:
    target = two_targets()
    before = discovery(target)
    discovery_needs_a_proof(target)
    with pytest.raises(Rejected):
        before.text({"SendTargets": "All"})
    proven = discovery(target, chap=("alice", "secret of alice!"))
    assert proven.text({"SendTargets": "All"}) == MINE + THE_OTHER
    target.access.discovery_grant = replace(target.access.discovery_grant, credentials=())
    with pytest.raises(Rejected):  # the user is no more
        proven.text({"SendTargets": "All"})


@pytest.mark.parametrize(
    "text",
    [
        b"SendTargets=Alle\0",
        b"SendTargets=A\0",
        b"sENDtARGETS=aLL\0",
        b"SendTargets=all\0",
        b"SendTargets=*\0",
        b"SendTargets=iqn.\0",
        b"SendTargets=All",
        b"SendTargets\0",
        b"=All\0",
        b"\xff\xff=\0",
        b"SendTargets=All\0SendTargets=All\0",
        b"MaxBurstLength=512\0",
        b"InitialR2T=No\0",
        b"AuthMethod=CHAP\0",
        b"CHAP_A=5\0",
        b"InitiatorName=iqn.x:y\0",
        b"TargetName=iqn.x:y\0",
        b"SessionType=Normal\0",
        b"TargetAddress=192.0.2.9:3260\0",
        b"MaxRecvDataSegmentLength=511\0",
        b"MaxRecvDataSegmentLength=x\0",
        b"HeaderDigest=None\0",
        b"A" * 100,
    ],
)
@pytest.mark.parametrize("normal", [False, True])
def test_what_is_rejected_and_the_connection_goes_on(text: bytes, normal: bool) -> None:
    """RFC 7143 §6.3 and §13, "Use": keys of login have no place here."""
    peer = two_targets().logged_in() if normal else discovery()
    with pytest.raises(Rejected) as rejected:
        peer.text(text)
    assert rejected.value.reason == RejectReason.PROTOCOL_ERROR
    assert rejected.value.pdu.data[0] == 0x04
    assert peer.text({"SendTargets": "All"}) == MINE + THE_OTHER


def test_send_targets_of_nothing_in_a_discovery_session() -> None:
    with pytest.raises(Rejected):
        discovery().text({"SendTargets": ""})


@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        ({}, []),
        (
            {"X-com.example": "1", "Frob": "2"},
            [("X-com.example", "NotUnderstood"), ("Frob", "NotUnderstood")],
        ),
        ({"IFMarkInt": "1~5"}, [("IFMarkInt", "Reject")]),
        ({"InitiatorAlias": "me"}, []),
        ({"Frob": "NotUnderstood"}, []),
    ],
)
def test_other_keys(keys: dict[str, str], answer: list[tuple[str, str]]) -> None:
    """RFC 7143 §6.2, §13.7, §13.25."""
    assert two_targets().logged_in().text(keys) == answer


def test_a_new_segment_length_holds_from_the_next_pdu_on() -> None:
    """RFC 7143 §13.12: may be declared at any time."""
    target = MemoryTarget()
    peer = target.logged_in()
    assert peer.text({"MaxRecvDataSegmentLength": "1024"}) == [("MaxRecvDataSegmentLength", "262144")]
    peer.initiator.max_data_in = peer.max_data_in = 1024
    assert len(peer.command(cdbs.read10(0, 64), read=32768).data) == 32768
    assert connection_of(peer).send_limit == 1024
    assert peer.nop(bytes(4096)).data == bytes(1024)


def exchange(peer: MemoryPeer, keys: dict[str, str], tag: int = RESERVED_TAG, **fields: Any) -> Any:
    """One Text Request of an exchange and its answer."""
    request = peer.initiator.text_request(keys, transfer_tag=tag, initiator_task_tag=9, **fields)
    return peer.request(request)


def test_what_is_declared_holds_when_the_exchange_is_over() -> None:
    """RFC 7143 §6.4: parameters become effective only after the negotiation sequence is completed, and one
    that is given up or rejected changes nothing."""
    target = MemoryTarget()
    peer = target.logged_in()
    connection = connection_of(peer)
    before = connection.send_limit
    new = {"MaxRecvDataSegmentLength": "1024"}
    tag = exchange(peer, new, final=False).expect(bhs.TextResponse).target_transfer_tag
    assert connection.send_limit == before
    assert exchange(peer, {}, tag).expect(bhs.TextResponse).flags == 0x80
    assert connection.send_limit == connection.keys.max_recv_data_segment_length_initiator == 1024
    exchange(peer, {"MaxRecvDataSegmentLength": "2048"}, final=False).expect(bhs.TextResponse)
    assert peer.text({"Frob": "1"}) == [("Frob", "NotUnderstood")]
    assert connection.send_limit == 1024
    tag = exchange(peer, {"MaxRecvDataSegmentLength": "2048"}, final=False).header.target_transfer_tag
    rejected = exchange(peer, {"MaxRecvDataSegmentLength": "4096"}, tag).expect(bhs.Reject)
    assert rejected.reason == RejectReason.PROTOCOL_ERROR
    assert connection.send_limit == 1024


# -- negotiation that the target asks for (RFC 7143 §11.9.1, event 4) -------------------------------


def configured(target: MemoryTarget, length: int, alias: str = "") -> None:
    """What is granted from now on."""
    grant = target.access.grant
    offer = replace(grant.offer, max_recv_data_segment_length=length)
    target.access.grant = replace(grant, offer=offer, target_alias=alias)


def asked(peer: MemoryPeer, within_s: int = 5) -> None:
    assert connection_of(peer).request_negotiation(within_s)
    message = peer.wait_for_async().expect(bhs.AsyncMessage)
    assert (message.async_event, message.parameter3) == (AsyncEvent.NEGOTIATION_REQUEST, within_s)
    assert (message.parameter1, message.parameter2, message.data_segment_length) == (0, 0, 0)


@pytest.mark.parametrize("keys", [{}, {"MaxRecvDataSegmentLength": "4096"}, {"Frob": "1"}])
def test_the_target_declares_what_holds_now_when_it_asked_for_the_negotiation(keys: dict[str, str]) -> None:
    """The Text Request may be empty (RFC 7143 §11.9.1); nothing of it is said in a later one."""
    target = MemoryTarget()
    peer = target.logged_in()
    configured(target, 524288, "vault")
    asked(peer)
    said = dict(peer.text(keys))
    assert said["MaxRecvDataSegmentLength"] == "524288"
    assert said["TargetAlias"] == "vault"
    assert peer.text({"Frob": "1"}) == [("Frob", "NotUnderstood")]
    target.pass_time(6)
    assert not connection_of(peer).closing
    assert peer.command(cdbs.write10(0, 1024), pattern(524288), unsolicited=0).good


def test_a_longer_segment_is_taken_after_a_negotiation_and_not_before() -> None:
    """RFC 7143 §13.12."""
    target = MemoryTarget()
    peer = target.logged_in()
    configured(target, 524288)
    connection = connection_of(peer)
    assert connection.framer.max_data == 262144
    asked(peer)
    tag = exchange(peer, {}, final=False).expect(bhs.TextResponse).target_transfer_tag
    assert connection.framer.max_data == 262144
    exchange(peer, {}, tag).expect(bhs.TextResponse)
    assert connection.framer.max_data == 524288


def test_a_shorter_segment_is_declared_and_what_is_on_its_way_is_taken() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    configured(target, 8192)
    asked(peer)
    assert peer.text({}) == [("MaxRecvDataSegmentLength", "8192")]
    assert peer.nop(bytes(8192)).data == bytes(8192)
    assert peer.command(cdbs.write10(0, 64), pattern(32768), immediate_data=32768).good


def test_a_text_request_that_was_pending_is_the_answer() -> None:
    """RFC 7143 §11.9.1: "unless a Text Request is already pending on the connection"."""
    target = MemoryTarget()
    peer = target.logged_in()
    tag = exchange(peer, {"Frob": "1"}, final=False).expect(bhs.TextResponse).target_transfer_tag
    configured(target, 524288)
    asked(peer)
    assert ("MaxRecvDataSegmentLength", "524288") in exchange(peer, {}, tag).text
    target.pass_time(6)
    assert not connection_of(peer).closing


def test_the_target_does_not_lose_its_word_when_the_initiators_is_rejected() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    asked(peer)
    with pytest.raises(Rejected):
        peer.text({"MaxBurstLength": "512"})
    tag = exchange(peer, {}, final=False).expect(bhs.TextResponse).target_transfer_tag
    exchange(peer, {"MaxBurstLength": "512"}, tag).expect(bhs.Reject)
    assert peer.text({}) == [("MaxRecvDataSegmentLength", "262144")]
    assert peer.text({}) == []


def test_an_initiator_that_is_asked_to_negotiate_and_does_not_is_dropped() -> None:
    """Others of the session are told by event 2 (RFC 7143 §11.9.1); without recovery of connections the
    session ends with it."""
    target = MemoryTarget(error_recovery_level=2, max_connections=2)
    first = target.logged_in(keys={"ErrorRecoveryLevel": "2", "MaxConnections": "2"})
    second = target.connect(session=first.session)
    second.initiator.cid = 2
    second.login(TARGET)
    asked(first)
    assert connection_of(first).request_negotiation(9)  # is one already
    assert first.pending() == []
    target.pass_time(5)
    assert not connection_of(first).closing
    target.pass_time(1)
    assert connection_of(first).closing
    message = second.wait_for_async().expect(bhs.AsyncMessage)
    assert (message.async_event, message.parameter1) == (AsyncEvent.CONNECTION_DROP, connection_of(first).cid)
    assert second.nop(b"still here")


def test_a_logout_answers_a_request_to_negotiate() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    asked(peer)
    assert peer.logout().response == 0
    assert not connection_of(peer).request_negotiation(5)


@pytest.mark.parametrize("length", ["512", "1000", "8192"])
def test_an_answer_over_many_pdus(length: str) -> None:
    """RFC 7143 §11.11.1 to §11.11.4: C, F and the Target Transfer Tag, checked by the test initiator."""
    target = MemoryTarget()
    names = [f"iqn.2026-11.example:target-{n}" for n in range(300)]
    target.access.records = [TargetRecord(name, (V4,)) for name in names]
    peer = discovery(target, keys={"MaxRecvDataSegmentLength": length})
    assert [found.name for found in peer.discover()] == names
    assert peer.logout().response == 0


def test_a_request_over_many_pdus() -> None:
    """RFC 7143 §11.10.2: one byte each."""
    peer = discovery()
    text = encode_text({"SendTargets": "All"})
    transfer_tag = RESERVED_TAG
    for n, byte in enumerate(text):
        last = n == len(text) - 1
        pdu = peer.request(
            peer.initiator.text_request(
                bytes((byte,)), final=last, more=not last, transfer_tag=transfer_tag, initiator_task_tag=9
            )
        )
        header = pdu.expect(bhs.TextResponse)
        transfer_tag = header.target_transfer_tag
        assert (header.flags, pdu.data == b"", transfer_tag == RESERVED_TAG) == (0x80 * last, not last, last)
    assert pdu.text == MINE + THE_OTHER


def test_we_end_only_when_the_initiator_does() -> None:
    """RFC 7143 §11.11.1: F in answer to a request without it is a protocol error."""
    peer = discovery(keys={"MaxRecvDataSegmentLength": "512"})
    target_of(peer).access.records = [TargetRecord(f"{OTHER}-{n}", (V4,)) for n in range(12)]

    def ask(data: bytes, final: bool, tag: int) -> bhs.TextResponse:
        request = peer.initiator.text_request(data, final=final, transfer_tag=tag, initiator_task_tag=9)
        return peer.request(request).expect(bhs.TextResponse)

    header = ask(encode_text({"SendTargets": "All"}), True, RESERVED_TAG)
    flags = [header.flags]
    while header.flags & 0x40:
        header = ask(b"", False, header.target_transfer_tag)
        flags.append(header.flags)
    assert flags == [0x40] * (len(flags) - 1) + [0]
    header = ask(b"", True, header.target_transfer_tag)
    assert (header.flags, header.target_transfer_tag, header.data_segment_length) == (0x80, RESERVED_TAG, 0)


def target_of(peer: MemoryPeer) -> MemoryTarget:
    return peer.target._target  # type: ignore[attr-defined,no-any-return]  # its Endpoint's


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 0xC0},
        {"transfer_tag": 77},
        {"initiator_task_tag": RESERVED_TAG},
    ],
)
def test_a_header_that_cannot_be(fields: dict[str, int]) -> None:
    """RFC 7143 §11.10.1 to §11.10.4."""
    peer = discovery()
    peer.send(peer.initiator.text_request({"SendTargets": "All"}, **fields))  # type: ignore[arg-type]
    (pdu,) = peer.pending()
    assert pdu.expect(bhs.Reject).reason in (RejectReason.PROTOCOL_ERROR, RejectReason.INVALID_PDU_FIELD)
    assert peer.text({"SendTargets": "All"})


def test_an_answer_under_way_is_not_interrupted_but_may_be_given_up() -> None:
    """RFC 7143 §11.10.4: FFFFFFFFh begins anew."""
    peer = discovery(keys={"MaxRecvDataSegmentLength": "512"})
    target_of(peer).access.records = [TargetRecord(f"{OTHER}-{n}", (V4,)) for n in range(20)]
    request = peer.initiator.text_request
    header = peer.request(request({"SendTargets": "All"}, initiator_task_tag=9)).expect(bhs.TextResponse)
    again = request(b"A=1\0", transfer_tag=header.target_transfer_tag, initiator_task_tag=9)
    assert peer.request(again).expect(bhs.Reject).reason == RejectReason.PROTOCOL_ERROR
    header = peer.request(request({"SendTargets": "All"}, initiator_task_tag=9)).expect(bhs.TextResponse)
    assert len(peer.discover()) == 20
    stale = request(b"", transfer_tag=header.target_transfer_tag, initiator_task_tag=9)
    assert peer.request(stale).expect(bhs.Reject)


def test_a_request_without_end_is_rejected() -> None:
    peer = discovery()
    tag = RESERVED_TAG
    answered = 0
    while True:
        request = peer.initiator.text_request(
            b"A" * 1024, final=False, more=True, transfer_tag=tag, initiator_task_tag=9
        )
        pdu = peer.request(request)
        if isinstance(pdu.header, bhs.Reject):
            break
        answered += 1
        tag = pdu.expect(bhs.TextResponse).target_transfer_tag
    assert answered == 8
    assert not connection_of(peer)._text._gathered  # type: ignore[union-attr]


def test_small_questions_with_long_answers_do_not_pile_up() -> None:
    """Thousands of requests in one delivery, each for the names of hundreds of targets."""
    target = MemoryTarget()
    target.access.records = [TargetRecord(f"{OTHER}-{n}", (V4,)) for n in range(500)]
    peer = discovery(target, keys={"MaxRecvDataSegmentLength": "262144"})
    ask = peer.initiator.text_request({"SendTargets": "All"}, immediate=True, initiator_task_tag=9)
    peer.send(ask * 5000)
    queued = peer.target.data_to_send()
    assert sum(map(len, queued)) < 2_000_000
    rejects = sum(bytes(part[:1]) == b"\x3f" for part in queued if len(part) == 48)
    assert rejects > 4900
    peer.initiator.exp_stat_sn = None
    assert len(peer.discover()) == 500


@pytest.mark.parametrize("what", ["command", "nop"])
def test_a_discovery_session_is_for_discovery(what: str) -> None:
    """RFC 7143 §4.3: all other requests MUST be rejected."""
    peer = discovery()
    with pytest.raises(Rejected) as rejected:
        if what == "nop":
            peer.nop(b"x")
        else:
            peer.command(bytes(6))
    assert rejected.value.reason == RejectReason.PROTOCOL_ERROR
    assert peer.discover()
    assert peer.logout().response == 0


def test_discovery_shows_what_the_initiator_may_see() -> None:
    target = two_targets()
    seen: list[tuple[str, str | None]] = []
    send = target.access.send_targets

    def look(name: str, wanted: str | None) -> TargetList:
        seen.append((name, wanted))
        return send(name, wanted)

    target.access.send_targets = look  # type: ignore[method-assign]
    discovery(target).discover()
    assert seen == [(INITIATOR_NAME, None)]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40), st.booleans()), max_size=6))
def test_any_text_request_is_answered_or_rejected(said: list[tuple[int, bytes, bool]]) -> None:
    peer = discovery()
    tag = RESERVED_TAG
    for flags, data, follow in said:
        request = peer.initiator.text_request(
            data, flags=flags, transfer_tag=tag if follow else RESERVED_TAG, initiator_task_tag=9
        )
        pdu = peer.request(request)
        if isinstance(pdu.header, bhs.TextResponse):
            tag = pdu.header.target_transfer_tag
        else:
            pdu.expect(bhs.Reject)
    assert peer.text({"SendTargets": "All"}) == MINE + THE_OTHER
