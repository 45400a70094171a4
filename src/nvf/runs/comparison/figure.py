"""The figure of a comparison: a panel a setting, with what bounds the figures; no state of matplotlib's is left."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nvf.files.atomic import written_whole
from nvf.runs.comparison.runs import Row
from nvf.runs.comparison.settings import MISSING, canonical, is_number, order, shown
from nvf.statistics import METRICS

if TYPE_CHECKING:
    from nvf.runs.comparison.table import Comparison

MOST_PANELS, MOST_LINES = 6, 8
AGREE = 0.5  # percent by which reference lines of rows at the same place may differ
MOST_TICKS = 12  # for more values than these, the axis is marked at round numbers
LOG_FROM = 30  # times the smallest value: from there on, an axis is logarithmic
# Okabe and Ito's palette, which the colour-blind tell apart, without the grey and black of the references.
COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a6d00", "#5b3a8e")
MARKERS = "osD^vP<>"
INK = "#222222"
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("exact search", {"color": "#8a8a8a", "linestyle": "-"}),
    "oracle": ("oracle", {"color": "#222222", "linestyle": (0, (1, 1.5))}),
    "coverage": ("coverage", {"color": "#6a6a6a", "linestyle": (0, (5, 2))}),
}
Part = tuple[str, list[int]]  # the label of a line, and which rows are its points


class Line(NamedTuple):
    """What one line shows: places on the x axis, and percent with the ends of the error bars, (points,) each."""

    x: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Scale(NamedTuple):
    """Where the values of a setting lie on the x axis."""

    places: dict[str, float]  # by the value's canonical form
    labels: list[str]
    numeric: bool

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Scale":
        """Numbers where they are, anything else at 0, 1, 2 and so on, numbers first."""
        distinct = {canonical(value): value for value in values}
        ordered = sorted(distinct.items(), key=lambda item: order(item[1]))
        numeric = all(is_number(value) for value in distinct.values())
        places = {key: float(value) if numeric else float(i) for i, (key, value) in enumerate(ordered)}
        return cls(places, [_label(value) for _, value in ordered], numeric)


def save(comparison: "Comparison", folder: Path) -> None:
    """Write comparison.png and comparison.svg, the same bytes for the same comparison."""
    figure = draw(comparison)
    options: dict[str, dict[str, Any]] = {"png": {"dpi": 160}, "svg": {"metadata": {"Date": None}}}
    with matplotlib.rc_context({"svg.hashsalt": "nvf"}):
        for ending, how in options.items():
            with written_whole(folder / f"comparison.{ending}") as partial:
                figure.savefig(partial, format=ending, facecolor="white", **how)


def draw(comparison: "Comparison") -> Figure:
    """A panel for each of the first settings that differ; without any, one of the seeds."""
    rows, columns = list(comparison.rows), list(comparison.columns)
    metric = METRICS[comparison.metric]
    panels = columns[:MOST_PANELS] or ["seed"]
    if not columns:
        rows = [Row.of([run]) for run in rows[0].runs]
    across = min(len(panels), 3 if len(panels) != 4 else 2)
    down = math.ceil(len(panels) / across)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(max(5.4 * across, 6.4), 3.7 * down + 1.1), layout="constrained")
        grid = [axes for line in figure.subplots(down, across, squeeze=False, sharey=True) for axes in line]
        drawn: dict[str, Any] = {}
        for column, axes in zip(panels, grid, strict=False):
            others = [name for name in columns if name != column]
            drawn |= _panel(axes, rows, column, others, comparison.rows[0])
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes in grid[::across]:
            axes.set_ylabel(f"test {metric}, %")
        bottom, top = grid[0].get_ylim()
        grid[0].set_ylim(max(bottom, -3), min(top, 103))
        figure.suptitle(_title(comparison, len(panels)), color=INK, fontsize=11)
        if drawn:
            figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=6, frameon=False)
    return figure


def _title(comparison: "Comparison", panels: int) -> str:
    counts = sorted({len(row.runs) for row in comparison.rows})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    interval = "95% interval over the test queries" if counts[-1] == 1 else "mean and 95% interval"
    title = f"Test {METRICS[comparison.metric]} of {comparison.fitted}: "
    if not comparison.columns:
        return f"{title}each seed, with its 95% interval over the test queries"
    title += f"{seeds} seed{'s' * (counts != [1])} a setting, {interval}"
    left = len(comparison.columns) - panels
    return f"{title}\n{panels} of {len(comparison.columns)} settings that differ; the table has all" if left else title


def _panel(axes: Axes, rows: Sequence[Row], column: str, others: Sequence[str], best: Row) -> dict[str, Any]:
    """Draw one setting's panel; returns what the figure's legend says of it."""
    if column == "seed":
        names = [_label(row.runs[0].seeds.get("seed", MISSING)) for row in rows]
        x = np.arange(len(rows))
        scale = Scale({name: float(i) for i, name in enumerate(map(str, x))}, names, False)
    else:
        scale = Scale.of([row.value(column) for row in rows])
        x = np.array([scale.places[canonical(row.value(column))] for row in rows])
    parts, note = _parts(rows, x, others)
    colours = _colours(parts, rows, others)
    dodge = 0.0 if scale.numeric else min(0.12, 0.6 / len(parts))
    shifts = dodge * (np.arange(len(parts)) - (len(parts) - 1) / 2)
    alone = len(parts) == 1 and len(others) > 0 and not note  # single points, drawn at random
    joined = scale.numeric and not alone
    drawn, undrawn = _references(axes, rows, x, scale.numeric, joined)
    for i, (label, own) in enumerate(parts):
        line = _mean_line(rows, x) if note else _line(rows, x, own)
        axes.errorbar(
            line.x + shifts[i],
            line.middle,
            yerr=[(line.middle - line.low).clip(0), (line.high - line.middle).clip(0)],  # a file may say anything
            color=colours[i],
            marker=MARKERS[i],
            markersize=5,
            linestyle="-" if joined else "none",
            linewidth=1.6,
            elinewidth=1.1,
            capsize=2.5,
            label=label,
            zorder=3,
        )
        if "coverage" in undrawn and not note:  # each line under a ceiling of its own
            heights = np.array([100 * rows[j].share("coverage") for j in own])
            if joined:
                axes.plot(x[own], heights, color=colours[i], linewidth=0.9, alpha=0.7, linestyle=(0, (5, 2)), zorder=2)
            else:
                axes.plot(x[own] + shifts[i], heights, "_", color=colours[i], markersize=8, zorder=2)
            drawn["coverage"] = Line2D([], [], **REFERENCES["coverage"][1])
        if best in rows and not note and rows.index(best) in own and column != "seed":
            place, height = x[rows.index(best)] + shifts[i], 100 * best.share("test")
            drawn["best on validation"] = axes.plot(place, height, "*", markersize=14, mfc="none", mec=INK, zorder=4)[0]
    if len(parts) > 1:
        legend = {"fontsize": 7.5, "title_fontsize": 7.5, "frameon": False, "alignment": "left"}
        axes.legend(title=", ".join(others), loc="upper left", bbox_to_anchor=(1.0, 1.0), **legend)
    if missing := [REFERENCES[name][0] for name in undrawn if name not in drawn]:
        note = "\n".join(filter(None, [note, f"not drawn (varying): {', '.join(missing)}"]))
    _dress(axes, scale, column, note)
    return drawn


def _parts(rows: Sequence[Row], x: np.ndarray, others: Sequence[str]) -> tuple[list[Part], str]:
    """The rows that share a line: those of a combination of the other settings, or all of them.

    Returns:
        The parts, points from left to right, and what the panel must say where the line is a mean.
    """
    combinations: dict[tuple[str, ...], list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: ([order(rows[i].value(name)) for name in others], x[i])):
        combinations.setdefault(tuple(canonical(rows[i].value(name)) for name in others), []).append(i)
    longest = max(map(len, combinations.values()))
    if len(combinations) == 1 or (len(combinations) <= MOST_LINES and longest > 1):
        return [
            (", ".join(_label(rows[own[0]].value(name)) for name in others), own) for own in combinations.values()
        ], ""
    everything = [("", sorted(range(len(rows)), key=lambda i: x[i]))]
    if len(set(x)) == len(rows):  # drawn at random, or each tried once: nothing to average
        return everything, ""
    return everything, "mean over the other settings (bars: their range)"


def _colours(parts: Sequence[Part], rows: Sequence[Row], others: Sequence[str]) -> Sequence[Any]:
    """One a line; numbers get lighter as they grow."""
    numbers = len(others) == 1 and len(parts) > 1 and all(is_number(row.value(others[0])) for row in rows)
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(parts)))) if numbers else COLOURS


def _line(rows: Sequence[Row], x: np.ndarray, own: Sequence[int]) -> Line:
    tests = [rows[i].figures["test"] for i in own]
    ends = 100 * np.array([[math.nan] * 3 if test is None else [*test.values()] for test in tests])
    return Line(x[own], *ends.T)


def _mean_line(rows: Sequence[Row], x: np.ndarray) -> Line:
    places = np.unique(x)
    tests = [np.array([100 * row.share("test") for row, at in zip(rows, x, strict=True) if at == p]) for p in places]
    return Line(places, *(np.array([f(test) for test in tests]) for f in (np.mean, np.min, np.max)))


def _references(
    axes: Axes, rows: Sequence[Row], x: np.ndarray, numeric: bool, joined: bool
) -> tuple[dict[str, Any], list[str]]:
    """Draw the ceilings and the baseline where the rows at each place agree on them.

    Returns:
        What the legend says of them, and the names of those on which they do not agree.
    """
    shares = {name: 100 * np.array([row.share(name) for row in rows]) for name in REFERENCES}
    same = np.allclose(shares["exact"], shares["oracle"], atol=0.005)
    drawn, undrawn = {}, []
    for name in ("exact", "coverage") if same else REFERENCES:
        label, how = REFERENCES[name]
        there = ~np.isnan(shares[name])
        places = np.unique(x[there])
        found = [shares[name][there & (x == place)] for place in places]
        alone = numeric and not joined and len(places) > 1 and np.ptp(np.concatenate(found)) > AGREE
        if alone or any(np.ptp(heights) > AGREE for heights in found):
            undrawn.append(name)
            continue
        heights = np.array([heights.mean() for heights in found])
        if not len(heights):
            continue
        constant = np.ptp(heights) < 0.05 and len(places) == len(np.unique(x))
        if numeric:
            ends = places
        elif constant:
            ends, heights = np.array([x.min() - 0.5, x.max() + 0.5]), heights[[0, 0]]
        else:
            ends, heights = np.array([places - 0.36, places + 0.36]), np.array([heights, heights])
        label = "exact search = oracle" if same and name == "exact" else label
        drawn[label] = axes.plot(ends, heights, linewidth=1.4, zorder=2, **how)[0]
    return drawn, undrawn


def _dress(axes: Axes, scale: Scale, column: str, note: str) -> None:
    """Name the axis, and put its marks where there are values."""
    places = np.array(list(scale.places.values()))
    axes.set_xlabel(column, color=INK)
    axes.set_title(note, fontsize=8, color="#666666")
    if scale.numeric:
        log = places.min() > 0 and places.max() > LOG_FROM * places.min()
        if log:
            axes.set_xscale("log")
        if len(places) <= MOST_TICKS:
            on_axis = np.log(places) if log else places
            room = np.ptp(on_axis) / 40  # for a character
            keep: list[int] = []
            for i in range(len(places)):
                if not keep or on_axis[i] - on_axis[keep[-1]] >= room * (len(scale.labels[i]) + 1):
                    keep.append(i)
            axes.set_xticks(places[keep], [scale.labels[i] for i in keep])
            axes.minorticks_off()
    else:
        long = sum(map(len, scale.labels)) > 50
        turn: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes.set_xticks(places, scale.labels, **turn)
        axes.set_xlim(places.min() - 0.6, places.max() + 0.6)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelleft=True)


def _label(value: Any) -> str:
    if isinstance(value, int) and is_number(value):
        return f"{value:,}"
    text = shown(value).replace("$", r"\$")  # which would begin a formula
    return text if len(text) <= 24 else f"…{text[-23:]}"  # the ends of paths tell them apart
