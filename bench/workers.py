"""Two targets in one process, and in two: what they serve together, and who used the processors for it.

``make bench-workers``. Each target has a file of its own and a client of its own (``load``, single-threaded),
both at once; the subjects take turns, round by round, and medians are told. The client's share is its part of
all processor time that both sides used: where clients and target share two cores, that much of them is not
the target's to have, and the most that a second process could bring is what the first one leaves idle.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.run import RESULTS, machine
from bench.subjects import BUILD, Ours
from bench.workloads import HANG_LIMIT_S, Workload, make_image, warm
from tests.daemon import HOST, Daemon, free_ports

WORKLOADS = (
    Workload("4k-randread-qd32", "randread", 4096, 32, client="load"),
    Workload("4k-randwrite-qd32", "randwrite", 4096, 32, client="load"),
    Workload("256k-randread-qd16", "randread", 262144, 16, client="load"),
)
TARGETS = 2


@dataclass(frozen=True)
class Sample:
    """Both targets together, once."""

    iops: float
    cpu_us: float
    """Of all processes of the daemon, per command, microseconds."""
    processors: float
    """Processors that the daemon kept busy."""
    client_share: float
    """The clients' part of all processor time that was used."""


class Spread(Ours):
    """The daemon with so many worker processes, and two targets."""

    def __init__(self, workers: int, directory: Path, mebibytes: int) -> None:
        self.name = f"{workers} process{'es' if workers > 1 else ''}"
        super().__init__(directory / "image0", directory)
        self.images = [directory / f"image{number}" for number in range(TARGETS)]
        for image in self.images:
            make_image(image, mebibytes)
        self.workers = workers
        self.iqns: list[str] = []

    def start(self) -> None:
        self.daemon = Daemon(
            self.directory,
            options=("--extent-root", str(self.image.parent), "--workers", str(self.workers)),
            portal_port=self.port,
            api_port=free_ports(1)[0],
        )
        self.daemon.start()
        for number, image in enumerate(self.images):
            path = {"iscsi_target_extent_path": str(image)}
            self.iqns.append(self.daemon.create_disk(f"bench{number}", "0", extent=path).iqn)


def measure(subject: Spread, work: Workload, seconds: float) -> Sample:
    """Both clients at once, from the same moment on."""
    for image in subject.images:
        warm(image)
    before, clients = subject.cpu_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    running = [
        subprocess.Popen(
            [
                *(str(BUILD / "load"), HOST, str(subject.port), iqn, "0"),
                *("--depth", str(work.depth), "--bs", str(work.block_size), "--seconds", str(seconds)),
                *["--write"] * work.writes,
            ],
            stdout=subprocess.PIPE,
        )
        for iqn in subject.iqns
    ]
    told = [json.loads(client.communicate(timeout=seconds + HANG_LIMIT_S)[0]) for client in running]
    spent = subject.cpu_seconds() - before
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    client = after.ru_utime + after.ru_stime - clients.ru_utime - clients.ru_stime
    commands = sum(answer["ios"] for answer in told)
    return Sample(
        sum(answer["iops"] for answer in told),
        spent / commands * 1e6,
        spent / seconds,
        client / (client + spent),
    )


def median(samples: list[Sample]) -> Sample:
    return Sample(*(statistics.median(column) for column in zip(*map(_values, samples), strict=True)))


def _values(sample: Sample) -> tuple[float, float, float, float]:
    return sample.iops, sample.cpu_us, sample.processors, sample.client_share


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.workers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--mebibytes", type=int, default=128, help="of each of the two files")
    arguments = parser.parse_args()
    if not (BUILD / "load").exists():
        print("bench/build/load is not built (bench/build.sh)", file=sys.stderr)
        return 1
    found: dict[str, dict[str, Sample]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-workers-") as name:
        subjects = [
            Spread(workers, Path(name, str(workers)), arguments.mebibytes) for workers in (1, TARGETS)
        ]
        started: list[Spread] = []
        try:
            for subject in subjects:
                subject.start()
                started.append(subject)
            for work in WORKLOADS:
                samples: dict[str, list[Sample]] = {}
                for _ in range(arguments.rounds):
                    for subject in subjects:
                        samples.setdefault(subject.name, []).append(measure(subject, work, arguments.seconds))
                found[work.name] = {subject: median(taken) for subject, taken in samples.items()}
                _tell(work.name, found[work.name])
        finally:
            for subject in started:
                subject.stop()
    RESULTS.mkdir(exist_ok=True)
    report = {
        "machine": machine(),
        "load": os.getloadavg(),
        "workloads": {
            work: {subject: asdict(sample) for subject, sample in row.items()} for work, row in found.items()
        },
    }
    (RESULTS / "workers.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _tell(work: str, row: dict[str, Sample]) -> None:
    (one, alone), (many, spread) = row.items()
    print(f"{work}: {spread.iops / alone.iops:.2f} times the commands with {many}")
    for subject, sample in ((one, alone), (many, spread)):
        print(
            f"  {subject:12} {sample.iops:9.0f} IOPS  {sample.cpu_us:6.1f} us/command  "
            f"{sample.processors:4.2f} processors  client's share {sample.client_share:4.0%}"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
