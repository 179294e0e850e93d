"""The wheel beside packages and projects of a user's that have the names of ours."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.daemon import HOST, ROOT, Daemon

OURS = ("api", "protocol", "storage", "targetd")


def test_every_package_is_in_the_wheel() -> None:
    """setuptools cannot find packages that are to have another name: the list is written by hand."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {
        f"iscsi_targetd.{'.'.join(path.parent.relative_to(ROOT).parts)}"
        for name in OURS
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert listed == folders | {"iscsi_targetd"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what is in the wheel."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            ".*", "tests", "bench", "state", "build", "dist", "*.egg-info", "__pycache__"
        ),
    )
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(place), str(source)],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = place.glob("*.whl")
    site = place / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    return site


def test_nothing_else_is_put_on_a_users_path(site: Path) -> None:
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"iscsi_targetd"}


class Installed(Daemon):
    """The daemon from the wheel, among names that would take the place of its own."""

    def command(self) -> list[str]:
        return [sys.executable, "-P", "-m", "iscsi_targetd", *self.arguments()]


def test_both_commands_and_the_workers_run_beside_packages_of_the_same_names(
    site: Path, tmp_path: Path
) -> None:
    user = tmp_path / "user"
    for name in OURS:
        (user / name).mkdir(parents=True)
        (user / name / "__init__.py").write_text(
            f"raise RuntimeError('the {name} of the user is imported')\n"
        )
    variables = {"PYTHONPATH": os.pathsep.join((str(user), str(site)))}
    daemon = Installed(tmp_path / "daemon", ["--workers", "2"])
    daemon.start(variables=variables)
    try:
        daemon.create_disk("a", "1MB")
        daemon.create_disk("b", "1MB")
        with urllib.request.urlopen(f"http://{HOST}:{daemon.api_port}/healthz", timeout=20) as answer:
            assert json.load(answer) == {"status": "ok"}
        listed = subprocess.run(
            [sys.executable, "-P", "-c", "import sys, iscsi_targetd; sys.exit(iscsi_targetd.ctl())",
             "--url", f"http://{HOST}:{daemon.api_port}",
             "--password-file", str(daemon.state_dir / "api-password"), "target", "list", "--json"],
            env={**os.environ, **variables},
            cwd=user,
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip
        assert listed.returncode == 0, listed.stderr
        assert [one["iscsi_target_name"] for one in json.loads(listed.stdout)] == ["a", "b"]
        workers = [one["pid"] for one in daemon.expect(200, "GET", "services/iscsi/statistics/")["processes"]]
        assert len(workers) == 2
        for pid in workers:
            loaded = Path(f"/proc/{pid}/environ").read_text().split("\0")
            (path,) = [one for one in loaded if one.startswith("PYTHONPATH=")]
            assert path.startswith(f"PYTHONPATH={site}/iscsi_targetd{os.pathsep}")
    finally:
        assert daemon.terminate() == 0
    assert not daemon.tracebacks()
