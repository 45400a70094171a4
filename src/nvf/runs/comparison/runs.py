"""The runs that a comparison is made of: every results.json, read, and put together where only the seeds differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvf.files.records import read_record
from nvf.runs.comparison.settings import MISSING, flatten, ignored, is_number, key, order, printable
from nvf.statistics import Interval, over_seeds

AGREES = 0.5  # of a query: a share in results.json may be a float32, its number of queries is whole


@dataclass(frozen=True)
class Run:
    """What one results.json says of one metric."""

    path: Path
    modified: float
    settings: dict[str, Any]  # flat, without seeds and what is ignored
    seeds: dict[str, Any]
    fitted: str  # last: pipeline, or attention
    figures: dict[str, Interval | None]  # validation and test of what was fitted last, stage1, coverage, exact, oracle
    fingerprints: tuple[str, str] | None  # of memory and test queries; None in files that lack one
    top1: float  # test Top-1 of what was fitted last

    def answered(self) -> np.ndarray | None:
        """Which test queries the fitted model ranks first, (B,) bool; None where that was not saved, or is damaged."""
        path = self.path.with_name("answered.npy")
        try:
            if not path.is_file():
                return None
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # which is never larger than the file
            sound = isinstance(mapped, np.ndarray) and mapped.ndim == 1 and mapped.dtype == bool
            answered = np.array(mapped) if sound else None
        except Exception:  # there is no end of what a damaged header makes numpy raise
            return None
        if answered is None or not len(answered) or answered.view(np.uint8).max() > 1:
            return None
        return answered if abs(int(answered.sum()) - self.top1 * len(answered)) < AGREES else None


@dataclass(frozen=True)
class Row:
    """One setting: its runs, which differ in seeds alone, and their mean figures."""

    runs: tuple[Run, ...]
    figures: dict[str, Interval | None]
    p: float | None = None  # that it and the best setting do equally well
    p_test: str | None = None

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Row":
        """The row of these runs."""
        names = runs[0].figures
        return cls(tuple(runs), {name: over_seeds([run.figures[name] for run in runs]) for name in names})

    @property
    def fitted(self) -> str:
        """What was fitted last: pipeline, or attention."""
        return self.runs[0].fitted

    def value(self, name: str) -> Any:
        """Of a setting; MISSING where it has none."""
        return self.runs[0].settings.get(name, MISSING)

    def share(self, figure: str) -> float:
        """The mean of a figure, NaN where there is none."""
        interval = self.figures[figure]
        return math.nan if interval is None else interval["value"]


def gather(folders: Sequence[Path], metric: str) -> tuple[list[Row], list[str]]:
    """A row a setting, in the order of their paths, from every results.json under the folders.

    Returns:
        The rows, and a line for each file that could not be read, and for runs that a newer one replaces.
    """
    paths = sorted({path.resolve(): path for folder in folders for path in folder.rglob("results.json")}.values())
    runs, notes = [], []
    for path in paths:
        try:
            runs.append(read_run(path, metric))
        except (OSError, ValueError) as fault:
            reason = " ".join(str(fault).split())[:120]
            notes.append(printable(f"{path} is left out, {reason}: delete it, or run its setting again"))
    newest: dict[Any, dict[Any, Run]] = {}
    replaced = []
    for run in sorted(runs, key=lambda run: run.modified):
        same = newest.setdefault((run.fitted, key(run.settings)), {})
        replaced += [same.pop(key(run.seeds))] if key(run.seeds) in same else []
        same[key(run.seeds)] = run
    if replaced:
        names = ", ".join(str(run.path) for run in replaced[:3]) + " and more" * (len(replaced) > 3)
        notes.append(f"older runs of the same setting and seed are left out, {len(replaced)}: {names}")
    rows = [
        Row.of(sorted(same.values(), key=lambda run: [(name, order(run.seeds[name])) for name in sorted(run.seeds)]))
        for same in newest.values()
    ]
    return sorted(rows, key=lambda row: row.runs[0].path), notes


def read_run(path: Path, metric: str) -> Run:
    """What the file says.

    Raises:
        ValueError: it is no results.json, or an old one that lacks the metric.
    """
    found = read_record(path)
    config, test, val = (_mapping(found, name) for name in ("config", "test", "val"))
    fitted = "attention" if val.get("pipeline") is None else "pipeline"
    figures = {
        "validation": _interval(_mapping(val, fitted), metric),
        "test": _interval(_mapping(test, fitted), metric),
        "stage1": _method(test, "attention", metric),
        "coverage": None if test.get("coverage") is None else _interval(test, "coverage"),
        "exact": _method(test, "exact", metric),
        "oracle": _method(test, "oracle", metric),
    }
    memory, queries = (found.get(name) for name in ("memory", "queries"))
    cut = _mapping({"cut": {}} | found, "cut")  # the same settings may have another effect where a clock cuts it
    flat = flatten(config) | flatten(cut, "cut.")
    seeds = {name: value for name, value in flat.items() if name == "seed" or name.endswith(".seed")}
    return Run(
        path=path,
        modified=path.stat().st_mtime,
        settings={name: value for name, value in flat.items() if name not in seeds and not ignored(name)},
        seeds=seeds,
        fitted=fitted,
        figures=figures,
        fingerprints=(memory, queries) if isinstance(memory, str) and isinstance(queries, str) else None,
        top1=_interval(_mapping(test, fitted), "top1")["value"],
    )


def _mapping(of: Any, name: str) -> dict[str, Any]:
    found = of.get(name) if isinstance(of, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"it has no {name}")
    return found


def _method(of: dict[str, Any], name: str, metric: str) -> Interval | None:
    return None if of.get(name) is None else _interval(_mapping(of, name), metric)


def _interval(of: dict[str, Any], name: str) -> Interval:
    found = _mapping(of, name)
    ends = [float(end) for end in map(found.get, Interval.__annotations__) if is_number(end) and 0 <= float(end) <= 1]
    if len(ends) < len(Interval.__annotations__):
        raise ValueError(f"its {name} is not a share with its interval")
    return Interval(value=ends[0], low=ends[1], high=ends[2])
