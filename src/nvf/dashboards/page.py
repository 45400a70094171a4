"""A run, or a comparison of runs, as one HTML file that needs neither a network nor a script."""

import math
import shlex
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from nvf.errors import InputError, one_line
from nvf.evaluation.report import NAMES, ceilings, entries, leaders, methods, remarks
from nvf.files.records import read_record
from nvf.runs.comparison.runs import plain
from nvf.runs.comparison.table import Comparison, shown
from nvf.runs.settings import flatten
from nvf.statistics import METRICS, in_percent, p_text, percent

STAGES = {"attention": "stage 1", "reranker": "stage 2", "joint": "both together"}
PAGES = Environment(
    loader=PackageLoader("nvf.dashboards", "."),
    autoescape=True,  # what comes from files is text, never markup
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters |= {"percent": percent, "plain": plain, "shown": shown, "url": quote, "sh": shlex.quote, "repr": repr}
PAGES.globals |= {"NAMES": NAMES, "METRICS": METRICS, "STAGES": STAGES, "flatten": flatten, "p_text": p_text}
PAGES.globals |= {each.__name__: each for each in (ceilings, entries, in_percent, leaders, methods, remarks)}
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError, TemplateError)


class Curve(NamedTuple):
    """What a fit validates to, by its steps."""

    stage: str  # a key of STAGES
    name: str  # of a stage 1 among several, else empty
    points: list[tuple[int, float]]  # steps, and Top-1 in 0..1


def run_page(folder: Path) -> str:
    """Return the page of the run in a folder; files of it that are damaged are an InputError."""
    pipeline, examples = folder / "pipeline", folder / "examples.json"
    try:
        return PAGES.get_template("page.html").render(
            title=folder.name,
            folder=str(folder),
            results=read_record(folder / "results.json"),
            examples=read_record(examples) if examples.is_file() else None,
            curves=curves(folder),
            pipeline=str(pipeline) if pipeline.is_dir() else None,
            words=(pipeline / "words").is_dir(),
        )
    except DAMAGE as fault:
        files = " or ".join(path.name for path in (folder / "results.json", examples) if path.is_file())
        raise InputError(f"{folder}: {files} is damaged or of another version ({one_line(fault)}); delete it") from None


def sweep_page(folder: Path, comparison: Comparison, unfinished: list[str]) -> str:
    """Return the page of a comparison of the runs below a folder; the jobs in it that have no results are named."""
    places = {run.path: run.path.parent.relative_to(folder) for row in comparison.rows for run in row.runs}
    given: dict[str, Any] = {"comparison": comparison, "places": places, "unfinished": unfinished}
    return PAGES.get_template("page.html").render(title=folder.name, folder=str(folder), **given)


def curves(folder: Path) -> list[Curve]:
    """Return Top-1 on validation over the steps of every fit, from TensorBoard's files in a run's folder."""
    found = []
    for stage in STAGES:
        for place in sorted({path.parent for path in (folder / stage).rglob("events.out.tfevents.*")}):
            events = EventAccumulator(str(place), size_guidance={SCALARS: 0}).Reload()
            if "val/top1" in events.Tags()[SCALARS]:
                points = [(at.step, at.value) for at in events.Scalars("val/top1") if math.isfinite(at.value)]
                name = place.relative_to(folder / stage).as_posix().lstrip(".")
                found += [Curve(stage, name, points)] if len(points) > 1 else []
    return found
