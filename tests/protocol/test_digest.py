"""CRC32C as it goes over the wire; the vectors are those of RFC 7143 appendix A.4 (as RFC 3720 B.4)."""

import pytest

from protocol.digest import digest, matches

VECTORS = [
    (bytes(32), "aa36918a"),
    (b"\xff" * 32, "43aba862"),
    (bytes(range(32)), "4e79dd46"),
    (bytes(range(31, -1, -1)), "5cdb3f11"),
    (
        bytes.fromhex(
            "01c000000000000000000000000000001400000000000400000000140000001828000000000000000200000000000000"
        ),
        "563a96d9",
    ),
]


@pytest.mark.parametrize(("data", "wire"), VECTORS)
def test_published_vectors(data: bytes, wire: str) -> None:
    assert digest(data).hex() == wire


@pytest.mark.parametrize(("data", "wire"), VECTORS)
def test_parts_are_digested_as_one(data: bytes, wire: str) -> None:
    assert digest(data[:5], memoryview(data)[5:7], data[7:]).hex() == wire


def test_any_changed_bit_is_seen() -> None:
    data = bytearray(bytes(range(48)) + digest(bytes(range(48))))
    assert matches(memoryview(data), 0, 48, 48)
    for bit in range(52 * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert not matches(memoryview(data), 0, 48, 48)
        data[bit // 8] ^= 1 << bit % 8
