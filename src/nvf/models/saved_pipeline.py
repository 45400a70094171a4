"""A pipeline's folder: config.json, tensors, ids, an index. Nothing in it runs code or has files elsewhere read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nvf.errors import InputError, refused
from nvf.files.atomic import atomic_write
from nvf.files.ids import IDS_FILE, read_ids, write_ids
from nvf.files.records import check_settings, is_unchanged, own_file, read_record, sealed, sha256
from nvf.files.tensors import DAMAGE, fill, read_tensors
from nvf.models.alignment import BUFFERS, Alignment
from nvf.models.ann_index import FILE as INDEX_FILE
from nvf.models.ann_index import read_index
from nvf.models.attention import SoftAttention
from nvf.models.evidence import Evidence
from nvf.models.memory import DTYPES, VectorMemory
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.models.words import Words

FORMAT = "nvf-pipeline-1"
WORDS, TEXTS = "words", "texts.json"  # a folder, where the rows have texts, and these with those of logged queries
FILES = ("config.json", "memory.safetensors", "weights.safetensors")
SAVE_AGAIN = "save the pipeline again"


def save(folder: Path, pipeline: Any) -> None:
    """Write the folder that `load` reads, atomically; an InputError if the path holds something else."""
    folder, memory = Path(os.path.realpath(folder)), pipeline.memory  # where a link leads, so that it stays a link
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder) as partial:
        partial.mkdir()
        if memory.ids is not None:
            write_ids(memory.ids, partial / IDS_FILE)
        rows = memory.rows if memory.rows.dtype in DTYPES.values() else memory.rows.float()
        merged = {} if memory.row_of_vector is None else {"place": memory.row_of_vector}
        aligned = {} if memory.alignment is None else dict(memory.alignment.named_buffers())
        similar = getattr(pipeline.evidence, "similar", None)
        near = {} if similar is None else {"similar": similar.contiguous()}
        save_file({"rows": rows.contiguous(), **merged, **near, **aligned}, partial / "memory.safetensors")
        save_file({name: one.contiguous() for name, one in pipeline.state_dict().items()}, partial / FILES[2])
        config = {
            "format": FORMAT,
            "k": pipeline.k,
            "memory": memory.fingerprint,
            "ids": memory.ids is not None,
            "attention": pipeline.attention.settings,
            "reranker": pipeline.reranker.settings,
            "index": None if pipeline.index is None else pipeline.index.write(partial / INDEX_FILE),
            "words": pipeline.words is not None,
        }
        if (words := pipeline.words) is not None:
            words.save(partial / WORDS)
            if memory.texts is not None and words.texts is not None:
                (partial / WORDS / TEXTS).write_text(json.dumps([memory.texts, words.texts["log"]]))
        config["sha256"] = {name: sha256(partial / name) for name in _hashed(partial, config)}
        (partial / "config.json").write_text(json.dumps(sealed(config), indent=2) + "\n")


def find_device(name: torch.device | str) -> torch.device:
    """Return a device, or raise an InputError if it cannot be used; `auto` is the GPU, if any, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with refused(f"device={name} cannot be used", "cpu always can", AssertionError, RuntimeError, TypeError):
        return torch.empty(0, device=name).device


def load(make: Callable[..., Any], folder: Path, device: torch.device | str, *, index: bool) -> Any:
    """Return the frozen pipeline of a folder, see `Pipeline.load`; `make` is the class."""
    device = find_device(device)
    old = folder.parent / f".{folder.name}.old"  # where it is if a process was killed as it put another in its place
    folder = old if old.is_dir() and not folder.exists() else folder
    if not (folder / "config.json").exists() and (folder / "pipeline").is_dir():
        folder = folder / "pipeline"
    _check_own(folder / "config.json")
    with refused(f"{folder} is damaged", SAVE_AGAIN, *DAMAGE):
        config = read_record(folder / "config.json")
        _check_config(folder, config)
        memory, similar = _memory(folder, config)
        weights = read_tensors(folder / "weights.safetensors")
        with torch.device("meta"):  # which gives no memory to sizes that the weights do not have
            attention = SoftAttention(memory, **config["attention"])
            reranker, evidence = _second_stage(memory, config, weights)
        words = Words.load(folder / WORDS, len(memory)) if config["words"] else None
        if words is not None and (folder / WORDS / TEXTS).exists():
            memory.texts, logged = _texts(folder / WORDS / TEXTS, memory.given, len(words.answers))
            words.texts = {"text": memory.texts_of_rows() or [], "log": logged}
        if evidence is not None:
            evidence.similar = similar
        pipeline = make(attention, reranker, k=config["k"], evidence=evidence)
        pipeline.words = words
        fill(pipeline, weights)
        pipeline.requires_grad_(False).eval()
        if index and config["index"] is not None:
            pipeline.index = read_index(folder / INDEX_FILE, config["index"], attention.keys())
    return pipeline.to(device)


def _hashed(folder: Path, config: dict[str, Any]) -> list[str]:
    """Name the files whose hashes config.json has; that of the index is among its settings."""
    words = sorted((folder / WORDS).rglob("*.*")) if config["words"] else []
    ids = [IDS_FILE] if config["ids"] else []
    return [*FILES[1:], *ids, *(path.relative_to(folder).as_posix() for path in words)]


def check_replaceable(folder: Path) -> None:
    """Raise an InputError if there is something that is to be replaced and is no saved pipeline, or holds more."""
    if not os.path.lexists(folder):
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = names.difference(FILES, (IDS_FILE, INDEX_FILE, WORDS))
    if others or len(names.intersection(FILES)) < 2 or not (folder / "config.json").is_file():
        raise InputError(f"{folder} exists and is not a pipeline folder, or holds other files; choose another path")


def _check_own(path: Path) -> None:
    if not own_file(path):
        raise InputError(f"{path} is missing, or no regular file in its folder; {SAVE_AGAIN}")


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise an InputError or a ValueError unless the settings are a pipeline's and every file is as it was saved."""
    check_settings(config)
    if config["format"] != FORMAT:
        raise InputError(f"{folder}: format {config['format']!r} is not {FORMAT!r}; save it with this version")
    if not isinstance(config["memory"], str) or not isinstance(config["ids"], bool):
        raise ValueError("config.json has a value of another type")
    if not is_unchanged(config):
        raise InputError(f"{folder / 'config.json'} is damaged, or of another version; {SAVE_AGAIN}")
    config.setdefault("words", False)  # an older version's has none
    if config["sha256"].keys() - _hashed(folder, config):
        raise ValueError("a file is missing")
    for name in _hashed(folder, config):
        _check_own(folder / name)
        if config["sha256"].get(name) != sha256(folder / name):
            raise InputError(f"{folder / name} is damaged, or of another pipeline; {SAVE_AGAIN}")


def _texts(path: Path, vectors: int, logged: int) -> tuple[list[str], list[str]]:
    """Read the texts of so many vectors and logged queries; a log that must not be used has none."""
    of_vectors, of_log = json.loads(path.read_text())
    for texts, counts in ((of_vectors, (vectors,)), (of_log, (0, logged))):
        if not isinstance(texts, list) or len(texts) not in counts or not all(isinstance(one, str) for one in texts):
            raise ValueError(f"{path.name} does not hold the texts of its rows and queries")
    return of_vectors, of_log


def _memory(folder: Path, config: dict[str, Any]) -> tuple[VectorMemory, Tensor | None]:
    """Return the memory, and how similar each row is to its neighbours, if that was saved."""
    tensors = read_tensors(folder / "memory.safetensors")
    rows, row_of_vector = tensors["rows"], tensors.get("place")
    if rows.dtype not in DTYPES.values():
        raise InputError(f"{folder}: rows of {rows.dtype} are none of {', '.join(DTYPES)}; {SAVE_AGAIN}")
    given = len(rows if row_of_vector is None else row_of_vector)
    ids = read_ids(folder / IDS_FILE, given, remedy=SAVE_AGAIN) if config["ids"] else None
    memory = VectorMemory.restore(rows, config["memory"], ids, row_of_vector)
    memory = memory.aligned_with(Alignment(**tensors)) if tensors.keys() & BUFFERS else memory
    return memory, tensors.get("similar")


def _second_stage(memory: VectorMemory, config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Any, Any]:
    if (settings := config["reranker"])["kind"] != "evidence":
        return Reranker(memory.query_dim, **settings), None
    parts = {name.removeprefix("evidence."): weights[name] for name in weights if name.startswith("evidence.")}
    if any(not tensor.is_floating_point() for name, tensor in parts.items() if name != "pairs"):
        raise ValueError("its log of queries has integers in place of floats")
    with torch.device("cpu"):
        evidence = Evidence(memory, worded=config["attention"].get("worded", False), **parts)
    reranker = EvidenceReranker(len(evidence.features), hidden=settings["hidden"], dropout=settings["dropout"])
    return reranker, evidence
