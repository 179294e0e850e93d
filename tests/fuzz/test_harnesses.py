"""A short run of each harness: its corpus, and mutations of it. ``make fuzz`` runs long, led by coverage."""

import random
import time

import pytest

from tests.fuzz.harnesses import HARNESSES, seeds

SECONDS = 1.0


def mutated(data: bytes, source: random.Random) -> bytes:
    """A few bytes changed, and perhaps cut or doubled."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 4, 16))):
        if changed:
            changed[source.randrange(len(changed))] = source.choice(
                (0, 1, 0x7F, 0x80, 0xFF, source.randrange(256))
            )
    match source.randrange(8):
        case 0:
            del changed[source.randrange(len(changed) + 1) :]
        case 1:
            changed += changed[source.randrange(len(changed) + 1) :]
    return bytes(changed)


@pytest.mark.parametrize("name", HARNESSES)
def test_harness_returns_whatever_the_bytes(name: str) -> None:
    harness, corpus = HARNESSES[name], seeds(name)
    source = random.Random(name)
    for seed in corpus:
        harness(seed)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        data = mutated(source.choice(corpus), source)
        try:
            harness(data)
        except Exception as error:
            pytest.fail(f"{name} on {data.hex()}: {error!r}")
