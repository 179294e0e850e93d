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
    account: tuple[str, str] | None = None
    """User and secret that its target asks for (CHAP)."""


KITS = {
    "main": Kit(
        {"iscsi_target_extent_removable": True}, "thin, 512 byte blocks in physical blocks of 4096, removable"
    ),
    "flat": Kit({"iscsi_target_extent_pblocksize": True}, "thin, no physical block size reported"),
    "read-only": Kit({"iscsi_target_extent_ro": True}, "write-protected, thin"),
    "chap": Kit({}, "as main, behind CHAP", ("0xsuite", "secretsecret1")),
}

KIT_OF = {
    "ReadOnly": "read-only",
    "iSCSICHAP": "chap",  # not in 1.19
    "GetLBAStatus.UnmapSingle": "flat",
}
"""Suite or SUITE.TEST → kit; everything else runs on "main"."""


@dataclass(frozen=True)
class Waiver:
    """Tests that are expected not to pass."""

    pattern: str
    outcome: Outcome
    reason: str
    may_pass: bool = False
    """With some releases of the tool it does."""


def _tool_fault(pattern: str, fault: str, *, not_everywhere: bool = False) -> Waiver:
    return Waiver(pattern, Outcome.FAILED, f"fault of the tool: {fault}", not_everywhere)


EXPECTED = (
    _tool_fault("iSCSITMF.LUNResetSimpleAsync", "asserts on the TMF response before it waits for it"),
    _tool_fault(
        "iSCSITMF.AbortTaskSimpleAsync", "asserts on the length of its own queue", not_everywhere=True
    ),
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
        if covered and not exception.may_pass and all(r.outcome is Outcome.PASSED for r in covered):
            lines.append(f"{exception.pattern} passes now; its row ({exception.reason}) can go")
    return lines
