"""The runs of a comparison: every results.json is read, and runs that differ in seeds alone make one row."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nvf.errors import one_line
from nvf.files.records import LARGEST, own_file, read_record
from nvf.runs.settings import canonical, key, material, matters
from nvf.statistics import Interval, mcnemar, over_seeds, paired_t, wins_and_losses

FEWEST_SEEDS = 3  # for a t-test
NAMED = re.compile(r"""^- ['"]?[+~]*([\w./@]+)=([^'"\n]*)""", re.MULTILINE)  # in Hydra's overrides.yaml


@dataclass(frozen=True)
class Run:
    """What one results.json says of one metric."""

    path: Path
    settings: dict[str, Any]  # flat, without seeds and without settings that leave the figures as they are
    seeds: dict[str, Any]
    named: dict[str, str]  # the settings that the run's command named, as Hydra recorded them
    fitted: str  # the model that was fitted last: pipeline or attention
    figures: dict[str, Interval | None]  # validation and test of that model, stage1, coverage, exact, oracle
    data: tuple[str, str] | None  # the hashes of memory and test queries, if the file has both

    def answered(self) -> np.ndarray | None:
        """Return which test queries the model ranks first, (B,) bool, or None; the metric must be top1."""
        path, test = self.path.with_name("answered.npy"), self.figures["test"]
        try:  # mapped, it is never oversized; a pipe would be waited for
            found = np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else None
        except Exception:  # a damaged header makes numpy raise errors of many types
            return None
        if not (test and isinstance(found, np.ndarray) and found.ndim == 1 and found.dtype == bool and len(found)):
            return None
        bits, right = found.view(np.uint8), test["value"] * len(found)  # an integer, but for a float32's rounding
        return np.array(found) if bits.max() <= 1 and abs(bits.sum() - right) < 0.5 else None


@dataclass(frozen=True)
class Row:
    """One setting: its runs, which differ in seeds alone, and their mean figures."""

    runs: tuple[Run, ...]
    figures: dict[str, Interval | None]
    p: float | None = None  # of the hypothesis that this setting and the best do equally well
    p_test: str | None = None

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Row":
        names = runs[0].figures
        return cls(tuple(runs), {name: over_seeds([run.figures[name] for run in runs]) for name in names})

    def value(self, name: str) -> Any:
        """Return the value of a setting, or the option chosen in a group; None where it has none."""
        run = self.runs[0]
        return (run.named | run.seeds | run.settings).get(name)

    def share(self, figure: str) -> float:
        """Return the mean of a figure, NaN where there is none."""
        interval = self.figures[figure]
        return math.nan if interval is None else interval["value"]

    def tested_against(self, best: "Row", metric: str) -> "Row":
        """Return the row with its p value: a t-test over seeds, or McNemar's where seeds are few or all agree."""
        pairs = _pairs(self, best)
        if len(pairs) >= FEWEST_SEEDS:
            tests = np.array([[run.figures["test"]["value"] for run in pair if run.figures["test"]] for pair in pairs])
            if (p := paired_t(*tests.T)) is not None:
                return replace(self, p=p, p_test="paired t-test")
        if pairs and metric == "top1" and (p := _mcnemar(pairs)) is not None:
            return replace(self, p=p, p_test="exact McNemar")
        return self


def gather(folders: Sequence[Path], metric: str) -> tuple[list[Row], list[str]]:
    """Return a row for each setting under the folders, and notes of files left out; of equal runs the newest counts."""
    found = {path.resolve(): path for folder in folders for path in folder.rglob("results.json") if path.is_file()}
    settings: dict[Any, dict[Any, Run]] = {}
    notes, older = [], 0
    for path in sorted(found.values(), key=lambda path: path.stat().st_mtime):
        try:
            run = read_run(path, metric)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
            notes.append(plain(f"{path} is left out ({one_line(fault)}): delete it, or run its setting again"))
            continue
        same = settings.setdefault(key(run.settings), {})
        older += key(run.seeds) in same
        same[key(run.seeds)] = run
    if older:
        notes.append(f"{older} older runs of the same setting and seed are left out")
    rows = [Row.of(sorted(same.values(), key=lambda run: run.path)) for same in settings.values()]
    return sorted(rows, key=lambda row: row.runs[0].path), notes


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the settings that tell the rows apart: those that the commands named, or all if those do not."""
    runs = [row.runs[0] for row in rows]
    names = sorted({name for run in runs for name in (*run.settings, *run.named)})
    values = {name: [canonical(row.value(name)) for row in rows] for name in names}
    differing = [name for name in names if len(set(values[name])) > 1]
    named = [name for name in differing if any(name in run.named for run in runs)]
    distinct = set(zip(*(values[name] for name in named), strict=True))
    return named if len(distinct) == len(rows) else differing


def read_run(path: Path, metric: str) -> Run:
    """Read a results.json; whatever else the file holds ends in one of the errors that `gather` expects."""
    found = read_record(path)
    fitted = "pipeline" if found["val"]["pipeline"] else "attention"
    test = found["test"]
    shares = {
        "validation": found["val"][fitted][metric],
        "test": test[fitted][metric],
        "stage1": test["attention"][metric],
        "coverage": test["coverage"],
        **{name: test[name] and test[name][metric] for name in ("exact", "oracle")},
    }
    if not shares["validation"] or not shares["test"]:
        raise ValueError(f"it has no {metric} of its {fitted}")
    flat = {plain(name): plain(value) for name, value in material(found["config"]).items()}
    seeds = {name: value for name, value in flat.items() if name.split(".")[-1] == "seed"}
    overrides, named = path.parent / ".hydra" / "overrides.yaml", []
    if own_file(overrides) and overrides.stat().st_size <= LARGEST:
        named = NAMED.findall(overrides.read_text(encoding="utf-8", errors="replace"))
    hashes: Any = found.get("memory"), found.get("queries")
    return Run(
        path=path,
        settings={name: value for name, value in flat.items() if name not in seeds},
        seeds=seeds,
        named={name: plain(value) for name, value in named if matters(name) and name not in seeds},
        fitted=fitted,
        figures={name: share and _interval(share) for name, share in shares.items()},
        data=hashes if all(isinstance(each, str) for each in hashes) else None,
    )


def plain(value: Any) -> Any:
    """Return a value as it may be printed: a list as JSON, a text on one line and without control characters."""
    if isinstance(value, list):
        return json.dumps(value)
    return "".join(c if c.isprintable() else " " for c in value) if isinstance(value, str) else value


def _interval(share: dict[str, Any]) -> Interval:
    value, low, high = (float(share[end]) for end in ("value", "low", "high"))
    if not 0 <= min(value, low, high) <= max(value, low, high) <= 1:
        raise ValueError("it holds a share outside 0..1")
    return Interval(value=value, low=low, high=high)


def _pairs(row: Row, best: Row) -> list[tuple[Run, Run]]:
    """Return the runs of the two rows with equal seeds; none if the seeds that all have do not tell runs apart."""
    names = set.intersection(*({*run.seeds} for run in (*row.runs, *best.runs)))
    mine, others = ({key({name: run.seeds[name] for name in names}): run for run in of.runs} for of in (row, best))
    if len(mine) < len(row.runs) or len(others) < len(best.runs):
        return []
    return [(mine[seeds], others[seeds]) for seeds in mine if seeds in others]


def _mcnemar(pairs: Sequence[tuple[Run, Run]]) -> float | None:
    """McNemar's p over the queries of all pairs; None where the runs of a pair have other queries.

    Queries that several seeds share count once: one query's answers under two seeds are not independent.
    """
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for one, other in pairs:
        ours, theirs = one.answered(), other.answered()
        if ours is None or theirs is None or len(ours) != len(theirs) or one.data is None or one.data != other.data:
            return None
        counts.setdefault(one.data, wins_and_losses(ours, theirs))
    return mcnemar(*map(sum, zip(*counts.values(), strict=True)))
