"""The curves of TensorBoard's first chart: where they are in a run's folder, and how they are read again."""

import logging
from pathlib import Path

import numpy as np

FOLDER = "curves"  # in a run's folder, with a folder for each line of CHART
CHART = "Top-1 on validation queries"  # the tag of the first chart: TensorBoard sorts capital letters first
LINES = {"attention": "stage-1", "reranker": "pipeline", "joint": "joint"}  # by stage, in the order of their fits


def read_curves(run: Path) -> dict[str, np.ndarray]:
    """Read the lines of CHART that a run's stages drew, in the order of their fits: (n, 2) steps and shares each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # no run needs it to start

    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it says which files it opens
    folders = {line: run / FOLDER / line for line in LINES.values() if (run / FOLDER / line).is_dir()}
    shown = {line: EventAccumulator(str(folder), {"scalars": 0}).Reload() for line, folder in folders.items()}
    drawn = {line: of.Scalars(CHART) for line, of in shown.items() if CHART in of.Tags()["scalars"]}
    return {line: np.array(sorted((point.step, point.value) for point in of)) for line, of in drawn.items()}
