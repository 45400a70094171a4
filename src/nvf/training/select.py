"""Which stage 1 a run goes on with, chosen on validation queries; stage 2; both together."""

import logging
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nvf.data.datamodule import Fold
from nvf.data.queries import QueryBatch, Recorded, Source
from nvf.evaluation.calibration import (
    answered,
    clearly_above,
    fit_hub_correction,
    fit_sharpness,
    fit_temperature,
    quality,
)
from nvf.models.attention import SoftAttention
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker
from nvf.ops.random_streams import stream
from nvf.ops.ranks import criterion
from nvf.training.build import (
    Settings,
    attention_stage,
    fit_settings,
    fixed_queries,
    joint_stage,
    loaded_attention,
    loaded_pipeline,
    log_of_queries,
    reranker_stage,
    stages,
    variants,
)
from nvf.training.cache import Kept, opened
from nvf.training.callbacks import LAST
from nvf.training.checkpoints import WEIGHTS
from nvf.training.fit import fit, fit_blindly
from nvf.training.limits import Cut, plan, plan_joint

log = logging.getLogger("nvf")
FOLDS = "folds"  # their checkpoints are of no use once the run is done


class Chosen(NamedTuple):
    """A fitted stage 1, and what its choice rested on."""

    attention: SoftAttention
    config: Settings  # its own, of the variant that was chosen
    epochs: int  # of training
    hub_share: float  # of the rows' hubness that its bias subtracts
    quality: torch.Tensor  # with which it answers the validation queries, (B,)
    tried: list[dict[str, Any]]  # every variant with its validation Top-1, and nDCG@10 where that chooses
    gradients: dict[str, Any] | None  # in its training; None where there was none
    fitted_by: dict[str, Any] | None = None  # the run that this one reuses it from, and its seconds
    cut: Cut | None = None  # by the limits on what a run may take


def fit_attention(config: Settings, source: Source, folder: Path) -> Chosen:
    """The stage 1 that validates best of the configured variants, or the one that a checkpoint names.

    Each has the weights that validate best; then its hubs are corrected, if that is asked for, and its
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
    config, cut = plan(config, source, folder)
    with opened(config, source) as entry:
        begun = any((folder / "checkpoints" / "attention").rglob(LAST))  # a run that goes on fits stage 1 itself
        if entry is not None and not begun and (kept := entry.read(source.memory, folder)) is not None:
            return _reused(config, held_out, kept)._replace(cut=cut)
        started = time.perf_counter()
        chosen = _fit_variants(config, source, folder, held_out)
        if entry is not None:
            about = {name: getattr(chosen, name) for name in ("epochs", "hub_share", "tried", "gradients")}
            by = {"folder": str(folder), "seconds": time.perf_counter() - started}
            entry.write(
                Kept(chosen.attention, {"attention": chosen.config["attention"], **about, "fitted_by": by}), folder
            )
    return chosen._replace(cut=cut)


def _reused(config: Settings, held_out: QueryBatch, kept: Kept) -> Chosen:
    about = kept.about
    log.info("stage 1: as %s fitted it", about["fitted_by"]["folder"])
    return Chosen(
        kept.attention,
        {**config, "attention": about["attention"]},
        quality=quality(kept.attention, held_out),
        **{name: about[name] for name in ("epochs", "hub_share", "tried", "gradients", "fitted_by")},
    )


def _fit_variants(config: Settings, source: Source, folder: Path, held_out: QueryBatch) -> Chosen:
    checkpoints = folder / "checkpoints" / "attention"
    fitted, several = [], len(variants(config)) > 1
    for variant in variants(config):
        module, data = attention_stage(variant, source)
        name = f"{variant['attention']['transform']}-{variant['attention']['keys']}" if several else ""
        starts_well = module.attention.transform.starts_at_exact_search
        settings = fit_settings(variant, "attention", source.memory)
        place = f"attention/{name}".rstrip("/")
        epochs, gradients = fit(module, data, settings, folder=folder, name=place, start_competes=starts_well)
        chosen = _calibrated(variant, source, held_out, module.attention, epochs)._replace(gradients=gradients)
        fitted.append((chosen, checkpoints / name / WEIGHTS))
    exact = quality(SoftAttention(source.memory, transform="identity"), held_out)
    clear = [pair for pair in fitted if clearly_above(pair[0].quality, exact)]
    best = max(float(chosen.quality.double().sum()) for chosen, _ in clear or fitted[:1])
    chosen, checkpoint = next(pair for pair in clear or fitted if float(pair[0].quality.double().sum()) == best)
    if several:
        shutil.copyfile(checkpoint, checkpoints / WEIGHTS)
    return chosen._replace(tried=[{**other.tried[0], "chosen": other is chosen} for other, _ in fitted])


def fit_reranker(
    config: Settings, source: Source, chosen: Chosen, folder: Path
) -> tuple[Pipeline, dict[str, Any] | None]:
    """Both stages: behind stage 1 a reranker with the weights that validate best, or one from a checkpoint.

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
            settings = fit_settings(config, "reranker", source.memory)
            fitted = fit(module, data, settings, folder=folder, name="reranker", start_competes=starts_well)
            gradients = fitted.gradients
    fit_sharpness(pipeline, fixed_queries(config, source, "val"))
    return pipeline, gradients


class Joint(NamedTuple):
    """How the joint training of both stages went."""

    gradients: dict[str, Any]  # in training
    kept: bool  # whether its weights are, or those from before it
    cut: Cut | None  # by the limits on what a run may take


def fit_joint(config: Settings, source: Source, pipeline: Pipeline, folder: Path) -> Joint:
    """Fit both stages together from where they are, and leave the weights that validate best in them.

    On recorded queries, which are few and can be learned by heart, the start goes on unless those are clearly above it.
    """
    held_out = fixed_queries(config, source, "val")
    start = {name: tensor.clone() for name, tensor in pipeline.state_dict().items()}
    before = quality(pipeline, held_out)
    module, data = joint_stage(config, source, pipeline)
    config, cut = plan_joint(config, module, data, folder)
    settings = fit_settings(config, "joint", source.memory)
    epochs, gradients = fit(module, data, settings, folder=folder, name="joint", start_competes=True)
    kept = epochs > 0 and (not isinstance(source, Recorded) or clearly_above(quality(pipeline, held_out), before))
    if kept:
        fit_sharpness(pipeline, held_out)
    else:
        log.info("joint training is not clearly better on validation queries: both stages stay as they were")
        pipeline.load_state_dict(start)
    return Joint(gradients, kept, cut)


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
        settings = fit_settings(chosen.config, "attention", source.memory)
        fit_blindly(module, data, settings, folder=folder, name=f"{FOLDS}/{number + 1}", epochs=chosen.epochs)
        if chosen.hub_share:
            fit_hub_correction(module.attention, rest.queries, held_out, shares=(chosen.hub_share,))
        fit_temperature(module.attention, *held_out)
        folds.append(Fold(module.attention, (part == number).nonzero().squeeze(-1)))
    return folds


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
    found, about = quality(attention, held_out), {name: variant["attention"][name] for name in ("transform", "keys")}
    ndcg = float(found.mean()) if criterion(held_out.targets) == "ndcg10" else None
    top1 = float((found if ndcg is None else answered(attention, held_out)).double().mean())
    scores = {"val_top1": top1, "val_ndcg10": ndcg}
    about = {**about, "hub_share": share, "epochs": epochs, **scores, "chosen": True}
    return Chosen(attention, variant, epochs, share, found, [about], None)
