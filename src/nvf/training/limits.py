"""What a run may take: the variants, epochs and folds that its limits, of work or of time, leave of those asked for."""

import logging
import math
import time
from pathlib import Path
from typing import Any

from nvf.data.datamodule import VectorDataModule
from nvf.data.queries import Source
from nvf.evaluation.report import cut_in_words
from nvf.runs.resume import decided
from nvf.training.build import VARIES, Settings, attention_stage, variants
from nvf.training.modules import JointModule
from nvf.training.stage import StageModule

log = logging.getLogger("nvf")
SHARE = 0.65  # of a limit for stage 1 in all its variants and folds
JOINT_SHARE = 0.25  # for joint training; stage 2 and evaluation have the rest
FEWEST_EPOCHS = 3  # or something less costly is tried
Cut = dict[str, Any]  # the limit, `by`, and what was `asked` and is `kept` of epochs, for stage 1 of variants and folds


def plan(config: Settings, source: Source, folder: Path) -> tuple[Settings, Cut | None]:
    """The settings with as many variants of stage 1, epochs and folds as the limits allow for, and what was cut.

    With less and less allowed: all variants with all folds; the last variant and two folds; the simplest and no folds,
    which it needs the least. Variants that are not trained cost nothing and stay.
    """
    given, most = variants(config), config["trainer"].get("max_epochs")
    asked = [variant["attention"]["epochs"] and (most or variant["attention"]["epochs"]) for variant in given]
    trained = [number for number, epochs in enumerate(asked) if epochs]
    by, affordable = _affordable(config, "attention", *attention_stage(given[-1], source), folder)
    if by is None or not trained:
        return config, None
    wanted = config["reranker"]["folds"] if "reranker" in config["stage"]["fit"] else None
    for several, folds in ((trained, wanted), (trained[-1:], wanted and 2), (trained[:1], None)):
        fits = len(several) + (folds or 1) - 1  # each of n folds lacks an nth of the queries
        epochs = max(1, int(SHARE * affordable / fits))
        if epochs >= min(FEWEST_EPOCHS, max(asked)):
            break
    left = [
        {**{name: variant["attention"][name] for name in VARIES}, "epochs": min(epochs, asked[number])}
        for number, variant in enumerate(given)
        if number in several or not asked[number]
    ]
    cut = _cut(
        "stage 1",
        by,
        kept={"epochs": min(epochs, max(asked)), "variants": len(left), "folds": folds},
        asked={"epochs": max(asked), "variants": len(given), "folds": wanted},
    )
    changes = {"attention": {"variants": left}, "reranker": {"folds": folds}}
    return _changed(config, changes), cut


def plan_joint(
    config: Settings, module: JointModule, data: VectorDataModule, folder: Path
) -> tuple[Settings, Cut | None]:
    """The settings with as many epochs of joint training as the limits allow for, none if need be, and what was cut."""
    asked = config["trainer"].get("max_epochs") or config["joint"]["epochs"]
    by, affordable = _affordable(config, "joint", module, data, folder)
    if by is None:
        return config, None
    epochs = int(min(JOINT_SHARE * affordable, asked))
    cut = _cut("joint training", by, kept={"epochs": epochs}, asked={"epochs": asked})
    return _changed(config, {"joint": {"epochs": epochs}}), cut


def _affordable(
    config: Settings, stage: str, module: StageModule, data: VectorDataModule, folder: Path
) -> tuple[str | None, float]:
    """The limit that binds, None where there is none, and how many epochs of a stage the whole of it would pay for.

    `data.work` is a matter of sizes alone. `data.budget_s` is one of the clock: what an epoch takes is measured once,
    and a run that goes on keeps to that.
    """
    limits, found = config["data"], {}
    if (work := limits.get("work")) is not None:
        memory, sample = module.attention.memory, config[stage].get("sample")
        rows, queries = sample or len(memory), data.batch_size * len(data.train_dataloader())
        found[f"data.work={work:g}"] = work / (queries * rows * memory.dim)
    if (budget := limits.get("budget_s")) is not None:
        seconds = decided(folder, f"seconds an epoch of {stage} takes", lambda: _epoch_seconds(module, data))
        found[f"data.budget_s={budget:g}"] = budget / seconds
    by = min(found, key=lambda name: found[name], default=None)
    return by, math.inf if by is None else found[by]


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


def _changed(config: Settings, changes: Settings) -> Settings:
    """The settings with some of each group's changed, and the trainer's own number of epochs taken up in them."""
    trainer = {name: value for name, value in config["trainer"].items() if name != "max_epochs"}
    return {**config, "trainer": trainer, **{group: {**config[group], **own} for group, own in changes.items()}}


def _cut(what: str, by: str, *, kept: dict[str, Any], asked: dict[str, Any]) -> Cut | None:
    if kept == asked:
        return None
    cut = {"by": by, "kept": kept, "asked": asked}
    log.info("%s is cut to %s", what, cut_in_words(cut))
    return cut
