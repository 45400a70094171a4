"""The tables and the figure of docs/performance.md, from what the other benchmarks have written.

    python tests/benchmarks/performance.py [folder=outputs/benchmarks] [figure=docs/images/performance.png]

What has not been measured is left out.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

import factored
import hnsw
import loops
import recipes
import sampling
import scale
import search_speed
from nvf.files.atomic import atomic_write
from nvf.options import Option, parse, path
from nvf.train import CONF
from timing import OUTPUTS

BENCHMARKS = {
    "recipes": ("Time to a goal", recipes.report),
    "loops": ("Lightning's share of a step", loops.report),
    "search_speed": ("Search", search_speed.report),
    "hnsw": ("An approximate first stage", hnsw.report),
    "factored": ("The reranker's first layer", factored.report),
    "scale": ("A training step over N", scale.report),
    "sampling": ("The sampled loss", sampling.report),
}
OPTIONS = (
    Option("folder", "of the benchmarks' figures", OUTPUTS, path),
    Option("figure", "the picture", CONF.parent / "docs" / "images" / "performance.png", path),
)
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)  # of ratios
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
MARKERS = "osD^v"
COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a6d00", "#5b3a8e")
INK = "#222222"
LOOKS = {"exact": ("#0072b2", "o"), "plain": ("#d55e00", "s"), "sampled": ("#009e73", "D")}
REFERENCE = {"color": "#6a6a6a", "linewidth": 1.2, "zorder": 1}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What each benchmark wrote."""
    there = {name: folder / f"{name}.json" for name in BENCHMARKS}
    return {name: json.loads(file.read_text()) for name, file in there.items() if file.exists()}


def tables(records: Mapping[str, Mapping[str, Any]]) -> str:
    """A section a benchmark: its tables, and what they were measured on."""
    sections = []
    for name, record in records.items():
        title, report = BENCHMARKS[name]
        machine = record["machine"]
        where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['ram_gb']:g} GB"
        what = ", ".join(f"{package} {number}" for package, number in record["versions"].items() if number)
        about = f"`python tests/benchmarks/{name}.py`, {record['date'][:10]}; {where}; {what}."
        sections.append(f"## {title}\n\n{about}\n\n{report(record['figures'])}")
    return "\n\n".join(sections)


def draw(records: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Search next to FAISS over N, and a step's time and memory over N."""
    panels: list[Callable[[Axes], None]] = []
    if "search_speed" in records:
        cases = records["search_speed"]["figures"]
        panels += [
            lambda axes: _ratios(axes, cases, "memory_to_flat", "Exact search, next to FAISS flat"),
            lambda axes: _ratios(axes, cases, "pipeline_to_parts", "Pipeline, next to FAISS flat + the reranker"),
        ]
    if "scale" in records:
        steps = records["scale"]["figures"]["cases"]
        panels += [lambda axes: _times(axes, steps), lambda axes: _sizes(axes, steps)]
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9.6, 3.7 * max(1, len(panels) // 2)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr]
        if panels:
            grid = figure.subplots(len(panels) // 2, 2, squeeze=False).flat
            for axes, panel in zip(grid, panels, strict=True):
                panel(axes)
    return figure


def _ratios(axes: Axes, cases: Sequence[Mapping[str, Any]], ratio: str, title: str) -> None:
    """A line for each batch and dimension."""
    batches = sorted({case["batch"] for case in cases})
    dims = sorted({case["dim"] for case in cases})
    drawn = []
    for colour, marker, batch in zip(COLOURS, MARKERS, batches, strict=False):
        for dashes, dim in zip(DASHES, dims, strict=False):
            own = sorted((c["rows"], c[ratio]) for c in cases if (c["batch"], c["dim"]) == (batch, dim))
            filled = {"markerfacecolor": colour if dim == dims[0] else "white"}
            axes.plot(*zip(*own, strict=True), color=colour, linestyle=dashes, **_line(marker), **filled)
            drawn.append((Line2D([], [], color=colour, linestyle=dashes, **_line(marker), **filled), f"{batch}, {dim}"))
    axes.axhline(1, **REFERENCE)
    axes.set_yscale("log")
    every = [case[name] for case in cases for name in ("memory_to_flat", "pipeline_to_parts")]
    low, high = min(0.9, *every) * 0.6, max(1.1, *every) * 1.1  # the same in both panels, with room for the legend
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylabel("times as many queries a second", color=INK)
    _dress(axes, title, [case["rows"] for case in cases])
    handles, labels = zip(*drawn, strict=True)
    axes.legend(handles, labels, title="batch, D", ncols=len(batches), **{**_legend(), "loc": "lower right"})


def _times(axes: Axes, cases: Sequence[Mapping[str, Any]]) -> None:
    for method, (colour, marker) in LOOKS.items():
        own = sorted((case["rows"], case["seconds"]) for case in cases if case["method"] == method)
        if own:
            axes.plot(*zip(*own, strict=True), color=colour, label=method, **_line(marker))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_duration))
    axes.set_ylabel("time of a step", color=INK)
    _dress(axes, f"A training step of stage 1, batch {cases[0]['batch']}", [case["rows"] for case in cases])
    axes.legend(**_legend())


def _sizes(axes: Axes, cases: Sequence[Mapping[str, Any]]) -> None:
    for method, (colour, marker) in LOOKS.items():
        own = sorted((case["rows"], case["process_bytes"]) for case in cases if case["method"] == method)
        if own:
            axes.plot(*zip(*own, strict=True), color=colour, label=method, **_line(marker))
    rows = sorted({case["rows"] for case in cases})
    axes.plot(rows, [4 * count * cases[0]["dim"] for count in rows], label="the rows", linestyle=DASHES[1], **REFERENCE)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_size))
    axes.set_ylabel("peak memory", color=INK)
    _dress(axes, "What it takes beside the rows", rows)
    axes.legend(**_legend())


def _dress(axes: Axes, title: str, rows: Sequence[int]) -> None:
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.set_xscale("log")
    sizes = sorted(set(rows))
    axes.set_xticks(sizes, [_count(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("rows, N", color=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _line(marker: str) -> dict[str, Any]:
    return {"marker": marker, "markersize": 5, "linewidth": 1.6, "zorder": 3}


def _legend() -> dict[str, Any]:
    return {"frameon": False, "fontsize": 8, "title_fontsize": 8, "alignment": "left", "loc": "best"}


def _count(rows: float) -> str:
    return f"{rows / 1e6:g}M" if rows >= 1e6 else f"{rows / 1e3:g}k" if rows >= 1e3 else f"{rows:g}"


def _duration(value: float, _: int) -> str:
    return f"{value:g} s" if value >= 1 else f"{1e3 * value:g} ms"


def _size(value: float, _: int) -> str:
    return f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB"


def main(arguments: Sequence[str]) -> None:
    """Print the tables, draw the figure."""
    options = parse(arguments, OPTIONS)
    records = read(options["folder"])
    print(tables(records))
    if {"search_speed", "scale"} & records.keys():
        with atomic_write(options["figure"]) as partial:
            draw(records).savefig(partial, format="png", dpi=160, facecolor="white")
        print(f"\n{options['figure']}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
