"""What a run may take: the variants, epochs and folds that the limit `data.work` leaves of those asked for."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nvf.evaluation.report import cut_in_words
from nvf.training.fit import FitSettings
from nvf.training.stages import Stage

log = logging.getLogger("nvf")
SHARE = 0.65  # of the limit for stage 1 in all its variants and folds
JOINT_SHARE = 0.25  # for joint training; stage 2 and evaluation have the rest
FEWEST_EPOCHS = 3  # with fewer, fewer variants and folds are tried
Cut = dict[str, Any]  # the limit, `by`, and what was `asked` and is `kept` of epochs, for stage 1 of variants and folds


def plan(
    given: Sequence[Stage], folds: int | None, data: Mapping[str, Any]
) -> tuple[Sequence[Stage], int | None, Cut | None]:
    """The variants of stage 1, the folds and what was cut, so that stage 1 keeps to its share of the limit.

    As the limit gets tighter, these are: all variants with all folds; the last variant and two folds; the simplest
    variant and no folds. Variants that are not trained cost nothing and stay. `data` are the settings of that name.
    """
    asked = [variant.fit.epochs for variant in given]
    trained = [number for number, epochs in enumerate(asked) if epochs]
    affordable, wanted = _affordable(data.get("work"), given[-1]), folds
    if math.isinf(affordable) or not trained:
        return given, folds, None
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
    return left, folds, _cut("stage 1", data, kept=kept, asked=wished)


def plan_joint(joint: Stage, data: Mapping[str, Any]) -> tuple[FitSettings, Cut | None]:
    """Joint training with as many epochs as the limit allows for, none if need be, and what was cut."""
    asked = joint.fit.epochs
    epochs = int(min(JOINT_SHARE * _affordable(data.get("work"), joint), asked))
    cut = _cut("joint training", data, kept={"epochs": epochs}, asked={"epochs": asked})
    return replace(joint.fit, epochs=epochs), cut


def _affordable(work: float | None, stage: Stage) -> float:
    """How many epochs of a stage all of the limit would pay for."""
    if work is None:
        return math.inf
    memory = stage.module.attention.memory
    rows = getattr(stage.module, "sample", None) or len(memory)
    return work / (stage.data.batch_size * len(stage.data.train_dataloader()) * rows * memory.dim)


def _cut(what: str, data: Mapping[str, Any], *, kept: dict[str, Any], asked: dict[str, Any]) -> Cut | None:
    if kept == asked:
        return None
    cut = {"by": f"data.work={data['work']:g}", "kept": kept, "asked": asked}
    log.info("%s is cut to %s", what, cut_in_words(cut))
    return cut
