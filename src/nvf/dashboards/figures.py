"""The figures that TensorBoard shows among its images, and what they count."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from scipy.stats import binned_statistic

from nvf.evaluation.report import NAMES

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"exact": "#9a9a9a", "attention": "#0072b2", "pipeline": "#e69f00"}
RIGHT, FRAME = "#009e73", "#d55e00"
STYLE: Any = {  # large letters, for thumbnails
    "text.parse_math": False,  # a dollar in a user's text is no formula
    "figure.constrained_layout.use": True,
    "font.size": 13,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
LAST_RANKS = (1, 2, 3, 4, 5, 10, 20, 50, 100, 1000)  # of each bin of the histogram; a last bin holds the deeper ones
LEAST = 1e-3  # the probability at which the heat map's colours begin
BARS = 8  # candidates that a query's panel has room for


class Panel(NamedTuple):
    """One query's k candidates, in stage 1's order."""

    title: str
    names: Sequence[str]
    probabilities: Mapping[str, np.ndarray]  # (k,) by method
    right: np.ndarray  # (k,) bool


def rank_histogram(ranks: np.ndarray, rows: int) -> tuple[list[str], np.ndarray]:
    """Count ranks, (B,), in bins: 1 to 5 one by one, then ever wider ones up to `rows`; returns names and counts."""
    last = np.array([rank for rank in LAST_RANKS if rank < rows] + [rows])
    first = np.append(1, last[:-1] + 1)
    names = [f"{a}" if a == b else f"{a:,}\u2013{b:,}" for a, b in zip(first, last, strict=True)]
    return names, np.bincount(np.searchsorted(last, ranks), minlength=len(last))


def heat_map_columns(candidates: np.ndarray, targets: np.ndarray, limit: int) -> np.ndarray:
    """The rows that the heat map shows, (c,): targets, (n, m), before best candidates, (n, k), up to a limit.

    They are ordered by the first query that names them, so that the map has a diagonal.
    """
    named = np.concatenate([targets[:, :1], candidates, targets[:, 1:]], axis=1)
    rows = np.array([row for row in dict.fromkeys(named.T.flat) if row >= 0][:limit])
    first = [(named == row).any(axis=1).argmax() for row in rows]
    return rows[np.argsort(first, kind="stable")]


def draw_ranks(ranks: Mapping[str, np.ndarray], rows: int) -> Figure:
    """Draw the share of queries whose target has each rank: bars, one colour for each method."""
    figure = Figure((13, 5.5))
    axes = figure.subplots()
    width = 0.84 / len(ranks)
    for place, (method, of_method) in enumerate(ranks.items()):
        names, counts = rank_histogram(of_method, rows)
        shares = 100 * counts / counts.sum()
        x = np.arange(len(names)) - 0.42 + width * (place + 0.5)
        bars = axes.bar(x, shares, 0.94 * width, color=COLOURS[method], label=NAMES[method])
        axes.bar_label(bars, [f"{share:.1f}" if share else "" for share in shares], fontsize=9)
    axes.set_xticks(np.arange(len(names)), names)
    axes.set(title="Where the target is ranked", xlabel="rank of the target", ylabel="% of queries")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def draw_reliability(
    confidences: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray], errors: Mapping[str, float], bins: int
) -> Figure:
    """Draw accuracy over confidence, and below it how many queries each of the bins holds; a column for each method.

    Honest probabilities lie on the diagonal. Confidences and what they should be are (B,); the titles name the errors.
    """
    figure = Figure((5.6 * len(confidences), 6.6))
    grid = figure.subplots(2, len(confidences), squeeze=False, sharex=True, height_ratios=(3, 1))
    for method, (above, below) in zip(confidences, grid.T, strict=True):
        values = [confidences[method], right[method]]
        means = binned_statistic(confidences[method], values, bins=bins, range=(0, 1)).statistic  # (2, bins)
        above.plot([0, 1], [0, 1], "--", color="#777777")
        above.plot(*means[:, ~np.isnan(means[0])], "o-", color=COLOURS[method])
        above.set(title=f"{NAMES[method]}: off by {100 * errors[method]:.1f} points on average")
        above.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
        below.hist(confidences[method], bins, range=(0, 1), color=COLOURS[method], ec="white")
        below.set(xlabel="probability of the answer", ylabel="queries")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


def draw_candidates(panels: Sequence[Panel]) -> Figure:
    """Draw a panel for each query: its candidates' probabilities before and after reranking, the right ones green."""
    methods = panels[0].probabilities
    shown = [shown_candidates(panel) for panel in panels]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    tall = 0.9 + max(map(len, shown)) * (0.16 + 0.14 * len(methods))  # inches
    figure = Figure((7.2 * columns, 0.6 + tall * lines))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, panel, of_panel in zip(grid.flat, panels, shown, strict=False):
        _draw_panel(axes, panel, of_panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    labels = {"attention": "before: attention", "pipeline": "after reranking"}
    handles = [Patch(color=COLOURS[method], label=labels[method]) for method in methods]
    handles.append(Patch(color=RIGHT, label="\u2713 the right row"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def shown_candidates(panel: Panel) -> np.ndarray:
    """The candidates that a panel has room for, in stage 1's order: the right ones, then the most probable."""
    largest = np.max([*panel.probabilities.values()], axis=0)
    return np.sort(np.lexsort((-largest, ~panel.right))[:BARS])


def _draw_panel(axes: Axes, panel: Panel, shown: np.ndarray) -> None:
    thick = 0.8 / len(panel.probabilities)
    for place, (method, probabilities) in enumerate(panel.probabilities.items()):
        values, y = probabilities[shown], np.arange(len(shown)) - 0.4 + thick * (place + 0.5)
        bars = axes.barh(y, values, 0.92 * thick, color=COLOURS[method])
        axes.bar_label(bars, [f"{value:.2f}" if value >= 0.005 else "" for value in values], padding=2, fontsize=9)
    axes.set(xlim=(0, 1.12), ylim=(len(shown) - 0.5, -0.5), xticks=[0, 0.5, 1])
    axes.set_title(panel.title, loc="right", fontsize=12)
    axes.set_yticks(
        np.arange(len(shown)), [f"\u2713 {panel.names[i]}" if panel.right[i] else panel.names[i] for i in shown]
    )
    for label, i in zip(axes.get_yticklabels(), shown, strict=True):
        label.set(fontsize=11, **({"color": RIGHT, "fontweight": "bold"} if panel.right[i] else {}))
    axes.grid(axis="y", visible=False)


def draw_heat_map(
    maps: Mapping[str, np.ndarray], right: np.ndarray, queries: Sequence[str], rows: Sequence[str]
) -> Figure:
    """Draw a map for each method: n queries down, c rows across, the darker the more probable, right rows framed."""
    n, c = right.shape
    figure = Figure((3 + max(5, 0.3 * c), (0.7 + 0.3 * n) * len(maps) + 0.09 * max(map(len, rows))))
    grid = figure.subplots(len(maps), squeeze=False, sharex=True)[:, 0]
    for axes, (method, values) in zip(grid, maps.items(), strict=True):
        image = axes.imshow(np.maximum(values, LEAST), cmap="Blues", norm=LogNorm(LEAST, 1), aspect="auto")
        for y, x in np.argwhere(right):
            axes.add_patch(Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, edgecolor=FRAME, linewidth=2))
        axes.set_xticks(np.arange(c), rows, rotation=90, fontsize=11)
        axes.set_yticks(np.arange(n), queries, fontsize=11)
        axes.set_title(f"{NAMES[method]}: probability of each row; the right ones are framed")
        axes.grid(visible=False)
    figure.colorbar(image, ax=grid, format="%g", label=f"probability; {LEAST:g} and less are white")
    return figure
