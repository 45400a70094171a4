"""What a run may take: the variants, epochs and folds that its limits, of work or of time, leave of those asked for."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import distributed

from nvf.evaluation.report import cut_in_words
from nvf.runs.resume import decided
from nvf.training.devices import agreed
from nvf.training.fit import FitSettings
from nvf.training.stages import Stage

log = logging.getLogger("nvf")
SHARE = 0.65  # of a limit for stage 1 in all its variants and folds
JOINT_SHARE = 0.25  # for joint training; stage 2 and evaluation have the rest
FEWEST_EPOCHS = 3  # with fewer, fewer variants and folds are tried
Cut = dict[str, Any]  # the limit, `by`, and what was `asked` and is `kept` of epochs, for stage 1 of variants and folds


def plan(
    given: Sequence[Stage], folds: int | None, data: Mapping[str, Any], folder: Path
) -> tuple[Sequence[Stage], int | None, Cut | None]:
    """The variants of stage 1, the folds and what was cut, so that stage 1 keeps to its share of the limits.

    As the limits get tighter, these are: all variants with all folds; the last variant and two folds; the simplest
    variant and no folds. Variants that are not trained cost nothing and stay. `data` are the settings of that name,
    with the limits.
    """
    asked = [variant.fit.epochs for variant in given]
    trained = [number for number, epochs in enumerate(asked) if epochs]
    by, affordable = _affordable(data, given[-1], folder)
    if by is None or not trained:
        return given, folds, None
    wanted = folds
    for several, folds in ((trained, wanted), (trained[-1:], wanted and 2), (trained[:1], None)):
        fits = len(several) + (folds or 1) - 1  # each of n folds lacks an nth of the queries
        epochs = max(1, int(SHARE * affordable / fits))
        if epochs >= min(FEWEST_EPOCHS, max(asked)):
            break
    left = [
        variant._replace(fit=replace(variant.fit, epochs=min(epochs, asked[number])))
        for number, variant in enumerate(given)
        if number in several or not asked[number]
    ]
    kept = {"epochs": min(epochs, max(asked)), "variants": len(left), "folds": folds}
    wished = {"epochs": max(asked), "variants": len(given), "folds": wanted}
    return left, folds, _cut("stage 1", by, kept=kept, asked=wished)


def plan_joint(joint: Stage, data: Mapping[str, Any], folder: Path) -> tuple[FitSettings, Cut | None]:
    """Joint training with as many epochs as the limits allow for, none if need be, and what was cut."""
    by, affordable = _affordable(data, joint, folder)
    if by is None:
        return joint.fit, None
    epochs = int(min(JOINT_SHARE * affordable, joint.fit.epochs))
    cut = _cut("joint training", by, kept={"epochs": epochs}, asked={"epochs": joint.fit.epochs})
    return replace(joint.fit, epochs=epochs), cut


def _affordable(limits: Mapping[str, Any], stage: Stage, folder: Path) -> tuple[str | None, float]:
    """The limit that binds, None where there is none, and how many epochs of a stage all of it would pay for.

    `data.work` is a matter of sizes alone. `data.budget_s` is in seconds: what an epoch takes is measured once, and a
    run that resumes keeps to that measurement.
    """
    affordable, module, data = {}, stage.module, stage.data
    if (limit := limits.get("work")) is not None:
        memory = module.attention.memory
        rows = getattr(module, "sample", None) or len(memory)
        cost: float = data.batch_size * len(data.train_dataloader()) * rows * memory.dim
        affordable[f"data.work={limit:g}"] = limit / cost
    if (limit := limits.get("budget_s")) is not None:
        what = f"seconds an epoch of {data.stage} takes"
        writes = not distributed.is_initialized() or distributed.get_rank() == 0
        cost = agreed(decided(folder, what, lambda: _epoch_seconds(stage), writes=writes))
        affordable[f"data.budget_s={limit:g}"] = limit / cost
    by = min(affordable, key=lambda name: affordable[name], default=None)
    return by, math.inf if by is None else affordable[by]


def _epoch_seconds(stage: Stage) -> float:
    """What an epoch of training takes here, from two steps after one to warm up."""
    batches = stage.data.train_dataloader()
    batch = next(iter(batches))
    for step in range(3):
        if step == 1:
            started = time.perf_counter()
        stage.module.loss(batch).backward()
    stage.module.zero_grad()
    return (time.perf_counter() - started) / 2 * len(batches)


def _cut(what: str, by: str, *, kept: dict[str, Any], asked: dict[str, Any]) -> Cut | None:
    if kept == asked:
        return None
    cut = {"by": by, "kept": kept, "asked": asked}
    log.info("%s is cut to %s", what, cut_in_words(cut))
    return cut
