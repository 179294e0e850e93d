"""Runs a part's checks in the guest and reports each: ``python3 -m tests.guest.inside.agent HOST:PORT``.

The stage says which part and which of its checks. What a check leaves behind (sessions, mounts, nodes) is
cleared after it, so that one failure is one failure; the kernel's own words since its start go with it.
A part that has ``serve`` instead of checks is a machine at work, which the stage watches from outside.
"""

import importlib
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import FrameType, ModuleType

from tests.guest.inside import host, iscsi, local_daemon
from tests.guest.inside.checks import (
    LIMIT_S,
    SETTLE_LIMIT_S,
    Check,
    CheckFailedError,
    CheckSkippedError,
    checks_of,
)

KERNEL_BUGS = ("BUG:", "Oops", "WARNING:", "hung task", "soft lockup", "blocked for more than")


class OverLimitError(Exception):
    """The check took longer than it may."""


def _alarm(_signal: int, _frame: FrameType | None) -> None:
    raise OverLimitError


def kernel_log() -> list[str]:
    return (
        subprocess.run(["dmesg"], capture_output=True, check=True).stdout.decode(errors="replace").split("\n")
    )


def start_services() -> None:
    """udev names devices and tells multipathd; iscsid logs in and keeps sessions alive."""
    Path("/etc/iscsi").mkdir(exist_ok=True)
    Path("/etc/iscsi/initiatorname.iscsi").write_text(f"InitiatorName={iscsi.ALICE}\n")
    subprocess.run(
        ["modprobe", "-a", "iscsi_tcp", "sd_mod", "sg", "loop", "dm_multipath", "dm-service-time"], check=True
    )
    subprocess.run(["/usr/lib/systemd/systemd-udevd", "--daemon"], check=True, stderr=subprocess.DEVNULL)
    subprocess.run(["udevadm", "trigger", "--action=add"], check=True)
    subprocess.run(["iscsid"], check=True)


def outcome_of(check: Check) -> tuple[str, str]:
    """Run one check; ``ok``, ``fail`` or ``skip``, and a note."""
    said = len(kernel_log())
    signal.alarm(LIMIT_S)
    try:
        note = check.run() or ""
        outcome = "ok"
    except CheckSkippedError as skipped:
        return "skip", str(skipped)
    except OverLimitError:
        outcome, note = "fail", f"no end within {LIMIT_S} s\n{traceback.format_exc(limit=-6)}"
    except CheckFailedError as failed:
        frame = traceback.extract_tb(failed.__traceback__)
        at = next((one for one in frame if one.name == check.name), frame[-1])
        outcome, note = "fail", f"{Path(at.filename).name}:{at.lineno}: {failed}"
    except Exception:
        outcome, note = "fail", traceback.format_exc()
    finally:
        signal.alarm(0)
    kernel = kernel_log()[said - 1 :]
    bugs = [line for line in kernel if any(word in line for word in KERNEL_BUGS)]
    if bugs and outcome == "ok":
        outcome, note = "fail", "the kernel complained"
    if outcome == "fail":
        note += "\n-- kernel log --\n" + "\n".join(kernel[-40:])
    return outcome, note


def clear() -> str:
    """Take down what a check left; what would not go is the answer."""
    signal.alarm(SETTLE_LIMIT_S)
    try:
        return iscsi.clear()
    except OverLimitError:
        return f"clearing took more than {SETTLE_LIMIT_S} s"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.alarm(0)


def run_part(part: ModuleType, wanted: list[str]) -> None:
    checks = {check.name: check for check in checks_of(part)}
    for name in wanted:
        start = time.monotonic()
        host.ask("started", name=name)
        outcome, note = outcome_of(checks[name])
        left = clear()
        if left and outcome != "skip":
            outcome, note = "fail", f"{note}\nleft behind: {left}"
        if outcome == "fail" and (said := local_daemon.log()):
            note += f"\n-- log --\n{said}"
        seconds = round(time.monotonic() - start, 1)
        print(f"CHECK {name} {outcome} {seconds} s", flush=True)
        host.ask("report", name=name, outcome=outcome, note=note, seconds=seconds)


def main() -> None:
    signal.signal(signal.SIGALRM, _alarm)
    plan = host.ask("plan")
    part = importlib.import_module(f"tests.guest.inside.{plan['part']}")
    serve = getattr(part, "serve", None)
    if serve is not None:
        serve(plan)
        return
    iscsi.first_lun = plan["first_lun"]
    start_services()
    host.ask("booted", uptime=float(Path("/proc/uptime").read_text().split()[0]))
    prepare = getattr(part, "prepare", None)
    if prepare is not None:
        prepare()
    run_part(part, plan["checks"])
    sys.stdout.flush()


if __name__ == "__main__":
    main()
