"""`python -m nvf.compare`: compare runs and sweeps in one table and one figure, best on validation first."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nvf.errors import InputError
from nvf.options import Option, folders, path, run
from nvf.runs.comparison.table import compare
from nvf.statistics import METRICS

FORMATS = ("text", "csv")
OPTIONS = (
    Option("format", f"what is printed: {', '.join(FORMATS)}", "text"),
    Option("metric", f"what is compared: {', '.join(METRICS)}", "top1"),
    Option("output", "a folder for comparison.md, .csv and .png; null: none of them", None, path),
)


def _show(folders: Sequence[Path], *, format: str, metric: str, output: Path | None) -> str:
    if format not in FORMATS:
        raise InputError(f"format={format} is not known; give one of {', '.join(FORMATS)}")
    comparison = compare(folders, metric)
    if format != "text":  # which includes them
        print(*comparison.notes, sep="\n", file=sys.stderr)
    if output is not None:
        from nvf.runs.comparison.figure import write  # matplotlib is slow to import

        print(write(comparison, output), file=sys.stderr)
    return str(getattr(comparison, format)())


if __name__ == "__main__":
    show, summary = partial(_show, folders()), (__doc__ or "").partition(": ")[2]
    run(show, program="nvf.compare FOLDER [FOLDER ...]", summary=summary, options=OPTIONS)
