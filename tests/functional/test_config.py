"""``config/`` on the real daemon: files are made with the change, or not at all; a dry run sees the disks."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.daemon import Daemon


@pytest.fixture(scope="module", params=["1", "2"], ids=["1 process", "2 workers"])
def daemon(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("config"), options=("--workers", request.param)).start()
    yield daemon
    assert not daemon.tracebacks()
    assert daemon.terminate() == 0


def document(daemon: Daemon, *paths: str) -> dict[str, Any]:
    """One LUN of a target for each path."""
    names = [f"e{number}" for number in range(len(paths))]
    return {
        "format": 1,
        "extent": [
            {"name": name, "type": "File", "path": path, "file_size": "1MB"}
            for name, path in zip(names, paths, strict=True)
        ],
        "target": [{"name": "t"}],
        "targetgroup": [{"target": "t", "portal": 1, "initiator_group": 1}],
        "targettoextent": [{"target": "t", "extent": name} for name in names],
    }


@pytest.mark.parametrize("query", ["?dry_run=1", ""], ids=["dry run", "in earnest"])
@pytest.mark.parametrize(
    ("path", "part"),
    [("/etc/passwd", "must reside inside"), ("/dev/zvol/none/v", "none")],
    ids=["outside", "no volume"],
)
def test_what_the_disks_refuse_leaves_nothing(daemon: Daemon, query: str, path: str, part: str) -> None:
    before = daemon.expect(200, "GET", "config/")
    root = daemon.extent_root
    wanted = document(daemon, f"{root}/a", f"{root}/b", path.format(root=root))
    if path.startswith("/dev"):
        wanted["extent"][2] |= {"type": "ZVOL", "file_size": "0"}
    refused = daemon.expect(409, "POST", f"config/{query}", wanted)
    assert list(refused) == ["extent e2: path"]
    assert part in refused["extent e2: path"][0]
    assert list(root.iterdir()) == []
    assert daemon.expect(200, "GET", "config/") == before


def test_a_document_is_in_force_as_a_whole(daemon: Daemon) -> None:
    root = daemon.extent_root
    wanted = document(daemon, f"{root}/a", f"{root}/b")
    foreseen = daemon.expect(200, "POST", "config/?dry_run=1", wanted)["changes"]
    assert list(root.iterdir()) == []
    done = daemon.expect(200, "POST", "config/", wanted)["changes"]
    assert [one["changes"] for one in done] == [one["changes"] for one in foreseen]
    assert sorted(file.name for file in root.iterdir()) == ["a", "b"]
    statuses = daemon.expect(200, "GET", "services/iscsi/extent/")
    assert [one["iscsi_target_extent_status"] for one in statuses] == ["ok", "ok"]
    daemon.restart()
    assert daemon.expect(200, "POST", "config/", wanted)["changes"] == []
    gone = [
        {"action": "delete", "resource": "extent", "key": [name], "discard_file": True}
        for name in ("e0", "e1")
    ]
    operations = {"operations": [*gone, {"action": "delete", "resource": "target", "key": ["t"]}]}
    daemon.expect(200, "POST", "config/", operations)
    assert list(root.iterdir()) == []
