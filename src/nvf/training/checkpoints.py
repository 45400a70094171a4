"""The fitted weights of a stage as a safetensors file that says what they were fitted for, and how it is loaded."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nvf.errors import InputError, one_line
from nvf.files.atomic import atomic_write
from nvf.files.records import check_settings, is_unchanged, sealed
from nvf.files.tensors import DAMAGE, fill, read_tensors
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline

WEIGHTS = "best.safetensors"
STAGES = ("attention", "reranker", "joint")
REMEDIES = {
    "stage": f"name a run's checkpoints/{{}}/{WEIGHTS}",
    "memory": "fit the stages anew, or run on the data and seed that it was made for",
    "settings": "give attention= and its settings the values that it was made with",
    "reranker": "give reranker= and its settings the values that it was made with",
    "k": "give k the value that it was made with",
}


def save_weights(model: SoftAttention | Pipeline, path: Path, *, stage: str) -> None:
    """Write a model's weights, with its settings and the memory's hash as metadata, atomically."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    about = sealed({"stage": stage, **_description(model), "weights": hashed(weights)})
    with atomic_write(path) as partial:
        save_file(weights, partial, {"nvf": json.dumps(about)})


def hashed(weights: Mapping[str, Tensor]) -> str:
    """The hash of tensors and their names, by which damage to a file is noticed; safetensors has none."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_attention(attention: SoftAttention, path: str | Path) -> None:
    """Load stage 1's weights that a run saved for the same memory, frozen.

    Raises:
        InputError: no such file, a damaged one, another memory, or another shape.
    """
    about, weights = _read(path, "attention")
    _compare(about, _description(attention), path, "attention")
    with _refused(path, "attention", "is damaged"):
        fill(attention, weights)
    attention.requires_grad_(False)


def attention_within(path: str | Path, memory: VectorMemory) -> SoftAttention:
    """Stage 1 as it was, calibrated, and frozen, in a run's checkpoint of stage 2, or of both stages.

    Raises:
        InputError: as for `load_attention`.
    """
    about, weights = _read(path, "reranker")
    _compare(about, {"memory": memory.fingerprint}, path, "reranker")
    with _refused(path, "reranker", "is damaged"):
        with torch.device("meta"):  # where settings may claim any size: the weights say which it is
            attention = SoftAttention(memory, **about["settings"])
        fill(attention, _under("attention.", weights))
    return attention.requires_grad_(False)


def load_reranker(pipeline: Pipeline, path: str | Path) -> None:
    """Load stage 2's weights from a run's checkpoint of it, or of both stages; stage 1 stays as it is.

    Raises:
        InputError: as for `load_attention`; another k, or another log of queries.
    """
    about, weights = _read(path, "reranker")
    mine = _description(pipeline)
    _compare(about, {name: mine[name] for name in ("memory", "reranker", "k")}, path, "reranker")
    with _refused(path, "reranker", "is damaged"):
        fill(pipeline.reranker, _under("reranker.", weights))
    if pipeline.evidence is not None:
        log, kept = _under("evidence.", weights), pipeline.evidence.state_dict()
        if log.keys() != kept.keys() or any(not _equal(log[name], own.cpu()) for name, own in kept.items()):
            raise InputError(f"reranker_checkpoint={path} was made with another log of queries; {REMEDIES['memory']}")


def _description(model: SoftAttention | Pipeline) -> dict[str, Any]:
    """What a file says of the model in it, as JSON values."""
    attention = model.attention if isinstance(model, Pipeline) else model
    about: dict[str, Any] = {"memory": attention.memory.fingerprint, "settings": attention.settings}
    if isinstance(model, Pipeline):
        about |= {"reranker": model.reranker.settings, "k": model.k}
    return dict(json.loads(json.dumps(about)))


def _read(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says of itself, and its weights."""
    remedy = REMEDIES["stage"].format(kind)
    if not Path(path).exists():
        raise InputError(f"{kind}_checkpoint={path} does not exist; {remedy}")
    with _refused(path, kind, "is truncated or not a checkpoint of NVF"):
        weights = read_tensors(Path(path))
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["nvf"])
        check_settings(about)
        if not is_unchanged(about) or about["weights"] != hashed(weights) or about["stage"] not in STAGES:
            raise ValueError("it is not what was saved")
    if (about["stage"] == "attention") != (kind == "attention"):
        raise InputError(f"{kind}_checkpoint={path} has stage {about['stage']}, but this run {kind}; {remedy}")
    return about, weights


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@contextmanager
def _refused(path: str | Path, kind: str, what: str) -> Iterator[None]:
    """Turn whatever a damaged file makes of us, torch or safetensors into an InputError."""
    try:
        yield
    except DAMAGE as fault:
        remedy = REMEDIES["stage"].format(kind)
        raise InputError(f"{kind}_checkpoint={path} {what} ({one_line(fault)}); {remedy}") from None


def _compare(about: dict[str, Any], mine: dict[str, Any], path: str | Path, kind: str) -> None:
    for what, value in mine.items():
        if about.get(what) != value:
            raise InputError(
                f"{kind}_checkpoint={path} has {what} {about.get(what)}, but this run {value}; {REMEDIES[what]}"
            )


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
