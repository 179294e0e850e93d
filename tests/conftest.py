"""Fixtures for tests that need the real daemon, their logs beside failures, and a record of what was said."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.daemon import ROOT, Daemon, ports

# An example that takes long says that the machine is busy, and nothing of us.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def _running(directory: Path) -> Iterator[Daemon]:
    """A fresh daemon; at the end it must still be there, stop when told, and have logged no bug."""
    daemon = Daemon(directory)
    try:
        yield daemon.start()
        assert daemon.alive(), "the daemon died during the test"
        status = daemon.terminate()
        assert status == 0, f"exit status {status} after SIGTERM"
        assert not daemon.tracebacks(), "the daemon logged a traceback"
    finally:
        daemon.kill9()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon for this test alone."""
    yield from _running(tmp_path)


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for all tests of a module: each makes targets of its own in it."""
    yield from _running(tmp_path_factory.mktemp("daemon"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the log of every daemon that a failed test used."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Daemon):
                report.sections.append((f"log of {name}", "\n".join(value.lines[-200:])))
    return report


# -- what the whole run says ----------------------------------------------------------------------

RECORDER_STOP_S = 60.0


class Recorder:
    """Records what daemons of this run say on loopback (``tests.recording``)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.low, self.high = ports().low, ports().high
        with path.with_suffix(".log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.recording", str(path), f"{self.low}-{self.high}"],
                cwd=ROOT,
                stderr=log,
            )

    def stop(self) -> None:
        """Stop, and leave the file."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(RECORDER_STOP_S)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked so comes last."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


@pytest.fixture(scope="session", autouse=True)
def recorder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Recorder | None]:
    """At work while there is a test in the run that will read it, and all of the others run before that."""
    wanted = any(item.get_closest_marker("last") for item in request.session.items)
    if not wanted or os.geteuid() or shutil.which("dumpcap") is None:
        yield None
        return
    recorder = Recorder(tmp_path_factory.mktemp("recording") / "run.pcap")
    try:
        yield recorder
    finally:
        recorder.stop()
