"""The files of a comparison: its tables, and its figure, which has a panel for each setting that differs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nvf.errors import InputError
from nvf.files.atomic import written_whole
from nvf.runs.comparison.runs import Row
from nvf.runs.comparison.table import Comparison, shown
from nvf.runs.settings import canonical, is_number
from nvf.statistics import METRICS

MOST_PANELS, MOST_LINES, MOST_TICKS = 6, 8, 12
LABEL = 24  # characters
AGREE = 0.5  # percent by which a reference may differ between the lines of a panel that draws it
LOG_FROM = 30  # an axis is logarithmic if its largest value is more than so many times its smallest
# Okabe and Ito's palette, which the colour-blind tell apart, without the grey and black of the references.
COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a6d00", "#5b3a8e")
MARKERS = "osD^vP<>"
INK = "#222222"
STYLE: Any = {
    **{"font.size": 9, "axes.labelcolor": INK, "axes.titlesize": 8, "axes.titlecolor": "#666666"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e6e6e6", "errorbar.capsize": 2.5},
    **{"lines.markersize": 5, "svg.hashsalt": "nvf", "savefig.facecolor": "white", "savefig.dpi": 160},
}
BEST: Any = {"linestyle": "none", "marker": "*", "markersize": 14, "mfc": "none", "mec": INK, "zorder": 4}
REFERENCES: dict[str, dict[str, Any]] = {
    "exact": {"label": "exact search", "color": "#8a8a8a", "linestyle": "-"},
    "oracle": {"label": "oracle", "color": INK, "linestyle": (0, (1, 1.5))},
    "coverage": {"label": "coverage", "color": "#6a6a6a", "linestyle": (0, (5, 2))},
}


def write(comparison: Comparison, folder: Path) -> str:
    """Write comparison.md, .csv, .json, .png and .svg into a folder, which is made; returns a line that says so.

    The same comparison gives the same bytes.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise InputError(f"{folder} cannot be made a folder ({fault.strerror}); give another output") from None
    for ending, text in {"md": comparison.markdown, "csv": comparison.csv, "json": comparison.json}.items():
        with written_whole(folder / f"comparison.{ending}") as partial:
            partial.write_text(text() + "\n", encoding="utf-8")
    with matplotlib.rc_context(STYLE):
        figure = draw(comparison)
        for ending, metadata in (("png", None), ("svg", {"Date": None})):
            with written_whole(folder / f"comparison.{ending}") as partial:
                figure.savefig(partial, format=ending, metadata=metadata)
    return f"written to {folder}: comparison.md, .csv, .json, .png, .svg"


def draw(comparison: Comparison) -> Figure:
    """Draw a panel for each of the first settings that differ; without any, one of the seeds."""
    rows, columns, marked = list(comparison.rows), list(comparison.columns), True
    if not columns:
        rows, marked = [Row.of([run]) for run in rows[0].runs], False
        seeds = sorted(rows[0].runs[0].seeds, key=len)
        columns = [next((name for name in seeds if len({row.value(name) for row in rows}) > 1), "seed")]
    panels = columns[:MOST_PANELS]
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(max(5.4 * across, 6.4), 3.7 * down + 1.1), layout="constrained")
    axes, drawn = None, dict[str, Line2D]()
    for i, column in enumerate(panels):
        axes = figure.add_subplot(down, across, i + 1, sharey=axes)
        drawn |= _panel(axes, rows, column, [name for name in columns if name != column], marked=marked)
    title = f"Test {METRICS[comparison.metric]}, %, with 95% intervals"
    left_out = f"\n{MOST_PANELS} of {len(columns)} settings that differ; the table has all"
    figure.suptitle(title + left_out * (len(columns) > MOST_PANELS), fontsize=11)
    if drawn:
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=6)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], column: str, others: Sequence[str], *, marked: bool) -> dict[str, Line2D]:
    """Draw the panel of one setting, with a line for each combination of the others; returns what the legend says.

    The first row is `marked` as the best on validation. Too many combinations become one line of means.
    """
    values = sorted({canonical(row.value(column)): row.value(column) for row in rows}.values(), key=_order)
    numeric = column not in rows[0].runs[0].seeds and all(map(is_number, values))
    place = {canonical(value): float(value) if numeric else float(i) for i, value in enumerate(values)}
    x = np.array([place[canonical(row.value(column))] for row in rows])
    lines = _lines(rows, others)
    averaged = len(lines) == 1 and len(others) > 0 and len(place) < len(rows)
    joined = numeric and (len(lines) > 1 or not others or averaged)  # else they are points of a random search
    tests = 100 * np.array([[*(row.figures["test"] or dict.fromkeys("vlh", math.nan)).values()] for row in rows])
    ends = tests[:, [0, 0]] if averaged else tests[:, 1:]
    for i, (label, own) in enumerate(lines.items()):
        places, middle = _means(x[own], tests[own, 0])
        low, high = (np.array([end(ends[own][x[own] == at]) for at in places]) for end in (np.min, np.max))
        bars = [(middle - low).clip(0), (high - middle).clip(0)]  # damaged intervals may not hold their value
        shift = 0.0 if numeric else 0.1 * (i - (len(lines) - 1) / 2)
        form = MARKERS[i] + "-" * joined
        axes.errorbar(places + shift, middle, yerr=bars, fmt=form, color=COLOURS[i], label=label, zorder=3)
        if 0 in own and marked and not averaged:
            axes.plot(x[0] + shift, tests[0, 0], **BEST)
    drawn = {"best on validation": Line2D([], [], **BEST)} if marked and not averaged else {}
    for name, style in REFERENCES.items():
        heights = 100 * np.array([row.share(name) for row in rows])
        differ = len(lines) > 1 and any(np.ptp(heights[x == at]) > AGREE for at in x)
        if np.isnan(heights).all() or differ:  # one mean for several lines would be wrong for each
            continue
        places, middle = _means(x, heights)
        line = {**style, "label": None, "zorder": 2}  # the figure's legend has it, not the panel's
        if numeric:
            axes.plot(places, middle, **line)
        else:
            axes.hlines(middle, places - 0.36, places + 0.36, **line)
        drawn[style["label"]] = Line2D([], [], **style)
    if len(lines) > 1:
        axes.legend(title=", ".join(others), loc="upper left", bbox_to_anchor=(1.0, 1.0), alignment="left")
    axes.set_title("mean over the other settings (bars: their range)" if averaged else "")
    axes.set_xlabel(column)
    if numeric and min(x) > 0 and max(x) > LOG_FROM * min(x):
        axes.set_xscale("log")
    if not numeric or len(values) <= MOST_TICKS:
        labels = [_label(value) for value in values]
        axes.set_xticks([*place.values()], labels, rotation=25 * (not numeric and sum(map(len, labels)) > 50))
        axes.minorticks_off()
    return drawn


def _lines(rows: Sequence[Row], others: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the rows that share a line, by its label: each combination of the other settings, or all."""
    lines: dict[str, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: [_order(rows[i].value(name)) for name in others]):
        lines.setdefault(", ".join(_label(rows[i].value(name)) for name in others), []).append(i)
    return {"": [*range(len(rows))]} if len(lines) > MOST_LINES or max(map(len, lines.values())) == 1 else lines


def _means(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct places, from left to right, and the mean of the values at each."""
    places = np.unique(x)
    return places, np.array([values[x == place].mean() for place in places])


def _order(value: Any) -> tuple[bool, float, str]:
    """Sorts numbers by size, and behind them anything else by name."""
    return (False, float(value), "") if is_number(value) else (True, 0.0, canonical(value))


def _label(value: Any) -> str:
    return shown(value, LABEL).replace("$", r"\$")  # which would begin a formula
