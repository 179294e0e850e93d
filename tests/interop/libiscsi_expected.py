"""What every test of libiscsi's suite needs, and which ones are not expected to pass.

``KITS`` are the kinds of logical unit, since no single one can run everything; ``KIT_OF`` sends a test to
its kind. ``EXPECTED`` is the complete list of exceptions: a test that fails, hangs or skips and is not
there is a regression. A listed test may pass; the report then says that its row can go.
"""

from dataclasses import dataclass
from typing import Any

from tests.interop.libiscsi_suite import Outcome, Result, matches


@dataclass(frozen=True)
class Kit:
    """A kind of logical unit, as fields of the extent resource."""

    extent: dict[str, Any]
    note: str


KITS = {
    "main": Kit({}, "thin, 512 byte blocks in physical blocks of 4096"),
    "flat": Kit({"iscsi_target_extent_pblocksize": True}, "thin, no physical block size reported"),
    "read-only": Kit({"iscsi_target_extent_ro": True}, "write-protected, thin"),
}

KIT_OF = {
    "ReadOnly": "read-only",
    "GetLBAStatus.UnmapSingle": "flat",
}
"""Suite or SUITE.TEST → kit; everything else runs on "main"."""


@dataclass(frozen=True)
class Waiver:
    """Tests that are expected not to pass."""

    pattern: str
    outcome: Outcome
    reason: str


def _tool_fault(pattern: str, fault: str) -> Waiver:
    return Waiver(pattern, Outcome.FAILED, f"fault of the tool: {fault}")


def _not_offered(pattern: str, what: str) -> Waiver:
    return Waiver(pattern, Outcome.SKIPPED, f"not offered: {what}")


EXPECTED = (
    _tool_fault("iSCSITMF.LUNResetSimpleAsync", "asserts on the TMF response before it waits for it"),
    Waiver(
        "WriteAtomic16.VPD",
        Outcome.SKIPPED,
        "two of its assertions are for units with alignment restrictions; the rest of it has passed by then",
    ),
    _not_offered("PreventAllow", "removable medium"),
    _not_offered("NoMedia", "removable medium"),
    _not_offered("StartStopUnit", "removable medium"),
)


def kit_of(test: str) -> str:
    return next((kit for pattern, kit in KIT_OF.items() if matches(test, pattern)), "main")


def explained(result: Result) -> str | None:
    """Why this outcome is no surprise; None: it is one."""
    if result.outcome is Outcome.PASSED:
        return "passed"
    return next(
        (e.reason for e in EXPECTED if e.outcome is result.outcome and matches(result.test, e.pattern)), None
    )


def outdated(results: list[Result]) -> list[str]:
    """Exceptions whose every test now passes."""
    lines = []
    for exception in EXPECTED:
        covered = [r for r in results if matches(r.test, exception.pattern)]
        if covered and all(r.outcome is Outcome.PASSED for r in covered):
            lines.append(f"{exception.pattern} passes now; its row ({exception.reason}) can go")
    return lines
