"""What lets a run resume where it stopped: its settings, what it decided by the clock, and a lock on its folder.

A run's folder holds run.json, written before the first stage is fitted; each stage's last.ckpt, see
`nvf.training.callbacks`; and decisions.json, where a time limit is set. What lies between two fits, such as
calibration, is computed again.
"""

import logging
import os
import shutil
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from nvf.errors import InputError, one_line
from nvf.files.records import is_unchanged, read_record, sealed, write_record
from nvf.runs.signals import restarted

RECORD, DECISIONS, LOCK = "run.json", "decisions.json", ".lock"
TRACES = {".hydra", "train.log", RECORD, LOCK, "checkpoints"}  # what a run leaves that never began to fit
MAY_BE_BUILT = ("nvf.", "torch.", "lightning.")
T = TypeVar("T")
log = logging.getLogger("nvf")


def recorded(folder: Path, targets: Container[str] | None = None) -> dict[str, Any]:
    """The settings of the run in a folder.

    Args:
        folder: the run's.
        targets: each `_target_` that the settings may name; None allows for those in the packages `MAY_BE_BUILT`.

    Raises:
        InputError: the folder holds no run, its record is damaged, or it names another `_target_`.
    """
    path = folder / RECORD
    if not path.is_file():
        raise InputError(
            f"resume={folder}: there is no {path}; name the folder of a run, resume=outputs/<date>/<time>, or of a "
            "sweep, resume=outputs/multirun/<date>/<time>"
        )
    record = _read(path)
    config = record.get("config")
    if not isinstance(config, dict) or not is_unchanged(record):
        raise InputError(f"{path} is damaged; start the run anew")
    if (foreign := _foreign(config, targets)) is not None:
        raise InputError(
            f"{path} wants {foreign!r} built; settings may name what is in {', '.join(MAY_BE_BUILT)}, or what you name "
            f"again beside resume=: the word with _target_={foreign}"
        )
    return config


def begin(folder: Path, record: Mapping[str, Any], *, goes_on: bool) -> FileLock:
    """Write the record of a run that begins, or check that the data of one that resumes are still the same.

    The record holds JSON values: the `config`, hashes of `memory` and `queries`, and what else the figures rest on.

    Returns:
        The lock that keeps other processes from the folder; it is the kernel's, and goes with the process.

    Raises:
        InputError: another process is at this run, or the data have changed.
    """
    lock = _locked(folder)
    if lock is None:
        raise InputError(f"the run in {folder} is still running; wait for it, or stop it")
    path = folder / RECORD
    if not goes_on:
        for left in (*(folder / "checkpoints").rglob("last.ckpt"), *folder.glob(DECISIONS)):
            left.unlink()  # of an earlier run in the same folder
        write_record(path, sealed({**record, "slurm_job": os.environ.get("SLURM_JOB_ID")}))
        return lock
    before = _read(path)
    for what in (what for what in record if what != "config" and before.get(what) != record[what]):
        if what in ("memory", "queries"):
            raise InputError(
                f"resume={folder}: its {what} are no longer those that it began with; bring them back, or start anew"
            )
        log.warning("%s has other %s than the run began with: its figures may differ in the end", folder, what)
    for left in folder.glob("events.out.tfevents.*"):  # written at the end of a run, and again
        left.unlink()
    return lock


def decided(folder: Path, name: str, decide: Callable[[], T], *, writes: bool = True) -> T:
    """What was decided by the clock, a JSON value: a run that resumes does not decide it again.

    Of several processes only one writes; all of them must then take its value.
    """
    path = folder / DECISIONS
    decisions = _read(path) if path.exists() else {}
    if name in decisions:
        return decisions[name]
    value = decide()
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        write_record(path, {**decisions, name: value})
    return value


def requeued(place: str | None = None) -> Path | None:
    """The run that this Slurm job was at when it was requeued, in outputs/ or the place it was given; None if none."""
    if not restarted():
        return None
    records = sorted(Path("outputs").glob(f"*/*/{RECORD}"), reverse=True) if place is None else [Path(place) / RECORD]
    for path in records:
        with suppress(InputError):
            if _read(path).get("slurm_job") == os.environ.get("SLURM_JOB_ID"):
                return path.parent
    return None


def remove_traces(folder: Path) -> None:
    """Remove the folder of a run that never began to fit, and its parent if that is then empty.

    A folder that holds anything else stays, and so does one that another process is at.
    """
    if not {path.name for path in folder.iterdir()} <= TRACES or _locked(folder) is None:
        return
    if any(path.is_file() for path in folder.glob("checkpoints/**/*")):
        return
    shutil.rmtree(folder)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _locked(folder: Path) -> FileLock | None:
    """The lock on a folder, which a process can take more than once; None while another process holds it."""
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except (OSError, ValueError) as fault:
        raise InputError(f"{path} is damaged ({one_line(fault)}); start the run anew") from None


def _foreign(tree: Any, targets: Container[str] | None) -> str | None:
    """The first `_target_` that may not be built, at any depth."""
    if isinstance(tree, dict):
        target = tree.get("_target_")
        ours = str(target).startswith(MAY_BE_BUILT) if targets is None else target in targets
        if target is not None and not ours:
            return str(target)
        tree = list(tree.values())
    if isinstance(tree, list):
        return next((found for part in tree if (found := _foreign(part, targets)) is not None), None)
    return None
