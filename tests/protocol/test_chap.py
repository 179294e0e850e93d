"""CHAP's arithmetic (RFC 1994 §4.1; RFC 7143 §12.1.3)."""

import hashlib

import pytest

from protocol.chap import ALGORITHMS, CHALLENGE_LENGTH, choose_algorithm, response, verify

CHALLENGE = bytes(range(16))


@pytest.mark.parametrize(
    ("algorithm", "name"), [(5, "md5"), (6, "sha1"), (7, "sha256"), (8, "sha3_256")]
)  # the numbers of IANA's registry
def test_the_response_is_the_hash_of_identifier_secret_and_challenge(algorithm: int, name: str) -> None:
    expected = hashlib.new(name, b"\x07" + b"a secret of size" + CHALLENGE).digest()
    assert response(algorithm, 7, b"a secret of size", CHALLENGE) == expected
    assert verify(algorithm, 7, b"a secret of size", CHALLENGE, expected)
    for wrong in (b"", expected[:-1], expected + b"\0", expected[:-1] + bytes((expected[-1] ^ 1,))):
        assert not verify(algorithm, 7, b"a secret of size", CHALLENGE, wrong)
    assert CHALLENGE_LENGTH[algorithm] == len(expected)


def test_md5_as_openssl_has_it() -> None:
    """printf '\\001secretabcdefgh' | openssl md5"""
    expected = hashlib.md5(b"\x01secretabcdefgh").digest()
    assert response(5, 1, b"secret", b"abcdefgh") == expected


@pytest.mark.parametrize(
    ("offered", "allowed", "chosen"),
    [
        ([5, 8], (8, 7, 6, 5), 5),
        ([8, 5], (5, 6, 7, 8), 8),
        ([5, 7], (7, 8), 7),
        ([5, 6], (7, 8), None),
        ([56], (5, 6, 7, 8), None),
        ([], (5,), None),
        ([9, 6], (6, 9), 6),
    ],
)
def test_the_initiators_order_decides_among_what_is_allowed(
    offered: list[int], allowed: tuple[int, ...], chosen: int | None
) -> None:
    assert choose_algorithm(offered, allowed) == chosen


def test_only_algorithms_with_a_registered_number() -> None:
    assert set(ALGORITHMS) == set(CHALLENGE_LENGTH) == {5, 6, 7, 8}
