"""What ``make bench`` makes of its figures. Nothing is measured here."""

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import report
from bench.workloads import AIMS, WORKLOADS, Aim, Cell, Grid, Sample

SUBJECTS = ("ours", "limit", "tgtd", "istgt", "file")
TEN, TWENTY = Sample(10, 10, 10, 10), Sample(20, 20, 20, 20)


def grid(ours: Sample = TEN, theirs: Sample = TWENTY) -> Grid:
    """Every workload with the same figures."""
    return {
        work.name: {name: Cell([ours if name == "ours" else theirs]) for name in SUBJECTS}
        for work in WORKLOADS
    }


def test_the_middle_of_samples_is_the_median_of_each_figure() -> None:
    cell = Cell([Sample(1, 30, 3, 4), Sample(3, 10, 1, 4), Sample(2, 20, 2, 5)])
    assert cell.middle == Sample(2, 20, 2, 4)
    assert Cell([], "no digests").middle is None


@pytest.mark.parametrize(
    ("at_most", "bound", "met"),
    [(True, 0.5, True), (True, 0.4, False), (False, 0.5, True), (False, 0.6, False)],
)
def test_an_aim_is_ours_divided_by_theirs(at_most: bool, bound: float, met: bool) -> None:
    aim = Aim("4k-randread-qd1", "p50", "p50_us", "tgtd", at_most, bound)
    ratio = aim.ratio(grid())
    assert ratio == 0.5
    assert aim.met(ratio) is met


def test_every_aim_is_about_what_is_measured() -> None:
    assert all(aim.ratio(grid()) is not None for aim in AIMS)


def test_an_aim_without_figures_is_left_out() -> None:
    found = grid()
    for row in found.values():
        row["tgtd"] = Cell([], "did not start")
    assert all("tgtd" not in words for _, words, *_ in report.aims(found, {}))
    assert any("istgt" in words for _, words, *_ in report.aims(found, {}))


def test_latencies_that_a_client_does_not_tell_are_shown_as_none() -> None:
    found = grid(ours=Sample(10, 10, math.nan, math.nan))
    assert "nan" not in report.terminal(found, SUBJECTS)
    assert "nan" not in report.section(found, {}, SUBJECTS, "here")


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    assert report.write_readme("new", path)
    assert report.write_readme("newer", path)
    assert path.read_text(encoding="utf-8") == f"before\n{report.BEGIN}\nnewer\n{report.END}\nafter\n"
    path.write_text("no markers", encoding="utf-8")
    assert not report.write_readme("new", path)
    assert path.read_text(encoding="utf-8") == "no markers"


def test_the_readme_has_the_markers() -> None:
    text = report.README.read_text(encoding="utf-8")
    assert text.count(report.BEGIN) == text.count(report.END) == 1


def test_the_plot_is_well_formed_and_has_a_bar_for_each_figure() -> None:
    bars = [
        element
        for element in ET.fromstring(report.plot(grid(), SUBJECTS)).iter()
        if element.tag.endswith("rect")
    ]
    assert len(bars) == 1 + len(WORKLOADS) * len(SUBJECTS)  # and the background
