"""What makes a sweep of many runs hold together: who runs on how many threads, what is done already, how it ends."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from nvf.errors import InputError
from nvf.files.records import read_record, write_record
from nvf.runs.comparison.settings import IGNORED
from nvf.runs.resume import recorded

log = logging.getLogger("nvf")
ROOT = Path("outputs/multirun")  # where conf/config.yaml puts sweeps
RECORD = "sweep.json"  # in a sweep's folder: what was asked for
# Settings that say how a run is made, not what it finds.
IMMATERIAL = (*IGNORED, "dashboards")
KEPT = (".hydra", "train.log", "results.before.json")  # of an unfinished job that starts anew


class Sweep(Callback):
    """Hydra calls it once a sweep, in the process that launches the jobs."""

    # Of the class, for Hydra sends the instance to the jobs.
    folder: ClassVar[Path | None] = None  # of the sweep that this process runs
    lock: ClassVar[Any] = None  # on that folder, while this process lives

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make the sweep's folder ours, and record what was asked for."""
        from filelock import FileLock, Timeout  # no single run needs it

        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        Sweep.lock = FileLock(folder / ".lock")
        try:
            Sweep.lock.acquire(timeout=0)
        except Timeout:
            print(f"error: the sweep in {folder} is still running; wait for it, or stop it", file=sys.stderr)
            sys.exit(1)
        write_record(folder / RECORD, {"overrides": identity(config.hydra.overrides.task)})
        Sweep.folder = folder


def identity(overrides: Sequence[str]) -> list[str]:
    """What makes two commands ask for the same sweep: their words, whose order numbers the jobs."""
    return [text for text in overrides if text.partition("=")[0].lstrip("+") not in IMMATERIAL]


def earlier(arguments: Sequence[str], root: Path = ROOT) -> Path | None:
    """The folder of the newest sweep that the same words asked for; None if there is none."""
    asked = identity([text for text in arguments if not text.startswith(("-", "hydra.", "hydra/", "~hydra", "+hydra"))])
    for record in sorted(root.glob(f"*/*/{RECORD}"), reverse=True):
        try:
            if read_record(record)["overrides"] == asked:
                return record.parent
        except (OSError, ValueError, KeyError):
            continue  # half of a record is no sweep to go on with
    return None


def finished(folder: Path, config: Mapping[str, Any]) -> float | None:
    """The objective of a run that is done, if its results are complete and of these settings; else None."""
    try:
        results = read_record(folder / "results.json")
        if not {"test", "val", "gradients", "seconds", "versions", "memory"} <= results.keys():
            return None
        if _material(results["config"]) != _material(json.loads(json.dumps(config))):
            return None
        return float((results["val"]["pipeline"] or results["val"]["attention"])["top1"]["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def goes_on(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether an unfinished job of these settings can go on where it stopped."""
    try:
        return _material(recorded(folder)) == _material(json.loads(json.dumps(config)))
    except (InputError, KeyError, TypeError):
        return False


def set_aside(folder: Path) -> None:
    """Keep figures of other settings, which a job that is run finds in its folder."""
    if (folder / "results.json").exists():
        os.replace(folder / "results.json", folder / "results.before.json")


def clear(folder: Path) -> None:
    """Remove what an unfinished job left, so that the curves of two tries do not mix."""
    for path in folder.iterdir():
        if path.name in KEPT:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _material(config: Mapping[str, Any]) -> dict[str, Any]:
    left = {name: value for name, value in config.items() if name not in IMMATERIAL}
    trainer = {name: value for name, value in config["trainer"].items() if name != "enable_progress_bar"}
    return {**left, "trainer": trainer}


def in_turn(launcher: Mapping[str, Any]) -> bool:
    """Whether the jobs run in the sweep's own process, one after the other."""
    return str(launcher["_target_"]).endswith("BasicLauncher")


def threads(launcher: Mapping[str, Any]) -> int | None:
    """How many CPU threads are a job's share, so that N jobs on N cores do not fight; None for all there are."""
    target, cores = str(launcher["_target_"]), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    cores = cores or os.cpu_count() or 1
    if "Joblib" in target:
        jobs = int(launcher["n_jobs"])
        return max(1, cores // (jobs if jobs > 0 else max(1, cores + 1 + jobs)))
    if "LocalLauncher" in target:  # it starts all jobs at once
        return int(launcher["cpus_per_task"] or 1)
    return None


def refuse_local_ddp(config: Mapping[str, Any]) -> None:
    """Lightning starts the other processes of a run with the words of the command line: a sweep's, or a program's.

    Raises:
        InputError: a run of the sweep or of the program wants several processes, and no cluster starts them.
    """
    trainer = config["trainer"]
    devices, nodes, strategy = (trainer.get(name) for name in ("devices", "num_nodes", "strategy"))
    one = devices in (1, "1", None) or (isinstance(devices, list) and len(devices) == 1)
    several = not one and not (devices in ("auto", -1, "-1") and trainer.get("accelerator") == "cpu")
    if (several or nodes not in (1, None) or "ddp" in str(strategy)) and "SLURM_NTASKS" not in os.environ:
        raise InputError(
            f"trainer.devices={devices} in a sweep: each process of a run would repeat the whole sweep, or the program "
            "that calls nvf.train.run; give trainer.devices=1 and run jobs side by side, hydra/launcher=parallel, or "
            "sweep with hydra/launcher=slurm"
        )


def finish() -> None:
    """End a sweep on its table, and on what is missing from it, if this process ran one."""
    folder = Sweep.folder
    if folder is None or not folder.is_dir():
        return
    from nvf.runs.comparison.table import summarize  # scipy takes a while, and no single run needs it

    jobs = [path for path in folder.iterdir() if path.is_dir() and (path / ".hydra").is_dir()]
    missing = sorted(path.name for path in jobs if not (path / "results.json").is_file())
    if (summary := summarize(folder)) is not None:
        print(f"\n{summary}")
    if missing:
        print(
            f"\n{len(missing)} of {len(jobs)} jobs that began have no results ({', '.join(missing)}); their folders in "
            f"{folder} say why. The same command with resume=true runs what is missing.",
            file=sys.stderr,
        )
