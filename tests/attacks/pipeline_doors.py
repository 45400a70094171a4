"""Every file of a pipeline or a run that NVF reads, and what it makes of a damaged copy.

As a program: `python pipeline_doors.py PLACE COUNT SEED plain|forged` reads so many damaged copies of each, in a
process of its own with little memory and little time for each, and prints a line of JSON for each.
"""

import contextlib
import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent))  # where seals.py is, for the program

from mutate import mutations

from nvf.errors import InputError
from nvf.files.records import sealed
from nvf.models.ann_index import build_index
from nvf.models.attention import SoftAttention
from nvf.models.evidence import Evidence
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.models.words import Words
from nvf.runs.comparison.runs import read_run
from nvf.runs.comparison.table import compare
from nvf.runs.resume import recorded
from nvf.runs.sweep import words
from nvf.training import cache
from nvf.training.checkpoints import load_attention
from nvf.training.fit import saved_step
from seals import reseal

ROOM, SECONDS = 2**30, 20  # for one copy
MEMORY = {"rows": 40, "dim": 8, "seed": 0}  # of the run
ASKED = ["seed=0,1"]


def digest(found: Any) -> str:
    """Equal for equal answers, to the last bit."""
    if isinstance(found, Tensor):
        found = found.detach().numpy()
    if isinstance(found, np.ndarray):
        return hashlib.sha256(repr(found.tolist()).encode() if found.dtype == object else found.tobytes()).hexdigest()
    if isinstance(found, dict):
        return digest(np.array([f"{name} {digest(value)}" for name, value in found.items()], dtype=object))
    if isinstance(found, list | tuple):
        return digest(np.array([digest(part) for part in found], dtype=object))
    return repr(found)


def _search(folder: Path) -> Any:
    queries = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    pipeline = Pipeline.load(folder)
    texts = None if pipeline.words is None else [f"item {row} please" for row in range(9)]
    return pipeline.search(queries, k=6, texts=texts)


def _folder(path: Path) -> Path:
    """Of the pipeline that has this file."""
    return next((folder for folder in path.parents if (folder / "config.json").exists()), path.parent)


def _kept(path: Path) -> Any:
    kept = cache.read(path, VectorMemory.synthetic(**MEMORY))
    return None if kept is None else kept[0].state_dict()


def _attention(path: Path) -> Any:
    return load_attention(path, VectorMemory.synthetic(**MEMORY))[0].state_dict()


def _within(path: Path) -> Any:
    return load_attention(path, VectorMemory.synthetic(**MEMORY), kind="reranker")[0].state_dict()


def _figures(folder: Path) -> Any:
    return compare([folder]).text()


def _answered(folder: Path) -> Any:
    return read_run(folder / "results.json", "top1").answered()


PIPELINE = ("config.json", "memory.safetensors", "weights.safetensors", "ids.json", "index.safetensors")
INDEX = ("params.index.json", "vocab.index.json", *(f"{name}.csc.index.npy" for name in ("data", "indices", "indptr")))
WORDS = ("settings.json", "answers.npy", *(f"{channel}/{name}" for channel in ("text", "log") for name in INDEX))
CHECKPOINTS = "run/checkpoints"
DOORS: dict[str, Callable[[Path], Any]] = {
    **{f"{kind}/{name}": lambda path: _search(path.parent) for kind in ("hnsw", "ivf") for name in PIPELINE},
    **{f"ivf/words/{name}": lambda path: _search(_folder(path)) for name in WORDS},
    f"{CHECKPOINTS}/attention/best.safetensors": _attention,
    f"{CHECKPOINTS}/reranker/best.safetensors": _within,
    f"{CHECKPOINTS}/reranker/last.ckpt": saved_step,
    "kept/attention.safetensors": _kept,
    "run/results.json": lambda path: _figures(path.parent),
    "run/answered.npy": lambda path: _answered(path.parent),
    "run/run.json": lambda path: recorded(path.parent),
    "sweeps/day/time/sweep.json": lambda path: words(path.parent),
}
# What has no hash, or none that is checked yet: a damaged figure is a figure.
UNHASHED = ("run/results.json", "run/answered.npy")


def furnish(place: Path, train: Callable[[Path, Path], None]) -> None:
    """Make all of these files: two pipelines, and with `train`, given folders for them, a run and its cache."""
    torch.manual_seed(0)
    rows = VectorMemory.synthetic(rows=30, dim=8, seed=0)
    memory = VectorMemory.restore(rows.rows, rows.fingerprint, np.array([f"item {row}" for row in range(30)], object))
    plain = SoftAttention(memory, transform="residual", hidden=4, keys="learned", biased=True)
    log = Evidence.gather(memory, unit(torch.randn(20, 8)), torch.randint(30, (20, 1)), worded=True)
    weighing = EvidenceReranker(len(log.features), hidden=(4, 4))
    made = {
        "hnsw": Pipeline(plain, Reranker(8, kind="residual", hidden=(6, 4)), k=4),
        "ivf": Pipeline(SoftAttention(memory, worded=True), weighing, k=4, evidence=log),
    }
    asked = [f"where is item {row}" for row in range(20)]
    made["ivf"].words = Words.gather([f"item {row}" for row in range(30)], asked, torch.arange(20).unsqueeze(-1))
    made["ivf"].attention.word_weights += 0.1
    for kind, pipeline in made.items():
        pipeline.requires_grad_(False).eval()
        settings = {"m": 2, "ef_search": 12} if kind == "hnsw" else {"nlist": 5, "nprobe": 3}
        pipeline.index = build_index(pipeline.keys(), kind, **settings)
        pipeline.save(place / kind)
    train(place / "run", place / "cache")
    (entry,) = (place / "cache").glob("*.safetensors")
    (place / "kept").mkdir()
    shutil.move(entry, place / "kept/attention.safetensors")
    (place / "sweeps/day/time").mkdir(parents=True)
    (place / "sweeps/day/time/sweep.json").write_text(json.dumps(sealed({"overrides": ASKED})))


def opened(path: Path, door: str) -> str:
    """What comes of reading a file: `refused`, `nothing`, the digest of what was found, or the fault."""
    try:
        found = DOORS[door](path)
    except InputError:
        return "refused"
    except Exception as fault:  # each of them is a find
        return f"fault {type(fault).__name__}: {fault}"[:300]
    return "nothing" if found is None else digest(found)


def copies(path: Path, count: int, seed: int, *, forged: bool) -> Iterator[None]:
    """Put so many damaged copies in the file's place, with the hashes made right again if forged; then the file."""
    folder = _folder(path)
    before = {own: own.read_bytes() for own in {*folder.iterdir(), *path.parent.iterdir()} if own.is_file()}
    for data in mutations(before[path], count, seed):
        path.write_bytes(data)
        if forged:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                reseal(folder)
        yield
        for own, content in before.items():
            own.write_bytes(content)


def main(place: Path, count: int, seed: int, *, forged: bool) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for door in DOORS:  # whatever is imported late is imported now
        print(json.dumps({"door": door, "expected": opened(place / door, door)}), flush=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    for door in DOORS:
        for attempt, _ in enumerate(copies(place / door, count, seed, forged=forged)):
            print(json.dumps({"door": door, "attempt": attempt}), flush=True)
            signal.alarm(SECONDS)
            print(json.dumps({"door": door, "attempt": attempt, "found": opened(place / door, door)}), flush=True)
            signal.alarm(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), forged=sys.argv[4] == "forged")
