"""The entry, `python -m nvf.train`: build the data, fit the stages, evaluate, save."""

import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nvf.errors import InputError

if TYPE_CHECKING:
    from nvf.attention import SoftAttention

START = time.perf_counter()
HERE = Path(__file__).resolve()
CARRIED = HERE.parent / "conf"  # in a wheel
CONF = CARRIED if CARRIED.is_dir() else HERE.parents[2] / "conf"
log = logging.getLogger("nvf")


def train(config: dict[str, Any], folder: Path, started: float) -> float:
    """One run, from plain settings to a whole run folder.

    Args:
        config: the composed configuration, resolved, as plain containers.
        folder: of the run; exists.
        started: the `time.perf_counter()` from which the run's total seconds count.

    Returns:
        The objective for sweepers: Top-1 on validation of what was fitted last.
    """
    # Imported here so that --help and a config error answer without importing torch.
    from nvf.dashboards import log_hparams
    from nvf.evaluation import against, evaluate
    from nvf.gradients import audit_gradients
    from nvf.pipeline import Pipeline
    from nvf.report import remarks, table
    from nvf.results import versions, write_results
    from nvf.selection import fit_attention, fit_joint, fit_reranker
    from nvf.stages import build_source, check, fixed_queries, seen_rows

    quiet()
    source = build_source(config)
    check(config, source)

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
        with timed(seconds, "evaluation"):
            before = evaluate(model, test, **known, title="before joint training")
        with timed(seconds, "joint"):
            assert isinstance(model, Pipeline)
            training["joint"], kept = fit_joint(config, source, model, folder)
    if isinstance(model, Pipeline):
        model.save(folder / "pipeline")
    with timed(seconds, "evaluation"):
        val_found = evaluate(model, val, **known, title="validation")
        found = evaluate(model, test, **known, title="test")
        if before is not None:
            joint = {"kept": kept, "before": before.figures, "against": against(found.answered, before.answered)}
        gradients = audit_gradients(model, val)
    total = time.perf_counter() - started
    results = {
        "test": found.figures,
        "val": val_found.figures,
        "against_exact": found.against_exact,
        "joint": joint,
        "selection": chosen.tried,
        "duplicates": getattr(source, "duplicates", None),
        "gradients": {**gradients, "training": {stage: norms for stage, norms in training.items() if norms}},
        "seconds": {**seconds, "total": total},
        "config": config,
        "versions": versions(),
        "memory": source.memory.fingerprint,
    }
    log_hparams(results, folder)
    write_results(results, folder / "results.json")

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
        return train(config, folder, time.perf_counter() if sweep else START)
    except InputError as error:
        if not sweep:
            remove_traces(folder)
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        log.error("%s", error)
        raise CompactHydraException(f"error: {error}") from None
    except Exception:
        log.exception("the run failed")
        if not sweep:
            sys.exit(1)
        raise
    except SystemExit as stop:  # Lightning's answer to SIGTERM has no status, and a sweep would end with success
        log.error("stopped; what was saved is in %s", folder)
        sys.exit(stop.code or 143)


def quiet() -> None:
    """Keep the screen for what a user wants to know; Lightning sets its level when it is imported."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch.utilities._pytree")  # its use of torch
    for message in ("does not have many workers", "exists and is not empty", "smaller than the logging interval"):
        warnings.filterwarnings("ignore", f".*{message}")


def remove_traces(folder: Path) -> None:
    """Remove what Hydra wrote for a run that never began, and the folders that this leaves empty."""
    if not {path.name for path in folder.iterdir()} <= {".hydra", "train.log"}:
        return  # it did begin, or the folder holds something else
    shutil.rmtree(folder)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()


if __name__ == "__main__":
    main()
