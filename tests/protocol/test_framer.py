"""The byte stream cut into PDUs: anywhere it is split, with every layout (RFC 7143 §11.2)."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.digest import digest
from protocol.errors import ProtocolViolation
from protocol.framer import LONG, STEP, Framer, padded

MAX_DATA = 3 * LONG
Seen = tuple[str, bytes, bytes]


def pdu(opcode: int, data: bytes, *, ahs: bytes = b"", digests: tuple[bool, bool] = (False, False)) -> bytes:
    """One PDU as RFC 7143 §11.2 lays it out."""
    header = bytes((opcode, 0x80, 0, 0, len(ahs) // 4)) + len(data).to_bytes(3, "big") + bytes(40) + ahs
    padding = bytes(padded(len(data)) - len(data))
    parts = [header, digest(header) if digests[0] else b"", data, padding]
    if data and digests[1]:
        parts.append(digest(data, padding))
    return b"".join(parts)


class Recorder:
    """Everything a framer hands on, copied."""

    def __init__(self, *, header_digest: bool = False, data_digest: bool = False) -> None:
        self.seen: list[Seen] = []
        self.placed: list[bytearray] = []
        self.framer = Framer([self._whole] * 64, self._damaged, self._place, MAX_DATA)
        self.framer.header_digest = header_digest
        self.framer.data_digest = data_digest

    def _whole(self, view: memoryview, at: int, data: memoryview) -> None:
        self._record("whole", view, at, data)

    def _damaged(self, view: memoryview, at: int, data: memoryview) -> None:
        self._record("damaged", view, at, data)

    def _record(self, kind: str, view: memoryview, at: int, data: memoryview) -> None:
        self.seen.append((kind, bytes(view[at : at + 48 + 4 * view[at + 4]]), bytes(data)))

    def _place(self, view: memoryview, at: int, size: int) -> memoryview:
        self.placed.append(bytearray(size))
        return memoryview(self.placed[-1])

    def feed(self, data: bytes) -> None:
        """As a server does: through one buffer that is used again, and straight home where asked for."""
        while data:
            target = self.framer.receive_target()
            if target is not None:
                taken = min(len(target), len(data))
                target[:taken] = data[:taken]
                self.framer.received_in_target(taken)
            else:
                taken = len(data)
                buffer = bytearray(data)
                self.framer.feed(memoryview(buffer))
                buffer[:] = b"\xee" * taken  # whoever kept a window on it would see this
            data = data[taken:]


def expected(opcode: int, data: bytes, ahs: bytes = b"") -> Seen:
    return "whole", pdu(opcode, data, ahs=ahs)[: 48 + len(ahs)], data


PDUS = st.lists(
    st.tuples(
        st.integers(0, 63),
        st.one_of(
            st.binary(max_size=9),
            st.integers(0, MAX_DATA).map(lambda size: bytes(i * 7 % 251 for i in range(size))),
        ),
        st.integers(0, 3).map(lambda words: bytes(range(4 * words))),
    ),
    max_size=4,
)


@given(PDUS, st.booleans(), st.booleans(), st.data())
def test_any_split_of_the_stream_gives_the_same_pdus(
    pdus: list[tuple[int, bytes, bytes]], header_digest: bool, data_digest: bool, choices: st.DataObject
) -> None:
    stream = b"".join(
        pdu(opcode, data, ahs=ahs, digests=(header_digest, data_digest)) for opcode, data, ahs in pdus
    )
    recorder = Recorder(header_digest=header_digest, data_digest=data_digest)
    cuts = choices.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    edges = [0, *sorted(cuts), len(stream)]
    for start, stop in pairwise(edges):
        recorder.feed(stream[start:stop])
    assert recorder.seen == [expected(*each) for each in pdus]
    assert not recorder.framer.in_pdu


@given(PDUS, st.booleans(), st.booleans(), st.data())
def test_whoever_stops_it_gets_the_same_pdus_later(
    pdus: list[tuple[int, bytes, bytes]], header_digest: bool, data_digest: bool, choices: st.DataObject
) -> None:
    digests = header_digest, data_digest
    stream = b"".join(pdu(opcode, data, ahs=ahs, digests=digests) for opcode, data, ahs in pdus * 8)
    recorder = Recorder(header_digest=header_digest, data_digest=data_digest)
    framer = recorder.framer
    framer.pause = lambda: choices.draw(st.booleans())
    cut = choices.draw(st.integers(0, len(stream)))
    for part in (stream[:cut], stream[cut:]):
        recorder.feed(part)
        while framer.unread is not None:
            assert not framer.in_pdu
            framer.go_on()
    assert recorder.seen == [expected(*each) for each in pdus * 8]


def test_it_is_asked_to_stop_once_in_some_bytes_and_stops_between_two_pdus() -> None:
    recorder = Recorder()
    recorder.framer.pause = lambda: True
    buffer = bytearray(pdu(1, b"") * 1000)
    recorder.framer.feed(memoryview(buffer))
    counts = [len(recorder.seen)]
    buffer[:] = b"\xee" * len(buffer)
    while recorder.framer.unread is not None:
        recorder.framer.go_on()
        counts.append(len(recorder.seen) - sum(counts))
    assert max(counts) <= STEP // 48
    assert recorder.seen == [expected(1, b"")] * 1000


@pytest.mark.parametrize("digests", [(False, False), (True, False), (False, True), (True, True)])
def test_byte_by_byte(digests: tuple[bool, bool]) -> None:
    recorder = Recorder(header_digest=digests[0], data_digest=digests[1])
    data = bytes(i % 251 for i in range(LONG + 5))
    for byte in pdu(1, data, ahs=b"\0\1\2\0", digests=digests) + pdu(2, b"", digests=digests):
        recorder.feed(bytes((byte,)))
    assert recorder.seen == [expected(1, data, b"\0\1\2\0"), expected(2, b"")]


def test_a_long_data_segment_is_received_straight_home() -> None:
    recorder = Recorder()
    data = bytes(i % 251 for i in range(2 * LONG))
    recorder.feed(pdu(5, data)[:100])
    target = recorder.framer.receive_target()
    assert target is not None
    assert len(target) == 2 * LONG - 52
    recorder.feed(pdu(5, data)[100:])
    assert bytes(recorder.placed[0]) == data
    assert recorder.seen == [expected(5, data)]


def test_a_damaged_data_segment_is_told_apart() -> None:
    for size in (7, 2 * LONG):
        recorder = Recorder(data_digest=True)
        stream = bytearray(pdu(5, bytes(size), digests=(False, True)))
        stream[50] ^= 1
        for start in range(0, len(stream), 1000):
            recorder.feed(bytes(stream[start : start + 1000]))
        recorder.feed(pdu(6, b"", digests=(False, True)))
        assert [kind for kind, _, _ in recorder.seen] == ["damaged", "whole"]


def test_a_header_digest_error_ends_the_stream() -> None:
    """RFC 7143 §7.8: the length cannot be believed, so what follows cannot be found."""
    for cut in (53, 10):
        recorder = Recorder(header_digest=True)
        stream = bytearray(pdu(1, b"abcd", digests=(True, False)))
        stream[7] ^= 1
        with pytest.raises(ProtocolViolation, match="header digest"):
            for start in range(0, len(stream), cut):
                recorder.feed(bytes(stream[start : start + cut]))
        assert recorder.seen == []


def spoil(stream: bytes, at: int, bit: int) -> bytes:
    return stream[:at] + bytes((stream[at] ^ 1 << bit,)) + stream[at + 1 :]


@given(PDUS, PDUS, st.booleans(), st.data())
def test_one_wrong_header_costs_one_pdu_wherever_the_stream_is_split(
    before: list[tuple[int, bytes, bytes]],
    behind: list[tuple[int, bytes, bytes]],
    data_digest: bool,
    choices: st.DataObject,
) -> None:
    """RFC 7143 §7.8, with ``resynchronise``: any bit of header, AHS and header digest but the lengths."""
    digests = (True, data_digest)
    bad = choices.draw(PDUS.filter(bool))[0]
    wrong = pdu(*bad[:2], ahs=bad[2], digests=digests)
    head = 48 + len(bad[2]) + 4
    at = choices.draw(st.integers(0, head - 1).filter(lambda at: not 4 <= at < 8))
    good = [
        [pdu(opcode, data, ahs=ahs, digests=digests) for opcode, data, ahs in part]
        for part in (before, behind)
    ]
    stream = b"".join([*good[0], spoil(wrong, at, choices.draw(st.integers(0, 7))), *good[1]])
    recorder = Recorder(header_digest=True, data_digest=data_digest)
    recorder.framer.resynchronise = True
    cuts = choices.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    for start, stop in pairwise([0, *sorted(cuts), len(stream)]):
        recorder.feed(stream[start:stop])
    assert recorder.seen == [expected(*each) for each in [*before, *behind]]
    assert not recorder.framer.in_pdu


@given(PDUS.filter(lambda pdus: len(pdus) > 1), st.integers(4, 7), st.integers(0, 7), st.integers(1, 5000))
@example([(0, bytes(8), b"")] * 3, 7, 6, 5000)  # 8 bytes of data told as 72: 64 more, a whole PDU
def test_a_wrong_length_never_makes_a_pdu_of_what_is_none(
    pdus: list[tuple[int, bytes, bytes]], at: int, bit: int, step: int
) -> None:
    """RFC 7143 §7.8: what is handed on was sent, whatever a header says of its length. With one that is wrong
    within the padding alone the next PDU is where it should be, and the stream goes on; one that is wrong by
    the very length of what follows takes that along."""
    stream = b"".join(pdu(opcode, data, ahs=ahs, digests=(True, True)) for opcode, data, ahs in pdus)
    stream = spoil(stream, at, bit)
    recorder = Recorder(header_digest=True, data_digest=True)
    recorder.framer.resynchronise = True
    try:
        for start in range(0, len(stream), step):
            recorder.feed(stream[start : start + step])
    except ProtocolViolation:
        pass
    sent = [expected(*each) for each in pdus]
    assert recorder.seen in [sent[first:] for first in range(1, len(sent) + 1)]


@pytest.mark.parametrize("cut", [48, 20, 1000])
def test_more_data_than_declared_is_refused_before_it_is_stored(cut: int) -> None:
    """RFC 7143 §13.12: the sender MUST respect MaxRecvDataSegmentLength."""
    recorder = Recorder()
    header = bytes((1, 0x80, 0, 0, 0)) + (MAX_DATA + 1).to_bytes(3, "big") + bytes(40)
    with pytest.raises(ProtocolViolation, match="DataSegmentLength"):
        for start in range(0, 48, cut):
            recorder.feed(header[start : start + cut])
    assert recorder.placed == []


def test_more_ahs_than_can_mean_anything_is_refused() -> None:
    recorder = Recorder()
    with pytest.raises(ProtocolViolation, match="TotalAHSLength"):
        recorder.feed(bytes((1, 0x80, 0, 0, 255)) + bytes(43))


@given(st.lists(st.binary(max_size=200), max_size=20), st.booleans(), st.booleans())
def test_garbage_raises_nothing_but_a_violation(
    pieces: list[bytes], header_digest: bool, data_digest: bool
) -> None:
    recorder = Recorder(header_digest=header_digest, data_digest=data_digest)
    try:
        for piece in pieces:
            recorder.feed(piece)
    except ProtocolViolation:
        pass
    assert sum(map(len, recorder.placed)) <= MAX_DATA
