"""Which stage 1 a run goes on with, chosen on validation queries; stage 2; both together."""

import logging
import shutil
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvf.data.datamodule import Fold
from nvf.data.queries import QueryBatch, Recorded, each
from nvf.evaluation import calibration
from nvf.evaluation.calibration import clearly_above, quality
from nvf.models.attention import SoftAttention
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker
from nvf.ops.random_streams import stream
from nvf.ops.ranks import criterion
from nvf.training import cache
from nvf.training.build import Built, stages
from nvf.training.callbacks import LAST
from nvf.training.checkpoints import WEIGHTS, save_weights
from nvf.training.fit import fit, fit_blindly
from nvf.training.plan import Cut, forecast, plan, plan_joint
from nvf.training.stages import Stage, attention_stage, joint_stage, label, planned

log = logging.getLogger("nvf")
FOLDS = "folds"  # their checkpoints are of no use once the run is done


class Chosen(NamedTuple):
    """A calibrated stage 1, and what its choice rested on."""

    attention: SoftAttention
    variant: Stage  # that it is
    about: dict[str, Any]  # its epochs, its hub correction and its validation figures
    tried: list[dict[str, Any]]  # the same of every variant
    gradients: dict[str, Any] | None = None  # in its training; None where there was none
    fitted_by: dict[str, Any] | None = None  # the run that this one reuses it from, and its seconds
    folds: int | None = None  # that the limits leave for stage 2
    cut: Cut | None = None  # by the limits on what a run may take


def fit_attention(built: Built, folder: Path) -> Chosen:
    """The stage 1 that validates best of the variants, or the one that a checkpoint holds.

    Each has the weights that validate best; then its hubs are corrected, if that is asked for, and its temperature is
    fitted, both on validation queries. A variant that is not clearly above exact search gives way to the first. What an
    earlier run has fitted with the same settings is taken from the cache.
    """
    config, folds = built.config, built.reranker and built.config["reranker"]["folds"]
    if built.given is not None:
        log.info(forecast(built, [], folds))
        variant, attention, epochs = built.given, built.given.module.attention, built.given.fit.epochs
        if (path := config["attention_checkpoint"] or config["reranker_checkpoint"]) is not None:
            log.info("stage 1: loaded from %s", path)
        calibrates = config["attention_checkpoint"] is not None
        about, _ = _judged(variant, built.queries("val"), epochs, calibrates=calibrates)
        return Chosen(attention, variant, about, [about], folds=folds)
    variants, folds, cut = plan(built.variants, folds, config["data"])
    settings = [{**variant.config["attention"], "epochs": variant.fit.epochs} for variant in variants]
    with cache.opened(config, cache.stage_key(config, built.source, settings)) as entry:
        begun = any((folder / "checkpoints" / "attention").rglob(LAST))  # a run that is resumed fits stage 1 itself
        kept = cache.read(entry, built.source.memory) if entry is not None and not begun else None
        if entry is not None and kept is not None:
            attention, notes = kept
            number, tried, by = notes["variant"], notes["tried"], notes["fitted_by"]
            log.info(forecast(built, [], folds))
            log.info("stage 1: as %s fitted it", by["folder"])
            (folder / "checkpoints" / "attention").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry, folder / "checkpoints" / "attention" / WEIGHTS)
            return Chosen(attention, variants[number], tried[number], tried, notes["gradients"], by, folds, cut)
        log.info(forecast(built, variants, folds))
        started = time.perf_counter()
        chosen = _fit_variants(variants, built, folder)
        if entry is not None and isinstance(chosen.variant.config["attention"]["transform"], str):
            notes = {"variant": variants.index(chosen.variant), "tried": chosen.tried, "gradients": chosen.gradients}
            notes["fitted_by"] = {"folder": str(folder), "seconds": time.perf_counter() - started}
            save_weights(chosen.attention, entry, stage="attention", notes=notes)
    return chosen._replace(folds=folds, cut=cut)


def _fit_variants(variants: Sequence[Stage], built: Built, folder: Path) -> Chosen:
    held_out, fitted, qualities = built.queries("val"), [], []
    for variant in variants:
        name, attention = f"attention/{variant.name}".rstrip("/"), variant.module.attention
        starts_well = getattr(attention.transform, "starts_at_exact_search", False)
        how: dict[str, Any] = {"folder": folder, "name": name, "start_competes": starts_well}
        epochs, gradients = fit(variant.module, variant.data, variant.fit, **how)
        about, found = _judged(variant, held_out, epochs, calibrates=True)
        attention.release()  # of a large memory, the keys of one stage 1 are as many as fit
        fitted.append(Chosen(attention, variant, about, [], gradients))
        qualities.append(found)
    reference = quality(built.exact, held_out) if held_out.words is None else qualities[0]
    clear = [number for number, found in enumerate(qualities) if clearly_above(found, reference)]
    best = max(clear or [0], key=lambda number: float(qualities[number].double().sum()))  # the first of equals
    for number, one in enumerate(fitted):
        one.about["chosen"] = number == best
    checkpoints, name = folder / "checkpoints" / "attention", variants[best].name
    if name:
        shutil.copyfile(checkpoints / name / WEIGHTS, checkpoints / WEIGHTS)
    return fitted[best]._replace(tried=[one.about for one in fitted])


def _judged(variant: Stage, held_out: QueryBatch, epochs: int, *, calibrates: bool) -> tuple[dict[str, Any], Tensor]:
    """What results.json says of a stage 1, and how well it answers each validation query, (B,).

    If it `calibrates`, moved keys, the hub correction, the weights of words and the temperature are fitted first, as
    far as the stage has them.
    """
    settings, attention, strength, share = variant.config["attention"], variant.module.attention, 0.0, 0.0
    if calibrates:
        attention.word_weights = None  # a checkpoint's may have been fitted
        if isinstance(variant.data.source, Recorded):
            train, bank = variant.data.queries("train"), planned(variant.config, "bank")
            if settings["keys"] == "moved":
                strength = calibration.move_keys(attention, train, held_out, bank=bank)
            if settings["hub_correction"]:
                cautious = not (epochs or strength)
                share = calibration.fit_hub_correction(attention, train.queries, held_out, cautious=cautious, bank=bank)
        if held_out.words is not None:
            calibration.fit_words(attention, held_out)
        calibration.fit_temperature(attention, held_out)
    found = quality(attention, held_out)
    ndcg = float(found.mean()) if criterion(held_out.targets) == "ndcg10" else None
    top1 = float((found if ndcg is None else quality(attention, held_out, by="top1")).double().mean())
    about = {"transform": label(settings["transform"]), "keys": settings["keys"], "hub_share": share, "epochs": epochs}
    about["key_strength"] = strength
    if attention.word_weights is not None:
        about["word_weights"] = attention.word_weights.tolist()
    return {**about, "val_top1": top1, "val_ndcg10": ndcg, "chosen": True}, found


def fit_reranker(built: Built, chosen: Chosen, folder: Path) -> tuple[Pipeline, dict[str, Any] | None]:
    """Both stages, and the gradients in training, if there was any.

    The reranker has the weights that validate best, or those of a checkpoint. Its scores are scaled so that their
    probabilities are right on validation queries.
    """
    assert built.reranker is not None
    module, data, settings, *_ = built.reranker
    pipeline: Pipeline = module.model
    gradients: dict[str, Any] | None = None
    pipeline.attention = data.attention = chosen.attention
    pipeline.words = getattr(built.source, "words", None)
    pipeline.to(built.source.memory.rows.device)
    if (path := built.config["reranker_checkpoint"]) is not None:
        log.info("stage 2: loaded from %s", path)
    else:
        taught = chosen.about["epochs"] or chosen.about["key_strength"] or built.aligned is not None
        if chosen.folds is not None and taught:
            data.folds = cross_fit(built, chosen, folder)
        if isinstance(pipeline.reranker, EvidenceReranker):
            assert pipeline.evidence is not None
            samples = data.samples_of("train")
            pipeline.reranker.standardise(samples.evidence, pipeline.evidence.law()["ignored"])  # type: ignore[union-attr]
        if "reranker" in stages(built.config):
            starts_well = getattr(pipeline.reranker, "starts_at_stage_one", False)
            _, gradients = fit(module, data, settings, folder=folder, name="reranker", start_competes=starts_well)
    calibration.fit_sharpness(pipeline, built.queries("val"))
    return pipeline, gradients


class FittedJointly(NamedTuple):
    """How the joint training of both stages went."""

    gradients: dict[str, Any]  # in training
    kept: bool  # whether its weights are, or those from before it
    cut: Cut | None  # by the limits on what a run may take


def fit_joint(built: Built, pipeline: Pipeline, folder: Path) -> FittedJointly:
    """Fit both stages together from where they are, and leave the weights that validate best in them.

    Recorded queries are few and can be learned by heart: there the start is kept unless training is clearly better.
    """
    held_out = built.queries("val")
    start = {name: tensor.clone() for name, tensor in pipeline.state_dict().items()}
    before = quality(pipeline, held_out)
    joint = joint_stage(built.config, built.source, pipeline)
    settings, cut = plan_joint(joint, built.config["data"])
    epochs, gradients = fit(joint.module, joint.data, settings, folder=folder, name="joint", start_competes=True)
    recorded = isinstance(built.source, Recorded)
    kept = epochs > 0 and (not recorded or clearly_above(quality(pipeline, held_out), before))
    if kept:
        calibration.fit_sharpness(pipeline, held_out)
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
    bank = planned(built.config, "bank")
    epochs, share, strength = (chosen.about[name] for name in ("epochs", "hub_share", "key_strength"))
    distinct, group = train.queries.unique(dim=0, return_inverse=True)
    part = torch.randperm(len(distinct), generator=stream(variant.data.seed, "folds"))[group] % count
    folds = []
    for number in range(count):
        log.info("fitting attention without part %d of %d of the training queries", number + 1, count)
        rest = each(train, itemgetter(part != number))
        memory = source.memory
        if built.aligned is not None:
            how = {name: built.aligned[name] for name in ("by", "shrinkage")}
            ((_, memory),) = calibration.align(memory, rest, source.pairs, **how, strengths=[built.aligned["strength"]])
        module, data, *_ = attention_stage(variant.config, Recorded(memory, {**source.splits, "train": rest}))
        if epochs:
            fit_blindly(module, data, variant.fit, folder=folder, name=f"{FOLDS}/{number + 1}", epochs=epochs)
        if strength:
            calibration.move_keys(module.attention, rest, held_out, strengths=(strength,), bank=bank)
        if share:
            calibration.fit_hub_correction(module.attention, rest.queries, held_out, shares=(share,), bank=bank)
        module.attention.word_weights = chosen.attention.word_weights
        calibration.fit_temperature(module.attention, held_out)
        module.attention.release()
        folds.append(Fold(module.attention, (part == number).nonzero().squeeze(-1)))
    return folds
