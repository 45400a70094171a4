"""One query at a time, in process: a pipeline next to FAISS over the same rows, and several Python threads at once.

    python tests/benchmarks/latency.py [rows=1e3,1e4] [dims=128,384] [rerankers=residual,evidence] [queries=1000]
        [at_once=1,2,4] [batch=1] [ways=flat,pipeline,hnsw,indexed] [threads=1] [folder=outputs/benchmarks]

Every query is asked of FAISS's `IndexFlatIP`, of its HNSW, and of a pipeline without and with that index; k = 5.
Then as many Python threads as `at_once` says share the queries of one pipeline, so many a `batch`, which must give the
same answers as one thread. A million rows: `rows=1e6 dims=128 rerankers=residual ways=hnsw,indexed`, of which building
HNSW takes some 5 minutes.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from nvf.data.queries import Noisy
from nvf.models.ann_index import build_index
from nvf.models.attention import SoftAttention
from nvf.models.evidence import Evidence
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.ops.random_streams import stream
from nvf.options import Option, parse, whole
from search_speed import FLAT, PIPELINE, SIGMA, K, flat_index, set_threads
from timing import COMMON, table, whole_numbers, write_json

RERANKERS = ("residual", "evidence")
HNSW, INDEXED = "faiss hnsw", "pipeline, hnsw"
WAYS = {"flat": FLAT, "pipeline": PIPELINE, "hnsw": HNSW, "indexed": INDEXED}
GOAL = 1e-4  # seconds that a pipeline may take beside twice FAISS flat
THREADS, FOLDER = COMMON


def _words(text: str) -> list[str]:
    return text.split(",")


OPTIONS = (
    Option("rows", "N", [10**3, 10**4], whole_numbers),
    Option("dims", "D", [128, 384], whole_numbers),
    Option("rerankers", "residual, or evidence with a correction of hubs", RERANKERS, _words),
    Option("queries", "asked one by one", 1000, whole),
    Option("at_once", "Python threads that search one pipeline", [1, 2, 4], whole_numbers),
    Option("batch", "queries in a call of several threads", 1, whole),
    Option("ways", "to search: flat and hnsw are FAISS's, pipeline or indexed must be among them", [*WAYS], _words),
    THREADS._replace(default=1),
    FOLDER,
)


def pipeline_of(memory: VectorMemory, queries: torch.Tensor, reranker: str) -> Pipeline:
    """An untrained pipeline; what it weighs makes no difference to its speed."""
    torch.manual_seed(0)
    count, logged = len(memory), len(queries)
    attention = SoftAttention(memory, transform="linear", biased=reranker == "evidence")
    if reranker == "residual":
        pipeline = Pipeline(attention, Reranker(memory.dim, kind="residual"), k=K)
    else:
        pairs = (torch.randint(count, (logged,)) * logged + torch.arange(logged)).sort().values
        nothing = torch.zeros(count)
        evidence = Evidence(memory, queries=queries, pairs=pairs, hubness=nothing, density=nothing)
        pipeline = Pipeline(attention, EvidenceReranker(len(evidence.features)), k=K, evidence=evidence)
    return pipeline.requires_grad_(False).eval()


def one_by_one(searches: Mapping[str, Callable[[np.ndarray], object]], queries: np.ndarray) -> dict[str, np.ndarray]:
    """Seconds of every query, (n,), for each search; they take turns, so that other work falls on all of them."""
    took = {name: np.empty(len(queries)) for name in searches}
    for number in range(len(queries)):
        for name, search in searches.items():
            started = time.perf_counter()
            search(queries[number : number + 1])
            took[name][number] = time.perf_counter() - started
    return took


def together(
    search: Callable[[np.ndarray], Any], queries: np.ndarray, threads: int, batch: int = 1
) -> tuple[float, list[Any]]:
    """Queries a second of so many Python threads at once, and the answers in the order of the queries."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(search, np.split(queries[:threads], threads)))  # every thread has started
        started = time.perf_counter()
        found = list(pool.map(search, np.split(queries, range(batch, len(queries), batch))))
        return len(queries) / (time.perf_counter() - started), found


def latency(
    rows: Sequence[int],
    dims: Sequence[int],
    rerankers: Sequence[str],
    queries: int,
    at_once: Sequence[int],
    batch: int = 1,
    ways: Sequence[str] = (*WAYS,),
) -> list[dict[str, Any]]:
    """Every case: p50 and p99, in seconds, and queries a second of several threads."""
    figures = []
    for size, dim in ((size, dim) for dim in dims for size in rows):
        memory = VectorMemory.synthetic(rows=size, dim=dim, seed=0)
        asked = Noisy(memory, sigma=SIGMA).sample(queries, stream(0, "test")).queries
        flat = flat_index(memory.rows) if "flat" in ways else None
        for reranker in rerankers:
            pipeline = pipeline_of(memory, asked, reranker)
            indexed = pipeline_of(memory, asked, reranker)
            indexed.index, width = None, indexed.attention.keys().shape[1]
            if {"hnsw", "indexed"} & {*ways}:
                indexed.index = build_index(indexed.attention.keys(), "hnsw")
            every: dict[str, Callable[[np.ndarray], Any]] = {
                FLAT: lambda some, flat=flat: flat.search(some, K),
                PIPELINE: partial(pipeline.search, k=K),
                HNSW: lambda some, index=indexed.index, width=width: index._made.search(
                    np.pad(some, ((0, 0), (0, width - some.shape[1]))), K
                ),
                INDEXED: partial(indexed.search, k=K),
            }
            searches = {WAYS[way]: every[WAYS[way]] for way in ways}
            shared = searches.get(PIPELINE) or searches[INDEXED]
            one_by_one(searches, asked[:20].numpy())
            took = one_by_one(searches, asked.numpy())
            _, expected = together(shared, asked.numpy(), 1, batch)
            rates, same = {}, True
            for threads in at_once:
                rates[str(threads)], found = together(shared, asked.numpy(), threads, batch)
                pairs = zip(found, expected, strict=True)
                same &= all(np.array_equal(a, b) for one, two in pairs for a, b in zip(one[:2], two[:2], strict=True))
            figures.append(
                {
                    **{"rows": size, "dim": dim, "reranker": reranker, "batch": batch, "same_answers": same},
                    "p50": {name: float(np.quantile(each, 0.5)) for name, each in took.items()},
                    "p99": {name: float(np.quantile(each, 0.99)) for name, each in took.items()},
                    "queries_per_second": rates,
                }
            )
            print(figures[-1], file=sys.stderr, flush=True)
    return figures


def report(figures: list[dict[str, Any]]) -> str:
    """A row a case; microseconds, p50 / p99."""
    ways, at_once = [*figures[0]["p50"]], [*figures[0]["queries_per_second"]]
    rates = (f"queries/s, {n} at once" for n in at_once)
    titles = ("N", "D", "reranker", *ways, *(["2 x flat + 100"] if FLAT in ways else []), *rates, "same")
    rows = [
        [
            *(f"{found['rows']:,}", str(found["dim"]), found["reranker"]),
            *(f"{1e6 * found['p50'][way]:,.0f} / {1e6 * found['p99'][way]:,.0f}" for way in ways),
            *([f"{1e6 * (2 * found['p50'][FLAT] + GOAL):,.0f}"] if FLAT in ways else []),
            *(f"{found['queries_per_second'][n]:,.0f}" for n in at_once),
            "yes" if found["same_answers"] else "NO",
        ]
        for found in figures
    ]
    return table(titles, rows)


def main(arguments: Sequence[str]) -> None:
    """Print the table, write latency.json."""
    options = parse(arguments, OPTIONS)
    set_threads(options["threads"])
    names = ("rows", "dims", "rerankers", "queries", "at_once", "batch", "ways")
    figures = latency(*(options[name] for name in names))
    print(report(figures))
    print(write_json("latency", figures, options))


if __name__ == "__main__":
    main(sys.argv[1:])
