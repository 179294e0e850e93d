"""Runs libiscsi's conformance suite, ``iscsi-test-cu``, against any target and reads its outcome.

The tool has habits that a runner must undo:

* A skipped test counts as passed there; its only trace is a ``[SKIPPED]`` line. Here it is skipped.
* A test that fails leaves state behind, and one that hangs takes the rest with it. So every test runs in a
  process of its own with a time limit, and a caller that can, gives every test a LUN of its own.
* A name that it does not know is "0 tests run" and success. Here that is not run.

As a command it runs against a target that somebody else set up::

    python -m tests.interop.libiscsi_suite --url iscsi://127.0.0.1:3260/iqn.2003-01.org.example:t/0

All data on that LUN is lost. ``--url`` may be given several times: as many tests run at once, each on one
of the LUNs. ``--only SUITE`` or ``--only SUITE.TEST`` (shell patterns) chooses tests.
"""

import argparse
import json
import queue
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

TOOL = "iscsi-test-cu"
LIMIT_S = 60.0
"""No test but Sanitize.Reset takes longer than seconds; that one looks every 60 s."""
LIMITS_S = {"Sanitize.Reset": 300.0, "Sanitize.*": 150.0}
TWO_PATHS = ("MultipathIO.*",)
"""These want two URLs of one logical unit; the same one twice is enough."""


class Outcome(StrEnum):
    """How one test ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    HUNG = "hung"
    """Still running at its time limit."""
    BROKEN = "broken"
    """The tool could not begin (set-up failed, unknown test) or died."""


@dataclass(frozen=True)
class Result:
    """One test, run once."""

    test: str
    """``SUITE.TEST``."""
    outcome: Outcome
    reason: str
    seconds: float
    output: str

    @property
    def suite(self) -> str:
        return self.test.partition(".")[0]


def installed() -> bool:
    return shutil.which(TOOL) is not None


def list_tests() -> list[str]:
    """Every test of the installed release once, as ``SUITE.TEST``, in the tool's order."""
    listing = subprocess.run([TOOL, "-l"], capture_output=True, text=True, check=True, timeout=30).stdout
    names = [line.strip().split(".", 2) for line in listing.splitlines()]
    return [".".join(name[1:]) for name in names if len(name) == 3 and name[0] == "ALL"]


def matches(test: str, pattern: str) -> bool:
    """``pattern`` is a suite or a ``SUITE.TEST``, with shell wildcards."""
    return fnmatchcase(test, pattern) or fnmatchcase(test.partition(".")[0], pattern)


def limit_for(test: str) -> float:
    return next((limit for pattern, limit in LIMITS_S.items() if matches(test, pattern)), LIMIT_S)


def read_outcome(status: int, output: str) -> tuple[Outcome, str]:
    """Outcome and reason from the exit status and the log of one test."""
    skipped = re.findall(r"\[SKIPPED\] *(.*)", output)
    failed = re.findall(r"\[FAILED\] *(.*)", output)
    asserted = re.findall(r"^ +\d+\. (\S+:\d+ +- .*?)(?: {4}Send .*)?$", output, re.MULTILINE)
    ran = re.search(r"^ +tests +\d+ +(\d+)", output, re.MULTILINE)
    if status < 0:
        return Outcome.BROKEN, f"the tool died of signal {-status}"
    if ran is None:
        said = [line.strip() for line in output.splitlines() if line.strip()]
        return Outcome.BROKEN, said[-1] if said else f"exit status {status}"
    if int(ran[1]) == 0:
        return Outcome.BROKEN, "the tool knows no such test"
    if status != 0:
        return Outcome.FAILED, "; ".join(dict.fromkeys(failed[:3] + asserted[:2])) or f"exit status {status}"
    if skipped:
        return Outcome.SKIPPED, skipped[0].strip() or "no reason given"
    return Outcome.PASSED, ""


def run_test(test: str, urls: Sequence[str], limit_s: float | None = None) -> Result:
    """Run one test on one LUN. Writes to it, sanitizes it, leaves it in any state.

    Args:
        test: ``SUITE.TEST``.
        urls: one libiscsi URL, or two of the same logical unit.
        limit_s: seconds; the default knows which tests are slow.
    """
    limit = limit_for(test) if limit_s is None else limit_s
    if len(urls) == 1 and any(matches(test, pattern) for pattern in TWO_PATHS):
        urls = [urls[0], urls[0]]
    began = time.monotonic()
    try:
        done = subprocess.run(
            [TOOL, "-d", "-S", "-V", "-f", "-t", f"ALL.{test}", *urls],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
        output = done.stdout.decode("utf-8", "replace")
        outcome, reason = read_outcome(done.returncode, output)
    except subprocess.TimeoutExpired as late:
        output = (late.output or b"").decode("utf-8", "replace")
        outcome, reason = Outcome.HUNG, f"no end within {limit:.0f} s"
    return Result(test, outcome, reason, time.monotonic() - began, output)


def run_tests(
    tests: Iterable[str],
    jobs: int,
    run: Callable[[str], Result],
    done: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run ``jobs`` tests at a time, in order; ``done`` hears of each as it ends."""

    def one(test: str) -> Result:
        result = run(test)
        if done is not None:
            done(result)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, tests))


def table(results: Sequence[Result]) -> str:
    """Counts by suite, and the sum."""
    suites: dict[str, Counter[Outcome]] = {}
    for result in results:
        suites.setdefault(result.suite, Counter())[result.outcome] += 1
    total: Counter[Outcome] = sum(suites.values(), Counter())
    columns = [outcome for outcome in Outcome if outcome in total or outcome.value in ("passed", "failed")]
    lines = [f"{'suite':<26}" + "".join(f"{column:>9}" for column in columns)]
    lines += [
        f"{suite:<26}" + "".join(f"{counts[column] or '·':>9}" for column in columns)
        for suite, counts in [*suites.items(), ("all", total)]
    ]
    return "\n".join(lines)


def main() -> int:
    """The command; exit status 1 if any test failed, hung or broke."""
    parser = argparse.ArgumentParser(description="Run libiscsi's conformance suite, counting skips as skips.")
    parser.add_argument("--url", action="append", required=True, help="a LUN to destroy; repeatable")
    parser.add_argument("--only", action="append", default=[], help="SUITE or SUITE.TEST, shell patterns")
    parser.add_argument("--json", type=Path, help="write every result there")
    parser.add_argument("--output", action="store_true", help="print the tool's output of what did not pass")
    options = parser.parse_args()
    if not installed():
        parser.error(f"{TOOL} is not installed")

    units: queue.SimpleQueue[str] = queue.SimpleQueue()
    for url in options.url:
        units.put(url)

    def run(test: str) -> Result:
        url = units.get()
        try:
            return run_test(test, [url])
        finally:
            units.put(url)

    def show(result: Result) -> None:
        print(f"{result.outcome:<8}{result.test:<44}{result.seconds:6.1f} s  {result.reason}", flush=True)
        if options.output and result.outcome not in (Outcome.PASSED, Outcome.SKIPPED):
            print(result.output)

    chosen = [t for t in list_tests() if not options.only or any(matches(t, only) for only in options.only)]
    results = run_tests(chosen, len(options.url), run, show)
    print("\n" + table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return int(any(r.outcome not in (Outcome.PASSED, Outcome.SKIPPED) for r in results))


if __name__ == "__main__":
    sys.exit(main())
