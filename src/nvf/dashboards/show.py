"""What TensorBoard shows beside the curves that are logged while training."""

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from nvf.dashboards.projector import add_points
from nvf.data.queries import QueryBatch
from nvf.errors import InputError, check_number, one_line
from nvf.evaluation.evaluate import BINS, METHODS, Evaluation, Outcomes
from nvf.models.attention import SoftAttention
from nvf.models.pipeline import Pipeline
from nvf.statistics import METRICS

SETTINGS = ("stage", "data", "queries", "attention", "reranker", "joint", "seed", "k")
SWITCHES = ("scalars_page", "candidates", "heat_map", "ranks", "reliability", "projector")
NUMBERS = {"queries": (1, 40), "projector_points": (4, 20_000)}
COLUMNS = 40  # of the heat map
CHARACTERS = 26  # of a row's name in a figure
CEILINGS = ("exact", "oracle", "coverage")
PAGE = {
    "both stages and their ceilings, on validation queries": {
        title: ["Multiline", [f"val/{metric}$", *(f"{metric}/{name}$" for name in CEILINGS)]]
        for metric, title in (("top1", "Top-1"), ("top5", "Top-5"))
    },
    "each stage": {
        "loss on validation queries": ["Multiline", ["val/loss$"]],
        "loss in training": ["Multiline", ["train/loss$"]],
        "norms of the gradients": ["Multiline", ["gradients/"]],
    },
}
log = logging.getLogger("nvf")


def log_hparams(results: Mapping[str, Any], folder: Path) -> None:
    """Write one row of the HPARAMS tab: the run's settings beside its test figures, `hp/method/metric`."""
    figures = results["test"]
    metrics = {
        f"hp/{method}/{metric}": figures[method][metric]["value"]
        for method in reversed(METHODS)  # the tab shows the first by itself
        if figures[method] is not None
        for metric in METRICS
    }
    metrics["hp/coverage"] = figures["coverage"]["value"]
    for method, error in figures["calibration_error"].items():
        metrics[f"hp/{method}/calibration_error"] = error["value"]
    settings = _flat({name: results["config"][name] for name in SETTINGS})
    with SummaryWriter(str(folder)) as writer:
        writer.add_hparams(settings, metrics, run_name=".")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def check_dashboards(settings: Mapping[str, Any]) -> None:
    """Raise an InputError unless every setting is known, and a switch or a number within its limits."""
    for name, value in settings.items():
        if name in NUMBERS:
            low, high = NUMBERS[name]
            remedy = f"{low} to {high} are shown well"
            check_number(f"dashboards.{name}", value, minimum=low, below=high + 1, whole=True, remedy=remedy)
        elif name not in SWITCHES:
            raise InputError(f"dashboards.{name}={value} is unknown; choose one of {', '.join((*SWITCHES, *NUMBERS))}")
        elif not isinstance(value, bool):
            raise InputError(f"dashboards.{name}={value} is neither true nor false; false leaves it out")


def texts_of(folder: str | Path | None, rows: int) -> list[str] | None:
    """Read the rows' texts, lines {"text": ...} of a folder's texts.jsonl; None, with a warning, if not one each."""
    path = None if folder is None else Path(folder) / "texts.jsonl"
    if path is None or not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8-sig") as file:
            texts = [json.loads(line)["text"] for line in file if line.strip()]
        for text in texts:
            str.encode(text)  # fails for half a surrogate pair, and for what is no text
        if len(texts) != rows:
            raise ValueError(f"it has {len(texts)} texts for {rows} rows")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as fault:
        log.warning("%s: %s; the figures name rows by number", path, one_line(fault))
        return None
    return texts


def show(
    model: SoftAttention | Pipeline,
    batch: QueryBatch,
    found: Evaluation,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    steps: int = 1,
    texts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
) -> None:
    """Write what TensorBoard shows of a fitted model: a page of scalars, images, and the projector's points.

    Args:
        model: stage 1 alone, or the pipeline.
        batch: validation queries.
        found: what the model reaches on them.
        settings: of conf/dashboards.
        folder: the run's; the folders in it hold the stages' curves.
        steps: of the longest stage, as the width of level lines.
        texts: of the N rows.
        labels: the clusters of the N rows.
    """
    if not any(settings[name] for name in SWITCHES):
        return
    from matplotlib import rc_context  # which takes a second to import

    from nvf.dashboards.figures import STYLE

    with SummaryWriter(str(folder)) as writer, rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of scripts that the font lacks: a box stands for them
        if settings["scalars_page"]:
            _add_scalars_page(writer, found.figures, steps)
        _add_figures(writer, model.eval(), batch, found, settings, texts)
        if settings["projector"]:
            attention = model.attention if isinstance(model, Pipeline) else model
            add_points(writer, attention, batch, settings["projector_points"], texts, labels)


def _add_scalars_page(writer: SummaryWriter, figures: Mapping[str, Any], steps: int) -> None:
    """Write the page, which shows the stages' own curves, and the ceilings as level lines."""
    writer.add_custom_scalars(PAGE)
    for metric in ("top1", "top5"):
        for name in CEILINGS:
            if figures[name] is not None:
                ceiling = figures[name] if name == "coverage" else figures[name][metric]
                for step in (0, steps):
                    writer.add_scalar(f"{metric}/{name}", ceiling["value"], step)


def _add_figures(
    writer: SummaryWriter,
    model: SoftAttention | Pipeline,
    batch: QueryBatch,
    found: Evaluation,
    settings: Mapping[str, Any],
    texts: Sequence[str] | None,
) -> None:
    from nvf.dashboards import figures

    outcomes = found.outcomes
    chosen = exemplary(outcomes, settings["queries"])
    if settings["candidates"]:
        figure = figures.draw_candidates([_panel(outcomes, query, texts) for query in chosen.tolist()])
        writer.add_figure("figures/1_candidates", figure)
    if settings["heat_map"]:
        candidates, targets = (part.numpy()[chosen] for part in (outcomes.candidates, outcomes.targets))
        columns = figures.heat_map_columns(candidates, targets, COLUMNS)
        maps = {name: part[:, columns] for name, part in _probabilities(model, batch.queries[chosen]).items()}
        right = (targets[:, None, :] == columns[None, :, None]).any(axis=-1)  # (n, c)
        names = [f"query {query}" for query in chosen], [_name(row, texts) for row in columns.tolist()]
        writer.add_figure("figures/2_attention", figures.draw_heat_map(maps, right, *names))
    if settings["ranks"]:
        ranks = {name: part.numpy() for name, part in outcomes.ranks.items() if name != "oracle"}
        writer.add_figure("figures/3_ranks", figures.draw_ranks(ranks, len(model.memory)))
    if settings["reliability"]:
        confidences = {name: part.numpy() for name, part in outcomes.confidences.items()}
        right = {name: outcomes.share_right(name).numpy() for name in confidences}
        errors = {name: found.figures["calibration_error"][name]["value"] for name in confidences}
        writer.add_figure("figures/4_reliability", figures.draw_reliability(confidences, right, errors, BINS))


def exemplary(outcomes: Outcomes, count: int) -> np.ndarray:
    """Choose at most `count` queries: some that the last method won over the one before it, some it lost, and others.

    Each kind has a third of the places, and those that another kind does not fill.
    """
    now, was = ((outcomes.ranks[method] == 1).numpy() for method in outcomes.compared)
    kinds = np.where(now == was, 2, np.where(now, 0, 1))  # won, lost, alike
    turns = np.zeros(len(kinds), dtype=int)  # a query's place among those of its kind
    for kind in range(3):
        turns[kinds == kind] = np.arange((kinds == kind).sum())
    chosen = np.lexsort((kinds, turns))[:count]
    return chosen[kinds[chosen].argsort(kind="stable")]


def _panel(outcomes: Outcomes, query: int, texts: Sequence[str] | None) -> Any:
    from nvf.dashboards.figures import Panel

    after, before = (int(outcomes.ranks[method][query]) for method in outcomes.compared)
    verdicts = {(True, True): "right as before", (False, True): "won", (True, False): "lost"}
    verdict = verdicts.get((before == 1, after == 1), "wrong still")
    right = outcomes.right[query].numpy()
    title = f"query {query}: {verdict}, rank {before:,} \u2192 {after:,}"
    return Panel(
        title if right.any() else f"{title}, target no candidate",
        [_name(row, texts) for row in outcomes.candidates[query].tolist()],
        {method: of[query].numpy() for method, of in outcomes.probabilities.items()},
        right,
    )


def _name(row: int, texts: Sequence[str] | None) -> str:
    return f"row {row}" if texts is None else shortened(f"{row}: {texts[row]}")


def shortened(text: str, width: int = CHARACTERS) -> str:
    """A text as one line of at most `width` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else f"{line[: width - 1].rstrip()}\u2026"


@torch.no_grad()
def _probabilities(model: SoftAttention | Pipeline, queries: torch.Tensor) -> dict[str, np.ndarray]:
    """Every row's probability for a few queries, (n, N), by method."""
    if isinstance(model, Pipeline):
        answer = model(queries, answer=False)
        logs = {"attention": answer.logits, "pipeline": answer.log_probs}
    else:
        logs = {"attention": model(queries)}
    return {method: of.softmax(dim=-1).cpu().numpy() for method, of in logs.items()}
