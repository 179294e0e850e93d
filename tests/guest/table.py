"""The table of README.md: a row for each check, from its own docstring. ``python -m tests.guest.table``"""

import importlib
from types import ModuleType

from tests.guest.inside.checks import PARTS, PC_PARTS, Check, checks_of


def part_of(name: str) -> ModuleType:
    return importlib.import_module(f"tests.guest.inside.{name}")


def row(check: Check) -> str:
    """The beginning of the check's line in README.md; what tgt does may follow."""
    return f"| `{check.name}` | {check.covers} |"


def heading(name: str) -> str:
    first = (part_of(name).__doc__ or "").strip().partition("\n\n")[0]
    return f"### `{name}`: {' '.join(first.split())}"


def main() -> None:
    for name in (*PARTS, *PC_PARTS):
        print(f"{heading(name)}\n\n| check | what it covers | tgt |\n| --- | --- | --- |")
        for check in checks_of(part_of(name)):
            print(f"{row(check)} |")
        print()


if __name__ == "__main__":
    main()
