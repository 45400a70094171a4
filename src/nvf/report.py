"""`python -m nvf.report`: write report.html into the folder of a run or a sweep, for a browser and to hand on."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nvf.dashboards.page import run_page, sweep_page
from nvf.errors import InputError
from nvf.files.atomic import atomic_write
from nvf.options import folders, run
from nvf.runs.comparison.table import compare
from nvf.runs.signals import command_to_resume


def report(folders: Sequence[Path]) -> str:
    """Write the page of the run or of the sweep in the one folder that is given, and return the page's path."""
    if len(folders) != 1 or not folders[0].is_dir():
        named = ", ".join(map(str, folders)) or "nothing"
        raise InputError(f"{named} is not one folder; give that of a run or of a sweep, such as outputs/<date>/<time>")
    folder = folders[0].absolute()
    if (folder / "results.json").is_file():
        text = run_page(folder)
    elif (folder / "run.json").is_file():
        raise InputError(f"{folder}: its run has no results yet; to finish it: {command_to_resume(folder)}")
    else:
        jobs = sorted(path.parent for path in folder.glob("*/.hydra"))
        unfinished = [job.name for job in jobs if not (job / "results.json").is_file()]
        text = sweep_page(folder, compare([folder]), unfinished)
    with atomic_write(folder / "report.html") as partial:
        partial.write_text(text, encoding="utf-8")
    return str(folder / "report.html")


if __name__ == "__main__":
    command, summary = partial(report, folders()), (__doc__ or "").partition(": ")[2]
    run(command, program="nvf.report FOLDER", summary=summary, options=())
