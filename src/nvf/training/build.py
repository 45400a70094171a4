"""How the configured objects are built: memory and queries, then each stage with its batches."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import lightning as L
import torch

from nvf.data.datamodule import Fold, VectorDataModule
from nvf.data.folder import read_memory, read_recorded
from nvf.data.queries import Nearest, Noisy, QueryBatch, QuerySource, Recorded, Source, Warped
from nvf.errors import InputError, check_number
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import VectorMemory, check_k
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.ops.random_streams import stream_seed
from nvf.training.checkpoints import attention_within, load_attention, load_reranker
from nvf.training.devices import SHARDED, on_one_device
from nvf.training.fit import FitSettings
from nvf.training.modules import AttentionModule, JointModule, RerankerModule

log = logging.getLogger("nvf")
Settings = Mapping[str, Any]
MANY_ROWS = 20_000  # from which a sample of the rows saves most of a step
FEWEST_STEPS = 8  # an epoch: a small log is cut into smaller batches, of at least
SMALLEST_BATCH = 64
LIMITS = ("work", "budget_s")  # of `data`, on what a run may take
VARIES = ("transform", "hidden", "keys", "epochs")


def build_source(config: Settings) -> Source:
    """The memory and the queries over it, everything about them checked.

    Raises:
        InputError: whatever is wrong with the settings or the user's files.
    """
    data, queries = dict(config["data"]), dict(config["queries"])
    for limit in LIMITS:
        data.pop(limit, None)
    kind, source = data.pop("name"), queries.pop("name")
    stored = {name: data.pop(name) for name in ("dtype", "mapped")}
    if kind == "synthetic":
        memory = VectorMemory.synthetic(**data, **stored)
    elif kind == "clustered":
        memory = VectorMemory.clustered(**data, **stored)
    elif kind == "embeddings":
        memory = read_memory(str(data["dir"]), columns=data["columns"], **stored)
    else:
        from nvf.data import qdrant  # needs qdrant-client, which is an extra, and takes seconds to import

        where = {name: data[name] for name in ("path", "url", "collection", "vector", "distance")}
        memory = qdrant.read_memory(**where, **stored)
    if merged := memory.given - len(memory):
        log.info("%d of %d rows equal an earlier one; equal rows are one answer", merged, memory.given)
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
        source.memory, **{name: settings[name] for name in ("transform", "hidden", "normalize", "keys", "beta")}
    )
    module = AttentionModule(
        attention,
        lr=settings["lr"],
        schedule=settings["schedule"],
        k=config["k"],
        learnable=seen_rows(source) if settings["keys"] == "learned" else None,
        **{name: settings[name] for name in ("warmup", "sample", "hard", "seed")},
    )
    return module, _build_data(config, "attention", source)


def reranker_stage(
    config: Settings,
    source: Source,
    attention: SoftAttention,
    *,
    evidence: Evidence | None = None,
    folds: Sequence[Fold] = (),
) -> tuple[RerankerModule, VectorDataModule]:
    """Stage 2, untrained, behind a stage 1, and its batches.

    Args:
        evidence: for `reranker=evidence`, gathered from the training queries.
        folds: stages 1 that have not seen some of them.
    """
    settings = config["reranker"]
    module = RerankerModule(
        untrained_pipeline(config, attention, evidence),
        lr=settings["lr"],
        schedule=settings["schedule"],
        scalar_lr_ratio=settings["scalar_lr_ratio"],
        seed=settings["seed"],
    )
    return module, _build_data(config, "reranker", source, attention=attention, evidence=evidence, folds=folds)


def joint_stage(config: Settings, source: Source, pipeline: Pipeline) -> tuple[JointModule, VectorDataModule]:
    """Both stages, to be fitted together, and their batches."""
    settings = config["joint"]
    given = ("lr", "schedule", "scalar_lr_ratio", "seed", "relaxation", "attention_weight")
    module = JointModule(pipeline, **{name: settings[name] for name in given}, learnable=seen_rows(source))
    return module, _build_data(config, "joint", source, evidence=pipeline.evidence)


def fit_settings(config: Settings, stage: str, memory: VectorMemory) -> FitSettings:
    """How a stage is fitted."""
    settings = config[stage]
    return FitSettings(
        stage=stage,
        epochs=settings["epochs"],
        patience=settings["patience"],
        save_every=config["save_every"],
        trainer=partial(L.Trainer, **config["trainer"]),
        remedies=_memory_remedies(config, stage, memory),
    )


def _memory_remedies(config: Settings, stage: str, memory: VectorMemory) -> tuple[str, ...]:
    """What to do where a stage's fit needs more memory than there is."""
    batch, settings = config[stage]["batch_size"], config["attention"]
    remedies = [f"lower {stage}.batch_size={batch} to {max(1, batch // 2)}"] if batch > 1 else []
    if stage == "attention" and settings["sample"] is None and len(memory) > MANY_ROWS:
        remedies.append("look at some rows a step, attention.sample=8192")
    if settings["keys"] == "learned":
        taken = 16 * len(memory) * memory.dim / 2**30  # float32: the keys, their gradient, and Adam's two moments
        remedies.append(f"do without learned keys, which take {taken:.1f} GiB: attention.keys=frozen")
    return (*remedies, "keep the rows in half the room, data.dtype=float16")


def untrained_pipeline(config: Settings, attention: SoftAttention, evidence: Evidence | None) -> Pipeline:
    """A stage 1 with a new reranker behind it."""
    settings = config["reranker"]
    torch.manual_seed(stream_seed(settings["seed"], "reranker"))
    network = {name: settings[name] for name in ("hidden", "dropout")}
    reranker: Reranker | EvidenceReranker
    if evidence is None:
        reranker = Reranker(attention.memory.dim, kind=settings["kind"], **network)
    else:
        reranker = EvidenceReranker(len(FEATURES), **network)
    return Pipeline(attention, reranker, k=config["k"], evidence=evidence)


def check(config: Settings, source: Source) -> None:
    """Build once what the stages will build, so that bad settings are refused before any work.

    Raises:
        InputError: whatever is wrong with them.
    """
    fits = stages(config)
    check_sharded(config)
    for stage in fits:
        for name in ("epochs", "patience"):
            if (value := config[stage][name]) is not None or name == "epochs":
                check_number(f"{stage}.{name}", value, minimum=1, whole=True, remedy="raise it")
    if (every := config["save_every"]) is not None:
        check_number("save_every", every, minimum=1, whole=True, remedy="null saves as often as every 20 s")
    for limit in LIMITS:
        if (value := config["data"].get(limit)) is not None:
            check_number(f"data.{limit}", value, above=0, remedy="null sets no limit")
    for variant in variants(config):
        check_number(
            "attention.variants.epochs", variant["attention"]["epochs"], minimum=0, whole=True, remedy="raise it"
        )
        module, _ = attention_stage(variant, source)
    attention = module.attention
    if config["attention_checkpoint"] is not None or config["reranker_checkpoint"] is not None:
        attention = loaded_attention(config, source)[1]
    if fits == ["attention"]:
        return
    settings = config["reranker"]
    weighs, folds = settings["kind"] == "evidence", settings["folds"]
    if (weighs or folds is not None) and not isinstance(source, Recorded):
        raise InputError(
            f"reranker.kind={settings['kind']} and reranker.folds={folds} need a log of queries, data=embeddings or "
            "qdrant; choose reranker=residual"
        )
    if folds is not None:
        check_number("reranker.folds", folds, minimum=2, whole=True, remedy="3 is the default, null makes none")
    evidence = Evidence.of_one(source.memory) if weighs else None
    pipeline = reranker_stage(config, source, attention, evidence=evidence)[0].model
    if config["reranker_checkpoint"] is not None:
        pipeline = loaded_pipeline(config, source, attention)
    if "joint" in fits:
        joint_stage(config, source, pipeline)


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
    """What is fitted, in which order; a cold start leaves everything to the last."""
    fits = config["stage"]["fit"]
    warm = config["stage"].get("warm_start", True)
    if not isinstance(warm, bool):
        raise InputError(f"stage.warm_start={warm} is neither true nor false; true is the default")
    return fits if warm else fits[-1:]


def loaded_attention(config: Settings, source: Source) -> tuple[Settings, SoftAttention]:
    """The stage 1 that `attention_checkpoint` names, else the one in `reranker_checkpoint`, and its variant's settings.

    Raises:
        InputError: it is no stage 1 for this memory, or none of the configured variants.
    """
    *others, last = variants(config)
    if config["attention_checkpoint"] is None:
        return last, attention_within(config["reranker_checkpoint"], source.memory)
    for variant in others:
        attention = attention_stage(variant, source)[0].attention
        with suppress(InputError):
            load_attention(attention, config["attention_checkpoint"])
            return variant, attention
    attention = attention_stage(last, source)[0].attention
    load_attention(attention, config["attention_checkpoint"])
    return last, attention


def loaded_pipeline(config: Settings, source: Source, attention: SoftAttention) -> Pipeline:
    """A stage 1 with the reranker that `reranker_checkpoint` names.

    Raises:
        InputError: that is no reranker for this memory, k or log of queries, or none of the configured kind.
    """
    pipeline = untrained_pipeline(config, attention, log_of_queries(config, source))
    load_reranker(pipeline, config["reranker_checkpoint"])
    return pipeline


def log_of_queries(config: Settings, source: Source) -> Evidence | None:
    """The evidence that the training queries give, where the reranker weighs any."""
    if config["reranker"]["kind"] != "evidence":
        return None
    return Evidence.gather(source.memory, *fixed_queries(config, source, "train"))


def variants(config: Settings) -> list[Settings]:
    """The settings of every stage 1 that the configuration asks to try: one, unless `attention.variants` lists more."""
    given = config["attention"]["variants"]
    if given is None:
        return [config]
    if not isinstance(given, list) or not given or not all(isinstance(variant, dict) for variant in given):
        raise InputError(f"attention.variants={given} is no list of settings; attention=auto has one to start from")
    for variant in given:
        if unknown := set(variant) - {*VARIES}:
            raise InputError(f"attention.variants names {', '.join(unknown)}; it may name {', '.join(VARIES)}")
    return [{**config, "attention": {**config["attention"], **variant, "variants": None}} for variant in given]


def fixed_queries(config: Settings, source: Source, split: str) -> QueryBatch:
    """The `val` or `test` queries of a run, or the `train` queries where they are recorded."""
    return _build_data(config, "attention", source).queries(split)


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


def _build_data(config: Settings, stage: str, source: Source, **candidates: Any) -> VectorDataModule:
    settings, queries = config[stage], config["queries"]
    batch_size = settings["batch_size"]
    if isinstance(source, Recorded) and isinstance(batch_size, int):
        batch_size = min(batch_size, max(SMALLEST_BATCH, len(source.splits["train"].queries) // FEWEST_STEPS))
    return VectorDataModule(
        source,
        stage=stage,
        seed=settings["seed"],
        batch_size=batch_size,
        steps_per_epoch=settings["steps_per_epoch"],
        train_samples=settings["train_samples"],
        k=config["k"],
        eval_seed=queries["seed"],
        **candidates,
        **{size: queries[size] for size in ("val_samples", "test_samples") if size in queries},
    )
