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

from nvf.console import ending_in_words, follows, logged, quiet
from nvf.errors import InputError
from nvf.files.records import read_record
from nvf.overrides import CONF, composed, resumed_settings, settled, words_of
from nvf.runs import sweep as sweeps
from nvf.runs.resume import remove_traces
from nvf.runs.signals import Stopped, handlers_kept, restarted, stop_when_asked

START = time.perf_counter()
log = logging.getLogger("nvf")


def train(config: dict[str, Any], folder: Path, started: float, *, goes_on: bool = False) -> float:
    """Make one run, from resolved settings in plain containers to a complete run folder, which must exist.

    Its total seconds count from `started`, a `time.perf_counter()`. If it `goes_on`, it resumes what a stopped run of
    these settings left in the folder. It returns what a sweeper maximises: Top-1 or nDCG@10 on validation.
    """
    if follows():
        os.environ["TQDM_DISABLE"] = "1"  # read when it is imported
    # Imported here so that --help and a config error answer without torch.
    from nvf.dashboards.show import check_dashboards
    from nvf.models.ann_index import check_index
    from nvf.results import Fitted, save
    from nvf.runs.resume import begin
    from nvf.training.build import build
    from nvf.training.cache import circumstances
    from nvf.training.devices import agreed, part_processes, set_up_torch, shares_memory, start_processes
    from nvf.training.select import FOLDS, fit_attention, fit_joint, fit_reranker

    quiet()
    set_up_torch(threads=config["threads"], deterministic=config["deterministic"])
    check_dashboards(config["dashboards"])
    built = build(config)
    check_index(config["index"], rows=len(built.source.memory), fits=config["stage"]["fit"])
    rank, own = start_processes(config["trainer"], threads=config["threads"]), folder
    folder = agreed(folder)  # a cluster gives each process one of its own
    if rank:
        log.setLevel(logging.ERROR)  # the first process does the talking
        if own != folder:
            remove_traces(own)
    if shares_memory(config["trainer"]):
        from nvf.training.sharded import share_out

        built = share_out(built)
    lock = None if rank else begin(folder, {"config": config, **circumstances(built.source)}, goes_on=goes_on)
    run = Fitted(built, folder, started)
    with run.timed("attention"):
        run.chosen = fit_attention(built, folder)
    run.model, run.gradients["attention"] = run.chosen.attention, run.chosen.gradients
    if built.reranker is not None:
        with run.timed("reranker"):
            run.model, run.gradients["reranker"] = fit_reranker(built, run.chosen, folder)
    if built.joint is not None:
        if not rank:
            with run.timed("evaluation"):
                run.before = run.evaluated(built.queries("test"), "test")
        with run.timed("joint"):
            run.joint = fit_joint(built, run.model, folder)
        run.gradients["joint"] = run.joint.gradients
    with run.timed("evaluation"):
        run.leave_devices()
    part_processes()
    if rank:
        return math.nan  # the first process evaluates and saves
    objective = save(run)
    shutil.rmtree(folder / "checkpoints" / FOLDS, ignore_errors=True)
    if lock is not None:
        lock.release()
    return objective


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> float:
    """Make a run, or a job of a sweep, from Hydra's configuration."""
    settings = HydraConfig.get()
    folder, sweep = Path(settings.runtime.output_dir), settings.mode is RunMode.MULTIRUN
    config = settled(cfg, settings.runtime.cwd if settings.job.chdir else "")
    again, started = bool(config["resume"]) or (sweep and restarted()), time.perf_counter() if sweep else START
    in_turn = settings.launcher._target_.endswith("BasicLauncher")
    with ending_in_words(folder, sweep=sweep, began=again, in_turn=in_turn):
        if sweep:
            sweeps.refuse_local_ddp(config)
            config["trainer"]["enable_progress_bar"] = False  # the bars of several jobs would run into each other
            config["dashboards"]["levels"] = False  # the sweep's figure has them, and lines of all jobs would be many
            config["threads"] = config["threads"] or sweeps.threads(settings.launcher)
        elif again:
            config = resumed_settings(folder, settings.overrides.task)
        if again and (objective := sweeps.finished(folder, config)) is not None:
            log.info("done already: %s", folder)
            return objective
        return train(config, folder, started, goes_on=again and (not sweep or sweeps.resumes(folder, config)))


def main() -> None:
    """Run the command line: help, a run, or a sweep with its table."""
    stop_when_asked()
    faulthandler.enable(2)  # says where the process was when the system killed it, as for a mapped file cut short
    logging.raiseExceptions = False  # a log that cannot be written needs no traceback for each line
    try:
        sys.argv[1:] = words_of(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
    try:
        job()
        code: Any = None
    except SystemExit as stop:
        code = stop.code
    if code not in (130, 143) and (table := sweeps.finish()) is not None:
        from nvf.dashboards.show import show_sweep

        show_sweep(*table)
    if code:
        sys.exit(code)


def run(*words: str) -> dict[str, Any]:
    """Make one run from Python, `nvf.train.run("data=clustered", "seed=1")`, and return its results.json.

    It works in notebooks and threads too, and prints if the program shows no log of its own. Wrong words, settings or
    files are an InputError; a run that is stopped, and can be resumed, ends in a KeyboardInterrupt.
    """
    started = time.perf_counter()
    config, folder, goes_on = composed(words)
    try:
        if not goes_on or sweeps.finished(folder, config) is None:
            folder.mkdir(parents=True, exist_ok=True)
            with handlers_kept(), logged(folder / "train.log"):
                train(config, folder, started, goes_on=goes_on)
    except InputError:
        if not goes_on:
            remove_traces(folder)
        raise
    except Stopped as stop:
        if stop.name != "SIGINT":
            raise
        raise KeyboardInterrupt(f'to resume: nvf.train.run("resume={folder}")') from None
    return read_record(folder / "results.json")


if __name__ == "__main__":
    from nvf.train import main  # under its full name, so that other processes can import what they are sent

    main()
