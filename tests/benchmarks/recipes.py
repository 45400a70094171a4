"""How long until the pipeline's Top-1 is 90%: NVF's default recipe next to the recipe that it grew from.

    python tests/benchmarks/recipes.py [seeds=0,1,2] [goal=0.9] [threads=2] [folder=outputs/benchmarks]

On the default data (1000 rows of 128 dimensions, `nearest`), with the fixed test queries. NVF is fitted as
`python -m nvf.train` does it, everything included but imports: its validations, checkpoints, curves and calibration.
The original recipe, as conf/experiment/original.yaml says it, is a plain loop: tensors in memory, fused Adam, neither
validation nor logging. The clock runs from an empty start, data included; it stands still while Top-1 is looked at.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from nvf.data.queries import QueryBatch, Source
from nvf.evaluation.calibration import quality
from nvf.ops.random_streams import stream, stream_seed
from nvf.options import Option, parse
from nvf.training.build import Settings, build
from nvf.training.modules import RerankerModule
from nvf.training.select import fit_attention, fit_reranker
from timing import COMMON, settings, table, watched_by, whole_numbers, write_json

TARGET = 0.1  # of the original recipe's seconds
EVERY = 20  # steps of NVF's reranker between two looks
LOOKS = 4  # an epoch of the original's
SCORED = 4096  # queries at a time, where all rows are scored
OPTIONS = (
    Option("seeds", "each is a run of either recipe", [0, 1, 2], whole_numbers),
    Option("goal", "Top-1 on the test queries", 0.9, float),
    *COMMON,
)


class Reached(Exception):
    """Training has done what was asked for."""


class Goal:
    """A clock that is stopped by the first Top-1 that is high enough."""

    def __init__(self, top1: float) -> None:
        self.wanted, self.best = top1, 0.0
        self.held = 0.0
        self.stages: dict[str, float] = {}  # seconds at the end of each
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start, without those that do not count."""
        return time.perf_counter() - self.started - self.held

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside, the clock stands still."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.held += time.perf_counter() - before

    def look(self, top1: Callable[[], float]) -> None:
        """Raises Reached if it is high enough."""
        with self.uncounted():
            self.best = max(self.best, top1())
        if self.best >= self.wanted:
            raise Reached

    def found(self) -> dict[str, Any]:
        """How it went, where it ends."""
        return {
            "seconds": self.seconds,
            "reached": self.best >= self.wanted,
            "best_top1": self.best,
            "stage_1_seconds": self.stages["stage 1"],
        }


class Look(Callback):
    """Asks for the Top-1 of the pipeline that is fitted, every so many steps."""

    def __init__(self, goal: Goal, test: QueryBatch) -> None:
        self.goal, self.test = goal, test

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        assert isinstance(module, RerankerModule)
        if trainer.global_step % EVERY == 0:
            self.goal.look(lambda: float(quality(module.model, self.test).double().mean()))
            module.train()


def nvf(config: Settings, goal_top1: float) -> dict[str, Any]:
    """NVF's recipe until the goal, or to its end."""
    test = build(config).queries("test")
    with tempfile.TemporaryDirectory() as place:
        folder, goal = Path(place), Goal(goal_top1)
        built = build(config)
        chosen = fit_attention(built, folder)
        goal.stages["stage 1"] = goal.seconds
        with suppress(Reached), watched_by(Look(goal, test)):
            fit_reranker(built, chosen, folder)
        return goal.found()


class Peripheral(nn.Module):
    """The original's stage 1: logits beta T(q) V^T, (B, N), with T = Linear-ReLU-Linear, not normalised."""

    def __init__(self, rows: Tensor, beta: float) -> None:
        super().__init__()
        dim = rows.shape[1]
        self.rows = rows
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.log_beta = nn.Parameter(torch.tensor(beta).log())

    def forward(self, queries: Tensor) -> Tensor:
        return self.log_beta.exp() * self.transform(queries) @ self.rows.T


class Foveal(nn.Module):
    """The original's stage 2: a score a candidate, (B, k), from [q, c, q - c, q * c] put together."""

    def __init__(self, dim: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        wide, narrow = hidden
        self.network = nn.Sequential(
            *(nn.Linear(4 * dim, wide), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, 1)),
        )

    def forward(self, queries: Tensor, candidates: Tensor) -> Tensor:
        q = queries.unsqueeze(1).expand_as(candidates)  # (B, k, D)
        return self.network(torch.cat([q, candidates, q - candidates, q * candidates], dim=-1)).squeeze(-1)


class Candidates(NamedTuple):
    """Queries with the k best rows of a fitted stage 1, and which of them is the target."""

    queries: Tensor  # (B, D)
    rows: Tensor  # (B, k)
    labels: Tensor  # (B,), -1 where none is


@torch.no_grad()
def candidates(stage_one: Peripheral, batch: QueryBatch, k: int) -> Candidates:
    """The k rows of highest attention."""
    rows = torch.cat([stage_one(queries).topk(k, dim=-1).indices for queries in batch.queries.split(SCORED)])
    found = rows == batch.targets
    return Candidates(batch.queries, rows, found.int().argmax(dim=-1).where(found.any(dim=-1), -1))


def batches(count: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    """For each epoch, the places of its batches in an order of its own."""
    for _ in range(epochs):
        yield torch.randperm(count, generator=generator).split(size)


def original(config: Settings, goal_top1: float) -> dict[str, Any]:
    """The original's recipe until the goal, or to its end."""
    test = build(config).queries("test")
    goal = Goal(goal_top1)
    source = build(config).source
    stage_one = fit_stage_one(config["attention"], source)
    goal.stages["stage 1"] = goal.seconds
    with suppress(Reached):
        fit_stage_two(config["reranker"], source, stage_one, config["k"], goal, test)
    return goal.found()


def fit_stage_one(config: Settings, source: Source) -> Peripheral:
    """On a fixed set of samples, by Adam."""
    seed, size = config["seed"], config["batch_size"]
    torch.manual_seed(stream_seed(seed, "attention"))
    generator = stream(seed, "train/attention")
    stage_one = Peripheral(source.memory.rows, config["beta"])
    samples = source.sample(config["train_samples"], generator)  # type: ignore[union-attr]
    queries, targets = samples.queries, samples.targets[:, 0]
    optimizer = torch.optim.Adam(stage_one.parameters(), lr=config["lr"], fused=True)
    for order in batches(len(queries), size, config["epochs"], generator):
        for chosen in order:
            loss = F.cross_entropy(stage_one(queries[chosen]), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return stage_one


def fit_stage_two(
    config: Settings, source: Source, stage_one: Peripheral, k: int, goal: Goal, test: QueryBatch
) -> Foveal:
    """On the candidates of a fixed set of samples, which are computed once; only those with their target count."""
    seed, size, memory = config["seed"], config["batch_size"], source.memory.rows
    torch.manual_seed(stream_seed(seed, "reranker"))
    generator = stream(seed, "train/reranker")
    stage_two = Foveal(memory.shape[1], config["hidden"], config["dropout"])
    samples = source.sample(config["train_samples"], generator)  # type: ignore[union-attr]
    every = candidates(stage_one, samples, k)
    valid = every.labels >= 0
    queries, rows, labels = (part[valid] for part in every)
    with goal.uncounted():
        asked = candidates(stage_one, test, k)
    optimizer = torch.optim.Adam(stage_two.parameters(), lr=config["lr"], fused=True)
    for order in batches(len(queries), size, config["epochs"], generator):
        between = max(1, len(order) // LOOKS)
        for step, chosen in enumerate(order, 1):
            loss = F.cross_entropy(stage_two(queries[chosen], memory[rows[chosen]]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % between == 0:
                goal.look(lambda: top1(stage_two, asked, memory))
    return stage_two


@torch.no_grad()
def top1(stage_two: Foveal, asked: Candidates, memory: Tensor) -> float:
    """The share of queries whose target is a candidate, and the best of them."""
    stage_two.eval()
    right = 0
    for queries, rows, labels in zip(*(part.split(1024) for part in asked), strict=True):
        right += int((stage_two(queries, memory[rows]).argmax(dim=-1) == labels).sum())
    stage_two.train()
    return right / len(asked.queries)


def compare(seeds: Sequence[int], goal: float, words: Sequence[str] = ()) -> dict[str, Any]:
    """Both recipes with each seed, in turn, after a few steps of either to warm up."""
    recipes = {"nvf": (nvf, []), "original": (original, ["experiment=original"])}
    few = ["attention.epochs=1", "attention.steps_per_epoch=2", "reranker.epochs=1", "reranker.steps_per_epoch=2"]
    fewer = ["attention.epochs=1", "attention.train_samples=512", "reranker.epochs=1", "reranker.train_samples=512"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    for recipe, overrides in recipes.values():
        recipe(settings(*overrides, *words, *(few if recipe is nvf else fewer), "cache=off"), 2.0)
    for seed in seeds:
        for name, (recipe, overrides) in recipes.items():
            found = recipe(settings(*overrides, *words, f"seed={seed}", "cache=off"), goal)
            runs[name].append({"seed": seed, **found})
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    medians = {name: median(run["seconds"] for run in several) for name, several in runs.items()}
    return {
        "goal": goal,
        "runs": runs,
        "median_seconds": medians,
        "ratio": medians["nvf"] / medians["original"],
        "target": TARGET,
    }


def report(figures: dict[str, Any]) -> str:
    """A row a recipe and the ratio."""
    rows = []
    for name, several in figures["runs"].items():
        rows.append(
            [
                name,
                f"{figures['median_seconds'][name]:.1f}",
                ", ".join(f"{run['seconds']:.1f}" for run in several),
                f"{median(run['stage_1_seconds'] for run in several):.1f}",
                f"{sum(run['reached'] for run in several)}/{len(several)}",
                ", ".join(f"{100 * run['best_top1']:.1f}" for run in several),
            ]
        )
    goal, ratio, target = figures["goal"], figures["ratio"], figures["target"]
    titles = ("recipe", f"s to {100 * goal:g}% Top-1", "each seed", "of it stage 1", "reached", "best Top-1, %")
    verdict = "met" if ratio <= target else "missed"
    note = f"ratio {ratio:.3f} (target <= {target}: {verdict}); a run that does not reach the goal counts in full"
    return f"{table(titles, rows)}\n\n{note}"


def main(arguments: Sequence[str]) -> None:
    """Print the table, write recipes.json."""
    options = parse(arguments, OPTIONS)
    torch.set_num_threads(options["threads"])
    with redirect_stdout(sys.stderr):  # where progress bars are no part of the table
        figures = compare(options["seeds"], options["goal"])
    print(report(figures))
    print(write_json("recipes", figures, options))


if __name__ == "__main__":
    main(sys.argv[1:])
