"""The curves of TensorBoard's first chart: where they are in a run's folder, and how they are read again."""

import logging
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = "curves"  # in a run's folder, with a folder for each line of CHART
CHART = "Top-1 on validation queries"  # the tag of the first chart: TensorBoard sorts capital letters first
LINES = {"attention": "stage-1", "reranker": "pipeline", "joint": "joint"}  # by stage, in the order of their fits


class Curve(NamedTuple):
    """A line of CHART that a fit drew."""

    stage: str  # a key of LINES
    name: str  # of a stage 1 among several, else empty
    points: np.ndarray  # (n, 2): steps, which go on from stage to stage, and shares in 0..1


def read_curves(run: Path) -> list[Curve]:
    """Read the lines of CHART in a run's folder, fit by fit; damaged files have fewer points or none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # no run needs it to start

    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it says which files it opens
    found = []
    for stage, line in LINES.items():
        folder = run / FOLDER / line
        for place in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
            shown = EventAccumulator(str(place), {"scalars": 0}).Reload()
            drawn = shown.Scalars(CHART) if CHART in shown.Tags()["scalars"] else []
            points = np.array(sorted((point.step, point.value) for point in drawn if math.isfinite(point.value)))
            if len(points):
                found.append(Curve(stage, "/".join(place.relative_to(folder).parts), points))
    return found
