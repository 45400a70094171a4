"""What a run takes, by the sizes of its data alone: how much of stage 1 is tried, and about how long that takes."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nvf.data.queries import Recorded
from nvf.evaluation.report import cut_in_words
from nvf.training.build import Built, stages
from nvf.training.fit import FitSettings
from nvf.training.stages import Stage, planned

log = logging.getLogger("nvf")
SHARE = 0.65  # of the limit for stage 1 in all its variants and folds
JOINT_SHARE = 0.25  # for joint training; stage 2 and evaluation have the rest
FEWEST_EPOCHS = 3  # with fewer, fewer variants and folds are tried
# What the runs in README.md and docs/ took on two cores.
START, STEP = 6.0, 0.005  # seconds beside the fits, and of a step at least
RATE, SCAN_RATE = 3e10, 8e10  # multiply-adds a second, of a step and of a search over all rows
SEARCHES = 8  # of the test queries in an evaluation, and of the validation queries in the choice of a variant
UNITS = {"days": 86_400, "hours": 3600, "minutes": 60, "seconds": 1}
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
    return math.inf if work is None else work / _work_of_epoch(stage)


def _work_of_epoch(stage: Stage) -> int:
    """The multiply-adds of one product of an epoch's queries with the rows that a step sees."""
    memory = stage.module.attention.memory
    rows = getattr(stage.module, "sample", None) or len(memory)
    return stage.data.batch_size * steps_of_epoch(stage) * rows * memory.dim


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


def forecast(built: Built, variants: Sequence[Stage], folds: int | None) -> str:
    """Say what is fitted, of what size, and about how long the run takes on two cores; then what large data are cut to.

    `variants` are the stages 1 that are fitted, none where one is given.
    """
    memory, config, source = built.source.memory, built.config, built.source
    scan = len(memory) * memory.query_dim / SCAN_RATE  # seconds of one query over all rows
    if isinstance(source, Recorded):
        logged, held, tested = (len(source.splits[split].queries) for split in ("train", "val", "test"))
    else:
        logged, (held, tested) = 0, built.variants[0].data.samples.values()

    def fitted(stage: Stage, passes: int) -> float:
        """The seconds of a fit whose loss passes so often over the rows of a step, with its validations."""
        seconds = steps_of_epoch(stage) * STEP + passes * _work_of_epoch(stage) / RATE + held * scan
        return stage.fit.epochs * seconds

    seconds, told = START + SEARCHES * tested * scan, []
    if variants:
        told.append("stage 1" if len(variants) == 1 else f"{len(variants)} variants of stage 1")
        seconds += sum(fitted(variant, passes=3) + SEARCHES * held * scan for variant in variants)
    if (stage := built.reranker) and "reranker" in stages(config) and config["reranker_checkpoint"] is None:
        told.append(f"stage 2 with {folds} folds" if folds else "stage 2")
        steps = stage.fit.epochs * steps_of_epoch(stage)
        taught = planned(config, "taught_by") or logged or steps * stage.data.batch_size
        seconds += steps * STEP + taught * scan
        seconds += ((folds or 1) - 1) * fitted([*built.variants, *variants][-1], passes=3)
    if built.joint is not None:
        told.append("both together")
        seconds += fitted(built.joint, passes=6)
    sizes = f"{f'{logged:,}' if logged else 'generated'} queries, {len(memory):,} rows of {memory.query_dim} dimensions"
    line = f"{', then '.join(told) or 'nothing to fit'}: about {in_words(seconds)} on two cores\n{sizes}"
    taken = [f"{name}={value:,}" for name, value in config["data"]["plan"].items() if value is not None]
    return f"{line}\nof these a part is taken: {', '.join(taken)}" if taken else line


def in_words(seconds: float) -> str:
    """Return a time in words, with one digit that is not 0."""
    unit, size = next((unit, size) for unit, size in UNITS.items() if seconds >= 1.5 * size or size == 1)
    return f"{float(f'{seconds / size:.1g}'):,.0f} {unit}"
