"""What a run finds: its figures with all they depend on, printed, shown and saved."""

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nvf.dashboards.examples import examples_of
from nvf.dashboards.show import log_hparams, show
from nvf.data.queries import QueryBatch, each, fingerprint
from nvf.evaluation.calibration import fit_words
from nvf.evaluation.evaluate import Evaluation, against, evaluate, evaluate_index
from nvf.evaluation.gradients import audit_gradients
from nvf.evaluation.report import remarks, table
from nvf.files.atomic import atomic_write
from nvf.files.records import write_record
from nvf.models.ann_index import build_index
from nvf.models.attention import SoftAttention
from nvf.models.pipeline import Pipeline
from nvf.ops.ranks import criterion
from nvf.runs.resume import versions
from nvf.training.build import Built
from nvf.training.fit import steps_of
from nvf.training.select import Chosen, FittedJointly

log = logging.getLogger("nvf")


@dataclass
class Fitted:
    """A run, and what it has fitted so far."""

    built: Built
    folder: Path
    started: float  # a `time.perf_counter()`
    chosen: Chosen = field(init=False)  # stage 1
    model: Any = field(init=False)  # what was fitted last: a SoftAttention or a Pipeline
    joint: FittedJointly | None = None
    before: Evaluation | None = None  # on test, without joint training
    gradients: dict[str, Any] = field(default_factory=dict)  # their norms in the training of each stage
    seconds: dict[str, float | None] = field(default_factory=lambda: {"attention": None, "reranker": None})

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to those of a part."""
        start = time.perf_counter()
        yield
        self.seconds[name] = (self.seconds.get(name) or 0) + time.perf_counter() - start

    def evaluated(self, queries: QueryBatch, split: str) -> Evaluation:
        """Evaluate the model on the queries of `val` or `test`."""
        built = self.built
        given: dict[str, Any] = {"oracle": built.source.oracle, "seen": built.seen, "hybrid": self.hybrid}
        given["references"] = getattr(built.source, "references", {}).get(split)
        return evaluate(self.model, queries, k=built.config["k"], title=f"evaluation ({split})", **given)

    @functools.cached_property
    def hybrid(self) -> SoftAttention | None:
        """Exact search with the words of texts, weighed on validation queries: a baseline."""
        held_out = self.built.queries("val")
        if held_out.words is None:
            return None
        hybrid = self.built.exact
        fit_words(hybrid, held_out, ("text",))
        return hybrid

    @functools.cached_property
    def judged(self) -> tuple[Any, ...]:
        """The queries of val, how the model answers them, the same of test, and the norms of the model's gradients."""
        val, test = (self.built.queries(split) for split in ("val", "test"))  # to draw them may be a search
        found = self.evaluated(val, "val"), self.evaluated(test, "test")
        return val, found[0], test, found[1], audit_gradients(self.model, val)

    def leave_devices(self) -> None:
        """Judge the model while processes share its memory, if they do; then go on with all of it in this process."""
        if self.model.memory.shared:
            from nvf.training.sharded import whole  # DTensor takes seconds to import

            val, of_val, test, of_test, audit = self.judged
            self.judged = each(val, Tensor.cpu), of_val, each(test, Tensor.cpu), of_test, audit
            self.model = whole(self.model)
            self.built.source.memory = self.model.memory


def save(run: Fitted) -> float:
    """Save the pipeline, evaluate, write and print the results, and return the objective for sweepers."""
    config, model, source, index = run.built.config, run.model, run.built.source, None
    if isinstance(model, Pipeline):
        start = time.perf_counter()
        model.index = build_index(model.attention.keys(), **config["index"])
        took = time.perf_counter() - start
        model.save(run.folder / "pipeline")
    with run.timed("evaluation"):
        val_queries, val, test_queries, test, audit = run.judged
        if isinstance(model, Pipeline) and model.index is not None:
            index = {**evaluate_index(model, test_queries.queries, test_queries.targets), "build_seconds": took}
        _show(run, val_queries, val)
    joint = None
    if run.joint is not None and run.before is not None:
        won = against(test.answered, run.before.answered)
        joint = {"kept": run.joint.kept, "before": run.before.figures, "against": won}
    total = time.perf_counter() - run.started
    results = {
        "test": test.figures,
        "val": val.figures,
        "against_exact": test.against_exact if test.figures["aligned"] is None else None,
        "against_aligned": None if test.figures["aligned"] is None else test.against_exact,
        "aligned": run.built.aligned,
        "joint": joint,
        "selection": run.chosen.tried,
        "attention_fitted_by": run.chosen.fitted_by,
        "cut": {stage: how.cut for stage, how in (("attention", run.chosen), ("joint", run.joint)) if how and how.cut},
        "duplicates": getattr(source, "duplicates", None),
        "merged": {"rows": source.memory.given - len(source.memory), "queries": getattr(source, "merged", 0)},
        "collection_distance": source.memory.distance,
        "log": model.evidence.law() if isinstance(model, Pipeline) and model.evidence is not None else None,
        "index": index,
        "plan": config["data"].get("plan"),
        "gradients": {**audit, "training": {stage: norms for stage, norms in run.gradients.items() if norms}},
        "seconds": {**run.seconds, "total": total},
        "config": run.built.asked,
        "versions": versions(),
        "memory": source.memory.fingerprint,
        "queries": fingerprint(test_queries),
    }
    log_hparams(results, run.folder)
    source.memory.check_unchanged()
    with atomic_write(run.folder / "answered.npy") as partial, partial.open("wb") as file:
        np.save(file, test.answered.cpu().numpy())
    write_record(run.folder / "results.json", results)
    made = functools.partial(table, results, len(test.answered))
    log.info("\n%s\n", made(), extra={"on_terminal": made})
    for line in remarks(results):
        log.warning(line)
    log.info("%.0f s; everything is in %s", total, run.folder)
    figures: Any = val.figures["pipeline"] or val.figures["attention"]
    return float(figures[criterion(val_queries.targets)]["value"])


def _show(run: Fitted, queries: QueryBatch, val: Evaluation) -> None:
    """Write examples.json, and draw what TensorBoard shows beside the curves."""
    config, texts = run.built.config, getattr(run.built.source, "texts", None)
    try:
        examples = examples_of(val, run.built.source, count=config["dashboards"]["queries"])
        write_record(run.folder / "examples.json", examples)
        show(
            run.model, queries, val, examples, config["dashboards"], run.folder, steps=steps_of(run.folder), texts=texts
        )
    except Exception:  # a picture is not worth a run
        log.exception("not all of what TensorBoard shows could be drawn; the figures below are complete")
