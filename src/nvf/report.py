"""`python -m nvf.report`: write report.html into the folder of a run or a sweep, for a browser and to hand on."""

from functools import partial
from pathlib import Path

from nvf.errors import InputError
from nvf.files.atomic import atomic_write
from nvf.options import folders, run
from nvf.runs.comparison.table import compare

NAME = "report.html"


def _write(given: list[Path]) -> str:
    """Write the page and return its path."""
    if len(given) != 1 or not given[0].is_dir():
        named = ", ".join(map(str, given)) or "nothing"
        raise InputError(f"{named} is not one folder; give that of a run or of a sweep, such as outputs/<date>/<time>")
    folder = given[0].absolute()
    if (folder / "results.json").is_file():
        from nvf.dashboards.page import run_page  # torch is slow to import, and bad input is said at once

        text = run_page(folder)
    elif (folder / "run.json").is_file():
        raise InputError(f"{folder} has no results.json: its run is not finished; python -m nvf.train resume={folder}")
    else:
        comparison = compare([folder])
        from nvf.dashboards.page import sweep_page

        jobs = sorted(path.parent for path in folder.glob("*/.hydra"))
        text = sweep_page(folder, comparison, [job.name for job in jobs if not (job / "results.json").is_file()])
    with atomic_write(folder / NAME) as partial_file:
        partial_file.write_text(text, encoding="utf-8")
    return str(folder / NAME)


if __name__ == "__main__":
    given, summary = folders(), (__doc__ or "").partition(": ")[2]
    run(partial(_write, given), program="nvf.report FOLDER", summary=summary, options=())
