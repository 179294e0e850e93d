"""``make torture``: what was written stays true, whatever an administrator, a wire or a kill does meanwhile.

    python -m tests.torture [--seconds 600] [--seed N] [--workers 2] [--sessions 12]

Hosts at error recovery levels 0, 1 and 2 write and read through relays that flip bits; administrators do
every edit that there is, by force where it must be, and take it back; the daemon and its workers are killed
and the daemon restarted. At the end of each phase every block is read, at the end of the run from the files,
too. The status is 0 when every byte was right, nothing hung and the daemon has logged no traceback. What is
done follows from the seed; when it is done does not.
"""

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon import HOST, Daemon
from tests.soak.host import UNIT
from tests.torture.edits import REFUSED_IN_USE, SIZE, Place
from tests.torture.host import FAULT_NAMES, LABEL_AT, UNITS, HangError, PatientHost, label

PHASE_S = 60.0
HOSTS_OF_A_PLACE = LABEL_AT // (UNITS * UNIT)
ONE_IN = 400
"""PDUs, each way, of which one has a bit flipped."""
KILLS_APART_S = (3.0, 12.0)
JOIN_LIMIT_S = 400.0
"""For a thread to end after a phase: longer than any patience of its own."""
KILLED, WORKER_KILLED, RESTARTED = "daemon killed", "worker killed", "daemon restarted"


@dataclass
class Report:
    """What came of it."""

    seconds: float = 0.0
    sessions: int = 0
    phases: int = 0
    done: Counter[str] = field(default_factory=Counter)
    edits: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    flipped: Counter[str] = field(default_factory=Counter)
    kinds: int = 0
    """Of edits that there are."""
    checked_after_kills: int = 0
    verified: int = 0
    failures: list[BaseException] = field(default_factory=list)
    tracebacks: int = 0

    @property
    def well(self) -> bool:
        return not self.failures and not self.tracebacks

    def lines(self) -> list[str]:
        """For people."""
        faults = {name: count for name, count in sorted(self.done.items()) if name in FAULT_NAMES}
        work = {name: count for name, count in sorted(self.done.items()) if name not in FAULT_NAMES}
        edits = {name: count for name, count in self.edits.items() if name != REFUSED_IN_USE}
        return [
            f"{self.sessions} sessions, {self.seconds:.0f} s, {self.phases} phases",
            f"operations {sum(work.values())}: {work}",
            f"faults {sum(faults.values())}: {faults}",
            f"bits flipped {sum(self.flipped.values())}: {dict(sorted(self.flipped.items()))}",
            f"kills and restarts {sum(self.kills.values())}: {dict(sorted(self.kills.items()))};"
            f" configurations compared after them {self.checked_after_kills}",
            f"edits {sum(edits.values())}, of {len(edits)} of {self.kinds} kinds;"
            f" refused in use {self.edits[REFUSED_IN_USE]}",
            f"verified {self.verified / 2**20:.0f} MiB, wrong {len(self.failures)},"
            f" tracebacks {self.tracebacks}",
        ]


class Torture:
    """One run."""

    def __init__(
        self,
        directory: Path,
        *,
        seconds: float,
        sessions: int,
        seed: int,
        workers: int = 2,
        phase_s: float = PHASE_S,
        one_in: int = ONE_IN,
        kills_apart_s: tuple[float, float] = KILLS_APART_S,
    ) -> None:
        self.seconds, self.sessions, self.seed = seconds, sessions, seed
        self.phase_s = min(phase_s, seconds)
        self.kills_apart_s = kills_apart_s
        self.daemon = Daemon(directory, options=("--workers", str(workers)))
        self.workers = workers
        self.one_in = one_in
        self.up = threading.Event()
        self.stop = threading.Event()
        self.report = Report(seconds, sessions)
        self.places: list[Place] = []
        self.hosts: list[PatientHost] = []
        self.dice = random.Random(f"{seed} kills")

    def run(self, say: Callable[[str], object] = lambda line: None) -> Report:
        """Phase after phase; what is wrong ends it, and is in ``Report.failures``."""
        report = self.report
        try:
            self.daemon.start()
            self.up.set()
            self._prepare()
            began = time.monotonic()
            while (left := self.seconds - (time.monotonic() - began)) > 0:
                self._phase(min(left, self.phase_s))
                report.phases += 1
                say(self._progress(time.monotonic() - began))
                if report.failures:
                    break
            if not report.failures:
                self._in_parallel([(f"{host.name} logs out", host.close, ()) for host in self.hosts])
                assert self.daemon.terminate() == 0, "the daemon did not end well"
                self._judge_files()
        except Exception as error:
            report.failures.append(error)
        finally:
            self._look_at_the_log()
            self.daemon.kill9()
            self._count()
        return report

    def _prepare(self) -> None:
        count = max(2, self.workers, -(-self.sessions // HOSTS_OF_A_PLACE))
        for number in range(count):
            source = random.Random(f"{self.seed} place {number}")
            self.places.append(Place(self.daemon, number, source, everywhere=number == 0, up=self.up))
        for index in range(self.sessions):
            place = self.places[index % count]
            self.hosts.append(
                PatientHost(
                    self.one_in, (HOST, place.port), place.iqn, f"iqn.2026-11.example:host-{index}",
                    index // count, index // count % 3, random.Random(f"{self.seed} host {index}"),
                )
            )  # fmt: skip
        self.report.kinds = len(self.places[0].edits)

    def _phase(self, seconds: float) -> None:
        self.stop.clear()
        self._in_parallel(
            [
                *((f"{host.name} works", self._work, (host,)) for host in self.hosts),
                *((f"place {place.number}", place.run, (self.stop,)) for place in self.places),
                ("kills", self._kill, ()),
                ("clock", self._clock, (seconds,)),
            ]
        )
        if not self.report.failures:
            self._in_parallel([(f"{host.name} verifies", host.verify_all, ()) for host in self.hosts])
        self._look_at_the_log()

    def _clock(self, seconds: float) -> None:
        """So long, and until there was something of everything, however busy the machine is."""
        ends = time.monotonic() + seconds
        while not self.stop.wait(0.1):
            everything = (
                self.report.kills
                and any(host.damaged for host in self.hosts)
                and all(place.done for place in self.places)
            )
            if everything and time.monotonic() > ends:
                self.stop.set()

    def _work(self, host: PatientHost) -> None:
        while not self.stop.is_set():
            host.step()

    def _in_parallel(self, jobs: Sequence[tuple[str, Callable[..., object], tuple[Any, ...]]]) -> None:
        threads = [threading.Thread(target=self._guarded, args=job, name=job[0], daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + self.seconds + JOIN_LIMIT_S
        for thread in threads:
            while thread.is_alive() and time.monotonic() < deadline and not self._stuck():
                thread.join(1.0)
        hung = [thread.name for thread in threads if thread.is_alive()]
        if hung and not self.report.failures:
            self.report.failures.append(HangError(f"these do not end: {', '.join(hung)}"))

    def _stuck(self) -> bool:
        """Something is wrong already; nobody waits for the others to find out."""
        return bool(self.report.failures)

    def _guarded(self, name: str, what: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        try:
            what(*arguments)
        except BaseException as error:
            error.add_note(f"({name})")
            self.report.failures.append(error)
            self.stop.set()

    # -- kills ------------------------------------------------------------------------------------

    def _kill(self) -> None:
        while not self.stop.wait(self.dice.uniform(*self.kills_apart_s)):
            kind = self.dice.choice((KILLED, RESTARTED, *[WORKER_KILLED] * (self.workers > 1)))
            if kind == WORKER_KILLED:
                self._kill_a_worker()
            else:
                self.up.clear()
                if kind == KILLED:
                    self.daemon.kill9()
                else:
                    assert self.daemon.terminate() == 0, "the daemon did not end well"
                self.daemon.start()
                self.up.set()
            self.report.kills[kind] += 1

    def _kill_a_worker(self) -> None:
        processes = self.daemon.expect(200, "GET", "services/iscsi/statistics/")["processes"]
        victim = self.dice.choice(processes)
        try:
            os.kill(victim["pid"], signal.SIGKILL)
        except ProcessLookupError:
            return

    # -- the end ----------------------------------------------------------------------------------

    def _judge_files(self) -> None:
        """Every byte of every medium: the hosts' parts, the label, and nothing anywhere else."""
        for place in self.places:
            hosts = [host for host in self.hosts if host.iqn == place.iqn]
            for path, medium in place.media.items():
                data = path.read_bytes()
                assert len(data) >= SIZE, (path, len(data))  # an extent that shrinks leaves its file
                for host in hosts:
                    host.judge_file(medium, data)
                assert data[LABEL_AT : LABEL_AT + UNIT] == label(medium), f"{path}: label overwritten"
                used = len(hosts) * UNITS * UNIT
                assert not any(data[used:LABEL_AT]), f"{path}: bytes that nobody wrote"
                assert not any(data[LABEL_AT + UNIT :]), f"{path}: bytes that nobody wrote, at the end"
                self.report.verified += len(data) - used

    def _look_at_the_log(self) -> None:
        self.report.tracebacks += len(self.daemon.tracebacks())
        if self.report.tracebacks:
            self.report.failures.append(AssertionError(f"tracebacks:\n{self.daemon.log[-8000:]}"))
        elif self.report.failures:
            self.report.failures[0].add_note("the daemon's last words:\n" + self.daemon.log[-8000:])
        self.daemon.lines.clear()

    def _count(self) -> None:
        report = self.report
        for host in self.hosts:
            report.done += host.done
            report.verified += host.verified
            for way, count in host.relay.damaged.items():
                report.flipped[f"{way}, level {host.level}"] += count
        for place in self.places:
            report.edits += place.done
            report.checked_after_kills += place.kills_survived

    def _progress(self, seconds: float) -> str:
        verified = sum(host.verified for host in self.hosts)
        flips = sum(host.damaged for host in self.hosts)
        edits = sum(sum(place.done.values()) for place in self.places)
        return (
            f"{seconds:.0f} s: {sum(sum(host.done.values()) for host in self.hosts)} operations and faults,"
            f" {edits} edits, {flips} bits flipped, {sum(self.report.kills.values())} kills,"
            f" {verified / 2**20:.0f} MiB verified"
        )


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sessions", type=int, default=12)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"--seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        report = Torture(Path(directory), **vars(options)).run(lambda line: print(line, flush=True))
    for failure in report.failures:
        print("".join(traceback.format_exception(failure)))
    print("\n".join(report.lines()))
    return 0 if report.well else 1


if __name__ == "__main__":
    sys.exit(main())
