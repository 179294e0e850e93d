"""The real Linux initiator does to our disks what people do to disks: one test for each check of a guest.

The checks are in ``inside/``; a guest is booted for each part, when its first test runs, and the tests then
wait for the lines of their checks. README.md says what each covers.
"""

import importlib
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
from tests.guest.inside.checks import PARTS, Check, checks_of
from tests.guest.stage import ENDED_CLEANLY

pytestmark = [pytest.mark.guest]

BOOT_LIMIT_S = 90.0
SETTLE_LIMIT_S = 150.0
"""Beyond a check's own limit: what it left behind is cleared, and the one before it may still be clearing."""
END_LIMIT_S = 60.0
COMMAND = ("unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")

CHECKS: dict[str, list[Check]] = {
    part: checks_of(importlib.import_module(f"tests.guest.inside.{part}")) for part in PARTS
}


@dataclass(frozen=True)
class Report:
    """A CHECK line."""

    outcome: str
    seconds: float
    note: str


class PartRun:
    """A stage at work, and what it has said so far."""

    def __init__(self, part: str, checks: list[str], root: Path, directory: Path) -> None:
        self.directory = directory
        self.reports: dict[str, Report] = {}
        self.ended = False
        self._said = threading.Condition()
        self.errors = (directory / "stage.log").open("wb")
        self.process = subprocess.Popen(
            [
                *COMMAND,
                *(sys.executable, "-m", "tests.guest.stage", part),
                *("--root", str(root), "--directory", str(directory), "--checks", ",".join(checks)),
                *("--subject", os.environ.get("GUEST_SUBJECT") or "ours"),
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

    def report(self, name: str, limit_s: float) -> Report:
        """The report of a check, waiting for it; a failure with the logs if there is none."""
        with self._said:
            self._said.wait_for(lambda: name in self.reports or self.ended, limit_s)
            if name in self.reports:
                return self.reports[name]
        what = "the guest ended without a report" if self.ended else f"no report within {limit_s} s"
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
        """Let it end; what has not by then is killed, and all it started with it."""
        try:
            self.process.wait(END_LIMIT_S if self.ended or len(self.reports) > 0 else 1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_LIMIT_S)
        self._reader.join(END_LIMIT_S)
        self.errors.close()


@pytest.fixture(scope="session")
def guest_root() -> Path:
    """The root, made if need be. Where no guest can run: skipped, but never in CI."""
    try:
        return image.root()
    except image.UnavailableError as why:
        if os.environ.get("CI"):
            pytest.fail(f"a guest must run in CI: {why}")
        pytest.skip(str(why))


class Guests:
    """One guest at a time: asking for a part's starts it and ends the one before."""

    def __init__(self, items: list[pytest.Item], root: Path, temporary: pytest.TempPathFactory) -> None:
        self._items = items
        self._root = root
        self._temporary = temporary
        self._runs: dict[str, PartRun] = {}

    def of(self, part: str) -> PartRun:
        if part not in self._runs:
            self.finish()
            self._runs[part] = PartRun(part, self._selected(part), self._root, self._temporary.mktemp(part))
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
    request: pytest.FixtureRequest, guest_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guests]:
    started = Guests(request.session.items, guest_root, tmp_path_factory)
    yield started
    started.finish()


def _cases() -> list[object]:
    cases: list[object] = []
    for part, checks in CHECKS.items():
        limits = {check.name: check.limit_s for check in checks} | {ENDED_CLEANLY: END_LIMIT_S}
        for name, limit_s in limits.items():
            limit_s += BOOT_LIMIT_S + SETTLE_LIMIT_S
            marks = pytest.mark.timeout(limit_s + END_LIMIT_S + image.BUILD_LIMIT_S)
            cases.append(pytest.param(part, name, limit_s, id=f"{part}-{name}", marks=marks))
    return cases


@pytest.mark.parametrize(("part", "check", "limit_s"), _cases())
def test_guest(guests: Guests, part: str, check: str, limit_s: float) -> None:
    run = guests.of(part)
    report = run.report(check, limit_s)
    if report.outcome == "skip":
        pytest.skip(report.note)
    if report.outcome != "ok":
        pytest.fail(f"{report.note}\n{run.logs()}", pytrace=False)
