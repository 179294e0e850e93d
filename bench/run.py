"""Measures this daemon beside the C floor, tgtd and istgt, and prints what it found.

One run takes all subjects through all workloads in interleaved rounds (A B C D, A B C D, …), so that what
else the machine does falls on all alike, and reports medians. All serve the same file, read into the page
cache before every measurement, or taken out of it for a cold one, where the file itself is measured too
(fio by io_uring, without a target). Before a write workload all of it is written once through the subject,
and afterwards it is synced: each starts from the same dirty pages and leaves none behind. CPU per command is
the server's user and system time over the whole run of the client, by the commands of that run.

Then what has no rate of commands (``bench.scale``). All figures go to a file as JSON; a run that is not
narrowed down (``--only``, ``--quick`` …) also writes the README's section and its plot (``bench.report``).
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from bench import report, scale
from bench.subjects import BUILD, SUBJECTS, Ours, Subject, UnavailableError
from bench.workloads import (
    HUNG,
    WORKLOADS,
    Cell,
    ClientFailedError,
    Grid,
    Workload,
    make_image,
    measure,
)

RESULTS = Path(__file__).resolve().parent / "results"
IDLE_SESSIONS = 1000
BUSY = " The machine was busy with other work: run it again on an idle one before you rely on these figures."

_S = TypeVar("_S", bound=Subject)


def machine() -> dict[str, Any]:
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
        # bbr makes large transfers over loopback dearer than reno does (PROFILE.md).
        "congestion control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "load average before": os.getloadavg()[1],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run_rounds(subjects: Iterable[Subject], works: Sequence[Workload], rounds: int, seconds: float) -> Grid:
    subjects = list(subjects)
    grid: Grid = {work.name: {subject.name: Cell([]) for subject in subjects} for work in works}
    for number in range(rounds):
        for work in works:
            for subject in subjects:
                cell = grid[work.name][subject.name]
                if subject.is_file and not work.cold:
                    cell.note = "—"
                    continue
                lacking = [
                    what
                    for what in ("digests", "chap", "flushes")
                    if getattr(work, what) and not getattr(subject, what)
                ]
                if lacking:
                    cell.note = f"no {lacking[0]}"
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


def by_subject(
    subjects: Iterable[_S], measured: Callable[[_S], dict[str, float]], what: str
) -> dict[str, dict[str, float]]:
    """The figures of each subject that has any; what fails is told and left out."""
    found = {}
    for subject in subjects:
        try:
            found[subject.name] = measured(subject)
        except ClientFailedError as failure:
            print(f"{what}: {subject.name}: {failure}", file=sys.stderr)
            subject.stop()
            subject.start()
        else:
            figures = ", ".join(f"{name} {value:.2f}" for name, value in found[subject.name].items())
            print(f"{what}: {subject.name}: {figures}", file=sys.stderr)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="workloads with TEXT in the name, and nothing of bench.scale; repeatable",
    )
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="comma list (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="a measurement's length (default %(default)s)"
    )
    parser.add_argument("--targets", type=int, default=1000, help="of the many (default %(default)s)")
    parser.add_argument("--luns", type=int, default=4, help="of each of them (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of one second, 50 targets")
    parser.add_argument(
        "--size", type=int, default=1024, metavar="MIB", help="the file (default %(default)s)"
    )
    parser.add_argument("--directory", type=Path, help="where the file goes (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="where the figures go (default: bench/results/TIME.json)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.targets = 1, 1.0, 50
    unknown = set(options.subjects.split(",")) - set(SUBJECTS)
    if unknown:
        parser.error(f"--subjects: unknown {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    options.works = [w for w in WORKLOADS if not options.only or any(text in w.name for text in options.only)]
    if not options.works:
        parser.error(f"--only: there are {', '.join(w.name for w in WORKLOADS)}")
    for client in sorted({work.client for work in options.works}):
        if not (BUILD / client).exists() and not (client == "perf" and shutil.which("iscsi-perf")):
            print(f"leaving out {client}: not in bench/build (bench/build.sh says why)", file=sys.stderr)
            options.works = [work for work in options.works if work.client != client]
    return options


def main() -> int:
    options = arguments()
    about = machine()
    running: list[Subject] = []
    beside: dict[str, dict[str, dict[str, float]]] = {}
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
            grid = run_rounds(running, options.works, options.rounds, options.seconds)
            if not options.only:
                ours = [subject for subject in running if isinstance(subject, Ours)]
                seconds = options.seconds
                beside["logins"] = by_subject(
                    [subject for subject in running if not subject.is_file],
                    lambda s: scale.logins(s, seconds),
                    "logins",
                )
                beside["api"] = by_subject(ours, lambda s: scale.api_rate(s, seconds), "API")
                beside["idle"] = by_subject(ours, lambda s: scale.idle(s, IDLE_SESSIONS), "silent sessions")
        finally:
            for subject in running:
                subject.stop()
    if not options.only and "ours" in options.subjects:
        figures = scale.many(
            options.targets, options.luns, options.rounds, options.seconds, options.directory
        )
        beside["many"] = {"ours": figures}

    about["load average after"] = os.getloadavg()[1]
    names = [subject.name for subject in running]
    heading = (
        f"{about['processor']}, {about['cores']} cores, Linux {about['kernel']}, "
        f"{about['congestion control']}, Python {about['python']}; "
        f"median of {options.rounds} × {options.seconds:g} s, interleaved; {about['time'][:10]}; "
        f"load average {about['load average before']:.1f} before, {about['load average after']:.1f} after."
    )
    if about["load average before"] > about["cores"]:
        heading += BUSY
    print(f"\n{heading}")
    print(report.terminal(grid, names))
    print()
    for workload, words, measured, bound, met in report.aims(grid, beside):
        print(f"{workload:<28}{words:<48}{measured:>8}   {bound:<8}{'' if met else 'missed'}")
    if not (options.only or options.quick) and options.subjects.split(",") == list(SUBJECTS):
        report.PLOT.write_text(report.plot(grid, names), encoding="utf-8")
        if report.write_readme(report.section(grid, beside, names, heading)):
            print(f"\nwritten into {report.README} and {report.PLOT}")
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
                "scale": beside,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"\nfigures: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
