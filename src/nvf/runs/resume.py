"""What lets a run go on where it stopped: its settings, what it decided by the clock, and that no other is at it.

A run's folder holds run.json, written before the first stage is fitted; each stage's last.ckpt, see
`nvf.training.callbacks`; and decisions.json, where a time limit is set. What lies between two fits, such as
calibration, is computed again.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from nvf.errors import InputError, one_line
from nvf.files.records import is_whole, read_record, sealed, write_record
from nvf.runs.signals import restarted

if TYPE_CHECKING:
    from nvf.data.queries import Source

RECORD, DECISIONS, LOCK = "run.json", "decisions.json", ".lock"
MAY_BE_BUILT = ("nvf.", "torch.", "lightning.")
T = TypeVar("T")
log = logging.getLogger("nvf")


def recorded(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder.

    Raises:
        InputError: there is no run, its record is damaged, or it names something to be built that is not ours.
    """
    path, remedy = folder / RECORD, "name a run's folder, resume=outputs/<date>/<time>"
    if not path.is_file():
        raise InputError(f"resume={folder}: there is no {path}, so no run to go on with; {remedy}")
    record = _read(path)
    config = record.get("config")
    if not isinstance(config, dict) or not is_whole(record):
        raise InputError(f"{path} is damaged; start the run anew")
    if (foreign := _foreign(config)) is not None:
        raise InputError(f"{path} wants {foreign!r} built; settings may name what is in {', '.join(MAY_BE_BUILT)}")
    return config


def begin(folder: Path, config: Mapping[str, Any], source: "Source", *, goes_on: bool) -> FileLock:
    """Record a run that begins, or check that the data of one that goes on are still the same.

    Returns:
        The lock that keeps others from the folder; the kernel's, it goes with the process.

    Raises:
        InputError: another process is at this run, or the data have changed.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"the run in {folder} is still running; wait for it, or stop it") from None
    now = _circumstances(source)
    path = folder / RECORD
    if not goes_on:
        for left in (*(folder / "checkpoints").rglob("last.ckpt"), *folder.glob(DECISIONS)):
            left.unlink()  # of an earlier run in the same folder
        write_record(path, sealed({"config": config, **now, "slurm_job": os.environ.get("SLURM_JOB_ID")}))
        return lock
    before = _read(path)
    for what in ("memory", "queries"):
        if before.get(what) != now[what]:
            raise InputError(
                f"resume={folder}: its {what} are no longer those that it began with; bring them back, or start anew"
            )
    for what in now:
        if before.get(what) != now[what]:
            log.warning("%s has other %s than the run began with: its figures may differ in the end", folder, what)
    for left in folder.glob("events.out.tfevents.*"):  # written at the end of a run, and again
        left.unlink()
    return lock


def decided(folder: Path, name: str, decide: Callable[[], T]) -> T:
    """What was decided by the clock, a JSON value: once, by the first process, and not anew by a run that goes on."""
    from nvf.training.devices import agreed, is_first

    path = folder / DECISIONS
    decisions = _read(path) if path.is_file() else {}
    value = agreed(decisions[name] if name in decisions else decide())
    if name not in decisions and is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_record(path, {**decisions, name: value})
    return value


def requeued(place: str | None = None) -> Path | None:
    """The run that this Slurm job was at when it was requeued, in outputs/ or the place it was given; None if none."""
    if not restarted():
        return None
    records = sorted(Path("outputs").glob(f"*/*/{RECORD}"), reverse=True) if place is None else [Path(place) / RECORD]
    for path in records:
        try:
            if _read(path).get("slurm_job") == os.environ.get("SLURM_JOB_ID"):
                return path.parent
        except InputError:
            continue
    return None


def remove_traces(folder: Path) -> None:
    """Remove what was written for a run that never began to fit, and the folders that this leaves empty."""
    if not {path.name for path in folder.iterdir()} <= {".hydra", "train.log", RECORD, LOCK, "checkpoints"}:
        return  # the folder holds something else
    if any(path.is_file() for path in folder.glob("checkpoints/**/*")):
        return  # it did begin
    shutil.rmtree(folder)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _circumstances(source: "Source") -> dict[str, Any]:
    """What the figures rest on beside the settings."""
    from nvf.data.queries import Recorded, fingerprint
    from nvf.training.cache import code_hash
    from nvf.training.threads import arithmetic

    splits = source.splits if isinstance(source, Recorded) else {}
    return {
        "memory": source.memory.fingerprint,
        "queries": {split: fingerprint(batch) for split, batch in splits.items()},
        "code": code_hash(),
        **arithmetic(),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except (OSError, ValueError) as fault:
        raise InputError(f"{path} is damaged ({one_line(fault)}); start the run anew") from None


def _foreign(tree: Any) -> str | None:
    """The first `_target_` that may not be built, at any depth."""
    if isinstance(tree, dict):
        target = tree.get("_target_")
        if target is not None and not str(target).startswith(MAY_BE_BUILT):
            return str(target)
        tree = list(tree.values())
    if isinstance(tree, list):
        return next((found for part in tree if (found := _foreign(part)) is not None), None)
    return None
