"""What every guest needs: the root it boots from."""

import os
from pathlib import Path

import pytest

from tests.guest import image


def must_run() -> bool:
    """In CI nothing is skipped. Another subject may lack what a check needs."""
    return bool(os.environ.get("CI")) and os.environ.get("GUEST_SUBJECT", "ours") == "ours"


@pytest.fixture(scope="session")
def guest_root() -> Path:
    """The root, made if need be. Where no guest can run: skipped, but never in CI."""
    try:
        return image.root()
    except image.UnavailableError as why:
        if must_run():
            pytest.fail(f"a guest must run in CI: {why}")
        pytest.skip(str(why))
