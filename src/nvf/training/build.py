"""From settings to objects, once: what is wrong with a setting is refused here, before any work."""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nvf.data.datamodule import VectorDataModule
from nvf.data.queries import QueryBatch, Recorded, Source
from nvf.errors import InputError, check_number
from nvf.models.attention import SoftAttention
from nvf.models.memory import check_k
from nvf.models.pipeline import Pipeline
from nvf.training.checkpoints import attention_within, load_attention, load_reranker
from nvf.training.devices import SHARDED, on_one_device
from nvf.training.fit import FitSettings, check_trainer
from nvf.training.modules import AttentionModule, JointModule, RerankerModule
from nvf.training.stages import (
    Settings,
    attention_stage,
    batches_of,
    fit_settings,
    joint_module,
    label,
    log_of_queries,
    make,
    reranker_stage,
    seen_rows,
    variants,
)

log = logging.getLogger("nvf")
LIMITS = ("work", "budget_s")  # of `data`, on what a run may take


class Variant(NamedTuple):
    """A stage 1 that a run tries: its untrained module, its batches, and how it is fitted."""

    name: str  # of its folder; empty where it is the only one
    settings: dict[str, Any]  # as they were given, JSON values
    module: AttentionModule
    data: VectorDataModule
    fit: FitSettings
    remake: Callable[[Source], tuple[AttentionModule, VectorDataModule]]  # untrained again, over other queries


class SecondStage(NamedTuple):
    """Stage 2 behind exact search, which gives its place to the fitted stage 1; its batches, and how it is fitted."""

    module: RerankerModule
    data: VectorDataModule
    fit: FitSettings
    folds: int | None  # of the training queries
    loaded: str | None  # the checkpoint that its weights are from


class Joint(NamedTuple):
    """What fits both stages together."""

    make: Callable[[Pipeline], JointModule]
    data: VectorDataModule
    fit: FitSettings


class Loaded(NamedTuple):
    """A stage 1 that a checkpoint holds."""

    variant: Variant  # that it is
    attention: SoftAttention
    calibrated: bool
    path: str


class Built(NamedTuple):
    """Everything that a run works with."""

    source: Source
    k: int  # candidates a query
    trained: tuple[str, ...]  # the stages that are trained, in this order
    seen: torch.Tensor | None  # which rows answer a training query, (N,) bool; None where every row can
    exact: SoftAttention  # exact search
    variants: tuple[Variant, ...]
    loaded: Loaded | None
    reranker: SecondStage | None
    joint: Joint | None
    limits: dict[str, float]  # on what the run may take, by name
    cache: Path | None  # for fitted stages 1
    rests_on: dict[str, Any]  # the settings, beside the variants' own, that a fitted stage 1 depends on

    def queries(self, split: str) -> QueryBatch:
        """The `val` or `test` queries, or the `train` queries where they are recorded."""
        return self.variants[0].data.queries(split)


def build(config: Settings, source: Source | None = None) -> Built:
    """Turn the settings of a run, resolved and as plain containers, into objects.

    Args:
        source: in place of the memory and the queries that the settings describe.

    Raises:
        InputError: whatever is wrong with the settings or the user's files.
    """
    check_trainer(config["trainer"])
    source = build_source(config) if source is None else source
    fits, trained = config["stage"]["fit"], stages(config)
    _check_numbers(config, trained)
    check_sharded(config)
    tried = tuple(_variant(variant, name, source) for name, variant in _named(variants(config)))
    loaded = _loaded(config, source, tried)
    exact, seen = SoftAttention(source.memory, transform="identity"), seen_rows(source)
    reranker = joint = None
    if "reranker" in fits:
        _check_log(config["reranker"], source)
        module, data = reranker_stage(config, source, exact, evidence=log_of_queries(config, source))
        if config["reranker_checkpoint"] is not None:
            load_reranker(module.model, config["reranker_checkpoint"])
        settings = fit_settings(config, "reranker", source.memory)
        reranker = SecondStage(module, data, settings, config["reranker"]["folds"], config["reranker_checkpoint"])
    if "joint" in fits:
        assert reranker is not None
        together = partial(joint_module, config, source)
        together(reranker.module.model)  # a shell that says what is wrong with its settings
        data = batches_of(config, "joint", source, evidence=reranker.module.model.evidence)
        joint = Joint(together, data, fit_settings(config, "joint", source.memory))
    queries = {name: value for name, value in config["queries"].items() if name != "source" or seen is None}
    off = config["cache"] in (None, False, "off") or not on_one_device({"devices": "auto", **config["trainer"]})
    return Built(
        source,
        config["k"],
        tuple(trained),
        seen,
        exact,
        tried,
        loaded,
        reranker,
        joint,
        limits={f"data.{name}": value for name in LIMITS if (value := config["data"].get(name)) is not None},
        cache=None if off else Path(str(config["cache"])),
        rests_on={name: config[name] for name in ("trainer", "optimizer", "callbacks")} | {"queries": queries},
    )


def build_source(config: Settings) -> Source:
    """The memory and the queries over it, everything about them checked.

    Raises:
        InputError: whatever is wrong with the settings or the user's files.
    """
    data, queries = config["data"], config["queries"]
    memory = make(data["memory"], "data.memory")
    if merged := memory.given - len(memory):
        log.info("%d of %d rows equal an earlier one; equal rows are one answer", merged, memory.given)
    check_k(config["k"], len(memory))
    if queries["name"] == "recorded" and "dir" not in data:
        raise InputError(f"data={data['name']} has no recorded queries; choose queries=nearest, noisy or warped")
    source: Source = make(queries["source"], "queries.source", memory=memory)
    return source


def check_sharded(config: Settings) -> None:
    """Refuse what a memory that several devices share cannot do.

    Raises:
        InputError: another stage than stage 1, learned keys, or a sample of the rows.
    """
    if config["trainer"].get("strategy") != SHARDED or on_one_device(config["trainer"]):
        return
    if stages(config) != ["attention"]:
        raise InputError(
            "trainer=sharded fits stage 1 alone; add stage=attention, and go on from its checkpoint on the CPU: "
            "trainer.accelerator=cpu attention_checkpoint=outputs/.../checkpoints/attention/best.safetensors"
        )
    if any(variant["attention"]["keys"] != "frozen" for variant in variants(config)):
        raise InputError("trainer=sharded fits no learned keys; set attention.keys=frozen, and no attention=auto")
    if (sample := config["attention"]["sample"]) is not None:
        raise InputError(
            f"attention.sample={sample} is of no use with trainer=sharded, which takes all rows; leave it out"
        )


def stages(config: Settings) -> list[str]:
    """What is trained, in which order; a cold start leaves everything to the last stage."""
    fits = config["stage"]["fit"]
    warm = config["stage"].get("warm_start", True)
    if not isinstance(warm, bool):
        raise InputError(f"stage.warm_start={warm} is neither true nor false; true is the default")
    return fits if warm else fits[-1:]


def _variant(config: Settings, name: str, source: Source) -> Variant:
    epochs = config["attention"]["epochs"]
    check_number("attention.variants.epochs", epochs, minimum=0, whole=True, remedy="raise it")
    module, data = attention_stage(config, source)
    settings = fit_settings(config, "attention", source.memory)
    return Variant(name, dict(config["attention"]), module, data, settings, partial(attention_stage, config))


def _named(given: list[Settings]) -> list[tuple[str, Settings]]:
    """Each variant with a name of its own, after its transform and its keys; one alone needs none."""
    if len(given) == 1:
        return [("", given[0])]
    plain = [f"{label(variant['attention']['transform'])}-{variant['attention']['keys']}" for variant in given]
    names = [name if plain.count(name) == 1 else f"{name}-{number + 1}" for number, name in enumerate(plain)]
    return list(zip(names, given, strict=True))


def _loaded(config: Settings, source: Source, tried: tuple[Variant, ...]) -> Loaded | None:
    """The stage 1 that `attention_checkpoint` names, else the one in `reranker_checkpoint`, where either is given."""
    path, later = config["attention_checkpoint"], config["reranker_checkpoint"]
    *others, last = tried
    if path is None:
        return later and Loaded(last, attention_within(later, source.memory), True, later)
    for variant in others:
        with suppress(InputError):
            load_attention(variant.module.attention, path)
            return Loaded(variant, variant.module.attention, False, path)
    load_attention(last.module.attention, path)
    return Loaded(last, last.module.attention, False, path)


def _check_numbers(config: Settings, trained: list[str]) -> None:
    for stage in trained:
        for name in ("epochs", "patience"):
            if (value := config[stage][name]) is not None or name == "epochs":
                check_number(f"{stage}.{name}", value, minimum=1, whole=True, remedy="raise it")
    if (every := config["save_every"]) is not None:
        check_number("save_every", every, minimum=1, whole=True, remedy="null saves as often as every 20 s")
    for limit in LIMITS:
        if (value := config["data"].get(limit)) is not None:
            check_number(f"data.{limit}", value, above=0, remedy="null sets no limit")


def _check_log(settings: Settings, source: Source) -> None:
    folds = settings["folds"]
    if (settings["kind"] == "evidence" or folds is not None) and not isinstance(source, Recorded):
        raise InputError(
            f"reranker.kind={settings['kind']} and reranker.folds={folds} need a log of queries, data=embeddings or "
            "qdrant; choose reranker=residual"
        )
    if folds is not None:
        check_number("reranker.folds", folds, minimum=2, whole=True, remedy="3 is the default, null makes none")
