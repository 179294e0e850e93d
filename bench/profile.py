"""Where each microsecond goes; ``bench/PROFILE.md`` says what was found.

``python -m bench.profile parts`` times the pieces of a command in this process, each as the best of many
short runs, which other work on the machine hardly touches. ``python -m bench.profile WORKLOAD [SUBJECT]``
takes a subject through a workload of ``make bench`` under perf and shows what its time was spent in; with
``--functions`` in which Python functions, under py-spy.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import timeit
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.subjects import SUBJECTS
from bench.workloads import WORKLOADS, make_image, measure
from protocol.digest import digest
from storage.file import File
from tests import cdbs
from tests.initiator import MemoryPeer
from tests.protocol.target import MemoryTarget, connection_of

COMMANDS = 32
"""In one wake-up: the depth of the main workload."""
BLOCK = 512
PLAIN = {"HeaderDigest": "None", "DataDigest": "None"}
DIGESTED = {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}


def best_us(work: Callable[[], object], number: int = 50, repeat: int = 400) -> float:
    return min(timeit.repeat(work, number=number, repeat=repeat)) / number * 1e6


def parts(directory: Path) -> None:
    """Print what the pieces cost."""
    path = directory / "extent"
    make_image(path, 16)
    extent = File(str(path))
    page, large = bytes(4096), bytes(262144)
    header = bytes(48)
    extent.read_nowait(0, 4096)  # learns that it is in memory
    pieces: dict[str, Callable[[], object]] = {
        "4 KiB lent by the mapping (read_nowait)": lambda: extent.read_nowait(0, 4096),
        "4 KiB copied, for a digest (copy_nowait)": lambda: extent.copy_nowait(0, 4096),
        "4 KiB stored through the mapping (write_nowait)": lambda: extent.write_nowait(0, page),
        "256 KiB written (write_nowait)": lambda: extent.write_nowait(0, large),
        "digest of a header": lambda: digest(header),
        "digest of 4 KiB": lambda: digest(page),
    }
    for name, work in pieces.items():
        print(f"{best_us(work):8.2f} µs  {name}")
    for keys, kind in ((PLAIN, "no digests"), (DIGESTED, "both digests")):
        for read in (True, False):
            name = f"a 4 KiB {'READ' if read else 'WRITE'}, {kind}, {COMMANDS} in a wake-up"
            print(f"{wake_up_us(extent, keys, read=read):8.2f} µs  {name}")


def wake_up_us(extent: File, keys: dict[str, str], *, read: bool) -> float:
    """From received bytes to the list for sendmsg, per command."""
    target = MemoryTarget()
    target.units[0].reconfigure(target.units[0].config, extent)
    target.access.grant = replace(target.access.grant, queue_depth=2 * COMMANDS)
    peer = target.logged_in(keys=keys)
    peer.command(bytes(6))  # the unit attention for the new medium
    connection = connection_of(peer)

    def once() -> None:
        connection.receive_data(stream, 0.0)
        if connection.take_events():
            raise AssertionError("the fast path was not taken")
        connection.data_to_send()

    times = []
    for _ in range(400):
        stream = memoryview(bytearray(commands(peer, keys, read=read)))
        times.append(timeit.timeit(once, number=1))
    return min(times) / COMMANDS * 1e6


def commands(peer: MemoryPeer, keys: dict[str, str], *, read: bool) -> bytes:
    """The PDUs of a wake-up, and the initiator's count with them."""
    digests = keys is DIGESTED
    stream = b""
    for number in range(COMMANDS):
        cdb = (cdbs.read10 if read else cdbs.write10)(8 * number, 8).ljust(16, b"\0")
        data = b"" if read else bytes(8 * BLOCK)
        flags = 0xC1 if read else 0xA1
        header = (
            bytes((1, flags, 0, 0)) + len(data).to_bytes(4, "big") + bytes(8)
            + (100 + number).to_bytes(4, "big") + (8 * BLOCK).to_bytes(4, "big")
            + peer.session.cmd_sn.to_bytes(4, "big") + bytes(4) + cdb
        )  # fmt: skip
        peer.session.cmd_sn += 1
        stream += header + (digest(header) if digests else b"")
        stream += data + (digest(data) if digests and data else b"")
    return stream


def watch(
    name: str, workload: str, seconds: float, directory: Path, watcher: Callable[[int, float], list[str]]
) -> None:
    """Run the watcher's command, made of process and seconds, over the server while the client runs."""
    work = next((work for work in WORKLOADS if work.name == workload), None)
    if work is None:
        sys.exit(f"there are: parts, {', '.join(work.name for work in WORKLOADS)}")
    image = directory / "image"
    make_image(image, 256)
    subject = SUBJECTS[name](image, directory / name)
    try:
        subject.start()
        with subprocess.Popen(watcher(subject.pid, 2 * seconds + 2), stdout=subprocess.DEVNULL):
            print(measure(subject, work, seconds), flush=True)
    finally:
        subject.stop()


def libraries_and_symbols(name: str, workload: str, seconds: float, directory: Path) -> None:
    """By perf; no hardware counters are needed."""
    found = directory / "perf.data"

    def perf(pid: int, seconds: float) -> list[str]:
        record = ["perf", "record", "-q", "-F", "4000", "-e", "cpu-clock", "-o", str(found)]
        return [*record, "-p", str(pid), "--", "sleep", str(seconds)]

    watch(name, workload, seconds, directory, perf)
    for sort in ("dso", "symbol"):
        report = [
            "perf",
            "report",
            "-i",
            str(found),
            "--no-children",
            "--sort",
            sort,
            "--percent-limit",
            "0.7",
        ]
        subprocess.run(report, stderr=subprocess.DEVNULL, env={**os.environ, "PAGER": "cat"}, check=True)


def functions(name: str, workload: str, seconds: float, directory: Path) -> None:
    """By py-spy (``pip install py-spy``): what a function does itself, system calls among it, but for the
    loop's wait."""
    found = directory / "py-spy.raw"

    def py_spy(pid: int, seconds: float) -> list[str]:
        record = ["py-spy", "record", "-r", "500", "--nonblocking", "--function", "-f", "raw"]
        return [*record, "-d", str(round(seconds)), "-o", str(found), "-p", str(pid)]

    watch(name, workload, seconds, directory, py_spy)
    samples: Counter[str] = Counter()
    for line in found.read_text(encoding="utf-8").splitlines():
        stack, _, count = line.rpartition(" ")
        function = stack.rpartition(";")[2]
        if not function.startswith("_Selector.select"):
            samples[function] += int(count)
    total = samples.total()
    for function, count in samples.most_common(20):
        print(f"{count / total:7.1%}  {function}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("workload", help="parts, or a workload of make bench")
    parser.add_argument("subject", nargs="?", default="ours", choices=list(SUBJECTS))
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--functions", action="store_true", help="Python functions, by py-spy, not perf")
    options = parser.parse_args()
    if options.functions and (options.workload == "parts" or options.subject != "ours"):
        parser.error("--functions: only of ours, and under a workload")
    with tempfile.TemporaryDirectory(prefix="iscsi-profile-") as directory:
        if options.workload == "parts":
            parts(Path(directory))
        else:
            show = functions if options.functions else libraries_and_symbols
            show(options.subject, options.workload, options.seconds, Path(directory))


if __name__ == "__main__":
    main()
