"""A machine that boots from our disk: installed by the guest's initiator, started by QEMU's and by iPXE's.

The guest puts a boot loader, Debian's kernel, an initrd and a root on a LUN, as an installer does, and logs
out. The stage then starts an emulated PC of which that LUN is the only disk.
"""

import gzip
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.guest.inside import host
from tests.guest.inside.checks import check, require
from tests.guest.inside.iscsi import logged_in, make_disk
from tests.guest.inside.shell import run, until

KERNEL: Final = Path("/usr/lib/pc-kernel")
"""Of an emulated PC (``image.py``)."""
MODULES: Final = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "iscsi_ibft")
BUSYBOX: Final = Path("/usr/bin/busybox")
FIRST_SECTOR: Final = 2048
MBR_CODE: Final = 440

INITRD_INIT: Final = """#!/bin/busybox sh
# Mount the root that is on the disk of this kernel; where the firmware reached it by iSCSI and the kernel has
# no such disk, say what the firmware left in the iBFT.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /modules/order); do insmod /modules/$module 2>/dev/null; done
echo "INITRD $(cat /mark)"
if [ -e /sys/firmware/ibft/target0 ]; then
    echo "IBFT $(cat /sys/firmware/ibft/target0/target-name) $(cat /sys/firmware/ibft/target0/ip-addr)"
    poweroff -f
fi
until [ -b /dev/vda1 ]; do usleep 50000; done
mount -t ext2 /dev/vda1 /root
exec switch_root /root /sbin/init
"""
ROOT_INIT: Final = """#!/bin/busybox sh
# The root on the LUN: leave something written, and turn the machine off.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
echo "ROOT $(/bin/busybox cat /mark) $(/bin/busybox sha256sum /filler)"
/bin/busybox cat /proc/sys/kernel/random/boot_id >/booted
/bin/busybox cat /filler /filler >/copied
/bin/busybox sync
/bin/busybox umount -r / 2>/dev/null
/bin/busybox mount -o remount,ro /
/bin/busybox poweroff -f
"""
# no_timer_check: an emulated timer on a busy machine may miss the ticks that the kernel counts.
LOADER: Final = """SERIAL 0 115200
DEFAULT linux
LABEL linux
  LINUX /vmlinuz
  INITRD /initrd
  APPEND console=ttyS0 quiet panic=-1 no_timer_check
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def skeleton(root: Path, mark: str) -> None:
    """What initrd and root have in common."""
    for name in ("bin", "dev", "proc", "sys", "root", "sbin"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(BUSYBOX, root / "bin" / "busybox")
    (root / "mark").write_text(mark)


def initrd(mark: str) -> bytes:
    tree = Path("/run/initrd")
    shutil.rmtree(tree, ignore_errors=True)
    skeleton(tree, mark)
    executable(tree / "init", INITRD_INIT)
    (tree / "modules").mkdir()
    release = (KERNEL / "release").read_text().strip()
    order: list[str] = []
    for module in MODULES:
        needs = run("modprobe", "--set-version", release, "--show-depends", module)
        for line in needs.splitlines():
            path = Path(line.split()[1])
            if path.name not in order:
                order.append(path.name)
                shutil.copy(path, tree / "modules" / path.name)
    (tree / "modules" / "order").write_text("\n".join(order))
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    run("sh", "-c", f"cd {tree} && busybox cpio -o -H newc >/run/initrd.cpio", stdin=names.encode())
    return gzip.compress(Path("/run/initrd.cpio").read_bytes(), 1)


@contextmanager
def partition(device: str) -> Iterator[Path]:
    """Its first partition, mounted."""
    where = Path("/mnt/system")
    where.mkdir(exist_ok=True)
    until(f"{device}1", lambda: Path(f"{device}1").exists())
    run("mount", f"{device}1", where)
    try:
        yield where
    finally:
        run("umount", where)


def install(device: str, mark: str) -> None:
    """Partition table, boot loader, kernel, initrd and root; a mark in both that this disk alone has."""
    run("sfdisk", "--quiet", device, stdin=f"label: dos\n{FIRST_SECTOR},,L,*\n".encode())
    run("udevadm", "settle")
    code = Path("/usr/lib/EXTLINUX/mbr.bin").read_bytes()[:MBR_CODE]
    with Path(device).open("r+b") as disk:
        disk.write(code)
    until(f"{device}1", lambda: Path(f"{device}1").exists())
    run("mkfs.ext2", "-q", f"{device}1")
    with partition(device) as system:
        skeleton(system, mark)
        executable(system / "sbin" / "init", ROOT_INIT)
        (system / "filler").write_bytes(os.urandom(1 << 20))
        shutil.copy(KERNEL / "vmlinuz", system / "vmlinuz")
        (system / "initrd").write_bytes(initrd(mark))
        (system / "extlinux.conf").write_text(LOADER)
        run("extlinux", "--install", system)
        filler = run("sha256sum", system / "filler").split()[0]
        (system / "filler.sum").write_text(filler)


@check
def pc_boots_from_the_lun() -> None:
    """`qemu-system-x86_64 -drive file=iscsi://…`: firmware, boot loader, kernel and root from the LUN; what
    the machine wrote is there for the next initiator."""
    made, mark = make_disk("64MB"), secrets.token_hex(8)
    with logged_in(made["iqn"]) as node:
        install(node.disk(), mark)
    said = host.ask("boot_from_lun", iqn=made["iqn"], lun=made["luns"][0]["lun"])
    require(f"INITRD {mark}" in said, said)
    with logged_in(made["iqn"]) as node:
        run("e2fsck", "-f", "-n", f"{node.disk()}1")
        with partition(node.disk()) as system:
            filler = (system / "filler").read_bytes()
            require(f"ROOT {mark} {(system / 'filler.sum').read_text()}" in said, said)
            require((system / "booted").read_text().strip(), "nothing written by the machine")
            require((system / "copied").read_bytes() == filler * 2, "not what the machine wrote")


@check
def ipxe_boots_from_the_lun() -> None:
    """iPXE's initiator: a PC with no disk gets a script by TFTP, `sanboot iscsi:…`, and kernel and initrd
    come from the LUN; the iBFT names our target."""
    made, mark = make_disk("64MB"), secrets.token_hex(8)
    with logged_in(made["iqn"]) as node:
        install(node.disk(), mark)
    said = host.ask("boot_by_ipxe", iqn=made["iqn"], lun=made["luns"][0]["lun"])
    require(f"INITRD {mark}" in said, said)
    require(f"IBFT {made['iqn']} " in said, said)
