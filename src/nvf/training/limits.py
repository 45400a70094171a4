"""What a run may take: the variants, epochs and folds that its limits, of work or of time, leave of those asked for."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nvf.data.datamodule import VectorDataModule
from nvf.evaluation.report import cut_in_words
from nvf.runs.resume import decided
from nvf.training.build import Variant
from nvf.training.devices import agreed, is_first
from nvf.training.fit import FitSettings
from nvf.training.modules import JointModule
from nvf.training.stage import StageModule

log = logging.getLogger("nvf")
SHARE = 0.65  # of a limit for stage 1 in all its variants and folds
JOINT_SHARE = 0.25  # for joint training; stage 2 and evaluation have the rest
FEWEST_EPOCHS = 3  # or something less costly is tried
Cut = dict[str, Any]  # the limit, `by`, and what was `asked` and is `kept` of epochs, for stage 1 of variants and folds


class Plan(NamedTuple):
    """What is fitted of stage 1."""

    variants: Sequence[Variant]
    folds: int | None
    cut: Cut | None  # by the limits


def plan(given: Sequence[Variant], folds: int | None, limits: Mapping[str, float], folder: Path) -> Plan:
    """Keep as many variants of stage 1, epochs and folds as the limits allow for.

    With less and less allowed, these are all variants with all folds; the last variant and two folds; the simplest and
    no folds, which it needs the least. Variants that are not trained cost nothing and stay.
    """
    asked = [variant.fit.epochs for variant in given]
    trained = [number for number, epochs in enumerate(asked) if epochs]
    by, affordable = _affordable(limits, given[-1].module, given[-1].data, folder)
    if by is None or not trained:
        return Plan(given, folds, None)
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
    cut = _cut(
        "stage 1",
        by,
        kept={"epochs": min(epochs, max(asked)), "variants": len(left), "folds": folds},
        asked={"epochs": max(asked), "variants": len(given), "folds": wanted},
    )
    return Plan(left, folds, cut)


def plan_joint(
    settings: FitSettings, module: JointModule, data: VectorDataModule, limits: Mapping[str, float], folder: Path
) -> tuple[FitSettings, Cut | None]:
    """Keep as many epochs of joint training as the limits allow for, none if need be."""
    by, affordable = _affordable(limits, module, data, folder)
    if by is None:
        return settings, None
    epochs = int(min(JOINT_SHARE * affordable, settings.epochs))
    return replace(settings, epochs=epochs), _cut(
        "joint training", by, kept={"epochs": epochs}, asked={"epochs": settings.epochs}
    )


def _affordable(
    limits: Mapping[str, float], module: StageModule, data: VectorDataModule, folder: Path
) -> tuple[str | None, float]:
    """The limit that binds, None where there is none, and how many epochs of a stage the whole of it would pay for.

    `data.work` is a matter of sizes alone. `data.budget_s` is one of the clock: what an epoch takes is measured once,
    and a run that is resumed keeps to that.
    """
    affordable = {}
    for name, limit in limits.items():
        if name == "data.work":
            memory = module.attention.memory
            rows = getattr(module, "sample", None) or len(memory)
            cost: float = data.batch_size * len(data.train_dataloader()) * rows * memory.dim
        else:
            what = f"seconds an epoch of {data.stage} takes"
            seconds = decided(folder, what, lambda: _epoch_seconds(module, data), writes=is_first())
            cost = agreed(seconds)
        affordable[f"{name}={limit:g}"] = limit / cost
    by = min(affordable, key=lambda name: affordable[name], default=None)
    return by, math.inf if by is None else affordable[by]


def _epoch_seconds(module: StageModule, data: VectorDataModule) -> float:
    """What an epoch of training takes here, from two steps after one to warm up."""
    batches = data.train_dataloader()
    batch = next(iter(batches))
    for step in range(3):
        if step == 1:
            started = time.perf_counter()
        module.loss(batch).backward()
    module.zero_grad()
    return (time.perf_counter() - started) / 2 * len(batches)


def _cut(what: str, by: str, *, kept: dict[str, Any], asked: dict[str, Any]) -> Cut | None:
    if kept == asked:
        return None
    cut = {"by": by, "kept": kept, "asked": asked}
    log.info("%s is cut to %s", what, cut_in_words(cut))
    return cut
