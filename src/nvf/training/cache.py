"""A cache of fitted stages 1 under everything they depend on, so that a sweep and later runs fit each only once."""

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from nvf.data.queries import Recorded, Source, fingerprint
from nvf.errors import InputError, refused
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.runs.resume import versions
from nvf.runs.settings import material, on_one_device
from nvf.training.checkpoints import hashed, load_attention

log = logging.getLogger("nvf")
TUNED_BY = ("MKL_", "ONEDNN_", "DNNL_", "CUBLAS_", "NVIDIA_TF32_", "TORCH_ALLOW_TF32_")  # environment variables
ON_WHICH = ("trainer", "optimizer", "callbacks")  # groups of settings that a fitted stage 1 depends on


@contextmanager
def opened(config: Mapping[str, Any], key: str) -> Iterator[Path | None]:
    """The file for the stage 1 with this key, locked until the block ends; None where the cache is off.

    Other processes that need the same stage 1 wait. The kernel drops the lock when its process ends, however that ends.
    """
    if config["cache"] in (None, False, "off") or not on_one_device(config["trainer"]):
        yield None
        return
    root = Path(str(config["cache"]))
    with refused(f"cache={root} cannot be written", "give another, or cache=off", OSError):
        (root / "locks").mkdir(parents=True, exist_ok=True)
        locked = FileLock(root / "locks" / key).acquire(poll_interval=0.2)
    with locked:
        yield root / f"{key}.safetensors"


def read(path: Path, memory: VectorMemory) -> tuple[SoftAttention, dict[str, Any]] | None:
    """A kept stage 1 and the notes about it; None if there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        return load_attention(path, memory)
    except InputError as fault:
        log.warning("stage 1 is fitted anew: %s", fault)
        return None


def stage_key(config: Mapping[str, Any], source: Source, variants: Sequence[Mapping[str, Any]]) -> str:
    """The hash of everything that a fitted stage 1 depends on: 32 hexadecimal digits.

    The memory and a user's own queries count by content. `variants` are the settings of each stage 1 that is tried.
    """
    by_content = {"source"} if isinstance(source, Recorded) else set()
    queries = {name: value for name, value in config["queries"].items() if name not in by_content}
    settings = {name: config[name] for name in ON_WHICH} | {"queries": queries, "variants": list(variants)}
    rests_on = {**circumstances(source), "settings": material(settings), "dtype": str(source.memory.rows.dtype)}
    return hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()[:32]


def circumstances(source: Source) -> dict[str, Any]:
    """What the last bits of a run's figures depend on beside its settings, as JSON values.

    Libraries choose their routines by the processor and by their own environment variables.
    """
    splits = source.splits if isinstance(source, Recorded) else {}
    cpuinfo, gpus = Path("/proc/cpuinfo"), torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    pairs = source.pairs if isinstance(source, Recorded) else None
    return {
        "pairs": None if pairs is None else hashed(dict(zip("ab", pairs, strict=True))),
        "memory": source.memory.fingerprint,
        "queries": {split: fingerprint(batch) for split, batch in splits.items()},
        "code": code_hash(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability(), *sorted({*names})],
        "devices": [torch.cuda.get_device_name(device) for device in range(gpus)],
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(TUNED_BY)},
        "matmul precision": torch.get_float32_matmul_precision(),
        "versions": versions(),
    }


def code_hash() -> str:
    """The hash of all our modules: in a development tree the version number stays as it is when the code changes."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
