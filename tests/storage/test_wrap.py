"""Wrappers: they change what they are for and pass on everything else."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage.memory import Memory
from storage.wrap import Faulty, ReadOnly, Slow

DATA = os.urandom(16384)


@pytest.fixture
def memory() -> Memory:
    backend = Memory(1 << 20)
    backend.write(0, DATA)
    return backend


def test_read_only_refuses_changes_and_reads(memory: Memory) -> None:
    extent = ReadOnly(memory)
    assert extent.read(0, 4096) == extent.read_nowait(0, 4096) == DATA[:4096]
    assert extent.capabilities.writable is extent.capabilities.unmap is False
    assert extent.capabilities.map_query
    assert not extent.write_nowait(0, b"x")
    for change in (
        lambda: extent.write(0, b"x"),
        lambda: extent.unmap(0, 4096),
        lambda: extent.write_zeroes(0, 4096),
        lambda: extent.copy_from(extent, 0, 4096, 512),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    assert memory.read(0, 16384) == DATA


def test_slow_waits_for_its_gate_on_workers_and_never_on_the_event_loop(memory: Memory) -> None:
    gate = threading.Event()
    extent = Slow(memory, gate=gate)
    assert extent.read_nowait(0, 512) is None
    assert extent.copy_nowait(0, 512) is None
    assert not extent.write_nowait(0, b"x" * 512)
    with ThreadPoolExecutor(2) as workers:
        read = workers.submit(extent.read, 0, 512)
        write = workers.submit(extent.write, 8192, b"y" * 512, durable=True)
        for _ in range(2):
            assert extent.waiting.acquire(timeout=10)
        assert not read.done()
        assert memory.read(8192, 512) == DATA[8192:8704]
        gate.set()
        assert read.result(10) == DATA[:512]
        write.result(10)
    assert memory.read(8192, 512) == b"y" * 512


def test_slow_leaves_other_operations_alone(memory: Memory) -> None:
    extent = Slow(memory, gate=threading.Event(), operations=frozenset({"flush"}))
    assert extent.read_nowait(0, 512) == DATA[:512]
    extent.write(0, b"z")


def test_a_fault_strikes_its_operations_in_its_range_so_often(memory: Memory) -> None:
    extent = Faulty(memory)
    extent.fail(errno.EIO, "read", offset=4096, length=4096, times=2)
    assert extent.read_nowait(0, 4096) == DATA[:4096]
    assert extent.read_nowait(8192, 512) is not None
    assert extent.write_nowait(4096, DATA[4096:8192])
    for _ in range(2):
        assert extent.read_nowait(4000, 512) is None
        with pytest.raises(OSError) as caught:
            extent.read(4000, 512)
        assert caught.value.errno == errno.EIO
    assert extent.read_nowait(4000, 512) == DATA[4000:4512]


def test_a_failed_flush_counts_as_lost_writes(memory: Memory) -> None:
    extent = Faulty(memory)
    extent.fail(errno.ENOSPC, "flush", times=1)
    with pytest.raises(OSError):
        extent.flush()
    extent.flush()
    assert extent.lost_writes == 1


def test_faults_can_be_cleared(memory: Memory) -> None:
    extent = Faulty(memory)
    extent.fail(errno.ENODEV)
    for attempt in (extent.refresh, extent.space, lambda: extent.write(0, b"x"), lambda: extent.runs(0, 512)):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.ENODEV
    extent.clear()
    assert extent.write_nowait(0, b"x")
    with pytest.raises(ValueError, match="raed"):
        extent.fail(errno.EIO, "raed")


def test_wrappers_stack_and_follow_the_size(memory: Memory) -> None:
    extent = ReadOnly(Faulty(Slow(memory)))
    extent.resize(1 << 21)
    assert extent.geometry.size_bytes == memory.geometry.size_bytes == 1 << 21
    assert extent.refresh().size_bytes == 1 << 21


def test_an_overlapping_copy_through_a_wrapper(memory: Memory) -> None:
    extent = Slow(memory)
    extent.copy_from(extent, 0, 100, 10000)
    assert memory.read(0, 10100) == DATA[:100] + DATA[:10000]
