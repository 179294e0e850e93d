"""A machine that serves disks until its power is cut: the daemon over the machine's own two disks.

One disk holds a file system with the daemon's state and the backing files of its File extents, the other is
exported as it is. Configured with the first start; with every other it finds what the cut left.
"""

from pathlib import Path
from typing import Any, Final

from tests.guest.inside import host
from tests.guest.inside.local_daemon import PLACE, LocalDaemon
from tests.guest.inside.shell import run
from tests.guest.wires import GUEST_PORTAL

STATE_DISK, RAW_DISK = (
    next((node for node in (f"/dev/ubd{letter}", f"/dev/vd{letter}") if Path(node).exists()), "")
    for letter in "ab"
)
"""In the order in which the machine was given them: user-mode Linux', or a PC's."""
SIZE: Final = "1MB"


def serve(plan: dict[str, Any]) -> None:
    """Start the daemon, say what it serves, and wait for the end."""
    first = plan["start"] == 0
    if first:
        run("mkfs.ext4", "-q", STATE_DISK)
    PLACE.mkdir(parents=True)
    run("mount", STATE_DISK, PLACE)
    daemon = LocalDaemon(PLACE, GUEST_PORTAL)
    daemon.start()
    if first:
        for number in range(plan["files"]):
            daemon.create_disk(f"file{number}", SIZE)
        daemon.device_disk("raw", RAW_DISK)
    # One change of the configuration with each start: what was answered is there after the next cut.
    daemon.create("target", iscsi_target_name=f"start{plan['start']}", iscsi_target_portalgroup=1)
    targets = daemon.expect(200, "GET", "services/iscsi/target/?limit=0")
    names = [target["iscsi_target_name"] for target in targets]
    disks = {name: daemon.full_name(name) for name in names if not name.startswith("start")}
    host.ask("serving", names=names, disks=disks)
    assert daemon.process is not None
    daemon.process.wait()
    Path("/dev/console").write_text(f"the daemon ended\n{daemon.log[-3000:]}")
