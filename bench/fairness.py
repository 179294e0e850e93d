"""What initiators that ask for too much cost one that does not.   python -m bench.fairness [--readme]

A good initiator reads 4 KiB at random from a target of its own, at depth 1 and at depth 32, first alone and
then beside each of the abusers below, which have targets of their own, and beside all of them at once. Told
are its 99th percentile and its rate as multiples of those alone, medians over the rounds. Aims: p99 ≤ 3 ×,
rate ≥ 0.3 ×.

Two set-ups: the daemon as one process on one core, with everybody else on the others, and as two workers with
the abusers' targets on both. Abusers are processes with a low priority (nice 10), so that what is measured is
what the daemon gives to whom, and not who gets the cores; still, on a machine of two cores they and the good
initiator share one.
"""

import argparse
import http.client
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from bench.run import machine
from bench.subjects import BUILD
from bench.workloads import ClientFailedError, run_client
from protocol.enums import SnackType
from tests import cdbs
from tests.daemon import HOST, Daemon, Disk
from tests.initiator import LoginFailed, SocketInitiator

P99_AIM, RATE_AIM = 3.0, 0.3
DEPTHS = (1, 32)
TARGETS = 50
"""That SendTargets has to tell, beside those in use."""
BURST = 500
SETTLE_S = 0.5
READ = 32 << 20
README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- fairness: begin -->", "<!-- fairness: end -->"


# -- Abusers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where an abuser goes."""

    port: int
    iqn: str
    api: int
    authorization: str


def _log_in(place: Place, name: str, **login: Any) -> SocketInitiator:
    peer = SocketInitiator((HOST, place.port), timeout_s=60, strict=False)
    peer.login(place.iqn, f"iqn.2026-11.example:{name}", **login)
    peer.command(bytes(6))
    return peer


def _flood(peer: SocketInitiator, bursts: Callable[[], bytes]) -> None:
    """Send without end, and take whatever comes."""

    def take() -> None:
        try:
            while peer.socket.recv(1 << 20):
                pass
        except OSError:
            pass

    threading.Thread(target=take, daemon=True).start()
    while True:
        peer.socket.sendall(bursts())


def nops(place: Place) -> None:
    """48 bytes each, which ask for 48."""
    peer = _log_in(place, "nops")
    burst = b"".join(peer.initiator.nop_out(b"", immediate=True) for _ in range(BURST))
    _flood(peer, lambda: burst)


def discovery(place: Place) -> None:
    """SendTargets=All again and again, of which 512 bytes are read."""
    peer = SocketInitiator((HOST, place.port), timeout_s=60, strict=False)
    peer.login(None, "iqn.2026-11.example:stranger", keys={"MaxRecvDataSegmentLength": "512"})
    burst = b"".join(
        peer.initiator.text_request({"SendTargets": "All"}, immediate=True) for _ in range(BURST)
    )
    _flood(peer, lambda: burst)


def task_management(place: Place) -> None:
    """ABORT TASK of nothing."""
    peer = _log_in(place, "aborter")
    burst = b"".join(peer.initiator.task_management(1, referenced_task_tag=5) for _ in range(BURST))
    _flood(peer, lambda: burst)


def aborted_commands(place: Place) -> None:
    """READs of 64 KiB, each aborted at once."""
    peer = _log_in(place, "fickle")
    pair = [
        peer.initiator.scsi_command(
            cdbs.read10(0, 128), read=True, expected=65536, immediate=True, initiator_task_tag=9
        ),
        peer.initiator.task_management(1, referenced_task_tag=9),
    ]
    burst = b"".join(pair) * (BURST // 2)
    _flood(peer, lambda: burst)


def tiny_segments(place: Place) -> None:
    """READs of 32 MiB in segments of 512 bytes, two at a time."""
    peer = _log_in(place, "tiny", keys={"MaxRecvDataSegmentLength": "512"})
    whole = READ + 48 * (READ // 512)

    def ask() -> None:
        cdb = cdbs.read16(0, READ // 512)
        peer.socket.sendall(
            peer.initiator.scsi_command(
                cdb, read=True, expected=READ, initiator_task_tag=peer.session.new_tag()
            )
        )

    ask()
    taken = 0
    while True:
        if taken == 0:
            ask()
        taken += len(peer.socket.recv(min(1 << 20, whole - taken)))
        taken %= whole


def snacks(place: Place) -> None:
    """48 bytes that ask for 4,096 PDUs again."""
    keys = {"MaxRecvDataSegmentLength": "512", "ErrorRecoveryLevel": "1"}
    peer = _log_in(place, "snacks", keys=keys)
    read = peer.initiator.scsi_command(
        cdbs.read16(0, 4096), read=True, expected=1 << 21, initiator_task_tag=9, exp_stat_sn=0
    )
    peer.socket.sendall(read)
    burst = peer.initiator.snack(SnackType.DATA_R2T, tag=9, exp_stat_sn=0) * 10
    _flood(peer, lambda: burst)


def tiny_data_out(place: Place) -> None:
    """Writes of 64 KiB in Data-Out PDUs of 4 bytes."""
    peer = _log_in(place, "drip")
    peer.max_data_out = 4
    while True:
        peer.command(cdbs.write16(0, 128), bytes(65536), immediate_data=0, unsolicited=0)


def logins(place: Place) -> None:
    """Logs in and out, one by one."""
    while True:
        try:
            _log_in(place, "comes-and-goes").close()
        except (LoginFailed, OSError):
            pass


def waiting_commands(place: Place) -> None:
    """An ORWRITE of 32 MiB, and hundreds of small WRITEs that wait for it."""
    peers = [_log_in(place, f"waits{n}") for n in range(4)]
    exclusive = _log_in(place, "orwrite")
    for number, peer in enumerate(peers):
        threading.Thread(target=_small_writes, args=(peer, 90 * number), daemon=True).start()
    while True:
        exclusive.command(cdbs.orwrite(0, READ // 512), bytes(READ))


def _small_writes(peer: SocketInitiator, first: int) -> None:
    while True:
        tasks = [
            peer.send_command(cdbs.write16(first + n, 1), bytes(512), immediate=n >= 30) for n in range(90)
        ]
        for task in tasks:
            peer.wait(task)


def api(place: Place) -> None:
    """Metrics, whole lists, the OpenAPI document, and bodies that are no JSON."""
    asked = (
        ("GET", "/metrics", None),
        ("GET", "/api/v1.0/services/iscsi/target/?limit=0", None),
        ("GET", "/api/v1.0/openapi.json", None),
        ("PUT", "/api/v1.0/services/iscsi/globalconfiguration/", b'{"a":"' + rb"\"" * 500_000),
    )
    while True:
        for method, path, body in asked:
            connection = http.client.HTTPConnection(HOST, place.api, timeout=60)
            try:
                headers = {"Authorization": place.authorization, "Content-Type": "application/json"}
                connection.request(method, path, body, headers)
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()


ABUSERS: tuple[tuple[str, Callable[[Place], None]], ...] = (
    ("NOP-Outs without end", nops),
    ("SendTargets without end", discovery),
    ("ABORT TASK without end", task_management),
    ("READs aborted at once", aborted_commands),
    ("READs in 512-byte segments", tiny_segments),
    ("SNACKs for 4,096 PDUs", snacks),
    ("Data-Out of 4 bytes", tiny_data_out),
    ("logins", logins),
    ("360 WRITEs behind an ORWRITE", waiting_commands),
    ("API: metrics, lists, bad bodies", api),
)
MIXTURE = "all of them"


def _abuse(abuser: Callable[[Place], None], place: Place, cores: Sequence[int], over: Event) -> None:
    os.nice(10)
    os.sched_setaffinity(0, cores)
    threading.Thread(target=lambda: (over.wait(), os._exit(0)), daemon=True).start()
    while True:
        try:
            abuser(place)
        except Exception:
            time.sleep(0.1)  # it was thrown out, and tries again


# -- The good one -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    rate: float
    p99_us: float


@dataclass
class Setup:
    """A daemon, who is to be measured, and where the others go."""

    name: str
    daemon: Daemon
    good: Disk
    bad: list[Disk]
    cores: Sequence[int]
    """Of the clients."""

    def measure(self, depth: int, seconds: float) -> Figures:
        argv = ["taskset", "-c", ",".join(map(str, self.cores)), str(BUILD / "load")]
        argv += [HOST, str(self.daemon.portal_port), self.good.iqn, "0"]
        argv += ["--depth", str(depth), "--bs", "4096", "--seconds", str(seconds)]
        said = json.loads(run_client(argv, seconds))
        return Figures(float(said["iops"]), float(said["p99_us"]))

    @contextmanager
    def beside(self, abusers: Sequence[Callable[[Place], None]]) -> Any:
        context = multiprocessing.get_context("spawn")
        over = context.Event()
        authorization = self.daemon.authorization()["Authorization"]
        running = []
        for number, abuser in enumerate(abusers):
            disk = self.bad[number % len(self.bad)]
            place = Place(self.daemon.portal_port, disk.iqn, self.daemon.api_port, authorization)
            running.append(context.Process(target=_abuse, args=(abuser, place, self.cores, over)))
            running[-1].start()
        time.sleep(SETTLE_S + 0.5 * len(abusers) ** 0.5)
        try:
            yield
        finally:
            over.set()
            for process in running:
                process.join(10)
                if process.is_alive():
                    process.kill()
            time.sleep(SETTLE_S)


@contextmanager
def setup(name: str, workers: int, directory: Path) -> Any:
    everything = sorted(os.sched_getaffinity(0))
    launcher: tuple[str, ...] = ()
    cores = everything
    if workers == 1 and len(everything) > 1:
        launcher, cores = ("taskset", "-c", str(everything[0])), everything[1:]
    options = ("--workers", str(workers))
    daemon = Daemon(directory, options=options)
    daemon.start(launcher=launcher)
    try:
        good = daemon.create_disk("good", "64MB")
        level = {"iscsi_target_error_recovery_level": 1}
        bad = [daemon.create_disk(f"bad{n}", "64MB", target=level) for n in range(2 * workers)]
        for number in range(TARGETS):
            daemon.create(
                "target",
                iscsi_target_name=f"more{number}",
                iscsi_target_portalgroup=1,
                iscsi_target_initiatorgroup=1,
            )
        daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_maxsesh": 64})
        yield Setup(name, daemon, good, bad, cores)
    finally:
        daemon.kill9()


# -- What is told -----------------------------------------------------------------------------------

Ratios = dict[int, tuple[float, float]]
"""Depth → (p99, rate) by those alone."""


def judge(made: Setup, abusers: Sequence[Callable[[Place], None]], rounds: int, seconds: float) -> Ratios:
    found: dict[int, list[tuple[float, float]]] = {depth: [] for depth in DEPTHS}
    for _ in range(rounds):
        alone = {depth: made.measure(depth, seconds) for depth in DEPTHS}
        with made.beside(abusers):
            for depth in DEPTHS:
                try:
                    got = made.measure(depth, seconds)
                except ClientFailedError as error:  # it had no answer for a second
                    print(f"{made.name}, depth {depth}: {error}", file=sys.stderr)
                    got = Figures(0.0, math.inf)
                found[depth].append((got.p99_us / alone[depth].p99_us, got.rate / alone[depth].rate))
    return {
        depth: (statistics.median(p for p, _ in each), statistics.median(r for _, r in each))
        for depth, each in found.items()
    }


def table(results: dict[str, dict[str, Ratios]]) -> list[str]:
    """Markdown: a row an abuser; p99 and rate by those alone, what misses its aim in bold."""
    names = list(results)
    lines = [
        "| beside | " + " | ".join(f"{name}, depth {depth}" for name in names for depth in DEPTHS) + " |"
    ]
    lines.append("| --- |" + " ---: |" * (len(names) * len(DEPTHS)))
    for abuser in next(iter(results.values())):
        cells = []
        for name in names:
            for p99, rate in results[name][abuser].values():
                shown = f"{p99:.1f} · {rate:.2f}"
                cells.append(shown if p99 <= P99_AIM and rate >= RATE_AIM else f"**{shown}**")
        lines.append(f"| {abuser} | " + " | ".join(cells) + " |")
    return lines


def write_readme(text: str) -> None:
    """Put it between the markers."""
    before, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module; exit status 1 when an aim is missed."""
    parser = argparse.ArgumentParser(prog="bench.fairness", description="Abusers beside a good initiator.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--only", action="append", help="abusers with this in their name; repeatable")
    parser.add_argument("--setup", choices=("one core", "2 workers"), help="one of the two alone")
    parser.add_argument("--readme", action="store_true", help="write the README's section")
    options = parser.parse_args(arguments)
    if not (BUILD / "load").exists():
        parser.error("bench/build/load is not built (bench/build.sh)")
    wanted = [(name, [abuser]) for name, abuser in ABUSERS] + [(MIXTURE, [abuser for _, abuser in ABUSERS])]
    if options.only:
        wanted = [each for each in wanted if any(text in each[0] for text in options.only)]
    results: dict[str, dict[str, Ratios]] = {}
    for name, workers in (("one core", 1), ("2 workers", 2)):
        if options.setup not in (None, name):
            continue
        results[name] = {}
        with tempfile.TemporaryDirectory() as directory, setup(name, workers, Path(directory)) as made:
            for abuser, functions in wanted:
                results[name][abuser] = judge(made, functions, options.rounds, options.seconds)
                shown = "  ".join(
                    f"depth {depth}: p99 × {p99:.2f}, rate × {rate:.2f}"
                    for depth, (p99, rate) in results[name][abuser].items()
                )
                print(f"{name:10} {abuser:32} {shown}", flush=True)
            assert not made.daemon.tracebacks(), made.daemon.tracebacks()
    about = machine()
    text = [
        f"{about['processor']}, {about['cores']} cores, Linux {about['kernel']}, Python {about['python']};"
        f" median of {options.rounds} × {options.seconds:g} s; {about['time'][:10]}; load average"
        f" {about['load average before']:.1f} meanwhile, the abusers' own among it.",
        "",
        *table(results),
    ]
    print("\n".join(["", *text]))
    if options.readme:
        write_readme("\n".join(text))
    every = [ratios for rows in results.values() for row in rows.values() for ratios in row.values()]
    return int(any(p99 > P99_AIM or rate < RATE_AIM for p99, rate in every))


if __name__ == "__main__":
    sys.exit(main())
