"""What TensorBoard shows beside the curves that the LightningModules log."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from nvf.evaluation import METHODS, METRICS

SETTINGS = ("stage", "data", "queries", "attention", "reranker", "joint", "seed", "k")


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
