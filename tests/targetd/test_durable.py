"""A private file survives a power cut whole."""

import stat
from pathlib import Path

from targetd.persistence.durable import write_private
from tests.faults.fusefs import faulty_fs

TEXT = "secret\n".rjust(1024)
"""Whole blocks, which the volatile disk holds back until they are flushed."""


def test_what_was_written_is_there_after_a_power_cut(tmp_path: Path) -> None:
    """The daemon's first password was once lost so: an empty file, and no start with it."""
    with faulty_fs(tmp_path, volatile=True) as fs:
        for seed in range(5):
            write_private(fs.at / f"secret{seed}", TEXT)
        fs.cut_power(0)
        for seed in range(5):
            assert (fs.backing / f"secret{seed}").read_text() == TEXT


def test_a_file_that_a_crash_left_unfinished_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    (tmp_path / "secret.new").write_text("half")
    write_private(path, TEXT)
    assert path.read_text() == TEXT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["secret"]
