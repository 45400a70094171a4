"""A comparison of runs as a table: Markdown and CSV."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvf.errors import InputError
from nvf.runs.comparison.runs import Row, columns, gather
from nvf.statistics import METRICS, Interval, in_percent, percent

FIGURES = ("validation", "test", "stage1", "coverage", "exact", "oracle")
ENDS = tuple(Interval.__annotations__)
LONGEST = 80  # characters of a cell
TESTS = "p vs best: paired t-test over common seeds, or exact McNemar test over the same queries; not corrected"


@dataclass(frozen=True)
class Comparison:
    """Settings, best on validation first, each tested against the best."""

    metric: str
    columns: tuple[str, ...]  # the settings that tell the rows apart
    rows: tuple[Row, ...]
    notes: tuple[str, ...]  # a line for each file that was left out

    def text(self) -> str:
        """Return a Markdown table, in percent, and the lines that explain it; texts are escaped."""
        cells = [[re.sub(r"([\\|\[`]|<(?=\D))", r"\\\1", cell) for cell in row] for row in self._cells()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        texts = len(self.columns) + 1  # columns; the others are numbers
        cells.insert(1, ["-" * width if i < texts else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
        for row in cells:
            for i, width in enumerate(widths):
                row[i] = row[i].ljust(width) if i < texts else row[i].rjust(width)
        lines = [
            f"percent; test {METRICS[self.metric]} is of the model fitted last, with its 95% interval over seeds, or "
            "over test queries where one seed ran or all agree; coverage and the oracle are ceilings",
            "the row with * is the best on validation, by which all are sorted; the test figures chose nothing",
            *([TESTS] if any(row.p is not None for row in self.rows) else []),
            *(re.sub(r"([*<\[`])", r"\\\1", note) for note in self.notes),
        ]
        return "\n".join([*(f"| {' | '.join(row)} |" for row in cells), "", *(f"- {line}" for line in lines)])

    def csv(self) -> str:
        """Return a line for each setting, in full precision, shares in 0..1; what does not exist is empty."""
        file = io.StringIO()
        out = csv.writer(file, lineterminator="\n")
        ends = [f"{figure}_{end}" for figure in FIGURES for end in ENDS]
        out.writerow([*self.columns, "best", "n", "fitted", *ends, "p", "p_test"])
        for row in self.rows:
            settings = [row.value(name) for name in self.columns]
            shares = [end for figure in FIGURES for end in (row.figures[figure] or dict.fromkeys(ENDS)).values()]
            best = str(row is self.rows[0]).lower()
            out.writerow([*settings, best, len(row.runs), row.runs[0].fitted, *shares, row.p, row.p_test])
        return file.getvalue().rstrip("\n")

    def _cells(self) -> list[list[str]]:
        title = METRICS[self.metric]
        figures = [f"val {title}", f"test {title}", "stage 1", "coverage", "exact", "oracle"]
        cells = [["", *map(shown, self.columns), "seeds", *figures, "p vs best"]]
        for row in self.rows:
            shares = ["-" if row.figures[name] is None else percent(row.share(name)) for name in FIGURES]
            if (test := row.figures["test"]) is not None:
                shares[FIGURES.index("test")] = in_percent(test).strip()
            p = "-" if row.p is None else "<0.001" if row.p < 0.001 else f"{row.p:.2g}"
            settings = [shown(row.value(name)) for name in self.columns]
            cells.append(["*" * (row is self.rows[0]), *settings, str(len(row.runs)), *shares, p])
        return cells


def compare(folders: Sequence[Path], metric: str = "top1") -> Comparison:
    """Compare every run whose results.json is under the folders; an unknown metric and no runs are an InputError."""
    if metric not in METRICS:
        raise InputError(f"metric={metric} is not known; give one of {', '.join(METRICS)}")
    rows, notes = gather(folders, metric)
    if not rows:
        where = ", ".join(map(str, folders)) or "no folder"
        raise InputError("\n".join([f"{where}: no results.json of a run; give folders, such as outputs", *notes]))
    rows = sorted(rows, key=lambda row: -row.share("validation"))
    tested = [rows[0], *(row.tested_against(rows[0], metric) for row in rows[1:])]
    return Comparison(metric, tuple(columns(rows)), tuple(tested), tuple(notes))


def shown(value: Any, longest: int = LONGEST) -> str:
    """Return a setting's value for people: a number in four digits, of a long text the end, which tells paths apart."""
    text = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= longest else f"...{text[3 - longest :]}"
