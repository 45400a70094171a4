"""The figures that TensorBoard shows among its images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from scipy.stats import binned_statistic

from nvf.data.queries import QueryBatch, each
from nvf.evaluation.evaluate import BINS, Evaluation, Outcomes
from nvf.evaluation.report import NAMES
from nvf.models.attention import SoftAttention
from nvf.models.pipeline import Pipeline

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
FIRST_RANKS = (1, 2, 3, 4, 5, 6, 11, 21, 51, 101, 1001)  # of each bin of the histogram
LEAST = 1e-3  # the probability at which the heat map's colours begin
BARS = 8  # candidates that a query's panel has room for
Name = Callable[[int], str]  # names a row


def draw(
    model: SoftAttention | Pipeline,
    batch: QueryBatch,
    found: Evaluation,
    settings: Mapping[str, Any],
    texts: Sequence[str] | None,
) -> Iterator[tuple[str, Figure]]:
    """Yield each figure that the settings of conf/dashboards switch on, with its tag."""
    chosen = exemplary(found.outcomes, settings["queries"])

    def name(row: int) -> str:
        return f"row {row}" if texts is None else shortened(f"{row}: {texts[row]}")

    if settings["candidates"]:
        yield "figures/1_candidates", _draw_candidates(found.outcomes, chosen, name)
    if settings["heat_map"]:
        yield (
            "figures/2_attention",
            _draw_heat_map(model, each(batch, itemgetter(chosen)), found.outcomes, chosen, name),
        )
    if settings["ranks"]:
        yield "figures/3_ranks", _draw_ranks(found.outcomes.ranks, len(model.memory))
    if settings["reliability"]:
        yield "figures/4_reliability", _draw_reliability(found)


def exemplary(outcomes: Outcomes, count: int) -> np.ndarray:
    """Choose at most `count` queries: up to a third that the last stage won, as many that it lost, then others."""
    now, was = ((outcomes.ranks[method] == 1).numpy() for method in outcomes.compared)
    third = -(-count // 3)
    chosen = [*(now & ~was).nonzero()[0][:third], *(was & ~now).nonzero()[0][:third]]
    return np.array([*dict.fromkeys([*chosen, *(now == was).nonzero()[0], *range(len(now))])][:count])


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


def _draw_heat_map(
    model: SoftAttention | Pipeline, batch: QueryBatch, outcomes: Outcomes, chosen: np.ndarray, name: Name
) -> Figure:
    """Draw each stage's probabilities of the rows that are a query's first target or one of its first candidates."""
    if isinstance(model, Pipeline):
        answer = model(batch.queries, batch.words, answer=False)
        logits = {"attention": answer.logits, "pipeline": answer.log_probs}
    else:
        logits = {"attention": model(batch.queries, batch.words)}
    targets = outcomes.targets.numpy()[chosen]
    named = np.concatenate([targets[:, :1], outcomes.candidates.numpy()[chosen]], axis=1)[:, : 40 // len(chosen)]
    columns = np.array([row for row in dict.fromkeys(named.flat) if row >= 0])
    right = (targets[:, None, :] == columns[None, :, None]).any(axis=-1)  # (n, c)
    names = [name(row) for row in columns.tolist()]
    figure = Figure((3 + max(5, 0.3 * len(columns)), (0.7 + 0.3 * len(chosen)) * len(logits) + 2))
    grid = figure.subplots(len(logits), squeeze=False, sharex=True)[:, 0]
    for axes, (method, of_rows) in zip(grid, logits.items(), strict=True):
        values = of_rows.softmax(dim=-1).cpu().numpy()[:, columns]
        image = axes.imshow(np.maximum(values, LEAST), cmap="Blues", norm=LogNorm(LEAST, 1), aspect="auto")
        for y, x in np.argwhere(right):
            axes.add_patch(Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, edgecolor="#d55e00", linewidth=2))
        axes.set_xticks(np.arange(len(columns)), names, rotation=90, fontsize=11)
        axes.set_yticks(np.arange(len(chosen)), [f"query {query}" for query in chosen], fontsize=11)
        axes.set_title(f"{NAMES[method]}: probability of each row; the right ones are framed")
        axes.grid(visible=False)
    figure.colorbar(image, ax=grid, format="%g", label=f"probability; {LEAST:g} and less are white")
    return figure


def _draw_ranks(ranks: Mapping[str, torch.Tensor], rows: int) -> Figure:
    """Draw the share of queries whose target has each rank, by every method but the oracle."""
    figure = Figure((13, 5.5))
    axes = figure.subplots()
    methods = [method for method in COLOURS if method in ranks]
    width = 0.84 / len(methods)
    for place, method in enumerate(methods):
        names, counts = rank_histogram(ranks[method].numpy(), rows)
        shares = 100 * counts / counts.sum()
        x = np.arange(len(names)) - 0.42 + width * (place + 0.5)
        bars = axes.bar(x, shares, 0.94 * width, color=COLOURS[method], label=NAMES[method])
        axes.bar_label(bars, [f"{share:.1f}" if share else "" for share in shares], fontsize=9)
    axes.set_xticks(np.arange(len(names)), names)
    axes.set(title="Where the target is ranked", xlabel="rank of the target", ylabel="% of queries")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def rank_histogram(ranks: np.ndarray, rows: int) -> tuple[list[str], np.ndarray]:
    """Count ranks, (B,), in bins: 1 to 5 one by one, then ever wider ones up to `rows`; return names and counts."""
    edges = [rank for rank in FIRST_RANKS if rank <= rows] + [rows + 1]
    names = [f"{a}" if b == a + 1 else f"{a:,}\u2013{b - 1:,}" for a, b in pairwise(edges)]
    return names, np.histogram(ranks, edges)[0]


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
