"""A comparison of runs as a table: text, Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvf.errors import InputError
from nvf.runs.comparison.runs import Row, columns, gather
from nvf.runs.comparison.settings import short, shown, written
from nvf.runs.comparison.significance import MCNEMAR, T_TEST, tested
from nvf.runs.settings import MISSING
from nvf.statistics import METRICS, Interval, in_percent, percent

FIGURES = ("validation", "test", "stage1", "coverage", "exact", "oracle")
ENDS = tuple(Interval.__annotations__)
SAYS = {T_TEST: "of test figures, over the seeds that both have", MCNEMAR: "over the same test queries"}
MOST_FOLLOWING = 6  # names that the text lists


@dataclass(frozen=True)
class Comparison:
    """Settings, best on validation first, each tested against the best."""

    metric: str
    columns: tuple[str, ...]  # the settings that tell the rows apart
    following: tuple[str, ...]  # settings that differ too, but follow from one of those
    rows: tuple[Row, ...]
    notes: tuple[str, ...]  # a line for each file that was left out

    @property
    def tests(self) -> list[str]:
        """The tests that the p values come from."""
        return sorted({row.p_test for row in self.rows if row.p_test})

    @property
    def fitted(self) -> str:
        """What the figures are of."""
        names = {"pipeline": "the pipeline", "attention": "stage 1"}
        return " or ".join(names[name] for name in sorted({row.fitted for row in self.rows}, reverse=True))

    def text(self) -> str:
        """An aligned table for the terminal, in percent, and the lines that explain it."""
        cells = self._cells()
        aligned = [
            [cell.ljust(width) if i <= len(self.columns) else cell.rjust(width) for cell in column]
            for i, column in enumerate(zip(*cells, strict=True))
            for width in [max(map(len, column))]
        ]
        lines = ["  ".join(row).rstrip() for row in zip(*aligned, strict=True)]
        return "\n".join([*lines, "", *self._lines()])

    def markdown(self) -> str:
        """The same as a Markdown table."""
        head, *body = [[_in_markdown(cell, "\\|<[`") for cell in row] for row in self._cells()]
        rule = ["---" if i <= len(self.columns) else "---:" for i in range(len(head))]
        table = [f"| {' | '.join(row)} |" for row in (head, rule, *body)]
        return "\n".join([*table, "", *(f"- {_in_markdown(line, '*<[`')}" for line in self._lines())])

    def csv(self) -> str:
        """A line a setting, in full precision, shares in 0..1; what does not exist is empty."""
        file = io.StringIO()
        out = csv.writer(file, lineterminator="\n")
        ends = [f"{figure}_{end}" for figure in FIGURES for end in ENDS]
        out.writerow([*self.columns, "best", "n", "fitted", *ends, "p", "p_test"])
        for row in self.rows:
            settings = [written(row.value(name)) for name in self.columns]
            shares = [end for figure in FIGURES for end in (row.figures[figure] or dict.fromkeys(ENDS)).values()]
            best = str(row is self.rows[0]).lower()
            out.writerow([*settings, best, len(row.runs), row.fitted, *shares, row.p, row.p_test])
        return file.getvalue().rstrip("\n")

    def json(self) -> str:
        """Everything, with the runs of each setting and every setting that differs."""
        names = (*self.columns, *self.following)
        rows = [
            {
                "best": row is self.rows[0],
                "settings": {name: row.value(name) for name in names if row.value(name) is not MISSING},
                "n": len(row.runs),
                "fitted": row.fitted,
                **row.figures,
                "p": row.p,
                "p_test": row.p_test,
                "runs": [{"folder": str(run.path.parent), "seeds": run.seeds} for run in row.runs],
            }
            for row in self.rows
        ]
        return json.dumps({**vars(self), "rows": rows}, indent=2, allow_nan=False)

    def _cells(self) -> list[list[str]]:
        title, names = METRICS[self.metric], map(short, self.columns)
        figures = [f"val {title}", f"test {title}", "stage 1", "coverage", "exact", "oracle"]
        cells = [["", *names, "seeds", *figures, "p vs best"]]
        for row in self.rows:
            shares = ["-" if row.figures[name] is None else percent(row.share(name)) for name in FIGURES]
            if (test := row.figures["test"]) is not None:
                shares[FIGURES.index("test")] = in_percent(test).strip()
            p = "-" if row.p is None else "<0.001" if row.p < 0.001 else f"{row.p:.2g}"
            if row.p_test is not None and len(self.tests) > 1:
                p += f" {row.p_test.split()[-1][0]}"  # t or M
            settings = [shown(row.value(name)) for name in self.columns]
            cells.append(["*" * (row is self.rows[0]), *settings, str(len(row.runs)), *shares, p])
        return cells

    def _lines(self) -> list[str]:
        over = "seeds, or the test queries where one ran or all agree"
        if all(len(row.runs) == 1 for row in self.rows):
            over = "the test queries of the one run"
        lines = [
            f"percent; test {METRICS[self.metric]} of {self.fitted} (95% interval over {over}); "
            "exact search is the baseline, coverage and the oracle are ceilings",
            "* the best on validation, by which the rows are sorted; the test figures chose nothing",
        ]
        if self.tests:
            tests = ", or ".join(f"{test} {SAYS[test]}" for test in self.tests)
            lines.append(f"p vs best: {tests}; not corrected for the number of rows")
        if self.following:
            more = len(self.following) - MOST_FOLLOWING
            names = ", ".join(map(short, self.following[:MOST_FOLLOWING])) + f" and {more} more" * (more > 0)
            lines.append(f"follow from the settings shown: {names}")
        return [*lines, *self.notes]


def _in_markdown(text: str, signs: str) -> str:
    """With the signs as they are, so that no setting ends a cell, or brings a link, a picture or a tag."""
    return "".join(f"\\{c}" if c in signs else c for c in text)


def compare(folders: Sequence[Path], metric: str = "top1") -> Comparison:
    """Compare every run whose results.json is under the folders; runs that differ in seeds alone are one setting.

    Raises:
        InputError: no such metric, no such folder, or no results.json that can be read.
    """
    remedy = "give those of runs or sweeps, such as outputs"
    if metric not in METRICS:
        raise InputError(f"metric={metric} is not known; give one of {', '.join(METRICS)}")
    if not folders:
        raise InputError(f"no folder is given; {remedy}")
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; {remedy}")
    rows, notes = gather(folders, metric)
    if not rows:
        where = ", ".join(map(str, folders))
        raise InputError("\n".join([f"no run's results.json under {where}; give the folder of a run or sweep", *notes]))
    rows = sorted(rows, key=lambda row: -row.share("validation"))
    chosen, following = columns(rows)
    rows = [rows[0], *(tested(row, rows[0], metric) for row in rows[1:])]
    return Comparison(metric, tuple(chosen), tuple(following), tuple(rows), tuple(notes))
