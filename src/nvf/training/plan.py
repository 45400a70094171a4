"""What a run takes, by the sizes of its data alone: samples of what is large, and how much of stage 1 is tried."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nvf.data.queries import Recorded, Source
from nvf.errors import check_number
from nvf.evaluation.report import cut_in_words
from nvf.training.fit import FitSettings
from nvf.training.stages import Stage

log = logging.getLogger("nvf")
SHARE = 0.65  # of the limit for stage 1 in all its variants and folds
JOINT_SHARE = 0.25  # for joint training; stage 2 and evaluation have the rest
FEWEST_EPOCHS = 3  # with fewer, fewer variants and folds are tried
AUTO = "auto"  # a setting that the sizes decide
EXACT = 2e11  # multiply-adds of an epoch up to which the loss is exact
SAMPLED = 8192  # rows a step that estimate it otherwise
ONCE, OFTEN = 1e12, 1e11  # multiply-adds of what is computed once, and of what each variant computes several times
FEWEST = 2048  # queries or rows that are left of more
Cut = dict[str, Any]  # the limit, `by`, and what was `asked` and is `kept` of epochs, for stage 1 of variants and folds


def sized(config: Mapping[str, Any], source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings with a number, or null for all, in the place of each `auto`, and what was planned.

    That is a function of the sizes alone: rows, their width, and queries.
    """
    splits = source.splits if isinstance(source, Recorded) else {}
    logged, held_out = (len(splits[name].queries) if splits else 0 for name in ("train", "val"))
    rows, dim = len(source.memory), source.memory.query_dim

    def of(most: float, count: int) -> int | None:
        wanted = max(FEWEST, int(most / (rows * dim)))
        return wanted if wanted < count else None

    large = logged * rows * dim > EXACT and rows > SAMPLED
    auto = {"among": of(ONCE, rows), "bank": of(OFTEN, logged)}
    auto |= {"taught_by": of(4 * ONCE, logged), "chosen_by": of(OFTEN, held_out)}
    given = {"sample": config["attention"]["sample"], **config["data"].get("plan", {})}
    planned = {
        name: {**auto, "sample": SAMPLED if large else None}[name] if value == AUTO else value
        for name, value in given.items()
    }
    for name, value in planned.items():
        if value is not None and name != "sample":
            check_number(f"data.plan.{name}", value, minimum=1, whole=True, remedy="auto suits the sizes, null is all")
    attention = {**config["attention"], "sample": planned["sample"]}
    return {**config, "attention": attention, "data": {**config["data"], "plan": planned}}, planned


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
    return work / (stage.data.batch_size * steps_of_epoch(stage) * rows * memory.dim)


def steps_of_epoch(stage: Stage) -> int:
    """The steps of an epoch, were all training samples used."""
    data, source = stage.data, stage.data.source
    samples = len(source.splits["train"].queries) if isinstance(source, Recorded) else data.train_samples or 0
    return data.steps_per_epoch or -(-samples // data.batch_size)


def _cut(what: str, data: Mapping[str, Any], *, kept: dict[str, Any], asked: dict[str, Any]) -> Cut | None:
    if kept == asked:
        return None
    cut = {"by": f"data.work={data['work']:g}", "kept": kept, "asked": asked}
    log.info("%s is cut to %s", what, cut_in_words(cut))
    return cut
