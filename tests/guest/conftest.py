"""What every guest needs: the root it boots from, and what its kernel is where that takes long to make."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.guest import image, ways, zfs

T = TypeVar("T")
_CHOICE = pytest.StashKey[ways.Choice]()
_BUILD = pytest.StashKey[zfs.Build]()
_LAST = "test_zfs.py"


def must_run() -> bool:
    """In CI nothing is skipped. Another subject may lack what a check needs."""
    return bool(os.environ.get("CI")) and os.environ.get("GUEST_SUBJECT", "ours") == "ours"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for the kernel with ZFS is the last."""
    items.sort(key=lambda item: item.path.name == _LAST)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to compile it, if anything that was selected wants it."""
    if any(item.path.name == _LAST for item in session.items) and not session.config.option.collectonly:
        session.config.stash[_BUILD] = zfs.Build()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _BUILD in config.stash:
        config.stash[_BUILD].stop()


def _or_skip(make: Callable[[], T]) -> T:
    """Where no guest can run: skipped, but never in CI."""
    try:
        return make()
    except image.UnavailableError as why:
        if must_run():
            pytest.fail(f"a guest must run in CI: {why}")
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def guest_root() -> Path:
    """The root, made if need be."""
    return _or_skip(image.root)


@pytest.fixture(scope="session")
def guest_choice(request: pytest.FixtureRequest, guest_root: Path) -> ways.Choice:
    """How guests run on this machine; found out by booting, if that is not known."""
    choice = _or_skip(lambda: ways.choose(guest_root))
    request.config.stash[_CHOICE] = choice
    return choice


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how guests ran, and why so."""
    if _CHOICE in config.stash:
        terminalreporter.write_line(f"guests ran in {config.stash[_CHOICE]}")


@pytest.fixture(scope="session")
def zfs_kernel(request: pytest.FixtureRequest) -> Path:
    """What ``zfs.built`` makes, once it is there."""
    return _or_skip(request.config.stash[_BUILD].wait)
