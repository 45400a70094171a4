"""Drawings for TensorBoard, from arrays to PNGs' pixels, and the counts that they show; no state of matplotlib's."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

# Okabe and Ito's palette, which the colour-blind tell apart; light and dark also differ in grey.
COLOURS = {"exact search": "#9a9a9a", "stage 1": "#0072b2", "pipeline": "#e69f00"}
RIGHT = "#009e73"
INK = "#222222"
DPI = 100
RANK_EDGES = (1, 2, 3, 4, 5, 10, 20, 50, 100, 1000)  # the last rank of each bin; one more is open
FEWEST = 1e-3  # the probability at which the heat map's colours begin
BARS = 8  # candidates that a query's panel has room for
TEXT = 34  # characters of a text
SHORT = 12  # characters of a name that is no text


class Reliability(NamedTuple):
    """What queries whose confidence falls in the same bin have in common; (bins,) each, NaN where there are none."""

    confidence: np.ndarray  # their mean
    accuracy: np.ndarray  # the share that is answered
    counts: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of the two, each bin weighed by its count."""
        gaps = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float((gaps * self.counts).sum() / self.counts.sum())


class Panel(NamedTuple):
    """One query's candidates, in stage 1's order."""

    title: str
    names: Sequence[str]  # of the k rows
    before: np.ndarray  # (k,) attention
    after: np.ndarray | None  # (k,) the pipeline's probabilities; None where there is no stage 2
    right: np.ndarray  # (k,) bool


def rank_histogram(ranks: np.ndarray, rows: int) -> tuple[list[str], np.ndarray]:
    """Names of the bins of ranks, 1 to 5 one by one and then ever wider ones up to `rows`, and how many fall in each.

    Args:
        ranks: (B,) from 1 to `rows`.
        rows: N.
    """
    last = np.array([edge for edge in RANK_EDGES if edge < rows] + [rows])
    first = np.append(1, last[:-1] + 1)
    names = [f"{a}" if a == b else f"{a:,}\u2013{b:,}" for a, b in zip(first, last, strict=True)]
    return names, np.bincount(np.searchsorted(last, ranks), minlength=len(last))


def reliability(confidences: np.ndarray, answered: np.ndarray, bins: int) -> Reliability:
    """Queries by the confidence of their answer, in equally wide bins of 0..1 that hold their upper ends.

    Args:
        confidences: (B,).
        answered: (B,), 1 where the answer is right, or its share of several right ones.
        bins: how many.
    """
    place = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (
            np.bincount(place, weights=values, minlength=bins) / count for values in (confidences, answered)
        )
    return Reliability(confidence, accuracy, count)


def matters(rows: np.ndarray, targets: np.ndarray, limit: int) -> np.ndarray:
    """Rows worth a column of the heat map: (c,), at most `limit`, the queries' targets and first rows side by side.

    Targets come before the best rows, and those before the second best, until there is no more room; they are shown
    in the order of the queries, so that the map has a diagonal.

    Args:
        rows: (n, k), best first.
        targets: (n, m), padded with -1.
        limit: at least 1.
    """
    chosen: dict[int, int] = {}  # the row, and the first query that named it
    for column in (*targets.T[:1], *rows.T, *targets.T[1:]):
        for query, row in enumerate(column.tolist()):
            if row >= 0 and len(chosen) < limit:
                chosen[row] = min(query, chosen.get(row, query))
    return np.array(sorted(chosen, key=chosen.__getitem__), dtype=np.int64)


def shortened(text: str, width: int = TEXT) -> str:
    """A text on one line of at most so many characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else f"{line[: width - 1].rstrip()}\u2026"


def draw_ranks(ranks: dict[str, np.ndarray], rows: int) -> np.ndarray:
    """Bars: the share of queries whose target has such a rank, a colour a method."""
    figure = _figure(13, 5.5)
    axes = figure.add_axes((0.065, 0.14, 0.92, 0.76))
    width = 0.84 / len(ranks)
    for place, (method, of_method) in enumerate(ranks.items()):
        names, counts = rank_histogram(of_method, rows)
        shares = 100 * counts / max(1, counts.sum())
        x = np.arange(len(names)) - 0.42 + width * (place + 0.5)
        axes.bar(x, shares, 0.94 * width, color=COLOURS[method], label=method)
        for at, share in zip(x, shares, strict=True):
            if share:
                text = f"{share:.0f}" if share >= 9.95 else f"{share:.1f}" if share >= 0.05 else "<.1"
                axes.text(at, share, text, ha="center", va="bottom", fontsize=9.5, color=INK)
    axes.set_xticks(np.arange(len(names)), names)
    _dress(axes, "Where the target is ranked", "rank of the target", "% of queries")
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=13, frameon=False, loc="upper right")
    return _pixels(figure)


def draw_reliability(bins: dict[str, Reliability]) -> np.ndarray:
    """A point a bin on the diagonal of honest probabilities, a panel a method; below it how many queries it holds."""
    figure = _figure(5.6 * len(bins), 6.6)
    for place, (method, found) in enumerate(bins.items()):
        left, width = (place + 0.14) / len(bins), 0.82 / len(bins)
        axes = figure.add_axes((left, 0.36, width, 0.55))
        axes.plot([0, 1], [0, 1], color="#777777", linestyle="--", linewidth=1.5)
        there = found.counts > 0
        axes.vlines(found.confidence[there], found.confidence[there], found.accuracy[there], COLOURS[method], alpha=0.5)
        axes.plot(
            found.confidence[there], found.accuracy[there], "o-", color=COLOURS[method], markersize=7, linewidth=2
        )
        axes.set(xlim=(0, 1), ylim=(0, 1))
        title = f"{method}: off by {100 * found.error:.1f} points on average"
        _dress(axes, title, "", "share that is right" if place == 0 else "")
        below = figure.add_axes((left, 0.11, width, 0.17))
        edges = np.linspace(0, 1, len(found.counts) + 1)
        below.bar(edges[:-1], found.counts, np.diff(edges), align="edge", color=COLOURS[method], edgecolor="white")
        below.set(xlim=(0, 1), ylim=(0, max(1, 1.08 * found.counts.max())))
        _dress(below, "", "probability of the answer", "queries" if place == 0 else "")
        below.yaxis.set_major_locator(_few())
    return _pixels(figure)


def draw_candidates(panels: Sequence[Panel]) -> np.ndarray:
    """A panel a query: its candidates' probabilities before and after reranking, the right one green and bold."""
    most = min(BARS, max(len(panel.names) for panel in panels))
    columns, bars = min(2, len(panels)), 2 if panels[0].after is not None else 1
    lines = -(-len(panels) // columns)
    head, tall = 0.6, 0.8 + most * (0.16 + 0.14 * bars)  # inches, of the legend and of a panel
    height = head + tall * lines
    left = 0.4 if max(len(name) for panel in panels for name in panel.names) > SHORT else 0.22  # of a panel: names
    figure = _figure((7.2 if left > 0.2 else 5.6) * columns, height)
    for place, panel in enumerate(panels):
        line, column = divmod(place, columns)
        bottom = height - head - tall * (line + 1) + 0.35
        box = ((column + left) / columns, bottom / height, (0.97 - left) / columns, (tall - 0.75) / height)
        _draw_panel(figure.add_axes(box), panel, _shown(panel), left)
    handles = [Patch(color=COLOURS["stage 1"], label="before: attention")]
    if bars == 2:
        handles.append(Patch(color=COLOURS["pipeline"], label="after reranking"))
    handles.append(Patch(color=RIGHT, label="\u2713 the right row"))
    figure.legend(handles=handles, loc="upper center", ncols=3, fontsize=13, frameon=False)
    return _pixels(figure)


def _shown(panel: Panel) -> np.ndarray:
    """The candidates that there is room for, in stage 1's order: the right ones, then the most probable."""
    largest = panel.before if panel.after is None else np.maximum(panel.before, panel.after)
    return np.sort(np.lexsort((-largest, ~panel.right))[:BARS])


def _draw_panel(axes: Axes, panel: Panel, shown: np.ndarray, left: float) -> None:
    kinds = [(panel.before, COLOURS["stage 1"])]
    if panel.after is not None:
        kinds.append((panel.after, COLOURS["pipeline"]))
    thick = 0.8 / len(kinds)
    for kind, (values, colour) in enumerate(kinds):
        y = np.arange(len(shown)) - 0.4 + thick * (kind + 0.5)
        axes.barh(y, values[shown], 0.92 * thick, color=colour)
        for at, value in zip(y, values[shown], strict=True):
            if value >= 0.005:  # letters take most of the time that drawing takes
                axes.text(value + 0.012, at, f"{value:.2f}", va="center", fontsize=9.5, color=INK)
    axes.set(xlim=(0, 1.12), ylim=(len(shown) - 0.5, -0.5))
    axes.set_xticks([0, 0.5, 1])
    names = [f"\u2713 {panel.names[i]}" if panel.right[i] else panel.names[i] for i in shown]
    axes.set_yticks(np.arange(len(shown)), names)
    _dress(axes, shortened(panel.title, 60), "", "", size=11, left=0.02 / (0.97 - left) - left / (0.97 - left))
    for label, i in zip(axes.get_yticklabels(), shown, strict=True):
        if panel.right[i]:
            label.set(color=RIGHT, fontweight="bold")
    axes.grid(axis="y", visible=False)


def draw_heat_map(
    maps: dict[str, np.ndarray], right: np.ndarray, queries: Sequence[str], rows: Sequence[str]
) -> np.ndarray:
    """Queries down, rows across, the probability as the darkness of a cell, a map a method; right rows framed.

    Args:
        maps: (n, c) probabilities by method.
        right: (n, c) bool.
        queries: n names.
        rows: c names.
    """
    n, c = right.shape
    wide, tall = max(5.0, 0.3 * c), 0.5 + 0.3 * n
    left, below = 1.4, 1.1 if max(map(len, rows)) <= SHORT else 2.4  # inches, of the names
    size = (left + wide + 1.2, below + (tall + 0.3) * len(maps))
    figure = _figure(*size)
    for place, (method, values) in enumerate(maps.items()):
        bottom = below + (len(maps) - 1 - place) * (tall + 0.3)
        axes = figure.add_axes((left / size[0], bottom / size[1], wide / size[0], (tall - 0.4) / size[1]))
        image = axes.imshow(
            np.maximum(values, FEWEST), cmap=_SHADES, norm=LogNorm(FEWEST, 1), aspect="auto", interpolation="nearest"
        )
        for y, x in np.argwhere(right):
            axes.add_patch(Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, edgecolor="#d55e00", linewidth=2.2))
        last = place == len(maps) - 1
        axes.set_xticks(np.arange(c), rows if last else [""] * c, rotation=90)
        axes.set_yticks(np.arange(n), queries)
        _dress(axes, f"{method}: probability of each row; the right ones are framed", "", "", size=11)
        axes.title.set_fontsize(13)
        axes.grid(visible=False)
    bar = figure.add_axes(((left + wide + 0.2) / size[0], below / size[1], 0.2 / size[0], 1 - (below + 0.7) / size[1]))
    figure.colorbar(image, cax=bar).set_ticks([FEWEST, 0.01, 0.1, 1], labels=[f"<{FEWEST:g}", "0.01", "0.1", "1"])
    bar.tick_params(labelsize=11)
    return _pixels(figure)


_SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#cfe3f2", "#5ba3cf", "#0a4d8c", "#04162e"])


def _figure(wide: float, tall: float) -> Figure:
    figure = Figure(figsize=(wide, tall), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=3, integer=True)


def _dress(axes: Axes, title: str, x: str, y: str, *, size: float = 13, left: float | None = None) -> None:
    """Letters large enough for a thumbnail, and lines that stay behind the data."""
    options: Any = {} if left is None else {"x": left}
    texts = [axes.set_title(title, fontsize=size + 1, loc="left", color=INK, **options)]
    texts += [axes.set_xlabel(x, fontsize=size, color=INK), axes.set_ylabel(y, fontsize=size, color=INK)]
    axes.tick_params(labelsize=size, colors=INK, length=0)
    texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
    for text in texts:
        text.set_parse_math(False)  # a dollar in a user's text is no formula
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bbbbbb")


def _pixels(figure: Figure) -> np.ndarray:
    """(height, width, 3) uint8."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of scripts that the font lacks: a box stands for them
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
