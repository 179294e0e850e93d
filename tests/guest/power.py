"""The host side of power cuts: a machine that serves disks is killed in the middle of verified writes.

A cut loses the machine's memory, page cache included; its disks keep what it had sent them, as disks without
a cache do. (Of another kind there is none in every way that a guest runs: the block driver of user-mode Linux
answers a flush and does nothing, and so do an emulated PC's disks. A disk whose own cache forgets is in
``tests/faults/test_durability.py``.) After each cut the machine boots again from what is left, mounts its
file system, starts the daemon on the state it finds there, and every disk is read through it and held against
its ledger.

Runs as process 1 of namespaces of its own, as ``stage.py`` does, and ends with an exception where a promise
was broken.
"""

import argparse
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.faults.kit import Lun
from tests.faults.ledger import BLOCKS, Ledger, write_until_cut
from tests.guest.machine import Machine
from tests.guest.stage import make_wires, serve
from tests.guest.subjects import UnsupportedError, python
from tests.guest.ways import Choice
from tests.guest.wires import GUEST_PORTAL

MIB: Final = 1 << 20
DISKS: Final = {"state": 64 * MIB, "raw": MIB}
FILES: Final = 3
"""File extents beside the raw disk: each is written by a session of its own when the power goes."""
LIMIT_S: Final = 400.0
"""For a boot, and for an answer: on a machine that has much else to do."""


class Machines:
    """One machine after another over the same disks; what the guest may ask for."""

    def __init__(self, root: Path, choice: Choice, directory: Path) -> None:
        self.root = root
        self.choice = choice
        self.directory = directory
        self.disk_files = {name: directory / f"{name}.img" for name in DISKS}
        self.starts = -1
        self.names: set[str] = set()
        """Of targets: every one whose creation was answered."""
        self.disks: dict[str, str] = {}
        """The iSCSI name of each disk's target."""
        self._told = threading.Event()
        self._serves = False

    def find(self, call: str) -> Callable[..., Any]:
        answers: dict[str, Callable[..., Any]] = {
            "plan": lambda: {"part": "power", "start": self.starts, "files": FILES},
            "python": python,
            "serving": self._serving,
        }
        if call not in answers:
            raise UnsupportedError(call)
        return answers[call]

    def _serving(self, names: list[str], disks: dict[str, str]) -> None:
        lost = self.names - set(names)
        assert not lost, f"targets that were created and are not there: {lost}"
        self.names = set(names)
        self.disks = disks
        self._serves = True
        self._told.set()

    def boot(self) -> Machine:
        """Until it serves."""
        self.starts += 1
        self._serves = False
        self._told.clear()
        console = self.directory / f"console{self.starts}.log"
        machine = self.choice.machine(self.root, console, self.disk_files)
        machine.start()
        machine.on_end(self._told)
        self._told.wait(LIMIT_S)
        if not self._serves:
            machine.cut_power()
            raise AssertionError(f"start {self.starts} serves nothing\n{machine.console_tail()}")
        return machine


def address() -> tuple[str, int]:
    host, _, port = GUEST_PORTAL.rpartition(":")
    return host, int(port)


def judge(iqn: str, ledger: Ledger) -> None:
    with Lun(address(), iqn, patience_s=LIMIT_S) as lun:
        reply = lun.ready().read(0, BLOCKS)
        assert reply.good, f"{iqn} cannot be read: {reply}"
        ledger.judge(reply.data)


def write_and_cut(machine: Machine, ledgers: dict[str, Ledger], seed: int) -> None:
    """Sessions write to all disks at once; whichever has done its share first cuts the power for all."""
    luns = {iqn: Lun(address(), iqn, patience_s=LIMIT_S).ready() for iqn in ledgers}
    failures: list[BaseException] = []

    def cut() -> None:
        machine.cut_power()
        for lun in luns.values():
            # Nobody is left to say that the connection has ended.
            lun.socket.shutdown(socket.SHUT_RDWR)

    def write(iqn: str) -> None:
        try:
            write_until_cut(luns[iqn], ledgers[iqn], random.Random(f"{seed} {iqn}"), cut)
        except OSError:
            assert not machine.running()
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(iqn,)) for iqn in ledgers]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for lun in luns.values():
        lun.socket.close()
    assert not failures, failures
    assert not machine.running()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="for disks and logs")
    parser.add_argument("--root", type=Path, required=True, help="of the guest")
    parser.add_argument("--choice", type=Path, required=True, help="what ways.choose has found")
    parser.add_argument("--cuts", type=int, required=True)
    given = parser.parse_args()
    make_wires()
    machines = Machines(given.root, Choice.load(given.choice), given.directory)
    serve(machines)
    for name, disk in machines.disk_files.items():
        with disk.open("wb") as file:
            file.truncate(DISKS[name])
    ledgers: dict[str, Ledger] = {}
    for cut in range(given.cuts + 1):
        machine = machines.boot()
        try:
            if not ledgers:
                ledgers = {iqn: Ledger() for iqn in machines.disks.values()}
            for iqn, ledger in ledgers.items():
                judge(iqn, ledger)
            if cut < given.cuts:
                write_and_cut(machine, ledgers, cut)
        finally:
            machine.cut_power()
        print(f"CUT {cut}: {len(ledgers)} disks hold what they owe", flush=True)


if __name__ == "__main__":
    main()
