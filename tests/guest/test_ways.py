"""How a guest runs here is found out by booting: ``ways.py``, and ``xstate.c`` for user-mode Linux."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest import image, ways
from tests.guest.conftest import must_run
from tests.guest.machine import COMMAND

pytestmark = [pytest.mark.guest]

LEGACY = 512 + 64
"""Bytes of the extended state that every processor has: x87, SSE and the header (SDM volume 1, 13.4)."""
NT_X86_XSTATE = 0x202
PTRACE_TRACEME, PTRACE_GETREGSET, PTRACE_SETREGSET = 0, 0x4204, 0x4205


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def transfer(request: int, pid: int, state: bytearray) -> int:
    """Get or set as much of a stopped process' state as fits; the errno, or 0. ``state`` gets its length."""
    # By name in the whole process, so that what is preloaded comes first, as it does for user-mode Linux.
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.restype = ctypes.c_long
    ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    room = (ctypes.c_char * len(state)).from_buffer(state)
    vector = _Vector(ctypes.addressof(room), len(state))
    failed = ptrace(request, pid, NT_X86_XSTATE, ctypes.addressof(vector))
    del room
    if not failed:
        del state[vector.length :]
    return ctypes.get_errno() if failed else 0


def set_a_part() -> None:
    """Set the beginning of another process' state, with another x87 control word; prints the errno, the word
    that is there afterwards and which components are not in their initial state."""
    pid = os.fork()
    if not pid:
        ctypes.CDLL(None).ptrace(PTRACE_TRACEME, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, 0)
    part = bytearray(LEGACY)
    assert transfer(PTRACE_GETREGSET, pid, part) == 0
    part[0:2] = (0x27F).to_bytes(2, "little")
    part[512] |= 7  # x87, SSE and AVX: of the last, nothing is given
    errno = transfer(PTRACE_SETREGSET, pid, part)
    whole = bytearray(1 << 16)
    assert transfer(PTRACE_GETREGSET, pid, whole) == 0
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(errno, hex(int.from_bytes(whole[:2], "little")), int.from_bytes(whole[512:520], "little") & ~3)


def built(directory: Path, *names: str) -> list[Path]:
    if not shutil.which("gcc") and not must_run():
        pytest.skip("not installed: gcc")
    return [ways.build(name, directory) for name in names]


@pytest.mark.parametrize(
    ("preloads", "said"),
    [(("wide",), "14 0x37f"), (("xstate", "wide"), "0 0x27f 0")],
    ids=["without", "with"],
)
def test_a_part_of_a_state_that_is_larger_can_be_set(
    tmp_path: Path, preloads: tuple[str, ...], said: str
) -> None:
    """``wide.c`` has this kernel refuse it, as one does on a processor with AMX."""
    libraries = built(tmp_path, *preloads)
    ran = subprocess.run(
        [sys.executable, "-c", "from tests.guest import test_ways; test_ways.set_a_part()"],
        cwd=image.ROOT,
        env={**os.environ, "PYTHONPATH": str(image.ROOT), "LD_PRELOAD": ":".join(map(str, libraries))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(said), ran.stdout


@pytest.mark.timeout(image.BUILD_LIMIT_S + 6 * ways.LIMIT_S)
def test_user_mode_linux_on_a_processor_with_more_state_than_it_knows(
    guest_root: Path, guest_choice: ways.Choice, tmp_path: Path
) -> None:
    """As it is it ends with the kernel's words; with the preload it boots, and reckons right. Where it does
    not run at all, or is left out, that is told."""
    if guest_choice.way not in ("uml", "preload"):
        assert "uml: " in guest_choice.why
        assert "preload: " in guest_choice.why
        return
    built(tmp_path, "wide")
    for way, words in (("uml", "errno = 14"), ("preload", "it boots")):
        told = probed(way, guest_root, tmp_path)
        assert words in told, f"{way}: {told}"


def probed(way: str, root: Path, directory: Path) -> str:
    """What ``ways.probe`` says of one way, with ``wide.so`` behind it, in namespaces of its own."""
    program = "import sys; from tests.guest import test_ways; test_ways.probe_with_more_state(*sys.argv[1:])"
    ran = subprocess.run(
        [*COMMAND, sys.executable, "-c", program, way, str(root), str(directory)],
        cwd=image.ROOT,
        env={**os.environ, "PYTHONPATH": str(image.ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.stdout + ran.stderr


def probe_with_more_state(way: str, root: str, directory: str) -> None:
    place = Path(directory)
    try:
        print(ways.probe(way, Path(root), place, behind=[place / "wide.so"]))
    except image.UnavailableError as why:
        print(why)


def test_ways_that_are_left_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUEST_WAYS", "tcg, preload")
    assert ways.allowed() == ("preload", "tcg")
    monkeypatch.setenv("GUEST_WAYS", "uml qemu")
    with pytest.raises(image.UnavailableError, match="GUEST_WAYS: qemu is none of uml preload kvm tcg"):
        ways.allowed()


def test_what_is_kept_depends_on_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = ways.machine_facts()
    assert ways.machine_facts() == facts
    monkeypatch.setenv("GUEST_WAYS", "tcg")
    assert ways.machine_facts() != facts
