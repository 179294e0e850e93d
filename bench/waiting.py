"""What a command costs that has to wait, by how many others do.   python -m bench.waiting

An exclusive command (as ORWRITE is) is under way over a whole unit, and others come behind it, all of which
wait: small ones side by side, small ones at the same place, large ones over each other, ORDERED ones, and
exclusive ones. Then it ends, and they go one after the other. Reported is the CPU time of a command from its
admission to its end in microseconds, all in one thread and without a medium; no command may cost much more
where 2,000 wait than where 100 do.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from protocol.enums import TaskAttribute
from protocol.scsi.commands import Command
from protocol.scsi.request import GOOD, Nexus, Outcome, Request
from protocol.scsi.table import ROWS
from protocol.scsi.taskset import TaskSet

COUNTS = (10, 100, 500, 1000, 2000)
ROUNDS = 5
AIM = 3.0
"""The cost at the highest count by that at 100."""
NEXUS = Nexus("iqn.2026-11.example:host", bytes(6), "iqn.2026-11.example:disk", 1)
WRITE = next(row for row in ROWS if row.name == "WRITE(10)")
EXCLUSIVE = replace(WRITE, exclusive=True)


class Unit(TaskSet):
    """Commands end at once, but for those that are exclusive."""

    def _start(self, request: Request, row: Command) -> Outcome | None:
        if not row.exclusive:
            return GOOD
        self._begin(request, row)
        return None

    def _finish(self, request: Request, row: Command, outcome: Outcome) -> None:
        self._leave(request)

    def _finish_aborted(self, request: Request, row: Command, outcome: Outcome) -> None:
        pass


def request(unit: Unit, row: Command, offset: int, length: int, attribute: int) -> Request:
    made = Request(NEXUS, bytes(16), attribute=attribute)
    made.command, made.offset, made.length = row, offset, length
    unit._join(made)
    return made


Kind = Callable[[int], tuple[Command, int, int, int]]
SIMPLE = TaskAttribute.SIMPLE
KINDS: dict[str, Kind] = {
    "512 bytes side by side": lambda n: (WRITE, 512 * n, 512, SIMPLE),
    "512 bytes at one place": lambda n: (WRITE, 0, 512, SIMPLE),
    "1 MiB over each other": lambda n: (WRITE, 4096 * n, 1 << 20, SIMPLE),
    "ORDERED": lambda n: (WRITE, 512 * n, 512, TaskAttribute.ORDERED),
    "exclusive, side by side": lambda n: (EXCLUSIVE, 512 * n, 512, SIMPLE),
    "exclusive, at one place": lambda n: (EXCLUSIVE, 0, 512, SIMPLE),
}


def cost(kind: Kind, count: int) -> float:
    """Microseconds a command."""
    unit = Unit()
    ended = 0

    def deliver(request: Request, outcome: Outcome) -> None:
        nonlocal ended
        ended += 1

    unit.deliver = deliver
    first = request(unit, EXCLUSIVE, 0, 1 << 40, SIMPLE)
    unit.submit(first)
    began = time.process_time()
    for number in range(count):
        unit.submit(request(unit, *kind(number)))
    assert not ended
    unit.complete(first, GOOD)
    while unit._running:
        for running in list(unit._running):
            assert isinstance(running, Request)
            unit.complete(running, GOOD)
    took = time.process_time() - began
    assert ended == count + 1 and not unit.tasks
    return took / count * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module; exit status 1 when a cost grows with the count."""
    del arguments
    print(f"{'µs a command, where so many wait':34}" + "".join(f"{count:>8}" for count in COUNTS))
    well = True
    for name, kind in KINDS.items():
        costs = [min(cost(kind, count) for _ in range(ROUNDS)) for count in COUNTS]
        well = well and costs[-1] <= AIM * costs[1]
        print(f"{name:34}" + "".join(f"{each:8.1f}" for each in costs), flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
