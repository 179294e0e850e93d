"""An emulated PC that boots from a LUN, by QEMU's own initiator or by iPXE's; its console is the answer."""

import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.guest.image import QEMU
from tests.guest.subjects import UnsupportedError
from tests.guest.wires import PORTALS

LIMIT_S: Final = 380.0
"""Of a boot that takes seconds, on a machine that has much else to do."""
MACHINE: Final = (
    *(QEMU, "-m", "256", "-nodefaults", "-no-user-config", "-no-reboot"),
    *("-display", "none", "-vga", "std", "-serial", "stdio"),
)


def _console(accelerator: str, *options: str) -> str:
    if shutil.which(QEMU) is None:
        raise UnsupportedError(f"{QEMU} is not installed")
    try:
        ran = subprocess.run(
            [*MACHINE, "-accel", accelerator, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        shown = (late.output or b"").decode(errors="replace")[-3000:]
        raise AssertionError(f"the machine is not off after {LIMIT_S} s\n{shown}") from None
    return ran.stdout.decode(errors="replace")


def boot_from_lun(accelerator: str, iqn: str, lun: int) -> str:
    """The LUN as the machine's only disk. ``accelerator``: ``kvm`` or ``tcg``."""
    drive = f"file=iscsi://{PORTALS[0]}/{iqn}/{lun},format=raw,if=virtio"
    return _console(accelerator, "-drive", drive, "-boot", "c")


def boot_by_ipxe(accelerator: str, directory: Path, iqn: str, lun: int) -> str:
    """No disk at all: iPXE in the network card's ROM fetches a script that names the LUN."""
    script = directory / "boot.ipxe"
    address, _, port = PORTALS[0].rpartition(":")
    script.write_text(f"#!ipxe\nsanboot iscsi:{address}:6:{port}:{lun:x}:{iqn}\n")
    network = f"user,id=net,tftp={directory},bootfile={script.name}"
    return _console(accelerator, "-netdev", network, "-device", "virtio-net-pci,netdev=net", "-boot", "n")
