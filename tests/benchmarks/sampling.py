"""What a sampled loss costs in accuracy, and saves in time, next to the exact one: stage 1 over a large memory.

    python tests/benchmarks/sampling.py [rows=1e5] [seeds=0] [name=value ...]

Each line is a run of `python -m nvf.train stage=attention` with the same queries and steps, hidden behind a rotation
that has to be learned; `clustered` rows have near neighbours, `synthetic` ones have not.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from nvf.options import Option, run, whole
from timing import COMMON, table, whole_numbers, write_json

OPTIONS = (
    Option("rows", "of the memory", [100_000], whole_numbers),
    Option("seeds", "of the runs", [0], whole_numbers),
    Option("epochs", "of 100 steps", 6, whole),
    *COMMON,
)
WARPED = [
    *("stage=attention", "queries=warped", "queries.warp=rotation", "attention.variants=null", "cache=off"),
    *("queries.val_samples=1000", "queries.test_samples=5000"),  # each is ranked among all rows
]
METHODS = {
    "exact": [],
    "sample=8192": ["attention.sample=8192"],
    "sample=8192, hard=16": ["attention.sample=8192", "attention.hard=16"],
}


def memories(rows: int) -> dict[str, list[str]]:
    """Settings of which an informed search finds some 85% to 99%."""
    return {
        "synthetic": [f"data.rows={rows}", "queries.sigma=0.17"],
        "clustered": [
            "data=clustered",
            *(f"data.clusters={rows // 100}", "data.rows_per_cluster=100", "data.sigma=0.05", "queries.sigma=0.1"),
        ],
    }


def sampling(*, rows: list[int], seeds: list[int], epochs: int, threads: int, folder: Path) -> str:
    """Run everything and return the table."""
    found = []
    for count in rows:
        for memory, where in memories(count).items():
            for method, words in METHODS.items():
                given = [*WARPED, *where, *words, f"attention.epochs={epochs}", f"threads={threads}"]
                runs = [one(*given, f"seed={seed}") for seed in seeds]
                figures = {
                    name: mean(run["test"][name]["top1"]["value"] for run in runs) for name in ("oracle", "attention")
                }
                seconds = mean(run["seconds"]["attention"] for run in runs)
                found.append({"rows": count, "memory": memory, "method": method, "seconds": seconds, **figures})
                print(found[-1], file=sys.stderr, flush=True)
    path = write_json("sampling", found, {"seeds": seeds, "epochs": epochs, "threads": threads, "folder": folder})
    return f"{report(found)}\n\n{path}"


def report(figures: list[dict[str, Any]]) -> str:
    """A row a run."""
    rows = [
        [
            *(f"{found['memory']}, {found['method']}", f"{found['rows']:,}"),
            *(f"{100 * found[name]:.2f}" for name in ("oracle", "attention")),
            f"{found['seconds']:.0f}",
        ]
        for found in figures
    ]
    return table(("rows, loss", "N", "oracle Top-1", "stage 1 Top-1", "seconds to fit"), rows)


def one(*words: str) -> dict[str, Any]:
    """results.json of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "nvf.train", *words, f"hydra.run.dir={folder}/run", "dashboards=none"]
        subprocess.run([*command, "trainer.enable_progress_bar=false"], capture_output=True, check=True)
        results: dict[str, Any] = json.loads(Path(folder, "run", "results.json").read_text())
        return results


if __name__ == "__main__":
    run(sampling, program=sys.argv[0], summary=(__doc__ or "").partition(":")[0], options=OPTIONS)
