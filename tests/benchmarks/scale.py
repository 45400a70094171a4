"""How a training step of stage 1 grows with the memory: its seconds, and what it takes beside the rows.

    python tests/benchmarks/scale.py [rows=1e4,3e4,1e5,3e5,1e6] [repeats=9] [batch=512] [dim=128] [sample=8192]
        [threads=2] [folder=outputs/benchmarks]

A step is projection, loss, backward pass and Adam, with a linear transform, frozen keys and `noisy` queries: `exact` as
NVF trains, `plain` by cross-entropy over all (B, N) logits, where these fit, and `sampled` as `attention.sample` does.
Times are of one process, all cases in turn. Memory is by how much a fresh process grows in its first step, and beside
it what torch's allocator counts.
"""

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvf.data.queries import Noisy
from nvf.models.attention import SoftAttention, attention_loss
from nvf.models.memory import VectorMemory
from nvf.ops.random_streams import stream
from nvf.options import Option, parse, whole
from nvf.training.modules import AttentionModule
from timing import (
    COMMON,
    available_bytes,
    interleaved,
    peak_bytes,
    peak_rss,
    table,
    whole_numbers,
    write_json,
)

METHODS = ("exact", "plain", "sampled")
BATCHES = 8  # that the steps go through in turn
LARGE = 10**5  # rows from which growth is fitted once more, as what does not grow weighs less there
PAPER = 10**7  # rows for which the growth is written out
MOST_GROWTH = {"exact": 1.05, "sampled": 0.3}  # the targets: exponents,
MOST_BYTES = 1.5e9  # and what an exact step over the largest memory takes beside its rows
PLAIN_COPIES = 4  # of the (B, N) logits that a plain step holds, about
SIGMA = 0.2
OPTIONS = (
    Option("rows", "N", [10**4, 3 * 10**4, 10**5, 3 * 10**5, 10**6], whole_numbers),
    Option("repeats", "of everything, in turn, at most", 9, whole),
    Option("batch", "queries", 512, whole),
    Option("dim", "D", 128, whole),
    Option("sample", "rows of a sampled step", 8192, whole),
    *COMMON,
)


def step_of(memory: VectorMemory, method: str, *, batch: int, sample: int) -> Callable[[], Tensor]:
    """A training step, which returns its loss."""
    attention = SoftAttention(memory, transform="linear")
    rows = min(sample, len(memory)) if method == "sampled" else None
    module = AttentionModule(attention, lr=1e-3, schedule="constant", sample=rows).train()
    adam = torch.optim.Adam(attention.parameters(), lr=1e-3, fused=True)
    source, generator = Noisy(memory, sigma=SIGMA), stream(0, "train")
    batches = cycle([source.sample(batch, generator) for _ in range(BATCHES)])

    def step() -> Tensor:
        queries, targets, *_ = given = next(batches)
        if method == "plain":
            loss = attention_loss(attention(queries), targets)
        else:
            module.seed += 1  # without a trainer the step is always the first: another seed draws another sample
            loss = module.loss(given)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def fits(method: str, rows: int, batch: int) -> bool:
    """Whether a step can be made in the memory there is."""
    return method != "plain" or PLAIN_COPIES * 4 * batch * rows < 0.8 * available_bytes()


def peaks(rows: int, method: str, dim: int, batch: int, sample: int, threads: int) -> dict[str, int]:
    """What the first step takes beside the rows, in a process that has done nothing else."""
    torch.set_num_threads(threads)
    memory = VectorMemory.synthetic(rows=rows, dim=dim, seed=0)
    step = step_of(memory, method, batch=batch, sample=sample)
    grown = peak_rss(step)
    return {"process_bytes": grown, "tensor_bytes": peak_bytes(step)}


def compare(
    sizes: Sequence[int], *, dim: int, batch: int, sample: int, repeats: int, threads: int
) -> list[dict[str, Any]]:
    """Every case that fits: seconds and bytes."""
    cases = [(rows, method) for rows in sizes for method in METHODS if fits(method, rows, batch)]
    found = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        for rows, method in cases:
            taken = fresh.submit(peaks, rows, method, dim, batch, sample, threads).result()
            found.append({"rows": rows, "dim": dim, "batch": batch, "method": method, **taken})
            print(found[-1], file=sys.stderr, flush=True)
    memories = {rows: VectorMemory.synthetic(rows=rows, dim=dim, seed=0) for rows in sizes}
    steps = {f"{rows} {m}": step_of(memories[rows], m, batch=batch, sample=sample) for rows, m in cases}
    took = interleaved(steps, repeats=repeats, budget=math.inf)
    return [{**case, "seconds": each} for case, each in zip(found, took.values(), strict=True)]


def power_law(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The exponent and the factor of values = factor * sizes ** exponent, by least squares of their logarithms."""
    exponent, log_factor = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(exponent), float(np.exp(log_factor))


def growth(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """For each method the exponent over all memories, and over the large ones, from which 1e7 rows are foretold."""
    found = {}
    for method in METHODS:
        own = [case for case in cases if case["method"] == method]
        large = [case for case in own if case["rows"] >= LARGE]
        (exponent, _), (exponent_large, factor), (growth_of_bytes, bytes_factor) = (
            power_law([case["rows"] for case in several], [case[what] for case in several])
            if len(several) > 1
            else (None, None)
            for several, what in ((own, "seconds"), (large, "seconds"), (large, "process_bytes"))
        )
        paper = beside = None
        if exponent_large is not None:
            paper, beside = factor * PAPER**exponent_large, bytes_factor * PAPER**growth_of_bytes
        found[method] = {
            "exponent": exponent,
            "exponent_large": exponent_large,
            "most": MOST_GROWTH.get(method),
            "seconds_on_paper": paper,
            "bytes_on_paper": None if beside is None else beside + 4 * PAPER * own[0]["dim"],
        }
    return found


def report(figures: dict[str, Any]) -> str:
    """A row a memory, then a row a method, then the peak."""
    cases = {(case["rows"], case["method"]): case for case in figures["cases"]}
    sizes = sorted({rows for rows, _ in cases})
    titles = ["N", *(f"{m}, ms" for m in METHODS), *(f"{m}, MB" for m in METHODS), "rows, MB"]
    rows = []
    for size in sizes:
        own = [cases.get((size, method)) for method in METHODS]
        times = ["-" if case is None else f"{1000 * case['seconds']:,.1f}" for case in own]
        beside = [
            "-" if c is None else f"{c['process_bytes'] / 1e6:,.0f} ({c['tensor_bytes'] / 1e6:,.0f})" for c in own
        ]
        width = next(case["dim"] for case in own if case is not None)
        rows.append([f"{size:,}", *times, *beside, f"{4 * size * width / 1e6:,.0f}"])
    grown = []
    for method, found in figures["growth"].items():
        large, most = found["exponent_large"], found["most"]
        verdict = "-" if most is None or large is None else "met" if large <= most else "missed"
        paper, room = found["seconds_on_paper"], found["bytes_on_paper"]
        grown.append(
            [
                method,
                *("-" if value is None else f"{value:.2f}" for value in (found["exponent"], large)),
                "-" if most is None else f"<= {most} ({verdict})",
                "-" if paper is None else f"{paper:,.2f}",
                "-" if room is None else f"{room / 1e9:,.1f}",
            ]
        )
    heads = ("step", "exponent over all N", f"from {LARGE:,}", "target", f"s at {PAPER:,} rows", "GB, rows included")
    lines = [table(titles, rows), "", "MB beside the rows: of the process (of tensors)", "", table(heads, grown)]
    lines += ["", f"what is said of {PAPER:,} rows is the fit from {LARGE:,} rows, on paper"]
    if (largest := cases.get((sizes[-1], "exact"))) is not None:
        peak = largest["process_bytes"]
        verdict = "met" if peak < MOST_BYTES else "missed"
        lines += ["", f"exact at {sizes[-1]:,} rows: {peak / 1e9:.2f} GB beside them (target < 1.5: {verdict})"]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print the tables, write scale.json."""
    options = parse(arguments, OPTIONS)
    torch.set_num_threads(options["threads"])
    given = {name: options[name] for name in ("dim", "batch", "sample", "repeats", "threads")}
    cases = compare(options["rows"], **given)
    figures = {"cases": cases, "growth": growth(cases)}
    print(report(figures))
    print(write_json("scale", figures, options))


if __name__ == "__main__":
    main(sys.argv[1:])
