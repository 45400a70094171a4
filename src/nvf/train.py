"""The entry, `python -m nvf.train`: build the data, fit the stages, evaluate, save."""

import faulthandler
import logging
import math
import os
import shutil
import sys
import time
import warnings
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

from nvf import sweeps
from nvf.errors import InputError, one_line
from nvf.faults import check_place, explain
from nvf.resumption import LOCK, RECORD, recorded, requeued
from nvf.stopping import Stopped, command_to_resume, restarted, stop_when_asked
from nvf.whole import written_whole

if TYPE_CHECKING:
    from nvf.attention import SoftAttention

START = time.perf_counter()
HERE = Path(__file__).resolve()
CARRIED = HERE.parent / "conf"  # in a wheel
CONF = CARRIED if CARRIED.is_dir() else HERE.parents[2] / "conf"
log = logging.getLogger("nvf")


def train(config: dict[str, Any], folder: Path, started: float, *, goes_on: bool = False) -> float:
    """One run, from plain settings to a whole run folder.

    Args:
        config: the composed configuration, resolved, as plain containers.
        folder: of the run; exists.
        started: the `time.perf_counter()` from which the run's total seconds count.
        goes_on: with what a run of these settings left in the folder when it was stopped, however that was.

    Returns:
        The objective for sweepers: Top-1 on validation of what was fitted last.
    """
    if follows():
        os.environ["TQDM_DISABLE"] = "1"  # which is read when it is imported
    # Imported here so that --help and a config error answer without importing torch.
    import numpy as np

    from nvf.computing import set_up_torch
    from nvf.dashboards import check_dashboards, log_hparams, show, texts_of
    from nvf.evaluation import against, evaluate, evaluate_index
    from nvf.gradients import audit_gradients
    from nvf.index import build_index, check_index
    from nvf.pipeline import Pipeline
    from nvf.processes import agreed, part_processes, start_processes
    from nvf.queries import fingerprint
    from nvf.records import write_record
    from nvf.report import remarks, table
    from nvf.results import versions
    from nvf.resumption import begin
    from nvf.selection import FOLDS, fit_attention, fit_joint, fit_reranker
    from nvf.stages import build_source, check, clusters, fixed_queries, seen_rows

    quiet()
    set_up_torch(threads=config["threads"], deterministic=config["deterministic"])
    check_dashboards(config["dashboards"])
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
    with timed(seconds, "attention"):
        chosen = fit_attention(config, source, folder)
        training["attention"] = chosen.gradients
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
            training["joint"], kept = fit_joint(config, source, model, folder)
    part_processes()
    if rank:
        return math.nan  # the first process evaluates and saves what all of them have fitted
    built: dict[str, float | None] = {}
    if isinstance(model, Pipeline):
        with timed(built, "build_seconds"):
            model.index = build_index(model.keys(), **config["index"])
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
        texts = texts_of(config["data"].get("dir"), len(source.memory))
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
        "duplicates": getattr(source, "duplicates", None),
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
    return (val_found.figures["pipeline"] or val_found.figures["attention"])["top1"]["value"]


@contextmanager
def timed(seconds: dict[str, float | None], name: str) -> Iterator[None]:
    """Add how long the block took."""
    start = time.perf_counter()
    yield
    seconds[name] = (seconds.get(name) or 0) + time.perf_counter() - start


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> float:
    """Compose the configuration, run it, and turn what goes wrong into words and an exit status."""
    settings = HydraConfig.get()
    folder, sweep = Path(settings.runtime.output_dir), settings.mode is RunMode.MULTIRUN
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
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
    print(f"error: {words}", file=sys.stderr)
    sys.exit(1)


def entry() -> None:
    """The command line: help, a run, or a sweep, which ends on its table; the exit status is 0 if all went well."""
    words = sys.argv[1:]
    if words in (["--help"], ["-h"]):
        print(usage())
        return
    if not any(word.lstrip("+").startswith(("experiment=", "hydra.mode=", "--config", "-c")) for word in words):
        # Only those say a mode; to ask the configuration for one, Hydra composes all of it once more.
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    stop_when_asked()
    faulthandler.enable()  # what kills the process from within says where, such as a mapped file that is truncated
    logging.raiseExceptions = False  # a log that cannot be written is not worth a screen of tracebacks a line
    try:
        sys.argv[1:] = words_of(words)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    try:
        main()
    except SystemExit as stop:
        if stop.code not in (130, 143):
            sweeps.finish()
        raise
    sweeps.finish()


def words_of(words: list[str]) -> list[str]:
    """The words of the command line, with the folder to go on in, where there is one.

    Raises:
        InputError: there is nothing to go on with, other settings than the run's own, or no place for a run.
    """
    place = next(
        (word.partition("=")[2] for word in words if word.startswith(("hydra.run.dir=", "hydra.sweep.dir="))), None
    )
    resume = next((word.partition("=")[2] for word in words if word.startswith("resume=")), "false")
    several = any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in words)
    if any(word.startswith("-") and word not in ("-m", "--multirun") for word in words) or follows():
        return words  # asks Hydra for something else; or the first process has seen to it
    if resume.lower() == "true":
        before = None if place else sweeps.earlier(words)
        at = next(number for number, word in enumerate(words) if word.startswith("resume="))
        return words if before is None else [*words[:at], f"hydra.sweep.dir={before}", *words[at:]]
    if resume.lower() == "false" and not several and (folder := requeued(place)) is not None:
        resume = str(folder)
    elif resume.lower() == "false":
        check_place(Path(place) if place and "${" not in place else Path("outputs"))
        return words
    others = [word for word in words if not word.startswith(("resume=", "hydra."))]
    if others and requeued(place) is None:
        raise InputError(
            f"resume={resume} goes on with the run's own settings; leave out {' '.join(others)}, or start anew"
        )
    recorded(Path(resume))  # or there is nothing to go on with
    return [f"resume={quoted(resume)}", f"hydra.run.dir={quoted(resume)}", "hydra.output_subdir=null"]


def quoted(text: str) -> str:
    """Text as a value in Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def usage() -> str:
    """What `--help` prints: the choices and the settings as they stand in conf/."""

    def names(group: Path) -> str:
        return ", ".join(sorted(choice.stem for choice in group.glob("*.yaml")))

    groups = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    settings = (CONF / "config.yaml").read_text().partition("\n\n")[2].partition("\nhydra:")[0]
    return "\n".join(
        [
            "python -m nvf.train name=value ...              one run",
            "python -m nvf.train -m name=value,value ...     a sweep: every combination, a table at the end",
            "",
            f"choices, each a file in {CONF}:",
            *(f"  {group.name + '=':13}{names(group)}" for group in groups),
            "",
            "settings beside theirs, as attention.lr=1e-3 is one of theirs:",
            *(f"  {line}" for line in settings.strip().splitlines()),
            "",
            f"jobs of a sweep side by side: hydra/launcher={names(CONF / 'hydra/launcher')}",
            "a run's settings, composed: --cfg job; Hydra's own words: --hydra-help",
        ]
    )


def follows() -> bool:
    """Whether this process is one of several in a run, and not the first, which says what there is to say."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK"))


def quiet() -> None:
    """Keep the screen for what a user wants to know; Lightning sets its level when it is imported."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # that it has looked for fonts is no news
    warnings.filterwarnings("ignore", module="lightning.pytorch.utilities._pytree")  # its use of torch
    for message in (
        "does not have many workers",
        "and your dataloader is not resumable",  # it goes on at the right step
        "exists and is not empty",
        "smaller than the logging interval",
        "It is recommended to use `self.log.*sync_dist=True",  # our metrics add up over processes by themselves
        "`broadcast_buffers` is deprecated",  # its successor is newer than the oldest torch that we run on
    ):
        warnings.filterwarnings("ignore", f".*{message}")


def remove_traces(folder: Path) -> None:
    """Remove what was written for a run that never began to fit, and the folders that this leaves empty."""
    if not {path.name for path in folder.iterdir()} <= {".hydra", "train.log", RECORD, LOCK, "checkpoints"}:
        return  # the folder holds something else
    if any(path.is_file() for path in folder.glob("checkpoints/**/*")):
        return  # it did begin
    shutil.rmtree(folder)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()


if __name__ == "__main__":
    from nvf.train import entry  # under its name, so that other processes find what they are sent

    entry()
