"""What a sweep adds to its runs: a record of its words, skipping of finished jobs, a share of threads, a table."""

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from nvf.errors import InputError
from nvf.files.records import is_unchanged, read_record, sealed, write_record
from nvf.runs.resume import locked, recorded
from nvf.runs.settings import key, material, on_one_device
from nvf.runs.signals import command_to_resume

RECORD = "sweep.json"  # in a sweep's folder: the words that asked for it
LAUNCHER = re.compile(r"hydra/launcher=\w+|hydra\.launcher\.[a-z]\w*=[\w:-]+")  # words of Hydra's that are recorded
SETTING = re.compile(r"[+~]{0,2}(?!hydra\b)(?!.*_target_)\w+(\.\w+)*(=.*)?", re.DOTALL)  # words that build nothing


class Sweep(Callback):
    """Hydra calls it once a sweep, in the process that launches the jobs."""

    # These belong to the class, because Hydra sends the instance to the jobs.
    folder: ClassVar[Path | None] = None  # of the sweep that this process runs
    lock: ClassVar[FileLock | None] = None  # on that folder, until the process ends

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Lock the sweep's folder, and record the words that asked for the sweep."""
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            Sweep.lock = locked(folder)
        except InputError as error:  # which Hydra would turn into a warning
            sys.exit(f"error: {error}")
        asked = [word for word in config.hydra.overrides.task if not word.startswith("resume=")]
        asked += [word for word in config.hydra.overrides.hydra if LAUNCHER.fullmatch(word)]
        write_record(folder / RECORD, sealed({"overrides": asked}))
        Sweep.folder = folder


def words(folder: Path) -> list[str]:
    """Return the words that asked for the sweep in a folder; a damaged record, or one that builds, is an InputError."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = (record := read_record(folder / RECORD))["overrides"]
        if is_unchanged(record) and all(SETTING.fullmatch(word) or LAUNCHER.fullmatch(word) for word in found):
            return [*found]
    raise InputError(f"{folder / RECORD} is damaged, or names what is to be built; start the sweep anew")


def finished(folder: Path, config: Mapping[str, Any]) -> float | None:
    """Return the objective of a run if its results are complete and belong to these settings, else None."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        results = read_record(folder / "results.json")
        complete = {"test", "val", "gradients", "seconds", "versions", "memory"} <= results.keys()
        if complete and key(material(results["config"])) == key(material(config)):
            by_ndcg = any(variant["val_ndcg10"] is not None for variant in results["selection"])
            figures = results["val"]["pipeline"] or results["val"]["attention"]
            return float(figures["ndcg10" if by_ndcg else "top1"]["value"])
    return None


def resumes(folder: Path, config: Mapping[str, Any]) -> bool:
    """Tell whether an unfinished job of these settings began in a folder; results of other settings are renamed."""
    if (folder / "results.json").exists():
        os.replace(folder / "results.json", folder / "results.before.json")
    with suppress(InputError):
        return key(material(recorded(folder))) == key(material(config))
    return False


def threads(launcher: Mapping[str, Any]) -> int | None:
    """Return how many CPU threads each job gets, so that jobs share the cores; None for all."""
    target = str(launcher["_target_"])
    if "Joblib" in target:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = int(launcher["n_jobs"])
        return max(1, cores // (jobs if jobs > 0 else max(1, cores + 1 + jobs)))
    return int(launcher["cpus_per_task"] or 1) if "LocalLauncher" in target else None  # which starts all jobs at once


def refuse_local_ddp(config: Mapping[str, Any]) -> None:
    """Raise an InputError if a run in a sweep or in a program wants several processes, and no cluster starts them."""
    if not on_one_device(config["trainer"]) and "SLURM_NTASKS" not in os.environ:
        what = f"trainer.devices={config['trainer'].get('devices', 'auto')}: each process would repeat sweep or program"
        raise InputError(f"{what}; give trainer.devices=1 trainer.num_nodes=1, or sweep with hydra/launcher=slurm")


def finish() -> Any:
    """Print the table of the sweep that this process ran, and which jobs have no results; return it, and the folder."""
    folder = Sweep.folder
    if folder is None or not folder.is_dir():
        return None
    from nvf.runs.comparison.figure import write  # matplotlib takes a while, and no single run needs it
    from nvf.runs.comparison.table import compare

    jobs = [path for path in folder.iterdir() if (path / ".hydra").is_dir()]
    missing, table = sorted(path.name for path in jobs if not (path / "results.json").is_file()), None
    if len(missing) < len(jobs):
        comparison = compare([folder])
        print(f"\n{comparison.text()}\n{write(comparison, folder)}")
        table = comparison, folder
    if missing:
        print(
            f"\n{len(missing)} of {len(jobs)} jobs that began have no results ({', '.join(missing)}); their folders in "
            f"{folder} say why. To run what is missing: {command_to_resume(folder)}",
            file=sys.stderr,
        )
    return table
