"""How a guest runs on this machine: found out by booting, once, and kept beside the root.

Four ways, tried in this order; the first in which a guest boots and reckons right is the one:

- ``uml``: user-mode Linux, the fastest, as it is;
- ``preload``: user-mode Linux behind ``xstate.c``, for processors whose state is larger than it knows;
- ``kvm``: an emulated PC whose processor is this one, by /dev/kvm;
- ``tcg``: an emulated PC altogether, which is slow and runs everywhere.

What needs a PC whatever the others run in (a kernel with ZFS, a machine that boots from a LUN) has the better
of the two kinds of PC. GUEST_WAYS names the ways that may be used, to try the others: ``GUEST_WAYS=tcg``.
"""

import array
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from tests.guest import image
from tests.guest.machine import AGENT, COMMAND, EmulatedPc, Machine, UserModeLinux

WAYS: Final = ("uml", "preload", "kvm", "tcg")
WORDS: Final = {
    "uml": "user-mode Linux",
    "preload": "user-mode Linux with a preload for the processor's state",
    "kvm": "an emulated PC by KVM",
    "tcg": "an emulated PC, all of it emulated",
}
RUNS: Final = "guest runs "
"""What ``inside/probe`` says at its end."""
LATE_IS_TRUE_FOR_S: Final = 3600.0
LIMIT_S: Final = 300.0
"""Of a boot that takes seconds, on a machine that has much else to do."""
KVM_LIMIT_S: Final = 45.0
"""Where it works it is done in three. There are machines on which /dev/kvm is there and its guest never
begins, and one that was late only costs time: all that it does is done without it."""
HERE: Final = Path(__file__).parent
PROBE: Final = HERE / "inside" / "probe"
PRELOAD: Final = "xstate"
"""The source, and the library made of it, without their suffixes."""
KVM: Final = Path("/dev/kvm")


class _LateError(image.UnavailableError):
    """A guest did not end in time."""


@dataclass(frozen=True)
class Choice:
    """What runs here. Kept as JSON."""

    way: str
    """One of ``WAYS``, for everything that has no wishes of its own."""
    accelerator: str
    """Of what needs a PC: ``kvm`` or ``tcg``."""
    why: str
    """What was tried, and what became of it."""
    until: float
    """``time.time`` to which this holds: a guest that was late says something of its hour alone."""
    place: str
    """The directory of this file and of the preload."""

    @classmethod
    def load(cls, directory: Path) -> Self:
        return cls(**json.loads((directory / "choice.json").read_text()), place=str(directory))

    def save(self, directory: Path) -> None:
        kept = {name: value for name, value in asdict(self).items() if name != "place"}
        (directory / "choice.json").write_text(json.dumps(kept))

    def machine(self, root: Path, console: Path, disks: Mapping[str, Path]) -> Machine:
        """A guest for anything, not started yet."""
        return machine(self.way, root, console, disks, Path(self.place))

    def pc(self, root: Path, kernel: Path, console: Path, disks: Mapping[str, Path]) -> Machine:
        """A guest with a kernel of its own, as ``zfs.built`` makes it."""
        return EmulatedPc(root, kernel, console, disks, self.accelerator)

    def __str__(self) -> str:
        pc = "" if self.way in ("kvm", "tcg") else f"; what needs a PC: {WORDS[self.accelerator]}"
        return f"{WORDS[self.way]} ({self.why}){pc}"


def machine(
    way: str,
    root: Path,
    console: Path,
    disks: Mapping[str, Path],
    place: Path,
    *,
    behind: Sequence[Path] = (),
    words: Sequence[str] = AGENT,
) -> Machine:
    """A guest that runs in one of ``WAYS``.

    Args:
        place: a directory with what ``build`` has made.
        behind: more libraries to preload, after our own.
        words: as for ``UserModeLinux``.
    """
    if way in ("kvm", "tcg"):
        return EmulatedPc(root, root / image.PC_KERNEL_AT, console, disks, way, words=words)
    preloads = [*([place / f"{PRELOAD}.so"] if way == "preload" else []), *behind]
    return UserModeLinux(root, console, disks, preloads, words=words)


def build(name: str, directory: Path) -> Path:
    """Compile a library to preload by the system's compiler. Raises UnavailableError."""
    library = directory / f"{name}.so"
    if shutil.which("gcc") is None:
        raise image.UnavailableError("not installed: gcc")
    made = subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", library, HERE / f"{name}.c"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if made.returncode != 0:
        raise image.UnavailableError(f"{name}.c cannot be compiled: {made.stderr.strip()[-300:]}")
    return library


def probe(way: str, root: Path, place: Path, behind: Sequence[Path] = ()) -> str:
    """Boot a guest that shows that it works, and ends.

    Args:
        place: for its console and for the preload, which is compiled.
        behind: as for ``machine``.

    Returns:
        In words how it went.

    Raises:
        UnavailableError: it does not run here; the text says why.
    """
    program = image.QEMU if way in ("kvm", "tcg") else image.KERNEL
    if shutil.which(program) is None:
        raise image.UnavailableError(f"not installed: {program}")
    if way == "kvm" and not KVM.exists():
        raise image.UnavailableError(f"no {KVM}")
    if way == "preload":
        build(PRELOAD, place)
    began = time.monotonic()
    guest = machine(way, root, place / f"{way}.log", {}, place, behind=behind, words=("probe",))
    guest.start()
    try:
        limit_s = KVM_LIMIT_S if way == "kvm" else LIMIT_S
        ended = guest.wait(limit_s)
    finally:
        guest.cut_power()
    said = guest.console.read_text(encoding="utf-8", errors="replace").splitlines()
    if any(RUNS in line for line in said):
        return f"it boots, in {time.monotonic() - began:.0f} s"
    if not ended:
        raise _LateError(f"no end within {limit_s:.0f} s")
    raise image.UnavailableError(_complaint(said))


def _complaint(said: Sequence[str]) -> str:
    """The line of a console that tells best why it ended."""
    for word in ("errno = ", "Kernel panic", "Could not access KVM", "failed", "rror"):
        for line in said:
            if word in line:
                return line.strip()[:200]
    return said[-1].strip()[:200] if said else "it ends without a word"


def allowed() -> tuple[str, ...]:
    """Those of ``WAYS`` that GUEST_WAYS lets us use; all unless it is set."""
    given = os.environ.get("GUEST_WAYS", "").replace(",", " ").split()
    unknown = [way for way in given if way not in WAYS]
    if unknown:
        raise image.UnavailableError(f"GUEST_WAYS: {' '.join(unknown)} is none of {' '.join(WAYS)}")
    return tuple(way for way in WAYS if not given or way in given)


def find_out(root: Path, directory: Path) -> None:
    """Try the ways that are allowed, and leave a ``Choice`` in ``directory``. Raises UnavailableError.

    In a namespace of its own: what a guest that failed leaves behind ends with this process.
    """
    told: list[str] = []
    works: dict[str, bool] = {}
    until = math.inf

    def tried(way: str) -> bool:
        nonlocal until
        if way not in works:
            try:
                if way not in allowed():
                    raise image.UnavailableError("left out by GUEST_WAYS")
                told.append(f"{way}: {probe(way, root, directory)}")
                works[way] = True
            except image.UnavailableError as why:
                told.append(f"{way}: {why}")
                works[way] = False
                if isinstance(why, _LateError) and way != "kvm":
                    until = time.time() + LATE_IS_TRUE_FOR_S
        return works[way]

    way = next(filter(tried, WAYS), None)
    if way is None:
        raise image.UnavailableError(f"no guest boots on this machine: {'; '.join(told)}")
    accelerator = "kvm" if tried("kvm") else "tcg"
    Choice(way, accelerator, "; ".join(told), until, "").save(directory)


def _find_out_apart(root: Path, directory: Path) -> None:
    directory.mkdir()
    ran = subprocess.run(
        [*COMMAND, sys.executable, "-m", "tests.guest.ways", str(root), str(directory)],
        cwd=image.ROOT,
        env={**os.environ, "PYTHONPATH": str(image.ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode != 0:
        raise image.UnavailableError(ran.stderr.strip()[-2000:])


def machine_facts() -> str:
    """What decides: the kernel, the processor and its state, the programs, and what is tried with them."""
    processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    told = ("vendor_id", "cpu family", "model", "stepping", "flags")
    facts = [f"linux {platform.release()} {platform.version()}", f"state {_signal_frame()}"]
    facts += sorted(line for line in processor if line.partition("\t")[0].strip() in told)
    for program in (image.KERNEL, image.QEMU):
        found = shutil.which(program)
        facts.append(f"{program} {hashlib.sha256(Path(found).read_bytes()).hexdigest() if found else 'none'}")
    facts.append(f"{KVM} {KVM.exists()}")
    facts += [path.read_text() for path in (HERE / f"{PRELOAD}.c", PROBE, HERE / "machine.py")]
    return "\n".join([*facts, *allowed()])


def _signal_frame() -> int:
    """Bytes that a signal's frame takes with all of the processor's state (AT_MINSIGSTKSZ, Linux 5.14)."""
    words = array.array("Q", Path("/proc/self/auxv").read_bytes())
    return dict(zip(words[::2], words[1::2], strict=True)).get(51, 0)


@functools.cache
def choose(root: Path) -> Choice:
    """How guests run here; found out now if it is not known. Raises UnavailableError."""

    def known() -> Choice:
        made_from = f"{root.name}\n{machine_facts()}"
        return Choice.load(image.kept("way", made_from, lambda directory: _find_out_apart(root, directory)))

    choice = known()
    if choice.until < time.time():
        shutil.rmtree(choice.place)
        choice = known()
    return choice


def main() -> None:
    root, directory = map(Path, sys.argv[1:])
    try:
        find_out(root, directory)
    except image.UnavailableError as why:
        sys.exit(str(why))


if __name__ == "__main__":
    main()
