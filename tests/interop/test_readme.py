"""README's "A disk through the API": every line of it run as it stands, and what it says looked at."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import cdbs
from tests.daemon import HOST, ROOT, Daemon
from tests.initiator import LoginFailed, SocketInitiator
from tests.interop.peers import needs, run
from tests.media import file_system, requires_loop_devices

pytestmark = [
    pytest.mark.interop,
    needs("bash", "curl", "iscsi-inq", "iscsi-readcapacity16"),
    requires_loop_devices,
]

GB = 1 << 30
CAPACITY_HAS_CHANGED, LUNS_HAVE_CHANGED = (0x2A, 0x09), (0x3F, 0x0E)
STRICT = """
set -eu
curl() { command curl -sS --fail-with-body "$@"; echo; }
"""


def transcripts() -> dict[str, str]:
    """Heading → the commands below it; the first part of the section has none."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## A disk through the API\n")[2].partition("\n## ")[0]
    parts = re.split(r"^### (.*)\n", section, flags=re.MULTILINE)
    texts = dict(zip(["", *parts[1::2]], parts[0::2], strict=True))
    return {
        heading: "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S))
        for heading, text in texts.items()
    }


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Daemon]:
    """What ``make run`` starts, with its state in ``./state``, on a file system that shares blocks."""
    with file_system(tmp_path, ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"], 320 << 20) as at:
        daemon = Daemon(at, ["--demo", "--extent-root", str(at / "state" / "extents")])
        daemon.extent_root.rmdir()
        (at / "state" / "extents").mkdir(parents=True)
        try:
            yield daemon.start()
            assert daemon.terminate() == 0
            assert not daemon.tracebacks()
        finally:
            daemon.kill9()


def follow(daemon: Daemon, heading: str) -> str:
    """Run what stands below a heading, with the variables of the first part; all that it prints."""
    texts = transcripts()
    settings = "".join(re.findall(r"^\w+=.*\n", texts[""], re.M))
    script = STRICT + (settings if heading else "") + texts[heading]
    script = script.replace(":8260", f":{daemon.api_port}").replace(":3260", f":{daemon.portal_port}")
    return run("bash", "-c", f"cd '{daemon.directory}'\n{script}").ok()


def capacity(daemon: Daemon, lun: int) -> int:
    with SocketInitiator((HOST, daemon.portal_port)) as session:
        session.login(daemon.full_name("disk1"))
        session.command(cdbs.test_unit_ready(), lun=lun)
        data = session.command(cdbs.read_capacity16(), read=32, lun=lun).data
        session.logout()
    return (int.from_bytes(data[:8], "big") + 1) * int.from_bytes(data[8:12], "big")


def test_every_line_works_as_it_stands(demo: Daemon) -> None:
    done = []

    def follow_next(heading: str) -> str:
        done.append(heading)
        return follow(demo, heading)

    assert "iSCSI Disk" in follow_next("")
    assert capacity(demo, 0) == 10 * GB

    with SocketInitiator((HOST, demo.portal_port)) as session:
        session.login(demo.full_name("disk1"))
        session.command(cdbs.test_unit_ready())
        assert f"Total size:{20 * GB}" in follow_next("Resize")
        assert session.command(cdbs.test_unit_ready()).additional_sense == CAPACITY_HAS_CHANGED
        assert '"iscsi_lunid": 1' in follow_next("A second LUN")
        assert session.command(cdbs.test_unit_ready()).additional_sense == LUNS_HAVE_CHANGED
        session.logout()
    assert capacity(demo, 1) == GB

    said = follow_next("CHAP, and only certain initiators")
    assert "iSCSI Disk" in said
    *_, explained = said.strip().splitlines()
    (answer,) = json.loads(explained)
    assert answer["allowed"] is False
    assert "does not name it" in answer["reason"]
    with SocketInitiator((HOST, demo.portal_port)) as session, pytest.raises(LoginFailed):
        session.login(demo.full_name("disk1"), "iqn.2003-01.org.example:alice")

    follow_next("Clone")
    images = demo.state_dir / "extents"
    assert (images / "disk1-copy.img").stat().st_size == (images / "disk1.img").stat().st_size

    follow_next("Remove")
    left = demo.expect(200, "GET", "services/iscsi/extent/")
    assert [extent["iscsi_target_extent_name"] for extent in left] == ["demo", "disk1-copy", "disk2"]
    assert sorted(path.name for path in images.iterdir()) == ["disk1-copy.img", "disk2.img"]
    assert done == list(transcripts())
