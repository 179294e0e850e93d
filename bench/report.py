"""What was found, for people: the table on the terminal, the section of the README and its plot.

The README's section stands between two markers, and nothing else of the file is touched.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from bench.scale import SCALE_AIMS
from bench.workloads import AIMS, Grid

README = Path(__file__).resolve().parent.parent / "README.md"
PLOT = Path(__file__).resolve().parent / "speed.svg"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"

Scale = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Group → subject → figure → value."""

COLOURS = {"ours": "#1f77b4", "limit": "#bbbbbb", "tgtd": "#d62728", "istgt": "#ff9f40", "file": "#2ca02c"}


def terminal(grid: Grid, names: Sequence[str]) -> str:
    """One block a workload; the ratios are ours by theirs, so 2.0x IOPS is twice as many for us."""
    lines = []
    for workload, row in grid.items():
        lines.append(
            f"\n{workload:<26}{'IOPS':>9}{'CPU µs':>9}{'p50 µs':>9}{'p99 µs':>9}"
            f"{'ours: IOPS':>13}{'CPU':>10}{'p50':>10}"
        )
        ours = row["ours"].middle if "ours" in row else None
        for name in names:
            cell = row[name]
            middle = cell.middle
            if middle is None:
                lines.append(f"  {name:<24}{'—':>9}   {cell.note}")
                continue
            figures = (middle.iops, middle.cpu_us, middle.p50_us, middle.p99_us)
            line = f"  {name:<24}" + "".join(f"{_shown(figure):>9}" for figure in figures)
            if ours is not None and name != "ours":
                ratios = (ours.iops / middle.iops, ours.cpu_us / middle.cpu_us, ours.p50_us / middle.p50_us)
                line += "   " + "".join(
                    f"{'—' if math.isnan(ratio) else f'{ratio:.2f}x':>10}" for ratio in ratios
                )
            lines.append(line + (f"   {cell.note}" if cell.note else ""))
    return "\n".join(lines)


def aims(grid: Grid, scale: Scale) -> list[tuple[str, str, str, str, bool]]:
    """(workload, what, measured, aim, met) of every aim that was measured."""
    rows = []
    for aim in AIMS:
        ratio = aim.ratio(grid)
        if ratio is not None:
            bound = f"{'≤' if aim.at_most else '≥'} {aim.bound:g}"
            rows.append((aim.workload, aim.words, f"{ratio:.2f}", bound, aim.met(ratio)))
    for group, figure, words, bound_at_most in SCALE_AIMS:
        value = scale.get(group, {}).get("ours", {}).get(figure)
        if value is not None:
            rows.append((_scale_name(group, scale), words, _number(value), f"≤ {bound_at_most:g}",
                         value <= bound_at_most))  # fmt: skip
    return rows


def _scale_name(group: str, scale: Scale) -> str:
    ours = scale[group]["ours"]
    if group == "many":
        return f"{ours['targets']:.0f} targets, {ours['LUNs']:.0f} LUNs"
    return f"{ours['idle sessions']:.0f} silent sessions"


def _shown(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:.1f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def section(grid: Grid, scale: Scale, names: Sequence[str], about: str) -> str:
    """Markdown of the README's section."""
    lines = ["![CPU per command by workload](bench/speed.svg)", "", about, ""]
    lines += ["| workload | what | measured | aim | |", "| --- | --- | ---: | ---: | --- |"]
    for workload, words, measured, bound, met in aims(grid, scale):
        lines.append(f"| {workload} | {words} | {measured} | {bound} | {'met' if met else '**missed**'} |")
    lines += ["", "IOPS, server CPU per command in µs, and p50 in µs of each:", ""]
    lines += ["| workload | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for workload, row in grid.items():
        cells = []
        for name in names:
            middle = row[name].middle
            cells.append(
                f"{middle.iops:,.0f} · {_shown(middle.cpu_us)} · {_shown(middle.p50_us)}"
                if middle is not None
                else row[name].note or "—"
            )
        lines.append(f"| {workload} | " + " | ".join(cells) + " |")
    for group in scale:
        figures = sorted({figure for values in scale[group].values() for figure in values})
        if group in ("logins", "api"):
            for figure in figures:
                cells = [
                    _number(scale[group][name][figure]) if name in scale[group] else "—" for name in names
                ]
                lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_readme(text: str, path: Path = README) -> bool:
    """Put the section between the markers; False where there are none."""
    whole = path.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return False
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return True


def plot(grid: Grid, names: Sequence[str]) -> str:
    """An SVG of bars: CPU per command, each workload on its own scale, so that the ratio is what shows."""
    bar, gap, left, width = 14, 16, 190, 420
    parts = []
    y = 34
    for workload, row in grid.items():
        middles = {name: row[name].middle for name in names}
        middles = {name: m for name, m in middles.items() if m is None or not math.isnan(m.cpu_us)}
        most = max((m.cpu_us for m in middles.values() if m is not None), default=0)
        if not most:
            continue
        parts.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{escape(workload)}</text>')
        for name, middle in middles.items():
            if middle is None:
                continue
            length = max(1, round(width * middle.cpu_us / most))
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length}" height="{bar - 2}" fill="{COLOURS[name]}"/>'
                f'<text x="{left + length + 5}" y="{y + 10}" class="s">{name} {middle.cpu_us:.1f} µs</text>'
            )
            y += bar
        y += gap
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 120}" height="{y}" '
        f'font-family="sans-serif" font-size="12"><style>.s{{font-size:10px}}</style>'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<text x="8" y="20" font-weight="bold">Server CPU per command (shorter is better)</text>'
        + "".join(parts)
        + "</svg>\n"
    )
