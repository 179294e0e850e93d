"""A guest as a process: started on a root, its console kept, ended when asked.

Two kinds: user-mode Linux, and an emulated PC, which finds the host's files, and its root among them, by
virtiofs. ``ways.py`` finds out which runs here.
"""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.guest.image import KERNEL, QEMU, ROOT, UnavailableError
from tests.guest.wires import CONTROL, CONTROL_PORT, WIRES

AGENT: Final = (f"{CONTROL.address}:{CONTROL_PORT}",)
"""What a guest is told to do: run the agent, and ask the stage behind this address."""
COMMAND: Final = ("unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")
"""Before the command line of what starts guests: it is process 1 of namespaces of its own."""
MEMORY: Final = "768M"
PC_MEMORY: Final = "1G"
VIRTIOFSD: Final = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
"""Where Debian has it: with QEMU, and since trixie in a package of its own."""
STOP_LIMIT_S: Final = 20.0


class Machine:
    """One guest. It ends by itself when its agent has run."""

    def __init__(self, command: Sequence[str], console: Path) -> None:
        """What ``command`` prints goes to the file ``console``."""
        self.command = command
        self.console = console
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.console.open("wb") as console:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def on_end(self, told: threading.Event) -> None:
        """Set ``told`` when the guest has ended."""
        process = self.process
        assert process is not None
        threading.Thread(target=lambda: (process.wait(), told.set()), daemon=True).start()

    def wait(self, limit_s: float) -> bool:
        """Until it has ended; whether it has."""
        assert self.process is not None
        try:
            self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def cut_power(self) -> None:
        """End it at once, as pulling the plug does.

        Its helper processes, which hold the taps and the disks, would outlive it. They fall to process 1 of
        the namespace, which the stage is: when they are reaped, all is free for another machine.
        """
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(STOP_LIMIT_S)
            while True:
                os.waitpid(-self.process.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass

    def console_tail(self, lines: int = 40) -> str:
        return "\n".join(self.console.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


class UserModeLinux(Machine):
    """Linux as a program of the host."""

    def __init__(
        self,
        root: Path,
        console: Path,
        disks: Mapping[str, Path],
        preloads: Sequence[Path] = (),
        *,
        words: Sequence[str] = AGENT,
    ) -> None:
        """
        Args:
            disks: name → raw image; the guest finds them as /dev/ubda and so on, in this order.
            preloads: libraries that stand before the host's C library.
            words: for ``inside/init``, after the place of the repository; only the agent has a network.
        """
        command = [
            *("env", f"LD_PRELOAD={':'.join(map(str, preloads))}"),
            KERNEL,
            f"mem={MEMORY}",
            "rootfstype=hostfs",
            f"rootflags={root}",
            "root=/dev/root",
            "ro",
            "init=/sbin/guest-init",
            "con=null",
            "con0=null,fd:1",
            "quiet",
        ]
        if words == AGENT:
            command += [f"eth{number}=tuntap,{wire.device}" for number, wire in enumerate(WIRES)]
        command += [f"ubd{number}={disk}" for number, disk in enumerate(disks.values())]
        super().__init__([*command, "--", str(ROOT), *words], console)


class EmulatedPc(Machine):
    """``qemu-system-x86_64`` with a kernel: a directory of ``vmlinuz``, ``initramfs``, and ``modules`` to
    lay over the root where that has not got them."""

    def __init__(
        self,
        root: Path,
        kernel: Path,
        console: Path,
        disks: Mapping[str, Path],
        accelerator: str,
        *,
        words: Sequence[str] = AGENT,
    ) -> None:
        """
        Args:
            disks: serial number → raw image; the guest finds them below /dev/disk/by-id, and as /dev/vda and
                so on, in this order.
            accelerator: ``kvm`` or ``tcg``.
            words: as for ``UserModeLinux``.
        """
        self._files = console.with_suffix(".virtiofs")
        modules = kernel / "modules"
        given = " ".join(f'"{word}"' for word in (root, modules if modules.exists() else "-", ROOT, *words))
        command = [
            *(QEMU, "-accel", accelerator, "-cpu", "max", "-smp", "2", "-m", PC_MEMORY),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
            # virtiofsd reads and writes the guest's memory.
            *("-object", f"memory-backend-memfd,id=memory,size={PC_MEMORY},share=on"),
            *("-machine", "memory-backend=memory"),
            *("-chardev", f"socket,id=files,path={self._files}"),
            *("-device", "vhost-user-fs-pci,chardev=files,tag=host"),
            *("-kernel", str(kernel / "vmlinuz"), "-initrd", str(kernel / "initramfs")),
            "-append",
            # no_timer_check: an emulated timer on a busy machine may miss the ticks that the kernel counts.
            f"console=ttyS0 quiet net.ifnames=0 no_timer_check panic=-1 -- {given}",
        ]
        for number, wire in enumerate(WIRES if words == AGENT else ()):
            command += ["-netdev", f"tap,id=net{number},ifname={wire.device},script=no,downscript=no"]
            command += ["-device", f"virtio-net-pci,netdev=net{number}"]
        for serial, image in disks.items():
            command += ["-drive", f"id={serial},file={image},format=raw,if=none,discard=unmap,cache=unsafe"]
            command += ["-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
        super().__init__(command, console)

    def start(self) -> None:
        """The server of its files first; that ends with the machine's connection."""
        server = next((path for path in VIRTIOFSD if Path(path).exists()), None)
        if server is None:
            raise UnavailableError("not installed: virtiofsd")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._files))
            listener.listen()
            with self.console.with_suffix(".virtiofsd.log").open("wb") as log:
                subprocess.Popen(
                    [server, f"--fd={listener.fileno()}", "-o", "source=/,cache=always,sandbox=chroot"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(listener.fileno(),),
                    start_new_session=True,
                )
        super().start()
