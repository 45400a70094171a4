"""FAISS's HNSW as the first stage of a search: recall of its five best, and its speed next to exact search.

    python tests/benchmarks/hnsw.py [rows=1e6] [dim=128] [batches=1,32,1024] [kinds=factors,synthetic] [repeats=15]
        [threads=2] [folder=outputs/benchmarks]

Two kinds of rows: `factors`, of 24 factors and a little noise, and `synthetic`, uniform on the sphere, which has no
structure for a graph to follow. Building a graph of a million keys takes some minutes.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from nvf.data.queries import Noisy
from nvf.models.ann_index import Index, build_index
from nvf.models.memory import VectorMemory
from nvf.ops.random_streams import stream
from nvf.options import Option, parse, whole
from search_speed import BUDGET, FLAT, MEMORY, SIGMA, K, flat_index, set_threads
from timing import COMMON, interleaved, table, whole_numbers, write_json

FACTORS = 24
KINDS = ("factors", "synthetic")
EF_SEARCH = (32, 64, 128, 256)
GRAPH = {"m": 32, "ef_construction": 200}
RECALL = 0.99  # the least that an approximate first stage must have
ASKED = 1024  # queries on which it is measured

OPTIONS = (
    Option("rows", "N", 10**6, lambda text: whole_numbers(text)[0]),
    Option("dim", "D", 128, whole),
    Option("batches", "queries in a call", [1, 32, 1024], whole_numbers),
    Option("kinds", "of the rows", KINDS, lambda text: text.split(",")),
    Option("repeats", "of everything, in turn, at most", 15, whole),
    *COMMON,
)


def factors(rows: int, dim: int) -> VectorMemory:
    """Rows near a subspace of FACTORS dimensions."""
    generator = stream(0, "memory")
    subspace = torch.randn(FACTORS, dim, generator=generator)
    vectors = torch.randn(rows, FACTORS, generator=generator) @ subspace
    return VectorMemory(vectors.add_(torch.randn(rows, dim, generator=generator)))


def hnsw(
    rows: int, dim: int, batches: Sequence[int], repeats: int, kinds: Sequence[str] = KINDS
) -> list[dict[str, Any]]:
    """Every kind of data and ef_search: recall, and speed next to FAISS's exact search and ours."""
    figures = []
    for kind in kinds:
        memory = factors(rows, dim) if kind == "factors" else VectorMemory.synthetic(rows=rows, dim=dim, seed=0)
        started = time.perf_counter()
        index = build_index(memory.rows, "hnsw", **GRAPH)
        assert index is not None
        building, flat = time.perf_counter() - started, flat_index(memory.rows)
        asked = Noisy(memory, sigma=SIGMA).sample(max(ASKED, *batches), stream(0, "test")).queries
        expected = memory.search(asked[:ASKED], K).rows
        for ef in EF_SEARCH:
            # Building it anew would take as long as the first time.
            index = Index(index._made, "hnsw", {**GRAPH, "ef_search": ef})
            found = index.search(asked[:ASKED], K)[1]
            recall = float((found.unsqueeze(-1) == expected.unsqueeze(1)).any(dim=-1).float().mean())
            for batch in batches:
                queries = asked[:batch]
                searches = {
                    FLAT: partial(flat.search, queries.numpy(), K),
                    MEMORY: partial(memory.search, queries, K),
                    "hnsw": partial(index.search, queries, K),
                }
                took = interleaved(searches, repeats=repeats, budget=BUDGET / 2)
                figures.append(
                    {
                        **{"data": kind, "rows": len(memory), "dim": dim, "batch": batch, "ef_search": ef},
                        "build_seconds": building,
                        "recall": recall,
                        "queries_per_second": {name: batch / each for name, each in took.items()},
                        "speedup": {name: took[name] / took["hnsw"] for name in (FLAT, MEMORY)},
                    }
                )
                print(figures[-1], file=sys.stderr, flush=True)
        del memory, index, flat
    return figures


def report(figures: list[dict[str, Any]]) -> str:
    """A row a case."""
    titles = ("rows", "N", "build, s", "ef_search", "recall@5", f">= {RECALL}", "batch", "HNSW, queries/s")
    titles = (*titles, "times FAISS flat", "times our memory")
    rows = [
        [
            *(found["data"], f"{found['rows']:,}", f"{found['build_seconds']:.0f}", str(found["ef_search"])),
            *(f"{found['recall']:.4f}", "yes" if found["recall"] >= RECALL else "no", str(found["batch"])),
            f"{found['queries_per_second']['hnsw']:,.0f}",
            *(f"{found['speedup'][name]:.1f}" for name in (FLAT, MEMORY)),
        ]
        for found in figures
    ]
    return table(titles, rows)


def main(arguments: Sequence[str]) -> None:
    """Print the table, write hnsw.json."""
    options = parse(arguments, OPTIONS)
    set_threads(options["threads"])
    figures = hnsw(options["rows"], options["dim"], options["batches"], options["repeats"], options["kinds"])
    print(report(figures))
    print(write_json("hnsw", figures, options))


if __name__ == "__main__":
    main(sys.argv[1:])
