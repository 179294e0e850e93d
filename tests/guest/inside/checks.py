"""What a check is: a function of a part that raises when what it claims does not hold.

A part is a module of this package. Its checks are the functions marked ``@check``, in the order of the
file; each stands alone, so that any of them can be run by itself. Host and guest both import the parts: the
host to learn the names, the guest to run them; so a part does nothing when it is imported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Final

PARTS: Final = ("login", "disks", "live", "paths", "own_daemon", "boot")
"""Modules of this package that hold checks; one guest is booted for each."""
PC_PARTS: Final = ("zfs",)
"""Those that need an emulated PC; ``test_zfs.py`` runs them last."""
LIMIT_S: Final = 900
"""For any check, on a machine that has much else to do: it ends what hangs."""
SETTLE_LIMIT_S: Final = 200
"""For clearing what it left behind."""


class CheckFailedError(Exception):
    """What the check claims does not hold; the text says how."""


class CheckSkippedError(Exception):
    """The check cannot be made here; the text says why."""


@dataclass(frozen=True)
class Check:
    """One check."""

    name: str
    covers: str
    """The first paragraph of its docstring."""
    run: Callable[[], str | None]
    """Returns a note for the report, or nothing."""


def check(function: Callable[[], str | None]) -> Callable[[], str | None]:
    """Mark a function as a check."""
    first = (function.__doc__ or "").strip().partition("\n\n")[0]
    made = Check(function.__name__, " ".join(first.split()), function)
    function.check = made  # type: ignore[attr-defined]
    return function


def checks_of(part: ModuleType) -> list[Check]:
    """The checks of a part, in the order of its file."""
    return [value.check for value in vars(part).values() if hasattr(value, "check")]


def require(held: object, what: str) -> None:
    """Raise CheckFailedError unless ``held``."""
    if not held:
        raise CheckFailedError(what)
