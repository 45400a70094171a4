"""Steps a second: training with Lightning, as NVF does it, next to the same mathematics in a plain loop.

    python tests/benchmarks/loops.py [steps=200] [repeats=7] [batch=512] [threads=2] [folder=outputs/benchmarks]

Lightning's side is the real `fitting.fit` with the default settings: curves, gradient norms, progress bar and
checkpoints are on; only validation is off the clock. The plain loop draws its batches from the same source, takes the
same losses and the same fused Adam with the same schedule, and logs nothing.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from nvf.data.queries import QueryBatch, Source
from nvf.models.attention import SoftAttention
from nvf.models.reranker import reranker_loss
from nvf.ops.random_streams import stream
from nvf.ops.ranks import are_targets
from nvf.options import Option, parse, whole
from nvf.training.build import build_source
from nvf.training.fit import fit
from nvf.training.modules import AttentionModule, RerankerModule
from nvf.training.stages import Settings, attention_stage, fit_settings, reranker_stage
from timing import COMMON, in_turn, interleaved, settings, table, watched_by, write_json

TARGET = 0.93
STAGES = {"attention": "stage 1", "reranker": "stage 2"}
OPTIONS = (
    Option("steps", "that are timed in a repeat", 200, whole),
    Option("repeats", "of either loop, in turn", 7, whole),
    Option("batch", "queries a step", 512, whole),
    *COMMON,
)
Module = AttentionModule | RerankerModule


class Ends(Callback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a step; the first one, which starts the epoch, does not count."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def built(config: Settings, stage: str, source: Source, attention: SoftAttention | None) -> tuple[Module, Any]:
    """The untrained module of a stage and its batches; stage 2 is behind the given stage 1."""
    if stage == "attention":
        return attention_stage(config, source)[:2]
    assert attention is not None
    return reranker_stage(config, source, attention)[:2]


def with_lightning(config: Settings, stage: str, source: Source, attention: SoftAttention | None) -> float:
    """Seconds of a step of a real fit."""
    module, data = built(config, stage, source, attention)
    ends = Ends()
    with tempfile.TemporaryDirectory() as folder, watched_by(ends):
        how = fit_settings(config, stage)
        fit(module, data, how, folder=Path(folder), name=stage, start_competes=False)
    return ends.seconds


def optimiser(module: Module, config: Settings, stage: str, steps: int) -> tuple[Any, Any]:
    """Fused Adam and its schedule, as the module has them."""
    groups = module.parameter_groups()
    peaks = [group["lr"] for group in groups]
    adam = torch.optim.Adam(groups, fused=True)
    assert config[stage]["schedule"] == "onecycle"
    return adam, torch.optim.lr_scheduler.OneCycleLR(adam, peaks, total_steps=steps, pct_start=module.warmup)


def loss_of(module: Module, batch: QueryBatch) -> Tensor:
    """The stage's loss, from queries and targets, in torch alone."""
    if isinstance(module, AttentionModule):
        return module.model.loss(batch.queries, batch.targets)
    pipeline = module.model
    with torch.no_grad():
        top = pipeline.attention.candidates(batch.queries, pipeline.k)
    scores = pipeline.score(batch.queries, top.rows, top.scores, None)
    return reranker_loss(scores, are_targets(top.rows, batch.targets))


def plain(
    module: Module, config: Settings, stage: str, source: Source, generators: Iterator[torch.Generator]
) -> Iterator[Tensor]:
    """Train a module in a plain loop, a step a generator; gives each step's loss."""
    settings = config[stage]
    adam, schedule = optimiser(module, config, stage, settings["epochs"] * settings["steps_per_epoch"])
    module.train()
    for generator in generators:
        loss = loss_of(module, source.sample(settings["batch_size"], generator))  # type: ignore[union-attr]
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        yield loss.detach()


def in_a_plain_loop(config: Settings, stage: str, source: Source, attention: SoftAttention | None) -> float:
    """Seconds of a step of a plain loop; the first one does not count here either."""
    module, _ = built(config, stage, source, attention)
    generator = stream(config["seed"], f"train/{stage}")
    steps = plain(module, config, stage, source, (generator for _ in range(config[stage]["steps_per_epoch"])))
    next(steps)
    started = time.perf_counter()
    count = sum(1 for _ in steps)
    return (time.perf_counter() - started) / count


def parts(config: Settings, stage: str, source: Source, attention: SoftAttention | None) -> dict[str, float]:
    """Seconds that the parts of a plain step take, each by itself."""
    module, _ = built(config, stage, source, attention)
    module.train()
    size, generator = config[stage]["batch_size"], stream(config["seed"], f"train/{stage}")
    batch = source.sample(size, generator)  # type: ignore[union-attr]
    adam, _ = optimiser(module, config, stage, 1000)

    def update(loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward()
        adam.step()

    work: dict[str, Callable[[], object]] = {
        "sampling": lambda: source.sample(size, generator)  # type: ignore[union-attr]
    }
    if isinstance(module, AttentionModule):
        work["model"] = lambda: update(loss_of(module, batch))
    else:
        pipeline = module.model
        top = pipeline.attention.candidates(batch.queries, pipeline.k)
        labels = are_targets(top.rows, batch.targets)
        work["candidates"] = lambda: pipeline.attention.candidates(batch.queries, pipeline.k)
        work["model"] = lambda: update(reranker_loss(pipeline.score(batch.queries, top.rows, top.scores, None), labels))
    return interleaved(work, repeats=15)


def compare(steps: int, repeats: int, batch: int, words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Both loops in both stages, on the default data."""
    few = [f"{stage}.{name}" for stage in STAGES for name in ("epochs=1", f"steps_per_epoch={steps + 1}")]
    sizes = [f"{stage}.batch_size={batch}" for stage in STAGES]
    config = settings(*words, *few, *sizes, "queries.val_samples=512", "cache=off")
    source = build_source(config)
    module, data, how, *_ = attention_stage(config, source)
    with tempfile.TemporaryDirectory() as folder:
        fit(module, data, how, folder=Path(folder), name="attention", start_competes=False)
    figures = []
    for stage, name in STAGES.items():
        given = (config, stage, source, module.attention if stage == "reranker" else None)
        took = in_turn({"lightning": lambda: with_lightning(*given), "plain": lambda: in_a_plain_loop(*given)}, repeats)  # noqa: B023
        medians = {loop: median(several) for loop, several in took.items()}
        figures.append(
            {
                "stage": name,
                "steps_per_second": {loop: 1 / each for loop, each in medians.items()},
                "ratio": medians["plain"] / medians["lightning"],
                "target": TARGET,
                "each_ratio": [b / a for a, b in zip(took["lightning"], took["plain"], strict=True)],
                "plain_step_parts": parts(*given),
            }
        )
    return figures


def report(figures: list[dict[str, Any]]) -> str:
    """A row a stage, and what a plain step consists of."""
    titles = ("", "Lightning, steps/s", "plain, steps/s", "ratio", "of each pair", f"target >= {TARGET}")
    rows, notes = [], []
    for found in figures:
        rate, each = found["steps_per_second"], found["each_ratio"]
        rows.append(
            [
                found["stage"],
                f"{rate['lightning']:.0f}",
                f"{rate['plain']:.0f}",
                f"{found['ratio']:.3f}",
                f"{min(each):.2f} to {max(each):.2f}",
                "met" if found["ratio"] >= found["target"] else "missed",
            ]
        )
        pieces = ", ".join(f"{part} {1000 * took:.2f}" for part, took in found["plain_step_parts"].items())
        steps = [1000 / rate[loop] for loop in ("plain", "lightning")]
        notes.append(f"{found['stage']}, ms a step: {pieces}; plain {steps[0]:.2f}, Lightning {steps[1]:.2f}")
    return "\n".join([table(titles, rows), "", *notes])


def main(arguments: Sequence[str]) -> None:
    """Print the table, write loops.json."""
    options = parse(arguments, OPTIONS)
    torch.set_num_threads(options["threads"])
    with redirect_stdout(sys.stderr):  # where progress bars are no part of the table
        figures = compare(options["steps"], options["repeats"], options["batch"])
    print(report(figures))
    print(write_json("loops", figures, options))


if __name__ == "__main__":
    main(sys.argv[1:])
