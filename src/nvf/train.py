"""The entry, `python -m nvf.train`: build the data, fit the stages, evaluate, save."""

import faulthandler
import logging
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from nvf.console import follows, logged, mend_streams, quiet
from nvf.errors import InputError
from nvf.exits import ending_in_words
from nvf.files.records import read_record
from nvf.overrides import CONF, check_folder, composed, resumed_settings, settled, words_of
from nvf.runs import sweep as sweeps
from nvf.runs.resume import remove_traces
from nvf.runs.signals import Stopped, handlers_kept, restarted, stop_when_asked

START = time.perf_counter()
log = logging.getLogger("nvf")


def train(config: dict[str, Any], folder: Path, started: float, *, goes_on: bool = False) -> float:
    """One run, from plain settings to a complete run folder.

    Args:
        config: the composed configuration, resolved, as plain containers.
        folder: of the run; exists.
        started: the `time.perf_counter()` from which the run's total seconds count.
        goes_on: with what a run of these settings left in the folder when it was stopped, however that was.

    Returns:
        The objective for sweepers, on validation of what was fitted last: Top-1, or nDCG@10 of several right rows.
    """
    check_folder(config)
    if follows():
        os.environ["TQDM_DISABLE"] = "1"  # which is read when it is imported
    # Imported here so that --help and a config error answer without importing torch.
    from nvf.dashboards.show import check_dashboards
    from nvf.models.ann_index import check_index
    from nvf.results import Stopwatch, evaluated, save
    from nvf.runs.resume import begin
    from nvf.training.build import build
    from nvf.training.cache import circumstances
    from nvf.training.devices import agreed, part_processes, set_up_torch, start_processes
    from nvf.training.select import FOLDS, fit_attention, fit_joint, fit_reranker

    quiet()
    set_up_torch(threads=config["threads"], deterministic=config["deterministic"])
    check_dashboards(config["dashboards"])
    built = build(config)
    check_index(config["index"], rows=len(built.source.memory), fits=config["stage"]["fit"])
    rank, own = start_processes(config["trainer"], threads=config["threads"]), folder
    folder = agreed(folder)  # a cluster gives each process one of its own
    if rank:
        log.setLevel(logging.ERROR)  # the first process says it all
        if own != folder:
            remove_traces(own)
    lock = None if rank else begin(folder, {"config": config, **circumstances(built.source)}, goes_on=goes_on)

    watch = Stopwatch(started)
    with watch("attention"):
        chosen = fit_attention(built, folder)
    fitted: dict[str, Any] = {"attention": chosen.gradients}
    model: Any = chosen.attention  # or a pipeline
    before = joint = None
    if built.reranker is not None:
        with watch("reranker"):
            model, fitted["reranker"] = fit_reranker(built, chosen, folder)
    if built.joint is not None:
        with watch("evaluation"):
            before = None if rank else evaluated(built, model, built.queries("test"), title="before joint training")
        with watch("joint"):
            joint = fit_joint(built, model, folder)
            fitted["joint"] = joint.gradients
    part_processes()
    if rank:
        return math.nan  # the first process evaluates and saves what all of them have fitted
    objective = save(config, built, model, chosen, joint, before, fitted, watch, folder)
    shutil.rmtree(folder / "checkpoints" / FOLDS, ignore_errors=True)
    if lock is not None:
        lock.release()
    return objective


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> float:
    """A run, or a job of a sweep, from Hydra's configuration; what goes wrong becomes words and an exit status."""
    settings = HydraConfig.get()
    folder, sweep = Path(settings.runtime.output_dir), settings.mode is RunMode.MULTIRUN
    config = settled(cfg, settings.runtime.cwd if settings.job.chdir else "")
    goes_on, started = bool(config["resume"]) and not sweep, time.perf_counter() if sweep else START
    with ending_in_words(folder, sweep=sweep, began=goes_on, in_turn=sweeps.in_turn(settings.launcher)):
        if sweep:
            config["trainer"]["enable_progress_bar"] = False  # the bars of several jobs would run into each other
            again = config["resume"] or restarted()
            if again and (objective := sweeps.finished(folder, config)) is not None:
                log.info("done already: %s", folder)
                return objective
            sweeps.refuse_local_ddp(config)
            config["threads"] = config["threads"] or sweeps.threads(settings.launcher)
            if again:
                goes_on = sweeps.resumes(folder, config)
        elif goes_on:
            config = resumed_settings(folder, settings.overrides.task)
            if sweeps.finished(folder, config) is not None:
                log.info("done already: %s", folder)
                return math.nan
        return train(config, folder, started, goes_on=goes_on)


def main() -> None:
    """The command line: help, a run, or a sweep, which ends on its table; the exit status is 0 if all went well."""
    if "kernel_launcher" in sys.argv[0]:  # a notebook's command line is not ours
        run()
        return
    mend_streams()
    stop_when_asked()
    faulthandler.enable(2)  # what kills the process from within says where, such as a mapped file that is truncated
    logging.raiseExceptions = False  # a log that cannot be written is not worth a screen of tracebacks a line
    try:
        sys.argv[1:] = words_of(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
    try:
        job()
    except SystemExit as stop:
        if stop.code not in (130, 143):
            sweeps.finish()
        raise
    sweeps.finish()


def run(*words: str) -> dict[str, Any]:
    """One run from Python, `nvf.train.run("data=clustered", "seed=1")`; its seconds count from here.

    It may be called again and again, in a notebook or a thread too. What it says is printed where the program shows no
    log of its own.

    Returns:
        What is in the run's results.json.

    Raises:
        InputError: whatever is wrong with the words, the settings or the user's files.
        KeyboardInterrupt: it was stopped, and can be resumed.
    """
    started = time.perf_counter()
    config, folder, goes_on = composed(words)
    if goes_on and sweeps.finished(folder, config) is not None:
        return read_record(folder / "results.json")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with handlers_kept(), logged(folder / "train.log"):
            train(config, folder, started, goes_on=goes_on)
    except InputError:
        if not goes_on:
            remove_traces(folder)
        raise
    except Stopped as stop:
        if stop.name != "SIGINT":
            raise
        raise KeyboardInterrupt(f'to go on: nvf.train.run("resume={folder}")') from None
    return read_record(folder / "results.json")


if __name__ == "__main__":
    from nvf.train import main  # under its name, so that other processes find what they are sent

    main()
