"""Which stage 1 a run goes on with, chosen on validation queries within a time budget; stage 2; both together."""

import logging
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nvf.attention import SoftAttention
from nvf.cache import Kept, opened
from nvf.calibration import answered, clearly_above, fit_hub_correction, fit_sharpness, fit_temperature
from nvf.data import Fold, VectorDataModule
from nvf.fitting import fit, fit_blindly
from nvf.modules import JointModule, StageModule
from nvf.pipeline import Pipeline
from nvf.queries import QueryBatch, Recorded, Source
from nvf.reranker import EvidenceReranker
from nvf.resumption import decided, has_decided
from nvf.stages import (
    Settings,
    attention_stage,
    fixed_queries,
    joint_stage,
    loaded_attention,
    loaded_pipeline,
    log_of_queries,
    reranker_stage,
    stages,
    variants,
)
from nvf.streams import stream

log = logging.getLogger("nvf")
SHARE = 0.65  # of the time budget for stage 1 in all its variants and folds
JOINT_SHARE = 0.25  # for joint training; stage 2 and evaluation have the rest
PLAN = "stage 1"  # the name of its decision
FOLDS = "folds"  # their checkpoints are of no use once the run is done
FEWEST_EPOCHS = 3  # or something less costly is tried


class Chosen(NamedTuple):
    """A fitted stage 1, and what its choice rested on."""

    attention: SoftAttention
    config: Settings  # its own, of the variant that was chosen
    epochs: int  # of training
    hub_share: float  # of the rows' hubness that its bias subtracts
    answered: torch.Tensor  # which validation queries it answers, (B,) bool
    tried: list[dict[str, Any]]  # every variant with its validation Top-1
    gradients: dict[str, Any] | None  # in its training; None where there was none
    fitted_by: dict[str, Any] | None = None  # the run that this one reuses it from, and its seconds


def fit_attention(config: Settings, source: Source, folder: Path) -> Chosen:
    """The stage 1 that validates best of the configured variants, or the one that a checkpoint names.

    Each has the weights of its best validation Top-1; then its hubs are corrected, if that is asked for, and its
    temperature is fitted, on validation queries both. A variant that is not clearly above exact search gives way to the
    first. What an earlier run has fitted so already is taken from the cache.
    """
    held_out = fixed_queries(config, source, "val")
    if (path := config["attention_checkpoint"] or config["reranker_checkpoint"]) is not None:
        variant, attention = loaded_attention(config, source)
        log.info("stage 1: loaded from %s", path)
        if config["attention_checkpoint"] is None:  # it is calibrated already
            return _chosen(variant, held_out, attention, variant["attention"]["epochs"])
        return _calibrated(variant, source, held_out, attention, variant["attention"]["epochs"])
    if "attention" not in stages(config):
        variant = variants(config)[-1]
        return _chosen(variant, held_out, attention_stage(variant, source)[0].attention, 0)
    with opened(config, source) as entry:
        begun = has_decided(folder, PLAN)  # by a run that goes on: it fits stage 1 itself
        if entry is not None and not begun and (kept := entry.read(source.memory, folder)) is not None:
            return _reused(config, held_out, kept)
        started = time.perf_counter()
        chosen = _fit_variants(config, source, folder, held_out)
        if entry is not None:
            settings = {"attention": chosen.config["attention"], "folds": chosen.config["reranker"]["folds"]}
            about = {name: getattr(chosen, name) for name in ("epochs", "hub_share", "tried", "gradients")}
            by = {"folder": str(folder), "seconds": time.perf_counter() - started}
            entry.write(Kept(chosen.attention, {**settings, **about, "fitted_by": by}), folder)
    return chosen


def _reused(config: Settings, held_out: QueryBatch, kept: Kept) -> Chosen:
    about = kept.about
    log.info("stage 1: as %s fitted it", about["fitted_by"]["folder"])
    variant = {**config, "attention": about["attention"]}
    if config["data"].get("budget_s") is not None:  # it may have left fewer folds than were asked for, see `plan`
        variant["reranker"] = {**config["reranker"], "folds": about["folds"]}
    return Chosen(
        kept.attention,
        variant,
        answered=answered(kept.attention, held_out),
        **{name: about[name] for name in ("epochs", "hub_share", "tried", "gradients", "fitted_by")},
    )


def _fit_variants(config: Settings, source: Source, folder: Path, held_out: QueryBatch) -> Chosen:
    checkpoints = folder / "checkpoints" / "attention"
    fitted, several = [], len(variants(config)) > 1
    for variant in decided(folder, PLAN, lambda: plan(config, source)):
        module, data = attention_stage(variant, source)
        name = f"{variant['attention']['transform']}-{variant['attention']['keys']}" if several else ""
        starts_well = module.attention.transform.starts_at_exact_search
        epochs, gradients = fit(
            variant, "attention", module, data, folder, start_competes=starts_well, name=f"attention/{name}".rstrip("/")
        )
        chosen = _calibrated(variant, source, held_out, module.attention, epochs)._replace(gradients=gradients)
        fitted.append((chosen, checkpoints / name / "best.ckpt"))
    exact = answered(SoftAttention(source.memory, transform="identity"), held_out)
    clear = [pair for pair in fitted if clearly_above(pair[0].answered, exact)]
    chosen, checkpoint = max(clear or fitted[:1], key=lambda pair: int(pair[0].answered.sum()))  # the first of equals
    if several:
        shutil.copyfile(checkpoint, checkpoints / "best.ckpt")
    return chosen._replace(tried=[{**other.tried[0], "chosen": other is chosen} for other, _ in fitted])


def fit_reranker(
    config: Settings, source: Source, chosen: Chosen, folder: Path
) -> tuple[Pipeline, dict[str, Any] | None]:
    """Both stages: behind stage 1 a reranker with the weights of its best validation Top-1, or one from a checkpoint.

    Its scores are scaled to be right about validation queries.

    Returns:
        The pipeline, and the gradients in training, if there was any.
    """
    gradients = None
    if config["reranker_checkpoint"] is not None:
        log.info("stage 2: loaded from %s", config["reranker_checkpoint"])
        pipeline = loaded_pipeline(config, source, chosen.attention)
    else:
        folds, count = [], chosen.config["reranker"]["folds"]
        if count is not None and chosen.epochs:
            folds = cross_fit(chosen, source, folder, count)
        evidence = log_of_queries(config, source)
        module, data = reranker_stage(config, source, chosen.attention, evidence=evidence, folds=folds)
        pipeline = module.model
        if isinstance(pipeline.reranker, EvidenceReranker):
            assert evidence is not None
            samples = data.samples_of("train")
            pipeline.reranker.standardise(samples.evidence, evidence.law()["ignored"])  # type: ignore[union-attr]
        if "reranker" in stages(config):
            starts_well = pipeline.reranker.starts_at_stage_one
            gradients = fit(config, "reranker", module, data, folder, start_competes=starts_well).gradients
    fit_sharpness(pipeline, fixed_queries(config, source, "val"))
    return pipeline, gradients


class Joint(NamedTuple):
    """How the joint training of both stages went."""

    gradients: dict[str, Any]  # in training
    kept: bool  # whether its weights are, or those from before it


def fit_joint(config: Settings, source: Source, pipeline: Pipeline, folder: Path) -> Joint:
    """Fit both stages together from where they are, and leave the weights of the best validation Top-1 in them.

    On recorded queries, which are few and can be learned by heart, the start goes on unless those are clearly above it.
    """
    held_out = fixed_queries(config, source, "val")
    start = {name: tensor.clone() for name, tensor in pipeline.state_dict().items()}
    before = answered(pipeline, held_out)
    module, data = joint_stage(config, source, pipeline)
    affordable = decided(folder, "joint training", lambda: _affordable(config, module, data))
    epochs, gradients = fit(affordable, "joint", module, data, folder, start_competes=True)
    kept = epochs > 0 and (not isinstance(source, Recorded) or clearly_above(answered(pipeline, held_out), before))
    if kept:
        fit_sharpness(pipeline, held_out)
    else:
        log.info("joint training is not clearly better on validation queries: both stages stay as they were")
        pipeline.load_state_dict(start)
    return Joint(gradients, kept)


def cross_fit(chosen: Chosen, source: Source, folder: Path, count: int) -> list[Fold]:
    """Stages 1 like the chosen one, each fitted without one of `count` parts of the training queries.

    Identical queries are in one part.
    """
    assert isinstance(source, Recorded)
    train, held_out = source.splits["train"], fixed_queries(chosen.config, source, "val")
    distinct, group = train.queries.unique(dim=0, return_inverse=True)
    seed = chosen.config["attention"]["seed"]
    part = torch.randperm(len(distinct), generator=stream(seed, "folds"))[group] % count
    folds = []
    for number in range(count):
        log.info("fitting attention without part %d of %d of the training queries", number + 1, count)
        rest = QueryBatch(*(tensor[part != number] for tensor in train))
        partial = Recorded(source.memory, {**source.splits, "train": rest})
        module, data = attention_stage(chosen.config, partial)
        fit_blindly(chosen.config, "attention", module, data, folder, chosen.epochs, name=f"{FOLDS}/{number + 1}")
        if chosen.hub_share:
            fit_hub_correction(module.attention, rest.queries, held_out, shares=(chosen.hub_share,))
        fit_temperature(module.attention, *held_out)
        folds.append(Fold(module.attention, (part == number).nonzero().squeeze(-1)))
    return folds


def plan(config: Settings, source: Source) -> list[Settings]:
    """The variants that the time budget allows for, each with the epochs and the folds that it allows for.

    With less and less time: all variants with all folds; the last variant and two folds; the simplest and no folds,
    which it needs the least. Variants that are not trained cost nothing and stay.
    """
    budget, given = config["data"].get("budget_s"), variants(config)
    if budget is None:
        return given
    wanted = config["reranker"]["folds"] if "reranker" in config["stage"]["fit"] else None
    free, trained = ([v for v in given if (v["attention"]["epochs"] > 0) is costs] for costs in (False, True))
    seconds = _epoch_seconds(*attention_stage(given[-1], source))
    for several, folds in ((trained, wanted), (trained[-1:], wanted and 2), (trained[:1], None)):
        fits = len(several) + (folds or 1) - 1  # each of n folds lacks an nth of the queries
        epochs = int(SHARE * budget / (seconds * max(1, fits)))
        if epochs >= FEWEST_EPOCHS:
            break
    epochs = max(1, epochs)
    if folds != wanted or any(variant["attention"]["epochs"] > epochs for variant in several):
        log.info(
            "an epoch of stage 1 takes some %.0f s: %d of %d variants, %d epochs at most and %s folds keep to "
            "data.budget_s=%g",
            *(seconds, len(free) + len(several), len(given), epochs, folds or "no", budget),
        )
    return [
        {
            **variant,
            "attention": {**variant["attention"], "epochs": min(epochs, variant["attention"]["epochs"])},
            "reranker": {**variant["reranker"], "folds": folds},
        }
        for variant in (*free, *several)
    ]


def _calibrated(
    variant: Settings, source: Source, held_out: QueryBatch, attention: SoftAttention, epochs: int
) -> Chosen:
    share = 0.0
    if variant["attention"]["hub_correction"] and isinstance(source, Recorded):
        bank = fixed_queries(variant, source, "train").queries
        share = fit_hub_correction(attention, bank, held_out, cautious=not epochs)
    fit_temperature(attention, *held_out)
    return _chosen(variant, held_out, attention, epochs, share)


def _chosen(
    variant: Settings, held_out: QueryBatch, attention: SoftAttention, epochs: int, share: float = 0.0
) -> Chosen:
    right = answered(attention, held_out)
    about = {name: variant["attention"][name] for name in ("transform", "keys")}
    score = float(right.double().mean())
    about = {**about, "hub_share": share, "epochs": epochs, "val_top1": score, "chosen": True}
    return Chosen(attention, variant, epochs, share, right, [about], None)


def _affordable(config: Settings, module: JointModule, data: VectorDataModule) -> Settings:
    """The settings with the epochs of joint training that the time budget allows for, none if need be."""
    budget, settings = config["data"].get("budget_s"), config["joint"]
    if budget is None:
        return config
    seconds = _epoch_seconds(module, data)
    epochs = int(JOINT_SHARE * budget / seconds)
    if epochs >= settings["epochs"]:
        return config
    log.info(
        "an epoch of joint training takes some %.0f s: %d epochs keep to data.budget_s=%g", seconds, epochs, budget
    )
    return {**config, "joint": {**settings, "epochs": epochs}}


def _epoch_seconds(module: StageModule, data: VectorDataModule) -> float:
    """What an epoch of training takes here, from two steps after one to warm up."""
    batches = data.train_dataloader()
    batch = next(iter(batches))
    for step in range(3):
        if step == 1:
            started = time.perf_counter()
        module.measure(batch)[0].backward()
    module.zero_grad()
    return (time.perf_counter() - started) / 2 * len(batches)
