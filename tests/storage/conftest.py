"""Media on a machine that may be busy with anything else."""

import pytest

from storage import paged


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No write counts as slow: a thread that waits its turn for the processor is no medium that waits."""
    monkeypatch.setattr(paged, "SLOW_WRITE_S", float("inf"))
