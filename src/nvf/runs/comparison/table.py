"""A comparison of runs as a table: text, Markdown, CSV and JSON, and the files that a folder of runs gets."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvf.errors import InputError
from nvf.files.atomic import written_whole
from nvf.runs.comparison.runs import Row, gather
from nvf.runs.comparison.settings import MISSING, columns, printable, short, shown, written
from nvf.runs.comparison.significance import MCNEMAR, T_TEST, tested
from nvf.statistics import METRICS, Interval, in_percent, percent

FIGURES = ("validation", "test", "stage1", "coverage", "exact", "oracle")
ENDS = tuple(Interval.__annotations__)


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
        """Which tests the p values come from."""
        return sorted({row.p_test for row in self.rows if row.p_test})

    @property
    def fitted(self) -> str:
        """What the figures are of."""
        names = {"pipeline": "the pipeline", "attention": "stage 1"}
        return " or ".join(names[name] for name in sorted({row.fitted for row in self.rows}, reverse=True))

    def text(self) -> str:
        """An aligned table for the terminal, in percent, and the lines that explain it."""
        head, *body = cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        left = 1 + len(self.columns)
        lines = [
            "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in (head, *body)
        ]
        return "\n".join([*(line.rstrip() for line in lines), "", *self._lines()])

    def markdown(self) -> str:
        """The same as a Markdown table."""
        head, *body = [[_in_markdown(cell, "\\|<[`") for cell in row] for row in self._cells()]
        rule = ["---" if i <= len(self.columns) else "---:" for i in range(len(head))]
        table = [f"| {' | '.join(row)} |" for row in (head, rule, *body)]
        return "\n".join([*table, "", *(f"- {_in_markdown(line, '*<[`')}" for line in self._lines())])

    def csv(self) -> str:
        """A line a setting, in full precision, shares in 0..1; what does not exist is empty."""
        ends = [f"{figure}_{end}" for figure in FIGURES for end in ENDS]
        file = io.StringIO()
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*map(printable, self.columns), "best", "n", "fitted", *ends, "p", "p_test"])
        for row in self.rows:
            settings = [printable(written(row.value(name))) for name in self.columns]
            shares = [end for figure in FIGURES for end in (row.figures[figure] or dict.fromkeys(ENDS, "")).values()]
            best = str(row is self.rows[0]).lower()
            p = ("" if row.p is None else row.p, row.p_test or "")
            out.writerow([*settings, best, len(row.runs), row.fitted, *shares, *p])
        return file.getvalue().rstrip("\n")

    def json(self) -> str:
        """Everything, with the runs of each setting and every setting that differs."""
        found = {
            "metric": self.metric,
            "columns": list(self.columns),
            "following": list(self.following),
            "rows": [self._entry(row) for row in self.rows],
            "notes": list(self.notes),
        }
        return json.dumps(found, indent=2, allow_nan=False)

    def _entry(self, row: Row) -> dict[str, Any]:
        settings = {name: row.value(name) for name in (*self.columns, *self.following)}
        return {
            "best": row is self.rows[0],
            "settings": {name: value for name, value in settings.items() if value is not MISSING},
            "n": len(row.runs),
            "fitted": row.fitted,
            **row.figures,
            "p": row.p,
            "p_test": row.p_test,
            "runs": [{"folder": str(run.path.parent), "seeds": run.seeds} for run in row.runs],
        }

    def _cells(self) -> list[list[str]]:
        title = METRICS[self.metric]
        head = [
            "",
            *(short(printable(name)) for name in self.columns),
            "seeds",
            f"val {title}",
            f"test {title}",
            "stage 1",
            "coverage",
        ]
        cells = [[*head, "exact", "oracle", "p vs best"]]
        for row in self.rows:
            shares = ["-" if row.figures[name] is None else percent(row.share(name)) for name in FIGURES]
            if (test := row.figures["test"]) is not None:
                shares[FIGURES.index("test")] = in_percent(test).strip()
            mark = "*" if row is self.rows[0] else ""
            settings = [shown(row.value(name)) for name in self.columns]
            cells.append([mark, *settings, str(len(row.runs)), *shares, self._p(row)])
        return cells

    def _p(self, row: Row) -> str:
        if row.p is None:
            return "-"
        mark = f" {(row.p_test or '').split()[-1][0]}" if len(self.tests) > 1 else ""
        return ("<0.001" if row.p < 0.001 else f"{row.p:.2g}") + mark

    def _lines(self) -> list[str]:
        title, counts = METRICS[self.metric], {len(row.runs) for row in self.rows}
        over = "seeds, or the test queries where one ran or all agree"
        if counts == {1}:
            over = "the test queries of the one run"
        lines = [
            f"percent; test {title} of {self.fitted} (95% interval over {over}); "
            "exact search is the baseline, coverage and the oracle are ceilings",
            "* the best on validation, by which the rows are sorted; the test figures chose nothing",
        ]
        says = {T_TEST: "of test figures, over the seeds that both have", MCNEMAR: "over the same test queries"}
        if self.tests:
            tests = ", or ".join(f"{test} {says[test]}" for test in self.tests)
            lines.append(f"p vs best: {tests}; not corrected for the number of rows")
        if self.following:
            more = len(self.following) - 6
            names = ", ".join(short(printable(name)) for name in self.following[:6]) + (
                f" and {more} more" if more > 0 else ""
            )
            lines.append(f"follow from the settings shown: {names}")
        return lines + [printable(note) for note in self.notes]


def _in_markdown(text: str, signs: str) -> str:
    """With the signs as they are, so that no setting ends a cell, or brings a link, a picture or a tag."""
    return "".join(f"\\{c}" if c in signs else c for c in text)


def compare(folders: Sequence[Path], metric: str = "top1") -> Comparison:
    """Compare every run whose results.json is under the folders; runs that differ in seeds alone are one setting.

    Raises:
        InputError: no such metric, no such folder, or no results.json that can be read.
    """
    if metric not in METRICS:
        raise InputError(f"metric={metric} is not known; give one of {', '.join(METRICS)}")
    if not folders:
        raise InputError("no folder is given; give those of runs or sweeps, such as outputs")
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give those of runs or sweeps, such as outputs")
    rows, notes = gather(folders, metric)
    if not rows:
        where = ", ".join(map(str, folders))
        raise InputError("\n".join([f"no run's results.json under {where}; give the folder of a run or sweep", *notes]))
    rows = sorted(rows, key=lambda row: -row.share("validation"))
    kept, following = columns([row.runs[0].settings for row in rows])
    rows = [rows[0], *(tested(row, rows[0], metric) for row in rows[1:])]
    return Comparison(metric, tuple(kept), tuple(following), tuple(rows), tuple(notes))


def write(comparison: Comparison, folder: Path) -> None:
    """Write comparison.md, .csv, .json, .png and .svg into the folder, which is made, each whole or not at all."""
    from nvf.runs.comparison.figure import save  # matplotlib is slow to import

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise InputError(f"{folder} cannot be made a folder ({fault.strerror}); give another output") from None
    texts = {"md": comparison.markdown(), "csv": comparison.csv(), "json": comparison.json()}
    for ending, text in texts.items():
        with written_whole(folder / f"comparison.{ending}") as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    save(comparison, folder)


def summarize(folder: Path) -> str | None:
    """Compare what is under the folder and write it there: the table, and where the files are; None without runs."""
    if next(folder.rglob("results.json"), None) is None:
        return None
    try:
        comparison = compare([folder])
    except InputError as error:  # none that can be read
        return str(error)
    write(comparison, folder)
    return f"{comparison.text()}\n{where(folder)}"


def where(folder: Path) -> str:
    return f"written to {folder}: comparison.md, .csv, .json, .png, .svg"
