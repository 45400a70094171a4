"""Top-1 on items that a pipeline got after it was fitted, and the seconds of an update.

    python tests/benchmarks/update.py dir=FOLDER [seed=0] [work=FOLDER]
    python tests/benchmarks/update.py [rows=100000] [add=10000] [dim=384]

With a folder of embeddings in .npy, split into train, val and test, a random fifth of its items is held out with their
queries, a pipeline is fitted on the rest and then gets these items, without their queries. Both kinds of test queries
are searched over all items, next to exact search and, where there are texts, to words beside it; those of the other
items also before the update. Without a folder, random rows join a pipeline over random rows, with a hub correction,
keys that may move and a log of 10,000 queries, without texts.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvf.data.beside import read_texts
from nvf.data.folder import read_recorded
from nvf.data.queries import QueryBatch
from nvf.embed import write_texts
from nvf.evaluation.calibration import fit_words
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker
from nvf.options import Option, parse, path, whole
from nvf.statistics import wilson
from timing import table

SPLITS = ("train", "val", "test")
OPTIONS = (
    Option("dir", "a folder of embeddings; null measures an update's seconds", None, path),
    Option("seed", "of the items that are held out", 0, whole),
    Option("work", "where the pipeline is fitted, and stays; null is a temporary folder", None, path),
    Option("rows", "of the memory", 100_000, whole),
    Option("add", "rows that it gets", 10_000, whole),
    Option("dim", "D", 384, whole),
)


def held_out_items(items: int, seed: int) -> np.ndarray:
    """A random fifth, (N,) bool."""
    held = np.zeros(items, dtype=bool)
    held[np.random.default_rng(seed).permutation(items)[: items // 5]] = True
    return held


def split(folder: Path, rest: Path, held: np.ndarray) -> dict[str, np.ndarray]:
    """Write the folder without the items held out and their queries; return which queries of each split those are."""
    rest.mkdir(parents=True, exist_ok=True)
    number = np.where(held, -1, np.cumsum(~held) - 1)
    np.save(rest / "corpus.npy", np.load(folder / "corpus.npy")[~held])
    if (texts := read_texts(folder, "corpus", len(held))) is not None:
        write_texts(rest / "texts.jsonl", [text for text, out in zip(texts, held, strict=True) if not out])
    theirs = {}
    for name in SPLITS:
        queries, targets = (np.load(folder / f"{name}_{part}.npy") for part in ("queries", "targets"))
        targets = targets.reshape(len(queries), -1)
        theirs[name] = (held[targets] & (targets >= 0)).any(axis=1)
        np.save(rest / f"{name}_queries.npy", queries[~theirs[name]])
        np.save(rest / f"{name}_targets.npy", np.where(targets >= 0, number[targets], -1)[~theirs[name]])
        if (texts := read_texts(folder, name, len(queries))) is not None:
            kept = [text for text, out in zip(texts, theirs[name], strict=True) if not out]
            write_texts(rest / f"{name}_texts.jsonl", kept)
    return theirs


def fit(folder: Path, run: Path) -> Pipeline:
    """The pipeline that `nvf.train` fits with its defaults."""
    if not (run / "pipeline").exists():
        words = ["data=embeddings", f"data.dir={folder}", f"hydra.run.dir={run}", "cache=off"]
        subprocess.run([sys.executable, "-m", "nvf.train", *words], check=True)
    return Pipeline.load(run)


def top1(found: Any, targets: Tensor) -> str:
    """Percent of queries whose first row is a target, with its interval."""
    hits = int((torch.as_tensor(found)[:, :1] == targets).any(dim=-1).sum())
    value, low, high = (100 * share for share in wilson(hits, len(targets)).values())
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


def compare(folder: Path, seed: int, work: Path) -> list[list[str]]:
    """Fit, add, and return Top-1 on the queries of added items, and of the others before and after."""
    vectors = torch.from_numpy(np.load(folder / "corpus.npy"))
    held = held_out_items(len(vectors), seed)
    theirs = split(folder, work / "rest", held)["test"]
    before = fit(work / "rest", work / "run")
    texts = read_texts(folder, "corpus", len(vectors)) if before.words is not None else None
    asked = read_texts(folder, "test", len(theirs)) if before.words is not None else None
    new = None if texts is None else [text for text, out in zip(texts, held, strict=True) if out]
    after = before.updated(add=vectors[torch.from_numpy(held)], texts=new)

    queries, targets = (torch.from_numpy(np.load(folder / f"test_{part}.npy")) for part in ("queries", "targets"))
    targets = targets.reshape(len(queries), -1)
    place = torch.from_numpy(np.where(held, (~held).sum() + np.cumsum(held), np.cumsum(~held)) - 1)
    targets = place[targets].where(targets >= 0, -2)  # numbered as in the updated memory
    first = after.memory.vectors_of(after.memory.rows_of(targets.clamp(min=0)))
    targets = first.where(targets >= 0, -2)  # of equal vectors a search returns the first
    exact = {"exact search": SoftAttention(after.memory, transform="identity")}
    if before.words is not None:
        exact["words + exact search"] = SoftAttention(after.memory, transform="identity", worded=True)
        fit_words(exact["words + exact search"], validation(work / "rest", before.memory, after), ("text",))
    rows = []
    for name, some in (("added items", theirs), ("other items", ~theirs)):
        chosen = torch.from_numpy(some)
        words = None if asked is None else [text for text, one in zip(asked, some, strict=True) if one]
        block, right = queries[chosen], targets[chosen]
        found = {}
        if name == "other items":  # which have fewer rivals then, for exact search too
            alone = SoftAttention(before.memory, transform="identity").candidates(unit(block), 1).rows
            found["before"] = before.search(block, texts=words).rows
            found["exact search before"] = before.memory.vectors_of(alone)
        found["updated"] = after.search(block, texts=words).rows
        scores = None if words is None else after.words.scores(words)
        for search, attention in exact.items():
            best = attention.candidates(unit(block), 1, words=scores).rows
            found[search] = after.memory.vectors_of(best)
        rows += [[f"{name}, {int(chosen.sum()):,} queries", search, top1(of, right)] for search, of in found.items()]
    return rows


def validation(folder: Path, before: VectorMemory, after: Pipeline) -> QueryBatch:
    """The validation queries of the other items, with what their words match among all items."""
    batch = read_recorded(folder, before, seed=0).splits["val"]
    texts = read_texts(folder, "val", len(np.load(folder / "val_queries.npy")))
    assert len(texts or ()) == len(batch.queries), "some validation queries are equal"
    return batch._replace(words=after.words.scores(texts))  # rows that stay keep their numbers


def made(rows: int, dim: int) -> Pipeline:
    """A pipeline over random rows, with learned keys, a hub correction and a log of 10,000 queries."""
    memory = VectorMemory.synthetic(rows=rows, dim=dim, seed=0)
    attention = SoftAttention(memory, transform="linear", keys="learned", biased=True, hubs=[0.5, 20.0])
    queries = unit(torch.randn(10_000, dim))
    evidence = Evidence.gather(memory, queries, torch.randint(rows, (10_000, 1)))
    return Pipeline(attention, EvidenceReranker(len(FEATURES)), k=20, evidence=evidence).eval()


def main() -> None:
    options = parse(sys.argv[1:], OPTIONS)
    if options["dir"] is None:
        pipeline = made(options["rows"], options["dim"])
        vectors = torch.randn(options["add"], options["dim"])
        started = time.perf_counter()
        after = pipeline.updated(add=vectors)
        added = time.perf_counter()
        after.updated(remove=[*range(0, options["rows"], max(1, options["rows"] // 100))])
        removed = time.perf_counter()
        print(f"{options['add']:,} rows added in {added - started:.1f} s, 100 removed in {removed - added:.1f} s")
        return
    with tempfile.TemporaryDirectory() as temporary:
        figures = compare(options["dir"], options["seed"], options["work"] or Path(temporary))
    print(table(("test queries of", "search", "Top-1 (95% interval)"), figures))


if __name__ == "__main__":
    main()
