"""The host side of one part: network, target, guest and what the checks ask for.

Runs as process 1 of namespaces of its own (``COMMAND`` in test_guest.py), so that addresses and devices are
nobody else's and all that was started here ends with it. Prints one line for each thing that happens:

    BOOTED seconds
    STARTED name
    CHECK name ok|fail|skip seconds "note"

The note is a JSON string, so that a line stays a line.
"""

import argparse
import json
import socketserver
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from tests.guest import pc
from tests.guest.machine import Machine
from tests.guest.subjects import SUBJECTS, Ours, Tgt, UnsupportedError
from tests.guest.table import part_of
from tests.guest.ways import Choice
from tests.guest.wires import CONTROL, CONTROL_PORT, SAN, WIRES

ENDED_CLEANLY: Final = "target_ended_cleanly"
"""The check that the stage itself makes at the end of each part."""


def say(word: str, *values: object) -> None:
    print(word, *values, flush=True)


def make_wires() -> None:
    """The taps, in the namespace that this process is in."""
    commands = [["ip", "link", "set", "lo", "up"]]
    for wire in WIRES:
        commands += [
            ["ip", "tuntap", "add", wire.device, "mode", "tap"],
            ["ip", "address", "add", f"{wire.address}/24", "dev", wire.device],
            ["ip", "link", "set", wire.device, "up"],
        ]
    for command in commands:
        subprocess.run(command, check=True)


class Stage:
    """What the checks may ask for, beside the methods of the subject."""

    def __init__(
        self, part: str, checks: list[str], subject: Ours | Tgt, choice: Choice, directory: Path
    ) -> None:
        self.choice = choice
        self.directory = directory
        self.part = part
        self.checks = checks
        self.subject = subject
        self.reported: set[str] = set()

    def plan(self) -> dict[str, Any]:
        return {"part": self.part, "checks": self.checks, "first_lun": self.subject.first_lun}

    def booted(self, uptime: float) -> None:
        say("BOOTED", uptime)

    def started(self, name: str) -> None:
        say("STARTED", name)

    def report(self, name: str, outcome: str, note: str, seconds: float) -> None:
        self.reported.add(name)
        say("CHECK", name, outcome, seconds, json.dumps(note))

    def cut(self, wire: int) -> None:
        """Take the host's end of a SAN wire down: frames are lost both ways, nobody is told."""
        subprocess.run(["ip", "link", "set", SAN[wire].device, "down"], check=True)

    def restore(self, wire: int) -> None:
        subprocess.run(["ip", "link", "set", SAN[wire].device, "up"], check=True)

    def boot_from_lun(self, iqn: str, lun: int) -> str:
        return pc.boot_from_lun(self.choice.accelerator, iqn, lun)

    def boot_by_ipxe(self, iqn: str, lun: int) -> str:
        return pc.boot_by_ipxe(self.choice.accelerator, self.directory, iqn, lun)

    def sleep(self, seconds: float) -> None:
        """Time of the host, whatever the guest's clock does."""
        time.sleep(seconds)

    def find(self, call: str) -> Callable[..., Any]:
        if call.startswith("_"):
            raise UnsupportedError(f"no request {call}")
        found = getattr(self, call, None) or getattr(self.subject, call, None)
        if found is None:
            raise UnsupportedError(f"{self.subject.name} cannot {call}")
        return found  # type: ignore[no-any-return]


class Answers(Protocol):
    """Whoever knows what to do for a request."""

    def find(self, call: str) -> Callable[..., Any]: ...


def serve(stage: Answers) -> socketserver.ThreadingTCPServer:
    """Answer the guest's requests from now on."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            request = json.loads(self.rfile.readline())
            answer: dict[str, Any]
            try:
                answer = {"result": stage.find(request["call"])(**request["arguments"])}
            except UnsupportedError as cannot:
                answer = {"unsupported": str(cannot)}
            except Exception as error:
                answer = {"failed": f"{error or type(error).__name__}\n{traceback.format_exc(limit=-3)}"}
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    socketserver.ThreadingTCPServer.allow_reuse_address = True
    server = socketserver.ThreadingTCPServer((CONTROL.address, CONTROL_PORT), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def make_machine(root: Path, choice: Choice, kernel: Path | None, directory: Path, part: str) -> Machine:
    """The machine that the part runs in; its disks, where it has some, are made empty."""
    console = directory / "console.log"
    disks = {}
    for serial, size in getattr(part_of(part), "DISKS", {}).items():
        disks[serial] = directory / f"{serial}.img"
        with disks[serial].open("wb") as file:
            file.truncate(size)
    if kernel is None:
        return choice.machine(root, console, disks)
    return choice.pc(root, kernel, console, disks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--directory", type=Path, required=True, help="for state, extents and logs")
    parser.add_argument("--root", type=Path, required=True, help="of the guest")
    parser.add_argument("--choice", type=Path, required=True, help="what ways.choose has found")
    parser.add_argument("--kernel", type=Path, help="what zfs.built has made, for a part that needs it")
    parser.add_argument("--checks", required=True, help="names, separated by commas")
    parser.add_argument("--subject", choices=sorted(SUBJECTS), default="ours")
    given = parser.parse_args()
    make_wires()
    subject = SUBJECTS[given.subject](given.directory)
    checks = [name for name in given.checks.split(",") if name]
    choice = Choice.load(given.choice)
    stage = Stage(given.part, checks, subject, choice, given.directory)
    machine = make_machine(given.root, choice, given.kernel, given.directory, given.part)
    try:
        subject.start()
        serve(stage)
        machine.start()
        ended = threading.Event()
        machine.on_end(ended)
        ended.wait()
        note = subject.finish()
        stage.report(ENDED_CLEANLY, "fail" if note else "ok", note, 0.0)
    finally:
        machine.cut_power()
        subject.abandon()
        (given.directory / "target.log").write_text(subject.log(), encoding="utf-8")


if __name__ == "__main__":
    main()
