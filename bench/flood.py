"""What a flood costs the initiators that are at work.   python -m bench.flood [--rounds N]

An initiator writes and reads back 4 KiB blocks, one command at a time, and judges every one. Rounds without
and with a flood alternate: first 10 000 connections of rubbish, as fast as they can be made, then 1000 logins
that are begun and never finished, held open. Reported is the 99th percentile of a command's time with the
flood as a multiple of that without. No command may fail; the ratio is to stay within 3.

The flood comes from processes of their own, from several loopback addresses, since one address has a bound.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.synchronize import Event
from pathlib import Path

from tests import cdbs
from tests.daemon import HOST, Daemon, Disk
from tests.initiator import SocketInitiator

RUBBISH_CONNECTIONS = 10_000
HALF_OPEN = 1000
BLOCKS = 8
AIM = 3.0
ALONE_S = 3.0
HELD_S = 3.0
RUBBISH = (b"\xff" * 48, b"\x43" + b"\xff" * 47, b"GET / HTTP/1.0\r\n\r\n" * 4, b"", b"\x43", bytes(48))
ADDRESSES = tuple(f"127.0.0.{host}" for host in range(2, 10))
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that ends a connection with RST: no port is left in TIME_WAIT."""


def _connect(port: int, number: int) -> socket.socket:
    source = (ADDRESSES[number % len(ADDRESSES)], 0)
    return socket.create_connection((HOST, port), timeout=60, source_address=source)


def rubbish(port: int, count: int, there: Event, begin: Event, over: Event) -> None:
    """``count`` connections that say something that is no login, and go."""
    there.set()
    begin.wait()
    for number in range(count):
        with _connect(port, number) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            try:
                sock.sendall(RUBBISH[number % len(RUBBISH)])
            except OSError:
                pass
    over.set()


def half_open(port: int, count: int, there: Event, begin: Event, over: Event) -> None:
    """``count`` logins that are begun, and held for a while."""
    there.set()
    begin.wait()
    with ExitStack() as stack:
        for number in range(count):
            stack.enter_context(_connect(port, number)).sendall(b"\x43\x81")
        time.sleep(HELD_S)
    over.set()


class Worker:
    """The initiator at work."""

    def __init__(self, daemon: Daemon, disk: Disk) -> None:
        self.peer = SocketInitiator((HOST, daemon.portal_port), timeout_s=60)
        self.peer.login(disk.iqn)
        self.peer.command(bytes(6))
        self.commands = 0

    def work(self, enough: Callable[[], bool]) -> list[float]:
        """Seconds of each command until it is enough."""
        times = []
        while not enough():
            lba = self.commands % 1024 * BLOCKS
            data = os.urandom(16) * (BLOCKS * 32)
            for cdb, out in ((cdbs.write10(lba, BLOCKS), data), (cdbs.read10(lba, BLOCKS), b"")):
                began = time.perf_counter()
                reply = self.peer.command(cdb, out, 0 if out else len(data))
                times.append(time.perf_counter() - began)
                assert reply.good, reply
            assert reply.data == data, "wrong data"
            self.commands += 2
        return times


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


def round_(daemon: Daemon, worker: Worker, flood: Callable[..., None], count: int) -> tuple[float, float]:
    """(p99 without, p99 with the flood) in seconds."""
    context = multiprocessing.get_context("spawn")
    there, begin, over = context.Event(), context.Event(), context.Event()
    attacker = context.Process(target=flood, args=(daemon.portal_port, count, there, begin, over))
    attacker.start()
    there.wait()
    alone = worker.work(_after(ALONE_S))
    begin.set()
    flooded = worker.work(over.is_set)
    attacker.join()
    assert attacker.exitcode == 0
    return p99(alone), p99(flooded)


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="bench.flood", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    well = True
    with tempfile.TemporaryDirectory() as directory:
        daemon = Daemon(Path(directory)).start()
        try:
            worker = Worker(daemon, daemon.create_disk("one", "16MB"))
            for flood, count in ((rubbish, RUBBISH_CONNECTIONS), (half_open, HALF_OPEN)):
                ratios = []
                for _ in range(options.rounds):
                    alone, flooded = round_(daemon, worker, flood, count)
                    ratios.append(flooded / alone)
                    print(
                        f"{flood.__name__:10} {count:6}: p99 {alone * 1e6:7.0f} µs alone,"
                        f" {flooded * 1e6:7.0f} µs in the flood, × {ratios[-1]:.2f}",
                        flush=True,
                    )
                ratio = statistics.median(ratios)
                well = well and ratio <= AIM
                print(f"{flood.__name__:10} median × {ratio:.2f} (aim: ≤ {AIM:.0f})", flush=True)
            print(f"{worker.commands} commands verified, none failed, while all went on")
            assert not daemon.tracebacks()
        finally:
            daemon.kill9()
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
