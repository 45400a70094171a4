"""Fitted stages 1, kept by everything they depend on, so that the jobs of a sweep and later runs fit each but once."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from nvf.data.queries import Recorded, Source, fingerprint
from nvf.errors import InputError, one_line
from nvf.files.atomic import atomic_write
from nvf.files.records import is_unchanged, own_file, read_record, sealed, sha256
from nvf.files.tensors import DAMAGE, fill, read_tensors
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.runs.settings import material
from nvf.training.threads import arithmetic

log = logging.getLogger("nvf")
LEFT_BY_A_FIT = ("checkpoints/attention", "attention")  # in a run's folder: the checkpoints and the curves
WEIGHTS, FIT = "attention.safetensors", "fit.zip"  # TensorBoard takes a folder of curves for a run, but no archive


class Kept(NamedTuple):
    """A fitted stage 1 and what its run knew of it."""

    attention: SoftAttention  # calibrated, frozen
    about: dict[str, Any]


class Entry:
    """The place of one stage 1 in the cache, which no other process touches while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, memory: VectorMemory, folder: Path) -> Kept | None:
        """What is kept, its checkpoints and curves copied into a run's folder; None if nothing is, or it is damaged."""
        if not self.path.exists():
            return None
        try:
            about = read_record(self.path / "about.json")
            for name in (WEIGHTS, FIT):
                path = self.path / name
                if not own_file(path) or not is_unchanged(about) or sha256(path) != about["sha256"][name]:
                    raise ValueError(f"{name} is not what was kept")
            with torch.device("meta"):  # where settings may claim any size: the weights say which it is
                attention = SoftAttention(memory, **about["settings"])
            fill(attention, read_tensors(self.path / WEIGHTS))
            with ZipFile(self.path / FIT) as archive:
                size = sum(part.file_size for part in archive.infolist())
                if size > (self.path / FIT).stat().st_size or not all(map(_left_by_a_fit, archive.namelist())):
                    raise ValueError(f"{FIT} holds more than a fit leaves")
                for part in LEFT_BY_A_FIT:
                    shutil.rmtree(folder / part, ignore_errors=True)  # what a fit that was stopped at once has left
                archive.extractall(folder)
        except (*DAMAGE, BadZipFile) as fault:
            log.warning("%s is damaged (%s); stage 1 is fitted anew", self.path, one_line(fault))
            return None
        return Kept(attention.to(memory.rows.device).requires_grad_(False), about)

    def write(self, kept: Kept, folder: Path) -> None:
        """Keep a stage 1, with the checkpoints and the curves that its fit left in a run's folder."""
        if not self.path.is_dir() or self.path.is_symlink():
            self.path.unlink(missing_ok=True)  # whatever it is, it is no entry
        with atomic_write(self.path) as partial:
            partial.mkdir()
            weights = {name: tensor.cpu().contiguous() for name, tensor in kept.attention.state_dict().items()}
            save_file(weights, partial / WEIGHTS)
            with ZipFile(partial / FIT, "w") as archive:
                for path in sorted(path for part in LEFT_BY_A_FIT for path in (folder / part).rglob("*")):
                    if path.is_file() and path.name != "last.ckpt":
                        archive.write(path, path.relative_to(folder))
            hashed = {"sha256": {name: sha256(partial / name) for name in (WEIGHTS, FIT)}}
            about = sealed({"settings": kept.attention.settings, **kept.about, **hashed})
            (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def _left_by_a_fit(name: str) -> bool:
    return name.startswith(tuple(f"{part}/" for part in LEFT_BY_A_FIT)) and ".." not in name.split("/")


@contextmanager
def opened(root: Path | None, key: str) -> Iterator[Entry | None]:
    """The entry with this key, locked until the block ends; None where `root`, the cache's folder, is None.

    Who needs the same one waits. The lock is the kernel's: it goes with the process that holds it, however that
    ends.

    Raises:
        InputError: the cache cannot be written.
    """
    if root is None:
        yield None
        return
    lock = FileLock(root / "locks" / key)
    try:
        (root / "locks").mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("stage 1: another job is fitting it; waiting for that")
            lock.acquire(poll_interval=0.2)
    except OSError as fault:
        raise InputError(
            f"cache={root} cannot be written ({one_line(fault)}); give another folder, or cache=off"
        ) from None
    try:
        yield Entry(root / key)
    finally:
        lock.release()


def stage_key(source: Source, settings: Mapping[str, Any]) -> str:
    """The hash of everything that a fitted stage 1 depends on: 32 hexadecimal digits.

    That is the memory's content, the queries (the user's own by content), our code, whatever else changes the bits, and
    these settings.
    """
    own = [source.splits[split] for split in ("train", "val")] if isinstance(source, Recorded) else []
    rests_on = {
        **material(settings),
        "memory": [source.memory.fingerprint, str(source.memory.rows.dtype)],
        "recorded": [fingerprint(batch) for batch in own],
        "code": code_hash(),
        "arithmetic": arithmetic(),
    }
    return hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()[:32]


def circumstances(source: Source) -> dict[str, Any]:
    """What the figures of a run rest on beside its settings, as JSON values."""
    splits = source.splits if isinstance(source, Recorded) else {}
    return {
        "memory": source.memory.fingerprint,
        "queries": {split: fingerprint(batch) for split, batch in splits.items()},
        "code": code_hash(),
        **arithmetic(),
    }


def code_hash() -> str:
    """Of every module of ours: a development tree's version number stays as it is when its code changes."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
