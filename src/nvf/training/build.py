"""From settings to objects, once: what is wrong with a setting is refused here, before any work."""

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar

from nvf.data.datamodule import VectorDataModule
from nvf.data.queries import QueryBatch, Recorded, Source
from nvf.errors import InputError, check_number, one_line
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import VectorMemory, check_k
from nvf.models.pipeline import Pipeline
from nvf.ops.random_streams import stream_seed
from nvf.training.checkpoints import attention_within, load_attention, load_reranker
from nvf.training.devices import SHARDED, on_one_device
from nvf.training.fit import FitSettings, check_trainer
from nvf.training.modules import AttentionModule, JointModule, RerankerModule

log = logging.getLogger("nvf")
Settings = Mapping[str, Any]
MANY_ROWS = 20_000  # from which a sample of the rows saves most of a step
FEWEST_STEPS = 8  # of an epoch: a small log is cut into smaller batches, of at least
SMALLEST_BATCH = 64
LIMITS = ("work", "budget_s")  # of `data`, on what a run may take
VARIES = ("transform", "hidden", "keys", "epochs")


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
        make = partial(joint_module, config, source)
        make(reranker.module.model)  # a shell that says what is wrong with its settings
        data = _build_data(config, "joint", source, evidence=reranker.module.model.evidence)
        joint = Joint(make, data, fit_settings(config, "joint", source.memory))
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


def make(node: Settings, name: str, **given: Any) -> Any:
    """Build what a part of the settings names by `_target_`.

    Args:
        node: `_target_` and arguments.
        name: of this part, for errors.
        given: further arguments.

    Raises:
        InputError: there is no such class or function, or it takes other arguments.
    """
    function = _instantiated({**node, "_partial_": True}, name)
    try:
        inspect.signature(function).bind(**given)
    except (TypeError, ValueError) as fault:
        raise InputError(f"{name}: {node.get('_target_')} takes other arguments ({fault}); correct them") from None
    return function(**given)


def _instantiated(node: Settings, name: str) -> Any:
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as fault:
        if isinstance(fault.__cause__, InputError):
            raise fault.__cause__ from None
        raise InputError(f"{name}: {one_line(fault)}; correct {name}._target_ or its arguments") from None


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


def attention_stage(config: Settings, source: Source) -> tuple[AttentionModule, VectorDataModule]:
    """Stage 1, untrained, and its batches."""
    settings = config["attention"]
    torch.manual_seed(stream_seed(settings["seed"], "attention"))
    module = AttentionModule(
        make(settings["model"], "attention.model", memory=source.memory),
        k=config["k"],
        learnable=seen_rows(source) if settings["keys"] == "learned" else None,
        optimizer=_instantiated(config["optimizer"], "optimizer"),
        **{name: settings[name] for name in ("lr", "schedule", "warmup", "sample", "hard", "seed")},
    )
    return module, _build_data(config, "attention", source)


def reranker_stage(
    config: Settings, source: Source, attention: SoftAttention, *, evidence: Evidence | None = None
) -> tuple[RerankerModule, VectorDataModule]:
    """Stage 2, untrained, behind a stage 1, and its batches; `evidence` is what `reranker=evidence` weighs."""
    settings = config["reranker"]
    torch.manual_seed(stream_seed(settings["seed"], "reranker"))
    size = {"dim": source.memory.dim} if evidence is None else {"features": len(FEATURES)}
    reranker = make(settings["model"], "reranker.model", **size)
    module = RerankerModule(
        Pipeline(attention, reranker, k=config["k"], evidence=evidence),
        optimizer=_instantiated(config["optimizer"], "optimizer"),
        **{name: settings[name] for name in ("lr", "schedule", "scalar_lr_ratio", "seed")},
    )
    return module, _build_data(config, "reranker", source, attention=attention, evidence=evidence)


def joint_module(config: Settings, source: Source, pipeline: Pipeline) -> JointModule:
    """Both stages, to be fitted together."""
    given = ("lr", "schedule", "scalar_lr_ratio", "seed", "relaxation", "attention_weight")
    return JointModule(
        pipeline,
        learnable=seen_rows(source),
        optimizer=_instantiated(config["optimizer"], "optimizer"),
        **{name: config["joint"][name] for name in given},
    )


def fit_settings(config: Settings, stage: str, memory: VectorMemory) -> FitSettings:
    """How a stage is fitted, with callbacks of its own."""
    settings, trainer = config[stage], dict(config["trainer"])
    most = trainer.pop("max_epochs", None)
    callbacks = [_instantiated(node, f"callbacks.{name}") for name, node in config["callbacks"].items() if node]
    if not trainer.get("enable_progress_bar", True):
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    loggers = [_instantiated(node, f"logger.{name}") for name, node in config["logger"].items() if node]
    return FitSettings(
        stage=stage,
        epochs=settings["epochs"] and (most or settings["epochs"]),
        patience=settings["patience"],
        save_every=config["save_every"],
        trainer=_instantiated({"_target_": "lightning.Trainer", "_partial_": True, **trainer}, "trainer"),
        callbacks=tuple(callbacks),
        loggers=lambda folder, name: [logger(save_dir=str(folder), name=name) for logger in loggers],
        remedies=_memory_remedies(settings, stage, config["attention"]["keys"], memory),
    )


def _memory_remedies(settings: Settings, stage: str, keys: str, memory: VectorMemory) -> tuple[str, ...]:
    """What to do where a stage's fit needs more memory than there is."""
    batch = settings["batch_size"]
    remedies = [f"lower {stage}.batch_size={batch} to {max(1, batch // 2)}"] if batch > 1 else []
    if stage == "attention" and settings["sample"] is None and len(memory) > MANY_ROWS:
        remedies.append("look at some rows a step, attention.sample=8192")
    if keys == "learned":
        taken = 16 * len(memory) * memory.dim / 2**30  # float32: the keys, their gradient, and Adam's two moments
        remedies.append(f"do without learned keys, which take {taken:.1f} GiB: attention.keys=frozen")
    return (*remedies, "keep the rows in half the room, data.dtype=float16")


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


def variants(config: Settings) -> list[Settings]:
    """The settings of every stage 1 that the configuration asks to try: one, unless `attention.variants` lists more."""
    attention = config["attention"]
    given = attention["variants"]
    if given is None:
        return [config]
    if not isinstance(given, list) or not given or not all(isinstance(variant, dict) for variant in given):
        raise InputError(f"attention.variants={given} is no list of settings; attention=auto has one to start from")
    for variant in given:
        if unknown := set(variant) - {*VARIES}:
            raise InputError(f"attention.variants names {', '.join(unknown)}; it may name {', '.join(VARIES)}")
    model = attention["model"]
    models = [{**model, **{name: variant[name] for name in variant if name in model}} for variant in given]
    return [
        {**config, "attention": {**attention, **variant, "model": model, "variants": None}}
        for variant, model in zip(given, models, strict=True)
    ]


def log_of_queries(config: Settings, source: Source) -> Evidence | None:
    """The evidence that the training queries give, where the reranker weighs any."""
    if config["reranker"]["kind"] != "evidence":
        return None
    assert isinstance(source, Recorded)
    return Evidence.gather(source.memory, *source.splits["train"])


def seen_rows(source: Source) -> torch.Tensor | None:
    """Which rows answer a training query, (N,) bool; None where every row can."""
    if not isinstance(source, Recorded):
        return None
    seen = torch.zeros(len(source.memory) + 1, dtype=torch.bool)
    seen[source.splits["train"].targets] = True  # -1, the padding, is the last
    return seen[:-1].to(source.memory.rows.device)


def clusters(config: Settings) -> list[int] | None:
    """Which cluster each row of a clustered memory is in; None where there are none."""
    data = config["data"]
    if data["name"] != "clustered":
        return None
    return [cluster for cluster in range(data["clusters"]) for _ in range(data["rows_per_cluster"])]


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


def label(transform: str | Mapping[str, Any]) -> str:
    """A transform's name: that of its class, where it is a user's own."""
    return transform if isinstance(transform, str) else str(transform["_target_"]).rpartition(".")[2]


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


def _build_data(config: Settings, stage: str, source: Source, **candidates: Any) -> VectorDataModule:
    settings, queries = config[stage], config["queries"]
    batch_size = settings["batch_size"]
    if isinstance(source, Recorded) and isinstance(batch_size, int):
        batch_size = min(batch_size, max(SMALLEST_BATCH, len(source.splits["train"].queries) // FEWEST_STEPS))
    return VectorDataModule(
        source,
        stage=stage,
        batch_size=batch_size,
        k=config["k"],
        eval_seed=queries["seed"],
        **candidates,
        **{name: settings[name] for name in ("seed", "steps_per_epoch", "train_samples")},
        **{size: queries[size] for size in ("val_samples", "test_samples") if size in queries},
    )
