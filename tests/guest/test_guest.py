"""The real Linux initiator does to our disks what people do to disks: one test for each check of a guest.

The checks are in ``inside/``; a guest is booted for each part, when its first test runs, and the tests then
wait for the lines of their checks. README.md says what each covers.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guest import image
from tests.guest.conftest import must_run
from tests.guest.inside.checks import LIMIT_S, PARTS, PC_PARTS, SETTLE_LIMIT_S, Check, checks_of
from tests.guest.machine import COMMAND
from tests.guest.stage import ENDED_CLEANLY
from tests.guest.table import heading, part_of, row
from tests.guest.ways import Choice

pytestmark = [pytest.mark.guest]

BOOT_LIMIT_S = 900.0
"""Of a guest, and of the daemon in it: on an emulated PC that has a tenth of a processor."""
REPORT_LIMIT_S = BOOT_LIMIT_S + LIMIT_S + 2 * SETTLE_LIMIT_S
"""For the report of the next check: what it left behind is cleared, the one before it may still be clearing,
and the guest may have to boot first."""
END_LIMIT_S = 120.0

CHECKS: dict[str, list[Check]] = {part: checks_of(part_of(part)) for part in PARTS}


@dataclass(frozen=True)
class Report:
    """A CHECK line."""

    outcome: str
    seconds: float
    note: str


class PartRun:
    """A stage at work, and what it has said so far."""

    def __init__(
        self,
        part: str,
        checks: list[str],
        root: Path,
        choice: Choice,
        directory: Path,
        kernel: Path | None = None,
    ) -> None:
        """``kernel``: what ``zfs.built`` has made, for a part that needs it."""
        self.directory = directory
        self.expected = {*checks, ENDED_CLEANLY}
        self.reports: dict[str, Report] = {}
        self.ended = False
        self._said = threading.Condition()
        self.errors = (directory / "stage.log").open("wb")
        self.process = subprocess.Popen(
            [
                *COMMAND,
                *(sys.executable, "-m", "tests.guest.stage", part),
                *("--root", str(root), "--choice", choice.place, "--directory", str(directory)),
                *("--checks", ",".join(checks)),
                *("--subject", os.environ.get("GUEST_SUBJECT") or "ours"),
                *(("--kernel", str(kernel)) if kernel is not None else ()),
            ],
            cwd=image.ROOT,
            env={**os.environ, "PYTHONPATH": str(image.ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            word, _, rest = raw.decode().rstrip("\n").partition(" ")
            with self._said:
                if word == "CHECK":
                    name, outcome, seconds, note = rest.split(" ", 3)
                    self.reports[name] = Report(outcome, float(seconds), json.loads(note))
                self._said.notify_all()
        with self._said:
            self.ended = True
            self._said.notify_all()

    def report(self, name: str) -> Report:
        """The report of a check, waiting for it; a failure with the logs if there is none."""
        with self._said:
            self._said.wait_for(lambda: name in self.reports or self.ended, REPORT_LIMIT_S)
            if name in self.reports:
                return self.reports[name]
        what = "the guest ended without a report" if self.ended else f"no report within {REPORT_LIMIT_S} s"
        return Report("fail", 0.0, f"{what}\n{self.logs()}")

    def logs(self, lines: int = 60) -> str:
        shown = []
        for name in ("stage.log", "console.log", "target.log"):
            path = self.directory / name
            if path.exists():
                text = path.read_text(encoding="utf-8", errors="replace").splitlines()
                shown.append("\n".join([f"-- {name} --", *text[-lines:]]))
        return "\n".join(shown)

    def finish(self) -> None:
        """Let it end, if all of its checks have; else nobody waits for them any more, and it is killed."""
        complete = self.expected <= self.reports.keys()
        try:
            self.process.wait(END_LIMIT_S if complete else 0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_LIMIT_S)
        self._reader.join(END_LIMIT_S)
        self.errors.close()


class Guests:
    """Two guests at a time, for a guest has one CPU: asking for a part's starts it and the next one, and ends
    those before."""

    def __init__(
        self, items: list[pytest.Item], root: Path, choice: Choice, temporary: pytest.TempPathFactory
    ) -> None:
        self._items = items
        self._root = root
        self._choice = choice
        self._temporary = temporary
        self._runs: dict[str, PartRun] = {}

    def of(self, part: str) -> PartRun:
        parts = [one for one in PARTS if one == part or self._selected(one)]
        here = parts.index(part)
        for earlier in parts[:here]:
            if earlier in self._runs:
                self._runs[earlier].finish()
        for wanted in parts[here : here + 2]:
            if wanted not in self._runs:
                directory = self._temporary.mktemp(wanted)
                checks = self._selected(wanted)
                self._runs[wanted] = PartRun(wanted, checks, self._root, self._choice, directory)
        return self._runs[part]

    def _selected(self, part: str) -> list[str]:
        """The checks of the part that this run of pytest selected."""
        parameters = [item.callspec.params for item in self._items if hasattr(item, "callspec")]
        wanted = {chosen["check"] for chosen in parameters if chosen.get("part") == part}
        return [check.name for check in CHECKS[part] if check.name in wanted]

    def finish(self) -> None:
        for run in self._runs.values():
            run.finish()


@pytest.fixture(scope="module")
def guests(
    request: pytest.FixtureRequest,
    guest_root: Path,
    guest_choice: Choice,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Guests]:
    started = Guests(request.session.items, guest_root, guest_choice, tmp_path_factory)
    yield started
    started.finish()


CASES = [
    pytest.param(part, name, id=f"{part}-{name}")
    for part, checks in CHECKS.items()
    for name in [*(check.name for check in checks), ENDED_CLEANLY]
]


@pytest.mark.timeout(REPORT_LIMIT_S + 2 * END_LIMIT_S + image.BUILD_LIMIT_S)
@pytest.mark.parametrize(("part", "check"), CASES)
def test_guest(guests: Guests, part: str, check: str) -> None:
    report = guests.of(part).report(check)
    if report.outcome == "skip" and not must_run():
        pytest.skip(report.note)
    if report.outcome != "ok":
        pytest.fail(f"{report.note}\n{guests.of(part).logs()}", pytrace=False)


def test_readme_has_the_table_of_what_is_covered() -> None:
    lines = (Path(__file__).parent / "README.md").read_text(encoding="utf-8").splitlines()
    covered = CHECKS | {part: checks_of(part_of(part)) for part in PC_PARTS}
    for part, checks in covered.items():
        assert heading(part) in lines
        for check in checks:
            assert any(line.startswith(row(check)) for line in lines), f"{check.name}: make it {row(check)}"
    named = {line.split("`")[1] for line in lines if line.startswith("| `")}
    assert named == {check.name for checks in covered.values() for check in checks}
