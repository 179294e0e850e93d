"""User-mode Linux as a process: started on a root, its console kept, ended when asked."""

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.guest.image import KERNEL, ROOT
from tests.guest.wires import CONTROL, CONTROL_PORT, WIRES

MEMORY: Final = "768M"
STOP_LIMIT_S: Final = 20.0


class Machine:
    """One guest. It ends by itself when its agent has run."""

    def __init__(self, root: Path, console: Path, options: Sequence[str] = ()) -> None:
        self.console = console
        networks = [f"eth{number}=tuntap,{wire.device}" for number, wire in enumerate(WIRES)]
        self.command = [
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
            *networks,
            *options,
            "--",
            str(ROOT),
            f"{CONTROL.address}:{CONTROL_PORT}",
        ]
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
