"""How two offers become one value (RFC 7143 §6.2, §13)."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.access import Offer
from protocol.enums import LoginStatus
from protocol.errors import ProtocolViolation
from protocol.negotiation import KEYS, OBSOLETE, Negotiator, Scope, Stage

DEFAULTS: dict[str, str] = {
    "HeaderDigest": "None",
    "DataDigest": "None",
    "MaxConnections": "1",
    "InitialR2T": "Yes",
    "ImmediateData": "Yes",
    "MaxRecvDataSegmentLength": "8192",
    "MaxBurstLength": "262144",
    "FirstBurstLength": "65536",
    "DefaultTime2Wait": "2",
    "DefaultTime2Retain": "20",
    "MaxOutstandingR2T": "1",
    "DataPDUInOrder": "Yes",
    "DataSequenceInOrder": "Yes",
    "ErrorRecoveryLevel": "0",
    "iSCSIProtocolLevel": "1",
    "TaskReporting": "RFC3720",
}
"""RFC 7143 §13 and RFC 7144 §7.1, by hand."""


def negotiator(*, leading: bool = True, discovery: bool = False, **offer: Any) -> Negotiator:
    return Negotiator(Offer(**offer), leading=leading, discovery=discovery)


def settled(negotiation: Negotiator) -> dict[str, str]:
    return negotiation.session.as_dict() | negotiation.connection.as_dict()


def refused(negotiation: Negotiator, name: str, value: str) -> None:
    with pytest.raises(ProtocolViolation) as violation:
        negotiation.receive(name, value)
    assert violation.value.reason == LoginStatus.INITIATOR_ERROR
    assert violation.value.fatal


def test_silence_leaves_the_defaults() -> None:
    assert settled(negotiator()) == DEFAULTS
    assert set(KEYS) == set(DEFAULTS)


@pytest.mark.parametrize(
    ("name", "offer", "said", "answer"),
    [
        ("MaxConnections", {"max_connections": 4}, "2", "2"),
        ("MaxConnections", {"max_connections": 4}, "8", "4"),
        ("InitialR2T", {"initial_r2t": False}, "No", "No"),
        ("InitialR2T", {"initial_r2t": False}, "Yes", "Yes"),
        ("InitialR2T", {"initial_r2t": True}, "No", "Yes"),
        ("ImmediateData", {"immediate_data": True}, "Yes", "Yes"),
        ("ImmediateData", {"immediate_data": True}, "No", "No"),
        ("ImmediateData", {"immediate_data": False}, "Yes", "No"),
        ("MaxBurstLength", {"max_burst_length": 65536}, "262144", "65536"),
        ("MaxBurstLength", {}, "0x200", "512"),
        ("FirstBurstLength", {"first_burst_length": 8192}, "262144", "8192"),
        ("FirstBurstLength", {"first_burst_length": 65536, "max_burst_length": 4096}, "65536", "4096"),
        ("DefaultTime2Wait", {"default_time2wait": 2}, "0", "2"),
        ("DefaultTime2Wait", {"default_time2wait": 2}, "3600", "3600"),
        ("DefaultTime2Retain", {"default_time2retain": 60}, "20", "20"),
        ("DefaultTime2Retain", {"default_time2retain": 10}, "20", "10"),
        ("MaxOutstandingR2T", {"max_outstanding_r2t": 16}, "65535", "16"),
        ("DataPDUInOrder", {}, "No", "Yes"),
        ("DataSequenceInOrder", {}, "No", "Yes"),
        ("ErrorRecoveryLevel", {}, "2", "0"),
        ("iSCSIProtocolLevel", {}, "31", "2"),
        ("TaskReporting", {}, "FastAbort,RFC3720", "RFC3720"),
        ("HeaderDigest", {}, "CRC32C,None", "CRC32C"),
        ("HeaderDigest", {}, "None,CRC32C", "None"),
        ("DataDigest", {"data_digests": ("None",)}, "CRC32C,None", "None"),
        ("DataDigest", {}, "SHA9,CRC32C", "CRC32C"),
    ],
)
def test_result_functions(name: str, offer: dict[str, Any], said: str, answer: str) -> None:
    negotiation = negotiator(**offer)
    assert negotiation.receive(name, said) == answer
    negotiation.declarations()
    if negotiation.session.first_burst_length <= negotiation.session.max_burst_length:
        negotiation.finish()
    assert settled(negotiation)[name] == answer


LO, IO, ALL = "leading only", "initialize only", "all"
SW, CO = Scope.SESSION, Scope.CONNECTION
RFC_7143 = {
    # §13.1 to §13.24: use, scope, default, lowest, highest
    "HeaderDigest": (IO, CO, "None", 0, 0),
    "DataDigest": (IO, CO, "None", 0, 0),
    "MaxConnections": (LO, SW, "1", 1, 65535),
    "InitialR2T": (LO, SW, "Yes", 0, 0),
    "ImmediateData": (LO, SW, "Yes", 0, 0),
    "MaxRecvDataSegmentLength": (ALL, CO, "8192", 512, 2**24 - 1),
    "MaxBurstLength": (LO, SW, "262144", 512, 2**24 - 1),
    "FirstBurstLength": (LO, SW, "65536", 512, 2**24 - 1),
    "DefaultTime2Wait": (LO, SW, "2", 0, 3600),
    "DefaultTime2Retain": (LO, SW, "20", 0, 3600),
    "MaxOutstandingR2T": (LO, SW, "1", 1, 65535),
    "DataPDUInOrder": (LO, SW, "Yes", 0, 0),
    "DataSequenceInOrder": (LO, SW, "Yes", 0, 0),
    "ErrorRecoveryLevel": (LO, SW, "0", 0, 2),
    "TaskReporting": (LO, SW, "RFC3720", 0, 0),
    "iSCSIProtocolLevel": (LO, SW, "1", 0, 31),
}


def test_the_table_is_that_of_the_standard() -> None:
    """RFC 7143 §13, line against line."""
    uses = {
        Stage.LEADING: LO,
        Stage.ANY_LOGIN: IO,
        Stage.ANY_LOGIN | Stage.FULL_FEATURE: ALL,
    }
    defaults = settled(negotiator())
    assert {
        name: (uses[key.stages], key.scope, defaults[name], key.low, key.high) for name, key in KEYS.items()
    } == RFC_7143


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MaxConnections", "0"),
        ("MaxConnections", "65536"),
        ("MaxConnections", "many"),
        ("InitialR2T", "yes"),
        ("ImmediateData", "1"),
        ("ImmediateData", ""),
        ("MaxBurstLength", "511"),
        ("MaxBurstLength", "16777216"),
        ("FirstBurstLength", "-1"),
        ("DefaultTime2Wait", "3601"),
        ("MaxOutstandingR2T", "0"),
        ("ErrorRecoveryLevel", "3"),
        ("HeaderDigest", "SHA9"),
        ("HeaderDigest", ""),
        ("HeaderDigest", "CRC32C,,None"),
        ("DataDigest", ","),
        ("TaskReporting", "FastAbort"),
        ("iSCSIProtocolLevel", "32"),
    ],
)
def test_a_value_that_cannot_be_is_rejected_and_the_default_holds(name: str, value: str) -> None:
    """RFC 7143 §6.2."""
    negotiation = negotiator()
    assert negotiation.receive(name, value) == "Reject"
    assert settled(negotiation)[name] == DEFAULTS[name]


@pytest.mark.parametrize(("value", "length"), [("512", 512), ("16777215", 16777215), ("0x1000", 4096)])
def test_a_declaration_gets_no_answer(value: str, length: int) -> None:
    """RFC 7143 §13.12."""
    negotiation = negotiator()
    assert negotiation.receive("MaxRecvDataSegmentLength", value) is None
    assert negotiation.connection.max_recv_data_segment_length_initiator == length


def test_our_declaration_holds_once_said() -> None:
    negotiation = negotiator(max_recv_data_segment_length=131072)
    assert negotiation.connection.max_recv_data_segment_length_target == 8192
    assert ("MaxRecvDataSegmentLength", "131072") in negotiation.declarations()
    assert negotiation.connection.max_recv_data_segment_length_target == 131072
    assert negotiation.declarations() == []


@pytest.mark.parametrize("name", sorted(OBSOLETE))
def test_markers_are_rejected_and_never_not_understood(name: str) -> None:
    """RFC 7143 §13.25."""
    assert negotiator().receive(name, "Yes") == "Reject"


@pytest.mark.parametrize("name", ["X-com.example.thing", "Y#thing", "Frobnicate", "headerdigest", "K" * 63])
def test_an_unknown_key_is_not_understood(name: str) -> None:
    """RFC 7143 §6.2."""
    assert negotiator().receive(name, "1") == "NotUnderstood"
    assert negotiator().receive(name, "NotUnderstood") is None


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_a_key_is_settled_once(name: str) -> None:
    """RFC 7143 §6.3: renegotiation is an error."""
    negotiation = negotiator()
    negotiation.receive(name, DEFAULTS[name])
    refused(negotiation, name, DEFAULTS[name])


@pytest.mark.parametrize("value", ["Reject", "Irrelevant", "NotUnderstood"])
def test_an_answer_to_nothing_asked(value: str) -> None:
    refused(negotiator(), "MaxBurstLength", value)


@pytest.mark.parametrize("name", [key.name for key in KEYS.values() if key.scope is Scope.SESSION])
def test_session_keys_come_only_on_the_leading_connection(name: str) -> None:
    """RFC 7143 §13, Use: LO."""
    refused(negotiator(leading=False), name, DEFAULTS[name])


def test_connection_keys_come_on_every_connection() -> None:
    negotiation = negotiator(leading=False)
    assert negotiation.receive("HeaderDigest", "CRC32C") == "CRC32C"
    assert negotiation.declarations() == [("MaxRecvDataSegmentLength", "262144")]


IRRELEVANT = {"InitialR2T", "ImmediateData", "DataPDUInOrder", "DataSequenceInOrder", "TaskReporting"}
"""RFC 7143 §13, "Irrelevant when: SessionType=Discovery", but for numbers."""


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_what_means_nothing_in_a_discovery_session(name: str) -> None:
    answer = negotiator(discovery=True).receive(name, DEFAULTS[name])
    assert (answer == "Irrelevant") == (name in IRRELEVANT)


@pytest.mark.parametrize("name", sorted(key.name for key in KEYS.values() if key.kind == "number"))
def test_a_number_is_answered_by_a_number_in_a_discovery_session_too(name: str) -> None:
    """Initiators are in use that read the answer as a number and cannot discover otherwise."""
    answer = negotiator(discovery=True, max_connections=8, error_recovery_level=2).receive(
        name, DEFAULTS[name]
    )
    assert answer is not None and answer.isdecimal()
    assert name != "MaxConnections" or answer == "1"  # a discovery session has one connection


@pytest.mark.parametrize(
    "value", ["16777216", "511", "0", "-1", "1e6", "8192,", "Reject", "Irrelevant", "?", ""]
)
def test_a_segment_length_out_of_range_is_answered_once_and_the_default_holds(value: str) -> None:
    """RFC 7143 §6.2: no answer carries a key twice; what was rejected is at its default, both ways."""
    negotiation = negotiator(max_recv_data_segment_length=262144)
    if value in ("Reject", "Irrelevant"):
        refused(negotiation, "MaxRecvDataSegmentLength", value)
        return
    assert negotiation.receive("MaxRecvDataSegmentLength", value) == "Reject"
    assert "MaxRecvDataSegmentLength" not in dict(negotiation.declarations())
    negotiation.finish()
    assert negotiation.connection.max_recv_data_segment_length_initiator == 8192
    assert negotiation.connection.max_recv_data_segment_length_target == 8192


def test_a_segment_length_out_of_range_after_ours_cannot_be_answered() -> None:
    negotiation = negotiator()
    assert "MaxRecvDataSegmentLength" in dict(negotiation.declarations())
    refused(negotiation, "MaxRecvDataSegmentLength", "1")


# -- digests that are demanded ----------------------------------------------------------------------

CRC, EITHER = ("CRC32C",), ("CRC32C", "None")


@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize(
    ("said", "asked", "then", "agreed"),
    [
        ("CRC32C", None, None, True),
        ("None,CRC32C", None, None, True),  # the initiator's first choice is none that we have
        ("None", None, None, False),
        ("SHA9", None, None, False),
        (None, "CRC32C", "CRC32C", True),  # we propose what it left out
        (None, "CRC32C", None, False),
    ],
)
def test_a_digest_that_is_demanded_is_had_or_there_is_no_login(
    said: str | None, asked: str | None, then: str | None, agreed: bool, leading: bool
) -> None:
    negotiation = negotiator(leading=leading, header_digests=CRC, data_digests=EITHER)
    if said is not None:
        negotiation.receive("HeaderDigest", said)
    assert dict(negotiation.declarations()).get("HeaderDigest") == asked
    assert negotiation.waiting == (asked is not None)
    if then is not None:
        assert negotiation.receive("HeaderDigest", then) is None
    if agreed:
        negotiation.finish()
        assert settled(negotiation)["HeaderDigest"] == "CRC32C"
    else:
        with pytest.raises(ProtocolViolation, match="HeaderDigest=CRC32C is demanded"):
            negotiation.finish()


@pytest.mark.parametrize("answer", ["None", "Reject", "NotUnderstood", "Irrelevant"])
def test_a_demanded_digest_that_is_declined_ends_the_login(answer: str) -> None:
    negotiation = negotiator(data_digests=CRC)
    negotiation.declarations()
    refused(negotiation, "DataDigest", answer)


# -- what we propose --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "offer", "proposal"),
    [
        ("MaxBurstLength", {"max_burst_length": 65536}, "65536"),
        ("FirstBurstLength", {"first_burst_length": 4096}, "4096"),
        ("ImmediateData", {"immediate_data": False}, "No"),
    ],
)
def test_we_ask_where_the_default_is_not_what_we_do(name: str, offer: dict[str, Any], proposal: str) -> None:
    negotiation = negotiator(**offer)
    assert (name, proposal) in negotiation.declarations()
    assert negotiation.waiting
    assert negotiation.receive(name, proposal) is None
    assert not negotiation.waiting
    assert settled(negotiation)[name] == proposal
    refused(negotiation, name, proposal)


def test_we_ask_nothing_that_the_initiator_has_said_or_that_is_as_it_should_be() -> None:
    assert [name for name, _ in negotiator().declarations()] == ["MaxRecvDataSegmentLength"]
    negotiation = negotiator(max_burst_length=65536)
    negotiation.receive("MaxBurstLength", "262144")
    assert [name for name, _ in negotiation.declarations()] == ["MaxRecvDataSegmentLength"]
    assert not negotiation.waiting


@pytest.mark.parametrize("value", ["131072", "Reject", "NotUnderstood", "lots", "100"])
def test_an_answer_that_is_no_result_of_our_proposal(value: str) -> None:
    """RFC 7143 §6.2.2."""
    negotiation = negotiator(max_burst_length=65536)
    negotiation.declarations()
    refused(negotiation, "MaxBurstLength", value)


def test_a_first_burst_longer_than_a_burst_by_the_initiators_own_word() -> None:
    """RFC 7143 §13.14: MUST NOT exceed MaxBurstLength."""
    negotiation = negotiator()
    negotiation.receive("FirstBurstLength", "65536")
    negotiation.receive("MaxBurstLength", "1024")
    with pytest.raises(ProtocolViolation):
        negotiation.finish()


def test_a_default_first_burst_shrinks_with_the_burst() -> None:
    negotiation = negotiator()
    negotiation.receive("MaxBurstLength", "1024")
    negotiation.finish()
    assert negotiation.session.first_burst_length == 1024


# -- anything at all --------------------------------------------------------------------------------

NAMES = st.sampled_from([*DEFAULTS, *OBSOLETE, "Unknown"])
ANY_VALUES = st.one_of(
    st.sampled_from(
        ["Yes", "No", "None", "CRC32C", "CRC32C,None", "", ",", "Reject", "Irrelevant", "RFC3720"]
    ),
    st.integers(-5, 2**25).map(str),
    st.text(max_size=12),
)


@given(
    st.lists(st.tuples(NAMES, ANY_VALUES), max_size=12),
    st.booleans(),
    st.booleans(),
    st.integers(512, 2**24 - 1),
    st.integers(512, 2**24 - 1),
)
def test_any_offer_ends_within_the_rules(
    said: list[tuple[str, str]], leading: bool, discovery: bool, first: int, burst: int
) -> None:
    """Whatever is said raises only ``ProtocolViolation``, and what is settled both sides can keep."""
    offer = Offer(first_burst_length=first, max_burst_length=burst, immediate_data=False)
    negotiation = Negotiator(offer, leading=leading, discovery=discovery)
    try:
        for name, value in said:
            answer = negotiation.receive(name, value)
            assert answer is None or answer in ("Reject", "Irrelevant", "NotUnderstood") or answer
        negotiation.declarations()
        negotiation.finish()
    except ProtocolViolation:
        return
    session, connection = negotiation.session, negotiation.connection
    assert 512 <= session.first_burst_length <= session.max_burst_length < 2**24
    assert 512 <= connection.max_recv_data_segment_length_initiator < 2**24
    assert session.data_pdu_in_order
    assert session.data_sequence_in_order
    assert session.error_recovery_level == 0
    assert session.max_connections == 1
