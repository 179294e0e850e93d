"""Memory and null extents. What they share with all backends is in test_backend_properties."""

import errno

import pytest

from storage.base import Backend, Run
from storage.memory import Memory, Null


def test_memory_takes_only_what_is_written() -> None:
    extent = Memory(1 << 50)
    extent.write((1 << 40) + 5, b"x")
    assert extent.space().used == 4096
    assert extent.read((1 << 40), 10) == b"\0\0\0\0\0x\0\0\0\0"
    assert list(extent.runs(0, 1 << 50)) == [
        Run(0, 1 << 40, False),
        Run(1 << 40, 4096, True),
        Run((1 << 40) + 4096, (1 << 50) - (1 << 40) - 4096, False),
    ]
    extent.unmap(0, 1 << 50)
    assert extent.space().used == 0


def test_what_was_read_does_not_change_with_a_later_write() -> None:
    extent = Memory(8192)
    extent.write(0, b"a" * 8192)
    for length in (100, 4096, 8192):
        before = extent.read_nowait(0, length)
        extent.write(0, b"b" * 8192)
        assert before == b"a" * length
        extent.write(0, b"a" * 8192)


def test_memory_under_a_name_is_one_until_its_last_opening_is_closed() -> None:
    """A changed extent is opened before the old one is closed, with another size."""
    before = Memory(8192, name="one")
    before.write(0, b"a" * 8192)
    after, other = Memory(1 << 20, name="one"), Memory(8192, name="two")
    before.close()
    assert before.read(0, 8192) == bytes(8192)
    assert after.read(0, 8192) == b"a" * 8192
    assert other.read(0, 8192) == bytes(8192)
    after.write(4096, b"b" * 4096)
    again = Memory(8192, name="one")
    assert again.read(4096, 4096) == b"b" * 4096
    after.close(), again.close()
    del before, after, again
    assert Memory(8192, name="one").read(0, 8192) == bytes(8192)


def test_null_reads_as_zeros_whatever_was_written() -> None:
    extent = Null(1 << 30)
    assert extent.write_nowait(0, b"x" * 4096)
    assert extent.read_nowait(0, 4096) == bytes(4096)
    assert extent.read(0, 3 << 20) == bytes(3 << 20)
    assert list(extent.runs(512, 1024)) == [Run(512, 1024, False)]


@pytest.mark.parametrize("extent", [Memory(8192, read_only=True), Null(8192, read_only=True)])
def test_read_only_refuses_changes(extent: Backend) -> None:
    assert not extent.capabilities.writable
    for change in (
        lambda: extent.write_nowait(0, b"x"),
        lambda: extent.write(0, b"x"),
        lambda: extent.unmap(0, 4096),
        lambda: extent.write_zeroes(0, 4096),
        lambda: extent.copy_from(extent, 0, 4096, 512),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    assert extent.capabilities.volatile
