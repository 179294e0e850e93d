"""Measures this daemon beside the C floor, tgtd and istgt, and prints what it found.

One run takes all subjects through all workloads in interleaved rounds (A B C D, A B C D, …), so that what
else the machine does falls on all alike, and reports medians. All serve the same file, read into the page
cache before every measurement. Before a write workload all of it is written once through the subject, and
afterwards it is synced: each starts from the same dirty pages and leaves none behind. CPU per command is
the server's user and system time over the whole run of the client, by the commands of that run.

The client is fio with its libiscsi engine; where libiscsi 1.19 cannot do what is asked (data digests) or
64 client threads would measure themselves, it is ``load``, a single-threaded initiator of our own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.subjects import BUILD, SUBJECTS, Subject, UnavailableError
from tests.daemon import HOST

RESULTS = Path(__file__).resolve().parent / "results"
MEBIBYTE = 1 << 20
HUNG = "the client hung"
HANG_LIMIT_S = 20.0
"""What a client may take beyond its measuring time before it counts as hung."""


@dataclass(frozen=True)
class Workload:
    """What a client does. Sizes in bytes; depth per session."""

    name: str
    pattern: str
    """fio's word: randread, randwrite, read, write."""
    block_size: int
    depth: int
    sessions: int = 1
    client: str = "fio"
    digests: bool = False

    @property
    def writes(self) -> bool:
        return "write" in self.pattern


WORKLOADS = (
    Workload("4k-randread-qd32", "randread", 4096, 32),
    Workload("4k-randwrite-qd32", "randwrite", 4096, 32),
    Workload("4k-randread-qd1", "randread", 4096, 1),
    Workload("4k-randwrite-qd1", "randwrite", 4096, 1),
    Workload("256k-read-qd16", "read", 262144, 16),
    Workload("256k-write-qd16", "write", 262144, 16),
    Workload("4k-randread-qd32-load", "randread", 4096, 32, client="load"),
    Workload("4k-randread-qd32-digests", "randread", 4096, 32, client="load", digests=True),
    Workload("4k-randread-16sessions", "randread", 4096, 4, sessions=16),
    Workload("4k-randread-64sessions", "randread", 4096, 4, sessions=64, client="load"),
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


class ClientFailedError(Exception):
    """A client did not get through; the text says what it said."""


def run_client(argv: Sequence[str], seconds: float) -> str:
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


def fio(subject: Subject, work: Workload, seconds: float) -> tuple[int, float, float, float]:
    """Commands, IOPS, p50 and p99 in microseconds."""
    said = run_client(
        [
            *fio_command(subject, work.pattern, work.block_size, work.depth),
            *(f"--numjobs={work.sessions}", "--group_reporting", "--thread", "--norandommap"),
            *("--time_based", f"--runtime={seconds}", "--percentile_list=50:99", "--output-format=json"),
        ],
        seconds,
    )
    # A remark about the engine may stand before the JSON.
    side = json.loads(said[said.index("{") :])["jobs"][0]["write" if work.writes else "read"]
    percentile = side["clat_ns"]["percentile"]
    return (
        side["total_ios"],
        side["iops"],
        percentile["50.000000"] / 1000,
        percentile["99.000000"] / 1000,
    )


def fio_command(subject: Subject, pattern: str, block_size: int, depth: int) -> list[str]:
    url = f"iscsi://{HOST}:{subject.port}/{subject.iqn}/{subject.lun}".replace(":", r"\:")
    return [
        *(str(BUILD / "fio"), "--name=bench", "--ioengine=libiscsi", f"--filename={url}"),
        *(f"--rw={pattern}", f"--bs={block_size}", f"--iodepth={depth}"),
        f"--size={subject.image.stat().st_size}",
    ]


def load(subject: Subject, work: Workload, seconds: float) -> tuple[int, float, float, float]:
    """The same from ``load``; it reads and writes at random only."""
    argv = [str(BUILD / "load"), HOST, str(subject.port), subject.iqn, str(subject.lun)]
    argv += ["--sessions", str(work.sessions), "--depth", str(work.depth), "--bs", str(work.block_size)]
    argv += ["--seconds", str(seconds)]
    argv += ["--digests"] * work.digests + ["--write"] * work.writes
    answer = json.loads(run_client(argv, seconds))
    return answer["ios"], answer["iops"], answer["p50_us"], answer["p99_us"]


def warm(image: Path) -> None:
    """Bring the file into the page cache: a host may have reclaimed it since the last run."""
    with image.open("rb", buffering=0) as file:
        buffer = bytearray(MEBIBYTE)
        while file.readinto(buffer):
            pass


def measure(subject: Subject, work: Workload, seconds: float) -> Sample:
    warm(subject.image)
    if work.writes:
        # Through the subject, so that its mapping, if it has one, is writable too: else the first write to
        # each clean page costs a fault in the file system, and a short run measures little but that.
        run_client(fio_command(subject, "write", 262144, 16), HANG_LIMIT_S)
    before = subject.cpu_seconds()
    try:
        ios, iops, p50, p99 = (fio if work.client == "fio" else load)(subject, work, seconds)
    finally:
        spent = subject.cpu_seconds() - before
        if work.writes:
            with subject.image.open("rb+") as file:
                os.fsync(file.fileno())
    return Sample(iops, spent / ios * 1e6, p50, p99)


def median(samples: Sequence[Sample]) -> Sample:
    return Sample(
        *(statistics.median(values) for values in zip(*(asdict(s).values() for s in samples), strict=True))
    )


@dataclass
class Cell:
    """All samples of one subject under one workload, or why there are none."""

    samples: list[Sample]
    note: str = ""

    @property
    def middle(self) -> Sample | None:
        return median(self.samples) if self.samples else None


Grid = dict[str, dict[str, Cell]]
"""Workload → subject → cell."""


def table(grid: Grid, names: Sequence[str]) -> str:
    """One block a workload; the ratios are ours by theirs, so 2.0x IOPS is twice as many for us."""
    lines = []
    for workload, row in grid.items():
        lines.append(
            f"\n{workload:<26}{'IOPS':>9}{'CPU µs':>9}{'p50 µs':>9}{'p99 µs':>9}   ours: IOPS     CPU     p50"
        )
        ours = row["ours"].middle if "ours" in row else None
        for name in names:
            cell = row[name]
            middle = cell.middle
            if middle is None:
                lines.append(f"  {name:<24}{'—':>9}   {cell.note}")
                continue
            line = (
                f"  {name:<24}{middle.iops:9.0f}{middle.cpu_us:9.1f}{middle.p50_us:9.1f}{middle.p99_us:9.1f}"
            )
            if ours is not None and name != "ours":
                ratios = (ours.iops / middle.iops, ours.cpu_us / middle.cpu_us, ours.p50_us / middle.p50_us)
                line += f"   {ratios[0]:9.2f}x{ratios[1]:7.2f}x{ratios[2]:7.2f}x"
            lines.append(line + (f"   {cell.note}" if cell.note else ""))
    return "\n".join(lines)


def machine() -> dict[str, object]:
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": model[0] if model else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def make_image(path: Path, mebibytes: int) -> None:
    """Bytes that neither compress nor repeat within a page, allocated in full."""
    block = os.urandom(MEBIBYTE)
    with path.open("wb") as file:
        for number in range(mebibytes):
            file.write(number.to_bytes(8, "big") + block[8:])
        os.fsync(file.fileno())


def run_rounds(subjects: Iterable[Subject], works: Sequence[Workload], rounds: int, seconds: float) -> Grid:
    subjects = list(subjects)
    grid: Grid = {work.name: {subject.name: Cell([]) for subject in subjects} for work in works}
    for number in range(rounds):
        for work in works:
            for subject in subjects:
                cell = grid[work.name][subject.name]
                if work.digests and not subject.digests:
                    cell.note = "no digests"
                    continue
                if cell.note == HUNG:
                    # Once is enough: it costs the whole time limit.
                    continue
                try:
                    sample = measure(subject, work, seconds)
                except ClientFailedError as failure:
                    cell.note = str(failure)
                    # Whatever state that left it in is not the next workload's business.
                    subject.stop()
                    subject.start()
                    continue
                cell.samples.append(sample)
                print(
                    f"round {number + 1}/{rounds} {work.name:<26} {subject.name:<6}"
                    f"{sample.iops:9.0f} IOPS {sample.cpu_us:7.1f} µs",
                    file=sys.stderr,
                )
    return grid


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="workloads with TEXT in the name; repeatable",
    )
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="comma list (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="a measurement's length (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one round of one second")
    parser.add_argument(
        "--size", type=int, default=1024, metavar="MIB", help="the file (default %(default)s)"
    )
    parser.add_argument("--directory", type=Path, help="where the file goes (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="where the figures go (default: bench/results/TIME.json)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, 1.0
    unknown = set(options.subjects.split(",")) - set(SUBJECTS)
    if unknown:
        parser.error(f"--subjects: unknown {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    works = [w for w in WORKLOADS if not options.only or any(text in w.name for text in options.only)]
    if not works:
        parser.error(f"--only: there are {', '.join(w.name for w in WORKLOADS)}")
    for client in sorted({work.client for work in works}):
        if not (BUILD / client).exists():
            print(f"bench/build/{client} is not built; run bench/build.sh, which says why", file=sys.stderr)
            works = [work for work in works if work.client != client]

    running: list[Subject] = []
    with tempfile.TemporaryDirectory(prefix="iscsi-bench-", dir=options.directory) as scratch:
        image = Path(scratch) / "image"
        make_image(image, options.size)
        try:
            for name in options.subjects.split(","):
                subject = SUBJECTS[name](image, Path(scratch) / name)
                try:
                    subject.start()
                    running.append(subject)
                except UnavailableError as reason:
                    print(f"leaving out {name}: {reason}", file=sys.stderr)
                    subject.stop()
            grid = run_rounds(running, works, options.rounds, options.seconds)
        finally:
            for subject in running:
                subject.stop()

    about = machine()
    print(
        f"\n{about['processor']}, {about['cores']} cores, Linux {about['kernel']}, Python {about['python']}; "
        f"median of {options.rounds} × {options.seconds:g} s"
    )
    print(table(grid, [subject.name for subject in running]))
    RESULTS.mkdir(exist_ok=True)
    path = options.json or RESULTS / f"{about['time']}.json"
    path.write_text(
        json.dumps(
            {
                "machine": about,
                "rounds": options.rounds,
                "seconds": options.seconds,
                "workloads": {
                    work: {
                        name: {
                            "note": cell.note,
                            "samples": [asdict(s) for s in cell.samples],
                            "median": asdict(cell.middle) if cell.middle else None,
                        }
                        for name, cell in row.items()
                    }
                    for work, row in grid.items()
                },
            },
            indent=1,
        )
        + "\n"
    )
    print(f"\nfigures: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
