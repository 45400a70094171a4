"""All of `data=embeddings`, from a large log to its table, on generated data with what real logs have.

    python tests/benchmarks/large.py [rows=1e5,1e6] [dim=384] [queries=1e5] [folder=outputs/benchmarks] [threads=2]
        [seed=0] [settings='index=hnsw']

Rows lie in clusters; popularity follows a power law, and a fifth of the items is never asked for; a query is an item
turned by a hidden rotation, with noise. So exact search finds little more than two thirds of what an oracle does, who
undoes the rotation. Each run is a process of its own, `python -m nvf.train` with its defaults and half-precision rows.
Printed are the plan, the seconds of each phase, the peak of its memory beside the rows, Top-1 of exact search, oracle,
stage 1 and pipeline, what an index finds if `settings` names one, and, with several numbers of rows, the exponents with
which time and memory grow.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nvf.models.memory import VectorMemory, unit
from nvf.ops.random_streams import stream
from nvf.options import Option, parse, whole
from timing import COMMON, whole_numbers, write_json

PER_CLUSTER, NEVER, POWER = 50, 0.2, 0.7  # rows of a cluster, the share never asked for, of the power law
TURN, NOISE = 0.7, 3.0  # of the hidden rotation, and of the queries, whose items have length 1
BLOCK = 65_536
SHOWN = ("exact", "attention", "pipeline")
OPTIONS = (
    Option("rows", "N", [10**5, 10**6], whole_numbers),
    Option("dim", "D", 384, whole),
    Option("queries", "n, of which 80% train", 10**5, lambda text: int(float(text))),
    Option("seed", "of data and run", 0, whole),
    Option("settings", "of nvf.train, with spaces between", ""),
    *COMMON,
)


def generate(folder: Path, *, rows: int, dim: int, queries: int, seed: int) -> torch.Tensor:
    """Write corpus.npy, queries.npy and targets.npy, and return the hidden rotation, (D, D)."""
    generator = stream(seed, "large")
    skew = torch.randn(dim, dim, generator=generator)
    rotation = torch.linalg.matrix_exp(TURN * (skew - skew.T) / math.sqrt(2 * dim))
    centres = F.normalize(torch.randn(max(1, rows // PER_CLUSTER), dim, generator=generator), dim=-1)
    corpus = np.lib.format.open_memmap(folder / "corpus.npy", "w+", np.float16, (rows, dim))
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        chosen = centres[torch.randint(len(centres), (size,), generator=generator)]
        offsets = torch.randn(size, dim, generator=generator) / math.sqrt(dim)
        corpus[start : start + size] = F.normalize(chosen + offsets, dim=-1).half().numpy()
    corpus.flush()
    asked = torch.randperm(rows, generator=generator)[: int((1 - NEVER) * rows)]
    popularity = (1 / torch.arange(1, len(asked) + 1, dtype=torch.float64) ** POWER).cumsum(0)
    drawn = torch.rand(queries, generator=generator, dtype=torch.float64) * popularity[-1]
    targets = asked[torch.searchsorted(popularity, drawn).clamp(max=len(asked) - 1)]
    noise = NOISE * torch.randn(queries, dim, generator=generator) / math.sqrt(dim)
    turned = unit(torch.from_numpy(corpus[targets.numpy()])) @ rotation
    np.save(folder / "queries.npy", F.normalize(turned + noise, dim=-1).half().numpy())
    np.save(folder / "targets.npy", targets.numpy())
    return rotation


def oracle(folder: Path, rotation: torch.Tensor, seed: int) -> float:
    """Return the share of the test queries that exact search over the turned rows answers."""
    from nvf.data.folder import read_memory, read_recorded

    memory = read_memory(folder, dtype="float16")
    test = read_recorded(folder, memory, seed=seed).splits["test"]
    turned = VectorMemory(torch.cat([block.float() @ rotation for block in memory.rows.split(BLOCK)]), dtype="float16")
    return float((turned.search(test.queries, 1).rows == test.targets).any(dim=-1).float().mean())


def run(folder: Path, *, seed: int, threads: int, settings: str) -> dict[str, Any]:
    """Make a run in a process of its own, and return its results with its wall clock and peak memory."""
    words = ["data=embeddings", f"data.dir={folder}", "data.dtype=float16", f"seed={seed}", f"threads={threads}"]
    words += ["cache=off", "trainer.enable_progress_bar=false", f"hydra.run.dir={folder / 'run'}", *settings.split()]
    code = "import resource, sys; import nvf.train as t; sys.argv[0] = 'train'; t.main(); "
    code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, check=True)
    wall, peak = time.perf_counter() - start, int(done.stdout.rsplit("peak ", 1)[1]) * 1024
    return {**json.loads((folder / "run" / "results.json").read_text()), "wall": wall, "peak": peak}


def main(words: Sequence[str]) -> None:
    """Generate, run and print."""
    given = parse(words, OPTIONS)
    torch.set_num_threads(given["threads"])
    found = []
    for rows in given["rows"]:
        with TemporaryDirectory() as name:
            folder = Path(name)
            sizes = {"rows": rows, "dim": given["dim"], "queries": given["queries"]}
            rotation = generate(folder, **sizes, seed=given["seed"])
            best = oracle(folder, rotation, given["seed"])
            results = run(folder, seed=given["seed"], threads=given["threads"], settings=given["settings"])
        top1 = {method: results["test"][method]["top1"]["value"] for method in SHOWN} | {"oracle": best}
        beside = results["peak"] - 2 * rows * given["dim"]
        one = {**sizes, "seconds": {**results["seconds"], "wall": results["wall"]}, "beside_rows": beside, "top1": top1}
        found.append({**one, **{name: results[name] for name in ("plan", "cut", "index")}})
        print(f"{rows:,} rows of {given['dim']} dimensions, {given['queries']:,} queries")
        print("  seconds:", ", ".join(f"{part} {value or 0:.0f}" for part, value in one["seconds"].items()))
        print(f"  memory beside the rows: {beside / 2**30:.1f} GiB; plan: {results['plan']}; cut: {results['cut']}")
        print("  Top-1:", ", ".join(f"{method} {100 * value:.1f}" for method, value in top1.items()))
        if (index := results["index"]) is not None:
            rates = ", ".join(f"{how} {rate:,.0f}" for how, rate in index["queries_per_second"].items())
            recall, right = (100 * index[share]["value"] for share in ("recall", "top1"))
            print(f"  {index['kind']}: recall {recall:.1f}, pipeline Top-1 {right:.1f}, queries/s: {rates}")
        print(
            f"  pipeline {top1['pipeline'] / best:.3f} x oracle, exact search {top1['exact'] / best:.3f} x", flush=True
        )
    if len(found) > 1:
        ratio = math.log(found[-1]["rows"] / found[0]["rows"])
        for name, of in (("time", lambda one: one["seconds"]["wall"]), ("memory", lambda one: one["beside_rows"])):
            print(f"{name} grows with the exponent {math.log(of(found[-1]) / of(found[0])) / ratio:.2f}")
    print(f"everything is in {write_json('large', found, given)}")


if __name__ == "__main__":
    main(sys.argv[1:])
