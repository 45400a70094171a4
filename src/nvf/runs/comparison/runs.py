"""The runs that a comparison is made of: every results.json, read, and put together where only the seeds differ."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvf.files.records import LARGEST, own_file, read_record
from nvf.runs.comparison.settings import order, printable
from nvf.runs.settings import MISSING, canonical, flatten, is_number, key, matters
from nvf.statistics import Interval, over_seeds

AGREES = 0.5  # of a query: a share in results.json may be a float32, its number of queries is an integer
DEEPEST = 20  # levels of settings
NAMED = re.compile(r"""^- ['"]?[+~]*([\w./@]+)=([^'"\n]*)""", re.MULTILINE)  # in Hydra's overrides.yaml


@dataclass(frozen=True)
class Run:
    """What one results.json says of one metric."""

    path: Path
    modified: float
    settings: dict[str, Any]  # flat, without seeds and what leaves the figures as they are
    seeds: dict[str, Any]
    named: dict[str, str]  # the settings and choices that the run's command named, as far as Hydra recorded them
    fitted: str  # last: pipeline, or attention
    figures: dict[str, Interval | None]  # validation and test of what was fitted last, stage1, coverage, exact, oracle
    fingerprints: tuple[str, str] | None  # of memory and test queries; None in files that lack one
    top1: float  # test Top-1 of what was fitted last

    def answered(self) -> np.ndarray | None:
        """Which test queries the fitted model ranks first, (B,) bool; None where that was not saved, or is damaged."""
        path = self.path.with_name("answered.npy")
        if not path.is_file():
            return None
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # which is never larger than the file
        except Exception:  # there is no end of what a damaged header makes numpy raise
            return None
        if not isinstance(mapped, np.ndarray) or mapped.ndim != 1 or mapped.dtype != bool:
            return None
        fits = mapped.view(np.uint8).max(initial=0) <= 1 and abs(mapped.sum() - self.top1 * len(mapped)) < AGREES
        return np.array(mapped) if fits and len(mapped) else None


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
        """The value of a setting, or the choice of a group; MISSING where it has none."""
        run = self.runs[0]
        return (run.named | run.seeds | run.settings).get(name, MISSING)

    def share(self, figure: str) -> float:
        """The mean of a figure, NaN where there is none."""
        interval = self.figures[figure]
        return math.nan if interval is None else interval["value"]


def gather(folders: Sequence[Path], metric: str) -> tuple[list[Row], list[str]]:
    """A row a setting, in the order of their paths, from every results.json under the folders.

    Returns also a line for each file that could not be read, and for runs that a newer one replaces.
    """
    paths = sorted({path.resolve(): path for folder in folders for path in folder.rglob("results.json")}.values())
    runs, notes = [], []
    for path in paths:
        try:
            runs.append(read_run(path, metric))
        except (OSError, ValueError) as fault:
            reason = " ".join(str(fault).split())[:120]
            notes.append(f"{path} is left out, {reason}: delete it, or run its setting again")
    newest: dict[Any, dict[Any, Run]] = {}
    replaced = []
    for run in sorted(runs, key=lambda run: run.modified):
        same = newest.setdefault((run.fitted, key(run.settings)), {})
        replaced += [same.pop(key(run.seeds))] if key(run.seeds) in same else []
        same[key(run.seeds)] = run
    if replaced:
        names = ", ".join(str(run.path) for run in replaced[:3]) + " and more" * (len(replaced) > 3)
        notes.append(f"older runs of the same setting and seed are left out, {len(replaced)}: {names}")
    rows = [Row.of(sorted(same.values(), key=_order)) for same in newest.values()]
    return sorted(rows, key=lambda row: row.runs[0].path), [printable(note) for note in notes]


def columns(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The settings that tell the rows apart, and those that differ too but follow from them.

    The first are those that the runs' commands named. Where they do not tell all rows apart, every setting that
    differs does.
    """
    names = sorted({name for row in rows for name in (*row.runs[0].settings, *row.runs[0].named)})
    values = {name: [canonical(row.value(name)) for row in rows] for name in names}
    differing = [name for name in names if len(set(values[name])) > 1]
    named = [name for name in differing if any(name in row.runs[0].named for row in rows)]
    if len(set(zip(*(values[name] for name in named), strict=True))) < len(rows):
        return differing, []
    return named, [name for name in differing if name not in named]


def read_run(path: Path, metric: str) -> Run:
    """What the file says.

    Raises:
        ValueError: it is no results.json, or an old one that lacks the metric.
    """
    found = read_record(path)
    # The same settings may have another effect where a clock cuts it.
    config = {"config": found.get("config"), "cut": found.get("cut", {})}
    if not isinstance(config["config"], dict) or _too_deep(config):
        raise ValueError(f"it has no config, or settings that are more than {DEEPEST} deep")
    flat = flatten({**config["config"], "cut": config["cut"]})
    flat = {printable(name): printable(value) for name, value in flat.items() if matters(name)}
    fitted = "attention" if _within(found, "val", "pipeline") is None else "pipeline"
    figures = {
        "validation": _figure(found, "val", fitted, metric),
        "test": _figure(found, "test", fitted, metric),
        "stage1": _figure(found, "test", "attention", metric),
        "coverage": _figure(found, "test", "coverage"),
        "exact": _figure(found, "test", "exact", metric),
        "oracle": _figure(found, "test", "oracle", metric),
    }
    top1, memory, queries = _figure(found, "test", fitted, "top1"), found.get("memory"), found.get("queries")
    if top1 is None or figures["validation"] is None or figures["test"] is None:
        raise ValueError(f"it has no top1 or {metric} of its {fitted}")
    return Run(
        path=path,
        modified=path.stat().st_mtime,
        settings={name: value for name, value in flat.items() if not _is_seed(name)},
        seeds={name: value for name, value in flat.items() if _is_seed(name)},
        named=_named(path.parent / ".hydra" / "overrides.yaml"),
        fitted=fitted,
        figures=figures,
        fingerprints=(memory, queries) if isinstance(memory, str) and isinstance(queries, str) else None,
        top1=top1["value"],
    )


def _order(run: Run) -> list[Any]:
    return [(name, order(seed)) for name, seed in sorted(run.seeds.items())]


def _named(path: Path) -> dict[str, str]:
    if not own_file(path) or path.stat().st_size > LARGEST:
        return {}
    words = NAMED.findall(path.read_text(encoding="utf-8", errors="replace"))
    return {name: printable(value) for name, value in words if matters(name) and not _is_seed(name)}


def _is_seed(name: str) -> bool:
    return name == "seed" or name.endswith(".seed")


def _too_deep(value: Any, levels: int = DEEPEST) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_too_deep(part, levels - 1) for part in parts)


def _within(tree: Any, *names: str) -> Any:
    """What lies under these names; None where one of them is missing or null."""
    for name in names:
        if not isinstance(tree, dict | type(None)):
            raise ValueError(f"there is no {name} in what should hold it")
        tree = None if tree is None else tree.get(name)
    return tree


def _figure(tree: dict[str, Any], *names: str) -> Interval | None:
    if _within(tree, *names) is None:
        return None
    ends = [float(end) for end in (_within(tree, *names, end) for end in Interval.__annotations__) if is_number(end)]
    if len(ends) < len(Interval.__annotations__) or not 0 <= min(ends) <= max(ends) <= 1:
        raise ValueError(f"its {'.'.join(names)} is not a share with its interval")
    return Interval(value=ends[0], low=ends[1], high=ends[2])
