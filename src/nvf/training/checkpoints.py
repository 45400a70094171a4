"""Checkpoints of the stages: what they say of themselves, and how they are loaded."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from nvf.errors import InputError, one_line
from nvf.files.records import check_settings
from nvf.files.tensors import DAMAGE, fill, read_archive
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.training.modules import RerankerModule, StageModule

REMEDIES = {
    "stage": "name a run's checkpoints/{}/best.ckpt",
    "memory": "fit the stages anew, or run on the data and seed that it was made for",
    "settings": "give attention= and its settings the values that it was made with",
    "reranker": "give reranker= and its settings the values that it was made with",
    "k": "give k the value that it was made with",
}


def load_attention(attention: SoftAttention, path: str | Path) -> None:
    """Load stage 1's weights that a run saved for the same memory, frozen; nothing in the file can run code.

    Raises:
        InputError: no such file, a damaged one, another memory, or another shape.
    """
    about, weights = _read(path, "attention")
    _compare(about, describe(attention), path, "attention")
    _fill(attention, weights, path, "attention")
    attention.requires_grad_(False)


def attention_within(path: str | Path, memory: VectorMemory) -> SoftAttention:
    """Stage 1 as it was, calibrated, and frozen, in a run's checkpoint of stage 2, or of both stages.

    Raises:
        InputError: as for `load_attention`.
    """
    about, weights = _read(path, "reranker")
    _compare(about, {"memory": memory.fingerprint}, path, "reranker")
    try:
        with torch.device("meta"):  # where settings may claim any size: the weights say which it is
            attention = SoftAttention(memory, **about["settings"])
    except DAMAGE as fault:
        raise _damaged(path, "reranker", fault) from None
    _fill(attention, _under("attention.", weights), path, "reranker")
    return attention.requires_grad_(False)


def load_reranker(pipeline: Pipeline, path: str | Path) -> None:
    """Load stage 2's weights from a run's checkpoint of it, or of both stages; stage 1 stays as it is.

    Raises:
        InputError: as for `load_attention`; another k, or another log of queries.
    """
    about, weights = _read(path, "reranker")
    mine = describe(pipeline)
    _compare(about, {name: mine[name] for name in ("memory", "reranker", "k")}, path, "reranker")
    _fill(pipeline.reranker, _under("reranker.", weights), path, "reranker")
    if pipeline.evidence is not None:
        log = _under("evidence.", weights)
        kept = pipeline.evidence.state_dict()
        if log.keys() != kept.keys() or any(not _equal(log[name], mine.cpu()) for name, mine in kept.items()):
            raise InputError(f"reranker_checkpoint={path} was made with another log of queries; {REMEDIES['memory']}")


def describe(model: SoftAttention | Pipeline) -> dict[str, Any]:
    """What a checkpoint says of the model in it."""
    attention = model.attention if isinstance(model, Pipeline) else model
    about = {"memory": attention.memory.fingerprint, "settings": attention.settings}
    return {**about, "reranker": model.reranker.settings, "k": model.k} if isinstance(model, Pipeline) else about


class Describe(Callback):
    """Writes into each checkpoint what it was made for."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, StageModule)
        model = module.model if isinstance(module, RerankerModule) else module.attention
        checkpoint["nvf"] = {"stage": self.stage, **describe(model)}


def _read(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint says of itself, and its weights."""
    path, remedy = Path(path), REMEDIES["stage"].format(kind)
    if not path.exists():
        raise InputError(f"{kind}_checkpoint={path} does not exist; {remedy}")
    try:
        checkpoint = read_archive(path)
        about, weights = checkpoint["nvf"], _under("model.", checkpoint["state_dict"])
        stage = about["stage"]
        if not isinstance(about, dict) or not isinstance(stage, str):
            raise TypeError("what it says of itself is of another type")
        check_settings(about)
    except Exception as fault:  # whatever a damaged file makes torch raise
        raise InputError(
            f"{kind}_checkpoint={path} is truncated or not a checkpoint of NVF ({one_line(fault)}); {remedy}"
        ) from None
    if (stage == "attention") != (kind == "attention"):
        raise InputError(f"{kind}_checkpoint={path} has stage {stage}, but this run {kind}; {remedy}")
    return about, weights


def _equal(found: Any, mine: Tensor) -> bool:
    return isinstance(found, Tensor) and found.dtype == mine.dtype and torch.equal(found, mine)


def _fill(model: nn.Module, weights: dict[str, Tensor], path: str | Path, kind: str) -> None:
    try:
        fill(model, weights)
    except DAMAGE as fault:
        raise _damaged(path, kind, fault) from None


def _damaged(path: str | Path, kind: str, fault: BaseException) -> InputError:
    return InputError(f"{kind}_checkpoint={path} is damaged ({one_line(fault)}); {REMEDIES['stage'].format(kind)}")


def _compare(about: dict[str, Any], mine: dict[str, Any], path: str | Path, kind: str) -> None:
    for what, value in mine.items():
        if about.get(what) != value:
            raise InputError(
                f"{kind}_checkpoint={path} has {what} {about.get(what)}, but this run {value}; {REMEDIES[what]}"
            )


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
