"""Queries a second of exact search and of a pipeline, next to FAISS over the same rows.

    python tests/benchmarks/search_speed.py [rows=1e3,1e4,1e5,1e6] [dims=128,384] [batches=1,32,1024] [repeats=15]
        [threads=2] [folder=outputs/benchmarks]

`VectorMemory.search` is next to FAISS's `IndexFlatIP`, and `Pipeline.search` (linear transform, residual reranker) next
to that and the reranker's own arithmetic on given candidates; k = 5. Queries are a numpy array, or for the memory the
tensor over it. Every search must find the same rows, but for ties.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvf.data.queries import Noisy
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import Reranker
from nvf.ops.random_streams import stream
from nvf.ops.topk import TopK
from nvf.options import Option, parse, whole
from timing import COMMON, interleaved, table, whole_numbers, write_json

K = 5
SIGMA = 0.05  # of the queries about the rows, and of the rows about their cluster's centre, a dimension
TIE = 1e-5  # cosines nearer than this are one
BUDGET = 12.0  # seconds for the repeats of a case, about
FLAT, MEMORY, PIPELINE, RERANKER = "faiss flat", "memory", "pipeline", "reranker"


OPTIONS = (
    Option("rows", "N", [10**3, 10**4, 10**5, 10**6], whole_numbers),
    Option("dims", "D", [128, 384], whole_numbers),
    Option("batches", "queries in a call", [1, 32, 1024], whole_numbers),
    Option("repeats", "of everything, in turn, at most", 15, whole),
    *COMMON,
)


def set_threads(threads: int) -> None:
    """For torch and for FAISS, which must be imported after it: they then share a pool of threads."""
    import faiss

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def flat_index(rows: Tensor) -> Any:
    """FAISS's exact search; it keeps a copy of the rows."""
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows.numpy())
    return index


def same_rows(memory: VectorMemory, queries: np.ndarray, ours: Any, theirs: np.ndarray) -> bool:
    """Whether both found the same rows, (B, k), in the same order, but for ties."""
    rows, asked = memory.rows, torch.from_numpy(queries).double()
    scores = [
        (rows[torch.as_tensor(found)].double() @ asked.unsqueeze(-1)).squeeze(-1)  # (B, k)
        for found in (ours, theirs)
    ]
    different = torch.as_tensor(ours) != torch.as_tensor(theirs)
    return bool(((scores[0] - scores[1]).abs()[different] < TIE).all())


def untrained(memory: VectorMemory) -> Pipeline:
    """A pipeline at its start, where it finds what exact search finds."""
    torch.manual_seed(0)
    attention = SoftAttention(memory, transform="linear")
    return Pipeline(attention, Reranker(memory.dim, kind="residual", hidden=(128, 64)), k=K).eval()


def candidates_of(pipeline: Pipeline, queries: Tensor) -> TopK:
    """What its stage 1 gives its reranker."""
    return pipeline.attention.candidates(queries, pipeline.k, logsumexp=True)


def exact(sizes: Sequence[int], dims: Sequence[int], batches: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Every case."""
    figures = []
    for dim in dims:
        for size in sizes:
            memory = VectorMemory.synthetic(rows=size, dim=dim, seed=0)
            index, pipeline = flat_index(memory.rows), untrained(memory)
            source = Noisy(memory, sigma=SIGMA)
            for batch in batches:
                found = case(memory, index, pipeline, source.sample(batch, stream(0, "test")).queries.numpy(), repeats)
                figures.append({"rows": size, "dim": dim, "batch": batch, **found})
                print(_line(figures[-1]), file=sys.stderr, flush=True)
            del memory, index, pipeline, source  # before the next ones are made
    return figures


def case(memory: VectorMemory, index: Any, pipeline: Pipeline, queries: np.ndarray, repeats: int) -> dict[str, Any]:
    """Seconds of each search of one batch, their ratios, and whether they agree."""
    asked = torch.from_numpy(queries)
    with torch.no_grad():
        top = candidates_of(pipeline, asked)
        searches: dict[str, Callable[[], Any]] = {
            FLAT: lambda: index.search(queries, K),
            MEMORY: lambda: memory.search(asked, K),
            PIPELINE: lambda: pipeline.search(queries, K),
            RERANKER: lambda: pipeline.scores_of(asked, top),
        }
        took = interleaved(searches, repeats=repeats, budget=BUDGET)
    _, theirs = index.search(queries, K)
    agree = all(same_rows(memory, queries, f(queries), theirs) for f in (partial(_memory, memory), _hits(pipeline)))
    return {
        "queries_per_second": {name: len(queries) / each for name, each in took.items()},
        "memory_to_flat": took[FLAT] / took[MEMORY],  # of throughputs
        "pipeline_to_parts": (took[FLAT] + took[RERANKER]) / took[PIPELINE],
        "same_rows": agree,
    }


def _memory(memory: VectorMemory, queries: np.ndarray) -> Tensor:
    return memory.search(torch.from_numpy(queries), K).rows


def _hits(pipeline: Pipeline) -> Callable[[np.ndarray], np.ndarray]:
    return lambda queries: pipeline.search(queries, K).rows


def _line(found: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {rate:,.0f}/s" for name, rate in found["queries_per_second"].items())
    return f"N={found['rows']:,} D={found['dim']} batch={found['batch']}: {rates}"


def report(figures: list[dict[str, Any]]) -> str:
    """A row a case."""
    titles = ("N", "D", "batch", "FAISS flat, queries/s", "memory", "ratio", "reranker alone", "pipeline")
    titles = (*titles, "to flat + reranker", "same rows")
    rows = [
        [
            *(f"{found['rows']:,}", str(found["dim"]), str(found["batch"])),
            *(f"{found['queries_per_second'][name]:,.0f}" for name in (FLAT, MEMORY)),
            f"{found['memory_to_flat']:.2f}",
            *(f"{found['queries_per_second'][name]:,.0f}" for name in (RERANKER, PIPELINE)),
            f"{found['pipeline_to_parts']:.2f}",
            "yes" if found["same_rows"] else "NO",
        ]
        for found in figures
    ]
    return table(titles, rows)


def main(arguments: Sequence[str]) -> None:
    """Print the tables, write search_speed.json."""
    options = parse(arguments, OPTIONS)
    set_threads(options["threads"])
    figures = exact(options["rows"], options["dims"], options["batches"], options["repeats"])
    print(report(figures))
    print(write_json("search_speed", figures, options))


if __name__ == "__main__":
    main(sys.argv[1:])
