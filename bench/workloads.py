"""What is measured, what we aim at (design.md §5), and how a client is made to do it.

The client is fio with its libiscsi engine; where libiscsi 1.19 cannot do what is asked (data digests) or
many client threads would measure themselves, it is ``load``, a single-threaded initiator of our own; with
CHAP, which fio cannot be told, libiscsi's ``iscsi-perf``, which tells no latencies.
Every client is bounded in time: it ends, or it is ended.
"""

import json
import math
import os
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.subjects import BUILD, CHAP_SECRET, CHAP_USER, Subject
from tests.daemon import HOST

MEBIBYTE = 1 << 20
HUNG = "the client hung"
HANG_LIMIT_S = 20.0
"""What a client may take beyond its measuring time before it counts as hung."""


@dataclass(frozen=True)
class Workload:
    """What a client does. Sizes in bytes; depth per session."""

    name: str
    pattern: str
    """fio's word: randread, randwrite, randrw, read, write."""
    block_size: int
    depth: int
    sessions: int = 1
    client: str = "fio"
    digests: bool = False
    chap: bool = False
    reads_percent: int = 70
    """Of ``randrw``."""
    cold: bool = False
    """Nothing of the file is in memory when it begins."""
    flush_every: int = 0
    """A SYNCHRONIZE CACHE after so many writes; 0: none."""

    @property
    def flushes(self) -> bool:
        """It asks for what has been written to be on the medium."""
        return self.flush_every > 0

    @property
    def writes(self) -> bool:
        return self.pattern != "read" and self.pattern != "randread"


WORKLOADS = (
    Workload("4k-randread-qd32", "randread", 4096, 32),
    Workload("4k-randwrite-qd32", "randwrite", 4096, 32),
    Workload("4k-randread-qd1", "randread", 4096, 1),
    Workload("4k-randwrite-qd1", "randwrite", 4096, 1),
    Workload("256k-read-qd16", "read", 262144, 16),
    Workload("256k-write-qd16", "write", 262144, 16),
    Workload("8k-70/30-qd32", "randrw", 8192, 32),
    Workload("64k-randread-qd16", "randread", 65536, 16),
    Workload("4k-randread-qd32-chap", "randread", 4096, 32, client="perf", chap=True),
    Workload("4k-randread-qd32-load", "randread", 4096, 32, client="load"),
    Workload("4k-randread-qd32-digests", "randread", 4096, 32, client="load", digests=True),
    Workload("4k-randread-16sessions", "randread", 4096, 4, sessions=16, client="load"),
    Workload("4k-randread-64sessions", "randread", 4096, 4, sessions=64, client="load"),
    Workload("8k-50/50-qd16", "randrw", 8192, 16, reads_percent=50),
    Workload("4k-randwrite-qd32-flush32", "randwrite", 4096, 32, flush_every=32),
    Workload("4k-randwrite-qd1-flush1", "randwrite", 4096, 1, flush_every=1),
    Workload("cold-4k-randread-qd1", "randread", 4096, 1, cold=True),
    Workload("cold-4k-randread-qd32", "randread", 4096, 32, cold=True),
    Workload("cold-4k-randread-qd128", "randread", 4096, 128, cold=True),
    Workload("cold-256k-read-qd16", "read", 262144, 16, cold=True),
    Workload("cold-8k-50/50-qd16", "randrw", 8192, 16, reads_percent=50, cold=True),
)


@dataclass(frozen=True)
class Sample:
    """One subject under one workload, once."""

    iops: float
    cpu_us: float
    """Server CPU per command, microseconds."""
    p50_us: float
    p99_us: float
    """Latencies as the client saw them, microseconds."""


@dataclass
class Cell:
    """All samples of one subject under one workload, or why there are none."""

    samples: list[Sample]
    note: str = ""

    @property
    def middle(self) -> Sample | None:
        """The median of each figure."""
        if not self.samples:
            return None
        figures = zip(*(asdict(sample).values() for sample in self.samples), strict=True)
        return Sample(*map(statistics.median, figures))


Grid = dict[str, dict[str, Cell]]
"""Workload → subject → cell."""


# -- aims -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """A ratio of two medians, and what it is to be."""

    workload: str
    words: str
    """What is compared, for the reader."""
    figure: str
    """Of ``Sample``, ours."""
    subject: str
    at_most: bool
    bound: float
    other: str = ""
    """The other's workload, where it is another one."""
    other_figure: str = ""
    """The other's figure, where it is another one."""

    def ratio(self, grid: Grid) -> float | None:
        """As measured; None where one side is missing. Without a subject it is the figure itself."""
        sides = [(self.workload, "ours", self.figure)]
        if self.subject:
            sides.append((self.other or self.workload, self.subject, self.other_figure or self.figure))
        values = []
        for workload, subject, figure in sides:
            cell = grid.get(workload, {}).get(subject)
            middle = cell.middle if cell is not None else None
            if middle is None:
                return None
            values.append(getattr(middle, figure))
        if math.isnan(sum(values)):
            return None  # the client does not tell it
        if len(values) == 1:
            return float(values[0])
        return float(values[0] / values[1]) if values[1] else None

    def met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.at_most else ratio >= self.bound


def _cpu(workload: str, bound: float) -> Aim:
    return Aim(workload, "CPU per command ÷ floor", "cpu_us", "limit", True, bound)


def _iops(workload: str, subject: str, bound: float) -> Aim:
    return Aim(workload, f"IOPS ÷ {subject}", "iops", subject, False, bound)


def _latency(workload: str) -> tuple[Aim, ...]:
    return (
        Aim(workload, "p50 ÷ floor", "p50_us", "limit", True, 1.3),
        Aim(workload, "p50 ÷ tgtd", "p50_us", "tgtd", True, 1.0),
        Aim(workload, "p50 ÷ istgt", "p50_us", "istgt", True, 1.0),
    )


def _crowd(workload: str) -> tuple[Aim, ...]:
    one = "4k-randread-qd32-load"
    return (
        Aim(workload, "IOPS ÷ one session's", "iops", "ours", False, 0.9, other=one),
        Aim(workload, "p99 ÷ p50", "p99_us", "ours", True, 3.0, other_figure="p50_us"),
    )


AIMS = (
    _cpu("4k-randread-qd32", 2.0),
    _iops("4k-randread-qd32", "tgtd", 3.0),
    _iops("4k-randread-qd32", "istgt", 2.0),
    _cpu("4k-randwrite-qd32", 2.0),
    _iops("4k-randwrite-qd32", "tgtd", 2.5),
    _iops("4k-randwrite-qd32", "istgt", 2.0),
    *_latency("4k-randread-qd1"),
    *_latency("4k-randwrite-qd1"),
    _cpu("256k-read-qd16", 1.25),
    _iops("256k-read-qd16", "tgtd", 3.0),
    _iops("256k-read-qd16", "istgt", 1.7),
    _cpu("256k-write-qd16", 1.25),
    _iops("256k-write-qd16", "tgtd", 3.0),
    _iops("256k-write-qd16", "istgt", 1.7),
    Aim(
        "4k-randread-qd32-digests",
        "IOPS ÷ tgtd without digests",
        "iops",
        "tgtd",
        False,
        2.0,
        other="4k-randread-qd32-load",
    ),
    Aim("8k-50/50-qd16", "CPU per command, µs", "cpu_us", "", True, 10.0),
    _iops("8k-50/50-qd16", "tgtd", 3.0),
    *(
        _iops(workload, peer, 1.2)
        for workload in ("4k-randwrite-qd32-flush32", "4k-randwrite-qd1-flush1")
        for peer in ("tgtd", "istgt")
    ),
    Aim("cold-4k-randread-qd1", "p50 ÷ tgtd", "p50_us", "tgtd", True, 1.15),
    Aim("cold-4k-randread-qd1", "p50 ÷ istgt", "p50_us", "istgt", True, 1.15),
    *(
        aim
        for workload in ("cold-4k-randread-qd32", "cold-4k-randread-qd128")
        for aim in (
            _iops(workload, "tgtd", 1.0),
            Aim(workload, "CPU per command ÷ tgtd", "cpu_us", "tgtd", True, 0.5),
            _iops(workload, "file", 0.7),
        )
    ),
    _iops("cold-256k-read-qd16", "tgtd", 1.5),
    _iops("cold-256k-read-qd16", "istgt", 1.5),
    *_crowd("4k-randread-16sessions"),
    *_crowd("4k-randread-64sessions"),
)


# -- clients ----------------------------------------------------------------------------------------


class ClientFailedError(Exception):
    """A client did not get through; the text says what it said."""


Figures = tuple[int, float, float, float]
"""Commands, IOPS, p50 and p99 in microseconds."""


def run_client(argv: Sequence[str], seconds: float) -> str:
    """What it prints. ClientFailedError when it fails or takes ``HANG_LIMIT_S`` longer than it should."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds + HANG_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ClientFailedError(HUNG) from None
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ClientFailedError(said[-1][:120] if said else f"exit status {done.returncode}")
    return done.stdout


def fio_command(subject: Subject, pattern: str, block_size: int, depth: int) -> list[str]:
    if subject.is_file:
        where = ["--ioengine=io_uring", f"--filename={subject.image}"]
    else:
        url = f"iscsi://{HOST}:{subject.port}/{subject.iqn}/{subject.lun}".replace(":", r"\:")
        where = ["--ioengine=libiscsi", f"--filename={url}"]
    return [
        *(str(BUILD / "fio"), "--name=bench", *where),
        *(f"--rw={pattern}", f"--bs={block_size}", f"--iodepth={depth}"),
        f"--size={subject.image.stat().st_size}",
    ]


def fio(subject: Subject, work: Workload, seconds: float) -> Figures:
    """Of a mixed workload the latencies are those of its reads."""
    said = run_client(
        [
            *fio_command(subject, work.pattern, work.block_size, work.depth),
            *(f"--numjobs={work.sessions}", "--group_reporting", "--thread", "--norandommap"),
            *("--time_based", f"--runtime={seconds}", "--percentile_list=50:99", "--output-format=json"),
            *(f"--rwmixread={work.reads_percent}", f"--fsync={work.flush_every}", "--invalidate=0"),
        ],
        seconds,
    )
    # A remark about the engine may stand before the JSON.
    job = json.loads(said[said.index("{") :])["jobs"][0]
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides:
        raise ClientFailedError("no command was answered")
    percentile = sides[0]["clat_ns"]["percentile"]
    return (
        sum(side["total_ios"] for side in sides),
        sum(side["iops"] for side in sides),
        percentile["50.000000"] / 1000,
        percentile["99.000000"] / 1000,
    )


def load_command(subject: Subject, *options: str) -> list[str]:
    return [str(BUILD / "load"), HOST, str(subject.port), subject.iqn, str(subject.lun), *options]


def load(subject: Subject, work: Workload, seconds: float) -> Figures:
    """The same from ``load``; it reads and writes at random only."""
    argv = load_command(subject, "--sessions", str(work.sessions), "--depth", str(work.depth))
    argv += ["--bs", str(work.block_size), "--seconds", str(seconds)]
    argv += ["--digests"] * work.digests + ["--write"] * work.writes
    answer = json.loads(run_client(argv, seconds))
    return answer["ios"], answer["iops"], answer["p50_us"], answer["p99_us"]


def perf(subject: Subject, work: Workload, seconds: float) -> Figures:
    """``iscsi-perf`` reads at random, in whole seconds; its mean is over all of them."""
    url = f"iscsi://{CHAP_USER}%{CHAP_SECRET}@{HOST}:{subject.port}/{subject.chap_iqn}/{subject.lun}"
    whole = max(1, round(seconds))
    argv = [
        "iscsi-perf",
        "-r",
        "-m",
        str(work.depth),
        "-b",
        str(work.block_size // 512),
        "-t",
        str(whole),
        url,
    ]
    said = re.search(r"iops average (\d+)", run_client(argv, seconds))
    if said is None:
        raise ClientFailedError("no average was told")
    iops = int(said[1])
    return iops * whole, iops, math.nan, math.nan


CLIENTS: dict[str, Callable[[Subject, Workload, float], Figures]] = {"fio": fio, "load": load, "perf": perf}


# -- measuring --------------------------------------------------------------------------------------


def make_image(path: Path, mebibytes: int) -> None:
    """Bytes that neither compress nor repeat within a page, allocated in full."""
    block = os.urandom(MEBIBYTE)
    with path.open("wb") as file:
        for number in range(mebibytes):
            file.write(number.to_bytes(8, "big") + block[8:])
        os.fsync(file.fileno())


def warm(image: Path) -> None:
    """Bring the file into the page cache: a host may have reclaimed it since the last run."""
    with image.open("rb", buffering=0) as file:
        buffer = bytearray(MEBIBYTE)
        while file.readinto(buffer):
            pass


def chill(image: Path) -> None:
    """Take the file out of the page cache, and what its file system keeps of it where we may (root)."""
    with image.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        pass  # pages that a target has mapped stay, then


def measure(subject: Subject, work: Workload, seconds: float) -> Sample:
    """One sample: CPU per command is the server's over the whole run of the client."""
    if work.cold:
        chill(subject.image)
    else:
        warm(subject.image)
    if work.writes and not work.cold:
        # Through the subject, so that its mapping, if it has one, is writable too: else the first write to
        # each clean page costs a fault in the file system, and a short run measures little but that.
        run_client(fio_command(subject, "write", 262144, 16), HANG_LIMIT_S)
    before = subject.cpu_seconds()
    try:
        ios, iops, p50, p99 = CLIENTS[work.client](subject, work, seconds)
    finally:
        spent = subject.cpu_seconds() - before
        if work.writes:
            with subject.image.open("rb+") as file:
                os.fsync(file.fileno())
    return Sample(iops, spent / ios * 1e6, p50, p99)
