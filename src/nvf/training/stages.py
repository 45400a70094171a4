"""Each stage from its settings: its module, its batches, and how it is fitted."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from nvf.data.datamodule import VectorDataModule
from nvf.data.queries import Recorded, Source
from nvf.errors import InputError, check_number, one_line
from nvf.models.attention import SoftAttention
from nvf.models.evidence import Evidence
from nvf.models.pipeline import Pipeline
from nvf.ops.random_streams import stream_seed
from nvf.training.callbacks import Curves
from nvf.training.fit import FitSettings
from nvf.training.modules import AttentionModule, JointModule, RerankerModule
from nvf.training.stage import StageModule

Settings = Mapping[str, Any]
FEWEST_STEPS = 8  # of an epoch: a small log is cut into smaller batches, of at least
SMALLEST_BATCH = 64


class Stage(NamedTuple):
    """A stage that can be fitted: its untrained module, its batches, and how it is fitted."""

    module: Any
    data: VectorDataModule
    fit: FitSettings
    config: Settings  # of the run
    name: str = ""  # of a stage 1 among several


def variants(config: Settings) -> list[Settings]:
    """The settings of every stage 1 that the configuration asks to try: one, unless `attention.variants` lists more."""
    attention = config["attention"]
    given, model = attention["variants"], attention["model"]
    found: list[Settings] = []
    if given is None:
        return [config]
    if not given or not all(isinstance(one, dict) and one.keys() <= attention.keys() for one in given):
        raise InputError(f"attention.variants={given} is no list of stage 1's settings; attention=auto has one")
    for variant in given:
        own = {**model, **{name: variant[name] for name in variant if name in model}}
        found.append({**config, "attention": {**attention, **variant, "model": own, "variants": None}})
    return found


def all_variants(config: Settings, source: Source) -> tuple[Stage, ...]:
    """The stages 1 that are tried, each with a name of its own after its transform and keys; one alone needs none."""
    given = variants(config)
    plain = [f"{label(one['attention']['transform'])}-{one['attention']['keys']}" for one in given]
    found = []
    for number, (one, name) in enumerate(zip(given, plain, strict=True), start=1):
        own = name if plain.count(name) == 1 else f"{name}-{number}"
        check_number("attention.variants.epochs", one["attention"]["epochs"], minimum=0, whole=True, remedy="raise it")
        found.append(attention_stage(one, source)._replace(name=own if len(given) > 1 else ""))
    return tuple(found)


def planned(config: Settings, name: str) -> int | None:
    """How much of a large set the plan of a run takes, see `data.plan` in conf/; None is all."""
    return config["data"].get("plan", {}).get(name)


def attention_stage(config: Settings, source: Source) -> Stage:
    """Stage 1."""
    settings = config["attention"]
    torch.manual_seed(stream_seed(settings["seed"], "attention"))
    seen = seen_rows(source) if settings["keys"] != "frozen" else None
    moving: dict[str, Any] = {} if seen is None else {"moving": seen.nonzero().squeeze(-1)}
    attention = make(settings["model"], "attention.model", memory=source.memory, **moving)
    given = {name: settings[name] for name in ("warmup", "sample", "hard")} | {"k": config["k"]}
    return _stage("attention", AttentionModule, attention, given, config, source)


def reranker_stage(
    config: Settings, source: Source, attention: SoftAttention, *, evidence: Evidence | None = None
) -> Stage:
    """Stage 2 behind a stage 1; `evidence` is what `reranker=evidence` weighs."""
    settings = config["reranker"]
    torch.manual_seed(stream_seed(settings["seed"], "reranker"))
    size: Any = {"dim": source.memory.query_dim} if evidence is None else {"features": len(evidence.features)}
    reranker = make(settings["model"], "reranker.model", **size)
    pipeline = Pipeline(attention, reranker, k=config["k"], evidence=evidence)
    given, taught_by = {"scalar_lr_ratio": settings["scalar_lr_ratio"]}, planned(config, "taught_by")
    candidates: dict[str, Any] = {"attention": attention, "evidence": evidence, "taught_by": taught_by}
    return _stage("reranker", RerankerModule, pipeline, given, config, source, **candidates)


def joint_stage(config: Settings, source: Source, pipeline: Pipeline) -> Stage:
    """Both stages, to be fitted together."""
    given = {name: config["joint"][name] for name in ("scalar_lr_ratio", "relaxation", "attention_weight")}
    return _stage("joint", JointModule, pipeline, given, config, source, evidence=pipeline.evidence)


def _stage(
    stage: str, kind: type[StageModule], model: Any, given: Settings, config: Settings, source: Source, **batches: Any
) -> Stage:
    """A stage whose module gets the arguments that are `given`, and its datamodule those of `batches`."""
    settings, queries = config[stage], config["queries"]
    optimizer = make(config["optimizer"], "optimizer", called=False)
    module = kind(model, optimizer=optimizer, **{name: settings[name] for name in ("lr", "schedule", "seed")}, **given)
    batch_size = settings["batch_size"]
    if isinstance(source, Recorded) and isinstance(batch_size, int):
        batch_size = min(batch_size, max(SMALLEST_BATCH, len(source.splits["train"].queries) // FEWEST_STEPS))
    sizes = {name: settings[name] for name in ("seed", "steps_per_epoch", "train_samples")}
    sizes |= {name: queries[name] for name in ("val_samples", "test_samples") if name in queries}
    sizes |= {"batch_size": batch_size, "k": config["k"], "eval_seed": queries["seed"]}
    data = VectorDataModule(source, stage=stage, **sizes, **batches)
    return Stage(module, data, fit_settings(config, stage), config)


def fit_settings(config: Settings, stage: str) -> FitSettings:
    """How a stage is fitted, with callbacks of its own."""
    settings, trainer = config[stage], dict(config["trainer"])
    most = trainer.pop("max_epochs", None)
    given = {name: node for name, node in config["callbacks"].items() if node}
    if not trainer.get("enable_progress_bar", True):
        given.pop("progress", None)
    loggers = [make(node, f"logger.{name}", called=False) for name, node in config["logger"].items() if node]

    def started(folder: Path, name: str, before: int, done: int) -> list[Logger]:
        """The loggers; TensorBoard then shows nothing that an interrupted process logged after the steps done."""
        first = [{"first": before} if issubclass(one.func, Curves) else {} for one in loggers]
        purged = [{"purge_step": done} if issubclass(one.func, TensorBoardLogger) else {} for one in loggers]
        given = {"save_dir": str(folder), "name": name}
        return [one(**given, **own, **from_step) for one, own, from_step in zip(loggers, first, purged, strict=True)]

    return FitSettings(
        stage=stage,
        epochs=settings["epochs"] and (most or settings["epochs"]),
        patience=settings["patience"],
        save_every=config["save_every"],
        trainer=make({"_target_": "lightning.Trainer", **trainer}, "trainer", called=False),
        callbacks=[make(node, f"callbacks.{name}") for name, node in given.items()],
        loggers=started,
    )


def seen_rows(source: Source) -> torch.Tensor | None:
    """Which rows answer a training query, (N,) bool; None where every row can."""
    if not isinstance(source, Recorded):
        return None
    seen = torch.zeros(len(source.memory) + 1, dtype=torch.bool)
    seen[source.splits["train"].targets] = True  # -1, the padding, is the last
    return seen[:-1].to(source.memory.rows.device)


def label(transform: str | Mapping[str, Any]) -> str:
    """A transform's name: that of its class, where it is a user's own."""
    return transform if isinstance(transform, str) else str(transform["_target_"]).rpartition(".")[2]


def make(node: Settings, name: str, *, called: bool = True, **given: Any) -> Any:
    """Build what a part of the settings names by `_target_`, with further arguments; unless `called`, a partial of it.

    A class or function that does not exist, or takes other arguments, is an InputError with the part's name.
    """
    try:
        function = instantiate({**node, "_partial_": True}, _convert_="all")
        inspect.signature(function.func).bind_partial(**{**function.keywords, **given})
        return function(**given) if called else function
    except (InstantiationException, TypeError) as fault:
        cause: BaseException | None = fault
        while cause is not None and not isinstance(cause, InputError):  # Hydra wraps the exceptions that it meets
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        raise InputError(f"{name}: {one_line(fault)}; correct {name}._target_ or its arguments") from None
