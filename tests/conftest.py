"""Fixtures for tests that need the real daemon, and its log beside every failure."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.daemon import Daemon

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
