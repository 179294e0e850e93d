"""The guest's root and kernels: Debian packages, put together once and kept.

The root is a directory that a guest mounts read-only from the host, by hostfs or virtiofs; everything that a
guest writes goes to memory. It holds the modules for user-mode Linux, where the host has that, and the kernel
of an emulated PC. It is made by mmdebstrap in about half a minute and kept in the user's cache directory
(``$XDG_CACHE_HOME/iscsi-targetd/guest``, or where GUEST_CACHE says), for clones come and go. Its name is a
hash of everything it was made from, so that each clone finds its own: another list of packages or another
kernel makes another root. What nobody has used for a while is removed.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
KERNEL: Final = "linux.uml"
QEMU: Final = "qemu-system-x86_64"
MODULES: Final = Path("/usr/lib/uml/modules")
TOOLS: Final = ("mmdebstrap", "unshare", "ip")
MACHINES: Final = (KERNEL, QEMU)
"""One of them has to be there; ``ways.py`` finds out which works."""
INITRAMFS: Final = Path(__file__).with_name("initramfs.sh")
PC_KERNEL_AT: Final = "usr/lib/pc-kernel"
"""In the root: ``vmlinuz``, ``initramfs`` and ``release``, whose modules are where modules are."""
BUILD_LIMIT_S: Final = 900.0
DEFAULT_SUITE: Final = "bookworm"
UNUSED_S: Final = 14 * 86400
"""After this long without use what is kept is removed."""

PACKAGES: Final = (
    "busybox-static",
    "ddpt",
    "dmsetup",
    "e2fsprogs",
    "extlinux",
    "fdisk",
    "fio",
    "iproute2",
    "iputils-ping",
    "kmod",
    "lsscsi",
    "mdadm",
    "multipath-tools",
    "open-iscsi",
    "procps",
    "python3",
    "python3-crc32c",
    "sg3-utils",
    "udev",
    "util-linux",
    "xfsprogs",
    "zfsutils-linux",
)
COMPONENTS: Final = "main,contrib"

PC_KERNEL: Final = rf"""
set -eu
at=$1/{PC_KERNEL_AT}
package=$(chroot "$1" apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: *//p' | head -n 1)
chroot "$1" sh -c "cd /var/cache/apt && apt-get -qq -o APT::Sandbox::User=root download $package"
mkdir -p "$at"
dpkg-deb --extract "$1"/var/cache/apt/"$package"*.deb "$at/unpacked"
rm "$1"/var/cache/apt/"$package"*.deb
mv "$at"/unpacked/boot/vmlinuz-* "$at/vmlinuz"
release=$(ls "$at/unpacked/lib/modules")
mkdir -p "$1/usr/lib/modules"
mv "$at/unpacked/lib/modules/$release" "$1/usr/lib/modules"
echo "$release" >"$at/release"
rm -r "$at/unpacked"
cd "$1/usr/lib/modules/$release/kernel"
rm -r sound drivers/gpu drivers/media drivers/net/ethernet drivers/net/wireless drivers/staging
"""
"""Debian's kernel, without the drivers of hardware that no emulated PC has."""

STUB: Final = """#!/bin/sh
# Process 1 until the repository is there: $1 is where it is on the host.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t hostfs -o "ro,$1" none /repo && exec /repo/tests/guest/inside/init "$@"
echo "no repository at $1"
echo o >/proc/sysrq-trigger
sleep 60
"""

LEFT_OUT: Final = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")


class UnavailableError(Exception):
    """No guest can run here; the text says why."""


def cache_dir() -> Path:
    """Where roots are kept."""
    given = os.environ.get("GUEST_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given or Path(caches) / "iscsi-targetd" / "guest").resolve()


def install_packages() -> None:
    """What the host side needs, where we may; says what it did on its standard error."""
    if any(shutil.which(tool) is None for tool in (*TOOLS, *MACHINES)):
        subprocess.run(
            [ROOT / "scripts" / "system-packages", "guest"], check=False, timeout=BUILD_LIMIT_S, cwd=ROOT
        )


def require_host() -> None:
    """Raise UnavailableError unless a guest can run on this machine."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise UnavailableError(f"guests run on x86-64 Linux, not on {platform.system()} {platform.machine()}")
    if os.geteuid() != 0:
        raise UnavailableError("only root can make network namespaces, tap devices and a Debian root")
    if not Path("/dev/net/tun").exists():
        raise UnavailableError("no /dev/net/tun, so no tap devices")
    install_packages()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if all(shutil.which(machine) is None for machine in MACHINES):
        missing.append(" or ".join(MACHINES))
    if missing:
        raise UnavailableError(f"not installed: {', '.join(missing)}")
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "ip", "tuntap", "add", "try", "mode", "tap"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if tried.returncode != 0:
        raise UnavailableError(f"no namespaces or tap devices of our own: {tried.stderr.strip()}")


def suite() -> str:
    """The Debian release of the host where it is one, so that kernel and tools fit each other."""
    try:
        told = platform.freedesktop_os_release()
    except OSError:
        return DEFAULT_SUITE
    return told.get("VERSION_CODENAME", DEFAULT_SUITE) if told.get("ID") == "debian" else DEFAULT_SUITE


def _kernel_release() -> str:
    """Of user-mode Linux; empty where there is none."""
    if shutil.which(KERNEL) is None:
        return ""
    return subprocess.run(
        [KERNEL, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def bootstrap(directory: Path, packages: Sequence[str], hook: str, limit_s: float = BUILD_LIMIT_S) -> str:
    """Make a Debian root of these packages by mmdebstrap; ``hook`` is the last step, and gets the directory.

    Returns:
        What mmdebstrap and the hook printed.

    Raises:
        UnavailableError: it could not be made.
    """
    made = subprocess.run(
        [
            "mmdebstrap",
            "--quiet",
            "--mode=root",
            "--variant=minbase",
            f"--components={COMPONENTS}",
            "--aptopt=Apt::Install-Recommends false",
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
            f"--include={','.join(packages)}",
            f"--customize-hook={hook}",
            suite(),
            str(directory),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=limit_s,
        check=False,
        umask=0o022,
    )
    if made.returncode != 0:
        raise UnavailableError(f"mmdebstrap could not make a root: {made.stdout[-2000:]}")
    return made.stdout


def _make(directory: Path, release: str) -> None:
    """mmdebstrap, the kernel's modules, and the stub."""
    bootstrap(directory, PACKAGES, PC_KERNEL)
    pc = directory / PC_KERNEL_AT
    arguments = (directory, "/usr", (pc / "release").read_text().strip(), pc / "initramfs")
    subprocess.run([INITRAMFS, *arguments], check=True, timeout=BUILD_LIMIT_S)
    # usr/lib/modules: the root is merged, and lib is a link in it.
    if release:
        shutil.copytree(MODULES / release, directory / "usr/lib/modules" / release, symlinks=True)
        subprocess.run(["chroot", str(directory), "depmod", release], check=True, timeout=60)
    for name in ("repo", "host"):
        (directory / name).mkdir(mode=0o755)
    stub = directory / "sbin" / "guest-init"
    stub.write_text(STUB, encoding="utf-8")
    stub.chmod(0o755)


def kept(kind: str, made_from: str, make: Callable[[Path], None]) -> Path:
    """The directory of that kind that was made from that, made now by ``make`` if it is not there.

    Args:
        make: makes the directory that it is given; what it raises is passed on, and nothing is left.
    """
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    wanted = cache / f"{kind}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}"
    with (cache / f"lock-{kind}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not wanted.is_dir():
            making = cache / f"{kind}-{os.getpid()}.making"
            try:
                make(making)
                making.rename(wanted)
            finally:
                shutil.rmtree(making, ignore_errors=True)
        os.utime(wanted)
        for old in cache.glob(f"{kind}-*"):
            if old.stat().st_mtime < time.time() - UNUSED_S:
                shutil.rmtree(old)
    return wanted


def root() -> Path:
    """The guest's root directory, made now if it is not there. Raises UnavailableError."""
    require_host()
    release = _kernel_release()
    recipes = (STUB, PC_KERNEL, INITRAMFS.read_text(encoding="utf-8"))
    made_from = "\n".join([suite(), COMPONENTS, release, *recipes, *PACKAGES, *LEFT_OUT])
    return kept("root", made_from, lambda directory: _make(directory, release))
