"""`python -m nvf.update`: add, replace and remove a pipeline's items, and log answered queries, without any fitting."""

import time
from pathlib import Path
from typing import Any

from nvf.errors import InputError
from nvf.options import Option, path, run
from nvf.statistics import two_digits

OPTIONS = (
    Option("pipeline", "the folder that a run saved: outputs/<date>/<time>/pipeline", read=path),
    Option("output", "the folder to write; the pipeline's own is replaced", read=path),
    Option("add", "a folder of items as data=embeddings reads it; an id that exists gets the new vector", None, path),
    Option("remove", "a .json list of ids, or of rows where there are no ids", None, path),
    Option("log", "a folder of queries.npy and targets.npy, ids where there are ids, or queries.parquet", None, path),
)


def update(*, pipeline: Path, output: Path, add: Path | None, remove: Path | None, log: Path | None) -> str:
    """Write the updated pipeline, and return the line that says what it holds."""
    # Imported here so that --help and an option's error answer without importing torch.
    from nvf.data.beside import read_texts
    from nvf.data.folder import open_items, read_log
    from nvf.files.ids import read_ids
    from nvf.models.pipeline import Pipeline
    from nvf.models.saved_pipeline import check_replaceable

    if add is None and remove is None and log is None:
        raise InputError("add=, remove= and log= are not set; give one of them at least")
    check_replaceable(output)
    start, model = time.perf_counter(), Pipeline.load(pipeline)
    change: dict[str, Any] = {"remove": () if remove is None else read_ids(remove, None)}
    if add is not None:
        items, ids = open_items(add)
        texts = None if model.words is None else read_texts(add, "corpus", len(items))
        change |= {"add": items.read(), "ids": ids, "texts": texts}
    if log is not None:
        queries, targets = read_log(log, by_id=model.memory.ids is not None)
        texts = None if model.words is None else read_texts(log, "queries", len(queries))
        change |= {"log": (queries, targets), "log_texts": texts}
    updated = model.updated(**change)
    updated.save(output)
    counts = f"{updated.memory.given:,} items, {model.memory.given:,} before"
    return f"{counts}, in {two_digits(time.perf_counter() - start)} s; the pipeline is in {output}"


if __name__ == "__main__":
    run(update, program="nvf.update", summary=(__doc__ or "").partition(": ")[2], options=OPTIONS)
