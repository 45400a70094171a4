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
from nvf.runs.curves import LINES, read_curves
from nvf.runs.settings import canonical, is_number
from nvf.statistics import METRICS

MOST_PANELS, ACROSS = 6, 2  # of the figure, and side by side
MOST_LINES = 8  # of curves
LOG_FROM = 30  # an axis is logarithmic if its largest value is more than so many times its smallest
BLUE, INK = "#0072b2", "#222222"
STYLE: Any = {  # of all figures
    **{"figure.dpi": 200, "font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left", "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "lines.markersize": 5},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": "#dddddd", "errorbar.capsize": 2.5},
    "text.parse_math": False,  # a dollar in a user's text is no formula
}
LEVELS: dict[str, dict[str, Any]] = {
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


def draw_curves(comparison: Comparison) -> Figure:
    """Draw validation's Top-1 over the steps: of each of the best settings the mean of its seeds in a band."""
    figure, rows = Figure(figsize=(5.2, 3.2), layout="constrained"), comparison.rows[:MOST_LINES]
    axes = figure.add_subplot()
    runs = [run.path for row in rows for run in row.runs]
    curves = {run: {curve.stage: curve.points for curve in read_curves(run.parent) if not curve.name} for run in runs}
    stages = [stage for stage in LINES if all(stage in of for of in curves.values())]  # not a reused stage 1
    for row in rows if stages else ():
        of_seeds = [np.concatenate([curves[run.path][stage] for stage in stages]).T for run in row.runs]  # (2, n) each
        of_seeds = [np.stack([steps - steps[0], 100 * shares]) for steps, shares in of_seeds]
        steps = np.unique(np.concatenate([steps for steps, _ in of_seeds]))
        steps = steps[steps <= min(found[-1] for found, _ in of_seeds)]  # where all of the seeds are
        values = np.array([np.interp(steps, *curve) for curve in of_seeds])
        named = [f"{name}={shown(row.value(name), 24)}" for name in comparison.columns] or ["all seeds"]
        (line,) = axes.plot(steps, values.mean(axis=0), label=", ".join(named))
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2, lw=0)
    best = f"; the {len(rows)} best of {len(comparison.rows)}" * (len(rows) < len(comparison.rows))
    steps_of = f"steps of {' and '.join(LINES[stage] for stage in stages)}"
    axes.set(xlabel=steps_of, title=f"Validation Top-1, %: mean and range of the seeds{best}")
    if axes.get_lines():
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw(comparison: Comparison) -> Figure:
    """Draw a panel for each of the first settings that differ; without any, one of the seeds."""
    rows, columns = list(comparison.rows), list(comparison.columns)
    if not columns:
        rows, columns = [Row.of([run]) for run in rows[0].runs], ["seed"]
    panels = columns[:MOST_PANELS]
    across = min(len(panels), ACROSS)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(max(4.4 * across, 5.2), 2.8 * down + 0.9), layout="constrained")
    axes: Any = None
    for i, column in enumerate(panels):
        axes = figure.add_subplot(down, across, i + 1, sharey=axes)
        _draw_panel(axes, rows, column)
    left_out = f"; {MOST_PANELS} of {len(columns)} settings that differ" * (len(columns) > MOST_PANELS)
    figure.suptitle(f"Test {METRICS[comparison.metric]}, %, with 95% intervals{left_out}", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Row], column: str) -> None:
    """Draw each row as a point over its value of a setting, and lines through the means at each value."""
    found = {canonical(value): value for value in (row.value(column) for row in rows)}
    values = sorted(found.values(), key=lambda v: (not is_number(v), v if is_number(v) else canonical(v)))
    seeds = column == "seed"  # none of them is the best, and their order says nothing
    numeric = not seeds and all(map(is_number, values))
    place = {canonical(value): float(value) if numeric else float(i) for i, value in enumerate(values)}
    x = np.array([place[canonical(row.value(column))] for row in rows])
    for name, style in LEVELS.items():
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
        labels = [shown(value, 24) for value in values]
        axes.set_xticks([*place.values()], labels, rotation=25 * (sum(map(len, labels)) > 50))
