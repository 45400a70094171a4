"""From settings to objects: what is wrong with a setting is refused here, before any work."""

import logging
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch

from nvf.data.queries import QueryBatch, Recorded, Source, each
from nvf.errors import InputError, check_number
from nvf.evaluation.calibration import fit_alignment
from nvf.models.attention import SoftAttention
from nvf.models.evidence import Evidence, evenly
from nvf.models.memory import check_k
from nvf.ops.random_streams import stream
from nvf.runs.settings import on_one_device
from nvf.training.checkpoints import OTHER, load_attention, load_reranker
from nvf.training.devices import SHARDED
from nvf.training.fit import check_trainer
from nvf.training.stages import (
    Settings,
    Stage,
    all_variants,
    joint_stage,
    make,
    planned,
    reranker_stage,
    seen_rows,
    variants,
)

ALIGNED_BY = 65_536  # generated queries, where these are of another space than the rows
AUTO = "auto"  # a setting that the sizes decide
EXACT = 2e11  # multiply-adds of an epoch up to which the loss is exact
SAMPLED = 8192  # rows a step that estimate it otherwise
ONCE, OFTEN = 1e12, 1e11  # multiply-adds of what is computed once, and of what each variant computes several times
FEWEST = 2048  # queries or rows that are left of more
logger = logging.getLogger("nvf")


@dataclass(frozen=True)
class Built:
    """Everything that a run works with."""

    asked: Settings  # as they were given
    config: Settings  # with numbers for what the sizes of the data decide
    source: Source
    seen: torch.Tensor | None  # which rows answer a training query, (N,) bool; None where every row can
    aligned: dict[str, Any] | None  # how rows were aligned with queries of another model, where they were
    exact: SoftAttention  # exact search; where rows are aligned, that of the aligned ones
    variants: tuple[Stage, ...]  # the stages 1 to try
    given: Stage | None  # not to be fitted: a checkpoint's, or untrained where joint training starts from scratch
    reranker: Stage | None  # behind exact search, whose place the fitted stage 1 takes
    joint: Stage | None  # as it is before the stages are fitted

    def queries(self, split: str) -> QueryBatch:
        """The `val` or `test` queries, or the `train` queries where they are recorded."""
        return self.variants[0].data.queries(split)


def build(config: Settings, source: Source | None = None) -> Built:
    """Turn a run's settings, with a `source` of one's own if it is given, into objects, or raise an InputError."""
    check_trainer(config["trainer"])
    source = build_source(config) if source is None else source
    asked, config = config, sized(config, source)
    if isinstance(source, Recorded):
        held_out = source.splits["val"]
        chosen = evenly(len(held_out.queries), planned(config, "chosen_by"))
        source.splits["val"] = each(held_out, itemgetter(chosen))
        of_val = source.references.get("val", {})
        if source.asked is not None:
            source.asked["val"] = [source.asked["val"][place] for place in chosen.tolist()]
        source.references["val"] = {name: (asked[chosen], rows) for name, (asked, rows) in of_val.items()}
    _check_numbers(config, source)
    foreign = getattr(source, "foreign", False)
    check_sharded(config, foreign=foreign)
    aligned = _align(config, source) if foreign else None
    tried = all_variants(config, source)
    given = _given(config, source, tried)
    exact, reranker, joint = SoftAttention(source.memory, transform="identity"), None, None
    if "reranker" in config["stage"]["fit"]:
        evidence = None
        if config["reranker"]["kind"] == "evidence":
            assert isinstance(source, Recorded)
            queries, targets, words, *_ = source.splits["train"]
            parts = {name: planned(config, name) for name in ("bank", "among")}
            evidence = Evidence.gather(source.memory, queries, targets, worded=words is not None, **parts)
        reranker = reranker_stage(config, source, exact, evidence=evidence)
        if config["reranker_checkpoint"] is not None:
            load_reranker(reranker.module.model, config["reranker_checkpoint"])
    if "joint" in config["stage"]["fit"]:
        assert reranker is not None
        joint = joint_stage(config, source, reranker.module.model)
    return Built(asked, config, source, seen_rows(source), aligned, exact, tried, given, reranker, joint)


def sized(config: Settings, source: Source) -> Settings:
    """The settings with a number, or null for all, in the place of each `auto`: a function of the sizes of the data."""
    splits = source.splits if isinstance(source, Recorded) else {}
    logged, held_out = (len(splits[name].queries) if splits else 0 for name in ("train", "val"))
    rows, dim = len(source.memory), source.memory.query_dim

    def of(most: float, count: int) -> int | None:
        wanted = max(FEWEST, int(most / (rows * dim)))
        return wanted if wanted < count else None

    large = logged * rows * dim > EXACT and rows > SAMPLED
    auto = {"among": of(ONCE, rows), "bank": of(OFTEN, logged), "sample": SAMPLED if large else None}
    auto |= {"taught_by": of(4 * ONCE, logged), "chosen_by": of(OFTEN, held_out)}
    given = {"sample": config["attention"]["sample"], **config["data"].get("plan", {})}
    planned = {name: auto[name] if value == AUTO else value for name, value in given.items()}
    for name, value in planned.items():
        if value is not None and name != "sample":
            check_number(f"data.plan.{name}", value, minimum=1, whole=True, remedy="auto suits the sizes, null is all")
    attention = {**config["attention"], "sample": planned["sample"]}
    return {**config, "attention": attention, "data": {**config["data"], "plan": planned}}


def build_source(config: Settings) -> Source:
    """The memory and the queries over it, everything about them checked."""
    data, queries = config["data"], config["queries"]
    if not data.get("dir", True) and (data["name"] == "embeddings" or queries["name"] == "recorded"):
        raise InputError("data.dir is not set; name the folder that holds your vectors: data.dir=path/to/folder")
    memory = make(data["memory"], "data.memory")
    if merged := memory.given - len(memory):
        logger.info("%d of %d rows equal an earlier one; equal rows are one answer", merged, memory.given)
    check_k(config["k"], len(memory))
    if queries["name"] == "recorded" and "dir" not in data:
        raise InputError(f"data={data['name']} has no recorded queries; choose queries=nearest, noisy or warped")
    source: Source = make(queries["source"], "queries.source", memory=memory)
    return source


def _align(config: Settings, source: Source) -> dict[str, Any]:
    """Align the source's rows with its queries, which are of another model, and return how."""
    if isinstance(source, Recorded):
        log, held_out, pairs = source.splits["train"], source.splits["val"], source.pairs
    else:
        streams = (stream(config["seed"], f"alignment/{name}", device=source.memory.rows.device) for name in "ab")
        (log, held_out), pairs = (source.sample(ALIGNED_BY, generator) for generator in streams), None
    source.memory, how = fit_alignment(source.memory, log, held_out, pairs, bank=planned(config, "bank"))
    return how


def check_sharded(config: Settings, *, foreign: bool = False) -> None:
    """Raise an InputError for what a memory that several devices share cannot do."""
    if config["trainer"].get("strategy") != SHARDED or on_one_device(config["trainer"]):
        return
    if foreign:
        raise InputError("trainer=sharded has no rows that are aligned with another model's queries; use one device")
    settings = [variant["attention"] for variant in variants(config)]
    moved = any(one["keys"] == "moved" or one["hard"] for one in settings)
    if (clip := config["trainer"].get("gradient_clip_val")) and any(one["keys"] == "learned" for one in settings):
        raise InputError(f"trainer.gradient_clip_val={clip} is not supported by trainer=sharded with learned keys")
    fits = config["stage"]["fit"]
    if "joint" in fits or moved or ("reranker" in fits and config["reranker"]["folds"] is not None):
        remedy = "stage=reranker or attention, attention.keys=frozen or learned, attention.hard=0, reranker.folds=null"
        raise InputError(f"trainer=sharded has no joint training, moved keys, hard negatives or folds: set {remedy}")


def stages(config: Settings) -> list[str]:
    """What is trained, in which order; without a warm start the last stage alone."""
    warm = config["stage"].get("warm_start", True)
    if not isinstance(warm, bool):
        raise InputError(f"stage.warm_start={warm} is neither true nor false; true is the default")
    fits: list[str] = config["stage"]["fit"]
    return fits if warm else fits[-1:]


def _given(config: Settings, source: Source, tried: tuple[Stage, ...]) -> Stage | None:
    last = tried[-1]
    if (path := config["attention_checkpoint"]) is not None:
        attention, _ = load_attention(path, source.memory)
        theirs = {**attention.settings, "biased": False, "worded": False, "hubs": None}  # fitted after training
        mine = last.module.attention.settings
        same = [stage for stage in tried if stage.module.attention.settings == theirs]
        if not same:
            raise InputError(f"attention_checkpoint={path} has settings {theirs}, but this run has {mine}; {OTHER}")
        same[0].module.model = attention
        return same[0]
    if (path := config["reranker_checkpoint"]) is not None:
        last.module.model = load_attention(path, source.memory, kind="reranker")[0]
        return last
    return None if "attention" in stages(config) else last._replace(fit=replace(last.fit, epochs=0))


def _check_numbers(config: Settings, source: Source) -> None:
    given = {f"{stage}.{name}": config[stage][name] for stage in stages(config) for name in ("epochs", "patience")}
    for name, value in {**given, "save_every": config["save_every"]}.items():
        if value is not None or name.endswith("epochs"):
            remedy = "null saves as often as every 20 s" if name == "save_every" else "raise it"
            check_number(name, value, minimum=1, whole=True, remedy=remedy)
    if (work := config["data"].get("work")) is not None:
        check_number("data.work", work, above=0, remedy="null sets no limit")
    kind, folds = config["reranker"]["kind"], config["reranker"]["folds"]
    if "reranker" in config["stage"]["fit"] and (kind == "evidence" or folds is not None):
        if not isinstance(source, Recorded):
            raise InputError(f"reranker.kind={kind}, reranker.folds={folds} need a log; choose reranker=residual")
        if folds is not None:
            check_number("reranker.folds", folds, minimum=2, whole=True, remedy="3 is the default, null makes none")
