"""NVF next to what else frozen vectors and texts allow, on any folder that `data=embeddings` reads; run on request.

    python tests/benchmarks/adapters.py data.dir=path/to/folder [seed=0] [output=table.md]

data.dir may name several folders, with commas between. How does a small log do? `subsample_rows=M` keeps M rows of the
corpus and the queries that they still answer; `subsample_train=N` keeps N training queries and N // 4 validation
queries, at least 50. With `run=path` NVF is a finished run on the folder. Every other setting goes to a new run of NVF,
as `python -m nvf.train` takes it. NUDGE needs `pip install nudge-ft`, and is left out without.

Every method is tuned on validation queries and reported once on test. Tables go to stdout, progress to stderr.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

import lexical
from baselines import baselines
from nvf import Pipeline
from nvf.data.folder import read_memory, read_recorded
from nvf.data.queries import Recorded
from nvf.data.splits import SPLITS
from nvf.errors import InputError
from nvf.ops.random_streams import stream
from nvf.ops.ranks import criterion
from nvf.overrides import quoted
from nvf.statistics import Interval, Z, in_percent, mean_interval
from nvf.train import CONF, train
from tuned_search import Asked, Lexicons, Problem, measured

SETTINGS = ("data.dir", "run", "seed", "output", "subsample_rows", "subsample_train")
FEWEST_VAL = 50
SIGNIFICANT = 2.576  # standard errors: p < 0.01
NVF = {"attention": "NVF, stage 1", "pipeline": "NVF, pipeline"}
SAFE = ("exact search", "words + exact search")  # what nobody should lose by training


class Row(NamedTuple):
    """A line of the table."""

    name: str
    found: dict[str, Tensor]  # each metric of each test query, (B,), see `baselines.measured`
    seconds: float  # of tuning and fitting
    val: float
    chosen: str


def compare(folder: Path, seed: int, overrides: Sequence[str] = (), run: Path | None = None) -> list[Row]:
    """Every baseline, exact search first, then NVF: stage 1 and the pipeline.

    Args:
        folder: of embeddings.
        seed: of the split, where the folder holds none, and of every fit.
        overrides: settings of NVF's run.
        run: of NVF, with this seed, if there is one already.
    """
    config = nvf_settings(folder, [f"seed={seed}", *overrides])  # first, so that a wrong one is refused at once
    source = read(folder, seed, config["data"]["words"])
    train_queries, val, test = batches(folder, source)
    rows = []
    for name, method in baselines(Problem(source.memory.rows, train_queries, val, seed)):
        rows.append(told(Row(name, measured(method.score, test), method.seconds, method.val.first, method.chosen)))
    if run is not None:
        return [*rows, *map(told, nvf_rows(run, test))]
    with tempfile.TemporaryDirectory() as new:
        train(config, Path(new), started=time.perf_counter())
        return [*rows, *map(told, nvf_rows(Path(new), test))]


def batches(folder: Path, source: Recorded) -> list[Asked]:
    """The queries of each split, with what their words match."""
    asked = lexical.asked(folder, source) if source.words is not None else None
    found: list[Lexicons | None] = [None for _ in SPLITS]
    if asked is not None:
        by_lexicon = [
            lexical.scores(source.texts, [asked[split] for split in SPLITS], name) for name in lexical.LEXICONS
        ]
        found = [Lexicons(*of_split) for of_split in zip(*by_lexicon, strict=True)]
    batches = [source.splits[split] for split in SPLITS]
    return [
        Asked(one.queries, one.targets, one.words, words, one.gains) for one, words in zip(batches, found, strict=True)
    ]


def nvf_settings(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of NVF's run on the folder, plain: the defaults, but for the overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = ["data=embeddings", f"data.dir={quoted(str(folder))}", "trainer.enable_progress_bar=false", *overrides]
        config: Any = OmegaConf.to_container(compose("config", given), resolve=True)
    return config


def nvf_rows(run: Path, test: Asked) -> list[Row]:
    """A run of NVF, whose saved pipeline is asked the test queries."""
    results = json.loads((run / "results.json").read_text())
    pipeline = Pipeline.load(run / "pipeline")
    for variant in results["selection"]:
        print(f"  {100 * variant['val_top1']:5.1f} on validation: {_described(variant)}", file=sys.stderr)
    chosen = next(_described(variant) for variant in results["selection"] if variant["chosen"])
    methods: dict[str, tuple[Callable[[Asked], Tensor], str]] = {
        "attention": (lambda batch: pipeline.attention(batch.queries, batch.words), chosen),
        "pipeline": (lambda batch: pipeline(batch.queries, batch.words, answer=False).ranking, f"k = {pipeline.k}"),
    }
    seconds = results["seconds"]["attention"], results["seconds"]["attention"] + results["seconds"]["reranker"]
    by = criterion(test.targets)
    return [
        Row(NVF[stage], measured(score, test), spent, results["val"][stage][by]["value"], about)
        for (stage, (score, about)), spent in zip(methods.items(), seconds, strict=True)
    ]


def _described(variant: dict[str, Any]) -> str:
    return "{transform} transform, {keys} keys, {epochs} epochs, share {hub_share:g}".format(**variant)


def told(row: Row) -> Row:
    """The row, after a line of progress."""
    print(" | ".join(_cells(row)), file=sys.stderr, flush=True)
    return row


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, in percent with 95% intervals."""
    titles = ("method", *(f"test {metric}" for metric in rows[0].found), "seconds", "validation", "chosen there")
    cells = [titles, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths))
    return "\n".join(f"{line} |" if line[1] == " " else f"{line}|" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    shares = [in_percent(interval(of)).strip() for of in row.found.values()]
    return (row.name, *shares, f"{row.seconds:.0f}", f"{100 * row.val:.1f}", row.chosen or "-")


def interval(values: Tensor) -> Interval:
    """The mean of values in 0..1, (B,), with its 95% interval."""
    error = float(values.std(correction=0)) / len(values) ** 0.5
    return mean_interval(float(values.mean()), error, count=len(values))


def verdict(rows: Sequence[Row]) -> str:
    """Whether NVF is above the strongest baseline of each metric, then whether it is significantly below what is safe.

    The strongest is the one with the best figure on test queries, a choice in its favour. Differences are paired.
    """
    *others, _, nvf = rows
    lines = []
    for metric, ours in nvf.found.items():
        strongest = max(others, key=lambda row: float(row.found[metric].mean()))
        difference, error = _difference(ours, strongest.found[metric])
        place = "above" if difference > 0 else "BELOW" if difference < 0 else "level with"
        reach = f"{100 * (difference - Z * error):+.1f} to {100 * (difference + Z * error):+.1f}"
        lines.append(f"{metric}: {100 * difference:+.1f} ({reach}), {place} {strongest.name}")
    for other in (row for row in others if row.name in SAFE):
        for metric in ("Top-1", "nDCG@10"):
            difference, error = _difference(nvf.found[metric], other.found[metric])
            below = "SIGNIFICANTLY BELOW" if difference < -SIGNIFICANT * error else "not significantly below"
            lines.append(f"{metric}: {below} {other.name}")
    return "\n".join(f"- {line}" for line in lines)


def _difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The mean difference of two metrics of the same queries, and its standard error."""
    each = ours - theirs
    return float(each.mean()), float(each.std(correction=0)) / len(each) ** 0.5


def subsample(
    source: Recorded,
    folder: Path,
    seed: int,
    *,
    asked: Mapping[str, Sequence[str]] | None = None,
    subsample_rows: int | None = None,
    subsample_train: int | None = None,
) -> None:
    """Write a part of a folder of embeddings as another one, its splits as they were.

    Args:
        source: what was read from the first.
        folder: the other one; exists.
        seed: of what stays.
        asked: the texts of the queries of each split; without them no texts are written.
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
    if source.texts is not None and asked is not None:
        _write_texts(folder / "texts.jsonl", source.texts, kept)
    for name, split in source.splits.items():
        targets, order = places[split.targets].sort(dim=-1, descending=True)
        stay = (targets >= 0).any(dim=-1).nonzero().squeeze(-1)
        if len(stay) == 0:
            raise InputError(f"subsample_rows={subsample_rows} leaves no {name} query with a target; raise it")
        if subsample_train is not None and name != "test":
            few = subsample_train if name == "train" else min(len(stay), max(FEWEST_VAL, subsample_train // 4))
            stay = stay[_draw(len(stay), few, f"subsample_train ({name})", seed)]
        np.save(folder / f"{name}_queries.npy", split.queries[stay].numpy())
        np.save(folder / f"{name}_targets.npy", targets[stay].numpy())
        if split.gains is not None:
            np.save(folder / f"{name}_gains.npy", split.gains.gather(-1, order)[stay].numpy())
        if asked is not None:
            _write_texts(folder / f"{name}_texts.jsonl", asked[name], stay)


def _write_texts(path: Path, texts: Sequence[str], places: Tensor) -> None:
    path.write_text("".join(json.dumps({"text": texts[place]}) + "\n" for place in places.tolist()))


def _draw(count: int, few: int | None, name: str, seed: int) -> Tensor:
    if few is None:
        return torch.arange(count)
    if not 1 <= few <= count:
        raise InputError(f"{name}={few} is not in 1..{count}, what there is; lower it")
    return torch.randperm(count, generator=stream(seed, name))[:few]


def read(folder: Path, seed: int, words: Mapping[str, Any] | None = None) -> Recorded:
    """The memory and the queries of a folder, with what their words match if `words` says how they are taken apart."""
    return read_recorded(folder, read_memory(folder), seed=seed, words=words)


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
                source = read(Path(path), seed)
                subsample(source, folder, seed, asked=lexical.asked(Path(path), source), **parts)
            source = read(folder, seed)
            rows = compare(folder, seed, overrides, Path(given["run"]) if "run" in given else None)
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
