"""The daemon over a real ZFS pool, in an emulated PC: one test for each check of ``inside/zfs.py``.

Last of all tests: its kernel is compiled while the others run (``zfs.py``, ``conftest.py``).
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest import image, zfs
from tests.guest.inside.checks import checks_of
from tests.guest.stage import ENDED_CLEANLY
from tests.guest.table import part_of
from tests.guest.test_guest import END_LIMIT_S, REPORT_LIMIT_S, PartRun
from tests.guest.ways import Choice

pytestmark = [pytest.mark.guest]

PART = "zfs"
NAMES = [check.name for check in checks_of(part_of(PART))]


@pytest.fixture(scope="module")
def machine(
    request: pytest.FixtureRequest,
    guest_root: Path,
    guest_choice: Choice,
    zfs_kernel: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[PartRun]:
    items = (item for item in request.session.items if hasattr(item, "callspec"))
    chosen = {item.callspec.params.get("check") for item in items}
    wanted = [name for name in NAMES if name in chosen]
    run = PartRun(PART, wanted, guest_root, guest_choice, tmp_path_factory.mktemp(PART), zfs_kernel)
    yield run
    run.finish()


@pytest.mark.timeout(REPORT_LIMIT_S + END_LIMIT_S + image.BUILD_LIMIT_S + zfs.LIMIT_S)
@pytest.mark.parametrize("check", [*NAMES, ENDED_CLEANLY])
def test_zfs(machine: PartRun, check: str) -> None:
    report = machine.report(check)
    if report.outcome != "ok":
        pytest.fail(f"{report.note}\n{machine.logs()}", pytrace=False)
