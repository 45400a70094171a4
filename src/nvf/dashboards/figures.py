"""The figures that TensorBoard shows among its images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy.stats import binned_statistic

from nvf.dashboards.examples import exemplary
from nvf.evaluation.evaluate import BINS, Evaluation, Outcomes
from nvf.evaluation.report import NAMES

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"exact": "#9a9a9a", "attention": "#0072b2", "pipeline": "#e69f00"}
RIGHT, TICK = "#009e73", "\u2713 "
STYLE: Any = {  # large letters, for thumbnails
    "text.parse_math": False,  # a dollar in a user's text is no formula
    "figure.constrained_layout.use": True,
    "font.size": 13,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
}
BARS = 8  # candidates that a query's panel has room for
Name = Callable[[int], str]  # names a row


def draw(found: Evaluation, settings: Mapping[str, Any], texts: Sequence[str] | None) -> Iterator[tuple[str, Figure]]:
    """Yield each figure that the settings of conf/dashboards switch on, with its tag."""

    def name(row: int) -> str:
        return f"row {row}" if texts is None else shortened(f"{row}: {texts[row]}")

    if settings["candidates"]:
        chosen = exemplary(found.outcomes, settings["queries"])
        yield "figures/1_candidates", _draw_candidates(found.outcomes, chosen, name)
    if settings["reliability"]:
        yield "figures/2_reliability", _draw_reliability(found)


def shortened(text: str, width: int = 26) -> str:
    """Return a text as one line of at most `width` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else f"{line[: width - 1].rstrip()}\u2026"


def _draw_candidates(outcomes: Outcomes, chosen: np.ndarray, name: Name) -> Figure:
    """Draw a panel for each query: its candidates' probabilities before and after reranking, the right ones green."""
    methods, columns = outcomes.probabilities, min(2, len(chosen))
    lines = -(-len(chosen) // columns)
    tall = 0.9 + min(BARS, outcomes.candidates.shape[1]) * (0.16 + 0.14 * len(methods))  # inches
    figure = Figure((7.2 * columns, 0.6 + tall * lines))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, query in zip(grid.flat, chosen.tolist(), strict=False):
        _draw_panel(axes, outcomes, query, name)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    handles = [Patch(color=COLOURS[method], label=NAMES[method]) for method in methods]
    handles.append(Patch(color=RIGHT, label=f"{TICK}the right row"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _draw_panel(axes: Axes, outcomes: Outcomes, query: int, name: Name) -> None:
    probabilities = {method: of[query].numpy() for method, of in outcomes.probabilities.items()}
    right, rows = outcomes.right[query].numpy(), outcomes.candidates[query].tolist()
    largest = np.max([*probabilities.values()], axis=0)
    shown = np.sort(np.lexsort((-largest, ~right))[:BARS])  # the right ones, then the most probable
    thick = 0.8 / len(probabilities)
    for place, (method, values) in enumerate(probabilities.items()):
        y = np.arange(len(shown)) - 0.4 + thick * (place + 0.5)
        bars = axes.barh(y, values[shown], 0.92 * thick, color=COLOURS[method])
        axes.bar_label(bars, [f"{v:.2f}" if v >= 0.005 else "" for v in values[shown]], padding=2, fontsize=9)
    after, before = (int(outcomes.ranks[method][query]) for method in outcomes.compared)
    verdict = ", won" if after == 1 < before else ", lost" if before == 1 < after else ""
    axes.set_title(f"query {query}: rank {before:,} \u2192 {after:,}{verdict}", loc="right", fontsize=12)
    axes.set(xlim=(0, 1.12), ylim=(len(shown) - 0.5, -0.5), xticks=[0, 0.5, 1])
    axes.set_yticks(np.arange(len(shown)), [(TICK if right[i] else "") + name(rows[i]) for i in shown], fontsize=11)
    for label, i in zip(axes.get_yticklabels(), shown, strict=True):
        if right[i]:
            label.set(color=RIGHT, fontweight="bold")
    axes.grid(axis="y", visible=False)


def _draw_reliability(found: Evaluation) -> Figure:
    """Draw accuracy over confidence, which agree on the diagonal, and the number of queries in each bin below."""
    errors = found.figures["calibration_error"]
    figure = Figure((5.6 * len(errors), 6.6))
    grid = figure.subplots(2, len(errors), squeeze=False, sharex=True, height_ratios=(3, 1))
    for (method, error), (above, below) in zip(errors.items(), grid.T, strict=True):
        confidences = found.outcomes.confidences[method].numpy()
        values = [confidences, found.outcomes.share_right(method).numpy()]
        means = binned_statistic(confidences, values, bins=BINS, range=(0, 1)).statistic  # (2, bins)
        above.plot([0, 1], [0, 1], "--", color="#777777")
        above.plot(*means[:, ~np.isnan(means[0])], "o-", color=COLOURS[method])
        above.set(title=f"{NAMES[method]}: off by {100 * error['value']:.1f} points on average")
        above.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
        below.hist(confidences, BINS, range=(0, 1), color=COLOURS[method], ec="white")
        below.set(xlabel="probability of the answer", ylabel="queries")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure
