"""The figures that TensorBoard shows among its images, drawn from the content of examples.json."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nvf.evaluation.evaluate import BINS
from nvf.evaluation.report import NAMES
from nvf.runs.comparison.figure import STYLE as PLAIN

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"exact": "#9a9a9a", "attention": "#0072b2", "pipeline": "#e69f00"}
RIGHT, GREY, TICK = "#007a59", "#666666", "\u2713 "
STYLE: Any = {**PLAIN, "axes.grid.axis": "both"}
WIDTH = 5.2  # inches; TensorBoard's smallest cards have 365 x 400 or 450 x 210 pixels, in which letters have 9
ROWS, LETTERS = 5, 36  # candidates that a card has room for, and letters of a line beside the bars
LEFT = -1.35  # where lines begin, in units of probability
VERDICTS = {"won": "1_won", "lost": "2_lost", "same": "3_others"}


def draw(examples: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[str, Figure, int]]:
    """Yield each figure that the settings of conf/dashboards switch on, with its tag and its step.

    The queries that the last stage won are steps of one tag, those that it lost of another, the others of a third.
    """
    if settings["candidates"]:
        for verdict, tag in VERDICTS.items():
            of_verdict = [query for query in examples["queries"] if query["verdict"] == verdict]
            for step, query in enumerate(reversed(of_verdict)):  # the last step is the one that is shown at first
                yield f"figures/{tag}", _draw_query(query, examples["compared"]), step
    if settings["reliability"]:
        yield "figures/4_reliability", _draw_reliability(examples["reliability"]), 0


def shortened(text: str, width: int = LETTERS) -> str:
    """Return a text as one line of at most `width` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else f"{line[: width - 1].rstrip()}\u2026"


def _draw_query(query: Mapping[str, Any], compared: list[str]) -> Figure:
    """Draw a query's candidates, each with its text, the words that matched, and its probabilities by each stage."""
    shown = sorted(query["candidates"], key=lambda one: -(one["right"] + max(one["probabilities"].values())))[:ROWS]
    shown = [one for one in query["candidates"] if one in shown]
    figure = Figure((WIDTH, 0.9 + 0.36 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for y, one in enumerate(shown):
        _draw_candidate(axes, y, one)
    after, before = (query["ranks"][method] for method in compared)
    asked = f"query {query['query']}" if query["text"] is None else f"\u201c{shortened(query['text'], 60)}\u201d"
    verdict = "" if query["verdict"] == "same" else f", {query['verdict']}"
    title = f"{asked}\nright answer: rank {before:,} \u2192 {after:,}{verdict}"
    axes.set_title(title, fontweight="bold", in_layout=False)
    axes.spines.left.set_position(("data", 0))
    axes.spines.bottom.set_bounds(0, 1)
    axes.set(xlim=(LEFT, 1.15), ylim=(len(shown) - 0.5, -0.5), yticks=[])
    axes.set_xticks([0, 0.5, 1], ["0", "probability", "1"])
    handles = [Patch(color=COLOURS[of], label=NAMES[of]) for of in shown[0]["probabilities"]]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.02, 0), ncols=2, borderpad=0.3)
    return figure


def _draw_candidate(axes: Axes, y: int, one: Mapping[str, Any]) -> None:
    colour, words = RIGHT if one["right"] else "black", shortened(", ".join(one["words"]), LETTERS + 5)
    line: Any = {"x": LEFT, "va": "center", "in_layout": False}
    axes.text(y=y - 0.2 * bool(words), s=TICK * one["right"] + _named(one), color=colour, **line)
    axes.text(y=y + 0.24, s=words, color=GREY, fontsize=7.5, **line)
    thick = 0.84 / len(one["probabilities"])
    for place, (method, value) in enumerate(one["probabilities"].items()):
        at = y - 0.42 + thick * (place + 0.5)
        axes.barh(at, value, 0.9 * thick, color=COLOURS[method])
        axes.text(value + 0.01, at, f"{value:.2f}", va="center", fontsize=7)


def _named(one: Mapping[str, Any]) -> str:
    """Return a candidate's name in one line, and its text from a little before the first word that matched."""
    name, text = f"row {one['row']}" if one["id"] is None else str(one["id"]), one["text"]
    if text is None:
        return name
    at = text.lower().find(one["words"][0]) if one["words"] else 0
    if at > LETTERS // 2:
        text = "\u2026 " + text[at - LETTERS // 4 :].partition(" ")[2]
    return shortened(f"{name}: {text}")


def _draw_reliability(reliability: Mapping[str, Any]) -> Figure:
    """Draw accuracy over confidence, which agree on the diagonal, and the number of queries in each bin below."""
    figure = Figure((WIDTH, 2.7), layout="constrained")
    grid = figure.subplots(2, len(reliability), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for (method, bins), (above, below) in zip(reliability.items(), grid.T, strict=True):
        means = np.array([bins["confidence"], bins["share_right"]], dtype=float)
        above.plot([0, 1], [0, 1], "--", color="#777777")
        above.plot(*means[:, ~np.isnan(means[0])], "o-", color=COLOURS[method], markersize=4)
        above.set(title=f"{NAMES[method]}: off by {100 * bins['error']:.1f} points", xlim=(0, 1), ylim=(0, 1))
        below.bar((np.arange(BINS) + 0.5) / BINS, bins["queries"], 1 / BINS, color=COLOURS[method], ec="white")
        below.set(xlabel="probability of the answer", xticks=[0, 0.5, 1])
        below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    grid[0, 0].set(ylabel="share that is right")
    grid[1, 0].set(ylabel="queries")
    return figure
