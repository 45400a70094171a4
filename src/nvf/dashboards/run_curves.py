"""TensorBoard's page of custom scalars: both stages and their ceilings on one chart, over all steps of a run."""

from collections.abc import Mapping
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from nvf.dashboards.outcomes import Looked

STAGES = ("attention", "reranker", "joint")  # in the order of fitting
SHARES = {"top1": 1, "top5": 5}
TAGS = {
    "stage 1": "stage1",
    "pipeline": "pipeline",
    "exact search": "exact",
    "oracle": "oracle",
    "coverage": "coverage",
}  # a tag has no spaces
EVENTS = "events.out.tfevents.*"
READ = ("val/top1", "val/top5", "val/coverage")
Points = list[tuple[int, float]]


def write_scalars_page(writer: SummaryWriter, looked: Looked, folder: Path) -> None:
    """The page's charts, and in the run's own folder the curves that they show: its tags are matched run by run."""
    curves = {stage: _curves(folder / stage) for stage in STAGES}
    for metric, rank in SHARES.items():
        measured = {method: looked.share(method, rank) for method in (*looked.ranks, "coverage")}
        for method, points in progress(curves, metric, measured).items():
            for step, value in points:
                writer.add_scalar(f"{metric}/{TAGS[method]}", value, step)
    writer.add_custom_scalars(
        {
            "both stages and their ceilings, on validation queries": {
                title: ["Multiline", [f"{metric}/{tag}$" for tag in TAGS.values()]]
                for metric, title in (("top1", "Top-1"), ("top5", "Top-5"))
            },
            "each stage": {
                "loss on validation queries": ["Multiline", ["val/loss$"]],
                "loss in training": ["Multiline", ["train/loss$"]],
                "norms of the gradients": ["Multiline", ["gradients/"]],
            },
        }
    )


def progress(
    curves: Mapping[str, Mapping[str, Points]], metric: str, measured: Mapping[str, float]
) -> dict[str, Points]:
    """Each method's line over all steps of the run, stage after stage; every line ends on what is measured now.

    A method that does not learn is a level line. Stage 1's line is its curve, then level where it stays frozen; the
    pipeline's begins with stage 2.

    Args:
        curves: (step, value) by stage and metric; a stage that was not fitted has none.
        metric: `top1` or `top5`.
        measured: the share that each method reaches.
    """
    lines: dict[str, Points] = {method: [] for method in measured}
    start = 0
    for stage, of_stage in curves.items():
        fitted = "stage 1" if stage == "attention" else "pipeline"
        shifted = {name: [(start + step, value) for step, value in points] for name, points in of_stage.items()}
        if fitted in lines:
            lines[fitted] += shifted.get(metric, [])
        if stage != "reranker":
            lines["coverage"] += shifted.get("coverage", [])
        end = max((step for points in shifted.values() for step, _ in points), default=start - 1)
        start = end + 1
        if stage == "attention" and not curves.get("joint") and end >= 0:
            for name in ("stage 1", "coverage"):
                lines[name].append((start, measured[name]))
    for name, points in lines.items():
        if not points:
            points.append((0, measured[name]))
        if points[-1][0] < (last := max(start, 1)):
            points.append((last, measured[name]))
    return lines


def _curves(folder: Path) -> dict[str, Points]:
    """A stage's validation curves, metric by metric; of several variants, those of the best Top-1."""
    found: list[dict[str, Points]] = []
    for place in sorted({path.parent for path in folder.rglob(EVENTS)}):
        curves: dict[str, Points] = {}
        for path in sorted(place.glob(EVENTS)):
            for event in EventFileLoader(str(path)).Load():
                for value in event.summary.value:
                    if value.tag in READ:
                        points = curves.setdefault(value.tag.removeprefix("val/"), [])
                        points.append((event.step, value.tensor.float_val[0]))
        found.append(curves)
    return max(found, key=lambda curves: max((v for _, v in curves.get("top1", [])), default=-1.0), default={})
