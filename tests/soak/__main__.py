"""``make soak``: many hosts at once against a real daemon, with faults and changes, for as long as is asked.

    python -m tests.soak [--seconds 600] [--sessions 1000] [--seed N]

At the end every unit is read once more, everybody logs out, and the daemon must hold no more tasks, buffers,
descriptors and threads than before, and no more memory than after the first tenth of the time.
"""

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon import HOST, ROOT, Daemon, Disk
from tests.soak.host import ENDED, FAULT_NAMES, UNIT_BLOCKS, UNITS, Host

THREADS = 8
"""Each with a target of its own, so that a reset of a LUN ends no command that another thread waits for."""
GROWTH_LIMIT_MB = 24
"""Memory beyond that of the first tenth: what allocators keep varies by less."""
SAMPLE_S = 2.0
SETTLE_S = 60.0
"""For what was cut to be gone: a host that vanished is noticed by pings and time limits."""


@dataclass
class Report:
    """What came of it."""

    seconds: float = 0.0
    sessions: int = 0
    done: Counter[str] = field(default_factory=Counter)
    changes: int = 0
    verified: int = 0
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    memory_mb: list[float] = field(default_factory=list)
    """Resident, from the time on when all were logged in."""
    failures: list[BaseException] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def leaked(self) -> dict[str, tuple[int, int]]:
        """What there is more of than before."""
        return self.more_than_before(self.after)

    def more_than_before(self, found: dict[str, int]) -> dict[str, tuple[int, int]]:
        """Of what a census found."""
        return {name: (count, found[name]) for name, count in self.before.items() if found[name] > count}

    @property
    def growth_mb(self) -> float:
        """The last tenth against the second, on average."""
        tenth = max(1, len(self.memory_mb) // 10)
        early, late = self.memory_mb[tenth : 2 * tenth] or self.memory_mb[:1], self.memory_mb[-tenth:]
        return sum(late) / len(late) - sum(early) / len(early)

    def lines(self) -> list[str]:
        """For people."""
        faults = {name: count for name, count in sorted(self.done.items()) if name in FAULT_NAMES}
        work = {name: count for name, count in sorted(self.done.items()) if name not in FAULT_NAMES}
        return [
            f"{self.sessions} sessions, {self.seconds:.0f} s",
            f"operations {sum(work.values())}: {work}",
            f"faults {sum(faults.values())}: {faults}; changes through the API {self.changes}",
            f"verified {self.verified / 2**20:.0f} MiB, wrong {len(self.failures)}",
            f"memory {self.memory_mb[0]:.1f} MiB at start, {self.memory_mb[-1]:.1f} at end,"
            f" {self.growth_mb:+.1f} from the second to the last tenth",
            f"alive before {self.before}",
            f"alive after  {self.after}",
            *self.remarks,
        ]


class Soak:
    """One run."""

    def __init__(self, directory: Path, *, seconds: float, sessions: int, seed: int) -> None:
        self.seconds = seconds
        self.seed = seed
        self.daemon = Daemon(directory)
        self.report = Report(seconds, sessions)
        self.stop = threading.Event()
        self.places = ""
        """What the descriptors of the last census are."""

    def run(self) -> Report:
        """From start to stop."""
        self.daemon.start(variables={"PYTHONPATH": f"{Path(__file__).parent / 'probe'}:{ROOT}"})
        try:
            self._run()
            assert self.daemon.terminate() == 0
            assert not self.daemon.tracebacks(), self.daemon.log[-4000:]
        finally:
            self.daemon.kill9()
        return self.report

    def _run(self) -> None:
        daemon, report = self.daemon, self.report
        daemon.expect(
            202, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_maxsesh": report.sessions + THREADS}
        )
        each = -(-report.sessions // THREADS)
        size = f"{-(-each * UNITS * UNIT_BLOCKS * 512 // 2**20) + 1}MB"
        disks = [daemon.create_disk(f"disk{number}", size) for number in range(THREADS)]
        groups = [
            [
                Host(
                    (HOST, daemon.portal_port), disk.iqn, f"iqn.2026-11.example:host-{number}-{index}",
                    index * UNITS * UNIT_BLOCKS, random.Random(f"{self.seed} {number} {index}"),
                )
                for index in range(each)
            ]
            for number, disk in enumerate(disks)
        ]  # fmt: skip
        # One of everything first, so that what is made once is there: lanes, a lock on a file beside its
        # second opening, pages for stores.
        for group, disk in zip(groups, disks, strict=True):
            self._grow(disk)
            group[0].warm_up()
        report.before = self._settled(lambda found: not found["Channel"])
        self._opened_before = self.places
        self._in_parallel(groups, self._log_in)
        changer = threading.Thread(target=self._guarded, args=(self._reconfigure, disks))
        sampler = threading.Thread(target=self._sample)
        timer = threading.Timer(self.seconds, self.stop.set)
        for thread in (changer, sampler, timer):
            thread.start()
        self._in_parallel(groups, self._work)
        self.stop.set()
        for thread in (changer, sampler, timer):
            thread.join()
        self._in_parallel(groups, self._finish)
        for group in groups:
            for host in group:
                report.done += host.done
                report.verified += host.verified
        report.after = self._settled(lambda found: not report.more_than_before(found))
        if report.leaked:
            report.remarks = [f"open before {self._opened_before}", f"open after  {self.places}"]

    # -- hosts ------------------------------------------------------------------------------------

    def _in_parallel(self, groups: list[list[Host]], what: Any) -> None:
        threads = [threading.Thread(target=self._guarded, args=(what, group)) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.report.failures:
            raise self.report.failures[0]

    def _guarded(self, what: Any, *arguments: Any) -> None:
        try:
            what(*arguments)
        except BaseException as error:
            self.report.failures.append(error)
            self.stop.set()

    def _log_in(self, group: list[Host]) -> None:
        for host in group:
            host.login()

    def _work(self, group: list[Host]) -> None:
        source = random.Random(group[0].name)
        while not self.stop.is_set():
            source.choice(group).step()

    def _finish(self, group: list[Host]) -> None:
        for host in group:
            while True:
                try:
                    host.verify(host.peer or host.login())
                except ConnectionError:
                    host.peer = None
                else:
                    break
            host.leave()

    # -- changes, as an administrator makes them ----------------------------------------------------

    def _reconfigure(self, disks: list[Disk]) -> None:
        source = random.Random(self.seed)
        spare = self.daemon.create_disk("extra", "1MB")
        while not self.stop.is_set():
            spare = self._change(disks, source, spare)
            self.report.changes += 1
            self.stop.wait(0.05)
        self.daemon.delete_disk(spare)

    def _change(self, disks: list[Disk], source: random.Random, spare: Disk) -> Disk:
        daemon = self.daemon
        match source.randrange(6):
            case 0:
                daemon.delete_disk(spare)
                spare = daemon.create_disk(spare.path.stem, "1MB")
            case 1:
                self._grow(source.choice(disks))
            case 2:
                interval = {"iscsi_nopinint": source.randint(20, 60)}
                daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", interval)
            case 3:
                made = daemon.create("authorizedinitiator", iscsi_target_initiator_initiators="iqn.none")
                daemon.delete("authorizedinitiator", made["id"])
            case 4:
                sessions = daemon.expect(200, "GET", "services/iscsi/session/?limit=50")
                if sessions:
                    path = f"services/iscsi/session/{source.choice(sessions)['id']}/"
                    assert daemon.api("DELETE", path).status in (202, 204, 404)
                    self.report.done[ENDED] += 1
            case _:
                assert daemon.api("GET", "/metrics").status == 200
        return spare

    def _grow(self, disk: Disk) -> None:
        path = f"services/iscsi/extent/{disk.extent_id}/"
        size = str(self.daemon.expect(200, "GET", path)["iscsi_target_extent_filesize"])
        grown = f"{int(size.removesuffix('MB')) + 1}MB"
        self.daemon.expect(202, "PUT", path, {"iscsi_target_extent_filesize": grown})

    # -- what the daemon holds ----------------------------------------------------------------------

    def _census(self) -> dict[str, int]:
        since = len(self.daemon.lines)
        assert self.daemon.process is not None
        self.daemon.process.send_signal(signal.SIGUSR2)
        line = self.daemon.wait_for_line("census {", since=since, limit_s=60)
        self.places = line.partition("} ")[2]
        found: dict[str, int] = json.loads(line.partition("census ")[2].partition("} ")[0] + "}")
        return found

    def _settled(self, is_well: Callable[[dict[str, int]], bool]) -> dict[str, int]:
        """The census when nothing moves any more: connections that were cut end by themselves, as do threads
        that have nothing to do."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            found = self._census()
            if is_well(found) or time.monotonic() > deadline:
                return found
            time.sleep(0.5)

    def _sample(self) -> None:
        while True:
            assert self.daemon.process is not None
            status = Path(f"/proc/{self.daemon.process.pid}/status").read_text(encoding="ascii")
            kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
            self.report.memory_mb.append(int(kilobytes) / 1024)
            if self.stop.wait(SAMPLE_S):
                return


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"--seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        soak = Soak(Path(directory), seconds=options.seconds, sessions=options.sessions, seed=options.seed)
        report = soak.run()
    print("\n".join(report.lines()))
    return 1 if report.leaked or report.growth_mb > GROWTH_LIMIT_MB else 0


if __name__ == "__main__":
    sys.exit(main())
