"""What a disk that hangs costs the others: latency of one LUN while another of the same daemon is stalled.

One LUN is on a FUSE file system that stops answering on command, with more writes outstanding than it has
workers; the client works on another, 4 KiB at depth 8. With and without the stall take turns, so that what
else the machine does falls on both alike. During each stall a task of the stalled LUN is aborted and the API
is asked, and that is timed too. Figures are medians over the rounds::

    python -m bench.isolation [--rounds N] [--seconds S]

Aims (design.md §6, "a slow LUN never delays another LUN"): p99 within 2 × of its value without the stall, an
ABORT TASK answered within a second. Exit status 1 when an aim is missed.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.subjects import BUILD
from bench.workloads import ClientFailedError, run_client
from tests import cdbs
from tests.daemon import HOST, Daemon, Disk
from tests.faults.fusefs import FaultyFs, faulty_fs
from tests.faults.kit import Lun

DEPTH = 8
BLOCK_SIZE = 4096
OUTSTANDING = 16
"""Writes on the stalled LUN; a lane has four threads."""
P99_AIM = 2.0
ABORT_AIM_S = 1.0
ABORT_TASK = 1


@dataclass(frozen=True)
class Round:
    """Seconds and microseconds of one stall, and of the quiet before it."""

    calm_p99_us: dict[str, float]
    stalled_p99_us: dict[str, float]
    abort_s: float
    api_s: float


def p99(daemon: Daemon, disk: Disk, seconds: float, *, write: bool) -> float:
    argv = [str(BUILD / "load"), HOST, str(daemon.portal_port), disk.iqn, "0", "--depth", str(DEPTH)]
    argv += ["--bs", str(BLOCK_SIZE), "--seconds", str(seconds)] + ["--write"] * write
    return float(json.loads(run_client(argv, seconds))["p99_us"])


def both(daemon: Daemon, disk: Disk, seconds: float) -> dict[str, float]:
    return {name: p99(daemon, disk, seconds, write=name == "write") for name in ("read", "write")}


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def one_round(daemon: Daemon, fs: FaultyFs, stuck: Disk, well: Disk, seconds: float) -> Round:
    calm = both(daemon, well, seconds)
    with Lun(daemon, stuck.iqn) as session:
        session.ready()
        fs.stall()
        try:
            tasks = [
                session.send_command(cdbs.write10(8 * number, 8), bytes(4096))
                for number in range(OUTSTANDING)
            ]
            fs.wait_for_stalled("write")
            stalled = both(daemon, well, seconds)
            abort = timed(lambda: session.task_management(ABORT_TASK, task=tasks[0]))
            api = timed(lambda: daemon.expect(200, "GET", "services/iscsi/extent/"))
        finally:
            fs.go()
    return Round(calm, stalled, abort, api)


def measure(rounds: int, seconds: float) -> list[Round]:
    with tempfile.TemporaryDirectory(prefix="isolation-") as directory:
        place = Path(directory)
        (place / "fs").mkdir()
        with faulty_fs(place / "fs") as fs:
            daemon = Daemon(place / "daemon", options=("--extent-root", str(fs.at)))
            try:
                daemon.start()
                well = daemon.create_disk("well", "64MB")
                path = {"iscsi_target_extent_path": str(fs.at / "stuck.img")}
                stuck = daemon.create_disk("stuck", "8MB", extent=path)
                both(daemon, well, 1)  # into the page cache
                return [one_round(daemon, fs, stuck, well, seconds) for _ in range(rounds)]
            finally:
                daemon.kill9()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Latency of a LUN while another LUN's medium hangs.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement; a stall lasts two")
    options = parser.parse_args()
    if not (BUILD / "load").exists():
        parser.error("bench/build/load is not built (bench/build.sh)")
    try:
        rounds = measure(options.rounds, options.seconds)
    except ClientFailedError as error:
        print(f"the client failed: {error}", file=sys.stderr)
        return 1
    missed = False
    for name in ("read", "write"):
        calm = statistics.median(round.calm_p99_us[name] for round in rounds)
        stalled = statistics.median(round.stalled_p99_us[name] for round in rounds)
        missed |= stalled > P99_AIM * calm
        print(
            f"4 KiB random {name} at depth {DEPTH}, p99: {calm:.0f} µs,"
            f" beside a stalled LUN {stalled:.0f} µs, {stalled / calm:.2f} × (aim {P99_AIM} ×)"
        )
    abort = max(round.abort_s for round in rounds)
    missed |= abort > ABORT_AIM_S
    print(f"ABORT TASK on the stalled LUN: {1000 * abort:.1f} ms at most (aim {1000 * ABORT_AIM_S:.0f} ms)")
    print(f"API meanwhile: {1000 * max(round.api_s for round in rounds):.1f} ms at most")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
