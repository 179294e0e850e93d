"""The soak in short: forty sessions, some seconds, each kind of fault. ``make soak`` runs it long."""

from pathlib import Path

import pytest

from tests.soak.__main__ import GROWTH_LIMIT_MB, Soak


@pytest.mark.timeout(400)
def test_nothing_is_lost_wrong_or_left_behind_after_faults_and_changes(tmp_path: Path) -> None:
    report = Soak(tmp_path, seconds=8, sessions=40, seed=9).run()
    assert report.failures == []
    assert report.leaked == {}, report.lines()
    assert report.growth_mb < GROWTH_LIMIT_MB, report.memory_mb
    assert report.verified > 0
