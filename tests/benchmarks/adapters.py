"""NVF next to what else frozen vectors allow, on any folder that `data=embeddings` reads; run on request.

    python tests/benchmarks/adapters.py data.dir=path/to/folder [seed=0] [output=table.md]

data.dir may name several folders, with commas between. How does a small log do? `subsample_rows=M` keeps M rows of the
corpus and the queries that they still answer, `subsample_train=N` keeps N training queries and N // 4 validation
queries, at least 50. Every other setting goes to NVF's run, as `python -m nvf.train` takes it.

Every method is tuned on validation queries and reported once on test. Tables go to stdout, progress to stderr.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from baselines import Problem, baselines, ranks
from nvf import Pipeline
from nvf.data.folder import read_memory, read_recorded
from nvf.data.queries import QueryBatch, Recorded
from nvf.data.splits import SPLITS
from nvf.errors import InputError
from nvf.ops.random_streams import stream
from nvf.ops.ranks import DEEPEST
from nvf.overrides import quoted
from nvf.statistics import in_percent, mcnemar, p_text, reciprocal_rank, wilson, wins_and_losses
from nvf.train import CONF, train

SETTINGS = ("data.dir", "seed", "output", "subsample_rows", "subsample_train")
FEWEST_VAL = 50
SIGNIFICANT = 0.01
NVF = {"attention": "NVF, stage 1", "pipeline": "NVF, pipeline"}
LINEAR = ("linear adapter, full softmax", "linear adapter, triplet loss")
TITLES = ("method", "test Top-1", "MRR@10", "McNemar p", "won/lost", "seconds", "val Top-1", "chosen on validation")


class Row(NamedTuple):
    """A line of the table."""

    name: str
    ranks: Tensor  # of the test queries' targets, (B,) from 1
    seconds: float  # of tuning and fitting
    val_top1: float
    chosen: str


def compare(folder: Path, source: Recorded, seed: int, overrides: Sequence[str] = ()) -> list[Row]:
    """Every baseline, exact search first, then NVF: stage 1 and the pipeline.

    Args:
        folder: of embeddings.
        source: what was read from it with the same seed.
        seed: of the split, where the folder holds none, and of every fit.
        overrides: settings of NVF's run.
    """
    config = nvf_settings(folder, [f"seed={seed}", *overrides])  # first, so that a wrong one is refused at once
    train_queries, val, test = (source.splits[split] for split in SPLITS)
    rows = []
    for name, method in baselines(Problem(source.memory.rows, train_queries, val, seed)):
        found = ranks(method.score, test)
        rows.append(told(Row(name, found, method.seconds, method.val.top1, method.chosen)))
    return [*rows, *map(told, nvf_rows(config, test))]


def nvf_settings(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of NVF's run on the folder, plain: the defaults, but for the overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = ["data=embeddings", f"data.dir={quoted(str(folder))}", "trainer.enable_progress_bar=false", *overrides]
        config: Any = OmegaConf.to_container(compose("config", given), resolve=True)
    return config


def nvf_rows(config: dict[str, Any], test: QueryBatch) -> list[Row]:
    """NVF's run; its pipeline, saved and loaded, is asked the test queries."""
    with tempfile.TemporaryDirectory() as run:
        train(config, Path(run), started=time.perf_counter())
        results = json.loads((Path(run) / "results.json").read_text())
        pipeline = Pipeline.load(Path(run) / "pipeline")
    for variant in results["selection"]:
        print(f"  {100 * variant['val_top1']:5.1f} on validation: {_described(variant)}", file=sys.stderr)
    chosen = next(_described(variant) for variant in results["selection"] if variant["chosen"])
    methods: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
        "attention": (pipeline.attention, chosen),
        "pipeline": (lambda queries: pipeline(queries).ranking, f"k = {pipeline.k}"),
    }
    seconds = results["seconds"]["attention"], results["seconds"]["attention"] + results["seconds"]["reranker"]
    return [
        Row(NVF[stage], ranks(score, test), spent, results["val"][stage]["top1"]["value"], about)
        for (stage, (score, about)), spent in zip(methods.items(), seconds, strict=True)
    ]


def _described(variant: dict[str, Any]) -> str:
    return "{transform} transform, {keys} keys, {epochs} epochs, share {hub_share:g}".format(**variant)


def told(row: Row) -> Row:
    """The row, after a line of progress."""
    print(f"{100 * share(row):5.1f} {row.name} ({row.seconds:.0f} s; {row.chosen})", file=sys.stderr, flush=True)
    return row


def share(row: Row) -> float:
    """Test Top-1."""
    return float((row.ranks == 1).double().mean())


def against(row: Row, other: Row) -> tuple[int, int]:
    """How many queries only the first method answers, and how many only the other."""
    return wins_and_losses(row.ranks == 1, other.ranks == 1)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, in percent with 95% intervals, wins and losses against the first row."""
    cells = [TITLES, *(_cells(row, rows[0]) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(TITLES))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths))
    return "\n".join(f"{line} |" if line[1] == " " else f"{line}|" for line in lines)


def _cells(row: Row, exact: Row) -> tuple[str, ...]:
    counts = np.bincount(row.ranks.clamp(max=DEEPEST + 1).numpy() - 1, minlength=DEEPEST + 1)
    top1, mrr10 = wilson(int(counts[0]), len(row.ranks)), reciprocal_rank(counts)
    shares = [in_percent(figure).strip() for figure in (top1, mrr10)]
    wins, losses = against(row, exact)
    versus = ("-", "-") if row is exact else (p_text(mcnemar(wins, losses)).removeprefix("= "), f"{wins}/{losses}")
    return (row.name, *shares, *versus, f"{row.seconds:.0f}", f"{100 * row.val_top1:.1f}", row.chosen or "-")


def verdict(rows: Sequence[Row]) -> str:
    """Whether NVF is significantly below exact search, and whether it is above the linear adapters."""
    named = {row.name: row for row in rows}
    nvf, exact = named[NVF["pipeline"]], rows[0]
    wins, losses = against(nvf, exact)
    p = mcnemar(wins, losses)
    below = "SIGNIFICANTLY BELOW" if losses > wins and p < SIGNIFICANT else "not significantly below"
    parts = [f"NVF is {below} exact search (won {wins}, lost {losses}, p {p_text(p)})"]
    for name in LINEAR:
        wins, losses = against(nvf, named[name])
        place = "above" if wins > losses else "BELOW" if wins < losses else "level with"
        gap = 100 * (share(nvf) - share(named[name]))
        parts.append(f"{place} the {name} by {gap:+.1f} (won {wins}, lost {losses}, p {p_text(mcnemar(wins, losses))})")
    return "; ".join(parts)


def subsample(
    source: Recorded, folder: Path, seed: int, *, subsample_rows: int | None = None, subsample_train: int | None = None
) -> None:
    """Write a part of a folder of embeddings as another one, its splits as they were.

    Args:
        source: what was read from the first.
        folder: the other one; exists.
        seed: of what stays.
        subsample_rows: how many rows of the corpus, with the queries that they still answer; all if None.
        subsample_train: how many training queries, and a quarter as many for validation, at least 50; all if None.

    Raises:
        InputError: more than there are, or a split that nothing is left of.
    """
    count = len(source.memory)
    kept = _draw(count, subsample_rows, "subsample_rows", seed).sort().values
    places = torch.full((count + 1,), -1)  # the last is that of -1, the padding
    places[kept] = torch.arange(len(kept))
    np.save(folder / "corpus.npy", source.memory.rows[kept].numpy())
    for name, split in source.splits.items():
        targets = places[split.targets].sort(dim=-1, descending=True).values
        stay = (targets >= 0).any(dim=-1).nonzero().squeeze(-1)
        if len(stay) == 0:
            raise InputError(f"subsample_rows={subsample_rows} leaves no {name} query with a target; raise it")
        if subsample_train is not None and name != "test":
            few = subsample_train if name == "train" else min(len(stay), max(FEWEST_VAL, subsample_train // 4))
            stay = stay[_draw(len(stay), few, f"subsample_train ({name})", seed)]
        np.save(folder / f"{name}_queries.npy", split.queries[stay].numpy())
        np.save(folder / f"{name}_targets.npy", targets[stay].numpy())


def _draw(count: int, few: int | None, name: str, seed: int) -> Tensor:
    if few is None:
        return torch.arange(count)
    if not 1 <= few <= count:
        raise InputError(f"{name}={few} is not in 1..{count}, what there is; lower it")
    return torch.randperm(count, generator=stream(seed, name))[:few]


def read(folder: Path, seed: int) -> Recorded:
    """The memory and the queries of a folder."""
    return read_recorded(folder, read_memory(folder), seed=seed)


def main(arguments: Sequence[str]) -> None:
    """Compare on every folder, and print a table for each."""
    given = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
    if "data.dir" not in given:
        raise InputError("data.dir is not set; name the folder that holds your corpus and queries: data.dir=path")
    seed, texts = int(given.get("seed", 0)), []
    parts = {name: int(given[name]) for name in ("subsample_rows", "subsample_train") if name in given}
    overrides = [argument for argument in arguments if argument.partition("=")[0] not in SETTINGS]
    for path in given["data.dir"].split(","):
        with tempfile.TemporaryDirectory() as part:
            folder = Path(part if parts else path)
            if parts:
                subsample(read(Path(path), seed), folder, seed, **parts)
            source = read(folder, seed)
            rows = compare(folder, source, seed, overrides)
        counts = ", ".join(f"{len(source.splits[split].queries):,} {split}" for split in SPLITS)
        settings = " ".join([Path(path).name, *(f"{name}={value}" for name, value in parts.items()), *overrides])
        heading = f"### {settings}: {len(source.memory):,} rows; {counts} queries; seed {seed}"
        texts.append(f"{heading}\n\n{table(rows)}\n\n{verdict(rows)}\n")
        print(texts[-1], flush=True)
        if "output" in given:
            Path(given["output"]).write_text("\n".join(texts))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
