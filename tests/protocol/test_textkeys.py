"""key=value text (RFC 7143 §6.1)."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.textkeys import TextError, build, cut, encode_binary, parse, read_binary, read_number

KEYS = st.from_regex(r"[A-Z][A-Za-z0-9.\-+@_]{0,62}", fullmatch=True)
VALUES = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=60)


@given(
    st.lists(st.binary(max_size=30).map(lambda text: text.replace(b"\0", b"") + b"\0")), st.integers(1, 40)
)
def test_text_is_cut_between_pairs_where_it_can_be(pairs: list[bytes], limit: int) -> None:
    """RFC 7143 §6.2: nothing is lost, no piece is too long, and only what is too long itself is divided."""
    whole, rest, pieces = b"".join(pairs), b"".join(pairs), []
    while rest:
        piece, rest = cut(rest, limit)
        assert 0 < len(piece) <= limit
        pieces.append(piece)
    assert b"".join(pieces) == whole
    if all(len(pair) <= limit for pair in pairs):
        assert all(piece.endswith(b"\0") for piece in pieces)


@given(st.lists(st.tuples(KEYS, VALUES)))
def test_what_is_built_parses_back(pairs: list[tuple[str, str]]) -> None:
    assert parse(build(pairs)) == pairs


@given(st.binary(max_size=300))
def test_any_bytes_are_pairs_or_a_text_error(data: bytes) -> None:
    try:
        pairs = parse(data)
    except TextError:
        return
    assert all("\0" not in value for _, value in pairs)


@pytest.mark.parametrize(
    ("data", "pairs"),
    [
        (b"", []),
        (b"\0\0", []),
        (b"A=1\0\0\0B=2\0", [("A", "1"), ("B", "2")]),
        (b"A=\0", [("A", "")]),
        (b"A=b=c\0", [("A", "b=c")]),
        (b"A=1\0A=2\0", [("A", "1"), ("A", "2")]),
        ("InitiatorAlias=Größe\0".encode(), [("InitiatorAlias", "Größe")]),
        (b"iSCSIProtocolLevel=2\0", [("iSCSIProtocolLevel", "2")]),
        (
            b"X-com.example.k=v\0X#NodeArchitecture=v\0",
            [("X-com.example.k", "v"), ("X#NodeArchitecture", "v")],
        ),
        (b"CHAP_C=0x" + b"ab" * 1024 + b"\0", [("CHAP_C", "0x" + "ab" * 1024)]),
        (b"K" * 63 + b"=" + b"v" * 255 + b"\0", [("K" * 63, "v" * 255)]),
    ],
)
def test_what_is_text(data: bytes, pairs: list[tuple[str, str]]) -> None:
    assert parse(data) == pairs


@pytest.mark.parametrize(
    "data",
    [
        b"A=1",
        b"A\0",
        b"=1\0",
        b"a=1\0",
        b"sENDtARGETS=aLL\0",
        b"0x=1\0",
        b"A B=1\0",
        b"A%s=1\0",
        b"A=\xff\xfe\0",
        b"\xc3\x84=1\0",
        b"K" * 64 + b"=1\0",
        b"A=" + b"v" * 256 + b"\0",
    ],
)
def test_what_is_no_text(data: bytes) -> None:
    with pytest.raises(TextError):
        parse(data)


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("262144", 262144), ("0x200", 512), ("0X1fF", 511), ("007", 7), ("9" * 20, int("9" * 20))],
)
def test_numbers(text: str, number: int) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize(
    "text", ["", " 1", "1 ", "-1", "+1", "1_0", "0x", "x1", "1.0", "1e3", "0b1", "ff", "٣", "9" * 21]
)
def test_no_numbers(text: str) -> None:
    with pytest.raises(TextError):
        read_number(text)


@given(st.binary(min_size=1, max_size=64))
def test_a_binary_value_is_read_in_every_spelling(value: bytes) -> None:
    from base64 import b64encode

    assert read_binary(encode_binary(value), 64) == value
    assert read_binary("0X" + value.hex().upper(), 64) == value
    assert read_binary("0b" + b64encode(value).decode(), 64) == value


def test_an_odd_number_of_hex_digits_has_a_leading_zero() -> None:
    assert read_binary("0xabc", 2) == b"\x0a\xbc"


@pytest.mark.parametrize(
    "text",
    ["", "0x", "0b", "abcd", "1234", "0xzz", "0x12 34", "0bAA", "0bA===", "0b!!!!", "0x٣٣", "0bAAA\u00e9"],
)
def test_no_binary_values(text: str) -> None:
    with pytest.raises(TextError):
        read_binary(text, 64)


@pytest.mark.parametrize("text", ["0x" + "ab" * 17, "0b" + "q6ur" * 6])
def test_a_binary_value_that_is_too_long(text: str) -> None:
    with pytest.raises(TextError, match="most"):
        read_binary(text, 16)


@given(st.text(string.printable, max_size=40))
def test_any_value_is_read_or_a_text_error(text: str) -> None:
    for read in (read_number, lambda text: read_binary(text, 16)):
        try:
            read(text)
        except TextError as error:
            assert str(error).isprintable()
