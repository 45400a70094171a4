"""The logger of a run's curves for TensorBoard: each stage goes on where the one before it ended."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from nvf.runs.curves import CHART, FOLDER, LINES


class Curves(TensorBoardLogger):
    """A `TensorBoardLogger` of a fit before which a run took `first` steps, with the validation's Top-1 as CHART.

    It is given the run's folder and the fit's name. The number of the epoch, which Lightning adds to every metric, is
    left out, and so is what an interrupted process logged from `purge_step` of this fit on; all of it for 0.
    """

    def __init__(self, save_dir: str, name: str, *, first: int = 0, purge_step: int = 0, **settings: Any) -> None:
        stage, _, variant = name.partition("/")
        root = str(Path(save_dir, FOLDER, LINES[stage]))
        super().__init__(root, name=variant, purge_step=first + purge_step if purge_step else None, **settings)
        self.first = first
        if not purge_step and getattr(rank_zero_only, "rank", 0) == 0:
            for left in Path(self.log_dir).glob("events.out.tfevents.*"):
                left.unlink()  # not purged: TensorBoard may read the files of one second in any order

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        shown = {CHART if tag == "val/top1" else tag: value for tag, value in metrics.items() if tag != "epoch"}
        super().log_metrics(shown, self.first + (step or 0))
