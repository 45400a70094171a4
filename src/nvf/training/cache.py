"""Fitted stages 1, kept by everything they depend on, so that the jobs of a sweep and later runs fit each but once."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from filelock import FileLock, Timeout

from nvf.data.queries import Recorded, Source, fingerprint
from nvf.errors import InputError, one_line
from nvf.files.atomic import written_whole
from nvf.files.records import is_whole, read_record, sealed, sha256
from nvf.files.tensors import DAMAGE
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.runs.settings import material
from nvf.training.checkpoints import load_attention, save_weights
from nvf.training.devices import on_one_device
from nvf.training.threads import arithmetic

log = logging.getLogger("nvf")
LEFT_BY_A_FIT = ("checkpoints/attention/", "attention/")  # in a run's folder: the checkpoints and the curves
WEIGHTS, FIT = "attention.safetensors", "fit.zip"  # TensorBoard takes a folder of curves for a run, but no archive


@contextmanager
def opened(config: Mapping[str, Any], key: str) -> Iterator[Path | None]:
    """The folder of the entry with this key, locked until the block ends; None where the cache is off.

    Other processes that need the same entry wait. The kernel drops the lock when its process ends, however that ends.

    Raises:
        InputError: the cache cannot be written.
    """
    if config["cache"] in (None, False, "off") or not on_one_device({"devices": "auto", **config["trainer"]}):
        yield None
        return
    root = Path(str(config["cache"]))
    lock = FileLock(root / "locks" / key)
    try:
        (root / "locks").mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("stage 1: waiting for another job that is fitting it")
            lock.acquire(poll_interval=0.2)
    except OSError as fault:
        why = f"cache={root} cannot be written ({one_line(fault)})"
        raise InputError(f"{why}; give another folder, or cache=off") from None
    try:
        yield root / key
    finally:
        lock.release()


def read(entry: Path, memory: VectorMemory, folder: Path) -> tuple[SoftAttention, dict[str, Any]] | None:
    """A kept stage 1 and what was noted about it; None if there is none, or it is damaged.

    Its checkpoints and curves are copied into the folder of a run.
    """
    if not entry.exists():
        return None
    try:
        about = read_record(entry / "about.json")
        if not is_whole(about) or sha256(entry / FIT) != about["sha256"][FIT]:
            raise ValueError("it is not what was kept")
        attention = load_attention(entry / WEIGHTS, memory)
        with ZipFile(entry / FIT) as archive:
            if sum(part.file_size for part in archive.infolist()) > (entry / FIT).stat().st_size:
                raise ValueError(f"{FIT} holds more than was kept")
            for part in LEFT_BY_A_FIT:
                shutil.rmtree(folder / part, ignore_errors=True)  # an interrupted fit may have left some
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(LEFT_BY_A_FIT)])
    except (*DAMAGE, BadZipFile) as fault:
        log.warning("%s is damaged (%s); stage 1 is fitted anew", entry, one_line(fault))
        return None
    return attention, about


def write(entry: Path, attention: SoftAttention, about: Mapping[str, Any], folder: Path) -> None:
    """Keep a calibrated stage 1, notes about it, and the checkpoints and curves that its fit left in a run's folder."""
    if not entry.is_dir() or entry.is_symlink():
        entry.unlink(missing_ok=True)
    with written_whole(entry) as partial:
        partial.mkdir()
        save_weights(attention, partial / WEIGHTS, stage="attention")
        with ZipFile(partial / FIT, "w") as archive:
            for path in sorted(path for part in LEFT_BY_A_FIT for path in (folder / part).rglob("*")):
                if path.is_file() and path.name != "last.ckpt":
                    archive.write(path, path.relative_to(folder))
        record = sealed({**about, "sha256": {FIT: sha256(partial / FIT)}})
        (partial / "about.json").write_text(json.dumps(record, indent=2) + "\n")


def stage_key(config: Mapping[str, Any], source: Source, variants: Sequence[Mapping[str, Any]]) -> str:
    """The hash of everything that a fitted stage 1 depends on: 32 hexadecimal digits.

    Args:
        config: of the run.
        source: the memory and the queries, which count by content where they are the user's own.
        variants: the settings of each stage 1 that is tried.
    """
    queries = {name: value for name, value in config["queries"].items() if name != "source"}
    if not isinstance(source, Recorded):
        queries = config["queries"]
    settings = {name: config[name] for name in ("trainer", "optimizer", "callbacks")} | {"queries": queries}
    rests_on = {
        **circumstances(source),
        "settings": material({**settings, "variants": list(variants)}),
        "dtype": str(source.memory.rows.dtype),
    }
    return hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()[:32]


def circumstances(source: Source) -> dict[str, Any]:
    """What the figures of a run depend on beside its settings, as JSON values."""
    splits = source.splits if isinstance(source, Recorded) else {}
    return {
        "memory": source.memory.fingerprint,
        "queries": {split: fingerprint(batch) for split, batch in splits.items()},
        "code": code_hash(),
        **arithmetic(),
    }


def code_hash() -> str:
    """The hash of all our modules: in a development tree the version number stays as it is when the code changes."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
