"""The installed form of iscsi-targetd: its packages live below this one.

In the repository ``api``, ``protocol``, ``storage`` and ``targetd`` stand at the top, where a reader finds
them. A wheel that put such names on a user's path would hide, or be hidden by, packages of the user's. So the
wheel has them in here, and the commands put this directory first on their own path before anything else is
imported.
"""

import sys
from pathlib import Path

__all__ = ["ctl", "daemon"]


def _home() -> str:
    """The directory that holds the packages: this one, or that of a checkout that is installed editable."""
    here = Path(__file__).resolve().parent
    return str(here if (here / "targetd").is_dir() else here.parents[2])


def _find_packages() -> None:
    home = _home()
    if sys.path[:1] != [home]:
        sys.path.insert(0, home)


def daemon() -> int:
    """Run ``iscsi-targetd``; its exit status."""
    _find_packages()
    from targetd.__main__ import main

    return main()


def ctl() -> int:
    """Run ``iscsi-targetctl``; its exit status."""
    _find_packages()
    from targetd.ctl import main

    return main()
