"""The fitted weights of a stage as a safetensors file that says what they were fitted for, and how it is loaded."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nvf.errors import InputError, refused
from nvf.files.atomic import atomic_write
from nvf.files.records import check_settings, is_unchanged, sealed
from nvf.files.tensors import DAMAGE, fill, read_tensors
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline

WEIGHTS = "best.safetensors"
STAGES = ("attention", "reranker", "joint")
ANOTHER = "name another or fit anew"
OTHER = "fit the stages anew, or give this run the data and settings that it was fitted with"


def save_weights(model: SoftAttention | Pipeline, path: Path, *, stage: str, notes: Any = None) -> None:
    """Write a model's weights atomically, with its settings, the memory's hash and JSON notes as metadata."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    about = sealed({"stage": stage, **_description(model), "weights": hashed(weights), "notes": notes})
    with atomic_write(path) as partial:
        save_file(weights, partial, {"nvf": json.dumps(about)})


def hashed(weights: Mapping[str, Tensor]) -> str:
    """The hash of tensors and their names, by which damage to a file is noticed; safetensors has none."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_attention(path: str | Path, memory: VectorMemory, *, kind: str = "attention") -> tuple[SoftAttention, Any]:
    """Load a stage 1, frozen, that was fitted for the same memory, and the notes in its file.

    A checkpoint of the kind `reranker`, of stage 2 or of both stages, holds the calibrated stage 1 too. A file that is
    missing, damaged, or of another stage or memory is an InputError.
    """
    about, weights = _read(path, kind, {"memory": memory.fingerprint})
    with refused(f"{kind}_checkpoint={path} is damaged", ANOTHER, InputError, *DAMAGE):
        with torch.device("meta"):  # so that settings which claim a huge size allocate nothing
            attention = SoftAttention(memory, **about["settings"])
        fill(attention, weights if kind == "attention" else _under("attention.", weights))
    return attention.to(memory.rows.device).requires_grad_(False), about.get("notes")


def load_reranker(pipeline: Pipeline, path: str | Path) -> None:
    """Load stage 2's weights from a run's checkpoint of stage 2 or of both stages; stage 1 stays as it is.

    Beside what `load_attention` refuses, so are another k, other settings of the reranker, and another log of queries.
    """
    mine = _description(pipeline)
    _, weights = _read(path, "reranker", {name: mine[name] for name in ("memory", "reranker", "k")})
    with refused(f"reranker_checkpoint={path} is damaged", ANOTHER, *DAMAGE):
        fill(pipeline.reranker, _under("reranker.", weights))
    if pipeline.evidence is not None:
        log, kept = _under("evidence.", weights), pipeline.evidence.state_dict()
        if log.keys() != kept.keys() or hashed(log) != hashed({name: own.cpu() for name, own in kept.items()}):
            raise InputError(f"reranker_checkpoint={path} was fitted with another log of queries; {OTHER}")


def _description(model: SoftAttention | Pipeline) -> dict[str, Any]:
    """What a file says of the model in it, as JSON values."""
    attention = model.attention if isinstance(model, Pipeline) else model
    about: dict[str, Any] = {"memory": attention.memory.fingerprint, "settings": attention.settings}
    if isinstance(model, Pipeline):
        about |= {"reranker": model.reranker.settings, "k": model.k}
    return dict(json.loads(json.dumps(about)))


def _read(path: str | Path, kind: str, mine: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's description and weights, if it fits this run, whose own description is `mine`."""
    name, remedy = f"{kind}_checkpoint={path}", f"name a run's checkpoints/{kind}/{WEIGHTS}"
    if not Path(path).exists():
        raise InputError(f"{name} does not exist; {remedy}")
    with refused(f"{name} is truncated or not a checkpoint of NVF", ANOTHER, *DAMAGE):
        weights = read_tensors(Path(path))
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["nvf"])
        check_settings({what: value for what, value in about.items() if what != "notes"})
        if not is_unchanged(about) or about["weights"] != hashed(weights) or about["stage"] not in STAGES:
            raise ValueError("it is not what was saved")
    if (about["stage"] == "attention") != (kind == "attention"):
        raise InputError(f"{name} has stage {about['stage']}, but this run needs {kind}; {remedy}")
    for what, value in mine.items():
        if about.get(what) != value:
            raise InputError(f"{name} has {what} {about.get(what)}, but this run has {value}; {OTHER}")
    return about, weights


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
