"""How the configured objects are built and fitted: memory and queries, then one stage after the other."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from nvf.attention import SoftAttention, fit_temperature
from nvf.data import VectorDataModule
from nvf.embeddings import read_memory, read_recorded
from nvf.errors import InputError, check_number
from nvf.memory import VectorMemory, check_k
from nvf.modules import AttentionModule, RerankerModule, StageModule
from nvf.pipeline import Pipeline
from nvf.queries import Nearest, Noisy, QueryBatch, QuerySource, Source, Warped
from nvf.reranker import Reranker
from nvf.streams import stream_seed

log = logging.getLogger("nvf")
Settings = Mapping[str, Any]
BEST = "name a run's checkpoints/attention/best.ckpt"


def build_source(config: Settings) -> Source:
    """The memory and the queries over it, everything about them checked.

    Raises:
        InputError: whatever is wrong with the settings or the user's files.
    """
    data, queries = dict(config["data"]), dict(config["queries"])
    kind, source = data.pop("name"), queries.pop("name")
    if data.get("dir", "") is None and (kind == "embeddings" or source == "recorded"):
        holds = "corpus and queries" if kind == "embeddings" else "queries"
        raise InputError(f"data.dir is not set; name the folder that holds your {holds}: data.dir=path/to/folder")
    if kind == "synthetic":
        memory = VectorMemory.synthetic(**data)
    elif kind == "clustered":
        memory = VectorMemory.clustered(**data)
    elif kind == "embeddings":
        memory = read_memory(str(data["dir"]), columns=data["columns"])
    else:
        from nvf import qdrant  # needs qdrant-client, which is an extra, and takes seconds to import

        memory = qdrant.read_memory(**{name: data[name] for name in ("path", "url", "collection", "vector")})
    check_k(config["k"], len(memory))
    if source == "recorded":
        if "dir" not in data:
            raise InputError(f"data={kind} has no recorded queries; choose queries=nearest, noisy or warped")
        return read_recorded(
            str(data["dir"]), memory, seed=queries["seed"], columns=data["columns"], by_id=kind == "qdrant"
        )
    for size in ("seed", "val_samples", "test_samples"):
        queries.pop(size)
    sources: dict[str, Callable[..., QuerySource]] = {"nearest": Nearest, "noisy": Noisy, "warped": Warped}
    return sources[source](memory, **queries)


def attention_stage(config: Settings, source: Source) -> tuple[AttentionModule, VectorDataModule]:
    """Stage 1, untrained, and its batches."""
    settings = config["attention"]
    torch.manual_seed(stream_seed(settings["seed"], "attention"))
    attention = SoftAttention(
        source.memory, **{name: settings[name] for name in ("transform", "hidden", "normalize", "beta")}
    )
    module = AttentionModule(attention, lr=settings["lr"], schedule=settings["schedule"], k=config["k"])
    return module, _build_data(config, "attention", source)


def reranker_stage(
    config: Settings, source: Source, attention: SoftAttention
) -> tuple[RerankerModule, VectorDataModule]:
    """Stage 2, untrained, behind a stage 1, and its batches."""
    settings = config["reranker"]
    torch.manual_seed(stream_seed(settings["seed"], "reranker"))
    reranker = Reranker(
        attention.memory.dim, kind=settings["kind"], hidden=settings["hidden"], dropout=settings["dropout"]
    )
    module = RerankerModule(
        Pipeline(attention, reranker, k=config["k"]),
        lr=settings["lr"],
        schedule=settings["schedule"],
        scalar_lr_ratio=settings["scalar_lr_ratio"],
        seed=settings["seed"],
    )
    return module, _build_data(config, "reranker", source, attention)


def check(config: Settings, source: Source) -> None:
    """Build once what the stages will build, so that bad settings are refused before any work.

    Raises:
        InputError: whatever is wrong with them.
    """
    for stage in config["stage"]["fit"]:
        for name in ("epochs", "patience"):
            if (value := config[stage][name]) is not None:
                check_number(f"{stage}.{name}", value, minimum=1, whole=True, remedy="raise it")
    module, _ = attention_stage(config, source)
    if config["attention_checkpoint"] is not None:
        load_attention(module.attention, config["attention_checkpoint"])
    if "reranker" in config["stage"]["fit"]:
        reranker_stage(config, source, module.attention)


def fit_attention(config: Settings, source: Source, folder: Path) -> SoftAttention:
    """Stage 1 with the weights of its best validation Top-1, or those that `attention_checkpoint` names.

    Either way its temperature is then fitted to the validation queries.
    """
    module, data = attention_stage(config, source)
    if config["attention_checkpoint"] is not None:
        load_attention(module.attention, config["attention_checkpoint"])
        log.info("stage 1: loaded from %s", config["attention_checkpoint"])
    else:
        _fit(config, "attention", module, data, folder, module.attention.transform.starts_at_exact_search)
    fit_temperature(module.attention, *fixed_queries(config, source, "val"))
    return module.attention


def fit_reranker(config: Settings, source: Source, attention: SoftAttention, folder: Path) -> Pipeline:
    """Both stages: a reranker with the weights of its best validation Top-1 behind the frozen stage 1."""
    module, data = reranker_stage(config, source, attention)
    _fit(config, "reranker", module, data, folder, module.model.reranker.starts_at_stage_one)
    return module.model


def fixed_queries(config: Settings, source: Source, split: str) -> QueryBatch:
    """The `val` or `test` queries of a run."""
    return _build_data(config, "attention", source).queries(split)


def load_attention(attention: SoftAttention, path: str | Path) -> None:
    """Load weights that a run saved for the same memory; nothing in the file can run code.

    Raises:
        InputError: no such file, a damaged one, another memory, or another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"attention_checkpoint={path} does not exist; {BEST}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        about = checkpoint["nvf"]
        weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
    except Exception as fault:  # whatever a damaged file makes torch raise
        raise InputError(
            f"attention_checkpoint={path} is truncated or not a checkpoint of NVF ({type(fault).__name__}); {BEST}"
        ) from None
    mine = describe(attention)
    for what, remedy in (
        ("stage", BEST),
        ("memory", "fit stage 1 anew, or run on the data and seed that it was made for"),
        ("settings", "give attention= and its settings the values that it was made with"),
    ):
        if about.get(what) != mine[what]:
            raise InputError(
                f"attention_checkpoint={path} has {what} {about.get(what)}, but this run {mine[what]}; {remedy}"
            )
    attention.load_state_dict(weights)


def describe(attention: SoftAttention) -> dict[str, Any]:
    """What a checkpoint of stage 1 says of itself."""
    return {"stage": "attention", "memory": attention.memory.fingerprint, "settings": attention.settings}


class _Describe(Callback):
    """Writes into each checkpoint what it was made for."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, StageModule)
        checkpoint["nvf"] = {**describe(module.attention), "stage": self.stage}


def _build_data(
    config: Settings, stage: str, source: Source, attention: SoftAttention | None = None
) -> VectorDataModule:
    settings, queries = config[stage], config["queries"]
    return VectorDataModule(
        source,
        seed=settings["seed"],
        batch_size=settings["batch_size"],
        steps_per_epoch=settings["steps_per_epoch"],
        train_samples=settings["train_samples"],
        attention=attention,
        k=config["k"],
        eval_seed=queries["seed"],
        **{size: queries[size] for size in ("val_samples", "test_samples") if size in queries},
    )


def _fit(
    config: Settings,
    stage: str,
    module: StageModule,
    data: VectorDataModule,
    folder: Path,
    start_competes: bool,
) -> None:
    """Fit a module and leave the weights of its best validation Top-1 in it.

    Where the untrained start is a search that works, it is validated too and wins unless training beats or equals it.
    """
    settings = config[stage]
    checkpoints = folder / "checkpoints" / stage
    best = ModelCheckpoint(
        checkpoints,
        filename="best",
        monitor="val/top1",
        mode="max",
        save_last=True,
        enable_version_counter=False,
    )
    callbacks: list[Callback] = [best, _Describe(stage)]
    if settings["patience"] is not None:
        callbacks.append(EarlyStopping("val/top1", mode="max", patience=settings["patience"]))
    if config["trainer"].get("enable_progress_bar", True):
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    try:
        trainer = L.Trainer(
            **{"max_epochs": settings["epochs"], **config["trainer"]},
            default_root_dir=folder,
            logger=TensorBoardLogger(folder, name=stage, version="", default_hp_metric=False),
            callbacks=callbacks,
            use_distributed_sampler=False,  # the datamodule deals the batches to the ranks
            num_sanity_val_steps=0,
            inference_mode=False,  # the metrics that validating the start leaves behind are used in the fit
        )
    except (MisconfigurationException, TypeError, ValueError) as fault:
        raise InputError(f"trainer: {fault}; correct trainer=, or trainer.<argument>= of lightning.Trainer") from None
    log.info("fitting %s", stage)
    start_score = float("-inf")
    if start_competes:
        start_score = trainer.validate(module, data, verbose=False)[0]["val/top1"]
        trainer.save_checkpoint(checkpoints / "start.ckpt")
    trainer.fit(module, data)
    assert best.best_model_score is not None
    score = float(best.best_model_score)
    if start_score > score:
        log.info("%s: no epoch validates better than the untrained start (Top-1 %.1f)", stage, 100 * start_score)
        os.replace(checkpoints / "start.ckpt", best.best_model_path)
    (checkpoints / "start.ckpt").unlink(missing_ok=True)
    weights = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict(weights)
