"""What is shipped beside the code says what the code does."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.daemon import ROOT

PACKAGING = ROOT / "packaging"


@pytest.mark.parametrize("page", ["iscsi-targetd.8", "iscsi-targetctl.8"])
def test_man_pages_are_those_of_the_options_and_commands(page: str) -> None:
    """``PYTHONPATH=. python packaging/manpages.py`` writes them anew."""
    writer = runpy.run_path(str(PACKAGING / "manpages.py"))
    written = (PACKAGING / page).read_text(encoding="utf-8")
    assert written == "\n".join(writer["PAGES"][page]()) + "\n"


@pytest.mark.parametrize("page", ["iscsi-targetd.8", "iscsi-targetctl.8"])
def test_man_page_is_well_formed(page: str) -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed")
    done = subprocess.run(
        [groff, "-man", "-ww", "-Tascii", str(PACKAGING / page)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_units_are_ones_that_systemd_understands(tmp_path: Path) -> None:
    systemd = shutil.which("systemd-analyze")
    if systemd is None:
        pytest.skip("systemd-analyze is not installed")
    units = []
    for name in ("iscsi-targetd.service", "iscsi-targetd.socket"):
        text = (PACKAGING / name).read_text(encoding="utf-8")
        units.append(tmp_path / name)
        units[-1].write_text(
            text.replace("/usr/bin/iscsi-targetd", "/bin/true").replace("man:iscsi-targetd(8)", "")
        )
    done = subprocess.run(
        [systemd, "verify", "--man=no", *map(str, units)], capture_output=True, text=True, check=False
    )
    assert [line for line in done.stderr.splitlines() if "iscsi-targetd." in line] == []


def test_security_names_every_published_hole_with_a_test_that_is_there() -> None:
    """The table of SECURITY.md and the tests are the same list."""
    document = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    tests = (ROOT / "tests/security/test_published_holes.py").read_text(encoding="utf-8")
    there = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", document)) == there
