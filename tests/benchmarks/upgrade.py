"""Queries of a new embedding model over the vectors of an old one: NVF next to maps between the models.

    python tests/benchmarks/upgrade.py dir=path/to/folder [seed=0] [output=table.md] [settings of NVF's runs]

The folder holds corpus.npy, (N, D), by the old model, and {train,val,test}_queries.npy, (n, Dq), by the new one, with
their targets; reference_old_train_queries.npy are the old halves of pairs, reference_old_test_queries.npy and
reference_new_corpus.npy what is compared with. Everything is fitted twice: on the log alone, each training query with
its target's row, and on pairs, each training query by both models (NVF sees the log beside them).

The others map queries into the space of the rows: a ridge, and what Drift-Adapter (arXiv 2509.23471) compares. Their
hyperparameters are chosen on validation queries, and every method is asked the test queries once.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import nvf_settings, read
from fitting import fit
from nvf import InputError, Pipeline
from nvf.data.queries import QueryBatch, Recorded
from nvf.models.memory import unit
from nvf.ops.ranks import target_ranks
from nvf.options import Option, parse, path, whole
from nvf.statistics import in_percent, wilson
from nvf.train import train
from timing import table
from tuned_search import Asked, Figures, Search, figures

STRENGTHS = tuple(10.0**power for power in (-4, -3, -2, -1, 0, 1))  # of a ridge, by the mean eigenvalue
RANKS, RATES, HIDDEN = (16, 32, 64, 128, 256), (1e-4, 3e-4, 1e-3, 3e-3), 256
DEPTHS = (1, 5, 10)
PAIRS = "reference_old_train_queries.npy"
Move = Callable[[Tensor], Tensor]  # of queries, (B, Dq) -> (B, D)
Both = tuple[Tensor, Tensor]  # (P, Dq) of the new model and (P, D) of the old
OPTIONS = (
    Option("dir", "the folder of embeddings", read=path),
    Option("seed", "of every fit", 0, whole),
    Option("output", "where the table goes too", None, path),
)


def affine(both: Both, strength: float, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """The ridge map, (Dq, D), of one to the other and its offset, (D,); of this rank at most, by the best directions.

    With a rank it minimises the squared error of what the ridge predicts among all maps of that rank.
    """
    new, old = (part.double() for part in both)
    centred, wanted = new - new.mean(dim=0), old - old.mean(dim=0)
    squares = centred.T @ centred
    squares.diagonal().add_(strength * squares.diagonal().mean())
    fitted = torch.linalg.solve(squares, centred.T @ wanted)
    if rank is not None:
        directions = torch.linalg.svd(centred @ fitted, full_matrices=False).Vh[:rank]
        fitted = fitted @ directions.T @ directions
    return fitted.float(), (old.mean(dim=0) - new.mean(dim=0) @ fitted).float()


def mapped(matrix: Tensor, offset: Tensor | float) -> Move:
    return lambda queries: F.normalize(queries @ matrix + offset, dim=-1)


def ridges(both: Both) -> Iterator[Move]:
    """One for each strength."""
    for strength in STRENGTHS:
        yield mapped(*affine(both, strength))


def procrustes(both: Both) -> Iterator[Move]:
    """The map with orthonormal columns (or rows) that turns one into the other, as they are or both centred."""
    for centred in (False, True):
        new, old = (part.double() for part in both)
        middles = [part.mean(dim=0) if centred else part.mean(dim=0) * 0 for part in (new, old)]
        left, _, right = torch.linalg.svd((new - middles[0]).T @ (old - middles[1]), full_matrices=False)
        turn = left @ right
        yield mapped(turn.float(), (middles[1] - middles[0] @ turn).float())


def low_rank(both: Both) -> Iterator[Move]:
    """One for each rank and strength."""
    for rank in RANKS:
        for strength in STRENGTHS:
            yield mapped(*affine(both, strength, rank))


class ResidualMLP(nn.Module):
    """normalize(q A + c + f(q)), with f of two layers, zero at first, behind a ridge that is fitted on."""

    def __init__(self, matrix: Tensor, offset: Tensor) -> None:
        super().__init__()
        inner, outer = matrix.shape
        self.skip, self.first, self.second = nn.Linear(inner, outer), nn.Linear(inner, HIDDEN), nn.Linear(HIDDEN, outer)
        self.skip.weight.data, self.skip.bias.data = matrix.T.contiguous(), offset
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, queries: Tensor) -> Tensor:
        return F.normalize(self.skip(queries) + self.second(F.gelu(self.first(queries))), dim=-1)


def residual_mlp(both: Both, quality: Callable[[Move], Figures], seed: int) -> Iterator[Move]:
    """One for each learning rate, by the squared error, its epoch chosen on validation too."""
    start = max((affine(both, strength) for strength in STRENGTHS), key=lambda of: quality(mapped(*of)))
    new, old = both
    for rate in RATES:
        torch.manual_seed(seed)
        model = ResidualMLP(*start)
        groups = [{"params": list(model.parameters()), "lr": rate}]

        def loss(part: Tensor, model: ResidualMLP = model) -> Tensor:
            return (model(new[part]) - old[part]).square().sum(dim=-1).mean()

        def validated(model: ResidualMLP = model) -> Figures:
            return quality(model)

        fit(model, groups, loss, torch.arange(len(new)), validated, seed=seed)
        yield model.eval()


def maps(both: Both, source: Recorded, seed: int) -> Iterator[tuple[str, Move]]:
    """Each kind of map, the one of it that validates best."""
    val = Asked(source.splits["val"].queries, source.splits["val"].targets)

    def quality(move: Move) -> Figures:
        return figures(Search(move, source.memory.rows), val)

    kinds = {
        "ridge to the rows": ridges(both),
        "orthogonal Procrustes": procrustes(both),
        "low-rank affine": low_rank(both),
        "residual MLP": residual_mlp(both, quality, seed),
    }
    for name, choices in kinds.items():
        yield name, max(choices, key=quality)


def nvf(folder: Path, pairs: Both | None, seed: int, overrides: Sequence[str] = ()) -> Pipeline:
    """NVF's pipeline, of a run on the folder, or on it with pairs."""
    with tempfile.TemporaryDirectory() as place:
        data, run = Path(place) / "data", Path(place) / "run"
        data.mkdir()
        run.mkdir()
        for file in folder.iterdir():
            if not file.name.startswith(("pairs_", "reference_")):
                shutil.copy(file, data)
        for name, vectors in zip(("new", "old"), pairs or (), strict=False):
            np.save(data / f"pairs_{name}.npy", vectors.numpy())
        ours = [f"seed={seed}", "cache=off", "dashboards=none", "data.foreign=true", *overrides]
        train(nvf_settings(data, ours), run, started=time.perf_counter())
        return Pipeline.load(run / "pipeline")


@torch.no_grad()
def answers(pipeline: Pipeline) -> dict[str, Callable[[QueryBatch], Tensor]]:
    """The scores of all rows, (B, N), by the alignment alone, by stage 1, and by both stages."""
    memory = pipeline.memory
    return {
        "NVF, alignment alone": lambda batch: memory.aligned_queries(batch.queries) @ memory.keys.T,
        "NVF, stage 1": lambda batch: pipeline.attention(batch.queries),
        "NVF, pipeline": lambda batch: pipeline(batch.queries, answer=False).ranking,
    }


@torch.no_grad()
def row(name: str, fitted_on: str, score: Callable[[QueryBatch], Tensor], test: QueryBatch) -> list[str]:
    """A line of the table."""
    ranks = target_ranks(score(test), test.targets)
    shares = [in_percent(wilson(int((ranks <= depth).sum()), len(ranks))).strip() for depth in DEPTHS]
    print(name, fitted_on, *shares, sep=" | ", file=sys.stderr, flush=True)
    return [name, fitted_on, *shares]


def compare(folder: Path, seed: int, overrides: Sequence[str] = ()) -> list[list[str]]:
    """Every line of the table: both references, then every method, on the log alone and on pairs."""
    source = read(folder, seed)
    if not source.foreign:
        raise InputError(f"dir={folder}: its queries are as wide as its rows; name a folder with another model's")
    memory, test, log = source.memory, source.splits["test"], source.splits["train"]
    lines = [
        row({"old": "old queries, old rows", "anew": "everything embedded anew"}[name], "-", lambda _, of=of: of, test)
        for name, of in ((name, asked @ rows.T) for name, (asked, rows) in source.references["test"].items())
    ]
    query, place = (log.targets >= 0).nonzero(as_tuple=True)
    fitted_on: dict[str, Both] = {"log": (log.queries[query], memory.take(log.targets[query, place]))}
    if (folder / PAIRS).exists():
        given = [torch.from_numpy(np.load(folder / name)) for name in ("train_queries.npy", PAIRS)]
        fitted_on["pairs"] = unit(given[0]), unit(given[1])
    for name, both in fitted_on.items():
        for kind, move in maps(both, source, seed):
            lines.append(row(kind, name, lambda batch, move=move: move(batch.queries) @ memory.rows.T, test))
        pipeline = nvf(folder, both if name == "pairs" else None, seed, overrides)
        for part, score in answers(pipeline).items():
            lines.append(row(part, name, score, test))
    return lines


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    names = [option.name for option in OPTIONS]
    options = parse([word for word in arguments if word.partition("=")[0] in names], OPTIONS)
    overrides = [word for word in arguments if word.partition("=")[0] not in names]
    titles = ("method", "fitted on", *(f"Top-{depth}" for depth in DEPTHS))
    text = table(titles, compare(options["dir"], options["seed"], overrides))
    print(text)
    if options["output"] is not None:
        options["output"].write_text(f"{text}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
