"""What each way to make exact search faster is worth here: the time without it over the time with it, in one run.

    python tests/benchmarks/search_methods.py [rows=1e4,1e5] [dims=128,384] [batches=32,1024] [repeats=15] [threads=2]
        [folder=outputs/benchmarks]

`sparse` is the k best from groups of rows, `blockwise_topk` with and without it, in turn. `plain` is blocks of matmul
with torch.topk, next to everything; it knows no rule of ties. `allocation`, the block that is allocated when
nvf.ops.products is imported, is measured between fresh processes, one with it and one without it, in turn. Above 1 a
method wins.
"""

import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from nvf.ops.topk import blockwise_topk
from nvf.options import Option, parse, whole
from timing import COMMON, interleaved, table, whole_numbers, write_json

K = 5
NEVER = 2**31  # queries from which a method is used, where it is turned off
BUDGET = 12.0  # seconds for the repeats of a case, about
PAIRS = 3  # of fresh processes a case
PROCESS = """
import sys, time
from statistics import median
from unittest import mock
import torch
allocate, rows, dim, batch, repeats, threads = map(int, sys.argv[1:])
if not allocate:
    with mock.patch.object(torch, "empty"):
        import nvf.ops.products
from nvf.ops.topk import blockwise_topk
torch.set_num_threads(threads)
keys, queries = (torch.nn.functional.normalize(torch.randn(count, dim), dim=-1) for count in (rows, batch))
took = []
for _ in range(repeats + 1):
    started = time.perf_counter()
    blockwise_topk(queries, keys, 5)
    took.append(time.perf_counter() - started)
print(median(took[1:]))
"""
METHODS = ("sparse", "allocation", "plain")
OPTIONS = (
    Option("rows", "N", [10**4, 10**5], whole_numbers),
    Option("dims", "D", [128, 384], whole_numbers),
    Option("batches", "queries in a call", [32, 1024], whole_numbers),
    Option("repeats", "of everything, in turn, at most", 15, whole),
    *COMMON,
)


def problem(rows: int, dim: int, batch: int) -> tuple[Tensor, Tensor]:
    """Unit queries and unit keys."""
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)
    return F.normalize(torch.randn(batch, dim, generator=generator), dim=-1), keys


def plain(queries: Tensor, keys: Tensor) -> Tensor:
    """The rows of the k largest products, from blocks of matmul."""
    values, rows, width = [], [], max(K, 2**20 // len(queries))
    for start in range(0, len(keys), width):
        best = (queries @ keys[start : start + width].T).topk(min(K, len(keys) - start), dim=-1)
        values.append(best.values)
        rows.append(best.indices + start)
    return torch.cat(rows, dim=-1).gather(-1, torch.cat(values, dim=-1).topk(K, dim=-1).indices)


def without_sparse(queries: Tensor, keys: Tensor) -> Any:
    """A search that takes a top-k of every block."""
    with patch("nvf.ops.topk.SPARSE_FROM", NEVER):
        return blockwise_topk(queries, keys, K)


def case(rows: int, dim: int, batch: int, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a search, and how many times as long it takes without each method."""
    queries, keys = problem(rows, dim, batch)
    took = interleaved(
        {
            "all": lambda: blockwise_topk(queries, keys, K),
            "sparse": lambda: without_sparse(queries, keys),
            "plain": lambda: plain(queries, keys),
        },
        repeats=options["repeats"],
        budget=BUDGET,
    )
    pairs = [[_in_a_process(rows, dim, batch, options, allocate) for allocate in (True, False)] for _ in range(PAIRS)]
    ratios = {name: took[name] / took["all"] for name in took if name != "all"}
    ratios["allocation"] = median(without / having for having, without in pairs)
    return {"rows": rows, "dim": dim, "batch": batch, "seconds": took["all"], **{m: ratios[m] for m in METHODS}}


def _in_a_process(rows: int, dim: int, batch: int, options: dict[str, Any], allocate: bool) -> float:
    """Seconds of a search in a fresh process, in which nvf.ops.products allocates its block, or does not."""
    words = [str(word) for word in (int(allocate), rows, dim, batch, options["repeats"], options["threads"])]
    command = [sys.executable, "-c", PROCESS, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def report(figures: list[dict[str, Any]]) -> str:
    """A row a case."""
    rows = [
        [
            *(f"{found['rows']:,}", str(found["dim"]), str(found["batch"]), f"{1e3 * found['seconds']:.2f}"),
            *(f"{found[name]:.2f}" for name in METHODS),
        ]
        for found in figures
    ]
    return table(("N", "D", "batch", "search, ms", *METHODS), rows)


def main(arguments: Sequence[str]) -> None:
    """Print the table, write search_methods.json."""
    options = parse(arguments, OPTIONS)
    torch.set_num_threads(options["threads"])
    figures = []
    for dim in options["dims"]:
        for rows in options["rows"]:
            for batch in options["batches"]:
                figures.append(case(rows, dim, batch, options))
                print(figures[-1], file=sys.stderr, flush=True)
    print(report(figures))
    print(write_json("search_methods", figures, options))


if __name__ == "__main__":
    main(sys.argv[1:])
