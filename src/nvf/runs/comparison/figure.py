"""The files of a comparison: its tables, and its figure, which has a panel for each setting that differs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nvf.files.atomic import atomic_write
from nvf.runs.comparison.runs import Row
from nvf.runs.comparison.table import Comparison, shown
from nvf.runs.settings import canonical, is_number
from nvf.statistics import METRICS

MOST_PANELS = 6
LOG_FROM = 30  # an axis is logarithmic if its largest value is more than so many times its smallest
BLUE, INK = "#0072b2", "#222222"
STYLE: Any = {
    **{"font.size": 9, "axes.labelcolor": INK, "savefig.facecolor": "white", "savefig.dpi": 160},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e6e6e6", "errorbar.capsize": 2.5},
    "lines.markersize": 5,
}
LINES: dict[str, dict[str, Any]] = {
    "test": {"label": "mean of the settings", "color": BLUE},
    "exact": {"label": "exact search", "color": "#8a8a8a"},
    "oracle": {"label": "oracle", "color": INK, "linestyle": ":"},
    "coverage": {"label": "coverage", "color": "#6a6a6a", "linestyle": "--"},
}


def write(comparison: Comparison, folder: Path) -> str:
    """Write the files of a comparison, the same bytes each time, into a folder, and return a line that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, text in {"md": comparison.text, "csv": comparison.csv}.items():
        with atomic_write(folder / f"comparison.{ending}") as partial:
            partial.write_text(text() + "\n", encoding="utf-8")
    with matplotlib.rc_context(STYLE), atomic_write(folder / "comparison.png") as partial:
        draw(comparison).savefig(partial, format="png")
    return f"written to {folder}: comparison.md, .csv, .png"


def draw(comparison: Comparison) -> Figure:
    """Draw a panel for each of the first settings that differ; without any, one of the seeds."""
    rows, columns = list(comparison.rows), list(comparison.columns)
    if not columns:
        rows, columns = [Row.of([run]) for run in rows[0].runs], ["seed"]
    panels = columns[:MOST_PANELS]
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(max(5.4 * across, 6.4), 3.7 * down + 1.1), layout="constrained")
    axes: Any = None
    for i, column in enumerate(panels):
        axes = figure.add_subplot(down, across, i + 1, sharey=axes)
        _draw_panel(axes, rows, column)
    left_out = f"; {MOST_PANELS} of {len(columns)} settings that differ" * (len(columns) > MOST_PANELS)
    figure.suptitle(f"Test {METRICS[comparison.metric]}, %, with 95% intervals{left_out}", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Row], column: str) -> None:
    """Draw each row as a point over its value of a setting, and lines through the means at each value."""
    found = {canonical(value): value for value in (row.value(column) for row in rows)}
    values = sorted(found.values(), key=lambda v: (not is_number(v), v if is_number(v) else canonical(v)))
    seeds = column == "seed"  # none of them is the best, and their order says nothing
    numeric = not seeds and all(map(is_number, values))
    place = {canonical(value): float(value) if numeric else float(i) for i, value in enumerate(values)}
    x = np.array([place[canonical(row.value(column))] for row in rows])
    for name, style in LINES.items():
        shares = 100 * np.array([row.share(name) for row in rows])
        means = np.array([shares[x == at].mean() for at in place.values()])
        if np.isnan(means).all():
            continue
        if numeric:
            axes.plot([*place.values()], means, **style)
        else:
            at = np.arange(len(values))
            axes.hlines(means, at - 0.36, at + 0.36, **style)
    tests = [row.figures["test"] for row in rows]
    test, low, high = 100 * np.array([[*figures.values()] for figures in tests if figures is not None]).T
    bars = [(test - low).clip(0), (high - test).clip(0)]  # damaged intervals may not hold their value
    axes.errorbar(x, test, yerr=bars, fmt="o", color=BLUE, label="a setting")
    if not seeds:
        axes.plot(x[0], test[0], "*", markersize=14, mfc="none", mec=INK, label="best on validation")
    axes.set_xlabel(column)
    if numeric and min(x) > 0 and max(x) > LOG_FROM * min(x):
        axes.set_xscale("log")
    if not numeric:
        labels = [shown(value, 24).replace("$", r"\$") for value in values]  # which would begin a formula
        axes.set_xticks([*place.values()], labels, rotation=25 * (sum(map(len, labels)) > 50))
