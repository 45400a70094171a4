"""A run, or a comparison of runs, as one HTML file that needs neither a network nor a script."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

from nvf.errors import InputError, one_line
from nvf.evaluation.report import NAMES, entries, remarks, standings
from nvf.files.records import read_record
from nvf.runs.comparison.runs import plain
from nvf.runs.comparison.table import TESTS, Comparison, shown
from nvf.runs.curves import read_curves
from nvf.runs.settings import flatten
from nvf.statistics import METRICS, in_percent, percent

STAGES = {"attention": "stage 1", "reranker": "stage 2", "joint": "both together"}
DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TemplateError, TypeError, ValueError)
# What comes from files is text, never markup.
PAGES = Environment(loader=PackageLoader("nvf.dashboards", "."), autoescape=True, undefined=StrictUndefined)
PAGES.filters |= {"percent": percent, "plain": plain, "shown": shown, "url": quote, "sh": shlex.quote, "repr": repr}
PAGES.globals |= {"NAMES": NAMES, "METRICS": METRICS, "STAGES": STAGES, "TESTS": TESTS, "flatten": flatten}
PAGES.globals |= {"entries": entries, "in_percent": in_percent, "remarks": remarks, "standings": standings}


def run_page(folder: Path) -> str:
    """Return the page of the run in a folder; files of it that are damaged are an InputError."""
    pipeline, path = folder / "pipeline", folder / "examples.json"
    given: dict[str, Any] = {
        "curves": [curve for curve in read_curves(folder) if len(curve.points) > 1],
        "words": (pipeline / "words").is_dir(),
    }
    given["pipeline"] = str(pipeline) if pipeline.is_dir() else None
    try:
        given["examples"] = read_record(path) if path.is_file() else None
        given["results"] = read_record(folder / "results.json")
        return PAGES.get_template("page.html").render(folder=str(folder), **given)
    except DAMAGE as fault:
        files = " or examples.json" * path.is_file()
        words = f"results.json{files} is damaged or of another version ({one_line(fault)}); make the run again"
        raise InputError(f"{folder}: {words}") from None


def sweep_page(folder: Path, comparison: Comparison, unfinished: Sequence[str]) -> str:
    """Return the page of a comparison of the runs below a folder, where the jobs named so have no results."""
    places = {run.path: str(run.path.parent.relative_to(folder)) for row in comparison.rows for run in row.runs}
    given: dict[str, Any] = {"comparison": comparison, "places": places, "unfinished": unfinished}
    return PAGES.get_template("page.html").render(folder=str(folder), **given)
