"""What TensorBoard shows beside the curves that the LightningModules log."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from nvf.dashboards.outcomes import Looked, exemplary, look, scored
from nvf.dashboards.projector import spread, write_points
from nvf.dashboards.run_curves import write_scalars_page
from nvf.data.queries import QueryBatch, score_blocks
from nvf.errors import InputError, check_number, one_line
from nvf.evaluation.evaluate import BINS, METHODS
from nvf.models.attention import SoftAttention
from nvf.models.pipeline import Pipeline
from nvf.statistics import METRICS

SETTINGS = ("stage", "data", "queries", "attention", "reranker", "joint", "seed", "k")
SWITCHES = ("scalars_page", "candidates", "heat_map", "ranks", "reliability", "projector")
NUMBERS = {"queries": (1, 40), "projector_points": (4, 20_000)}
TEXTS = "texts.jsonl"
COLUMNS = 40  # of the heat map
SCORES = 2**28  # that may be computed for the figures, some seconds' worth
FEWEST_QUERIES = 1000  # whatever they cost
log = logging.getLogger("nvf")


def log_hparams(results: Mapping[str, Any], folder: Path) -> None:
    """One row of the HPARAMS tab: the run's settings beside its test figures, `hp/method/metric`."""
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
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    logger.log_hyperparams(settings, metrics)
    logger.finalize("success")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def check_dashboards(settings: Mapping[str, Any]) -> None:
    """Raise an InputError unless the settings are the known ones, each a switch or a number within its limits."""
    for name, value in settings.items():
        if name in NUMBERS:
            low, high = NUMBERS[name]
            remedy = f"{low} to {high} are shown well"
            check_number(f"dashboards.{name}", value, minimum=low, below=high + 1, whole=True, remedy=remedy)
        elif name not in SWITCHES:
            known = ", ".join((*SWITCHES, *NUMBERS))
            raise InputError(f"dashboards.{name}={value} is unknown; choose one of {known}")
        elif not isinstance(value, bool):
            raise InputError(f"dashboards.{name}={value} is neither true nor false; false leaves it out")
    for name in (*SWITCHES, *NUMBERS):
        if name not in settings:
            raise InputError(f"dashboards.{name} is missing; conf/dashboards/default.yaml has it")


def texts_of(folder: str | Path | None, rows: int) -> list[str] | None:
    """The rows' texts, lines {"text": ...} of a folder's texts.jsonl; None, with a warning, if not one each."""
    path = None if folder is None else Path(folder) / TEXTS
    if path is None or not path.is_file():
        return None
    texts = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line, record in enumerate(file, 1):
                if not record.strip():
                    continue
                text = json.loads(record)["text"]
                if not isinstance(text, str):
                    raise TypeError(f"line {line}: text is {type(text).__name__}, not str")
                text.encode()  # half a surrogate pair is no character
                texts.append(text)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as fault:
        log.warning("%s: %s; the figures name rows by number", path, one_line(fault))
        return None
    if len(texts) != rows:
        log.warning("%s has %d texts for %d rows; the figures name rows by number", path, len(texts), rows)
        return None
    return texts


def show(
    model: SoftAttention | Pipeline,
    batch: QueryBatch,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    k: int = 5,
    oracle: Tensor | None = None,
    texts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
) -> None:
    """Write what TensorBoard shows of a fitted model: a page of scalars, images, and a projector's points.

    More queries than `SCORES` / N, at least `FEWEST_QUERIES`, are thinned out evenly.

    Args:
        model: stage 1 alone, or the pipeline.
        batch: validation queries.
        settings: of conf/dashboards.
        folder: the run's; its attention/, reranker/ and joint/ hold the stages' curves.
        k: candidates, where the model is stage 1 alone.
        oracle: rows (N, D) that an informed search would use; None where nobody knows them.
        texts: of the N rows.
        labels: clusters of the N rows.
    """
    if not any(settings[name] for name in SWITCHES):
        return
    from nvf.dashboards import figures  # matplotlib takes a second to import

    model.eval()
    rows = len(model.memory)
    several = spread(len(batch.queries), max(FEWEST_QUERIES, SCORES // rows))
    batch = QueryBatch(*(part[torch.from_numpy(several).to(part.device)] for part in batch))
    looked = look(model, batch, k=model.k if isinstance(model, Pipeline) else min(k, rows), oracle=oracle)
    chosen = exemplary(looked, settings["queries"])
    with SummaryWriter(str(folder)) as writer:
        if settings["scalars_page"]:
            write_scalars_page(writer, looked, folder)
        images = {}
        if settings["candidates"]:
            images["1 candidates"] = figures.draw_candidates(
                [_panel(looked, i, int(several[i]), texts) for i in chosen]
            )
        if settings["heat_map"]:
            images["2 attention"] = _heat_map(model, batch, looked, chosen, several, texts)
        if settings["ranks"]:
            shown = {method: ranks for method, ranks in looked.ranks.items() if method != "oracle"}
            images["3 ranks"] = figures.draw_ranks(shown, rows)
        if settings["reliability"]:
            shares = 1 / (looked.targets >= 0).sum(axis=1)  # that several right rows have of the probability
            images["4 reliability"] = figures.draw_reliability(
                {
                    method: figures.reliability(confidences, (looked.ranks[method] == 1) * shares, BINS)
                    for method, confidences in looked.confidences.items()
                }
            )
        for name, image in images.items():
            writer.add_image(f"figures/{name.replace(' ', '_')}", image, dataformats="HWC")
    if settings["projector"]:
        attention = model.attention if isinstance(model, Pipeline) else model
        write_points(attention, batch, several, settings["projector_points"], folder, texts, labels)


def _panel(looked: Looked, query: int, number: int, texts: Sequence[str] | None) -> Any:
    from nvf.dashboards.figures import Panel

    ranks = {method: int(ranks[query]) for method, ranks in looked.ranks.items()}
    before, after = ("stage 1", "pipeline") if "pipeline" in ranks else ("exact search", "stage 1")
    was, now = ranks[before] == 1, ranks[after] == 1
    verdict = "won" if now and not was else "lost" if was and not now else "right as before" if now else "wrong still"
    right = looked.right[query]
    title = f"query {number}: {verdict}, rank {ranks[before]:,} \u2192 {ranks[after]:,}"
    title += "" if right.any() else ", target no candidate"
    names = [_name(row, texts) for row in looked.rows[query].tolist()]
    return Panel(
        title,
        names,
        looked.probabilities["stage 1"][query],
        looked.probabilities["pipeline"][query] if "pipeline" in looked.probabilities else None,
        right,
    )


def _name(row: int, texts: Sequence[str] | None, width: int = 26) -> str:
    from nvf.dashboards.figures import shortened

    return f"row {row}" if texts is None else shortened(f"{row}: {texts[row]}", width)


@torch.no_grad()
def _heat_map(
    model: SoftAttention | Pipeline,
    batch: QueryBatch,
    looked: Looked,
    chosen: Sequence[int],
    numbers: np.ndarray,
    texts: Sequence[str] | None,
) -> np.ndarray:
    from nvf.dashboards import figures

    columns = figures.matters(looked.rows[chosen], looked.targets[chosen], COLUMNS)
    shown = QueryBatch(*(part[list(chosen)] for part in batch))
    maps: dict[str, list[np.ndarray]] = {}
    for queries, _ in score_blocks(shown, len(model.memory)):
        for method, (scores, total, _) in scored(model, queries).items():
            some = scores[:, torch.from_numpy(columns)] - total.unsqueeze(-1)
            maps.setdefault(method, []).append(some.exp().cpu().numpy())
    right = (looked.targets[chosen][:, None, :] == columns[None, :, None]).any(axis=-1)  # (n, c)
    return figures.draw_heat_map(
        {method: np.concatenate(parts) for method, parts in maps.items()},
        right,
        [f"query {numbers[query]}" for query in chosen],
        [_name(row, texts, 20) for row in columns.tolist()],
    )
