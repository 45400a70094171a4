"""What lets a run resume: the record of its settings and data, and a lock on its folder.

What is computed between two fits, such as the calibration, is not saved: a resumed run computes it again.
"""

import logging
import os
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nvf.errors import InputError, refused
from nvf.files.records import is_unchanged, read_record, sealed, write_record
from nvf.runs.curves import FOLDER

RECORD, LOCK = "run.json", ".lock"
TRACES = {".hydra", "train.log", RECORD, LOCK, "checkpoints"}  # what a run leaves that was refused before a fit
log = logging.getLogger("nvf")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run's figures depend on."""
    packages = ("nvf", "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def recorded(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder; no run, or a damaged record, is an InputError."""
    path = folder / RECORD
    if not path.is_file():
        raise InputError(f"resume={folder}: there is no {path}; name the folder of a run or of a sweep")
    record = _read(path)
    if not isinstance(record.get("config"), dict) or not is_unchanged(record):
        raise InputError(f"{path} is damaged; start the run anew")
    return record["config"]


def begin(folder: Path, record: Mapping[str, Any], *, goes_on: bool) -> FileLock:
    """Lock a run's folder, and write the record of the run or check that the data of a resumed one are the same.

    The record holds JSON values: the `config`, hashes of `memory`, `queries`, `pairs`, and what else figures depend on.
    Changed data, and another process in the folder, are an InputError. The lock ends with the process.
    """
    lock, events = locked(folder), "events.out.tfevents.*"
    if not goes_on:
        checkpoints = (folder / "checkpoints").rglob("last.ckpt")
        for left in (*checkpoints, *folder.glob(events), *(folder / FOLDER).rglob(events)):
            left.unlink()  # from an earlier run in the same folder
        write_record(folder / RECORD, sealed({**record, "slurm_job": os.environ.get("SLURM_JOB_ID")}))
        return lock
    before = _read(folder / RECORD)
    for name in (name for name in record if name != "config" and before.get(name) != record[name]):
        if name in ("memory", "queries", "pairs"):
            raise InputError(f"resume={folder}: the {name} changed since the run began; restore them, or start anew")
        log.warning("%s: %s changed since the run began; its figures may differ in the last digits", folder, name)
    for left in folder.glob(events):  # are written again at the end of the run
        left.unlink()
    return lock


def requeued(place: str | None = None) -> Path | None:
    """Return the folder of the run that this Slurm job began before it was requeued, in `place` or in outputs/."""
    records = sorted(Path("outputs").glob(f"*/*/{RECORD}"), reverse=True) if place is None else [Path(place) / RECORD]
    for path in records:
        with suppress(InputError):
            if _read(path).get("slurm_job") == os.environ.get("SLURM_JOB_ID"):
                return path.parent
    return None


def remove_traces(folder: Path) -> None:
    """Remove the folder of a run that never began to fit, unless it holds anything else or another process uses it."""
    saved = any(path.is_file() for path in folder.glob("checkpoints/**/*"))
    if not saved and {path.name for path in folder.iterdir()} <= TRACES:
        with suppress(InputError):
            locked(folder)
            shutil.rmtree(folder)
            if not any(folder.parent.iterdir()):
                folder.parent.rmdir()


def locked(folder: Path) -> FileLock:
    """Lock a folder, which one process may do several times; a folder that another has locked is an InputError."""
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"what runs in {folder} is still running; wait for it, or stop it") from None
    return lock


def _read(path: Path) -> dict[str, Any]:
    with refused(f"{path} is damaged", "start the run anew", OSError, ValueError):
        return read_record(path)
