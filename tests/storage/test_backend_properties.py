"""Every backend behaves as an array of bytes whatever is done to it."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.base import Backend
from storage.file import File
from storage.memory import Memory
from storage.wrap import Slow

SIZE = 600 * 1024 + 512
"""Bytes: more than two chunks of residency, and no multiple of a page."""


def _file(directory: Path) -> Backend:
    path = directory / "disk"
    path.touch()
    return File(str(path), SIZE)


def _memory(directory: Path) -> Backend:
    return Memory(SIZE)


def _wrapped(directory: Path) -> Backend:
    return Slow(_file(directory))


def ranges(limit: int = SIZE) -> st.SearchStrategy[tuple[int, int]]:
    offset = st.one_of(
        st.integers(0, limit), st.sampled_from([0, 4096, 8192, 256 * 1024 - 512, 256 * 1024, limit])
    )
    length = st.one_of(
        st.integers(0, 20000), st.sampled_from([512, 4096, 65536, 256 * 1024, 256 * 1024 + 4096, limit])
    )
    return st.tuples(offset, length).map(lambda both: (both[0], min(both[1], limit - both[0])))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "unmap", "write_zeroes", "copy", "flush", "tick"]),
        ranges(),
        st.integers(0, SIZE),
        st.integers(1, 255),
    ),
    max_size=12,
)


@pytest.mark.parametrize("make", [_file, _memory, _wrapped])
@settings(max_examples=60, deadline=None)
@given(steps=STEPS, looks=st.lists(ranges(), min_size=1, max_size=6))
def test_a_backend_is_an_array_of_bytes(
    make: Callable[[Path], Backend],
    steps: list[tuple[str, tuple[int, int], int, int]],
    looks: list[tuple[int, int]],
) -> None:
    model = bytearray(SIZE)
    with tempfile.TemporaryDirectory() as directory:
        backend = make(Path(directory))
        for operation, (offset, length), other, value in steps:
            end = offset + length
            if operation == "write":
                data = bytes([value, value ^ 0x5A]) * (length // 2) + bytes([value]) * (length % 2)
                if not backend.write_nowait(offset, data):
                    backend.write(offset, data, durable=value > 250)
                model[offset:end] = data
            elif operation == "unmap":
                backend.unmap(offset, length)
                model[offset:end] = bytes(length)
            elif operation == "write_zeroes":
                backend.write_zeroes(offset, length)
                model[offset:end] = bytes(length)
            elif operation == "copy":
                length = min(length, SIZE - other)
                backend.copy_from(backend, other, offset, length)
                model[offset : offset + length] = model[other : other + length]
            elif operation == "flush":
                backend.flush(offset, length)
            else:
                backend.tick()
        for offset, length in looks:
            expected = model[offset : offset + length]
            assert backend.read(offset, length) == expected
            for nowait in (backend.read_nowait, backend.copy_nowait):
                found = nowait(offset, length)
                assert found is None or found == expected
            runs = list(backend.runs(offset, length))
            assert sum(run.length for run in runs) == length
            at = offset
            for index, run in enumerate(runs):
                assert run.offset == at
                assert run.length > 0
                assert index == 0 or run.mapped != runs[index - 1].mapped
                assert run.mapped or not any(model[at : at + run.length])
                at += run.length
        backend.close()
