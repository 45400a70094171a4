"""What TensorBoard shows beside the curves that are logged while training."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from nvf.data.queries import QueryBatch
from nvf.errors import InputError, check_number
from nvf.evaluation.evaluate import METHODS, Evaluation
from nvf.models.attention import SoftAttention
from nvf.models.evidence import evenly
from nvf.models.pipeline import Pipeline
from nvf.runs.comparison.table import Comparison
from nvf.runs.curves import CHART, FOLDER, LINES
from nvf.runs.settings import flatten
from nvf.statistics import METRICS

SETTINGS = ("stage", "data", "queries", "attention", "reranker", "joint", "seed", "k")
SWITCHES = ("levels", "candidates", "reliability", "projector")
LEVELS = {"exact": "exact", "oracle": "oracle", "coverage": "coverage"}  # lines of CHART, by what they show
FITTED = {"attention": LINES["attention"], "pipeline": LINES["reranker"]}  # which are curves where they were fitted


def log_hparams(results: Mapping[str, Any], folder: Path) -> None:
    """Write one row of the HPARAMS tab: the run's settings beside its test figures, `hp/method/metric`."""
    figures = results["test"]
    metrics = {
        f"hp/{method}/{metric}": figures[method][metric]["value"]
        for method in reversed(METHODS)  # the tab shows only the first column at once
        if figures[method] is not None
        for metric in METRICS
    }
    metrics["hp/coverage"] = figures["coverage"]["value"]
    for method, error in figures["calibration_error"].items():
        metrics[f"hp/{method}/calibration_error"] = error["value"]
    leaves = flatten({group: results["config"][group] for group in SETTINGS})
    settings = {name: leaf if isinstance(leaf, int | float | str) else str(leaf) for name, leaf in leaves.items()}
    with SummaryWriter(str(folder)) as writer:
        writer.add_hparams(settings, metrics, run_name=".")


def check_dashboards(settings: Mapping[str, Any]) -> None:
    """Raise an InputError unless each switch is true or false, and each number within its limits."""
    for name in SWITCHES:
        if not isinstance(settings[name], bool):
            raise InputError(f"dashboards.{name}={settings[name]} is neither true nor false; false leaves it out")
    for name, low, high in (("queries", 1, 40), ("projector_points", 4, 20_000)):
        remedy = f"{low} to {high} are shown well"
        check_number(f"dashboards.{name}", settings[name], minimum=low, below=high + 1, whole=True, remedy=remedy)


@torch.no_grad()
def show(
    model: SoftAttention | Pipeline,
    batch: QueryBatch,
    found: Evaluation,
    examples: Mapping[str, Any],
    settings: Mapping[str, Any],
    folder: Path,
    *,
    steps: int = 1,
    texts: Sequence[str] | None = None,
) -> None:
    """Write what TensorBoard shows of a fitted model: level lines on its first chart, images, the projector's points.

    The evaluation `found`, and `examples`, see `examples_of`, are of the same validation queries; the settings are
    those of conf/dashboards. The level lines are `steps` long. Texts are of the N rows.
    """
    if settings["levels"]:
        _add_levels(found, folder / FOLDER, max(1, steps))
    if not any(settings[name] for name in SWITCHES[1:]):
        return
    from matplotlib import rc_context  # takes a second to import

    from nvf.dashboards.figures import STYLE, draw

    with SummaryWriter(str(folder)) as writer, rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for a letter that the font lacks
        for tag, figure, step in draw(examples, settings):
            writer.add_figure(tag, figure, step)
        if settings["projector"]:
            attention = model.attention if isinstance(model, Pipeline) else model
            _add_points(writer, attention, batch, settings["projector_points"], texts)


def show_sweep(comparison: Comparison, folder: Path) -> None:
    """Show a comparison in TensorBoard as a run of the sweep's folder: two images, and the table as a text."""
    from matplotlib import rc_context

    from nvf.runs.comparison.figure import STYLE, draw, draw_curves

    for left in folder.glob("events.out.tfevents.*"):  # of the same sweep, before it was resumed
        left.unlink()
    with SummaryWriter(str(folder)) as writer, rc_context(STYLE):
        writer.add_figure("figures/1_curves", draw_curves(comparison))
        writer.add_figure("figures/2_comparison", draw(comparison))
        writer.add_text("comparison", comparison.text().replace(r"\<", "&lt;"))  # its Markdown has no such escape


def _add_levels(found: Evaluation, folder: Path, steps: int) -> None:
    """Draw level lines on CHART, each a run of its own: ceilings, baselines, and a stage that was not fitted here."""
    absent = {name: line for name, line in FITTED.items() if not (folder / line).exists()}
    for name, line in (LEVELS | absent).items():
        if (level := found.figures[name]) is not None:
            with SummaryWriter(str(folder / line), purge_step=0) as writer:  # a resumed run writes it again
                # Not two points alone: of a chart's values, TensorBoard leaves the outer tenth out of sight.
                for step in np.unique(np.linspace(0, steps, 50, dtype=int)).tolist():
                    writer.add_scalar(CHART, (level if name == "coverage" else level["top1"])["value"], step)


def _add_points(
    writer: SummaryWriter, attention: SoftAttention, batch: QueryBatch, limit: int, texts: Sequence[str] | None
) -> None:
    """Write at most `limit` points, at least 4, each with its kind and the row that it is or is answered by.

    A quarter are queries, a quarter the same queries transformed, and the rest are their answers and other rows.
    """
    memory, places = attention.memory, evenly(len(batch.queries), limit // 4)
    raw, answers = batch.queries[places], batch.targets[places].amax(dim=-1)  # -1 is padding
    rows = torch.cat([answers, evenly(len(memory), limit - 3 * len(places)).to(answers.device)]).unique()
    transformed = F.normalize(attention.moved(raw), dim=-1)
    points = torch.cat([memory.take_keys(rows), memory.aligned_queries(raw), transformed])
    kinds = ["row"] * len(rows) + ["query"] * len(raw) + ["transformed query"] * len(raw)
    lines: list[list[Any]] = [*map(list, zip(kinds, [*rows.tolist(), *answers.tolist() * 2], strict=True))]
    if texts is not None:
        lines = [[*line, " ".join(texts[line[1]][:100].split())] for line in lines]  # a tab would separate columns
    header = ["kind", "row", "text"][: len(lines[0])]  # the first colours and names the points
    numbers = points.double().cpu().numpy().round(6)  # the file is text, of fewer digits
    writer.add_embedding(numbers, lines, metadata_header=header, tag="rows and queries", global_step=0)
