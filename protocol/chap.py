"""CHAP as pure functions (RFC 1994; RFC 7143 §12.1.3). Challenges and identifiers come in as arguments."""

import hashlib
import hmac
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

__all__ = ["ALGORITHMS", "CHALLENGE_LENGTH", "choose_algorithm", "response", "verify"]

ALGORITHMS: Mapping[int, Callable[[bytes], Any]] = {
    5: hashlib.md5,
    6: hashlib.sha1,
    7: hashlib.sha256,
    8: hashlib.sha3_256,
}
"""IANA PPP authentication algorithms that RFC 7143 §12.1.3 and the registry know for iSCSI."""

CHALLENGE_LENGTH: Mapping[int, int] = {5: 16, 6: 20, 7: 32, 8: 32}
"""Bytes of our challenge: the length of the hash (RFC 7143 §12.1.3). Longer ones break initiators."""


def choose_algorithm(offered: Sequence[int], allowed: Collection[int]) -> int | None:
    """The initiator's first choice among what we allow."""
    return next((number for number in offered if number in ALGORITHMS and number in allowed), None)


def response(algorithm: int, identifier: int, secret: bytes, challenge: bytes) -> bytes:
    """H(identifier | secret | challenge) (RFC 1994 §4.1)."""
    value: bytes = ALGORITHMS[algorithm](bytes((identifier,)) + secret + challenge).digest()
    return value


def verify(algorithm: int, identifier: int, secret: bytes, challenge: bytes, answer: bytes) -> bool:
    """Whether ``answer`` proves knowledge of ``secret``; takes the same time wherever it differs."""
    return hmac.compare_digest(response(algorithm, identifier, secret, challenge), answer)
