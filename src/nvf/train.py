"""The entry, `python -m nvf.train`: build the data, fit the stages, evaluate, save."""

import faulthandler
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nvf.console import follows, logged, mend_streams, quiet
from nvf.errors import InputError, one_line
from nvf.faults import explain
from nvf.files.atomic import written_whole
from nvf.files.records import read_record
from nvf.overrides import CONF, check_folder, composed, settle, usage, words_of
from nvf.runs import sweep as sweeps
from nvf.runs.resume import RECORD, recorded, remove_traces
from nvf.runs.signals import Stopped, command_to_resume, handlers_kept, restarted, stop_when_asked

if TYPE_CHECKING:
    from nvf.models.attention import SoftAttention

START = time.perf_counter()
log = logging.getLogger("nvf")


def train(config: dict[str, Any], folder: Path, started: float, *, goes_on: bool = False) -> float:
    """One run, from plain settings to a whole run folder.

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
    import numpy as np

    from nvf.dashboards.show import check_dashboards, log_hparams, show, texts_of
    from nvf.data.queries import fingerprint
    from nvf.evaluation.evaluate import against, evaluate, evaluate_index
    from nvf.evaluation.gradients import audit_gradients
    from nvf.evaluation.report import remarks, table
    from nvf.files.records import write_record
    from nvf.models.ann_index import build_index, check_index
    from nvf.models.pipeline import Pipeline
    from nvf.ops.ranks import criterion
    from nvf.runs.resume import begin
    from nvf.runs.versions import versions
    from nvf.training.build import build_source, check, clusters, fixed_queries, seen_rows
    from nvf.training.devices import agreed, part_processes, start_processes
    from nvf.training.fit import check_trainer
    from nvf.training.select import FOLDS, fit_attention, fit_joint, fit_reranker
    from nvf.training.threads import set_up_torch

    quiet()
    set_up_torch(threads=config["threads"], deterministic=config["deterministic"])
    check_dashboards(config["dashboards"])
    check_trainer(config["trainer"])
    source = build_source(config)
    check(config, source)
    check_index(config["index"], rows=len(source.memory), fits=config["stage"]["fit"])
    rank, own = start_processes(config), folder
    folder = agreed(folder)  # a cluster gives each process one of its own
    if rank:
        log.setLevel(logging.ERROR)  # the first process says it all
        if own != folder:
            remove_traces(own)
    lock = None if rank else begin(folder, config, source, goes_on=goes_on)

    seconds: dict[str, float | None] = {"attention": None, "reranker": None}
    training: dict[str, Any] = {}  # the gradients in it
    cut: dict[str, Any] = {}  # what the limits left out
    with timed(seconds, "attention"):
        chosen = fit_attention(config, source, folder)
        training["attention"], cut["attention"] = chosen.gradients, chosen.cut
    model: SoftAttention | Pipeline = chosen.attention
    if "reranker" in config["stage"]["fit"]:
        with timed(seconds, "reranker"):
            model, training["reranker"] = fit_reranker(config, source, chosen, folder)

    val, test = (fixed_queries(config, source, split) for split in ("val", "test"))
    known: dict[str, Any] = {"k": config["k"], "oracle": source.oracle, "seen": seen_rows(source)}
    before = joint = None
    if "joint" in config["stage"]["fit"]:
        if not rank:
            with timed(seconds, "evaluation"):
                before = evaluate(model, test, **known, title="before joint training")
        with timed(seconds, "joint"):
            assert isinstance(model, Pipeline)
            training["joint"], kept, cut["joint"] = fit_joint(config, source, model, folder)
    part_processes()
    if rank:
        return math.nan  # the first process evaluates and saves what all of them have fitted
    built: dict[str, float | None] = {}
    if isinstance(model, Pipeline):
        with timed(built, "build_seconds"):
            model.index = build_index(model.attention.keys(), **config["index"])
        model.save(folder / "pipeline")
    with timed(seconds, "evaluation"):
        val_found = evaluate(model, val, **known, title="validation")
        found = evaluate(model, test, **known, title="test")
        if before is not None:
            joint = {"kept": kept, "before": before.figures, "against": against(found.answered, before.answered)}
        index = None
        if isinstance(model, Pipeline) and model.index is not None:
            index = {**evaluate_index(model, *test), **built}
        gradients = audit_gradients(model, val)
        texts = texts_of(config["data"].get("dir"), source.memory.given)
        if texts is not None and source.memory.vector_of_row is not None:
            texts = [texts[vector] for vector in source.memory.vector_of_row.tolist()]
        shown = {"k": config["k"], "oracle": source.oracle, "texts": texts, "labels": clusters(config)}
        try:
            show(model, val, config["dashboards"], folder, **shown)
        except Exception:  # a picture is not worth a run
            log.exception("not all of what TensorBoard shows could be drawn; the figures below are whole")
    total = time.perf_counter() - started
    results = {
        "test": found.figures,
        "val": val_found.figures,
        "against_exact": found.against_exact,
        "joint": joint,
        "selection": chosen.tried,
        "attention_fitted_by": chosen.fitted_by,
        "cut": {stage: what for stage, what in cut.items() if what is not None},
        "duplicates": getattr(source, "duplicates", None),
        "merged": {"rows": source.memory.given - len(source.memory), "queries": getattr(source, "merged", 0)},
        "collection_distance": source.memory.distance,
        "log": model.evidence.law() if isinstance(model, Pipeline) and model.evidence is not None else None,
        "index": index,
        "gradients": {**gradients, "training": {stage: norms for stage, norms in training.items() if norms}},
        "seconds": {**seconds, "total": total},
        "config": config,
        "versions": versions(),
        "memory": source.memory.fingerprint,
        "queries": fingerprint(test),
    }
    log_hparams(results, folder)
    source.memory.check_unchanged()
    with written_whole(folder / "answered.npy") as partial, partial.open("wb") as file:
        np.save(file, found.answered.cpu().numpy())
    write_record(folder / "results.json", results)
    shutil.rmtree(folder / "checkpoints" / FOLDS, ignore_errors=True)
    if lock is not None:
        lock.release()

    log.info("\n%s\n", table(results, len(test.queries)))
    for line in remarks(results):
        log.warning(line)
    log.info("%.0f s; everything is in %s", total, folder)
    return (val_found.figures["pipeline"] or val_found.figures["attention"])[criterion(val.targets)]["value"]


@contextmanager
def timed(seconds: dict[str, float | None], name: str) -> Iterator[None]:
    """Add how long the block took."""
    start = time.perf_counter()
    yield
    seconds[name] = (seconds.get(name) or 0) + time.perf_counter() - start


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> float:
    """A run, or a job of a sweep, from Hydra's configuration; what goes wrong becomes words and an exit status."""
    settings = HydraConfig.get()
    folder, sweep = Path(settings.runtime.output_dir), settings.mode is RunMode.MULTIRUN
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    settle(config, settings.runtime.cwd if settings.job.chdir else "")
    if sweep:
        config["trainer"]["enable_progress_bar"] = False  # the bars of several jobs would run into each other
    try:
        goes_on = False
        if sweep:
            again = config["resume"] or restarted()
            if again and (objective := sweeps.finished(folder, config)) is not None:
                log.info("done already: %s", folder)
                return objective
            sweeps.refuse_local_ddp(config)
            config["threads"] = config["threads"] or sweeps.threads(settings.launcher)
            if again:
                sweeps.set_aside(folder)
                goes_on = sweeps.goes_on(folder, config)
                if not goes_on:
                    sweeps.clear(folder)
        elif config["resume"] is True:
            raise InputError("resume=True goes on with a sweep; add -m, or name a run: resume=outputs/<date>/<time>")
        elif config["resume"]:
            goes_on, config = True, recorded(folder)
            if sweeps.finished(folder, config) is not None:
                log.info("done already: %s", folder)
                return math.nan
        return train(config, folder, time.perf_counter() if sweep else START, goes_on=goes_on)
    except InputError as error:
        if follows():
            sys.exit(0)  # the first process says the same; another status makes Lightning kill it before it does
        return _fail(str(error), folder, sweep)
    except Exception as fault:
        if (words := explain(fault, folder)) is not None:
            return _fail(f"{words}; then {command_to_resume(folder)}", folder, sweep)
        log.exception("the run failed")
        if not sweep:
            sys.exit(1)
        # The launchers send it from process to process, which not every exception survives.
        raise CompactHydraException(f"error: {one_line(fault)}; its traceback is in {folder}/train.log") from None
    except SystemExit as stop:
        if not follows():
            why = f"stopped by {stop.name}" if isinstance(stop, Stopped) else "stopped"
            if (folder / RECORD).exists():
                log.error("%s; to go on: %s", why, command_to_resume(folder))
            else:
                log.error("%s before anything was fitted", why)
                remove_traces(folder)
        if sweep and not sweeps.in_turn(settings.launcher):
            raise CompactHydraException(f"error: the job of {folder} was stopped") from None  # the others go on
        sys.exit(stop.code or 143)


def _fail(words: str, folder: Path, sweep: bool) -> NoReturn:
    """End a run, or a job of a sweep, on one line."""
    if sweep:
        log.error("%s", words)
        raise CompactHydraException(f"error: {words}") from None
    remove_traces(folder)
    sys.exit(f"error: {words}")


def main() -> None:
    """The command line: help, a run, or a sweep, which ends on its table; the exit status is 0 if all went well."""
    if "kernel_launcher" in sys.argv[0]:  # a notebook's command line is not ours
        run()
        return
    mend_streams()
    words = sys.argv[1:]
    if words in (["--help"], ["-h"]):
        print(usage())
        return
    if not any(word.lstrip("+").startswith(("experiment=", "hydra.mode=", "--config", "-c")) for word in words):
        # Only those say a mode; to ask the configuration for one, Hydra composes all of it once more.
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    stop_when_asked()
    faulthandler.enable(2)  # what kills the process from within says where, such as a mapped file that is truncated
    logging.raiseExceptions = False  # a log that cannot be written is not worth a screen of tracebacks a line
    try:
        sys.argv[1:] = words_of(words)
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
        KeyboardInterrupt: it was stopped, and can go on.
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
