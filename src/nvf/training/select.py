"""Which stage 1 a run goes on with, chosen on validation queries; stage 2; both together."""

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nvf.data.datamodule import Fold
from nvf.data.queries import QueryBatch, Recorded
from nvf.evaluation.calibration import (
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
from nvf.training.build import Built, Variant
from nvf.training.cache import Kept, opened, stage_key
from nvf.training.callbacks import LAST
from nvf.training.checkpoints import WEIGHTS
from nvf.training.fit import fit, fit_blindly
from nvf.training.limits import Cut, plan, plan_joint
from nvf.training.stages import label

log = logging.getLogger("nvf")
FOLDS = "folds"  # their checkpoints are of no use once the run is done
KEPT = ("epochs", "hub_share", "tried", "gradients")  # of what the cache keeps beside the weights


class Chosen(NamedTuple):
    """A fitted stage 1, and what its choice rested on."""

    attention: SoftAttention
    variant: Variant  # that it is
    epochs: int  # of training
    hub_share: float  # of the rows' hubness that its bias subtracts
    quality: torch.Tensor  # with which it answers the validation queries, (B,)
    tried: list[dict[str, Any]]  # every variant with its validation Top-1, and nDCG@10 where that chooses
    gradients: dict[str, Any] | None = None  # in its training; None where there was none
    fitted_by: dict[str, Any] | None = None  # the run that this one reuses it from, and its seconds
    folds: int | None = None  # that the limits leave for stage 2
    cut: Cut | None = None  # by the limits on what a run may take


def fit_attention(built: Built, folder: Path) -> Chosen:
    """The stage 1 that validates best of the variants, or the one that a checkpoint holds.

    Each has the weights that validate best; then its hubs are corrected, if that is asked for, and its
    temperature is fitted, on validation queries both. A variant that is not clearly above exact search gives way to the
    first. What an earlier run has fitted so already is taken from the cache.
    """
    held_out, folds = built.queries("val"), built.reranker and built.reranker.folds
    if built.loaded is not None:
        variant, attention, calibrated, path = built.loaded
        log.info("stage 1: loaded from %s", path)
        how = _chosen if calibrated else _calibrated
        return how(variant, held_out, attention, variant.fit.epochs)._replace(folds=folds)
    if "attention" not in built.trained:
        variant = built.variants[-1]
        return _chosen(variant, held_out, variant.module.attention, 0)._replace(folds=folds)
    variants, folds, cut = plan(built.variants, folds, built.limits, folder)
    tried = [{**variant.settings, "epochs": variant.fit.epochs} for variant in variants]
    with opened(built.cache, stage_key(built.source, {**built.rests_on, "variants": tried})) as entry:
        begun = any((folder / "checkpoints" / "attention").rglob(LAST))  # a run that is resumed fits stage 1 itself
        kept = entry.read(built.source.memory, folder) if entry is not None and not begun else None
        if kept is not None:
            chosen = _reused(variants, held_out, kept)
        else:
            started = time.perf_counter()
            chosen = _fit_variants(variants, built.exact, held_out, folder)
            if entry is not None and isinstance(chosen.variant.settings["transform"], str):
                about = {name: getattr(chosen, name) for name in KEPT} | {"variant": variants.index(chosen.variant)}
                by = {"folder": str(folder), "seconds": time.perf_counter() - started}
                entry.write(Kept(chosen.attention, {**about, "fitted_by": by}), folder)
    return chosen._replace(folds=folds, cut=cut)


def _reused(variants: Sequence[Variant], held_out: QueryBatch, kept: Kept) -> Chosen:
    log.info("stage 1: as %s fitted it", kept.about["fitted_by"]["folder"])
    return Chosen(
        kept.attention,
        variants[kept.about["variant"]],
        quality=quality(kept.attention, held_out),
        **{name: kept.about[name] for name in (*KEPT, "fitted_by")},
    )


def _fit_variants(variants: Sequence[Variant], exact: SoftAttention, held_out: QueryBatch, folder: Path) -> Chosen:
    fitted = []
    for variant in variants:
        name, attention = f"attention/{variant.name}".rstrip("/"), variant.module.attention
        starts_well = getattr(attention.transform, "starts_at_exact_search", False)
        done = fit(variant.module, variant.data, variant.fit, folder=folder, name=name, start_competes=starts_well)
        chosen = _calibrated(variant, held_out, attention, done.epochs)._replace(gradients=done.gradients)
        fitted.append(chosen)
    reference = quality(exact, held_out)
    clear = [chosen for chosen in fitted if clearly_above(chosen.quality, reference)]
    best = max(clear or fitted[:1], key=lambda chosen: float(chosen.quality.double().sum()))  # the first of equals
    checkpoints = folder / "checkpoints" / "attention"
    if best.variant.name:
        shutil.copyfile(checkpoints / best.variant.name / WEIGHTS, checkpoints / WEIGHTS)
    return best._replace(tried=[{**other.tried[0], "chosen": other is best} for other in fitted])


def fit_reranker(built: Built, chosen: Chosen, folder: Path) -> tuple[Pipeline, dict[str, Any] | None]:
    """Both stages: behind stage 1 a reranker with the weights that validate best, or one from a checkpoint.

    Its scores are scaled to be right about validation queries.

    Returns:
        The pipeline, and the gradients in training, if there was any.
    """
    assert built.reranker is not None
    module, data, settings, _, loaded = built.reranker
    pipeline, gradients = module.model, None
    pipeline.attention = data.attention = chosen.attention
    pipeline.to(built.source.memory.rows.device)
    if loaded is not None:
        log.info("stage 2: loaded from %s", loaded)
    else:
        if chosen.folds is not None and chosen.epochs:
            data.folds = cross_fit(built, chosen, folder)
        if isinstance(pipeline.reranker, EvidenceReranker):
            assert pipeline.evidence is not None
            samples = data.samples_of("train")
            pipeline.reranker.standardise(samples.evidence, pipeline.evidence.law()["ignored"])  # type: ignore[union-attr]
        if "reranker" in built.trained:
            starts_well = getattr(pipeline.reranker, "starts_at_stage_one", False)
            done = fit(module, data, settings, folder=folder, name="reranker", start_competes=starts_well)
            gradients = done.gradients
    fit_sharpness(pipeline, built.queries("val"))
    return pipeline, gradients


class FittedJointly(NamedTuple):
    """How the joint training of both stages went."""

    gradients: dict[str, Any]  # in training
    kept: bool  # whether its weights are, or those from before it
    cut: Cut | None  # by the limits on what a run may take


def fit_joint(built: Built, pipeline: Pipeline, folder: Path) -> FittedJointly:
    """Fit both stages together from where they are, and leave the weights that validate best in them.

    On recorded queries, which are few and can be learned by heart, the start goes on unless those are clearly above it.
    """
    assert built.joint is not None
    held_out = built.queries("val")
    start = {name: tensor.clone() for name, tensor in pipeline.state_dict().items()}
    before = quality(pipeline, held_out)
    module, data = built.joint.make(pipeline), built.joint.data
    settings, cut = plan_joint(built.joint.fit, module, data, built.limits, folder)
    epochs, gradients = fit(module, data, settings, folder=folder, name="joint", start_competes=True)
    recorded = isinstance(built.source, Recorded)
    kept = epochs > 0 and (not recorded or clearly_above(quality(pipeline, held_out), before))
    if kept:
        fit_sharpness(pipeline, held_out)
    else:
        log.info("joint training is not clearly better on validation queries: both stages stay as they were")
        pipeline.load_state_dict(start)
    return FittedJointly(gradients, kept, cut)


def cross_fit(built: Built, chosen: Chosen, folder: Path) -> list[Fold]:
    """Stages 1 like the chosen one, each fitted without one of `chosen.folds` parts of the training queries.

    Identical queries are in one part.
    """
    source, count, variant = built.source, chosen.folds, chosen.variant
    assert isinstance(source, Recorded)
    assert count is not None
    train, held_out = source.splits["train"], built.queries("val")
    distinct, group = train.queries.unique(dim=0, return_inverse=True)
    part = torch.randperm(len(distinct), generator=stream(variant.data.seed, "folds"))[group] % count
    folds = []
    for number in range(count):
        log.info("fitting attention without part %d of %d of the training queries", number + 1, count)
        rest = QueryBatch(*(tensor[part != number] for tensor in train))
        module, data = variant.remake(Recorded(source.memory, {**source.splits, "train": rest}))
        fit_blindly(module, data, variant.fit, folder=folder, name=f"{FOLDS}/{number + 1}", epochs=chosen.epochs)
        if chosen.hub_share:
            fit_hub_correction(module.attention, rest.queries, held_out, shares=(chosen.hub_share,))
        fit_temperature(module.attention, *held_out)
        folds.append(Fold(module.attention, (part == number).nonzero().squeeze(-1)))
    return folds


def _calibrated(variant: Variant, held_out: QueryBatch, attention: SoftAttention, epochs: int) -> Chosen:
    share = 0.0
    if variant.settings["hub_correction"] and isinstance(variant.data.source, Recorded):
        bank = variant.data.queries("train").queries
        share = fit_hub_correction(attention, bank, held_out, cautious=not epochs)
    fit_temperature(attention, *held_out)
    return _chosen(variant, held_out, attention, epochs, share)


def _chosen(
    variant: Variant, held_out: QueryBatch, attention: SoftAttention, epochs: int, share: float = 0.0
) -> Chosen:
    found = quality(attention, held_out)
    ndcg = float(found.mean()) if criterion(held_out.targets) == "ndcg10" else None
    top1 = float((found if ndcg is None else quality(attention, held_out, by="top1")).double().mean())
    about = {"transform": label(variant.settings["transform"]), "keys": variant.settings["keys"]}
    about |= {"hub_share": share, "epochs": epochs, "val_top1": top1, "val_ndcg10": ndcg, "chosen": True}
    return Chosen(attention, variant, epochs, share, found, [about])
