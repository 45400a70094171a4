"""What a run finds: its figures with all they rest on, printed, shown and saved."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nvf.dashboards.show import log_hparams, show, texts_of
from nvf.data.queries import QueryBatch, fingerprint
from nvf.evaluation.evaluate import Evaluation, against, evaluate, evaluate_index
from nvf.evaluation.gradients import audit_gradients
from nvf.evaluation.report import remarks, table
from nvf.files.atomic import atomic_write
from nvf.files.records import write_record
from nvf.models.ann_index import build_index
from nvf.models.attention import SoftAttention
from nvf.models.pipeline import Pipeline
from nvf.ops.ranks import criterion
from nvf.runs.versions import versions
from nvf.training.build import Built
from nvf.training.select import Chosen, FittedJointly

log = logging.getLogger("nvf")


class Stopwatch:
    """The seconds that the parts of a run take, by their names, and all of it."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.seconds: dict[str, float | None] = {"attention": None, "reranker": None}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add how long the block took."""
        start = time.perf_counter()
        yield
        self.seconds[name] = (self.seconds.get(name) or 0) + time.perf_counter() - start


def evaluated(built: Built, model: SoftAttention | Pipeline, queries: QueryBatch, *, title: str) -> Evaluation:
    """What a model reaches on the run's validation or test queries."""
    return evaluate(model, queries, k=built.k, oracle=built.source.oracle, seen=built.seen, title=title)


def save(
    config: dict[str, Any],
    built: Built,
    model: SoftAttention | Pipeline,
    chosen: Chosen,
    joint: FittedJointly | None,
    before: Evaluation | None,
    gradients: dict[str, Any],
    watch: Stopwatch,
    folder: Path,
) -> float:
    """Save the pipeline, evaluate, and write and print what was found.

    Args:
        config: of the run, to be written down.
        before: what the stages reached before joint training.
        gradients: in the training of each stage.

    Returns:
        The objective for sweepers.
    """
    source, index, took = built.source, None, {}
    if isinstance(model, Pipeline):
        start = time.perf_counter()
        model.index = build_index(model.attention.keys(), **config["index"])
        took = {"build_seconds": time.perf_counter() - start}
        model.save(folder / "pipeline")
    with watch("evaluation"):
        val_queries, test_queries = built.queries("val"), built.queries("test")  # once: to draw them may be a search
        val = evaluated(built, model, val_queries, title="validation")
        test = evaluated(built, model, test_queries, title="test")
        if isinstance(model, Pipeline) and model.index is not None:
            index = {**evaluate_index(model, *test_queries), **took}
        audit = audit_gradients(model, val_queries)
        _show(config, built, model, val_queries, val, gradients, folder)
    together = None
    if joint is not None and before is not None:
        won = against(test.answered, before.answered)
        together = {"kept": joint.kept, "before": before.figures, "against": won}
    total = time.perf_counter() - watch.started
    results = {
        "test": test.figures,
        "val": val.figures,
        "against_exact": test.against_exact,
        "joint": together,
        "selection": chosen.tried,
        "attention_fitted_by": chosen.fitted_by,
        "cut": {stage: how.cut for stage, how in (("attention", chosen), ("joint", joint)) if how and how.cut},
        "duplicates": getattr(source, "duplicates", None),
        "merged": {"rows": source.memory.given - len(source.memory), "queries": getattr(source, "merged", 0)},
        "collection_distance": source.memory.distance,
        "log": model.evidence.law() if isinstance(model, Pipeline) and model.evidence is not None else None,
        "index": index,
        "gradients": {**audit, "training": {stage: norms for stage, norms in gradients.items() if norms}},
        "seconds": {**watch.seconds, "total": total},
        "config": config,
        "versions": versions(),
        "memory": source.memory.fingerprint,
        "queries": fingerprint(test_queries),
    }
    log_hparams(results, folder)
    source.memory.check_unchanged()
    with atomic_write(folder / "answered.npy") as partial, partial.open("wb") as file:
        np.save(file, test.answered.cpu().numpy())
    write_record(folder / "results.json", results)
    log.info("\n%s\n", table(results, len(test.answered)))
    for line in remarks(results):
        log.warning(line)
    log.info("%.0f s; everything is in %s", total, folder)
    figures: Any = val.figures["pipeline"] or val.figures["attention"]
    return float(figures[criterion(val_queries.targets)]["value"])


def _show(
    config: dict[str, Any],
    built: Built,
    model: SoftAttention | Pipeline,
    queries: QueryBatch,
    val: Evaluation,
    gradients: dict[str, Any],
    folder: Path,
) -> None:
    """Draw what TensorBoard shows beside the curves."""
    memory = built.source.memory
    texts = texts_of(config["data"].get("dir"), memory.given)
    if texts is not None and memory.vector_of_row is not None:
        texts = [texts[vector] for vector in memory.vector_of_row.tolist()]
    data = config["data"]
    clustered = data["name"] == "clustered"
    labels = [row // data["rows_per_cluster"] for row in range(memory.given)] if clustered else None
    logged = max((norms["steps"] for norms in gradients.values() if norms), default=0)
    steps = logged * (config["trainer"].get("log_every_n_steps") or 1) or 1
    try:
        show(model, queries, val, config["dashboards"], folder, steps=steps, texts=texts, labels=labels)
    except Exception:  # a picture is not worth a run
        log.exception("not all of what TensorBoard shows could be drawn; the figures below are complete")
