"""What a sweep saves by fitting stage 1 once, and what a start costs, each as a ratio within one run.

    python tests/benchmarks/sweep.py [repeats=5] [word ...]

Words are settings of both sweeps, as `hydra/launcher=parallel`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTS = "import torch, lightning, hydra"
FIRST_STEP = """
import os, nvf.train, nvf.training.modules
nvf.training.modules.StageModule.training_step = lambda *_: os._exit(0)
nvf.train.main()
"""
JOBS = ["-m", "reranker.lr=1e-3,3e-3,1e-2,3e-2", "reranker.seed=0,1,2"]


def seconds(*words: str, cwd: str) -> float:
    """From the start of a Python process to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - started


def starts(repeats: int) -> None:
    """Medians of starts next to imports, taken in turn."""
    pairs = {
        "process start to first training step": (["-c", FIRST_STEP, "cache=off"], ["-c", IMPORTS]),
        "--help": (["-m", "nvf.train", "--help"], ["-c", "import hydra"]),
        "a config error": (["-m", "nvf.train", "colour=red"], ["-c", "import hydra"]),
    }
    with tempfile.TemporaryDirectory() as cwd:
        for name, (ours, theirs) in pairs.items():
            took = [(seconds(*ours, cwd=cwd), seconds(*theirs, cwd=cwd)) for _ in range(repeats + 1)][1:]
            mine, other = (statistics.median(column) for column in zip(*took, strict=True))
            print(f"{name:38} {mine:6.2f} s   {theirs[1]:32} {other:6.2f} s   ratio {mine / other:.2f}", flush=True)


def sweeps(words: list[str]) -> None:
    """Twelve jobs over one stage 1, with the cache and without it."""
    took, figures = {}, {}
    with tempfile.TemporaryDirectory() as cwd:
        for cache in ("outputs/cache", "off"):
            folder = f"hydra.sweep.dir={cache.replace('/', '-')}"
            took[cache] = seconds("-m", "nvf.train", *JOBS, f"cache={cache}", folder, *words, cwd=cwd)
            found = sorted(Path(cwd, folder.partition("=")[2]).glob("*/results.json"))
            figures[cache] = [json.loads(path.read_text())["test"] for path in found]
    kept, off = took.values()
    same = figures["off"] == figures["outputs/cache"] and len(figures["off"]) == 12
    print(f"12 jobs over one stage 1: {kept:.0f} s, with cache=off {off:.0f} s, ratio {kept / off:.2f}")
    print(f"all figures are there, and equal: {same}")


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if not word.startswith("repeats=")]
    counts = [int(word.partition("=")[2]) for word in sys.argv[1:] if word.startswith("repeats=")]
    starts(*counts or [5])
    sweeps(given)
