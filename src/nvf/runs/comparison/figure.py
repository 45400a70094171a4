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
from nvf.files.atomic import atomic_write
from nvf.runs.comparison.runs import Row
from nvf.runs.comparison.settings import order, shown
from nvf.runs.comparison.table import Comparison, compare
from nvf.runs.settings import canonical, is_number
from nvf.statistics import METRICS

MOST_PANELS, MOST_LINES = 6, 8
AGREE = 0.5  # percent by which rows at the same place may differ to share one reference line
MOST_TICKS = 12  # for more values than these, the axis is marked at round numbers
LOG_FROM = 30  # times the smallest value: from there on, an axis is logarithmic
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
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("exact search", {"color": "#8a8a8a", "linestyle": "-"}),
    "oracle": ("oracle", {"color": "#222222", "linestyle": (0, (1, 1.5))}),
    "coverage": ("coverage", {"color": "#6a6a6a", "linestyle": (0, (5, 2))}),
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
        with atomic_write(folder / f"comparison.{ending}") as partial:
            partial.write_text(text() + "\n", encoding="utf-8")
    with matplotlib.rc_context(STYLE):  # no state of matplotlib's is left
        figure = draw(comparison)
        for ending, metadata in (("png", None), ("svg", {"Date": None})):
            with atomic_write(folder / f"comparison.{ending}") as partial:
                figure.savefig(partial, format=ending, metadata=metadata)
    return f"written to {folder}: comparison.md, .csv, .json, .png, .svg"


def summarize(folder: Path) -> str | None:
    """Compare what is under the folder and write it there: the table, and where the files are; None without runs."""
    if next(folder.rglob("results.json"), None) is None:
        return None
    try:
        comparison = compare([folder])
    except InputError as error:  # none that can be read
        return str(error)
    return f"{comparison.text()}\n{write(comparison, folder)}"


def draw(comparison: Comparison) -> Figure:
    """A panel for each of the first settings that differ; without any, one of the seeds."""
    rows, columns, best = list(comparison.rows), list(comparison.columns), 0
    if not columns:
        rows, best = [Row.of([run]) for run in rows[0].runs], -1
        seeds = sorted(rows[0].runs[0].seeds, key=len)
        columns = [next((name for name in seeds if len({row.value(name) for row in rows}) > 1), "seed")]
    panels = columns[:MOST_PANELS]
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(max(5.4 * across, 6.4), 3.7 * down + 1.1), layout="constrained")
    axes, drawn = None, dict[str, Line2D]()
    for i, column in enumerate(panels):
        axes = figure.add_subplot(down, across, i + 1, sharey=axes)
        drawn |= _panel(axes, rows, column, [name for name in columns if name != column], best)
    figure.supylabel(f"test {METRICS[comparison.metric]}, %", fontsize=9)
    figure.suptitle(_title(comparison), fontsize=11)
    if drawn:
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=6)
    return figure


def _title(comparison: Comparison) -> str:
    title = f"Test {METRICS[comparison.metric]} of {comparison.fitted}: "
    counts, settings = sorted({len(row.runs) for row in comparison.rows}), len(comparison.columns)
    if not settings:
        return f"{title}each seed, with its 95% interval over the test queries"
    seeds = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
    title += f"{seeds} seed{'s' * (counts != [1])} a setting, "
    title += "95% interval over the test queries" if counts == [1] else "mean and 95% interval"
    left = f"\n{MOST_PANELS} of {settings} settings that differ; the table has all"
    return title + left * (settings > MOST_PANELS)


def _panel(axes: Axes, rows: Sequence[Row], column: str, others: Sequence[str], best: int) -> dict[str, Line2D]:
    """Draw the panel of one setting, with a line for each combination of the others; returns what the legend says.

    `best` is the row that is marked as the best on validation, -1 for none.
    """
    values = sorted({canonical(row.value(column)): row.value(column) for row in rows}.values(), key=order)
    numeric = column not in rows[0].runs[0].seeds and all(map(is_number, values))
    place = {canonical(value): float(value) if numeric else float(i) for i, value in enumerate(values)}
    x = np.array([place[canonical(row.value(column))] for row in rows])
    lines = _lines(rows, x, others)
    averaged = len(lines) == 1 and len(others) > 0 and len(place) < len(rows)
    joined = numeric and (len(lines) > 1 or not others or averaged)  # or it is single points, drawn at random
    tests = 100 * np.array([[*(row.figures["test"] or dict.fromkeys("vlh", math.nan)).values()] for row in rows])
    ends = tests[:, [0, 0]] if averaged else tests[:, 1:]
    for i, (label, own) in enumerate(lines.items()):
        places, middle = _means(x[own], tests[own, 0])
        low, high = (np.array([end(ends[own][x[own] == at]) for at in places]) for end in (np.min, np.max))
        bars = [(middle - low).clip(0), (high - middle).clip(0)]  # a file may say anything
        shift = 0.0 if numeric else min(0.12, 0.6 / len(lines)) * (i - (len(lines) - 1) / 2)
        form = MARKERS[i] + "-" * joined
        axes.errorbar(places + shift, middle, yerr=bars, fmt=form, color=COLOURS[i], label=label, zorder=3)
        if best in own and not averaged:
            axes.plot(x[best] + shift, tests[best, 0], **BEST)
    drawn = _references(axes, rows, x, [*lines.values()], numeric=numeric, joined=joined)
    if best >= 0 and not averaged:
        drawn["best on validation"] = Line2D([], [], **BEST)
    if len(lines) > 1:
        axes.legend(title=", ".join(others), loc="upper left", bbox_to_anchor=(1.0, 1.0), alignment="left")
    axes.set_title("mean over the other settings (bars: their range)" if averaged else "")
    axes.set_xlabel(column)
    if not numeric:
        axes.set_xlim(-0.6, len(values) - 0.4)
    elif min(x) > 0 and max(x) > LOG_FROM * min(x):
        axes.set_xscale("log")
    if not numeric or len(values) <= MOST_TICKS:
        labels = list(map(_label, values))
        axes.set_xticks([*place.values()], labels, rotation=25 * (not numeric and sum(map(len, labels)) > 50))
        axes.minorticks_off()
    return drawn


def _lines(rows: Sequence[Row], x: np.ndarray, others: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows that share a line, from left to right, by its label: each combination of the other settings, or all."""
    lines: dict[str, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: ([order(rows[i].value(name)) for name in others], x[i])):
        lines.setdefault(", ".join(_label(rows[i].value(name)) for name in others), []).append(i)
    if len(lines) > MOST_LINES or max(map(len, lines.values())) == 1:
        return {"": np.argsort(x, kind="stable")}
    return {label: np.array(own) for label, own in lines.items()}


def _means(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct places, from left to right, and the mean of the values at each."""
    places = np.unique(x)
    return places, np.array([values[x == place].mean() for place in places])


def _references(
    axes: Axes, rows: Sequence[Row], x: np.ndarray, lines: Sequence[np.ndarray], *, numeric: bool, joined: bool
) -> dict[str, Line2D]:
    """Draw the ceilings and the baseline; returns what the legend says.

    Each is drawn once where the rows at the same place agree on it, else for each line in the line's colour.
    """
    shares = {name: 100 * np.array([row.share(name) for row in rows]) for name in REFERENCES}
    same = np.allclose(shares["exact"], shares["oracle"], atol=0.005)
    drawn = {}
    for name, (label, style) in REFERENCES.items():
        if np.isnan(shares[name]).all() or (same and name == "oracle"):
            continue
        agree = len(lines) == 1 or all(np.ptp(shares[name][x == place]) <= AGREE for place in x)
        for i, own in enumerate([np.arange(len(rows))] if agree else lines):
            places, heights = _means(x[own], shares[name][own])
            line: dict[str, Any] = {**style, "color": style["color"] if agree else COLOURS[i], "zorder": 2}
            if numeric:
                axes.plot(places, heights, **line if joined else {**line, "linestyle": "none", "marker": "_"})
            else:
                axes.hlines(heights, places - 0.36, places + 0.36, **line)
        drawn["exact search = oracle" if same and name == "exact" else label] = Line2D([], [], **style)
    return drawn


def _label(value: Any) -> str:
    if isinstance(value, int) and is_number(value):
        return f"{value:,}"
    text = shown(value).replace("$", r"\$")  # which would begin a formula
    return text if len(text) <= 24 else f"…{text[-23:]}"  # the ends of paths tell them apart
